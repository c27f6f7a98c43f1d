"""dit.py against independent oracles: formulas written out again, Conv3d."""
import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dit
from dit import CONDITIONINGS, PRESETS, DiT, DiTConfig, Stream

ROOT = Path(__file__).resolve().parent.parent
SMALL = DiTConfig((Stream(4, (1, 2, 2), (4, 8, 8)),), dim=48, depth=3, heads=4)
VIDTWIN = (Stream(4, (2, 2, 2), (4, 4, 4)), Stream(3, (1, 2, 1), (4, 4, 1)),
           Stream(3, (1, 1, 2), (4, 1, 4)))


def make(cfg=SMALL, awake=False, dtype=torch.float32, seed=0):
    """A model; awake: every weight is random, as after training (at first most branches are 0)."""
    torch.manual_seed(seed)
    model = DiT(cfg).to(dtype)
    if awake:
        with torch.no_grad():
            for w in model.parameters():
                w.add_(torch.randn_like(w), alpha=0.1)
    return model


def batch(model, B=2, L=5, size=None, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    s = model.cfg.streams
    if len(s) == 1:
        shape = (B, s[0].channels, *(size or s[0].size))
    else:
        shape = (B, sum(x.numel for x in s))
    r = lambda *n: torch.randn(*n, generator=g, dtype=dtype)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, L - 2:] = False
    return r(*shape), torch.rand(B, generator=g), r(B, L, model.cfg.text_width), mask


# ---- initialisation ----

@pytest.mark.parametrize("adaln", ["shared", "per_block"])
def test_at_first_the_blocks_are_the_identity_plus_positions_and_the_output_is_zero(adaln):
    model = make(replace(SMALL, adaln=adaln))
    x, t, text, mask = batch(model)
    assert torch.equal(model(x, t, text, mask), torch.zeros_like(x))
    pos, c = model.positions(x.shape), model.condition(t)
    h = want = model.embed(model.patchify(x))
    for block in model.blocks:
        h, want = block(h, pos, c, text, mask), want + pos
    assert torch.equal(h, want)
    assert pos.std() > 0.01                             # so that the line above says something


def test_weights_wake_up_in_three_steps():
    """Step 0: the last Linear alone. Step 1: what feeds it directly. Step 2: behind the gates."""
    model = make()
    x, t, text, mask = batch(model, B=4)
    target = torch.randn_like(x)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    first = {}
    for step in range(4):
        opt.zero_grad()
        (model(x, t, text, mask) - target).square().mean().backward()
        for name, w in model.named_parameters():
            if w.grad is not None and w.grad.abs().max() > 0:
                first.setdefault(name, step)
        opt.step()
    step0 = {n for n, s in first.items() if s == 0}
    step1 = {n for n, s in first.items() if s == 1}
    step2 = {n for n, s in first.items() if s == 2}
    assert step0 == {"head.out.weight", "head.out.bias"}
    blocks = range(SMALL.depth)
    assert step1 == {"head.adaln.weight", "head.adaln.bias", "adaln.weight", "adaln.bias",
                     "embed.weight", "embed.bias", *(f"tables.0.{i}" for i in range(3)),
                     *(f"blocks.{i}.table" for i in blocks),
                     *(f"blocks.{i}.cross_attention.out.weight" for i in blocks)}
    assert step2 == {n for n, _ in model.named_parameters()} - step0 - step1
    assert set(first) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("conditioning,adaln", dit.VARIANTS)
def test_every_conditioning_starts_at_zero_trains_every_weight_and_feels_t(conditioning, adaln):
    cfg = replace(SMALL, conditioning=conditioning, adaln=adaln, qk_norm=True)
    model = make(cfg)
    x, t, text, mask = batch(model, B=4)
    assert torch.equal(model(x, t, text, mask), torch.zeros_like(x))
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        opt.zero_grad()
        (model(x, t, text, mask) - x).square().mean().backward()
        opt.step()
    still = [n for n, w in model.named_parameters() if w.grad is None or w.grad.abs().max() == 0]
    assert still == []
    model = make(cfg, awake=True)
    a, b = (model(x, torch.full((4,), s), text, mask) for s in (0.2, 0.7))
    assert (a - b).abs().max() > 1e-3


def plain_block(p, heads, h, text, mask):
    """A block whose norms have a learned shift and scale and no gates, by `reference_block`."""
    table, zero, one = p["table"], torch.zeros(1, h.shape[-1]), torch.ones(1, h.shape[-1])
    m = [table[0][None], table[1][None], one, table[2][None], table[3][None], one]
    return reference_block(p, heads, h, zero, m, text, mask)


def test_in_context_is_one_more_video_token_without_a_position():
    model = make(replace(SMALL, conditioning="in_context"), awake=True)
    x, t, text, mask = batch(model)
    e = model.time(dit.timestep_embedding(t))[:, None]
    pos = model.positions(x.shape)
    h = torch.cat([model.embed(model.patchify(x)), e], dim=1)
    for block in model.blocks:
        h = torch.cat([h[:, :64] + pos, h[:, 64:]], dim=1)
        h = plain_block(dict(block.named_parameters()), 4, h, text, mask)
    shift, scale = model.head.table
    norm = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = (norm * (1 + scale) + shift)[:, :64] @ model.head.out.weight.T + model.head.out.bias
    assert torch.allclose(model(x, t, text, mask), model.unpatchify(out, x.shape), atol=1e-5)


def test_cross_attention_conditioning_is_one_more_text_token_which_no_mask_hides():
    model = make(replace(SMALL, conditioning="cross_attention"), awake=True)
    x, t, text, mask = batch(model)
    h, pos, c = model.embed(model.patchify(x)), model.positions(x.shape), model.condition(t)
    longer, seen = torch.cat([text, c], dim=1), torch.cat([mask, torch.ones(2, 1).bool()], dim=1)
    block = model.blocks[0]
    want = plain_block(dict(block.named_parameters()), 4, h + pos, longer, seen)
    assert torch.allclose(block(h, pos, c, text, mask), want, atol=1e-5)
    want = plain_block(dict(block.named_parameters()), 4, h + pos, longer, None)
    assert torch.allclose(block(h, pos, c, text), want, atol=1e-5)


def test_adaln_is_adaln_zero_with_open_gates():
    model = make(replace(SMALL, conditioning="adaln"), awake=True)
    x, t, text, mask = batch(model)
    h, pos, c = model.embed(model.patchify(x)), model.positions(x.shape), model.condition(t)
    block = model.blocks[0]
    four, one = (c[:, 1:] + block.table).unbind(1), torch.ones(2, 48)
    m = [four[0], four[1], one, four[2], four[3], one]
    want = reference_block(dict(block.named_parameters()), 4, h, pos, m, text, mask)
    assert torch.allclose(block(h, pos, c, text, mask), want, atol=1e-5)


# ---- the block, derived again ----

def reference_block(p, heads, h, pos, m, text, mask, qk_weight=None):
    """Movie Gen's block from loops and sums; m: DiT's six, shift, scale, gate twice."""
    norm = lambda x: x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** 0.5
    def attention(q, k, v, allowed, weights=None):
        out = torch.zeros_like(q)
        d = q.shape[-1] // heads
        for i in range(heads):
            a, b, c = (x[..., i * d:(i + 1) * d] for x in (q, k, v))
            if weights is not None:
                a, b = norm(a) * weights[0], norm(b) * weights[1]
            s = torch.einsum("bnd,bld->bnl", a, b) / math.sqrt(d)
            if allowed is not None:
                s = s - 1e30 * (~allowed)[:, None, :]
            e = torch.exp(s - s.max(-1, keepdim=True).values)
            e = e / e.sum(-1, keepdim=True)
            out[..., i * d:(i + 1) * d] = torch.einsum("bnl,bld->bnd", e, c)
        return out
    m = [x[:, None, :] for x in m]
    D = h.shape[-1]
    h = h + pos
    x = norm(h) * (1 + m[1]) + m[0]
    q, k, v = (x @ p["self_attention.qkv.weight"][i * D:(i + 1) * D].T for i in range(3))
    h = h + m[2] * (attention(q, k, v, None, qk_weight) @ p["self_attention.out.weight"].T)
    q = norm(h) @ p["cross_attention.q.weight"].T
    k, v = (text @ p["cross_attention.kv.weight"][i * D:(i + 1) * D].T for i in range(2))
    h = h + attention(q, k, v, mask) @ p["cross_attention.out.weight"].T
    x = norm(h) * (1 + m[4]) + m[3]
    ffn = p["ffn.down.weight"].shape[1]
    gate, up = x @ p["ffn.gate_up.weight"][:ffn].T, x @ p["ffn.gate_up.weight"][ffn:].T
    return h + m[5] * ((gate / (1 + torch.exp(-gate)) * up) @ p["ffn.down.weight"].T)


@pytest.mark.parametrize("adaln", ["shared", "per_block"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_equals_its_formula_in_float64_forward_and_gradient(adaln, qk_norm):
    cfg = replace(SMALL, adaln=adaln, qk_norm=qk_norm, text_dim=20)
    model = make(cfg, awake=True, dtype=torch.float64)
    block = model.blocks[1]
    x, t, text, mask = batch(model, dtype=torch.float64)
    with torch.no_grad():
        h, pos, c = model.embed(model.patchify(x)), model.positions(x.shape), model.condition(t)
    inputs = [v.detach().clone().requires_grad_() for v in (h, pos, c, text)]
    h, pos, c, text = inputs
    p = dict(block.named_parameters())
    if adaln == "per_block":                            # DiT: Linear(silu(c)).chunk(6)
        e = c[:, 0]
        m = ((e / (1 + torch.exp(-e))) @ p["adaln.weight"].T + p["adaln.bias"]).chunk(6, dim=1)
    else:                                               # PixArt: the shared six plus the table
        m = [c[:, 1 + i] + p["table"][i] for i in range(6)]
    qk_weight = p.get("self_attention.qk_weight")
    expected = reference_block(p, cfg.heads, h, pos, m, text, mask, qk_weight)
    found = block(h, pos, c, text, mask)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-10
    probe = torch.randn(found.shape, dtype=torch.float64)
    wanted = inputs + list(p.values())
    got = torch.autograd.grad((found * probe).sum(), wanted, retain_graph=True)
    want = torch.autograd.grad((expected * probe).sum(), wanted)
    for a, b in zip(got, want):
        assert (a - b).abs().max() < 1e-10 * max(1, b.abs().max().item())
    assert all(g.abs().max() > 0 for g in want)


def test_the_shared_modulation_is_one_linear_of_silu_of_the_time_embedding():
    model = make(awake=True, dtype=torch.float64)
    t = torch.tensor([0.1, 0.8])
    c = model.condition(t)
    assert c.shape == (2, 7, 48)
    six = F.linear(F.silu(c[:, 0]), model.adaln.weight, model.adaln.bias)
    assert torch.allclose(c[:, 1:].flatten(1), six, atol=1e-12)


def test_the_head_is_dits_final_layer():
    model = make(awake=True, dtype=torch.float64)
    c, h = model.condition(torch.rand(2)), torch.randn(2, 7, 48, dtype=torch.float64)
    m = F.linear(F.silu(c[:, 0]), model.head.adaln.weight, model.head.adaln.bias)
    shift, scale = m.chunk(2, dim=1)
    y = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]
    want = y @ model.head.out.weight.T + model.head.out.bias
    assert (model.head(h, c) - want).abs().max() < 1e-12


def test_the_timestep_embedding_turns_a_thousand_t_cosines_first():
    t = [0.0, 0.4, 0.5, 1.0]
    want = [[f(1000 * s * 10000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)]
            for s in t]
    found = dit.timestep_embedding(torch.tensor(t, dtype=torch.float64))
    assert (found - torch.tensor(want, dtype=torch.float64)).abs().max() < 2e-4  # fp32 frequencies
    assert F.cosine_similarity(found[1], found[2], dim=0) < 0.6      # 0.9997 without the thousand


# ---- text ----

def test_padding_of_the_text_is_never_seen():
    model = make(awake=True)
    x, t, text, mask = batch(model)
    spoiled = text.clone()
    spoiled[~mask] = 1e4 * torch.randn(int((~mask).sum()), text.shape[-1])
    assert torch.equal(model(x, t, text, mask), model(x, t, spoiled, mask))
    assert not torch.allclose(model(x, t, text), model(x, t, spoiled), atol=1e-3)
    longer = F.pad(text, (0, 0, 0, 4), value=7.0), F.pad(mask, (0, 4))
    assert torch.allclose(model(x, t, text, mask), model(x, t, *longer), atol=1e-5)


def test_the_text_is_a_set_of_tokens():
    model = make(awake=True)
    x, t, text, _ = batch(model)
    order = torch.randperm(text.shape[1], generator=torch.Generator().manual_seed(3))
    assert torch.allclose(model(x, t, text), model(x, t, text[:, order]), atol=1e-5)
    mask = torch.arange(text.shape[1]) < torch.tensor([[3], [5]])       # in the valid part alone
    order = torch.tensor([2, 0, 1, 3, 4])
    assert torch.allclose(model(x, t, text, mask)[0], model(x, t, text[:, order], mask)[0],
                          atol=1e-5)
    with pytest.raises(ValueError, match="mask torch.float32: not bool"):
        model(x, t, text, mask.float())


def test_samples_do_not_mix():
    model = make(awake=True)
    x, t, text, mask = batch(model, B=3)
    alone = model(x[1:2], t[1:2], text[1:2], mask[1:2])
    assert torch.allclose(model(x, t, text, mask)[1:2], alone, atol=1e-5)


# ---- tokens and positions ----

def test_patchify_and_embed_are_a_conv3d_with_kernel_equal_to_stride():
    model = make(awake=True)
    x = batch(model)[0]
    conv = torch.nn.Conv3d(4, 48, (1, 2, 2), (1, 2, 2))
    with torch.no_grad():
        conv.weight.copy_(model.embed.weight.view_as(conv.weight))
        conv.bias.copy_(model.embed.bias)
    want = conv(x).flatten(2).transpose(1, 2)
    assert torch.allclose(model.embed(model.patchify(x)), want, atol=1e-5)


@pytest.mark.parametrize("streams", [SMALL.streams, (Stream(3, (2, 1, 4), (4, 2, 8)),), VIDTWIN])
def test_unpatchify_undoes_patchify(streams):
    model = make(replace(SMALL, streams=streams))
    x = batch(model)[0]
    assert torch.equal(model.unpatchify(model.patchify(x), x.shape), x)


def test_a_model_of_ones_own_with_several_streams():
    class Mine(dit.FlatDiT):
        pass
    assert type(Mine(replace(SMALL, streams=VIDTWIN))) is Mine
    assert type(DiT(replace(SMALL, streams=VIDTWIN))) is dit.FlatDiT


def test_streams_own_their_columns_and_share_nothing():
    model = make(replace(SMALL, streams=VIDTWIN), awake=True)
    x, t, text, mask = batch(model)
    tokens, real = model.patchify(x), model.token_mask(x.shape)
    widths, counts = [32, 6, 6], [8, 8, 8]
    assert model.width == 44 and tokens.shape == (2, 24, 44)
    assert real.shape == (24, 44) and int(real.sum()) == x.shape[1]
    assert (tokens * ~real).abs().max() == 0
    assert real.sum(1).tolist() == [w for w, n in zip(widths, counts) for _ in range(n)]
    # One Linear does what one for each stream would do.
    second = x[:, 256:304].view(2, 3, 4, 4, 1)
    conv = F.conv3d(second, model.embed.weight[:, 32:38].reshape(48, 3, 1, 2, 1), model.embed.bias,
                    stride=(1, 2, 1)).flatten(2).transpose(1, 2)
    assert torch.allclose(model.embed(tokens)[:, 8:16], conv, atol=1e-5)
    assert model(x, t, text, mask).shape == x.shape
    # Rubbish in foreign columns of the output is dropped.
    spoiled = torch.where(real, tokens, torch.tensor(9.0))
    assert torch.equal(model.unpatchify(spoiled, x.shape), x)
    assert isinstance(model, dit.FlatDiT) and type(make()) is DiT


def test_positions_are_the_sum_of_three_tables_at_frame_row_column():
    model = make(awake=True)
    a, b, c = model.tables[0]
    pos = model.positions((1, 4, 3, 6, 4))
    assert pos.shape == (3 * 3 * 2, 48)
    n = 0
    for frame in range(3):
        for row in range(3):
            for column in range(2):
                assert torch.allclose(pos[n], a[frame] + b[row] + c[column])
                n += 1


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 2, 8), (3, 8, 4), (2, 2, 2)])
def test_any_size_length_and_aspect_ratio_up_to_the_tables(size):
    model = make(awake=True)
    x, t, text, mask = batch(model, size=size)
    v = model(x, t, text, mask)
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize("size,axis", [((5, 8, 8), "T"), ((4, 10, 8), "H"), ((4, 8, 10), "W")])
def test_what_is_larger_than_the_tables_is_an_error_and_not_an_index_that_wraps(size, axis):
    with pytest.raises(ValueError, match=f"{axis}, the position table has .*expand_positions"):
        make()(torch.zeros(1, 4, *size), torch.zeros(1), torch.zeros(1, 2, 48))


@pytest.mark.parametrize("shape", [(1, 4, 4, 7, 8), (1, 5, 4, 8, 8), (1, 4, 8, 8)])
def test_what_cannot_be_cut_into_patches_is_an_error(shape):
    with pytest.raises(RuntimeError):                   # einops' or torch's own
        make()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 2, 48))
    with pytest.raises(RuntimeError):
        make(replace(SMALL, streams=VIDTWIN)).patchify(torch.zeros(1, 351))


def test_expand_positions_interpolates_and_keeps_what_was_learnt():
    model = make(awake=True)
    line = torch.arange(4.0)[:, None] * torch.randn(48)             # a table that is linear
    with torch.no_grad():
        model.tables[0][1].copy_(line)
    before = model.tables[0][0].clone()
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.expand_positions((8, 16, 24))
    assert not any(w.requires_grad for w in frozen.parameters())
    model.expand_positions((8, 16, 24))
    assert [len(x) for x in model.tables[0]] == [8, 8, 12]
    assert model.cfg.streams[0].size == (8, 16, 24)
    # Row i of 8 stands for the place (i + 1/2)/8 * 4 - 1/2 of the old rows; the ends are flat.
    place = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)[:, None]
    assert torch.allclose(model.tables[0][1], place * line[1], atol=1e-5)
    assert torch.allclose(model.tables[0][0].mean(0), before.mean(0), atol=0.2)
    x, t, text, mask = batch(model, size=(8, 16, 24))
    assert model(x, t, text, mask).shape == x.shape
    image = make(replace(SMALL, streams=(Stream(4, (1, 2, 2), (1, 8, 8)),)), awake=True)
    row = image.tables[0][0].clone()
    image.expand_positions((4, 8, 8))
    assert torch.allclose(image.tables[0][0], row.expand(4, -1))
    with pytest.raises(ValueError, match="one .T, H, W. for each"):
        image.expand_positions((4, 8, 8), (4, 8, 8))


# ---- the seams ----

@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("streams", [SMALL.streams, VIDTWIN])
def test_forward_is_nothing_but_its_seams(conditioning, streams):
    model = make(replace(SMALL, conditioning=conditioning, streams=streams), awake=True)
    x, t, text, mask = batch(model)
    h, pos, c = model.embed(model.patchify(x)), model.positions(x.shape), model.condition(t)
    for block in model.blocks:
        h = block(h, pos, c, text, mask)
    assert torch.equal(model.unpatchify(model.head(h, c), x.shape), model(x, t, text, mask))


@pytest.mark.parametrize("streams", [SMALL.streams, VIDTWIN])
def test_two_halves_of_the_tokens_with_all_keys_equal_the_whole(streams):
    """What sequence parallelism does: everything but attend on a slice, attend on gathered K, V."""
    model = make(replace(SMALL, streams=streams), awake=True)
    x, t, text, mask = batch(model)
    whole = model(x, t, text, mask)
    tokens, pos, c = model.patchify(x), model.positions(x.shape), model.condition(t)
    N = tokens.shape[1]
    cuts = [slice(0, N // 3), slice(N // 3, N)]
    hs = [model.embed(tokens[:, s]) for s in cuts]
    for block in model.blocks:
        gathered = []
        block.attend = lambda q, k, v: (gathered.append((k, v)), v)[1]          # noqa: B023
        for h, s in zip(hs, cuts):
            block(h, pos[s], c, text, mask)
        k, v = (torch.cat(x, dim=2) for x in zip(*gathered))
        block.attend = lambda q, *_: F.scaled_dot_product_attention(q, k, v)    # noqa: B023
        hs = [block(h, pos[s], c, text, mask) for h, s in zip(hs, cuts)]
    out = torch.cat([model.head(h, c) for h in hs], dim=1)
    assert torch.allclose(model.unpatchify(out, x.shape), whole, atol=1e-5)


def test_attend_is_called_once_a_block_with_heads_in_front():
    model = make()
    shapes = []
    for block in model.blocks:
        block.attend = lambda q, k, v: (shapes.append([*q.shape, *k.shape, *v.shape]), v)[1]
    x, t, text, mask = batch(model)
    model(x, t, text, mask)
    assert shapes == [[2, 4, 64, 12] * 3] * 3


# ---- precision, checkpointing, compile ----

def test_fp32_islands_under_bf16_autocast():
    model = make(awake=True)
    x, t, text, mask = batch(model)
    seen = {}
    hook = lambda name: lambda m, args, out: seen.__setitem__(name, (args[0].dtype, out.dtype))
    for name, m in model.named_modules():
        m.register_forward_hook(hook(name)) if name else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(x, t, text, mask)
    for name in ("time.0", "time.2", "adaln", "head.adaln", "head.out", "blocks.0", "blocks.2"):
        assert seen[name][1] == torch.float32, name
    for name in ("self_attention.qkv", "cross_attention.kv", "ffn.gate_up", "ffn.down"):
        assert seen["blocks.1." + name][1] == torch.bfloat16, name
    exact = model(x, t, text, mask)
    assert v.dtype == torch.float32
    assert (v - exact).norm() / exact.norm() < 0.02
    assert not torch.equal(v, exact)                    # so bf16 was really at work


def test_bf16_weights_run_without_autocast_and_the_residual_stream_stays_fp32():
    model = make(awake=True)
    x, t, text, mask = batch(model)
    exact = model(x, t, text, mask)
    h = model.bfloat16().blocks[0](torch.randn(2, 64, 48).bfloat16(), model.positions(x.shape),
                                   model.condition(t), text, mask)
    for dtype in (torch.float32, torch.bfloat16):       # the sampler's state is fp32
        v = model(x.to(dtype), t, text.to(dtype), mask)
        assert h.dtype == torch.float32 and v.dtype == dtype
        assert (v - exact).norm() / exact.norm() < 0.05


def test_bf16_with_qk_norm_and_a_modulation_per_block():
    model = make(replace(SMALL, qk_norm=True, adaln="per_block"), awake=True)
    x, t, text, mask = batch(model)
    exact = model(x, t, text, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(x, t, text, mask)
    assert 0 < (v - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_v_has_the_dtype_of_x_whatever_the_weights_have(dtype):
    model = make(awake=True)
    x, t, text, mask = batch(model)
    v = model(x.to(dtype), t, text.to(dtype), mask)
    assert v.dtype == dtype
    assert torch.allclose(v.float(), model(x, t, text, mask), atol=0.05)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_checkpointing_changes_no_gradient(conditioning):
    grads = []
    for checkpointing in (False, True):
        model = make(replace(SMALL, checkpointing=checkpointing, conditioning=conditioning), True)
        x, t, text, mask = batch(model)
        calls = Counter()
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.update(["block"]))
        model(x, t, text, mask).square().mean().backward()
        grads.append([w.grad for w in model.parameters()])
        assert calls["block"] == 1 + checkpointing      # forward again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_model_can_be_copied():
    """As torch's AveragedModel does."""
    for model in (make(), make(replace(SMALL, streams=VIDTWIN))):
        again = copy.deepcopy(model)
        assert type(again) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


@pytest.mark.slow
def test_compile_traces_one_graph_with_the_same_output():
    model = make(awake=True)
    x, t, text, mask = batch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, text, mask), model(x, t, text, mask), atol=1e-5)


@pytest.mark.slow
def test_compile_with_inductor_equals_eager_forward_and_gradient():
    model = make(awake=True)
    x, t, text, mask = batch(model)
    compiled = torch.compile(model)
    out, grads = [], []
    for m in (model, compiled):
        model.zero_grad()
        out.append(m(x, t, text, mask))
        out[-1].square().sum().backward()
        grads.append([w.grad.clone() for w in model.parameters()])
    assert (out[0] - out[1]).abs().max() < 1e-5 * out[0].abs().max()
    for a, b in zip(*grads):
        assert (a - b).abs().max() < 1e-4 * a.abs().max().clamp_min(1e-3)


# ---- sizes and costs ----

@pytest.mark.parametrize("name,adaln,billions", [
    ("1b", "shared", 0.93), ("5b", "shared", 4.92), ("30b", "shared", 29.30),
    ("1b", "per_block", 1.26), ("5b", "per_block", 6.68), ("30b", "per_block", 39.95)])
def test_parameters_of_the_published_sizes(name, adaln, billions):
    with torch.device("meta"):
        model = DiT(replace(PRESETS[name], adaln=adaln))
    count = sum(w.numel() for w in model.parameters())
    assert abs(count / 1e9 - billions) < 0.01 * billions


def test_the_longest_clip_has_73728_tokens():
    cfg = PRESETS["30b"]
    assert cfg.streams[0].size == (256 // 8, 768 // 8, 768 // 8)
    with torch.device("meta"):
        model = DiT(replace(cfg, depth=1))
        assert model.patchify(torch.zeros(1, 16, 32, 96, 96)).shape == (1, 73728, 64)
        assert model.positions((1, 16, 32, 96, 96)).shape == (73728, 6144)


def test_a_model_from_the_meta_device_is_initialised_like_any_other():
    with torch.device("meta"):
        model = DiT(SMALL)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    x, t, text, mask = batch(model)
    assert torch.equal(model(x, t, text, mask), torch.zeros_like(x))
    like = make()
    for (n, a), b in zip(model.named_parameters(), like.parameters()):
        assert abs(a.std() - b.std()) < 0.05 + 0.15 * b.std() and a.isfinite().all(), n


def test_a_config_survives_json():
    for cfg in (*PRESETS.values(), replace(SMALL, streams=VIDTWIN)):
        assert DiTConfig(**json.loads(json.dumps(asdict(cfg)))) == cfg


def test_derived_widths_follow_dim():
    cfg = replace(PRESETS["toy"], dim=384)
    assert (cfg.ffn_width, cfg.text_width) == (1024, 384)
    assert [c.ffn_width for c in PRESETS.values()] == [448, 704, 4096, 8192, 16384]
    assert replace(cfg, ffn=100, text_dim=7).ffn_width == 100


@pytest.mark.parametrize("change,says", [
    ({"adaln": "none"}, "adaln none: not one of shared, per_block"),
    ({"conditioning": "film"}, "conditioning film: not one of adaln_zero, adaln"),
    ({"heads": 5}, "heads 5: does not divide dim 48"),
    ({"heads": 0}, "heads 0: must be 1 or more"),
    ({"depth": 0}, "depth 0: must be 1 or more"),
    ({"adaln": "per_block", "conditioning": "adaln"}, "adaln per_block: only with"),
    ({"conditioning": "cross_attention", "text_dim": 20}, "text_dim 20: with conditioning cross")])
def test_wrong_configs_are_one_line(change, says):
    with pytest.raises(ValueError) as e:
        replace(SMALL, **change)
    assert says in str(e.value)
    for patch in ((1, 3, 2), (0, 2, 2), (2, 2)):
        with pytest.raises(ValueError, match="does not divide the latent size"):
            Stream(4, patch, (4, 8, 8))


# ---- the command line ----

def run(folder, *args):
    """dit.py copied alone into an empty folder."""
    (folder / "dit.py").write_text((ROOT / "dit.py").read_text(encoding="utf-8"), encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run([sys.executable, "dit.py", *args], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=300)


@pytest.mark.slow
def test_a_demo_that_has_not_learnt_fails(tmp_path):
    done = run(tmp_path, "--steps", "2")
    assert done.returncode == 1 and "FAIL one clip learned" in done.stdout
    assert "PASS largest output at initialisation: 0 vs 0" in done.stdout
    assert (tmp_path / "out/dit/gates.png").stat().st_size > 10_000


@pytest.mark.parametrize("args", [["--steps", "0"], ["--steps", "x"], ["--stepz", "1"], ["extra"]])
def test_bad_arguments_are_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dit.py", *args])
    with pytest.raises(SystemExit) as e:
        dit.main()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and len(err.splitlines()) == 1 and args[0] in err
