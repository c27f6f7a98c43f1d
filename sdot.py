"""sdot.py: semi-discrete optimal transport. Which noise becomes which clip, before training.

    latents y_1..y_M --> fit: one number h_j per latent, so that each cell of noise has its mass
    (groups: captions)    |                                 (once; kept in coupling.pt)
                          v
    x0 ~ N(0, I) ----> couple: argmax_j <x0, y_j> + h_j ----> index of the clip x0 trains towards

The idea.  Flow matching pairs each noise with a random clip. The lines of such pairs cross, at a
crossing the model can only learn their average, so sampled paths bend and few steps miss. Optimal
transport pairs without crossings. Minibatch methods solve it anew inside every batch, where the
answer is poor. But one side, the data set, is finite and the other a Gaussian that we can draw
from for ever: then the optimal pairing of ALL noise with ALL clips is known by M numbers, for the
noise that belongs to clip j is a convex cell (a Laguerre cell)

    L_j = { x : <x, y_j> + h_j >= <x, y_k> + h_k  for all k }.

ANY h gives a pairing that is optimal for the masses its cells happen to have. All a solver must do
is make the masses equal to the clips' frequencies b_j, and the dual is concave with the gradient
b_j - P(x in L_j). So: throw noise, count where it lands, lower h where too much landed. That is
the algorithm; there is no Sinkhorn in it, and no M x M matrix. After S noises the relative mass
error is about sqrt(M / S), whatever M and the dimension, which is the error of counting itself.

Papers.  [AF] AlignFlow, arXiv 2510.15038 (the map, eq. 6; one problem per class; the pairs).
[SDFM] arXiv 2509.25519 (unbiased chi-square stopping).  [PASGD] arXiv 2510.27340 (averaged SGD on
the semi-dual, which POT's ot.semidiscrete implements).  [C2OT] arXiv 2503.10636 (a coupling that
looks across captions makes the noise depend on the caption; at sampling time it does not).

Contract.  latents (M, ...) normalised like the model's data, fp32, posterior MEANS for a VAE (train
on samples of the posterior that the index names); groups (M,) int64, all clips of one caption (or
`cluster` of its embeddings) share an id; x0 (B, ...) ~ N(0, I) like a latent, never touched;
couple(x0, cond) -> (B,) int64 row of the data set.  The group is drawn by its frequency, then the
noise independently of it, then the noise picks the clip: so x0 given a caption stays N(0, I).
Flips and other augmentations that can be listed enter as rows of their own (row mod M is the clip);
random crops cannot. Encode the flipped CLIP: the flip of a latent is not the latent of the flip.

Run.   python sdot.py                     # cells, GIF, convergence against POT    ~25 s on 2 cores
       python sdot.py --plan 1000000 4096 # time, memory and gain to expect, without solving
       python sdot.py --study runs/toy    # couplings, schedules, diffusion on a toy run's latents

Differences from the paper.  [AF] runs Adam on a softmax-smoothed histogram from g = 0 for a fixed
number of steps. Here: hard cells, a start and a step size derived below, an averaged iterate, and
a stop by measured mass error: 130 noises a clip for 10 %. Its CIFAR-10 recipe draws 1000 (for 3 %);
shortened to 400 it ends far from that (tests/bench_sdot.py). [AF] moves the surplus of `rebalance`
to arbitrary cells; here optimal transport moves it. Conditions are captions instead of classes.

Letters.  M latents, N targets of one problem, d numbers in a latent, b (N,) masses, h (N,) dual
weights, p cell masses, sigma tau the scales of section 2, S noises used, K noises a clip of a pool.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor


def one_of(name: str, value, choices) -> None:
    """ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


# ---- 1. Configuration ----------------------------------------------------------------------------
@dataclass
class SDOTConfig:
    """How the dual weights are found and used."""

    solver: str = "stream"     # stream: section 4 (GPU, ranks, resume) | pot: POT's ot.semidiscrete
    optimiser: str = "auto"    # sgd: at the statistical limit for spread-out data | adam: 1.5 times
                               #   its error, but survives tight clusters of latents and d < 8 |
                               #   auto: sgd, then adam where sgd has missed its target by half
    target: float = 0.1        # rms relative mass error to stop at; [SDFM] sees no gain below 0.22
    budget: float = 4.0        # draw at most this many times N / target^2 noises
    batch: int = 0             # noises in a step; 0 = by N
    lr: float = 0.0            # first step in units of tau; 0 = 0.5 for sgd, 0.3 for adam
    decay: float = 1e-3        # adam: last step over first step, 1 = constant (sgd: t^-2/3)
    temperature: float = 0.0   # softmax in place of argmax, in units of tau; 0 counts exactly
    ema: float = 0.0           # average the iterates by this factor; 0 = Polyak averaging
    start: str = "auto"        # first h: extreme | gaussian | voronoi | auto, best of two
    cluster: int = 32          # least size of a group, where captions are unique (see `cluster`)
    pca: int = 0               # solve and pair in so many principal directions; 0 = in all of them
    memory: int = 64           # MiB for one block of scores: bounds memory whatever N is
    precision: str = "fp32"    # of the products in `couple`: fp32 | bf16 (1 % of pairs differ)
    seed: int = 0

    def __post_init__(self):
        one_of("solver", self.solver, ("stream", "pot"))
        one_of("optimiser", self.optimiser, ("auto", "sgd", "adam"))
        one_of("start", self.start, ("auto", "extreme", "gaussian", "voronoi"))
        one_of("precision", self.precision, ("fp32", "bf16"))
        for name in ("target", "budget", "decay", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0")
        if self.cluster < 1:
            raise ValueError(f"cluster {self.cluster}: must be 1 or more")
        for name in ("batch", "lr", "temperature", "pca"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must not be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema}: must lie in [0, 1)")


# The solver scales itself, so the sizes differ only where a whole data set no longer fits in a
# block or is scored often enough for bf16 to matter.
PRESETS = {"toy": SDOTConfig(), "small": SDOTConfig(),
           **{size: SDOTConfig(memory=1024, precision="bf16") for size in ("1b", "5b", "30b")}}


# ---- 2. Scales and start -------------------------------------------------------------------------
# Where to start and how far to step, from one approximation. The cell of x is the largest of the
# scores z_j + h_j with z_j = <x, y_j - mean>, which are Gaussian with standard deviation sigma_j.
# In hundreds of dimensions they are nearly independent, and then the chance that j wins is
#     p_j = int phi(u) Phi((sigma_j u + h_j) / sigma)^(N-1) du.
# Integrate its derivatives at equal scores by parts, with m = E max of N standard normals:
#     dp_j/dh_j = (1/N) m / sigma          dp_j/dsigma_j = (1/N) (E max^2 - 1) / sigma.
# * Start: a target far out (large sigma_j) wins too often; h_j = -q sigma_j with
#   q = (E max^2 - 1) / m cancels that. Measured rms mass error of the start, N = 500: 0.59 at
#   d = 64 and 0.36 at d = 1024, where g = 0 has 2.6 and 10.7, h = 0 has 3.3 and 3.4.
# * Step: tau_j = sigma_j / m makes h_j -= tau_j (p_j / b_j - 1) a Newton step (of the diagonal).
#   All step sizes below are multiples of it, so scaling or moving the latents changes nothing. The
#   usual unit, that of g = 2 h + |y|^2, does not know the problem: |y|^2 varies 50 times as much.
def expected_max(n: int) -> tuple[float, float]:
    """(m, q) of the comment above for n independent standard normals, by quadrature; n = 1: 0, 0.

    m(2) = 0.56, m(10) = 1.54, m(1000) = 3.24, m(10^6) = 4.86: it hardly grows, and it is all that
    semi-discrete transport can gain (see `gain`).
    """
    if n < 2:
        return 0.0, 0.0
    x = torch.linspace(-9, 12, 42001, dtype=torch.float64)
    mass = (n * torch.special.log_ndtr(x)).exp().diff()          # of the maximum, Phi^n
    mid = (x[1:] + x[:-1]) / 2
    m = (mid * mass).sum().item()
    return m, ((mid ** 2 * mass).sum().item() - 1) / m


def spread(Y: Tensor, b: Tensor) -> Tensor:
    """sigma (N,) float64: the standard deviation of each centred score, |y_j - mean|.

    Centring makes N scores slightly anti-correlated; the factor sqrt(N / (N - 1)) undoes it, and
    turns the formulas above exact for N = 2.
    """
    rows = [slice(i, i + 4096) for i in range(0, len(Y), 4096)]
    mean = sum(b[r] @ Y[r].double() for r in rows)
    sigma = torch.cat([(Y[r].double() - mean).norm(dim=1) for r in rows])
    return sigma * math.sqrt(len(Y) / max(1, len(Y) - 1))


def gaussian_start(Y: Tensor, b: Tensor) -> Tensor:
    """h_j = -(y_j - mean)^T C^(-1/2) (y_j - mean) / 2, C the covariance of the targets: (N,).

    The other end of the scale, many targets in few dimensions: were the targets a Gaussian N(mean,
    C), the map would be linear, x -> mean + C^(1/2) x, and its potential has this conjugate.
    """
    mean = sum(b[i:i + 4096] @ Y[i:i + 4096].double() for i in range(0, len(Y), 4096))
    C, h = 0, []
    for y, w in zip(Y.split(4096), b.split(4096)):
        y = y.double() - mean
        C = C + y.T @ (w[:, None] * y)
    lam, V = torch.linalg.eigh(C)
    V = V * lam.clamp_min(1e-6 * lam[-1]) ** -0.25
    for y in Y.split(4096):
        h.append(-((y.double() - mean) @ V).square().sum(1) / 2)
    return torch.cat(h)


def gain(sigma: Tensor, b: Tensor, base: float) -> float:
    """2 m sigma / (d + E|y|^2): the share of the squared transport cost that coupling can save.

    Random pairs cost E|x - y|^2 = d + E|y|^2 (`base`); the best of N nearly independent scores is m
    sigma, and a cost is base - 2 E<x, y_phi(x)>. With unit latents it is m(N) / sqrt(d): 43 % for
    d = 64 and 2000 clips, 11 % for d = 1024, 1 % for d = 131072 and a million clips.
    """
    return 2 * expected_max(len(sigma))[0] * (b @ sigma).item() / base


# ---- 3. Cells ------------------------------------------------------------------------------------
def noise(key: tuple[int, ...], rows: int, dim: int, device=None) -> Tensor:
    """(rows, dim) N(0, I) that the key alone decides: drawn again instead of stored or sent.

    The key is hashed to 32 bits because torch's CPU generator uses no more of its seed than that.
    """
    seed = 0
    for k in key:
        seed = (seed * 0x9E3779B1 + k * 0x85EBCA6B + 0x27220A95) & 0xFFFFFFFF
        seed ^= seed >> 15
    g = torch.Generator(device or "cpu").manual_seed(seed)
    return torch.randn(rows, dim, generator=g, device=device)


def assign(x: Tensor, Y: Tensor, h: Tensor, memory: int = 64) -> Tensor:
    """argmax_j <x, y_j> + h_j, the Laguerre cell of each x [AF eq.6]: x (B, d), Y (N, d) -> (B,).

    It is argmin_j |x - y_j|^2 - g_j with h = (g - |y|^2) / 2. Blocks of targets keep the scores
    within `memory` MiB, so N is bounded by what Y itself takes.
    """
    cols = max(1, memory * 2 ** 18 // max(1, len(x)))
    best = index = None
    for j in range(0, len(Y), cols):
        y, w = Y[j:j + cols], h[j:j + cols]
        # bf16: products in bf16, but the sum with h, which is larger, in fp32
        s = torch.addmm(w, x, y.T) if x.dtype == w.dtype else (x @ y.T).float() + w   # (B, cols)
        s, i = s.max(1)
        if best is None:
            best, index = s, i
        else:
            index = torch.where(s > best, i + j, index)
            best = torch.maximum(best, s)
    return index


def chi_square(counts: Tensor, b: Tensor) -> float:
    """sum_j (p_j - b_j)^2 / b_j from a histogram of fresh noise, without bias [SDFM].

    Its root is the rms relative mass error. The naive sum over p_j = n_j / S is no measure: it
    shows sqrt(N / S) for perfect cells. Unbiased, so it may come out below 0 when nothing is left.
    """
    n, S = counts.double(), counts.sum().item()
    return ((n * (n - 1) / b).sum() / (S * (S - 1))).item() - 1


def dual_cost(x: Tensor, Y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """d + E|y|^2 + 2 <b, h> - 2 E max_j(<x, y_j> + h_j): a lower bound of the transport cost.

    Over noises x; its gradient is 2 (b_j - p_j). For tests and teaching: solvers only count.
    """
    const = Y.shape[1] + b @ Y.square().sum(1)
    return const + 2 * b @ h - 2 * (x @ Y.T + h).max(1).values.mean()


# ---- 4. The streaming solver ---------------------------------------------------------------------
BLOCK = 256    # noises with one key: a step's unit of work, the same for any number of ranks
LARGE = 4096   # eigenvectors of a matrix of more rows than this are not worth their time and memory


@dataclass
class State:
    """All that a solve is, between two steps. `avg` is the answer, `h` the iterate it averages."""
    h: Tensor
    avg: Tensor
    adam: Tensor                                      # (2, N) first and second moments
    phase: str = "sgd"
    t: int = 0                                        # steps of this phase
    steps: int = 0                                    # of all phases: the key of the noise
    samples: int = 0                                  # S
    done: bool = False
    error: float = math.nan                           # rms mass error of h lately, to be shown
    history: list = field(default_factory=list)       # [S, chi-square of avg, E<x, y_phi(x)>]


def span(Y: Tensor) -> Tensor:
    """(N, r <= N - 1): targets in coordinates of their own span, same inner products once centred.

    N targets meet only N - 1 directions of noise, in any dimension. So a caption's 20 clips of 2048
    numbers are, exactly, a problem in 19 dimensions: cheap noise, cheap scores.
    """
    gram = 0
    for y in Y.split(4096, dim=1):                      # columns: no second copy of the latents
        y = y.double() - y.double().mean(0)
        gram = gram + y @ y.T
    lam, V = torch.linalg.eigh(gram)
    keep = lam > 1e-10 * lam[-1].clamp_min(1e-300)
    return (V[:, keep] * lam[keep].sqrt()).float()


def check_problem(name: str, Y: Tensor, mass: Tensor | None) -> None:
    """ValueError for a row of Y (N, d) that is not finite, or masses that are not N numbers > 0."""
    finite = torch.cat([y.isfinite().all(1) for y in Y.split(4096)])
    if not finite.all():
        raise ValueError(f"{name}: row {(~finite).nonzero()[0].item()} has NaN or infinity")
    if mass is not None and (mass.shape != (len(Y),) or not (mass > 0).all()
                             or not mass.isfinite().all()):
        raise ValueError(f"mass {tuple(mass.shape)}: need {len(Y)} numbers above 0")


def fit(targets: Tensor, mass: Tensor | None = None, cfg: SDOTConfig | None = None, key: int = 0,
        state: State | None = None, ranks: bool = False,
        on_step: Callable[[State], None] | None = None) -> State:
    """Dual weights of one problem: targets (N, ...), mass (N,) or uniform -> State (.avg).

    Draws S = 1.3 N / target^2 noises, which the law rms = 1.1 sqrt(N / S) asks for, then measures,
    and goes on while the error is significantly above `target` and the budget lasts.
    A State of an earlier call continues to the same bits; so does any number of `ranks` (of
    torch.distributed's default group), which share a step's noise, if that is 512 or more, and add
    integer counts (with a temperature: sums, equal up to rounding).
    `key` tells problems of one seed apart. on_step(state) sees each step; it may stop by raising.
    """
    cfg = cfg or SDOTConfig()
    if len(targets) == 0 or targets.ndim < 2:
        raise ValueError(f"targets {tuple(targets.shape)}: need (N, ...), N 1 or more")
    Y = targets.flatten(1).float()
    N = len(Y)
    check_problem("targets", Y, mass)
    b = torch.full((N,), 1 / N) if mass is None else mass / mass.sum()
    b = b.double().to(Y.device)
    if Y.shape[1] / 2 > N - 1 and N <= LARGE:
        Y = span(Y)
    d = Y.shape[1]
    if d == 0:                                                   # one target: all noise is its cell
        zero = torch.zeros(N, dtype=torch.float64, device=Y.device)
        return State(zero, zero, zero.expand(2, -1), done=True)
    sigma = spread(Y, b)
    m, q = expected_max(N)
    tau = sigma.clamp_min(1e-3 * sigma.mean()) / m
    law = N / cfg.target ** 2                                    # noises for c = 1
    # A step's own counting error is sqrt(N / batch) tau. Averaging removes it, whatever the batch,
    # as long as there are steps enough (64 and more); so batches are as large as that allows.
    batch = cfg.batch or max(32, min(max(2 * BLOCK, N // 4), int(law / 64)))
    # The spread of chi_square is sqrt(2 N) / checks. A quarter of target^2 is fine enough, and for
    # a small group, where that takes more noise than the solve, the average over groups is.
    checks = int(min(4 * math.sqrt(2 * N) / cfg.target ** 2, law / 4)) + 2
    world = 1
    if ranks and batch >= 2 * BLOCK:                             # smaller: each rank does it all
        import torch.distributed as dist
        world, rank = dist.get_world_size(), dist.get_rank()

    def throw(h: Tensor, stream: int, total: int) -> tuple[Tensor, float]:
        """Histogram (N,) of fresh noise over the cells; the mean of <x, y_phi(x)> in checks."""
        soft = cfg.temperature > 0 and not stream
        counts = torch.zeros(N, dtype=torch.float64 if soft else torch.int64, device=Y.device)
        inner, h = 0.0, h.float()
        for i in range(0, total, BLOCK):
            if world > 1 and (i // BLOCK) % world != rank:
                continue
            rows = min(BLOCK, total - i)
            x = noise((cfg.seed, key, stream, state.steps, i // BLOCK), rows, d, Y.device)
            if soft:
                for part in x.split(max(1, cfg.memory * 2 ** 18 // N)):
                    s = torch.addmm(h, part, Y.T) / (cfg.temperature * tau.mean())
                    counts += s.softmax(1).sum(0)
                continue
            index = assign(x, Y, h, cfg.memory)
            counts += torch.bincount(index, minlength=N)
            if stream:
                inner += (x * Y[index]).sum().item()
        if world > 1:
            dist.all_reduce(counts)
            total_inner = torch.tensor(inner, dtype=torch.float64, device=Y.device)
            if stream:
                dist.all_reduce(total_inner)
            inner = total_inner.item()
        return counts, inner / total

    def centred(h: Tensor) -> Tensor:
        """A constant added to all h changes no cell; <b, h> = 0 picks one."""
        return h - b @ h

    def measure() -> float:
        counts, inner = throw(state.avg, 1, checks)
        state.history.append([state.samples, chi_square(counts, b), inner])
        return state.history[-1][1]

    if state is not None:                                        # from a file: it is on the CPU
        state.h, state.avg, state.adam = (v.to(Y.device) for v in (state.h, state.avg, state.adam))
    else:
        zero = torch.zeros(N, dtype=torch.float64, device=Y.device)
        state = State(zero, zero, torch.zeros(2, N, dtype=torch.float64, device=Y.device))
        starts = {"extreme": lambda: -q * sigma, "gaussian": lambda: gaussian_start(Y, b),
                  "voronoi": lambda: -Y.double().square().sum(1) / 2}
        # As many dimensions as targets leave room for independent scores: extreme, without a trial.
        names = [cfg.start] if cfg.start != "auto" else ["extreme", "gaussian"][
            :1 + (d < min(N, LARGE))]
        tries = [centred(starts[n]() + tau * (N * b).log()) for n in names]   # and b to first order
        if len(tries) > 1:
            tries.sort(key=lambda h: chi_square(throw(h, 2, 2 * N)[0], b))
        state.h = state.avg = tries[0]
        state.phase = "adam" if cfg.optimiser == "adam" else "sgd"
    if cfg.solver == "pot":
        state.avg, state.samples = _pot(Y, b, state.h, tau, cfg, key, batch)
        state.avg = centred(state.avg)
        measure()
        state.done = True

    most, cap = 2 + 6 / (batch * b).sqrt(), cfg.budget * law
    check_at = max(1.3 * law, 1.25 * (state.history[-1][0] if state.history else 0))
    recent = torch.zeros_like(b)                                 # histogram of some steps
    while not state.done:
        state.t, state.steps, t = state.t + 1, state.steps + 1, state.t + 1
        counts, _ = throw(state.h, 0, batch)
        recent += counts
        if recent.sum() >= 4 * N:
            state.error, recent = rms(chi_square(recent, b)), torch.zeros_like(b)
        error = counts / (batch * b) - 1                         # (N,) relative mass error, noisy
        if state.phase == "sgd":
            # A cell that starts 1000 times too large would fall 500 tau at once, and an empty cell
            # climbs back by one step size at a time: so surprises beyond counting noise are cut.
            step = (cfg.lr or 0.5) * t ** (-2 / 3) * torch.minimum(error, most)
            weight = 2 / (t + 1)                                 # average with weights 1, 2, 3, ...
        else:
            left = cap - (state.samples - (t - 1) * batch)       # when this phase began
            length = max(1, math.ceil(min(2.6 * law, left) / batch))
            state.adam = torch.stack([0.9 * state.adam[0] + 0.1 * error,
                                      0.99 * state.adam[1] + 0.01 * error ** 2])
            size = (cfg.lr or 0.3) * cfg.decay ** min(1.0, t / length)
            step = size * state.adam[0] / (1 - 0.9 ** t) / (
                (state.adam[1] / (1 - 0.99 ** t)).sqrt() + 1e-8)
            weight = 1 / max(1, t - length // 2)                 # average of the second half
        state.h = centred(state.h - tau * step)
        state.avg = torch.lerp(state.avg, state.h, 1 - cfg.ema if cfg.ema else weight)
        state.samples += batch
        spent = state.samples >= cap
        if spent or (t == length if state.phase == "adam" else state.samples >= check_at):
            check_at = 1.25 * state.samples
            chi2, noise_floor = measure(), math.sqrt(2 * N) / checks
            if spent or state.phase == "adam" or chi2 - noise_floor <= cfg.target ** 2:
                state.done = True
            elif cfg.optimiser == "auto" and chi2 - noise_floor > 2.25 * cfg.target ** 2:
                # The law does not hold: twins whose common wall a step of tau jumps across, or few
                # dimensions. Adam finds each target's own step size, down to 1e-3 of tau.
                state.phase, state.t, state.h = "adam", 0, state.avg
        if on_step:
            on_step(state)
    return state


def _pot(Y: Tensor, b: Tensor, h: Tensor, tau: Tensor, cfg: SDOTConfig, key: int,
         batch: int) -> tuple[Tensor, int]:
    """The same problem by POT's ot.semidiscrete [PASGD]: (weights, noises used).

    Its defaults (lr0 = sqrt(N batch), g = 0, entropy 0.1) leave 15-75 % of the cells of latents
    empty: they are absolute numbers in the unit of g. Start and step of section 2 repair that. The
    cost -<x, y> makes its g our h. No stop, checkpoint, blocks or ranks; averages from step 1.
    """
    from ot.semidiscrete import solve_semidiscrete  # imported here: it takes seconds
    N, d = Y.shape
    steps = max(1, math.ceil(min(2.0, cfg.budget) * N / cfg.target ** 2 / batch))
    g = torch.Generator(Y.device).manual_seed(cfg.seed * 1_000_003 + key)
    h = solve_semidiscrete(
        Y, lambda n: torch.randn(n, d, generator=g, device=Y.device), b.float(),
        metric=lambda x, y: -(x @ y.T), reg=0.0, decreasing_reg=False, max_iter=steps,
        batch_size=batch, lr0=(cfg.lr or 0.5) * tau.median().item() * N, init_potential=h.float())
    return h.double(), steps * batch


# ---- 5. Groups -----------------------------------------------------------------------------------
def caption_groups(captions: list[str]) -> Tensor:
    """(M,) int64: clips with the same caption share an id, in order of first appearance."""
    ids = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    return torch.tensor([ids[c] for c in captions])


def cluster(embeddings: Tensor, size: int = 32, seed: int = 0, rounds: int = 20) -> Tensor:
    """k-means groups of at least `size` rows (if there are as many), for captions that are unique.

    embeddings (M, E) -> (M,) int64. A larger group costs: inside it the noise tells clips with
    different captions apart, so the model may trust the noise instead of the caption. A smaller
    one costs, too: m(size) is all there is to gain, 1.4 for 8, 2.1 for 32, 3.0 for 500.
    """
    if size < 1:
        raise ValueError(f"size {size}: must be 1 or more")
    E = embeddings.flatten(1).float()
    M, k = len(E), max(1, len(E) // (2 * size))
    g = torch.Generator().manual_seed(seed)
    centres = E[torch.randperm(M, generator=g)[:k].to(E.device)]
    for _ in range(rounds):
        ids = assign(E, centres, -centres.square().sum(1) / 2)   # nearest centre: a Voronoi cell
        n = torch.bincount(ids, minlength=len(centres))
        total = torch.zeros_like(centres).index_add_(0, ids, E)
        centres = torch.where(n[:, None] > 0, total / n.clamp_min(1)[:, None], centres)
    while True:                                    # dissolve the smaller half of the too small ones
        ids = assign(E, centres, -centres.square().sum(1) / 2)
        n = torch.bincount(ids, minlength=len(centres))
        small = (n < size).sum().item()
        if len(centres) == 1 or small == 0:
            return ids
        centres = centres[n.argsort()[min(len(centres) - 1, (small + 1) // 2):]]


def rebalance(x: Tensor, index: Tensor, Y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """index (n,) with exactly b_j n noises in each cell (rounded), few changed, each at least cost.

    The counts of a pool fluctuate even when the cells are perfect: for K noises a clip, a Poisson
    share of them, 37 % at K = 1 and 13 % at K = 10, is in the wrong place. Those nearest to a wall
    give way, and POT's exact solver seats them. ([AF] seats them anywhere, which costs 13 % of the
    gain at K = 10 and 34 % at K = 1; measured.)
    """
    import ot  # imported here: it takes seconds
    n, N = len(x), len(Y)
    share = b.double() * n
    quota = share.floor().long()
    left = n - quota.sum().item()
    count = torch.bincount(index, minlength=N)
    # remainders: the largest first, and among equals a cell that has the noise already
    quota[torch.argsort(share - quota + 1e-6 * (count > quota), descending=True)[:left]] += 1
    short = ((quota - count) > 0).nonzero()[:, 0]
    if not len(short):
        return index
    over = (count > quota)[index].nonzero()[:, 0]                # noises that may have to move
    score = torch.addmm(h[short], x[over], Y[short].T)           # (over, short)
    own = (x[over] * Y[index[over]]).sum(1) + h[index[over]]
    regret = own - score.max(1).values
    by_cell = over[torch.argsort(regret)]                        # nearest to a wall first
    by_cell = by_cell[torch.argsort(index[by_cell], stable=True)]
    cells, sizes = torch.unique_consecutive(index[by_cell], return_counts=True)
    move = torch.cat([r[:c - w] for r, c, w in zip(
        by_cell.split(sizes.tolist()), count[cells].tolist(), quota[cells].tolist())])
    seats = (quota - count)[short].double().cpu().numpy()
    cost = -(x[move] @ Y[short].T).double().cpu().numpy()
    plan, log = ot.emd([1 / len(move)] * len(move), seats / len(move), cost - cost.min(),
                       numItermax=10_000_000, log=True)
    if log["warning"]:
        raise RuntimeError(f"rebalance: {log['warning']}")
    out = index.clone()
    out[move] = short[torch.from_numpy(plan).argmax(1).to(short.device)]
    return out


# ---- 6. The coupling of a data set ---------------------------------------------------------------
class Coupling:
    """Noise -> row of the data set, inside groups. Made by `fit`, kept by `save` and `load`.

    Rows are held sorted by group, so that a group is a slice: nothing is gathered to pair a batch.
    Of exact duplicates one stands for all (weight, cell, mass) and the others have h = -inf: copies
    of one clip share one cell, which separate weights could only fight over.
    """

    def __init__(self, cfg: SDOTConfig, groups: Tensor, mass: Tensor, h: Tensor, copies: Tensor,
                 basis: Tensor | None, meta: dict):
        self.cfg, self.groups, self.mass, self.h = cfg, groups, mass, h      # h: in sorted order
        self.copies, self.basis, self.meta = copies, basis, meta
        self.order = torch.argsort(groups, stable=True)              # (M,) sorted position -> row
        self.ids, sizes = torch.unique(groups, return_counts=True)   # (G,) ascending
        self.ptr = [0, *sizes.cumsum(0).tolist()]                    # group g is ptr[g]:ptr[g + 1]
        # copies (M,): position -> its representative's; the inverse lists for each of them
        self.twins = torch.argsort(copies, stable=True)
        self.count = torch.bincount(copies, minlength=len(copies))
        self.first = self.count.cumsum(0) - self.count
        heap = mass[self.order[self.twins]].double().cumsum(0)       # their masses, one on another
        self.heaped = torch.cat([torch.zeros(1, dtype=torch.float64), heap])        # (M + 1,)
        self.Y = self.checkpoint = None

    # -- make
    @classmethod
    def fit(cls, latents: Tensor, groups: Tensor | None = None, mass: Tensor | None = None,
            cfg: SDOTConfig | None = None, progress: bool = False, ranks: bool = False,
            checkpoint: str | Path | None = None, device=None, **flags) -> "Coupling":
        """Solves every group: latents (M, ...), groups (M,) ids or None for one, mass (M,).

        checkpoint: a file written every 30 s and at the end, resumed from to the same bits, and
        removed by `save`. ranks: share large groups' work over torch.distributed (groups below
        about 300 clips each rank solves itself). device: where to solve. flags: config fields.
        """
        cfg = replace(cfg or SDOTConfig(), **flags)
        Y = latents.flatten(1)
        M, d = Y.shape
        if M == 0:
            raise ValueError("latents (0, ...): there is nothing to couple with")
        mass = torch.ones(M) if mass is None else torch.as_tensor(mass).cpu()
        check_problem("latents", Y, mass)
        groups = torch.zeros(M).long() if groups is None else torch.as_tensor(groups).long().cpu()
        if groups.shape != (M,):
            raise ValueError(f"groups {tuple(groups.shape)}: need one id for each of {M} latents")
        if cfg.pca > d:
            raise ValueError(f"pca {cfg.pca}: a latent has only {d} numbers")
        mass = mass.double() / mass.double().sum()
        lead = not ranks or torch.distributed.get_rank() == 0

        self = cls(cfg, groups, mass, torch.full((M,), -math.inf), _copies(Y, groups, cfg.memory),
                   _basis(Y, groups, cfg.pca) if cfg.pca else None, {})
        meta = {"M": M, "d": d, "fingerprint": fingerprint(Y, groups, mass), "next": 0,
                "chi2": 0.0, "gain": 0.0, "expected": 0.0, "samples": 0}
        base = d + sum((w @ y.double().square().sum(1).cpu()).item()
                       for w, y in zip(mass.split(4096), Y.split(4096)))
        partial, state = Path(checkpoint) if checkpoint and lead else None, None
        if partial and not partial.parent.is_dir():
            raise ValueError(f"{partial}: no such folder")
        saved = [_read(partial) if partial and partial.exists() else None]
        if ranks:                                   # only rank 0 is sure to have it on its disk
            torch.distributed.broadcast_object_list(saved, 0)
        if (s := saved[0]) is not None:
            if not isinstance(s, dict) or s.keys() != {"cfg", "h", "meta", "state"}:
                raise ValueError(f"{checkpoint}: not an unfinished solve; choose another name")
            if (s["meta"]["fingerprint"], s["cfg"]) != (meta["fingerprint"], asdict(cfg)):
                raise ValueError(f"{checkpoint}: of other latents, groups or flags; remove it")
            self.h, meta = s["h"], s["meta"]
            state = State(**s["state"]) if s["state"] else None
        self.checkpoint = partial
        Ys = self._sorted(Y)
        meta["expected"] = 0.0
        for i, j in zip(self.ptr, self.ptr[1:]):
            _, b, y = self._targets(i, j, Ys)
            w = (b / b.sum()).to(y.device)
            meta["expected"] += b.sum().item() * gain(spread(y, w), w, base)
        if progress and lead and (why := self._hopeless(meta["expected"])):
            print(why, file=sys.stderr)             # before the work, not after it
        written = time.monotonic()

        def keep(s: State | None) -> None:
            _write(partial, {"cfg": asdict(cfg), "h": self.h, "meta": meta,
                             "state": vars(s) if s else None})

        def show(at: int, error: float) -> None:    # the bar moves inside a large group, too
            if not math.isnan(error):
                bar.set_postfix(mass_error=f"{error:.3f}", refresh=False)
            bar.update(at - bar.n)

        def on_step(s: State | None) -> None:
            nonlocal written
            if bar is not None and s:
                part = min(1.0, s.samples * cfg.target ** 2 / (1.3 * (j - i)))
                show(i + int(part * (j - i)), s.error)
            if partial and time.monotonic() - written > CHECKPOINT_SECONDS:
                keep(s)
                written = time.monotonic()

        bar, solved = None, self.mass[self.order[:self.ptr[meta["next"]]]].sum().item()
        if progress and lead:
            from tqdm import tqdm
            bar = tqdm(total=M, initial=self.ptr[meta["next"]], desc="sdot", unit="clip")
        for g in range(meta["next"], len(self.ids)):
            i, j = self.ptr[g], self.ptr[g + 1]
            own, b, y = self._targets(i, j, Ys)
            y, p = y.to(device or y.device), b.sum().item()
            s = fit(y, b / p, cfg, i, state, ranks, on_step)
            state = None
            self.h[own] = s.avg.float().cpu()
            if s.history:
                S, chi2, inner = s.history[-1]
                meta["chi2"] += p * chi2
                meta["gain"] += p * 2 * inner / base
                meta["samples"] += S
            meta["next"] = g + 1
            on_step(None)
            if bar is not None:
                solved += p
                show(j, rms(meta["chi2"] / solved))
        if bar is not None:
            bar.close()
        self.meta = meta
        if partial:
            keep(None)                              # until `save` has written all of it
        if cfg.precision == "bf16":                 # what the cheaper products change
            self.Y, self.h = Ys, self.h.to(Ys.device)
            x = noise((cfg.seed, 4), 1024, d, Ys.device)
            cond = self.draw_group(len(x), torch.Generator().manual_seed(cfg.seed))
            exact = self.couple(x, cond)
            meta["disagreement"] = (self._attach(Ys).couple(x, cond) != exact).float().mean().item()
        return self._attach(Ys)

    def _targets(self, i: int, j: int, Ys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the group i:j: positions of its distinct latents, their masses, the latents."""
        b = self.mass[self.order[i:j]]
        own = torch.arange(i, j)
        mine = self.copies[i:j] == own
        if mine.all():
            return own, b, Ys[i:j]
        b = torch.zeros_like(b).index_add_(0, self.copies[i:j] - i, b)
        return own[mine], b[mine], Ys[i:j][mine.to(Ys.device)]

    def _sorted(self, Y: Tensor) -> Tensor:
        """(M, d or pca) fp32 in sorted order; no copy where the data set has that order already."""
        if not torch.equal(self.order, torch.arange(len(Y))):
            Y = Y[self.order.to(Y.device)]
        return Y.float() if self.basis is None else Y.float() @ self.basis.to(Y.device)

    def _attach(self, Ys: Tensor) -> "Coupling":
        if self.cfg.precision == "bf16":     # centred in each group: shared offsets cost bits
            Ys = torch.cat([(Ys[i:j] - Ys[i:j].mean(0)).bfloat16()
                            for i, j in zip(self.ptr, self.ptr[1:])])
        self.Y, self.h = Ys, self.h.to(Ys.device)
        return self

    def attach(self, latents: Tensor) -> "Coupling":
        """Gives a loaded coupling its latents (M, ...); ValueError if it was solved for others."""
        Y = latents.flatten(1)
        if fingerprint(Y, self.groups, self.mass) != self.meta["fingerprint"]:
            raise ValueError(f"latents {tuple(latents.shape)}: not those that this coupling was "
                             f"solved for ({self.meta['M']} of {self.meta['d']} numbers)")
        return self._attach(self._sorted(Y))

    # -- use
    def couple(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The clip of each noise: x0 (B, ...), cond (B,) group ids -> (B,) int64 rows.

        Costs B N d multiply-adds, N the size of a group. ValueError for an id that has no clips.
        """
        if self.Y is None:
            raise ValueError("coupling: loaded without its latents; pass them to Coupling.load")
        x = self._project(x0)                                        # (B, d or pca)
        g = self._group_index(cond, len(x))                          # (B,) 0 .. G - 1
        rows = torch.argsort(g)
        which, counts = torch.unique_consecutive(g[rows], return_counts=True)
        at = torch.empty_like(g)                                     # (B,) sorted positions
        for u, r in zip(which.tolist(), rows.split(counts.tolist())):
            i, j = self.ptr[u], self.ptr[u + 1]
            if j > i + 1:
                own = x[r.to(x.device)].to(self.Y)                   # (b, d)
                at[r] = i + assign(own, self.Y[i:j], self.h[i:j], self.cfg.memory).cpu()
            else:
                at[r] = i
        if (self.count[at] > 1).any():
            # Any split of a shared cell is optimal: thin stripes along the first axis.
            stripe = x0.flatten(1)[:, 0].double().cpu() * 1e3
            at = self._twin(at, stripe - stripe.floor())
        return self.order[at].to(x0.device)

    def _twin(self, at: Tensor, u: Tensor) -> Tensor:
        """Of the copies that `at` (n,) stands for, the one in whose share u (n,), 0 to 1, falls."""
        first, last = self.first[at], self.first[at] + self.count[at] - 1
        low, high = self.heaped[first], self.heaped[last + 1]
        found = torch.searchsorted(self.heaped[1:], low + u * (high - low), right=True)
        return self.twins[torch.minimum(torch.maximum(found, first), last)]

    def _project(self, x0: Tensor) -> Tensor:
        x = x0.flatten(1).float()
        if x.shape[1] != self.meta["d"]:
            raise ValueError(f"x0 {tuple(x0.shape)}: a latent has {self.meta['d']} numbers")
        return x if self.basis is None else x @ self.basis.to(x.device)

    def _group_index(self, cond: Tensor | None, B: int) -> Tensor:
        if cond is None:
            if len(self.ids) > 1:
                raise ValueError(f"cond None: this coupling has {len(self.ids)} groups, say which")
            return torch.zeros(B, dtype=torch.int64)
        cond = torch.as_tensor(cond).cpu().long()
        if cond.shape != (B,):
            raise ValueError(f"cond {tuple(cond.shape)}: need one group for each of {B} noises")
        g = torch.searchsorted(self.ids, cond).clamp_max(len(self.ids) - 1)
        if (self.ids[g] != cond).any():
            raise ValueError(f"cond {cond[self.ids[g] != cond][0].item()}: a group without clips")
        return g

    def draw_group(self, B: int, generator: torch.Generator | None = None) -> Tensor:
        """(B,) int64 group ids by frequency. Draw them independently of the noise."""
        u = torch.rand(B, generator=generator, dtype=torch.float64)
        row = torch.searchsorted(self.mass.cumsum(0), u).clamp_max(len(self.mass) - 1)
        return self.groups[row]

    def pairs(self, epoch: int = 0, repeat: int = 1) -> tuple[Tensor, Tensor]:
        """An epoch for loaders that read clips in their own order: keys, rows (both (repeat M,)).

        Each clip comes exactly `repeat` times (by mass, if that is not uniform), rebalanced inside
        its group. `self.noise(keys)` draws the noise again: nothing but two integers a pair is kept
        [AF stage 2]. Rows come sorted by group; shuffle them. A group's surplus is seated at once,
        so memory and time grow with the square of its clips: 0.2 GiB and 2 s for 4000.
        """
        if self.Y is None:
            raise ValueError("coupling: loaded without its latents; pass them to Coupling.load")
        if repeat < 1:
            raise ValueError(f"repeat {repeat}: must be 1 or more")
        share = [self.mass[self.order[i:j]].sum().item() for i, j in zip(self.ptr, self.ptr[1:])]
        sizes = [max(1, round(repeat * len(self.mass) * p)) for p in share]
        keys, rows, used = [], [], epoch << 32                   # no two epochs share a key
        for i, j, n in zip(self.ptr, self.ptr[1:], sizes):
            own, b, y = self._targets(i, j, self.Y.float())
            key = torch.arange(used, used + n)
            used += n
            x = self._project(self.noise(key)).to(y.device)
            h, b = self.h[own.to(self.h.device)], (b / b.sum()).to(y.device)
            index = rebalance(x, assign(x, y, h, self.cfg.memory), y, h, b).cpu()
            at, perm = own[index].sort(stable=True)                  # copies take turns
            _, group, n_at = torch.unique_consecutive(at, return_inverse=True, return_counts=True)
            turn = torch.arange(n) - torch.searchsorted(at, at)
            keys.append(key[perm])
            rows.append(self.order[self._twin(at, (turn + 0.5) / n_at[group])])
        return torch.cat(keys), torch.cat(rows)

    def noise(self, keys: Tensor) -> Tensor:
        """(n, d): the noise of these keys of `pairs`, always drawn on the CPU."""
        d = self.meta["d"]
        return torch.cat([noise((self.cfg.seed, 3, k >> 32, k & 0xFFFFFFFF), 1, d)
                          for k in keys.tolist()])

    # -- know
    def expected_gain(self) -> float:
        """The share of the transport cost that the closed form promises, 0 to 1 (see `gain`)."""
        return self.meta["expected"]

    def report(self) -> str:
        m, sizes = self.meta, torch.tensor(self.ptr).diff()
        lines = [f"sdot: {m['M']} latents of {m['d']} numbers in {len(sizes)} groups of "
                 f"{sizes.min()} to {sizes.max()} (median {sizes.median()})",
                 f"sdot: mass error {rms(m['chi2']):.3f} rms after {m['samples']:.2g} noises; "
                 f"transport cost {100 * m['gain']:.1f} % below random pairing "
                 f"({100 * m['expected']:.1f} % expected from the closed form)"]
        if "disagreement" in m:
            lines.append(f"sdot: products in bf16 change {100 * m['disagreement']:.1f} % of pairs")
        if m["chi2"] > 2.25 * self.cfg.target ** 2:
            what = ("choose solver stream" if self.cfg.solver == "pot" else
                    "raise budget, or choose optimiser adam")
            lines.append(f"WARNING: the mass error missed its target of {self.cfg.target}: some "
                         f"clips are drawn too rarely; {what}")
        return "\n".join([*lines, *filter(None, [self._hopeless(m["expected"])])])

    def _hopeless(self, expected: float) -> str:
        """A warning where the closed form promises next to nothing, else an empty string."""
        if expected >= 0.02:
            return ""
        why = ("nearly every group is a single clip; use `cluster` on the caption embeddings"
               if len(self.mass) < 2 * len(self.ids) else "the gain falls as m(N) / sqrt(d)")
        return (f"WARNING: {100 * expected:.1f} % of the transport cost to gain here: {why}. "
                "`independent` will do as well")

    # -- keep
    def save(self, path: str | Path) -> None:
        """All but the latents, of which it keeps the fingerprint; written whole or not at all."""
        _write(Path(path), {"format": 1, "cfg": asdict(self.cfg), "groups": self.groups,
                            "mass": self.mass, "h": self.h.cpu(), "copies": self.copies,
                            "basis": self.basis, "meta": self.meta})
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, latents: Tensor | None = None) -> "Coupling":
        """A saved coupling, with its latents if it is to pair; ValueError, which names the file,
        for one that is damaged or was solved for other latents."""
        s = _read(Path(path))
        if not isinstance(s, dict) or s.get("format") != 1:
            raise ValueError(f"{path}: not a coupling of format 1")
        try:
            cfg = SDOTConfig(**s["cfg"])
            self = cls(cfg, *(s[k] for k in ("groups", "mass", "h", "copies", "basis", "meta")))
        except (KeyError, TypeError) as e:
            raise ValueError(f"{path}: not a coupling of this version ({e})") from e
        if latents is None:
            return self
        try:
            return self.attach(latents)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


CHECKPOINT_SECONDS = 30.0


def rms(chi2: float) -> float:
    """Root of an unbiased chi-square, which may be a little below 0 when there is no error left."""
    return math.sqrt(max(0.0, chi2))


def fingerprint(Y: Tensor, groups: Tensor, mass: Tensor) -> str:
    """sha256 of the latents (fp32, in order), groups and masses: what a coupling was solved for."""
    digest = hashlib.sha256(repr(tuple(Y.shape)).encode())
    for y in Y.split(4096):
        digest.update(y.float().cpu().contiguous().numpy())
    digest.update(groups.cpu().contiguous().numpy())
    digest.update(mass.double().cpu().contiguous().numpy())
    return digest.hexdigest()


def _copies(Y: Tensor, groups: Tensor, memory: int) -> Tensor:
    """(M,) sorted position -> that of the first clip of its group which is as good as the same.

    Nearer than 1e-3 of the group's spread (or fp32's resolution of Y): one clip encoded twice in
    two batches, say. No step size finds the wall between two such. Distances in 32 random
    directions will do, and cost no more than one noise a clip.
    """
    d, order = Y.shape[1], torch.argsort(groups, stable=True)
    P = noise((6,), d, 32, Y.device) / 32 ** 0.5 if d > 32 else torch.eye(d, device=Y.device)
    Z = torch.cat([y.float() @ P for y in Y.split(4096)])[order.to(Y.device)].double()
    first, i = torch.arange(len(Y)), 0
    for n in torch.unique(groups, return_counts=True)[1].tolist():
        z = Z[i:i + n] - Z[i:i + n].mean(0)
        size = z.square().sum(1)
        same = 1e-6 * size.mean() + 1e-12 * Z[i:i + n].square().sum(1).mean()
        rows = max(1, memory * 2 ** 17 // n)                     # of a block of distances, fp64
        for k in range(0, n, rows):
            apart = torch.addmm(size, z[k:k + rows], z.T, alpha=-2).add_(size[k:k + rows, None])
            apart.diagonal(k).zero_()
            first[i + k:i + k + len(apart)] = i + (apart <= same).byte().argmax(1).cpu()
        i += n
    return torch.where(first[first] == first, first, torch.arange(len(Y)))   # no chains of nearly


def _basis(Y: Tensor, groups: Tensor, k: int) -> Tensor:
    """(d, k) principal directions of what varies INSIDE groups: the rest cannot tell clips apart.

    x0 -> basis^T x0 is N(0, I_k), so cells solved there have the same masses; they only see less.
    """
    _, group = torch.unique(groups, return_inverse=True)
    group = group.to(Y.device)
    n = torch.bincount(group)[:, None]
    mean = torch.zeros(len(n), Y.shape[1], device=Y.device).index_add_(0, group, Y.float()) / n
    parts = lambda: ((y.float() - mean[g]) for y, g in zip(Y.split(4096), group.split(4096)))
    if Y.shape[1] <= LARGE:
        return torch.linalg.eigh(sum(y.T @ y for y in parts()).double())[1][:, -k:].float()
    # No d x d matrix: power iteration on a few vectors more than are wanted.
    Q = noise((5,), Y.shape[1], k + 16, Y.device)
    for _ in range(6):
        Q = torch.linalg.qr(sum(y.T @ (y @ Q) for y in parts()))[0]
    small = sum((y @ Q).T @ (y @ Q) for y in parts())                    # (k + 16, k + 16)
    return (Q @ torch.linalg.eigh(small.double())[1][:, -k:].float()).contiguous()


def _write(path: Path, data: dict) -> None:
    """Writes beside the file and renames: a full disk or a kill leaves the file that was there."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except RuntimeError as error:           # torch's zip writer, in the way of what the disk said
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temp.unlink(missing_ok=True)


def _read(path: Path) -> dict:
    """Tensors and plain values only: a file from a stranger cannot run code."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:
        raise ValueError(f"{path}: not a readable coupling ({type(e).__name__})") from e


def plan(M: int, d: int, target: float = 0.1, memory: int = 64) -> str:
    """What solving M latents of d numbers as one problem takes and brings, without solving it."""
    if M < 2 or d < 1:
        raise ValueError(f"plan {M} {d}: need 2 or more latents of 1 or more numbers")
    samples = 1.3 * M / target ** 2
    flops = 2 * samples * M * d * 1.1                                # a tenth for measuring
    gib = (4 * M * d + 2 ** 20 * memory + 4 * BLOCK * d + 10 * 8 * M) / 2 ** 30
    saves = 100 * min(1.0, expected_max(M)[0] / math.sqrt(d))        # unit latents: sigma^2 = d
    return (f"sdot: {M} latents of {d} numbers to {target} rms: {samples:.2g} noises, "
            f"{flops:.2g} FLOP ({flops / 60e9 / 3600:.2g} h on one core of 60 GFLOP/s, "
            f"{flops / 1e14 / 3600:.2g} h at 100 TFLOP/s), {gib:.2g} GiB, of which the latents "
            f"{4 * M * d / 2 ** 30:.2g}\n"
            f"sdot: pairing takes {2 * M * d:.2g} FLOP a noise; for unit latents it saves "
            f"{saves:.1f} % of the transport cost. Groups of n clips divide the work by M / n and "
            "replace M by n in the gain"
            + ("" if saves >= 2 else "\nWARNING: under 2 %: `independent` will do as well"))


# ---- 7. Demo -------------------------------------------------------------------------------------
def toy_latents(N: int, d: int, seed: int = 0) -> Tensor:
    """(N, d) of unit power, like latents: 20 clusters, power-law spectrum, varied contrast."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1) ** -0.5
    Y = torch.randn(20, d, generator=g)[torch.randint(20, (N,), generator=g)]
    Y = (Y + torch.randn(N, d, generator=g)) * spectrum
    Y = Y * (0.35 * torch.randn(N, 1, generator=g)).exp()
    Y = (Y - Y.mean(0)) @ torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    return Y / Y.square().mean().sqrt()


def mass_error(Y: Tensor, h: Tensor, per_target: int = 200, seed: int = 99) -> float:
    """rms relative error of the cell masses (uniform b), by noise that no solver has seen."""
    N, d = Y.shape
    counts = torch.zeros(N, dtype=torch.int64)
    for i in range(per_target * N // BLOCK + 1):
        counts += torch.bincount(assign(noise((seed, i), BLOCK, d), Y, h.float()), minlength=N)
    return rms(chi_square(counts, torch.full((N,), 1 / N, dtype=torch.float64)))


def convergence(Y: Tensor, seed: int) -> dict[str, list[tuple[float, float]]]:
    """method -> [(noises per target, rms mass error)], all at the same numbers of noises, in steps
    of one size. As published (steps of 32, amsgrad, three stages) they are in tests/bench_sdot.py.
    """
    from ot.semidiscrete import solve_semidiscrete
    N, d = Y.shape
    levels = (10, 30, 100, 200)

    def ours(**flags) -> list[tuple[float, float]]:
        cfg = SDOTConfig(target=levels[-1] ** -0.5, budget=1.0, batch=BLOCK, seed=seed, **flags)
        seen = []

        def on_step(s: State) -> None:
            if len(seen) < len(levels) and s.samples >= levels[len(seen)] * N:
                seen.append((s.samples / N, mass_error(Y, s.avg)))
        fit(Y, cfg=cfg, on_step=on_step)
        return seen

    def pot(**flags) -> list[tuple[float, float]]:
        out = []
        for level in levels:
            g = torch.Generator().manual_seed(seed)
            dual = solve_semidiscrete(Y, lambda n, g=g: torch.randn(n, d, generator=g),
                                      batch_size=BLOCK, max_iter=level * N // BLOCK, **flags)
            out.append((level, mass_error(Y, (dual - Y.square().sum(1)) / 2)))
        return out

    b = torch.full((N,), 1 / N, dtype=torch.float64)
    m, q = expected_max(N)
    sigma = spread(Y, b)
    unit = (sigma.mean() / m).item()                  # tau, in h; and g = 2 h + |y|^2
    warm = (-2 * q * sigma + Y.double().square().sum(1)).float()
    return {
        "this file": ours(optimiser="sgd"),
        "this file, adam": ours(optimiser="adam"),
        "POT tuned": pot(lr0=unit * N, init_potential=warm, decreasing_reg=False),
        "POT defaults": pot(),
        # [AF]'s ImageNet recipe in these flags: Adam at lr 10 in g, softmax at 0.01, EMA, g = 0
        "AlignFlow's recipe": ours(optimiser="adam", lr=5 / unit, decay=1.0, ema=0.99,
                                   temperature=0.005 / unit, start="voronoi"),
    }


def demo(out: str = "out/sdot", seed: int = 0) -> bool:
    """Cells in 2-D with their masses growing equal; convergence in 64 dimensions; the claims."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    # 2-D: four clumps, so that the first cells (nearest target) are far from equal
    N, g = 60, torch.Generator().manual_seed(5 + seed)
    Y = torch.tensor([[-1.5, -1.2], [1.6, -0.8], [0.8, 1.6], [-1.4, 1.3]])[torch.arange(N) % 4]
    Y = Y + torch.tensor([0.15, 0.3, 0.5, 0.8])[torch.arange(N) % 4, None] * torch.randn(
        N, 2, generator=g)
    frames: list[Tensor] = []
    cfg = SDOTConfig(optimiser="adam", target=0.04, start="voronoi", batch=BLOCK, seed=seed)
    wanted = {round(1.13 ** k) for k in range(200)}
    state = fit(Y, cfg=cfg, on_step=lambda s: s.steps in wanted and frames.append(s.h.float()))
    frames = [-Y.square().sum(1) / 2, *frames, state.avg.float()]
    masses = [torch.bincount(assign(noise((7, seed), 60000, 2), Y, h), minlength=N) / 60000 * N
              for h in frames]
    side = torch.linspace(-3.2, 3.2, 200)
    grid = torch.cartesian_prod(side, side).flip(1)                      # (40000, 2) as (x, y)
    colours = plt.get_cmap("turbo")(torch.rand(N, generator=g).numpy())

    def cells(ax, k):
        ax.clear()
        image = colours[assign(grid, Y, frames[k]).view(200, 200).numpy()]
        ax.imshow(image, origin="lower", extent=(-3.2, 3.2, -3.2, 3.2), alpha=0.75)
        ax.scatter(*Y.T, s=9, c="k")
        ax.set(xticks=[], yticks=[], title=f"cells of noise, rms mass error {spreads[k]:.2f}")

    def bars(ax, k):
        ax.clear()
        ax.bar(range(N), masses[k], color=colours)
        ax.axhline(1, c="k", lw=0.8)
        ax.set(ylim=(0, 3), xlabel="target", ylabel="mass of its cell x N")

    spreads = [(m - 1).square().mean().sqrt().item() for m in masses]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4))
    movie = FuncAnimation(fig, lambda k: (cells(left, k), bars(right, k)), frames=len(frames))
    movie.save(out / "cells.gif", PillowWriter(fps=8), dpi=70)
    plt.close(fig)

    Z = toy_latents(500, 64, seed)
    curves = convergence(Z, seed)
    fig, axes = plt.subplots(2, 2, figsize=(11, 9))
    cells(axes[0, 0], 0)
    cells(axes[0, 1], -1)
    bars(axes[1, 0], 0)
    axes[1, 0].step(range(N), masses[-1], where="mid", c="k", label="solved")
    axes[1, 0].legend()
    ax = axes[1, 1]
    for name, curve in curves.items():
        ax.loglog(*zip(*curve), marker="o", label=name)
    x = torch.tensor([10.0, 200.0])
    ax.loglog(x, x ** -0.5, "k--", label="sqrt(N / S)")
    ax.set(xlabel="noises per target, S / N", ylabel="rms mass error", title="500 targets, d = 64")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "sdot.png", dpi=110)
    plt.close(fig)

    for name, curve in curves.items():
        print(f"{name:20s}" + "".join(f"  S = {x:3.0f} N: {y:.3f}" for x, y in curve))
    c = Coupling.fit(Z, torch.arange(500) % 5, seed=seed)
    print(c.report())
    S, error = curves["this file"][-1]
    ratio, gained = curves["POT defaults"][-1][1] / error, c.meta["gain"] / c.expected_gain()
    ok = True
    for claim, value, sign, bound in (
            ("rms mass error of 60 cells in 2-D", spreads[-1], "<", 0.08),
            (f"rms mass error, N 500, d 64, S = {S:.0f} N", error, "<", 1.25 * S ** -0.5),
            ("POT defaults' error over ours", ratio, ">", 5.0),
            ("measured over expected gain in groups of 100", gained, ">", 0.7)):
        good = value < bound if sign == "<" else value > bound
        ok &= good
        print(f"{'PASS' if good else 'FAIL'} {claim}: {value:.4g} vs {sign} {bound:.4g}")
    print(f"figures: {out / 'sdot.png'}, {out / 'cells.gif'}")
    return ok


# ---- 8. Study: what a coupling is worth to the toy -----------------------------------------------
# Four couplings, and diffusion, on the same latents for the same steps, sampled in 1 to 50 steps.
STEPS = (1, 2, 4, 8, 10, 16, 30, 50)


def energy_distance(a: Tensor, b: Tensor, paired: bool = False) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets (n, d), (m, d): 0 only for the same law.
    paired: rows i of both have a caption in common, which draws them together: left out."""
    n, m = len(a), len(b)
    within = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    across = torch.cdist(a, b)
    own = across.diagonal().sum() if paired else 0
    return (2 * (across.sum() - own) / (n * m - (n if paired else 0)) - within).item()


def sweep(folder: Path, clips: int = 64) -> list[dict]:
    """One run of train.py sampled on the captions of held-out clips, without guidance (whose bent
    paths would hide the coupling's), by number of steps, and without a coupling by schedule: the
    share of clips in which all that the caption says is right, the energy distance of their latents
    to the real ones, and the curvature of the paths. Kept in folder/sweep.json."""
    import json

    import train
    path = folder / "sweep.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    run = train.load_run(folder)
    source = train.clips_of(run.cfg)
    x, captions = zip(*(source.clip("heldout", i) for i in range(clips)))
    rows = []
    with torch.no_grad():
        real = run.tae.normalize(run.tae.encode(torch.stack(x)).mean).flatten(1)
        P, mask, _, _ = run.prompts(list(captions))
        v_fn, x0 = lambda x, t: run.dit(x, t, P, mask), run.noise(list(range(clips)))
        bent = float("nan")
        if run.cfg.flow.objective == "flow":
            bent = train.flow.straightness(v_fn, x0, run.schedule(16))["curvature"]
        plain = run.cfg.coupling == "independent" and run.cfg.flow.objective == "flow"
        for name in ("shifted", "linear", "linear_quadratic") if plain else ("shifted",):
            for steps in STEPS:
                z = train.flow.sample(v_fn, x0, run.schedule(steps, name), cfg=run.cfg.flow)
                seen = [train.judge(clip, c) for clip, c in zip(run.decode(z), captions)]
                rows.append({"schedule": name, "steps": steps, "curvature": bent,
                             "right": sum(all(v.values()) for v in seen) / clips,
                             "energy": energy_distance(z.flatten(1), real, paired=True)})
    train.write_json(path, rows)
    return rows


def study(base: Path, out: Path, steps: int, seeds: int = 3) -> None:
    """Train the variants on the latents of the run `base`, sweep the sampling steps of each; tables
    and out/steps.png (accuracy and distribution error by steps, mean and spread over seeds)."""
    import multiprocessing

    import matplotlib

    import train
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    common = {"train_dit.steps": steps}
    variants = {c: {"coupling": c, **common} for c in train.COUPLINGS}
    # All clips in one problem: 1.3 N / target^2 noises against N latents of 2048 numbers would take
    # longer than the training. 64 principal directions and half the precision: 8 minutes of a core.
    variants["sdot-global"] |= {"sdot.pca": 64, "sdot.target": 0.2}
    variants["diffusion"] = {"flow.objective": "diffusion", "flow.shift": 1.0, **common}
    runs = train.compare(base, out, variants, seeds)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        swept = pool.map(sweep, [Path(run["folder"]) for run in runs], chunksize=1)
    of = {v: [s for run, s in zip(runs, swept) if run["variant"] == v] for v in variants}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    shown = [(v, "shifted") for v in variants] + [("independent", "linear"),
                                                  ("independent", "linear_quadratic")]
    print(f"\n{'right, by steps':34}" + "".join(f"{n:>12}" for n in STEPS))
    for i, (v, schedule) in enumerate(shown):
        rows = [[r for r in one if r["schedule"] == schedule] for one in of[v]]
        label = f"{v}, {schedule}"
        for ax, key in zip(axes, ("right", "energy")):
            values = torch.tensor([[r[key] for r in run] for run in rows])      # (seeds, STEPS)
            mean, spread = values.mean(0), values.std(0, correction=seeds > 1)
            ax.errorbar(STEPS, mean, spread, fmt="o-" if i < len(variants) else "s--",
                        color=f"C{i}", capsize=2, lw=1, ms=3, label=label)
            if key == "right":
                print(f"{label:34}" + "".join(f"{f'{a:.2f}+-{b:.2f}':>12}"
                                              for a, b in zip(mean.tolist(), spread.tolist())))
    for ax, title in zip(axes, ("all that the caption says is right", "energy distance")):
        ax.set(xscale="log", xlabel="sampling steps", title=title)
        ax.set_xticks(STEPS, STEPS)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out / "steps.png", dpi=130)
    for v in variants:
        bent = [one[0]["curvature"] for one in of[v]]
        print(f"curvature of the sampled paths, {v}: {sum(bent) / seeds:.4f}")
    print(f"wrote {out / 'steps.png'}")


# ---- 9. Main -------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """One line for a wrong argument, and exit status 2."""

    def error(self, message: str):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """The command line."""
    parser = Parser(allow_abbrev=False, description="Demo, or a plan for a data set (--plan).")
    parser.add_argument("--out", default="out/sdot", help="folder of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", type=int, nargs=2, metavar=("M", "D"),
                        help="time, memory and gain for M latents of D numbers, and stop")
    parser.add_argument("--study", metavar="RUN", type=Path,
                        help="compare couplings on a finished toy run: about an hour")
    parser.add_argument("--steps", type=int, default=400, help="study: training steps of each run")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be 1 or more")
    if args.study:
        try:
            import train
        except ModuleNotFoundError as e:
            parser.error(f"--study {args.study}: needs the other files of the repository ({e})")
        try:
            return study(args.study, Path(args.out), args.steps)
        except train.UserError as e:
            parser.error(str(e))
    try:
        if args.plan:
            print(plan(*args.plan))
            return
        ok = demo(args.out, args.seed)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
