"""flow.py: flow matching. The objective that carries noise to latents, and the ODE that samples it.

    x0 ~ N(0, I) ---.                                x0 ~ N(0, I)
                     path --> x_t --> model --> v         |
    x1 (a latent) --'                           |    for t_i in schedule:
         '---- target  x1 - (1 - s) x0 ----> loss        x <- x + (t_i+1 - t_i) v(x, t_i)
                                                          |
                       training                           x1          sampling

Papers.  [MG] Movie Gen, arXiv 2410.13720 (s3.1.2 objective, s3.4.2 linear-quadratic schedule).
[FM] Flow Matching, 2210.02747 (s4 the conditional-OT path).  [RF] Rectified Flow, 2209.03003
(straightness).  [CFM] OT-CFM, 2302.00482 (minibatch coupling).  [C2OT] 2503.10636 (and captions).
[SD3] 2403.03206 (logit-normal time, resolution shift).  [PD] 2202.00512 (v-prediction).  [ZSNR]
2305.08891 (zero terminal SNR).  [CFG] 2207.12598.  [AF] AlignFlow, 2510.15038 (see sdot.py).

"OT" means two unrelated things in these papers, so this file never says it alone:
  the conditional-OT path   the straight line that ONE noise and ONE data point travel together;
  the coupling              who travels with whom: independent, minibatch, semi-discrete (sdot.py).
The path is straight by definition. But a model learns the AVERAGE velocity of all lines through a
point: where lines cross, the average bends, and a bent flow needs many steps. A coupling with few
crossings is what makes few steps enough. `python flow.py` shows it.

Contract.  x0 noise and x1 data, (B, ...) of any shape; t (B,) fp32 in [0, 1], **0 noise, 1 data**;
v_fn(x, t) -> v like x, a closure over a model, its text and its guidance. t, path, target and ODE
state are fp32 whatever the model computes in: in bf16, 1 - 1e-5 is 1 and so is t = 0.999.

The clock.  Half the field runs it backwards, and a sign or clock that is off by one convention
still trains, then samples garbage. `from_clock` adapts their models to us, `to_clock` ours to them.
  | code base                                   | noise at | target       | our v(x, t) is      |
  | Movie Gen, SiT, flow_matching, TorchCFM, RF | t = 0    | data - noise | f(x, t)             |
  | Mochi (is fed 1 - its sigma)                | t = 0    | data - noise | f(x, t)             |
  | minRF, Open-Sora 2                          | t = 1    | noise - data | -f(x, 1 - t)        |
  | SD3, diffusers, HunyuanVideo, Wan, LTX      | t = 1000 | noise - data | -f(x, 1000 (1 - t)) |

Run.   python flow.py                 # 2-D: three couplings, paths, errors    20 s on 2 CPU cores
       python flow.py --steps 4000 --out out/flow

Differences from the paper.  The loss is a mean over elements, not a sum. Midpoint, Heun, RK4 and
Dormand-Prince stand beside Movie Gen's Euler. The diffusion baseline is ours to define, since the
paper says only "v-prediction, zero terminal SNR": the scaled-linear betas of latent diffusion,
rescaled by [ZSNR], sampled with DDIM. The linear-quadratic schedule is Movie Gen's, and train.py's
default from 1b on; on toys it lost to plain linear steps, because its last steps are long.

Letters.  B batch, x0 noise, x1 data, x_t between them, t flow time, v velocity, s = sigma_min, ts
the (steps + 1) times of a schedule, S straightness.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VFn = Callable[[Tensor, Tensor], Tensor]  # v_fn(x (B, ...), t (B,)) -> v (B, ...)


# ---- 1. Configuration ----------------------------------------------------------------------------
def one_of(name: str, value, choices) -> None:
    """ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


@dataclass
class FlowConfig:
    """The objective: path, target, and the law of the times."""

    sigma_min: float = 1e-5    # noise left at t = 1 [MG s3.1.2]; invisible, keeps densities proper
    time: str = "auto"         # law of t in training: logit_normal | uniform | auto, which is
                               #   logit_normal for flow [MG s3.1.2], uniform for diffusion (DDPM)
    mean: float = 0.0          # of logit(t): above 0 trains more on nearly clean latents
    std: float = 1.0           # of logit(t)
    shift: float = 1.0         # above 1 moves t towards noise: large latents need more to hide
    objective: str = "flow"    # flow | diffusion (the baseline that [MG] Table 8 compares with)

    def __post_init__(self):
        one_of("time", self.time, ("auto", "logit_normal", "uniform"))
        one_of("objective", self.objective, ("flow", "diffusion"))
        for name in ("std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min {self.sigma_min}: must lie in [0, 1)")


# Movie Gen trains every size with one objective. (SD3 and Open-Sora would raise `shift` with size.)
PRESETS = {size: FlowConfig() for size in ("toy", "small", "1b", "5b", "30b")}


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, ..., 1), so that it broadcasts over x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


# ---- 2. The path of one pair ---------------------------------------------------------------------
def fp32(x):
    """Half precision to fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cond_ot_path(x0: Tensor, x1: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """x_t = t x1 + (1 - (1 - s) t) x0: the conditional-OT path of a pair [MG s3.1.2, FM s4]."""
    x0, x1 = fp32(x0), fp32(x1)
    t = like(t, x1).to(x1.dtype)
    return t * x1 + (1 - (1 - sigma_min) * t) * x0


def velocity(x0: Tensor, x1: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """v = dx_t/dt = x1 - (1 - s) x0 [MG s3.1.2]: constant along the path, so it needs no t."""
    return fp32(x1) - (1 - sigma_min) * fp32(x0)


# With k = 1 - s the two lines above are solved for the ends without a division:
#   x_t - t v = (t x1 + (1 - k t) x0) - t (x1 - k x0) = x0
#   x1        = v + k x0 = k x_t + (1 - k t) v
# The way back divides by t (from noise) or by 1 - k t (from data): one reason for networks to
# predict v rather than an end.
def to_noise(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v: the noise that a velocity implies. For a model's v it is E[x0 | x_t]."""
    return x - like(t, x) * v


def to_data(v: Tensor, x: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """x1 = (1 - s) x_t + (1 - (1 - s) t) v: the data point that a velocity implies."""
    k = 1 - sigma_min
    return k * x + (1 - k * like(t, x)) * v


def from_noise(x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / t, for t > 0."""
    return (x - x0) / like(t, x)


def from_data(x1: Tensor, x: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """v = (x1 - (1 - s) x_t) / (1 - (1 - s) t)."""
    k = 1 - sigma_min
    return (x1 - k * x) / (1 - k * like(t, x))


def to_score(v: Tensor, x: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """grad log p_t(x) = -E[x0 | x_t] / (1 - (1 - s) t), Tweedie's formula.

    Only under the INDEPENDENT coupling: it needs x0 to be Gaussian given x1, and every other
    coupling exists to break that.
    """
    return -to_noise(v, x, t) / (1 - (1 - sigma_min) * like(t, x))


def from_score(score: Tensor, x: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """v = (x_t + (1 - (1 - s) t) score) / t, for t > 0: the way back."""
    return (x + (1 - (1 - sigma_min) * like(t, x)) * score) / like(t, x)


# name -> (does the clock run from data to noise?, largest value of the time fed to the model)
CLOCKS = {
    "filmstrip": (False, 1), "movie_gen": (False, 1), "sit": (False, 1),
    "flow_matching": (False, 1), "torchcfm": (False, 1), "rectified_flow": (False, 1),
    "mochi": (False, 1),
    "minrf": (True, 1), "open_sora_2": (True, 1),
    "sd3": (True, 1000), "diffusers": (True, 1000), "hunyuan": (True, 1000), "wan": (True, 1000),
    "ltx": (True, 1000),
}


def from_clock(fn: VFn, name: str) -> VFn:
    """Another code base's model as our v_fn: time turned and scaled, sign turned."""
    one_of("clock", name, CLOCKS)
    back, scale = CLOCKS[name]
    return (lambda x, t: -fn(x, scale * (1 - t))) if back else (lambda x, t: fn(x, scale * t))


def to_clock(v_fn: VFn, name: str) -> VFn:
    """The inverse of `from_clock`: our v_fn as a model of another code base."""
    one_of("clock", name, CLOCKS)
    back, scale = CLOCKS[name]
    return (lambda x, u: -v_fn(x, 1 - u / scale)) if back else (lambda x, u: v_fn(x, u / scale))


# ---- 3. Time and loss ----------------------------------------------------------------------------
def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = t / (t + a (1 - t)), the resolution shift [SD3]: exactly logit(t') = logit(t) - ln a.

    Written for the noise level u = 1 - t it is the familiar a u / (1 + (a - 1) u).
    """
    return t / (t + shift * (1 - t))


def sample_t(n: int, cfg: FlowConfig | None = None, generator=None, device=None) -> Tensor:
    """(n,) fp32 times in (0, 1): sigmoid(N(mean, std)) [MG s3.1.2] or uniform, then shifted.

    The logit-normal law spends its samples in the middle, where the target is hardest to guess.
    Only 1.4 % of its times lie below 0.1, so the first Euler step, at 0 exactly, extrapolates.
    """
    cfg = cfg or FlowConfig()
    if cfg.time == "logit_normal" or (cfg.time == "auto" and cfg.objective == "flow"):
        t = torch.sigmoid(cfg.mean + cfg.std * torch.randn(n, generator=generator, device=device))
    else:
        t = torch.rand(n, generator=generator, device=device)
    return shift_time(t, cfg.shift)


def noise_and_target(x0: Tensor, x1: Tensor, t: Tensor, cfg: FlowConfig) -> tuple[Tensor, Tensor]:
    """(x_t, what the network has to say there), for either objective."""
    if cfg.objective == "flow":
        return cond_ot_path(x0, x1, t, cfg.sigma_min), velocity(x0, x1, cfg.sigma_min)
    phi = like(angle(t), x1)
    x0, x1 = fp32(x0), fp32(x1)
    return phi.sin() * x1 + phi.cos() * x0, phi.cos() * x1 - phi.sin() * x0


def loss(v_fn: VFn, x1: Tensor, x0: Tensor | None = None, t: Tensor | None = None,
         cfg: FlowConfig | None = None, generator=None, reduce: bool = True,
         couple: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """E |v_fn(x_t, t) - v|^2, a mean over elements [MG s3.1.2]: scalar, or (B,) if not reduce.

    x0 and t are drawn where they are not given. `couple(x0, x1) -> x0` may reorder the batch's
    noise (`minibatch_pairing`): noise moves, x1 keeps its caption. The semi-discrete coupling
    chooses the x1 of an x0, before there is a batch: pass its pair as x1 and x0.
    A network that returns 0 scores 1 + E x1^2, so 2 for normalised latents: the number of step 0.
    """
    cfg = cfg or FlowConfig()
    B = len(x1)
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 {tuple(x0.shape)}: not the shape of x1 {tuple(x1.shape)}")
    if couple is not None:
        x0 = couple(x0, x1)
    if t is None:
        t = sample_t(B, cfg, generator, x1.device)
    x_t, target = noise_and_target(x0, x1, t, cfg)
    error = (fp32(v_fn(x_t, t)) - target).square().flatten(1).mean(1)            # (B,)
    return error.mean() if reduce else error


# ---- 4. The diffusion baseline -------------------------------------------------------------------
# A variance-preserving diffusion moves on a circle, x_t = sin(phi) x1 + cos(phi) x0, phi from 0
# (noise) to almost pi/2 (data). Its derivative by the ANGLE, cos(phi) x1 - sin(phi) x0, is what
# v-prediction learns [PD] (up to sign). So diffusion and flow matching differ in the curve, arc or
# line, in how fast t runs along it, and in the law of t: nothing else, and one flag switches.
# phi(0) = 0 exactly is "zero terminal SNR" [ZSNR]. Without it a model never sees pure noise in
# training, though sampling starts there.
_betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
_amp = (1 - _betas).cumprod(0).sqrt()                            # of the data, in latent diffusion
_amp = (_amp - _amp[-1]) * _amp[0] / (_amp[0] - _amp[-1])        # the last one becomes 0
ANGLES = torch.asin(_amp).flip(0)                                # (1000,) from noise to data


def angle(t: Tensor) -> Tensor:
    """phi(t), like t: the 1000-step table of [ZSNR], linear between its entries."""
    u = t.double() * (len(ANGLES) - 1)
    i = u.floor().long().clamp(0, len(ANGLES) - 2)
    table = ANGLES.to(t.device)
    return (table[i] + (u - i) * (table[i + 1] - table[i])).float()


# ---- 5. Schedules: which times to visit ----------------------------------------------------------
def schedule(name: str, steps: int, shift: float = 3.0, of: int = 1000,
             linear_steps: int | None = None) -> Tensor:
    """(steps + 1,) fp32 times from 0 to 1: n steps need n + 1 times.

    linear             equal steps
    shifted            equal steps, moved by `shift` towards the noise, where layout is decided
    linear_quadratic   the first `linear_steps` (half) steps of an `of`-step linear schedule, then
                       quadratic to 1 [MG s3.4.2]
    """
    one_of("schedule", name, ("linear", "linear_quadratic", "shifted"))
    if steps < 1 or of < 1:
        raise ValueError(f"steps {steps}, of {of}: must be 1 or more")
    if not shift > 0:
        raise ValueError(f"shift {shift}: must be above 0")
    if name == "linear_quadratic":
        return linear_quadratic(steps, of, linear_steps)
    ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (shift_time(ts, shift) if name == "shifted" else ts).float()


def linear_quadratic(steps: int, of: int = 1000, linear_steps: int | None = None) -> Tensor:
    """t_i = i h for i <= L, then t_(L+k) = L h + k h + c k^2, k = 1..Q  [MG s3.4.2].

    h = 1 / of, L = linear_steps (half), Q = steps - L.

    c = (1 - L h - Q h) / Q^2 closes it at 1. The k h term makes it C1, the first quadratic step
    continuing the last linear one; a pure square from the join, as seen in the wild, makes the
    steps shrink there (0.004 -> 0.0013). With of = steps, c = 0 and the schedule is linear.
    """
    L = steps // 2 if linear_steps is None else linear_steps
    Q, h = steps - L, 1 / of
    if not 0 <= L < steps:
        raise ValueError(f"linear_steps {L}: must lie in [0, {steps})")
    if of < steps:
        raise ValueError(f"of {of}: a schedule of {steps} steps cannot imitate one with fewer")
    k = torch.arange(1, Q + 1, dtype=torch.float64)
    c = (1 - L * h - Q * h) / Q ** 2
    return torch.cat([torch.arange(L + 1) * h, L * h + k * h + c * k ** 2]).float()


# ---- 6. Solvers: how to step between them --------------------------------------------------------
# One step of each explicit Runge-Kutta method, t to t + h. Each f is a call of the model: Euler 1,
# midpoint and Heun 2, RK4 4. Compare methods at equal calls (NFE), not at equal steps.
def _euler(f, x, t, h):
    return x + h * f(x, t)


def _midpoint(f, x, t, h):
    return x + h * f(x + h / 2 * f(x, t), t + h / 2)


def _heun(f, x, t, h):
    a = f(x, t)
    return x + h / 2 * (a + f(x + h * a, t + h))


def _rk4(f, x, t, h):
    a = f(x, t)
    b = f(x + h / 2 * a, t + h / 2)
    c = f(x + h / 2 * b, t + h / 2)
    return x + h / 6 * (a + 2 * b + 2 * c + f(x + h * c, t + h))


SOLVERS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}

# Dormand-Prince 5(4): a row of A for each stage; the last is the 5th-order step itself. E is its
# difference to the embedded 4th-order step, the error estimate that adapts the step.
_DP_T = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_DP_A = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
         (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
         (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
         (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
_DP_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dopri5(f, x, t, h, rtol=1e-5, atol=1e-5):
    """From t to t + h in as many steps as the tolerance asks; one step size for the whole batch."""
    if h < 0:                                           # backwards: the same on a mirrored clock
        return _dopri5(lambda x, t: -f(x, -t), x, -t, -h, rtol, atol)
    end, h, k1 = t + h, h / 4, f(x, t)
    while end - t > 1e-7:
        h = min(h, end - t)
        k = [k1]
        for at, row in zip(_DP_T, _DP_A):
            y = x + h * sum(a * ki for a, ki in zip(row, k) if a)
            k.append(f(y, t + h * at))
        err = h * sum(e * ki for e, ki in zip(_DP_E, k) if e)
        err = (err / (atol + rtol * torch.maximum(x.abs(), y.abs()))).square().mean().sqrt().item()
        if not math.isfinite(err):
            raise ValueError(f"v_fn returned NaN or infinity near t = {t:.4f}")
        if err <= 1 or h < 1e-6:
            x, t, k1 = y, t + h, k[-1]           # the last stage is the next step's first
        h *= min(5.0, max(0.2, 0.9 * max(err, 1e-9) ** -0.2))
    return x


@torch.no_grad()
def sample(v_fn: VFn, x0: Tensor, ts: Tensor, solver: str = "euler", progress: bool = False,
           trajectory: bool = False, cfg: FlowConfig | None = None) -> Tensor:
    """Follows dx/dt = v_fn(x, t) through the times ts (n + 1,): x0 (B, ...) noise -> x1, fp32.

    solver: euler (what [MG] settled on) | midpoint | heun | rk4 | dopri5, adaptive between the
    times. trajectory=True returns all states, (n + 1, B, ...).
    A diffusion model (cfg.objective) takes euler only, which then is DDIM: on a circle, the step
    along a frozen direction is a turn, x <- cos(d) x + sin(d) v, d the difference in angle.
    """
    one_of("solver", solver, (*SOLVERS, "dopri5"))
    diffusion = cfg is not None and cfg.objective == "diffusion"
    if diffusion and solver != "euler":
        raise ValueError(f"solver {solver}: a diffusion model is sampled with euler (DDIM)")
    step = _dopri5 if solver == "dopri5" else SOLVERS[solver]
    dtype = torch.promote_types(x0.dtype, torch.float32)           # fp32, or fp64 where x0 is
    f = lambda x, t: v_fn(x, torch.full((len(x),), t, device=x.device, dtype=dtype)).to(dtype)
    x = x0.to(dtype)
    path = [x]
    times = ts.tolist()
    spans = list(zip(times[:-1], times[1:]))
    if progress:
        from tqdm import tqdm
        spans = tqdm(spans, desc=f"sample ({solver})", unit="step")
    for t, end in spans:
        if diffusion:
            d = (angle(torch.tensor(end)) - angle(torch.tensor(t))).item()
            x = math.cos(d) * x + math.sin(d) * f(x, t)
        else:
            x = step(f, x, t, end - t)
        if trajectory:
            path.append(x)
    return torch.stack(path) if trajectory else x


class Counted:
    """v_fn that counts its calls: `f = Counted(v_fn); sample(f, ...); f.nfe`."""

    def __init__(self, v_fn: VFn):
        self.v_fn, self.nfe = v_fn, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        return self.v_fn(x, t)


# ---- 7. Guidance ---------------------------------------------------------------------------------
def guide(v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v = v_u + scale (v_c - v_u) [CFG]: 1 is the conditional model, 0 the unconditional; or (B,).

    Papers also write (1 + w) v_c - w v_u: the same with scale = 1 + w. Movie Gen samples at 7.5.
    """
    if isinstance(scale, Tensor) and scale.ndim:
        scale = like(scale, v_cond)
    return v_uncond + scale * (v_cond - v_uncond)


def guided(v_cond: VFn, v_uncond: VFn, scale: float | Tensor,
           interval: tuple[float, float] = (0.0, 1.0)) -> VFn:
    """The v_fn of two closures. Rows outside the interval of t have scale 1; where all rows have,
    one call is saved."""
    def v_fn(x: Tensor, t: Tensor) -> Tensor:
        now = (interval[0] <= t) & (t <= interval[1])                            # (B,)
        each = torch.where(now, torch.as_tensor(scale, device=t.device, dtype=t.dtype), 1.0)
        v = v_cond(x, t)
        return v if (each == 1).all() else guide(v, v_uncond(x, t), each)
    return v_fn


# ---- 8. Minibatch coupling -----------------------------------------------------------------------
def minibatch_pairing(x0: Tensor, x1: Tensor, groups: Tensor | None = None) -> Tensor:
    """x0 (B, ...) reordered so that sum |x0_i - x1_i|^2 is least [CFM]: exact, by POT's ot.emd.

    A permutation: drawing pairs from the plan with replacement, as torchcfm does by default, drops
    noises and clips. With groups (B,) noise moves only inside a caption: across captions the noise
    would come to depend on the caption, which at sampling time it does not [C2OT].
    """
    import ot  # imported here: it takes seconds
    if x0.shape != x1.shape:
        raise ValueError(f"x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)}: need the same shape")
    if groups is None:
        groups = torch.zeros(len(x0), dtype=torch.int64)
    if groups.shape != x0.shape[:1]:
        raise ValueError(f"groups {tuple(groups.shape)}: need one for each of {len(x0)} noises")
    for name, x in (("x0", x0), ("x1", x1)):
        if not x.isfinite().all():
            raise ValueError(f"{name}: NaN or infinity")
    order = torch.arange(len(x0))
    for g in groups.cpu().unique():
        rows = (groups.cpu() == g).nonzero()[:, 0]
        n = len(rows)
        if n > 1:
            # |x - y|^2 up to terms of x or y alone, which no pairing changes
            a, b = x0[rows.to(x0.device)].flatten(1), x1[rows.to(x1.device)].flatten(1)
            cost = -(b.double() @ a.double().T).cpu().numpy()
            plan, log = ot.emd([1 / n] * n, [1 / n] * n, cost - cost.min(),
                               numItermax=10_000_000, log=True)
            if log["warning"]:          # numItermax at its default stops short from n = 2048 on
                raise RuntimeError(f"minibatch_pairing: {log['warning']}")
            order[rows] = rows[torch.from_numpy(plan).argmax(1)]
    return x0[order.to(x0.device)]


# ---- 9. Measures ---------------------------------------------------------------------------------
@torch.no_grad()
def straightness(v_fn: VFn, x0: Tensor, ts: Tensor | None = None,
                 cfg: FlowConfig | None = None) -> dict[str, float]:
    """How far the flow is from straight, by one Euler run of x0 (B, ...) along ts (64 steps).

    energy        int E|v|^2 dt per sample: what the path costs
    displacement  E|z1 - z0|^2: what the straight line between its ends would cost
    S             energy - displacement = int E|(z1 - z0) - v|^2 dt [RF]: 0 means one step is exact
    curvature     S / energy, free of units, 0 to 1; of a flow that stands still, 0
    """
    ts = schedule("linear", 64) if ts is None else ts
    z = sample(v_fn, x0, ts, trajectory=True, cfg=cfg)                           # (n + 1, B, ...)
    dt = ts.diff().to(z.device)
    v = z.diff(dim=0).flatten(2) / dt[:, None, None]                             # (n, B, D)
    energy = (v.square().sum(2).mean(1) * dt).sum().item()
    displacement = (z[-1] - z[0]).flatten(1).square().sum(1).mean().item() / dt.sum().item()
    S = energy - displacement
    curvature = S / energy if energy else 0.0
    return {"S": S, "energy": energy, "displacement": displacement, "curvature": curvature}


@torch.no_grad()
def endpoint_error(v_fn: VFn, x0: Tensor, ts: Tensor, solver: str = "euler",
                   reference: int = 256, cfg: FlowConfig | None = None) -> float:
    """rms per element between this sampler's end and that of `reference` RK4 steps, same noise (of
    diffusion: four times as many steps of DDIM)."""
    diffusion = cfg is not None and cfg.objective == "diffusion"
    fine = sample(v_fn, x0, schedule("linear", 4 * reference if diffusion else reference),
                  "euler" if diffusion else "rk4", cfg=cfg)
    return (sample(v_fn, x0, ts, solver, cfg=cfg) - fine).square().mean().sqrt().item()


@torch.no_grad()
def validation_loss(v_fn: VFn, x1: Tensor, cfg: FlowConfig | None = None, times: int = 8,
                    seed: int = 0) -> tuple[float, Tensor]:
    """(mean, (times,)): loss on held-out x1 at the times (i + 1/2) / times, with fixed noise.

    Movie Gen finds that it follows human preference, so it is the number to steer by. With t and x0
    fixed, two checkpoints differ by what they learned, not by what was drawn.
    """
    g = torch.Generator().manual_seed(seed)
    per_time = []
    for i in range(times):
        x0 = torch.randn(x1.shape, generator=g).to(x1.device)
        t = torch.full((len(x1),), (i + 0.5) / times, device=x1.device)
        per_time.append(loss(v_fn, x1, x0, t, cfg))
    per_time = torch.stack(per_time).cpu()
    return per_time.mean().item(), per_time


# ---- 10. Demo ------------------------------------------------------------------------------------
def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2): uniform on the eight black fields of a 4 x 4 board of side 6."""
    x = torch.rand(6 * n + 64, 2, generator=generator) * 4
    return (x[(x.floor().sum(1) % 2) == 0][:n] - 2) * 1.5


class MLP(torch.nn.Module):
    """v(x, t) in 2-D: t enters as waves, for a plain number hardly moves a small network."""

    def __init__(self, width: int = 128):
        super().__init__()
        sizes = (2 + 8, width, width, width)
        hidden = [m for a, b in zip(sizes, sizes[1:])
                  for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]
        self.net = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])            # (B, 4)
        return self.net(torch.cat([x, waves.sin(), waves.cos()], 1))


def semi_discrete(y: Tensor, generator: torch.Generator, steps: int = 1500) -> Tensor:
    """(N,) weights h whose cells argmax_j <x, y_j> + h_j hold equal noise: a small sdot.py."""
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
    """One small network for each coupling, the same data and steps; figure and claims."""
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
    # Uniform times: one Euler step asks for v at t = 0 only, which logit-normal hardly trains.
    cfg = FlowConfig(time="uniform")
    noise = torch.randn(1000, 2, generator=g)

    def batch(name: str) -> tuple[Tensor, Tensor]:
        x0 = torch.randn(B, 2, generator=g)
        if name == "semi-discrete":
            return x0, y[(x0 @ y.T + h).argmax(1)]                    # the noise picks the point
        x1 = y[torch.randint(N, (B,), generator=g)]
        return (minibatch_pairing(x0, x1) if name == "minibatch" else x0), x1

    def error(x: Tensor) -> float:
        """W2 between samples and data set, exact."""
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
        measures = straightness(net, noise)
        S[name] = measures["S"]
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

    ok = True
    one, eight = errors["semi-discrete"][0], errors["independent"][counts.index(8)]
    for claim, value, bound in (
            ("semi-discrete at 1 step against independent at 8 steps, W2", one, eight),
            ("straightness S, semi-discrete against independent", S["semi-discrete"],
             0.1 * S["independent"])):
        ok &= value < bound
        print(f"{'PASS' if value < bound else 'FAIL'} {claim}: {value:.3f} vs < {bound:.3f}")
    print(f"figure: {out / 'flow.png'}")
    return ok


# ---- 11. Main ------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """One line for a wrong argument, and exit status 2."""

    def error(self, message: str):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """The command line."""
    parser = Parser(allow_abbrev=False, description="Three couplings in 2-D: paths and errors.")
    parser.add_argument("--out", default="out/flow", help="folder of the figure")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each network")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        ok = demo(args.out, args.steps, args.seed)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
