"""Question: which of the four ways to condition the blocks on t works best, at equal size and
equal training time? It is the ablation of [DiT s5], arXiv 2212.09748, on video: text always
goes through cross-attention, and t enters as adaLN-Zero, as adaLN, as a token of the text or as a
token of the video.

Run:    python studies/conditionings.py runs/toy
Time:   42 minutes on 2 cores, after `python train.py --scale toy`; continues where it was stopped
Answer: the DiT paper's order, adaLN-Zero first, in each of three seeds; the last two are level.

All four train on the same latents for the same CPU seconds, so a way that costs more a step takes
fewer of them. The FFN is widened where no parameters are spent on modulation.
"""
import json
import time
from dataclasses import replace

import common
import torch

from dit import CONDITIONINGS, DiT

BATCH = 64                                              # clips in a step


def matched(base, conditioning):
    """Switch `base` to another conditioning; widen its FFN until it is as large as before."""
    def count(cfg):
        with torch.device("meta"):
            return sum(w.numel() for w in DiT(cfg).parameters())
    cfg = replace(base, conditioning=conditioning)
    gap = (count(base) - count(cfg)) / (3 * cfg.dim * cfg.depth)       # SwiGLU: three matrices
    return replace(cfg, ffn=cfg.ffn_width + round(gap / 8) * 8)


def seconds_per_step(cfg, B=BATCH, L=14, rounds=6):
    """Measure a training step of each conditioning on one thread, in turn -> {name: the median}."""
    torch.set_num_threads(1)
    models, seconds = {}, {c: [] for c in CONDITIONINGS}
    for c in CONDITIONINGS:
        models[c] = DiT(matched(cfg, c))
        for w in models[c].parameters():
            w.data.add_(torch.randn_like(w), alpha=0.02)            # open the gates
    s = cfg.streams[0]
    shape = (s.channels, *s.size) if len(cfg.streams) == 1 else (sum(s.numel for s in cfg.streams),)
    x, t, text = torch.randn(B, *shape), torch.rand(B), torch.randn(B, L, cfg.dim)
    for i in range(rounds):
        for c, model in models.items():
            began = time.process_time()
            model(x, t, text).square().mean().backward()
            model.zero_grad()
            if i:                                                   # the first round warms up
                seconds[c].append(time.process_time() - began)
    return {c: sorted(times)[len(times) // 2] for c, times in seconds.items()}


def main():
    parser = common.Parser(__doc__, "conditionings", of_run=True, seeds=3)
    parser.add_argument("--seconds", type=common.positive, default=220.0, help="CPU, each run")
    args = parser.parse_args()
    cfg = parser.loaded(args.run, "meta").cfg.dit
    plan = args.out / f"seconds-{args.run.resolve().name}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not plan.exists():                               # measured once, kept for a restart
        plan.write_text(json.dumps(seconds_per_step(cfg)))
    cost = json.loads(plan.read_text())
    common.compare(args.run, args.out, {c: {
        "dit.conditioning": c, "dit.ffn": matched(cfg, c).ffn, "train_dit.batch": BATCH,
        "train_dit.steps": max(1, round(args.seconds / cost[c]))} for c in CONDITIONINGS},
        args.seeds)
    print("The DiT paper's order, by FID on images, best first: " + ", ".join(CONDITIONINGS))


if __name__ == "__main__":
    main()
