"""Question: what does it cost if the backbone's clips move faster, or slower, than those that the
autoencoder was trained on? Does a motion curriculum help?

Run:    python studies/unseen_motion.py
Time:   95 minutes on 2 cores; continues where it was stopped
Answer: fast clips through an autoencoder of slow ones cost 4.6 dB, and samples inherit that loss
        (0.40 pixels a frame off the speed). Slow clips through one of fast ones cost 1.3 dB;
        samples lose nothing without guidance, and with it more of them are too fast. A curriculum
        takes 2.0 of the 4.6 dB back, and costs 1.3 where both paces are fast.

Clips of eight frames show one shape, which moves by half a pixel a frame (slow) or by two (fast)
and never meets an edge, so that the judge reads both alike. The toy's autoencoder trains on crowds
of shapes, then on clips, all of one pace. With the curriculum the crowds begin slow and become
as fast as the fast clips, whatever the pace; the last clips have the one pace again. On each of
these four autoencoders one DiT trains on slow clips and one on fast ones, on latents that are
normalised by the statistics of the autoencoder's pace (so at the other pace their variance is not
1: part of the cost). Measured are, for held-out clips of the DiT's pace and their captions:
- reconstruction: PSNR;
- reconstructions and samples: how often all is right to the judge, colour, shape, direction and
  speed; of samples also each of them. To the judge any speed above 0.8 is fast; so the medians of
  physics.py, too: distance from a line at constant speed, and that speed's error, of samples with
  guidance and without (guidance makes slow things faster);
- energy distance to other held-out clips, of reconstructions and of samples without guidance (which
  would change the distribution): 0 for one distribution. In all pixels, where blur counts, or in
  means over 2 x 4 x 4, where only colour, layout and motion do.
In "same less other" a positive number is a cost for dB and shares, a negative one elsewhere.
"""
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import common
import torch
from couplings import FEATURES, energy_distance
from physics import ERRORS, errors
from tqdm import tqdm

import tae
import train
import world

SPEEDS = {"slow": 0.5, "fast": 2.0}                     # pixels a frame, in place of world.SPEEDS
FASTEST = 4                                             # of the curriculum: fast over slow
TRAINED = ("same", "other")                             # the pace of the autoencoder's clips
JUDGED = ("color", "shape", "direction", "speed", "all")
PHYSICS = {"line": ERRORS.index("line"), "pace": ERRORS.index("speed")}
ENERGIES = ("coarse_again", "coarse_made", "fine_again", "fine_made")
HEAD = ("clips of the DiT", "autoencoder's", "curriculum", "reconstruction, dB",
        "reconstructions: all", *JUDGED,
        "off the line, px", "off the speed, px a frame", "without guidance: line", "speed",
        "energy distance, coarse: reconstructions", "samples", "all pixels: reconstructions",
        "samples")


# ---- 1. Clips of one pace ------------------------------------------------------------------------

class Paced(train.ToyClips):
    """Clips of shapes that all move at one pace, slow or fast."""

    def __init__(self, cfg, pace):
        super().__init__(cfg)
        self.pace = pace

    def clip(self, split, i, shape, done=0.0):
        (T, H, _), c, t = shape, self.cfg.clips, self.cfg.train_tae
        rng, crowd = random.Random(f"{split}/{self.cfg.seed}/{i}"), split == "tae"
        scene = world.sample_world(rng, t.crowd if crowd else 1, signs=0.0, frames=c.frames,
                                   overlap=crowd)
        # A path with room for fast motion has room for slower motion: so nothing ever bounces.
        pace, interval = self.pace, 1.0
        if crowd and t.motion > 1:
            pace, interval = "fast", world.motion_interval(rng, done, t.motion) / t.motion
        scene = replace(scene, things=tuple(
            world.place(replace(thing, speed=pace), rng, c.frames,
                        1.0 if crowd else world.WANDER["shape"]) for thing in scene.things))
        (x,) = world.render([scene], T, H, interval=interval, start=rng.randint(0, c.frames - T))
        return x, world.caption(scene)

    def heldout(self, first, n):
        """Make n clips that no training sees, from number `first` on, and their captions."""
        x, captions = zip(*(self.clip("heldout", first + i, self.cfg.clips.shape)
                            for i in range(n)))
        return torch.stack(x), list(captions)


# ---- 2. An autoencoder, and a DiT for each pace --------------------------------------------------

def moves(clips, captions):
    """Give the share of clips that the judge finds right in each respect and in all, and medians of
    their distance from a line and of their speed's error."""
    pairs = list(zip(clips, captions))
    seen = [world.judge(*pair) for pair in pairs]
    e = torch.tensor([errors(*pair) for pair in pairs])
    return (world.accuracy(seen) | {"all": sum(all(v.values()) for v in seen) / len(seen)}
            | {key: e[:, at].nanmedian().item() for key, at in PHYSICS.items()})


@torch.no_grad()
def measure(folder, clips, n=160, others=640):
    """Compare reconstructions and samples of a run with real clips -> a row of figures."""
    run = train.load_run(folder)
    (x, captions), (real, _) = clips.heldout(0, n), clips.heldout(n, others)
    again = common.reconstructed(run, x)
    row = {"psnr": tae.psnr(again, x).mean().item()}
    guided = common.sampled(run, captions)
    row |= moves(guided, captions)
    for what, clips_of in (("real", x), ("again", again)):
        row |= {f"{key}_{what}": share for key, share in moves(clips_of, captions).items()}
    made = common.sampled(run, captions, guidance=1.0)
    row |= {f"{key}_plain": share for key, share in moves(made, captions).items()}
    for name, features in FEATURES.items():
        for key, mine in (("again", again), ("made", made), ("real", x)):
            row[f"{name}_{key}"] = energy_distance(features(mine), features(real))
    return row


def job(folder, pace, cfg):
    """Train an autoencoder on one pace, a DiT on slow and one on fast clips -> folder/rows.json."""
    world.SPEEDS.update(SPEEDS)
    first, rows = train.open_run(cfg, folder / "autoencoder"), []
    train.train_tae(first, Paced(cfg, pace))
    autoencoder = train.load_tensors(first.folder / "tae/tae.safetensors")
    for other in SPEEDS:
        run, clips = train.open_run(cfg, folder / other), Paced(cfg, other)
        run.save("tae/tae.safetensors", autoencoder)
        train.encode_latents(run, clips)
        train.train_dit(run)
        rows.append({"clips": other, "trained": TRAINED[pace != other], "seed": cfg.seed,
                     "curriculum": cfg.train_tae.motion > 1, **measure(run.folder, clips)})
    train.write_json(folder / "rows.json", rows)


# ---- 3. The study --------------------------------------------------------------------------------

def cells(rows, keys):
    """Write figures as cells of a table: mean and spread of each key, nothing for no key."""
    return " | ".join("{:.2f} +- {:.2f}".format(*common.mean_and_spread(rows, [key])[0])
                      if key else "" for key in keys)


def tell(rows, path):
    """Print the table, at its end what the other pace costs, seed by seed; draw the main figures.
    """
    grid = [(clips, trained, on) for clips in SPEEDS for trained in TRAINED for on in (False, True)]
    of = {at: [row for row in rows if (row["clips"], row["trained"], row["curriculum"]) == at]
          for at in grid}
    keys = ("psnr", "all_again", *JUDGED, *PHYSICS, *(f"{key}_plain" for key in PHYSICS), *ENERGIES)
    word = {False: "off", True: "on"}
    print(f"| {' | '.join(HEAD)} |\n" + "|---" * len(HEAD) + "|")
    for (clips, trained, on), mine in of.items():
        print(f"| {clips} | {trained} | {word[on]} | {cells(mine, keys)} |")
    for clips in SPEEDS:
        print(f"| {clips} | real clips | | " + cells(
            [row for row in rows if row["clips"] == clips],
            ("", "", *(f"{key}_real" for key in (*JUDGED, *PHYSICS)), "", "", "", "coarse_real", "",
             "fine_real")) + " |")
    for clips, _, on in [at for at in grid if at[1] == "other"]:
        pairs = zip(of[clips, "same", on], of[clips, "other", on])
        less = [{key: same[key] - other[key] for key in keys} for same, other in pairs]
        print(f"| {clips} | same less other | {word[on]} | {cells(less, keys)} |")

    plt = common.pyplot()
    shown = {"psnr": "reconstruction, dB", "all": "samples: all right",
             "coarse_made": "energy distance, coarse", "fine_made": "energy distance, all pixels"}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.4))
    for ax, (key, title) in zip(axes, shown.items()):
        for i, ((clips, trained, on), mine) in enumerate(of.items()):
            mean, spread = common.mean_and_spread(mine, [key])[0]
            ax.errorbar(list(SPEEDS).index(clips) + 0.12 * (i % 4 - 1.5), mean, spread, capsize=3,
                        fmt="os"[on], color=f"C{TRAINED.index(trained)}",
                        label=f"autoencoder on the {trained} pace{', curriculum' * on}")
        real = f"{key.split('_')[0]}_real"
        for x, clips in enumerate(SPEEDS) if real in rows[0] else ():
            mine = [row for row in rows if row["clips"] == clips]
            mean, _ = common.mean_and_spread(mine, [real])[0]
            ax.hlines(mean, x - 0.3, x + 0.3, "gray", "--")
        ax.set_xticks([0, 1], [f"{name} clips" for name in SPEEDS])
        ax.set(title=title, xlim=(-0.5, 1.5))
        ax.grid(alpha=0.3)
    figure.legend(*(part[:4] for part in axes[0].get_legend_handles_labels()), fontsize=8, ncol=4,
                  loc="lower center")
    figure.tight_layout(rect=(0, 0.07, 1, 1)); figure.savefig(path, dpi=120); plt.close(figure)
    print(f"wrote {path}; dashed: real clips")


def main():
    if "--pace" in sys.argv:                            # one autoencoder, in a process of its own
        i = sys.argv.index("--pace")
        cfg, command = train.parse(sys.argv[1:i] + sys.argv[i + 2:])
        return job(common.Path(command.workdir), sys.argv[i + 1], cfg)
    parser = common.Parser(__doc__, "unseen_motion", seeds=3)
    parser.add_argument("--tae-steps", type=common.whole, default=1000)
    parser.add_argument("--dit-steps", type=common.whole, default=2000)
    parser.add_argument("--clips", type=common.whole, default=6144, help="that a DiT trains on")
    args = parser.parse_args()

    def one(run):
        seed, pace, motion = run
        of = f"{args.tae_steps}-{args.dit_steps}-{args.clips}"
        folder = args.out / of / f"{pace}-{motion}-{seed}"
        common.train(folder, {
            "pace": pace, "train_tae.motion": motion, "seed": seed, "coupling": "independent",
            "clips.frames": 8, "clips.count": args.clips, "train_tae.steps": args.tae_steps,
            "train_tae.image_steps": args.tae_steps // 7, "train_dit.steps": args.dit_steps},
            "rows.json", __file__)
        return train.read_json(folder / "rows.json")

    runs = [(s, pace, motion) for s in range(args.seeds) for pace in SPEEDS
            for motion in (1, FASTEST)]
    with ThreadPoolExecutor(2) as pool:
        rows = sum(tqdm(pool.map(one, runs), desc="study", unit="autoencoder", total=len(runs)), [])
    train.write_json(args.out / "study.json", rows)
    tell(rows, args.out / "study.png")


if __name__ == "__main__":
    main()
