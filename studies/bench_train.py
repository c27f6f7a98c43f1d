"""Question: what does the training loop add to the bare step, and how much faster are two ranks?

Run:    python studies/bench_train.py --rounds 5 --scales toy
Time:   8 minutes on 2 cores; `--scales small` 50 minutes
Answer: a step takes 1.01 times the bare one; two ranks with a copy each do 1.52 times the steps of
        one, where two processes that never exchange a word do 1.68.

`overhead`: a step of the dit stage (batch made, forward, backward, clipping, optimizer, moving
average, log, checkpoints) over the bare forward, backward and optimizer step of such a batch, one
of each in turn in one process. What a checkpoint adds to the step that it is written behind counts
as often as the preset writes one. `dp 2`, `replicate 2`: clips a second of two ranks, the model
sharded or copied, over those of one, with the preset's batch; each measurement is a process of its
own, in turn. `apart`: two processes that never exchange a word, at once, each with half the batch:
what the machine lets two ranks reach. Medians over the rounds. Latents are random numbers: what
they are does not change the time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import tae
import train

STEPS = {"toy": (3, 24), "small": (1, 5)}           # to warm up, in all


def make_run(scale, folder, replicate=1, parts=1):
    """A run that has come to its dit stage, with 1024 clips of noise."""
    cfg = train.SCALES[scale]()
    cfg.coupling, cfg.clips = "independent", replace(cfg.clips, count=1024)
    steps, batch = STEPS[scale][1], cfg.train_dit.batch // parts
    cfg.train_dit = replace(cfg.train_dit, steps=steps, every=steps, batch=batch)
    run = train.Run(folder, train.finish_config(cfg), torch.device("cpu"),
                    train.make_mesh(replicate=replicate))
    if train.rank() == 0:
        model = tae.autoencoder(run.cfg.autoencoder_config)
        train.save_tensors(folder / "tae/tae.safetensors", model.state_dict())
        shape = model.latent_shape(cfg.clips.frames, cfg.clips.size, cfg.clips.size)
        clips, here = train.ToyClips(run.cfg), folder / "latents"
        captions = [clips.clip("train", i)[1] for i in range(64)]
        for s in range(4):
            train.save_tensors(here / train.shard_file(s), {
                "mean": torch.randn(256, *shape), "logvar": torch.full((256, *shape), -6.0)})
        text = train.text_cond.TextConditioner(run.cfg.text)
        train.save_tensors(here / train.text_file(0), text.encode(captions))
        train.write_json(here / "captions.json", {
            "captions": captions, "of": [i % 64 for i in range(1024)],
            "rows": [list(range(256 * s, 256 * (s + 1))) for s in range(4)],
            "shapes": [shape] * 4})
    train.barrier()
    return run


def loop(run, folder, bare=None):
    """Seconds of a step of train.py without the first ones, of what a checkpoint adds to the step
    that it is written behind, and of `bare`, called after each."""
    warm, stamps, add, save = STEPS[run.cfg.scale][0], [], train.Metrics.add, train.Checkpoints.save
    saved = set()

    def stamp(self, *args):
        add(self, *args)
        ended = time.perf_counter()
        if bare is not None:
            bare()
        stamps.append((ended, time.perf_counter()))

    def note(self, *args):
        saved.add(len(stamps))
        save(self, *args)

    train.Metrics.add, train.Checkpoints.save = stamp, note
    try:
        train.train_phase(run, "dit", run.latents, folder, folder / "model.safetensors")
    finally:
        train.Metrics.add, train.Checkpoints.save = add, save
    took = {i: stamps[i][0] - stamps[i - 1][1] for i in range(warm, len(stamps))}
    plain = statistics.mean(t for i, t in took.items() if i not in saved)
    behind = statistics.mean(t for i, t in took.items() if i in saved) - plain
    return {"loop": plain + behind / (train.SCALES[run.cfg.scale]().train_dit.every // 2),
            "checkpoint": behind,
            "bare": statistics.mean(after - ended for ended, after in stamps[warm:])}


def bare_step(run):
    """A function: forward, backward and optimizer step on one batch of the same run."""
    caught = []

    def catch(run, stage, folder, model, t, steps, losses):
        caught.extend((model, next(losses(0))))
        raise StopIteration

    optimize, train.optimize = train.optimize, catch
    try:
        train.train_phase(run, "dit", run.latents, run.folder, run.folder / "none.safetensors")
    except StopIteration:
        pass
    finally:
        train.optimize = optimize
    model, (part,) = caught
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        part(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure(scale, replicate, parts):
    """What one process, or one of two ranks, measures; rank 0 prints it."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    name = [tempfile.mkdtemp() if train.rank() == 0 else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    folder = Path(name[0])
    run = make_run(scale, folder, replicate, parts)
    alone = train.world_size() == parts == 1
    found = loop(run, folder / "dit0", bare_step(run) if alone else None)
    if train.rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
        train.shutil.rmtree(folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(scale, ranks, replicate=1, parts=1):
    """One measurement in processes of its own, of which there are `parts` at once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(launch if ranks == 2 else []), __file__, "--measure", scale,
               "--replicate", str(replicate), "--parts", str(parts)]
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scales", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--measure", choices=list(STEPS), help="internal")
    parser.add_argument("--replicate", type=int, default=1, help="internal")
    parser.add_argument("--parts", type=int, default=1, help="internal")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.replicate, args.parts)
    raw = {}
    print("| scale | batch | step, s | overhead | dp 2 | replicate 2 | apart |")
    print("|---" * 7 + "|")
    for scale in args.scales:
        one, two, copies, apart = [], [], [], []
        for _ in range(args.rounds):
            one.append(start(scale, 1))
            two.append(start(scale, 2))
            copies.append(start(scale, 2, replicate=2))
            apart.append(start(scale, 1, parts=2))
        raw[scale] = {"one": one, "dp 2": two, "replicate 2": copies, "apart": apart}
        overhead = statistics.median(r["loop"] / r["bare"] for r in one)
        speedups = [statistics.median(a["loop"] / b["loop"] for a, b in zip(one, both))
                    for both in (two, copies, apart)]
        step = statistics.median(r["loop"] for r in one)
        batch = train.SCALES[scale]().train_dit.batch
        print(f"| {scale} | {batch} | {step:.3f} | {overhead:.3f} | "
              + " | ".join(f"{s:.2f}" for s in speedups) + " |", flush=True)
    path = Path("out/studies/bench_train.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
