"""sample_parallel.py against one process: forked ranks, gloo over a file, one thread each."""
import argparse
import io
import itertools
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import sample_parallel as sp
from sample_parallel import ParallelSampler, emulate, launch, make_mesh

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 2, 8, 8, 8)


def tiny(seed=0, **kwargs):
    """An untrained model (its velocity is not zero) and everything a sample needs."""
    torch.manual_seed(seed)
    kwargs = {"D": 32, "depth": 4, "heads": 4, **kwargs}
    model, D = sp.TinyDiT(**kwargs).eval(), kwargs["D"]
    mask = torch.tensor([[True, True, True, False]])
    return model, dict(x0=torch.randn(1, 2, *kwargs.get("grid", SHAPE[2:])),
                       text=torch.randn(1, 4, D), mask=mask, null=torch.randn(1, 2, D),
                       guidance=3.0, steps=4)


def sampler(model, mode):
    """The ParallelSampler of degrees and settings in one dict."""
    degrees = {k: v for k, v in mode.items() if k in sp.AXES}
    return ParallelSampler(model, make_mesh(**degrees),
                           **{k: v for k, v in mode.items() if k not in sp.AXES})


def run_modes(model, inputs, modes):
    """On every rank: each mode once -> [(x1, row)]."""
    return [sp.measure(sampler(model, mode), **inputs) for mode in modes]


def of_mode(mode):
    """What `emulate` must be told of a mode, written apart from the sampler's own `settings`."""
    name, patches = "exact", 1
    if mode.get("pp", 1) > 1:
        name, patches = "pipefusion", mode.get("patches") or mode["pp"]
    return dict(mode=name, patches=patches, warmup=mode.get("warmup", 1),
                patch_axis=mode.get("patch_axis", "t"))


def compare(model, inputs, modes, world, tolerance=1e-5, run=run_modes):
    """Each mode on `world` ranks against one process: up to rounding, since matrices of fewer rows
    may be summed in another order. A mode that is wrong is off by 1e-3 or more."""
    ranks = launch(run, world, model, inputs, modes)
    for i, mode in enumerate(modes):
        x1, row = ranks[0][i][:2]
        assert row["settings"] == of_mode(mode)
        want = emulate(model=model, **inputs, **of_mode(mode))
        assert all(torch.equal(x1, r[i][0]) for r in ranks), f"{mode}: ranks hold different clips"
        assert sp.difference(x1, want) < tolerance, f"{mode}: {sp.difference(x1, want):.1e}"
    return ranks


# ---- the algorithm in one process ----------------------------------------------------------------
def forward(model, x, t, text, mask=None):
    """A model's own forward; of the tiny one, which has none, its seams one after the other."""
    if type(model) is not sp.TinyDiT:
        return model(x, t, text, mask)
    h, pos, c = model.embed(model.patchify(x)), model.positions(x.shape), model.condition(t)
    for block in model.blocks:
        h = block(h, pos, c, text, mask)
    return model.unpatchify(model.head(h, c), x.shape)


def forward_loop(model, x0, text, mask=None, null=None, guidance=1.0, steps=4, **_):
    """Written without slices of tokens: the model's forward, and Euler by hand."""
    x, dt = x0.clone(), 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i / steps)
        with torch.no_grad():
            v = forward(model, x, t, text, mask)
            if null is not None:
                v = forward(model, x, t, null) * (1 - guidance) + guidance * v
        x = x + dt * v
    return x


@pytest.mark.parametrize("guided", [True, False])
def test_emulate_exact_is_the_models_own_forward(guided):
    model, inputs = tiny()
    if not guided:
        inputs.update(null=None, guidance=1.0)
    want = emulate("exact", model, **inputs)
    assert sp.difference(want, forward_loop(model, **inputs)) < 1e-5
    one = ParallelSampler(model).sample(**inputs)                   # a process of its own, no ranks
    assert sp.difference(one, want) < 1e-5
    assert all(block.attend is sp.attention for block in model.blocks)      # the model is as it was


def test_a_mask_of_numbers_is_refused():
    model, inputs = tiny()
    for sample in (lambda **kw: emulate("exact", model, **kw), ParallelSampler(model).sample):
        with pytest.raises(ValueError, match="mask torch.float32: not bool"):
            sample(**{**inputs, "mask": torch.ones(inputs["text"].shape[:2])})


def test_patches_without_a_whole_step_are_refused():
    model, inputs = tiny()
    for mode in ("pipefusion", "distrifusion"):
        with pytest.raises(ValueError, match="warmup 0: patches need"):
            emulate(mode, model, **inputs, patches=4, warmup=0)


@pytest.mark.parametrize("mode", ["pipefusion", "distrifusion", "no_exchange"])
def test_emulated_modes_are_exact_while_warming_up_and_not_after(mode):
    model, inputs = tiny()
    exact = emulate("exact", model, **inputs)
    warm = emulate(mode, model, **inputs, patches=4, warmup=4)
    assert sp.difference(warm, exact) < 1e-6
    assert sp.difference(emulate(mode, model, **inputs, patches=4, warmup=1), exact) > 1e-4


def test_distrifusion_sees_what_the_first_patch_of_a_pipeline_sees(monkeypatch):
    """In the step after the warm-up the pipeline's first patch has only its own K, V fresh: each
    patch in turn is made the first one."""
    model, inputs = tiny()
    inputs["steps"] = 2
    made, real = emulate("distrifusion", model, **inputs, patches=4), sp.token_order
    for m in range(4):
        monkeypatch.setattr(sp, "token_order", lambda *args, m=m: real(*args).roll(-16 * m))
        first = emulate("pipefusion", model, **inputs, patches=4)
        mine = (..., slice(2 * m, 2 * m + 2), slice(None), slice(None))     # 16 of the 64 tokens
        assert torch.allclose(first[mine], made[mine], atol=1e-5)
        assert not torch.allclose(first, made, atol=1e-3)


def test_layout_shares_every_token_once():
    for N, M, R, U in itertools.product((64, 105), (1, 3, 4), (1, 2, 3), (1, 2, 4)):
        order = torch.randperm(N)
        layout = sp.Layout(order, M, R, U)
        rows = torch.cat([layout.rows(r, u) for r in range(R) for u in range(U)])
        assert torch.equal(rows.sort().values, torch.arange(N))
        for r in range(R):
            # as the all-to-all of a warm-up delivers
            delivered = torch.cat([layout.rows(r, u) for u in range(U)])
            assert layout.tokens(None, r) == [len(layout.rows(r, u)) for u in range(U)]
            cache = delivered[layout.splice(r)]
            assert layout.cached()[r] == len(cache)
            for m in range(M):                                   # and as that of patch m does later
                patch = torch.cat([layout.rows(r, u)[layout.local(m, r, u)] for u in range(U)])
                assert torch.equal(cache[layout.slot(m, r)], patch)


def test_token_order_makes_bands():
    model, _ = tiny()
    n = torch.arange(64).view(8, 4, 2)                                      # token grid T, H, W
    assert torch.equal(sp.token_order(model, SHAPE, "t"), torch.arange(64))
    assert torch.equal(sp.token_order(model, SHAPE, "h"), n.permute(1, 0, 2).flatten())
    assert torch.equal(sp.token_order(model, SHAPE, "w"), n.permute(2, 0, 1).flatten())


# ---- attention over ranks ------------------------------------------------------------------------
def test_attention_lse_is_the_definition():
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    scores = q @ k.mT / 4
    o, lse = sp.attention_lse(q, k, v)
    assert torch.allclose(o, scores.softmax(-1) @ v, atol=1e-5)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_ring_takes_q_k_v_however_they_lie():
    """Strided in the last dimension (heads innermost), and channels last."""
    last = dict(memory_format=torch.channels_last)

    def rank(lie):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 6, 8)
        me = dist.get_rank()
        ring = sp.Ring(sp.Axis(2, me, dist.group.WORLD), [3, 3])
        mine = [lie(a[:, :, 3 * me:3 * me + 3]) for a in (q, k, v)]
        return ring(*mine) - sp.attention(q, k, v)[:, :, 3 * me:3 * me + 3]
    for lie in (lambda a: a.mT.contiguous().mT, lambda a: a.contiguous(**last)):
        for difference in launch(rank, 2, lie):
            assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("H, N", [(7, 11), (3, 5)])
def test_ulysses_and_gather_in_training(H, N):
    """What `train.py --sp` uses: the answer and the gradients are those of one process, with uneven
    heads and tokens. (B, H, N, d) fp64, so that another order of summing is no excuse."""
    torch.manual_seed(0)
    qkv, w = torch.randn(3, 2, H, N, 4).double(), torch.randn(2, H, N, 4).double()
    whole = qkv.clone().requires_grad_()
    o = sp.attention(*whole)
    (o * w).sum().backward()

    def rank(pieces):
        sizes, me = sp.split(N, 3), dist.get_rank()
        axis = sp.Axis(3, me, dist.group.WORLD)
        x = qkv.split(sizes, 3)[me].clone().requires_grad_()
        attend = (sp.Ulysses(axis, tokens=sizes) if pieces == 1 else
                  sp.UlyssesInPieces(axis, [sp.attention] * pieces, sizes))
        everything = sp.gather(attend(*x), sizes, 2, axis)
        (everything * w).sum().backward()           # the same loss on all ranks: gradients x 3
        return everything.detach(), x.grad / 3
    for pieces in (1, 2):
        ranks = launch(rank, 3, pieces)
        assert all(torch.allclose(r[0], o, atol=1e-12) for r in ranks)
        grads = torch.cat([r[1] for r in ranks], dim=3)
        assert torch.allclose(grads, whole.grad, atol=1e-12)


# ---- modes ---------------------------------------------------------------------------------------
def test_two_ranks():
    model, inputs = tiny()
    modes = [dict(cfg=2), dict(ulysses=2), dict(ring=2)]
    modes += [dict(pp=2, patches=M, warmup=W) for M, W in ((2, 1), (4, 1), (5, 1), (2, 2), (3, 4))]
    modes += [dict(pp=2, patches=2, patch_axis=a) for a in "hw"]
    ranks = compare(model, inputs, modes, 2)
    all_warm = ranks[0][modes.index(dict(pp=2, patches=3, warmup=4))][0]
    # nothing stale: the exact clip
    assert sp.difference(all_warm, emulate("exact", model, **inputs)) < 1e-5


def test_every_hybrid_of_four_ranks():
    """Each makes the clip of one process, and sends the bytes of the formula, counted outside."""
    model, inputs = tiny()
    inputs["steps"] = 3             # a warm-up, a step on what it left, one on what that left
    modes = [dict(zip(sp.AXES, d))
             for d in itertools.product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4))
             if math.prod(d) == 4]
    assert len(modes) == 9                                                 # 3 of one axis, 6 of two
    modes += [dict(pp=4, patches=8), dict(pp=4, patches=5), dict(pp=2, ulysses=2, patches=4),
              dict(pp=2, ring=2, patches=4)]
    for rank in compare(model, inputs, modes, 4, run=count_bytes):
        for mode, (_, row, outside, counted) in zip(modes, rank):
            assert outside == counted, mode
            # (5 patches of 64 tokens are uneven, the formula's are not)
            assert row["sent"] == row["expected"] or mode.get("patches") == 5, mode


def test_nothing_has_to_divide():
    """105 tokens, 6 heads and 5 blocks over 4 ranks, M that divides nothing."""
    model, inputs = tiny(grid=(3, 5, 7), patch=(1, 1, 1), heads=6, D=48, depth=5)
    modes = [dict(ulysses=4), dict(ring=4), dict(pp=4, patches=5), dict(ring=2, ulysses=2),
             dict(pp=2, ulysses=2, patches=3), dict(pp=2, ring=2, patches=3)]
    compare(model, inputs, modes, 4)


def test_three_ranks():
    """A number of ranks that divides neither tokens, heads nor blocks."""
    model, inputs = tiny()
    modes = [dict(ulysses=3), dict(ring=3), dict(pp=3, patches=3), dict(pp=3, patches=5, warmup=2)]
    compare(model, inputs, modes, 3)


def test_batches_no_guidance_and_a_schedule():
    model, _ = tiny()
    inputs = dict(x0=torch.randn(3, *SHAPE[1:]), text=torch.randn(3, 4, 32),
                  ts=torch.tensor([0, 0.1, 0.3, 0.6, 1.0]))
    compare(model, inputs, [dict(ulysses=2), dict(ring=2), dict(pp=2, patches=3)], 2)


def test_bf16_weights():
    model, inputs = tiny()
    inputs.update(text=inputs["text"].bfloat16(), null=inputs["null"].bfloat16())
    compare(model.bfloat16(), inputs, [dict(ulysses=2), dict(pp=2), dict(ring=2)], 2,
            tolerance=3e-2)


def test_collectives_match_on_all_ranks():
    """Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch checks every collective for being the same one
    on all ranks, where it would otherwise hang, or mix up two."""
    model, inputs = tiny()
    inputs["steps"] = 2
    modes = [dict(cfg=2, ulysses=2), dict(pp=2, ulysses=2)]
    decoder, z = sp.TinyDecoder().eval(), torch.randn(1, 2, 3, 9, 5)

    def rank():
        return run_modes(model, inputs, modes), sp.halo_decode(decoder, z)
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        launch(rank, 4)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def test_stale_buffers_of_a_sampler_are_not_reused():
    model, inputs = tiny()
    other = dict(inputs, x0=torch.randn(SHAPE), text=torch.randn(1, 4, 32))
    plain = dict(inputs, null=None, guidance=1.0)              # half the batch: other buffer shapes

    def rank():
        parallel = ParallelSampler(model, make_mesh(pp=2), 2)
        return [parallel.sample(**i) for i in (inputs, other, plain, inputs)]
    got = launch(rank, 2)[0]
    for x1, i in zip(got, (inputs, other, plain, inputs)):
        assert sp.difference(x1, emulate("pipefusion", model, **i, patches=2)) < 1e-5


# ---- other models --------------------------------------------------------------------------------
def dit_case(streams, seed=0, **kwargs):
    dit = pytest.importorskip("dit")
    torch.manual_seed(seed)
    cfg = dit.DiTConfig(tuple(dit.Stream(*s) for s in streams), dim=48, depth=4, heads=6,
                        text_dim=24, **kwargs)
    model = dit.DiT(cfg).eval()
    for p in model.parameters():                     # wake the gates and the head, which start at 0
        torch.nn.init.normal_(p, std=0.15) if not p.any() else None
    return model, dict(text=torch.randn(1, 5, 24), mask=torch.tensor([[True] * 4 + [False]]),
                       null=torch.randn(1, 1, 24), guidance=2.0, steps=4)


def test_the_repositorys_dit():
    model, inputs = dit_case([(4, (1, 2, 2), (4, 8, 8))])
    inputs["x0"] = torch.randn(1, 4, 4, 8, 8)
    assert sp.difference(emulate("exact", model, **inputs), forward_loop(model, **inputs)) < 1e-5
    compare(model, inputs, [dict(ulysses=2), dict(ring=2), dict(cfg=2), dict(pp=2, patches=4),
                            dict(pp=2, patches=2, patch_axis="h")], 2)
    assert all(b.attend is F.scaled_dot_product_attention for b in model.blocks)


def test_several_latents_laid_flat():
    """Columns of a token that are not its latent's must stay zero, or embed would read the head's
    noise there."""
    model, inputs = dit_case([(4, (1, 2, 2), (2, 4, 4)), (2, (1, 1, 2), (3, 1, 8))])
    inputs["x0"] = torch.randn(1, 4 * 2 * 4 * 4 + 2 * 3 * 8)
    assert sp.difference(emulate("exact", model, **inputs), forward_loop(model, **inputs)) < 1e-5
    compare(model, inputs, [dict(ulysses=2), dict(ring=2), dict(pp=2, patches=3)], 2)


def test_every_mesh_leaves_a_token_for_each_share():
    model = sp.TinyDiT(grid=(2, 2, 4)).eval()                                      # two tokens
    inputs = {"x0": torch.randn(1, 2, 2, 2, 4), "text": torch.randn(1, 2, 64),
              "null": torch.randn(1, 2, 64), "steps": 2}
    run = lambda: [row["mode"] for _, row in sp.sample_every(model, inputs)]
    assert launch(run, 2)[0] == ["ulysses 2", "ring 2", "pp 2 x M 2", "cfg 2"]
    with pytest.raises(Exception, match="no mesh of 7 ranks fits 2 tokens"):
        launch(run, 7)


def test_in_context_conditioning_is_refused():
    model, _ = dit_case([(4, (1, 2, 2), (4, 8, 8))], conditioning="in_context")
    with pytest.raises(ValueError, match="in_context"):
        ParallelSampler(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_diffusers_wan(dtype, tolerance, monkeypatch):
    """studies/wan.py's seams, on Wan's own forward: an Euler loop by hand, with Wan's clock."""
    pytest.importorskip("text_cond").make_torchvision_importable()
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.syspath_prepend(ROOT / "studies")
    seams = pytest.importorskip("wan").seams
    torch.manual_seed(0)
    wan = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32)
    for name, p in wan.to(dtype).named_parameters():             # as from_pretrained loads them
        if set(name.split(".")) & set(wan._keep_in_fp32_modules):
            p.data = p.data.float()
    wan.rope.float()
    x0, raw = torch.randn(1, 4, 4, 8, 6), torch.randn(2, 5, 16).to(dtype)
    with torch.no_grad():
        x = x0
        for i in range(4):
            v, v0 = (-wan.eval()(x.to(dtype), torch.tensor([1000 * (1 - i / 4)]), row,
                                 return_dict=False)[0].float() for row in raw.split(1))
            x = x + (v0 + 3 * (v - v0)) / 4
        text = wan.condition_embedder.text_embedder(raw)
    whole = sum(p.numel() for p in wan.blocks.parameters())
    model = seams(wan).eval()
    inputs = dict(x0=x0, text=text[:1], null=text[1:], guidance=3.0, steps=4)
    assert sp.difference(emulate("exact", model, **inputs), x) < tolerance
    compare(model, inputs, [dict(ulysses=2), dict(cfg=2), dict(ring=2), dict(pp=2, patches=3)], 2,
            tolerance=tolerance)
    sp.keep_stage(model, 2, 0)
    assert 2 * sum(p.numel() for p in model.blocks.parameters()) == whole


# ---- bytes ---------------------------------------------------------------------------------------
def count_bytes(model, inputs, modes):
    """The bytes that torch.distributed is given, counted from outside of sample_parallel.py."""
    totals = []
    isend, batch, a2a, op = (dist.isend, dist.batch_isend_irecv, sp.all_to_all_single_autograd,
                             dist.P2POp)

    def count(n):
        totals[-1] += n

    def all_to_all(x, got, sent, group):
        count((sum(sent) - sent[dist.get_rank(group)]) * x.element_size())
        return a2a(x, got, sent, group)

    def batched(ops):
        count(sum(p.tensor.nbytes for p in ops if p.op is not dist.irecv))
        return batch(ops)
    dist.isend = lambda x, *a, **k: (count(x.nbytes), isend(x, *a, **k))[1]
    dist.P2POp = lambda f, *a, **k: op(isend if f is dist.isend else f, *a, **k)
    sp.all_to_all_single_autograd, dist.batch_isend_irecv = all_to_all, batched
    mine = []
    for mode in modes:
        totals.append(0)
        parallel = sampler(model, mode)
        totals[-1] = 0                                      # without what opened the links
        x1, row = sp.measure(parallel, **inputs)
        mine.append((x1, row, totals[-1], sum(parallel.sent.values())))
    return mine


def test_traffic_by_hand():
    """[XD table 1] at Movie Gen's longest context on 8 devices, one row, bf16: the head's table."""
    per = lambda **d: sum(sp.traffic(73728, 6144, 48, 64, B=1, branches=1, S=1, size=2,
                                     **d).values()) / 1e9
    assert per(ulysses=8) == pytest.approx(19.0, abs=0.05)
    assert per(ring=8) == pytest.approx(76.1, abs=0.05)
    assert per(pp=8, M=8) == pytest.approx(0.906, abs=0.01)      # and half as deep, alone, the same
    shallow = sp.traffic(73728, 6144, 24, 64, B=1, branches=1, S=1, size=2, pp=8, M=8)
    assert sum(shallow.values()) / 1e9 == pytest.approx(0.906, abs=0.01)
    assert per(pp=8, M=8, hidden_bytes=4) == pytest.approx(1.81, abs=0.01)       # residual: fp32
    assert per(cfg=2) == pytest.approx(0.019, abs=0.001)


# ---- staleness -----------------------------------------------------------------------------------
def moving_blobs(n, generator, grid=(8, 8, 8)):
    """Latent clips of a blob that moves left, right, up, down -> x1 (n, 2, T, H, W), way (n,)."""
    T, H, W = grid
    way = torch.randint(4, (n,), generator=generator)
    v = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])[way] * 4 / T       # (n, 2), cells a frame
    at = torch.rand(n, 2, generator=generator) * 3 + 2
    at = at - v.clamp(max=0) * T / 2 - v.clamp(min=0) * T / 4
    at = at[:, :, None] + v[:, :, None] * torch.arange(T)                               # (n, 2, T)
    y, x = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    blob = torch.exp(-((y - at[:, 0, :, None, None]) ** 2 + (x - at[:, 1, :, None, None]) ** 2) / 3)
    return torch.stack([3 * blob - 0.6, 1.5 * (x - 3.5) / 3.5 * blob], 1), way


def train_tiny(steps=120):
    """A TinyDiT that learned the blobs by flow matching, and its text: 5 x 2 tokens, null last."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    model = sp.TinyDiT()
    text = torch.randn(5, 2, model.embed.out_features, generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        x1, way = moving_blobs(16, g)
        way[torch.rand(16, generator=g) < 0.15] = 4
        x0, t = torch.randn(x1.shape, generator=g), torch.rand(16, generator=g)
        x_t = t.view(-1, 1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1, 1)) * x0
        loss = F.mse_loss(forward(model, x_t, t, text[way]), x1 - x0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 20, (steps - step) / (steps / 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), text


@pytest.fixture(scope="module")
def trained():
    model, text = train_tiny()
    g = torch.Generator().manual_seed(5)
    inputs = dict(x0=torch.randn(4, *SHAPE[1:], generator=g), text=text[:4], null=text[4:],
                  guidance=2.0)
    l2 = lambda a, b: ((a - b).norm() / b.norm()).item()
    exact = {S: emulate("exact", model, **inputs, steps=S) for S in (8, 32)}
    return model, inputs, lambda mode, S, M, W=1: l2(
        emulate(mode, model, **inputs, steps=S, patches=M, warmup=W), exact[S])


@pytest.mark.slow
def test_staleness_on_a_trained_model(trained):
    _, _, error = trained
    few, many = error("pipefusion", 8, 2), error("pipefusion", 32, 2)
    assert many < 0.5 * few                                         # falls with the number of steps
    assert error("pipefusion", 32, 4) > many                      # grows with the number of patches
    assert many < 0.9 * error("distrifusion", 32, 2)           # the paper's claim, at equal patches
    assert many < 0.2 * error("no_exchange", 32, 2)
    assert error("pipefusion", 8, 4, W=4) < error("pipefusion", 8, 4)


@pytest.mark.slow
def test_a_trained_model_on_four_ranks(trained):
    model, inputs, _ = trained
    inputs = dict({k: v[:1] if k != "guidance" else v for k, v in inputs.items()}, steps=8)
    compare(model, inputs, [dict(cfg=2, ulysses=2), dict(pp=4, patches=8)], 4)


# ---- weights -------------------------------------------------------------------------------------
def test_a_stage_needs_only_its_blocks():
    model, inputs = tiny()
    whole = sum(p.numel() for p in model.blocks.parameters())

    def rank():
        mesh = make_mesh(pp=2)
        part = sp.keep_stage(model, 2, mesh["pp"].get_local_rank())
        x1 = ParallelSampler(part, mesh, 2).sample(**inputs)
        return sum(p.numel() for p in part.blocks.parameters()), x1
    want = emulate("pipefusion", model, **inputs, patches=2)
    for numbers, x1 in launch(rank, 2):
        assert numbers == whole // 2 and sp.difference(x1, want) < 1e-5


# ---- decoding ------------------------------------------------------------------------------------
@pytest.mark.parametrize("world, rows", [(2, 6), (4, 8), (4, 9)])
def test_decoding_on_many_ranks_equals_one(world, rows):
    torch.manual_seed(0)
    decoder, z = sp.TinyDecoder().eval(), torch.randn(1, 2, 5, rows, 7)
    with torch.no_grad():
        want = decoder(z)
        naive = torch.cat([decoder(z[:, :, :, s]) for s in sp.spans(sp.split(rows, world))], dim=3)
    got = launch(sp.halo_decode, world, decoder, z)
    assert all(g is None for g in got[1:])
    assert sp.difference(got[0], want) < 1e-5 and sp.difference(naive, want) > 1e-2


def test_halo_norm_of_a_picture_that_was_flattened():
    """GroupNorm on (F, C, H W), as in the attention of some decoders: the other bands count."""
    torch.manual_seed(0)
    conv, z = torch.nn.Conv2d(2, 8, 3, padding=1), torch.randn(1, 2, 5, 6, 7)

    def decode(z):
        h = conv(z[0].transpose(0, 1))                                          # (F, C, H, W)
        return F.group_norm(h.flatten(2), 4).view(h.shape).transpose(0, 1)[None]
    with torch.no_grad():
        want = decode(z)
    assert sp.difference(launch(sp.halo_decode, 2, decode, z)[0], want) < 1e-5


def test_halo_sees_arguments_by_name():
    torch.manual_seed(0)
    w, z = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 1, 6, 7)

    def decode(z):
        h = F.conv2d(input=z[:, :, 0], weight=w, padding=1).flatten(2).mT[:, None]   # (1, 1, n, 4)
        h = F.scaled_dot_product_attention(query=h, key=h, value=h)
        return h[:, 0].mT.view(1, 4, 1, *z.shape[3:])
    assert sp.difference(launch(sp.halo_decode, 2, decode, z)[0], decode(z)) < 1e-5


@pytest.mark.parametrize("kind, shortcut", [("2.5d", False), ("2.5d", True), ("3d", False)])
def test_halo_decode_of_the_repositorys_tae(kind, shortcut):
    tae = pytest.importorskip("tae")
    torch.manual_seed(0)
    cfg = tae.PRESETS["toy"]
    model = tae.TAE(type(cfg)(**{**vars(cfg), "variant": kind, "shortcut": shortcut})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None
    z = torch.randn(1, 8, 4, 8, 8)
    with torch.no_grad():
        want = model.decode(z)
    got = launch(sp.halo_decode, 4, model.decode, z)[0]
    assert sp.difference(got, want) < 1e-5


def test_halo_refuses_what_it_cannot_split():
    strided = torch.nn.Conv2d(2, 2, 3, stride=2, padding=1)
    w, twice = torch.randn(2, 2, 3, 3), lambda x: F.interpolate(x, scale_factor=2.0)
    edge = torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate")
    cases = {
        "valid": lambda z: F.conv2d(z[:, :, 0], w)[:, :, None],
        "valid, later": lambda z: twice(F.conv2d(twice(z[:, :, 0]), w))[:, :, None],
        "wide": lambda z: F.conv2d(z[:, :, 0], w, padding=2)[:, :, None],
        "padded before": lambda z: F.conv2d(F.pad(z[:, :, 0], (1, 1, 1, 1)), w)[:, :, None],
        "other padding": lambda z: edge(z[:, :, 0])[:, :, None],
        "strided": lambda z: strided(z[:, :, 0])[:, :, None],
        "pooled": lambda z: F.avg_pool2d(z[:, :, 0], 3, 1, 1)[:, :, None],
        "largest": lambda z: F.max_pool2d(z[:, :, 0], 3, 1, 1)[:, :, None],
        "overlapping": lambda z: F.conv_transpose2d(z[:, :, 0], w, stride=2)[:, :, None],
        "transposed, padded": lambda z: F.conv_transpose2d(z[:, :, 0], w, stride=3,
                                                           padding=1)[:, :, None],
        "transposed, dilated": lambda z: F.conv_transpose2d(z[:, :, 0], w, stride=3,
                                                            dilation=2)[:, :, None],
        "thin": lambda z: F.conv2d(z[:, :, 0], torch.randn(2, 2, 7, 7), padding=3)[:, :, None],
        "ambiguous": lambda z: F.scaled_dot_product_attention(*[z.reshape(8, 1, 8, 1)]
                                                              * 3).view(z.shape)}

    def rank():
        said = {}
        for name, decode in cases.items():
            try:
                sp.halo_decode(decode, torch.randn(1, 2, 4 if name == "ambiguous" else 1, 4, 4))
            except ValueError as error:
                said[name] = str(error)
        return said
    for said in launch(rank, 2):
        assert said.keys() == cases.keys() and all("use " in s for s in said.values())


@pytest.mark.parametrize("shape, world, can", [
    ((8, 4, 8, 8), 8, True), ((16, 8, 8, 8), 4, True), ((16, 8, 8, 8), 8, False),
    ((4, 6, 5, 2), 2, True), ((4, 6, 5, 2), 6, False), ((2048,), 2, False), ((2048,), 1, False),
    ((4, 16, 4, 4), 1, True), ((16, 32, 96, 96), 8, True)])
def test_which_latents_a_halo_can_share(shape, world, can):
    assert sp.can_be_split(shape, world) == can


@pytest.mark.parametrize("T", [6, 8])
def test_a_halo_can_share_what_it_says(T):
    """Latents of T x 2 x 4: 8 frames are a multiple of the pixels of a band, 6 are not."""
    import tae
    torch.manual_seed(0)
    model = tae.TAE(tae.PRESETS["toy"]).eval()
    z = torch.randn(1, 8, T, 2, 4)

    def rank():
        try:
            return sp.halo_decode(model.decode, z) is not None or dist.get_rank() > 0
        except ValueError as error:
            return str(error)
    said, can = launch(rank, 2), sp.can_be_split(z.shape[1:], 2)
    assert can == (T == 6) and all((s is True) == can for s in said), said


def test_halo_attention_that_one_rank_cannot_tell():
    """6 frames, bands of 3 and 2 rows of 2 columns: rank 0's 6 sequences of 6 tokens may be either,
    rank 1's can only be one of the two."""
    z = torch.randn(1, 2, 6, 5, 2)

    def decode(z):
        B, C, T, H, W = z.shape
        x = z.permute(0, 2, 3, 4, 1).reshape(T, 1, H * W, C)                      # over space
        x = F.scaled_dot_product_attention(x, x, x).view(B, T, H * W, C)
        x = x.transpose(1, 2).reshape(H * W, 1, T, C)                             # over time
        x = F.scaled_dot_product_attention(x, x, x)
        return x.view(B, H, W, T, C).permute(0, 4, 3, 1, 2)

    want = decode(z)
    assert sp.difference(launch(sp.halo_decode, 2, decode, z)[0], want) < 1e-5


# ---- what goes wrong -----------------------------------------------------------------------------
@pytest.mark.parametrize("world, settings, message", [
    (4, dict(ulysses=2), "= 2: not the number of ranks, 4"),
    (2, dict(ulysses=4), "= 4: not the number of ranks, 2"),
    (3, dict(cfg=3), "cfg 3: not one of 1, 2"),
    (2, dict(cfg=2, guided=False), "needs guidance"),
    (2, dict(pp=2, patches=1), "patches 1: fewer than the pp 2 stages"),
    (1, dict(patches=2), "patches 2: needs pp"),
    (2, dict(pp=2, warmup=0), "warmup 0"),
    (2, dict(pp=2, warmup=9, steps=8), "warmup 9: more than the 8 steps"),
    (2, dict(ring=2, warmup=3, steps=2), "warmup 3: more than the 2 steps"),    # --mode every
    (8, dict(pp=8, depth=6), "pp 8: more stages than the model's 6 blocks"),
    (8, dict(ulysses=8, heads=6), "ulysses 8: more ranks than the model's 6"),
    (1, dict(ring=0), "ring 0"),
    (2, dict(pp=2, patches=-1), "patches -1"),
])
def test_settings_that_cannot_work(world, settings, message):
    with pytest.raises(ValueError, match=message):
        sp.check_degrees(world, **settings)


def misfits(model, inputs):
    said = []
    for mode in (dict(ulysses=4), dict(ring=2, patches=2), dict(pp=2, patches=1), dict(cfg=2),
                 dict(pp=2, patch_axis="x"), dict(pp=2, patches=65)):
        try:
            sampler(model, mode).sample(**inputs)
            said.append("ok")
        except ValueError as error:
            said.append(str(error))
    return said


def test_every_rank_hears_of_a_misfit_and_none_hangs():
    model, inputs = tiny(heads=4)
    ranks = launch(misfits, 2, model, dict(inputs, null=None, guidance=1.0))
    assert ranks[0] == ranks[1] and "ok" not in ranks[0]


def test_ranks_with_different_seeds_make_the_same_clip():
    model, inputs = tiny()

    def rank():
        torch.manual_seed(dist.get_rank())
        mine = dict(inputs, x0=torch.randn(SHAPE), text=inputs["text"] + torch.randn(1))
        return mine["x0"], mine["text"], ParallelSampler(model, make_mesh(ring=2)).sample(**mine)
    (x0, text, a), (other, _, b) = launch(rank, 2)
    assert not torch.equal(x0, other) and torch.equal(a, b)
    assert sp.difference(a, emulate("exact", model, **dict(inputs, x0=x0, text=text))) < 1e-5


@pytest.mark.parametrize("what", ["shapes", "ts"])
def test_ranks_that_are_called_otherwise_say_so(what):
    model, inputs = tiny()

    def rank():
        mine, odd = dict(inputs), dist.get_rank() == 1
        if what == "shapes" and odd:
            mine["text"], mine["mask"] = torch.randn(1, 3, 32), None
        mine["steps"] = 4 + (what == "ts" and odd)
        try:
            ParallelSampler(model, make_mesh(ulysses=2)).sample(**mine)
        except ValueError as error:
            return str(error)
    for said in launch(rank, 2):
        assert said.startswith(f"{what}: rank 1 has ") and " rank 0 " in said


def test_launch_raises_the_first_error():
    def rank():
        if dist.get_rank() == 1:
            raise ValueError("this rank is odd")
        dist.barrier()
    with pytest.raises(Exception, match="this rank is odd"):
        launch(rank, 2)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["lazy", "eager"])
def test_pipefusion_never_waits_for_itself_on_nccl(how, world):
    """NCCL's two rules for a message on its own, on gloo. lazy: the first of a pair waits until the
    other end makes its own first. eager (init_process_group with a device_id): those of a group
    run one after the other, in the order of their posting."""
    model, inputs = tiny()

    class Later:
        def __init__(self):
            self.done = threading.Event()

        def wait(self):
            if not self.done.wait(10):
                raise TimeoutError("stuck in its stream")

    def rank():
        me, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
        streams, opened = {}, set()

        def run(stream):
            for op, args, later in iter(stream.get, None):
                op(*args).wait()
                later.done.set()

        def message(op, x, peer, group):
            pair = dist.distributed_c10d._world.pg_names[group], *sorted((me, peer))
            if how == "lazy":
                if pair not in opened:
                    opened.add(pair)
                    store.set(f"{pair} {me}", "")
                    store.wait([f"{pair} {peer}"], timedelta(seconds=10))
                return op(x, peer, group)
            if group not in streams:
                streams[group] = queue.Queue()
                threading.Thread(target=run, args=(streams[group],), daemon=True).start()
            later = Later()
            streams[group].put((op, (x, peer, group), later))
            return later
        dist.isend, dist.irecv = (partial(message, op) for op in (dist.isend, dist.irecv))
        return ParallelSampler(model, make_mesh(pp=world)).sample(**inputs)
    want = emulate("pipefusion", model, **inputs, patches=world)
    assert all(sp.difference(x1, want) < 1e-5 for x1 in launch(rank, world))


# ---- command line --------------------------------------------------------------------------------
@pytest.fixture
def fake_run(monkeypatch, tmp_path):
    """`train` with a tiny model in the place of a run: what the command line needs of it."""
    model, inputs = tiny()
    decoder, seen = sp.TinyDecoder().eval(), SimpleNamespace(prompts=[], wrote=[])
    cfg = SimpleNamespace(
        sample=SimpleNamespace(steps=4, guidance=3.0, solver="euler"),
        flow=SimpleNamespace(objective="flow"), clips=SimpleNamespace(shape=(7, 15, 16)))

    def prompts(texts, features):
        seen.prompts += features["texts"]
        return inputs["text"], inputs["mask"], inputs["null"], None
    run = SimpleNamespace(
        cfg=cfg, dit=model, latent_shape=SHAPE[1:], fps_of=lambda prompt: 16,
        encode=lambda texts: {"texts": texts}, prompts=prompts,
        noise=lambda seeds: torch.randn(SHAPE, generator=torch.Generator().manual_seed(*seeds)),
        decode=torch.no_grad()(decoder),
        schedule=lambda steps, name: torch.linspace(0, 1, steps + 1))
    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(
        load_run=lambda path, device="cpu", prepare=None: run,
        text_cond=SimpleNamespace(clean=lambda prompt: prompt),
        write_video=lambda path, clip, fps: seen.wrote.append((path.name, tuple(clip.shape)))))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.chdir(tmp_path)
    return seen


def test_prompt_files_are_read_as_utf_8_and_cut_at_line_ends_only(fake_run, tmp_path):
    """A byte order mark is no part of the first prompt; form feeds, U+2028 and their like, at which
    str.splitlines cuts, stay inside a prompt."""
    lines = ["a red circle", "two\x0bparts \x1c of\u2028one \x85 prompt", "une étoile", "last"]
    for end, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf"), ("\r", b"")):
        fake_run.prompts.clear()
        (tmp_path / "prompts.txt").write_bytes(mark + end.join([*lines, "  ", ""]).encode())
        assert sp.main(["--workdir", "run", "--prompt-file", "prompts.txt", "--steps", "1",
                        "--decode", "one"]) == 0
        assert fake_run.prompts == lines
    assert [name for name, _ in fake_run.wrote] == 3 * [f"clip-{i}.mp4" for i in range(4)]


def test_only_rank_0_runs_the_text_encoders():
    def rank():
        mine, given = [], []
        run = SimpleNamespace(
            encode=lambda texts: mine.append(texts) or {"words": torch.ones(1, 3)},
            prompts=lambda texts, features: given.append(features["words"].sum().item()) or 4 * [0],
            noise=lambda seeds: seeds)
        sp.inputs_of(run, "a red circle", 0, 1.0, None)
        return mine, given
    assert launch(rank, 2) == [([["a red circle"]], [3.0]), ([], [3.0])]

    def no_encoder():
        def encode(texts):
            raise ValueError("words google/ul2: not there")
        with pytest.raises(ValueError, match="words google/ul2: not there"):
            sp.inputs_of(SimpleNamespace(encode=encode), "a red circle", 0, 1.0, None)
        return True
    assert launch(no_encoder, 2) == [True, True]


def test_a_prompt_that_the_terminal_cannot_show(fake_run, monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    assert sp.main(["--workdir", "run", "--prompt", "une \u00e9toile", "--steps", "1"]) == 0
    sys.stdout.flush()
    assert rb"une \xe9toile" in said.getvalue() and fake_run.wrote



def test_a_decoded_clip_has_the_runs_frames(fake_run):
    """Frames and rows are no multiple of what a latent frame or row holds."""
    assert sp.main(["--workdir", "run", "--prompt", "a", "--out", "c.gif"]) == 0
    assert fake_run.wrote == [("c.gif", (3, 7, 15, 16))]


def test_a_place_that_cannot_be_written_is_seen_before_sampling(fake_run, capsys):
    Path("clip.gif").mkdir()
    Path("file").touch()
    for out in ("clip.gif", "file/clip.gif"):
        code, err = exits(["--workdir", "run", "--prompt", "a", "--out", out], capsys)
        assert code == 2 and f"--out {out}: " in err and err.count("\n") == 1
    assert not fake_run.prompts and not fake_run.wrote


def test_check_and_every_see_what_is_wrong(fake_run, monkeypatch, capsys):
    flags = ["--workdir", "run", "--prompt", "a", "--check"]
    assert sp.main(flags) == 0 and sp.main([*flags, "--mode", "every"]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    right = sp.emulate
    monkeypatch.setattr(sp, "emulate", lambda *a, **k: right(*a, **k) * 1.01)
    assert sp.main(flags) == 1 and sp.main([*flags, "--mode", "every"]) == 1
    assert capsys.readouterr().out.count("FAIL") == 2
    monkeypatch.setattr(sp, "emulate", right)
    run, calls = sys.modules["train"].load_run("run"), itertools.count(1)
    decode = run.decode
    run.decode = lambda z: decode(z) * (1 + 0.001 * next(calls))    # of bands, of rank 0 alone
    assert sp.main(flags) == 1 and "decoded within 1e-04" in capsys.readouterr().out


def exits(argv, capsys, **env):
    """main(argv) in this process -> (exit status, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        for k, v in env.items():
            patch.setenv(k, str(v))
        patch.setattr(sp.time, "sleep", lambda s: None)
        with pytest.raises(SystemExit) as stop:
            sp.main(argv)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("argv, world, message", [
    (["--cfg", "3"], 3, "--cfg: 3: must be 1 to 2"),
    (["--ulysses", "2"], 4, "not the number of ranks, 4"),
    (["--pp", "2", "--patches", "1"], 2, "patches 1: fewer than the pp 2 stages"),
    (["--ring", "two"], 1, "--ring: invalid int value: 'two'"),
    (["--steps", "0"], 1, "--steps: 0: must be 1 to 10000"),
    (["--guidance", "nan"], 1, "--guidance: nan: must be"),
    (["--patch-axis", "th"], 1, "invalid choice: 'th'"),
    (["--frobnicate"], 1, "unrecognized arguments: --frobnicate"),
    (["--step", "5"], 1, "unrecognized arguments"),
    (["--mode", "every", "--cfg", "2"], 2, "--mode every chooses the mesh itself"),
    (["--mode", "every"], 2, "--mode every: needs --check"),
    (["--mode", "every", "--check", "--decode", "one"], 2, "--mode every writes no clip"),
    (["--mode", "every", "--check", "--prompt", "b"], 2, "takes one prompt, not 2"),
    (["--warmup", "2"], 1, "--warmup 2: needs --pp 2 or more"),
    (["--out", "clip.png"], 1, "--out clip.png: must end in .mp4 or .gif"),
    (["--out", ""], 1, "--out : must end in .mp4 or .gif"),
    (["--prompt-file", "nowhere.txt"], 1, "--prompt-file nowhere.txt"),
    (["--prompt", " "], 1, "--prompt: needed with --workdir"),
    (["--device", "cuda"], 1, "--device cuda: torch sees 0 GPUs"),
])
def test_bad_arguments_are_one_line_and_status_2(argv, world, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    argv = ["--workdir", "runs/none", "--prompt", "a red circle", *argv]
    code, err = exits(argv, capsys, WORLD_SIZE=world, RANK=0)
    assert code == 2 and message in err and err.count("\n") == 1
    code, err = exits(argv, capsys, WORLD_SIZE=max(world, 2), RANK=1)
    assert code == 2 and message in err and err.count("\n") == 1
    assert err.startswith("sample_parallel.py: rank 1: ")


def test_flags_without_a_run(capsys):
    for argv, message in ((["--prompt", "a"], "--workdir: needed with --prompt"),
                          (["--workdir", "runs/none"], "--prompt: needed"),
                          (["--workdir", ""], "--workdir '': no such folder")):
        code, err = exits(argv, capsys)
        assert code == 2 and message in err and err.count("\n") == 1


def test_torchrun_leaves_every_flag_to_us():
    """torchrun claims a flag that is a prefix of one of its own, wherever it stands."""
    from torch.distributed.run import get_args_parser
    flags = set()

    def spy(self, *args):
        flags.update(f for f in self._option_string_actions if f.startswith("--"))
        return right(self, *args)
    right = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", spy)
        sp.parse([])
    for flag in flags - {"--help"}:
        args = get_args_parser().parse_args(["--nproc_per_node", "2", "sample_parallel.py", flag,
                                             "1"])
        assert args.training_script_args == [flag, "1"], flag
    assert len(flags) > 15


@pytest.mark.slow
def test_without_stderr_the_line_goes_to_stdout(tmp_path):
    """Closed by the shell (`2>&-`), Python has None in its place."""
    shutil.copy(ROOT / "sample_parallel.py", tmp_path)
    done = subprocess.run(f"{sys.executable} sample_parallel.py --workdir x --steps 0 2>&-",
                          shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert "--steps: 0: must be 1 to 10000" in done.stdout


def test_a_failing_claim_is_exit_status_1(monkeypatch):
    monkeypatch.setattr(sp, "demo", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sp.main([]) == 1


def random_run(folder):
    """A finished run of train.py with random weights, in the folder."""
    import json
    from dataclasses import asdict

    import train
    cfg = train.finish(train.SCALES["toy"]())
    cfg.dit.depth, cfg.sample.steps = 2, 6
    torch.manual_seed(0)
    model = train.TextToVideo(cfg)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    tae = train.autoencoder.autoencoder(cfg.autoencoder_config)
    tensors = model.state_dict() | {f"tae.{k}": v for k, v in tae.state_dict().items()}
    folder.mkdir()
    train.save_tensors(folder / "model.safetensors", tensors, config=json.dumps(asdict(cfg)))


def command(world, *flags):
    """sample_parallel.py by torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                           str(world), "sample_parallel.py", *flags], cwd=ROOT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--cfg 2", "--pp 2 --patches 4 --patch-axis h",
                                   "--pp 2 --ulysses 2 --schedule linear"])
def test_the_command_line_samples_a_run_and_checks_itself(flags, tmp_path):
    """A run of random weights; --check compares the ranks with one process."""
    random_run(tmp_path / "run")
    flags = [*flags.split(), "--workdir", str(tmp_path / "run"), "--prompt", "a red circle",
             "--prompt", "a blue star", "--check", "--out", str(tmp_path / "clip.gif")]
    done = command(4 if "--ulysses" in flags else 2, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 2 and "FAIL" not in done.stdout
    assert {p.name for p in tmp_path.glob("*.gif")} == {"clip-0.gif", "clip-1.gif"}


@pytest.mark.slow
def test_mode_every_checks_each_mesh(tmp_path):
    """One row for each mesh of two ranks; writes nothing."""
    random_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    done = command(2, "--workdir", str(tmp_path / "run"), "--prompt", "a red circle", "--mode",
                   "every", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line[2:24].strip() for line in done.stdout.splitlines() if " vs e" in line]
    assert sorted(rows) == ["cfg 2", "pp 2 x M 2", "pp 2 x M 4", "ring 2", "ulysses 2"]
    assert "PASS 5 of 5 modes" in done.stdout and sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_torchrun_ends_when_the_mesh_does_not_fit():
    done = command(2, "--workdir", "runs/none", "--prompt", "a", "--ulysses", "4")
    assert done.returncode != 0 and done.stderr.count("not the number of ranks, 2") == 1
