"""Question: where do the video tokens of a trained toy look in their prompt? The picture shows, for
each token of the prompt, the cross-attention that falls on it from each place of the clip, averaged
over frames, heads, blocks and sampling steps.

Run:    python studies/attention.py runs/toy 'a red sign saying "C" moving left'
Time:   20 seconds on 2 cores, after `python train.py --scale toy`
Answer: the middle of the picture looks at the letter, the rim at `moving`.
"""
import common
import torch
from einops import rearrange

import text_cond


def tokens(prompt):
    """The toy's tokens of a prompt as text, in the order of P."""
    strings = text_cond.token_strings(prompt)
    return [*strings["words"], *strings["bytes"], "(concepts)"]


@torch.no_grad()
def attention(run, prompt):
    """Sample one clip -> it (3, T, H, W), and the attention of its video tokens (L, H', W')."""
    P, seen = run.prompts([prompt])[0], []

    def keep(layer, inputs, output):
        x, text, *_ = inputs
        if torch.equal(text, P):                                # not the null prompt of guidance
            q = rearrange(layer.q(x), "B N (h d) -> B h N d", h=layer.heads)
            k = rearrange(layer.kv(text), "B L (two h d) -> two B h L d", two=2, h=layer.heads)[0]
            seen.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))       # (N, L)

    hooks = [block.cross_attention.register_forward_hook(keep) for block in run.dit.blocks]
    clip = run.generate([prompt], [0])[0]
    for hook in hooks:
        hook.remove()
    stream = run.cfg.dit.streams[0]
    T, H, _ = (n // p for n, p in zip(stream.size, stream.patch))
    maps = rearrange(torch.stack(seen).mean(0), "(T H W) L -> L T H W", T=T, H=H).mean(1)
    return clip.cpu(), maps.cpu()


def draw(clip, maps, labels, path):
    """Draw the middle frame and, for each token, its map and its share of the attention."""
    plt = common.pyplot()
    share = maps.mean((1, 2))
    figure, axes = plt.subplots(2, len(labels) + 1, figsize=(1.1 * len(labels) + 1, 2.7),
                                height_ratios=(3, 1), squeeze=False)
    axes[0, 0].imshow(clip[:, clip.shape[1] // 2].permute(1, 2, 0) / 2 + 0.5,
                      extent=(0, maps.shape[2], maps.shape[1], 0))
    axes[0, 0].set_title("middle frame", fontsize=7)
    for i, label in enumerate(labels, 1):
        axes[0, i].imshow(maps[i - 1], cmap="magma", vmin=0, vmax=maps.max().item())
        axes[0, i].set_title(label, fontsize=7)
        axes[1, i].bar([0], [share[i - 1].item()], color="C0")
        axes[1, i].set_ylim(0, share.max().item())
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[1, 0].set_axis_off()
    axes[1, 1].set_ylabel("share", fontsize=7)
    figure.tight_layout(pad=0.3); figure.savefig(path, dpi=130); plt.close(figure)
    for label, part in zip(labels, share.tolist()):
        print(f"  {label:12}{100 * part:5.1f} %")
    print(f"wrote {path}")


def main():
    parser = common.Parser(__doc__, "attention", of_run=True)
    parser.add_argument("prompt", nargs="?", default='a red sign saying "A" moving left')
    args = parser.parse_args()
    run = parser.loaded(args.run, of_videos=True)
    cfg = run.cfg
    if (cfg.text.mode != "toy" or cfg.text.without or len(cfg.dit.streams) > 1
            or cfg.dit.conditioning not in ("adaln_zero", "adaln")):
        parser.error(f"run {args.run}: only a run with the three toy encoders, a single latent and "
                     "t in the norms can be drawn")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(*attention(run, args.prompt), tokens(args.prompt), args.out / "attention.png")


if __name__ == "__main__":
    main()
