"""A tiny run on two gloo ranks that is killed, stopped, damaged and starved, and ends with the same
bits as the run that nobody touched.

    pytest tests/chaos.py -m slow -s                    # about 6 minutes on 2 cores
    python tests/chaos.py [SEED]                        # the same, at other moments

One job under `torchrun --max-restarts`, in this order: 20 SIGKILLs of either rank at random moments
of every stage (the last three after what follows), SIGTERM to one rank, the newest checkpoint cut
in half, one bit of the newest flipped, a full disk (a tmpfs; without the right to mount one, a
limit on the size of a file). Proven: tae/tae.safetensors, model.safetensors, coupling.pt, the
latents, and the losses in log.jsonl are those of the untouched run, bit for bit; each time the work
goes on at the last checkpoint that was whole, and no more steps are lost than --train_*.every says;
what is damaged or cannot be written is named; nothing half written is left.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
EVERY = 4                       # steps between checkpoints: the most that a kill costs
TINY = f"""--device cpu --clips.count 1024 --train_tae.image_steps 40 --train_tae.steps 40
  --train_tae.batch 2 --train_tae.image_batch 8 --train_tae.every {EVERY} --steps 200 --batch 8
  --train_dit.every {EVERY} --dit.dim 48 --dit.depth 2 --text.width 32 --sample.prompts 4
  --sample.steps 3""".split()
TRAINED = ("tae/image", "tae/video", "dit")             # stages with checkpoints, in their folders
KILLS = {"tae/image": 4, "tae/video": 4, "latents": 3, "coupling": 2, "dit": 4, "sample": 2,
         "report": 1}


# ---- the job: torchrun, its ranks, what they say ------------------------------------------------


def wait(what, true, seconds=120):
    """Until true() is; its value."""
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)
    return value


def workers(agent):
    """rank -> process id of the ranks that this torchrun process has started."""
    found = {}
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        try:
            env = dict(x.split("=", 1) for x in Path(f"/proc/{pid}/environ").read_text().split("\0")
                       if "=" in x)
        except OSError:                                             # it has ended just now
            continue
        if "RANK" in env:
            found[int(env["RANK"])] = int(pid)
    return found


class Job:
    """train.py on two ranks under torchrun; all that they say goes to one log."""

    def __init__(self, folder, log, restarts=30, limit=None):
        self.folder, self.log, self.old = folder, log, set()
        log.touch()
        self.since, self.rows = log.stat().st_size, len(rows(folder))
        less = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        with log.open("a") as out:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                 "--max-restarts", str(restarts), "train.py", "--workdir", str(folder), *TINY,
                 "--dp", "2"],                                          # shards: more can go wrong
                cwd=ROOT, stdout=out, stderr=out, preexec_fn=less,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def said(self):
        """What was said since this start."""
        with self.log.open("rb") as f:
            f.seek(self.since)
            return f.read().decode(errors="replace")

    def ranks(self):
        """Both ranks, neither of them one that was there before the last kill."""
        def new():
            assert self.agent.poll() is None, "it has ended\n" + self.said()[-3000:]
            found = workers(self.agent.pid)
            return len(found) == 2 and not self.old & set(found.values()) and found
        return wait("two ranks", new)

    def stage(self):
        """The stage that the ranks of now work at; "" before the first."""
        now = rows(self.folder)[self.rows :]
        starts = [i for i, row in enumerate(now) if row.get("event") == "start"]
        return after(now[-1]) if starts else ""

    def reached(self, stage):
        """Wait until the ranks of now have begun a stage, or a later one."""
        self.ranks()
        order = ["", *KILLS]
        wait(f"{stage} to go on", lambda: order.index(self.stage()) >= order.index(stage))

    def signal(self, rank, number):
        found = self.ranks()
        self.old, self.rows = set(found.values()), len(rows(self.folder))
        os.kill(found[rank], number)

    def end(self, seconds=300):
        """The exit status."""
        try:
            return self.agent.wait(seconds)
        finally:
            self.kill()

    def kill(self):
        if self.agent.poll() is None:
            for pid in [*workers(self.agent.pid).values(), self.agent.pid]:
                os.kill(pid, signal.SIGKILL)
            self.agent.wait()


# ---- what lies in a run folder ------------------------------------------------------------------


def rows(folder):
    """The rows of log.jsonl; one that a kill has cut is left out."""
    path, found = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def after(row):
    """The stage at work after a row of log.jsonl."""
    if row["stage"] == "run":
        return ""
    if row.get("event") != "done":
        return row["stage"]
    return {"tae": "latents", "latents": "coupling", "coupling": "dit", "dit": "sample",
            "sample": "report", "report": "report"}[row["stage"]]


def begins(folder, stage):
    """The steps at which a stage was begun, or gone on with."""
    return [r["step"] for r in rows(folder)
            if r["stage"] == stage and r.get("event") in ("begin", "resume")]


def losses(folder):
    """{(stage, step): loss}; of a step that was made twice, the last."""
    return {(r["stage"], r["step"]): r["loss"] for r in rows(folder) if "loss" in r}


def steps(folder):
    """Steps of the checkpoints in a folder that are whole."""
    return sorted(int(p.parent.name[5:]) for p in folder.glob("step_*/.metadata"))


def damaged(folder):
    """Whatever is left half written in a run folder, or is not what its checksum says."""
    bad = list(folder.rglob("*.part"))
    bad += [p for p in folder.rglob("step_*") if not (p / ".metadata").exists()]
    bad += [p for p in folder.rglob("*.crc32")
            if f"{zlib.crc32(p.with_suffix('').read_bytes()):08x}" != p.read_text()]
    for path in folder.rglob("*.safetensors"):
        load_file(path)                                             # or it raises
    return bad


def same(a, b):
    """Names of the results in which two run folders differ."""
    names = ["tae/image.safetensors", "tae/tae.safetensors", "model.safetensors"]
    names += [str(p.relative_to(a)) for p in a.glob("latents/*")]
    differ = [n for n in names if (a / n).read_bytes() != (b / n).read_bytes()]
    x, y = (torch.load(f / "coupling.pt", weights_only=True) for f in (a, b))
    flat = lambda v: v.tolist() if isinstance(v, torch.Tensor) else v
    differ += [f"coupling.pt {k}" for k in {**x, **y} if flat(x[k]) != flat(y[k])]
    return differ + ["log.jsonl"] * (losses(a) != losses(b))


# ---- what is done to it -------------------------------------------------------------------------


@contextmanager
def disk(folder):
    """A small disk of its own at `folder` -> resize(bytes); None where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(folder)]
    mounted = bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True
                                                                 ).returncode
    try:
        yield (lambda n: subprocess.run(["mount", "-o", f"remount,size={n}", str(folder)],
                                        check=True)) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def untouched(folder, log):
    """The run that nobody touches -> seconds that it spent in each stage."""
    job = Job(folder, log)
    try:
        assert job.end() == 0, job.said()[-3000:]
    finally:
        job.kill()
    seconds = dict.fromkeys(KILLS, 0.0)
    for a, b in zip(rows(folder), rows(folder)[1:]):
        if after(a) in seconds:
            seconds[after(a)] += b["time"] - a["time"]
    return seconds


def kill(job, stage, rank, delay):
    """SIGKILL, some seconds after a stage has begun -> the stage it hit (a later one, if this one
    was over sooner than expected), and a check of what is lost."""
    job.reached(stage)
    time.sleep(delay)
    stage = job.stage()
    there = max(steps(job.folder / stage), default=0) if stage in TRAINED else 0
    before = len(rows(job.folder))
    job.signal(rank, signal.SIGKILL)

    def check():
        """Steps that were lost, None if the stage had ended."""
        log = rows(job.folder)
        start = next(i for i, r in enumerate(log) if i >= before and r.get("event") == "start")
        first = next((r for r in log[start:] if r.get("event") in ("begin", "resume")), None)
        made = [r["step"] for r in log[:start] if r["stage"] == stage and "loss" in r]
        if stage not in TRAINED or first is None or first["stage"] != stage or not made:
            return None
        assert first["step"] >= there, f"{stage}: went on at {first}, not at {there}"
        lost = made[-1] + 1 - first["step"]
        assert 0 <= lost <= EVERY, f"{stage}: {lost} steps lost"
        return lost

    return stage, check


def stop(job, beyond=0):
    """SIGTERM to one rank in the dit stage, after step `beyond`: a checkpoint, exit status 0."""
    job.reached("dit")
    at = begins(job.folder, "dit")[-1]
    wait("some steps", lambda: rows(job.folder)[-1]["step"] > max(beyond, at) + 1)
    job.signal(1, signal.SIGTERM)
    assert job.end(60) == 0, job.said()[-3000:]
    last = rows(job.folder)[-1]
    assert (last["stage"], last["event"]) == ("dit", "stopped"), last
    assert last["step"] == steps(job.folder / "dit")[-1]


def harm(path, how):
    """Cut the largest file of a checkpoint in half, or flip one bit of it."""
    big = max(path.iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(big.read_bytes())
    content[len(content) // 2] ^= 1
    big.write_bytes(content[: len(content) // 2] if how == "cut in half" else content)


def starve(folder, log, resize):
    """No space for the next checkpoint: a line that names it, and the earlier ones are whole."""
    kept, limit = steps(folder / "dit"), None
    size = sum(p.stat().st_size for p in (folder / f"dit/step_{kept[-1]:07d}").iterdir())
    if resize:
        now = os.statvfs(folder)
        resize((now.f_blocks - now.f_bfree) * now.f_frsize + size // 2)
    else:
        limit = size // 4                                           # half of a rank's file
    job = Job(folder, log, restarts=0, limit=limit)
    try:
        assert job.end() != 0
    finally:
        job.kill()
        if resize:
            resize("512m")
    lines = sorted({r[r.index("train.py:"):] for r in job.said().splitlines()
                    if "could not be written" in r})                # each rank says the same
    assert len(lines) == 1 and f"dit/step_{(kept[-1] // EVERY + 1) * EVERY:07d}" in lines[0], \
        job.said()[-3000:]
    assert "the one before is kept" in lines[0] and steps(folder / "dit") == kept
    return lines[0]


def torment(folder, log, resize, seconds, seed, say=print):
    """The job and everything that happens to it -> steps lost by each SIGKILL while training."""
    rng, checks, hit = random.Random(seed), [], set()

    def kills(job, stages):
        for stage in stages:
            first = rng.randrange(2)
            for rank in [(first + i) % 2 for i in range(KILLS[stage])]:
                delay = rng.uniform(0, seconds[stage] / (KILLS[stage] + 1))
                where, check = kill(job, stage, rank, delay)
                checks.append(check)
                hit.add(where)
                say(f"SIGKILL of rank {rank}, {delay:.2f} s into {where}")

    job = Job(folder, log)
    try:
        kills(job, ["tae/image", "tae/video", "latents", "coupling", "dit"])
        stop(job)
        say("SIGTERM: checkpoint written, exit status 0")
        for how in ("cut in half", "changed by one bit"):
            before, newest = steps(folder / "dit")[-2:]
            path = folder / f"dit/step_{newest:07d}"
            harm(path, how)
            job = Job(folder, log)
            stop(job, newest)
            assert f"{path}: damaged" in job.said()
            assert begins(folder, "dit")[-1] == before, "not the one before it"
            say(f"{path.name} {how}: named as damaged, gone on at {before}")
        say(starve(folder, log, resize))
        job = Job(folder, log)
        kills(job, ["sample", "report"])
        assert job.end() == 0, job.said()[-3000:]
    finally:
        job.kill()
    assert hit == set(KILLS), f"no SIGKILL in {set(KILLS) - hit}"
    return [lost for lost in (check() for check in checks) if lost is not None]


@pytest.mark.slow
def test_chaos(tmp_path, seed=0):
    seconds = untouched(tmp_path / "untouched", tmp_path / "untouched.log")
    print({stage: round(s, 1) for stage, s in seconds.items()})
    with disk(tmp_path / "chaos") as resize:
        print("full disk by", "a tmpfs" if resize else "a limit on the size of a file")
        lost = torment(tmp_path / "chaos", tmp_path / "chaos.log", resize, seconds, seed)
        print(f"steps lost by each SIGKILL while training, of {EVERY} at most: {lost}")
        assert not damaged(tmp_path / "chaos")
        differ = same(tmp_path / "untouched", tmp_path / "chaos")
        assert not differ, differ
    print("the same bits as the run that nobody touched")


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        test_chaos(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 0)
