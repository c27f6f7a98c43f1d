"""Question: which autoencoder makes the better videos, 2.5D, 3D or VidTwin, with as many latent
values and the same training time? Does the order by reconstruction hold for generation?

Run:    python studies/end_to_end.py
Time:   118 minutes on 2 cores; continues where it was stopped
Answer: between 2.5D and 3D undecided, though 2.5D reconstructs 1.7 dB better. VidTwin is behind
        both in reconstructions and in clips; with four times the time it reconstructs like 2.5D,
        and its clips have not caught up.

Each arm is the toy with `--variant`, on one thread: 240 CPU seconds for the autoencoder, 400 for
the DiT, of one size for all. Short runs measure the seconds of a step first, which sets the
steps; the table says what was really taken. VidTwin, a transformer from scratch,
needs longer: in a fourth arm its autoencoder has four times the time, and trains on clips of one
object, on which it comes further than on crowds. That arm shows what VidTwin can do; the answer is
from the three of equal time. Every arm has 64 tokens of 32 numbers, and
no alignment loss, which would pool VidTwin's flat latent in another way. Learning rate, KL weight,
shift and guidance are the toy's, and so were chosen for 2.5D.

A validation loss compares runs that share a latent, not different ones: it says what share of a
latent's variance is left open by prompt and noisy latent, detail that nobody sees included. These
figures mean the same in every arm:
- one step: what the DiT predicts from pure noise, decoded and compared with real clips of the
  prompt. The best prediction is the clips' mean (decoded is the mean of latents, which may differ).
- what the judge sees in samples with guidance, and in reconstructions: about the most that a
  generator can reach.
- energy distance of samples without guidance, which would change the distribution, to real clips of
  other prompts of the same kinds: 0 for one distribution. It does not see which prompt was
  followed. Pixels are features that no arm has trained: all of them, where blur counts, or means
  over 2 x 4 x 4, where only colour, layout and motion do. Its excess over that of reconstructions
  is the generator's.
A difference is decided where the 95 % interval over the seeds (Student's t, pairs of one seed)
leaves out 0: with three seeds it has to be large. Of some thirty such intervals one or two leave it
out by chance.
"""
import collections
import itertools
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import common
import torch
from couplings import FEATURES, energy_distance
from scipy import stats
from tqdm import tqdm

import train
import world

ARMS = {                    # the variant, its autoencoder's time in budgets, other flags
    "2.5d": ("2.5d", 1, {}), "3d": ("3d", 1, {}), "vidtwin": ("vidtwin", 1, {}),
    "vidtwin-4x": ("vidtwin", 4, {"train_tae.crowd": 1})}
EQUAL = ("2.5d", "3d", "vidtwin")                       # arms of equal time
PATCHES = {"vidtwin": {"patch_structure": (4, 1, 1), "patch_dynamics": (1, 4, 1)}}
SETS = 8                                # real clips of each prompt
FRESH = 4                               # lists of other prompts, for the energy distance
ROWS = {                                                # title, decimals; is more better, or less?
    "values": ("latent values", 0, 0), "tokens": ("tokens", 0, 0),
    "tae_size": ("autoencoder: million parameters", 2, 0),
    "tae_steps": ("autoencoder: steps", 0, 0), "tae_seconds": ("autoencoder: CPU seconds", 0, 0),
    "psnr": ("reconstruction, dB", 2, 1), "dit_size": ("DiT: million parameters", 2, 0),
    "dit_steps": ("DiT: steps", 0, 0), "dit_seconds": ("DiT: CPU seconds", 0, 0),
    "loss": ("validation loss, not comparable", 3, 0),
    "one_step": ("one step from noise, dB", 2, 1), "color": ("colour", 2, 1),
    "shape": ("shape", 2, 1), "shape_again": ("shape, reconstructions", 2, 0),
    "direction": ("direction", 2, 1), "text": ("one letter", 2, 1),
    "text_again": ("one letter, reconstructions", 2, 0),
    "heldout": ("held-out combinations", 2, 1), "coarse": ("energy distance, coarse", 3, -1),
    "coarse_more": ("energy distance above reconstructions', coarse", 3, -1),
    "fine": ("energy distance, all pixels", 2, -1),
    "fine_more": ("energy distance above reconstructions', all pixels", 2, -1),
    "sample": ("CPU seconds a sample", 3, -1)}
GENERATION = ("one_step", "color", "shape", "direction", "text", "heldout", "coarse_more",
              "fine_more")                              # against reconstruction, in the answer


# ---- 1. The steps that a time buys ---------------------------------------------------------------

class Timed(train.Run):
    """A run whose log says the CPU seconds of its process: pauses do not count."""

    def log(self, stage, step, **figures):
        super().log(stage, step, cpu=time.process_time(), **figures)


def pace(rows):
    """Rows of a log -> {stage: (steps, CPU seconds of a step)}. Of a step that was made twice the
    last counts; the first after a start, which pays for what is made once, does not."""
    took = collections.defaultdict(dict)
    for a, b in zip(rows, rows[1:]):
        if "loss" in a and "loss" in b and a["stage"] == b["stage"]:
            took[b["stage"]][b["step"]] = b["cpu"] - a["cpu"]
    return {stage: (max(of) + 1, sum(of.values()) / len(of)) for stage, of in took.items()}


def steps_for(recipe, seconds, tae, dit):
    """The steps that `tae` and `dit` CPU seconds buy, images and clips in the proportion of the
    recipe, a TrainTAE. seconds: of a step in each stage."""
    whole = recipe.image_steps * seconds.get("tae/image", 0) + recipe.steps * seconds["tae/video"]
    return {"train_tae.image_steps": round(recipe.image_steps * tae / whole),
            "train_tae.steps": round(recipe.steps * tae / whole),
            "train_dit.steps": round(dit / seconds["dit"])}


# ---- 2. Measures in pixels -----------------------------------------------------------------------

def real_clips(prompts, sets, name):
    """Draw clips of the toy world until each prompt has `sets` -> (sets, n, 3, T, H, W)."""
    rng, wanted = random.Random(name), collections.Counter(prompts)
    found = {prompt: [] for prompt in prompts}
    while any(len(found[p]) < sets * n for p, n in wanted.items()):
        scene = world.sample_world(rng, heldout=None)
        found.get(world.caption(scene), []).append(scene)
    return torch.stack([world.render([found[p].pop() for p in prompts]) for _ in range(sets)])


def plain_prompts(seed, n):
    """Draw prompts like those of training, n, and of held-out combinations, 3n/10."""
    return [p for kind, p in world.test_prompts(seed, n) if kind in ("trained", "heldout")]


@torch.no_grad()
def measure(folder):
    """Compare the reconstructions and samples of a run with real clips -> folder/measures.json."""
    run, report = train.load_run(folder), train.read_json(folder / "report.json")
    row = {"psnr": report["tae_psnr_db"], "loss": report["dit_val_loss"],
           "values": math.prod(run.latent_shape),
           "tokens": train.tokens_of(run.cfg, run.cfg.clips.shape),
           **report["prompt_accuracy"], **{f"{k}_real": v for k, v in report["judge"].items()}}
    paces = pace(train.Run(folder, None).rows())
    for part in ("tae", "dit"):
        mine = [paces[stage] for stage in paces if stage.startswith(part)]
        row |= {f"{part}_size": report["parameters"][part] / 1e6,
                f"{part}_steps": sum(steps for steps, _ in mine),
                f"{part}_seconds": sum(steps * each for steps, each in mine)}

    seed, n = run.cfg.seed, run.cfg.sample.prompts
    prompts = plain_prompts(seed, n)
    start = time.process_time()
    common.sampled(run, prompts[:32])
    row["sample"] = (time.process_time() - start) / len(prompts[:32])
    made = common.sampled(run, prompts, guidance=1.0)
    first = common.sampled(run, prompts, guidance=1.0, steps=1)
    real = real_clips(prompts, SETS, f"end_to_end/{seed}")
    others = sum((plain_prompts(f"{seed}/{k}", n) for k in range(FRESH)), [])
    others = real_clips(others, 1, f"end_to_end/{seed}/others")[0]
    again = common.reconstructed(run, real[0])
    read = world.accuracy([world.judge(x, p) for x, p in zip(again[:n], prompts)])  # `trained`
    row |= {f"{key}_again": share for key, share in read.items()}
    decibels = lambda squared_error: 10 * math.log10(4 / squared_error)
    row["one_step"] = decibels((first - real).square().mean().item())
    row["one_step_real"] = decibels(real.var(0).mean().item())      # of the mean of a prompt
    for name, features in FEATURES.items():
        for key, clips in ((name, made), (f"{name}_again", again), (f"{name}_real", real[0])):
            row[key] = energy_distance(features(clips), features(others))
        row[f"{name}_more"] = row[name] - row[f"{name}_again"]
    train.write_json(folder / "measures.json", row)


# ---- 3. The study --------------------------------------------------------------------------------

def lead(a, b, better):
    """By how much figures a are better than b, with the same seeds -> (mean, half of its 95 %
    interval); of one seed the interval has no end."""
    d = torch.tensor([x - y for x, y in zip(a, b)]).double() * better
    if len(d) < 2:
        return d.mean().item(), math.inf
    return d.mean().item(), stats.t.ppf(0.975, len(d) - 1) * d.std().item() / len(d) ** 0.5


def decided(mean, half):
    """Tell whether an interval leaves out 0; one without a width does not, of shares that differ by
    as much in all seeds."""
    return abs(mean) > half > 0


def answer(found):
    """{figure: {arm: values}} -> what reconstruction and generation say of each pair."""
    lines = []
    for a, b in itertools.combinations(EQUAL, 2):
        says = {"same": [], "other": [], "open": []}
        mean, half = lead(found["psnr"][a], found["psnr"][b], 1)
        a, b = (b, a) if mean < 0 else (a, b)
        for key in GENERATION:
            title, _, better = ROWS[key]
            ahead, within = lead(found[key][a], found[key][b], better)
            says["open" if not decided(ahead, within) else "same" if ahead > 0 else "other"] += [
                title]
        lines.append(f"{a} reconstructs better than {b} ({abs(mean):.2f} +- {half:.2f} dB)"
                     if decided(mean, half) else f"{a} and {b}: reconstruction undecided")
        lines[-1] += "".join(f"; {word}: {', '.join(says[key]) or 'none'}" for key, word in (
            ("same", f"{a} is better in"), ("other", f"{b} in"), ("open", "undecided")))
    return lines


def tell(rows, path):
    """Print the table, the differences of arms of equal time, and what they say; draw figures over
    PSNR."""
    of = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    values = {key: {arm: [row[key] for row in of[arm]] for arm in ARMS} for key in ROWS}
    print("| | " + " | ".join(ARMS) + " | real clips |\n" + "|---" * (2 + len(ARMS)) + "|")
    for key, (title, digits, _) in ROWS.items():
        found = {arm: common.mean_and_spread(of[arm], [key])[0] for arm in ARMS}
        there = f"{key}_real" in rows[0]
        cells = [*found.values()]
        if there:
            cells += common.mean_and_spread(of[EQUAL[0]], [f"{key}_real"])
        print(f"| {title} | " + " | ".join(f"{a:.{digits}f}" + f" +- {b:.{digits}f}" * (b > 0)
                                           for a, b in cells) + " |" + "  |" * (not there))
    pairs = list(itertools.combinations(EQUAL, 2))
    print("\nBy how much the first is better, and half of the 95 % interval (decided: bold):\n| | "
          + " | ".join(map(" against ".join, pairs)) + " |\n|---" + "|---" * len(pairs) + "|")
    for key, (title, digits, better) in ROWS.items():
        leads = [lead(values[key][a], values[key][b], better) for a, b in pairs if better]
        cells = [f"{d:+.{digits}f} +- {half:.{digits}f}" for d, half in leads]
        cells = [f"**{cell}**" if decided(*d) else cell for cell, d in zip(cells, leads)]
        print(f"| {title} | {' | '.join(cells)} |\n" * bool(cells), end="")
    print("", *answer(values), sep="\n")

    plt = common.pyplot()
    shown = ("one_step", "shape", "heldout", "coarse_more", "fine_more")
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 3.2))
    for ax, key in zip(axes, shown):
        for arm in ARMS:
            ax.plot(*zip(*((row["psnr"], row[key]) for row in of[arm])), "o", label=arm)
        if f"{key}_real" in rows[0]:
            ax.axhline(common.mean_and_spread(rows, [f"{key}_real"])[0][0], ls="--", color="gray")
        ax.set_title(ROWS[key][0].replace(" above", "\nabove"), fontsize=9)
        ax.set(xlabel=ROWS["psnr"][0])
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout(); figure.savefig(path, dpi=120); plt.close(figure)
    print(f"wrote {path}; dashed: real clips")


def main():
    if "--workdir" in sys.argv:                         # a run of train.py, timed and measured
        train.Run = Timed
        status = train.main(sys.argv[1:])
        folder = common.Path(sys.argv[sys.argv.index("--workdir") + 1])
        if status == 0 and (folder / "report.json").exists():
            measure(folder)
        sys.exit(status)
    parser = common.Parser(__doc__, "end_to_end", seeds=3)
    parser.add_argument("--tae-seconds", type=common.positive, default=240.0, help="CPU")
    parser.add_argument("--dit-seconds", type=common.positive, default=400.0, help="CPU")
    args = parser.parse_args()
    recipe = {v: train.parse(["--variant", v])[0].train_tae for v, *_ in ARMS.values()}

    def always(variant, seed):
        """The flags of every run."""
        return {"coupling": "independent", "train_dit.align": 0, "sample.prompts": 120,
                "tae.shortcut": False, "variant": variant, "seed": seed, **PATCHES.get(variant, {})}

    def short(run):
        """Time a twentieth of the recipe -> {stage: CPU seconds of a step}."""
        (variant, seed), folder = run, args.out / "short/{}-{}".format(*run)
        common.train(folder, always(variant, seed) | {
            "clips.count": 256, "stage": "dit",
            "train_tae.image_steps": recipe[variant].image_steps // 20,
            "train_tae.steps": recipe[variant].steps // 20, "train_dit.steps": 60},
            "model.safetensors", __file__)
        return {k: each for k, (_, each) in pace(train.Run(folder, None).rows()).items()}

    def whole(run):
        """Train and measure one arm -> its row of figures."""
        (arm, seed), (variant, times, others) = run, ARMS[run[0]]
        folder = args.out / f"{args.tae_seconds:g}-{args.dit_seconds:g}/{arm}-{seed}"
        steps = steps_for(recipe[variant], seconds[variant], times * args.tae_seconds,
                          args.dit_seconds)
        common.train(folder, always(variant, seed) | steps | others, "measures.json", __file__)
        return {"arm": arm, "seed": seed, **train.read_json(folder / "measures.json")}

    with ThreadPoolExecutor(2) as pool:                 # two at a time, short and whole
        both = {v: [pool.submit(short, (v, seed)) for seed in range(2)] for v in recipe}
        seconds = {v: {stage: (a.result()[stage] + b.result()[stage]) / 2 for stage in a.result()}
                   for v, (a, b) in both.items()}
        longest = sorted(ARMS, key=lambda arm: -ARMS[arm][1])   # first: so no core idles at the end
        runs = [(arm, seed) for arm in longest for seed in range(args.seeds)]
        rows = list(tqdm(pool.map(whole, runs), desc="study", unit="run", total=len(runs)))
    if len(values := {row["values"] for row in rows}) > 1:
        raise SystemExit(f"latents of different sizes: {values}")
    train.write_json(args.out / "study.json", rows)
    tell(rows, args.out / "study.png")


if __name__ == "__main__":
    main()
