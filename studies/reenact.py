"""Question: what does VidTwin put into its structure latent and what into its dynamics latent?
Clips are decoded from the structure latent of one clip with the dynamics latent of another, and
from each latent alone; the judge of world.py says what it sees.

Run:    python studies/reenact.py
Time:   16 minutes on 1 core, 15 of them training, which is kept
Answer: structure holds outline, letters and their motion, dynamics holds colour: as the paper says,
        content and global movement on one side, fine detail and fast change on the other.
"""
import autoencoders
import common
import torch
from einops import rearrange

import tae
import world


def trained(path, seconds, seed):
    """VidTwin, trained on clips of one object for so many CPU seconds; kept in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = autoencoders.fit("vidtwin", seconds, seed, things=1)
        torch.save(model.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    model = tae.VidTwin(tae.VIDTWIN_PRESETS["toy"]).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


@torch.no_grad()
def decodings(model, a, b):
    """Two batches of clips -> {name: clips}: reconstructed, swapped, from one latent alone."""
    made = {"A": model(a)[0], "B": model(b)[0],
            "structure of A, dynamics of B": model.decode(torch.cat([
                model.split(model.encode(a).mean)[0].flatten(1),
                *(z.flatten(1) for z in model.split(model.encode(b).mean)[1:])], 1))}
    for part in ("structure", "dynamics"):
        made[f"{part} of A alone"] = model.decode(model.encode(a).mean, only=part)
    return made


def draw(clips, path):
    """Draw every second frame of the first two clips of each kind."""
    plt = common.pyplot()
    figure, axes = plt.subplots(2 * len(clips), 1, figsize=(9, 2.1 * len(clips)))
    for ax, (i, (title, x)) in zip(axes, ((i, item) for i in range(2) for item in clips.items())):
        strip = rearrange(x[i, :, ::2].clamp(-1, 1), "C T H W -> H (T W) C") / 2 + 0.5
        ax.imshow(strip.numpy())
        ax.set_axis_off()
        ax.set_title(title, fontsize=7, pad=2)
    figure.tight_layout(pad=0.3); figure.savefig(path, dpi=130); plt.close(figure)
    print(f"wrote {path}")


def main():
    parser = common.Parser(__doc__, "reenact")
    parser.add_argument("--seconds", type=common.positive, default=900.0, help="CPU, of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = trained(args.out / f"vidtwin-{args.seconds:g}-{args.seed}.pt", args.seconds, args.seed)
    a, b = (autoencoders.clips(f"reenact/{i}/0", 64) for i in "ab")
    made = decodings(model, a, b)
    seen = {k: [world.perceive(clip, 1, "latin")[0] for clip in v]
            for k, v in {"of A": a, "of B": b, **made}.items()}
    agree = lambda k, side, what: sum(
        x[what] == y[what] for x, y in zip(seen[k], seen[side])) / len(a)
    print(f"reconstruction of A: {tae.psnr(made['A'].clamp(-1, 1), a).mean():.2f} dB")
    columns = [(what, of) for what in ("color", "shape", "direction") for of in ("of A", "of B")]
    print("| decoded | " + " | ".join(map(" ".join, columns)) + " |\n" + "|---" * 7 + "|")
    for k in made:
        print(f"| {k} | " + " | ".join(f"{agree(k, s, what):.2f}" for what, s in columns) + " |")
    draw({"clip A": a, "clip B": b, **made}, args.out / "reenact.png")


if __name__ == "__main__":
    main()
