"""Bad input to train.py and sample_parallel.py: one line that names flag and value, exit status 2,
nothing on stdout, nothing written. Every flag is given a wrong value at least once."""
import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample_parallel
import train

DEFAULTS = train.flags_of(train.finish_config(train.SCALES["toy"]()))
FREE = {"data", "text.words", "text.bytes", "text.concepts", "text.cache"}  # any word will do
HUGE = "99999999999999999999"

# ---- flags of train.py: a flag, its wrong value, and what else makes it wrong --------------------

OUT_OF_BOUNDS = """
    --scale huge / --stage dits / --text clip / --tae vidtwn / --coupling ot / --device tpu
    --steps many / --steps -1 / --steps 1.5 / --steps=1e3 / --batch 0 / --batch 2.5 / --seed 1e400
    --timeout x / --timeout 0 / --timeout nan / --timeout inf / --timeout 1e400 / --timeout 1e300
    --dp x / --dp -1 / --dp 3 / --sp 0 / --sp 2 / --sp 1.5 / --replicate 0 / --replicate 3
    --reshard maybe / --export model.pt / --peak-tflops x / --peak-tflops -1 / --peak-tflops nan
    --plan=yes / --gpus 0 / --gpus 1.5 / --gpus x / --memory 0 / --memory nan / --link -1
    --link inf / --utilisation 2 / --utilisation 0 / --gpus 6 --plan --sp 4
    --gpus 8 --plan --dp 3 / --gpus 2 / --memory 40 / --link 3 / --utilisation 0.5
    --train_tae.accumulate 2 / --train_dit.crowd 2
    --dit.conditioning adaln --plan
    --workdir '' / --data '' / --data none / --export ''
    --scael toy / --clip 1 / --tae.variant 3d / --dit.text_dim 64 / --help=yes
    --workdir / --clips.size / --train_dit.lr / --patch / --stage / --reshard / --timeout
    --clips.frames 0 / --clips.frames -1 / --clips.size 0 / --clips.size -32 / --clips.size 16 32
    --clips.fps 0 / --clips.things 0 / --clips.things 4 / --clips.count 0 / --clips.max_interval 0
    --clips.workers -1 / --clips.lengths 0 --coupling independent
    --clips.lengths 8 -1 --coupling independent / --coupling sdot --clips.lengths 8
    --coupling sdot --clips.aspects 16 9
    --clips.aspects 16 --coupling independent / --clips.aspects 0 9 --coupling independent
    --clips.images -1 --coupling independent
    --tae vidtwin --clips.images 0.1 --coupling independent
    --coupling sdot-global --phases progressive
    --patch 1 4 / --patch 0 2 2 / --patch -1 2 2 / --patch 1 3 3
    --patch_structure 8 1 --tae vidtwin / --patch_structure 3 1 1 --tae vidtwin
    --patch_dynamics 0 4 2 --tae vidtwin / --patch_dynamics 1 3 2 --tae vidtwin
    --tae.channels 0 / --tae.channels -1 / --tae.mult 1 2 / --tae.mult 0 1 1 / --tae.space 0 1
    --tae.space 1 / --tae.time 2 -2 / --tae.time 2 / --tae.stem 0 / --tae.res_blocks 0 1 -1
    --tae.res_blocks 1 1 / --tae.extra -1 / --tae.latent_channels 0 / --tae.heads 0 / --tae.heads 3
    --vidtwin.patch 0 / --vidtwin.patch 5 / --vidtwin.width 0 / --vidtwin.width 100
    --vidtwin.depth 0 / --vidtwin.heads 0 / --vidtwin.heads 5 / --vidtwin.queries 0
    --vidtwin.query_width 0 / --vidtwin.query_layers 0 / --vidtwin.query_heads 3
    --vidtwin.query_heads 0 / --vidtwin.query_ffn -1 / --vidtwin.structure_down -1
    --vidtwin.structure_channels 0 / --vidtwin.dynamics_down -1 / --vidtwin.dynamics_channels -1
    --loss.l1 -1 / --loss.l2 -1 / --loss.kl -1 / --loss.opl -1 / --loss.opl_start -1
    --loss.opl_r -1 / --loss.perceptual -1 / --loss.gan -1 / --loss.gan_start -1
    --text.max_words 1 / --text.max_bytes 0 / --text.max_concepts -1 / --text.width 0
    --text.width 100 --text.heads 8 / --text.heads 0 / --text.heads 5 / --text.layers -1
    --text.batch 0 / --text.words '' / --text.bytes '' / --text.concepts ''
    --text.words nowhere --text pretrained
    --dit.dim 0 / --dit.dim 100 / --dit.depth 0 / --dit.heads 0 / --dit.heads 5 / --dit.ffn -1
    --dit.num_classes -1 / --train_tae.precision fp64
    --flow.sigma_min -0.1 / --flow.sigma_min 1 / --flow.std 0 / --flow.shift -2 / --flow.shift 0
    --sample.solver heun --flow.objective diffusion
    --sdot.target 0 / --sdot.budget 0 / --sdot.batch -1 / --sdot.lr -1 / --sdot.decay 0
    --sdot.temperature -1 / --sdot.ema 1 / --sdot.cluster 0 / --sdot.pca -1 / --sdot.memory 0
    --sample.steps 0 / --sample.batch 0 / --sample.prompts 0 / --train_tae.crowd 7
""" + " / ".join(f"--train_{stage}.{flag}" for stage in ("tae", "dit") for flag in (
    "steps -1", "batch 0", "lr 0", "lr -1", "warmup -1", "decay 1.5", "weight_decay -1", "beta2 1",
    "beta2 -0.5", "clip 0", "clip -1", "ema 2", "every 0", "image_steps -1", "image_batch 0",
    "crowd 0", "window 0", "motion 0", "finish 2", "accumulate 0", "drop 1.5", "align -1"))


def of_each_type():
    """A word of another type, and numbers that are none, for every field of every config."""
    for flag, default in DEFAULTS.items():
        if isinstance(default, bool | str):
            bad = ("two words",) if flag in FREE - {"data"} else ("nonesuch",)
        else:
            bad = ("x", "nan", "inf", "1e400") if isinstance(default, float) else ("x", "1.5", HUGE)
        for word in bad:
            yield [f"--{flag}", *word.split()]
    yield ["--train_dit.lr=-inf"]


def listed(table):
    """The rows of a table as argument lists."""
    for row in table.replace("\n", " / ").split(" / "):
        if row.strip():
            yield ["" if word == "''" else word for word in row.split()]


# ---- flags of sample_parallel.py -----------------------------------------------------------------

SAMPLE = """
    --mode fast / --cfg 3 / --cfg 0 / --cfg x / --pp 0 / --pp two / --pp 2 / --patches -1
    --patches 4 / --patches x / --warmup 0 / --warmup x / --patch-axis z / --ring 0 / --ring 1.5
    --ulysses 0 / --ulysses 3 / --ulysses -1 / --shard=1 / --shard / --steps 0 / --steps -5
    --steps 2.5 / --schedule cosine / --guidance x / --guidance nan / --guidance inf
    --guidance 1e400 / --seed x / --seed 1.5 / --out clip.png / --out clip / --out '' / --decode all
    --check=yes / --device tpu / --timeout 0 / --timeout nan / --timeout 1e300 / --timeout x
    --prompt ' ' / --prompt '' / --prompt-file none.txt / --prompt-file '' / --workdir none
    --workdir '' / --workdir / --frobnicate / --step 5 / --gpus x / --link x / --tflops x
    --memory x / --size 7b / --mode auto --patches 4 / --mode auto --shard / --mode auto --ring 2
    --decode / --prompt-file / --mode distrifusion --ulysses 2 / --schedule x --out sub/clip.gif
    --patch-axis h / --patches 1 / --patches 1 --mode distrifusion
"""
SAMPLE += " / ".join(f"--{flag} {HUGE}" for flag in ("cfg", "ring", "patches", "warmup", "steps",
                                                    "seed", "gpus"))
PLAN = """
    --gpus 0 / --gpus -8 / --gpus 5000 / --link 0 / --link -1 / --link nan
    --link inf / --tflops 0 / --tflops nan / --memory 0 / --memory 1e400 / --resolution 12x
    --resolution 0x768x768 / --resolution axbxc / --resolution 1x2x3x4 / --steps 0 / --warmup 0
    --size 7b / --plan=30b
"""


# ---- surroundings --------------------------------------------------------------------------------


def video(folder, caption="a video"):
    folder.mkdir()
    train.write_video(folder / "v.gif", torch.zeros(3, 20, 40, 40))
    if caption is not None:
        (folder / "v.txt").write_text(caption)
    return folder


def sketch(folder, *flags, finished=True):
    """A run as far as the shapes go: no weights."""
    cfg, _ = train.parse_args(["--workdir", str(folder), *flags])
    (folder / "dit").mkdir(parents=True)
    train.write_json(folder / "config.json", asdict(cfg))
    if finished:
        (folder / "dit/model.safetensors").write_bytes(b"")
    return folder


def spoilt(folder, text):
    (sketch(folder) / "config.json").write_text(text)


def edited(folder, section, **fields):
    config = json.loads((sketch(folder) / "config.json").read_text())
    config[section] |= fields
    train.write_json(folder / "config.json", config)




SURROUNDINGS = {  # what lies in the current folder before
    "nothing": lambda here: None,
    "empty data": lambda here: (here / "data").mkdir(),
    "a file": lambda here: (here / "data").write_text("mine"),
    "no captions": lambda here: video(here / "data", None),
    "empty caption": lambda here: video(here / "data", " \n"),
    "a caption with a NUL": lambda here: video(here / "data", "a\0b"),
    "no header": lambda here: (video(here / "data") / "metadata.csv").write_text("v.gif,a video"),
    "empty in the table": lambda here: (video(here / "data", None) / "metadata.csv").write_text(
        "file_name,text\nv.gif,\n"),
    "unreadable": lambda here: (video(here / "data") / "v.gif").write_bytes(b"not a video"),
    "thesis": lambda here: [(here / "run").mkdir(), (here / "run/thesis.txt").write_text("mine")],
    "a file called run": lambda here: (here / "run").write_text("mine"),
    "a run": lambda here: sketch(here / "run"),
    "an unfinished run": lambda here: sketch(here / "run", finished=False),
    "a run by diffusion": lambda here: sketch(here / "run", "--flow.objective", "diffusion"),
    "a run of VidTwin": lambda here: sketch(here / "run", "--tae", "vidtwin"),
    "cut config": lambda here: spoilt(here / "run", '{"scale": "to'),
    "empty config": lambda here: spoilt(here / "run", ""),
    "a list as config": lambda here: spoilt(here / "run", "[1]"),
    "a section that is none": lambda here: spoilt(here / "run", '{"dit": 5}'),
    "unknown field": lambda here: edited(here / "run", "dit", wings=2),
    "impossible field": lambda here: edited(here / "run", "dit", heads=7),
    "a word for a number": lambda here: edited(here / "run", "clips", frames="many"),
    "prompts": lambda here: [sketch(here / "run"), (here / "empty.txt").write_text("\n \n"),
                             (here / "nul.txt").write_text("a\0b"),
                             (here / "latin.txt").write_bytes(b"caf\xe9"),
                             (here / "file").write_text("mine")],
}
TRAINED = [  # surroundings, flags, what the line must say
    ("nothing", "--data none", "--data none"), ("a file", "--data data", "--data data"),
    ("empty data", "--data data", "--data data: no video"),
    ("no captions", "--data data", "--data data: no captions"),
    ("empty caption", "--data data", "data/v.gif: its caption is empty"),
    ("a caption with a NUL", "--data data", "data/v.gif: its caption"),
    ("no header", "--data data", "data/metadata.csv: its first line must be"),
    ("empty in the table", "--data data", "data/v.gif: its caption is empty"),
    ("unreadable", "--data data", "--data data: none of its 1 videos"),
    ("thesis", "--workdir run", "--workdir run: not empty, and not a run"),
    ("a file called run", "--workdir run", "run"),
    ("a run", "--workdir run --seed 7", "--workdir run: holds a run of another configuration "
                                        "(seed: 0 there, 7 here)"),
    ("cut config", "--workdir run", "run/config.json: damaged"),
    ("empty config", "--workdir run", "run/config.json: damaged"),
    ("a list as config", "--workdir run", "config.json"),
    ("a section that is none", "--workdir run", "run/config.json: damaged"),
    ("unknown field", "--workdir run", "config.json: unknown field wings"),
    ("impossible field", "--workdir run", "run/config.json: damaged (heads 7"),
    ("a word for a number", "--workdir run", "run/config.json: damaged (frames 'many'"),
    ("nothing", "--workdir none --export x.safetensors", "--workdir none: no run there"),
    ("thesis", "--workdir run --export x.safetensors", "--workdir run: no run there"),
    ("an unfinished run", "--workdir run --export x.safetensors", "--workdir run: not finished"),
    ("cut config", "--workdir run --export x.safetensors", "run/config.json: damaged"),
    ("unknown field", "--workdir run --export x.safetensors", "config.json: unknown field wings"),
    ("a run", "--workdir run --export x.bin", "--export x.bin: must end in .safetensors"),
    ("a run", "--workdir run --export run/dit/model.safetensors",
     "--export run/dit/model.safetensors"),
    ("a run", "--workdir run --export x.safetensors", "run/tae/tae.safetensors: damaged"),
]
SAMPLED = [
    ("nothing", "--workdir none --prompt a", "--workdir none: no run there"),
    ("thesis", "--workdir run --prompt a", "--workdir run: no run there"),
    ("thesis", "--workdir run/thesis.txt --prompt a", "run/thesis.txt"),
    ("an unfinished run", "--workdir run --prompt a", "--workdir run: not finished"),
    ("a run by diffusion", "--workdir run --prompt a", "--workdir run: trained by diffusion"),
    ("cut config", "--workdir run --prompt a", "run/config.json: damaged"),
    ("empty config", "--workdir run --prompt a", "run/config.json: damaged"),
    ("a list as config", "--workdir run --prompt a", "config.json"),
    ("unknown field", "--workdir run --prompt a", "config.json: unknown field wings"),
    ("impossible field", "--workdir run --prompt a", "run/config.json: damaged (heads 7"),
    ("a word for a number", "--workdir run --prompt a", "damaged (frames 'many'"),
    ("an unfinished run", "--workdir run --prompt a --out sub/clip.gif", "not finished"),
    ("prompts", "--workdir run", "--prompt: needed"),
    ("prompts", "--workdir run --prompt-file none.txt", "--prompt-file none.txt"),
    ("prompts", "--workdir run --prompt-file empty.txt", "--prompt"),
    ("prompts", "--workdir run --prompt-file nul.txt", "a NUL at character 2"),
    ("prompts", "--workdir run --prompt-file latin.txt", "--prompt-file latin.txt"),
    ("prompts", "--workdir run --prompt-file run", "--prompt-file run"),
    ("prompts", "--workdir run --prompt a --out sub/clip.avi", "--out sub/clip.avi"),
    ("prompts", "--workdir run --prompt a --out file/clip.gif", "file"),
    ("prompts", "--workdir run --prompt a --pp 9", "the number of ranks"),
    ("nothing", "--prompt a", "--workdir: needed"), ("nothing", "--check", "--workdir: needed"),
    ("prompts", "--prompt-file latin.txt", "--workdir: needed"),
    ("nothing", "--cfg 2", "--workdir: needed with --cfg"),
    ("nothing", "--gpus 4", "--plan: needed with --gpus"),
    ("prompts", "--plan --prompt a", "--prompt: --plan has no use"),
    ("prompts", "--workdir run --prompt a --link 3", "--link: needs --plan or --mode auto"),
    ("prompts", "--workdir run --prompt a --warmup 99", "--warmup 99: needs --pp 2"),
    ("prompts", "--workdir run --prompt a --mode every", "--mode every: checks and writes no clip"),
    ("prompts", "--workdir run --prompt a --prompt b --mode every --check", "takes one prompt"),
    ("prompts", "--workdir run --prompt a --mode every --check --out c.gif", "leave out --out"),
    ("a run of VidTwin", "--workdir run --prompt a --decode halo", "--decode halo: latents ("),
    ("a run of VidTwin", "--workdir run --prompt a --decode tiles", "--decode tiles: latents ("),
]
MESHES = [  # ranks, flags: wrong only together with the number of ranks, or with the model's sizes
    (2, "--cfg 2 --pp 2"), (4, "--ulysses 2"), (3, "--cfg 3"), (6, "--pp 6"), (9, "--ulysses 9"),
    (2, "--patches 1 --pp 2"), (2, "--warmup 99 --pp 2"), (2, "--patches 3 --ring 2"),
    (2, "--patch-axis q --ulysses 2"), (2, "--patch-axis h --cfg 2"), (9, "--decode halo --ring 9"),
]


def rows():
    for argv in [*listed(OUT_OF_BOUNDS), *of_each_type()]:
        yield train, argv, [], "nothing", None
    for surroundings, flags, line in TRAINED:
        yield train, flags.split(), [], surroundings, line
    for argv in listed(SAMPLE.replace("' '", "\u00a0")):                    # a blank, to strip()
        before = ["--workdir", "run", "--prompt", "a red circle"]
        yield sample_parallel, argv, before, "prompts", None
    for argv in listed(PLAN):
        yield sample_parallel, argv, ["--plan"], "nothing", None
    for surroundings, flags, line in SAMPLED:
        yield sample_parallel, flags.split(), [], surroundings, line
    for ranks, flags in MESHES:
        yield (sample_parallel, flags.split(), [f"WORLD_SIZE={ranks}", "--workdir", "run",
                                                "--prompt", "a"], "prompts", None)


ROWS = list(rows())
NAMES = [" ".join([program.__name__, *before[:1], *argv, *([place] if line else [])])
         for program, argv, before, place, line in ROWS]


def named(argv, line):
    """Does the line name the (first) flag and its value? Numbers may be written otherwise."""
    flag, *words = argv[0].removeprefix("--").split("=") + argv[1:]
    words = [w for w in words[:1] if w.strip() and not w.startswith("--")]
    forms = set()
    for word in words:
        forms = {word}
        with contextlib.suppress(ValueError):
            forms |= {str(float(word)), f"{float(word):g}"}
    return flag.split(".")[-1] in line and (not forms or any(form in line for form in forms))


def flags_in(program, start):
    """Every flag that the program's own parser takes."""
    flags = set()

    class Spy(program.Parser):
        def parse_args(self, *args):
            flags.update(f for f in self._option_string_actions if f.startswith("--"))
            return super().parse_args(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Parser", Spy)
        start([])
    return flags - {"--help"}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}


def test_every_flag_has_a_row():
    for program, start in ((train, train.parse_args), (sample_parallel, sample_parallel.parse)):
        tried = {argv[0].split("=")[0] for p, argv, *_ in ROWS if p is program}
        assert not flags_in(program, start) - tried


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """An autoencoder that is made for its shapes alone is made once: it takes half of a row."""
    made, real = {}, train.autoencoder.autoencoder

    def autoencoder(cfg):
        if torch.get_default_device().type != "meta":
            return real(cfg)
        if repr(cfg) not in made:
            made[repr(cfg)] = real(cfg)
        return made[repr(cfg)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.autoencoder, "autoencoder", autoencoder)
        yield


@pytest.mark.parametrize("program,argv,before,place,line", ROWS, ids=NAMES)
def test_bad_input_is_one_line_and_status_2(program, argv, before, place, line, tmp_path, capfd,
                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(train, "train_tae", lambda *_: pytest.fail("it started to train"))
    monkeypatch.setattr(sample_parallel, "demo", lambda: pytest.fail("it started the demo"))
    monkeypatch.setattr(sample_parallel, "measure", lambda *_: pytest.fail("it started to sample"))
    if before and before[0].startswith("WORLD_SIZE="):
        monkeypatch.setenv(*before[0].split("="))
        before = before[1:]
    SURROUNDINGS[place](tmp_path)
    capfd.readouterr()
    was = contents(tmp_path)
    try:
        status = program.main([*before, *argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    said = err.splitlines()
    if place == "unreadable":                               # each file that is skipped has its line
        said = [one for one in said if not one.endswith("skipped") and "skipped (" not in one]
    assert status == 2 and out == "", (status, out, err)
    assert len(said) == 1 and said[0].startswith(f"{Path(program.__file__).name}: "), err
    assert (line in said[0]) if line else named(argv, said[0]), err
    assert contents(tmp_path) == was
