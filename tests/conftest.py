"""Every test sees the repository root, one thread, and no display."""
import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.profiler import profile  # noqa: E402

torch.set_num_threads(1)


def peak_bytes(step):
    """The most that a step holds at once, of what it allocates itself, as torch's profiler sees."""
    with profile(profile_memory=True) as seen:
        step()
    events, peak = list(seen.profiler.kineto_results.experimental_event_tree()), 0
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            peak = max(peak, event.typed[1].total_allocated)
    return peak


@pytest.fixture(scope="session", autouse=True)
def made_once():
    """What nearly every test of train.py asks for again: its parser, and the shapes of latents."""
    if (train := sys.modules.get("train")) is None:
        yield
        return
    real, known = train.parts_of, {}

    def parts_of(cfg, shape):
        key = repr(cfg.autoencoder_config), shape
        if key not in known:
            known[key] = real(SimpleNamespace(autoencoder_config=cfg.autoencoder_config), shape)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_parser", functools.cache(train.make_parser))
        patch.setattr(train, "parts_of", parts_of)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """UL2, ByT5 and MetaCLIP in miniature, saved as their real counterparts are."""
    import text_cond
    text_cond.make_torchvision_importable()
    import transformers as tf
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + w, -3.0) for w in ("a", "red", "sign", "saying", "moving", "circle")]
    pieces += [(c, -5.0) for c in map(chr, range(33, 127))]
    tokenizer = tf.T5Tokenizer(vocab=pieces, extra_ids=0)
    for name, vocab in (("words", len(tokenizer)), ("bytes", 384)):
        cfg = tf.T5Config(vocab_size=vocab, d_model=24, d_ff=48, d_kv=8, num_heads=3, num_layers=2,
                          feed_forward_proj="gated-gelu" if name == "bytes" else "gated-silu")
        kind = tf.T5EncoderModel if name == "bytes" else tf.T5ForConditionalGeneration
        kind(cfg).save_pretrained(root / name)          # UL2's files hold its decoder too,
    tokenizer.save_pretrained(root / "words")
    letters = [chr(i) for i in range(33, 127)]
    vocab = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tf.CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[])
    n = len(vocab)
    cfg = tf.CLIPTextConfig(vocab_size=n, hidden_size=40, intermediate_size=64,
                            num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=77,
                            bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                image_size=8, patch_size=4)
    both = tf.CLIPConfig(text_config=cfg.to_dict(), vision_config=eyes, projection_dim=8)
    tf.CLIPModel(both).save_pretrained(root / "concepts")           # and MetaCLIP's both towers
    tokenizer.save_pretrained(root / "concepts")
    return {name: str(root / name) for name in text_cond.ENCODERS}
