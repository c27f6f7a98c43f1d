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


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def pair(B=6, seed=0, shape=(3, 2, 4, 4)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, *shape, generator=g), torch.randn(B, *shape, generator=g)


class Counted:
    """A v_fn that counts its calls."""

    def __init__(self, v_fn):
        self.v_fn, self.calls = v_fn, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.v_fn(x, t)


# ---- the path ------------------------------------------------------------------------------------
def test_path_begins_in_noise_ends_in_data_and_its_derivative_is_the_velocity():
    x0, x1 = pair()
    s = 0.05
    assert torch.equal(flow.cond_ot_path(x0, x1, torch.zeros(6), s), x0)     # 0 x1 + 1 x0
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


def test_a_velocity_says_where_both_ends_are():
    """The formulas of section 6."""
    x0, x1 = pair()
    t, k = torch.linspace(0.05, 0.95, 6), 1 - 0.1
    x, v, t_like = flow.cond_ot_path(x0, x1, t, 0.1), flow.velocity(x0, x1, 0.1), flow.like(t, x0)
    torch.testing.assert_close(x - t_like * v, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(k * x + (1 - k * t_like) * v, x1, atol=1e-5, rtol=1e-5)


def gaussian_velocity(mean, std, s=1e-5):
    """E[v | x_t] for data N(mean, std^2) and independent noise, each element, in closed form."""
    def v_fn(x, t):
        t, k = flow.like(t, x), 1 - s
        var = t ** 2 * std ** 2 + (1 - k * t) ** 2
        return mean + (t * std ** 2 - k * (1 - k * t)) / var * (x - t * mean)
    return v_fn


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_model_with_a_backward_clock_finds_its_data(unit):
    """By the table of section 6. In the words of those code bases: z = (1 - u) data + u noise, and
    the model, told the time u unit, predicts noise - data. All data is one point c."""
    c = torch.tensor([1.5, -2.0])
    foreign = lambda z, time: (z - c) / (time.view(-1, 1) / unit)
    x0, ts = torch.randn(64, 2), flow.schedule("linear", 8)
    x1 = flow.sample(lambda x, t: -foreign(x, unit * (1 - t)), x0, ts)
    torch.testing.assert_close(x1, c.expand(64, 2), atol=1e-4, rtol=0)
    wrong = flow.sample(foreign, x0, ts[1:])                    # with our clock: never there
    assert not torch.allclose(wrong, c.expand(64, 2), atol=0.5)


def test_wrong_values_are_named():
    x = torch.zeros(1, 1)
    for call in (lambda: FlowConfig(time="normal"), lambda: FlowConfig(objective="ddpm"),
                 lambda: flow.schedule("cosine", 4),
                 lambda: flow.sample(lambda x, t: x, x, torch.ones(2), "ab2")):
        with pytest.raises(ValueError, match="not one of"):
            call()
    for call, line in (
            (lambda: flow.schedule("linear", 0), "steps 0: must be 1 or more"),
            (lambda: flow.schedule("shifted", 4, shift=0), "shift 0: must be above 0"),
            (lambda: flow.schedule("linear_quadratic", 2000), "steps 2000: must be at most 1000"),
            (lambda: FlowConfig(std=0), "std 0: must be above 0"),
            (lambda: FlowConfig(sigma_min=1), "sigma_min 1: must lie in [0, 1)"),
            (lambda: flow.loss(lambda x, t: x, x, torch.zeros(1, 2)), "shape of x1"),
            (lambda: flow.sample(lambda x, t: x, x, torch.ones(2), "heun",
                                 cfg=FlowConfig(objective="diffusion")), "solver heun: a diff"),
            (lambda: flow.minibatch_pairing(*pair(4)[:1], pair(6)[1]), "need the same shape"),
            (lambda: flow.minibatch_pairing(*pair(6), torch.zeros(5)),
             "groups (5,): need one for each of 6"),
            (lambda: flow.minibatch_pairing(pair(6)[0] / 0, pair(6)[1]), "NaN or infinity")):
        with pytest.raises(ValueError, match=re.escape(line)):
            call()


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


def test_sampled_times_are_shifted_and_moved():
    g = lambda: torch.Generator().manual_seed(0)
    plain = flow.sample_t(4000, FlowConfig(time="logit_normal"), g())
    moved = flow.sample_t(4000, FlowConfig(time="logit_normal", mean=0.7, shift=3.0), g())
    torch.testing.assert_close(moved.logit(), plain.logit() + 0.7 - math.log(3), atol=1e-3, rtol=0)


def test_shift_moves_the_logit_and_towards_noise():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = flow.shift_time(t, 3.0)
    torch.testing.assert_close(torch.logit(shifted), torch.logit(t) - math.log(3), atol=1e-9,
                               rtol=0)
    noise = 1 - t                                    # the published form is in the noise level
    torch.testing.assert_close(1 - shifted, 3 * noise / (1 + 2 * noise))


# ---- loss ----------------------------------------------------------------------------------------
def test_loss_of_zero_and_of_the_exact_answer():
    x0, x1 = pair(64)
    t = torch.rand(64)
    zero = flow.loss(lambda x, t: torch.zeros_like(x), x1, x0, t)
    assert zero.item() == pytest.approx((flow.velocity(x0, x1) ** 2).mean().item(), rel=1e-5)
    assert 1.8 < zero < 2.2
    assert flow.loss(lambda x, t: flow.velocity(x0, x1), x1, x0, t) == 0
    drawn = flow.loss(lambda x, t: torch.zeros_like(x), x1)             # noise and times of its own
    assert 1.8 < drawn < 2.2


def test_loss_is_least_at_the_conditional_mean():
    """1-D Gaussian data: the regression's minimiser among c * exact is c = 1."""
    g = torch.Generator().manual_seed(0)
    x1 = 0.7 + 0.5 * torch.randn(100_000, 1, generator=g)
    exact = gaussian_velocity(0.7, 0.5)
    same = lambda: torch.Generator().manual_seed(1)
    values = [flow.loss(lambda x, t, c=c: c * exact(x, t), x1, generator=same()).item()
              for c in (0.9, 1.0, 1.1)]
    assert values[1] < values[0] and values[1] < values[2]


def test_loss_passes_the_time_that_the_path_was_made_with():
    x0, x1 = pair(8)
    seen = {}

    def v_fn(x, t):
        seen.update(x=x, t=t)
        return x
    flow.loss(v_fn, x1, x0)
    torch.testing.assert_close(seen["x"], flow.cond_ot_path(x0, x1, seen["t"]))


# ---- diffusion baseline --------------------------------------------------------------------------
def test_diffusion_has_zero_terminal_snr_and_its_target_is_the_derivative_by_angle():
    x0, x1 = pair(1)
    x, v = flow.diffusion_pair(x0, x1, torch.zeros(1))
    assert torch.equal(x, x0) and torch.equal(v, x1)
    assert flow.ANGLES[-1].sin() == pytest.approx(math.sqrt(1 - 0.00085), rel=1e-6)   # first kept
    t, e = torch.tensor([0.37]), 2e-3
    (a, _), (b, _) = (flow.diffusion_pair(x0, x1, t + d) for d in (-e, e))
    dphi = flow.angle(t + e) - flow.angle(t - e)
    _, v = flow.diffusion_pair(x0, x1, t)
    torch.testing.assert_close((b - a) / dphi, v, atol=3e-3, rtol=3e-3)
    seen = {}
    flow.loss(lambda x, t: seen.update(x=x) or v, x1, x0, t, FlowConfig(objective="diffusion"))
    torch.testing.assert_close(seen["x"], flow.diffusion_pair(x0, x1, t)[0])


def point_diffusion(c):
    """The exact v-prediction where all data is one point c: x = sin c + cos x0 -> cos c - sin x0.
    """
    def v_fn(x, t):
        phi = flow.like(flow.angle(t), x)
        return phi.cos() * c - phi.sin() * (x - phi.sin() * c) / phi.cos()
    return v_fn


def test_ddim_recovers_a_point_in_any_number_of_steps_and_a_gaussian_in_many():
    cfg, c, end = FlowConfig(objective="diffusion"), torch.tensor([1.5, -2.0]), flow.ANGLES[-1]
    x0 = torch.randn(50, 2)
    for n in (1, 4):
        x1 = flow.sample(point_diffusion(c), x0, flow.schedule("linear", n), cfg=cfg)
        torch.testing.assert_close(x1, (end.sin() * c + end.cos() * x0).float(), atol=1e-4,
                                   rtol=1e-4)
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


# ---- schedules -----------------------------------------------------------------------------------
@pytest.mark.parametrize("steps,imitate", [(50, 1000), (50, 250), (64, 1000), (7, 100), (1, 10)])
def test_linear_quadratic_is_c1_monotone_and_complete(steps, imitate):
    ts = flow.schedule("linear_quadratic", steps, imitate=imitate).double()
    d, L = ts.diff(), steps // 2
    assert len(ts) == steps + 1 and ts[0] == 0 and ts[-1] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(d[:L], torch.full((L,), 1 / imitate).double(), atol=1e-7, rtol=1e-4)
    assert (d.diff() > -1e-7).all()
    if steps - L > 2:                                # C1: the quadratic starts with slope h
        c = d[L] - 1 / imitate
        bends = (2 * c).expand(steps - L - 1)
        torch.testing.assert_close(d[L:].diff(), bends, atol=1e-6, rtol=1e-3)


def test_linear_quadratic_published_numbers_and_limits():
    for imitate, join, last in ((1000, 0.00252, 0.0755), (250, 0.00528, 0.0667)):
        d = flow.schedule("linear_quadratic", 50, imitate=imitate).double().diff()
        assert d[25].item() == pytest.approx(join, abs=1e-5)
        assert d[-1].item() == pytest.approx(last, abs=1e-4)
    same = flow.schedule("linear_quadratic", 20, imitate=20)
    torch.testing.assert_close(same, flow.schedule("linear", 20))


def test_shifted_schedule_spends_its_steps_near_noise():
    ts = flow.schedule("shifted", 10, shift=3.0)
    assert ts[0] == 0 and ts[-1] == 1 and (ts.diff() > 0).all() and ts[5] < 0.3


# ---- solvers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver,order,calls", [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2),
                                                ("rk4", 4, 4)])
def test_solver_order_and_calls(solver, order, calls):
    """dx/dt = x (1 + t): x(1) = x0 e^1.5. Halving the steps divides the error by 2^order."""
    f = Counted(lambda x, t: x * (1 + flow.like(t, x)))
    x0 = torch.ones(1, 1, dtype=torch.float64)
    e = [abs(flow.sample(f, x0, flow.schedule("linear", n), solver).item() - math.exp(1.5))
         for n in (32, 64)]
    assert math.log2(e[0] / e[1]) == pytest.approx(order, abs=0.25)
    assert f.calls == calls * 96


def test_dopri5_meets_its_tolerance_adapts_and_runs_backwards():
    x0, one = torch.tensor([[1.0], [2.0]]), flow.schedule("linear", 1)
    smooth = Counted(lambda x, t: x * torch.cos(4 * flow.like(t, x)))
    x1 = flow.sample(smooth, x0, one, "dopri5")
    torch.testing.assert_close(x1, x0 * math.exp(math.sin(4) / 4), atol=5e-5, rtol=5e-5)
    stiff = Counted(lambda x, t: x * torch.cos(40 * flow.like(t, x)) * 5)
    there = flow.sample(stiff, x0, one, "dopri5")
    torch.testing.assert_close(there, x0 * math.exp(math.sin(40) / 8), atol=2e-4, rtol=2e-4)
    assert stiff.calls > 2 * smooth.calls
    torch.testing.assert_close(flow.sample(stiff, there, one.flip(0), "dopri5"), x0, atol=5e-4,
                               rtol=5e-4)
    with pytest.raises(ValueError, match="NaN"):
        flow.sample(lambda x, t: x * math.nan, x0, one, "dopri5")


def test_one_point_target_is_exact_in_one_euler_step():
    """The velocity to a single point y: x1 = y, up to sigma_min."""
    y, k = torch.tensor([3.0, -1.0]), 1 - 1e-5
    v_fn = lambda x, t: (y - k * x) / (1 - k * flow.like(t, x))
    x0 = torch.randn(32, 2)
    x1 = flow.sample(v_fn, x0, flow.schedule("linear", 1))
    torch.testing.assert_close(x1, y + (1 - k) * x0, atol=1e-5, rtol=1e-5)


def test_gaussian_to_gaussian_in_closed_form():
    """The flow between N(0, 1) and N(m, s^2) is the line x -> m + s x (up to sigma_min)."""
    v_fn = gaussian_velocity(0.7, 0.4)
    x0 = torch.linspace(-3, 3, 41)[:, None]
    end = lambda n, solver="euler": flow.sample(v_fn, x0, flow.schedule("linear", n), solver)
    torch.testing.assert_close(end(100, "rk4"), 0.7 + 0.4 * x0, atol=1e-3, rtol=0)
    e = [(end(n) - 0.7 - 0.4 * x0).square().mean().sqrt().item() for n in (16, 32)]
    assert e[0] / e[1] == pytest.approx(2, abs=0.3)


def test_trajectory_and_state_dtype():
    x0 = torch.randn(3, 2).bfloat16()
    seen = []

    def v_fn(x, t):
        seen.append((x.dtype, t.shape, t.dtype))
        return x.bfloat16()
    path = flow.sample(v_fn, x0, flow.schedule("linear", 5), trajectory=True)
    assert path.shape == (6, 3, 2) and path.dtype == torch.float32
    assert torch.equal(path[0], x0.float()) and set(seen) == {(torch.float32, (3,), torch.float32)}
    assert torch.equal(path[-1], flow.sample(v_fn, x0, flow.schedule("linear", 5)))


# ---- guidance ------------------------------------------------------------------------------------
def test_guidance_formula_and_what_scale_1_calls():
    c, u = pair(4)
    assert torch.equal(flow.guide(c, u, 0.0), u)
    torch.testing.assert_close(flow.guide(c, u, 1.0), c)
    w = 2.5
    torch.testing.assert_close(flow.guide(c, u, 1 + w), (1 + w) * c - w * u, atol=1e-5, rtol=1e-5)
    for scale, calls in ((3.0, (10, 10)), (1.0, (10, 0))):
        f, g = Counted(lambda x, t: x), Counted(lambda x, t: -x)
        x1 = flow.sample(flow.guided(f, g, scale), torch.ones(2, 1), flow.schedule("linear", 10))
        assert (f.calls, g.calls) == calls
        v = -1 + scale * 2                                          # v_uncond = -x, v_cond = x
        torch.testing.assert_close(x1, torch.full((2, 1), (1 + 0.1 * v) ** 10))


# ---- coupling ------------------------------------------------------------------------------------
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
    line = flow.minibatch_pairing(x0[:, 0, 0], x1[:, 0, 0])     # numbers are paired by their rank
    assert torch.equal(line.argsort(), x1[:, 0, 0].argsort())


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


# ---- measures ------------------------------------------------------------------------------------
def test_straightness_is_energy_minus_displacement():
    """A quarter turn: |v| = (pi/2) |x|, displacement^2 = 2 |x|^2."""
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) * math.pi / 2
    x0 = torch.randn(500, 2)
    r2 = x0.square().sum(1).mean().item()
    m = flow.straightness(lambda x, t: x @ J.T, x0, flow.schedule("linear", 4000))
    assert m["energy"] == pytest.approx(r2 * math.pi ** 2 / 4, rel=2e-3)
    assert m["displacement"] == pytest.approx(2 * r2, rel=2e-3)
    assert m["curvature"] == pytest.approx(1 - 8 / math.pi ** 2, rel=0.02)


def test_the_curvature_of_a_straight_flow_is_not_below_zero():
    """In whatever order a processor sums: energy - displacement would be below 0 in a quarter of
    these."""
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        x0, v = torch.randn(5, 7, generator=g), torch.randn(5, 7, generator=g)
        m = flow.straightness(lambda x, t, v=v: v, x0, flow.schedule("linear", 6))
        assert 0 <= m["curvature"] < 1e-10 and m["S"] >= 0


def test_measures_of_what_stands_still_of_half_a_path_and_of_diffusion():
    still = flow.straightness(lambda x, t: 0 * x, torch.randn(4, 2))
    assert still["S"] == still["curvature"] == 0
    numbers = flow.straightness(lambda x, t: torch.ones_like(x), torch.randn(4))        # (B,)
    assert numbers["energy"] == pytest.approx(1, abs=1e-5)
    half = flow.straightness(lambda x, t: torch.ones_like(x), torch.randn(4, 2),
                             torch.linspace(0, 0.5, 9))
    assert half["S"] < 1e-6 and abs(half["energy"] - 1) < 1e-5
    arc = flow.straightness(point_diffusion(torch.tensor([1.5, -2.0])), torch.randn(16, 2),
                            flow.schedule("linear", 4), FlowConfig(objective="diffusion"))
    assert 0.02 < arc["curvature"] < 1


def test_validation_loss_is_repeatable_and_covers_its_grid():
    _, x1 = pair(16)
    times = []

    def v_fn(x, t):
        times.append(t[0].item())
        return torch.zeros_like(x)
    a, b = flow.validation_loss(v_fn, x1), flow.validation_loss(v_fn, x1)
    assert a == b and times[:8] == times[8:] == [(i + 0.5) / 8 for i in range(8)]


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


def test_scipy_agrees():
    scipy = pytest.importorskip("scipy.integrate")
    v_fn = gaussian_velocity(0.7, 0.4)

    def rhs(t, x):
        return v_fn(torch.tensor(x)[:, None], torch.full((1,), t).double()).numpy()[:, 0]
    x0 = np.linspace(-2, 2, 9)
    ref = scipy.solve_ivp(rhs, (0, 1), x0, rtol=1e-9, atol=1e-9).y[:, -1]
    ours = flow.sample(v_fn, torch.tensor(x0)[:, None], flow.schedule("linear", 1), "dopri5")
    np.testing.assert_allclose(ours[:, 0].numpy(), ref, atol=1e-4)


# ---- the command line ----------------------------------------------------------------------------
@pytest.mark.parametrize("args", [("--stpes", "3"), ("--steps", "x"), ("--steps", "0")])
def test_bad_arguments_give_one_line_and_status_2(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flow.py", *args])
    with pytest.raises(SystemExit) as stop:
        flow.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and args[0] in err


def run_alone(tmp_path, *args):
    shutil.copy(ROOT / "flow.py", tmp_path)
    return subprocess.run([sys.executable, "flow.py", *args], cwd=tmp_path, text=True,
                          capture_output=True, timeout=600)


@pytest.mark.slow
def test_demo_fails_when_its_claim_fails(tmp_path):
    """Three training steps teach nothing, so the claim cannot hold."""
    r = run_alone(tmp_path, "--steps", "3")
    assert r.returncode == 1 and "FAIL" in r.stdout
