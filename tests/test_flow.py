"""flow.py against closed forms, measured orders of convergence, and two other libraries."""
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flow
from flow import FlowConfig

ROOT = Path(flow.__file__).parent


def pair(B=6, seed=0, shape=(3, 2, 4, 4)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, *shape, generator=g), torch.randn(B, *shape, generator=g)


# ---- the path ------------------------------------------------------------------------------------
def test_path_begins_in_noise_ends_in_data_and_its_derivative_is_the_velocity():
    x0, x1 = pair()
    s = 0.05
    assert torch.equal(flow.cond_ot_path(x0, x1, torch.zeros(6), s), x0)
    torch.testing.assert_close(flow.cond_ot_path(x0, x1, torch.ones(6), s), x1 + s * x0)
    t, dt = torch.full((6,), 0.4), 1e-2
    slope = (flow.cond_ot_path(x0, x1, t + dt, s) - flow.cond_ot_path(x0, x1, t - dt, s)) / (2 * dt)
    torch.testing.assert_close(slope, flow.velocity(x0, x1, s), atol=1e-4, rtol=1e-4)


def test_the_clock_runs_from_noise_to_data():
    x0, x1 = torch.zeros(1, 1), torch.ones(1, 1)
    early, late = (flow.cond_ot_path(x0, x1, torch.tensor([t])).item() for t in (0.1, 0.9))
    assert early == pytest.approx(0.1) and late == pytest.approx(0.9)
    assert flow.velocity(x0, x1).item() > 0


def test_path_is_fp32_for_bf16_latents():
    x0, x1 = pair()
    t = torch.full((6,), 0.999)
    exact = flow.cond_ot_path(x0.bfloat16().float(), x1.bfloat16().float(), t)
    assert torch.equal(flow.cond_ot_path(x0.bfloat16(), x1.bfloat16(), t.double()), exact)
    assert flow.velocity(x0.bfloat16(), x1.bfloat16()).dtype == torch.float32


def test_conversions_recover_the_ends_and_return():
    x0, x1 = pair()
    t = torch.linspace(0.05, 0.95, 6)
    for s in (1e-5, 0.1):
        x, v = flow.cond_ot_path(x0, x1, t, s), flow.velocity(x0, x1, s)
        torch.testing.assert_close(flow.to_noise(v, x, t), x0, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flow.to_data(v, x, t, s), x1, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flow.from_noise(x0, x, t), v, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(flow.from_data(x1, x, t, s), v, atol=1e-4, rtol=1e-4)


def gaussian_velocity(mean, std, s=1e-5):
    """E[v | x_t] for data N(mean, std^2) and independent noise, each element, in closed form."""
    def v_fn(x, t):
        t, k = flow.like(t, x), 1 - s
        var = t ** 2 * std ** 2 + (1 - k * t) ** 2
        return mean + (t * std ** 2 - k * (1 - k * t)) / var * (x - t * mean)
    return v_fn


def test_score_of_a_gaussian_flow_is_the_gaussians_score():
    t, x = torch.full((50,), 0.6), torch.linspace(-2, 3, 50)[:, None]
    mean, std, s = 0.7, 0.5, 1e-5
    var = 0.36 * std ** 2 + (1 - (1 - s) * 0.6) ** 2
    score = flow.to_score(gaussian_velocity(mean, std)(x, t), x, t, s)
    torch.testing.assert_close(score, -(x - 0.6 * mean) / var, atol=1e-4, rtol=1e-4)


# ---- clocks of other code bases ------------------------------------------------------------------
@pytest.mark.parametrize("name", flow.CLOCKS)
def test_clocks_close_in_a_circle(name):
    v_fn = gaussian_velocity(0.3, 0.5)
    x, t = torch.randn(7, 3), torch.linspace(0, 1, 7)
    round_trip = flow.from_clock(flow.to_clock(v_fn, name), name)
    torch.testing.assert_close(round_trip(x, t), v_fn(x, t), atol=1e-5, rtol=1e-5)


def test_a_diffusers_style_model_samples_its_data_through_from_clock():
    """Independent statement of that convention: x = (1 - u) data + u noise, u = timestep / 1000."""
    data = torch.tensor([1.5, -2.0])

    def foreign(x, timestep):                       # predicts noise - data for a one-point data set
        u = timestep[:, None] / 1000
        return (x - (1 - u) * data) / u - data
    x0, ts = torch.randn(64, 2), flow.schedule("linear", 8)
    x1 = flow.sample(flow.from_clock(foreign, "sd3"), x0, ts)
    torch.testing.assert_close(x1, data.expand(64, 2), atol=1e-4, rtol=0)
    wrong = flow.sample(foreign, x0, ts[1:])
    assert not torch.allclose(wrong, data.expand(64, 2), atol=0.5)


def one_point(name, c):
    """What a perfect model of that code base says where all data is one point c, from its own
    words: how it mixes data and noise, what it predicts, and in what unit it is told the time."""
    if name in ("minrf", "open_sora_2"):            # z = (1 - t) x + t noise, predicts noise - x
        return lambda z, t: (z - c) / t.view(-1, 1)
    if name in ("sd3", "diffusers", "hunyuan", "wan", "ltx"):       # the same, t in thousandths
        return lambda z, t: (z - c) / (t.view(-1, 1) / 1000)
    return lambda z, t: (c - z) / (1 - t.view(-1, 1))           # z = t x + (1 - t) noise, x - noise


@pytest.mark.parametrize("name", flow.CLOCKS)
def test_a_model_of_every_clock_finds_its_data(name):
    c, x0 = torch.tensor([1.5, -2.0]), torch.randn(64, 2)
    x1 = flow.sample(flow.from_clock(one_point(name, c), name), x0, flow.schedule("linear", 8))
    torch.testing.assert_close(x1, c.expand(64, 2), atol=1e-4, rtol=0)


def test_score_and_velocity_are_each_other_s_inverse():
    x, v, t = torch.randn(5, 3), torch.randn(5, 3), torch.linspace(0.1, 0.9, 5)
    torch.testing.assert_close(flow.from_score(flow.to_score(v, x, t), x, t), v, atol=1e-5, rtol=0)


def test_sampled_times_are_shifted_and_moved():
    g = lambda: torch.Generator().manual_seed(0)
    plain = flow.sample_t(4000, flow.FlowConfig(time="logit_normal"), g())
    moved = flow.sample_t(4000, flow.FlowConfig(time="logit_normal", mean=0.7, shift=3.0), g())
    torch.testing.assert_close(moved.logit(), plain.logit() + 0.7 - math.log(3), atol=1e-3, rtol=0)


def test_unknown_names_are_named():
    for call in (lambda: flow.from_clock(None, "sd4"), lambda: FlowConfig(time="normal"),
                 lambda: FlowConfig(objective="ddpm"), lambda: flow.schedule("cosine", 4),
                 lambda: flow.sample(lambda x, t: x, torch.zeros(1, 1), torch.ones(2), "ab2")):
        with pytest.raises(ValueError, match="not one of"):
            call()
    with pytest.raises(ValueError, match="steps 0"):
        flow.schedule("linear", 0)
    with pytest.raises(ValueError, match="shape of x1"):
        flow.loss(lambda x, t: x, torch.zeros(2, 3), torch.zeros(2, 4))


# ---- time ----------------------------------------------------------------------------------------
def test_times_follow_their_law():
    g = torch.Generator().manual_seed(0)
    t = flow.sample_t(200_000, FlowConfig(), g)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    z = torch.logit(t.double())
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert (t < 0.1).double().mean().item() == pytest.approx(0.0140, abs=0.001)   # Phi(logit 0.1)
    u = flow.sample_t(200_000, FlowConfig(time="uniform"), g)
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    assert abs(flow.sample_t(200_000, FlowConfig(objective="diffusion"), g).var() - 1 / 12) < 0.001


def test_shift_moves_the_logit_and_towards_noise():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = flow.shift_time(t, 3.0)
    moved = torch.logit(t) - math.log(3)
    torch.testing.assert_close(torch.logit(shifted), moved, atol=1e-9, rtol=0)
    noise = 1 - t                                    # the published form is in the noise level
    torch.testing.assert_close(1 - shifted, 3 * noise / (1 + 2 * noise))


# ---- loss ----------------------------------------------------------------------------------------
def test_loss_of_zero_and_of_the_exact_answer():
    x0, x1 = pair(64)
    t = torch.rand(64)
    zero = flow.loss(lambda x, t: torch.zeros_like(x), x1, x0, t)
    assert zero.item() == pytest.approx((flow.velocity(x0, x1) ** 2).mean().item(), rel=1e-6)
    assert 1.8 < zero < 2.2
    assert flow.loss(lambda x, t: flow.velocity(x0, x1), x1, x0, t) == 0
    each = flow.loss(lambda x, t: torch.zeros_like(x), x1, x0, t, reduce=False)
    assert each.shape == (64,) and each.mean().item() == pytest.approx(zero.item(), rel=1e-6)


def test_loss_is_least_at_the_conditional_mean():
    """1-D Gaussian data: the regression's minimiser among c * exact is c = 1."""
    g = torch.Generator().manual_seed(0)
    x1 = 0.7 + 0.5 * torch.randn(100_000, 1, generator=g)
    exact = gaussian_velocity(0.7, 0.5)
    same = lambda: torch.Generator().manual_seed(1)
    values = [flow.loss(lambda x, t, c=c: c * exact(x, t), x1, generator=same()).item()
              for c in (0.9, 1.0, 1.1)]
    assert values[1] < values[0] and values[1] < values[2]


def test_loss_passes_the_time_the_path_was_made_with_and_couples_noise_only():
    x0, x1 = pair(8)
    seen = {}

    def v_fn(x, t):
        seen.update(x=x, t=t)
        return x
    flow.loss(v_fn, x1, x0, couple=lambda a, b: a.flip(0))
    torch.testing.assert_close(seen["x"], flow.cond_ot_path(x0.flip(0), x1, seen["t"]))


# ---- diffusion baseline --------------------------------------------------------------------------
def test_diffusion_has_zero_terminal_snr_and_its_target_is_the_derivative_by_angle():
    x0, x1 = pair(1)
    cfg = FlowConfig(objective="diffusion")
    x, v = flow.noise_and_target(x0, x1, torch.zeros(1), cfg)
    assert torch.equal(x, x0) and torch.equal(v, x1)
    assert flow.ANGLES[-1].sin() == pytest.approx(math.sqrt(1 - 0.00085), rel=1e-6)   # first kept
    t, e = torch.tensor([0.37]), 2e-3
    (a, _), (b, _) = (flow.noise_and_target(x0, x1, t + d, cfg) for d in (-e, e))
    dphi = flow.angle(t + e) - flow.angle(t - e)
    _, v = flow.noise_and_target(x0, x1, t, cfg)
    torch.testing.assert_close((b - a) / dphi, v, atol=3e-3, rtol=3e-3)


def test_ddim_recovers_a_point_in_one_step_and_a_gaussian_in_many():
    cfg = FlowConfig(objective="diffusion")
    y = torch.tensor([1.5, -2.0])

    def point(x, t):                                 # the exact v-prediction for data = {y}
        phi = flow.like(flow.angle(t), x)
        return phi.cos() * y - phi.sin() * (x - phi.sin() * y) / phi.cos()
    x0 = torch.randn(50, 2)
    x1 = flow.sample(point, x0, flow.schedule("linear", 1), cfg=cfg)
    end = flow.ANGLES[-1]
    torch.testing.assert_close(x1, (end.sin() * y + end.cos() * x0).float(), atol=1e-5, rtol=1e-5)

    mean, std = 1.0, 0.5

    def gaussian(x, t):
        phi = flow.like(flow.angle(t), x)
        s, c = phi.sin(), phi.cos()
        gain = (s * c * std ** 2 - s * c) / (s ** 2 * std ** 2 + c ** 2)
        return c * mean + gain * (x - s * mean)
    g = torch.Generator().manual_seed(0)
    x0, ts = torch.randn(40_000, 1, generator=g), flow.schedule("linear", 200)
    x1 = flow.sample(gaussian, x0, ts, cfg=cfg)
    assert x1.mean().item() == pytest.approx(mean, abs=0.02)
    assert x1.std().item() == pytest.approx(std, abs=0.02)
    with pytest.raises(ValueError, match="DDIM"):
        flow.sample(gaussian, x1, flow.schedule("linear", 2), "heun", cfg=cfg)


# ---- schedules -----------------------------------------------------------------------------------
@pytest.mark.parametrize("steps,of", [(50, 1000), (50, 250), (64, 1000), (7, 100), (1, 10)])
def test_linear_quadratic_is_c1_monotone_and_complete(steps, of):
    ts = flow.schedule("linear_quadratic", steps, of=of).double()
    d, L = ts.diff(), steps // 2
    assert len(ts) == steps + 1 and ts[0] == 0 and ts[-1] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(d[:L], torch.full((L,), 1 / of).double(), atol=1e-7, rtol=1e-4)
    assert (d.diff() > -1e-7).all()
    if steps - L > 2:                                # C1: the quadratic starts with slope h
        c = d[L] - 1 / of
        bends = (2 * c).expand(steps - L - 1)
        torch.testing.assert_close(d[L:].diff(), bends, atol=1e-6, rtol=1e-3)


def test_linear_quadratic_published_numbers_and_limits():
    d = flow.schedule("linear_quadratic", 50, of=1000).double().diff()
    assert d[25].item() == pytest.approx(0.00252, abs=1e-5)
    assert d[-1].item() == pytest.approx(0.0755, abs=1e-4)
    d = flow.schedule("linear_quadratic", 50, of=250).double().diff()
    assert d[25].item() == pytest.approx(0.00528, abs=1e-5)
    assert d[-1].item() == pytest.approx(0.0667, abs=1e-4)
    same = flow.schedule("linear_quadratic", 20, of=20)
    torch.testing.assert_close(same, flow.schedule("linear", 20))
    with pytest.raises(ValueError, match="of 10"):
        flow.schedule("linear_quadratic", 20, of=10)


def test_shifted_schedule_spends_its_steps_near_noise():
    ts = flow.schedule("shifted", 10, shift=3.0)
    assert ts[0] == 0 and ts[-1] == 1 and (ts.diff() > 0).all() and ts[5] < 0.3


# ---- solvers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver,order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solver_order(solver, order):
    """dx/dt = x (1 + t): x(1) = x0 e^1.5. Halving the steps divides the error by 2^order."""
    f = lambda x, t: x * (1 + flow.like(t, x))
    x0 = torch.ones(1, 1, dtype=torch.float64)
    e = [abs(flow.sample(f, x0, flow.schedule("linear", n), solver).item() - math.exp(1.5))
         for n in (32, 64)]
    assert math.log2(e[0] / e[1]) == pytest.approx(order, abs=0.25)


def test_solvers_count_their_calls():
    for solver, calls in (("euler", 10), ("midpoint", 20), ("heun", 20), ("rk4", 40)):
        f = flow.Counted(lambda x, t: x)
        flow.sample(f, torch.ones(2, 3), flow.schedule("linear", 10), solver)
        assert f.nfe == calls


def test_dopri5_meets_its_tolerance_and_adapts():
    x0 = torch.tensor([[1.0], [2.0]])
    smooth = flow.Counted(lambda x, t: x * torch.cos(4 * flow.like(t, x)))
    x1 = flow.sample(smooth, x0, flow.schedule("linear", 1), "dopri5")
    torch.testing.assert_close(x1, x0 * math.exp(math.sin(4) / 4), atol=5e-5, rtol=5e-5)
    stiff = flow.Counted(lambda x, t: x * torch.cos(40 * flow.like(t, x)) * 5)
    x1 = flow.sample(stiff, x0, flow.schedule("linear", 1), "dopri5")
    torch.testing.assert_close(x1, x0 * math.exp(math.sin(40) / 8), atol=2e-4, rtol=2e-4)
    assert stiff.nfe > 2 * smooth.nfe
    with pytest.raises(ValueError, match="NaN"):
        flow.sample(lambda x, t: x * math.nan, x0, flow.schedule("linear", 1), "dopri5")


def test_one_point_target_is_exact_in_one_euler_step():
    y = torch.tensor([3.0, -1.0])
    k = 1 - 1e-5
    v_fn = lambda x, t: flow.from_data(y.expand_as(x), x, t)
    x0 = torch.randn(32, 2)
    x1 = flow.sample(v_fn, x0, flow.schedule("linear", 1))
    torch.testing.assert_close(x1, y + (1 - k) * x0, atol=1e-6, rtol=1e-6)


def test_gaussian_to_gaussian_in_closed_form():
    """The flow between N(0, 1) and N(m, s^2) is the line x -> m + s x (up to sigma_min)."""
    v_fn = gaussian_velocity(0.7, 0.4)
    x0 = torch.linspace(-3, 3, 41)[:, None]
    fine = flow.sample(v_fn, x0, flow.schedule("linear", 100), "rk4")
    torch.testing.assert_close(fine, 0.7 + 0.4 * x0, atol=1e-3, rtol=0)
    e = [flow.endpoint_error(v_fn, x0, flow.schedule("linear", n)) for n in (16, 32)]
    assert e[0] / e[1] == pytest.approx(2, abs=0.3)


def test_trajectory_progress_and_state_dtype(capsys):
    x0 = torch.randn(3, 2).bfloat16()
    seen = []

    def v_fn(x, t):
        seen.append((x.dtype, t.shape, t.dtype))
        return x.bfloat16()
    path = flow.sample(v_fn, x0, flow.schedule("linear", 5), progress=True, trajectory=True)
    assert path.shape == (6, 3, 2) and path.dtype == torch.float32
    assert torch.equal(path[0], x0.float()) and set(seen) == {(torch.float32, (3,), torch.float32)}
    assert torch.equal(path[-1], flow.sample(v_fn, x0, flow.schedule("linear", 5)))
    assert "5/5" in capsys.readouterr().err


# ---- guidance ------------------------------------------------------------------------------------
def test_guidance_formula_scale_per_sample_and_interval():
    c, u = pair(4)
    assert torch.equal(flow.guide(c, u, 0.0), u)
    torch.testing.assert_close(flow.guide(c, u, 1.0), c)
    w = 2.5
    torch.testing.assert_close(flow.guide(c, u, 1 + w), (1 + w) * c - w * u, atol=1e-5, rtol=1e-5)
    scale = torch.tensor([0.0, 1.0, 2.0, 7.5])
    rows = torch.stack([flow.guide(c[i], u[i], scale[i].item()) for i in range(4)])
    torch.testing.assert_close(flow.guide(c, u, scale), rows)
    f, g = flow.Counted(lambda x, t: x), flow.Counted(lambda x, t: -x)
    flow.sample(flow.guided(f, g, 3.0, (0.5, 1.0)), torch.ones(2, 1), flow.schedule("linear", 10))
    assert (f.nfe, g.nfe) == (10, 5)
    f, g = flow.Counted(lambda x, t: x), flow.Counted(lambda x, t: -x)
    flow.sample(flow.guided(f, g, 1.0), torch.ones(2, 1), flow.schedule("linear", 10))
    assert (f.nfe, g.nfe) == (10, 0)


# ---- coupling and measures -----------------------------------------------------------------------
def test_minibatch_pairing_is_the_best_permutation_and_stays_within_captions():
    scipy = pytest.importorskip("scipy.optimize")
    x0, x1 = pair(24, shape=(2, 3))
    paired = flow.minibatch_pairing(x0, x1)
    key = lambda x: sorted(map(tuple, x.flatten(1).tolist()))
    assert key(paired) == key(x0)                                    # a permutation
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square().numpy()
    best = cost[scipy.linear_sum_assignment(cost)].sum()
    assert (paired - x1).double().square().sum().item() == pytest.approx(best, rel=1e-5)
    groups = torch.tensor([5] * 10 + [-3] * 13 + [9])[torch.randperm(24)]
    paired = flow.minibatch_pairing(x0, x1, groups)
    for g in groups.unique():
        assert key(paired[groups == g]) == key(x0[groups == g])
    assert (paired - x1).square().sum() < (x0 - x1).square().sum()


def test_guidance_looks_at_the_time_of_each_row():
    f, g = lambda x, t: torch.ones_like(x), lambda x, t: torch.zeros_like(x)
    v = flow.guided(f, g, torch.tensor([3.0, 5.0]), (0.5, 1.0))
    x = torch.zeros(2, 1)
    assert v(x, torch.tensor([0.1, 0.9])).tolist() == [[1.0], [5.0]]
    assert v(x, torch.tensor([0.9, 0.1])).tolist() == [[3.0], [1.0]]


def test_dopri5_runs_backwards_too():
    x0, v = torch.randn(8, 1), lambda x, t: x * t.view(-1, 1)
    ts = flow.schedule("linear", 3)
    there = flow.sample(v, x0, ts, "dopri5")
    torch.testing.assert_close(there, x0 * math.exp(0.5), atol=1e-4, rtol=1e-4)
    back = flow.sample(v, there, ts.flip(0), "dopri5")
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)


def test_measures_of_what_stands_still_and_of_half_a_path():
    still = flow.straightness(lambda x, t: 0 * x, torch.randn(4, 2))
    assert still["S"] == still["curvature"] == 0
    half = flow.straightness(lambda x, t: torch.ones_like(x), torch.randn(4, 2),
                             torch.linspace(0, 0.5, 9))
    assert abs(half["S"]) < 1e-6 and abs(half["energy"] - 1) < 1e-6


def test_measures_follow_the_objective():
    """A one-point diffusion model, for which DDIM is exact in any number of steps."""
    c, cfg = torch.tensor([[1.5, -2.0]]), flow.FlowConfig(objective="diffusion")

    def v_fn(x, t):                                 # x = sin c + cos x0 -> cos c - sin x0
        phi = flow.angle(t).view(-1, 1).float()
        return phi.cos() * c - phi.sin() * (x - phi.sin() * c) / phi.cos()
    x0, ts = torch.randn(16, 2), flow.schedule("linear", 4)
    assert flow.endpoint_error(v_fn, x0, ts, cfg=cfg, reference=16) < 1e-2
    assert flow.endpoint_error(v_fn, x0, ts, reference=16) > 0.1
    assert 0.02 < flow.straightness(v_fn, x0, ts, cfg)["curvature"] < 1


def test_straightness_is_energy_minus_displacement():
    """A quarter turn: |v| = (pi/2) |x|, displacement^2 = 2 |x|^2. A straight flow: S = 0."""
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) * math.pi / 2
    x0 = torch.randn(500, 2)
    r2 = x0.square().sum(1).mean().item()
    m = flow.straightness(lambda x, t: x @ J.T, x0, flow.schedule("linear", 4000))
    assert m["energy"] == pytest.approx(r2 * math.pi ** 2 / 4, rel=2e-3)
    assert m["displacement"] == pytest.approx(2 * r2, rel=2e-3)
    assert m["curvature"] == pytest.approx(1 - 8 / math.pi ** 2, rel=0.02)
    assert abs(flow.straightness(lambda x, t: torch.ones_like(x), x0)["S"]) < 1e-4


@pytest.mark.parametrize("x0,x1,groups,line", [
    (pair(4)[0], pair(6)[1], None, "need the same shape"),
    (*pair(6), torch.zeros(5), "groups (5,): need one for each of 6"),
    (*pair(6), torch.zeros(9), "groups (9,): need one for each of 6"),
    (pair(6)[0] / 0, pair(6)[1], None, "x0: NaN or infinity"),
    (pair(6)[0], pair(6)[1] * math.nan, None, "x1: NaN or infinity")])
def test_minibatch_pairing_names_what_it_cannot_pair(x0, x1, groups, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        flow.minibatch_pairing(x0, x1, groups)


def test_minibatch_pairing_names_a_solver_that_stopped_short(monkeypatch):
    ot = pytest.importorskip("ot")
    real = ot.emd
    monkeypatch.setattr(ot, "emd", lambda *a, **k: real(*a, **{**k, "numItermax": 1}))
    with pytest.raises(RuntimeError, match="numItermax"), pytest.warns(UserWarning):
        flow.minibatch_pairing(*pair(64))


def test_minibatch_coupling_straightens_the_regression_target():
    """The exact marginal velocity's loss is E Var(v | x_t): less of it is left after pairing."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(256) % 8 * math.pi / 4
    x1 = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    x0 = torch.randn(256, 2, generator=g)
    t = torch.full((256,), 0.3)

    def spread(a):                                   # nearest-neighbour estimate of that variance
        x, v = flow.cond_ot_path(a, x1, t), flow.velocity(a, x1)
        near = torch.cdist(x, x).topk(4, largest=False).indices[:, 1:]
        return (v[near] - v[:, None]).square().mean().item()
    assert spread(flow.minibatch_pairing(x0, x1)) < 0.3 * spread(x0)


def test_validation_loss_is_repeatable_and_covers_its_grid():
    _, x1 = pair(16)
    times = []

    def v_fn(x, t):
        times.append(t[0].item())
        return torch.zeros_like(x)
    a, per_time = flow.validation_loss(v_fn, x1)
    b, _ = flow.validation_loss(v_fn, x1)
    assert a == b and per_time.shape == (8,) and times[:8] == [(i + 0.5) / 8 for i in range(8)]


# ---- against other libraries ---------------------------------------------------------------------
def test_torchcfm_agrees():
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    x0, x1 = pair(8)
    t = torch.linspace(0.05, 0.95, 8)
    theirs = cfm.TargetConditionalFlowMatcher(sigma=1e-5)
    # its path is N(t x1, (1 - (1 - s) t)^2) with its own noise, which it returns
    _, xt, ut, eps = theirs.sample_location_and_conditional_flow(x0, x1, t, return_noise=True)
    torch.testing.assert_close(flow.cond_ot_path(eps, x1, t, 1e-5), xt, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flow.velocity(eps, x1, 1e-5), ut, atol=2e-5, rtol=2e-5)


def test_flow_matching_agrees():
    path = pytest.importorskip("flow_matching.path")
    x0, x1 = pair(8)
    t = torch.linspace(0, 1, 8)
    s = path.CondOTProbPath().sample(x_0=x0, x_1=x1, t=t)           # sigma_min = 0
    torch.testing.assert_close(flow.cond_ot_path(x0, x1, t, 0.0), s.x_t, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flow.velocity(x0, x1, 0.0), s.dx_t, atol=1e-6, rtol=1e-6)


def test_torch_dopri5_and_scipy_agree():
    scipy = pytest.importorskip("scipy.integrate")
    v_fn = gaussian_velocity(0.7, 0.4)

    def rhs(t, x):
        return v_fn(torch.tensor(x)[:, None], torch.full((1,), t).double()).numpy()[:, 0]
    x0 = np.linspace(-2, 2, 9)
    ref = scipy.solve_ivp(rhs, (0, 1), x0, rtol=1e-9, atol=1e-9).y[:, -1]
    ours = flow.sample(v_fn, torch.tensor(x0)[:, None], flow.schedule("linear", 1), "dopri5")
    np.testing.assert_allclose(ours[:, 0].numpy(), ref, atol=1e-4)


# ---- the file alone ------------------------------------------------------------------------------
def run_alone(tmp_path, *args, timeout=60):
    shutil.copy(ROOT / "flow.py", tmp_path)
    return subprocess.run([sys.executable, "flow.py", *args], cwd=tmp_path, text=True,
                          capture_output=True, timeout=timeout)


@pytest.mark.parametrize("args", [("--stpes", "3"), ("--steps", "x"), ("--steps", "0")])
def test_bad_arguments_give_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flow.py", *args])
    with pytest.raises(SystemExit) as stop:
        flow.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and args[0] in err


@pytest.mark.slow
def test_demo_passes_alone(tmp_path):
    r = run_alone(tmp_path, timeout=600)
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.count("PASS") == 2 and (tmp_path / "out/flow/flow.png").stat().st_size > 10_000


@pytest.mark.slow
def test_demo_fails_when_its_claim_fails(tmp_path):
    """Three training steps teach nothing, so the claim cannot hold."""
    r = run_alone(tmp_path, "--steps", "3", timeout=600)
    assert r.returncode == 1 and "FAIL" in r.stdout
