"""Question: what is each pairing of noise and clips worth to the toy: random, by transport within
minibatches, by semi-discrete transport within captions (`sdot`) or blind to them (`sdot-global`)?
And are flow matching and a shifted schedule better than the alternatives?

Run:    python studies/couplings.py runs/toy
Time:   57 minutes on 2 cores, after `python train.py --scale toy`; continues where it was stopped
Answer: within captions the paths bend 7 % less and samples in few steps are 6 to 14 % nearer to the
        data, but three seeds show no gain in accuracy; caption-blind transport does harm; diffusion
        is behind.

Every run is sampled as the toy is, and without guidance, whose bent paths would hide the
coupling's, in 1 to 50 Euler steps on the captions of 64 held-out clips.
"""
import json
import sys

import common
import torch
import torch.nn.functional as F

import flow
import sdot
import train
import world

STEPS = (1, 2, 4, 8, 10, 16, 30, 50)
COUPLINGS = ("independent", "minibatch", "sdot", "sdot-global")
DIRECTIONS = 64                                         # principal directions of `sdot-global`


# ---- 1. Sample a run in few and in many steps ----------------------------------------------------

def energy_distance(a, b, paired=False):
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets (n, d), (m, d): 0 for one distribution.

    paired: rows i of both share a caption, which draws them together; these pairs are left out."""
    n, m = len(a), len(b)
    within = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    across = torch.cdist(a, b)
    own = across.diagonal().sum() if paired else 0
    return (2 * (across.sum() - own) / (n * m - (n if paired else 0)) - within).item()


# Features of clips in pixels, for that: means, where only colour, layout and motion count, or all.
FEATURES = {"coarse": lambda x: F.avg_pool3d(x, (2, 4, 4)).flatten(1),
            "fine": lambda x: x.flatten(1)}


@torch.no_grad()
def sweep(folder, clips=64):
    """Sample one run by number of steps, a plain one by schedule as well; kept in its sweep.json.

    -> [{schedule, steps, right: share of clips in which all that the caption says is right,
    energy: distance of the sampled latents to the real ones, curvature of the paths}]"""
    path = folder / "sweep.json"
    if path.exists():
        return json.loads(path.read_text())
    run, rows, bent = train.load_run(folder), [], float("nan")
    source = train.ToyClips(run.cfg)
    x, captions = zip(*(source.clip("heldout", i, run.cfg.clips.shape) for i in range(clips)))
    real = run.tae.normalize(run.tae.encode(torch.stack(x)).mean).flatten(1)
    P, mask, *_ = run.prompts(list(captions))
    v_fn, x0 = lambda x, t: run.dit(x, t, P, mask), run.noise(list(range(clips)))
    if run.cfg.flow.objective == "flow":
        bent = flow.straightness(v_fn, x0, run.schedule(16))["curvature"]
    plain = run.cfg.coupling == "independent" and run.cfg.flow.objective == "flow"
    for name in ("shifted", "linear", "linear_quadratic") if plain else ("shifted",):
        for steps in STEPS:
            z = flow.sample(v_fn, x0, run.schedule(steps, name), cfg=run.cfg.flow)
            seen = [world.judge(clip, c) for clip, c in zip(run.decode(z), captions)]
            rows.append({"schedule": name, "steps": steps, "curvature": bent,
                         "right": sum(all(v.values()) for v in seen) / clips,
                         "energy": energy_distance(z.flatten(1), real, paired=True)})
    path.write_text(json.dumps(rows))
    return rows


# ---- 2. The caption-blind coupling, in fewer dimensions ------------------------------------------
# All clips in one problem take 1.3 N / target^2 noises against N latents of 2048 numbers: longer
# than the training. In the 64 principal directions of the latents it takes 8 minutes of a core.

def principal_directions(z):
    """z (M, ...) -> (d, DIRECTIONS): where the latents vary most."""
    flat = z.flatten(1) - z.flatten(1).mean(0)
    return torch.linalg.eigh((flat.T @ flat).double())[1][:, -DIRECTIONS:].float()


class Projected(sdot.Coupling):
    """sdot.Coupling on the principal directions V: latents z and noise x0 meet as z V and x0 V."""

    @classmethod
    def fit(cls, z, *args, **kwargs):
        V = principal_directions(z)
        coupling = super().fit(z.flatten(1) @ V, *args, **kwargs)
        coupling.V = V
        return coupling

    @classmethod
    def load(cls, path, z):
        V = principal_directions(z)
        coupling = super().load(path, z.flatten(1) @ V)
        coupling.V = V
        return coupling

    def couple(self, x0, groups=None):
        return super().couple(x0.flatten(1) @ self.V, groups)


# ---- 3. The study --------------------------------------------------------------------------------

def draw(of, variants, path):
    """Print accuracy and distance by number of steps, and draw them."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    shown = [(v, "shifted") for v in variants] + [("independent", "linear"),
                                                  ("independent", "linear_quadratic")]
    for ax, key, title in zip(axes, ("right", "energy"),
                              ("all that the caption says is right", "energy distance")):
        print(f"\n| {title} | " + " | ".join(map(str, STEPS)) + " |\n" + "|---" * 9 + "|")
        for i, (v, schedule) in enumerate(shown):
            rows = [{r["steps"]: r[key] for r in run if r["schedule"] == schedule} for run in of[v]]
            found = common.mean_and_spread(rows, STEPS)
            ax.errorbar(STEPS, *zip(*found), fmt="o-" if i < len(variants) else "s--",
                        color=f"C{i}", capsize=2, lw=1, ms=3, label=f"{v}, {schedule}")
            print(f"| {v}, {schedule} | " + " | ".join(f"{a:.2f} +- {b:.2f}" for a, b in found)
                  + " |")
        ax.set(xscale="log", xlabel="sampling steps", title=title)
        ax.set_xticks(STEPS, STEPS)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    figure.tight_layout(); figure.savefig(path, dpi=130); plt.close(figure)
    for v in variants:
        bent = [run[0]["curvature"] for run in of[v]]
        print(f"curvature of the sampled paths, {v}: {sum(bent) / len(bent):.4f}")
    print(f"wrote {path}")


def main():
    if "--workdir" in sys.argv:                         # one run of train.py, with Projected in it
        sdot.Coupling = Projected
        sys.exit(train.main(sys.argv[1:]))
    parser = common.Parser(__doc__, "couplings", of_run=True, seeds=3)
    parser.add_argument("--steps", type=common.whole, default=400, help="training steps of each")
    args = parser.parse_args()
    steps = {"train_dit.steps": args.steps, "train_dit.batch": 64}
    variants = {c: {"coupling": c, **steps} for c in COUPLINGS}
    variants["sdot-global"] |= {"sdot.target": 0.2}
    variants["diffusion"] = {"flow.objective": "diffusion", "flow.shift": 1.0, **steps}
    runs = common.compare(args.run, args.out, variants, args.seeds,
                          programs={"sdot-global": __file__})
    of = {v: [sweep(common.Path(run["folder"])) for run in runs if run["variant"] == v]
          for v in variants}
    draw(of, variants, args.out / "steps.png")


if __name__ == "__main__":
    main()
