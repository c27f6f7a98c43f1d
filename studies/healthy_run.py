"""Question: what does a healthy run look like? How does the loss fall, and what do samples look
like after 10, 25, 50 and 100 % of the steps?

Run:    python studies/healthy_run.py runs/toy
        python studies/healthy_run.py runs/small --watch     # while train.py is at work there
Time:   10 minutes on 2 cores, after `python train.py --scale toy`; continues where it was stopped
Answer: a picture to compare your own run with (assets/healthy.png). Colour and direction come
        first, letters and outlines last; the validation loss falls to the end, 0.58 to 0.27.

The dit stage is trained once more on the latents of the run. The averaged weights of a checkpoint
at each tenth, and at a quarter, are kept while it trains; each makes the same clips from the same
prompts and noise. --watch follows the run itself: for one that takes hours.
"""
import json
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache

import common
import torch
import torch.distributed.checkpoint as dcp

import train
import world

SHOWN = (10, 25, 50, 100)                               # percent of the steps
KEPT = (10, 20, 25, 30, 40, 50, 60, 70, 80, 90)
FIGURES = ("color", "shape", "direction", "text")


def averaged(checkpoint, cfg):
    """Read the averaged weights of text encoders and DiT out of a checkpoint of the dit stage."""
    part = "average" if cfg.train_dit.ema else "model"
    state = {part: {k: torch.empty_like(w)
                    for k, w in train.TextToVideo(cfg).named_parameters()}}
    dcp.load(state, storage_reader=train.SafeReader(checkpoint), no_dist=True)
    return state[part]


@lru_cache
def read(file, written):
    """Read the config of a mark, once for each time that it was written."""
    return train.read_config(file)


def keep(out, folder, cfg, marks):
    """Keep each checkpoint that is whole and of a step in marks, {percent: step}, as a file that
    load_run reads -> {percent: file}, with the result of the run if it has ended."""
    files = {percent: out / f"at_{percent:03d}.safetensors" for percent in marks}
    # And of no other run.
    kept = lambda file: file.exists() and read(file, file.stat().st_mtime_ns) == cfg
    for percent, file in files.items():
        checkpoint = folder / f"dit/step_{marks[percent]:07d}"
        if (checkpoint / ".metadata").exists() and not kept(file):
            tae = train.load_tensors(folder / "tae/tae.safetensors")
            train.save_tensors(file, {f"tae.{k}": v for k, v in tae.items()}
                               | averaged(checkpoint, cfg), config=json.dumps(asdict(cfg)))
    files = {percent: file for percent, file in files.items() if kept(file)}
    result = folder / "model.safetensors"
    return files | ({100: result} if result.exists() else {})


def train_and_keep(base, out, kept=KEPT, seed=None, threads=2):
    """Train the dit stage of `base` again -> {percent: a file with the weights at that point}.

    kept: multiples of 5 below 100. seed: by default that of `base`."""
    folder, cfg = out / "run", train.read_config(base)
    if seed is not None:
        cfg = replace(cfg, seed=seed)
    every = cfg.train_dit.steps // 20
    marks = {percent: percent // 5 * every for percent in kept}
    if every < 1:
        raise SystemExit(f"{base}: fewer than 20 steps in the dit stage")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(common.train, folder, {
            "base": base, "stage": "dit", "seed": cfg.seed, "train_dit.every": every},
            "model.safetensors", threads=threads)
        while not running.done():
            keep(out, folder, cfg, marks)
            time.sleep(0.1)
        running.result()
    files = keep(out, folder, cfg, marks)
    if lost := sorted(set(marks) - set(files)):         # it trained on while nobody watched
        raise SystemExit(f"{out}: nothing was kept at {lost} %; remove it, and start again")
    return files


def watch(folder, out, kept=KEPT):
    """Keep those marks at which a run writes a checkpoint, while it trains -> {percent: file}."""
    cfg = train.read_config(folder)
    marks = {p: p * cfg.train_dit.steps // 100 for p in kept}
    marks = {p: step for p, step in marks.items() if step % cfg.train_dit.every == 0}
    while not (folder / "model.safetensors").exists():
        keep(out, folder, cfg, marks)
        time.sleep(0.5)
    return keep(out, folder, cfg, marks)


def picture(losses, frames, prompts, path):
    """Draw the loss of each stage above; below, a row of middle frames for each percentage."""
    plt = common.pyplot()
    figure = plt.figure(figsize=(1.5 * len(prompts) + 0.5, 3 + 1.4 * len(frames) + 0.8))
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1.4 * len(frames) + 0.8))
    train.plot_losses(above, losses)
    above.subplots_adjust(wspace=0.3)
    axes = below.subplots(len(frames), len(prompts), squeeze=False)
    for row, (percent, images) in zip(axes, frames.items()):
        for ax, image, prompt in zip(row, images, prompts):
            ax.imshow(image.permute(1, 2, 0) / 2 + 0.5)
            ax.set(xticks=[], yticks=[])
            if percent == 100:
                ax.set_xlabel(textwrap.fill(prompt, 20), fontsize=7)
        row[0].set_ylabel(f"{percent} %")
    figure.savefig(path, dpi=110, bbox_inches="tight"); plt.close(figure)
    print(f"wrote {path}")


def main():
    parser = common.Parser(__doc__, "healthy_run", of_run=True)
    parser.add_argument("--prompts", type=common.whole, default=40, help="that are judged")
    parser.add_argument("--watch", action="store_true", help="keep what RUN has at each tenth, "
                        "while it trains; trains nothing")
    args = parser.parse_args()
    out = args.out / args.run.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    try:
        cfg = train.read_config(args.run)
        parser.needs_judge(args.run, cfg)
        files = (watch if args.watch else train_and_keep)(args.run, out)
    except train.UserError as error:
        parser.error(str(error))
    dit = train.Run(args.run if args.watch else out / "run", cfg).losses()["dit"]
    losses = train.Run(args.run, cfg).losses() | {"dit": dit}

    c, source = cfg.clips, train.ToyClips(cfg)
    real, captions = zip(*(source.clip("heldout", i, c.shape) for i in range(64)))
    tae = train.load_run(files[100]).tae                        # that of all marks
    with torch.no_grad():
        z = tae.normalize(tae.encode(torch.stack(real)).mean)
    asked = [prompt for kind, prompt in world.test_prompts(
        cfg.seed, args.prompts, c.things, c.frames, c.script) if kind == "trained"]
    shown = asked[:: max(1, len(asked) // 8)][:8]
    frames = {}
    print("| steps | loss | validation loss | " + " | ".join(FIGURES) + " |\n"
          + "|---" * (3 + len(FIGURES)) + "|")
    for percent, file in files.items():
        loaded = train.load_run(file)
        clips = common.sampled(loaded, asked)
        right = world.accuracy([world.judge(clip, p) for clip, p in zip(clips, asked)])
        steps = round(percent / 100 * len(dit))
        near = [dit[i] for i in range(max(0, steps - max(1, len(dit) // 40)), steps)]
        held_out = train.validation_loss(loaded, z, list(captions))
        print(f"| {percent} % | {sum(near) / len(near):.3f} | {held_out:.3f} | "
              + " | ".join(f"{right[k]:.2f}" if k in right else "" for k in FIGURES) + " |")
        if percent in SHOWN:
            frames[percent] = [clips[asked.index(p)][:, c.frames // 2] for p in shown]
    picture(losses, frames, shown, out / "healthy.png")


if __name__ == "__main__":
    main()
