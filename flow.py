"""Flow matching: a loss that trains a velocity from noise to latents, an ODE that samples with it.

    x0 ~ N(0, I) ---.                                x0 ~ N(0, I)
                     path --> x_t --> model --> v         |
    x1 (a latent) --'                           |    for t_i in schedule:
         '---- target  x1 - (1 - s) x0 ----> loss        x <- x + (t_{i+1} - t_i) v(x, t_i)
                                                          |
                       training                           x1          sampling

Papers.  [MG] Movie Gen, arXiv 2410.13720 (s3.1.2 objective, s3.4.2 linear-quadratic schedule).
[FM] Flow Matching, 2210.02747 (s4 the conditional-OT path).  [RF] Rectified Flow, 2209.03003
(straightness).  [CFM] OT-CFM, 2302.00482 (minibatch coupling).  [C2OT] 2503.10636 (within
captions).  [SD3] 2403.03206 (logit-normal time, resolution shift).  [PD] 2202.00512 (v-prediction).
[DDIM] 2010.02502.  [ZSNR] 2305.08891 (zero terminal SNR).  [CFG] 2207.12598.  [AF] AlignFlow,
2510.15038.

"OT" means two unrelated things in these papers, so this file never says it alone:
  the conditional-OT path   the straight line from ONE noise to ONE data point;
  the coupling              which noise goes to which data point: independent, minibatch, or
                            semi-discrete ([AF], sdot.py).
The path is straight by definition. But a model learns the AVERAGE velocity of all lines through a
point: where lines cross, the flow bends, and a bent flow needs many steps. With a coupling that has
few crossings, few steps are enough. `python flow.py` shows it.

Contract.  x0 noise and x1 data, (B, ...) of any shape; t (B,) fp32 in [0, 1], **0 noise, 1 data**;
v_fn(x, t) -> v like x, a closure over a model, its text and its guidance. t, path, target and ODE
state are fp32 (fp64 if x0 is) whatever the model computes in: bf16 rounds 1 - 1e-5 and 0.999 to 1.

Run.   python flow.py                 # 2-D: three couplings, paths, errors    20 s on 2 CPU cores
       python flow.py --steps 4000 --out out/flow

Differences from the paper.  The loss is a mean over elements, not a sum. Besides Movie Gen's Euler
there are midpoint, Heun, RK4 and Dormand-Prince. The diffusion baseline is our own definition,
since no more than "v-prediction, zero terminal SNR" was found in the paper: the scaled-linear betas
of latent diffusion, rescaled by [ZSNR], sampled with [DDIM]. Movie Gen's linear-quadratic schedule
is the default of train.py from 1b on; at toy scale, with few steps it is worse than equal
ones, with many no different (studies/README.md).

Letters.  B batch, x0 noise, x1 data, x_t between them, t flow time, v velocity, s = sigma_min, ts
the (steps + 1) times of a schedule, h the size of a step, S straightness (0: straight).
"""
import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

VFn = Callable[[Tensor, Tensor], Tensor]  # v_fn(x (B, ...), t (B,)) -> v (B, ...)


# ---- 1. The idea: path, velocity, loss; guidance and Euler ---------------------------------------
def like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape t (B,) to (B, 1, ..., 1), so that it broadcasts over x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def fp32(x):
    """Cast half precision to fp32; leave fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cond_ot_path(x0: Tensor, x1: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Return x_t = t x1 + (1 - (1 - s) t) x0: the conditional-OT path [MG s3.1.2, FM s4]."""
    x0, x1 = fp32(x0), fp32(x1)
    t = like(t, x1).to(x1.dtype)
    return t * x1 + (1 - (1 - sigma_min) * t) * x0


def velocity(x0: Tensor, x1: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Return v = dx_t/dt = x1 - (1 - s) x0 [MG s3.1.2]: constant along the path, so without t."""
    return fp32(x1) - (1 - sigma_min) * fp32(x0)


def loss(v_fn: VFn, x1: Tensor, x0: Tensor | None = None, t: Tensor | None = None,
         cfg: "FlowConfig | None" = None, generator=None) -> Tensor:
    """Return E |v_fn(x_t, t) - target|^2, a mean over all elements [MG s3.1.2].

    x0 and t are drawn where they are not given. For a coupling, pass x0 and x1 as pairs:
    `minibatch_pairing` permutes the noise of a batch, so that each x1 keeps its caption; with the
    semi-discrete coupling each noise has already picked its x1.
    A network that returns 0 has loss 1 + E x1^2: expect 2 for normalised latents at step 0
    (diffusion: 1).
    """
    cfg = cfg or FlowConfig()
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 {tuple(x0.shape)}: not the shape of x1 {tuple(x1.shape)}")
    if t is None:
        t = sample_t(len(x1), cfg, generator, x1.device)
    if cfg.objective == "diffusion":
        x_t, target = diffusion_pair(x0, x1, t)
    else:
        x_t, target = cond_ot_path(x0, x1, t, cfg.sigma_min), velocity(x0, x1, cfg.sigma_min)
    return (fp32(v_fn(x_t, t)) - target).square().mean()


def guide(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Return v_uncond + scale (v_cond - v_uncond) [CFG]: v_cond at scale 1, v_uncond at 0.

    Papers also write (1 + w) v_cond - w v_uncond, with scale = 1 + w. Movie Gen samples at 7.5.
    """
    return v_uncond + scale * (v_cond - v_uncond)


def euler(f, x, t, h):
    """Return x at t + h, by one step of Euler's method: v is taken as constant in between."""
    return x + h * f(x, t)


@torch.no_grad()
def sample(v_fn: VFn, x0: Tensor, ts: Tensor, solver: str = "euler", trajectory: bool = False,
           cfg: "FlowConfig | None" = None) -> Tensor:
    """Follow dx/dt = v_fn(x, t) through the times ts (n + 1,): x0 (B, ...) noise -> x1, fp32 (fp64
    if x0 is).

    solver: euler (Movie Gen's choice) | midpoint | heun | rk4, or dopri5, adaptive between the
    times. trajectory=True returns all states, (n + 1, B, ...). cfg: needed for a diffusion model,
    whose Euler step is DDIM.
    """
    one_of("solver", solver, SOLVERS)
    step = SOLVERS[solver]
    if cfg is not None and cfg.objective == "diffusion":
        if solver != "euler":
            raise ValueError(f"solver {solver}: a diffusion model is sampled with euler (DDIM)")
        step = ddim
    f = lambda x, t: v_fn(x, x.new_full((len(x),), t)).to(x.dtype)
    x, times = fp32(x0), ts.tolist()
    path = [x]
    for t, end in zip(times, times[1:]):
        x = step(f, x, t, end - t)
        if trajectory:
            path.append(x)
    return torch.stack(path) if trajectory else x


def guided(v_cond: VFn, v_uncond: VFn, scale: float) -> VFn:
    """Return the guided v_fn of two closures, one with the prompt and one with the null text; at
    scale 1 the second is never called."""
    if scale == 1:
        return v_cond
    return lambda x, t: guide(v_cond(x, t), v_uncond(x, t), scale)


# ---- 2. Configuration ----------------------------------------------------------------------------
def one_of(name, value, choices):
    """Raise ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


Times = Literal["auto", "logit_normal", "uniform"]


@dataclass
class FlowConfig:
    """Settings of the objective: path, target, and distribution of the times.

    SD3 and Open-Sora raise `shift` with the resolution; none was found in [MG]."""

    sigma_min: float = 1e-5    # std of the noise left at t = 1: invisible, but gives x_t a density
    time: Times = "auto"       # distribution of t; auto: logit_normal, or uniform for diffusion
    mean: float = 0.0          # mean of logit(t); above 0, more times near the data
    std: float = 1.0           # standard deviation of logit(t)
    shift: float = 1.0         # above 1 moves t towards noise, for large latents
    objective: Literal["flow", "diffusion"] = "flow"  # diffusion is Movie Gen's baseline (Table 8)

    def __post_init__(self):
        one_of("time", self.time, get_args(Times))
        one_of("objective", self.objective, ("flow", "diffusion"))
        for name in ("std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min {self.sigma_min}: must lie in [0, 1)")


# ---- 3. Training times ---------------------------------------------------------------------------
def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return t' = t / (t + shift (1 - t)) [SD3], that is logit(t') = logit(t) - ln shift.

    For the noise level u = 1 - t, this is the familiar u' = shift u / (1 + (shift - 1) u).
    """
    return t / (t + shift * (1 - t))


def sample_t(n: int, cfg: FlowConfig | None = None, generator=None, device=None) -> Tensor:
    """Draw (n,) fp32 times: sigmoid(N(mean, std)) [MG s3.1.2], or uniform in [0, 1), then shifted.

    The logit-normal distribution has most of its times in the middle, where the target is hardest
    to predict. By default only 1.4 % of them are below 0.1, so the velocity at t = 0, where the
    first Euler step is taken, is hardly trained.
    """
    cfg = cfg or FlowConfig()
    if cfg.time == "logit_normal" or (cfg.time == "auto" and cfg.objective == "flow"):
        t = torch.sigmoid(cfg.mean + cfg.std * torch.randn(n, generator=generator, device=device))
    else:
        t = torch.rand(n, generator=generator, device=device)
    return shift_time(t, cfg.shift)


# ---- 4. Schedules: the times of the steps --------------------------------------------------------
def schedule(name: str, steps: int, shift: float = 3.0, imitate: int = 1000) -> Tensor:
    """Return (steps + 1,) fp32 times from 0 to 1: n steps need n + 1 times.

    linear             equal steps
    shifted            equal steps, moved by `shift` towards the noise, where the layout is decided
    linear_quadratic   the first half is the start of a linear schedule of `imitate` steps;
                       in the second half, t grows quadratically to 1 [MG s3.4.2]
    """
    one_of("schedule", name, ("linear", "linear_quadratic", "shifted"))
    if steps < 1:
        raise ValueError(f"steps {steps}: must be 1 or more")
    if not shift > 0:
        raise ValueError(f"shift {shift}: must be above 0")
    if name == "linear_quadratic":
        return linear_quadratic(steps, imitate)
    ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (shift_time(ts, shift) if name == "shifted" else ts).float()


def linear_quadratic(steps: int, imitate: int = 1000) -> Tensor:
    """Return t_i = i h for i <= L, then t_(L+k) = L h + k h + c k^2, k = 1..Q  [MG s3.4.2].

    h = 1 / imitate, L = half of the steps, Q = the others; c = (1 - L h - Q h) / Q^2, so that the
    last time is 1. The term k h makes the slope continuous where the halves meet: without it, as in
    some code bases, the step size drops there, from 0.004 to 0.0013 for imitate = 250 and 52 steps.
    With imitate = steps, c is 0 and the schedule is linear.
    """
    if steps > imitate:
        raise ValueError(f"steps {steps}: must be at most {imitate} for linear_quadratic, which "
                         f"imitates {imitate} equal steps")
    L, h = steps // 2, 1 / imitate
    Q = steps - L
    k = torch.arange(1, Q + 1, dtype=torch.float64)
    c = (1 - L * h - Q * h) / Q ** 2
    return torch.cat([torch.arange(L + 1) * h, L * h + k * h + c * k ** 2]).float()


# ---- 5. Other solvers ----------------------------------------------------------------------------
# One step of each explicit Runge-Kutta method, t to t + h. Each f is a call of the model: Euler 1,
# midpoint and Heun 2, RK4 4. Compare methods at equal calls, not at equal steps.
def midpoint(f, x, t, h):
    """Return x at t + h by the slope in the middle, order 2."""
    return x + h * f(x + h / 2 * f(x, t), t + h / 2)


def heun(f, x, t, h):
    """Return x at t + h by the average of the slopes at both ends, order 2."""
    a = f(x, t)
    return x + h / 2 * (a + f(x + h * a, t + h))


def rk4(f, x, t, h):
    """Return x at t + h by the classical Runge-Kutta method with four slopes, order 4."""
    a = f(x, t)
    b = f(x + h / 2 * a, t + h / 2)
    c = f(x + h / 2 * b, t + h / 2)
    return x + h / 6 * (a + 2 * b + 2 * c + f(x + h * c, t + h))


# Dormand-Prince 5(4): DP_A has a row for each stage after the first; the last row is the 5th-order
# step. DP_E is that row minus the 4th-order one: it estimates the error, which sets h.
DP_T = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DP_A = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
DP_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(f, x, t, h, rtol=1e-5, atol=1e-5):
    """Return x at t + h in as many steps as the tolerance needs; the whole batch shares them."""
    if h < 0:                                           # backwards: with -f and -t
        return dopri5(lambda x, t: -f(x, -t), x, -t, -h, rtol, atol)
    end, h, k1 = t + h, h / 4, f(x, t)
    while end - t > 1e-7:
        h = min(h, end - t)
        k = [k1]
        for at, row in zip(DP_T, DP_A):
            y = x + h * sum(a * ki for a, ki in zip(row, k) if a)
            k.append(f(y, t + h * at))
        err = h * sum(e * ki for e, ki in zip(DP_E, k) if e)
        err = (err / (atol + rtol * torch.maximum(x.abs(), y.abs()))).square().mean().sqrt().item()
        if not math.isfinite(err):
            raise ValueError(f"v_fn returned NaN or infinity near t = {abs(t):.4f}")
        if err <= 1 or h < 1e-6:
            x, t, k1 = y, t + h, k[-1]           # the last stage is the next step's first
        h *= min(5.0, max(0.2, 0.9 * max(err, 1e-9) ** -0.2))
    return x


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4, "dopri5": dopri5}


# ---- 6. The clocks of other code bases -----------------------------------------------------------
# In half of them time runs backwards. With a wrong sign or a wrong clock, a model still trains, and
# then samples garbage. f is their model.
#   | code base                                   | noise at | target       | our v(x, t) is      |
#   | Movie Gen, SiT, flow_matching, TorchCFM     | t = 0    | data - noise | f(x, t)             |
#   | Rectified Flow                              | t = 0    | data - noise | f(x, 999 t)         |
#   | Mochi (is fed 1 - its sigma)                | t = 0    | data - noise | f(x, t)             |
#   | minRF, Open-Sora 2                          | t = 1    | noise - data | -f(x, 1 - t)        |
#   | SD3, diffusers, HunyuanVideo, Wan           | t = 1000 | noise - data | -f(x, 1000 (1 - t)) |
#
# A velocity also says where both ends of its path are, without a division:
#   x0 = x_t - t v        x1 = (1 - s) x_t + (1 - (1 - s) t) v
# Computing v from x0 divides by t, from x1 by 1 - (1 - s) t: one reason why networks predict v.
# A model's v is an average over pairs, and so are the x0 and x1 that are computed from it.


# ---- 7. Minibatch coupling -----------------------------------------------------------------------
def minibatch_pairing(x0: Tensor, x1: Tensor, groups: Tensor | None = None) -> Tensor:
    """Reorder x0 (B, ...) so that sum |x0_i - x1_i|^2 is least [CFM]: exact, by POT's ot.emd.

    The result is a permutation: drawing pairs from the plan with replacement, as torchcfm does by
    default, loses some noises and clips. With groups (B,), noise moves only among clips of the same
    caption. Otherwise noise would depend on the caption in training, but not in sampling [C2OT].
    """
    import ot  # imported here: it takes seconds
    if x0.shape != x1.shape:
        raise ValueError(f"x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)}: need the same shape")
    if groups is not None and groups.shape != x0.shape[:1]:
        raise ValueError(f"groups {tuple(groups.shape)}: need one for each of {len(x0)} noises")
    if not (x0.isfinite().all() and x1.isfinite().all()):
        raise ValueError("x0, x1: NaN or infinity")
    B = len(x0)
    order = torch.arange(B)
    groups = torch.zeros(B, dtype=torch.int64) if groups is None else groups.cpu()
    for g in groups.unique():
        rows = (groups == g).nonzero()[:, 0]
        n = len(rows)
        # |x - y|^2 without the terms of x or y alone, which no pairing changes
        a, b = (x[rows.to(x.device)].reshape(n, -1) for x in (x0, x1))
        cost = -(b.double() @ a.double().T).detach().cpu().numpy()
        plan, log = ot.emd([1 / n] * n, [1 / n] * n, cost - cost.min(),
                           numItermax=10_000_000, log=True)
        if log["warning"]:              # the default numItermax is too small from n = 2048 on
            raise RuntimeError(f"minibatch_pairing: {log['warning']}")
        order[rows] = rows[torch.from_numpy(plan).argmax(1)]
    return x0[order.to(x0.device)]


# ---- 8. Measures ---------------------------------------------------------------------------------
@torch.no_grad()
def straightness(v_fn: VFn, x0: Tensor, ts: Tensor | None = None,
                 cfg: FlowConfig | None = None) -> dict[str, float]:
    """Measure how far the flow is from straight, by one Euler run z_0 = x0 (B, ...), ..., z_n along
    ts (default: 64 steps from 0 to 1). With u = (z_n - z_0) / (t_n - t_0), the straight line's v:

    displacement  E|u|^2 (t_n - t_0), the energy of the straight line
    S             int E|v - u|^2 dt, the energy beyond that [RF]: 0 means one step is exact
    energy        int E|v|^2 dt = displacement + S: the mixed term is 0, since u is v's mean
    curvature     S / energy, between 0 and 1 and without a unit; 0 if nothing moves
    """
    ts = schedule("linear", 64) if ts is None else ts
    z = sample(v_fn, x0, ts, trajectory=True, cfg=cfg)                           # (n + 1, B, ...)
    z = z.reshape(*z.shape[:2], -1)                                              # (n + 1, B, D)
    dt = ts.diff().to(z.device)
    v = z.diff(dim=0) / dt[:, None, None]                                        # (n, B, D)
    u = (z[-1] - z[0]) / dt.sum()                                                # (B, D)
    # Why S is summed, and not energy - displacement: rounding could make that negative.
    S = ((v - u).square().sum(2).mean(1) * dt).sum().item()
    displacement = (u.square().sum(1).mean() * dt.sum()).item()
    energy = displacement + S
    return {"S": S, "energy": energy, "displacement": displacement,
            "curvature": S / energy if energy else 0.0}


@torch.no_grad()
def validation_loss(v_fn: VFn, x1: Tensor, cfg: FlowConfig | None = None, times: int = 8,
                    seed: int = 0) -> float:
    """Return the mean loss on held-out x1 over t = (i + 1/2) / times, with fixed noise.

    Movie Gen finds that it correlates with human preference [MG fig. 15], so compare runs by it.
    With t and x0 fixed, two checkpoints differ by what they learned, not by what was drawn.
    """
    g, total = torch.Generator().manual_seed(seed), 0.0
    for i in range(times):
        x0 = torch.randn(x1.shape, generator=g, device="cpu").to(x1.device)
        t = torch.full((len(x1),), (i + 0.5) / times, device=x1.device)
        total += loss(v_fn, x1, x0, t, cfg).item()
    return total / times


# ---- 9. The diffusion baseline -------------------------------------------------------------------
# A variance-preserving diffusion moves on a circle, x_t = sin(phi) x1 + cos(phi) x0, phi from 0
# (noise) to almost pi/2 (data). Its derivative with respect to phi, cos(phi) x1 - sin(phi) x0, is
# what v-prediction learns [PD] (up to sign). So diffusion and flow matching differ only in the
# curve (arc or line), the speed along it and the distribution of t. phi(0) = 0 exactly is
# "zero terminal SNR" [ZSNR]. Without it a model never sees pure noise in training, though sampling
# starts there.
_betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
_data = (1 - _betas).cumprod(0).sqrt()                  # the data's share, sqrt(alpha_bar)
_data = (_data - _data[-1]) * _data[0] / (_data[0] - _data[-1])          # makes the last one 0
ANGLES = torch.asin(_data).flip(0)                      # (1000,) from noise to data


def angle(t: Tensor) -> Tensor:
    """Return phi(t), shaped like t: the 1000-step table of [ZSNR], linear between its entries."""
    u = t.double() * (len(ANGLES) - 1)
    i = u.floor().long().clamp(0, len(ANGLES) - 2)
    table = ANGLES.to(t.device)
    return (table[i] + (u - i) * (table[i + 1] - table[i])).float()


def diffusion_pair(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t on the circle, and the regression target there."""
    phi, x0, x1 = like(angle(t), x1), fp32(x0), fp32(x1)
    return phi.sin() * x1 + phi.cos() * x0, phi.cos() * x1 - phi.sin() * x0


def ddim(f, x, t, h):
    """Return x at t + h [DDIM]: with the predicted x0 and x1 held fixed, the step rotates by d."""
    d = (angle(torch.tensor(t + h)) - angle(torch.tensor(t))).item()
    return math.cos(d) * x + math.sin(d) * f(x, t)


# ---- 10. Demo ------------------------------------------------------------------------------------
def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Draw n points (n, 2), uniform on the eight black squares of a 4 x 4 board of side 6."""
    x = torch.rand(6 * n + 64, 2, generator=generator) * 4
    return (x[(x.floor().sum(1) % 2) == 0][:n] - 2) * 1.5


class MLP(torch.nn.Module):
    """Compute v(x, t) in 2-D, from x and sines and cosines of t: t itself varies too little."""

    def __init__(self, width: int = 128):
        super().__init__()
        sizes = (2 + 8, width, width, width)
        hidden = [m for a, b in zip(sizes, sizes[1:])
                  for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]
        self.net = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], device=t.device)  # (B, 4)
        return self.net(torch.cat([x, waves.sin(), waves.cos()], 1))


def semi_discrete(y: Tensor, generator: torch.Generator, steps: int = 1500) -> Tensor:
    """Find dual weights h (N,) such that argmax_j <x, y_j> + h_j gives each y_j equal noise: a
    small sdot.py, with Adam, as 2-D needs."""
    h, N = -y.square().sum(1) / 2, len(y)
    h.requires_grad_()
    optimiser = torch.optim.Adam([h], lr=0.3)
    for i in range(steps):
        cell = (torch.randn(1024, 2, generator=generator) @ y.T + h.detach()).argmax(1)
        h.grad = torch.bincount(cell, minlength=N) / 1024 - 1 / N
        optimiser.param_groups[0]["lr"] = 0.3 * 1e-3 ** (i / steps)
        optimiser.step()
    return h.detach()


def demo(out: str = "out/flow", steps: int = 1500, seed: int = 0) -> bool:
    """Train one small network for each coupling, with the same data and steps; draw the paths, and
    return whether the claims hold."""
    if steps < 1:
        raise ValueError(f"--steps {steps}: must be 1 or more")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import ot

    g = torch.Generator().manual_seed(seed)
    N, B, counts = 200, 128, (1, 2, 4, 8, 16)
    y = checkerboard(N, g)                                            # (N, 2) the data set
    h = semi_discrete(y, g)
    # Uniform times, because one Euler step needs v at t = 0, where logit-normal hardly trains it.
    cfg = FlowConfig(time="uniform")
    noise = torch.randn(1000, 2, generator=g)

    def batch(name: str) -> tuple[Tensor, Tensor]:
        x0 = torch.randn(B, 2, generator=g)
        if name == "semi-discrete":
            return x0, y[(x0 @ y.T + h).argmax(1)]                    # the noise picks the point
        x1 = y[torch.randint(N, (B,), generator=g)]
        return (minibatch_pairing(x0, x1) if name == "minibatch" else x0), x1

    def error(x: Tensor) -> float:
        """Compute W2 between samples and data set, exactly."""
        a, b = torch.full((len(x),), 1 / len(x)).double(), torch.full((N,), 1 / N).double()
        cost = torch.cdist(x, y).square().double()
        return ot.emd2(a, b, cost, numItermax=10_000_000).item() ** 0.5

    fig, axes = plt.subplots(1, 4, figsize=(17, 4.2))
    errors, S = {}, {}
    for ax, name in zip(axes, ("independent", "minibatch", "semi-discrete")):
        torch.manual_seed(seed)
        net = MLP()
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            x0, x1 = batch(name)
            value = loss(net, x1, x0, cfg=cfg, generator=g)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            decay.step()
        errors[name] = [error(sample(net, noise, schedule("linear", n))) for n in counts]
        S[name] = straightness(net, noise)["S"]
        print(f"{name:14s} loss {value.item():6.3f}   S {S[name]:6.3f}   W2 at "
              + "  ".join(f"{n}: {e:.3f}" for n, e in zip(counts, errors[name])), flush=True)
        path = sample(net, noise[:250], schedule("linear", 32), trajectory=True)     # (33, 250, 2)
        ax.plot(path[..., 0], path[..., 1], c="tab:blue", lw=0.4, alpha=0.5)
        ax.scatter(*y.T, s=14, c="0.8", label="data")
        ax.scatter(*path[0].T, s=3, c="0.4", label="noise")
        ax.scatter(*path[-1].T, s=4, c="tab:red", label="samples")
        ax.set(title=f"{name}: S = {S[name]:.3f}", xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[],
               aspect="equal")
        axes[3].loglog(counts, errors[name], marker="o", label=name)
    axes[0].legend(fontsize=8)
    axes[3].set(xlabel="Euler steps", ylabel="W2 to the data", title="error of the samples",
                xticks=counts, xticklabels=counts)
    axes[3].legend()
    fig.tight_layout()
    fig.savefig(out / "flow.png", dpi=100)
    plt.close(fig)

    claims = [("semi-discrete at 1 step against independent at 8 steps, W2",
               errors["semi-discrete"][0], errors["independent"][counts.index(8)]),
              ("straightness S, semi-discrete against independent",
               S["semi-discrete"], 0.1 * S["independent"])]
    for claim, value, bound in claims:
        print(f"{'PASS' if value < bound else 'FAIL'} {claim}: {value:.3f} vs < {bound:.3f}")
    print(f"figure: {out / 'flow.png'}")
    return all(value < bound for _, value, bound in claims)


# ---- 11. Main ------------------------------------------------------------------------------------
def main() -> None:
    """Run the demo: status 0 if its claims hold, 1 if not, 2 with one line for a wrong argument."""
    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Three couplings in 2-D: paths and errors.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--out", default="out/flow", help="folder of the figure")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each network")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        ok = demo(args.out, args.steps, args.seed)
    except ValueError as e:
        parser.error(str(e))
    except BrokenPipeError:                              # as by `| head`
        os._exit(0)
    except OSError as e:
        parser.error(f"--out {args.out}: {e}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
