"""Question: how fast is the backbone beside the video transformers of diffusers, at the same width,
depth, heads, feed-forward FLOPs and number of tokens, forward and with the backward pass?

Run:    pip install diffusers && python studies/bench_dit.py --tokens 512 2048
Time:   15 minutes on 2 cores
Answer: as fast as Wan's, which does the same work, or faster; at most 14 % above the time of the
        bare matrix products.

Prints tokens per second, the FLOPs of the matrix products of a forward pass (counted by torch,
which leaves out attention on a CPU), and the time over that of the bare matrix products and
attention calls of our blocks, which no model of these FLOPs can beat. All are medians over rounds
in one process, each in another order; fp32, random weights. Each transformer treats
text in its own way: Wan and Latte attend to it; CogVideoX carries it along with the video, so it
has fewer matrices in a block. In Latte not every token sees every other one: half of its blocks
attend over space and half over time, the latter without text.
"""

import json
import statistics
import time
from pathlib import Path

import common
import torch
import torch.nn.functional as F

import dit
import text_cond

D, DEPTH, HEADS, L = 768, 4, 12, 64
GRIDS = {512: (8, 8, 8), 2048: (8, 16, 16), 8192: (8, 32, 32)}      # tokens: frames, rows, columns


def ours(grid):
    T, H, W = grid
    cfg = dit.DiTConfig((dit.Stream(16, (1, 2, 2), (T, 2 * H, 2 * W)),), D, DEPTH, HEADS)
    model = dit.DiT(cfg)
    for w in model.parameters():                # no gate is closed: all of it has a gradient
        w.data.add_(torch.randn_like(w), alpha=0.02)
    return model, lambda x, t, text: model(x, t, text)


def wan(grid):
    from diffusers import WanTransformer3DModel
    model = WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=D // HEADS,
                                  text_dim=D, ffn_dim=4 * D, num_layers=DEPTH)
    return model, lambda x, t, text: model(x, 1000 * t, text).sample


def cogvideox(grid):
    from diffusers import CogVideoXTransformer3DModel
    T, H, W = grid
    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, text_embed_dim=D,
        num_layers=DEPTH, sample_width=2 * W, sample_height=2 * H, sample_frames=4 * (T - 1) + 1,
        max_text_seq_length=L)
    return model, lambda x, t, text: model(x.transpose(1, 2), text, 1000 * t).sample.transpose(1, 2)


def latte(grid):
    from diffusers import LatteTransformer3DModel
    T, H, W = grid
    model = LatteTransformer3DModel(    # num_layers counts pairs of a spatial and a temporal block
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, in_channels=16, out_channels=16,
        num_layers=DEPTH // 2, cross_attention_dim=D, attention_bias=True, sample_size=2 * H,
        patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=D, video_length=T)
    return model, lambda x, t, text: model(x, (1000 * t).long(), text).sample


def bare(grid):
    """The matrix products and attention calls of `ours`, one after the other, and nothing else."""
    N, width = grid[0] * grid[1] * grid[2], dit.DiTConfig(dim=D, heads=HEADS).ffn_width
    shapes = [(N, D, 3 * D), (N, D, D), (N, D, D), (L, D, 2 * D), (N, D, D), (N, D, 2 * width),
              (N, width, D)]
    linears = [(torch.randn(n, a), torch.randn(b, a) / a**0.5) for n, a, b in shapes]
    heads = lambda n: torch.randn(1, HEADS, n, D // HEADS)
    calls = [(heads(N), heads(N), heads(N)), (heads(N), heads(L), heads(L))]
    work = [(F.linear, args) for args in linears] + [(F.scaled_dot_product_attention, args)
                                                     for args in calls]

    def run(backward):
        for _ in range(DEPTH):
            for fn, args in work:
                if not backward:
                    fn(*args)
                    continue
                args = [a.detach().requires_grad_() for a in args]
                y = fn(*args)
                torch.autograd.grad(y, args, torch.empty_like(y))
    return run


MODELS = {"filmstrip": ours, "WanTransformer3DModel": wan, "CogVideoXTransformer3DModel": cogvideox,
          "LatteTransformer3DModel": latte}


def measure(models, floor, grid, backward, repeats):
    """Seconds of each, `repeats` times in turn; the first round warms up and is thrown away."""
    T, H, W = grid
    x, text = torch.randn(1, 16, T, 2 * H, 2 * W), torch.randn(1, L, D)
    seconds = {name: [] for name in [*models, "bare"]}
    names = list(seconds)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names):] + names[:repeat % len(names)]:
            began = time.perf_counter()
            with torch.set_grad_enabled(backward):
                if name == "bare":
                    floor(backward)
                else:
                    model, forward = models[name]
                    y = forward(x, torch.tensor([0.5]), text)
                    assert y.shape == x.shape
                    if backward:
                        y.square().mean().backward()
                        model.zero_grad()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def gflop(forward, grid):
    """GFLOPs of the matrix products of a forward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode
    T, H, W = grid
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(torch.randn(1, 16, T, 2 * H, 2 * W), torch.tensor([0.5]), torch.randn(1, L, D))
    return counter.get_total_flops() / 1e9


def main():
    """The command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--repeats", type=common.whole, default=5,
                        help="rounds (at 512 tokens: four times as many)")
    args = parser.parse_args()
    text_cond.make_torchvision_importable()
    rows = []
    print(f"width {D}, depth {DEPTH}, {HEADS} heads, {L} text tokens, {torch.get_num_threads()} "
          "threads\n| tokens | pass | transformer | parameters, M | linear GFLOP | tokens/s | "
          "time / bare |\n|---|---|---|---|---|---|---|")
    for N in args.tokens:
        torch.manual_seed(0)
        models = {name: make(GRIDS[N]) for name, make in MODELS.items()}
        floor, cost = bare(GRIDS[N]), {k: gflop(f, GRIDS[N]) for k, (_, f) in models.items()}
        for backward in (False, True):
            rounds = args.repeats * (4 if N == 512 else 1)
            seconds = measure(models, floor, GRIDS[N], backward, rounds)
            for name, (model, _) in models.items():
                s = statistics.median(seconds[name])
                over = statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"]))
                rows.append({"tokens": N, "pass": "forward + backward" if backward else "forward",
                             "model": name, "seconds": seconds[name], "bare": seconds["bare"],
                             "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
                             "gflop": cost[name]})
                print(f"| {N} | {rows[-1]['pass']} | {name} | {rows[-1]['parameters_m']:.1f} | "
                      f"{cost[name]:.0f} | {N / s:.0f} | {over:.2f} |", flush=True)
    path = Path("out/studies/bench_dit.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
