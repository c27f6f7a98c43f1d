"""sample_parallel.py against one process: forked ranks, gloo over a file, one thread each."""
import itertools
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import sample_parallel as sp
from sample_parallel import ParallelSampler, emulate, launch, make_mesh

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 2, 8, 8, 8)


def tiny(seed=0, text=32, **kwargs):
    """An untrained model (its velocity is not zero) and everything a sample needs."""
    torch.manual_seed(seed)
    kwargs = {"D": 32, "depth": 4, "heads": 4, **kwargs}
    model = sp.TinyDiT(**kwargs).eval()
    D, shape = kwargs["D"], (1, 2, *kwargs.get("grid", SHAPE[2:]))
    mask = torch.tensor([[True, True, True, False]])
    return model, dict(x0=torch.randn(shape), text=torch.randn(1, 4, D), mask=mask,
                       null=torch.randn(1, 2, D),
                       guidance=3.0, steps=4)


def run_modes(model, inputs, modes):
    """On every rank: each mode once -> [(x1, sent of the busiest rank, facts)]."""
    out = []
    for mode in modes:
        mesh = make_mesh(**{k: v for k, v in mode.items() if k in sp.AXES})
        sampler = ParallelSampler(model, mesh,
                                  **{k: v for k, v in mode.items() if k not in sp.AXES})
        x1, row = sp.measure(sampler, **inputs)
        out.append((x1, row, sampler.facts))
    return out


def oracle(model, inputs, mode):
    name, patches = "exact", 1
    if mode.get("pp", 1) > 1:
        name, patches = "pipefusion", mode.get("patches") or mode["pp"]
    if mode.get("baseline"):
        name, patches = mode["baseline"], mode["ring"]
    return emulate(name, model, **inputs, patches=patches, warmup=mode.get("warmup", 1),
                   patch_axis=mode.get("patch_axis", "t"))


def compare(model, inputs, modes, world, bitwise=lambda mode: False, tolerance=1e-5):
    ranks = launch(run_modes, world, model, inputs, modes, timeout=60)
    for i, mode in enumerate(modes):
        want, x1 = oracle(model, inputs, mode), ranks[0][i][0]
        assert all(torch.equal(x1, r[i][0]) for r in ranks), f"{mode}: ranks hold different clips"
        assert sp.difference(x1, want) < tolerance, f"{mode}: {sp.difference(x1, want):.1e}"
        if bitwise(mode):
            assert torch.equal(x1, want), f"{mode}: {sp.difference(x1, want):.1e}, not bit for bit"
    return ranks


# ---- the oracle itself ---------------------------------------------------------------------------

def forward_loop(model, x0, text, mask=None, null=None, guidance=1.0, steps=4, **_):
    """Written without the seams: the model's forward, and Euler by hand."""
    x, dt = x0.clone(), 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i / steps)
        with torch.no_grad():
            v = model(x, t, text, mask)
            if null is not None:
                v = model(x, t, null, None) * (1 - guidance) + guidance * v
        x = x + dt * v
    return x


@pytest.mark.parametrize("guided", [True, False])
def test_emulate_exact_is_the_models_own_forward(guided):
    model, inputs = tiny()
    if not guided:
        inputs.update(null=None, guidance=1.0)
    assert sp.difference(emulate("exact", model, **inputs), forward_loop(model, **inputs)) < 1e-5
    one = ParallelSampler(model).sample(**inputs)                   # a process of its own, no ranks
    assert torch.equal(one, emulate("exact", model, **inputs))
    assert all(block.attend is sp.attention for block in model.blocks)      # the model is as it was


@pytest.mark.parametrize("mode", ["pipefusion", "distrifusion", "no_exchange"])
def test_emulated_modes_are_exact_while_warming_up_and_not_after(mode):
    model, inputs = tiny()
    exact = emulate("exact", model, **inputs)
    assert torch.equal(emulate(mode, model, **inputs, patches=4, warmup=4), exact)
    assert sp.difference(emulate(mode, model, **inputs, patches=4, warmup=1), exact) > 1e-4


def test_layout_shares_every_token_once():
    for N, M, R, U in itertools.product((64, 105), (1, 3, 4), (1, 2, 3), (1, 2, 4)):
        order = torch.randperm(N)
        layout = sp.Layout(order, M, R, U)
        rows = torch.cat([layout.rows(r, u) for r in range(R) for u in range(U)])
        assert torch.equal(rows.sort().values, torch.arange(N))
        for r in range(R):
            # as the all-to-all of a warm-up delivers
            delivered = torch.cat([layout.rows(r, u) for u in range(U)])
            cache = delivered[layout.splice(r)]
            for m in range(M):                                   # and as that of patch m does later
                patch = torch.cat([layout.rows(r, u)[layout.local(m, r, u)] for u in range(U)])
                assert torch.equal(cache[layout.slot(m, r)], patch)


def test_token_order_makes_bands():
    model, _ = tiny()
    n = torch.arange(64).view(8, 4, 2)                                      # token grid T, H, W
    assert torch.equal(sp.token_order(model, SHAPE, "t"), torch.arange(64))
    assert torch.equal(sp.token_order(model, SHAPE, "h"), n.permute(1, 0, 2).flatten())
    assert torch.equal(sp.token_order(model, SHAPE, "w"), n.permute(2, 0, 1).flatten())


def test_attention_lse_is_the_definition():
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    scores = q @ k.mT / 4
    o, lse = sp.attention_lse(q, k, v)
    assert torch.allclose(o, scores.softmax(-1) @ v, atol=1e-5)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


# ---- exact modes ---------------------------------------------------------------------------------

def test_ring_takes_q_k_v_however_they_lie():
    """Strided in the last dimension (heads innermost), and channels last."""
    last = dict(memory_format=torch.channels_last)

    def rank(lie):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 6, 8)
        me = dist.get_rank()
        ring = sp.Ring(sp.Axis(2, me, dist.group.WORLD), [3, 3], sp.Wire())
        mine = [lie(a[:, :, 3 * me:3 * me + 3]) for a in (q, k, v)]
        return ring(*mine) - sp.attention(q, k, v)[:, :, 3 * me:3 * me + 3]
    for lie in (lambda a: a.mT.contiguous().mT, lambda a: a.contiguous(**last)):
        for difference in launch(rank, 2, lie, timeout=60):
            assert difference.abs().max() < 1e-5


def only(mode, *axes):
    return all(mode.get(a, 1) == 1 for a in sp.AXES if a not in axes)


def test_two_ranks():
    model, inputs = tiny()
    modes = [dict(cfg=2), dict(ulysses=2), dict(ulysses=2, pieces=1), dict(ring=2)]
    modes += [dict(pp=2, patches=M, warmup=W) for M, W in ((2, 1), (4, 1), (5, 1), (2, 2), (3, 4))]
    modes += [dict(pp=2, patches=2, patch_axis=a) for a in "hw"]
    ranks = compare(model, inputs, modes, 2, bitwise=lambda m: only(m, "ulysses") or only(m, "pp"))
    all_warm = ranks[0][modes.index(dict(pp=2, patches=3, warmup=4))][0]
    assert torch.equal(all_warm, emulate("exact", model, **inputs))  # nothing stale: the exact clip


def test_every_hybrid_of_four_ranks():
    model, inputs = tiny()
    modes = [dict(zip(sp.AXES, d))
             for d in itertools.product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4))
             if math.prod(d) == 4]
    assert len(modes) == 9                                                 # 3 of one axis, 6 of two
    modes += [dict(pp=4, patches=8), dict(pp=4, patches=5), dict(pp=2, ulysses=2, patches=4)]
    modes += [dict(ring=4, baseline="distrifusion"), dict(ring=4, baseline="distrifusion",
                                                          patch_axis="h")]
    modes += [dict(ring=4, baseline="no_exchange", warmup=2)]
    compare(model, inputs, modes, 4,
            bitwise=lambda m: only(m, "ulysses", "pp") or "baseline" in m)


def test_nothing_has_to_divide():
    """105 tokens, 6 heads and 5 blocks over 2 and 4 ranks, M that divides nothing."""
    model, inputs = tiny(grid=(3, 5, 7), patch=(1, 1, 1), heads=6, D=48, depth=5)
    for world in (2, 4):
        modes = [dict(ulysses=world), dict(ring=world), dict(pp=world, patches=world + 1)]
        if world == 4:
            modes += [dict(ring=2, ulysses=2), dict(pp=2, ulysses=2, patches=3),
                      dict(pp=2, ring=2, patches=3)]
        compare(model, inputs, modes, world)


def test_three_ranks():
    """A number of ranks that divides neither tokens, heads nor blocks."""
    model, inputs = tiny()
    modes = [dict(ulysses=3), dict(ring=3), dict(pp=3, patches=3), dict(pp=3, patches=5, warmup=2)]
    compare(model, inputs, modes, 3, bitwise=lambda m: only(m, "ulysses", "pp"))


def test_batches_no_guidance_and_a_schedule():
    model, inputs = tiny()
    x0, text = torch.randn(3, *SHAPE[1:]), torch.randn(3, 4, 32)
    ts = torch.tensor([0, 0.1, 0.3, 0.6, 1.0])
    inputs = dict(x0=x0, text=text, ts=ts)
    modes = [dict(ulysses=2), dict(ring=2), dict(pp=2, patches=3)]
    compare(model, inputs, modes, 2)


def test_bf16_weights():
    model, inputs = tiny()
    model = model.bfloat16()
    inputs.update(text=inputs["text"].bfloat16(), null=inputs["null"].bfloat16())
    model.condition = lambda t, condition=model.condition: condition_in_bf16(model, t)
    compare(model, inputs, [dict(ulysses=2), dict(pp=2), dict(ring=2)], 2,
            bitwise=lambda m: only(m, "ulysses", "pp"),
            tolerance=3e-2)


def condition_in_bf16(model, t):
    angle = t[:, None] * 8 * torch.arange(16) ** 1.3
    return model.time(torch.cat([angle.cos(), angle.sin()], 1).bfloat16()).unflatten(1, (4, -1))


def test_collectives_match_on_all_ranks():
    """Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch checks every collective for being the same one
    on all ranks, where it would otherwise hang, or mix up two."""
    model, inputs = tiny()
    inputs["steps"] = 2
    modes = [dict(cfg=2, ulysses=2), dict(ring=4), dict(pp=4), dict(pp=2, ulysses=2)]
    decoder, z = sp.TinyDecoder().eval(), torch.randn(1, 2, 3, 9, 5)

    def rank():
        return run_modes(model, inputs, modes), sp.halo_decode(decoder, z)
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        launch(rank, 4, timeout=120)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def test_the_wrong_splice_order_fails(monkeypatch):
    """The mutation that no clip would show: the cache keeps the order of the warm-up's
    all-to-all."""
    model, inputs = tiny()
    modes = [dict(pp=2, ulysses=2, patches=4)]
    monkeypatch.setattr(sp.Layout, "splice", lambda self, r: torch.arange(self.shard(r)))
    with pytest.raises(AssertionError):
        compare(model, inputs, modes, 4)


def test_stale_buffers_of_a_sampler_are_not_reused():
    model, inputs = tiny()
    other = dict(inputs, x0=torch.randn(SHAPE), text=torch.randn(1, 4, 32))
    plain = dict(inputs, null=None, guidance=1.0)              # half the batch: other buffer shapes

    def rank():
        sampler = ParallelSampler(model, make_mesh(pp=2), 2)
        return [sampler.sample(**i) for i in (inputs, other, plain, inputs)]
    got = launch(rank, 2, timeout=60)[0]
    for x1, i in zip(got, (inputs, other, plain, inputs)):
        assert torch.equal(x1, emulate("pipefusion", model, **i, patches=2))


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
                       null=torch.randn(1, 1, 24),
                       guidance=2.0, steps=4)


def test_the_repositorys_dit():
    model, inputs = dit_case([(4, (1, 2, 2), (4, 8, 8))])
    inputs["x0"] = torch.randn(1, 4, 4, 8, 8)
    assert sp.difference(emulate("exact", model, **inputs), forward_loop(model, **inputs)) < 1e-5
    modes = [dict(ulysses=2), dict(ring=2), dict(cfg=2), dict(pp=2, patches=4),
             dict(pp=2, patches=2, patch_axis="h")]
    compare(model, inputs, modes, 2, bitwise=lambda m: only(m, "ulysses", "pp"))
    assert all(b.attend is F.scaled_dot_product_attention for b in model.blocks)


def test_several_latent_streams_laid_flat():
    """Columns of a token that are not its stream's must stay zero, or embed would read the head's
    noise there."""
    model, inputs = dit_case([(4, (1, 2, 2), (2, 4, 4)), (2, (1, 1, 2), (3, 1, 8))])
    n = 4 * 2 * 4 * 4 + 2 * 3 * 8
    inputs["x0"] = torch.randn(1, n)
    assert sp.difference(emulate("exact", model, **inputs), forward_loop(model, **inputs)) < 1e-5
    compare(model, inputs, [dict(ulysses=2), dict(ring=2), dict(pp=2, patches=3)], 2)


def test_in_context_conditioning_is_refused():
    model, _ = dit_case([(4, (1, 2, 2), (4, 8, 8))], conditioning="in_context")
    with pytest.raises(ValueError, match="in_context"):
        ParallelSampler(model)


# ---- bytes ---------------------------------------------------------------------------------------

def count_bytes(model, inputs, modes):
    """The bytes that torch.distributed is given, counted from outside of sample_parallel.py."""
    totals = []
    isend, batch = dist.isend, dist.batch_isend_irecv
    a2a, gather = dist.all_to_all_single, dist.all_gather
    size = lambda x: x.numel() * x.element_size()

    def count(n):
        totals[-1] += n
    dist.isend = lambda x, *a, **k: (count(size(x)), isend(x, *a, **k))[1]
    dist.all_gather = lambda out, x, *a, **k: (count(size(x)), gather(out, x, *a, **k))[1]

    def all_to_all(out, x, got, sent, group, **k):
        count((sum(sent) - sent[dist.get_rank(group)]) * x.element_size())
        return a2a(out, x, got, sent, group=group, **k)

    def batched(ops):
        count(sum(size(p.tensor) for p in ops if p.op is not dist.irecv))
        return batch(ops)
    dist.all_to_all_single, dist.batch_isend_irecv = all_to_all, batched
    isend_in_ops = dist.P2POp
    dist.P2POp = lambda op, *a, **k: isend_in_ops(isend if op is dist.isend else op, *a, **k)
    mine = []
    for mode in modes:
        totals.append(0)
        sampler = ParallelSampler(model,
                                  make_mesh(**{k: v for k, v in mode.items() if k in sp.AXES}),
                                  mode.get("patches", 0))
        totals[-1] = 0                                      # without what opened the links
        sampler.sample(**inputs)
        mine.append((totals[-1], sum(sampler.wire.sent.values()), sp.all_sent(sampler),
                     sp.traffic(**sampler.facts, **sampler.degrees)))
    return mine


def test_bytes_on_the_wire_are_the_formula():
    model, inputs = tiny()
    modes = [dict(ulysses=4), dict(ring=4), dict(ring=2, ulysses=2), dict(cfg=2, ulysses=2),
             dict(cfg=2, ring=2),
             dict(pp=4, patches=8), dict(cfg=2, pp=2, patches=2), dict(pp=2, ulysses=2, patches=4),
             dict(pp=2, ring=2, patches=4)]
    for rank in launch(count_bytes, 4, model, inputs, modes, timeout=60):
        for mode, (outside, counted, busiest, formula) in zip(modes, rank):
            assert outside == counted, mode
            assert busiest == formula, mode


def test_traffic_grows_with_depth_but_for_pipefusion():
    modes = [dict(ulysses=2), dict(ring=2), dict(pp=2, patches=2), dict(cfg=2)]
    shallow, deep = (launch(count_bytes, 2, *tiny(depth=L), modes, timeout=60)[0] for L in (2, 8))
    a, b = [m[0] for m in shallow], [m[0] for m in deep]
    assert [y / x for x, y in zip(a, b)] == [4, 4, 1, 1]


def test_traffic_by_hand():
    """[XD table 1] at Movie Gen's longest context on 8 devices, one row, bf16."""
    per = lambda **d: sum(sp.traffic(73728, 6144, 48, 64, B=1, branches=1, S=1, size=2,
                                     **d).values()) / 1e9
    assert per(ulysses=8) == pytest.approx(19.0, abs=0.05)
    assert per(ring=8) == pytest.approx(76.1, abs=0.05)
    assert per(pp=8, M=8) == pytest.approx(0.906, abs=0.01)


# ---- staleness -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained():
    model, text = sp.train_tiny()
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
    for numbers, x1 in launch(rank, 2, timeout=60):
        assert numbers == whole // 2 and torch.equal(x1, want)


def test_fully_sharded_blocks():
    model, inputs = tiny()
    whole = sum(p.numel() for p in model.blocks.parameters())

    def rank():
        mesh = make_mesh(pp=2, ulysses=2)
        sampler = ParallelSampler(model, mesh, 2)
        sp.shard_weights(sp.keep_stage(model, 2, sampler.pp.index), mesh)
        x1 = sampler.sample(**inputs)
        return sum(p.to_local().numel() for p in model.blocks.parameters()), x1
    want = emulate("pipefusion", model, **inputs, patches=2)
    for numbers, x1 in launch(rank, 4, timeout=60):
        assert numbers <= whole // 4 + 100 and torch.equal(x1, want)


# ---- decoding ------------------------------------------------------------------------------------

def decode_ranks(decoder, z):
    return sp.halo_decode(decoder, z), sp.tiled_decode(decoder, z, tile=3, overlap=1)


@pytest.mark.parametrize("world, rows", [(2, 6), (4, 8), (4, 9)])
def test_halo_decode_equals_one_rank(world, rows):
    torch.manual_seed(0)
    decoder, z = sp.TinyDecoder().eval(), torch.randn(1, 2, 5, rows, 7)
    with torch.no_grad():
        want = decoder(z)
        naive = torch.cat([decoder(z[:, :, :, s]) for s in sp.spans(sp.split(rows, world))], dim=3)
    got = launch(decode_ranks, world, decoder, z, timeout=60)
    assert all(g == (None, None) for g in got[1:])
    assert sp.difference(got[0][0], want) < 1e-5 and sp.difference(naive, want) > 1e-2
    assert torch.equal(got[0][1], sp.tiled_decode(decoder, z, tile=3, overlap=1))


def test_halo_decode_of_the_repositorys_tae():
    tae = pytest.importorskip("tae")
    torch.manual_seed(0)
    model = tae.TAE(tae.PRESETS["toy"]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None
    z = torch.randn(1, 8, 4, 8, 8)
    with torch.no_grad():
        want = model.decode(z)
    got = launch(sp.halo_decode, 4, model.decode, z, timeout=60)[0]
    assert sp.difference(got, want) < 1e-5


def test_tiles_blend_to_the_whole():
    """A decoder without memory: tiles give the same clip as one pass, whatever the ramp; T = 1 and
    short last tiles too."""
    decode = lambda z: z[:, :1].repeat_interleave(4, 2)
    for T in (1, 2, 4, 7, 9, 32):
        z = torch.randn(1, 2, T, 3, 3)
        assert torch.allclose(sp.tiled_decode(decode, z), decode(z), atol=1e-6)
    with pytest.raises(ValueError, match="overlap"):
        sp.tiled_decode(decode, z, tile=2, overlap=2)


def test_halo_refuses_what_it_cannot_split():
    conv = torch.nn.Conv2d(2, 2, 3, stride=2, padding=1)
    w, twice = torch.randn(2, 2, 3, 3), lambda x: F.interpolate(x, scale_factor=2.0)
    cases = {
        "valid": lambda z: F.conv2d(z[:, :, 0], w)[:, :, None],
        "valid, later": lambda z: twice(F.conv2d(twice(z[:, :, 0]), w))[:, :, None],
        "wide": lambda z: F.conv2d(z[:, :, 0], w, padding=2)[:, :, None],
        "strided, padded before": lambda z: F.conv2d(F.pad(z[:, :, 0], (0, 1, 0, 1)), w,
                                                     stride=2)[:, :, None],
        "circular": lambda z: F.pad(z[:, :, 0], (1, 1, 1, 1), mode="circular")[:, :, None],
        "cut": lambda z: F.pad(z[:, :, 0], (0, 0, -1, 0))[:, :, None],
        "normed, rms": lambda z: F.rms_norm(z, z.shape[-2:]),
        "normed, batch": lambda z: F.batch_norm(z[:, :, 0], None, None, training=True)[:, :, None],
        "unfolded": lambda z: F.unfold(z[:, :, 0], 3, padding=1)[:, :, None, :, None],
        "strided": lambda z: conv(z[:, :, 0])[:, :, None],
        "smooth": lambda z: F.interpolate(z[:, :, 0], scale_factor=2, mode="bilinear")[:, :, None],
        "pooled": lambda z: F.avg_pool2d(z[:, :, 0], 3, 1, 1)[:, :, None],
        "largest": lambda z: F.max_pool2d(z[:, :, 0], 3, 1, 1)[:, :, None],
        "normed": lambda z: F.layer_norm(z, z.shape[-2:]),
        "ambiguous": lambda z: F.scaled_dot_product_attention(*[z.reshape(8, 1, 8, 1)]
                                                              * 3).view(z.shape)}

    def rank():
        said = {}
        for name, decode in cases.items():
            try:
                sp.halo_decode(decode,
                               torch.randn(1, 2, 4, 4, 4) if name == "ambiguous"
                               else torch.randn(1, 2, 1, 4, 4))
            except ValueError as error:
                said[name] = str(error)
        return said
    for said in launch(rank, 2, timeout=60):
        assert said.keys() == cases.keys() and all("--decode one" in s for s in said.values())


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
    assert sp.difference(launch(sp.halo_decode, 2, decode, z, timeout=60)[0], want) < 1e-5


# ---- somebody else's model -----------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_readmes_wrapper_of_diffusers_wan(dtype, tolerance):
    """The code in the README, on Wan's own forward: an Euler loop by hand, with Wan's clock."""
    pytest.importorskip("text_cond").make_torchvision_importable()
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    (code,) = [part for part in (ROOT / "README.md").read_text().split("```python\n")
               if "class Seams" in part]
    names = {}
    exec(code.split("```")[0], names)
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
    model = names["seams"](wan).eval()
    inputs = dict(x0=x0, text=text[:1], null=text[1:], guidance=3.0, steps=4)
    assert sp.difference(emulate("exact", model, **inputs), x) < tolerance
    compare(model, inputs, [dict(ulysses=2), dict(cfg=2), dict(ring=2), dict(pp=2, patches=3)], 2,
            tolerance=tolerance)
    sp.keep_stage(model, 2, 0)
    assert 2 * sum(p.numel() for p in model.blocks.parameters()) == whole


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
    (8, dict(pp=8, depth=6), "pp 8: more stages than the model's 6 blocks"),
    (8, dict(ulysses=8, heads=6), "ulysses 8: more ranks than the model's 6"),
    (1, dict(ring=0), "ring 0"),
    (2, dict(pp=2, patches=-1), "patches -1"),
])
def test_settings_that_cannot_work(world, settings, message):
    with pytest.raises(ValueError, match=message):
        sp.check_degrees(world, **settings)


@pytest.mark.parametrize("change, message", [
    (dict(steps=0), "steps 0: must be at least 1"), (dict(steps=-5), "steps -5"),
    (dict(ts=torch.tensor([0.0])), "two times or more, from 0 to 1"),
    (dict(ts=torch.tensor([1.0, 0.0])), "from 0 to 1"),
    (dict(ts=torch.tensor([0.0, math.nan])), "from 0 to 1"),
    (dict(x0=torch.randn(2, *SHAPE[1:])), "text: a batch of 1, but x0 is one of 2"),
    (dict(null=torch.randn(3, 2, 32)), "null: a batch of 3, but x0 is one of 1"),
])
def test_a_sample_that_makes_no_sense(change, message):
    model, inputs = tiny()
    with pytest.raises(ValueError, match=message):
        ParallelSampler(model).sample(**dict(inputs, **change))


def misfits(model, inputs):
    said = []
    for degrees, kwargs in ((dict(ulysses=4), {}), (dict(ring=2), dict(patches=2)),
                            (dict(pp=2), dict(patches=1)),
                            (dict(cfg=2), {}), (dict(pp=2), dict(patch_axis="x")),
                            (dict(pp=2), dict(patches=65)),
                            (dict(ulysses=2), dict(baseline="distrifusion"))):
        try:
            ParallelSampler(model, make_mesh(**degrees), **kwargs).sample(**inputs)
            said.append("ok")
        except ValueError as error:
            said.append(str(error))
    return said


def test_every_rank_hears_of_a_misfit_and_none_hangs():
    model, inputs = tiny(heads=4)
    ranks = launch(misfits, 2, model, dict(inputs, null=None, guidance=1.0), timeout=60)
    assert ranks[0] == ranks[1] and "ok" not in ranks[0]


def test_ranks_with_different_seeds_make_the_same_clip():
    model, inputs = tiny()

    def rank():
        torch.manual_seed(dist.get_rank())
        mine = dict(inputs, x0=torch.randn(SHAPE), text=inputs["text"] + torch.randn(1))
        return mine["x0"], mine["text"], ParallelSampler(model, make_mesh(ring=2)).sample(**mine)
    (x0, text, a), (other, _, b) = launch(rank, 2, timeout=60)
    assert not torch.equal(x0, other) and torch.equal(a, b)
    assert sp.difference(a, emulate("exact", model, **dict(inputs, x0=x0, text=text))) < 1e-5


@pytest.mark.parametrize("what", ["weights", "shapes", "ts"])
def test_ranks_that_disagree_say_so(what):
    model, inputs = tiny()

    def rank():
        mine, odd = dict(inputs), dist.get_rank() == 1
        if what == "weights" and odd:
            torch.nn.init.normal_(model.blocks[1].qkv.weight)
        if what == "shapes" and odd:
            mine["text"], mine["mask"] = torch.randn(1, 3, 32), None
        if what == "ts":
            mine["steps"] = 4 + odd
        try:
            ParallelSampler(model, make_mesh(ulysses=2)).sample(**mine)
        except ValueError as error:
            return str(error)
    name = "weights blocks.1.qkv.weight" if what == "weights" else what
    assert launch(rank, 2, timeout=60) == [f"{name}: rank 1 has another than rank 0"] * 2


def test_weights_that_are_nan_everywhere_agree():
    model, _ = tiny()
    torch.nn.init.constant_(model.blocks[1].qkv.bias, math.nan)
    launch(lambda: ParallelSampler(model, make_mesh(ulysses=2)) and None, 2, timeout=60)


def test_weights_that_rank_0_does_not_have_are_compared_too():
    model, _ = tiny()

    def rank():
        mesh = make_mesh(pp=2, ulysses=2)
        sp.keep_stage(model, 2, mesh["pp"].get_local_rank())
        if dist.get_rank() == 3:
            torch.nn.init.normal_(model.blocks[3].qkv.weight)
        try:
            ParallelSampler(model, mesh)
        except ValueError as error:
            return str(error)
    assert set(launch(rank, 4, timeout=60)) == {
        "weights blocks.3.qkv.weight: rank 3 has another than rank 2"}


@pytest.mark.parametrize("degrees", [dict(ulysses=2), dict(ring=2), dict(cfg=2), dict(pp=2)])
def test_a_rank_that_dies(degrees, tmp_path):
    model, inputs = tiny()
    calls = []

    def rank():
        sampler = ParallelSampler(model, make_mesh(**degrees))
        if dist.get_rank() == 1:                                           # in the middle of a step
            embed = model.condition
            model.condition = lambda t: os._exit(9) if len(calls) == 3 else (calls.append(t),
                                                                             embed(t))[1]
        try:
            sampler.sample(**inputs)
        except sp.LostRank as error:
            return str(error)
    start = time.monotonic()

    def guarded():
        (tmp_path / "said").write_text(rank())
        os._exit(0)                                     # before the barrier that ends a launch
    launch(guarded, 2, timeout=30, strict=False)
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 0: lost contact with another rank in step") and "\n" not in said
    assert time.monotonic() - start < 30


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
    assert all(torch.equal(x1, want) for x1 in launch(rank, world, timeout=40))


@pytest.mark.parametrize("degrees", [
    {"ulysses": 2}, *(pytest.param({axis: 2}, marks=pytest.mark.slow)
                      for axis in ("pp", "ring", "cfg"))], ids=str)
def test_a_rank_that_hangs_is_noticed_within_the_time_out(degrees, tmp_path):
    """Not dead, so its sockets stay open: only a time-out tells, that of the mesh's own groups."""
    model, inputs = tiny()

    def rank():
        me = dist.get_rank()
        dist.barrier()              # one that leaves while the other still connects ends it
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/again", rank=me,
                                world_size=2, timeout=timedelta(seconds=3))
        sampler = ParallelSampler(model, make_mesh(**degrees))
        if me == 1:
            embed, calls = model.condition, []
            model.condition = lambda t: (calls.append(t), len(calls) == 3 and time.sleep(25),
                                         embed(t))[2]
        start = time.monotonic()
        try:
            sampler.sample(**inputs)
        except sp.LostRank as error:
            (tmp_path / "said").write_text(f"{time.monotonic() - start} {error}")
            os._exit(9)
    with pytest.raises(RuntimeError) as e:
        launch(rank, 2, timeout=20)
    assert (tmp_path / "said").exists(), e.value
    seconds, said = (tmp_path / "said").read_text().split(" ", 1)
    assert said.startswith("rank 0: lost contact") and float(seconds) < 10


@pytest.mark.parametrize("words, lost", [
    ("Application timeout caused pair closure", True),      # gloo's, heard in a backward pass
    ("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1", True),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False)])
def test_what_a_lost_rank_sounds_like(words, lost):
    assert sp.is_loss(RuntimeError(words)) == lost


def test_launch_reports_the_first_error_and_ends_the_rest():
    def rank():
        if dist.get_rank() == 1:
            raise ValueError("this rank is odd")
        time.sleep(30)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="this rank is odd"):
        launch(rank, 2, timeout=60)
    assert time.monotonic() - start < 20
    with pytest.raises(RuntimeError, match="did not end within 1 s"):
        launch(lambda: time.sleep(30), 1, timeout=1)


# ---- plan ----------------------------------------------------------------------------------------

def test_plan_prefers_what_the_link_allows():
    size = sp.PRESETS["30b"]
    best = lambda link, world=8: sp.plan(size, 73728, world, link=link, memory=1e15)[0]
    assert best(400e9)["pp"] == 1                           # fast links: sequence parallel is exact
    slow = best(0.5e9)
    # slow links: CFG and PipeFusion
    assert slow["cfg"] == 2 and slow["pp"] == 4 and slow["patches"] >= 4
    rows = sp.plan(size, 73728, 16, link=50e9)
    assert all(r["cfg"] * r["pp"] * r["ring"] * r["ulysses"] == 16 for r in rows)
    assert all(r["speedup"] <= r["ideal"] * 1.0001 for r in rows)
    # 58 GB of weights do not fit beside anything
    tight = sp.plan(size, 73728, 8, link=400e9, memory=60e9)
    assert tight[0]["pp"] > 1 and tight[0]["fits"] and not tight[-1]["fits"]


def test_plan_of_many_gpus_takes_few_steps():
    """Lines run, not seconds: 13 divisors of 4096 to choose two from, not 4096 numbers."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += 1
        assert lines < 100_000, "plan goes through all degrees"
        return trace

    sys.settrace(trace)
    try:
        rows = sp.plan(sp.PRESETS["30b"], 73728, 4096)
    finally:
        sys.settrace(None)
    assert {r["cfg"] for r in rows} == {1, 2}


def test_ideal_speedup_of_a_pipeline():
    """S / (W + ((S - W) M + N - 1) / (M N)), [PF]."""
    for S, W, N, M, want in ((50, 1, 4, 4, 3.72), (50, 1, 8, 16, 6.96), (20, 4, 4, 4, 2.44)):
        rows = sp.plan(sp.PRESETS["30b"], 73728, N, S, W, link=1e30, guided=False, memory=1e15)
        row = next(r for r in rows if r["pp"] == N and r["patches"] == M)
        assert row["ideal"] == pytest.approx(want, abs=0.01)


def test_preset_sizes_match_the_model():
    dit = pytest.importorskip("dit")
    for name, size in sp.PRESETS.items():
        cfg = dit.PRESETS[name]
        assert (size.dim, size.depth, size.heads) == (cfg.dim, cfg.depth, cfg.heads)
        assert size.width == cfg.streams[0].width


# ---- command line --------------------------------------------------------------------------------

def cli(*args, cwd=ROOT, **env):
    return subprocess.run([sys.executable, str(Path(cwd) / "sample_parallel.py"), *args], cwd=cwd,
                          capture_output=True,
                          text=True, timeout=60, env={**os.environ, **env})


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
    (["--cfg", "3"], 3, "cfg 3: not one of 1, 2"),
    (["--ulysses", "2"], 4, "not the number of ranks, 4"),
    (["--pp", "2", "--patches", "1"], 2, "patches 1: fewer than the pp 2 stages"),
    (["--ring", "two"], 1, "--ring: invalid int value"),
    (["--steps", "0"], 1, "--steps 0: must be above 0"),
    (["--patch-axis", "z"], 1, "invalid choice: 'z'"),
    (["--frobnicate"], 1, "unrecognized arguments: --frobnicate"),
    (["--step", "5"], 1, "unrecognized arguments"),
    (["--mode", "auto", "--cfg", "2"], 2, "--mode auto: chooses the degrees itself"),
    (["--shard"], 1, "--shard: needs"),
    (["--out", "clip.png"], 1, "--out clip.png: must end in .mp4 or .gif"),
    (["--prompt-file", "nowhere.txt"], 1, "--prompt-file nowhere.txt"),
    (["--prompt", " "], 1, "--prompt: is empty"),
    (["--warmup", "0"], 1, "warmup 0"),
])
def test_bad_arguments_are_one_line_and_status_2(argv, world, message, capsys):
    argv = ["--workdir", "runs/none", "--prompt", "a red circle", *argv]
    code, err = exits(argv, capsys, WORLD_SIZE=world, RANK=0)
    assert code == 2 and message in err and err.count("\n") == 1
    code, err = exits(argv, capsys, WORLD_SIZE=max(world, 2), RANK=1)       # the others are silent
    assert code == 2 and err == ""


@pytest.mark.parametrize("argv, message", [
    (["--prompt", "a"], "--workdir: needed with"), (["--workdir", "runs/none"], "--prompt: needed"),
    (["--plan", "--resolution", "12x"], "resolution 12x"), (["--plan", "--gpus", "0"], "--gpus 0"),
    (["--plan", "--size", "7b"], "invalid choice"),
    (["--workdir", "nowhere", "--prompt", "a"], "nowhere"),
])
def test_other_bad_arguments(argv, message, capsys):
    code, err = exits(argv, capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_fewer_gpus_than_ranks(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, err = exits(["--workdir", "run", "--prompt", "a", "--cfg", "2", "--device", "cuda"],
                      capsys, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, RANK=0)
    assert code == 2 and err.endswith("--device cuda: 1 GPUs here, one rank each\n")


def test_torchrun_leaves_every_flag_to_us():
    """torchrun claims a flag that is a prefix of one of its own, wherever it stands."""
    from test_bad_input import flags_in
    from torch.distributed.run import get_args_parser
    flags = flags_in(sp, sp.parse)
    for flag in flags:
        args = get_args_parser().parse_args(["--nproc_per_node", "2", "sample_parallel.py", flag,
                                             "1"])
        assert args.training_script_args == [flag, "1"], flag
    assert flags


def test_copied_alone_it_plans(tmp_path):
    shutil.copy(ROOT / "sample_parallel.py", tmp_path)
    done = cli("--plan", "--size", "5b", "--gpus", "4", "--link", "10", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "<- chosen" in done.stdout and "mesh: --cfg" in done.stdout


@pytest.mark.slow
def test_copied_alone_it_demonstrates_itself(tmp_path):
    shutil.copy(ROOT / "sample_parallel.py", tmp_path)
    done = subprocess.run([sys.executable, "sample_parallel.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("PASS") == 9
    assert (tmp_path / "out/sample_parallel/timeline.png").stat().st_size > 10_000


@pytest.mark.slow
def test_torchrun_ends_when_the_mesh_does_not_fit():
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                           "sample_parallel.py",
                           "--workdir", "runs/none", "--prompt", "a", "--ulysses", "4"], cwd=ROOT,
                           capture_output=True,
                          text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("not the number of ranks, 2") == 1


def random_run(folder, frames=16):
    """A run of train.py with random weights, in the folder."""
    import train
    cfg = train.SCALES["toy"]()
    cfg.clips.frames = frames
    cfg = train.finish_config(cfg)
    cfg.dit.depth, cfg.sample.steps = 2, 6
    cfg = train.finish_config(cfg)
    torch.manual_seed(0)
    model = train.TextToVideo(cfg)
    model.dit.to_empty(device="cpu")
    model.dit.init_weights()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    tae = train.autoencoder.autoencoder(cfg.autoencoder_config)
    train.save_tensors(folder / "dit/model.safetensors", model.state_dict())
    train.save_tensors(folder / "tae/tae.safetensors", tae.state_dict())
    train.write_json(folder / "config.json", train.asdict(cfg))


def command(world, *flags):
    """sample_parallel.py by torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                           str(world), "sample_parallel.py", *flags], cwd=ROOT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--cfg 2", "--pp 2 --patches 4 --patch-axis h",
                                   "--mode auto --link 0.001",
                                   "--mode distrifusion --patch-axis h --decode tiles",
                                   "--pp 2 --ulysses 2 --shard --schedule linear"])
def test_the_command_line_samples_a_run_and_checks_itself(flags, tmp_path):
    """A run of random weights; --check compares the ranks with one process, and takes longer than
    --timeout here: the other ranks must bear it."""
    folder = tmp_path / "run"
    random_run(folder)
    flags = [*flags.split(), "--workdir", str(folder), "--prompt", "a red circle", "--prompt",
             "a blue star", "--check", "--timeout", "8", "--out", str(tmp_path / "clip.gif")]
    done = command(4 if "--ulysses" in flags else 2, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 2 and "FAIL" not in done.stdout
    assert {p.name for p in tmp_path.glob("*.gif")} == {"clip-0.gif", "clip-1.gif"}


@pytest.mark.parametrize("frames", [14, 30])
def test_every_way_to_decode_gives_the_runs_frames(frames, tmp_path, monkeypatch):
    """Neither is a multiple of what a latent frame holds."""
    import train
    random_run(tmp_path, frames)
    monkeypatch.setenv("WORLD_SIZE", "1")
    wrote = []
    monkeypatch.setattr(train, "write_video", lambda path, x, fps: wrote.append(tuple(x.shape)))
    for how in ("one", "halo", "tiles"):
        assert sp.main(["--workdir", str(tmp_path), "--prompt", "a red circle", "--steps", "1",
                        "--decode", how, "--out", str(tmp_path / "clip.gif")]) == 0
    assert wrote == [(3, frames, 32, 32)] * 3


@pytest.mark.slow
def test_mode_every_checks_each_mesh_and_sees_a_wrong_one(tmp_path, monkeypatch):
    """One row for each mesh of two ranks and the baselines; writes nothing. What is wrong fails."""
    random_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--workdir", str(tmp_path), "--prompt", "a red circle", "--mode", "every", "--check"]
    done = command(2, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line[2:24].strip() for line in done.stdout.splitlines() if " vs e" in line]
    assert sorted(rows) == ["cfg 2", "distrifusion 2", "no_exchange 2", "pp 2 x M 2", "pp 2 x M 4",
                            "ring 2", "ulysses 2"]
    assert "PASS 7 modes" in done.stdout and sorted(tmp_path.rglob("*")) == before
    wrong = sp.emulate
    monkeypatch.setattr(sp, "emulate", lambda *a, **k: wrong(*a, **k) * 1.01)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sp.main(flags) == 1


def test_the_model_file_knows_nothing_of_ranks():
    path = ROOT / "dit.py"
    if path.exists():
        source = path.read_text()
        assert "torch.distributed" not in source and "import sample_parallel" not in source


def test_a_failing_claim_is_exit_status_1(monkeypatch):
    monkeypatch.setattr(sp, "demo", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sp.main([]) == 1
