"""Bad input to train.py: one line on stderr that names the flag and its value, exit status 2,
nothing on stdout, nothing written. Every flag is given a wrong value at least once."""
import json
import re
import typing
from dataclasses import asdict, fields, is_dataclass
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

import train

HUGE = str(2**63)

# ---- values out of bounds, and flags that do not suit each other ---------------------------------
# The line names the first flag and its first value; what else it names is said in OTHERS.

OUT_OF_BOUNDS = """
    --scale huge / --stage dits / --text clip / --tae vidtwn / --coupling ot / --device tpu
    --steps -1 / --steps=1e3 / --batch 0 / --batch 2.5 / --timeout 0 / --timeout -3
    --dp -1 / --dp 3 / --sp 0 / --sp 2 / --replicate -1 / --replicate 3 / --reshard maybe
    --peak -1 --plan / --gpus 0 --plan / --gpus 1.5 --plan / --memory 0 --plan
    --utilisation 0 --plan / --plan=yes / --dp 3 --plan --gpus 8 / --sp 3 --plan --gpus 8
    --gpus 2 / --memory 40 / --utilisation 0.5 / --peak 3
    --scael toy / --clip 1 / --tae.variant 3d / --dit.text_dim 64 / --text.dim 64 / --dit.streams 1
    --phases progressive / --export x.safetensors / --dit.num_classes 3 / --step 5
    --workdir '' / --data '' / --base '' / --init '' / --data none / --base none / --init none
    --clips.frames 0 / --clips.frames -1 / --clips.size 0 / --clips.size -32 / --clips.fps 0
    --clips.size 1 / --clips.things 0 / --clips.things 4 / --clips.count 0 / --clips.max_interval 0
    --clips.workers -1 / --clips.signs 1.1 / --clips.images -1 / --clips.script greek
    --clips.others 8x32 / --clips.others 0x32x32 / --clips.others 8x32x-2 / --clips.others 8,32,32
    --coupling sdot --clips.others 8x32x32 / --coupling sdot-global --clips.images 0.1
    --patch 1 4 / --patch 0 2 2 / --patch -1 2 2 / --patch 1 3 3 / --patch 1 2 2 2
    --patch_structure 8 1 --tae vidtwin / --patch_structure 3 1 1 --tae vidtwin
    --patch_dynamics 0 4 2 --tae vidtwin / --patch_dynamics 1 3 2 --tae vidtwin
    --tae.channels 0 / --tae.channels -1 / --tae.mult 0 1 1
    --tae.space_stride 0 1 / --tae.space_stride 1 / --tae.time_stride 2 -2 / --tae.time_stride 2
    --tae.stem 0 / --tae.res_blocks 0 1 -1 / --tae.res_blocks 1 1 / --tae.decoder_extra -1
    --tae.latent_channels 0 / --tae.heads 0 / --tae.heads 3
    --vidtwin.patch 0 / --vidtwin.patch 5 / --vidtwin.width 0 / --vidtwin.width 102
    --vidtwin.depth 0 / --vidtwin.heads 0 / --vidtwin.heads 5 / --vidtwin.queries 0
    --vidtwin.query_width 0 / --vidtwin.query_layers 0 / --vidtwin.query_heads 3
    --vidtwin.query_heads 0 / --vidtwin.query_ffn -1 / --vidtwin.structure_down -1
    --vidtwin.structure_channels 0 / --vidtwin.dynamics_down -1 / --vidtwin.dynamics_channels -1
    --loss.l1 -1 / --loss.l2 -1 / --loss.kl -1 / --loss.opl -1 / --loss.opl_start -1
    --loss.opl_r -1 / --loss.perceptual -1 / --loss.gan -1 / --loss.gan_start -1
    --text.max_words 1 / --text.max_bytes 0 / --text.max_concepts -1 / --text.width 0
    --text.heads 0 / --text.heads 5 / --text.layers -1 / --text.batch 0
    --text.words nowhere --text pretrained / --text.words '' --text pretrained
    --text.precision fp8 / --text.offload moon / --text.without everything
    --dit.dim 0 / --dit.depth 0 / --dit.heads 0 / --dit.heads 7 / --dit.ffn -1
    --dit.adaln none / --dit.conditioning magic / --train_tae.precision fp64
    --flow.sigma_min -0.1 / --flow.sigma_min 1 / --flow.std 0 / --flow.shift -2 / --flow.shift 0
    --sample.solver heun --flow.objective diffusion / --sample.schedule cosine
    --sample.steps 2000 --sample.schedule linear_quadratic / --sample.steps 1001 --scale 30b
    --sdot.target 0 / --sdot.budget 0 / --sdot.lr -1 / --sdot.temperature -1 / --sdot.ema 1
    --sdot.cluster 0 / --sdot.memory 0 / --sdot.solver magic / --sdot.temperature 0.5
    --sdot.ema 0.9
    --sample.steps 0 / --sample.batch 0 / --sample.prompts 0 / --train_tae.crowd 101
    --sample.solver rk5 / --flow.time beta / --flow.objective sde / --train_dit.crowd 2
    --train_tae.accumulate 2 / --train_dit.accumulate 3 / --batch 63 --train_dit.accumulate 2
""" + " / ".join(f"--train_{stage}.{flag}" for stage in ("tae", "dit") for flag in (
    "steps -1", "batch 0", "lr 0", "lr -1", "warmup -1", "decay 1.5", "weight_decay -1", "beta2 1",
    "beta2 -0.5", "clip 0", "clip -1", "ema 2", "every 0", "precision fp16", *(
        ("accumulate 0", "drop 1.5", "align -1") if stage == "dit" else
        ("image_steps -1", "image_batch 0", "crowd 0", "signs 2", "window 0", "motion 0",
         "finish 2"))))

ALL_WORDS = {"seed", "train_dit.lr", "patch", "reshard", "train_dit.precision"}
MAY_BE_ALONE = {"plan", "clips.others"}
NO_TYPE = MAY_BE_ALONE | {"data", "base", "init", "workdir", "sample.schedule", "text.mode",
                          "text.precision", "text.offload", "text.without", "text.words",
                          "text.bytes", "text.concepts", "dit.adaln", "dit.conditioning"}


def flags_of(cfg, prefix=""):
    """(name, type) of each field that is a flag."""
    kinds = typing.get_type_hints(type(cfg))
    for f in fields(cfg):
        if is_dataclass(value := getattr(cfg, f.name)):
            yield from flags_of(value, f"{prefix}{f.name}.")
        elif prefix + f.name not in train.DERIVED:
            yield prefix + f.name, kinds[f.name]


FLAGS = dict([*flags_of(train.SCALES["toy"]()), *flags_of(train.Command())])


def of_another_type():
    """For each flag a word that is no value of its type: by turns another, and all of them for one
    flag of each type."""
    wrong = {int: ("x", "1.5", "1e3", "nan", "1e400", HUGE, "", None),
             float: ("x", "nan", "inf", "-inf", "1e400", HUGE, "", None),
             tuple: ("x", "1.5", "nan", HUGE, ""), bool: ("nonesuch", "1", "", None),
             Literal: ("nonesuch", "fp 32", None)}
    for number, (flag, kind) in enumerate(FLAGS.items()):
        words = wrong[typing.get_origin(kind) or kind] if flag not in NO_TYPE else [None]
        for word in words if flag in ALL_WORDS else [words[number % len(words)]]:
            if flag not in MAY_BE_ALONE or word is not None:
                yield [f"--{flag}=-inf"] if word == "-inf" else [f"--{flag}"] + [word] * (
                    word is not None)


def listed(table):
    """The rows of a table as argument lists."""
    for row in table.replace("\n", " / ").split(" / "):
        if row.strip():
            yield ["" if word == "''" else word for word in row.split()]


ROWS = [*listed(OUT_OF_BOUNDS), *of_another_type()]
OTHERS = [      # where the other of two flags is named
    ("--tae.mult 1 2", "--tae.space_stride 1 1: must be 1 or 2 each"),
    ("--vidtwin.width 132 --vidtwin.heads 8", "--vidtwin.heads 8: must divide width 132"),
    ("--dit.dim 102", "--dit.heads 4: does not divide dim 102"),
    ("--tae vidtwin --loss.opl 0.5", "--loss.opl 0.5: not with --variant vidtwin"),
    ("--clips.size 16 32", "unrecognized arguments: 32"), ("toy", "unrecognized arguments: toy"),
    ("--tae vidtwin --coupling independent --clips.images 0.1", "--variant vidtwin: its clips "),
    ("--clips.size 16 --loss.gan 0.1", "--clips.size 16: the discriminator of --loss.gan needs 24"),
    ("--clips.frames 24", "24: at most 16 frames in the toy world; longer clips need --data"),
    ("--train_tae.window 32", "32: at most 16 frames in the toy world; longer clips need --data"),
]


def says(line, argv):
    """Whether a line names the first flag, or its short name, and the value."""
    flag, *words = argv[0].split("=") + argv[1:]
    name = flag.removeprefix("--")
    name = {short: long for long, short in train.NAMES.items()}.get(name, name)
    spellings = {f"--{name}", f"--{train.NAMES.get(name, name)}"}
    forms = {""}
    if words and not words[0].startswith("--"):
        forms = {words[0]}
        if words[0].replace("-", "").replace(".", "").isdigit():
            forms |= {str(float(words[0])), f"{float(words[0]):g}"}
    return any(s in line for s in spellings) and any(form in line for form in forms)


# ---- surroundings --------------------------------------------------------------------------------


def sketch(folder, *flags, finished=False):
    """A run as far as its settings go; finished: with a result that has no weights."""
    cfg = asdict(train.parse(list(flags))[0])
    folder.mkdir()
    train.write_json(folder / "config.json", cfg)
    if finished:
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors",
                  {"config": json.dumps(cfg)})
    return folder


def spoilt(folder, text):
    (sketch(folder) / "config.json").write_text(text)


def changed(folder, section, **values):
    cfg = json.loads((sketch(folder) / "config.json").read_text())
    (cfg[section] if section else cfg).update(values)
    (folder / "config.json").write_text(json.dumps(cfg))


def file(here, name, content=b"mine"):
    path = here / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def video(here, table):
    file(here, "data/metadata.csv", table)
    file(here, "data/v.txt", b"a video")
    train.write_video(here / "data/v.gif", torch.rand(3, 20, 40, 40))


PLACES = [      # what lies in the folder; flags; what the line says
    (lambda here: file(here, "data"), "--data data", "--data data: no such folder"),
    (lambda here: (here / "data").mkdir(), "--data data", "--data data: no video in it"),
    (lambda here: video(here, b"v.gif,a video"), "--data data", "its first line must be"),
    (lambda here: file(here, "run/thesis.txt"), "--workdir run",
     "--workdir run: not empty, and not a run of train.py"),
    (lambda here: file(here, "run"), "--workdir run", "run"),
    (lambda here: file(here, "file"), "--workdir file/run", "file"),
    (lambda here: sketch(here / "run"), "--workdir run --seed 7",
     "--workdir run: holds a run of another configuration (seed: 0 there, 7 here)"),
    (lambda here: sketch(here / "run"), "--workdir run --dit.dim 128", "dit.dim: 160 there, 128"),
    (lambda here: sketch(here / "run"), "--workdir run --data data", "--data data: no such folder"),
    (lambda here: spoilt(here / "run", '{"scale": "to'), "--workdir run", "config.json: damaged"),
    (lambda here: spoilt(here / "run", ""), "--workdir run", "run/config.json: damaged"),
    (lambda here: spoilt(here / "run", "[1]"), "--workdir run", "run/config.json: damaged"),
    (lambda here: spoilt(here / "run", "5"), "--workdir run", "run/config.json: damaged"),
    (lambda here: spoilt(here / "run", "null"), "--workdir run", "run/config.json: damaged"),
    (lambda here: spoilt(here / "run", '{"dit": 5}'), "--workdir run", "config.json: damaged"),
    (lambda here: file(here, "run/config.json", b"\xff\xfe\0"), "--workdir run", "config.json"),
    (lambda here: changed(here / "run", "dit", wings=2), "--workdir run", "unknown field wings"),
    (lambda here: changed(here / "run", "dit", heads=7), "--workdir run", "damaged (heads 7"),
    (lambda here: changed(here / "run", "clips", frames="many"), "--workdir run", "frames 'many'"),
    (lambda here: changed(here / "run", "clips", frames=None), "--workdir run", "frames None"),
    (lambda here: changed(here / "run", "", patch=["x", 2, 2]), "--workdir run", "patch"),
    (lambda here: changed(here / "run", "", coupling="ot"), "--workdir run", "coupling"),
]
for one in ("base", "init"):
    PLACES += [
        (lambda here: None, f"--{one} none --workdir new", "none: no run there"),
        (lambda here: file(here, "run/thesis.txt"), f"--{one} run --workdir new",
         "run: no run there"),
        (lambda here: file(here, "file"), f"--{one} file --workdir new", "file"),
        (lambda here: spoilt(here / "run", "{"), f"--{one} run --workdir new",
         "run/config.json: damaged"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir new --scale small",
         "--scale small: run is a run of --scale toy"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir new --tae 3d",
         f"--variant 3d: --{one} run has settled it"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir new --train_tae.steps 9",
         f"--train_tae.steps 9: --{one} run has settled it"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir new --loss.kl 1",
         f"--loss.kl 1.0: --{one} run has settled it"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir new --tae.channels 32",
         f"--tae.channels 32: --{one} run has settled it"),
        (lambda here: sketch(here / "run"), f"--{one} run --workdir run", "run"),
        (lambda here: file(here, "x.safetensors", b"no tensors"), f"--{one} x.safetensors",
         "x.safetensors: damaged or missing"),
        (lambda here: save_file({"x": torch.zeros(1)}, here / "x.safetensors"),
         f"--{one} x.safetensors", "x.safetensors: not a model.safetensors of train.py"),
        (lambda here: save_file({"x": torch.zeros(1)}, here / "x.safetensors", {"config": "{"}),
         f"--{one} x.safetensors", "x.safetensors"),
    ]
PLACES += [
    (lambda here: sketch(here / "run"), "--base run --init run --workdir new",
     "--base, --init: one or the other"),
    (lambda here: sketch(here / "run"), "--base run --workdir new", "run: no run with an auto"),
    (lambda here: sketch(here / "run"), "--init run --workdir new --dit.dim 128",
     "--dit.dim 128: --init run has settled it"),
    (lambda here: sketch(here / "run"), "--init run --workdir new --text pretrained",
     "--text.mode pretrained: --init run has settled it"),
    (lambda here: sketch(here / "run"), "--init run --workdir new",
     "run: not finished; continue it"),
    (lambda here: sketch(here / "run"), "--init run --workdir new --patch 1 4 4",
     "--patch 1 4 4: --init run has settled it"),
    (lambda here: sketch(here / "run", "--tae", "vidtwin"), "--base run --workdir new "
     "--clips.size 64", "--clips.size 64: --base run has settled it"),
]
RANKS = [       # with so many ranks
    (2, "--batch 63", "--batch 63: not a multiple of 2"),
    (4, "--batch 6 --sp 2 --train_dit.accumulate 2", "--batch 6: not a multiple of 4"),
    (3, "--batch 63 --train_tae.batch 8", "--train_tae.batch 8: not a multiple of 3"),
    (2, "--train_tae.image_batch 5", "--train_tae.image_batch 5: not a multiple of 2"),
    (4, "--sp 3", "--sp 3: does not divide the 4 ranks"),
    (4, "--replicate 3", "--replicate 3: does not divide the 4 ranks"),
    (4, "--dp 3", "--dp 3"), (4, "--sp 2 --replicate 2 --dp 2", "8 ranks in all, but there are 4"),
    (4, "--sp 4 --replicate 2", "--dp 1 --sp 4: 8 ranks in all, but there are 4"),
    (16, "--sp 16 --train_tae.batch 16", "--sp 16: more ranks than attention heads, 4"),
    (2, "--sp 2 --dit.conditioning in_context", "--sp 2: not with --dit.conditioning in_context"),
]


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def no_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_tae", lambda *_: pytest.fail("it began to train"))
        yield


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused(argv) -> the line that train.py says, once it is sure that it did nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(argv):
        was = contents(tmp_path)
        capfd.readouterr()
        status = train.main(argv)
        out, err = capfd.readouterr()
        assert contents(tmp_path) == was, "it wrote"
        lines = [x for x in err.splitlines() if not x.startswith("--data: passed over")]
        assert status == 2 and out == "" and len(lines) == 1, (status, out, err)
        assert lines[0].startswith("train.py: ") and len(lines[0]) < 400
        return lines[0]
    return run


@pytest.mark.parametrize("argv", ROWS, ids=" ".join)
def test_a_wrong_flag(refused, argv):
    line = refused(argv)
    assert says(line, argv), line


@pytest.mark.parametrize("flags, said", OTHERS, ids=str)
def test_two_flags_that_do_not_suit_each_other(refused, flags, said):
    assert said in refused(flags.split())


@pytest.mark.parametrize("place, flags, said", PLACES, ids=lambda x: x if x == str(x) else "")
def test_wrong_files(refused, tmp_path, place, flags, said):
    place(tmp_path)
    assert said in refused(flags.split())


@pytest.mark.parametrize("ranks, flags, said", RANKS, ids=str)
def test_wrong_for_so_many_ranks(refused, monkeypatch, ranks, flags, said):
    """Without a process group: what the number of ranks decides is asked before anything else."""
    monkeypatch.setattr(train, "world_size", lambda: ranks)
    assert said in refused(flags.split())


def test_ranks_share_only_what_is_still_to_be_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 3)
    cfg, mesh = train.parse(["--train_tae.image_steps", "0"])[0], train.Mesh(dp=3)
    share = lambda last: train.check_shares(cfg, mesh, tmp_path, last)
    cfg.train_tae.batch = 6
    share("latents")
    with pytest.raises(train.UserError, match="--batch 16"):    # three ranks cannot share 16 clips
        share("all")
    (tmp_path / "model.safetensors").touch()
    share("report")


def test_every_flag_has_a_wrong_value():
    tried = {argv[0].removeprefix("--").split("=")[0] for argv in ROWS}
    tried |= {long for long, short in train.NAMES.items() if short in tried}
    assert not FLAGS.keys() - tried


def test_every_flag_has_its_help(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and not [flag for flag in FLAGS if not re.search(
        rf"--{re.escape(flag)} \[?X( ...)?\]?(, --\w+ X)? (?!--[\w.]+ \[?X)\S", out)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(refused):
    assert "--device cuda: torch sees no CUDA device here" in refused(["--device", "cuda"])
