"""Question: what does the training loop add to the bare step, and how much faster are two ranks?

Run:    python studies/bench_train.py --rounds 5 --scales toy
Time:   5 minutes on 2 cores
Answer: a step takes 1.01 times the bare one; two ranks with a copy each do 1.45 times the steps of
        one, where two processes that do not communicate do 1.71.

`overhead`: a step of the dit stage (batch made, forward, backward, clipping, optimizer, moving
average, log, checkpoints) over the bare forward, backward and optimizer step of such a batch, one
of each in turn in one process. A checkpoint's extra time counts as often as the preset writes
one. `dp 2`, `replicate 2`: clips a second of two ranks, the model
sharded or copied, over those of one, with the preset's batch or --batch; each measurement is a
process of its own, in turn. `apart`: two processes that do not communicate, at once, each with
half the batch: about what two ranks can reach. Medians over the rounds. Latents are random
numbers: what they are does not change the time. A run begins with large gradients, which are
scaled; --train_dit.clip is 10 here, so that none are, as in 98 % of a run's steps.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import common
import torch
import torch.distributed as dist

import train

STEPS = {"toy": (3, 24, 12), "small": (3, 24, 12)}  # to warm up, in all, until the checkpoint


def make_run(scale, folder, replicate, batch):
    """A run that has come to its dit stage, with 1024 clips of noise."""
    cfg = train.SCALES[scale]()
    _, steps, every = STEPS[scale]
    cfg.coupling, cfg.clips = "independent", replace(cfg.clips, count=1024)
    cfg.train_dit = replace(cfg.train_dit, steps=steps, every=every, batch=batch, clip=10.0)
    run = train.Run(folder, train.finish(cfg), "cpu", train.make_mesh(replicate=replicate))
    if train.rank() == 0:
        model = train.autoencoder.autoencoder(run.cfg.autoencoder_config)
        train.save_tensors(folder / "tae/tae.safetensors", model.state_dict())
        shape, clips = model.latent_shape(*cfg.clips.shape), train.ToyClips(run.cfg)
        captions = [clips.clip("train", i, cfg.clips.shape)[1] for i in range(64)]
        features = train.text_cond.TextConditioner(run.cfg.text).encode(captions)
        index = []
        for s in range(4):
            index.append([f"shard_{s:05d}.safetensors", 256, *shape])
            train.save_tensors(folder / "latents" / index[s][0], {
                "mean": torch.randn(256, *shape), "logvar": torch.full((256, *shape), -6.0),
                "caption": torch.arange(256) % 64,
                **{f"text.{k}": v for k, v in features.items()}},
                captions=json.dumps([captions[i % 64] for i in range(256)]))
        train.write_json(folder / "latents/index.json", index)
    run.mesh.meet("a run to measure")
    return run


def loop(run, bare=None):
    """Seconds of a step of train.py without the first ones, of what a checkpoint adds to the step
    that it is written behind, and of `bare`, called after each."""
    warm, stamps, saved = STEPS[run.cfg.scale][0], [], set()
    log, save = train.Run.log, train.Checkpoints.save

    def stamp(self, stage, step, **figures):
        log(self, stage, step, **figures)
        if "loss" in figures:                           # and not an event
            ended = time.perf_counter()
            if bare is not None:
                bare()
            stamps.append((ended, time.perf_counter()))

    def note(self, step):
        saved.add(step)
        save(self, step)

    train.Run.log, train.Checkpoints.save = stamp, note
    try:
        train.train_dit(run)
    finally:
        train.Run.log, train.Checkpoints.save = log, save
    took = {i: stamps[i][0] - stamps[i - 1][1] for i in range(warm, len(stamps))}
    plain = statistics.mean(t for i, t in took.items() if i not in saved)
    behind = statistics.mean(t for i, t in took.items() if i in saved) - plain
    return {"loop": plain + behind / train.SCALES[run.cfg.scale]().train_dit.every,
            "checkpoint": behind,
            "bare": statistics.mean(after - ended for ended, after in stamps[warm:])}


def bare_step(run):
    """A function: forward, backward and optimizer step on one batch of the same run."""
    model = train.TextToVideo(run.cfg)
    latents = train.Latents(run.folder / "latents")
    (part,) = train.dit_batches(run, latents, model.text)(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        model(*part).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure(scale, replicate, parts, batch):
    """What one process, or one of two ranks, measures; rank 0 prints it. Of several processes that
    exchange nothing each has its part of the batch."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    name = [tempfile.mkdtemp() if train.rank() == 0 else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    folder = Path(name[0])
    run = make_run(scale, folder, replicate, batch // parts)
    alone = train.world_size() == parts == 1
    found = loop(run, bare_step(run) if alone else None)
    if train.rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
        shutil.rmtree(folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(scale, batch, ranks, replicate=1, parts=1):
    """One measurement in processes of its own, of which there are `parts` at once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(launch if ranks == 2 else []), __file__, "--measure", scale,
               "--replicate", str(replicate), "--parts", str(parts), "--batch", str(batch)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(parts)]
    found = []
    for process in running:
        said, error = process.communicate()
        lines = [line for line in said.splitlines() if line.startswith("FOUND ")]
        if process.returncode or not lines:
            raise SystemExit(error[-2000:])
        found.append(json.loads(lines[0].removeprefix("FOUND ")))
    return max(found, key=lambda f: f["loop"])


def main():
    """The command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("--rounds", type=common.whole, default=5)
    parser.add_argument("--scales", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--batch", type=common.whole, help="in place of the preset's")
    parser.add_argument("--measure", choices=list(STEPS), help="internal")
    parser.add_argument("--replicate", type=int, default=1, help="internal")
    parser.add_argument("--parts", type=int, default=1, help="internal")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.replicate, args.parts, args.batch)
    raw = {}
    print("| scale | batch | step, s | overhead | dp 2 | replicate 2 | apart |")
    print("|---" * 7 + "|")
    for scale in args.scales:
        one, two, copies, apart = [], [], [], []
        batch = args.batch or train.SCALES[scale]().train_dit.batch
        for _ in range(args.rounds):
            one.append(start(scale, batch, 1))
            two.append(start(scale, batch, 2))
            copies.append(start(scale, batch, 2, replicate=2))
            apart.append(start(scale, batch, 1, parts=2))
        raw[scale] = {"one": one, "dp 2": two, "replicate 2": copies, "apart": apart}
        overhead = statistics.median(r["loop"] / r["bare"] for r in one)
        speedups = [statistics.median(a["loop"] / b["loop"] for a, b in zip(one, both))
                    for both in (two, copies, apart)]
        step = statistics.median(r["loop"] for r in one)
        print(f"| {scale} | {batch} | {step:.3f} | {overhead:.3f} | "
              + " | ".join(f"{s:.2f}" for s in speedups) + " |", flush=True)
    path = Path("out/studies/bench_train.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
