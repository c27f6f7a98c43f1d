"""train.py: what a run leaves, resuming, the loop, damage, --base and --init, shapes of clips, the
ends that a run can meet, ranks. Most tests share one tiny run of all stages."""
import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import sample_parallel
import text_cond
import train
import world

# train.py filters it, and pytest anew.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(train.__file__).parent
TINY = """--device cpu --clips.frames 8 --clips.count 264 --patch 2 2 2 --train_tae.image_steps 4
  --train_tae.steps 6 --train_tae.every 3 --train_tae.batch 2 --train_tae.image_batch 4 --steps 8
  --batch 8 --train_dit.every 3 --dit.dim 48 --dit.depth 2 --text.width 32 --sample.prompts 5
  --sample.steps 3""".split()
PROMPTS = ["a red circle moving left", 'a white sign saying "CAT" moving up']


def main(folder, *flags):
    """The command line in this process. The judge has its own test, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "check_judge", lambda *_, **__: {"color": 1.0})
        return train.main(["--workdir", str(folder), "--device", "cpu", *flags])


def run(folder, *flags):
    return main(folder, *TINY, *flags)


def fork(other, folder, *flags):
    """A run on the autoencoder and latents of another, up to its dit stage."""
    assert main(folder, "--base", str(other), "--coupling", "independent", "--stage", "dit",
                *flags) == 0
    return train.load_tensors(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def before_dit(copy):
    """The run as it was before its dit stage."""
    forget(copy, "dit", "model.safetensors", "samples", "report.json", "index.html")
    return copy


def forget(folder, *names):
    """Take files and folders away, as if they had never been."""
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def opened(folder):
    """The run, as its stages see it."""
    return train.Run(folder, train.read_config(folder))


def events(folder, what):
    """(stage, step) of each event of this kind in log.jsonl."""
    return [(r["stage"], r["step"]) for r in train.Run(folder, None).rows()
            if r.get("event") == what]


def losses(folder, stage="dit"):
    """The loss of each step, in order."""
    return [loss for _, loss in sorted(train.Run(folder, None).losses()[stage].items())]


def checkpoints(folder):
    """Steps of the checkpoints that are whole."""
    return sorted(int(p.parent.name[5:]) for p in folder.glob("step_*/.metadata"))


def same_files(a, b, *names):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def figures(folder):
    """What a report says, but for what depends on the clock."""
    report = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in report.items() if k not in ("seconds", "machine")}


def one_line(capfd):
    """What was said to the user, which is one line and no traceback. Progress bars do not count."""
    said = [line.split("\r")[-1] for line in capfd.readouterr().err.splitlines()]
    lines = [line for line in said if "train.py: " in line]
    assert len(lines) == 1 and "Traceback" not in "".join(said), said
    assert lines[0].startswith("train.py: "), said              # not behind an open progress bar
    return lines[0]


# ---- the run -------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(finished):
    for name in ("coupling.pt", "tae/tae.safetensors", "samples.gif", "samples/0000.gif",
                 "curves.png", "latents/shard_00001.safetensors", "reconstructions/11.gif"):
        assert (finished / name).stat().st_size > 0, name
    with train.safe_open(finished / "model.safetensors", "pt") as f:
        assert json.loads(f.metadata()["config"]) == json.loads(
            (finished / "config.json").read_text())
        assert {k.split(".")[0] for k in f.keys()} == {"tae", "text", "dit"}  # noqa: SIM118
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert all({"time", "stage", "step"} < r.keys() for r in rows)
    for stage, steps in (("tae/image", 4), ("tae/video", 6), ("dit", 8)):
        assert [r["step"] for r in rows if r["stage"] == stage
                and {"loss", "lr", "grad_norm"} < r.keys()] == list(range(steps))
    assert all("event" in r for r in rows if "loss" not in r)
    report = json.loads((finished / "report.json").read_text())
    assert {"scale", "seed", "data", "coupling", "tae_psnr_db", "dit_val_loss"} <= report.keys()
    assert report["parameters"].keys() == {"tae", "text", "dit"}
    assert report["prompt_accuracy"].keys() == {"color", "shape", "direction", "speed", "text",
                                                "heldout", "words", "words_heldout"}
    assert report["gap"]["random"].keys() >= {"color", "shape", "direction"}
    assert {"tae", "latents", "coupling", "dit", "sample", "total"} <= report["seconds"].keys()
    assert report["judge"]


def test_a_report_of_few_prompts_says_nothing_of_what_was_not_measured():
    prompts = train.world.test_prompts(0, 3)
    rows = [{"kind": kind, "prompt": prompt} for kind, prompt in prompts]
    assert {row["kind"] for row in rows} == {"trained"}
    figures = train.judged(rows, lambda i: torch.zeros(3, 8, 32, 32), 0)
    assert figures["prompt_accuracy"].keys() <= {"color", "shape", "direction", "speed", "text"}
    lines = train.in_words(figures | {"tae_psnr_db": 25.0, "dit_val_loss": 0.4, "parameters": {},
                                      "seconds": {}})
    assert "Prompts followed" in lines[0] and not any("never" in x for x in lines)


def test_the_page_opens_with_samples_and_verdicts(finished):
    page = (finished / "index.html").read_text(encoding="utf-8")
    rows = json.loads((finished / "samples/index.json").read_text())
    prompts, signs = {r["prompt"] for r in rows}, sum('"' in r["prompt"] for r in rows)
    assert page.count("saying &quot;") == signs > 0
    places = [page.index(f'src="samples/{r["file"]}"') for r in rows]
    assert max(places) < page.index("reconstructions/00.gif") < page.index("curves.png")
    assert all(p.replace('"', "&quot;") in page for p in prompts)
    verdicts = page.count('<span class="yes">') + page.count('<span class="no">')
    assert verdicts == 4 * len(rows) + signs            # colour, shape, direction, speed; text
    assert "colour " in page and "autoencoder " in page and "color" not in page
    linked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all((finished / file).exists() for file in linked)


def test_latents_are_what_the_autoencoder_says(finished):
    r, clips = opened(finished), train.ToyClips(train.read_config(finished))
    latents, tae = train.Latents(finished / "latents"), train.load_tae(r)
    everything = torch.arange(len(latents))
    mean, logvar = latents.rows(everything)
    assert mean.shape == logvar.shape == (264, *tae.latent_shape(8, 32, 32))
    text = text_cond.TextConditioner(r.cfg.text)
    for i in (0, 255, 256, 263):                        # in both files
        x, caption = clips.clip("dit", i, (8, 32, 32))
        with torch.no_grad():
            assert torch.allclose(mean[i], tae.encode(x[None]).mean[0], atol=1e-5)
        assert latents.captions[i] == caption
        for k, v in text.encode([caption]).items():
            assert torch.equal(latents.text(torch.tensor([i]))[k][:, : v.shape[1]], v)
    z = tae.normalize(mean + (logvar / 2).exp() * torch.randn_like(mean))
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.1 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


def test_the_result_is_one_file(finished, tmp_path):
    """A run, a copy of its model.safetensors and samples/ give the same clips."""
    path = shutil.copy(finished / "model.safetensors", tmp_path / "mine.safetensors")
    a, b = train.load_run(finished), train.load_run(path)
    clips = a.generate(PROMPTS, [3, 4])
    assert clips.shape == (2, 3, 8, 32, 32) and clips.abs().max() <= 1 and clips.std() > 0
    assert torch.equal(clips, b.generate(PROMPTS, [3, 4])) and a.cfg == b.cfg
    assert torch.allclose(clips[1], b.generate(PROMPTS[1:], [4])[0], atol=1e-4)     # alone
    rows = json.loads((finished / "samples/index.json").read_text())
    made = train.load_tensors(finished / "samples/clips_0000.safetensors")["clips"]
    again = a.generate([rows[2]["prompt"]], [rows[2]["seed"]])
    assert len(made) == len(rows) and torch.allclose(made[2], again[0], atol=1e-4)


def test_generate_takes_a_seed_for_each_prompt(finished):
    loaded = train.load_run(finished)
    want = loaded.generate(PROMPTS[:1], [3])
    for seed in (np.int64(3), torch.tensor(3)):
        assert torch.equal(loaded.generate(PROMPTS[:1], [seed]), want)
    with pytest.raises(ValueError, match="one for each of 3 prompts"):
        loaded.generate([*PROMPTS, PROMPTS[0]], [1, 2])
    for bad in (1.5, "1", torch.tensor(1.9)):
        with pytest.raises(ValueError, match="must be whole numbers"):
            loaded.generate(PROMPTS[:1], [bad])
    with pytest.raises(ValueError, match="features of 2 prompts: there are 1"):
        loaded.generate(PROMPTS[:1], [1], loaded.encode(PROMPTS[:2]))
    with pytest.raises(ValueError, match="steps 0: must be 1 or more"):
        loaded.schedule(0)
    for bad in (PROMPTS[0], [], [3]):
        with pytest.raises(ValueError, match="must be a list of one or more texts"):
            loaded.generate(bad)


def test_shapes_without_weights_and_a_part_of_the_blocks(finished):
    sketch, whole = train.load_run(finished, "meta"), train.load_run(finished)
    assert all(p.is_meta for p in sketch.dit.parameters())
    assert sketch.latent_shape == whole.latent_shape == whole.noise([0])[0].shape
    part = train.load_run(finished, prepare=lambda dit: sample_parallel.keep_stage(dit, 2, 1))
    blocks, mine = (dict(x.dit.named_parameters()) for x in (whole, part))
    assert mine.keys() == {k for k in blocks if not k.startswith("blocks.0.")}
    assert all(torch.equal(w, blocks[k]) for k, w in mine.items())


def test_what_is_no_result_cannot_be_loaded(tmp_path, before_dit):
    train.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    for path, line in ((tmp_path / "nothing", "no run there"), (before_dit, "not finished"),
                       (tmp_path / "other.safetensors", "not a model.safetensors of train.py")):
        with pytest.raises(train.UserError, match=line):
            train.load_run(path)


@pytest.mark.parametrize("data,asked", [("", "a"), ("videos", "FPS-8 a")])
def test_frame_rates_are_told_where_they_were(data, asked):
    """Captions of the toy world never tell theirs."""
    class Text:
        def encode(self, prompts):
            return prompts

    cfg = train.SCALES["toy"]()
    cfg.data, cfg.clips.tell_fps = data, True
    loaded = train.Loaded(cfg, None, Text(), None, torch.device("cpu"))
    assert loaded.encode(["a", "FPS-15 a"]) == [asked, "FPS-15 a"]
    assert loaded.encode(["FPS-games"]) == [asked[:-1] + "FPS-games"]       # a word, no rate
    told = [loaded.fps_of(p) for p in ("a", "FPS-15 a", "FPS-29.7 a", "FPS-x a")]
    assert told == ([8, 15, 30, 8] if data else [8] * 4)


def test_the_log_tells_seconds(tmp_path):
    """10 steps of 2 s, a step that was made twice, and an hour in which nobody worked;
    a row that was cut by a kill is left out, and the next one is not."""
    rows = [("run", 0, 0, "start"), ("dit", 0, 5, "begin")]
    rows += [("dit", s, 7 + 2 * s, None) for s in range(6)]
    rows += [("run", 0, 3600, "start"), ("dit", 5, 3605, "resume")]
    rows += [("dit", s, 3597 + 2 * s, None) for s in range(5, 10)] + [("dit", 0, 3616, "done")]
    lines = [json.dumps({"time": t, "stage": stage, "step": s} | (
        {"event": event} if event else {"loss": 1.0})) for stage, s, t, event in rows]
    r = train.Run(tmp_path, None)
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"time": 36')
    r.log("run", 0, event="start")
    assert r.rows()[-1]["event"] == "start" and len(r.rows()) == len(rows) + 1
    assert sorted(r.losses()["dit"]) == list(range(10))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert r.seconds() == {"dit": 5 + 12 + 5 + 11}


# ---- resuming ------------------------------------------------------------------------------------


def test_starting_again_skips_everything(finished, capfd):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.*") if p.is_file()}
    assert run(finished, "--stage", "sample") == 0
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"log.jsonl", "index.json"} and "step/s" not in capfd.readouterr().err


@contextlib.contextmanager
def cut(stage, step):
    """End what runs in here when this step would count."""
    log = train.Run.log

    def interrupt(self, *at, **figures):
        if at == (stage, step) and "loss" in figures:
            raise KeyboardInterrupt
        log(self, *at, **figures)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "log", interrupt)
        yield


@pytest.mark.parametrize("stage, cuts, names", [
    pytest.param("tae", [("tae/image", 1), ("tae/image", 3), ("tae/video", 5)],
                 ["tae/image.safetensors", "tae/tae.safetensors"], marks=pytest.mark.slow),
    ("dit", [("dit", 2), ("dit", 4), ("dit", 7)], ["model.safetensors"])])
def test_interrupted_and_resumed_is_uninterrupted(finished, tmp_path, stage, cuts, names):
    """Ended in mid-step, again and again: the same losses and weights, bit for bit."""
    folder = tmp_path / "again"
    if stage == "dit":
        shutil.copytree(finished, folder)
        forget(folder, "dit", "model.safetensors", "log.jsonl")
    for at in cuts:
        with cut(*at):
            run(folder, "--stage", stage)
    assert run(folder, "--stage", stage) == 0
    assert events(folder, "resume") == [
        (s, step // 3 * 3) for s, step in cuts if step >= 3]        # at the last checkpoint
    for name in {s for s, _ in cuts}:
        assert losses(folder, name) == losses(finished, name)
    same_files(folder, finished, *names)


def test_how_a_run_is_computed_may_change(finished, tmp_path):
    """Every field of HOW, for a run that goes on; the result is the same but for rounding."""
    values = {"train_tae.every": "5", "train_dit.every": "5", "train_dit.accumulate": "2",
              "tae.checkpointing": "true", "vidtwin.checkpointing": "true",
              "dit.checkpointing": "true", "clips.workers": "3", "text.offload": "never",
              "text.batch": "4", "sdot.memory": "1"}
    assert values.keys() == train.HOW
    folder = tmp_path / "run"                      # align: it sees a part, not the batch
    other = ["--train_dit.align", "0", "--coupling", "minibatch"]
    fork(finished, folder, *other)
    before = losses(folder)
    forget(folder, "dit", "model.safetensors", "log.jsonl")
    fork(finished, folder, *other, *[x for k, v in values.items() for x in (f"--{k}", v)])
    there = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        section, _, field = name.partition(".")
        assert str(there[section][field]).lower() == value, name
    assert losses(folder) == pytest.approx(before, rel=1e-4)
    assert not (folder / "coupling.pt").exists()


def test_the_coupling_may_take_less_memory(finished, tmp_path, monkeypatch):
    folder, asked, assign = tmp_path / "run", set(), train.sdot.assign
    fork(finished, folder, "--coupling", "sdot")
    before = losses(folder)
    forget(folder, "dit", "model.safetensors", "log.jsonl")
    monkeypatch.setattr(train.sdot, "assign", lambda *a: asked.add(a[3]) or assign(*a))
    fork(finished, folder, "--coupling", "sdot", "--sdot.memory", "1")
    assert asked == {1} and losses(folder) == before


def test_another_configuration_is_refused_and_named(copy, capfd):
    before = (copy / "config.json").read_bytes()
    assert run(copy, "--seed", "7", "--train_dit.lr", "0.5", "--train_dit.accumulate", "4") == 2
    line = one_line(capfd)
    assert "seed: 0 there, 7 here" in line and "train_dit.lr: 0.002 there, 0.5 here" in line
    assert "accumulate" not in line and (copy / "config.json").read_bytes() == before
    (copy.parent / "other").mkdir()
    (copy.parent / "other/thesis.txt").write_text("mine")
    assert run(copy.parent / "other") == 2 and "not empty" in one_line(capfd)
    assert [p.name for p in (copy.parent / "other").iterdir()] == ["thesis.txt"]


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1] + "/lock", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_work_in_one_folder(copy, capfd):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], text=True,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
        assert run(copy) == 2 and "another run works there" in one_line(capfd)
        assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
        other.kill()
    assert run(copy, "--stage", "dit") == 0


# ---- the loop ------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """A line through noise; its loss is not a number where `factor` is not."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def forward(self, x, factor):
        return ((self.line(x) - x.sum(1, keepdim=True)) * factor).square().mean()


def toy_batch(step):
    return torch.randn(8, 3, generator=train.generator("toy", step))


def toy_training(folder, poison=(), before=lambda step: None, parts=1, **changes):
    """12 steps of `optimize` -> its weights. before(step) is called before each step, which adds
    the gradients of so many parts."""
    def batch(step):
        before(step)
        return [(x, math.nan if step in poison else 1.0) for x in toy_batch(step).chunk(parts)]

    folder.mkdir(parents=True, exist_ok=True)
    t = train.TrainConfig(**{"steps": 12, "every": 4, "ema": 0.9, **changes})
    torch.manual_seed(0)
    try:
        return train.optimize(train.Run(folder, train.Config()), "dit", Line(), t, t.steps, batch)
    finally:
        train.STOP.clear(), train.TRAINING.clear()


def test_training_is_what_torch_does_by_hand(tmp_path, capfd):
    """Clipping (of some steps, not of all), AdamW, schedule and average, each by torch itself, on
    whole batches; step 5 is not finite, and changes nothing."""
    state = toy_training(tmp_path, (5,), parts=2, lr=0.2, clip=2.0, warmup=3, weight_decay=0.1,
                         decay=0.5)
    torch.manual_seed(0)
    model, norms = Line(), []
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": [model.line.weight], "weight_decay": 0.1},
                                   {"params": [model.line.bias], "weight_decay": 0.0}],
                                  betas=(0.9, 0.99))
    for step in set(range(12)) - {5}:
        model(toy_batch(step), 1.0).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0).item())
        falling = (1 + math.cos(math.pi * (step - 6) / 6)) / 2 if step > 6 else 1
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min(1, (step + 1) / 3) * falling
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (step + 1) / (step + 10))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in model.state_dict().items()}
    assert min(norms) < 2.0 < max(norms), norms
    for name, want in average.items():
        assert torch.allclose(state[name], want, rtol=1e-5, atol=1e-6), name
    assert events(tmp_path, "skipped") == [("dit", 5)]
    said = [line.split("\r")[-1] for line in capfd.readouterr().err.splitlines()]
    assert any(line.startswith("dit step 5: skipped, loss nan") for line in said), said
    rows = [r for r in train.Run(tmp_path, None).rows() if "loss" in r]
    assert [r["grad_norm"] for r in rows] == pytest.approx(norms, rel=1e-5)


def test_three_steps_in_a_row_that_are_not_finite_end_the_run(before_dit, capfd):
    """So high a rate that the first step throws the weights beyond what fp32 holds."""
    config = json.loads((before_dit / "config.json").read_text())
    config["train_dit"]["lr"] = 1e18
    (before_dit / "config.json").write_text(json.dumps(config))
    assert run(before_dit, "--train_dit.lr", "1e18") == 2
    line = one_line(capfd)
    assert re.search(r"dit: loss \S+, .* at step 3, .*lower the learning rate", line), line
    assert events(before_dit, "skipped") == [("dit", 1), ("dit", 2), ("dit", 3)]


@pytest.mark.parametrize("every", [1, 4])
def test_a_kill_costs_no_more_steps_than_every_says(tmp_path, monkeypatch, every):
    """However slow the disk: when a step counts, how many would a kill cost?"""
    finish, log, lost = train.SummedWriter.finish, train.Run.log, []
    monkeypatch.setattr(train.SummedWriter, "finish", lambda *args, **named: (
        time.sleep(0.05), finish(*args, **named)))

    def count(self, stage, step, **figures):
        if "loss" in figures:
            lost.append(step + 1 - max(checkpoints(tmp_path / "dit"), default=0))
        log(self, stage, step, **figures)

    monkeypatch.setattr(train.Run, "log", count)
    toy_training(tmp_path, every=every)
    assert lost == [1 + step % every for step in range(12)]


def test_a_stop_that_is_asked_for_loses_nothing(tmp_path):
    plain = toy_training(tmp_path / "a")
    with pytest.raises(train.Stopped, match="stopped after step 7, checkpoint written"):
        toy_training(tmp_path / "b", before=lambda step: step == 6 and train.STOP.set())
    assert checkpoints(tmp_path / "b/dit") == [4, 7]
    state = toy_training(tmp_path / "b")
    assert all(torch.equal(plain[k], state[k]) for k in plain)
    assert events(tmp_path / "b", "resume") == events(tmp_path / "b", "stopped") == [("dit", 7)]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_batch_does_not_depend_on_the_ranks(finished, monkeypatch):
    """The clips, noise and times of two ranks, or of two parts, are halves of those of one."""
    r, latents = opened(finished), train.Latents(finished / "latents")
    clips, seen = train.ToyClips(r.cfg), {}
    text = train.TextToVideo(r.cfg).text
    for coupling in ("independent", "minibatch", "sdot"):
        r.cfg.coupling = coupling
        for ranks in (1, 2):
            monkeypatch.setattr(train, "world_size", lambda ranks=ranks: ranks)
            r.mesh, parts = train.Mesh(dp=ranks), []
            for i in range(ranks):
                monkeypatch.setattr(train, "rank", lambda i=i: i)
                (part,) = train.dit_batches(r, latents, text)(3)
                frames = [train.tae_batches(r, clips, video)(3)[0][0] for video in (False, True)]
                parts.append([*part[1:], *frames])      # dropped text, x1, x0, t
            seen[ranks] = [torch.cat(values) for values in zip(*parts)]
        assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2])), coupling
        _, _, x0, t, *_ = seen[1]
        assert len(x0.flatten(1).unique(dim=0)) == 8 == len(t.unique())
        assert abs(x0.mean()) < 0.05 and abs(x0.std() - 1) < 0.05
    monkeypatch.undo()
    r.mesh, r.cfg.train_dit.accumulate = train.Mesh(), 2
    halves = [part[1:] for part in train.dit_batches(r, latents, text)(3)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(seen[1], zip(*halves)))


def test_a_coupling_of_the_whole_data_set_warns(finished, tmp_path, capfd):
    fork(finished, tmp_path / "run", "--coupling", "sdot-global", "--sdot.target", "0.5", "--steps",
         "2")
    assert "ignores captions" in capfd.readouterr().err
    assert (tmp_path / "run/coupling.pt").exists()


# ---- damage --------------------------------------------------------------------------------------


def damage(folder, how):
    """Cut the data of a checkpoint, or flip one bit of it, or of its checksum."""
    (data,) = folder.glob("*.distcp.crc32" if how == "checksum" else "*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 128 if how == "checksum" else 4       # no UTF-8 any more
    data.write_bytes(content[:-100] if how == "cut" else content)


@pytest.mark.parametrize("how", ["flipped bit", "checksum"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, finished, capfd, how):
    forget(copy, "model.safetensors")
    damage(copy / "dit/step_0000006", how)
    assert run(copy, "--stage", "dit") == 0
    assert re.search("dit/step_0000006: damaged .*, using the one before", capfd.readouterr().err)
    assert events(copy, "resume") == [("dit", 3)]
    same_files(copy, finished, "model.safetensors")
    forget(copy, "model.safetensors")                   # and a good one has taken its place
    assert run(copy, "--stage", "dit") == 0 and "damaged" not in capfd.readouterr().err


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    state = {"model": {"w": torch.zeros(1000)}}
    there = train.Checkpoints(tmp_path, state, train.Mesh())
    for step in (4, 8, 11):
        state["model"]["w"].fill_(step)
        there.save(step)
        there.wait()
    assert checkpoints(tmp_path) == [8, 11]
    damage(tmp_path / "step_0000011", "cut")
    there = train.Checkpoints(tmp_path, state, train.Mesh())
    assert there.load() == 8 and state["model"]["w"].eq(8).all()
    there.save(10)
    there.wait()
    assert {8, 10} <= set(checkpoints(tmp_path))


def test_checkpoints_that_cannot_be_read_are_not_thrown_away(copy, capfd):
    forget(copy, "model.safetensors")
    for data in (copy / "dit").glob("step_*/*.distcp"):
        data.write_bytes(b"")
    assert run(copy) == 2
    assert "none of its checkpoints can be read; move them away" in one_line(capfd)
    assert checkpoints(copy / "dit") == [3, 6]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_checkpoint_cannot_run_code(copy, finished, monkeypatch, tmp_path, capfd):
    """Neither its table of contents, nor what stands in place of a tensor."""
    monkeypatch.chdir(tmp_path)
    forget(copy, "model.safetensors")
    table = copy / "dit/step_0000006/.metadata"
    table.write_bytes(pickle.dumps(Evil()))
    table.with_name(".metadata.crc32").write_text(train.crc32(table))
    assert run(copy, "--stage", "dit") == 0
    assert re.search("step_0000006: damaged .*system has no place", capfd.readouterr().err)
    same_files(copy, finished, "model.safetensors")
    dotted = (b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.")
    with pytest.raises(pickle.UnpicklingError):         # protocol 4 follows dots through a module
        train.SafeUnpickler(__import__("io").BytesIO(dotted)).load()
    dcp.save({"model": {"w": Evil()}}, checkpoint_id=tmp_path / "dit/step_0000001", no_dist=True)
    with pytest.raises(train.UserError, match="none of its checkpoints"):
        train.Checkpoints(tmp_path / "dit", {"model": {"w": torch.zeros(3)}}, train.Mesh()).load()
    assert "BytesStorageMetadata has no place" in capfd.readouterr().err
    assert not (tmp_path / "evil").exists()
    for path in copy.rglob("*.pt"):                     # no other file of a run is a pickle
        torch.load(path, weights_only=True)


def test_what_is_removed_or_cut_is_made_again(copy, finished, capfd):
    """The one line for a damaged file says: remove it and start the run again."""
    shard = copy / "latents/shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    names = ["model.safetensors", "samples/clips_0000.safetensors", "samples/0003.gif",
             "samples/index.json"]
    forget(copy, "dit", *names)
    assert run(copy, "--stage", "sample") == 0
    said = capfd.readouterr().err
    assert re.search(f"{shard.name}: damaged or missing, encoded again", said)
    assert "sdot:" in said and "ignores captions" not in said
    same_files(copy, finished, f"latents/{shard.name}", *names)


@pytest.mark.parametrize("name, stage, line", [
    ("model.safetensors", "sample", "model.safetensors: damaged or missing .*; remove it"),
    ("tae/tae.safetensors", "latents", "tae.safetensors: damaged or missing .*; remove it"),
    ("coupling.pt", "dit", "coupling.pt: .*; remove it"),
    ("config.json", "dit", "config.json: damaged .*; choose another folder"),
    ("latents/index.json", "dit", "index.json: damaged .*; remove it and start")])
def test_a_damaged_file_is_one_line(copy, capfd, name, stage, line):
    (copy / name).write_bytes((copy / name).read_bytes()[:99])
    forget(copy, "samples", "report.json")
    if stage != "sample":
        forget(copy, "dit", "model.safetensors")
    if stage == "latents":
        forget(copy, "latents")
    assert run(copy) == 2
    assert re.search(line, one_line(capfd))


@contextlib.contextmanager
def disk_of(size):
    """No file can grow beyond this size: to who writes, a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_keeps_the_checkpoint_before(copy, finished, capfd):
    forget(copy, "model.safetensors", "dit/step_0000006")
    with disk_of(100_000):
        assert run(copy) == 2
    assert re.search("dit/step_0000006: could not be written .*too large.*the one before is kept",
                     one_line(capfd))
    assert checkpoints(copy / "dit") == [3]
    assert run(copy, "--stage", "dit") == 0 and checkpoints(copy / "dit") == [3, 6]
    same_files(copy, finished, "model.safetensors")


@pytest.mark.parametrize("name", [
    "latents/shard_00001.safetensors", "model.safetensors", "samples/0000.gif", "log.jsonl"])
def test_a_full_disk_is_one_line_that_names_the_file(copy, finished, capfd, name):
    """Whatever could not be written; with more space the next start makes it."""
    size = (copy / name).stat().st_size + (20 if name == "log.jsonl" else -10)
    if name != "log.jsonl":
        forget(copy, name, "log.jsonl")
    if name == "samples/0000.gif":
        forget(copy, "samples/clips_0000.safetensors")
    if name == "model.safetensors":
        forget(copy, "dit")
    with disk_of(size):
        assert run(copy, "--train_dit.every", "1000") == 2          # no checkpoint is too large
    assert re.search(f"{name}: could not be written .*too large.*free some space", one_line(capfd))
    assert not list(copy.rglob("*.part"))
    assert run(copy, "--stage", "sample") == 0
    if name != "log.jsonl":
        same_files(copy, finished, name)


def test_files_of_tensors_have_the_mode_of_other_files(tmp_path):
    (tmp_path / "other").touch()
    train.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# ---- --base and --init ---------------------------------------------------------------------------


def test_a_run_on_another_shares_its_autoencoder_and_latents(finished, tmp_path):
    folder = tmp_path / "run"
    before = (finished / "model.safetensors").read_bytes()
    fork(finished, folder, "--seed", "1", "--dit.qk_norm", "true", "--text.without", "words",
         "--text.layers", "1", "--dit.dim", "64", "--steps", "2")
    same_files(folder, finished, "tae/tae.safetensors")
    for path in (finished / "latents").iterdir():
        assert path.samefile(folder / "latents" / path.name)
    there, here = train.read_config(finished), train.load_run(folder).cfg
    assert (there.clips, there.tae, there.train_tae) == (here.clips, here.tae, here.train_tae)
    assert (here.seed, here.dit.dim, here.dit.qk_norm, here.train_dit.steps) == (1, 64, True, 2)
    assert (finished / "model.safetensors").read_bytes() == before
    assert len(losses(folder)) == 2


def test_a_run_never_writes_latents_of_another(finished, tmp_path, monkeypatch, capfd):
    """Another seed has other clips of each shape, and would need other shards."""
    monkeypatch.setattr(train, "SHARD", 4)
    base, shard = tmp_path / "base", tmp_path / "base/latents/shard_00000.safetensors"
    latents = lambda folder, of, seed: main(
        folder, "--base", str(of), "--seed", str(seed), "--coupling", "independent", "--stage",
        "latents", *("--clips.images 1 --clips.count 24 --patch 1 2 2".split() * (folder == base)))
    files = lambda: {p.name: p.read_bytes() for p in (base / "latents").iterdir()}
    assert latents(base, finished, 1) == 0
    before = files()
    for seed in (0, 2):
        assert latents(tmp_path / str(seed), base, seed) == 0
    assert files() == before
    with monkeypatch.context() as patch:                # as when --data has moved in between
        patch.setattr(train, "same_latents", lambda cfg: False)
        for seed in (0, 2):
            assert latents(tmp_path / str(seed), base, seed) == 0
    assert files() == before
    shard.write_bytes(shard.read_bytes()[:-8])
    cut_short, _ = files(), capfd.readouterr()
    assert latents(tmp_path / "5", base, 5) == 2 and files() == cut_short
    assert re.search("damaged or missing: shard_00000.*first .*--stage latents", one_line(capfd))
    assert latents(base, finished, 1) == 0 and files() == before


def test_a_run_and_its_base_can_be_moved_and_copied(finished, tmp_path, monkeypatch):
    """The link to the latents of --base is relative; one to another place is made anew, so a copy
    does not write where the original is."""
    (tmp_path / "a").mkdir()
    shutil.copytree(finished, tmp_path / "a/toy")
    latents = lambda: main(Path("run"), "--base", "toy", "--stage", "latents")
    monkeypatch.chdir(tmp_path / "a")
    assert latents() == 0
    link = tmp_path / "a/run/latents"
    assert not Path(os.readlink(link)).is_absolute()
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    link.unlink()
    link.symlink_to(tmp_path / "a/toy/latents")     # as an earlier version made it
    (tmp_path / "a").rename(tmp_path / "c")
    for here in ("b", "c"):
        monkeypatch.chdir(tmp_path / here)
        assert latents() == 0
        assert Path("run/latents").resolve() == tmp_path / here / "toy/latents"


@pytest.mark.parametrize("there", ["", "cross_attention"])
def test_another_width_on_a_base(finished, tmp_path, there):
    base = tmp_path / "base"
    shutil.copytree(finished, base)
    cfg = json.loads((base / "config.json").read_text())
    cfg["dit"]["conditioning"] = there or cfg["dit"]["conditioning"]
    (base / "config.json").write_text(json.dumps(cfg))
    cfg, _ = train.parse(["--base", str(base), "--dit.dim", "96",
                          *(() if there else ("--dit.conditioning", "cross_attention"))])
    assert cfg.dit.text_width == cfg.dit.dim == 96


def test_a_kill_while_the_first_config_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("lock", "config.json.part"):
        (tmp_path / "run" / name).touch()
    cfg = train.parse([])[0]
    train.open_run(cfg, tmp_path / "run")
    assert train.read_config(tmp_path / "run") == cfg


def test_the_newest_checkpoint_has_the_largest_number(tmp_path):
    for step in (9_999_800, 10_000_000, 200):
        (tmp_path / f"step_{step:07d}").mkdir()
        (tmp_path / f"step_{step:07d}/.metadata").touch()
    (tmp_path / "step_0000200-mine").mkdir()
    (tmp_path / "step_0000200-mine/.metadata").touch()
    (tmp_path / "step_0000400").mkdir()                 # half written
    train.Checkpoints(tmp_path, {}, train.Mesh())
    whole = train.checkpoints_in(tmp_path)
    assert [train.step_of(path) for path in whole] == [10_000_000, 9_999_800, 200]
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in whole} == {"step_0000200-mine"}


def test_longer_clips_of_other_shapes_do_not_bounce():
    """Objects are placed for as many frames as are drawn: they move in a straight line to the end,
    as their captions say."""
    cfg = train.parse("--coupling independent --clips.frames 8 --clips.others 16x32x32".split())[0]
    clips = train.ToyClips(cfg)
    ends = [clips.clip("dit", i, (16, 32, 32)) for i in range(40)]
    right = [train.world.judge(x[:, 12:], caption)["direction"] for x, caption in ends]
    assert sum(right) >= 38


def test_the_clips_of_the_dit_stage_have_their_own_share_of_signs():
    def captions(signs, split, n=30):
        cfg = train.Config(clips=train.ClipConfig(things=2, signs=signs))
        return [train.ToyClips(cfg).clip(split, i, (1, 32, 32))[1] for i in range(n)]

    assert captions(0.4, "dit") == captions(0.4, "train") == captions(0.9, "train")
    assert captions(0.9, "heldout") == captions(0.4, "heldout") != captions(0.4, "train")
    assert not any("sign" in c for c in captions(0.0, "dit"))
    assert all(c.count("sign") == 2 for c in captions(1.0, "dit"))
    few, many = (sum(c.count("sign") for c in captions(s, "dit", 200)) / 400 for s in (0.4, 0.6))
    assert 0.35 < few < 0.48 and 0.55 < many < 0.68


@pytest.mark.parametrize("flags", ["--clips.count 20 --clips.frames 16 --patch 4 2 2",
                                   "--text.max_bytes 90 --clips.count 264"])
def test_a_run_on_another_with_other_clips_or_text_encodes_them(finished, tmp_path, flags):
    folder = tmp_path / "run"
    fork(finished, folder, "--steps", "1", *flags.split())
    same_files(folder, finished, "tae/tae.safetensors")
    mine, there = (train.Latents(f / "latents") for f in (folder, finished))
    cfg = train.read_config(folder)
    assert len(mine) == cfg.clips.count and not list(finished.glob("latents/*.part"))
    assert not (folder / "latents/index.json").samefile(finished / "latents/index.json")
    x, _ = train.ToyClips(cfg).clip("dit", 7, cfg.clips.shape)
    with torch.no_grad():
        want = train.load_tae(opened(folder)).encode(x[None]).mean
    assert torch.allclose(mine.rows(torch.tensor([7]))[0], want, atol=1e-5)
    assert (mine.shapes == there.shapes) == ("bytes" in flags)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_run_can_start_from_the_weights_of_another(finished, tmp_path, kind):
    """With no step at all its result is the other one's, with tables stretched to larger clips."""
    folder = tmp_path / "run"
    other = finished if kind == "folder" else shutil.copy(finished / "model.safetensors", tmp_path)
    assert main(folder, "--init", str(other), "--clips.frames", "16", "--clips.size", "48",
                "--clips.count", "4", "--coupling", "independent", "--steps", "0",
                "--stage", "dit") == 0
    a, b = (train.load_tensors(f / "model.safetensors") for f in (finished, folder))
    dit = train.load_run(finished).dit
    sizes = dict(dit.tables.named_parameters())
    dit.expand_positions((4, 12, 12))
    tables = dit.tables.state_dict()
    for k, v in b.items():
        name = k.removeprefix("dit.tables.")
        assert torch.equal(v, tables[name] if name in tables else a[k]), k
    assert any(len(v) > len(sizes[k]) for k, v in tables.items()) and a.keys() == b.keys()
    assert train.Latents(folder / "latents").shapes == [(8, 4, 12, 12)]


def test_a_run_from_the_weights_of_another_resumes_at_its_own(finished, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--init", str(finished), "--clips.count", "20", "--coupling", "independent", "--steps",
             "5", "--stage", "dit"]
    assert main(whole, *flags) == 0
    with cut("dit", 4):
        main(parts, *flags)
    assert main(parts, *flags) == 0 and events(parts, "resume") == [("dit", 3)]
    same_files(whole, parts, "model.safetensors")


# ---- clips of several shapes ---------------------------------------------------------------------

SHAPES = "--clips.count 40 --clips.others 8x16x32 --clips.images 1 --patch 1 2 2".split()


def test_shapes_of_clips():
    clips = train.ClipConfig(frames=16, size=96, others=("16x72x128", "8x96x96"), images=0.1)
    assert clips.shapes == [(16, 96, 96), (16, 72, 128), (8, 96, 96), (1, 96, 96), (1, 72, 128)]
    drawn = [clips.drawn_shape(f"{i}") for i in range(10_000)]
    images = sum(T == 1 for T, *_ in drawn) / len(drawn)
    assert abs(images - 1 / 11) < 4 * (1 / 11 * 10 / 11 / len(drawn)) ** 0.5        # one in eleven
    even = train.ClipConfig(frames=16, images=1.0)              # an image for each clip: one in two
    images = sum(even.drawn_shape(f"{i}")[0] == 1 for i in range(1000)) / 1000
    assert abs(images - 1 / 2) < 4 * (1 / 4 / 1000) ** 0.5
    assert set(drawn) == set(clips.shapes)
    for aspect, sizes in ((9 / 16, {(96, 96), (72, 128)}), (1.0, {(96, 96)}), (2, {(96, 96)})):
        shapes = {clips.drawn_shape(f"{i}", aspect) for i in range(1000)}
        assert {s[1:] for s in shapes} == sizes and {s[0] for s in shapes} == {1, 8, 16}
        assert aspect != 9 / 16 or all(s[1:] == (72, 128) for s in shapes if s[0] != 8)


def test_clips_of_one_latent_shape_that_do_not_follow_each_other(tmp_path):
    """13 frames and 16 make as many latent frames; larger clips of 13 frames lie between them."""
    a, b = [4, 8, 4, 8, 8], [3, 8, 4, 16, 16]
    train.write_json(tmp_path / "index.json", [["0", *a], ["1", *b], ["2", *a], ["3", *a]])
    assert train.Latents(tmp_path).buckets() == [
        (torch.Size(a[1:]), range(4)), (torch.Size(b[1:]), range(4, 7)),
        (torch.Size(a[1:]), range(7, 15))]


def test_a_run_of_several_shapes(finished, tmp_path):
    folder = tmp_path / "run"
    fork(finished, folder, *SHAPES, "--steps", "6")
    latents, r = train.Latents(folder / "latents"), opened(folder)
    assert {tuple(shape) for shape, _ in latents.buckets()} == {
        (8, 2, 8, 8), (8, 2, 4, 8), (8, 1, 8, 8), (8, 1, 4, 8)}
    assert sorted(i for _, clips in latents.buckets() for i in clips) == list(range(40))
    clips = train.ToyClips(r.cfg)
    order = sorted(range(40), key=clips.shape)          # and in their order within a shape
    for shape, rows in latents.buckets():
        i = order[rows[0]]
        x, caption = clips.clip("dit", i, clips.shape(i))
        with torch.no_grad():
            want = train.load_tae(r).encode(x[None]).mean
        assert torch.allclose(latents.rows(torch.tensor([rows[0]]))[0], want, atol=1e-5), shape
        assert latents.captions[rows[0]] == caption
    batch = train.dit_batches(r, latents, train.TextToVideo(r.cfg).text)
    assert len({batch(step)[0][2].shape for step in range(20)}) > 1
    assert train.load_run(folder).generate(PROMPTS[:1]).shape == (1, 3, 8, 32, 32)


# ---- the ends that a run can meet ----------------------------------------------------------------


def test_memory_and_gpus_that_are_too_few_are_one_line(tmp_path, monkeypatch, capfd):
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"
    def work(*_):
        raise torch.OutOfMemoryError(full)

    for fails, line in ((work, "2.00 GiB. GPU 0"), (lambda *_: torch.empty(10**12, 2**10), "bytes"),
                        (lambda *_: torch.empty(10**12, 10**12), "overflow")):
        monkeypatch.setattr(train, "work", fails)
        assert train.main(["--workdir", str(tmp_path / "x")]) == 2
        assert re.search(f"{line}.* Use less with --train_dit.acc", one_line(capfd))
    monkeypatch.setattr(train, "work", lambda *_: len(0))           # ours, with its traceback
    with pytest.raises(TypeError):
        train.main(["--workdir", str(tmp_path / "x")])
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = "train.py: --nproc_per_node 2: 1 GPUs here, one rank each; or --device cpu\n"
    for rank, line in ((0, said), (1, "")):             # the second machine says so, too
        for name, value in (("WORLD_SIZE", 4), ("RANK", 2 + rank), ("LOCAL_RANK", rank),
                            ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert train.main(["--workdir", str(tmp_path / "x"), "--device", "cuda"]) == 2
        assert capfd.readouterr().err == line


def test_small_computes_in_bf16_on_a_gpu(monkeypatch):
    def chosen(*flags):
        cfg, _ = train.parse(list(flags))
        return cfg.train_tae.precision, cfg.train_dit.precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("--scale", "small") == ("fp32", "fp32")
    assert chosen("--scale", "small", "--plan") == ("bf16", "bf16")            # a plan is for GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("--scale", "small") == ("bf16", "bf16")
    assert chosen("--scale", "small", "--device", "cpu") == chosen("--scale", "toy")
    assert chosen("--scale", "small", "--train_dit.precision", "fp32") == ("bf16", "fp32")


def test_torchrun_leaves_every_flag_to_us(capsys):
    """It claims a flag that is a prefix of one of its own, wherever that stands."""
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        train.main(["--help"])
    flags = re.findall(r"--[a-z][\w.]*", capsys.readouterr().out)
    parser = get_args_parser()
    assert len(set(flags)) > 100
    for flag in set(flags):
        args = parser.parse_args(["--nproc_per_node", "2", "train.py", flag, "1"])
        assert args.training_script_args == [flag, "1"], flag


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(*flags, **how):
    """train.py in a process of its own, with the signals of one that a shell has started."""
    usual = lambda: [signal.signal(s, signal.SIG_DFL) for s in train.SIGNALS]
    return subprocess.Popen([sys.executable, "train.py", "--device", "cpu", *map(str, flags)],
                            cwd=ROOT, text=True, preexec_fn=usual,
                            **{"env": ENV, "stderr": subprocess.PIPE, **how})


def wait_for(process, true, seconds=200):
    """Wait until true() while a process runs."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=9)
        time.sleep(0.02)


def on(finished, *flags):
    """The flags of a dit stage on another run's latents."""
    return ["--base", str(finished), "--coupling", "independent", *flags]


@pytest.mark.slow
def test_without_stderr_errors_are_said_on_stdout():
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} train.py --scael toy 2>&-"],
                          cwd=ROOT, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2 and re.fullmatch("train.py: .*--scael.*\n", done.stdout), done
    env = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} train.py --scale caf\u00e9 2>&-"],
                          cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 2 and done.stdout.startswith(b"train.py: --scale"), done


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stdout and stderr", "stderr, from the beginning"])
def test_nobody_listening_ends_no_run(before_dit, finished, closed):
    """As under `| head -1`, `2>&1 | head -1` and `2>&-`; what is told next is saved before."""
    forget(before_dit, "coupling.pt")
    command = [sys.executable, "train.py", "--workdir", str(before_dit), *TINY]
    if "beginning" in closed:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=ROOT, env=ENV, timeout=400, text=True,
        stdout=writer if "stdout" in closed else subprocess.PIPE,
        stderr=writer if "and" in closed else subprocess.PIPE)
    os.close(writer)
    assert "Traceback" not in (done.stderr or "") + (done.stdout or "")
    assert figures(before_dit).keys() == figures(finished).keys()
    for name in ("index.html", "samples.gif", "model.safetensors", "coupling.pt"):
        assert (before_dit / name).stat().st_size > 0
    rows = [json.loads(line) for line in (before_dit / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["stage"] == "report" and rows[-1]["event"] == "done"


@pytest.mark.parametrize("stage, said", [("all", True), ("report", True), ("sample", False)])
def test_the_figures_are_said_when_the_report_was_made(tmp_path, monkeypatch, capfd, stage, said):
    for name in ("train_tae", "encode_latents", "couple_latents", "train_dit", "make_samples"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train, "make_report", lambda *_: {"dit_val_loss": 0.5})
    monkeypatch.setattr(train, "in_words", lambda report: [f"loss {report['dit_val_loss']}"])
    assert train.main(["--workdir", str(tmp_path / "run"), "--stage", stage]) == 0
    assert capfd.readouterr().out == f"loss 0.5\nlook at {tmp_path}/run/index.html\n" * said


def test_a_warning_is_a_line_of_its_own(monkeypatch, capfd):
    def work(*_):
        for _ in train.tqdm(range(1), "latents"):
            warnings.warn("words: 600 tokens cut to 512", stacklevel=2)
    monkeypatch.setattr(train, "work", work)
    assert train.main([]) == 0
    assert one_line(capfd) == "train.py: words: 600 tokens cut to 512"


DEAF = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
import train
train.say = lambda line: time.sleep(600)                # a pipe that is full
train.listen()
os.kill(os.getpid(), signal.SIGTERM)
train.say("progress")
"""


@pytest.mark.slow
def test_a_signal_ends_a_process_whose_stderr_nobody_reads():
    done = subprocess.run([sys.executable, "-c", DEAF], cwd=ROOT, env=ENV, timeout=120)
    assert done.returncode == 0


def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn"))
    folder.mkdir()
    report = {"tae_psnr_db": 1.0, "dit_val_loss": 1.0, "parameters": {}, "seconds": {}}
    train.write_page(folder, report, [])
    assert "filmstrip: r" in (folder / "index.html").read_text(encoding="utf-8")


def test_settings_of_another_type_are_named():
    there = train.asdict(train.SCALES["toy"]())
    assert train.from_dict(train.Config, json.loads(json.dumps(there))) == train.SCALES["toy"]()
    for name, bad in (("seed", True), ("seed", 1.5), ("patch", ["1", 2, 2]), ("patch", 2),
                      ("scale", 3)):
        with pytest.raises(ValueError, match=f"{name} .*: not of the type of"):
            train.from_dict(train.Config, there | {name: bad})
    with pytest.raises(ValueError, match="unknown field lattice"):
        train.from_dict(train.Config, there | {"lattice": 1})


LOCALE = """
import json, sys, train
from pathlib import Path
folder = Path(sys.argv[1])
rows = train.read_json(folder / "samples/index.json")
rows[0]["prompt"] = chr(0x5c71)
train.say(rows[0]["prompt"])
train.write_page(folder, train.read_json(folder / "report.json"), rows)
assert rows[0]["prompt"] in train.read_text(folder / "index.html")
"""


@pytest.mark.slow
def test_text_is_utf8_whatever_the_locale(copy):
    env = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import locale; assert locale.getpreferredencoding(False) != 'UTF-8'\n" + LOCALE
    subprocess.run([sys.executable, "-c", code, str(copy)], cwd=ROOT, env=env, check=True)
    assert "\u5c71" in (copy / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_writes_a_checkpoint_and_ends_well(finished, tmp_path, name):
    """Also where another library has threads, which must not take the signal for us."""
    flags = on(finished, "--workdir", tmp_path / "run", "--steps", 100_000, "--train_dit.every",
               100_000)
    env, at = {**ENV, "OPENBLAS_NUM_THREADS": "2"}, []
    for _ in range(2):
        p, steps = started(*flags, env=env), len(train.Run(tmp_path / "run", None).losses())
        wait_for(p, lambda: len(events(tmp_path / "run", "resume")) == len(at)
                 and max(train.Run(tmp_path / "run", None).losses().get("dit", [0])) > sum(at))
        began = time.monotonic()
        p.send_signal(getattr(signal, name))
        said = p.communicate(timeout=200)[1]
        assert p.returncode == 0 and time.monotonic() - began < 30, (p.returncode, said, steps)
        assert "checkpoint written; start again to continue" in said and "Traceback" not in said
        at.append(events(tmp_path / "run", "stopped")[-1][1])
        assert checkpoints(tmp_path / "run/dit") == at
    assert 0 < at[0] < at[1] and events(tmp_path / "run", "resume") == [("dit", at[0])]


@pytest.mark.slow
def test_a_second_signal_ends_at_once(finished, tmp_path):
    """One within 3 seconds is the same, passed on by torchrun. A step here takes minutes."""
    p = started(*on(finished, "--workdir", tmp_path / "run", "--dit.dim", 384, "--dit.depth", 12,
                    "--batch", 4000, "--train_dit.accumulate", 400))
    wait_for(p, lambda: ("dit", 0) in events(tmp_path / "run", "begin"))
    for wait in (0.5, 4):
        p.send_signal(signal.SIGTERM)
        time.sleep(wait)
        assert p.poll() is None
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=10)[1]
    assert p.returncode == 1 and "ended by SIGTERM; start again to continue" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_of_training_ends_at_once(finished, tmp_path, name):
    folder = tmp_path / "run"
    p = started(*on(finished, "--workdir", folder, "--clips.count", 20_000))
    wait_for(p, lambda: list(folder.glob("latents/*.safetensors")))
    p.send_signal(getattr(signal, name))
    said = p.communicate(timeout=10)[1]
    assert p.returncode == 0 and f"ended by {name}; start again" in said, (p.returncode, said)
    assert "Traceback" not in said
    assert all(train.readable(path) for path in folder.glob("latents/*.safetensors"))


@pytest.mark.slow
def test_sigkill_in_each_stage(finished, tmp_path):
    """Killed once in each stage and started again: the figures and weights of a run that was not.
    """
    killed = tmp_path / "killed"
    for sign in ("tae/image", "tae/video/step_*", "latents/shard_00000.safetensors", "dit/step_*",
                 "samples"):
        p = started("--workdir", killed, *TINY)
        wait_for(p, lambda sign=sign: list(killed.glob(sign)))
        p.kill()
        p.communicate()
    assert not (killed / "report.json").exists()
    p = started("--workdir", killed, *TINY)
    assert p.communicate(timeout=400) and p.returncode == 0
    mine, there = figures(killed), figures(finished)
    assert mine.pop("judge") and there.pop("judge")     # not asked in `finished`
    assert mine == there and losses(killed) == losses(finished)
    same_files(killed, finished, "tae/tae.safetensors", "coupling.pt", "model.safetensors",
               "samples/clips_0000.safetensors", "latents/shard_00001.safetensors")


# ---- other autoencoders, and the pretrained text encoders ----------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant, streams", [("3d", 1), ("vidtwin", 2)])
def test_the_other_autoencoders_run_all_stages(tmp_path, variant, streams):
    folder = tmp_path / variant
    assert run(folder, "--clips.frames", "16", "--patch", "4", "2", "2", "--tae", variant,
               "--train_tae.motion", "4", *(("--loss.opl", "0.5") * (variant == "3d"))) == 0
    loaded = train.load_run(folder)
    assert len(loaded.cfg.dit.streams) == streams
    assert (folder / "tae/image.safetensors").exists() == (variant == "3d")
    clips = loaded.generate(PROMPTS)
    assert clips.shape == (2, 3, 16, 32, 32) and clips.std() > 0
    latents = train.Latents(folder / "latents")
    mean, logvar = latents.rows(torch.arange(len(latents)))
    z = loaded.tae.normalize(mean + (logvar / 2).exp() * torch.randn_like(mean))
    for part in loaded.tae.split(z):                    # each latent, each channel
        assert (part.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


@pytest.mark.slow
def test_a_run_with_the_pretrained_encoders(folders, tmp_path, capfd):
    """All stages with UL2, ByT5 and MetaCLIP in miniature. Whose folder is missing is told at the
    start; a finished run does without."""
    shutil.copytree(folders["concepts"], tmp_path / "concepts")
    where = {**folders, "concepts": str(tmp_path / "concepts")}
    flags = ["--text", "pretrained", "--coupling", "independent", "--sample.prompts", "4"]
    flags += [x for name, folder in where.items() for x in (f"--text.{name}", folder)]
    folder, away = tmp_path / "run", tmp_path / "moved"
    (tmp_path / "concepts").rename(away)
    assert run(folder, *flags) == 2 and not folder.exists()
    assert f"--text.concepts {tmp_path / 'concepts'}: no such folder" in one_line(capfd)
    away.rename(tmp_path / "concepts")
    assert run(folder, *flags) == 0
    (tmp_path / "concepts").rename(away)
    assert run(folder, *flags) == 2                     # a report validates on other captions
    assert f"concepts {tmp_path / 'concepts'}: no such folder" in one_line(capfd)
    latents = train.Latents(folder / "latents")
    import transformers
    model = transformers.T5EncoderModel.from_pretrained(folders["words"], dtype=torch.bfloat16)
    read = transformers.AutoTokenizer.from_pretrained(folders["words"])
    for i, caption in enumerate(latents.captions[:9]):
        ids = read(text_cond.seen_by(caption)["words"], return_tensors="pt").input_ids
        mine = latents.text(torch.tensor([i]))
        got = mine["words"][0][mine["words_mask"][0]].float()
        assert (got - model(ids).last_hidden_state[0].float()).abs().max() < 0.05, caption
    away.rename(tmp_path / "concepts")
    loaded = train.load_run(folder)
    P, mask, *_ = loaded.prompts(latents.captions[:2])
    assert P.shape == (2, mask.shape[1], 48) and mask.any(1).all()
    assert loaded.generate(latents.captions[:1]).shape == (1, 3, 8, 32, 32)


# ---- several ranks -------------------------------------------------------------------------------


STANDALONE = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")


def torchrun(ranks, folder, *flags, script="train.py", **how):
    """torchrun on a free port -> its process, all that it and its ranks say in `stderr`."""
    command = [sys.executable, *STANDALONE, "--nproc_per_node", ranks, *how.pop("options", ()),
               script, "--device", "cpu", "--workdir", folder, *flags]
    return subprocess.Popen([str(x) for x in command], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                            env={**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **how})


def done(process):
    """Wait for the end -> (exit status, what was said)."""
    said = process.communicate(timeout=500)[1]
    return process.returncode, said[-3000:]


def on_ranks(ranks, folder, *flags):
    status, said = done(torchrun(ranks, folder, *flags))
    assert status == 0, said
    return torch.tensor(losses(folder), dtype=torch.float64)


@pytest.mark.slow
def test_any_number_of_ranks_trains_the_same_dit(finished, tmp_path):
    """Twenty steps in fp64 of one rank, and of every axis of the mesh, step for step."""
    flags = ["--base", str(finished), "--coupling", "sdot", "--steps", "20", "--batch", "12",
             "--train_dit.precision", "fp64", "--train_dit.align", "0", "--train_dit.every", "14"]
    assert main(tmp_path / "start", *flags, "--stage", "coupling") == 0

    def one(mesh):
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"run{mesh}".replace(" ", ""))
        ranks = math.prod(int(n) for n in mesh.split() if n.isdigit())
        parts = 2 if mesh == "--replicate 2" else 1     # DDP waits with its messages
        curve = on_ranks(ranks, folder, *flags, *mesh.split(), "--stage", "dit",
                         "--train_dit.accumulate", parts)
        return curve, train.load_tensors(folder / "model.safetensors")

    meshes = ("", "--dp 2", "--dp 3", "--dp 4", "--dp 4 --reshard false", "--sp 2",
              "--replicate 2", "--dp 2 --sp 2", "--replicate 2 --dp 2", "--replicate 2 --sp 2")
    with ThreadPoolExecutor(2) as pool:                 # half of the time is torchrun's beginning
        (plain, weights), *others = pool.map(one, meshes)
    assert len(plain) == 20 == len(plain.unique())
    for mesh, (other, there) in zip(meshes[1:], others, strict=True):
        assert torch.allclose(plain, other, rtol=1e-9, atol=0), (mesh, (plain - other).abs().max())
        for k, w in weights.items():
            assert torch.allclose(w, there[k], atol=1e-6), (mesh, k)


@pytest.mark.slow
def test_ranks_agree_in_other_precisions(finished, tmp_path):
    """As near as 24 and 8 bits of mantissa allow."""
    def one(run):
        precision, mesh = run
        return on_ranks(
            2 if mesh else 1, tmp_path / f"{precision}{mesh}".replace(" ", ""), *mesh.split(),
            *on(finished, "--steps", "20", "--train_dit.align", "0", "--stage", "dit",
                "--train_dit.precision", precision))

    runs = [(p, mesh) for p in ("fp32", "bf16") for mesh in ("", "--dp 2", "--replicate 2")]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(runs, pool.map(one, runs)))
    for (precision, _), other in found.items():
        near = {"fp32": 1e-4, "bf16": 5e-3}[precision]
        assert torch.allclose(found[precision, ""], other, rtol=near)
    apart = (found["fp32", ""] - found["bf16", ""]).abs().max()
    assert len(found["fp32", ""]) == 20 and 0 < apart < 0.02        # it is another precision


@pytest.mark.slow
def test_a_checkpoint_is_taken_up_by_another_number_of_ranks(finished, tmp_path):
    """2 ranks, then 1, then 4, six steps each: the curve of one rank alone."""
    flags = on(finished, "--steps", "18", "--train_dit.every", "6", "--train_dit.precision", "fp64",
               "--train_dit.align", "0", "--stage", "dit")
    folder = tmp_path / "parts"
    with ThreadPoolExecutor(1) as pool:                 # the whole run beside its parts
        plain = pool.submit(on_ranks, 1, tmp_path / "whole", *flags)
        for ranks, again in ((2, ["dit/step_0000012"]), (1, []), (4, [])):
            on_ranks(ranks, folder, *flags, *(["--dp", ranks] if ranks > 1 else []))
            forget(folder, "model.safetensors", *again)
    assert events(folder, "resume") == [("dit", 6), ("dit", 12)]
    mine = torch.tensor(losses(folder), dtype=torch.float64)
    assert torch.allclose(plain.result(), mine, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--dp 2", "--replicate 2"])
def test_two_ranks_run_all_stages(finished, tmp_path, flags):
    status, said = done(torchrun(2, tmp_path / "run", *TINY, *flags.split()))
    assert status == 0, said
    assert figures(tmp_path / "run").keys() == figures(finished).keys()
    mine, there = (train.Latents(f / "latents") for f in (tmp_path / "run", finished))
    assert mine.captions == there.captions and mine.shapes == there.shapes


@pytest.mark.slow
def test_two_ranks_train_on_several_shapes(finished, tmp_path):
    flags = on(finished, *SHAPES, "--train_dit.precision", "fp64", "--train_dit.align", "0")
    start = tmp_path / "start"
    assert main(start, *flags, "--stage", "latents") == 0
    one, two = (on_ranks(n, shutil.copytree(start, tmp_path / f"{n}"), *flags, "--stage", "dit")
                for n in (1, 2))
    assert len(one) == 8 and torch.allclose(one, two, rtol=1e-9)


@pytest.mark.slow
def test_two_ranks_train_an_autoencoder_with_an_adversary(tmp_path):
    """With a discriminator that starts late: about the loss curve of one rank."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        status, said = done(torchrun(
            ranks, folder, *TINY, "--stage", "tae", "--loss.gan", "0.1", "--loss.gan_start", "3",
            "--loss.kl", "0", "--loss.opl", "0.1", "--train_tae.lr", "5e-4"))
        assert status == 0, said
        found[ranks] = torch.tensor(losses(folder, "tae/image") + losses(folder, "tae/video"))
    # Each rank draws its own posterior noise and weighs its own adversary: close, not equal. With
    # 3e-3 the two part after nine steps; with 5e-4, in four seeds, they differ by 2.5 % at most.
    assert len(found[1]) == 10 and torch.allclose(found[1], found[2], rtol=0.05)


@pytest.mark.slow
def test_a_wrong_flag_under_torchrun_is_one_line(tmp_path):
    status, said = done(torchrun(2, tmp_path / "run", "--coupling", "ot"))
    assert status != 0 and said.count("train.py: --coupling ot: not one of") == 1
    assert not (tmp_path / "run").exists()


APART = """
import os, sys
os.chdir(os.path.join(sys.argv[-1], os.environ["RANK"]))
import train
sys.exit(train.main(sys.argv[1:-1]))
"""


@pytest.mark.slow
def test_nodes_that_do_not_share_the_folder_are_refused(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "apart.py").write_text(APART)
    status, said = done(torchrun(2, "here", *TINY, tmp_path, script=tmp_path / "apart.py",
                                 PYTHONPATH=str(ROOT)))
    assert status != 0 and said.count("--workdir here: rank 1 does not see the files") == 1, said
    assert not any(p.name != "lock" for p in tmp_path.glob("*/here/*"))


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(finished, tmp_path):
    """SIGKILL of one of two ranks: the run ends by itself, with the losses of one that nobody
    touched."""
    flags = on(finished, "--steps", "60", "--stage", "dit")
    plain, folder = on_ranks(2, tmp_path / "plain", *flags), tmp_path / "killed"
    p = torchrun(2, folder, *flags, options=["--max-restarts", 3])
    wait_for(p, lambda: checkpoints(folder / "dit"))
    os.kill(children(p)[-1], signal.SIGKILL)
    status, said = done(p)
    assert status == 0, said
    assert events(folder, "resume"), "it was not killed in the middle"
    assert torch.equal(torch.tensor(losses(folder), dtype=plain.dtype), plain) and len(plain) == 60


def children(process):
    """Process ids of the ranks of a torchrun."""
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(
        ).split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks outlive their torchrun")
def test_torchrun_killed_takes_its_ranks_along(finished, tmp_path):
    """They hear SIGTERM, write a checkpoint and end."""
    folder = tmp_path / "run"
    p = torchrun(2, folder, *on(finished, "--steps", "100000"))
    wait_for(p, lambda: checkpoints(folder / "dit"))
    ranks = children(p)
    p.kill()
    p.communicate(timeout=100)                          # which ends when the last rank has ended
    for n in ranks:                                     # gone, or ended and waited for by nobody
        with contextlib.suppress(FileNotFoundError):
            assert ") Z " in Path(f"/proc/{n}/stat").read_text()
    assert events(folder, "stopped")[-1][1] == checkpoints(folder / "dit")[-1]


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_the_timeout(finished, tmp_path):
    folder = tmp_path / "run"
    p = torchrun(2, folder, *on(finished, "--steps", "100000", "--timeout", "5"))
    wait_for(p, lambda: checkpoints(folder / "dit"))
    waits, hangs = children(p)
    os.kill(hangs, signal.SIGSTOP)
    wait_for(p, lambda: waits not in children(p))       # ended by the collective's time-out
    os.kill(hangs, signal.SIGKILL)                      # as torchrun would, in another 30 s
    status, said = done(p)
    assert status != 0 and checkpoints(folder / "dit"), said
