"""Question: how fast is the TAE at Movie Gen's size, and how much memory does it take, beside the
autoencoders of Wan 2.1, HunyuanVideo and CogVideoX at their published sizes in diffusers?

Run:    pip install diffusers && python studies/bench_tae.py
Time:   40 minutes on 2 cores
Answer: streamed, it is as fast as Wan's or faster, in the same memory; whole, it is half as fast in
        three to four times the memory, still ahead of the other two in speed.

Random weights, fp32, the same clips, in turn in one process; the peak memory of each is that of a
process of its own. Pixels per second: T * H * W divided by the seconds that encode and decode take,
the median of `--repeats`. Peak memory: the largest resident set less what the imports take, so
weights, activations and the two clips.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common
import torch

import tae
import text_cond

SIZE = 128
NAMES = ("filmstrip 2.5D, streamed", "filmstrip 2.5D, whole", "AutoencoderKLWan",
         "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX")


def build(name: str):
    """(parameters in millions, clip -> reconstruction) of one autoencoder."""
    torch.manual_seed(0)
    if name.startswith("filmstrip"):
        model = tae.TAE(tae.PRESETS["paper"]).eval()
        stream = name.endswith("streamed")
        run = lambda x: model.decode(model.encode(x, stream).mean, x.shape[2], stream=stream)
    else:
        import diffusers
        model = getattr(diffusers, name)().eval()
        run = lambda x: model.decode(model.encode(x).latent_dist.mode()).sample
    return sum(p.numel() for p in model.parameters()) / 1e6, run


def clip(frames: int) -> torch.Tensor:
    return torch.rand(1, 3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def memory(name: str, frames: int) -> float:
    """Peak of this fresh process while it encodes and decodes once, less the imports, in MiB."""
    if not name.startswith("filmstrip"):
        text_cond.make_torchvision_importable()
        import diffusers
        getattr(diffusers, name)                # imported when asked for
    x, before = clip(frames), common.peak_memory()
    _, run = build(name)
    assert run(x).shape == x.shape
    return common.peak_memory() - before


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("--frames", type=common.whole, nargs="+", default=[17, 33])
    parser.add_argument("--repeats", type=common.whole, default=2)
    parser.add_argument("--skip-memory", action="store_true", help="seconds alone")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "FRAMES"), help="of one, and stop")
    args = parser.parse_args()
    if args.memory:
        print(memory(args.memory[0], int(args.memory[1])))
        return
    rows = []
    for frames in args.frames:
        for name in NAMES:
            rows.append({"model": name, "frames": frames, "peak_mib": "-"})
            if args.skip_memory:
                continue
            out = subprocess.run([sys.executable, __file__, "--memory", name, str(frames)],
                                 check=True, capture_output=True, text=True,
                                 env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
            rows[-1]["peak_mib"] = round(float(out.stdout))
            print(f"{name}, {frames} frames: {out.stdout.strip()} MiB", flush=True)
    text_cond.make_torchvision_importable()
    models = {name: build(name) for name in NAMES}
    seconds: dict = {(r["model"], r["frames"]): [] for r in rows}
    for repeat in range(args.repeats + 1):                      # the first warms up
        for row in rows:
            x, began = clip(row["frames"]), time.perf_counter()
            models[row["model"]][1](x)
            spent = time.perf_counter() - began
            print(f"{repeat}: {row['model']}, {row['frames']} frames: {spent:.2f} s", flush=True)
            if repeat:
                seconds[row["model"], row["frames"]].append(spent)
    print("| autoencoder | parameters, M | frames | kilopixels/s | peak, MiB |")
    print("|---|---|---|---|---|")
    for row in rows:
        row["parameters_m"] = round(models[row["model"]][0], 1)
        row["seconds"] = seconds[row["model"], row["frames"]]
        row["pixels_per_s"] = row["frames"] * SIZE**2 / statistics.median(row["seconds"])
        print(f"| {row['model']} | {row['parameters_m']} | {row['frames']} | "
              f"{row['pixels_per_s'] / 1e3:.1f} | {row['peak_mib']} |")
    path = Path("out/studies/bench_tae.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
