"""train.py: judge, data, checkpoints, resuming, bad input. One tiny run of all stages is shared."""
import contextlib
import gc
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import sample_parallel
import sdot
import tae
import text_cond
import train

ROOT = Path(train.__file__).parent
CLIPS = ROOT.parent / "shared" / "clips"
TINY = """--train_tae.steps 6 --train_tae.image_steps 4 --train_tae.every 6 --train_tae.batch 2
  --train_tae.image_batch 8 --clips.count 300 --steps 8 --train_dit.every 6 --batch 8 --dit.dim 48
  --dit.depth 2 --text.width 32 --sample.prompts 10 --sample.steps 3""".split()


def run(folder, *extra):
    check, train.check_judge = train.check_judge, lambda cfg: {"color": 1.0}  # has its own test
    try:
        return train.main(["--workdir", str(folder), "--device", "cpu", *TINY, *extra])
    finally:
        train.check_judge = check


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def forget(folder, *names):
    """Take files and folders of later stages away, as if they had never been."""
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- captions and the judge ----------------------------------------------------------------------


def test_judge_agrees_with_the_truth():
    cfg = train.finish_config(train.SCALES["toy"]())
    agreement = train.check_judge(cfg, 500)
    assert min(agreement[k] for k in ("color", "shape", "direction", "speed")) >= 0.99
    assert agreement["text"] >= 0.97


def test_judge_agrees_with_two_objects():
    cfg = train.finish_config(train.SCALES["small"]())
    agreement = train.check_judge(cfg, 60)
    assert min(agreement.values()) >= 0.97


def test_judge_reads_chinese():
    try:
        tae.glyphs("人", 16)
    except ValueError:
        pytest.skip("fonts-wqy-microhei is not installed")
    cfg = train.SCALES["toy"]()
    cfg.clips.script = "chinese"
    agreement = train.check_judge(train.finish_config(cfg), 300)
    assert min(agreement.values()) >= 0.99
    world = tae.World((tae.Thing("red", "sign", "left", "slow", "火山"),))
    assert train.parse(train.caption(world))[0]["text"] == "火山"


def test_an_image_is_judged_without_its_motion():
    world = tae.World((tae.Thing("red", "circle", "left", "slow"),))
    (clip,) = tae.render([world], 1)
    seen = train.judge(clip, train.caption(world))
    assert seen["color"] and seen["shape"] and not seen["direction"]


def test_judge_can_fail():
    rng = random.Random(0)
    worlds = [tae.sample_world(rng) for _ in range(120)]
    made = tae.render(worlds)
    wrong = train.accuracy([train.judge(c, train.caption(w))
                            for c, w in zip(made, worlds[1:] + worlds[:1])])
    assert wrong["color"] < 0.35 and wrong["direction"] < 0.3 and wrong["text"] < 0.15
    assert wrong["shape"] < 0.55                       # signs are 2 in 5
    black = train.judge(torch.full((3, 16, 32, 32), -1.0), train.caption(worlds[0]))
    noise = train.judge(torch.randn(3, 16, 32, 32), train.caption(worlds[0]))
    assert not any(black.values()) and not noise["direction"]


def test_captions_are_the_grammar():
    rng = random.Random(1)
    for things in (1, 2):
        for _ in range(100):
            world = tae.sample_world(rng, things, heldout=None)
            parsed = train.parse(train.caption(world))
            assert [(p["color"], p["shape"], p["direction"], p["speed"], p["text"])
                    for p in parsed] == [(t.color, t.shape, t.direction, t.speed, t.word)
                                         for t in world.things]
    assert train.parse("a dog on a beach") == []
    kinds = [k for k, _ in train.test_prompts(train.finish_config(train.SCALES["toy"]()))]
    assert kinds.count("trained") == 160
    small = train.finish_config(train.SCALES["small"]())                    # of two things
    small.sample.prompts = 30
    prompts = train.test_prompts(small)
    assert [k for k, _ in prompts].count("words") == 6 and len(prompts) == 30 + 9 + 6 + 6
    assert all(len(train.parse(p)) == 2 for _, p in prompts)
    assert all("sign" in p for k, p in prompts if k.startswith("words"))


# ---- the run -------------------------------------------------------------------------------------


def test_run_leaves_what_it_promises(finished):
    for name in ("config.json", "metrics.csv", "coupling.pt", "report.json", "index.html",
                 "samples.gif", "curves.png", "tae/tae.safetensors", "dit/model.safetensors",
                 "samples/0000.gif", "samples/0000.mp4", "latents/index.json"):
        assert (finished / name).stat().st_size > 0, name
    report = json.loads((finished / "report.json").read_text())
    assert {"tae_psnr_db", "prompt_accuracy", "gap", "seconds", "judge"} <= set(report)
    assert {"color", "shape", "direction", "heldout", "text"} <= set(report["prompt_accuracy"])
    assert set(report["gap"]["random"]) >= {"color", "shape", "direction"}
    assert report["seconds"]["total"] > 0
    rows = train.read_metrics(finished / "metrics.csv")
    assert [r["step"] for r in rows if r["stage"] == "dit"] == list(range(8))
    page = (finished / "index.html").read_text()
    assert 'a href="samples/0000.mp4"' in page and "sign saying &quot;" in page


def test_latents_are_what_the_autoencoder_says(finished):
    cfg = train.from_dict(train.Config, json.loads((finished / "config.json").read_text()))
    r = train.Run(finished, cfg, torch.device("cpu"))
    latents, model = train.load_latents(r), train.load_tae(r)
    assert latents.mean.shape == (300, 8, 4, 8, 8)
    clips = train.ToyClips(cfg)
    for i in (0, 299):
        x, text = clips.clip("train", i)
        with torch.no_grad():
            p = model.encode(x[None])
        assert torch.allclose(latents.mean[i], p.mean[0], atol=1e-5)
        assert latents.captions[latents.of[i]] == text
    everything = torch.arange(len(latents.of))
    z = tae.Posterior(latents.mean, latents.rows("logvar", everything)).sample(
        torch.Generator().manual_seed(0))
    z = model.normalize(z)
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.1 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


@pytest.mark.slow
def test_a_stage_shorter_than_its_first_checkpoint(copy, finished):
    forget(copy, "dit", "samples", "report.json")
    assert run(copy, "--train_dit.every", "1000") == 0
    assert figures(copy) == figures(finished)
    assert json.loads((copy / "config.json").read_text())["train_dit"]["every"] == 1000


def test_how_a_run_is_computed_may_change_and_what_comes_out_may_not(copy, capfd):
    assert not train.HOW - set(train.flags_of(train.Config()))
    forget(copy, "samples", "report.json")
    assert run(copy, "--train_dit.accumulate", "2", "--dit.checkpointing", "true",
               "--stage", "dit") == 0
    there = train.read_config(copy / "config.json")
    assert there.train_dit.accumulate == 2 and there.dit.checkpointing
    assert run(copy, "--train_dit.accumulate", "4", "--steps", "9") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "(train_dit.steps: 8 there, 9 here)" in line
    assert train.read_config(copy / "config.json") == there


def test_load_run_generates_the_same_clip_again(finished):
    loaded = train.load_run(finished)
    prompts = ["a red circle moving left", 'a white sign saying "CAT" moving up']
    a, b = loaded.generate(prompts, [3, 4]), loaded.generate(prompts[1:], [4])
    assert a.shape == (2, 3, 16, 32, 32) and a.abs().max() <= 1
    assert torch.allclose(a[1], b[0], atol=1e-4)       # alone or in a batch


def test_starting_again_skips_everything(finished, capfd):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    assert run(finished, "--stage", "sample") == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    assert "step/s" not in capfd.readouterr().err


def figures(folder):
    report = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in report.items() if k not in ("seconds", "machine", "judge", "dit")}


@pytest.mark.parametrize("stage,step", [
    *(pytest.param(*at, marks=pytest.mark.slow) for at in (
        ("tae/image", 2), ("tae/video", 4), ("dit", 2))), ("dit", 5),
])
def test_interrupted_and_resumed_is_uninterrupted(finished, tmp_path, monkeypatch, stage, step):
    folder, add, whole = tmp_path / "again", train.Metrics.add, step != 5
    until = () if whole else ("--stage", "dit")
    if stage == "dit":                                  # the others have tested what is before it
        shutil.copytree(finished, folder)
        forget(folder, "dit", "samples", "report.json")

    def interrupt(self, s, *rest):
        if (self.stage, s) == (stage, step):
            raise KeyboardInterrupt
        add(self, s, *rest)

    monkeypatch.setattr(train.Metrics, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.undo()
    assert run(folder, *until) == 0
    assert not whole or figures(folder) == figures(finished)
    assert (train.read_metrics(folder / "metrics.csv")
            == train.read_metrics(finished / "metrics.csv"))      # loss by loss, bit by bit
    for name in ("tae/tae.safetensors", "dit/model.safetensors"):
        a, b = train.load_tensors(folder / name), train.load_tensors(finished / name)
        assert all(torch.equal(a[k], b[k]) for k in b)


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fork_shares_the_latents_and_changes_what_it_is_told(finished, tmp_path):
    other = {"coupling": "independent", "seed": 1, "dit.qk_norm": True, "train_dit.steps": 4}
    run = train.fork(finished, tmp_path / "fork", other)
    for name in ("tae/tae.safetensors", "latents/index.json"):
        assert (tmp_path / "fork" / name).read_bytes() == (finished / name).read_bytes()
    train.train_dit(run)
    train.make_samples(run)
    report = train.make_report(run, train.clips_of(run.cfg))
    assert report["seed"] == 1 and report["coupling"] == "independent"
    rows = train.read_metrics(tmp_path / "fork" / "metrics.csv")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert train.load_run(tmp_path / "fork").cfg.dit.qk_norm
    assert not train.load_run(finished).cfg.dit.qk_norm             # the other is as it was
    train.fork(finished, tmp_path / "fork", other)                  # again: the same run
    with pytest.raises(train.UserError, match="another configuration"):
        train.fork(finished, tmp_path / "fork", {**other, "seed": 2})
    with pytest.raises(train.UserError, match="no run with latents"):
        train.fork(tmp_path, tmp_path / "new", {})


@pytest.mark.slow
def test_a_study_is_runs_that_can_be_continued(finished, tmp_path, capfd):
    plain = {"train_dit.steps": 2, "sample.prompts": 5}
    variants = {"plain": plain, "normed": {**plain, "dit.qk_norm": True}}
    rows = train.compare(finished, tmp_path, variants, seeds=2)
    assert [(r["variant"], r["seed"]) for r in rows] == [("plain", 0), ("normed", 0), ("plain", 1),
                                                         ("normed", 1)]
    out = capfd.readouterr().out
    assert out.count(" +- ") == 2 * len(train.COMPARED) and (tmp_path / "study.png").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("report.json")}
    shutil.rmtree(tmp_path / "study" / "normed-1")
    assert train.compare(finished, tmp_path, variants, seeds=2) == rows     # one made again, alike
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("report.json")}
    assert sum(after[p] != t for p, t in before.items()) == 1


def test_a_run_swept_over_sampling_steps(copy, monkeypatch):
    monkeypatch.setattr(sdot, "STEPS", (1, 3))
    assert [(r["schedule"], r["steps"]) for r in sdot.sweep(copy, clips=2)] == [
        ("shifted", 1), ("shifted", 3)]
    (copy / "sweep.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    train.write_json(copy / "config.json", {**config, "coupling": "independent"})
    rows = sdot.sweep(copy, clips=4)
    assert [(r["schedule"], r["steps"]) for r in rows] == [
        (s, n) for s in ("shifted", "linear", "linear_quadratic") for n in (1, 3)]
    assert all(0 <= r["right"] <= 1 and 0 <= r["curvature"] <= 1 and r["energy"] > 0 for r in rows)
    # one step is one step, whatever the schedule: x0 + v(x0, 0)
    assert len({round(r["energy"], 5) for r in rows if r["steps"] == 1}) == 1
    assert sdot.sweep(copy) == rows                                 # kept, not made again


def test_where_video_tokens_look(finished, tmp_path, capsys):
    text_cond.look(finished, 'a red sign saying "AT" moving left', tmp_path)
    shares = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()
              if line.endswith(" %")]
    assert len(shares) == 8 + 3 + 1 and sum(shares) == pytest.approx(100, abs=0.6)
    assert (tmp_path / "attention.png").stat().st_size > 0


@pytest.mark.slow
def test_truncated_checkpoint_is_named_and_the_one_before_is_used(copy, finished, capfd):
    forget(copy, "dit/model.safetensors", "samples", "report.json")
    newest = sorted((copy / "dit").glob("step_*"))[-1]
    (data,) = newest.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-100])
    assert run(copy) == 0
    err = capfd.readouterr().err
    assert str(newest) in err and "damaged" in err
    assert figures(copy) == figures(finished)


@pytest.mark.slow
def test_truncated_latent_shard_is_named_and_made_again(copy, finished, capfd):
    shard = copy / "latents" / "shard_00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    forget(copy, "dit", "samples", "coupling.pt", "report.json")
    assert run(copy) == 0
    assert shard.name in capfd.readouterr().err and shard.read_bytes() == good
    assert figures(copy) == figures(finished)


def test_latents_with_other_numbers_are_coupled_again(copy, monkeypatch, capfd):
    """A shard made again on another machine, or with a clip in place of a video that is gone."""
    r = train.Run(copy, parsed(), torch.device("cpu"))
    old, encoded = (copy / "coupling.pt").read_bytes(), train.encoded

    def otherwise(*args):
        for x, captions, posterior in encoded(*args):
            posterior.mean.mul_(1 + 1e-6)
            yield x, captions, posterior

    monkeypatch.setattr(train, "encoded", otherwise)
    (copy / "latents" / train.shard_file(1)).write_bytes(b"")
    train.encode_latents(r, train.clips_of(r.cfg))
    assert "so the coupling is solved again: shard_00001" in capfd.readouterr().err
    train.couple_latents(r)
    z = train.statistics_of(r).normalize(train.load_latents(r).mean)
    train.sdot.Coupling.load(copy / "coupling.pt", z)
    (copy / "coupling.pt").write_bytes(old)         # as if all of latents/ had been made anew
    forget(copy, "dit/model.safetensors")
    with pytest.raises(train.UserError, match=r"^\S*coupling.pt: latents .* remove it and start"):
        train.train_dit(r)
    (copy / "coupling.pt").write_bytes(old[:99])
    with pytest.raises(train.UserError, match=r"^\S*coupling.pt: not a readable .* remove it"):
        train.train_dit(r)


@pytest.mark.slow
def test_a_run_with_the_pretrained_encoders(folders, tmp_path, capfd):
    """All stages with UL2, ByT5 and MetaCLIP in miniature. Who has none is told at the start."""
    where = [x for name, f in folders.items() for x in (f"--text.{name}", f)]
    flags = ["--text", "pretrained", "--coupling", "independent", "--sample.prompts", "4", *where]
    gone = tmp_path / "moved"
    shutil.copytree(folders["concepts"], tmp_path / "concepts")
    flags[-1] = str(tmp_path / "concepts")

    def refused(says):
        out, err = capfd.readouterr()
        assert len(err.splitlines()) == 1 and not out and says in err, err

    (tmp_path / "concepts").rename(gone)
    assert run(tmp_path / "run", *flags) == 2 and not (tmp_path / "run").exists()
    refused(f"train.py: --text.concepts {tmp_path / 'concepts'}: no such folder")
    assert run(tmp_path / "run", *flags, "--stage", "tae") == 0     # which needs no text
    gone.rename(tmp_path / "concepts")
    assert run(tmp_path / "run", *flags, "--stage", "latents") == 0
    (tmp_path / "concepts").rename(gone)
    capfd.readouterr()
    assert run(tmp_path / "run", *flags) == 2
    refused("samples need it: to end before them, --stage dit")
    assert run(tmp_path / "run", *flags, "--stage", "dit") == 0     # reads features that are there
    gone.rename(tmp_path / "concepts")
    assert run(tmp_path / "run", *flags) == 0
    index = json.loads((tmp_path / "run/samples/index.json").read_text())
    assert index and len(list((tmp_path / "run/samples").glob("*.gif"))) == len(index)

    captions = json.loads((tmp_path / "run/latents/captions.json").read_text())["captions"][:9]
    there = train.load_tensors(tmp_path / "run/latents" / train.text_file(0))
    import transformers
    model = transformers.T5EncoderModel.from_pretrained(folders["words"], dtype=torch.bfloat16)
    read = transformers.AutoTokenizer.from_pretrained(folders["words"])
    for i, caption in enumerate(captions):
        ids = read(text_cond.seen_by(caption)["words"], return_tensors="pt").input_ids
        mine = there["words"][i][there["words_mask"][i]].float()
        assert (mine - model(ids).last_hidden_state[0].float()).abs().max() < 0.05, caption
    loaded = train.load_run(tmp_path / "run")
    P, mask, *_ = loaded.prompts(captions[:2])
    assert P.shape == (2, mask.shape[1], 48) and mask.any(1).all()
    (tmp_path / "concepts").rename(gone)                # a run, and an export, can do without
    train.export(tmp_path / "run", tmp_path / "x.safetensors")
    for folder in (tmp_path / "run", tmp_path / "x.safetensors"):
        again = train.load_run(folder).text.state_dict()
        assert all(torch.equal(v, again[k]) for k, v in loaded.text.state_dict().items())


def test_full_disk_keeps_the_checkpoint_before(copy, monkeypatch, capfd):
    forget(copy, "dit/model.safetensors", "samples", "report.json", "dit/step_0000006")
    kept = sorted(p.name for p in (copy / "dit").glob("step_*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.WholeWriter, "write_data", full)     # in the thread that writes
    assert run(copy) == 2
    err = capfd.readouterr().err
    assert "No space left on device" in err and "step_0000003 is kept" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in (copy / "dit").glob("*")) == kept


def test_a_checkpoint_without_the_files_of_a_rank_is_none(copy, monkeypatch, capfd):
    """As where each node has a folder of its own."""
    forget(copy, "dit/model.safetensors", "samples", "report.json", "dit/step_0000006")
    write = train.WholeWriter.write_data

    def elsewhere(self, *args):
        written = write(self, *args)
        (self.path / "sums_0.json").unlink()
        return written

    monkeypatch.setattr(train, "LATE", 0.1)
    monkeypatch.setattr(train.WholeWriter, "write_data", elsewhere)
    assert run(copy) == 2
    err = capfd.readouterr().err
    assert "__0_0.distcp: not there; do all nodes share" in err and "step_0000003 is kept" in err
    assert not (copy / "dit/step_0000006").exists()


def test_a_file_is_no_rank_whatever_its_path_says(monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    gone = FileNotFoundError(2, "No such file or directory", "runs/timeout_600/__1_0.distcp")
    lost = RuntimeError("Connection closed by peer")
    wrapped = lambda e: train.CheckpointException("read", {1: (e, None)})
    for error in (gone, wrapped(gone), ValueError("timeout.json is not what was written")):
        assert not train.tells_of_loss(error)
    assert train.tells_of_loss(lost) and train.tells_of_loss(wrapped(lost))


@pytest.mark.slow
def test_a_stop_while_a_checkpoint_is_read_costs_none(copy, finished, monkeypatch):
    """A stop is no damage: it is heard after the first step, and no checkpoint is taken for bad."""
    forget(copy, "dit/model.safetensors", "samples", "report.json", "coupling.pt")
    real, left = train.Checkpoints.check, [2]

    def check(self, path):
        if path.parent.name == "dit" and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, path)
    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpoints, "check", check)
        assert run(copy) == 0
    assert not (copy / "dit/model.safetensors").exists()
    there = sorted(p.name for p in (copy / "dit").glob("step_*"))
    assert there == ["step_0000006", "step_0000007"]
    assert run(copy) == 0 and figures(copy) == figures(finished)


def test_checkpoints_that_cannot_be_read_are_not_thrown_away(copy, capfd):
    forget(copy, "dit/model.safetensors", "samples", "report.json")
    there = sorted((copy / "dit").glob("step_*"))
    for data in (copy / "dit").glob("step_*/*.distcp"):
        data.write_bytes(b"")
    assert run(copy) == 2
    assert "none of its checkpoints can be read; move them away" in capfd.readouterr().err
    assert sorted((copy / "dit").glob("step_*")) == there


@pytest.mark.slow
def test_what_is_removed_is_made_again(copy, finished):
    """The one line for a damaged file says: remove it and start the run again."""
    names = ("latents/text_00000.safetensors", "latents/captions.json",
             "samples/clips_0000.safetensors")
    forget(copy, "report.json", *names)
    assert run(copy) == 0
    for name in names:
        assert (copy / name).read_bytes() == (finished / name).read_bytes()
    assert figures(copy) == figures(finished)


def test_captions_are_encoded_in_parts(copy, monkeypatch, capfd):
    """Their features do not depend on the parts; one that was damaged, or is left over from a start
    with other captions, is made again."""
    r = train.Run(copy, parsed(), torch.device("cpu"))
    want = text_cond.TextConditioner(r.cfg.text).encode(train.load_latents(r).captions)
    forget(copy, "latents")
    monkeypatch.setattr(train, "SHARD", 64)
    train.encode_latents(r, train.clips_of(r.cfg))
    made = {p.name: p.read_bytes() for p in sorted((copy / "latents").glob("text_*"))}
    latents = train.load_latents(r)
    assert len(made) == -(-len(latents.captions) // 64) > 1

    def same(rows):
        got = latents.features(rows)
        assert got.keys() == want.keys()
        for k, x in got.items():
            L = x.shape[1]
            assert torch.equal(x, want[k][rows, :L]) and not want[k][rows, L:].any()

    same(torch.arange(len(latents.captions)))
    same(torch.tensor([len(latents.captions) - 1, 0, 64, 63, 64]))
    damaged, *_, stale = (copy / "latents" / name for name in made)
    damaged.write_bytes(b"")
    assert "text_00000.safetensors" not in capfd.readouterr().err
    train.encode_latents(r, train.clips_of(r.cfg))
    assert "encoded again: text_00000.safetensors" in capfd.readouterr().err
    forget(copy, "latents/index.json")
    train.save_tensors(stale, train.load_tensors(damaged), captions="[]")
    train.encode_latents(r, train.clips_of(r.cfg))
    assert {p.name: p.read_bytes() for p in sorted((copy / "latents").glob("text_*"))} == made
    (copy / "latents/index.json").write_text('{"shards": {"shard_')         # cut: nothing is lost
    before = {p: p.stat().st_mtime_ns for p in (copy / "latents").glob("*.safetensors")}
    train.encode_latents(r, train.clips_of(r.cfg))
    assert before == {p: p.stat().st_mtime_ns for p in (copy / "latents").glob("*.safetensors")}
    capfd.readouterr()
    # A shard that is made again can have other captions: then so have all files of features.
    (copy / "latents" / train.shard_file(0)).write_bytes(b"")
    clips, other = train.clips_of(r.cfg), "a red circle moving left and a red circle moving left"
    clip = clips.clip
    clips.clip = lambda split, i, *rest: (clip(split, i, *rest)[0], other if i == 0 else
                                          clip(split, i, *rest)[1])
    train.encode_latents(r, clips)
    latents = train.load_latents(r)
    assert latents.captions[0] == other
    want = text_cond.TextConditioner(r.cfg.text).encode(latents.captions)
    same(torch.arange(len(latents.captions)))
    train.encode_latents(r, clips)
    assert json.loads((copy / "latents/index.json").read_text())["shards"].keys() == {
        p.name for p in (copy / "latents").iterdir()} - {"index.json"}


def test_no_space_for_tensors_is_one_line_and_leaves_nothing(tmp_path):
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(train.UserError, match="could not be written .*free some space") as e:
            train.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors").mkdir()        # no space would help
    with pytest.raises(train.UserError, match="could not be written .*a directory.*[)]$"):
        train.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_ctrl_c_while_importing_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nraise SystemExit(3)\n")
    done = subprocess.run([sys.executable, "train.py", "--plan"], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(2, signal.SIG_DFL))   # nohup ignores it
    assert done.returncode == -2 and not done.stderr


def test_memory_and_gpus_that_are_too_few_are_one_line(tmp_path, monkeypatch, capfd):
    def work(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
                                     "total capacity of 79.1 GiB")
    with monkeypatch.context() as patch:
        patch.setattr(train, "work", work)
        assert train.main(["--workdir", str(tmp_path / "x")]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "2.00 GiB. Go on with --train_dit.acc" in err
    for sizes, line in (((10**12, 2**10), "allocate 3,814,697.27 GiB."),
                        ((10**12, 10**12), "64 bits"), ((10**24,), "64 bits")):
        with monkeypatch.context() as patch:
            patch.setattr(train, "work", lambda *_, sizes=sizes: torch.empty(sizes))
            assert train.main(["--workdir", str(tmp_path / "x")]) == 2
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and line in err
    with pytest.raises(TypeError), monkeypatch.context() as patch:      # ours, with its traceback
        patch.setattr(train, "work", lambda *_: len(0))
        train.main(["--workdir", str(tmp_path / "x")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = "train.py: --nproc_per_node 2: 1 GPUs here, one rank each; or --device cpu\n"
    for rank, line in ((0, said), (1, "")):             # the second machine says so, too
        for name, value in (("WORLD_SIZE", 4), ("RANK", 2 + rank), ("LOCAL_RANK", rank),
                            ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert train.main(["--workdir", str(tmp_path / "x"), "--device", "cuda"]) == 2
        assert capfd.readouterr().err == line


def test_checkpoints_are_planned_as_torch_plans_them(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.randn(3, 4), "b": torch.randn(5)}, "step": {"at": torch.ones(())}}
    told = []
    for planner in (dcp.DefaultSavePlanner(), train.SavePlanner()):
        path = tmp_path / type(planner).__name__
        dcp.save(state, checkpoint_id=path, planner=planner, no_dist=True)
        told.append(dcp.FileSystemReader(path).read_metadata())
    for name in ("state_dict_metadata", "planner_data", "storage_data"):
        assert getattr(told[0], name) == getattr(told[1], name)


def test_a_model_that_a_checkpoint_fills_is_not_drawn():
    """But for what is no draw, as tables and zeros."""
    model = train.backbone.DiT(parsed().dit)
    for p in model.parameters():
        torch.nn.init.constant_(p, 7)
    with train.WholeDraws(none=True):
        model.init_weights()
    assert {v for p in model.parameters() for v in p.unique().tolist()} == {0, 7}
    with train.WholeDraws():
        model.init_weights()
    assert not any((p == 7).any() for p in model.parameters())


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    state = {"model": {"w": torch.zeros(1000)}}

    def there():
        return sorted(p.name for p in tmp_path.iterdir())

    checkpoints = train.Checkpoints(tmp_path)
    for step in (4, 8, 11):
        state["model"]["w"].fill_(step)
        checkpoints.save(step, state)
        checkpoints.wait()
    assert there() == ["step_0000008", "step_0000011"]
    data = next((tmp_path / "step_0000011").glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)
    checkpoints = train.Checkpoints(tmp_path)
    assert checkpoints.load(state) == 8 and state["model"]["w"].eq(8).all()
    checkpoints.save(10, state)
    checkpoints.wait()
    assert there() == ["step_0000008", "step_0000010"]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_checkpoint_cannot_run_code(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = copy / "dit" / "step_0000006"
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(pickle.UnpicklingError):
        train.SafeReader(folder).read_metadata()
    with pytest.raises(pickle.UnpicklingError):         # protocol 4 follows dots through a module
        train._SafeUnpickler(__import__("io").BytesIO(
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93."
        )).load()
    assert not (tmp_path / "evil").exists()
    for path in copy.rglob("*"):                        # nothing else is a pickle but coupling.pt
        if path.is_file() and path.suffix in (".pt", ".pth", ".pkl"):
            torch.load(path, weights_only=True)


def test_another_configuration_is_refused_and_named(copy, capfd):
    before = (copy / "config.json").read_text()
    assert run(copy, "--seed", "7", "--train_dit.lr", "0.5") == 2
    err = capfd.readouterr().err
    assert "seed: 0 there, 7 here" in err and "train_dit.lr" in err and err.count("\n") == 1
    assert (copy / "config.json").read_text() == before
    (copy.parent / "other").mkdir()
    (copy.parent / "other" / "thesis.txt").write_text("mine")
    assert run(copy.parent / "other") == 2
    assert [p.name for p in (copy.parent / "other").iterdir()] == ["thesis.txt"]


# ---- bad input -----------------------------------------------------------------------------------

BAD = [
    (["--scael", "toy"], "--scael"),
    (["--scale", "huge"], "--scale huge: not one of toy, small"),
    (["--stage", "dits"], "--stage dits: not one of tae, latents"),
    (["--coupling", "ot"], "--coupling ot: not one of independent"),
    (["--tae", "vidtwn"], "--tae vidtwn: not one of 2.5d, 3d, vidtwin"),
    (["--tae", "vidtwin", "--patch_dynamics", "1", "3", "2"], "--patch_dynamics 1 3 2: does not"),
    (["--tae", "vidtwin", "--vidtwin.patch", "5"], "patch 5: does not divide the size 32"),
    (["--tae.mult", "1", "2"], "one stride less than there are levels"),
    (["--train_tae.motion", "0"], "--train_tae.motion 0: must be 1 or more"),
    (["--text", "clip"], "--text clip: not one of toy, pretrained"),
    (["--device", "tpu"], "--device tpu: not one of"),
    (["--data", "/nowhere"], "--data /nowhere: no such folder"),
    (["--data", ""], "--data"),
    (["--steps", "many"], "--train_dit.steps many: not a whole number"),
    (["--steps", "-1"], "--train_dit.steps -1: must be 0 or more"),
    (["--batch", "0"], "--train_dit.batch 0: must be 1 or more"),
    (["--seed", "x"], "--seed x: not a whole number"),
    (["--train_dit.lr", "0"], "--train_dit.lr 0.0: must be above 0"),
    (["--train_dit.lr", "fast"], "--train_dit.lr fast: not a number"),
    (["--clips.frames", "0"], "--clips.frames 0: must be 1 or more"),
    (["--clips.things", "4"], "--clips.things 4: at most 3"),
    (["--train_tae.crowd", "7"], "--train_tae.crowd 7: at most 6"),
    (["--clips.lengths", "17", "--coupling", "independent"], "--clips.lengths 17: clips of the"),
    (["--patch", "1", "3", "3"], "--patch 1 3 3: does not divide"),
    (["--patch", "1", "4"], "--patch 1 4: not three numbers"),
    (["--dit.heads", "5"], "heads 5"),
    (["--dit.adaln", "none"], "--dit.adaln none"),
    (["--flow.time", "cubic"], "--flow.time cubic"),
    (["--dit.qk_norm", "maybe"], "--dit.qk_norm maybe: not true or false"),
    (["--sample.schedule", "cosine"], "--sample.schedule cosine: not one of"),
    (["--sample.solver", "rk9"], "--sample.solver rk9: not one of"),
    (["--sample.steps", "0"], "--sample.steps 0: must be 1 or more"),
    (["--train_tae.finish", "2"], "--train_tae.finish 2.0: must be from 0 to 1"),
    (["--train_dit.drop", "1.5"], "--train_dit.drop 1.5: must be from 0 to 1"),
    (["--sdot.solver", "lp"], "--sdot.solver lp"),
]


@pytest.mark.parametrize("flags,line", BAD, ids=[" ".join(f) for f, _ in BAD])
def test_bad_flags_are_one_line(flags, line, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "train_tae", lambda *_: pytest.fail("it started to train"))
    try:
        status = train.main(["--workdir", str(tmp_path / "run"), *flags])
    except SystemExit as stop:
        status = stop.code
    err = capfd.readouterr().err
    assert status == 2 and line in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_cuda_where_there_is_none(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert train.main(["--device", "cuda", "--workdir", str(tmp_path / "run")]) == 2
    assert "--device cuda: torch sees no CUDA device here" in capfd.readouterr().err


def test_an_export_is_the_run(finished, tmp_path, capfd):
    path = tmp_path / "model.safetensors"
    assert train.main(["--workdir", str(finished), "--export", str(path)]) == 0
    a, b = train.load_run(finished), train.load_run(path)
    assert a.config == b.config
    prompts, seeds = ['a red circle moving left', 'a white sign saying "CAT" moving up'], [3, 4]
    assert torch.equal(a.generate(prompts, seeds), b.generate(prompts, seeds))
    train.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    for bad, line in (("other.safetensors", "not written by train.py --export"),
                      ("none.safetensors", "no run there")):
        with pytest.raises(train.UserError, match=line):
            train.load_run(tmp_path / bad)
    assert train.main(["--workdir", str(tmp_path), "--export", str(path)]) == 2


def test_shapes_without_weights_and_a_part_of_the_blocks(finished):
    sketch = train.load_run(finished, "meta")
    assert all(p.is_meta for p in sketch.dit.parameters())
    assert sketch.latent_shape == train.load_run(finished).latent_shape
    part = train.load_run(finished, prepare=lambda dit: sample_parallel.keep_stage(dit, 2, 1))
    whole = dict(train.load_run(finished).dit.named_parameters())
    mine = dict(part.dit.named_parameters())
    assert mine.keys() == {k for k in whole if not k.startswith("blocks.0.")}
    assert all(torch.equal(w, whole[k]) for k, w in mine.items())


# ---- clips of several shapes, and phases ---------------------------------------------------------

SHAPES = """--coupling independent --patch 1 2 2 --phases progressive --clips.size 48
  --clips.aspects 1 1 4 3 --clips.lengths 8 --steps 20""".split()


def parsed(*flags):
    return train.parse_args([*TINY, *flags])[0]


def test_phases_are_movie_gens():
    """Table 3 of the paper, from the 30B preset."""
    cfg = train.finish_config(train.SCALES["30b"]())
    rows = [(p.frames, p.size, p.batch, p.steps, round(p.lr, 9)) for p in train.phases(cfg)]
    assert rows == [(1, 256, 9216, 210_000, 1e-4), (256, 256, 1536, 185_000, 6e-5),
                    (256, 768, 512, 74_500, 6e-5)]
    assert [round(p.batch * p.steps / 1e6, 1) for p in train.phases(cfg)] == [1935.4, 284.2, 38.1]
    sizes = [train.at_phase(cfg, p).dit.streams[0].size for p in train.phases(cfg)]
    assert sizes == [(1, 32, 32), (32, 32, 32), (32, 96, 96)]      # latents of 8 x 8 x 8
    cfg = parsed(*SHAPES, "--clips.images", "0.5", "--batch", "8")
    at = [train.at_phase(cfg, p) for p in train.phases(cfg)]
    assert {T for T, *_ in train.shapes_of(at[0])} == {1}
    assert {T for T, *_ in train.shapes_of(at[1])} == {1, 8, 16}
    assert [c.clips.images for c in at] == [0.0, 0.5, 0.5]
    with pytest.raises(train.UserError, match="--batch 8, in phase full 2: not a multiple"):
        train.check_shares(cfg, train.Mesh(dp=4), Path("nowhere"))


def test_ranks_have_to_suit_only_what_is_still_to_do(tmp_path):
    cfg, three, many = parsed(*SHAPES), train.Mesh(dp=3), train.Mesh(dp=2, sp=16)
    (tmp_path / "dit").mkdir()
    for phase, said in (("images", "small 8"), ("small", "small 8"), ("full", "full 2")):
        for mesh, last in ((three, "tae"), (many, "coupling")):
            train.check_shares(cfg, mesh, tmp_path, last)
        for last in ("dit", "all"):
            with pytest.raises(train.UserError, match=f"in phase {said}: not"):
                train.check_shares(cfg, three, tmp_path, last)
            with pytest.raises(train.UserError, match="--sp 16: more ranks than"):
                train.check_shares(cfg, many, tmp_path, last)
        (tmp_path / "dit" / f"{phase}.safetensors").touch()
    for mesh in (three, many):
        train.check_shares(cfg, mesh, tmp_path)
    with pytest.raises(train.UserError, match="--sp 3: more ranks than tokens in the smallest"):
        train.check_shares(train.parse_args(["--scale", "small", "--phases", "progressive"])[0],
                           train.Mesh(dp=1, sp=3), tmp_path / "new")


def test_shapes_of_clips():
    cfg = parsed("--coupling", "independent", "--patch", "1", "2", "2", "--clips.size", "96",
                 "--clips.aspects", "1", "1", "16", "9", "9", "16", "--clips.lengths", "8",
                 "--clips.images", "0.1")
    shapes = train.shapes_of(cfg)
    assert shapes[0] == (16, 96, 96) and len(shapes) == 9
    for _, H, W in shapes:
        assert H % 8 == W % 8 == 0 and 0.9 < H * W / 96**2 < 1.1
        assert min(abs(W / H / a - 1) for a in (1, 16 / 9, 9 / 16)) < 0.15
    assert all(m >= n for T, H, W in shapes
               for m, n in zip(cfg.dit.streams[0].size, (-(-T // 4), H // 4, W // 4)))
    clips = train.ToyClips(cfg)
    drawn = [clips.shape(i) for i in range(0, 40_000, train.CROPS)]
    share = sum(T == 1 for T, *_ in drawn) / len(drawn)
    assert abs(share - 1 / 11) < 4 * (1 / 11 * 10 / 11 / len(drawn)) ** 0.5      # one in eleven
    assert set(drawn) == set(shapes)
    assert clips.shape(5) == clips.shape(7)                         # crops of one window
    x, _ = clips.clip("train", 0, None, shapes[4])
    assert x.shape == (3, *shapes[4])
    g, counts = torch.Generator().manual_seed(0), [100, 300, 600]
    bins = torch.tensor([train.draw_bucket(counts, g) for _ in range(4000)]).bincount() / 4000
    assert (bins - torch.tensor([0.1, 0.3, 0.6])).abs().max() < 0.03


@pytest.mark.parametrize("aspects,shape", [("16 9 1 1", (16, 24, 40)), ("9 16 1 1", (16, 32, 32))])
def test_videos_go_to_the_shape_nearest_to_theirs(tmp_path, aspects, shape):
    folder = make_folder(tmp_path / "v")                            # 64 x 48
    cfg = config(folder, "--coupling", "independent", "--patch", "1", "2", "2", "--clips.aspects",
                 *aspects.split())
    clips = train.VideoFolder(cfg)
    assert {clips.shape(i) for i in range(0, 40, train.CROPS)} == {shape}
    for other in clips.shapes:
        assert clips.clip("train", 0, None, other)[0].shape == (3, *other)


@torch.no_grad()
def test_a_phase_starts_where_the_one_before_ended(tmp_path):
    """Against expand_positions on a whole model, which dit.py's tests know."""
    cfg = parsed(*SHAPES)
    small, full = (train.at_phase(cfg, p) for p in train.phases(cfg)[1:])
    run_ = train.Run(tmp_path, small, torch.device("cpu"))
    old = train.place(run_, train.TextToVideo(small))
    train.save_tensors(tmp_path / "old.safetensors", old.state_dict())
    new = train.place(run_, train.TextToVideo(full))
    train.start_from(new, tmp_path / "old.safetensors", small.dit)
    old.dit.expand_positions(full.dit.streams[0].size)
    a, b = old.state_dict(), new.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(b["dit.tables.0.1"]) > len(train.TextToVideo(small).dit.tables[0][1])


def test_a_rank_draws_only_its_noise_where_that_is_much(finished, tmp_path, monkeypatch):
    """The batches of two ranks are halves of that of one; and both are N(0, 1)."""
    key, shape = (0, "x0", 7), (2, 3, 4, 4)
    whole = train.draw_noise(key, 64, shape, slice(None))
    parts = [train.draw_noise(key, 64, shape, train.shard(64, i, 2)) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    assert len(whole.flatten(1).unique(dim=0)) == 64
    assert not torch.equal(whole, train.draw_noise((0, "x0", 8), 64, shape, slice(None)))
    seen = {}

    def catch(run, stage, folder, model, t, steps, losses):
        (part,) = next(losses(3))
        seen[run.mesh.data] = part.args[0][2:], part.keys       # x1, x0, t, and the clips
        return model.state_dict()

    monkeypatch.setattr(train, "WHOLE", 0)
    monkeypatch.setattr(train, "optimize", catch)
    run_ = train.fork(finished, tmp_path / "run", {"coupling": "independent"})
    for data in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(train.Mesh, "data", data)
        train.train_phase(run_, "dit", run_.latents, tmp_path, tmp_path / f"{data}.safetensors")
    for one, *two in zip(*(seen[d][0] for d in ((0, 1), (0, 2), (1, 2)))):
        assert torch.equal(one, torch.cat(two))
    assert seen[0, 1][1] == seen[0, 2][1] + seen[1, 2][1]


@pytest.mark.slow
def test_progressive_run_of_many_shapes(tmp_path, monkeypatch, capfd):
    folder, add = tmp_path / "run", train.Metrics.add

    def interrupt(self, s, *rest):
        if (self.stage, s) == ("dit/small", 4):
            raise KeyboardInterrupt
        add(self, s, *rest)

    monkeypatch.setattr(train.Metrics, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, *SHAPES)
    monkeypatch.undo()
    assert run(folder, *SHAPES) == 0
    rows = train.read_metrics(folder / "metrics.csv")
    steps = {s: [r["step"] for r in rows if r["stage"] == s] for s in dict.fromkeys(
        r["stage"] for r in rows) if s.startswith("dit")}
    assert steps == {"dit/images": list(range(9)), "dit/small": list(range(8)),
                     "dit/full": list(range(3))}
    shapes = {}
    for name in ("images", "small", "full"):
        latents = train.load_latents(train.Run(folder, parsed(*SHAPES), torch.device("cpu")),
                                     folder / "latents" / name)
        shapes[name] = {tuple(shape) for shape, _ in latents.buckets()}
        assert sum(len(clips) for _, clips in latents.buckets()) == 300
    assert shapes["images"] == {(8, 1, 4, 4)}          # 4 to 3 is 16 x 16, too
    assert {s[2:] for s in shapes["full"]} == {(12, 12), (10, 14)}
    assert {s[1] for s in shapes["small"]} == {s[1] for s in shapes["full"]} == {1, 2, 4}
    loaded = train.load_run(folder)
    assert loaded.generate(["a red circle moving left"]).shape == (1, 3, 16, 48, 48)
    run_ = train.fork(folder, tmp_path / "fork", {"seed": 1})
    train.encode_latents(run_, train.clips_of(run_.cfg))            # all is there
    assert "latents" not in train.read_json(tmp_path / "fork" / "seconds.json", {})
    events = [{"stage": f"dit/{name}", "event": e, "step": steps, "time": seconds}
              for name, n, began in (("images", 9, 0), ("small", 8, 100), ("full", 3, 200))
              for e, steps, seconds in (("start", 0, began), ("end", n, began + n))]
    run_ = train.Run(folder, loaded.cfg, torch.device("cpu"))
    alone = [train.utilisation(run_, events[i : i + 2])["tflop_per_step"] for i in (0, 2, 4)]
    found, batches = train.utilisation(run_, events), [p.batch for p in train.phases(loaded.cfg)]
    assert batches == [48, 8, 2] and alone[0] / 48 < alone[1] / 8
    assert found["clips_per_second"] == (9 * 48 + 8 * 8 + 3 * 2) / 20
    mean = sum(n * flops for n, flops in zip((9, 8, 3), alone)) / 20
    assert abs(found["tflop_per_step"] / mean - 1) < 1e-3
    # Clips of each shape count as what they are: by hand, over the clips that there are.
    cfg = train.at_phase(loaded.cfg, train.phases(loaded.cfg)[2])
    L = loaded.text(train.load_latents(run_).features(torch.arange(64)))[0].shape[1]
    clips = train.ToyClips(cfg)
    sizes = [clips.shape(i) for i in range(300)]
    tokens = [-(-T // 4) * H // 8 * W // 8 for T, H, W in sizes]
    want = 3 * 2 / 1e12 * sum(sum(train.backbone.flops(cfg.dit, N, L)) for N in tokens) / 300
    assert abs(alone[2] / want - 1) < 0.02, (alone[2], want)


@pytest.mark.slow
def test_two_ranks_go_through_the_phases(tmp_path):
    losses = []
    for ranks in (1, 2):
        done = torchrun(tmp_path / str(ranks), ranks, *SHAPES, "--train_dit.precision", "fp64",
                        "--train_dit.align", "0", "--stage", "latents")
        assert done.returncode == 0, done.stderr[-3000:]
        if ranks == 2:          # the same autoencoder and latents
            for name in ("tae", "latents"):
                shutil.rmtree(tmp_path / "2" / name)
                shutil.copytree(tmp_path / "1" / name, tmp_path / "2" / name)
        done = torchrun(tmp_path / str(ranks), ranks, *SHAPES, "--train_dit.precision", "fp64",
                        "--train_dit.align", "0", "--stage", "dit")
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(torch.tensor([r["loss"] for r in train.read_metrics(
            tmp_path / str(ranks) / "metrics.csv") if r["stage"].startswith("dit")]))
    assert len(losses[0]) == 20 and torch.allclose(*losses, rtol=1e-6)


# ---- steps that go wrong, and ends that are asked for --------------------------------------------


def toy_training(folder, poison=(), **changes):
    """`optimize` on a line through noise; steps in `poison` have a loss that is not a number."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = train.TrainConfig(**{"steps": 12, "every": 8, "ema": 0.9, **changes})
    run = train.Run(folder, train.Config(), torch.device("cpu"))
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def losses(first):
        for step in range(first, cfg.steps):
            x = torch.randn(8, 3, generator=train.generator("toy", step))
            bad = float("nan") if step in poison else 1.0
            part = lambda model, x=x, bad=bad: ((model(x) - x.sum(1, keepdim=True)) * bad).square(
                ).mean()
            part.keys = [step]
            yield [part]

    state = train.optimize(run, "dit", folder / "dit", model, cfg, cfg.steps, losses)
    return state, [(e["event"], e["step"]) for e in train.read_events(folder / "events.jsonl")]


def test_training_is_what_torch_does_by_hand(tmp_path):
    """Clipping (of some steps, not of all), AdamW, schedule and average, each by torch itself."""
    state, _ = toy_training(tmp_path / "a", lr=0.2, clip=2.0, warmup=3, weight_decay=0.1)
    torch.manual_seed(0)
    model, norms = torch.nn.Linear(3, 1), []
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": [model.weight], "weight_decay": 0.1},
                                   {"params": [model.bias], "weight_decay": 0.0}],
                                  betas=(0.9, 0.99))
    for step in range(12):
        x = torch.randn(8, 3, generator=train.generator("toy", step))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / 12)) / 2
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (step + 1) / (step + 10))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in model.state_dict().items()}
    assert min(norms) < 2.0 < max(norms), norms
    for name, want in average.items():
        assert torch.allclose(state[name], want, rtol=1e-5, atol=1e-6), name


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, capfd):
    plain, _ = toy_training(tmp_path / "a")
    skipped, events = toy_training(tmp_path / "b", poison=(5,))
    assert ("skipped", 5) in events and "clips 5" in capfd.readouterr().err
    assert all(v.isfinite().all() for v in skipped.values())
    assert not torch.equal(plain["weight"], skipped["weight"])
    rows = train.read_metrics(tmp_path / "b" / "metrics.csv")
    assert [r["step"] for r in rows if r["loss"] != r["loss"]] == [5]


def test_three_in_a_row_take_the_last_checkpoint_again(tmp_path, capfd):
    """Steps 5 to 7 fail: training goes on at 8 as if 4 had been the last one before it."""
    state, events = toy_training(tmp_path / "a", poison=(5, 6, 7), ema=0.0)
    assert [e for e in events if e[0] in ("skipped", "rewound")] == [
        ("skipped", 5), ("skipped", 6), ("skipped", 7), ("rewound", 7)]
    assert "to the weights of step 4" in capfd.readouterr().err
    again, _ = toy_training(tmp_path / "b", poison=(4, 5, 6, 7), ema=0.0)  # 4 was trained, and lost
    assert torch.equal(state["weight"], again["weight"])
    with pytest.raises(train.UserError, match="third step in a row; lower the learning rate"):
        toy_training(tmp_path / "c", poison=(0, 1, 2))


@pytest.mark.parametrize("every", [1, 3, 4])
def test_a_kill_costs_no_more_steps_than_every_says(tmp_path, monkeypatch, every):
    """However slow the disk: before each step, how many a kill at its end would cost."""
    finish, begin, lost = train.WholeWriter.finish, train.generator, []
    monkeypatch.setattr(train.WholeWriter, "finish", lambda *args, **named: (
        time.sleep(0.2), finish(*args, **named)))

    def step_begins(stage, step):
        whole = [int(p.name[5:]) for p in (tmp_path / "dit").glob("step_*")]
        lost.append(step + 1 - max(whole, default=0))
        return begin(stage, step)

    monkeypatch.setattr(train, "generator", step_begins)
    toy_training(tmp_path, every=every, poison=(5,) if every == 4 else ())
    assert len(lost) == 12 and max(lost) <= every and (every % 2 or max(lost) == every)


@pytest.mark.parametrize("number", train.Stop.signals)
def test_a_stop_that_is_asked_for_loses_nothing(tmp_path, monkeypatch, number):
    plain, _ = toy_training(tmp_path / "a")
    fire, calls = train.generator, []

    def asked(*key):
        calls.append(key)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return fire(*key)

    before = signal.getsignal(number)
    train.Stop.listen()
    try:
        with monkeypatch.context() as patch, pytest.raises(train.Stopped, match="after 7 steps"):
            patch.setattr(train, "generator", asked)
            toy_training(tmp_path / "b")
    finally:
        train.Stop.forget()
    assert signal.getsignal(number) == before
    state, events = toy_training(tmp_path / "b")
    assert torch.equal(plain["weight"], state["weight"]) and events.count(("stopped", 7)) == 1
    assert ("start", 7) in events
    rows = train.read_metrics(tmp_path / "b" / "metrics.csv")
    assert [r["step"] for r in rows] == list(range(12))


def test_steps_of_the_autoencoder_know_their_clips(tmp_path, monkeypatch):
    def first_steps(run, stage, folder, model, t, steps, losses):
        keys.extend(part.keys for (part,), _ in zip(losses(2), range(2)))
        raise InterruptedError

    keys, cfg = [], parsed()
    monkeypatch.setattr(train, "optimize", first_steps)
    monkeypatch.setattr(train, "check_judge", lambda cfg: {})
    with pytest.raises(InterruptedError):
        train.train_tae(train.Run(tmp_path, cfg, torch.device("cpu")), train.clips_of(cfg))
    assert [set(k) for k in keys] == [{4, 5}, {6, 7}]               # 8 frames, 4 of each clip


def test_a_spike_is_named_with_its_clips(tmp_path, capfd):
    folder, value = tmp_path / "a", {60: 1e3}
    folder.mkdir()
    run = train.Run(folder, train.Config(), torch.device("cpu"))
    model = torch.nn.Linear(1, 1)

    def losses(first):
        for step in range(first, 70):
            part = lambda model, step=step: model(torch.ones(1, 1)).sum() * 0 + value.get(
                step, 1 + step % 7 / 10)
            part.keys = [step, 99]
            yield [part]

    train.optimize(run, "dit", folder / "dit", model, train.TrainConfig(every=1000), 70, losses)
    assert "dit step 60: spike, loss 1000 after 1.3, clips 60 99" in capfd.readouterr().err
    train.draw_timeline(folder, {})
    assert (folder / "timeline.png").stat().st_size > 3000


@pytest.mark.parametrize("frames,clips", [(1, 8), (2, 4), (3, 3), (16, 2)])
def test_an_image_batch_is_whole_however_short_the_clips(frames, clips, tmp_path, monkeypatch):
    class Caught(Exception):
        pass

    def catch(run, stage, folder, model, t, steps, losses):
        (part,) = next(losses(0))
        raise Caught(part(lambda x, step, g: x.shape), part.keys)

    monkeypatch.setattr(train, "optimize", catch)
    monkeypatch.setattr(train, "check_judge", lambda cfg: {})
    cfg = parsed("--clips.frames", str(frames), "--patch", "1", "1", "1", "--coupling",
                 "independent", "--train_tae.image_batch", "8")
    with pytest.raises(Caught) as caught:
        train.train_tae(train.Run(tmp_path, cfg, torch.device("cpu")), train.ToyClips(cfg))
    shape, keys = caught.value.args
    assert shape == (8, 3, 1, 32, 32) and len(keys) <= clips


def test_files_of_tensors_have_the_mode_of_other_files(tmp_path, monkeypatch):
    (tmp_path / "other").touch()
    train.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    monkeypatch.setattr(os, "access", lambda *_: False)     # nor is a good file called damaged
    with pytest.raises(PermissionError, match="x.safetensors: this user may not read it"):
        train.readable(tmp_path / "x.safetensors")


def test_utilisation_of_clips_that_all_have_one_of_several_shapes(tmp_path):
    """Wide videos alone, of a config that allows squares, too: 4 x 3 x 5 tokens and not 4 x 4 x 5.
    """
    cfg = parsed("--data", "x", "--coupling", "independent", "--patch", "1", "2", "2",
                 "--clips.aspects", "16", "9", "--clips.count", "4")
    wide, there = torch.zeros(4, 8, 4, 6, 10), tmp_path / "latents"
    train.save_tensors(there / train.shard_file(0), {"mean": wide, "logvar": wide.clone()})
    train.save_tensors(there / train.text_file(0), {k: torch.zeros(1, 5, dtype=torch.int64)
                                                    for k in text_cond.ENCODERS})
    train.write_json(there / "captions.json", {"captions": ["a"], "of": [0] * 4,
                                               "rows": [[0, 1, 2, 3]], "shapes": [wide.shape[1:]]})
    run_ = train.Run(tmp_path, cfg, torch.device("cpu"))
    run_.peak = 1e12
    rows = [{"stage": "dit", "event": e, "step": s, "time": s, "ranks": 1}
            for e, s in (("start", 0), ("end", 10))]
    want = 3 * cfg.train_dit.batch * sum(train.backbone.flops(cfg.dit, 60, 11)) / 1e12
    assert train.tokens_of(cfg.dit) == 80
    assert train.utilisation(run_, rows)["tflop_per_step"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("data,asked", [((), "a"), (("--data", "x"), "FPS-8 a")])
def test_frame_rates_are_told_where_they_were(data, asked):
    """Captions of the toy world never tell theirs."""
    class Text:
        def encode(self, prompts):
            raise ValueError(*prompts)

    cfg = parsed("--clips.tell_fps", "true", *data)
    loaded = train.Loaded(cfg, None, Text(), None, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{asked}$"):
        loaded.prompts(["a"])
    with pytest.raises(ValueError, match="^FPS-15 a$"):
        loaded.prompts(["FPS-15 a"])
    assert [loaded.fps_of(p) for p in ("a", "FPS-15 a", "FPS-29.7 a", "FPS-x a")] == [8, 15, 30, 8]


def test_utilisation_counts_what_was_done_while_it_ran(finished):
    """10 steps of 8 clips in 20 seconds, half of them on two ranks, and an hour between that nobody
    worked in."""
    cfg = train.from_dict(train.Config, json.loads((finished / "config.json").read_text()))
    run_ = train.Run(finished, cfg, torch.device("cpu"))
    run_.peak = 5e9
    rows = [("start", 0, 0), ("checkpoint", 5, 10), ("start", 5, 3610), ("end", 10, 3620)]
    rows = [{"stage": "dit", "event": e, "step": s, "time": t, "ranks": 1 + (t > 10)}
            for e, s, t in rows]
    rows.insert(0, {"stage": "tae", "event": "end", "step": 9, "time": -1})
    found = train.utilisation(run_, rows)
    assert found["clips_per_second"] == 4
    with torch.device("meta"):
        model = train.TextToVideo(cfg).dit
    features = train.load_tensors(finished / "latents/text_00000.safetensors")
    L = train.load_run(finished).text(features)[0].shape[1]
    from torch.utils.flop_counter import FlopCounterMode
    x, t, P = (torch.empty(*s, device="meta") for s in ((8, 8, 4, 8, 8), (8,), (8, L, 48)))
    with FlopCounterMode(display=False) as counter:     # attention, too: on meta it is two products
        model(x, t, P)
    flops = 3 * counter.get_total_flops()
    assert abs(found["tflop_per_step"] * 1e12 / flops - 1) < 1e-3
    assert abs(found["mfu_percent"] / (100 * flops * 10 / (10 + 2 * 10) / 5e9) - 1) < 1e-3
    assert train.utilisation(run_, []) == {}


def test_accumulated_parts_are_the_whole_batch(finished, tmp_path):
    weights = {}
    for parts in (1, 4):
        changes = {"train_dit.accumulate": parts, "train_dit.align": 0.0, "train_dit.steps": 3,
                   "coupling": "independent"}
        run_ = train.fork(finished, tmp_path / str(parts), changes)
        train.train_dit(run_)
        weights[parts] = train.load_tensors(tmp_path / str(parts) / "dit" / "model.safetensors")
    for k, w in weights[1].items():
        assert torch.allclose(w, weights[4][k], atol=1e-5), k


# ---- couplings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"coupling": "minibatch"}, {"coupling": "sdot-global", "sdot.target": 0.5, "sdot.pca": 8}])
def test_the_other_couplings_train(finished, tmp_path, changes, capfd):
    run_ = train.fork(finished, tmp_path / "fork", {**changes, "train_dit.steps": 2})
    train.couple_latents(run_)
    train.train_dit(run_)
    assert (tmp_path / "fork" / "dit" / "model.safetensors").exists()
    assert ("ignores captions" in capfd.readouterr().err) == (changes["coupling"] == "sdot-global")


def test_unique_captions_are_coupled_in_clusters():
    words = ("a red boat on the sea", "two dogs run over green grass")
    captions = [f"{words[i % 2]} take{i}" for i in range(128)]
    latents = train.Latents(None, [], torch.zeros(128, 2), torch.arange(128), captions)
    points = torch.randn(128, 4, 8) + 9 * (-1.0) ** torch.arange(128).view(-1, 1, 1)
    there = torch.arange(4) < torch.randint(1, 4, (128, 1))
    points[~there] = 1e3                                # padding, which must not count
    for mask in ({}, {"concepts_mask": there}):         # of toys, of MetaCLIP
        latents.features = lambda rows, mask=mask: {
            k: x[rows] for k, x in ({"concepts": points} | mask).items()}
        groups = train.caption_groups(latents, 32)
        assert torch.bincount(groups)[groups].min() >= 32
        for group in groups.unique():
            assert len({int(i) % 2 for i in (groups == group).nonzero()}) == 1


def test_unfinished_run_cannot_be_loaded(tmp_path, copy):
    with pytest.raises(train.UserError, match="no run there"):
        train.load_run(tmp_path / "nothing")
    forget(copy, "dit/model.safetensors")
    with pytest.raises(train.UserError, match="not finished"):
        train.load_run(copy)


# ---- real videos ---------------------------------------------------------------------------------


def make_folder(path, videos=3, frames=40, size=48):
    """Videos whose frame k has the grey level 4 k, so that a window can be told from its pixels."""
    path.mkdir()
    for v in range(videos):
        level = (4 * torch.arange(frames) / 127.5 - 1).view(1, frames, 1, 1)
        clip = level.expand(3, -1, size, size + 16)
        train.write_video(path / f"v{v}.{'gif' if v == 2 else 'mp4'}", clip, fps=10)
        (path / f"v{v}.txt").write_text(f"grey number {v}\n")
    return path


def config(folder, *flags):
    return train.parse_args(["--data", str(folder), "--workdir", "x", *flags])[0]


def test_videos_that_no_clip_is_of_are_told_of(tmp_path, capfd):
    folder, said = make_folder(tmp_path / "v"), "sees 2 of the 3 videos, 4 crops of each; 12 to see"
    for count, missed in ((8, True), (9, False), (12, False)):
        clips = train.VideoFolder(config(folder, "--clips.count", str(count)))
        assert (said in capfd.readouterr().err) == missed
        texts = {clips.clip("train", i)[1] for i in range(count)}
        assert len(texts) == (2 if missed else 3)


def test_windows_are_frames_at_an_interval(tmp_path):
    folder = make_folder(tmp_path / "v", frames=60)
    clips = train.VideoFolder(config(folder))
    assert [(p.name, n) for p, _, n, *_ in clips.videos] == [("v0.mp4", 60), ("v1.mp4", 60),
                                                              ("v2.gif", 60)]
    seen = set()
    for i in range(0, 24 * train.CROPS, train.CROPS):
        for split in ("train", "heldout"):
            x, text = clips.clip(split, i)
            assert x.shape == (3, 16, 32, 32) and text == f"grey number {i // train.CROPS % 3}"
            k = ((x.mean((0, 2, 3)) + 1) * 127.5 / 4)                       # frame numbers
            d = k.diff()
            assert d.std() < 0.4 and 0.7 < d.mean() < 2.3
            if split == "heldout":                   # the last fifth, or the last clip if longer
                assert k[0] > 43.4
            else:
                assert k[-1] < 43.6
                seen.add(round(d.mean().item()))
            again, _ = clips.clip(split, i)
            assert torch.equal(x, again)
    assert seen == {1, 2}


@pytest.mark.parametrize("frames,cut", [(1000, 800), (80, 64), (79, 63), (60, 44), (32, 16),
                                        (31, 0), (16, 0), (5, 0)])
def test_what_is_held_out_is_never_trained_on(frames, cut):
    """Clips have 16 frames: the last fifth, or the last clip; nothing where two do not fit."""
    assert train.held_out(16, frames) == cut


@pytest.mark.parametrize("scale,count", [("toy", 1024), ("small", 1024), ("1b", 1_000_000),
                                         ("30b", 10_000_000)])
def test_only_the_small_scales_cut_down_real_videos(scale, count):
    argv = ["--scale", scale, "--data", "videos"]
    assert train.parse_args(argv)[0].clips.count == count
    assert train.parse_args([*argv, "--clips.count", "77"])[0].clips.count == 77


def test_image_batches_do_not_depend_on_the_ranks(tmp_path, monkeypatch):
    """Two ranks' frames are those of one, and each decodes the clips it needs alone."""
    cfg = train.parse_args(["--train_tae.image_batch", "8", "--train_tae.image_steps", "3"])[0]
    seen: dict = {}

    def optimize(run, stage, folder, model, t, steps, losses):
        for (one,), _ in zip(losses(0), range(3)):
            seen.setdefault(train.rank(), []).append(one(lambda x, step, g: x))
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "optimize", optimize)
    monkeypatch.setattr(train, "check_judge", lambda cfg: {"color": 1.0})
    asked: list = []
    clips = train.ToyClips(cfg)
    whole = clips.clip
    clips.clip = lambda *a: asked.append(a[1]) or whole(*a)
    for world in (1, 2):
        for r in range(world):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train, "rank", lambda r=r: r)
                patch.setattr(train, "world_size", lambda world=world: world)
                folder = tmp_path / f"{world}{r}"
                train.train_tae(train.Run(folder, cfg, torch.device("cpu")), clips)
        if world == 1:
            alone, decoded = seen.pop(0), len(asked)
            asked.clear()
    for step in range(3):
        assert torch.equal(alone[step], torch.cat([seen[0][step], seen[1][step]]))
        assert alone[step].shape == (8, 3, 1, 32, 32)
    assert decoded <= len(asked) <= 2 * decoded


def test_reader_reaches_every_frame(tmp_path):
    folder = make_folder(tmp_path / "v")
    for name in ("v0.mp4", "v2.gif"):
        for start in (0, 7, 23, 37):
            x = train.read_window(folder / name, start, 1, 4, 32, 10.0).float().mean((1, 2, 3)) / 4
            want = torch.tensor([min(start + k, 39.0) for k in range(4)])
            assert (x - want).abs().max() < 0.6, (name, start, x)


def test_odd_folders(tmp_path, capfd):
    folder = make_folder(tmp_path / "v", videos=2)
    (folder / "broken.mp4").write_bytes(b"not a video" * 50)
    (folder / "broken.txt").write_text("broken")
    (folder / "silent.avi").write_bytes(b"")
    train.write_video(folder / "short.mp4", torch.zeros(3, 5, 40, 40), fps=10)
    (folder / "metadata.csv").write_bytes(      # as Excel writes it, and then somebody else
        b'\xef\xbb\xbffile_name,text\nshort.mp4,"caf\xe9, short"\n')
    (folder / "v0.txt").write_text("from the left", encoding="utf-8-sig")
    clips = train.VideoFolder(config(folder))
    err = capfd.readouterr().err
    assert "broken.mp4: unreadable, skipped" in err and "silent.avi: no caption" in err
    assert "shorter than 16 frames, the last frame is repeated: short.mp4" in err
    assert [v[0].name for v in clips.videos] == ["short.mp4", "v0.mp4", "v1.mp4"]
    assert train.read_captions(folder, [v[0] for v in clips.videos])[1] == "from the left"
    x, _ = clips.clip("train", 0)
    assert x.shape == (3, 16, 32, 32) and (x[:, 5:] - x[:, 4:5]).abs().max() < 0.05


def test_a_run_keeps_to_the_videos_that_it_began_with(tmp_path, monkeypatch, capfd):
    """One that goes, one that comes, and a caption that changes do not move the clips of others."""
    folder, table = make_folder(tmp_path / "v"), tmp_path / "videos.json"
    clips = train.VideoFolder(config(folder), table=table)
    want = [clips.clip("train", i * train.CROPS) for i in range(3)]
    train.write_json(table, clips.table())
    (folder / "v0.mp4").unlink()
    (folder / "v1.txt").write_text("another caption")
    shutil.copyfile(folder / "v1.mp4", folder / "a.mp4")
    (folder / "a.txt").write_text("new")
    monkeypatch.setattr(train, "probe", None)                       # no file is opened
    again = train.VideoFolder(config(folder), table=table)
    assert again.videos == clips.videos
    err = capfd.readouterr().err
    assert "gone since this run began, others stand in: v0.mp4" in err
    assert "not seen when this run began, not used: a.mp4" in err
    for damaged in ("", "5", "[]", "[1]", '[["v1.mp4", "x", 60, 10.0]]'):
        (tmp_path / "bad.json").write_text(damaged)
        with pytest.raises(train.UserError, match="bad.json: damaged; remove it"):
            train.VideoFolder(config(folder), table=tmp_path / "bad.json")
    for i, (x, _) in enumerate(want):
        got, said = again.clip("train", i * train.CROPS)
        assert said == f"grey number {i or 1}"                      # the next one stands in
        assert i == 0 or torch.equal(got, x)
    assert "v0.mp4: cannot be read any more" in capfd.readouterr().err


def test_no_phase_trains_on_what_is_held_out(tmp_path, monkeypatch):
    """Images have one frame; what clips of 16 may not see, they may not see either."""
    clips = train.VideoFolder(config(make_folder(tmp_path / "v", frames=40)))
    cfg = config(tmp_path / "v", "--phases", "progressive", "--coupling", "independent",
                 "--clips.size", "48", "--patch", "1", "2", "2")
    read, last = train.read_window, []
    monkeypatch.setattr(train, "read_window", lambda path, start, interval, T, *rest: last.append(
        start + interval * (T - 1)) or read(path, start, interval, T, *rest))
    for phase in train.phases(cfg):
        there = train.at_phase(cfg, phase)
        here = clips.at(there)
        for i in range(0, 16 * train.CROPS, train.CROPS):
            x, _ = here.clip("train", i)
            assert x.shape[1:] == train.whole_clip(there)
    assert 16 < max(last) < train.held_out(16, 40) == 24


def test_shared_out_work_comes_back_in_order(monkeypatch):
    items, shares = list(range(10)), {}
    for _ in range(2):                                  # the second time all shares are known
        for r in range(3):
            monkeypatch.setattr(train, "world_size", lambda: 3)
            monkeypatch.setattr(train, "rank", lambda r=r: r)
            monkeypatch.setattr(train, "from_all", lambda mine, r=r: shares.update({r: mine}) or [
                shares.get(k, [None] * 4) for k in range(3)])
            found = train.shared_out("squares", lambda x: x * x, items, True)
            assert shares[r] == [x * x for x in items[r::3]]
    assert found == [x * x for x in items]


def test_a_video_that_vanishes_in_mid_run_is_named_and_another_stands_in(tmp_path, capfd):
    folder = make_folder(tmp_path / "v")
    clips = train.VideoFolder(config(folder))
    want = [clips.clip("train", i * train.CROPS) for i in range(3)]
    (folder / "v0.mp4").unlink()
    (folder / "v1.mp4").write_bytes((folder / "v1.mp4").read_bytes()[:200])
    indices = [[0], [train.CROPS], [2 * train.CROPS], [3 * train.CROPS]]
    seen = list(train.batches(clips, "train", indices))
    assert [text for _, (text,) in seen] == ["grey number 2"] * 4
    assert torch.equal(seen[2][0][0], want[2][0])               # what was not lost is the same
    err = capfd.readouterr().err
    for name in ("v0.mp4", "v1.mp4"):
        assert f"{name}: cannot be read any more (" in err
    (folder / "v2.gif").unlink()
    with pytest.raises(train.UserError, match="none of its 3 videos can be read any more") as e:
        list(train.batches(clips, "train", indices))
    assert "\n" not in str(e.value)
    assert not any(w.is_alive() for w in train._workers)        # though the error is still here


@pytest.mark.slow
def test_a_process_ends_though_its_workers_are_deaf(tmp_path):
    """As after an error in mid-run, whose traceback holds the reader until the end."""
    folder = make_folder(tmp_path / "v")
    code = ("import train\n"
            f"cfg = train.parse_args(['--data', {str(folder)!r}, '--workdir', 'x'])[0]\n"
            "reader = train.batches(train.VideoFolder(cfg), 'train', [[i] for i in range(99)])\n"
            "print(len(next(reader)), len(train._workers))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.split()[0] == "2" and int(done.stdout.split()[1]) > 0


@pytest.mark.parametrize("case,line", [
    ("empty", "no video in it"), ("captionless", "no captions"), ("blank", "its caption is empty"),
    ("unreadable", "none of its 1 videos can be read"), ("table", "its first line must be"),
    ("quote", "is a quotation mark not closed"),
    ("first quote", "is a quotation mark not closed"), ("locked", "v0.txt"),
])
def test_bad_folders_are_one_line(tmp_path, capfd, case, line):
    folder = tmp_path / "v"
    if case == "empty":
        folder.mkdir()
    else:
        make_folder(folder, videos=1)
    if case == "captionless":
        (folder / "v0.txt").unlink()
    if case == "blank":
        (folder / "v0.txt").write_text("  \n")
    if case == "unreadable":
        (folder / "v0.mp4").write_bytes(b"\0" * 1000)
    if case == "table":
        (folder / "metadata.csv").write_text("name,caption\nv0.mp4,x\n")
    if case == "quote":
        (folder / "metadata.csv").write_text('file_name,text\nv0.mp4,"' + 200_000 * "x")
    if case == "first quote":
        (folder / "metadata.csv").write_text('file_name,"text\n' + 200_000 * "x")
    if case == "locked":
        (folder / "v0.txt").unlink()
        (folder / "v0.txt").mkdir()
    assert train.main(["--data", str(folder), "--workdir", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert line in err[-1] and "Traceback" not in "".join(err)
    assert not (tmp_path / "run").exists()


def write_frames(path, times, size=(32, 32), rate=10, **options):
    """Colours, one frame at each of `times` in milliseconds -> the images."""
    from fractions import Fraction

    import av

    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (1, 1, 3), generator=g).byte().expand(*size, 3)
              .clone() for _ in times]
    for image in images:
        image[: size[0] // 2, : size[1] // 2] = 255     # the corner at the top left
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base, stream.codec_context.gop_size = Fraction(1, 1000), 5
        for image, ms in zip(images, times):
            frame = av.VideoFrame.from_ndarray(image.numpy())
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return images


def test_a_video_of_varying_rate_is_as_long_as_it_lasts(tmp_path):
    """Matroska tells a rate and no number of frames: 20 in two seconds, then one a second."""
    times = [100 * i for i in range(20)] + [2000 + 1000 * i for i in range(20)]
    images = write_frames(tmp_path / "v.mkv", times, rate=10)
    frames, rate, _ = train.probe(tmp_path / "v.mkv")
    assert frames / rate == pytest.approx(times[-1] / 1000 + 0.1, abs=0.11)     # 21.1 s
    seen = train.read_window(tmp_path / "v.mkv", round(15 * rate), 1, 1, 32, rate)[0]
    want = images[times.index(15_000)]
    assert (seen.float() - want.float()).abs().mean() < 8


def test_a_video_that_was_longer_is_not_read_as_a_still(tmp_path, capfd):
    folder = make_folder(tmp_path / "v", videos=1)
    path = folder / "v.mkv"
    write_frames(path, [100 * i for i in range(100)])
    path.with_suffix(".txt").write_text("noise")
    clips = train.VideoFolder(config(folder))
    assert sorted(n for _, _, n, *_ in clips.videos) == [40, 100]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert len(train.read_window(path, 0, 1, 16, 32, 10.0)) == 16
    with pytest.raises(ValueError, match="v.mkv: nothing decodes from frame 70 on"):
        train.read_window(path, 70, 1, 16, 32, 10.0)
    for i in range(0, 40 * train.CROPS, train.CROPS):
        clips.clip("heldout", i)
    assert "v.mkv: cannot be read any more (" in capfd.readouterr().err


def test_a_phone_video_stands_upright(tmp_path):
    """A display matrix of 90 degrees: x' = width - y, y' = x, so that the corner at the top left
    comes to the top right."""
    import struct

    path = tmp_path / "v.mp4"
    write_frames(path, [100 * i for i in range(10)], (32, 64), movflags="faststart")
    plain = train.read_window(path, 0, 1, 2, 32, 10.0)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(data)
    turned = train.read_window(path, 0, 1, 2, 32, 10.0)
    assert plain.shape == (2, 32, 64, 3) and turned.shape == (2, 64, 32, 3)
    assert plain[0, 2, 2].min() > 230 and turned[0, 2, -3].min() > 230
    assert turned[0, 2, 2].min() < 200
    assert train.probe(path) == (10, 10.0, 2.0)


def test_captions_that_were_not_meant_so_are_named(tmp_path, capfd):
    files = [tmp_path / f"{c}.mp4" for c in "ab"]
    (tmp_path / "metadata.csv").write_text('file_name,text\na.mp4,a dog, a cat\nb.mp4,b\n')
    with pytest.raises(train.UserError, match="line 2: more columns than the first line has"):
        train.read_captions(tmp_path, files)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.mp4,"a dog\nb.mp4,b\n')
    with pytest.raises(train.UserError, match="is a quotation mark not closed"):
        train.read_captions(tmp_path, files)
    (tmp_path / "metadata.csv").write_text('file_name,text,by\na.mp4,"a dog, a cat",me\nc.mp4,c,\n')
    (tmp_path / "b.txt").write_bytes("un café".encode("latin-1"))
    assert train.read_captions(tmp_path, files) == ["a dog, a cat", "un caf\ufffd"]
    err = capfd.readouterr().err
    assert "no such video here, not used: c.mp4" in err
    assert "captions that are not in UTF-8: b.mp4" in err


def test_crops_of_a_window_go_to_one_worker(tmp_path, monkeypatch):
    """And what is encoded at once is as small as before."""
    clips = train.VideoFolder(config(make_folder(tmp_path / "v")))
    shape, seen = train.whole_clip(clips.cfg), []
    read, decoded = train.batches, []

    def parts_of(clips, split, parts):
        decoded.extend(parts)
        return read(clips, split, parts)

    class Encoder:
        def encode(self, x, **how):
            seen.append(x)

    monkeypatch.setattr(train, "batches", parts_of)
    run_ = train.Run(tmp_path / "run", clips.cfg, torch.device("cpu"))
    rows = list(range(2 * train.CROPS))
    for large, sizes in ((1, [1] * 8), (3 * 16 * 32 * 32, [3, 1] * 2), (2**23, [8])):
        monkeypatch.setattr(train, "LARGE", large)
        seen.clear(), decoded.clear()
        told = [c for _, cs, _ in train.encoded(run_, Encoder(), clips, "train", rows, shape)
                for c in cs]
        assert [len(x) for x in seen] == sizes
        assert all({i // train.CROPS for i, *_ in part} != {0, 1} or large == 2**23
                   for part in decoded) and sum(map(len, decoded)) == 8
        want = [clips.clip("train", i) for i in rows]
        assert torch.equal(torch.cat(seen), torch.stack([x for x, _ in want]))
        assert told == [text for _, text in want]


def test_videos_of_subfolders_and_a_folder_that_moved(tmp_path, finished, capfd):
    old, new = make_folder(tmp_path / "über all", videos=2), tmp_path / "moved"
    deep = old / "sub dir" / "deep"
    deep.mkdir(parents=True)
    (old / "v1.mp4").rename(deep / "v1.mp4")
    (old / "v1.txt").unlink()
    (old / "metadata.csv").write_text("file_name,text\nsub dir/deep/v1.mp4,deeper\n")
    clips = train.VideoFolder(config(old))
    assert [row[:2] for row in clips.table()] == [("sub dir/deep/v1.mp4", "deeper"),
                                                  ("v0.mp4", "grey number 0")]
    assert "not used" not in capfd.readouterr().err
    want = clips.clip("train", 0)[0]
    train.write_json(tmp_path / "videos.json", clips.table())
    old.rename(new)
    again = train.VideoFolder(config(new), table=tmp_path / "videos.json")
    assert again.table() == clips.table() and torch.equal(again.clip("train", 0)[0], want)
    # and the run goes on with it; one of the toy world is no run of videos
    for data in (old, new, f"{new}/"):
        train.open_run(parsed("--data", str(data)), tmp_path / "run", torch.device("cpu"))
    with pytest.raises(train.UserError, match="another configuration .*data:"):
        train.open_run(parsed("--data", str(new)), finished, torch.device("cpu"))


def test_workers_leave_no_open_files(tmp_path):
    clips = train.VideoFolder(config(make_folder(tmp_path / "v", videos=1)))
    clips.cfg.clips.workers = 1

    def fewest(seconds=5):                      # a thread may be about to close its end of a pipe
        gc.collect()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and (n := len(os.listdir("/proc/self/fd"))) > before:
            time.sleep(0.1)
        return n

    before = 0
    list(train.batches(clips, "train", [[0]]))          # opens what stays open, such as a semaphore
    before = fewest(0.5)
    for _ in range(4):
        list(train.batches(clips, "train", [[0]]))
    assert fewest() <= before                           # a worker that is kept has two


@pytest.mark.parametrize("error,line", [
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "--clips.workers"),
    (ConnectionResetError(104, "Connection reset by peer"), "--clips.workers"),
    (RuntimeError("another"), "another")])
def test_a_worker_that_is_killed_is_one_line(error, line, monkeypatch):
    class Loader:
        def __init__(self, *args, **kwargs):
            pass

        def __iter__(self):
            yield torch.zeros(1), ["a"]
            raise error

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    reader = train.batches(train.ToyClips(parsed()), "train", [[0], [1]])
    next(reader)
    with pytest.raises(train.UserError if "workers" in line else RuntimeError, match=line):
        next(reader)


def test_video_metadata_that_is_not_utf8_is_read(tmp_path):
    folder = make_folder(tmp_path / "v", videos=1)
    import av

    path = folder / "tagged.mp4"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "XXXXcafeXXXX"
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(torch.zeros(32, 32, 3).byte().numpy())
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    data = path.read_bytes()
    assert b"XXXXcafeXXXX" in data
    path.write_bytes(data.replace(b"XXXXcafeXXXX", b"XXXXcaf\xe9XXXX"))
    with pytest.raises(UnicodeDecodeError):             # what happens without metadata_errors
        av.open(str(path)).metadata  # noqa: B018
    assert train.probe(path) == (20, 10.0, 1.0)


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no {CLIPS}: real clips are not in here")
def test_real_clips():
    clips = train.VideoFolder(config(CLIPS))
    assert len(clips.videos) == 8
    for i in range(0, 8 * train.CROPS, train.CROPS):
        x, text = clips.clip("train", i)
        assert x.shape == (3, 16, 32, 32) and x.std() > 0.05 and len(text) > 20
        assert not torch.equal(x, clips.clip("train", i + 1)[0])       # another crop


@pytest.mark.slow
def test_videos_are_not_kept_in_memory(tmp_path):
    """Peak memory of reading windows from 4 long videos at 960 x 540 and from 24 of them."""
    import av

    def folder(n):
        path = tmp_path / f"n{n}"
        path.mkdir()
        with av.open(str(path / "v0.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 960, 540, "yuv420p"
            for k in range(300):
                image = torch.full((540, 960, 3), k % 255, dtype=torch.uint8).numpy()
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            out.mux(stream.encode())
        for v in range(n):
            if v:
                shutil.copy(path / "v0.mp4", path / f"v{v}.mp4")
            (path / f"v{v}.txt").write_text("grey")
        return path

    code = ("import re, train\n"
            "clips = train.VideoFolder(train.parse_args(['--data', '{}', '--workdir', 'x'])[0])\n"
            "for i in range(0, 96, 4): clips.clip('train', i)\n"
            # the largest memory so far; getrusage's would begin with that of this process
            "print(re.search('VmHWM:(.*) kB', open('/proc/self/status').read())[1])")
    measure = lambda n: subprocess.run(
        [sys.executable, "-c", code.replace("{}", str(folder(n)))], cwd=ROOT, check=True,
        capture_output=True, text=True).stdout
    peaks = [int(measure(n)) for n in (4, 24)]
    assert peaks[1] < 1.1 * peaks[0], peaks


@pytest.mark.parametrize("flags, ranks, layout", [
    ("", 1, (0, 1, 1)), ("", 4, (0, 1, 4)), ("--scale small", 2, (0, 1, 2)),
    ("--sp 2", 4, (0, 2, 2)), ("--dp 2", 2, (2, 1, 1)), ("--dp 2 --replicate 2", 4, (2, 1, 2)),
    ("--replicate 1", 2, (0, 1, 1)), ("--scale 1b", 8, (0, 1, 1)),
    ("--scale small --plan --gpus 3", 1, (0, 1, 3)), ("--scale 30b --plan", 1, (0, 1, 1))])
def test_small_models_are_copied_and_large_ones_sharded(monkeypatch, flags, ranks, layout):
    """(--dp, --sp, --replicate) as asked, or by the scale; dp 0: what is left."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = train.parse_args(["--workdir", "x", *flags.split()])[1]
    assert (args.dp, args.sp, args.replicate) == layout


# ---- several ranks, and real kills ---------------------------------------------------------------


STANDALONE = ("--standalone", "--local-addr", "127.0.0.1")      # a free port, no name to look up


def torchrun(folder, ranks, *extra, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE, "--nproc_per_node",
               str(ranks), "train.py", "--workdir", str(folder), "--device", "cpu", *TINY, *extra]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def dit_anew(finished, folder, **changes):
    """A copy of the run before its dit stage, with other fields of train_dit; and their flags."""
    shutil.copytree(finished, folder)
    forget(folder, "dit", "samples", "report.json")
    config = json.loads((folder / "config.json").read_text())
    changes = {"align": 0.0, **changes}         # CLIP's loss sees the clips of one rank only
    config["train_dit"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return [word for k, v in changes.items()
            for word in (f"--{k}" if k in ("steps", "batch") else f"--train_dit.{k}", str(v))]


def dit_losses(folder):
    return torch.tensor([r["loss"] for r in train.read_metrics(folder / "metrics.csv")
                         if r["stage"] == "dit"], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("precision, rtol", [("fp64", 1e-9), ("fp32", 1e-4)])
def test_any_number_of_ranks_trains_the_same_dit(finished, tmp_path, precision, rtol):
    """Twenty steps of one rank, and of every axis of the mesh, step for step."""
    losses, weights = {}, {}
    for flags in ("", "--dp 2", "--dp 3", "--sp 2", "--dp 4", "--replicate 2", "--replicate 4",
                  "--replicate 2 --dp 2", "--dp 2 --sp 2", "--dp 4 --reshard false"):
        folder = tmp_path / f"run{flags}".replace(" ", "")
        accumulate = 2 if flags == "--replicate 2" else 1       # DDP waits with its messages
        changes = dit_anew(finished, folder, steps=20, every=14, precision=precision, batch=12,
                           accumulate=accumulate)           # 12 is shared out by three as well
        ranks = math.prod(int(n) for n in flags.split() if n.isdigit())
        done = torchrun(folder, ranks, "--stage", "dit", *flags.split(), *changes)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[flags] = dit_losses(folder)
        weights[flags] = train.load_tensors(folder / "dit" / "model.safetensors")
    plain = losses.pop("")
    assert len(plain) == 20 and plain[-1] < plain[0]
    for flags, other in losses.items():
        assert torch.allclose(plain, other, rtol=rtol, atol=0), (flags, (plain - other).abs().max())
        for k, w in weights[""].items() if precision == "fp64" else ():
            assert torch.allclose(w, weights[flags][k], atol=1e-6), (flags, k)


@pytest.mark.slow
def test_two_ranks_train_the_same_dit_in_bf16(finished, tmp_path):
    """In bf16, as near as 8 bits of mantissa allow."""
    losses = {}
    for precision, ranks in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
        folder = tmp_path / f"{precision}{ranks}"
        changes = dit_anew(finished, folder, steps=20, precision=precision)
        done = torchrun(folder, ranks, "--stage", "dit", *changes)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[precision, ranks] = dit_losses(folder)
    plain = losses["fp32", 1]
    assert len(plain) == 20
    assert torch.allclose(losses["bf16", 1], losses["bf16", 2], rtol=5e-3)
    assert 0 < (plain - losses["bf16", 1]).abs().max() < 0.02     # and it is another precision


@pytest.mark.slow
def test_a_checkpoint_is_taken_up_by_another_number_of_ranks(finished, tmp_path):
    """2 ranks, then 1, then 4, each for some of the steps: the curve of one rank alone."""
    flags = dit_anew(finished, tmp_path / "whole", steps=18, every=12, precision="fp64")
    assert torchrun(tmp_path / "whole", 1, "--stage", "dit", *flags).returncode == 0
    folder = tmp_path / "parts"
    dit_anew(finished, folder, steps=18, every=12, precision="fp64")
    for ranks, too_new in ((2, "step_0000012"), (1, None), (4, None)):
        done = torchrun(folder, ranks, "--stage", "dit", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        forget(folder / "dit", "model.safetensors", *([too_new] if too_new else []))
    rows = [e for e in train.read_events(folder / "events.jsonl")
            if e["stage"] == "dit" and e["event"] == "start"]
    assert [e["step"] for e in rows][-3:] == [0, 6, 12]
    assert torch.allclose(dit_losses(tmp_path / "whole"), dit_losses(folder), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_two_ranks_run_all_stages(tmp_path):
    done = torchrun(tmp_path / "all", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "all" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant,streams", [("3d", 1), ("vidtwin", 2)])
def test_the_other_autoencoders_run_all_stages(tmp_path, variant, streams):
    folder = tmp_path / variant
    assert run(folder, "--tae", variant, "--train_tae.motion", "4", "--loss.opl", "0.5") == 0
    loaded = train.load_run(folder)
    assert len(loaded.cfg.dit.streams) == streams
    assert (folder / "tae" / "image.safetensors").exists() == (variant == "3d")
    clips = loaded.generate(["a red circle moving left"])
    assert clips.shape == (1, 3, 16, 32, 32) and clips.std() > 0
    latents = train.load_latents(train.Run(folder, loaded.cfg, torch.device("cpu")))
    everything = torch.arange(len(latents.of))
    z = tae.Posterior(latents.mean, latents.rows("logvar", everything)).sample(
        torch.Generator().manual_seed(0))
    for part in loaded.tae.split(loaded.tae.normalize(z)):      # each stream, each channel
        assert (part.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


@pytest.mark.slow
def test_two_ranks_train_an_autoencoder_with_an_adversary(tmp_path):
    """Sharded, with a discriminator that starts late: the loss curve of one rank."""
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        done = torchrun(folder, ranks, "--stage", "tae", "--loss.gan", "0.1",
                        "--loss.gan_start", "3", "--loss.kl", "0", "--loss.opl", "0.1")
        assert done.returncode == 0, done.stderr[-3000:]
        rows = train.read_metrics(folder / "metrics.csv")
        losses[ranks] = torch.tensor([r["loss"] for r in rows])
    # each rank draws its own posterior noise and weighs its own adversary, so: close, not equal
    assert len(losses[1]) == 10 and torch.allclose(losses[1], losses[2], rtol=0.05)


@pytest.mark.slow
def test_wrong_flag_under_torchrun_is_one_line(tmp_path):
    done = torchrun(tmp_path / "bad", 1, "--coupling", "ot")
    assert done.returncode != 0
    assert "train.py: --coupling ot: not one of" in done.stderr


@pytest.mark.slow
def test_sigkill_in_each_stage(finished, tmp_path):
    """Killed once in each stage and started again: the same figures, the same loss curve."""
    folder = tmp_path / "killed"
    signs = ["tae/image", "tae/step_*", "latents/shard_00000.safetensors", "dit/step_*",
             "samples"]
    command = [sys.executable, "train.py", "--workdir", str(folder), "--device", "cpu", *TINY]
    for sign in signs:
        p = subprocess.Popen(command, cwd=ROOT, stderr=-3, stdout=-3,      # to nowhere
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        while p.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.01)
        p.kill()
        p.wait()
    assert not (folder / "report.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert figures(folder) == figures(finished)
    assert (train.read_metrics(folder / "metrics.csv")
            == train.read_metrics(finished / "metrics.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_writes_a_checkpoint_and_ends_well(finished, tmp_path, name):
    """Asked to end in each stage: status 0, and the finished run is the uninterrupted one."""
    folder = tmp_path / "stopped"
    command = [sys.executable, "train.py", "--workdir", str(folder), "--device", "cpu", *TINY]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sign in ("config.json", "tae/step_*", "latents/shard_00000.safetensors", "dit/step_*"):
        p = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)
        while p.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.01)
        began = time.monotonic()
        p.send_signal(getattr(signal, name))
        said = p.communicate(timeout=200)[1]
        assert p.returncode == 0 and time.monotonic() - began < 30, said
        assert "start again to continue" in said and "Traceback" not in said, said
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert figures(folder) == figures(finished)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks outlive their torchrun")
def test_torchrun_killed_takes_its_ranks_along(finished, tmp_path):
    """They hear SIGTERM, write a checkpoint and end."""
    folder = tmp_path / "orphans"
    flags = dit_anew(finished, folder, steps=4000)
    (folder / "events.jsonl").unlink()
    events = lambda: [e["event"] for e in train.read_events(folder / "events.jsonl")]
    p = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *STANDALONE, "--nproc_per_node", "2",
         "train.py", "--workdir", str(folder), "--device", "cpu", *TINY, *flags],
        cwd=ROOT, stderr=-3, stdout=-3, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while p.poll() is None and "checkpoint" not in events():
        time.sleep(0.05)
    p.kill()
    p.wait()
    until = time.monotonic() + 60
    while events()[-1:] != ["stopped"] and time.monotonic() < until:
        time.sleep(0.1)
    last = train.read_events(folder / "events.jsonl")[-1]
    assert last["event"] == "stopped", events()
    assert (folder / "dit" / f"step_{last['step']:07d}").exists()


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1] + "/lock", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process", os.getpid(), file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_work_in_one_folder(copy, capfd):
    """The second waits for the end of the first, says for whom, and gives up in time."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
        with pytest.raises(train.UserError, match=f"another run works there .process {other.pid}"):
            train.open_run(parsed("--train_dit.every", "7"), copy, torch.device("cpu"), None, 0.1)
        assert "waiting 0.1 s for its end" in capfd.readouterr().err
        assert before == {p: p.stat().st_mtime_ns for p in before}
        threading.Timer(0.2, other.kill).start()
        assert train.alone(copy, 20)
    assert (copy / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


MEET = """
import os, train                         # seconds on a busy machine, before any time-out counts
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
store.set(os.environ["RANK"], "here")
store.wait(["0", "1"])
"""


@contextlib.contextmanager
def two_ranks(code, *flags, **pipes):
    """Two processes that find each other, without torchrun. Killed in the end. The store is kept
    here, as torchrun's is: the port is never free in between."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [subprocess.Popen(
        [sys.executable, "-c", MEET + code, *flags], cwd=ROOT, text=True, **pipes,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r),
             "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
             "TORCHELASTIC_USE_AGENT_STORE": "True"})
        for r in range(2)]
    try:
        yield ranks
    finally:
        for p in ranks:
            p.kill()
            p.wait()


@pytest.mark.slow
def test_nodes_that_do_not_share_the_folder_are_refused(tmp_path):
    for r in "01":
        (tmp_path / r).mkdir()
    code = ("import os, sys; os.chdir(os.path.join(sys.argv[1], os.environ['RANK']))\n"
            "sys.exit(train.main(sys.argv[2:]))")
    with two_ranks(code, str(tmp_path), *TINY, "--device", "cpu", "--workdir", "here",
                   stderr=subprocess.PIPE) as ranks:
        said = [p.communicate(timeout=400)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [2, 2], said
    assert sum(s.count("--workdir here: rank 1 does not see the files") for s in said) == 1
    assert not any(p.name != "lock" for p in tmp_path.glob("*/here/*"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(finished, tmp_path):
    """SIGSTOP of one of two ranks in the dit stage: the other says which, within --timeout."""
    folder = Path(shutil.copytree(finished, tmp_path / "hung"))
    forget(folder, "dit", "samples", "report.json")
    config = json.loads((folder / "config.json").read_text())
    config["train_dit"]["steps"] = 4000
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--workdir", str(folder), "--device", "cpu", *TINY, "--steps", "4000"]
    with two_ranks("import sys; sys.exit(train.main(sys.argv[1:]))", *flags, "--timeout", "5",
                   stderr=subprocess.PIPE) as ranks:
        while not list(folder.glob("dit/step_*")) and all(p.poll() is None for p in ranks):
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        said = ranks[0].communicate(timeout=400)[1]
    assert ranks[0].returncode == 1 and "train.py: rank 1: hangs, or is gone" in said, said[-2000:]
    assert "Traceback" not in said


NAMED = """
import datetime, os, pathlib, sys, time, torch, torch.distributed as dist, train
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
run = train.Run(pathlib.Path(sys.argv[1]), train.Config(), torch.device("cpu"), train.make_mesh(2))
write = train.WholeWriter.write_data
train.WholeWriter.write_data = lambda *args: (time.sleep(0.1 * dist.get_rank()), write(*args))[1]
model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(8)])
train.fully_shard(model, mesh=run.mesh.weights)

def losses(first):
    for step in range(first, 40):
        part = lambda model: model(torch.ones(1, 300)).mean() * (1 if step % 2 else torch.nan)
        part.keys = [step, dist.get_rank()]
        yield [part]

train.optimize(run, "dit", run.folder / "dit", model, train.TrainConfig(every=3), 40, losses)
os._exit(0)
"""


@pytest.mark.slow
def test_a_skipped_step_is_named_while_a_checkpoint_is_written(tmp_path):
    """The thread that writes and the step that asks for the keys have a group of ranks each."""
    with two_ranks(NAMED, str(tmp_path), stderr=subprocess.PIPE) as ranks:
        said = ranks[0].communicate(timeout=400)[1]
    assert ranks[0].returncode == 0 and said.count("skipped") == 20, said[-2000:]
    assert "dit step 38: skipped, loss nan, gradient norm nan, clips 38 0 1" in said


PATIENT = """
import sys, time, train
generate, judge = train.Loaded.generate, train.check_judge
def late(f):
    def g(*args):
        time.sleep(12)                  # more than twice the time-out
        return f(*args)
    return g
train.Loaded.generate = late(generate)
train.check_judge = late(lambda cfg: {"color": 1.0})
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_without_work_wait_for_the_judge_and_for_samples(tmp_path):
    flags = [*TINY, "--coupling", "independent", "--device", "cpu", "--timeout", "5",
             "--sample.batch", "64", "--workdir", str(tmp_path / "run")]
    with two_ranks(PATIENT, *flags, stderr=subprocess.PIPE) as ranks:
        said = ranks[0].communicate(timeout=400)[1]
    assert ranks[0].returncode == 0 and (tmp_path / "run/report.json").exists(), said[-2000:]


WAIT = """
import datetime, os, sys, time, torch.distributed as dist, sample_parallel, train
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
part = lambda: None
part.keys = [dist.get_rank() + 4, 9]
print(train.keys_of([part]), flush=True)
if dist.get_rank() == 1:
    for _ in range(12):                 # twice the time-out
        time.sleep(0.5)
        train.pulse()
train.wait_for_all("work")
print("waited", flush=True)
if dist.get_rank() == 1:
    time.sleep(60)
began = time.monotonic()
try:
    train.wait_for_all("hang")
except RuntimeError as error:
    print(sample_parallel.is_loss(error), train.silent_ranks(1), time.monotonic() - began < 7)
os._exit(0)
"""


@pytest.mark.slow
def test_who_works_is_waited_for_and_who_hangs_is_named():
    with two_ranks(WAIT, stdout=subprocess.PIPE) as ranks:
        said = ranks[0].communicate(timeout=400)[0]
    assert said.splitlines() == [", clips 4 9 5", "waited", "True [1] True"]


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(finished, tmp_path):
    """The README's command: SIGKILL of one of two ranks, and the run ends by itself, with the
    losses of one that nobody touched."""
    losses = {}
    for killed in (False, True):
        folder = Path(shutil.copytree(finished, tmp_path / str(killed)))
        forget(folder, "dit", "samples", "report.json")
        config = json.loads((folder / "config.json").read_text())
        config["train_dit"]["steps"] = 60
        (folder / "config.json").write_text(json.dumps(config))
        p = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *STANDALONE, "--nproc_per_node", "2",
             "--max-restarts", "3", "train.py", "--workdir", str(folder), "--device", "cpu",
             *TINY, "--steps", "60", "--stage", "dit"], cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        while killed and not list(folder.glob("dit/step_*")) and p.poll() is None:
            time.sleep(0.02)
        if killed:
            ranks = Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
            os.kill(int(ranks[-1]), 9)
        said = p.communicate(timeout=300)[1]
        assert p.returncode == 0, said[-3000:]
        losses[killed] = [r["loss"] for r in train.read_metrics(folder / "metrics.csv")
                          if r["stage"] == "dit"]
    starts = [e for e in train.read_events(folder / "events.jsonl")
              if e["event"] == "start" and e["stage"] == "dit"]
    assert starts[-1]["step"] > 0, "it was not killed in the middle"
    assert losses[True] == losses[False] and len(losses[True]) == 60
