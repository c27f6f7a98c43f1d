"""Question: how much faster do two ranks sample than one process, by parallel mode and by the speed
of the link between them?

Run:    python studies/bench_parallel.py --links none 1gbit 100mbit
Time:   10 minutes on 2 cores; `--links` needs root and Linux, without it 4 minutes
Answer: with 784 tokens CFG-parallel and PipeFusion gain on every link, Ring and Ulysses on a fast
        one only; with 128 tokens CFG-parallel alone gains on every link.

Each mode samples the same clips in turn, one thread a rank; medians of each round's ratios. A
link is two network namespaces joined by a veth pair with a token bucket (tbf); where that is not
possible the script says so and goes on without. Model: that of a run (a folder as argument), else
one with D 192, 6 heads, 8 layers, 784 tokens and random weights; --clips at a time (1). Guided, 8
Euler steps, fp32. `ideal`: a link that takes no time; a pipeline still has to be filled. `two
copies`: the work a second of two independent processes over that of one; below 2, the cores share
something, and no mode can be expected to reach its ideal. Also measures `ParallelSampler` on one
rank over a loop written by hand.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import common
import torch
import torch.distributed as dist

import dit
import sample_parallel as sp
import train
import world

STEPS, GUIDANCE = 8, 3.0
MODES = {"CFG": {"cfg": 2}, "Ring": {"ring": 2}, "Ulysses": {"ulysses": 2},
         "PipeFusion M 2": {"pp": 2, "patches": 2}, "PipeFusion M 4": {"pp": 2, "patches": 4},
         "PipeFusion M 8": {"pp": 2, "patches": 8}}
COPIES = "two copies"
SPACES = ("filmstrip-a", "filmstrip-b")
ADDRESS = ("10.77.0.1", "10.77.0.2")


@torch.no_grad()
def case(run, clips):
    """The model, and x0, text, mask, null, null_mask as `ParallelSampler.sample` takes them: the
    same on every rank."""
    torch.manual_seed(0)
    if not run:
        model = dit.DiT(dit.DiTConfig((dit.Stream(4, (1, 2, 2), (4, 28, 28)),), 192, 8, 6)).eval()
        for w in model.parameters():
            w.add_(torch.randn_like(w), alpha=0.02)
        x0, text, null = (torch.randn(clips, 4, 4, 28, 28), torch.randn(clips, 16, 192),
                          torch.randn(1, 1, 192).expand(1, 16, 192))
        return model, (x0, text, None, null, None)
    loaded = train.load_run(run)
    c = loaded.cfg.clips
    prompts = [p for _, p in world.test_prompts(0, clips, c.things, c.frames, c.script)][:clips]
    return loaded.dit, (loaded.noise(range(clips)), *loaded.prompts(prompts))


@torch.no_grad()
def by_hand(model, x0, text, mask, null, null_mask):
    """What one process does: both branches of guidance in one batch, Euler."""
    (both, masks), x = sp.both_branches(len(x0), text, mask, null, null_mask), x0
    for i in range(STEPS):
        v, v0 = model(torch.cat([x, x]), torch.full((len(both),), i / STEPS), both, masks).chunk(2)
        x = x + (v0 + GUIDANCE * (v - v0)) / STEPS
    return x


def rank_main(rank, address, port, args):
    """One of two ranks; rank 0 prints a JSON object: mode -> its seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2,
                            timeout=timedelta(minutes=5))
    model, inputs = case(args.run, args.clips)
    samplers = {}
    for name, flags in MODES.items():
        flags = dict(flags)
        patches = flags.pop("patches", 0)
        samplers[name] = sp.ParallelSampler(model, sp.make_mesh(**flags), patches=patches)
    seconds = {name: [] for name in ("one process", COPIES, *MODES)}
    reference = by_hand(model, *inputs)
    for turn in range(args.rounds + 1):                         # the first warms up
        for name in seconds:
            dist.barrier()
            began = time.perf_counter()
            if name in MODES:
                x1 = samplers[name].sample(*inputs, GUIDANCE, STEPS)
                if not name.startswith("Pipe"):
                    assert sp.difference(x1, reference) < 1e-4
            elif rank == 0 or name == COPIES:   # with one process the other rank waits, idle
                by_hand(model, *inputs)
            if name == COPIES:
                dist.barrier()                                  # until the slower one is done
            if turn:
                seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        print(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def overhead(args):
    """ParallelSampler on one rank over the loop by hand: the median ratio."""
    model, inputs = case(args.run, args.clips)
    sampler, ratios = sp.ParallelSampler(model), []
    for turn in range(args.rounds + 1):
        began = time.perf_counter()
        by_hand(model, *inputs)
        between = time.perf_counter()
        sampler.sample(*inputs, GUIDANCE, STEPS)
        if turn:
            ratios.append((time.perf_counter() - between) / (between - began))
    return statistics.median(ratios)


def sh(command):
    subprocess.run(command.split(), check=True, capture_output=True)


def link(rate):
    """Two namespaces with a link of this rate between them; "none" is without a limit."""
    unlink()
    for space in SPACES:
        sh(f"ip netns add {space}")
    sh(f"ip link add fs0 netns {SPACES[0]} type veth peer name fs1 netns {SPACES[1]}")
    for i, space in enumerate(SPACES):
        sh(f"ip -n {space} addr add {ADDRESS[i]}/24 dev fs{i}")
        sh(f"ip -n {space} link set fs{i} up")
        sh(f"ip -n {space} link set lo up")
        if rate != "none":
            sh(f"ip netns exec {space} tc qdisc add dev fs{i} root tbf rate {rate} burst 64kb "
               "latency 400ms")


def unlink():
    for space in SPACES if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


def two_ranks(args, apart):
    """Both ranks of `rank_main`, each in its namespace or both on this host -> seconds by mode."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = ADDRESS[0] if apart else "127.0.0.1"
    ranks = []
    for rank in range(2):
        inside = ["ip", "netns", "exec", SPACES[rank]] if apart else []
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | (
            {"GLOO_SOCKET_IFNAME": f"fs{rank}"} if apart else {})
        ranks.append(subprocess.Popen(
            [*inside, sys.executable, __file__, args.run, "--clips", str(args.clips), "--rank",
             str(rank), address, str(port), "--rounds", str(args.rounds)],
            stdout=subprocess.PIPE, text=True, env=env))
    out = [r.communicate()[0] for r in ranks]
    if any(r.returncode for r in ranks):
        raise SystemExit("bench_parallel.py: a rank failed, see above")
    return json.loads(out[0].splitlines()[-1])


def ideal(name):
    """The speed-up on a link that takes no time, in whole steps of one process: a pipeline of two
    does one step as a warm-up, then M micro-steps a step of 1/2M each, and one more to fill."""
    M = MODES[name].get("patches")
    return 2.0 if M is None else STEPS / (1 + ((STEPS - 1) * M + 1) / (2 * M))


def draw(found, ideals, path):
    """Bars of the speed-ups, by mode and link, with the ideal as a line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(8, 3.4))
    width = 0.8 / len(found)
    for i, (rate, speedups) in enumerate(found.items()):
        label = "no limit" if rate == "none" else rate.replace("gbit", " Gbit/s").replace(
            "mbit", " Mbit/s")
        ax.bar([j + i * width for j in range(len(MODES))], [speedups[n] for n in MODES], width,
               label=label)
    for j, name in enumerate(MODES):
        ax.hlines(ideals[name], j - width / 2, j + 0.8 - width / 2, color="k", lw=1,
                  label="ideal" if j == 0 else None)
    ax.axhline(1, color="gray", lw=0.8, ls=":")
    ax.axhline(statistics.median(f[COPIES] for f in found.values()), color="C3", lw=1, ls="--",
               label="two copies at once")
    ax.set_xticks([j + 0.4 - width / 2 for j in range(len(MODES))], list(MODES), fontsize=8)
    ax.set(ylabel="speed-up on 2 ranks", ylim=(0, 2.1))
    ax.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """The command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("run", nargs="?", default="", help="a finished run")
    parser.add_argument("--clips", type=common.whole, default=1, help="at a time")
    parser.add_argument("--rounds", type=common.whole, default=5)
    parser.add_argument("--links", nargs="+", default=["none"], metavar="RATE",
                        help="none, or a rate that tc knows: 1gbit, 100mbit")
    parser.add_argument("--rank", nargs=3, metavar=("RANK", "ADDRESS", "PORT"), help="internal")
    args = parser.parse_args()
    if args.rank:
        return rank_main(int(args.rank[0]), args.rank[1], args.rank[2], args)
    torch.set_num_threads(1)
    folder = Path("out/studies/bench_parallel")
    folder.mkdir(parents=True, exist_ok=True)
    ideals = {name: ideal(name) for name in MODES}
    found, raw = {}, {}
    for rate in args.links:
        apart = args.links != ["none"]
        if apart:
            try:
                link(rate)
            except (OSError, subprocess.CalledProcessError) as e:
                why = (getattr(e, "stderr", None) or str(e).encode()).decode().strip()
                print(f"link {rate}: no such namespaces or rate here ({why})")
                if rate != "none":
                    continue
                apart = False
        try:
            raw[rate] = two_ranks(args, apart)
        finally:
            unlink()
        ones = raw[rate]["one process"]
        found[rate] = {n: statistics.median(a / b for a, b in zip(ones, raw[rate][n]))
                       for n in (COPIES, *MODES)}
        found[rate][COPIES] *= 2
        print(f"link {rate}: one process {statistics.median(ones):.2f} s, two copies at once "
              f"{found[rate][COPIES]:.2f} times as much work a second", flush=True)
        for n in MODES:
            print(f"| {n} | {rate} | {found[rate][n]:.2f} | ideal {ideals[n]:.2f} |", flush=True)
    ratio = overhead(args)
    print(f"ParallelSampler on one rank: {ratio:.3f} times the loop by hand")
    (folder / "bench.json").write_text(json.dumps(
        {"ideal": ideals, "speedup": found, "seconds": raw, "overhead": ratio}, indent=1))
    if found:
        draw(found, ideals, folder / "bench.png")
        print(f"wrote {folder / 'bench.json'}, {folder / 'bench.png'}")


if __name__ == "__main__":
    main()
