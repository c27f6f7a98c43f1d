"""text_cond.py against transformers, against unpadded runs, and against what users type."""
import json
import math
import os
import subprocess
import sys
import warnings
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import text_cond
from text_cond import (
    ENCODERS,
    PRESETS,
    TextConditioner,
    TextConfig,
    byte_ids,
    seen_by,
    words_of,
)

ROOT = Path(__file__).resolve().parent.parent
TOY = TextConfig("toy", dim=32, width=32, heads=2)
SIGN = 'a red sign saying "CAT" moving left'
PROMPTS = ["a red circle moving left", SIGN, 'a white sign saying "B" moving up fast', "", "blue"]


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return TextConditioner(TOY).eval()


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_toy_encoders_in_another_precision(dtype, layers):
    torch.manual_seed(0)
    text = TextConditioner(replace(TOY, layers=layers)).eval()
    features, z = text.encode(PROMPTS), torch.randn(len(PROMPTS), 4, 2, 8, 8)
    with torch.no_grad():
        want, loss = text(features)[0], text.align(features, z)
        text.to(dtype)
        got, near = text(features)[0], text.align(features, z)
    assert got.dtype == dtype and (got - want).abs().max() < 0.1
    assert near.item() == pytest.approx(loss.item(), rel=0.1)


# ---- prompts ----

@pytest.mark.parametrize("prompt,text", [
    ('saying "CAT"', "CAT"), ("saying “CAT”", "CAT"), ("sagt „KATZE“", "KATZE"),
    ("dit «CHAT»", "CHAT"), ("»CAT« und »DOG«", "CAT\nDOG"), ("säger ”KATT”", "KATT"),
    ("｢猫｣", "猫"), ('a 5" tall sign saying "CAT"', "CAT"),
    ("a 5” tall sign saying “CAT”", "CAT"),
    ("写着「猫」", "猫"), ("写着『小猫』", "小猫"), ("＂猫＂", "猫"),
    ('"A" and "B C"', "A\nB C"), ('signs "A" 「B」', "A\nB"), ("a dog's life", ""), ('5" tall', ""),
    ('an open "quote', ""), ('""', ""), ('" "', ""), ('"👋🏽"', "👋🏽"), ('"שלום"', "שלום")])
def test_the_byte_encoder_is_given_what_stands_in_quotes(prompt, text):
    assert seen_by("FPS-16 zoom out. " + prompt)["bytes"] == text


def test_an_accent_typed_in_two_ways_is_one_prompt(toy):
    one, two = 'a café saying "É"', 'a cafe\u0301 saying "E\u0301"'
    assert one != two and seen_by(one) == seen_by(two)
    features = toy.encode([one, two])
    assert all(torch.equal(x[0], x[1]) for x in features.values())


@pytest.mark.parametrize("prompt,says", [
    ("a \ud83d b", "a lone surrogate"), ("a\0b", "a NUL"), (7, "not text"), (None, "not text"),
    (b"bytes", "not text")])
def test_what_is_no_text_is_one_line(toy, prompt, says):
    with pytest.raises(ValueError) as e:
        toy.encode(["fine", prompt])
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("prompts", [[], "abc", None])
def test_a_list_of_prompts_is_asked_for(toy, prompts):
    with pytest.raises(ValueError, match="not a list of 1 or more texts"):
        toy.encode(prompts)


def test_the_frame_rate_in_front_of_a_prompt_changes_p_and_not_the_sign(toy):
    assert seen_by(f"FPS-16 {SIGN}")["bytes"] == "CAT"
    plain, fast, slow = (toy(toy.encode([p + SIGN]))[0] for p in ("", "FPS-16 ", "FPS-24 "))
    assert fast.shape == slow.shape and (fast - slow).abs().max() > 0.01
    assert plain.shape[1] == fast.shape[1] - 1


# ---- tokenizers ----

def test_byte_tokens():
    assert byte_ids("A") == [68, 1] and len(byte_ids("é")) == 3 and byte_ids("") == []
    assert byte_ids("猫") == [b + 3 for b in "猫".encode()] + [1]


@pytest.mark.parametrize("text", ["CAT", "é", "猫と犬", "👨‍👩‍👧", "שלום", "a b\nc", "</s>x"])
def test_byte_tokens_equal_transformers(text):
    text_cond.make_torchvision_importable()
    from transformers import ByT5Tokenizer
    if "</s>" in text:                  # transformers reads its special tokens out of user text:
        assert byte_ids(text) == [b + 3 for b in text.encode()] + [1]       # a sign may say </s>
    else:
        assert byte_ids(text) == ByT5Tokenizer()(text).input_ids


def test_toy_words_hide_the_quoted_letters_and_nothing_else():
    assert words_of('A Red, sign saying "CAT" (fast)!') == [
        "a", "red", "sign", "saying", "<quoted>", "fast", "<end>"]
    assert words_of("") == ["<end>"] and words_of('"A""B"').count("<quoted>") == 2
    features = TextConditioner(TOY).encode([SIGN, SIGN.replace("CAT", "DOG")])
    assert torch.equal(features["words"][0], features["words"][1])
    assert torch.equal(features["concepts"][0], features["concepts"][1])
    assert not torch.equal(features["bytes"][0], features["bytes"][1])


def test_word_ids_need_no_vocabulary_and_are_the_same_everywhere():
    assert text_cond.word_id("red") == 1 + zlib.crc32(b"red") % 2 ** 20
    assert [text_cond.word_id(w) for w in ("red", "zyzzyva", "猫")] == [90000, 616678, 963089]
    world = words_of("red green blue yellow white orange purple cyan circle square triangle star "
                     "moving left right up down up-left up-right down-left down-right fast slowly "
                     'sign saying "A" and a fps-16 fps-24')
    assert len({text_cond.word_id(w) for w in world}) == len(world)


def test_words_that_share_a_digit_of_their_id_are_told_apart():
    torch.manual_seed(0)
    embed = text_cond.WordEmbedding(16)
    a, b, c = embed(torch.tensor([1 + 5 * 1024 + 7, 1 + 5 * 1024 + 8, 1 + 6 * 1024 + 7]))
    assert min((a - b).norm(), (a - c).norm(), (b - c).norm()) > 1
    assert torch.equal(a, embed.high.weight[5] + embed.low.weight[7])


def test_long_prompts_are_cut_with_a_warning_and_keep_their_end():
    model = TextConditioner(replace(TOY, max_words=6, max_bytes=4, max_concepts=3))
    with pytest.warns(UserWarning) as said:
        f = model.encode(['a b c d e f g "CATTLE"'])
    assert {str(w.message)[:24] for w in said} == {
        "words: 9 tokens cut to 6", "bytes: 7 tokens cut to 4", "concepts: 8 tokens cut t"}
    end = text_cond.word_id("<end>")
    assert f["words"].shape == (1, 6) and f["words"][0, -1] == end
    assert f["bytes"].tolist() == [[70, 68, 87, 1]] and f["concepts"].shape == (1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextConditioner(TOY).encode([SIGN])


# ---- P and its mask ----

def test_p_is_three_segments_as_long_as_the_batch_needs(toy):
    P, mask = toy(toy.encode(PROMPTS))
    assert P.shape == (5, 9 + 4 + 1, 32) and mask.dtype == torch.bool
    counts = [(6, 0), (8, 4), (9, 2), (1, 0), (2, 0)]
    P, mask = toy(toy.encode(PROMPTS[:1] + PROMPTS[3:]))
    assert P.shape[1] == 6 + 0 + 1                      # nothing quoted, no byte tokens at all
    for i, (w, b) in enumerate(counts):
        P, mask = toy(toy.encode([PROMPTS[i]]))
        assert mask.all() and P.shape[1] == w + b + 1
    assert all(mask.any() for mask in toy(toy.encode(PROMPTS))[1])


def test_a_row_does_not_depend_on_what_else_is_in_the_batch(toy):
    features = toy.encode(PROMPTS)
    P, mask = toy(features)
    for i, prompt in enumerate(PROMPTS):
        alone, there = toy(toy.encode([prompt]))
        assert there.all()
        assert torch.allclose(P[i][mask[i]], alone[0], atol=1e-5)
        some = {k: x[i:i + 1] for k, x in features.items()}        # padded for the whole cache
        again, there = toy(some)
        assert again.shape == alone.shape and torch.allclose(again, alone, atol=1e-5)


def test_padding_is_zero_and_a_token_has_mean_0_and_std_1(toy):
    P, mask = toy(toy.encode(PROMPTS))
    assert P[~mask].abs().max() == 0 and int((~mask).sum()) > 10
    assert P[mask].mean(-1).abs().max() < 1e-5
    assert (P[mask].std(-1, correction=0) - 1).abs().max() < 1e-3


def test_the_order_of_letters_and_of_words_is_in_the_tokens(toy):
    """As sets of tokens, which is all that the cross-attention sees, CAT and ACT differ."""
    as_set = lambda p: toy(toy.encode([p]))[0][0].sum(0)
    cat, act = (as_set(f'a sign saying "{w}"') for w in ("CAT", "ACT"))
    assert (cat - act).abs().max() > 0.01
    a, b = (as_set(f"a {x} circle and a {y} square") for x, y in (("red", "blue"), ("blue", "red")))
    assert (a - b).abs().max() > 0.01


def test_the_bag_of_concepts_has_no_order_and_no_count(toy):
    f = toy.encode(["a red circle and a blue square", "square and blue a circle red", "red red"])
    assert torch.equal(f["concepts"][0], f["concepts"][1])
    x = toy.features_of("concepts", f)[0]
    assert x.shape == (3, 1, 32) and torch.allclose(x[0], x[1], atol=1e-6)
    y = toy.features_of("concepts", toy.encode(["red"]))[0]
    assert torch.allclose(x[2], y[0], atol=1e-6)
    word = toy.encoders["concepts"].embedding(torch.tensor(text_cond.word_id("red")))
    assert torch.allclose(y[0, 0], toy.encoders["concepts"].mlp(word), atol=1e-6)


# ---- dropping conditions ----

def test_a_dropped_encoder_is_one_null_token(toy):
    f = toy.encode(PROMPTS)
    drop = torch.zeros(5, 3, dtype=torch.bool)
    drop[0] = True
    drop[1, 1] = True
    drop[3] = True                                      # the empty prompt too
    P, mask = toy(f, drop)
    null, ones = toy.null_tokens(5)
    assert null.shape == (5, 3, 32) and ones.all()
    assert (P[0][mask[0]] - null[0]).abs().max() < 1e-5
    assert (P[3][mask[3]] - null[0]).abs().max() < 1e-5
    kept = toy(f)
    words = mask[1, :9]
    assert torch.allclose(P[1, :9][words], kept[0][1, :9][words], atol=1e-6)
    assert torch.allclose(P[1, 9], null[0, 1], atol=1e-5) and not mask[1, 10]
    assert torch.allclose(P[2][mask[2]], kept[0][2][kept[1][2]], atol=1e-6)
    P, mask = toy(f, torch.ones(5, dtype=torch.bool))
    assert P.shape == (5, 3, 32) and torch.allclose(P, null, atol=1e-5) and mask.all()


def test_no_row_is_ever_fully_masked_and_everything_is_finite(toy):
    g = torch.Generator().manual_seed(0)
    f = toy.encode(PROMPTS)
    for independent in (False, True):
        for p in (0.0, 0.5, 1.0):
            P, mask = toy(f, toy.drop_mask(5, p, g, independent))
            assert mask.any(1).all() and P.isfinite().all()
            P.sum().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in toy.parameters())
    toy.zero_grad()


def test_rates_of_dropping(toy):
    n, p = 20_000, 0.1
    g = torch.Generator().manual_seed(0)
    error = 4 * math.sqrt(p * (1 - p) / n)
    joint = toy.drop_mask(n, p, g)
    assert joint.shape == (n, 3) and (joint.all(1) == joint.any(1)).all()
    assert abs(joint[:, 0].float().mean() - p) < error
    assert 0 < joint[:1000].any(1).sum() < 1000         # each sample draws for itself
    each = toy.drop_mask(n, p, g, independent=True)
    assert abs(each.all(1).float().mean() - p) < error
    assert (each.float().mean(0) - 0.4642).abs().max() < 4 * math.sqrt(0.25 / n)
    again = toy.drop_mask(n, p, torch.Generator().manual_seed(0))
    assert torch.equal(again, joint)


def test_every_weight_is_trained():
    torch.manual_seed(0)
    model = TextConditioner(TOY)
    f = model.encode(PROMPTS)
    P, mask = model(f, torch.tensor([True, False, False, False, False]))
    target = torch.randn_like(P)
    ((P - target).square().sum() + model.align(f, torch.randn(5, 4, 4, 8, 8))).backward()
    assert [n for n, w in model.named_parameters() if w.grad is None or not w.grad.any()] == []


# ---- aligning concepts with pictures ----

def test_align_is_clips_loss_with_all_right_answers():
    torch.manual_seed(0)
    model = TextConditioner(TOY).double()
    f = model.encode(["red circle", "circle red", "blue square", 'a sign "A"', 'a sign "B"'])
    z = torch.randn(5, 8, 2, 4, 4, dtype=torch.float64)             # 8 x 2 x 4 x 4 = 256 numbers
    a = model.text_to_common(model.encoders["concepts"](f["concepts"])[:, 0])
    b = model.latent_to_common(z.flatten(1))
    s = model.scale.exp()
    right = [[0, 1], [0, 1], [2], [3, 4], [3, 4]]
    want = 0
    for i in range(5):
        for x, y in ((a, b), (b, a)):
            scores = torch.stack([s * (x[i] @ y[j]) / x[i].norm() / y[j].norm() for j in range(5)])
            logp = scores - scores.exp().sum().log()
            want -= sum(logp[j] for j in right[i]) / len(right[i]) / 10
    assert abs(model.align(f, z) - want) < 1e-10


@pytest.mark.parametrize("shape", [(4, 8, 4, 8, 8), (4, 16, 1, 6, 10), (4, 4928), (4, 100)])
def test_align_takes_any_latent(toy, shape):
    assert toy.align(toy.encode(PROMPTS[:4]), torch.randn(shape)).isfinite()


def test_aligning_teaches_the_bag_which_picture_is_meant():
    torch.manual_seed(0)
    model = TextConditioner(TOY)
    names = ["red circle", "blue circle", "red square", "blue square"]
    pictures = torch.randn(4, 4, 2, 4, 4)
    f = model.encode(names * 4)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        z = pictures.repeat(4, 1, 1, 1, 1) + 0.3 * torch.randn(16, 4, 2, 4, 4)
        loss = model.align(f, z)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[0] > math.log(16) - 1 and losses[-1] < math.log(4) + 0.1      # 4 right answers


# ---- the pretrained encoders, small and with random weights ----

def pretrained(folders, **change):
    torch.manual_seed(0)
    change = {"precision": "fp32", **change}
    return TextConditioner(TextConfig("pretrained", dim=32, **folders, **change)).eval()


def reference(folders, name, text, dtype=torch.float32):
    """transformers alone, one prompt, nothing padded."""
    import transformers as tf
    kind = tf.CLIPTextModel if name == "concepts" else tf.T5EncoderModel
    model = kind.from_pretrained(folders[name], dtype=dtype).eval()
    tokenizer = tf.ByT5Tokenizer() if name == "bytes" else tf.AutoTokenizer.from_pretrained(
        folders[name])
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def test_features_equal_those_of_transformers_padded_or_not(folders):
    model = pretrained(folders)
    f = model.encode(["FPS-16 " + p for p in PROMPTS])
    for name in ENCODERS:
        for i, prompt in enumerate(PROMPTS):
            x = f[name][i][f[name + "_mask"][i]]
            text = seen_by("FPS-16 " + prompt)[name]
            if name == "bytes" and not text:
                assert len(x) == 0
                continue
            assert (x - reference(folders, name, text)).abs().max() < 1e-5, (name, prompt)
        assert f[name][~f[name + "_mask"]].abs().max() == 0         # features behind a row
    alone = model.encode(["FPS-16 " + PROMPTS[1]])
    for name in ENCODERS:
        x = f[name][1][f[name + "_mask"][1]]
        assert torch.allclose(x, alone[name][0], atol=1e-5)


def test_bf16_is_the_default_and_close(folders):
    f = pretrained(folders, precision="bf16").encode([SIGN])
    for name in ENCODERS:
        want = reference(folders, name, seen_by(SIGN)[name])
        assert f[name].dtype == torch.bfloat16
        assert (f[name][0].float() - want).norm() / want.norm() < 0.03
    assert TextConfig().precision == "bf16"


def test_p_from_pretrained_features(folders):
    model = pretrained(folders)
    f = model.encode(PROMPTS)
    P, mask = model(f)
    assert P.shape[-1] == 32 and mask.any(1).all() and P[~mask].abs().max() == 0
    assert not any(p.numel() > 40 * 32 for p in model.parameters())     # the encoders are not in it
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    for i in (0, 1, 3):
        alone, there = model(model.encode(PROMPTS[i:i + 1]))
        assert there.all() and torch.allclose(P[i][mask[i]], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match="frozen"):
        model.align(f, torch.randn(5, 8))
    P, mask = model(f, torch.ones(5, 3, dtype=torch.bool))
    assert torch.allclose(P, model.null_tokens(5)[0], atol=1e-5) and mask.all()


def test_metaclip_beyond_77_tokens(folders):
    """Up to 77 the original positions; beyond, 20 kept and the rest stretched to the limit."""
    import transformers as tf
    model = pretrained(folders, max_concepts=256)
    short, long = "a" * 70, "b" * 200
    f = model.encode([short, long])
    x, y = (f["concepts"][i][f["concepts_mask"][i]] for i in (0, 1))
    assert (x - reference(folders, "concepts", short)).abs().max() < 1e-5
    assert len(y) == 202
    clip = tf.CLIPTextModel.from_pretrained(folders["concepts"]).eval()
    old = clip.embeddings.position_embedding.weight.data
    new = torch.empty(256, 40)
    for i in range(256):                                # row 20 + j reads old row 20 + 56 j / 235
        place = i if i < 20 else 20 + (i - 20) * 56 / 235
        low = min(int(place), 75)
        new[i] = old[low] + (place - low) * (old[low + 1] - old[low])
    clip.embeddings.position_embedding = torch.nn.Embedding.from_pretrained(new)
    clip.embeddings.position_ids = torch.arange(256)[None]
    ids = tf.AutoTokenizer.from_pretrained(folders["concepts"])(long, return_tensors="pt").input_ids
    with torch.no_grad():
        assert (y - clip(ids).last_hidden_state[0]).abs().max() < 1e-4
    with pytest.warns(UserWarning, match="cut to 256"):
        f = model.encode(["c" * 400])
    assert f["concepts"].shape[1] == 256


def test_one_encoder_at_a_time_is_in_memory(folders, monkeypatch):
    import weakref
    alive, most, load = weakref.WeakSet(), [0], text_cond.load_encoder

    def watched(*args):
        model = load(*args)
        alive.add(model)
        most[0] = max(most[0], len(alive))
        return model
    monkeypatch.setattr(text_cond, "load_encoder", watched)
    pretrained(folders).encode([SIGN])
    assert most[0] == 1
    pretrained(folders, offload="never").encode([SIGN])
    assert most[0] == 3


def test_in_bf16_too_a_prompt_does_not_depend_on_what_is_beside_it(folders):
    model = pretrained(folders, precision="bf16")
    together = model.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = model.encode([prompt])
        for name in ENCODERS:
            x, y = (f[name][r][f[name + "_mask"][r]].float()
                    for f, r in ((together, i), (alone, 0)))
            assert x.shape == y.shape and torch.allclose(x, y, atol=0.05, rtol=0.02), name


@pytest.mark.parametrize("offload,held", [("disk", ()), ("cpu", ENCODERS), ("never", ENCODERS)])
def test_where_an_encoder_waits(folders, offload, held):
    model = pretrained(folders, offload=offload)
    a, b = model.encode([SIGN]), model.encode([SIGN])
    assert sorted(model.frozen) == sorted(held)
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    assert not any(w.requires_grad for _, m in model.frozen.values() for w in m.parameters())


def test_a_wrong_source_is_one_line(folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="words .*none: no such folder"):
        pretrained({**folders, "words": str(tmp_path / "none")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="concepts .*empty: neither a folder with") as e:
        pretrained({**folders, "concepts": str(tmp_path / "empty")})
    assert "\n" not in str(e.value)
    import shutil
    shutil.copytree(folders["words"], tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="words .*short: neither a folder with"):
        pretrained({**folders, "words": str(tmp_path / "short")}).encode([SIGN])
    # transformers reads a model of another kind, too, with weights that it draws at random
    odd = {**folders, "words": folders["concepts"]}
    with pytest.raises(ValueError, match="words .*not the weights of a T5Enc.* is missing$"):
        pretrained(odd).encode([SIGN])
    with pytest.raises(ValueError, match="words .*: a model of type clip, not T5"):
        text_cond.check_sources(TextConfig("pretrained", **odd))
    with pytest.raises(ValueError, match="concepts .*: a model of type t5, not CLIP"):
        text_cond.check_sources(TextConfig("pretrained", **{**folders, "concepts": odd["bytes"]}))
    text_cond.check_sources(TextConfig("pretrained", **folders))
    text_cond.check_sources(TextConfig("toy"))
    for content in (None, "version https://git-lfs.github.com/spec/v1"):    # as git leaves it
        file.write_text(content) if content else file.unlink()
        short = TextConfig("pretrained", **{**folders, "words": str(file.parent)})
        with pytest.raises(ValueError, match="words .*short: no weights there"):
            text_cond.check_sources(short)
    monkeypatch.setitem(text_cond.WIDTHS, folders["bytes"], 99)
    with pytest.raises(ValueError, match="24 features per token, not the 99"):
        pretrained(folders).encode([SIGN])


def test_known_widths():
    assert text_cond.width_of("words", "google/ul2") == 4096
    assert text_cond.width_of("bytes", "google/byt5-small") == 1472
    assert text_cond.width_of("concepts", "facebook/metaclip-h14-fullcc2.5b") == 1024


# ---- the rest ----

def test_features_are_tensors_to_be_saved_and_indexed(toy, tmp_path):
    from safetensors.torch import load_file, save_file
    f = toy.encode(PROMPTS)
    save_file(f, tmp_path / "text.safetensors")
    g = load_file(tmp_path / "text.safetensors")
    assert set(f) == set(ENCODERS) and all(len(x) == 5 for x in f.values())
    pick = torch.tensor([3, 1])
    P, mask = toy({k: x[pick] for k, x in g.items()})
    assert torch.allclose(P, toy(toy.encode(["", SIGN]))[0], atol=1e-6)


def test_a_config_survives_json_and_names_what_is_wrong():
    for cfg in PRESETS.values():
        assert TextConfig(**json.loads(json.dumps(asdict(cfg)))) == cfg
    for change, says in (({"mode": "real"}, "mode real: not one of toy, pretrained"),
                         ({"offload": "gpu"}, "offload gpu"), ({"precision": "fp8"}, "fp8"),
                         ({"max_words": 1}, "max_words 1"), ({"heads": 3}, "heads 3")):
        with pytest.raises(ValueError, match=says):
            replace(TOY, **change)


def run(folder, *args):
    """text_cond.py copied alone into an empty folder."""
    source = (ROOT / "text_cond.py").read_text(encoding="utf-8")
    (folder / "text_cond.py").write_text(source, encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8",
           "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "text_cond.py", *args], cwd=folder, env=env,
                          capture_output=True, timeout=300, encoding="utf-8")


def test_what_each_encoder_sees(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text_cond.py", "FPS-16 zoom out. " + SIGN])
    text_cond.main()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "fps-16 zoom out a red sign saying <quoted> moving left <end>"
    assert lines[3] == "C A T <end>" and "4 tokens (limit 128)" in lines[2]
    assert sorted(lines[5].split()) == sorted(set(lines[1].split()) - {"<end>"})


@pytest.mark.parametrize("args", [
    ["--steps", "0"], ["--fsp", "16"], ["a\ud83db"]])
def test_bad_arguments_are_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text_cond.py", *args])
    with pytest.raises(SystemExit) as e:
        text_cond.main()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_demo_that_has_not_learnt_fails(tmp_path):
    done = run(tmp_path, "--steps", "2")
    assert done.returncode == 1 and "FAIL letters of held-out words, through bytes" in done.stdout
    assert (tmp_path / "out/text_cond/spelling.png").stat().st_size > 10_000


@pytest.mark.parametrize("lost", ENCODERS)
def test_without_an_encoder_nothing_depends_on_it(lost):
    torch.manual_seed(0)
    text = TextConditioner(TextConfig("toy", 48, width=32, without=lost))
    prompts = ['a red sign saying "CAT" moving left', "a blue circle moving up fast"]
    features = text.encode(prompts)
    P, mask = text(features)
    other = {k: v.flip(0) if k == lost else v for k, v in features.items()}
    assert torch.equal(P, text(other)[0]) and torch.equal(mask, text(other)[1])
    for name in set(ENCODERS) - {lost}:
        other = {k: v.flip(0) if k == name else v for k, v in features.items()}
        made = text(other)[0]
        assert made.shape != P.shape or not torch.allclose(made, P)
    drop = torch.tensor([True, False])
    dropped, left = text(features, drop)
    assert left[0].sum() == 3
    assert torch.allclose(dropped[0][left[0]], text.null_tokens(1)[0][0], atol=1e-5)
    with pytest.raises(ValueError, match="without none"):
        TextConfig("toy", without="none")
