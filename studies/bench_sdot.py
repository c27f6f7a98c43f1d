"""Question: how fast is the semi-discrete solver beside POT's `ot.semidiscrete` and AlignFlow's
recipe, in CPU seconds to a given rms mass error? And what do pairing and memory cost?

Run:    OMP_NUM_THREADS=1 python studies/bench_sdot.py
        python studies/bench_sdot.py --problems 20000x1024    # 7 hours; see studies/README.md
Time:   5 minutes on 2 cores, for 2000 latents of 64 numbers
Answer: at 2000 x 64 1.8 to 2.8 times as fast as POT with our start and step, at least 10 times
        as POT's defaults; pairing costs little more than its matrix product.

`solve`: a rival has no stopping rule, so it is run for `--levels` 1, 1.3, 2 and 4 times 1 / error^2
noises for each target, each time from its start; only the first run that
reaches the target counts, and the mass error is measured off the clock, by noise that no solver has
seen. A run is cut short at `--patience` times our time. `couple`: seconds of the pairing over those
of the bare matrix product. `memory`: the largest resident set of a process that solves a few steps
and pairs a batch at N = 10^5, d = 1024, less the imports (the data set itself is 0.38 GiB).
`step`: the share of a training step of `train.py --scale small` that pairing takes, with 10,000
clips, 64 to a caption. Each part adds its figures to out/studies/bench_sdot.json when it is done.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common
import torch
from ot.semidiscrete import solve_semidiscrete

import sdot


class Late(Exception):
    """A run took longer than it was given."""


def clocked(draw, limit):
    """`draw`, which raises Late after `limit` seconds: POT offers no other way to stop."""
    began = time.process_time()

    def sampler(n):
        if time.process_time() - began > limit:
            raise Late
        return draw(n)
    return sampler


def pot(Y, level, limit, tuned):
    """Dual weights by POT after level * N noises; by default it takes 32 at a time."""
    N, d = Y.shape
    g = torch.Generator().manual_seed(0)
    draw = clocked(lambda n: torch.randn(n, d, generator=g), limit)
    if not tuned:
        dual = solve_semidiscrete(Y, draw, max_iter=level * N // 32)
        return (dual - Y.square().sum(1)) / 2
    b = torch.full((N,), 1 / N, dtype=torch.float64)
    sigma, (m, q), batch = sdot.score_std(Y, b), sdot.expected_max(N), max(512, N // 4)
    start = (-2 * q * sigma + Y.double().square().sum(1)).float()
    dual = solve_semidiscrete(Y, draw, max_iter=level * N // batch, batch_size=batch,
                              lr0=(sigma.mean() / m).item() * N, init_potential=start,
                              decreasing_reg=False)
    return (dual - Y.square().sum(1)) / 2


def alignflow(Y, level, limit):
    """[AF]'s CIFAR-10 recipe, shortened in proportion to level * N noises: Adam with amsgrad on the
    dual g from 0, three stages of (lr, share of the noises, batch, temperature, EMA), each from the
    average that the one before has left."""
    N, d = Y.shape
    gen = torch.Generator().manual_seed(0)
    draw = clocked(lambda n: torch.randn(n, d, generator=gen), limit)
    square, mean = Y.square().sum(1), torch.zeros(N)
    for lr, share, batch, eps, ema in ((10.0, 0.01, 1024, 1.0, 0.99),
                                       (0.1, 0.198, 4096, 1.0, 0.999),
                                       (0.1, 0.792, 16384, 0.01, 0.999)):
        g = mean.clone().requires_grad_()
        opt = torch.optim.Adam([g], lr, amsgrad=True)
        batch = min(batch, max(32, int(share * level * N / 50)))        # at least 50 steps a stage
        for _ in range(max(1, int(share * level * N / batch))):
            mass = torch.zeros(N)
            for x in draw(batch).split(512):
                cost = (x.square().sum(1)[:, None] - 2 * x @ Y.T + square).clamp_min(0)
                mass += ((g.detach() - cost) / eps).softmax(1).sum(0)
            g.grad = mass / batch - 1 / N
            opt.step()
            mean = ema * mean + (1 - ema) * g.detach()
    return (mean - square) / 2


METHODS = {"tuned": lambda *a: pot(*a, tuned=True), "alignflow": alignflow,
           "defaults": lambda *a: pot(*a, tuned=False)}                     # POT's, [AF]'s, POT's


def solve(N, d, target, patience, per_target, methods, levels):
    """Rows of CPU seconds, noises a target, mass error, printed as they come: ours, the rivals."""
    Y, rows = sdot.toy_latents(N, d), []
    print(f"N {N}, d {d}, to an rms mass error of {target:g}\n"
          "| solver | noises a target | CPU seconds | over ours | mass error |\n"
          "|---|---|---|---|---|", flush=True)

    def add(method, noises, seconds, h):
        error = None if h is None else sdot.mass_error(Y, h, per_target)
        reached = error is not None and error <= 1.05 * target
        rows.append({"N": N, "d": d, "method": method, "noises": noises, "seconds": seconds,
                     "error": error, "reached": reached})
        print(f"| {method} | {noises:.0f} | {seconds:.1f} | {seconds / rows[0]['seconds']:.1f} | "
              f"{'not finished' if h is None else f'{error:.3f}'} |", flush=True)
        return reached

    began = time.process_time()
    solved = sdot.solve(Y, cfg=sdot.SDOTConfig(target=target))
    ours = time.process_time() - began
    add("sdot.solve", solved.samples / N, ours, solved.h)
    for name in methods:
        for level in (round(k / target ** 2) for k in levels):
            began = time.process_time()
            try:
                h = METHODS[name](Y, level, patience * ours)
            except Late:
                add(name, level, patience * ours, None)
                break
            if add(name, level, time.process_time() - began, h):
                break
    return rows


def couple(N=20000, d=1024, B=1024, repeats=7):
    """Pairing B noises within one group of N over the bare product, in turn."""
    c = sdot.Coupling.fit(sdot.toy_latents(N, d), budget=0.01)
    x, seconds = torch.randn(B, d), {"couple": [], "product": []}
    for i in range(repeats + 1):
        for name, call in (("couple", lambda: c.couple(x)), ("product", lambda: x @ c.Y.T)):
            began = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values()))
    print(f"couple: {B} noises, N {N}, d {d}: {ratio:.2f} times the bare matrix product")
    return {"N": N, "d": d, "B": B, "ratio": ratio, **seconds}


def memory(N=100_000, d=1024):
    """Resident set of a fresh process less its imports, in GiB."""
    code = ("import sys, torch; sys.path.insert(0, 'studies'); import common, sdot\n"
            f"x, before = torch.randn(8, 8), common.peak_memory()\nN, d = {N}, {d}\n"
            "Y = torch.randn(N, d, generator=torch.Generator().manual_seed(0))\n"
            "c = sdot.Coupling.fit(Y, target=1.0, budget=0.1)\n"
            "c.couple(torch.randn(1024, d))\nprint((common.peak_memory() - before) / 1024)")
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent)
    print(f"memory: N {N}, d {d}: {float(out.stdout):.2f} GiB at most")
    return {"N": N, "d": d, "gib": float(out.stdout)}


def step(M=10_000, group=64, repeats=3):
    """The share of one training step of the small preset that drawing and pairing take."""
    import dit
    import train
    cfg, batch = train.finish(train.SCALES["small"]()), 16
    s = cfg.dit.streams[0]
    z = torch.randn(M, s.numel)
    c = sdot.Coupling.fit(z, torch.arange(M) // group, budget=0.01)
    model = dit.DiT(cfg.dit)
    opt = torch.optim.AdamW(model.parameters())
    text = torch.randn(batch, 32, cfg.dit.text_width)
    seconds: dict[str, list[float]] = {"pairing": [], "step": []}
    for i in range(repeats + 1):
        x0 = torch.randn(batch, s.numel)
        began = time.perf_counter()
        rows = c.couple(x0, c.draw_group(batch))
        paired = time.perf_counter()
        shape = (batch, s.channels, *s.size)
        x1, t = z[rows].view(shape), torch.rand(batch)
        x_t = x0.view(shape) + t.view(-1, 1, 1, 1, 1) * (x1 - x0.view(shape))
        (model(x_t, t, text) - (x1 - x0.view(shape))).square().mean().backward()
        opt.step(); opt.zero_grad()
        if i:
            seconds["pairing"].append(paired - began)
            seconds["step"].append(time.perf_counter() - began)
    share = statistics.median(a / b for a, b in zip(*seconds.values()))
    print(f"step: pairing takes {100 * share:.2f} % of a step of small, batch {batch}")
    return {"share": share, **seconds}


def problem(text):
    """The type of a flag that takes NxD."""
    N, d = text.split("x")
    return common.whole(N), common.whole(d)


def main():
    """The command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("--problems", nargs="+", type=problem, default=[(2000, 64)], metavar="NxD")
    parser.add_argument("--target", type=common.positive, default=0.1)
    parser.add_argument("--patience", type=common.positive, default=12.0)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS),
                        help="rivals: POT with our start and step, AlignFlow's recipe, POT")
    parser.add_argument("--levels", nargs="+", type=common.positive, default=[1, 1.3, 2, 4])
    parser.add_argument("--per-target", type=common.whole, default=400,
                        help="noises of the measurement")
    parser.add_argument("--only", nargs="+", choices=("solve", "couple", "memory", "step"),
                        default=("solve", "couple", "memory", "step"))
    args = parser.parse_args()
    path = Path("out/studies/bench_sdot.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, seed 0")
    how = args.target, args.patience, args.per_target, args.methods, args.levels
    parts = {f"solve {N}x{d}": lambda N=N, d=d: solve(N, d, *how) for N, d in args.problems}
    parts |= {"couple": couple, "memory": memory, "step": step}
    for name, part in parts.items():
        if name.split()[0] in args.only:
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(found | {name: part()}, indent=1))


if __name__ == "__main__":
    main()
