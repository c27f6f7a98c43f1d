"""sdot.py against exact partitions, POT's exact solver and POT's own semi-discrete solver; and on
several ranks, with damaged files, and on data that are not as they should be."""
import math
import os
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from conftest import peak_bytes
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


def dual_cost(x, Y, h, b):
    """d + E|y|^2 + 2 <b, h> - 2 E max_j(<x, y_j> + h_j): a lower bound of the transport cost."""
    const = Y.shape[1] + b @ Y.square().sum(1)
    return const + 2 * b @ h - 2 * (x @ Y.T + h).max(1).values.mean()


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


def test_the_mass_error_is_the_gradient_of_the_dual():
    """What solvers follow without derivatives, by autograd."""
    Y, x, b = latents(20, 6).double(), normal(500, 6).double(), uniform(20)
    h = (0.3 * normal(1, 20)[0]).double().requires_grad_()
    dual_cost(x, Y, h, b).backward()
    p = torch.bincount(sdot.assign(x, Y, h.detach()), minlength=20).double() / 500
    torch.testing.assert_close(h.grad, 2 * (b - p), atol=1e-12, rtol=0)


def test_any_weights_are_optimal_for_the_masses_of_their_cells():
    ot = pytest.importorskip("ot")
    Y, x = latents(12, 5), normal(400, 5)
    h = 0.5 * normal(1, 12, 3)[0]
    index = sdot.assign(x, Y, h)
    p = torch.bincount(index, minlength=12).double() / 400
    cost = torch.cdist(x, Y).square().double()
    best = ot.emd2(uniform(400).numpy(), p.numpy(), cost.numpy(), numItermax=10 ** 7)
    assert cost[torch.arange(400), index].mean().item() == pytest.approx(best, rel=1e-6)
    shuffled = index[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert cost[torch.arange(400), shuffled].mean().item() > 1.1 * best


def test_blocks_of_targets_change_nothing():
    """Integers, which fp32 adds without rounding in any order; h makes all scores of x differ."""
    g = torch.Generator().manual_seed(0)
    Y, x = (torch.randint(-4, 5, (n, 16), generator=g).float() for n in (700, 5000))
    h = torch.randperm(700, generator=g) / 1024
    best = (x.long() @ Y.long().T * 1024 + (h * 1024).long()).argmax(1)
    assert torch.equal(sdot.assign(x, Y, h, memory=1000), best)
    assert torch.equal(sdot.assign(x, Y, h, memory=1), best)         # 52 targets at a time


def test_own_span_keeps_every_inner_product_of_centred_targets():
    Y = latents(20, 300) + 1
    Z = sdot.in_own_span(Y)
    assert Z.shape == (20, 19)
    C = (Y - Y.mean(0)).double()
    torch.testing.assert_close(Z.double() @ Z.double().T, C @ C.T, atol=1e-4, rtol=1e-4)


# ---- the solver against exact answers ------------------------------------------------------------
def test_the_ten_lines_solve_it():
    Y = latents(300, 64)
    torch.manual_seed(0)
    assert error(Y, sdot.smallest(Y, 0)) > 0.4
    assert error(Y, sdot.smallest(Y, 200, 512)) < 1.4 * math.sqrt(300 / (200 * 512))


def test_one_dimension_against_the_quantile_partition():
    N = 50
    y = torch.sort(normal(N, 1, 4)[:, 0] * 2).values
    h = sdot.solve(y[:, None], cfg=SDOTConfig(solver="adam", target=0.012)).h
    wall = (h[:-1] - h[1:]) / (y[1:] - y[:-1]).double()
    assert (wall.diff() > 0).all()                                   # every cell is there, in order
    edges = torch.cat([torch.tensor([0.0]), torch.special.ndtr(wall), torch.tensor([1.0])])
    p = edges.diff()
    assert (p * N - 1).square().mean().sqrt() < 0.04 and (p * N - 1).abs().max() < 0.15
    t = torch.special.ndtri(torch.arange(1, N).double() / N)         # exact walls
    exact = torch.cat([torch.zeros(1), (-t * y.double().diff()).cumsum(0)])
    assert (h - (exact - exact.mean())).abs().max() < 0.1


def test_two_dimensions_against_power_cells_by_quadrature():
    N = 60
    Y = normal(N, 2, 1) * torch.tensor([1.5, 0.6])
    h = sdot.solve(Y, cfg=SDOTConfig(solver="adam", target=0.02)).h
    side = torch.linspace(-5, 5, 501, dtype=torch.float64)
    w = torch.exp(-side ** 2 / 2)
    g = 2 * h + Y.double().square().sum(1)
    cell = torch.cat([((c[:, None] - Y.double()) ** 2).sum(2).sub(g).argmin(1)
                      for c in torch.cartesian_prod(side, side).split(50_000)])
    weight = torch.outer(w, w).flatten()
    p = torch.zeros(N, dtype=torch.float64).index_add_(0, cell, weight / weight.sum())
    exact = (p * N - 1).square().mean().sqrt().item()
    assert exact < 0.05
    assert sdot.chi_square(masses(Y, h, 2000), uniform(N)) == pytest.approx(exact ** 2, abs=1e-3)


@pytest.mark.parametrize("N,d", [(500, 64), pytest.param(500, 256, marks=pytest.mark.slow),
                                 pytest.param(2000, 64, marks=pytest.mark.slow),
                                 pytest.param(500, 1024, marks=pytest.mark.slow),
                                 pytest.param(1000, 1024, marks=pytest.mark.slow),
                                 pytest.param(5000, 64, marks=pytest.mark.slow)])
def test_mass_error_is_at_the_statistical_limit(N, d):
    Y = latents(N, d)
    s = sdot.solve(Y)
    counts = masses(Y, s.h, max(20, 100_000 // N))                   # seen to 4 %
    reached = sdot.rms(sdot.chi_square(counts, uniform(N)))
    assert reached < 1.25 * math.sqrt(N / s.samples)
    assert counts.min() > 0 and s.samples <= 4.1 * N / 0.1 ** 2
    assert sdot.rms(s.chi2) == pytest.approx(reached, abs=0.04)      # it knows


def test_the_start_is_far_better_than_none():
    """One tiny step leaves the start; g = 0 is the nearest target."""
    Y = latents(400, 256)
    start = sdot.solve(Y, cfg=SDOTConfig(lr=1e-9, budget=1e-9)).h
    assert error(Y, start, 20) < 0.7 and error(Y, -Y.square().sum(1) / 2, 20) > 3.5
    mass = torch.linspace(1, 9, 400).double()
    b = mass / mass.sum()                                            # masses, to first order
    start_b = sdot.solve(Y, mass, SDOTConfig(lr=1e-9, budget=1e-9)).h
    assert error(Y, start_b, 20, b) < 0.7 * error(Y, start, 20, b)


def test_a_bad_start_is_mended_before_the_budget_is_spent():
    """In 8 dimensions some first cells are ten times too large; steps as large would overshoot."""
    Y = latents(400, 8, 1)
    s = sdot.solve(Y, cfg=SDOTConfig(solver="sgd", budget=1.3))
    assert error(Y, s.h, 300) < 1.25 * math.sqrt(400 / s.samples)


def test_tight_clusters_make_auto_change_to_adam():
    Y = normal(40, 64)[torch.arange(400) % 40] + 0.004 * normal(400, 64, 1)
    auto, sgd = (sdot.solve(Y, cfg=SDOTConfig(solver=o)) for o in ("auto", "sgd"))
    assert auto.solver == "adam" and sgd.solver == "sgd"
    assert error(Y, auto.h) < 0.15 and error(Y, sgd.h) > 0.25
    assert sdot.solve(latents(400, 64)).solver == "sgd"


def test_scale_and_shift_of_the_latents_change_nothing():
    Y, x = latents(300, 48), normal(4000, 48)
    a, b = sdot.solve(Y).h, sdot.solve(3 * Y + 5).h
    same = sdot.assign(x, Y, a.float()) == sdot.assign(x, 3 * Y + 5, b.float())
    assert same.double().mean() > 0.99


def test_masses_that_are_not_equal():
    Y = latents(100, 32)
    mass = torch.linspace(1, 9, 100)
    b = (mass / mass.sum()).double()
    s = sdot.solve(Y, mass)
    assert error(Y, s.h, 100, b) < 0.13
    p = masses(Y, s.h, 200) / 20_000
    assert p[-20:].sum() == pytest.approx(b[-20:].sum().item(), abs=0.02)


def test_a_temperature_makes_the_softmax_masses_equal():
    Y, x = latents(100, 32), normal(20_000, 32, 5)
    s = sdot.solve(Y, cfg=SDOTConfig(solver="sgd", temperature=1.0))
    tau = (Y - Y.mean(0)).norm(dim=1).mean() * (100 / 99) ** 0.5 / sdot.expected_max(100)[0]
    p = ((x @ Y.T + s.h) / tau).softmax(1).mean(0)
    assert (100 * p - 1).square().mean().sqrt() < 0.1
    assert 0.25 < error(Y, s.h, 200) < 0.6                           # those of argmax are not,
    assert sdot.rms(s.chi2) == pytest.approx(error(Y, s.h, 200), abs=0.05)      # and it says so
    short = dict(solver="sgd", temperature=1.0, budget=0.05)         # rows of noise one by one
    torch.testing.assert_close(sdot.solve(Y, cfg=SDOTConfig(memory=1e-4, **short)).h,
                               sdot.solve(Y, cfg=SDOTConfig(**short)).h, atol=1e-3, rtol=0)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_answer_is_an_average_of_the_iterates(ema):
    """Of Polyak and Juditsky's kind, here with weights 1, 2, 3, ..., or a moving one as in [AF]."""
    Y, iterates = latents(60, 32), []
    start = sdot.solve(Y, cfg=SDOTConfig(lr=1e-12, budget=1e-9)).h
    s = sdot.solve(Y, cfg=SDOTConfig(solver="sgd", ema=ema, target=0.3),
                   on_step=lambda samples, h: iterates.append(h))
    H, n = torch.stack(iterates), len(iterates)
    weight = torch.arange(1.0, n + 1, dtype=torch.float64) if not ema else (
        (1 - ema) * ema ** torch.arange(n - 1.0, -1, -1, dtype=torch.float64))
    expected = weight @ H / weight.sum() if not ema else weight @ H + ema ** n * start
    torch.testing.assert_close(s.h, expected, atol=1e-6, rtol=0)


def test_no_noise_is_used_twice(monkeypatch):
    """Neither in two steps, in two groups, nor to solve and then to test."""
    keys, real = [], sdot.keyed_noise
    monkeypatch.setattr(sdot, "keyed_noise", lambda key, *a: keys.append(key) or real(key, *a))
    Coupling.fit(latents(400, 16), torch.arange(400) // 320, target=0.15)
    assert len(keys) > 100 and len(set(keys)) == len(keys)


# ---- against POT ---------------------------------------------------------------------------------
def test_against_exact_transport_of_a_dense_sample():
    ot = pytest.importorskip("ot")
    Y, x = latents(20, 5), normal(3000, 5)
    h = sdot.solve(Y, cfg=SDOTConfig(target=0.03)).h
    cost = torch.cdist(x, Y).square().double().numpy()
    plan, log = ot.emd(uniform(3000).numpy(), uniform(20).numpy(), cost, log=True,
                       numItermax=10 ** 7)
    assert log["warning"] is None
    index = sdot.assign(x, Y, h.float())
    assert (torch.from_numpy(plan.argmax(1)) == index).double().mean() > 0.93
    ours = cost[np.arange(3000), index.numpy()].mean()
    assert ours == pytest.approx((plan * cost).sum(), rel=0.02)
    dual = dual_cost(normal(100_000, 5, 8).double(), Y.double(), h, uniform(20)).item()
    assert dual == pytest.approx(ours, rel=0.03)


def test_pots_solver_agrees_and_its_defaults_fail():
    semidiscrete = pytest.importorskip("ot.semidiscrete")
    Y, x = latents(300, 64), normal(4000, 64)
    a, b = (sdot.solve(Y, cfg=SDOTConfig(solver=s)) for s in ("auto", "pot"))
    assert error(Y, b.h) < 0.15 and b.samples == pytest.approx(200 * 300, rel=0.05)
    assert b.solver == "pot" and sdot.rms(b.chi2) < 0.15
    few = [sdot.solve(Y, key=key, cfg=SDOTConfig(solver="pot", budget=0.01, seed=seed)).h
           for key, seed in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(few[0], few[3]) and not torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    same = sdot.assign(x, Y, a.h.float()) == sdot.assign(x, Y, b.h.float())
    assert same.double().mean() > 0.85
    g = torch.Generator().manual_seed(0)
    g = semidiscrete.solve_semidiscrete(Y, lambda n: torch.randn(n, 64, generator=g), max_iter=120,
                                        batch_size=256)
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
        score = torch.where(groups == cond[i], Y @ x0[i] + h, -torch.inf)
        assert score[index[i]] > score.max() - 1e-3
    shaped = Coupling.fit(Y.view(240, 4, 4, 4), groups)
    assert torch.equal(shaped.couple(x0.view(500, 4, 4, 4), cond), index)


def test_a_coupling_again_is_the_same_and_another_seed_is_not():
    """A solve that was killed starts again; nothing of it was kept."""
    Y, groups, c = grouped(M=60)
    again, other = Coupling.fit(Y, groups), Coupling.fit(Y, groups, seed=1)
    assert torch.equal(c.h, again.h) and c.found == again.found
    assert not torch.equal(c.h, other.h)
    fewer, twins = Coupling.fit(Y[:30], torch.zeros(30)), torch.arange(60) // 30
    both = Coupling.fit(Y[:30].repeat(2, 1), twins)
    assert torch.equal(both.h[:30], fewer.h) and not torch.equal(both.h[:30], both.h[30:])


def test_each_clip_is_drawn_equally_often():
    Y, groups, c = grouped(target=0.05)
    n = 60_000
    cond = c.draw_group(n, torch.Generator().manual_seed(1))
    counts = torch.bincount(c.couple(normal(n, 64, 2), cond), minlength=240)
    assert counts.min() > 0 and sdot.rms(sdot.chi_square(counts, uniform(240))) < 0.08


def test_pot_solves_groups_too():
    Y, groups, c = grouped(solver="pot")
    assert sdot.rms(c.found["chi2"]) < 0.15
    cond = c.draw_group(40_000, torch.Generator().manual_seed(1))
    counts = torch.bincount(c.couple(normal(40_000, 64, 2), cond), minlength=240)
    assert sdot.rms(sdot.chi_square(counts, uniform(240))) < 0.15


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
    for mass, share in ((None, 0.75), (torch.where(groups == 7, 1.0, 9.0), 0.25)):
        c = Coupling.fit(latents(40, 8), groups, mass)
        drawn = c.draw_group(20_000, torch.Generator().manual_seed(0))
        assert (drawn == 7).double().mean() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("M,G,d", [(240, 6, 64), (300, 30, 512)])
def test_expected_gain_is_about_what_is_gained(M, G, d):
    groups, Y = torch.arange(M) % G, normal(M, d, 2)
    c = Coupling.fit(Y, groups)
    x0, cond = normal(6000, d, 3), c.draw_group(6000, torch.Generator().manual_seed(0))
    paired = (x0 - Y[c.couple(x0, cond)]).square().sum(1).mean()
    g = torch.Generator().manual_seed(4)
    random = (x0 - Y[torch.randint(M, (6000,), generator=g)]).square().sum(1).mean()
    measured = 1 - (paired / random).item()
    assert c.found["expected"] == pytest.approx(measured, rel=0.12)
    assert c.found["gain"] == pytest.approx(measured, rel=0.08)
    assert f"{100 * c.found['gain']:.1f} % below random" in c.report()


def test_report_warns_when_there_is_nothing_to_gain():
    few = Coupling.fit(normal(40, 64), torch.arange(40))
    assert "fewer than three clips. Random pairs" in few.report() and few.found["expected"] == 0
    assert "sqrt(d)" in Coupling.fit(normal(4, 9000)).report()
    assert "WARNING" not in grouped()[2].report()
    missed = grouped(budget=0.02, solver="sgd", lr=5.0)[2].report()
    assert "WARNING: the mass error" in missed and "raise budget" in missed


def test_clips_of_one_caption_are_a_group():
    groups = sdot.caption_groups(["b", "a", "b", "b", "a", "b"])
    assert groups.dtype == torch.int64 and groups.tolist() == [0, 1, 0, 0, 1, 0]
    assert sdot.caption_groups(["a", "b"] * 2, torch.zeros(4, 3)).tolist() == [0, 1, 0, 1]
    assert sdot.caption_groups(["a", "a", "b", "c", "d"]).tolist() == [0] * 5    # too few, then


@pytest.mark.parametrize("features", [False, True])
def test_unique_captions_are_grouped_by_similarity(features):
    words = ("a red boat on the sea", "two dogs run over green grass")
    captions = [f"take{i}" if features else f"{words[i % 2]} take{i}" for i in range(128)]
    E = normal(128, 8) + 9 * (-1.0) ** torch.arange(128)[:, None]    # the same two, as embeddings
    E = E * torch.linspace(0.01, 1, 128)[:, None]                    # of any length
    groups = sdot.caption_groups(captions, E.bfloat16() if features else None, size=32)
    assert torch.bincount(groups)[groups].min() >= 32
    for group in groups.unique():
        assert len({int(i) % 2 for i in (groups == group).nonzero()}) == 1


def test_clusters_are_tight_and_large_enough():
    E = normal(10, 16, 1)[torch.arange(700) % 10] * 5 + normal(700, 16)
    ids = sdot.cluster(E, size=32)
    assert torch.bincount(ids)[ids].min() >= 32 and len(ids.unique()) > 3
    inside = sum((E[ids == g] - E[ids == g].mean(0)).square().sum() for g in ids.unique())
    assert inside < 0.5 * (E - E.mean(0)).square().sum()
    assert torch.equal(ids, sdot.cluster(E, size=32))
    assert sdot.cluster(E[:20], size=32).unique().tolist() == [0]


# ---- an epoch of pairs ---------------------------------------------------------------------------
def test_rebalance_is_exact_changes_few_and_costs_little():
    ot = pytest.importorskip("ot")
    N, K = 100, 10
    Y, x = latents(N, 64), normal(N * K, 64)
    h = sdot.solve(Y, cfg=SDOTConfig(target=0.05)).h.float()
    before = sdot.assign(x, Y, h)
    after = sdot.rebalance(x, before, Y, h, uniform(N))
    assert (torch.bincount(after, minlength=N) == K).all()
    moved = (after != before).nonzero()[:, 0]
    assert len(moved) == (torch.bincount(before, minlength=N) - K).clamp_min(0).sum()
    assert len(moved) / (N * K) == pytest.approx(0.125, abs=0.03)
    cost = lambda i: (x - Y[i]).square().sum(1).mean().item()
    anywhere = before.clone()                                        # as [AF] does it
    anywhere[moved] = after[moved][torch.randperm(
        len(moved), generator=torch.Generator().manual_seed(0))]
    assert cost(after) < cost(before) + 0.35 * (cost(anywhere) - cost(before))
    M = torch.cdist(x, Y).square().double().numpy()
    best = ot.emd2(uniform(N * K).numpy(), uniform(N).numpy(), M, numItermax=10 ** 7)
    assert best <= cost(after) + 1e-4 and cost(after) == pytest.approx(best, rel=0.02)


def test_pairs_cover_every_clip_and_draw_their_noise_again():
    pytest.importorskip("ot")
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


def test_pairs_never_use_a_noise_twice_and_follow_the_masses():
    pytest.importorskip("ot")
    mass = torch.cat([torch.full((10,), 9.0), torch.ones(10)])
    c = Coupling.fit(latents(20, 8), torch.arange(20) // 10, mass)
    keys, rows = c.pairs(0, repeat=5)
    assert torch.bincount(rows).tolist() == [9] * 10 + [1] * 10
    keys = torch.cat([keys, c.pairs(1)[0], c.pairs(2)[0]])
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("groups", [10, 40])
def test_pairs_of_light_clips_come_now_and_then(groups):
    """Masses of 0.4 and 1.6 of the mean: no epoch can give each clip its share, many epochs do."""
    pytest.importorskip("ot")
    mass = torch.tensor([0.4, 1.6, 1.6, 0.4]).repeat(10)
    c = Coupling.fit(latents(40, 8), torch.arange(40) % groups, mass, target=0.5)
    drawn = [c.pairs(epoch)[1] for epoch in range(60)]
    assert {len(rows) for rows in drawn} == {40}
    counts = torch.stack([torch.bincount(rows, minlength=40) for rows in drawn]).double()
    for m in (0.4, 1.6):
        near = 0.22                             # 3.5 standard deviations, if all round alike
        assert counts[:, mass == m].mean().item() == pytest.approx(m, abs=near)
    assert (counts.sum(0) > 0).all() and counts.max() <= 3


@pytest.mark.parametrize("mass", [[0.0, 1, 1], [-1.0, 1, 1], [math.nan, 1, 1], [1.0, 1]])
def test_a_mass_that_is_none(mass):
    with pytest.raises(ValueError, match="must be 3 numbers, all above 0"):
        sdot.solve(torch.randn(3, 4), torch.tensor(mass))


def test_another_default_dtype_changes_nothing():
    Y = normal(30, 8).float()
    want = Coupling.fit(Y).h
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.allclose(Coupling.fit(Y).h.float(), want, atol=1e-2)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- files, ranks, the bar -----------------------------------------------------------------------
def test_save_and_load(tmp_path):
    Y, groups, c = grouped()
    c.save(tmp_path / "coupling.pt")
    back = Coupling.load(tmp_path / "coupling.pt", Y)
    x0, cond = normal(200, 64), groups[:200]
    assert torch.equal(back.couple(x0, cond), c.couple(x0, cond)) and back.report() == c.report()
    assert os.listdir(tmp_path) == ["coupling.pt"] and back.cfg == c.cfg
    other = Y.clone()
    other[17, 3] += 1e-6
    for wrong in (other, Y.flip(0), Y[:-1]):
        with pytest.raises(ValueError, match="coupling.pt: solved for other latents"):
            Coupling.load(tmp_path / "coupling.pt", wrong)


def test_unreadable_files_are_named(tmp_path):
    Y, groups, c = grouped(M=24)
    path = tmp_path / "c.pt"
    with pytest.raises(ValueError, match="c.pt: not a readable coupling"):
        Coupling.load(path, Y)
    c.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="c.pt: not a readable coupling"):
        Coupling.load(path, Y)
    torch.save(print, path)                                          # code, from a stranger
    with pytest.raises(ValueError, match="c.pt: not a readable coupling"):
        Coupling.load(path, Y)
    for thing in (torch.ones(3), {"anything": 1}, {"format": 1},
                  {"format": 2, "cfg": {"a_later_setting": 1}}):
        torch.save(thing, path)
        with pytest.raises(ValueError, match="c.pt: not a coupling of this version"):
            Coupling.load(path, Y)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    """Files may have 1000 bytes."""
    Y, groups, c = grouped(M=24)
    path = tmp_path / "c.pt"
    c.save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            c.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


def test_the_bar_moves_inside_a_large_group(monkeypatch):
    seen, real = [], tqdm.tqdm.update
    monkeypatch.setattr(tqdm.tqdm, "update", lambda bar, n: (real(bar, n), seen.append(bar.n)))
    Coupling.fit(latents(320, 64), torch.arange(320) // 300, progress=True)
    assert seen[0] < 30 and seen == sorted(seen) and len(set(seen)) > 30
    assert seen[-1] == 320 and 300 in seen


def _rank(rank: int, world: int, init: str, out: str) -> None:
    """Solve with all ranks, then alone: in one process, so that equal means equal."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank,
                                         world_size=world)
    mine, real = [], sdot.keyed_noise
    sdot.keyed_noise = lambda *a: mine.append(1) or real(*a)
    Y, groups = latents(420, 16), torch.tensor([0] * 400 + [1] * 20)
    c = Coupling.fit(Y, groups, ranks=True)
    shared = len(mine)
    alone = Coupling.fit(Y, groups)
    equal = torch.equal(c.h, alone.h) and c.found["chi2"] == alone.found["chi2"]
    gain = abs(c.found["gain"] / alone.found["gain"] - 1) < 1e-6
    torch.save((c.h, equal, gain, shared, len(mine) - shared), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_agree_and_share_the_work(tmp_path):
    world = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # forking a threaded process
        torch.multiprocessing.start_processes(
            _rank, (world, str(tmp_path / "init"), str(tmp_path / "out")), nprocs=world,
            start_method="fork")
    found = [torch.load(tmp_path / f"out.{r}") for r in range(world)]
    for h, equal, gain, shared, alone in found:
        assert equal and gain and torch.equal(h, found[0][0])
        assert shared < 0.7 * alone                                  # the group of 20 is not shared


# ---- data that are not as they should be ---------------------------------------------------------
def test_of_exact_copies_one_gets_the_cell():
    """The content is drawn as often as before, and every row comes in `pairs`."""
    pytest.importorskip("ot")
    Y = torch.cat([latents(40, 32), latents(40, 32)[:5]])
    c = Coupling.fit(Y, target=0.05)
    counts = torch.bincount(c.couple(normal(60_000, 32)), minlength=45).double() / 60_000
    content = counts[:40].clone()
    content[:5] += counts[40:]
    assert (content[:5] * 45 - 2).abs().max() < 0.3 and (content[5:] * 45 - 1).abs().max() < 0.4
    assert (torch.bincount(c.pairs(repeat=6)[1], minlength=45) == 6).all()


def test_flips_enter_as_rows_of_their_own():
    clips = normal(30, 8)
    c = Coupling.fit(torch.cat([clips, clips.flip(1)]), torch.arange(60) % 3, target=0.05)
    row = c.couple(normal(30_000, 8), c.draw_group(30_000, torch.Generator().manual_seed(0)))
    assert torch.bincount(row % 30, minlength=30).min() > 800        # row % M is the clip
    assert abs((row >= 30).double().mean() - 0.5) < 0.02             # row // M says which version


def test_all_the_same_single_and_pair():
    same = Coupling.fit(torch.ones(5, 8))
    assert same.couple(normal(50, 8)).shape == (50,) and torch.isfinite(same.h).all()
    one = Coupling.fit(normal(1, 8))
    assert one.couple(normal(3, 8)).tolist() == [0, 0, 0]
    assert one.couple(normal(3, 8), torch.zeros(3, dtype=torch.int32)).tolist() == [0, 0, 0]
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
            (lambda: c.couple(normal(2, 8), torch.tensor([0, 5])), "no clip has group 5")):
        with pytest.raises(ValueError, match=words):
            call()


def test_any_seed_solves():
    solved = [Coupling.fit(normal(40, 8), solver="pot", seed=seed).h for seed in (10**14, 10**14)]
    assert torch.equal(*solved)


@pytest.mark.parametrize("flag,value", [
    ("solver", "sinkhorn"), ("target", 0), ("budget", math.nan), ("memory", 0), ("cluster", -1),
    ("lr", -1), ("temperature", -0.1), ("ema", 1)])
def test_wrong_flags_are_named(flag, value):
    with pytest.raises(ValueError, match=f"^{flag} {value}: "):
        SDOTConfig(**{flag: value})


@pytest.mark.parametrize("flag,value", [("temperature", 0.5), ("ema", 0.9)])
def test_what_pot_cannot_do_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"^{flag} {value}: must be 0 with solver pot$"):
        SDOTConfig(solver="pot", **{flag: value})
    SDOTConfig(solver="sgd", **{flag: value})


# ---- speed and the file alone --------------------------------------------------------------------
def test_a_fit_holds_no_second_copy_of_the_latents():
    Y = normal(40_000, 64)
    fit = lambda: Coupling.fit(Y, target=1.0, budget=0.001, memory=1)
    assert 0 < peak_bytes(fit) < Y.nbytes


def test_pairing_scores_one_group_not_the_data_set(monkeypatch):
    """A batch of 64 from 30 groups: no score is computed outside the groups it asks for."""
    c = Coupling.fit(normal(300, 16), torch.arange(300) % 30, target=0.9)
    seen, real = [], sdot.assign
    monkeypatch.setattr(sdot, "assign", lambda x, Y, h, m: seen.append(x.shape[0] * Y.shape[0])
                        or real(x, Y, h, m))
    c.couple(normal(64, 16), c.draw_group(64))
    assert sum(seen) == 64 * 10


@pytest.mark.parametrize("args", [("--seed", "x"), ("--polt", "3"), ("--out", "/dev/null/x")])
def test_bad_arguments_give_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sdot.py", *args])
    with pytest.raises(SystemExit) as stop:
        sdot.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and args[0] in err


def test_autocast_changes_no_cell():
    x, Y, h = normal(200, 64), normal(300, 64), normal(300, 1)[:, 0]
    want = sdot.assign(x, Y, h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sdot.assign(x, Y, h), want)


def test_identical_targets_in_few_dimensions_have_finite_weights():
    for temperature in (0.0, 0.5):
        h = sdot.solve(torch.ones(5, 8), cfg=SDOTConfig(temperature=temperature, budget=0.1)).h
        assert h.isfinite().all()
