"""Question: which autoencoder reconstructs moving objects best with the same number of latent
values and the same training time: Movie Gen's 2.5D, 3D, or VidTwin? And what does a motion
curriculum do, with clips up to eight times as fast?

Run:    python studies/autoencoders.py
Time:   38 minutes on 2 cores; continues where it was stopped
Answer: 2.5D, since 3D takes fewer steps in the same time and VidTwin needs longer than three
        minutes; the curriculum moves quality from slow clips to fast ones.

Three seeds of each train on one thread for the same CPU seconds, on crowds of six objects, and are
measured on 64 clips of one object, as they are and with six times their motion.
"""
import json
import math
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import common
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

import tae
import world

VARIANTS = ("2.5d", "3d", "vidtwin")
FASTEST = (1, 8)                                        # the motion curriculum, off and on
MEASURES = ("psnr", "ssim", "temporal_error")


# ---- 1. Clips, training, measures ----------------------------------------------------------------

def clips(name, n, things=1, pace=lambda rng: 1.0):
    """Draw n clips of the toy world from `name` alone -> (n, 3, 16, 32, 32); several things
    overlap. pace(rng): the motion between two frames, in units of the usual one."""
    rng = random.Random(name)
    worlds = [world.sample_world(rng, things, overlap=things > 1) for _ in range(n)]
    return torch.cat([world.render([w], interval=pace(rng)) for w in worlds])


def fit(variant, seconds, seed, fastest=1, things=6):
    """Train a toy autoencoder for so many CPU seconds on one thread.

    2.5D and 3D: 15 % of the time goes to images, the rest to windows of 8 frames, every fourth step
    to single frames. VidTwin takes whole clips. things: objects in a clip."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)

    def train(model, share, images):
        objective = tae.Objective(model, tae.LOSSES["toy"])
        opt = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99))
        start, step, done = time.process_time(), 0, 0.0
        while done < 1:
            for group in opt.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
            pace = lambda rng, done=done: (world.motion_interval(rng, done, fastest)
                                           if fastest > 1 else 1.0)
            x = clips(f"{'image' if images else 'video'}/{seed}/{step}", 8, things, pace)
            if images:
                x = rearrange(x[:, :, ::4], "B C T H W -> (B T) C 1 H W")
            elif variant != "vidtwin":
                x = x[:, :, :1] if tae.is_image_step(step) else x[:, :, step % 9 : step % 9 + 8]
            opt.zero_grad()
            objective(x).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            step, done = step + 1, (time.process_time() - start) / (share * seconds)

    if variant == "vidtwin":
        model = tae.VidTwin(tae.VIDTWIN_PRESETS["toy"])
        train(model, 1.0, images=False)
    else:
        image = tae.TAE(replace(tae.PRESETS["toy"], variant="2d"))
        train(image, 0.15, images=True)
        model = tae.inflate(image, variant)
        train(model, 0.85, images=False)
    return model.eval()


def ssim(x, y):
    """Structural similarity of clips in [-1, 1] -> (B,), the mean over frames and channels.

    Gaussian window of 11 pixels, sigma 1.5, K = 0.01 and 0.03, where the window fits."""
    k = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(k, k) / k.sum() ** 2)[None, None].double()
    a, b = (rearrange(v.double().clamp(-1, 1) / 2 + 0.5, "B C T H W -> (B C T) 1 H W")
            for v in (x, y))                # float64: a variance is a difference of two squares
    blur = lambda v: F.conv2d(v, window)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    s = ((2 * mean_a * mean_b + 0.01**2) * (2 * cov + 0.03**2)
         / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return s.reshape(len(x), -1).mean(1).float()


def temporal_error(x, y):
    """RMS difference between the frame-to-frame changes of two clips, in units of [0, 1] -> (B,).

    It shows flicker and lag, to which PSNR is nearly blind."""
    change = (x.clamp(-1, 1) - y.clamp(-1, 1)).diff(dim=2) / 2
    return change.square().mean((1, 2, 3, 4)).sqrt()


# ---- 2. One model, all models --------------------------------------------------------------------

def job(variant, fastest, seed, seconds, folder):
    """Train and measure one model -> folder/VARIANT-FASTEST-SEED.json, written last."""
    model = fit(variant, seconds, seed, fastest)
    row = {"variant": variant, "fastest": fastest, "seed": seed, "seconds": seconds,
           "values": math.prod(model.latent_shape(16, 32, 32)),
           "parameters": sum(p.numel() for p in model.parameters())}
    for speed, pace in (("slow", 1.0), ("fast", 6.0)):
        x = clips(f"study/{speed}/0", 64, pace=lambda rng, pace=pace: pace)
        with torch.no_grad():
            y = torch.cat([model(part)[0] for part in x.split(16)]).clamp(-1, 1)
        for name, measure in zip(MEASURES, (tae.psnr, ssim, temporal_error)):
            row[f"{speed}_{name}"] = measure(x, y).mean().item()
    part = folder / f"{variant}-{fastest}-{seed}.part"
    part.write_text(json.dumps(row))
    part.replace(part.with_suffix(".json"))


def draw(table, path):
    """Plot mean and spread of each measure, for slow and for fast clips."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for ax, measure, label in zip(axes, MEASURES, ("PSNR, dB", "SSIM", "temporal error")):
        for i, (name, found) in enumerate(table.items()):
            for j, speed in enumerate(("slow", "fast")):
                mean, spread = found[f"{speed}_{measure}"]
                ax.errorbar(j + 0.08 * (i - 2.5), mean, spread, fmt="os"[i % 2], color=f"C{i // 2}",
                            mfc=f"C{i // 2}" if i % 2 else "w", capsize=3,
                            label=name if j == 0 else None)
        ax.set_xticks([0, 1], ["slow clips", "fast clips"])
        ax.set(xlim=(-0.5, 1.5), ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout(); figure.savefig(path, dpi=130); plt.close(figure)


def main():
    parser = common.Parser(__doc__, "autoencoders", seeds=3)
    parser.add_argument("--seconds", type=common.positive, default=180.0, help="CPU, each model")
    parser.add_argument("--job", nargs=3, metavar=("VARIANT", "FASTEST", "SEED"), help="internal")
    args = parser.parse_args()
    folder = args.out / f"models-{args.seconds:g}s"
    folder.mkdir(parents=True, exist_ok=True)
    if args.job:
        variant, fastest, seed = args.job
        return job(variant, int(fastest), int(seed), args.seconds, folder)

    grid = [(v, m, s) for s in range(args.seeds) for v in VARIANTS for m in FASTEST]
    todo = [j for j in grid if not (folder / f"{j[0]}-{j[1]}-{j[2]}.json").exists()]
    start = lambda j: subprocess.run(
        [sys.executable, __file__, "--out", str(args.out), "--seconds", str(args.seconds),
         "--job", *map(str, j)], check=True)
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(start, todo), desc="study", unit="model", initial=len(grid) - len(todo),
                  total=len(grid)))
    rows = [json.loads((folder / f"{v}-{m}-{s}.json").read_text()) for v, m, s in grid]
    keys, table = [f"{speed}_{m}" for speed in ("slow", "fast") for m in MEASURES], {}
    print("| autoencoder | " + " | ".join(keys) + " |\n" + "|---" * (1 + len(keys)) + "|")
    for v in VARIANTS:
        for m in FASTEST:
            mine = [r for r in rows if (r["variant"], r["fastest"]) == (v, m)]
            name = f"{v}, curriculum {'on' if m > 1 else 'off'}"
            found = common.mean_and_spread(mine, keys)
            table[name] = dict(zip(keys, found))
            print(f"| {name} | " + " | ".join(f"{a:.3f} +- {b:.3f}" for a, b in found) + " |")
    (args.out / "study.json").write_text(json.dumps({"table": table, "rows": rows}, indent=1))
    draw(table, args.out / "study.png")
    print(f"wrote {args.out / 'study.json'}, {args.out / 'study.png'}")


if __name__ == "__main__":
    main()
