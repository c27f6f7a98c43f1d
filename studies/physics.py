"""Question: do better models predict physics better? Do the physical errors of samples go on
falling when more training no longer raises the accuracy of prompts?

Run:    python studies/physics.py runs/toy [RUN ...]; and the same with --fast
Time:   40 minutes on 2 cores for each run of the toy; continues where it was stopped
Answer: yes. In the second half of the toy's steps, where the judge finds direction and speed right
        in 98 to 100 % of the clips, the physical errors fall by 25 to 57 %, the validation loss by
        14 %. They end at 1.8 to 14 times those of reconstructions. With --fast the speed is learned
        in a third of the steps, and bounces go on to improve until the end, where an object still
        loses or gains 36 % of its speed at an edge (18 % in reconstructions).

The dit stage of a run is trained again with each of four seeds, and its averaged weights are kept
at 5 to 100 % of the steps (with the falling rate of that run: a late mark has had more steps, and
smaller ones). Each of these models makes a clip from the caption of every held-out
clip. Objects of the toy world keep their size, and move in a straight line at constant speed. How
far from that are the samples, the real clips, and what the autoencoder makes of the real clips?

    line       distance of the centre of mass from the best such line, RMS, in pixels
    area       distance of the area from its mean over the clip, RMS, relative to that mean
    speed      of the line, less the speed that the caption says, in pixels a frame
    direction  of the line, against the direction that the caption says, in degrees
    bounce     --fast: the share of its speed that a bounce changes; 1 if there is no bounce

"right": the share of clips that show all the caption says; "moves": its direction and speed. Motion
is learned first: where "moves" no longer rises, a stretch of the run is left in which the errors
can go on falling.

A pixel is a 32nd of the picture's height. The figure of a model is the median over its clips, so
that a few which show something else do not decide it. Clips in which an object is not seen in half
of the frames have no errors; the table says their share. Signs have one letter: spelling longer
words is not physics. With --fast the dit stage learns from clips with twice the motion, where fast
objects bounce off the edge once; the fitted line may turn round once. The autoencoder stays.
--finished compares finished runs (of several lengths, say) and trains nothing. (Runs of two scales
differ in their task, too: in objects, signs and size.)
"""
import itertools
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import common
import torch
from healthy_run import train_and_keep
from tqdm import tqdm

import train
import world

KEPT = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90)  # percent of the steps; and 100
FAST = 2.0                                              # motion between two frames with --fast
SHARES = ("moves", "right")
ERRORS = ("line", "area", "speed", "direction", "bounce")
TITLES = {"loss": "validation loss", "line": "off the line, px", "area": "change of area",
          "speed": "off the speed, px a frame", "direction": "off the direction, degrees",
          "bounce": "speed lost in a bounce"}
AS_GOOD = 0.02                                          # accuracies that differ by less are equal


# ---- 1. The errors of a clip ---------------------------------------------------------------------

def fit(p, t, turns):
    """Fit p ~ w - v |t - k| by least squares over w, v and these k: a line at constant speed v that
    turns round at time k, or does not if k is the last time. p, t: (n,) -> v, k, what is left."""
    u = -(t - turns[:, None]).abs()                                                     # (K, n)
    u, p = u - u.mean(1, keepdim=True), p - p.mean()
    v = (u * p).sum(1) / u.square().sum(1)
    left = p - v[:, None] * u
    best = left.square().sum(1).argmin()
    return v[best].item(), turns[best].item(), left[best]


def rebound(p, t, k):
    """Compare the speeds after and before the turn k: 0 if what came returns at the same speed."""
    speed = lambda part: fit(p[part], t[part], t[part][-1:])[0]       # nan for a single frame
    if k >= t[-1]:
        return 1.0
    before = speed(t <= k)
    return abs(1 + speed(t >= k) / before) if before else math.nan


def follow(clip, wanted):
    """Find the objects asked for in a clip (3, T, H, W), as `world.perceive` does -> for each its
    area (T,) and centre (2, T), in pixels of a picture 32 high."""
    x = ((clip.float() + 1) / 2).clamp(0, 1)
    H, W = x.shape[2:]
    rim = torch.ones(H, W, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    background = x[:, :, rim].flatten(1).median(1).values.view(3, 1, 1, 1)
    alpha = ((x - background).abs().amax(0) / 0.7).clamp(0, 1)                          # (T, H, W)
    colors = world.seen_colors(x)
    for w in wanted:
        mine = (colors == list(world.COLORS).index(w["color"])) | (len(wanted) == 1)
        own, *centre = world.track(torch.where(mine, alpha, 0))
        yield own.sum((1, 2)).double() * (32 / H) ** 2, torch.stack(centre).double() * 32 / H


def errors(clip, prompt, fast=False):
    """Measure ERRORS of a clip, means over its objects; nan if one of them is not seen."""
    rows, wanted = [], world.parse(prompt)
    for w, (area, centre) in zip(wanted, follow(clip, wanted)):
        seen = area > 0.015 * 32 * 32                               # as for the judge
        if 2 * seen.sum() < len(area):
            return [math.nan] * len(ERRORS)
        t, asked = torch.arange(len(area)).double()[seen], world.DIRECTIONS[w["direction"]]
        within = torch.arange(t[0].item() + 1, t[-1].item() - 1, 0.25).double()
        turns = torch.cat([within, t[-1:]] if fast else [t[-1:]])
        (vx, kx, x), (vy, ky, y) = (fit(p, t, turns) for p in centre[:, seen])
        speed = world.SPEEDS[w["speed"]] * (FAST if fast else 1)
        angle = math.degrees(math.atan2(vy, vx) - math.atan2(asked[1], asked[0]))
        bounces = [rebound(p, t, k) for p, k, d in zip(centre[:, seen], (kx, ky), asked)
                   if d and fast and w["speed"] == "fast"]
        rows.append([(x**2 + y**2).mean().sqrt(), (area / area.mean() - 1).square().mean().sqrt(),
                     abs(math.hypot(vx, vy) - speed), abs((angle + 180) % 360 - 180),
                     sum(bounces) / len(bounces) if bounces else math.nan])
    return torch.tensor(rows).nanmean(0).tolist()


# ---- 2. Clips and models -------------------------------------------------------------------------

class FastClips(train.ToyClips):
    """Clips of the toy world with FAST times the motion between two frames."""

    def clip(self, split, i, shape, done=0.0):
        c, rng = self.cfg.clips, random.Random(f"{split}/{self.cfg.seed}/{i}")
        signs = {"signs": c.signs} if split == "dit" else {}
        scene = world.sample_world(rng, c.things, **signs, frames=c.frames, script=c.script,
                                   cap=world.cap_of(c.things))
        return world.render([scene], *shape[:2], interval=FAST)[0], world.caption(scene)


def real_clips(cfg, n, fast):
    """Draw n held-out clips whose signs have one letter -> (n, 3, T, H, W), captions."""
    source = (FastClips if fast else train.ToyClips)(cfg)
    drawn = (source.clip("heldout", i, cfg.clips.shape) for i in itertools.count())
    plain = (pair for pair in drawn if all(len(w["text"]) < 2 for w in world.parse(pair[1])))
    x, captions = zip(*itertools.islice(plain, n))
    return torch.stack(x), list(captions)


def row_of(clips, prompts, fast, **more):
    """Judge and measure clips -> a row of the table. Lines of the judge do not turn round: of fast
    clips it reads no motion, so "right" is the rest, and "moves" is unknown."""
    verdicts = [world.judge(clip, p) for clip, p in zip(clips, prompts)]
    right = [all(good for key, good in v.items() if not fast or key not in ("direction", "speed"))
             for v in verdicts]
    moves = [math.nan if fast else v["direction"] and v["speed"] for v in verdicts]
    e = torch.tensor([errors(clip, p, fast) for clip, p in zip(clips, prompts)])    # (n, errors)
    return {"loss": math.nan, "right": sum(right) / len(e), "moves": sum(moves) / len(e),
            "left out": e[:, 0].isnan().double().mean().item(),
            **dict(zip(ERRORS, e.nanmedian(0).values.tolist())), **more}


@torch.no_grad()
def measured(file, out, clips, captions, fast):
    """Measure a model: samples for all captions, each from its own noise, and the validation loss
    on 64 real clips; kept in the folder `out`."""
    kept = out / f"{file.stem}-{len(captions)}.json"
    if not kept.exists():
        run = train.load_run(file, "cuda" if torch.cuda.is_available() else "cpu")
        z = run.tae.normalize(run.tae.encode(clips[:64].to(run.device)).mean)
        loss = train.validation_loss(run, z, captions[:64])
        train.write_json(kept, row_of(common.sampled(run, captions), captions, fast, loss=loss))
    return train.read_json(kept)


def models(base, out, clips, captions, seeds, fast):
    """Train and measure the models of one run -> {percent: [a row for each seed]}."""
    if fast:
        common.train(out / "latents", {"base": base, "stage": "latents"}, "latents/index.json",
                     program=__file__, threads=2)
        base = out / "latents"

    def one(seed):
        files = train_and_keep(base, out / f"seed-{seed}", KEPT, seed, threads=1)
        return {m: measured(file, out / f"seed-{seed}", clips, captions, fast)
                for m, file in sorted(files.items())}

    with ThreadPoolExecutor(2) as pool:
        found = list(tqdm(pool.map(one, range(seeds)), desc=out.name, unit="seed", total=seeds))
    return {m: [of[m] for of in found] for m in found[0] if all(m in of for of in found)}


# ---- 3. Figures ----------------------------------------------------------------------------------

def saturation(right):
    """Find the mark from which on the accuracy {mark: share} is about that of the last mark."""
    marks = sorted(right)
    off = [i for i, m in enumerate(marks) if abs(right[m] - right[marks[-1]]) > AS_GOOD]
    return marks[off[-1] + 1 if off else 0]


def conclude(rows, shown, what):
    """Say how far the errors fall from where on an accuracy no longer rises, "right" or "moves"."""
    mean = {m: sum(row[what] for row in of) / len(of) for m, of in rows.items()}
    first, last = saturation(mean), max(rows)
    if first == last:
        return print(f"{what} has not saturated before the end")
    said = [f"{what} {mean[first]:.3f} and {mean[last]:.3f}"]
    for key in [key for key in shown if key in ("loss", *ERRORS)]:
        ((fall, spread),) = common.mean_and_spread(
            [{0: late[key] / early[key] - 1} for early, late in zip(rows[first], rows[last])], (0,))
        said.append(f"{key} {fall:+.0%} +- {spread:.0%}")
    print(f"between {first} % and {last} % of the steps: {', '.join(said)}")


def draw(tables, shown, path):
    """Plot figures by percent of the steps; dotted: real clips, dashed: their reconstructions."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3))
    for ax, key in zip(axes, shown):
        for i, (name, rows) in enumerate(tables.items()):
            marks = [m for m in rows if isinstance(m, int)]
            ax.errorbar(marks, *zip(*(common.mean_and_spread(rows[m], (key,))[0] for m in marks)),
                        fmt="o-", ms=3, lw=1, capsize=2, color=f"C{i}", label=name)
            for what, style in (("real", ":"), ("reconstructed", "--")):
                ax.axhline(rows[what][0][key], color=f"C{i}", ls=style, lw=1)
        ax.set_title(TITLES.get(key, key), fontsize=9)
        ax.set(xlabel="% of the steps", yscale="linear" if key in SHARES else "log")
        ax.grid(alpha=0.3)
    for style, what in ((":", "real clips"), ("--", "reconstructions")):
        axes[-1].plot([], [], style, color="gray", label=what)
    axes[0].legend(fontsize=7); axes[-1].legend(fontsize=7)
    figure.tight_layout(); figure.savefig(path, dpi=120); plt.close(figure)


# ---- 4. The study --------------------------------------------------------------------------------

def main():
    if "--workdir" in sys.argv:                         # a run of train.py on FastClips
        train.ToyClips, train.same_latents = FastClips, lambda cfg: False
        sys.exit(train.main(sys.argv[1:]))
    parser = common.Parser(__doc__, "physics", seeds=4)
    add = parser.add_argument
    add("runs", type=common.Path, nargs="+", metavar="RUN", help="finished runs of the toy world")
    add("--fast", action="store_true", help="clips with twice the motion, which bounce")
    add("--clips", type=common.whole, default=160, help="held-out ones (default: %(default)s)")
    add("--finished", action="store_true", help="measure the runs as they are; trains nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)                            # two seeds at a time
    out = args.out / ("fast" if args.fast else "plain") / ("finished" if args.finished else "")
    shares, kinds = (SHARES[1:], ERRORS) if args.fast else (SHARES, ERRORS[:-1])
    shown, tables = ["loss", *shares, "left out", *kinds], {}
    names = [base.resolve().name for base in args.runs]
    if len(set(names)) < len(names):
        parser.error(f"{' '.join(map(str, args.runs))}: two runs of one name")
    for name, base in zip(names, args.runs):
        run = parser.loaded(base)
        clips, captions = real_clips(run.cfg, args.clips, args.fast)
        again = common.reconstructed(run, clips)
        if args.finished:
            found = {100: [measured(train.result_of(base), out / name, clips, captions,
                                    args.fast)]}
        else:
            found = models(base, out / name, clips, captions, args.seeds, args.fast)
        rows = tables[name] = {"real": [row_of(clips, captions, args.fast)],
                               "reconstructed": [row_of(again, captions, args.fast)], **found}
        print(f"\n| {name} | " + " | ".join(shown) + " |\n" + "|---" * (1 + len(shown)) + "|")
        for mark, of in rows.items():
            cells = ["" if math.isnan(a) else f"{a:.3f}" + f" +- {b:.3f}" * (len(of) > 1)
                     for a, b in common.mean_and_spread(of, shown)]
            print(f"| {mark}{' %' * isinstance(mark, int)} | {' | '.join(cells)} |")
        for what in shares if len(found) > 1 else ():
            conclude(found, shown, what)
    train.write_json(out / "study.json", tables)
    draw(tables, [key for key in shown if key != "left out"], out / "study.png")
    print(f"wrote {out / 'study.json'}, {out / 'study.png'}")


if __name__ == "__main__":
    main()
