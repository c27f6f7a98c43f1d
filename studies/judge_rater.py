"""Question: by the net win rate of versus.py, with the toy's judge as the rater: is flow matching
better than diffusion, and the whole training than half of it? How many prompts and trainings does
it take to decide a difference of five points?

Run:    python studies/judge_rater.py runs/toy
Time:   75 minutes on 2 cores, after `python train.py --scale toy`; continues where it was stopped
Answer: flow matching by 6.5 +- 2.0 points, the whole training by 25.5 +- 4.0. Two trainings of one
        arm differ by up to 3.3. Five points take three trainings of each arm and 72 to 320 prompts
        if measured, five and 110 to 650 if they are the truth.

Each arm is trained with five seeds, on the autoencoder and the latents of the run, and makes clips
of the same prompts from the same noise. Training k of one arm meets training k of the other: of two
clips, the one in which the judge finds more of what was asked for wins; equal is a tie. This is
counted for all that a prompt says, and for each verdict alone. In "another seed" training k meets
training k + 1 of the same arm: what training with another seed changes.

A vote is a mean plus effects of its prompt, its pair and a rest, of variances P, T and E, which a
two-way analysis of variance separates. So for n
prompts and K trainings of each arm

    variance of the net win rate = P / n + T / K + E / (n K)

and a measured difference d is decided (95 %) if it is more than 1.96 standard deviations:

    n > (P + E / K) / ((d / 1.96)^2 - T / K),   and K > T (1.96 / d)^2, or no n is enough

A true difference d measures less than d half of the time; to decide it in four studies of five,
1.96 + 0.84 takes the place of 1.96. Both are printed as if P, T and E were known; with T
estimated from few trainings n is larger. Prompt i has the same noise in all trainings, so P is
of prompts and noises; T is of trainings of the DiT on one autoencoder.

An interval over prompts alone, as one has with one training of each arm, leaves T out. The interval
over prompts and trainings has Student's t in place of 1.96, since five pairs estimate T poorly
(Satterthwaite's formula); for the same reason the number of prompts is given at both ends of an 80
% interval of T, too. Training k of every arm has the same seed: first weights, order of the clips,
noise. Guidance and steps are the toy's, chosen for flow matching.
"""
import math
from concurrent.futures import ThreadPoolExecutor

import common
import torch
from scipy import stats
from tqdm import tqdm
from versus import agreement, bootstrap, half_width, net_win_rate, sign_test

import train
import world

AXES = ("all", "color", "shape", "direction", "speed", "text")
PAIRS = {"flow matching against diffusion": ("flow", "diffusion"),
         "all steps against half": ("flow", "half"), "another seed": ("flow", "flow")}
TRAININGS = (1, 2, 3, 5, 10)                            # of each arm, for five points
# [MG table 8]: net win rate and sigma of the raters; 381 prompts, three raters, one training an arm
MOVIE_GEN = {"quality": (16.53, 5.07), "alignment": (7.08, 3.74)}


# ---- 1. Votes ------------------------------------------------------------------------------------

def vote(a, b, axis):
    """Compare the judge's verdicts on two clips of a prompt: 1 if A has more of what was asked."""
    score = lambda verdicts: sum(verdicts.values()) if axis == "all" else verdicts[axis]
    return (score(a) > score(b)) - (score(a) < score(b))


def votes(a, b, axis):
    """Pair the trainings of two arms, a list of verdicts each; those of one arm with each other's
    next -> (n, K) votes on the prompts that have this axis."""
    pairs = list(zip(a, a[1:] + a[:1] * (len(a) > 2) if a is b else b))
    return torch.tensor([[vote(va[i], vb[i], axis) for va, vb in pairs] for i in range(len(a[0]))
                         if axis == "all" or axis in a[0][i]]).double()


# ---- 2. Variances --------------------------------------------------------------------------------

def mean_squares(y):
    """Analyse the variance of y (n, K), one vote a cell -> the mean squares of prompts, of pairs
    and of the rest, and their degrees of freedom."""
    n, K = y.shape
    rows, columns = y.mean(1), y.mean(0)
    rest = (y - rows[:, None] - columns + y.mean()).square().sum() / ((n - 1) * (K - 1))
    return ((K * rows.var().item(), n * columns.var().item(), rest.item()),
            (n - 1, K - 1, (n - 1) * (K - 1)))


def variances(y, against_itself=False):
    """Split the variance of votes (n, K) -> P of prompts, T of trainings, E of the rest. Of an arm
    against itself every mean is known to be 0."""
    n, K = y.shape
    if against_itself:
        E = y.square().mean().item()
        return 0.0, max(0.0, y.mean(0).square().mean().item() - E / n), E
    (prompts, pairs, rest), _ = mean_squares(y)
    return max(0.0, prompts - rest) / K, max(0.0, pairs - rest) / n, rest


def margin(y):
    """Compute the half of a 95 % interval of the mean of y (n, K) over prompts and trainings."""
    squares, freedom = mean_squares(y)
    a, b = (float(square > squares[2]) for square in squares[:2])
    parts = [c * square / y.numel() for c, square in zip((a, b, 1 - a - b), squares)]
    if not sum(parts):                                  # all votes are alike
        return 0.0
    freedom = sum(parts) ** 2 / sum(p**2 / f for p, f in zip(parts, freedom))
    return stats.t.ppf(0.975, freedom).item() * math.sqrt(sum(parts))


def bounds_of_trainings(y):
    """Bound T of votes (n, K), which few trainings tell badly: an 80 % interval -> (low, high)."""
    n, K = y.shape
    (_, pairs, rest), _ = mean_squares(y)
    return [max(0.0, pairs * (K - 1) / stats.chi2.ppf(share, K - 1).item() - rest) / n
            for share in (0.9, 0.1)]


def prompts_needed(P, T, E, K, points=5, deviations=1.96):
    """Compute how many prompts decide a difference with K trainings of each arm; inf: none do.

    deviations: 1.96, or 2.8 to decide a true difference in four studies of five."""
    room = (points / 100 / deviations) ** 2 - T / K
    return math.ceil((P + E / K) / room) if room > 0 else math.inf


# ---- 3. Trainings --------------------------------------------------------------------------------

@torch.no_grad()
def verdicts(base, folder, prompts, flags):
    """Train a model, and judge its clips of the prompts -> their verdicts, kept in its folder."""
    kept = folder / f"verdicts-{len(prompts)}.json"
    if not kept.exists():
        common.train(folder, {"base": base, "coupling": "independent", "stage": "dit", **flags},
                     "model.safetensors")
        run = train.load_run(folder, "cuda" if torch.cuda.is_available() else "cpu")
        clips = common.sampled(run, prompts)
        train.write_json(kept, [world.judge(clip, p) for clip, p in zip(clips, prompts)])
    return train.read_json(kept)


# ---- 4. Table and figure -------------------------------------------------------------------------

def row_of(name, axis, y):
    """Count the votes (n, K) of one comparison -> a row of the table. An arm against itself wins as
    often as it loses, if all pairs are taken together: there the intervals are of one pair, around
    0, by prompts alone and by what the trainings add."""
    prompts, itself = y.int().tolist(), len(set(PAIRS[name])) == 1
    flat, alike = sum(prompts, []), agreement(prompts)
    most = [(of > 0) - (of < 0) for of in map(sum, prompts)]
    wins, ties, losses = (flat.count(v) for v in (1, 0, -1))
    P, T, E = variances(y, itself)
    if itself:
        rate, high = 0.0, half_width(wins / y.shape[1], losses / y.shape[1], len(y))
        low, both = -high, 196 * math.sqrt(T + E / len(y))
    else:
        rate, (low, high), both = net_win_rate(flat), bootstrap(prompts), 100 * margin(y)
    print("| " + " | ".join((
        name, axis, str(len(y)), f"{wins} / {ties} / {losses}",
        " ".join(f"{100 * of:+.1f}" for of in y.mean(0)), f"{rate:+.1f}" * (not itself),
        f"{low:+.1f} to {high:+.1f}", f"{rate - both:+.1f} to {rate + both:+.1f}",
        f"{net_win_rate(most):+.1f}, p = {sign_test(most.count(1), most.count(-1)):.2g}"
        * (not itself), "{:.2f} ({:.2f})".format(*alike) if alike and not itself else "",
        " / ".join(f"{100 * math.sqrt(v):.1f}" for v in (P, T, E)),
        "" if itself else "not decided" if abs(rate) <= both else "AB"[rate < 0])) + " |")
    return {"name": name, "axis": axis, "rate": rate, "rates": (100 * y.mean(0)).tolist(),
            "low": low, "high": high, "both": both, "variances": (P, T, E),
            "T": [] if itself else bounds_of_trainings(y)}


def movie_gen():
    """Print Movie Gen's rows of the table, with intervals as if a fifth of the votes were ties."""
    for axis, (rate, sigma) in MOVIE_GEN.items():
        wins, losses = (381 * (0.8 + side * rate / 100) / 2 for side in (1, -1))
        both = half_width(wins, losses, 381)
        print(f"| the same, Movie Gen | {axis} | 381 | | one pair | {rate:+.1f} | "
              f"{rate - both:+.1f} to {rate + both:+.1f} | unknown | | | "
              f"sigma of its raters {sigma:.1f} | |")


def draw(rows, path):
    """Plot the net win rates with both intervals; and the half of an interval by n and K."""
    plt = common.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1))
    n = torch.logspace(1.5, 4.5, 60)
    for i, name in enumerate(PAIRS):
        mine = [row for row in rows if row["name"] == name]
        rate, low, high, both = (torch.tensor([row[k] for row in mine])
                                 for k in ("rate", "low", "high", "both"))
        at = torch.arange(len(mine)) + 0.2 * (i - 1)
        left.errorbar(at, rate, both, fmt="none", ecolor=f"C{i}", lw=1, capsize=4)
        left.errorbar(at, rate, (rate - low, high - rate), fmt="o", color=f"C{i}", lw=4, label=name)
        left.plot(at, torch.tensor([row["rates"] for row in mine]), "kx", ms=4)
        P, T, E = mine[0]["variances"]
        for K, style in zip((1, 3, 10), ("-", "--", ":")) if i < 2 else ():
            right.plot(n, 196 * (P / n + T / K + E / (n * K)).sqrt(), style, color=f"C{i}",
                       label=f"{name}, K = {K}")
    left.set_xticks(range(len(AXES)), AXES)
    left.set(title="net win rate; thick: 95 % over prompts, thin: and trainings, x: a pair")
    left.axhline(0, color="k", lw=0.5)
    right.axhline(5, color="k", lw=0.5)
    right.set(xscale="log", yscale="log", xlabel="prompts", title="half of the 95 % interval")
    for ax in (left, right):
        ax.grid(alpha=0.3); ax.legend(fontsize=6)
    figure.tight_layout(); figure.savefig(path, dpi=120); plt.close(figure)


# ---- 5. The study --------------------------------------------------------------------------------

def main():
    parser = common.Parser(__doc__, "judge_rater", of_run=True, seeds=5)
    add = parser.add_argument
    add("--prompts", type=common.whole, default=300, help="and 7/10 as many of held-out "
        "combinations and of longer words (default: %(default)s)")
    add("--steps", type=common.whole, help="of the whole training (default: those of the run)")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: must be 2 or more")
    try:
        cfg = train.read_config(train.result_of(args.run))
    except ValueError as error:
        parser.error(str(error))
    parser.needs_judge(args.run, cfg)
    torch.set_num_threads(1)                            # two trainings at a time
    c, steps = cfg.clips, args.steps or cfg.train_dit.steps
    prompts = [p for _, p in world.test_prompts(0, args.prompts, c.things, c.frames, c.script)]
    flags = {"flow": {"train_dit.steps": steps}, "half": {"train_dit.steps": steps // 2},
             "diffusion": {"train_dit.steps": steps, "flow.objective": "diffusion",
                           "flow.shift": 1.0}}
    jobs = [(arm, seed) for arm in ("flow", "diffusion", "half") for seed in range(args.seeds)]
    runs = args.out / "runs" / args.run.resolve().name
    one = lambda job: verdicts(args.run, runs / f"{job[0]}-{steps}-{job[1]}", prompts,
                               {"seed": job[1], **flags[job[0]]})
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, tqdm(pool.map(one, jobs), desc="study", unit="training",
                                    total=len(jobs))))
    arms = {arm: [found[arm, seed] for seed in range(args.seeds)] for arm in flags}

    print("| comparison | of | prompts | votes A / tie / B | net win rate of each pair | of all | "
          "95 %, over prompts | 95 %, over prompts and trainings | "
          "sign of the sum over pairs, sign test | pairs agree (chance) | "
          "sigma of prompts / trainings / rest | better |\n" + "|---" * 12 + "|")
    rows = []
    for name, (a, b) in PAIRS.items():
        rows += [row_of(name, axis, votes(arms[a], arms[b], axis)) for axis in AXES]
        if b == "diffusion":
            movie_gen()
    for row in rows:
        if row["axis"] == "all" and row["name"] != "another seed":
            P, T, E = row["variances"]
            least, most = row["T"]
            for said, z in (("as measured", 1.96), ("in truth, decided four times in five", 2.8)):
                for how, at in (("", T), (", low end of T", least), (", high end of T", most)):
                    print(f"five points, {said}, {row['name']}{how}: " + ", ".join(
                        f"{prompts_needed(P, at, E, K, deviations=z)} prompts with {K}"
                        for K in TRAININGS) + " trainings of each arm")
    train.write_json(args.out / "study.json", rows)
    draw(rows, args.out / "study.png")
    print(f"wrote {args.out / 'study.json'}, {args.out / 'study.png'}")


if __name__ == "__main__":
    main()
