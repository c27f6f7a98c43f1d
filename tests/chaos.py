"""A tiny run on two gloo ranks that is killed, stopped, damaged and starved, and ends with the same
bits as the run that nobody touched.

    pytest tests/chaos.py -m slow                       # about 9 minutes on 2 cores
    python tests/chaos.py [SEED]                        # the same with a log, other moments

One job under `torchrun --max-restarts`, in this order: 20 SIGKILLs of either rank at random moments
of every stage (the last three kinds after what follows), SIGTERM to one rank, the newest checkpoint
cut in half while the job is down, a full disk (a tmpfs; without the right to mount one, a limit on
the size of a file). Proven: tae/tae.safetensors, dit/model.safetensors, coupling.pt, the latents
and metrics.csv are those of the untouched run, bit for bit; each time the work goes on at the last
checkpoint that was in its place, and no more steps are lost than --train_*.every says (one that was
being written counts as lost); what is damaged or cannot be written is named; nothing half written
is left.
"""
import json
import os
import random
import re
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
EVERY = 4                       # steps that a kill costs at most
APART = EVERY // 2              # between two checkpoints
TINY = f"""--device cpu --clips.count 1024 --train_tae.image_steps 40 --train_tae.steps 40
  --train_tae.batch 2 --train_tae.image_batch 8 --train_tae.every {EVERY} --steps 80 --batch 8
  --train_dit.every {EVERY} --dit.dim 48 --dit.depth 2 --text.width 32 --sample.prompts 4
  --sample.steps 3""".split()
FOLDER = {"tae/image": "tae/image", "tae/video": "tae", "dit": "dit"}     # of the checkpoints
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
        self.since, self.began = log.stat().st_size, time.time()
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
        """What was said since this start, or since the last restart that `ranks` saw."""
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

    def fresh(self):
        """Wait for the ranks that come after a kill, and listen only to them."""
        found = self.ranks()
        if self.old:
            self.since, self.began = self.log.stat().st_size, time.time()
        self.old = set()
        return found

    def inside(self, stage):
        """Whether these ranks have begun this stage: its progress bar is there; report has none."""
        if stage == "report":
            return any(p.stat().st_mtime > self.began
                       for p in self.folder.glob("reconstructions/*.gif"))
        return f"{'sdot' if stage == 'coupling' else stage}:" in self.said()

    def stage(self):
        """The last stage that these ranks have begun."""
        return next((stage for stage in reversed(KILLS) if self.inside(stage)), "")

    def signal(self, rank, number):
        found = self.ranks()
        self.old = set(found.values())
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


def events(folder, what="start"):
    path = folder / "events.jsonl"
    rows = [json.loads(r) for r in path.read_text().splitlines()] if path.exists() else []
    return [r for r in rows if r["event"] == what]


def steps(folder):
    """Steps of the checkpoints in a folder that are in their place."""
    return sorted(int(p.name[5:]) for p in folder.glob("step_*"))


def damaged(folder):
    """Whatever is left half written in a run folder, or is not what its checksum says."""
    bad = list(folder.rglob("*.tmp")) + list(folder.rglob("coupling.partial"))
    sums = [(p.parent, json.loads(p.read_text())) for p in folder.rglob("sums.json")]
    sums += [(p.parent, json.loads(p.read_text())["shards"])
             for p in folder.glob("latents/index.json")]
    for where, table in sums:
        bad += [where / n for n, crc in table.items()
                if f"{zlib.crc32((where / n).read_bytes()):08x}" != crc]
    for path in folder.rglob("*.safetensors"):
        load_file(path)                                             # or it raises
    return bad


def same(a, b):
    """Names of the results in which two run folders differ."""
    names = ["tae/tae.safetensors", "dit/model.safetensors", "metrics.csv", "latents/captions.json"]
    names += [str(p.relative_to(a)) for p in a.glob("latents/*.safetensors")]
    differ = [n for n in names if (a / n).read_bytes() != (b / n).read_bytes()]
    x, y = (torch.load(f / "coupling.pt", weights_only=True) for f in (a, b))
    flat = lambda v: v.tolist() if isinstance(v, torch.Tensor) else v
    return differ + [f"coupling.pt {k}" for k in {**x, **y} if flat(x[k]) != flat(y[k])]


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
    job, seen = Job(folder, log), {}
    try:
        while job.agent.poll() is None:
            for stage in KILLS:
                if stage not in seen and job.inside(stage):
                    seen[stage] = time.monotonic()
            time.sleep(0.02)
        assert job.end() == 0, job.said()[-3000:]
    finally:
        job.kill()
    assert set(seen) == set(KILLS)
    ends = [*list(seen.values())[1:], time.monotonic()]
    return {stage: end - began for (stage, began), end in zip(seen.items(), ends)}


def kill(job, stage, rank, delay):
    """SIGKILL, some seconds after a stage has begun -> the stage it hit (a later one, if this one
    was over sooner than expected), and a check of what is lost."""
    job.fresh()
    order = ["", *KILLS]
    wait(f"{stage} to go on", lambda: order.index(job.stage()) >= order.index(stage))
    time.sleep(delay)
    stage, there, before = job.stage(), 0, len(events(job.folder))
    if stage in FOLDER:
        there = max(steps(job.folder / FOLDER[stage]), default=0)
    job.signal(rank, signal.SIGKILL)
    shown = [int(n) for n in re.findall(rf"{stage}: .*?\| (\d+)/\d+ \[", job.said())]

    def check():
        """Steps that were lost, None if the stage had ended."""
        after = events(job.folder)[before:]
        if stage not in FOLDER or not after or after[0]["stage"] != stage:
            return None
        assert after[0]["step"] >= there, f"{stage}: went on at {after[0]}, not at {there}"
        lost = max(shown) - after[0]["step"]
        assert lost <= EVERY, f"{stage}: {lost} steps lost"
        return max(0, lost)

    return stage, check


def stop(job):
    """SIGTERM to one rank in the dit stage: a checkpoint, and exit status 0."""
    job.fresh()
    wait("dit to go on", lambda: job.inside("dit"))
    time.sleep(1)
    job.signal(1, signal.SIGTERM)
    assert job.end(60) == 0, job.said()[-3000:]
    at = events(job.folder, "stopped")[-1]
    assert at["stage"] == "dit" and at["step"] == steps(job.folder / "dit")[-1]


def cut_in_half(folder):
    """The biggest file of the newest checkpoint -> (that checkpoint, step of the one before)."""
    before, newest = steps(folder)
    path = folder / f"step_{newest:07d}"
    big = max(path.iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(big, big.stat().st_size // 2)
    return path, before


def starve(folder, log, resize):
    """No space for the next checkpoint: one line that names it, and the earlier ones are whole."""
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
    lines = [r for r in job.said().splitlines() if "could not be written" in r]
    assert len(lines) == 1 and f"dit/step_{(kept[-1] // APART + 1) * APART:07d}" in lines[0], \
        job.said()[-3000:]
    assert f"step_{kept[-1]:07d} is kept" in lines[0] and steps(folder / "dit") == kept
    assert not damaged(folder)
    return lines[0][lines[0].index("train.py:"):]


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
        newest, before = cut_in_half(folder / "dit")
        job = Job(folder, log)
        stop(job)
        assert f"{newest}: damaged" in job.said()
        assert events(folder)[-1]["step"] == before, "not the one before it"
        say(f"{newest.name} cut in half: named as damaged, gone on at {before}")
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
