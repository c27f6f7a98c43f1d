"""studies/: every script says what it asks and answers; their measures against closed forms."""
import ast
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "studies"
SCRIPTS = sorted(p.stem for p in STUDIES.glob("*.py") if p.stem != "common")
sys.path.insert(0, str(STUDIES))


def head(name):
    return ast.get_docstring(ast.parse((STUDIES / f"{name}.py").read_text(encoding="utf-8")))


# ---- every script ----

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_its_question_command_time_and_answer(name):
    text = head(name)
    assert re.match(r"Question: .*?\?", text, re.S)
    assert re.search(rf"^Run: .*python studies/{name}\.py", text, re.M)
    assert re.search(r"^Time: .*\d+ (minutes|seconds)", text, re.M)
    assert re.search(r"^Answer: \w", text, re.M)


def test_the_page_names_every_script():
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.py" for name in SCRIPTS} == set(re.findall(r"\((\w+\.py)\)", page))


def test_which_study_imports_which():
    for path in STUDIES.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        allowed = {"reenact": {"autoencoders"}, "end_to_end": {"couplings"},    # it goes on from
                   "unseen_motion": {"couplings", "physics"}, "physics": {"healthy_run"},
                   "judge_rater": {"versus"}}
        assert not names & set(SCRIPTS) - allowed.get(path.stem, set()), path.name


def test_help_and_an_unknown_flag(tmp_path, monkeypatch, capsys):
    """wan.py needs diffusers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(STUDIES)
    for name in sorted(set(SCRIPTS) - {"wan"}):
        for flag, status in (("--help", 0), ("--no-such-flag", 2)):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", flag])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
            said = capsys.readouterr()
            assert (end.value.code or 0) == status, name
            assert (not said.out) if status else ("Question:" in said.out), name
    assert not list(tmp_path.iterdir())


def test_a_study_finds_the_files_above_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(STUDIES), *(p for p in sys.path
                                                      if Path(p).resolve() != ROOT)])
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import common  # noqa: F401
    assert str(ROOT) in sys.path


# ---- measures ----

def test_ssim_against_its_definition():
    """A window at a time, in float64; and closed forms."""
    from autoencoders import ssim
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 1, 13, 14, dtype=torch.float64) * 2 - 1
    k = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    w = torch.outer(k, k) / k.sum() ** 2
    values = []
    for c in range(3):
        for i in range(3):
            for j in range(4):
                a, b = (v[0, c, 0, i:i + 11, j:j + 11] / 2 + 0.5 for v in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
                              / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-6)
    assert ssim(x, x).item() == pytest.approx(1)
    flat = torch.zeros(1, 3, 2, 16, 16)                         # grey 0.5 against grey 0.75
    assert ssim(flat, flat + 0.5).item() == pytest.approx(
        (2 * 0.5 * 0.75 + 1e-4) / (0.25 + 0.5625 + 1e-4), abs=1e-4)


def test_temporal_error_against_a_closed_form():
    from autoencoders import temporal_error
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 8, 1, 1).expand(1, 3, 8, 16, 16)
    assert temporal_error(ramp, torch.zeros_like(ramp)).item() == pytest.approx(1 / 7, rel=1e-5)
    assert temporal_error(ramp, ramp + 0.0) == 0


def test_energy_distance_in_closed_form():
    from couplings import energy_distance
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=g), torch.randn(4000, 1, generator=g)
    assert abs(energy_distance(a, b)) < 0.01
    # N(0, 1) and N(m, 1): E|x - y| is that of |N(m, 2)|
    m, root = 1.0, math.sqrt(2)
    away = root * math.sqrt(2 / math.pi) * math.exp(-m**2 / 4) + m * math.erf(m / 2)
    within = 2 / math.sqrt(math.pi)
    assert energy_distance(a, b + m) == pytest.approx(2 * away - 2 * within, abs=0.03)


def test_energy_distance_without_pairs_that_belong_together():
    """32 samples near their own partners: counted, the pairs look like less than no distance."""
    from couplings import energy_distance
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(200):
        a = torch.randn(32, 50, generator=g)
        b = a + 0.1 * torch.randn(32, 50, generator=g)
        values.append([energy_distance(a, b, paired) for paired in (False, True)])
    counted, left_out = torch.tensor(values).mean(0).tolist()
    assert counted < -0.4 and abs(left_out) < 0.02


def test_a_projected_coupling_pairs_within_the_principal_directions(tmp_path, monkeypatch):
    import couplings
    monkeypatch.setattr(couplings, "DIRECTIONS", 3)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 2, 8, generator=g) * torch.tensor([9.0, 6, 4, .1, .1, .1, .1, .1])
    z[:, 1] *= 0.01                                     # three numbers vary, thirteen hardly
    coupling = couplings.Projected.fit(z, target=0.3)
    x0 = torch.randn(500, 2, 8, generator=g)
    found = coupling.couple(x0)
    scores = x0[:, 0, :3] @ z[:, 0, :3].T + coupling.h  # about the same, by hand
    assert (scores.argmax(1) == found).float().mean() > 0.8
    coupling.save(tmp_path / "coupling.pt")
    assert torch.equal(couplings.Projected.load(tmp_path / "coupling.pt", z).couple(x0), found)


def test_structure_and_dynamics_of_two_clips_are_decoded_together():
    import reenact

    import tae
    torch.manual_seed(0)
    model = tae.VidTwin(tae.VIDTWIN_PRESETS["toy"]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None
    a, b = torch.rand(2, 1, 3, 16, 32, 32) * 2 - 1
    name = "structure of A, dynamics of B"
    same, other = reenact.decodings(model, a, a), reenact.decodings(model, a, b)
    assert torch.allclose(same[name], same["A"], atol=1e-5)
    n = math.prod(model.shapes[0])
    with torch.no_grad():
        za, zb = model.encode(a).mean, model.encode(b).mean
        want = model.decode(torch.cat([za[:, :n], zb[:, n:]], 1))
    assert torch.allclose(other[name], want, atol=1e-5)
    assert all((want - other[x]).abs().max() > 1e-4 for x in "AB")


def test_the_conditionings_are_compared_at_equal_size():
    import conditionings

    from dit import CONDITIONINGS, PRESETS, DiT, DiTConfig, Stream
    size = lambda cfg: sum(w.numel() for w in DiT(cfg).parameters())
    base = PRESETS["toy"]
    for conditioning in CONDITIONINGS:
        cfg = conditionings.matched(base, conditioning)
        assert cfg.conditioning == conditioning
        assert size(cfg) == pytest.approx(size(base), rel=0.005)
    small = DiTConfig((Stream(4, (1, 2, 2), (4, 8, 8)),), dim=48, depth=3, heads=4)
    seconds = conditionings.seconds_per_step(small, B=2, L=5, rounds=2)
    assert set(seconds) == set(CONDITIONINGS) and min(seconds.values()) > 0


def test_mean_and_spread():
    import common
    rows = [{"a": 1.0, "b": 5}, {"a": 3.0, "b": 5}]
    (mean, spread), constant = common.mean_and_spread(rows, ("a", "b"))
    assert (mean, spread) == pytest.approx((2, math.sqrt(2))) and constant == (5, 0)
    assert common.mean_and_spread(rows[:1], ("a",)) == [(1, 0)]


# ---- the speed-run ----

STUB = '''import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
assert not folder.exists(), "not fresh"
folder.mkdir()
sys.exit(7) if pathlib.Path("broken").exists() else None
(folder / "report.json").write_text(json.dumps({
    "tae_psnr_db": 28.0, "dit_val_loss": 0.4, "seconds": {"tae": 3.0, "total": 3.0},
    "judge": dict.fromkeys(("color", "shape", "direction", "speed", "text"), 1.0),
    "prompt_accuracy": dict.fromkeys(("color", "direction", "speed", "text", "shape", "words"), 1.0)
    | {"heldout": 0.94 + 0.02 * int(sys.argv[sys.argv.index("--seed") + 1])}}))
'''


def test_a_record_is_of_fresh_runs_and_its_means_decide(tmp_path, monkeypatch, capsys):
    import common
    import record
    (tmp_path / "train.py").write_text(STUB)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(record, "git", lambda *words: "abc1234")
    out = tmp_path / "out"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["record.py", "--out", str(out), "--ranks", "1", *words])
        record.main()
        return capsys.readouterr().out

    (out / "abc1234-0").mkdir(parents=True)                         # left by a run that was stopped
    said = run("--seeds", "0")
    assert "no record: heldout 0.940, asked 0.95" in said
    assert "abc1234-0: running" in said and "| abc1234 |  | " in said
    said = run("--seeds", "0", "1")                                 # the mean of 0.94 and 0.96
    assert said.endswith("a record\n") and "no record" not in said
    assert "abc1234-0: running" not in said and "0.95 +- 0.01" in said
    (tmp_path / "broken").touch()
    with pytest.raises(SystemExit, match="abc1234-2: failed; what it said is in"):
        run("--seeds", "2")


def test_a_record_against_another_commit_runs_that_commit(tmp_path):
    import record
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tree = record.tree_of("HEAD", tmp_path)
    assert (tree / "train.py").exists() and (tree / "studies/common.py").exists()
    assert tree.name == "tree-" + record.git("rev-parse", "--short=7", "HEAD")
    with pytest.raises(SystemExit, match="git rev-parse"):
        record.tree_of("no-such-commit", tmp_path)


# ---- a whole study, tiny ----

TINY = """--train_tae.steps 4 --train_tae.batch 2 --train_tae.image_steps 2
  --train_tae.image_batch 8 --clips.count 64 --steps 2 --batch 8 --dit.dim 48 --dit.depth 1
  --dit.heads 4 --text.width 32 --sample.prompts 5 --sample.steps 2""".split()


def test_a_study_needs_a_run_of_the_toy_world(tmp_path, capsys):
    import common
    for said in ("no run there; first: python train.py", "needs the judge"):
        with pytest.raises(SystemExit) as end:
            common.compare(tmp_path, tmp_path / "out", {})
        assert end.value.code == 2 and said in capsys.readouterr().err
        (tmp_path / "config.json").write_text(json.dumps({"data": "videos"}))


def test_a_run_with_other_flags_is_not_taken_for_the_one_that_is_there(tmp_path, capsys):
    import common
    ends_at_once = tmp_path / "program.py"
    ends_at_once.write_text("import sys; open(sys.argv[2] + '/done', 'w')")
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(2):
        common.train(run, {"a": 1}, "done", ends_at_once)
    with pytest.raises(SystemExit) as end:
        common.train(run, {"a": 2}, "done", ends_at_once)
    assert end.value.code == 2
    assert "made with other flags, --a 1; choose another --out" in capsys.readouterr().err
    (run / "done").unlink()
    run.rmdir()                                         # what is gone was not made with other flags
    with pytest.raises(SystemExit, match="run: .*No such file"):
        common.train(run, {"a": 2}, "done", ends_at_once)


@pytest.mark.slow
def test_a_study_is_runs_that_can_be_continued(tmp_path, capfd):
    import common
    base, out = tmp_path / "base", tmp_path / "out"
    subprocess.run([sys.executable, ROOT / "train.py", "--workdir", base, "--device", "cpu", *TINY],
                   check=True, capture_output=True)
    variants = {"plain": {}, "normed": {"dit.qk_norm": "true"}}
    again = lambda: common.compare(base, out, variants, seeds=2, workers=1)
    rows = again()
    assert [(r["variant"], r["seed"]) for r in rows] == [("plain", 0), ("normed", 0), ("plain", 1),
                                                         ("normed", 1)]
    assert rows == json.loads((out / "study.json").read_text())
    assert capfd.readouterr().out.count(" +- ") == 2 * len(common.FIGURES)
    assert (out / "study.png").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("report.json")}
    shutil.rmtree(out / "runs" / "normed-1")
    assert again() == rows                                          # one made again, alike
    after = {p: p.stat().st_mtime_ns for p in out.rglob("report.json")}
    assert sum(after[p] != t for p, t in before.items()) == 1
    with pytest.raises(SystemExit, match="dit.depth 0: must be 1 or more"):     # train.py's line
        common.compare(base, out, {"wrong": {"dit.depth": 0}}, seeds=1)


@pytest.mark.slow
def test_the_marks_of_a_run_are_the_averages_in_its_checkpoints(tmp_path):
    import healthy_run
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    import train
    run, out = tmp_path / "run", tmp_path / "out"
    subprocess.run([sys.executable, ROOT / "train.py", "--workdir", run, "--device", "cpu", *TINY,
                    "--steps", "20", "--train_dit.every", "10"], check=True, capture_output=True)
    files = healthy_run.watch(run, out)                 # of a run that has ended: what it left
    assert set(files) == {50, 100} and files[100] == run / "model.safetensors"
    at, end = (train.load_tensors(files[percent]) for percent in (50, 100))
    dcp_to_torch_save(run / "dit/step_0000010", tmp_path / "whole.pt")
    there = torch.load(tmp_path / "whole.pt", weights_only=False)["average"]
    assert there and at.keys() == end.keys()
    assert all(torch.equal(at[k], v) for k, v in there.items())
    assert any(not torch.equal(at[k], end[k]) for k in there)
    assert train.load_run(files[50]).cfg == train.read_config(run)
    loaded = train.load_run(run)
    clips = train.ToyClips(loaded.cfg)
    real, captions = zip(*(clips.clip("heldout", i, (16, 32, 32)) for i in range(64)))
    z = loaded.tae.normalize(loaded.tae.encode(torch.stack(real)).mean)
    measured = train.validation_loss(loaded, z, list(captions))
    told = json.loads((run / "report.json").read_text())["dit_val_loss"]
    assert measured == pytest.approx(told, abs=2e-4)


def test_the_lead_of_an_arm_is_a_paired_t_interval():
    from end_to_end import lead
    a, b = [1.0, 2.0, 3.0], [0.9, 1.8, 2.7]
    assert lead(a, b, 1) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)), rel=1e-3)
    assert lead(a, b, -1)[0] == pytest.approx(-0.2) and lead([1.0], [2.0], 1) == (-1, math.inf)


def test_what_generation_says_of_the_order_by_reconstruction():
    from end_to_end import EQUAL, GENERATION, ROWS, answer
    level = {arm: [1.0, 1.1, 0.9] for arm in EQUAL}
    good = {"3d": [2.0, 2.1, 2.0]}
    found = dict.fromkeys(GENERATION, level) | {"psnr": level | good}
    found["shape"] = level | good
    found["one_step"] = found["coarse_more"] = level | {"3d": [0.0, 0.1, 0.0]}
    first, second, third = answer(found)
    assert re.match("3d reconstructs better than 2.5d .*; 3d is better in: shape, "
                    f"{ROWS['coarse_more'][0]}; 2.5d in: {ROWS['one_step'][0]}; undec", first)
    assert second.startswith("2.5d and vidtwin: reconstruction undecided; 2.5d is better in: none")
    assert third.startswith("3d reconstructs better than vidtwin")


def test_the_figures_of_an_end_to_end_study(tmp_path, capsys):
    import end_to_end
    rows = [{"arm": arm, "seed": seed, **dict.fromkeys(end_to_end.ROWS, i + seed / (7 + i)),
             "shape_real": 1.0} for i, arm in enumerate(end_to_end.ARMS) for seed in range(3)]
    end_to_end.tell(rows, tmp_path / "study.png")
    said = capsys.readouterr().out
    assert (tmp_path / "study.png").exists()
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[: len(end_to_end.ROWS) + 2]} == {7}
    assert {line.count("|") for line in tables[len(end_to_end.ROWS) + 2 :]} == {5}
    assert said.count("reconstructs better than") == 3 and "**-1." in said


def test_the_figures_of_a_study_of_unseen_motion(tmp_path, capsys):
    import unseen_motion as study
    keys = ["psnr", "all_again", *study.JUDGED, *study.PHYSICS, *study.ENERGIES, "coarse_real",
            "fine_real", *(f"{key}_real" for key in (*study.JUDGED, *study.PHYSICS)),
            *(f"{key}_plain" for key in study.PHYSICS)]
    rows = [{"clips": clips, "trained": trained, "curriculum": on, "seed": seed,
             **dict.fromkeys(keys, 2.0 + (trained == "same") + 0.01 * seed)}
            for clips in study.SPEEDS for trained in study.TRAINED for on in (False, True)
            for seed in range(3)]
    study.tell(rows, tmp_path / "study.png")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(study.HEAD) + 1} and len(table) == 2 + 14
    assert all(" 1.00 +- 0.00 |" in line for line in table if "same less other" in line)
    assert (tmp_path / "study.png").exists()


@pytest.mark.parametrize("fast", [False, True])
def test_the_figures_of_a_study_of_physics(tmp_path, capsys, fast):
    import physics

    import train
    cfg = train.Config(clips=train.ClipConfig())
    real = physics.row_of(*physics.real_clips(cfg, 12, fast), fast)
    assert real["right"] == 1 and (math.isnan(real["moves"]) if fast else real["moves"] == 1)
    shown = ["loss", *physics.SHARES[fast and 1 :], *physics.ERRORS[: None if fast else -1]]
    row = lambda m: dict.fromkeys(shown, 1 / m) | {"moves": min(1.0, m / 20),
                                                   "right": min(1.0, m / 50)}
    rows = {m: [row(m), row(m)] for m in (10, 20, 50, 100)}
    for what in physics.SHARES[fast and 1 :]:
        physics.conclude(rows, shown, what)
    said = capsys.readouterr().out
    assert ("between 20 % and 100 % of the steps: moves 1.000 and 1.000, loss -80%" in said) != fast
    assert "between 50 % and 100 % of the steps: right 1.000 and 1.000, loss -50%" in said
    if fast:                    # all kinds of errors; "moves" is drawn as "right" is
        physics.draw({"toy": rows | {"real": [real], "reconstructed": [real]}}, shown,
                     tmp_path / "study.png")
        assert (tmp_path / "study.png").exists()


@pytest.mark.parametrize("scale", ["toy", "small"])
def test_a_wrong_word_is_all_that_is_wrong(scale):
    from types import SimpleNamespace

    import spelling

    import train
    import world
    cfg = train.SCALES[scale]()
    scenes, right, wrong = spelling.signs(cfg, 2, 4)
    for scene, a, b in zip(scenes, map(world.parse, right), map(world.parse, wrong)):
        assert world.parse(world.caption(scene)) == a
        words = [(x["text"], y["text"]) for x, y in zip(a, b) if x != y]
        assert len(words) == 1 and {len(w) for w in words[0]} == {2}
        assert [{**x, "text": ""} for x in a] == [{**x, "text": ""} for x in b]
    # Prompts as numbers; a model that predicts 0, and 1 everywhere if it is shown a wrong one.
    shape = (4, 2, 2, 2, 2)
    run = SimpleNamespace(
        cfg=cfg, noise=lambda seeds: torch.zeros(shape),
        tae=SimpleNamespace(encode=lambda x: SimpleNamespace(mean=torch.zeros(shape)),
                            normalize=lambda z: z),
        prompts=lambda texts: (torch.tensor([float(t in wrong) for t in texts]), None),
        dit=lambda x, t, P, mask: P.view(-1, 1, 1, 1, 1).expand(shape))
    assert spelling.cost_of_a_wrong_word(run, 2, 4) == ([0.0] * 6, [1.0] * 6)


# ---- physics, and the judge as a rater ----

def test_a_path_is_fitted_with_and_without_a_turn():
    from physics import fit
    t = torch.arange(16).double()
    end, turns = t[-1:], torch.cat([torch.arange(1, 14, 0.25).double(), t[-1:]])
    v, k, left = fit(3 - 0.5 * t, t, end)
    assert (v, k) == pytest.approx((-0.5, 15)) and left.abs().max() < 1e-12
    # What a line leaves of t^2 at T times has the mean square (T^2 - 1) (T^2 - 4) / 180.
    assert fit(0.1 * t**2, t, end)[2].square().mean().item() == pytest.approx(
        0.01 * 255 * 252 / 180)
    v, k, left = fit(20 - 2 * (t - 8.5).abs(), t, turns)
    assert (v, k) == pytest.approx((2, 8.5)) and left.abs().max() < 1e-12
    assert fit(20 + 2 * t, t, turns)[:2] == pytest.approx((2, 15))              # it need not turn


def squares(sizes, centres):
    """A clip of white squares on black; centres (T, 2) in whole pixels, sizes odd."""
    x = torch.full((3, len(sizes), 32, 32), -1.0)
    for frame, size, (cx, cy) in zip(x.unbind(1), sizes, centres):
        frame[:, cy - size // 2 : cy + size // 2 + 1, cx - size // 2 : cx + size // 2 + 1] = 1
    return x


def test_the_errors_of_clips_drawn_by_hand():
    from physics import errors
    steady = [(6 + t, 16) for t in range(16)]                                   # 1 pixel a frame
    line, area, speed, direction, _ = errors(squares([9] * 16, steady),
                                             "a white square moving right fast")
    assert max(line, area, speed, direction) < 1e-5
    _, _, speed, direction, _ = errors(squares([9] * 16, steady), "a white square moving up left")
    assert (speed, direction) == pytest.approx((0.5, 135), abs=1e-4)
    # Areas of 49 and 121 in turn: 36 from their mean of 85.
    assert errors(squares([7, 11] * 8, steady), "a white square moving right")[1] == pytest.approx(
        36 / 85, rel=1e-4)
    jump = [(4 + t + (t > 7), 16) for t in range(16)]
    left = torch.tensor([float(x) for x, _ in jump]).double()
    t = torch.stack([torch.ones(16), torch.arange(16.0)], 1).double()
    left = left - t @ torch.linalg.lstsq(t, left[:, None]).solution[:, 0]       # by torch's own
    assert errors(squares([9] * 16, jump), "a white square moving right")[0] == pytest.approx(
        left.square().mean().sqrt().item(), rel=1e-4)


def test_errors_where_an_object_is_not_seen():
    from physics import errors
    prompt = "a white square moving right fast"
    clip = squares([9] * 16, [(4 + t, 16) for t in range(16)])
    assert all(map(math.isnan, errors(torch.full((3, 16, 32, 32), -1.0), prompt)))
    clip[:, 9:] = -1                                            # seen in 9 of 16 frames: a line,
    line, area, speed, *_ = errors(clip, prompt)                # and an area that vanishes
    assert max(line, speed) < 1e-5 and area == pytest.approx(math.sqrt(7 / 9), rel=1e-4)
    clip[:, 7:] = -1
    assert all(map(math.isnan, errors(clip, prompt)))
    late = squares([9] * 16, [(4 + t, 16) for t in range(16)])
    late[:, :4] = -1                                            # it comes into sight, and may turn
    line, _, _, direction, bounce = errors(late, prompt, fast=True)
    assert line < 1e-5 and direction < 1e-4 and bounce == 1             # it does not


@pytest.mark.parametrize("things, size", [(1, 32), (2, 64)])
def test_real_clips_have_hardly_any_errors(things, size):
    """They are drawn in quarters of a pixel: an RMS of sqrt(2 / 12) / 4 = 0.10 pixels of 32."""
    import physics

    import train
    cfg = train.Config(clips=train.ClipConfig(things=things, size=size))
    for fast in (False, True):
        x, captions = physics.real_clips(cfg, 12, fast)
        assert x.shape == (12, 3, 16, size, size)
        e = torch.tensor([physics.errors(*pair, fast) for pair in zip(x, captions)])
        assert not e[:, 0].isnan().any()
        line, area, speed, direction, bounce = e.nanmedian(0).values.tolist()
        assert line < 0.15 and area < 0.02 and speed < 0.02 and direction < 1
        assert bounce < 0.05 if fast else math.isnan(bounce)


def test_a_bounce_that_does_not_come():
    from physics import errors
    prompt = "a white square moving right fast"                                 # 2 pixels a frame
    x = [min(6 + 2 * t, 26) for t in range(16)]                                 # it stops
    assert errors(squares([9] * 16, [(a, 16) for a in x]), prompt, True)[4] > 0.7
    x = [6 + 2 * t if t < 11 else 26 - (t - 10) for t in range(16)]             # at half the speed
    assert errors(squares([9] * 16, [(a, 16) for a in x]), prompt, True)[4] == pytest.approx(
        0.5, abs=0.1)


def test_where_an_accuracy_is_saturated():
    from physics import saturation
    assert saturation({5: 0.2, 10: 0.97, 20: 0.9, 40: 0.965, 100: 0.98}) == 40
    assert saturation({5: 0.97, 100: 0.98}) == 5 and saturation({5: 0.2, 100: 0.98}) == 100


def test_votes_of_the_judge():
    from judge_rater import vote, votes
    yes, no = {"color": True, "shape": True}, {"color": True, "shape": False}
    sign = {"color": False, "shape": True, "text": True}
    assert [vote(yes, no, axis) for axis in ("all", "color", "shape")] == [1, 0, 1]
    assert vote(no, yes, "all") == -1
    a, b, c = [yes, sign], [no, sign], [no, {**sign, "text": False}]
    assert votes([a, b], [c, c], "all").tolist() == [[1, 0], [1, 1]]
    assert votes([a], [c], "text").tolist() == [[1]]                            # signs alone
    arm = [a, b, c]                                                             # each with the next
    assert votes(arm, arm, "all").tolist() == [[1, 0, -1], [0, 1, -1]]
    two = [a, c]
    assert votes(two, two, "all").tolist() == [[1], [1]]


def test_variances_of_votes_by_hand_and_in_a_simulation():
    from judge_rater import mean_squares, variances
    y = torch.tensor([[1.0, 0], [0, -1]]).double()              # rows and columns alone
    assert mean_squares(y) == ((1, 1, 0), (1, 1, 1)) and variances(y) == (0.5, 0.5, 0)
    y = torch.tensor([[1.0, -1], [-1, 1]]).double()             # neither
    assert mean_squares(y)[0] == (0, 0, 4) and variances(y) == (0, 0, 4)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).double()
    p, t, e = 0.5 * draw(400, 1), 0.2 * draw(1, 300), 0.7 * draw(400, 300)
    assert variances(0.3 + p + t + e) == pytest.approx(         # of the numbers that were drawn
        (p.var().item(), t.var().item(), e.var().item()), rel=0.08)
    assert variances(t + e, against_itself=True) == pytest.approx(      # the mean is known to be 0
        (0, t.square().mean().item(), (t + e).square().mean().item()), rel=0.08)


def test_an_interval_over_prompts_and_trainings():
    from judge_rater import bounds_of_trainings, margin, prompts_needed
    c = torch.tensor([-0.1, 0.2, 0.5]).double()                 # trainings alone: a sample of three
    assert margin(c.expand(50, 3)) == pytest.approx(4.303 * 0.3 / math.sqrt(3), rel=1e-3)
    prompts = torch.tensor([-1.0, 0, 0, 1, 1]).double()         # prompts alone: a sample of five
    assert margin(prompts[:, None].expand(5, 3)) == pytest.approx(
        2.776 * prompts.std().item() / math.sqrt(5), rel=1e-3)
    assert margin(torch.zeros(5, 3).double()) == 0
    # 0.09 has two degrees of freedom: times 2, over 4.605 and 0.2107, the deciles of chi-square.
    assert bounds_of_trainings(c.expand(50, 3)) == pytest.approx(
        [0.18 / 4.605, 0.18 / 0.2107], rel=1e-3)

    from versus import half_width
    n = prompts_needed(1.0, 0.0, 0.0, K=1)                      # no ties, as many wins as losses
    assert half_width(n / 2, n / 2, n) <= 5 < half_width((n - 1) / 2, (n - 1) / 2, n - 1)
    more = prompts_needed(1.0, 0.0, 0.0, K=1, deviations=2.8)
    assert more == pytest.approx(n * (2.8 / 1.96) ** 2, rel=2e-3)
    assert prompts_needed(0.0, 0.0, 1.0, K=3) == math.ceil(n / 3)
    least = 0.001 * (1.96 / 0.05) ** 2                          # 1.54 trainings
    assert prompts_needed(0.1, 0.001, 0.1, K=math.floor(least)) == math.inf
    assert prompts_needed(0.1, 0.001, 0.1, K=math.ceil(least)) < math.inf
