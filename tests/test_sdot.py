"""sdot.py against exact partitions, POT's exact solver, POT's own semi-discrete solver, and itself
on more ranks, after a kill, and on data that is not as it should be."""
import math
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from torch import Tensor

import sdot
from sdot import Coupling, SDOTConfig

ROOT = Path(sdot.__file__).parent
uniform = lambda N: torch.full((N,), 1 / N, dtype=torch.float64)


def latents(M, d=32, seed=0):
    return sdot.toy_latents(M, d, seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def masses(Y, h, per_target=60, seed=77):
    """Cell frequencies by the power-diagram formula |x - y|^2 - g and fresh noise: (N,) counts."""
    N, d = Y.shape
    g = 2 * h.double() + Y.double().square().sum(1)
    gen, counts = torch.Generator().manual_seed(seed), torch.zeros(N, dtype=torch.int64)
    for _ in range(max(1, per_target * N // 1000)):
        x = torch.randn(1000, d, generator=gen).double()
        cost = torch.cdist(x, Y.double()).square() - g
        counts += torch.bincount(cost.argmin(1), minlength=N)
    return counts


def error(Y, h, per_target=60, b=None):
    return sdot.rms(sdot.chi_square(masses(Y, h, per_target), uniform(len(Y)) if b is None else b))


# ---- the formulas --------------------------------------------------------------------------------
def test_expected_maximum():
    assert sdot.expected_max(1) == (0.0, 0.0)
    assert sdot.expected_max(2)[0] == pytest.approx(1 / math.sqrt(math.pi), rel=1e-5)
    assert sdot.expected_max(3)[0] == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-5)
    best = normal(20_000, 50).max(1).values.double()
    m, q = sdot.expected_max(50)
    assert m == pytest.approx(best.mean().item(), abs=0.02)
    assert q == pytest.approx((best.square().mean().item() - 1) / best.mean().item(), abs=0.03)
    assert sdot.expected_max(10 ** 6)[0] == pytest.approx(4.863, abs=0.01)


def test_chi_square_is_unbiased_where_the_plug_in_is_not():
    N = 200
    b = uniform(N)
    p = b * (1 + 0.3 * torch.sin(torch.arange(N) / 3))
    p = p / p.sum()
    true = ((p - b) ** 2 / b).sum().item()
    g = torch.Generator().manual_seed(0)
    draws = [torch.bincount(torch.multinomial(p, 2 * N, True, generator=g), minlength=N)
             for _ in range(400)]
    assert np.mean([sdot.chi_square(c, b) for c in draws]) == pytest.approx(true, abs=0.01)
    plug_in = np.mean([((c / c.sum() - b) ** 2 / b).sum().item() for c in draws])
    assert plug_in > true + 0.4


def test_dual_gradient_is_the_mass_error():
    Y, x, b = latents(20, 6).double(), normal(500, 6).double(), uniform(20)
    h = (0.3 * normal(1, 20)[0]).double().requires_grad_()
    sdot.dual_cost(x, Y, h, b).backward()
    p = torch.bincount(sdot.assign(x, Y, h.detach()), minlength=20).double() / 500
    torch.testing.assert_close(h.grad, 2 * (b - p), atol=1e-12, rtol=0)


def test_any_weights_are_optimal_onto_their_own_push_forward():
    ot = pytest.importorskip("ot")
    Y, x = latents(12, 5), normal(400, 5)
    h = 0.5 * normal(1, 12, 3)[0]
    index = sdot.assign(x, Y, h)
    p = torch.bincount(index, minlength=12).double() / 400
    cost = torch.cdist(x, Y).square().double()
    best = ot.emd2(uniform(400).numpy(), p.numpy(), cost.numpy(), numItermax=10 ** 7)
    assert cost[torch.arange(400), index].mean().item() == pytest.approx(best, rel=1e-6)
    shuffled = index[torch.randperm(400)]
    assert cost[torch.arange(400), shuffled].mean().item() > 1.1 * best


def test_blocks_of_targets_change_nothing():
    Y, x, h = latents(700, 16), normal(5000, 16), 0.1 * normal(1, 700)[0]
    whole = sdot.assign(x, Y, h, memory=1000)
    assert torch.equal(sdot.assign(x, Y, h, memory=1), whole)        # 53 targets at a time
    assert torch.equal(whole, (x @ Y.T + h).argmax(1))


def test_span_keeps_every_inner_product_of_centred_targets():
    Y = latents(20, 300)
    Z = sdot.span(Y)
    assert Z.shape == (20, 19)
    C = (Y - Y.mean(0)).double()
    torch.testing.assert_close(Z.double() @ Z.double().T, C @ C.T, atol=1e-4, rtol=1e-4)


# ---- the solver against exact answers ------------------------------------------------------------
def test_one_dimension_against_the_quantile_partition():
    N = 50
    y = torch.sort(normal(N, 1, 4)[:, 0] * 2).values
    s = sdot.fit(y[:, None], cfg=SDOTConfig(optimiser="adam", target=0.012, budget=3))
    wall = (s.avg[:-1] - s.avg[1:]) / (y[1:] - y[:-1]).double()
    assert (wall.diff() > 0).all()                                   # every cell is there, in order
    edges = torch.cat([torch.tensor([0.0]), torch.special.ndtr(wall), torch.tensor([1.0])])
    p = edges.diff()
    assert (p * N - 1).square().mean().sqrt() < 0.04 and (p * N - 1).abs().max() < 0.15
    t = torch.special.ndtri(torch.arange(1, N).double() / N)         # exact walls
    h = torch.cat([torch.zeros(1), (-t * y.double().diff()).cumsum(0)])
    assert (s.avg - (h - h.mean())).abs().max() < 0.1


def test_two_dimensions_against_power_cells_by_quadrature():
    N = 60
    Y = normal(N, 2, 1) * torch.tensor([1.5, 0.6])
    s = sdot.fit(Y, cfg=SDOTConfig(optimiser="adam", target=0.03))
    side = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    w = torch.exp(-side ** 2 / 2)
    grid = torch.cartesian_prod(side, side)
    weight = torch.outer(w, w).flatten()
    g = 2 * s.avg + Y.double().square().sum(1)
    cell = torch.cat([((c[:, None] - Y.double()) ** 2).sum(2).sub(g).argmin(1)
                      for c in grid.split(50_000)])
    p = torch.zeros(N, dtype=torch.float64).index_add_(0, cell, weight / weight.sum())
    exact = (p * N - 1).square().mean().sqrt().item()
    assert exact < 0.05
    counts = masses(Y, s.avg, 4000)
    assert sdot.chi_square(counts, uniform(N)) == pytest.approx(exact ** 2, abs=6e-4)


@pytest.mark.parametrize("N,d", [(500, 64), (500, 256),
                                 pytest.param(2000, 64, marks=pytest.mark.slow),
                                 pytest.param(500, 1024, marks=pytest.mark.slow),
                                 pytest.param(1000, 1024, marks=pytest.mark.slow),
                                 pytest.param(5000, 64, marks=pytest.mark.slow)])
def test_mass_error_is_at_the_statistical_limit(N, d):
    Y = latents(N, d)
    s = sdot.fit(Y)
    counts = masses(Y, s.avg, max(20, 150_000 // N))                 # seen to 3 %
    reached = sdot.rms(sdot.chi_square(counts, uniform(N)))
    assert reached < 1.25 * math.sqrt(N / s.samples)
    assert counts.min() > 0 and s.samples <= 4.1 * N / 0.1 ** 2


def test_start_is_far_better_than_no_start():
    """One tiny step leaves the start: extreme values against g = 0 (Voronoi)."""
    Y = latents(400, 256)
    begin = {name: error(Y, sdot.fit(Y, cfg=SDOTConfig(start=name, lr=1e-9, budget=1e-9)).avg, 20)
             for name in ("extreme", "voronoi", "auto")}
    assert begin["extreme"] < 0.7 and begin["voronoi"] > 5 * begin["extreme"]
    assert begin["auto"] == pytest.approx(begin["extreme"], rel=0.05)
    Y = normal(800, 4) * torch.tensor([2.0, 1.0, 0.5, 0.2])
    low = {name: error(Y, sdot.fit(Y, cfg=SDOTConfig(start=name, lr=1e-9, budget=1e-9)).avg, 20)
           for name in ("extreme", "gaussian", "auto")}
    assert low["gaussian"] < 0.5 * low["extreme"]
    assert low["auto"] == pytest.approx(low["gaussian"], rel=0.05)


def test_tight_clusters_make_auto_change_to_adam():
    centres = normal(40, 64)
    Y = centres[torch.arange(400) % 40] + 0.004 * normal(400, 64, 1)
    auto, sgd = (sdot.fit(Y, cfg=SDOTConfig(optimiser=o)) for o in ("auto", "sgd"))
    assert auto.phase == "adam" and sgd.phase == "sgd"
    assert error(Y, auto.avg) < 0.15 and error(Y, sgd.avg) > 0.3
    assert sdot.fit(latents(400, 64)).phase == "sgd"


def test_scale_and_shift_of_the_latents_change_nothing():
    Y, x = latents(300, 48), normal(4000, 48)
    a, b = sdot.fit(Y).avg, sdot.fit(3 * Y + 5).avg
    same = sdot.assign(x, Y, a.float()) == sdot.assign(x, 3 * Y + 5, b.float())
    assert same.double().mean() > 0.99


def test_non_uniform_mass():
    Y = latents(100, 32)
    mass = torch.linspace(1, 9, 100)
    b = (mass / mass.sum()).double()
    s = sdot.fit(Y, mass)
    assert error(Y, s.avg, 100, b) < 0.13
    p = masses(Y, s.avg, 200) / 20_000
    assert p[-20:].sum() == pytest.approx(b[-20:].sum().item(), abs=0.02)


def test_softmax_histogram_and_moving_average_are_usable():
    Y = latents(200, 64)
    cfg = SDOTConfig(optimiser="sgd", temperature=0.1, ema=0.9, target=0.15)
    assert error(Y, sdot.fit(Y, cfg=cfg).avg) < 0.4


# ---- against POT ---------------------------------------------------------------------------------
def test_against_exact_transport_of_a_dense_sample():
    ot = pytest.importorskip("ot")
    Y, x = latents(20, 5), normal(3000, 5)
    s = sdot.fit(Y, cfg=SDOTConfig(target=0.03))
    cost = torch.cdist(x, Y).square().double().numpy()
    plan, log = ot.emd(uniform(3000).numpy(), uniform(20).numpy(), cost, log=True,
                       numItermax=10 ** 7)
    assert log["warning"] is None
    index = sdot.assign(x, Y, s.avg.float())
    assert (torch.from_numpy(plan.argmax(1)) == index).double().mean() > 0.93
    ours = cost[np.arange(3000), index.numpy()].mean()
    assert ours == pytest.approx((plan * cost).sum(), rel=0.02)
    dual = sdot.dual_cost(normal(100_000, 5, 8).double(), Y.double(), s.avg, uniform(20)).item()
    assert dual == pytest.approx(ours, rel=0.03)


def test_pots_solver_agrees_and_its_defaults_fail():
    semidiscrete = pytest.importorskip("ot.semidiscrete")
    Y, x = latents(300, 64), normal(4000, 64)
    a, b = (sdot.fit(Y, cfg=SDOTConfig(solver=s)) for s in ("stream", "pot"))
    assert error(Y, b.avg) < 0.15 and b.samples == pytest.approx(200 * 300, rel=0.05)
    same = sdot.assign(x, Y, a.avg.float()) == sdot.assign(x, Y, b.avg.float())
    assert same.double().mean() > 0.85
    draw = lambda n: torch.randn(n, 64)
    g = semidiscrete.solve_semidiscrete(Y, draw, max_iter=120, batch_size=256)
    assert error(Y, (g - Y.square().sum(1)) / 2) > 0.5


# ---- groups --------------------------------------------------------------------------------------
def grouped(M=240, G=6, d=64, seed=0, **flags):
    """Latents whose caption moves them: a caption-blind coupling would tell captions apart."""
    groups = torch.arange(M) % G * 10 + 3
    Y = latents(M, d, seed) + 2 * normal(G, d, 9)[torch.arange(M) % G]
    return Y, groups, Coupling.fit(Y, groups, **flags)


def test_couple_stays_in_the_group_and_picks_its_best_cell():
    Y, groups, c = grouped()
    x0, cond = normal(500, 64), c.draw_group(500, torch.Generator().manual_seed(0))
    index = c.couple(x0, cond)
    assert index.dtype == torch.int64 and torch.equal(groups[index], cond)
    h = torch.empty(240)
    h[c.order] = c.h
    for i in range(0, 500, 50):
        rows = (groups == cond[i]).nonzero()[:, 0]
        assert index[i] == rows[(Y[rows] @ x0[i] + h[rows]).argmax()]
    shaped = Coupling.fit(Y.view(240, 4, 4, 4), groups)
    assert torch.equal(shaped.couple(x0.view(500, 4, 4, 4), cond), index)


def test_each_clip_is_drawn_equally_often():
    Y, groups, c = grouped(target=0.05)
    n = 60_000
    cond = c.draw_group(n, torch.Generator().manual_seed(1))
    counts = torch.bincount(c.couple(normal(n, 64, 2), cond), minlength=240)
    assert counts.min() > 0 and sdot.rms(sdot.chi_square(counts, uniform(240))) < 0.08


def two_sample(a: Tensor, b: Tensor) -> float:
    """p value of Kolmogorov and Smirnov's test."""
    from scipy.stats import ks_2samp
    return ks_2samp(a.numpy(), b.numpy()).pvalue


def test_noise_of_each_caption_stays_normal_and_a_caption_blind_coupling_is_caught():
    Y, groups, within = grouped()
    blind = Coupling.fit(Y)
    x0 = normal(8000, 64, 5)
    cond = within.draw_group(8000, torch.Generator().manual_seed(2))
    row = {"within": within.couple(x0, cond), "blind": blind.couple(x0)}
    worst = {}
    for name, index in row.items():
        p = []
        for g in groups.unique():
            seen = x0[groups[index] == g]
            away = (Y[groups == g].mean(0) - Y.mean(0)) / 8
            p.append(two_sample(seen @ away, normal(4000, 64, 6) @ away))
            if name == "within":
                assert seen.mean(0).abs().max() < 5 / len(seen) ** 0.5
                assert seen.var().item() == pytest.approx(1, abs=0.03)
        worst[name] = min(p)
    assert worst["within"] > 1e-3 and worst["blind"] < 1e-12


def test_groups_are_drawn_by_frequency_and_mass():
    groups = torch.tensor([7] * 30 + [-2] * 10)
    c = Coupling.fit(latents(40, 8), groups)
    drawn = c.draw_group(20_000, torch.Generator().manual_seed(0))
    assert (drawn == 7).double().mean() == pytest.approx(0.75, abs=0.015)
    c = Coupling.fit(latents(40, 8), groups, mass=torch.where(groups == 7, 1.0, 9.0))
    drawn = c.draw_group(20_000, torch.Generator().manual_seed(0))
    assert (drawn == 7).double().mean() == pytest.approx(0.25, abs=0.015)


def test_expected_gain_is_about_what_is_gained():
    for M, G, d in ((240, 6, 64), (300, 30, 512)):
        groups = torch.arange(M) % G
        Y = normal(M, d, 2)
        c = Coupling.fit(Y, groups)
        x0, cond = normal(6000, d, 3), c.draw_group(6000, torch.Generator().manual_seed(0))
        paired = (x0 - Y[c.couple(x0, cond)]).square().sum(1).mean()
        g = torch.Generator().manual_seed(4)
        random = (x0 - Y[torch.randint(M, (6000,), generator=g)]).square().sum(1).mean()
        measured = 1 - (paired / random).item()
        assert c.expected_gain() == pytest.approx(measured, rel=0.12)
        assert c.meta["gain"] == pytest.approx(measured, rel=0.08)


def test_report_warns_when_there_is_nothing_to_gain():
    few = Coupling.fit(normal(40, 64), torch.arange(40))
    assert "cluster" in few.report() and few.expected_gain() == 0
    assert "WARNING" not in grouped()[2].report()
    assert "WARNING: the mass error" in grouped(budget=0.02, optimiser="sgd", lr=5.0)[2].report()


def test_caption_groups_and_clusters():
    assert sdot.caption_groups(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    E = normal(10, 16, 1)[torch.arange(700) % 10] * 5 + normal(700, 16)
    ids = sdot.cluster(E, size=32)
    assert torch.bincount(ids)[ids].min() >= 32 and len(ids.unique()) > 3
    inside = sum((E[ids == g] - E[ids == g].mean(0)).square().sum() for g in ids.unique())
    assert inside < 0.5 * (E - E.mean(0)).square().sum()
    assert torch.equal(ids, sdot.cluster(E, size=32))
    assert sdot.cluster(E[:20], size=32).unique().tolist() == [0]


# ---- flags ---------------------------------------------------------------------------------------
def test_pca_solves_in_fewer_directions_and_says_what_it_costs():
    Y, groups, full = grouped()
    _, _, some = grouped(pca=8)
    assert some.Y.shape == (240, 8)
    n = 20_000
    cond = some.draw_group(n, torch.Generator().manual_seed(1))
    counts = torch.bincount(some.couple(normal(n, 64, 2), cond), minlength=240)
    assert sdot.rms(sdot.chi_square(counts, uniform(240))) < 0.2
    assert 0.4 * full.meta["gain"] < some.meta["gain"] < full.meta["gain"]
    _, _, every = grouped(pca=64)
    x0, cond = normal(2000, 64), full.draw_group(2000, torch.Generator().manual_seed(0))
    assert (every.couple(x0, cond) == full.couple(x0, cond)).double().mean() > 0.85
    with pytest.raises(ValueError, match="pca 65"):
        grouped(pca=65)


def test_bf16_scores_disagree_rarely():
    Y, groups, exact = grouped()
    _, _, rough = grouped(precision="bf16")
    assert rough.Y.dtype == torch.bfloat16
    x0, cond = normal(5000, 64), exact.draw_group(5000, torch.Generator().manual_seed(0))
    same = (exact.couple(x0, cond) == rough.couple(x0, cond)).double().mean()
    assert same > 0.97
    assert rough.meta["disagreement"] == pytest.approx(1 - same.item(), abs=0.01)   # it says so
    assert "products in bf16 change" in rough.report() and "bf16" not in exact.report()


def test_principal_directions_without_a_square_matrix(monkeypatch):
    Y, groups = latents(300, 64), torch.arange(300) // 100
    exact = sdot._basis(Y, groups, 6)
    monkeypatch.setattr(sdot, "LARGE", 32)
    rough = sdot._basis(Y, groups, 6)
    assert rough.shape == (64, 6)
    torch.testing.assert_close(rough.T @ rough, torch.eye(6), atol=1e-4, rtol=0)
    assert (exact.T @ rough).square().sum() > 5.9                   # the same six directions


def test_pot_solves_groups_too():
    Y, groups, c = grouped(solver="pot")
    assert sdot.rms(c.meta["chi2"]) < 0.15


@pytest.mark.parametrize("flag,value", [
    ("solver", "sinkhorn"), ("optimiser", "lbfgs"), ("start", "0"), ("precision", "fp8"),
    ("target", 0), ("batch", -1), ("ema", 1)])
def test_wrong_flags_are_named(flag, value):
    with pytest.raises(ValueError, match=f"^{flag} {value}: "):
        SDOTConfig(**{flag: value})


# ---- pools ---------------------------------------------------------------------------------------
def test_rebalance_is_exact_changes_few_and_costs_little():
    N, K = 100, 10
    Y, x = latents(N, 64), normal(N * K, 64)
    h = sdot.fit(Y, cfg=SDOTConfig(target=0.05)).avg.float()
    before = sdot.assign(x, Y, h)
    after = sdot.rebalance(x, before, Y, h, uniform(N))
    assert (torch.bincount(after, minlength=N) == K).all()
    changed = (after != before).double().mean().item()
    floor = (torch.bincount(before, minlength=N) - K).clamp_min(0).sum().item() / (N * K)
    assert changed == pytest.approx(floor) and floor == pytest.approx(0.125, abs=0.03)
    cost = lambda i: (x - Y[i]).square().sum(1).mean().item()
    anywhere = before.clone()
    moved = (after != before).nonzero()[:, 0]
    anywhere[moved] = after[moved][torch.randperm(len(moved))]
    assert cost(before) <= cost(after) < cost(before) + 0.35 * (cost(anywhere) - cost(before))
    from ot import emd2
    M = torch.cdist(x, Y).square().double().numpy()
    best = emd2(uniform(N * K).numpy(), uniform(N).numpy(), M, numItermax=10 ** 7)
    assert best <= cost(after) + 1e-6 and cost(after) == pytest.approx(best, rel=0.02)


def test_pairs_cover_every_clip_and_regenerate_their_noise():
    Y, groups, c = grouped()
    keys, rows = c.pairs(epoch=3, repeat=4)
    assert len(keys) == len(keys.unique()) == 960
    assert (torch.bincount(rows) == 4).all()
    x0 = c.noise(keys)
    assert torch.equal(x0[[5, 700]], c.noise(keys[[5, 700]]))
    assert abs(x0.mean()) < 0.02 and abs(x0.std() - 1) < 0.01
    assert (c.couple(x0, groups[rows]) == rows).double().mean() > 0.7
    again, _ = c.pairs(epoch=4, repeat=4)
    assert not set(again.tolist()) & set(keys.tolist())
    assert torch.equal(c.pairs(3, 4)[1], rows)


# ---- keep, kill, share ---------------------------------------------------------------------------
def test_save_and_load(tmp_path):
    Y, groups, c = grouped(pca=16)
    c.save(tmp_path / "coupling.pt")
    back = Coupling.load(tmp_path / "coupling.pt", Y)
    x0, cond = normal(200, 64), groups[:200]
    assert torch.equal(back.couple(x0, cond), c.couple(x0, cond)) and back.report() == c.report()
    assert [p.name for p in tmp_path.iterdir()] == ["coupling.pt"]
    bare = Coupling.load(tmp_path / "coupling.pt")
    assert bare.draw_group(5).shape == (5,) and bare.expected_gain() == c.expected_gain()
    with pytest.raises(ValueError, match="without its latents"):
        bare.couple(x0, cond)
    other = Y.clone()
    other[17, 3] += 1e-6
    for wrong in (other, Y.flip(0), Y[:-1]):
        with pytest.raises(ValueError, match="not those"):
            Coupling.load(tmp_path / "coupling.pt", wrong)


def test_unreadable_files_are_named(tmp_path):
    Y, groups, c = grouped(M=24)
    path = tmp_path / "c.pt"
    c.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="c.pt: not a readable"):
        Coupling.load(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(ValueError, match="c.pt: not a coupling"):
        Coupling.load(path)
    c.save(path)
    with pytest.raises(ValueError, match="c.pt: not an unfinished solve"):
        Coupling.fit(Y, groups, checkpoint=path)
    with pytest.raises(ValueError, match="none.pt: no such file"):
        Coupling.load(tmp_path / "none.pt")
    torch.save({"anything": 1}, path)
    with pytest.raises(ValueError, match="format"):
        Coupling.load(path)
    for bad in ({"format": 1}, {"format": 1, "cfg": {"no such": 1}}):
        torch.save(bad, path)
        with pytest.raises(ValueError, match="c.pt: not a coupling of this version"):
            Coupling.load(path)
    for bad in (torch.ones(3), {"state": None}):
        torch.save(bad, path)
        with pytest.raises(ValueError, match="c.pt: not an unfinished solve"):
            Coupling.fit(Y, groups, checkpoint=path)
    with pytest.raises(ValueError, match="part: no such folder"):
        Coupling.fit(Y, groups, checkpoint=tmp_path / "none" / "part")


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    """Files may have 1000 bytes. The solve, not saved, is there for the next call."""
    Y, groups, c = grouped(M=24)
    path, part = tmp_path / "c.pt", tmp_path / "part"
    c.save(path)
    before = path.read_bytes()
    solved = Coupling.fit(Y, groups, checkpoint=part)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            solved.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["c.pt", "part"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdot, "noise", lambda key, *a: pytest.fail("it solved again")
                      if key[2:3] == (0,) else normal(*a[:2]))
        again = Coupling.fit(Y, groups, checkpoint=part)
    assert torch.equal(again.h, solved.h) and again.meta == solved.meta
    again.save(path)
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_bar_moves_and_shows_the_mass_error_as_it_falls(monkeypatch):
    """Inside one group, long before the first measurement; it is rms |p_j / b_j - 1|."""
    seen = []
    monkeypatch.setattr(tqdm.tqdm, "set_postfix",
                        lambda bar, mass_error, **_: seen.append((bar.n, float(mass_error))))
    Coupling.fit(latents(300, 64), progress=True, start="voronoi", target=0.05)
    at, error = zip(*seen)
    assert error[0] > 0.5 and error[-1] < 0.07 and len(set(error)) > 20
    assert at[0] < 30 and list(at) == sorted(at) and len(set(at)) > 50 and at[-1] == 300


@pytest.mark.parametrize("kill_at", [3, 40, 75])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, kill_at):
    """Two groups; the kill falls into the first or the second; Adam's moments included."""
    Y, groups = latents(400, 32), torch.arange(400) % 2
    flags = {"optimiser": "adam" if kill_at == 40 else "auto", "target": 0.15}
    draw, drawn = sdot.noise, []
    monkeypatch.setattr(sdot, "noise", lambda *a: drawn.append(1) or draw(*a))
    whole = Coupling.fit(Y, groups, **flags)
    all_blocks = len(drawn)
    monkeypatch.setattr(sdot, "CHECKPOINT_SECONDS", 0.0)
    real, steps = sdot._write, []

    def dying(path, data):
        real(path, data)
        steps.append(1)
        if len(steps) == kill_at:
            raise KeyboardInterrupt
    monkeypatch.setattr(sdot, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        Coupling.fit(Y, groups, checkpoint=tmp_path / "part", **flags)
    monkeypatch.setattr(sdot, "_write", real)
    with pytest.raises(ValueError, match="other latents"):
        Coupling.fit(Y + 1e-3, groups, checkpoint=tmp_path / "part", **flags)
    drawn.clear()
    resumed = Coupling.fit(Y, groups, checkpoint=tmp_path / "part", **flags)
    assert len(drawn) <= all_blocks - kill_at + 1                    # no step was done again
    assert torch.equal(resumed.h, whole.h) and resumed.meta == whole.meta
    resumed.save(tmp_path / "c.pt")
    assert os.listdir(tmp_path) == ["c.pt"]


def _rank(rank: int, world: int, init: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank,
                                         world_size=world)
    mine = []
    real = sdot.noise
    sdot.noise = lambda *a: mine.append(1) or real(*a)
    groups = torch.tensor([0] * 300 + [1] * 20)
    c = Coupling.fit(latents(320, 32), groups, ranks=True, target=0.15, batch=1024)
    torch.save((c.h, c.meta["chi2"], len(mine)), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_and_share_the_work(tmp_path, world):
    groups = torch.tensor([0] * 300 + [1] * 20)
    whole = Coupling.fit(latents(320, 32), groups, target=0.15, batch=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # forking a threaded process
        torch.multiprocessing.start_processes(
            _rank, (world, str(tmp_path / "init"), str(tmp_path / "out")), nprocs=world,
            start_method="fork")
    found = [torch.load(tmp_path / f"out.{r}") for r in range(world)]
    for h, chi2, _ in found:
        assert torch.equal(h, whole.h) and chi2 == pytest.approx(whole.meta["chi2"], abs=1e-12)
    blocks = [n for _, _, n in found]
    assert max(blocks) < 1.1 * min(blocks) + 4 * world               # nobody does it all


# ---- data that is not as it should be ------------------------------------------------------------
def test_exact_duplicates_share_one_cell_evenly():
    Y = torch.cat([latents(40, 32), latents(40, 32)[:10], latents(40, 32)[:10]])[torch.randperm(60)]
    c = Coupling.fit(Y, target=0.05)
    counts = torch.bincount(c.couple(normal(60_000, 32)), minlength=60)
    assert counts.min() > 0 and sdot.rms(sdot.chi_square(counts, uniform(60))) < 0.09
    _, rows = c.pairs(repeat=6)
    assert (torch.bincount(rows, minlength=60) == 6).all()


@pytest.mark.parametrize("N,d,offset", [(20, 2048, 1e-5), (20, 2048, 1e-7), (40, 64, 1e-6),
                                        (40, 16, 1e-5), (40, 64, 3e-4), (40, 64, 0.0)])
def test_clips_that_are_as_good_as_the_same_are_drawn_alike(N, d, offset):
    """One clip encoded twice: its rows differ in the last bits (0.0: in the sign of a zero)."""
    Y = latents(N, d)
    Y[3, 0] = 0.0
    twin = Y[3] + offset * normal(1, d)[0]
    if not offset:
        twin[0] = -0.0
    c = Coupling.fit(torch.cat([Y, twin[None]]), target=0.05)
    share = torch.bincount(c.couple(normal(40_000, d)), minlength=N + 1) / 40_000 * (N + 1)
    assert 0.85 < share[3] < 1.15 and 0.85 < share[N] < 1.15 and c.meta["chi2"] < 0.01
    assert (c.copies != torch.arange(N + 1)).sum() == 1              # nobody else was merged


def test_close_neighbours_keep_cells_of_their_own():
    """A chain whose links are nearer than a copy would be, but whose ends are not."""
    Y = torch.cat([latents(40, 64), latents(40, 64)[:1] + torch.arange(1, 6)[:, None] * 7e-4])
    copies = sdot._copies(Y, torch.zeros(45).long(), 64)
    apart = (Y - Y[copies]).norm(dim=1).max() / (Y - Y.mean(0)).norm(dim=1).square().mean().sqrt()
    assert apart < 2e-3 and 41 <= len(copies.unique()) < 45


def test_copies_share_by_their_masses():
    Y = torch.cat([torch.ones(2, 8), torch.zeros(1, 8)])
    c = Coupling.fit(Y, mass=torch.tensor([9.0, 1.0, 10.0]), target=0.03)
    share = torch.bincount(c.couple(normal(40_000, 8)), minlength=3) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.45, 0.05, 0.5]), atol=0.02, rtol=0)
    _, rows = c.pairs(repeat=20)
    assert torch.bincount(rows).tolist() == [27, 3, 30]


def test_pairs_never_use_a_noise_twice_whatever_the_masses():
    mass = torch.cat([torch.full((10,), 9.0), torch.ones(10)])
    c = Coupling.fit(latents(20, 8), torch.arange(20) // 10, mass)
    keys = torch.cat([c.pairs(0, repeat=4)[0], c.pairs(1)[0], c.pairs(2)[0]])
    assert len(keys.unique()) == len(keys)


def test_flips_enter_as_rows_of_their_own():
    clips = normal(30, 8)
    c = Coupling.fit(torch.cat([clips, clips.flip(1)]), torch.arange(60) % 3, target=0.05)
    row = c.couple(normal(30_000, 8), c.draw_group(30_000, torch.Generator().manual_seed(0)))
    assert torch.bincount(row % 30, minlength=30).min() > 800        # row % M is the clip
    assert abs((row >= 30).double().mean() - 0.5) < 0.02             # row // M says which version


def test_all_the_same_single_and_pair():
    same = Coupling.fit(torch.ones(5, 8))
    assert torch.bincount(same.couple(normal(5000, 8)), minlength=5).min() > 900
    one = Coupling.fit(normal(1, 8))
    assert one.couple(normal(3, 8)).tolist() == [0, 0, 0]
    assert one.pairs(repeat=2)[1].tolist() == [0, 0]
    two = Coupling.fit(torch.stack([torch.zeros(8), torch.ones(8) * 5]))
    assert two.couple(normal(20_000, 8)).double().mean() == pytest.approx(0.5, abs=0.04)
    mixed = Coupling.fit(latents(9, 8), torch.tensor([4, 4, 4, 4, 4, 9, 2, 2, 2]))
    assert mixed.couple(normal(4, 8), torch.tensor([9, 9, 2, 4]))[:2].tolist() == [5, 5]


def test_input_errors_are_named():
    Y = latents(20, 8)
    bad = Y.clone()
    bad[7, 3] = math.nan
    c = Coupling.fit(Y, torch.arange(20) // 10)
    for call, words in (
            (lambda: Coupling.fit(bad), "row 7 has NaN"),
            (lambda: Coupling.fit(Y[:0]), "nothing to couple"),
            (lambda: Coupling.fit(Y, torch.zeros(19)), "one id for each of 20"),
            (lambda: Coupling.fit(Y, mass=torch.zeros(20)), "above 0"),
            (lambda: c.couple(normal(2, 8), torch.tensor([0, 5])), "cond 5: a group without clips"),
            (lambda: c.couple(normal(2, 8)), "2 groups"),
            (lambda: c.couple(normal(5, 8), torch.tensor([0, 0])), "one group for each of 5"),
            (lambda: sdot.fit(bad), "row 7 has NaN"), (lambda: sdot.fit(Y[:0]), "N 1 or more"),
            (lambda: sdot.fit(Y[:3], torch.tensor([0.0, 1, 1])), "3 numbers above 0"),
            (lambda: c.couple(normal(2, 9), torch.tensor([0, 0])), "8 numbers"),
            (lambda: sdot.cluster(Y, 0), "size 0"), (lambda: c.pairs(repeat=0), "repeat 0")):
        with pytest.raises(ValueError, match=words):
            call()


# ---- speed and the file alone --------------------------------------------------------------------
def test_pairing_gathers_one_group_not_the_data_set(monkeypatch):
    """A batch of 64 from 300 groups: no score is computed outside the groups it asks for."""
    groups = torch.arange(3000) % 300
    c = Coupling.fit(normal(3000, 16), groups, target=0.5)
    seen = []
    real = sdot.assign
    monkeypatch.setattr(sdot, "assign", lambda x, Y, h, m: seen.append(x.shape[0] * Y.shape[0])
                        or real(x, Y, h, m))
    c.couple(normal(64, 16), c.draw_group(64))
    assert sum(seen) == 64 * 10


def run_alone(tmp_path, *args):
    shutil.copy(ROOT / "sdot.py", tmp_path)
    return subprocess.run([sys.executable, "sdot.py", *args], cwd=tmp_path, text=True,
                          capture_output=True, timeout=900)


@pytest.mark.parametrize("args", [("--plan", "1", "4"), ("--plan", "x", "4"), ("--polt", "3")])
def test_bad_arguments_give_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sdot.py", *args])
    with pytest.raises(SystemExit) as stop:
        sdot.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1
    assert args[0].strip("-") in err


def test_plan(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sdot.py", "--plan", "1000000", "4096"])
    sdot.main()
    out = capsys.readouterr().out
    assert "15 GiB" in out and "7.6 %" in out                        # m(1e6) / sqrt(4096) = 0.076


@pytest.mark.slow
def test_demo_passes_alone(tmp_path):
    r = run_alone(tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.count("PASS") == 4
    for name in ("sdot.png", "cells.gif"):
        assert (tmp_path / "out/sdot" / name).stat().st_size > 10_000


def test_energy_distance_in_closed_form():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=g), torch.randn(4000, 1, generator=g)
    assert abs(sdot.energy_distance(a, b)) < 0.01
    # N(0, 1) and N(m, 1): E|x - y| is that of |N(m, 2)|
    m, root = 1.0, math.sqrt(2)
    away = root * math.sqrt(2 / math.pi) * math.exp(-m**2 / 4) + m * math.erf(m / 2)
    within = 2 / math.sqrt(math.pi)
    assert sdot.energy_distance(a, b + m) == pytest.approx(2 * away - 2 * within, abs=0.03)


def test_energy_distance_without_pairs_that_belong_together():
    """32 samples near their own partners: counted, the pairs look like less than no distance."""
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(200):
        a = torch.randn(32, 50, generator=g)
        b = a + 0.1 * torch.randn(32, 50, generator=g)
        values.append([sdot.energy_distance(a, b, paired) for paired in (False, True)])
    counted, left_out = torch.tensor(values).mean(0).tolist()
    assert counted < -0.4 and abs(left_out) < 0.02
