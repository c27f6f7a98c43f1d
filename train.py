"""train.py: the whole system, from captioned clips to a model and from prompts to new clips.

    tae       clips -> autoencoder           image training, inflation, video training, statistics
    latents   clips -> mean, logvar          encoded once; from here on the autoencoder is frozen
    coupling  latents -> weights             which noise meets which clip
    dit       latents, captions -> velocity  flow matching, condition dropout, moving average
    sample    prompts -> clips               Euler, classifier-free guidance, decode; GIF and MP4
    report    everything -> report.json, index.html

This file is the only one that knows the others: it composes tae.py, text_cond.py, dit.py, flow.py
and sdot.py, and adds what only a composer can: captions and the judge of the toy world, reading
videos, checkpoints, the command line.

Run.   torchrun train.py --scale toy               # all stages: no download, no GPU, no data
       torchrun train.py --scale toy --data DIR --workdir runs/mine      # captioned videos
       torchrun --nproc_per_node 2 train.py --scale toy --dp 2           # the same, sharded
       python train.py --scale 30b --plan --gpus 6144       # what that would take: needs no GPU
       python train.py --help                      # every field of every config is a flag

Starting a run again continues it: finished stages are skipped, an unfinished one resumes at its
last checkpoint. Every random number comes from (seed, stage, step), the autoencoder's own also from
the rank: the resumed run is the uninterrupted one. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint
first. A step whose loss or gradient is not finite is skipped; after three in a row the weights of
the last checkpoint are taken again.

A run folder: config.json, metrics.csv (stage; step; loss, the mean over elements and ranks; lr;
grad_norm before clipping), events.jsonl (starts, stops, checkpoints, skipped steps), tae/,
latents/, coupling.pt, dit/, samples/, report.json, index.html (all of them: README.md).
Nothing in it can run code: tensors are safetensors or are read with weights_only=True, and the one
pickle, the table of contents of a distributed checkpoint, may name only the classes of such a one.

Letters: B batch, T frames, H W height and width, M clips in the data set, P text embedding.
"""

import argparse
import atexit
import contextlib
import copy
import csv
import ctypes
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")       # its advice on DDP would break restarts
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C before `Stop.listen`: no traceback

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import dit as backbone
import flow
import sample_parallel
import sdot
import tae as autoencoder
import text_cond
from flow import FlowConfig
from sdot import SDOTConfig

# ---- 1. Configuration ----------------------------------------------------------------------------


class UserError(ValueError):
    """Something that a user can mend: printed as one line, exit status 2."""


@dataclass
class ClipConfig:
    """What a clip is."""

    frames: int = 16  # T
    size: int = 32  # H = W
    fps: int = 8  # of the files that are written
    things: int = 1  # moving objects in a clip of the toy world
    script: str = "latin"  # of its signs: latin | chinese
    count: int = 6144  # M: clips the DiT is trained on (toy and small with --data: 1024)
    max_interval: int = 4  # real videos: take every n-th frame, n drawn from 1 .. max_interval
    tell_fps: bool = False  # real videos: captions begin with the frame rate of the clip, FPS-12
    workers: int = 2  # processes that decode real videos
    # What the dit stage sees beside clips of frames x size x size; a step has one shape:
    lengths: tuple[int, ...] = ()  # also clips of so many frames
    aspects: tuple[int, ...] = (1, 1)  # width, height, width, height, ...: of one area
    images: float = 0.0  # images (one frame) for each clip; Movie Gen has 0.1


@dataclass
class TrainConfig:
    """How a model is trained; `tae:` and `dit:` fields are used by that stage alone."""

    steps: int = 1000
    batch: int = 8  # clips a step, over all ranks
    lr: float = 2e-3
    warmup: int = 20  # steps of linear warm-up
    decay: float = 1.0  # the last part of the steps over which the rate falls to 0 (cosine)
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0  # gradient norm
    ema: float = 0.0  # 0: no average of the weights
    every: int = 200  # steps that a kill costs at most: checkpoints are half as far apart
    image_steps: int = 0  # tae: steps of image training before inflation
    image_batch: int = 32  # tae: frames a step in image training
    crowd: int = 1  # tae: objects in a toy clip; an empty background teaches nothing
    window: int = 16  # tae: frames of a training clip
    motion: int = 1  # tae: motion curriculum, up to so many times as fast in the end; 1 is off
    finish: float = 0.0  # tae: the last part of the steps, on whole clips without a crowd
    accumulate: int = 1  # dit: a rank's clips of a step, in so many parts one after another
    precision: str = "fp32"  # of the matrix products: fp32 | bf16; dit: | fp64, which is for tests
    drop: float = 0.1  # dit: condition dropout
    drop_each: bool = False  # dit: each text encoder is dropped for itself, not all three together
    align: float = 0.0  # dit: weight of the loss that aligns the toy MetaCLIP with the picture


@dataclass
class SampleConfig:
    """How clips are made."""

    steps: int = 25
    schedule: str = "linear"
    solver: str = "euler"
    guidance: float = 3.0
    batch: int = 32
    # toy world: prompts that are judged (more are drawn for held-out combinations and longer words)
    prompts: int = 160


@dataclass
class Config:
    """Everything that decides a run: config.json is this, and nothing else."""

    scale: str = "toy"
    data: str = ""  # folder of captioned videos; empty: the toy world
    seed: int = 0
    coupling: str = "sdot"
    phases: str = "one"  # of the dit stage: one | progressive (small images, small clips, clips)
    patch: tuple[int, ...] = (1, 4, 4)  # latent frames, rows and columns in one token
    clips: ClipConfig = field(default_factory=ClipConfig)
    variant: str = "2.5d"  # --tae: 2.5d | 3d (both: `tae`) | vidtwin (`vidtwin`)
    patch_structure: tuple[int, ...] = (8, 1, 1)  # the same of VidTwin's two latents: all "frames"
    patch_dynamics: tuple[int, ...] = (1, 4, 2)  # of the structure; 4 frames of 2 rows or columns
    tae: autoencoder.TAEConfig = field(default_factory=autoencoder.TAEConfig)
    vidtwin: autoencoder.VidTwinConfig = field(default_factory=autoencoder.VidTwinConfig)
    loss: autoencoder.LossConfig = field(default_factory=autoencoder.LossConfig)  # of the tae stage
    train_tae: TrainConfig = field(default_factory=TrainConfig)
    text: text_cond.TextConfig = field(default_factory=text_cond.TextConfig)
    dit: backbone.DiTConfig = field(default_factory=backbone.DiTConfig)
    train_dit: TrainConfig = field(default_factory=TrainConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sdot: SDOTConfig = field(default_factory=SDOTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def autoencoder_config(self) -> autoencoder.TAEConfig | autoencoder.VidTwinConfig:
        """Sizes of the autoencoder that `variant` names."""
        return self.vidtwin if self.variant == "vidtwin" else self.tae


SCALES: dict[str, Callable[[], Config]] = {
    # 2 CPU cores, minutes: 16 x 32 x 32 clips, latent (8, 4, 8, 8), 16 tokens
    "toy": lambda: Config(
        patch=(4, 2, 2),  # a token is 8 x 8 pixels for the whole clip
        tae=replace(autoencoder.PRESETS["toy"]),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["toy"]),
        loss=replace(autoencoder.LOSSES["toy"]),
        train_tae=TrainConfig(steps=2200, batch=8, lr=2e-3, image_steps=150, crowd=6, window=8,
                              finish=0.2),
        text=replace(text_cond.PRESETS["toy"]),
        dit=replace(backbone.PRESETS["toy"]),
        clips=ClipConfig(count=18432),
        train_dit=TrainConfig(steps=2000, batch=64, lr=2e-3, warmup=100, ema=0.995, align=0.1),
        flow=FlowConfig(std=1.3, shift=2.0),  # where and whither is decided near the noise
        sdot=SDOTConfig(solver="pot"),
        sample=SampleConfig(schedule="shifted", guidance=5.0),
    ),
    # one GPU, hours: 16 x 64 x 64 clips with two objects, 8 x 8 x 8, latent (16, 2, 8, 8)
    "small": lambda: Config(
        scale="small",
        coupling="independent",
        patch=(1, 2, 2),
        clips=ClipConfig(size=64, things=2, count=50_000),
        tae=replace(autoencoder.PRESETS["small"]),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["small"]),
        loss=replace(autoencoder.LOSSES["small"]),
        train_tae=TrainConfig(steps=40_000, batch=32, lr=4e-4, warmup=500, image_steps=10_000,
                              image_batch=128, every=2000),
        text=replace(text_cond.PRESETS["small"]),
        dit=replace(backbone.PRESETS["small"]),
        train_dit=TrainConfig(steps=100_000, batch=256, lr=3e-4, warmup=1000, ema=0.9999,
                              every=2000, align=0.1),
        sample=SampleConfig(steps=50),
    ),
}


def paper_scale(name: str, clips: ClipConfig, train_tae: TrainConfig, train_dit: TrainConfig,
                phases: str = "one") -> Config:
    """The sizes of the papers: their autoencoder, their text encoders, bf16. Planned, with --plan,
    and never run whole by us."""
    return Config(
        scale=name, coupling="independent", phases=phases, patch=(1, 2, 2), clips=clips,
        tae=replace(autoencoder.PRESETS["paper"], checkpointing=True),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["paper"]),
        loss=replace(autoencoder.LOSSES["paper"]),
        train_tae=replace(train_tae, lr=1e-4, warmup=1000, every=1000, window=16, precision="bf16"),
        text=replace(text_cond.PRESETS[name]), dit=replace(backbone.PRESETS[name]),
        train_dit=replace(train_dit, warmup=2000, weight_decay=0.1, beta2=0.95, ema=0.9999,
                          every=500, precision="bf16"),
        sample=SampleConfig(steps=50, schedule="linear_quadratic", batch=1),
    )


SCALES |= {
    # 8 GPUs, weeks: 4 s at 8 frames a second, 256 px; 4 x 16 x 16 = 1024 tokens
    "1b": lambda: paper_scale(
        "1b", ClipConfig(frames=32, size=256, count=1_000_000, images=0.1, workers=8),
        TrainConfig(steps=100_000, batch=64, image_steps=50_000, image_batch=256),
        TrainConfig(steps=200_000, batch=512, lr=2e-4)),
    # 64 GPUs and more: 8 s at 16 frames a second, 256 px; 16 x 16 x 16 = 4096 tokens
    "5b": lambda: paper_scale(
        "5b", ClipConfig(frames=128, size=256, fps=16, count=4_000_000, images=0.1, workers=8),
        TrainConfig(steps=200_000, batch=256, image_steps=100_000, image_batch=1024),
        TrainConfig(steps=200_000, batch=1024, lr=1e-4)),
    # thousands of GPUs: Movie Gen's three phases, to 16 s at 768 px, 73,728 tokens
    "30b": lambda: paper_scale(
        "30b", ClipConfig(frames=256, size=768, fps=16, count=10_000_000, tell_fps=True, workers=8),
        TrainConfig(steps=200_000, batch=512, image_steps=100_000, image_batch=2048),
        TrainConfig(steps=469_500, batch=1536, lr=1e-4), phases="progressive"),
}
COUPLINGS = ("independent", "minibatch", "sdot", "sdot-global")
VARIANTS = ("2.5d", "3d", "vidtwin")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
STAGES = ("tae", "latents", "coupling", "dit", "sample", "report")
COMPARED = ("loss", "color", "shape", "direction", "text", "heldout")  # figures of a study
# Fields that follow from others, and are therefore no flags.
DERIVED = {"dit.streams", "dit.text_dim", "text.dim", "tae.variant", "vidtwin.frames",
           "vidtwin.size", "variant",
           # and those of a training stage that only the other one has
           *(f"train_tae.{name}" for name in ("drop", "drop_each", "align", "accumulate")),
           *(f"train_dit.{name}" for name in ("window", "motion", "image_steps", "image_batch",
                                              "crowd", "finish"))}
# Fields that say how a run is computed, and not what comes out: they may change when it goes on.
HOW = {"train_tae.every", "train_dit.every", "train_dit.accumulate", "tae.checkpointing",
       "vidtwin.checkpointing", "dit.checkpointing", "clips.workers", "text.offload"}


def one_of(flag: str, value: str, choices) -> None:
    """UserError unless value is among the choices."""
    if value not in choices:
        raise UserError(f"{flag} {value}: not one of {', '.join(choices)}")


def finish_config(cfg: Config) -> Config:
    """Fill the fields that follow from others, and check what no single stage can."""
    c = cfg.clips
    for name in ("frames", "size", "fps", "things", "count", "max_interval"):
        if getattr(c, name) < 1:
            raise UserError(f"--clips.{name} {getattr(c, name)}: must be 1 or more")
    if c.workers < 0:
        raise UserError(f"--clips.workers {c.workers}: must be 0 or more")
    for section in ("train_tae", "train_dit"):
        t = getattr(cfg, section)
        for name in ("batch", "every", "image_batch", "crowd", "window", "motion",
                     "accumulate"):
            if getattr(t, name) < 1:
                raise UserError(f"--{section}.{name} {getattr(t, name)}: must be 1 or more")
        for name in ("steps", "image_steps", "warmup", "weight_decay", "align"):
            if not getattr(t, name) >= 0:
                raise UserError(f"--{section}.{name} {getattr(t, name)}: must be 0 or more")
        if not 0 <= t.beta2 < 1:
            raise UserError(f"--{section}.beta2 {t.beta2}: must be from 0 to below 1")
        for name in ("finish", "drop", "decay", "ema"):
            if not 0 <= getattr(t, name) <= 1:
                raise UserError(f"--{section}.{name} {getattr(t, name)}: must be from 0 to 1")
        one_of(f"--{section}.precision", t.precision,
               PRECISIONS if section == "train_dit" else ("fp32", "bf16"))
        for name in ("lr", "clip"):
            if not getattr(t, name) > 0:
                raise UserError(f"--{section}.{name} {getattr(t, name)}: must be above 0")
    one_of("--clips.script", c.script, autoencoder.SCRIPTS)
    try:
        autoencoder.glyphs(autoencoder.SCRIPTS[c.script][0][0], 16)
    except ValueError as error:
        raise UserError(f"--clips.script {c.script}: {error}") from None
    if c.things > 3 and not cfg.data:
        raise UserError(f"--clips.things {c.things}: at most 3 pass one another without touching")
    for flag, n in (("train_tae.crowd", cfg.train_tae.crowd),
                    ("train_dit.crowd", cfg.train_dit.crowd)):
        if n > len(autoencoder.COLORS):
            raise UserError(f"--{flag} {n}: at most {len(autoencoder.COLORS)}, one of each colour")
    if cfg.train_tae.window > c.frames:
        cfg.train_tae.window = c.frames
    one_of("--coupling", cfg.coupling, COUPLINGS)
    for name in ("steps", "batch", "prompts"):
        if getattr(cfg.sample, name) < 1:
            raise UserError(f"--sample.{name} {getattr(cfg.sample, name)}: must be 1 or more")
    one_of("--sample.solver", cfg.sample.solver, (*flow.SOLVERS, "dopri5"))
    try:
        flow.schedule(cfg.sample.schedule, cfg.sample.steps, shift=cfg.flow.shift)
    except ValueError as error:
        raise UserError(f"--sample.{error}") from None
    if cfg.flow.objective == "diffusion" and cfg.sample.solver != "euler":
        raise UserError(f"--sample.solver {cfg.sample.solver}: diffusion is sampled with euler")
    one_of("--tae", cfg.variant, VARIANTS)
    patches = {"patch": cfg.patch}
    if cfg.variant == "vidtwin":
        cfg.vidtwin = replace(cfg.vidtwin, frames=c.frames, size=c.size)
        cfg.train_tae.window, cfg.train_tae.image_steps = c.frames, 0  # whole clips, no images
        patches = {"patch_structure": cfg.patch_structure, "patch_dynamics": cfg.patch_dynamics}
    else:
        cfg.tae = replace(cfg.tae, variant=cfg.variant)
    with torch.device("meta"):
        model = autoencoder.autoencoder(cfg.autoencoder_config)
    one_of("--phases", cfg.phases, ("one", "progressive"))
    for name, patch in patches.items():
        if len(patch) != 3 or min(patch) < 1:
            raise UserError(f"--{name} {' '.join(map(str, patch))}: not three numbers above 0")
    shapes, streams = shapes_of(cfg), []
    several = len(shapes) > 1 or cfg.phases != "one"
    if several and cfg.coupling.startswith("sdot"):
        raise UserError(f"--coupling {cfg.coupling}: for clips of one shape only; with --phases, "
                        "--clips.lengths, --clips.aspects or --clips.images: independent")
    if several and cfg.variant == "vidtwin":
        raise UserError("--tae vidtwin: its clips have one shape; without --phases, "
                        "--clips.lengths, --clips.aspects and --clips.images")
    for shape in shapes:
        here = model.streams(*shape)
        for (name, patch), (_, *size) in zip(patches.items(), here):
            if any(n % p for n, p in zip(size, patch)):
                raise UserError(f"--{name} {' '.join(map(str, patch))}: does not divide the latent "
                                f"{tuple(size)}")
        streams = [tuple(map(max, *pair)) for pair in zip(streams or here, here)]
    cfg.dit = replace(
        cfg.dit,
        streams=tuple(
            backbone.Stream(C, tuple(patch), tuple(size))
            for patch, (C, *size) in zip(patches.values(), streams)
        ),
        text_dim=cfg.dit.dim,
    )
    cfg.text = replace(cfg.text, dim=cfg.dit.dim)
    for phase in phases(cfg) if cfg.phases == "progressive" else ():
        at_phase(cfg, phase)  # their sizes are checked before anything runs
    return cfg


def whole_clip(cfg: Config) -> tuple[int, int, int]:
    """T, H, W of a clip."""
    return cfg.clips.frames, cfg.clips.size, cfg.clips.size


def token_pixels(cfg: Config) -> list[int]:
    """Rows and columns of pixels of one token."""
    with torch.device("meta"):
        model = autoencoder.autoencoder(cfg.autoencoder_config)
    (_, _, *sides), *_ = model.streams(*whole_clip(cfg))
    return [cfg.clips.size // n * p for n, p in zip(sides, cfg.patch[1:])]


def shapes_of(cfg: Config) -> list[tuple[int, int, int]]:
    """The (T, H, W) that clips of the dit stage can have; the first is that of a sample. Those of
    other aspects have about the same area, in whole tokens of the autoencoder's latent."""
    c = cfg.clips
    if any(n < 1 for n in (*c.lengths, *c.aspects)) or len(c.aspects) % 2 or not c.aspects:
        raise UserError(f"--clips.lengths {' '.join(map(str, c.lengths))}, --clips.aspects "
                        f"{' '.join(map(str, c.aspects))}: lengths and pairs width height, above 0")
    if not cfg.data and max(c.lengths, default=0) > c.frames:
        raise UserError(f"--clips.lengths {' '.join(map(str, c.lengths))}: clips of the toy world "
                        f"have --clips.frames {c.frames}")
    if not 0 <= c.images < math.inf:
        raise UserError(f"--clips.images {c.images:g}: must be 0 or more")
    units = token_pixels(cfg)
    sides = [(c.size, c.size)]
    for w, h in zip(c.aspects[::2], c.aspects[1::2]):
        side = tuple(max(1, round(c.size * math.sqrt(a / b) / unit)) * unit
                     for a, b, unit in ((h, w, units[0]), (w, h, units[1])))
        if w != h and side not in sides:
            sides.append(side)
    lengths = dict.fromkeys((c.frames, *c.lengths, *([1] if c.images else [])))
    return [(T, *side) for T in lengths for side in sides]


@dataclass(frozen=True)
class Phase:
    """A stretch of the dit stage on clips of one size. Its name is that of its folders."""

    name: str
    frames: int
    size: int
    steps: int
    batch: int
    lr: float
    images: float


def phases(cfg: Config) -> list[Phase]:
    """One phase; or Movie Gen's three: images at a third of the size, clips of that size, clips at
    full size, the last two with one image for ten clips (or as --clips.images says). Steps, batches
    and rates are to each other as 210k : 185k : 74.5k, 9216 : 1536 : 512 and 1e-4 : 6e-5 : 6e-5
    [MG table 3]; --train_dit.batch is that of the second, --train_dit.lr that of the first. (The
    paper doubles the second batch on the way, and halves the last rate where the validation loss
    stands still; here the first stays, and the rate falls as a cosine.)
    """
    c, t = cfg.clips, cfg.train_dit
    if cfg.phases == "one":
        return [Phase("", c.frames, c.size, t.steps, t.batch, t.lr, c.images)]
    unit = math.lcm(*token_pixels(cfg))
    small = max(1, round(c.size / 3 / unit)) * unit
    cut, images = [round(t.steps * n / 469.5) for n in (210, 395)], c.images or 0.1
    return [Phase("images", 1, small, cut[0], 6 * t.batch, t.lr, 0.0),
            Phase("small", c.frames, small, cut[1] - cut[0], t.batch, 0.6 * t.lr, images),
            Phase("full", c.frames, c.size, t.steps - cut[1], max(1, t.batch // 3), 0.6 * t.lr,
                  images)]


def at_phase(cfg: Config, phase: Phase) -> Config:
    """The config of one phase: that of a run which has no other."""
    cfg = copy.deepcopy(cfg)
    cfg.phases = "one"
    cfg.clips = replace(cfg.clips, frames=phase.frames, size=phase.size, images=phase.images,
                        lengths=cfg.clips.lengths if phase.frames > 1 else ())
    cfg.train_dit = replace(cfg.train_dit, steps=phase.steps, batch=phase.batch, lr=phase.lr)
    return finish_config(cfg)


# ---- 2. The toy world: captions and the judge ----------------------------------------------------


def caption(world: autoencoder.World) -> str:
    """`a red circle moving left fast`, `a white sign saying "CAT" moving up`; two objects are
    joined by `and`."""

    def one(t: autoencoder.Thing) -> str:
        what = f'sign saying "{t.word}"' if t.shape == "sign" else t.shape
        return f"a {t.color} {what} moving {t.direction}" + (" fast" if t.speed == "fast" else "")

    return " and ".join(one(t) for t in world.things)


_one_of = lambda words: "|".join(sorted(words, key=len, reverse=True))
GRAMMAR = re.compile(
    rf"an? (?P<color>{_one_of(autoencoder.COLORS)}) "
    rf'(?:(?P<shape>{_one_of(autoencoder.SHAPES)})|sign saying "(?P<word>[^" ]+)")'
    rf" moving (?P<direction>{_one_of(autoencoder.DIRECTIONS)})(?P<fast> fast)?"
)


def parse(prompt: str) -> list[dict[str, str]]:
    """What a prompt of the toy grammar asks for, one dict per object; [] if it is not of that
    grammar."""
    parts = [GRAMMAR.fullmatch(p) for p in prompt.split(" and ")]
    if not all(parts):
        return []
    return [
        {
            "color": m["color"],
            "shape": m["shape"] or "sign",
            "direction": m["direction"],
            "speed": "fast" if m["fast"] else "slow",
            "text": m["word"] or "",
        }
        for m in parts
    ]


def seen_colors(x: Tensor) -> Tensor:
    """Index of the nearest palette colour of each pixel, by hue: x (3, ...) in [0, 1] -> (...).
    Brightness is divided out, because blur mixes a colour with the dark background."""
    palette = torch.tensor(list(autoencoder.COLORS.values()))
    palette = palette / palette.amax(1, keepdim=True)
    x = x / x.amax(0, keepdim=True).clamp_min(1e-3)
    return (x[None] - palette.view(-1, 3, *[1] * (x.ndim - 1))).square().sum(1).argmin(0)


def centred_sprite(alpha: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """The object with its motion taken out: each frame of alpha (T, H, W) is shifted so that (cx,
    cy) (T,) comes to the centre, then frames are averaged -> (H, W)."""
    T, H, W = alpha.shape
    theta = torch.zeros(T, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, 0, 2], theta[:, 1, 2] = (2 * cx + 1) / W - 1, (2 * cy + 1) / H - 1
    grid = nn.functional.affine_grid(theta, (T, 1, H, W), align_corners=False)
    return nn.functional.grid_sample(alpha[:, None], grid, align_corners=False).mean((0, 1))


@cache
def templates(H: int, script: str) -> tuple[Tensor, list[tuple[str, str]]]:
    """Sprites of every shape, and of every word of a script, made by the same measurement from
    rendered clips: (K, H*H) unit rows, labels."""
    shape = autoencoder.Thing("white", "circle", "right", "slow", x=0.4)
    things = [replace(shape, shape=s, radius=r / 200)
              for s in autoencoder.SHAPES for r in range(26, 42, 2)]
    sign = replace(shape, shape="sign", x=0.38)
    things += [replace(sign, word=w) for words in autoencoder.SCRIPTS[script] for w in words]
    rows = []
    for thing in things:
        (clip,) = autoencoder.render([autoencoder.World((thing,))], H=H)
        alpha, cx, cy = track((clip[0] + 1) / 2)
        rows.append(centred_sprite(alpha, cx, cy).flatten())
    labels = [(t.shape, t.word) for t in things]
    return nn.functional.normalize(torch.stack(rows), dim=1), labels


def track(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha (T, H, W), faint pixels removed, and its centre of mass in each frame (T,), (T,)."""
    T, H, W = alpha.shape
    alpha = torch.where(alpha > 0.2, alpha, 0)
    mass = alpha.sum((1, 2)).clamp_min(1e-6)
    cx = (alpha.sum(1) * torch.arange(W)).sum(1) / mass
    cy = (alpha.sum(2) * torch.arange(H)).sum(1) / mass
    return alpha, cx, cy


def perceive(clip: Tensor, things: int = 1, script: str = "latin") -> list[dict[str, str]]:
    """What a clip (3, T, H, W) in [-1, 1] shows, from its pixels alone: colour, shape, direction,
    speed and text of `things` objects. Background = the median pixel of the rim; an object = what
    differs from it; direction and speed = a straight line through the centres of mass; shape and
    text = the best matching template. "none" where nothing is to be seen.
    """
    x = ((clip.float() + 1) / 2).clamp(0, 1)
    T, H, W = x.shape[1:]
    rim = torch.ones(H, W, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    background = x[:, :, rim].flatten(1).median(1).values.view(3, 1, 1, 1)
    strength = (x - background).abs().amax(0)  # (T, H, W)
    alpha = (strength / 0.7).clamp(0, 1)
    solid = alpha > 0.75
    colors = seen_colors(x)  # (T, H, W)
    areas = torch.bincount(colors[solid], minlength=len(autoencoder.COLORS))
    bank, labels = templates(H, script)
    seen = []
    for color in areas.topk(things).indices.tolist():
        own = alpha if things == 1 else torch.where(colors == color, alpha, 0)
        own, cx, cy = track(own)
        if own.sum((1, 2)).median() < 0.015 * H * W:  # the smallest object covers 3 %
            seen.append(dict.fromkeys(("color", "shape", "direction", "speed", "text"), "none"))
            continue
        t = torch.arange(T) - (T - 1) / 2
        vx, vy = (
            (c * t).sum() / t.square().sum().clamp_min(1) * 32 / H for c in (cx, cy)
        )  # pixels a frame at H = 32
        speed, octant = math.hypot(vx, vy), round(math.atan2(vy, vx) / (math.pi / 4)) % 8
        score = bank @ nn.functional.normalize(centred_sprite(own, cx, cy).flatten(), dim=0)
        shape, word = labels[score.argmax()] if score.max() > 0.6 else ("none", "")
        seen.append(
            {
                "color": list(autoencoder.COLORS)[color],
                "shape": shape,
                "text": word,
                "direction": list(autoencoder.DIRECTIONS)[octant] if speed > 0.2 else "none",
                "speed": "fast" if speed > 0.8 else "slow" if speed > 0.2 else "none",
            }
        )
    return seen


def judge(clip: Tensor, prompt: str) -> dict[str, bool]:
    """Whether a clip (3, T, H, W) shows what a toy prompt asks for: color, shape, direction,
    speed, and text if the prompt has a sign. With several objects each verdict must hold for all
    of them (matched by colour)."""
    wanted = parse(prompt)
    if not wanted:
        raise ValueError(f"prompt {prompt!r}: not of the toy grammar")
    latin = all(w["text"].isascii() for w in wanted)
    seen = perceive(clip, len(wanted), "latin" if latin else "chinese")
    if len(wanted) > 1:
        by_color = {s["color"]: s for s in seen}
        seen = [by_color.get(w["color"], dict.fromkeys(w, "none")) for w in wanted]
    verdict = {k: all(s[k] == w[k] for s, w in zip(seen, wanted))
               for k in ("color", "shape", "direction", "speed")}
    if any(w["text"] for w in wanted):
        verdict["text"] = all(s["text"] == w["text"] for s, w in zip(seen, wanted))
    return verdict


def accuracy(verdicts: list[dict[str, bool]],
             keys=("color", "shape", "direction", "speed", "text")) -> dict[str, float]:
    """Share of the verdicts that hold, per key, over those that have the key."""
    out = {}
    for key in keys:
        votes = [v[key] for v in verdicts if key in v]
        if votes:
            out[key] = sum(votes) / len(votes)
    return out


def check_judge(cfg: Config, n: int = 500) -> dict[str, float]:
    """Agreement of the judge with the truth on n rendered clips; fewer, where they are large."""
    n = max(20, min(n, 2**25 // math.prod(whole_clip(cfg))))
    rng = random.Random(f"judge/{cfg.seed}")
    c = cfg.clips
    worlds = [autoencoder.sample_world(rng, c.things, heldout=None, frames=c.frames,
                                       script=c.script) for _ in range(n)]
    verdicts = []
    for world in worlds:
        (clip,) = autoencoder.render([world], c.frames, c.size)
        verdicts.append(judge(clip, caption(world)))
    return accuracy(verdicts)


def test_prompts(cfg: Config) -> list[tuple[str, str]]:
    """(category, prompt) with fixed seeds: `trained` (3/5 shapes, 2/5 one-letter signs), `heldout`
    combinations of shapes, `words` of two and three letters, `words_heldout`. A letter is so large
    that it has hardly room beside another thing: of several things one or more are signs of any
    length where one thing would be."""
    rng = random.Random(f"prompts/{cfg.seed}")
    n, c = cfg.sample.prompts, cfg.clips
    want = {"trained": n, "heldout": 3 * n // 10, "words": n // 5, "words_heldout": n // 5}
    out: list[tuple[str, str]] = []
    signs = 2 * n // 5
    for kind, count in want.items():
        got = 0
        while got < count:
            word = kind.startswith("words") or (kind == "trained" and got < signs)
            share = float(word) if c.things == 1 else 0.4 * word
            world = autoencoder.sample_world(rng, c.things, share, frames=c.frames,
                                             heldout=kind.endswith("heldout"), script=c.script)
            lengths = [len(t.word) for t in world.things if t.word]
            if word and not lengths:
                continue
            if word and c.things == 1 and (kind == "trained") != (lengths == [1]):
                continue
            out.append((kind, caption(world)))
            got += 1
    return out


# ---- 3. Data: toy worlds and folders of videos ---------------------------------------------------


class ToyClips:
    """Captioned clips of the toy world. Clip i of a split is drawn from (seed, split, i): any rank
    or worker can make it."""

    def __init__(self, cfg: Config):
        self.cfg, self.shapes = cfg, shapes_of(cfg)

    def at(self, cfg: Config) -> "ToyClips":
        """The clips of one phase of the run."""
        return ToyClips(cfg)

    def shape(self, i: int) -> tuple[int, int, int]:
        """(T, H, W) of clip i of the dit stage."""
        return drawn_shape(self.shapes, self.cfg, i)

    def clip(self, split: str, i: int, done: float | None = None,
             shape: tuple[int, int, int] | None = None) -> tuple[Tensor, str]:
        """(3, T, H, W) in [-1, 1] and its caption. Splits: `tae` (crowded), `train`, `heldout`.
        done: share of the training that is past, for the motion curriculum; None leaves it out.
        shape: another (T, H, W), the middle of a larger square."""
        c, most = self.cfg.clips, self.cfg.train_tae.motion
        rng = random.Random(f"{split}/{self.cfg.seed}/{i}")
        things = max(c.things, self.cfg.train_tae.crowd) if split == "tae" else c.things
        world = autoencoder.sample_world(rng, things, frames=c.frames, overlap=split == "tae",
                                         script=c.script)
        faster = done is not None and most > 1
        interval = autoencoder.motion_interval(rng, done, most) if faster else 1.0
        T, H, W = shape or whole_clip(self.cfg)
        (x,) = autoencoder.render([world], c.frames, max(H, W), interval=interval)
        T0, H0, W0 = x.shape[1:]
        top, left, start = (H0 - H) // 2, (W0 - W) // 2, (T0 - T) // 2
        return x[:, start : start + T, top : top + H, left : left + W], caption(world)


CROPS = 4


def drawn_shape(shapes: list[tuple[int, int, int]], cfg: Config, i: int,
                aspect: float | None = None) -> tuple[int, int, int]:
    """(T, H, W) of clip i of the dit stage, from (seed, i): an image or a clip, then a length; the
    nearest to an aspect H / W, or any. Clips of one window have one shape."""
    c = cfg.clips
    if len(shapes) == 1:
        return shapes[0]
    rng = random.Random(f"shape/{cfg.seed}/{i // CROPS}")
    image = rng.random() < c.images / (1 + c.images)
    T = 1 if image else rng.choice((c.frames, *c.lengths))
    sides = [s for s in shapes if s[0] == T]
    if aspect is None:
        return rng.choice(sides)
    return min(sides, key=lambda s: abs(math.log(s[1] / s[2] / aspect)))


def held_out(T: int, frames: int) -> int:
    """The first frame of a video that training does not see: of its last fifth, or of its last clip
    of T frames if that is longer; 0 where two clips do not fit, and all of it is for both."""
    cut = min(int(0.8 * frames), frames - T)
    return cut if cut >= T else 0


VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".gif")


class VideoFolder:
    """Captioned videos: .mp4 .avi .mkv .webm .gif, in subfolders too, each with a caption in a .txt
    beside it or in the folder's metadata.csv (`file_name,text`, as sub/name.mp4). A clip is a
    random window: T frames at a random start and frame interval, shrunk so that the short side is
    1 to 1.5 times the size of a clip, cropped at random. The last fifth of each video, one clip at
    least, is held out of training.

    Frames are decoded when they are needed, one at a time, and shrunk at once: memory does not
    grow with the number, the length or the resolution of the videos. Unreadable files are named
    and skipped. A run keeps to the videos that it began with, in `table`: one that vanishes, or is
    damaged, later is named, and the next one stands in for it; one that is added is not used.
    """

    def __init__(self, cfg: Config, quiet: bool = False, table: Path | None = None):
        self.cfg, self.root, self.window = cfg, Path(cfg.data), ("", None)
        self.lost: set[Path] = set()
        self.shapes = shapes_of(cfg)
        self.longest = max((cfg.clips.frames, *cfg.clips.lengths))      # of all phases
        if not self.root.is_dir():
            raise UserError(f"--data {cfg.data}: no such folder")
        there = self.root.rglob("*") if rank() == 0 else ()
        files = from_rank0(sorted(name_in(self.root, p) for p in there
                                  if p.suffix.lower() in VIDEO_SUFFIXES))
        known = from_rank0(read_videos(table) if table and rank() == 0 else None)
        if isinstance(known, str):
            raise UserError(known)
        # file, caption, frames, frames per second, height / width
        self.videos: list[tuple[Path, str, int, float, float]]
        say = (lambda *_: None) if quiet else (lambda line: print(line, file=sys.stderr))
        if known:
            self.videos = [(self.root / name, *row) for name, *row in known]
            old, new = {name for name, *_ in known}, set(files)
            if old - new:
                say(f"--data {cfg.data}: gone since this run began, others stand in: "
                    + some_of(old - new))
            if new - old:
                say(f"--data {cfg.data}: not seen when this run began, not used: "
                    + some_of(new - old))
        else:
            self.videos = self._look([self.root / name for name in files], quiet, say)

    def at(self, cfg: Config) -> "VideoFolder":
        """The clips of one phase of the run. What no phase may train on is the same in all."""
        other = copy.copy(self)
        other.cfg, other.shapes, other.window = cfg, shapes_of(cfg), ("", None)
        return other

    def table(self) -> list:
        """What a run keeps of its videos."""
        return [(name_in(self.root, path), *row) for path, *row in self.videos]

    def _look(self, files: list[Path], quiet: bool, say: Callable[[str], None]):
        data, T = self.cfg.data, self.cfg.clips.frames
        if not files:
            raise UserError(f"--data {data}: no video in it ({' '.join(VIDEO_SUFFIXES)})")
        captions = read_captions(self.root, files, quiet)
        if not any(captions):
            raise UserError(f"--data {data}: no captions; put one in NAME.txt beside each video, "
                            "or in metadata.csv")
        for path, caption in zip(files, captions):
            if not caption:
                say(f"{path}: no caption, skipped")
        told = [row for row in zip(files, captions) if row[1]]
        found = shared_out("videos", try_probe, [path for path, _ in told], quiet)
        for (path, _), what in zip(told, found):
            if isinstance(what, str):
                say(f"{path}: unreadable, skipped ({what})")
        videos = [(*row, *what) for row, what in zip(told, found) if not isinstance(what, str)]
        if not videos:
            raise UserError(f"--data {data}: none of its {len(files)} videos can be read and has a "
                            "caption")
        short = [path.name for path, _, frames, *_ in videos if frames < T]
        whole = [path.name for path, _, frames, *_ in videos
                 if frames >= T and not held_out(self.longest, frames)]
        if short:
            say(f"shorter than {T} frames, the last frame is repeated: " + some_of(short))
        if whole:
            say("too short for two clips, so that nothing of it is held out of training: "
                + some_of(whole))
        seen = -(-self.cfg.clips.count // CROPS)
        if seen < len(videos):
            say(f"--clips.count {self.cfg.clips.count}: the dit stage sees {seen} of the "
                f"{len(videos)} videos, {CROPS} crops of each; {CROPS * len(videos)} to see all")
        return videos

    def shape(self, i: int) -> tuple[int, int, int]:
        """(T, H, W) of clip i of the dit stage: the aspect nearest to its video's."""
        return drawn_shape(self.shapes, self.cfg, i,
                           self.videos[i // CROPS % len(self.videos)][4])

    def clip(self, split: str, i: int, done: float | None = None,
             shape: tuple[int, int, int] | None = None) -> tuple[Tensor, str]:
        """(3, T, H, W) in [-1, 1] and its caption, drawn from (seed, split, i). CROPS consecutive
        clips are crops of one window, because decoding is what costs. done, shape: as in ToyClips.
        """
        x, told = self.frames(split, i, done, shape)
        return in_range(x), told

    def frames(self, split: str, i: int, done: float | None = None,
               shape: tuple[int, int, int] | None = None) -> tuple[Tensor, str]:
        """`clip` in bytes, uint8 of 0 to 255: a quarter of the memory."""
        key = f"{split}/{self.cfg.seed}/{i // CROPS}"
        T, H, W = shape or whole_clip(self.cfg)
        if self.window[0] != (key, T, H, W):
            window = self._window(split, i // CROPS, random.Random(key), done, (T, H, W))
            self.window = (key, T, H, W), window
        x, fps, caption = self.window[1]                                            # (T, h, w, 3)
        rng = random.Random(f"{split}/{self.cfg.seed}/{i}/crop")
        top, left = (rng.randint(0, n - m) for n, m in zip(x.shape[1:3], (H, W)))
        x = x[:, top : top + H, left : left + W]
        told = f"FPS-{fps:.3g} " if self.cfg.clips.tell_fps else ""                 # [MG s3.1.4]
        return rearrange(x, "t h w c -> c t h w"), told + caption

    def _window(self, split: str, w: int, rng: random.Random, done: float | None,
                shape: tuple[int, int, int]) -> tuple[Tensor, float, str]:
        for k in range(len(self.videos)):
            video = self.videos[(w + k) % len(self.videos)]
            try:
                return self._read(video, split, rng, done, shape)
            except Exception as error:  # whatever PyAV raises for what was readable at the start
                if video[0] not in self.lost:
                    print(f"{video[0]}: cannot be read any more ({_reason(error)}); the next "
                          "video stands in", file=sys.stderr, flush=True)
                self.lost.add(video[0])
        raise UserError(f"--data {self.root}: none of its {len(self.videos)} videos can be read "
                        "any more")

    def _read(self, video: tuple[Path, str, int, float, float], split: str, rng: random.Random,
              done: float | None, shape: tuple[int, int, int]) -> tuple[Tensor, float, str]:
        (T, H, W), most = shape, self.cfg.clips.max_interval
        if done is not None and self.cfg.train_tae.motion > 1:
            most = int(autoencoder.motion_interval(rng, done, self.cfg.train_tae.motion))
        path, caption, frames, rate, aspect = video
        cut = held_out(self.longest, frames)
        lo, hi = (cut, frames) if split == "heldout" else (0, cut or frames)
        interval = rng.randint(1, max(1, min(most, (hi - lo) // T)))
        start = rng.randint(lo, max(lo, hi - interval * (T - 1) - 1))
        covering = max(H, W * aspect) if aspect < 1 else max(W, H / aspect)     # its short side
        short_side = max(round(covering * rng.uniform(1.0, 1.5)), math.ceil(covering))
        x = read_window(path, start, interval, T, short_side, rate)
        return x, rate / interval, caption


def name_in(root: Path, path: Path) -> str:
    """What a video of --data is called: sub/name.mp4."""
    return path.relative_to(root).as_posix()


def read_videos(table: Path) -> list | str | None:
    """What VideoFolder.table gave, or what is wrong with it; None where there is nothing."""
    if not table.exists():
        return None
    rows = read_json(table, [])
    kinds = str, str, int, float, float
    if rows and all(isinstance(row, list) and tuple(map(type, row)) == kinds for row in rows):
        return rows
    return (f"{table}: damaged; remove it, and --data is looked at again (with the videos that the "
            "run began with, it goes on as before)")


def some_of(names: Collection[str], most: int = 20) -> str:
    """Names for a line that somebody will read."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def read_captions(root: Path, files: list[Path], quiet: bool = False) -> list[str]:
    """The caption of each file, from metadata.csv or NAME.txt (which wins); "" where there is none.
    UserError for an empty one, and for one that is no text."""
    told: dict[str, str] = {}
    table, name = root / "metadata.csv", partial(name_in, root)
    if table.exists():
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as f:
            rows = csv.DictReader(f, strict=True)
            try:
                if not {"file_name", "text"} <= set(rows.fieldnames or ()):
                    raise UserError(f"{table}: its first line must be file_name,text")
                for row in rows:
                    if None in row:
                        raise UserError(f"{table}: line {rows.line_num}: more columns than the "
                                        'first line has; a text with a comma stands in "..."')
                    told[row["file_name"]] = row["text"] or ""
            except csv.Error as error:
                raise UserError(f"{table}: {error}; is a quotation mark not closed?") from None
        if not quiet and (unknown := told.keys() - set(map(name, files))):
            print(f"{table}: no such video here, not used: {some_of(unknown)}", file=sys.stderr)

    def look(path: Path) -> tuple[str, str]:
        """Its caption, and what is wrong with it."""
        beside = path.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8-sig", errors="replace")
        except FileNotFoundError:
            caption = told.get(name(path))
        except OSError as error:
            return "", str(error)
        if caption is None:
            return "", ""
        caption = caption.strip()
        if not caption:
            return "", f"{path}: its caption is empty"
        try:
            text_cond.clean(caption)                        # rather than after the tae stage
        except ValueError as error:
            return "", f"{path}: its caption is no text: {error}"
        return caption, ""

    found = shared_out("captions", look, files, quiet)
    wrong = next((line for _, line in found if line), "")
    if wrong:
        raise UserError(wrong)
    odd = [name(path) for path, (caption, _) in zip(files, found) if "\ufffd" in caption]
    if odd and not quiet:
        print(f"{root}: captions that are not in UTF-8: {some_of(odd)}", file=sys.stderr)
    return [caption for caption, _ in found]


def open_video(path: Path):
    """A PyAV container whose metadata may be anything, and its first video stream."""
    import av

    container = av.open(str(path.absolute()), metadata_errors="replace")    # no `protocol:name`
    if not container.streams.video:
        container.close()
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # frame threads would hold many decoded frames
    return container, stream


def probe(path: Path) -> tuple[int, float, float]:
    """Number of frames, frames per second, height / width; raises if not even one frame decodes."""
    container, stream = open_video(path)
    with container:
        turned = next(container.decode(stream)).rotation % 180 == 90
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        frames = stream.frames
        if not frames:  # not in the header (GIF, WebM): the last packet tells, without decoding
            container.seek(0, stream=stream)
            times = [p.dts if p.pts is None else p.pts for p in container.demux(stream) if p.size]
            last = max((t for t in times if t is not None), default=0) - (stream.start_time or 0)
            frames = round(float(last * stream.time_base) * rate) + 1
        aspect = stream.codec_context.height / stream.codec_context.width
    return max(frames, 1), rate, 1 / aspect if turned else aspect


def try_probe(path: Path) -> tuple[int, float, float] | str:
    """What `probe` says, or why the file cannot be read."""
    try:
        return probe(path)
    except Exception as error:  # whatever PyAV raises for a stream that it cannot read
        return _reason(error)


def read_window(path: Path, start: int, interval: int, T: int, size: int, rate: float) -> Tensor:
    """T frames from frame `start` on, every `interval`-th, short side = size -> (T, h, w, 3)
    uint8, turned as the file says. Where the video ends early the last frame is repeated;
    ValueError where it ends a second before `start`: it was longer once."""
    container, stream = open_video(path)
    with container:
        w, h = stream.codec_context.width, stream.codec_context.height
        scale = size / min(w, h)
        w, h = max(size, round(w * scale)), max(size, round(h * scale))
        origin = stream.start_time or 0
        if start > 0:
            container.seek(
                origin + int(start / rate / stream.time_base), stream=stream
            )  # to the key frame before it
        out: list[Tensor] = []
        last, at = None, start

        def pixels(frame) -> Tensor:
            x = frame.to_ndarray(format="rgb24", width=w, height=h, interpolation="AREA")
            return torch.rot90(torch.from_numpy(x), round(frame.rotation / 90))  # counter-clockwise

        for frame in container.decode(stream):
            at = ((frame.pts - origin) * float(stream.time_base) * rate if frame.pts is not None
                  else start)
            last = frame
            while len(out) < T and at >= start + len(out) * interval - 0.5:
                out.append(pixels(frame))
            if len(out) == T:
                break
        if not out:
            if last is None or start - at > max(rate, 3):
                raise ValueError(f"{path}: nothing decodes from frame {start} on")
            out.append(pixels(last))
    return torch.stack(out + [out[-1]] * (T - len(out)))


def clips_of(cfg: Config, quiet: bool = False, table: Path | None = None) -> ToyClips | VideoFolder:
    """The clips that a run is about; `quiet` on all ranks but one; table: as in VideoFolder."""
    return VideoFolder(cfg, quiet, table) if cfg.data else ToyClips(cfg)


def in_range(x: Tensor) -> Tensor:
    """Frames in bytes -> [-1, 1]; others are there already."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


class _Split(torch.utils.data.Dataset):
    def __init__(self, clips, split: str):
        self.look, self.split = getattr(clips, "frames", clips.clip), split

    def __getitem__(self, i: int | tuple):
        return self.look(self.split, *(i if isinstance(i, tuple) else (i,)))


_workers = weakref.WeakSet()                 # those alive: each holds two open files


def _deaf(_) -> None:
    """A worker goes on when all of a job are asked to stop: its trainer needs it for the step."""
    for number in Stop.signals:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing asks them by SIGTERM, to which they are deaf, and waits."""
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch would report it as a failure
    for worker in _workers:
        worker.kill()


def cores() -> int:
    """Cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
            os.cpu_count() or 1)


def _collate(rows: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([r[0] for r in rows]), [r[1] for r in rows]


def batches(clips, split: str, indices) -> Iterator[tuple[Tensor, list[str]]]:
    """(B, 3, T, H, W) and captions for each list of clips, in order: a clip is its index, or the
    arguments of `clip`. Videos are decoded by worker processes."""
    workers = min(clips.cfg.clips.workers, cores()) if isinstance(clips, VideoFolder) else 0
    before = set(multiprocessing.active_children())
    loaded = iter(torch.utils.data.DataLoader(
        _Split(clips, split), batch_sampler=indices, num_workers=workers, collate_fn=_collate,
        worker_init_fn=_deaf))
    _workers.update(set(multiprocessing.active_children()) - before)

    def one_line():                             # what a worker raises comes with its traceback
        nonlocal loaded
        try:
            yield from ((in_range(x), captions) for x, captions in loaded)
        except UserError as error:
            error.__traceback__ = loaded = None         # whoever keeps the error keeps no workers
            raise UserError(_reason(error).split("UserError: ")[-1]) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise UserError(f"--clips.workers {workers}: one that reads videos was killed "
                            f"({_reason(error)}), for want of memory? Fewer take less") from None
    return one_line()


def write_video(path: str | Path, clip: Tensor, fps: int = 8, zoom: int = 1) -> None:
    """Write a clip (3, T, H, W) in [-1, 1] as .mp4 or .gif, each pixel enlarged `zoom` times."""
    frames = ((clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    frames = rearrange(frames, "c t h w -> t h w c").numpy()
    path = Path(path)
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(f).quantize(255) for f in frames]     # before they are large
        images = [i.resize((zoom * i.width, zoom * i.height), Image.Resampling.NEAREST)
                  for i in images]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps),
                       loop=0)
    elif path.suffix == ".mp4":
        import av

        frames = frames.repeat(zoom, 1).repeat(zoom, 2)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
            stream.height, stream.width = (
                n - n % 2 for n in frames.shape[1:3]
            )  # 4:2:0 needs even sides
            stream.pix_fmt = "yuv420p"
            for f in frames:
                frame = av.VideoFrame.from_ndarray(
                    f[: stream.height, : stream.width].copy(), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        raise ValueError(f"{path}: not .mp4 or .gif")


# ---- 4. Engine: ranks, randomness, checkpoints, metrics ------------------------------------------


def rank() -> int:
    """0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def from_all(mine, group: dist.ProcessGroup | None = None) -> list:
    """What each rank brings, in their order."""
    if not dist.is_initialized():
        return [mine]
    said = [None] * world_size()
    dist.all_gather_object(said, mine, group=group)
    return said


def from_rank0(mine):
    """What rank 0 brings."""
    box = [mine]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def wait_for_rank0(what: str) -> None:
    """Until rank 0 has done what it does alone, however long that takes: a barrier would call it
    silent. `what` names the place, which a process comes to once."""
    sample_parallel.after_rank0(f"train/{what}", True)
    barrier()


def pulse() -> None:
    """Tell the ranks that are in `wait_for_all` that this one is at work."""
    if dist.is_initialized():
        dist.distributed_c10d._get_default_store().add("train/pulse", 1)


@contextlib.contextmanager
def pulsing():
    """A pulse every second, around what tells of no progress itself, as the load of an encoder: a
    rank that dies there is noticed, one that hangs there is not."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(1):
            pulse()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_all(what: str) -> None:
    """Until every rank has done a share that no other has to do with, however long that takes: a
    barrier would call the slowest silent. LostRank when for the time-out of the ranks none has
    finished, and none told of work (`pulse`). `what` as in `wait_for_rank0`."""
    if dist.is_initialized():
        store, place, seen = dist.distributed_c10d._get_default_store(), f"train/{what}/done", None
        there = store.add(place, 1)
        while there < world_size():
            if (now := (there, store.add("train/pulse", 0))) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > sample_parallel.patience().total_seconds():
                raise sample_parallel.LostRank(f"{what}: {there} of {world_size()} ranks are done")
            sample_parallel.between_looks()
            there = store.add(place, 0)
    barrier()


def shared_out(what: str, look: Callable, items: list, quiet: bool = False) -> list:
    """look(item) of each: every rank does some, eight at once because it is the disk that takes the
    time, and all hear of all. `what` as in `wait_for_rank0`."""
    mine, found = items[rank() :: world_size()], []
    with ThreadPool(8) as pool:
        for x in tqdm(pool.imap(look, mine), desc=what, total=len(mine), unit="file", leave=False,
                      delay=3, disable=quiet):
            found.append(x)
            pulse()
    wait_for_all(what)
    said = from_all(found)
    return [said[i % world_size()][i // world_size()] for i in range(len(items))]


@dataclass
class Mesh:
    """replicate x dp x sp ranks, outermost to innermost: FSDP2 shards the parameters over the dp x
    sp ranks of one replica; the clips of a step are shared out to replicate x dp; the sp ranks of a
    clip share its tokens (Ulysses). Only the dit stage knows sp: to the others all ranks are alike.
    A replica of one rank is not sharded: `optimize` leaves its gradients to DDP.
    """

    replicate: int = 1
    dp: int = 1
    sp: int = 1
    reshard: bool = True  # free a block's parameters after its forward; else after its backward
    weights: DeviceMesh | None = None  # of FSDP2; None where each rank has the whole model
    tokens: sample_parallel.Axis | None = None  # the ranks of this rank's clips; None: sp is 1

    @property
    def data(self) -> tuple[int, int]:
        """This rank's part of the clips of a step: which one, of how many."""
        return rank() // self.sp, self.replicate * self.dp

    @cached_property
    def files(self) -> dist.ProcessGroup | None:
        """All ranks, for the thread that writes checkpoints alone: its messages must not meet the
        main thread's."""
        return (dist.new_group(backend="gloo", timeout=sample_parallel.patience())
                if dist.is_initialized() else None)

    @cached_property
    def pulse(self) -> dist.ProcessGroup | None:
        """All ranks, for the main thread where it gathers on GPUs: NCCL's time-out ends the process
        without a word; gloo's, half as long, names the silent rank. On CPUs the default group does
        all that."""
        return (dist.new_group(backend="gloo", timeout=sample_parallel.patience() / 2)
                if dist.is_initialized() and dist.get_backend() == "nccl" else None)


def dp_of(ranks: int, dp: int, sp: int, replicate: int, known: str = "there are") -> int:
    """dp, or if 0 what is left of the ranks. UserError where these cannot be shared out."""
    for flag, n in (("--sp", sp), ("--replicate", replicate)):
        if n < 1 or ranks % n:
            raise UserError(f"{flag} {n}: does not divide the {ranks} ranks")
    dp = dp or ranks // (sp * replicate)
    if replicate * dp * sp != ranks:
        raise UserError(f"--replicate {replicate} --dp {dp} --sp {sp}: {replicate * dp * sp} ranks "
                        f"in all, but {known} {ranks}")
    return dp


def make_mesh(dp: int = 0, sp: int = 1, replicate: int = 1, reshard: bool = True,
              device: str = "cpu") -> Mesh:
    """The ranks that there are as a Mesh; dp 0: as many as are left. UserError where the product is
    another number."""
    dp = dp_of(world_size(), dp, sp, replicate)
    mesh = Mesh(replicate, dp, sp, reshard)
    if dist.is_initialized():
        ranks = init_device_mesh(device, (replicate, dp * sp), mesh_dim_names=("replicate", "dp"))
        if dp * sp > 1:
            mesh.weights = ranks if replicate > 1 else ranks["dp"]
        groups = init_device_mesh(device, (replicate * dp, sp), mesh_dim_names=("data", "sp"))
        for name, m in (("replicate", ranks), ("dp", ranks), ("data", groups), ("sp", groups)):
            dist.distributed_c10d._set_pg_timeout(sample_parallel.patience(), m.get_group(name))
        if sp > 1:
            group = groups.get_group("sp")
            mesh.tokens = sample_parallel.Axis(sp, dist.get_rank(group), group)
    return mesh


def copy_whole(p: Tensor, whole: Tensor) -> Tensor:
    """p, filled with a whole tensor that every rank has: with this rank's rows, where p is sharded,
    without messages."""
    whole = whole.to(p.device, p.dtype)
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    return p.copy_(whole)


class WholeDraws(TorchFunctionMode):
    """Random values of sharded parameters as if they were whole, so that a model starts the same on
    any number of ranks: each rank draws a whole tensor, keeps its rows, and forgets it before the
    next one. No rank ever holds a whole model. none: nothing is drawn, for a model that is filled
    otherwise."""

    def __init__(self, none: bool = False):
        super().__init__()
        self.none = none

    draws = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args else kwargs.get("tensor")
        if func in self.draws and isinstance(x, Tensor):    # on the CPU, the same for every device
            if self.none:
                return x
            whole = torch.empty(x.shape, dtype=x.dtype)
            kwargs.pop("tensor", None)
            func(whole, *args[1:], **kwargs)
            return copy_whole(x, whole)
        return func(*args, **kwargs)


def place(run: "Run", model: nn.Module, precision: str = "fp32", fresh: bool = True) -> nn.Module:
    """The model on this rank's device: whole on one rank and in copies, else sharded (FSDP2, a
    backbone block by block, in bf16 if asked: then gradients are still summed in fp32). A backbone
    on the meta device comes to life here, in shards; not fresh: a checkpoint will fill it."""
    model = model.double() if precision == "fp64" else model
    dit = getattr(model, "dit", None)
    for p in model.parameters():  # channels_last weights are not contiguous, which FSDP asks for
        p.data = p.data.contiguous()
    for part in model.children() if dit is not None else [model]:
        if part is not dit:
            part.to(run.device)
    if run.mesh.weights is not None:
        rule = {"mesh": run.mesh.weights, "reshard_after_forward": run.mesh.reshard}
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in dit.blocks if dit is not None else ():
            fully_shard(block, **rule, **({"mp_policy": half} if precision == "bf16" else {}))
        fully_shard(model, **rule)
    if dit is not None:
        dit.to_empty(device=run.device)
        model.to(run.device)        # moves nothing: FSDP's outermost group finds the new shards
        torch.manual_seed(run.cfg.seed + 1)
        with WholeDraws(none=not fresh):
            dit.init_weights()
    return model


def generator(*key) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, "dit", step): not on ranks,
    restarts or devices."""
    g = torch.Generator()
    return g.manual_seed(
        zlib.crc32(repr(key).encode()) | zlib.crc32(repr(key[::-1]).encode()) << 32
    )


def write_json(path: Path, value) -> None:
    """Whole or not at all: written beside, then renamed."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("w") as f:
            f.write(json.dumps(value, indent=1))
            f.flush()
            os.fsync(f.fileno())    # else a power cut can leave the new name and no content
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    os.replace(tmp, path)


def read_json(path: Path, default):
    """What write_json wrote; default where nothing of its kind is there."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        if isinstance(value := json.loads(path.read_text()), type(default)):
            return value
    return default


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """safetensors, whole or not at all; UserError if there is no space for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp,
                  metadata=metadata or None)
        tmp.chmod(0o666 & ~text_cond.UMASK)     # like other files, not its owner's alone
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (SafetensorError, OSError) as error:
        tmp.unlink(missing_ok=True)
        other = re.search("ermission denied|s a directory", str(error))
        full = "" if other else "; free some space and start again"
        raise UserError(f"{path}: could not be written ({error}){full}") from None


def load_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """A safetensors file, or those of its tensors that have these names; UserError that names it
    if it is damaged."""
    with opened(path) as f:
        return {k: f.get_tensor(k) for k in f.keys() if names is None or k in names}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file; UserError that names it if it is damaged."""
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: this user may not read it")
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged or missing ({error}); remove it and start the run again"
        ) from None


def readable(path: Path) -> bool:
    """Whether a safetensors file is there and whole."""
    with contextlib.suppress(UserError):
        load_tensors(path)
        return True
    return False


class _SafeUnpickler(pickle.Unpickler):
    """DCP keeps its table of contents as a pickle: let it name the classes of such a table, and
    nothing else. Dotted names are refused too: they would reach any module through an allowed one.
    """

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageInfo"},
        "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "PurePosixPath"},
    }

    def find_class(self, module: str, name: str):
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """Reads tensors only, so that a checkpoint from a stranger cannot run code."""

    def read_metadata(self, *_, **__):
        with (Path(self.path) / ".metadata").open("rb") as f:
            metadata = _SafeUnpickler(f).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """Refuses entries that DCP would unpickle."""

    def load_bytes(self, read_item, value) -> None:
        raise UserError(f"checkpoint entry {read_item.storage_index.fqn}: not a tensor")


def crc(path: Path) -> str:
    """CRC-32 of a file in hexadecimal: finds damage, not malice."""
    value = 0
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# DCP says at every call that there is one process only.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class SavePlanner(dcp.DefaultSavePlanner):
    """Without torch's proof that no two shards of a tensor overlap, whose cost is quadratic in the
    ranks: FSDP's do not."""

    def create_global_plan(self, all_plans):
        plans, table = default_planner.create_default_global_save_plan(
            self._dedup_save_plans(all_plans))
        names = {k: v for plan in plans for k, v in plan.planner_data.items()}
        self.global_plan, self.metadata = plans, replace(table, planner_data=names)
        return self.global_plan, self.metadata


LATE = 10       # seconds after which a network's file system may still show another node's files


class WholeWriter(dcp.FileSystemWriter):
    """Writes a checkpoint beside its final place, each rank with the checksums of its own files.
    When all ranks have written, rank 0 renames it: a folder step_0000200 is whole. The last two
    are kept."""

    def __init__(self, final: Path, done: Callable[[], None], damaged: set[Path]):
        super().__init__(final.with_name(f".{final.name}.tmp"))
        self.final, self.done, self.damaged = final, done, damaged

    def write_data(self, plan, planner):
        tmp = Path(self.path)
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch's zip writer, in the way of what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        write_json(tmp / f"sums_{rank()}.json",
                   {p.name: crc(p) for p in sorted(tmp.glob(f"__{rank()}_*"))})
        return written

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        tmp = Path(self.path)
        sums = {".metadata": crc(tmp / ".metadata")}
        files = {x.relative_path for x in metadata.storage_data.values()}
        until = time.monotonic() + LATE
        while True:
            for part in tmp.glob("sums_*.json"):
                sums |= json.loads(part.read_text())
                part.unlink()
            if files <= sums.keys():
                break
            if time.monotonic() > until:
                raise OSError(f"{some_of(files - sums.keys())}: not there; do all nodes share "
                              f"{self.final.parent}?")
            time.sleep(0.5)
        write_json(tmp / "sums.json", sums)
        shutil.rmtree(self.final, ignore_errors=True)
        os.replace(tmp, self.final)
        self.damaged.discard(self.final)
        there = sorted(self.final.parent.glob("step_*"), reverse=True)
        whole = [p for p in there if p < self.final and p not in self.damaged]
        for old in set(there) - {self.final, *whole[:1]}:  # later ones were damaged, too
            shutil.rmtree(old, ignore_errors=True)
        self.done()


class Checkpoints:
    """DCP checkpoints in a folder, written behind the training: the state is copied, and a thread
    writes the copy. done(step), on rank 0, once it is in its place. group: of several ranks, for
    the messages of that thread, which must not meet those of the training."""

    def __init__(self, folder: Path, done: Callable[[int], None] = lambda step: None,
                 group: dist.ProcessGroup | None = None):
        self.folder, self.done, self.writing, self.group = folder, done, None, group
        self.damaged: set[Path] = set()
        self.clear()
        barrier()

    def clear(self) -> None:
        """Away with what a run that was killed, or had no space, left half written."""
        for left in self.folder.glob(".step_*.tmp") if rank() == 0 else ():
            shutil.rmtree(left, ignore_errors=True)

    def steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), reverse=True)

    def save(self, step: int, state: dict) -> None:
        """Begin to write; UserError if this one, or the one before, cannot be written."""
        self.wait()
        final = self.folder / f"step_{step:07d}"
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        writer = WholeWriter(final, partial(self.done, step), self.damaged)
        self.writing = final, dcp.async_save(state, storage_writer=writer, planner=SavePlanner(),
                                             no_dist=not self.group, process_group=self.group)

    def wait(self) -> None:
        """Until what is being written is in its place; UserError if it cannot be."""
        if self.writing is None:
            return
        (final, future), self.writing = self.writing, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # what the file system says, wrapped
            self.clear()
            if tells_of_loss(error):
                raise sample_parallel.LostRank(_reason(error)) from None
            kept = self.steps()
            raise UserError(
                f"{final}: could not be written ({_reason(error)}); "
                + (f"{kept[0].name} is kept, " if kept else "")
                + "free some space and start again"
            ) from None

    def check(self, path: Path) -> None:
        """ValueError, on every rank, if a file is not what was written; each looks at some."""
        wrong = ""
        try:
            sums = sorted(json.loads((path / "sums.json").read_text()).items())
            for name, value in sums[rank() :: world_size()]:
                if crc(path / name) != value:
                    wrong = f"{name} is not what was written"
        except (OSError, ValueError) as error:
            wrong = _reason(error)
        wrong = next(filter(None, from_all(wrong, self.group)), "")
        if wrong:
            raise ValueError(wrong)

    def load(self, state: dict) -> int:
        """Fill `state` from the newest checkpoint that is whole -> its step; 0 if there is none,
        UserError if there are some, none of them whole."""
        self.wait()
        barrier()
        for path in from_rank0(self.steps()):
            try:
                self.check(path)
                reader, alone = SafeReader(path), not dist.is_initialized()
                dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=alone)
                return int(path.name.removeprefix("step_"))
            except UserError:
                raise
            except (Exception, CheckpointException) as error:
                if tells_of_loss(error):
                    raise sample_parallel.LostRank(_reason(error)) from None
                self.damaged.add(path)
                if rank() == 0:
                    print(f"{path}: damaged ({_reason(error)}), using the one before it",
                          file=sys.stderr)
        if self.damaged:
            raise UserError(f"{self.folder}: none of its checkpoints can be read; move them away "
                            "to begin again")
        return 0


def tells_of_loss(error: BaseException) -> bool:
    """Whether a rank is gone that wrote or read a checkpoint, too; not if a file is at fault, whose
    path may say anything, such as "timeout"."""
    causes = _causes(error)
    return (world_size() > 1 and any(map(sample_parallel.is_loss, causes))
            and not any(isinstance(e, OSError | ValueError) for e in causes))


def _causes(error: BaseException) -> list[BaseException]:
    """What the ranks met, of a CheckpointException; else the error itself."""
    return [e for e, _ in getattr(error, "failures", {}).values()] or [error]


def _reason(error: BaseException) -> str:
    """The last line of an error that says something, without its wrapping."""
    text = str(_causes(error)[0])
    return (text.strip().splitlines() or [type(error).__name__])[-1][:200]


class Run:
    """A run folder and the ranks that work on it."""

    def __init__(self, folder: Path, cfg: Config, device: torch.device, mesh: Mesh | None = None):
        self.folder, self.cfg, self.device, self.mesh = folder, cfg, device, mesh or Mesh()
        self.lock = None  # of rank 0 of a run that is at work
        self.peak = 0.0  # FLOPs a second of a device, as the maker says; 0: measured
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def latents(self) -> Path:
        """Where the latents of this run lie, or those of its last phase."""
        return self.folder / "latents" / phases(self.cfg)[-1].name

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage, which count over all restarts."""
        if rank() == 0:
            path = self.folder / "seconds.json"
            table = read_json(path, {})
            table[stage] = round(table.get(stage, 0) + seconds, 2)
            write_json(path, table)

    def event(self, stage: str, step: int, what: str, detail: str = "") -> None:
        """A line of events.jsonl; what is not routine is also said."""
        if rank() == 0:
            row = {"time": round(time.time(), 2), "ranks": world_size(), "stage": stage,
                   "step": step, "event": what, "detail": detail}
            with (self.folder / "events.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            if what not in ("start", "checkpoint", "end"):
                print(f"{stage} step {step}: {what}{detail and ', ' + detail}", file=sys.stderr)

    def log_from(self, stage: str, step: int) -> "Metrics":
        return Metrics(self.folder / "metrics.csv", stage, step)


class Metrics:
    """metrics.csv: stage, step, loss (mean over elements and ranks), lr, grad_norm (before
    clipping). Rows of this stage at or after `step`, left by a run that was killed, are
    dropped."""

    columns = ("stage", "step", "loss", "lr", "grad_norm")

    def __init__(self, path: Path, stage: str, step: int):
        self.path, self.stage, self.rows = path, stage, []
        if rank() != 0:
            return
        kept = [r for r in read_metrics(path) if r["stage"] != stage or r["step"] < step]
        tmp = path.with_name(path.name + ".tmp")
        with tmp.open("w", newline="") as f:
            out = csv.writer(f)
            out.writerow(self.columns)
            out.writerows([r["stage"], r["step"], *(repr(r[c]) for c in self.columns[2:])]
                          for r in kept)
        os.replace(tmp, path)

    def add(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        self.rows.append((self.stage, step, repr(loss), repr(lr), repr(grad_norm)))

    def flush(self) -> None:
        if rank() == 0:
            with self.path.open("a", newline="") as f:
                csv.writer(f).writerows(self.rows)
        self.rows = []


def read_metrics(path: Path) -> list[dict]:
    """Rows of metrics.csv; a half-written last line is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as f:
        for r in csv.DictReader(f):
            with contextlib.suppress(TypeError, ValueError):
                numbers = {c: float(r[c]) for c in Metrics.columns[2:]}
                rows.append({"stage": r["stage"], "step": int(r["step"]), **numbers})
    return rows


def read_events(path: Path) -> list[dict]:
    """Rows of events.jsonl; a half-written last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class Stopped(BaseException):
    """The run was asked to end, and can go on where it is. No Exception: nobody may take it for
    a damaged file."""


class Stop:
    """Ctrl-C, SIGTERM, and SIGUSR1, which SLURM can send before it takes the machine, ask for an
    end: within a training loop after the step and a checkpoint, elsewhere at once (whatever is
    written there is written whole or not at all)."""

    signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    asked, patient, before = "", False, {}

    @classmethod
    def listen(cls) -> None:
        for number in cls.signals:
            cls.before[number] = signal.signal(number, cls._hear)

    @classmethod
    def forget(cls) -> None:
        """As it was before `listen`."""
        cls.asked, cls.patient = "", False
        while cls.before:
            signal.signal(*cls.before.popitem())

    @classmethod
    def _hear(cls, number: int, _) -> None:
        cls.asked = signal.Signals(number).name
        if not cls.patient:
            cls.patient = True      # a second signal must not meet what the first one ends
            raise Stopped(f"stopped by {cls.asked}; start again to continue")


def silent_ranks(seconds: float = 3.0) -> list[int]:
    """After a collective failed: the ranks that do not say within `seconds` that it failed for
    them, too. They hang, or are gone."""
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"alive/{rank()}", "1")
        time.sleep(seconds)
        return [r for r in range(world_size()) if not store.check([f"alive/{r}"])]
    except dist.DistError:  # the store is gone, and with it the rank that kept it
        return [0]


def learning_rate(step: int, t: TrainConfig, steps: int) -> float:
    """Linear warm-up, flat, then a cosine down to 0 over the last `decay` of the steps."""
    up = min(1.0, (step + 1) / max(1, t.warmup))
    f = max(0.0, (step / max(1, steps) - (1 - t.decay)) / max(t.decay, 1e-9))
    return t.lr * up * 0.5 * (1 + math.cos(math.pi * min(1.0, f)))


def optimize(run: Run, stage: str, folder: Path, model: nn.Module, t: TrainConfig, steps: int,
             losses: Callable[[int], Iterator[list[Callable[[nn.Module], Tensor]]]]
             ) -> dict[str, Tensor]:
    """Train `model` for `steps` and return its full state, or that of its moving average.

    losses(first) yields, from step `first` on, a list of closures a step: closure(model) -> scalar
    loss of one part of this rank's part of the batch (`closure.keys`: its rows of the data, for the
    log). Checkpoints go to `folder`; the run resumes at the last one, whatever number of ranks
    wrote it. The model comes from `place`; gradients are averaged over the ranks. The state is
    complete on rank 0, and empty on the others.

    A step whose loss or gradient is not finite changes nothing. After three in a row the state of
    the last checkpoint is taken again, and training goes on with the steps that follow: to repeat
    the ones between would end the same way. Stopped after one of `Stop.signals`.
    """
    Stop.patient = True     # from here on a signal is heard after the next step
    # Norm, optimizer and average need this rank's numbers alone, so they get its shards as tensors:
    # DTensor took a seventh of a toy's step to find, one by one, that there was nothing to do.
    local = lambda x: x.to_local() if isinstance(x, DTensor) else x
    names = dict(model.named_parameters())
    own = {k: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for k, p in names.items()}
    lookup = lambda name: any(word in name for word in ("table", "embedding", "qk_weight"))
    decays = {k: p.ndim >= 2 and not lookup(k) for k, p in own.items()}     # not lookups and biases
    optimizer = torch.optim.AdamW(
        [{"params": [p for k, p in own.items() if decays[k]]},
         {"params": [p for k, p in own.items() if not decays[k]], "weight_decay": 0.0}],
        t.lr, (0.9, t.beta2), weight_decay=t.weight_decay, fused=True)
    state = {"model": {k: p.data for k, p in names.items()},    # what a checkpoint is read into
             "optimizer": {k: {"step": torch.zeros((), device=p.device),
                               "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                           for k, p in names.items()}}
    for k, p in own.items():
        optimizer.state[p] = {name: local(x) for name, x in state["optimizer"][k].items()}
    if t.ema:
        state["ema"] = {k: p.detach().clone() for k, p in names.items()}
    average, weights = [local(x) for x in state.get("ema", {}).values()], list(own.values())

    checkpoints = Checkpoints(folder, lambda step: run.event(stage, step, "checkpoint"),
                              run.mesh.files)
    first = checkpoints.load(state)
    metrics, began = run.log_from(stage, first), time.monotonic()
    run.event(stage, first, "start")
    # A bucket leaves while backward still fills the next; with unused parameters looked for, their
    # order stays the first one, so that a restart adds up the same numbers in the same order.
    copies = (DistributedDataParallel(model, forward_sync_buffers=False, bucket_cap_mb=4,
                                      find_unused_parameters=True, gradient_as_bucket_view=True)
              if run.mesh.weights is None and world_size() > 1 else None)

    # A kill may come before the newest checkpoint is in its place, and costs the steps since the
    # one before it: two distances at most, as the next one waits for it.
    apart, saved = max(1, t.every // 2), first

    def save(step: int) -> None:
        nonlocal began, saved
        checkpoints.wait()  # before the small files: without space, it is named, and not they
        metrics.flush()
        run.spent(stage.split("/")[0], time.monotonic() - began)
        began = time.monotonic()
        checkpoints.save(step, state)
        if t.every == 1:
            checkpoints.wait()
        saved = step

    bar = tqdm(total=steps, initial=first, desc=stage, unit="step", disable=rank() != 0,
               mininterval=1.0, dynamic_ncols=True)
    source = losses(first)
    bad, rewound, recent = 0, 0, []
    for step in range(first, steps):
        lr = learning_rate(step, t, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts, loss = next(source), 0.0
        for k, part in enumerate(parts):    # what adds up is shards: whole gradients do not fit
            alone = copies is not None and k + 1 < len(parts)
            with (torch.autocast(run.device.type, torch.bfloat16, enabled=t.precision == "bf16"),
                  copies.no_sync() if alone else contextlib.nullcontext()):
                part_loss = part(copies or model) / len(parts)
            part_loss.backward()
            loss = loss + part_loss.detach()
        for k, p in names.items():
            own[k].grad = None if p.grad is None else local(p.grad)
        total = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if run.mesh.weights is not None:
            total = total.square()
            dist.all_reduce(total, group=run.mesh.weights.get_group("dp"))
            total = total.sqrt()
        asked = torch.full_like(loss, bool(Stop.asked))
        if dist.is_initialized():                   # one rank that was asked to stop, stops all
            told = torch.stack([loss, asked])
            dist.all_reduce(told, dist.ReduceOp.AVG if told.is_cuda else dist.ReduceOp.SUM)
            loss, asked = told if told.is_cuda else told / world_size()
        if run.mesh.pulse is not None:
            dist.barrier(group=run.mesh.pulse)
        value, norm = loss.item(), total.item()
        if math.isfinite(value) and math.isfinite(norm):
            bad = 0
            if norm + 1e-6 > t.clip:                # else torch multiplies all gradients by 1
                nn.utils.clip_grads_with_norm_(weights, t.clip, total)
            optimizer.step()
            if t.ema:
                with torch.no_grad():
                    torch._foreach_lerp_(average, weights, 1 - min(t.ema, (step + 1) / (step + 10)))
        else:
            bad += 1
            run.event(stage, step, "skipped", f"loss {value:g}, gradient norm {norm:g}"
                      + keys_of(parts, run.mesh.pulse))
        for p in (*names.values(), *weights):       # a shard and its tensor hold a gradient each
            p.grad = None
        metrics.add(step, value, lr, norm)
        if len(recent) == 50:
            mean = sum(recent) / 50
            if value > mean + 6 * math.sqrt(sum((r - mean) ** 2 for r in recent) / 50):
                run.event(stage, step, "spike", f"loss {value:.4g} after {mean:.4g}"
                          + keys_of(parts, run.mesh.pulse))
        recent = [*recent[-49:], value] if math.isfinite(value) else recent
        bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        bar.update()
        if bad == 3:
            back = checkpoints.load(state) if rewound < 3 else 0
            if not back:
                raise UserError(f"{stage}: the loss is {value} at step {step}, for the third step "
                                "in a row; lower the learning rate")
            bad, rewound = 0, rewound + 1
            run.event(stage, step, "rewound", f"to the weights of step {back}")
        elif (step + 1) // apart > saved // apart and step + 1 < steps:
            if bad == 0:
                save(step + 1)
                rewound = 0
            else:
                checkpoints.wait()
        if asked.item() and step + 1 < steps:
            if saved < step + 1:
                save(step + 1)
            checkpoints.wait()
            bar.close()
            run.event(stage, step + 1, "stopped", f"by {Stop.asked or 'another rank'}")
            raise Stopped(f"{stage}: stopped after {step + 1} steps, checkpoint written; start "
                          "again to continue")
    bar.close()
    checkpoints.wait()
    metrics.flush()
    run.event(stage, steps, "end")
    run.spent(stage.split("/")[0], time.monotonic() - began)
    best = {}
    for k, v in state["ema" if t.ema else "model"].items():     # one whole tensor at a time
        whole = v.full_tensor() if isinstance(v, DTensor) else v.detach()
        if rank() == 0:
            best[k] = whole.to("cpu", torch.float32, copy=True)
    Stop.patient = False        # not before: on a GPU a rank cannot leave others in a collective
    return best


def keys_of(parts: list, group: dist.ProcessGroup | None = None) -> str:
    """The rows of the data that a step was made of on all ranks, for the log; else nothing."""
    mine = [k for part in parts for k in getattr(part, "keys", ())]
    keys = dict.fromkeys(k for keys in from_all(mine, group) for k in keys)     # sp ranks share
    return f", clips {' '.join(map(str, keys))}" if keys else ""


def shard(rows: int, index: int | None = None, of: int | None = None) -> slice:
    """Part `index` of a batch that is cut into `of`: this rank's, of all, where it is not said."""
    i, n = (rank(), world_size()) if of is None else (index, of)
    return slice(i * rows // n, (i + 1) * rows // n)


# ---- 5. The stages -------------------------------------------------------------------------------


def train_tae(run: Run, clips) -> None:
    """tae/tae.safetensors: image training, inflation, video training, latent statistics."""
    cfg, t, folder = run.cfg, run.cfg.train_tae, run.folder / "tae"
    final, image_file = folder / "tae.safetensors", folder / "image.safetensors"
    if final.exists():
        return
    folder.mkdir(exist_ok=True)
    if not cfg.data and rank() == 0:  # before a minute is spent: can the judge be trusted?
        agreement = check_judge(cfg)
        write_json(run.folder / "judge.json", agreement)
        print(
            "judge agrees with the truth: "
            + ", ".join(f"{k} {v:.3f}" for k, v in agreement.items())
        )
    wait_for_rank0("judge")
    torch.manual_seed(cfg.seed)
    try:
        perceptual = autoencoder.vgg_perceptual() if cfg.loss.perceptual else None
    except ValueError as error:
        raise UserError(f"--loss.perceptual {cfg.loss.perceptual:g}: {error}") from None

    def losses(video: bool, batch: int):
        mine, steps = shard(batch), t.steps if video else t.image_steps
        finish = round(steps * (1 - t.finish)) if video else steps  # from here on: whole clips
        # an image batch takes 4 frames of each clip
        per_step = batch if video else -(-batch // min(4, cfg.clips.frames))

        def images(step: int) -> Tensor:
            """This rank's frames of an image batch, counted through all frames of its clips."""
            g = generator(cfg.seed, "tae", False, step)
            return torch.randperm(per_step * cfg.clips.frames, generator=g)[:batch][mine]

        def rows(step: int) -> list[int]:
            return (list(range(batch)[mine]) if video else
                    (images(step) // cfg.clips.frames).unique().tolist())

        def clips_from(first: int):
            for split, low, high in (("tae", 0, finish), ("train", finish, steps)):
                todo = ([s * per_step + i for i in rows(s)] for s in range(max(first, low), high))
                if split == "tae":          # crops of one window share its place in the curriculum
                    todo = ([(i, i // CROPS * CROPS // per_step / steps) for i in batch]
                            for batch in todo)
                if first < high:
                    yield from batches(clips, split, todo)

        def source(first: int):
            for step, (x, _) in enumerate(clips_from(first), first):
                g = generator(cfg.seed, "tae", video, step)
                image = autoencoder.is_image_step(step) and cfg.variant != "vidtwin"
                T = 1 if image else t.window
                T = x.shape[2] if step >= finish else T
                if not video:
                    frames = images(step)
                    _, clip = (frames // x.shape[2]).unique(return_inverse=True)
                    x = x.transpose(1, 2)[clip, frames % x.shape[2]][:, :, None]    # (b c 1 h w)
                else:
                    at = torch.randint(x.shape[2] - T + 1, (), generator=g).item()
                    x = x[:, :, at : at + T]
                g = generator(cfg.seed, "tae", video, step, rank())
                x = x.to(run.device)

                part = lambda model, x=x, g=g, step=step: model(x, step, g)
                part.keys = [step * per_step + i for i in rows(step)]
                yield [part]

        return source

    if cfg.variant == "vidtwin":
        torch.manual_seed(cfg.seed + 1)
        tae = autoencoder.VidTwin(cfg.vidtwin)
    else:
        image = autoencoder.TAE(replace(cfg.tae, variant="2d"))
        if not image_file.exists():
            plain = replace(cfg.loss, opl=0.0, gan=0.0)  # what refines comes when time is learnt
            model = place(run, autoencoder.Objective(image, plain, perceptual), t.precision)
            source = losses(False, t.image_batch)
            state = optimize(run, "tae/image", folder / "image", model, t, t.image_steps, source)
            if rank() == 0:
                save_tensors(image_file, only(state, "tae."))
            wait_for_rank0(f"{image_file}")
            image = autoencoder.TAE(replace(cfg.tae, variant="2d"))
        image.load_state_dict(load_tensors(image_file), strict=False)
        torch.manual_seed(cfg.seed + 1)  # the same start, were images trained just now or not
        tae = autoencoder.inflate(image, cfg.tae.variant)
    model = place(run, autoencoder.Objective(tae, cfg.loss, perceptual), t.precision)
    state = optimize(run, "tae/video", folder, model, t, t.steps, losses(True, t.batch))
    if rank() == 0:
        tae = autoencoder.autoencoder(cfg.autoencoder_config).eval()
        tae.load_state_dict(only(state, "tae."), strict=False)
        tae, stats = tae.to(run.device), autoencoder.LatentStats(tae)
        for _, _, posterior in encoded(run, tae, clips, "train", range(256), whole_clip(cfg)):
            stats.update(posterior)
        tae.lat_mean[:], tae.lat_std[:] = stats.result()
        save_tensors(final, tae.state_dict())
    wait_for_rank0("statistics")


def only(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_tae(run: Run) -> autoencoder.Autoencoder:
    """The trained autoencoder, frozen."""
    tae = autoencoder.autoencoder(run.cfg.autoencoder_config)
    tae.load_state_dict(load_tensors(run.folder / "tae" / "tae.safetensors"))
    return tae.to(run.device).eval().requires_grad_(False)


SHARD = 256  # clips in one file of latents
LARGE = 2**23  # pixels of a clip from which on the autoencoder sees one frame at a time


def streamed(cfg: Config, shape: tuple[int, int, int]) -> dict[str, bool]:
    """The arguments with which encode and decode keep a clip of T x H x W within memory."""
    return {"stream": True} if math.prod(shape) > LARGE and cfg.variant != "vidtwin" else {}


@torch.no_grad()
def encoded(run: Run, tae: autoencoder.Autoencoder, clips, split: str, rows: list[int],
            shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, list[str], object]]:
    """(clips, captions, posterior) of these rows, as many at once as memory takes."""
    n, how = max(1, min(32, LARGE // math.prod(shape))), streamed(run.cfg, shape)
    whole = max(n // CROPS, 1) * CROPS  # a worker decodes a window once, and cuts all its crops
    parts = [[(i, None, shape) for i in rows[k : k + whole]] for k in range(0, len(rows), whole)]
    for clips_, captions in batches(clips, split, parts):
        for k, x in enumerate(clips_.split(n)):
            yield x, captions[k * n : (k + 1) * n], tae.encode(x.to(run.device), **how)
            pulse()


def shards_of(clips, count: int) -> list[tuple[tuple[int, int, int], list[int]]]:
    """(shape, clips) of each shard: the clips of one shape in their order, SHARD to a shard."""
    rows: dict[tuple[int, int, int], list[int]] = {}
    for i in range(count):
        rows.setdefault(clips.shape(i), []).append(i)
    return [(shape, mine[i : i + SHARD]) for shape, mine in sorted(rows.items())
            for i in range(0, len(mine), SHARD)]


def encode_latents(run: Run, clips) -> None:
    """latents/: mean and logvar of each clip in shards, captions, and the frozen part of the text
    encoders' work; for each phase, if there are several."""
    for phase in phases(run.cfg):
        if phase.name:
            cfg = at_phase(run.cfg, phase)
            encode_phase(run, run.folder / "latents" / phase.name, clips.at(cfg))
        else:
            encode_phase(run, run.latents, clips)


def encode_phase(run: Run, folder: Path, clips) -> None:
    """The latents of one phase. What is there and whole is kept."""
    every, todo, index = slice(rank(), None, world_size()), set(), folder / "index.json"
    sums = from_rank0(read_json(index, {}).get("shards", {}) if rank() == 0 else {})
    if text_file(0) in sums:
        def intact(name: str) -> bool:
            with contextlib.suppress(OSError):
                return crc(folder / name) == sums[name]
            return False

        found = shared_out(f"{folder}", intact, list(sums), quiet=rank() != 0)
        todo = {name for name, good in zip(sums, found) if not good}
        if not todo:
            return
        if rank() == 0:
            print(f"{folder}: damaged or missing, encoded again: {some_of(todo)}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    began, M = time.monotonic(), run.cfg.clips.count
    shards = {shard_file(s): shard for s, shard in enumerate(shards_of(clips, M))}

    names = [n for n in shards if n in todo] if todo else list(shards)
    names = [n for n in names[every] if todo or not readable(folder / n)]   # by an earlier start
    tae = load_tae(run) if names else None
    bar = tqdm(total=sum(len(shards[n][1]) for n in names), desc="latents", unit="clip",
               disable=rank() != 0)
    for name in names:
        shape, rows = shards[name]
        mean, logvar, texts = [], [], []
        for _, captions, posterior in encoded(run, tae, clips, "train", rows, shape):
            mean.append(posterior.mean.cpu())
            logvar.append(posterior.logvar.cpu())
            texts += captions
            bar.update(len(captions))
        save_tensors(folder / name, {"mean": torch.cat(mean), "logvar": torch.cat(logvar)},
                     captions=json.dumps(texts))
    bar.close()
    wait_for_all(f"shards of {folder}")
    if rank() == 0:
        captions, shapes = [""] * M, []
        for name, (_, rows) in shards.items():
            with opened(folder / name) as f:
                shapes.append(f.get_slice("mean").get_shape()[1:])
                for i, text in zip(rows, json.loads(f.metadata()["captions"])):
                    captions[i] = text
        unique = {c: i for i, c in enumerate(dict.fromkeys(captions))}
        write_json(folder / "captions.json",
                   {"captions": list(unique), "of": [unique[c] for c in captions],
                    "rows": [rows for _, rows in shards.values()], "shapes": shapes})
    wait_for_rank0(f"captions of {folder}")
    captions = json.loads((folder / "captions.json").read_text())["captions"]
    texts = {text_file(s): captions[i : i + SHARD]
             for s, i in enumerate(range(0, len(captions), SHARD))}

    text = text_cond.TextConditioner(run.cfg.text).to(run.device)
    for name in list(texts)[every]:
        there = name not in todo and readable(folder / name)
        if there:                       # of an earlier start: of these captions?
            with opened(folder / name) as f:
                there = json.loads(f.metadata()["captions"]) == texts[name]
        if not there:
            with pulsing():
                features = text.encode(texts[name])
            save_tensors(folder / name, features, captions=json.dumps(texts[name]))
    wait_for_all(f"text of {folder}")
    files = [*shards, *texts, "captions.json"]
    found = shared_out(f"sums of {folder}", lambda n: crc(folder / n), files, quiet=rank() != 0)
    if rank() == 0:
        other = [n for n, s in zip(files, found) if sums.get(n, s) != s]
        if other and list(run.folder.glob("coupling.p*")):
            print(f"{folder}: other numbers than before, so the coupling is solved again: "
                  + some_of(other), file=sys.stderr)
            for name in ("coupling.pt", "coupling.partial"):
                (run.folder / name).unlink(missing_ok=True)
        write_json(index, {"shards": dict(zip(files, found))})
    run.spent("latents", time.monotonic() - began)
    barrier()


def shard_file(s: int) -> str:
    """Name of the s-th file of latents."""
    return f"shard_{s:05d}.safetensors"


def text_file(s: int) -> str:
    """Name of the s-th file of the text encoders' work, on SHARD captions."""
    return f"text_{s:05d}.safetensors"


def text_config(cfg: Config, folder: Path) -> text_cond.TextConfig:
    """cfg.text, with a place where the features of frozen encoders are kept: the run folder."""
    return replace(cfg.text, cache=cfg.text.cache or str(folder / "text"))


@dataclass
class Latents:
    """The data set that the DiT is trained on. Its files are mapped into memory when they are asked
    for, a thousand at a time, and not read: what is not asked for stays on the disk."""

    folder: Path  # its files hold mean, logvar (m, C, T', H', W'), not normalised; text features
    shapes: list[torch.Size]  # of a latent, (C, T', H', W'), in each shard
    where: Tensor  # (M, 2) int64: shard of each clip, and its row there
    of: Tensor  # (M,) int64: caption of each clip
    captions: list[str]  # unique

    def __post_init__(self):
        self.file = lru_cache(1000)(lambda name: load_tensors(self.folder / name))

    def rows(self, name: str, index: Tensor) -> Tensor:
        """`mean` or `logvar` of these clips, which have one shape: (B, C, T', H', W')."""
        return torch.stack([self.file(shard_file(s))[name][row]
                            for s, row in self.where[index].tolist()])

    def features(self, captions: Tensor) -> dict[str, Tensor]:
        """What the text encoders made of these captions, each padded to the longest, (B, L, ..)."""
        there = [(self.file(text_file(i // SHARD)), i % SHARD) for i in captions.tolist()]
        return {k: nn.utils.rnn.pad_sequence([file[k][row] for file, row in there], True)
                for k in there[0][0]}

    def buckets(self) -> list[tuple[torch.Size, Tensor]]:
        """(shape of a latent, the clips that have it)."""
        kinds = list(dict.fromkeys(self.shapes))
        kind = torch.tensor([kinds.index(s) for s in self.shapes])[self.where[:, 0]]
        return [(shape, (kind == k).nonzero().flatten()) for k, shape in enumerate(kinds)]

    @property
    def mean(self) -> Tensor:
        """(M, C, T', H', W'): all of them, read into memory. Only where all have one shape."""
        return torch.cat([self.file(shard_file(s))["mean"] for s in range(len(self.shapes))])


def load_latents(run: Run, folder: Path | None = None) -> Latents:
    """Those of a folder; of latents/, or of the last phase, where none is given."""
    folder = folder or run.latents
    table = json.loads((folder / "captions.json").read_text())
    where = torch.zeros(len(table["of"]), 2, dtype=torch.int64)
    for s, rows in enumerate(table["rows"]):
        where[rows, 0], where[rows, 1] = s, torch.arange(len(rows))
    return Latents(folder, [torch.Size(s) for s in table["shapes"]], where,
                   torch.tensor(table["of"]), table["captions"])


def statistics_of(run: Run) -> autoencoder.Autoencoder:
    """The autoencoder without its weights: it can normalise latents, and takes no memory."""
    with torch.device("meta"):
        tae = autoencoder.autoencoder(run.cfg.autoencoder_config)
    there = load_tensors(run.folder / "tae" / "tae.safetensors", ("lat_mean", "lat_std"))
    tae.load_state_dict(there, strict=False, assign=True)
    return tae


def caption_groups(latents: Latents, size: int = 32) -> Tensor:
    """(M,) int64 groups within which SDOT couples: clips of the same caption; where captions are
    unique, clusters of `size` clips or more of similar captions, by the mean of MetaCLIP's
    features, or by bags of hashed words where the encoders are toys."""
    if len(latents.captions) <= len(latents.of) / 2:
        return latents.of
    parts = torch.arange(len(latents.captions)).split(SHARD)
    if "concepts_mask" in latents.features(parts[0][:1]):
        bags = []
        for features in map(latents.features, parts):
            x, there = features["concepts"].float(), features["concepts_mask"]
            bags.append((x * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp_min(1))
        bags = torch.cat(bags)
    else:
        bags = torch.zeros(len(latents.captions), 256)
        for row, text in zip(bags, latents.captions):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % 256] += 1
    bags = nn.functional.normalize(bags, dim=1)
    return sdot.cluster(bags[latents.of], size, seed=0)


def couple_latents(run: Run) -> None:
    """coupling.pt: the dual weights of the semi-discrete coupling of N(0, I) with the normalised
    latents."""
    path, partial = run.folder / "coupling.pt", run.folder / "coupling.partial"
    if not run.cfg.coupling.startswith("sdot") or path.exists():
        if rank() == 0:
            partial.unlink(missing_ok=True)    # left by a kill between the two
        return
    began = time.monotonic()
    latents, tae, size = load_latents(run), statistics_of(run), run.cfg.sdot.cluster
    if run.cfg.coupling == "sdot-global" and rank() == 0:
        print("--coupling sdot-global ignores captions: unguided samples then do so too",
              file=sys.stderr)
    groups = caption_groups(latents, size) if run.cfg.coupling == "sdot" else None
    z = tae.normalize(latents.mean)
    coupling = sdot.Coupling.fit(
        z, groups, cfg=run.cfg.sdot, progress=True, ranks=dist.is_initialized(),
        device=run.device, checkpoint=partial)
    if rank() == 0:
        print(coupling.report())
        coupling.save(path)
    run.spent("coupling", time.monotonic() - began)
    barrier()


class TextToVideo(nn.Module):
    """What the dit stage trains: text projections (and toy encoders) and the backbone, with the
    loss as its forward. The backbone begins on the meta device: `place` or load_run fill it.
    widths: features a token of each pretrained encoder, so that none of them has to be there."""

    def __init__(self, cfg: Config, widths: dict[str, int] | None = None):
        super().__init__()
        self.text = text_cond.TextConditioner(cfg.text, widths)
        with torch.device("meta"):
            self.dit = backbone.DiT(cfg.dit)
        self.flow, self.align = cfg.flow, cfg.train_dit.align if cfg.text.mode == "toy" else 0.0

    def forward(self, features: dict[str, Tensor], drop: Tensor, x1: Tensor, x0: Tensor,
                t: Tensor) -> Tensor:
        P, mask = self.text(features, drop)
        loss = flow.loss(lambda x, t: self.dit(x, t, P, mask), x1, x0, t, self.flow)
        return loss + self.align * self.text.align(features, x1) if self.align else loss


class GatherTokens(torch.autograd.Function):
    """My tokens (B, n, P) -> everybody's (B, N, P). All ranks compute one and the same loss of
    them, and gradients are averaged over ranks: so backwards each takes its own rows, `size` times.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], axis: sample_parallel.Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        works, parts = sample_parallel.post_all_gather(x, sizes, 1, axis)
        for work in works:
            work.wait()
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.axis.size * grad.split(ctx.sizes, 1)[ctx.axis.index], None, None


def split_tokens(dit: backbone.DiT, axis: sample_parallel.Axis) -> None:
    """Sequence parallelism: from here on this rank carries its share of the tokens of a clip
    through the blocks. Attention trades tokens for heads (Ulysses, the sampler's), and every rank
    gets the whole velocity. The model is told nothing: its seams are enough."""
    sizes: list[int] = []
    patchify, positions, unpatchify = dit.patchify, dit.positions, dit.unpatchify

    def mine(tokens: Tensor) -> Tensor:
        sizes[:] = sample_parallel.split(tokens.shape[-2], axis.size)
        return tokens.split(sizes, -2)[axis.index]

    dit.patchify = lambda x: mine(patchify(x))
    dit.positions = lambda shape: mine(positions(shape))
    dit.unpatchify = lambda tokens, shape: unpatchify(
        GatherTokens.apply(tokens, list(sizes), axis), shape)
    ulysses = sample_parallel.Ulysses(axis, [sample_parallel.attention], lambda: sizes,
                                      sample_parallel.Wire())
    for block in dit.blocks:
        block.attend = ulysses


WHOLE = 2**22  # numbers of noise in a step, up to which every rank draws all of them


def draw_noise(key: tuple, batch: int, shape: torch.Size, rows: slice) -> Tensor:
    """These rows of a batch of noise (batch, *shape): each clip has a generator of its own."""
    return torch.stack([torch.randn(shape, generator=generator(*key, i))
                        for i in range(batch)[rows]])


def draw_bucket(counts: list[int], g: torch.Generator) -> int:
    """Which shape the clips of a step have, as often as there are clips of it."""
    if len(counts) == 1:
        return 0
    at = torch.randint(sum(counts), (), generator=g).item()
    return next(i for i in range(len(counts)) if at < sum(counts[: i + 1]))


@torch.no_grad()
def start_from(model: TextToVideo, path: Path, before: backbone.DiTConfig) -> None:
    """Fill the model with the weights that another phase ended with, its position tables stretched
    to the sizes of this one. One tensor at a time; each rank keeps its part."""
    with torch.device("meta"):
        grown = backbone.DiT(before)
    tables = load_tensors(path, {f"dit.{k}" for k in grown.state_dict() if k.startswith("tables.")})
    grown.load_state_dict(only(tables, "dit."), strict=False, assign=True)
    grown.expand_positions(*(s.size for s in model.dit.cfg.streams))
    tables = {f"dit.tables.{k}": v for k, v in grown.tables.state_dict().items()}
    for name, p in model.named_parameters():
        value = tables.get(name)
        copy_whole(p, load_tensors(path, {name})[name] if value is None else value)


def train_dit(run: Run) -> None:
    """dit/model.safetensors: the averaged weights of TextToVideo, phase after phase."""
    folder = run.folder / "dit"
    if (folder / "model.safetensors").exists():
        return
    before = None
    for phase in phases(run.cfg):
        if not phase.name:
            train_phase(run, "dit", run.latents, folder, folder / "model.safetensors")
            return
        here = Run(run.folder, at_phase(run.cfg, phase), run.device, run.mesh)
        final = folder / f"{phase.name}.safetensors"
        if not final.exists():
            train_phase(here, f"dit/{phase.name}", run.folder / "latents" / phase.name,
                        folder / phase.name, final, before)
        before = final, here.cfg.dit
    if rank() == 0:
        save_tensors(folder / "model.safetensors", load_tensors(final))
    wait_for_rank0(f"{folder}")


def train_phase(run: Run, stage: str, source: Path, folder: Path, final: Path,
                before: tuple[Path, backbone.DiTConfig] | None = None) -> None:
    """`final`: TextToVideo trained on the latents in `source`, from the start or from where the
    phase `before` (its weights, its config) ended."""
    cfg, t = run.cfg, run.cfg.train_dit
    latents, tae = load_latents(run, source), statistics_of(run)
    coupling, mine = None, shard(t.batch, *run.mesh.data)
    if cfg.coupling.startswith("sdot"):
        path = run.folder / "coupling.pt"
        try:
            coupling = sdot.Coupling.load(path, tae.normalize(latents.mean))
        except ValueError as error:
            raise UserError(f"{error}; remove it and start again, and it is solved again") from None
    torch.manual_seed(cfg.seed)
    widths = {}
    if cfg.text.mode == "pretrained":
        with opened(source / text_file(0)) as f:
            widths = {k: f.get_slice(k).get_shape()[2] for k in text_cond.ENCODERS}
    fresh = from_rank0(not any(folder.glob("step_*")))      # else `optimize` loads one of them
    model = place(run, TextToVideo(cfg, widths), t.precision, fresh)
    if before and fresh:
        start_from(model, *before)
    if run.mesh.tokens is not None:
        split_tokens(model.dit, run.mesh.tokens)
    buckets = latents.buckets()
    dtype = torch.promote_types(PRECISIONS[t.precision], torch.float32)  # bf16: products alone

    def batch(step: int):
        """Everything random of a step comes from its number, for the whole batch; each rank takes
        its rows. Where that is much noise, no rank draws another's."""
        g = generator(cfg.seed, "dit", step)
        shape, there = buckets[draw_bucket([len(clips) for _, clips in buckets], g)]
        little = t.batch * math.prod(shape) <= WHOLE or cfg.coupling == "minibatch"
        own = slice(None) if little else mine  # the rows that are drawn here

        def noise(what: str) -> Tensor:
            if little:
                return torch.randn(t.batch, *shape, generator=g)
            return draw_noise((cfg.seed, what, step), t.batch, shape, own)

        x0 = noise("x0")
        if coupling is None:
            rows = there[torch.randint(len(there), (t.batch,), generator=g)][own]
        else:  # the noise picks the clip, inside a group that is drawn independently of it
            groups = coupling.draw_group(t.batch, g)[own] if cfg.coupling == "sdot" else None
            rows = coupling.couple(x0, groups)
        if cfg.coupling == "minibatch":
            x0 = flow.minibatch_pairing(x0, tae.normalize(latents.rows("mean", rows)),
                                        latents.of[rows])
        posterior = noise("posterior")
        times = flow.sample_t(t.batch, cfg.flow, g)[own]
        drop = model.text.drop_mask(t.batch, t.drop, g, independent=t.drop_each)[own]
        if little:
            rows, drop, x0, times, posterior = (v[mine] for v in (rows, drop, x0, times, posterior))
        spread = (0.5 * latents.rows("logvar", rows)).exp()
        x1 = tae.normalize(latents.rows("mean", rows) + spread * posterior)
        parts = []
        for clips, dropped, *args in zip(*(v.chunk(t.accumulate)
                                           for v in (rows, drop, x1, x0, times))):
            features = {k: v.to(run.device)
                        for k, v in latents.features(latents.of[clips]).items()}
            args = features, dropped.to(run.device), *(v.to(run.device, dtype) for v in args)
            parts.append(partial(lambda args, model: model(*args), args))
            parts[-1].keys = clips.tolist()
        return parts

    def losses(first: int):
        return map(batch, range(first, t.steps))

    state = optimize(run, stage, folder, model, t, t.steps, losses)
    if rank() == 0:
        save_tensors(final, state)
    wait_for_rank0(f"{final}")


@dataclass
class Loaded:
    """A trained run, ready to use: tae, text, dit (averaged weights), all in eval mode."""

    cfg: Config
    tae: autoencoder.Autoencoder
    text: text_cond.TextConditioner
    dit: backbone.DiT
    device: torch.device

    @property
    def config(self) -> dict:
        return asdict(self.cfg)

    @property
    def fps(self) -> int:
        return self.cfg.clips.fps

    def fps_of(self, prompt: str) -> int:
        """Frames a second of the clip that a prompt asks for: as told in front of it, if at all."""
        told = re.match(r"FPS-(\d+(?:\.\d+)?) ", prompt) if self.cfg.clips.tell_fps else None
        return max(1, round(float(told[1]))) if told else self.fps

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.tae.latent_shape(*whole_clip(self.cfg))

    def prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P (B, L, D), mask (B, L) of the prompts, and P, mask of as many null prompts."""
        if self.cfg.clips.tell_fps and self.cfg.data:
            prompts = [p if p.startswith("FPS-") else f"FPS-{self.fps} {p}" for p in prompts]
        features = {k: v.to(self.device) for k, v in self.text.encode(prompts).items()}
        return *self.text(features), *self.text.null_tokens(len(prompts))

    def noise(self, seeds: list[int]) -> Tensor:
        """x0 (B, C, T', H', W'): the same seed gives the same noise on every device."""
        return torch.stack(
            [torch.randn(self.latent_shape, generator=generator("sample", s)) for s in seeds]
        ).to(self.device)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents (B, C, T', H', W') -> clips (B, 3, T, H, W) in [-1, 1]."""
        T, H, W = whole_clip(self.cfg)
        x = self.tae.decode(self.tae.denormalize(z), T, (H, W), **streamed(self.cfg, (T, H, W)))
        return x.clamp(-1, 1)

    def schedule(self, steps: int | None = None, name: str | None = None) -> Tensor:
        """The times (steps + 1,) to visit, 0 to 1; as configured, where not said."""
        s = self.cfg.sample
        return flow.schedule(name or s.schedule, steps or s.steps, shift=self.cfg.flow.shift)

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int] | None = None) -> Tensor:
        """New clips (B, 3, T, H, W) in [-1, 1] for prompts, with classifier-free guidance; steps,
        solver and scale as configured."""
        s = self.cfg.sample
        P, mask, P0, mask0 = self.prompts(prompts)
        v_fn = flow.guided(lambda x, t: self.dit(x, t, P, mask),
                           lambda x, t: self.dit(x, t, P0, mask0), s.guidance)
        x0 = self.noise(seeds if seeds is not None else list(range(len(prompts))))
        z = flow.sample(v_fn, x0, self.schedule(), solver=s.solver, cfg=self.cfg.flow)
        return self.decode(z)


def load_run(folder: str | Path, device: str | torch.device = "cpu",
             prepare: Callable[[nn.Module], object] = lambda dit: None) -> Loaded:
    """The trained stages of a run folder, or of a file that --export wrote. Reads safetensors and
    JSON only; on device "meta" no weights at all, for what only asks for shapes. prepare(dit) may
    take blocks out of the backbone first: what is not there is not read, and takes no memory."""
    folder, device = Path(folder), torch.device(device)
    if folder.is_file():
        tae_file = dit_file = folder
        of_tae, of_model = "tae.", "model."
        with opened(folder) as f:
            config = json.loads((f.metadata() or {}).get("config", "{}"))
        if not config:
            raise UserError(f"{folder}: not written by train.py --export")
        cfg = from_dict(Config, config)
    else:
        tae_file, dit_file = folder / "tae/tae.safetensors", folder / "dit/model.safetensors"
        of_tae = of_model = ""
        if not (folder / "config.json").exists():
            raise UserError(f"--workdir {folder}: no run there; train first: torchrun train.py "
                            f"--workdir {folder}")
        if not dit_file.exists():
            raise UserError(f"--workdir {folder}: not finished; continue it with the command that "
                            "began it")
        cfg = read_config(folder / "config.json")
    widths = {}
    if cfg.text.mode == "pretrained":                       # whose encoders may be elsewhere
        with opened(dit_file) as f:
            widths = {k: f.get_slice(f"{of_model}text.null.{k}").get_shape()[0]
                      for k in text_cond.ENCODERS}
    with torch.device("meta"):                              # neither memory nor random numbers
        model = TextToVideo(cfg, widths)
    tae = autoencoder.autoencoder(cfg.autoencoder_config)   # has tables that no file holds
    prepare(model.dit)
    model.text.cfg = text_config(cfg, folder) if folder.is_dir() else cfg.text
    if device.type != "meta":
        for part, path, prefix in ((model, dit_file, of_model), (tae, tae_file, of_tae)):
            names = [prefix + k for k in part.state_dict()]
            part.load_state_dict({k.removeprefix(prefix): v
                                  for k, v in load_tensors(path, names).items()},
                                 assign=part is model)
    for part in (model, tae):
        part.to(device).eval().requires_grad_(False)
    return Loaded(cfg, tae, model.text, model.dit, device)


def export(folder: Path, path: Path) -> None:
    """A finished run as one safetensors file, with its config as metadata: load_run reads it."""
    load_run(folder, "meta")                                # a run, and finished
    if folder.resolve() in path.resolve().parent.parents:   # its weights, latents, checkpoints
        raise UserError(f"--export {path}: among the run's own files; choose another")
    config = json.dumps(json.loads((folder / "config.json").read_text()))
    tensors = {f"{prefix}.{k}": v
               for prefix, name in (("tae", "tae/tae"), ("model", "dit/model"))
               for k, v in load_tensors(folder / f"{name}.safetensors").items()}
    save_tensors(path, tensors, config=config)


def make_samples(run: Run) -> None:
    """samples/: a GIF and an MP4 for each prompt, and index.json. Each rank makes some; what is
    there is kept."""
    folder, cfg, began = run.folder / "samples", run.cfg, time.monotonic()
    if cfg.data:
        captions = json.loads((run.latents / "captions.json").read_text())["captions"]
        todo = [("trained", captions[i % len(captions)])
                for i in range(min(cfg.sample.prompts, 2 * len(captions)))]
    else:
        todo = test_prompts(cfg)
    folder.mkdir(exist_ok=True)
    part_file = lambda i: folder / f"clips_{i:04d}.safetensors"
    mine = [i for i in range(0, len(todo), cfg.sample.batch)[rank() :: world_size()]
            if not readable(part_file(i))]
    parts = [todo[i : i + cfg.sample.batch] for i in mine]
    bar = tqdm(total=sum(map(len, parts)), desc="sample", unit="clip", dynamic_ncols=True,
               disable=rank() != 0 or not mine)
    with pulsing():         # a batch may take minutes, and ranks that have none wait
        loaded = load_run(run.folder, run.device) if mine else None
        if mine and cfg.text.mode == "pretrained":      # no encoder is read twice
            loaded.prompts([p for part in parts for _, p in part])
        for i, part in zip(mine, parts):
            clips = loaded.generate([p for _, p in part], list(range(i, i + len(part)))).cpu()
            for j, clip in enumerate(clips, i):
                for suffix in ("gif", "mp4"):
                    write_video(folder / f"{j:04d}.{suffix}", clip, loaded.fps_of(todo[j][1]),
                                zoom=max(1, 128 // cfg.clips.size))
            save_tensors(part_file(i), {"clips": clips})
            bar.update(len(part))
    bar.close()
    wait_for_all("samples")
    if rank() == 0:
        write_json(folder / "index.json",
                   [{"file": f"{j:04d}", "kind": kind, "prompt": prompt, "seed": j}
                    for j, (kind, prompt) in enumerate(todo)])
        if mine:
            run.spent("sample", time.monotonic() - began)


def make_report(run: Run, clips) -> dict:
    """report.json (every figure by name), index.html (a page to look at), samples.gif (the contact
    sheet)."""
    if rank() != 0:
        return {}
    began, cfg, folder = time.monotonic(), run.cfg, run.folder
    loaded = load_run(folder, run.device)
    tae = loaded.tae
    report: dict = {"scale": cfg.scale, "seed": cfg.seed, "data": cfg.data or "toy world",
                    "coupling": cfg.coupling}

    shape = whole_clip(cfg)
    (folder / "reconstructions").mkdir(exist_ok=True)
    psnr, latents, captions = [], [], []
    for x, texts, posterior in encoded(run, tae, clips, "heldout", range(64), shape):
        with torch.no_grad():
            recon = tae.decode(posterior.mean, shape[0], shape[1:], **streamed(cfg, shape)).cpu()
        psnr.append(autoencoder.psnr(recon, x))
        for i, (a, b) in enumerate(zip(x[: max(0, 12 - len(captions))], recon), len(captions)):
            pair = torch.cat([a, torch.full_like(a[..., :2], -1), b], dim=-1)
            write_video(folder / "reconstructions" / f"{i:02d}.gif", pair, cfg.clips.fps,
                        zoom=max(1, 128 // cfg.clips.size))
        latents.append(tae.normalize(posterior.mean))
        captions += texts
    report["tae_psnr_db"] = round(torch.cat(psnr).mean().item(), 2)
    report["tae_rate_percent"] = round(100 * tae.compression_rate(*shape), 3)
    report["dit_val_loss"] = round(validation_loss(loaded, torch.cat(latents), captions), 4)
    report["parameters"] = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in (("tae", tae), ("text", loaded.text), ("dit", loaded.dit))
    }

    rows = json.loads((folder / "samples" / "index.json").read_text())
    made = torch.cat(
        [load_tensors(folder / "samples" / f"clips_{i:04d}.safetensors")["clips"]
         for i in range(0, len(rows), cfg.sample.batch)]
    )
    if not cfg.data:
        report["judge"] = json.loads((folder / "judge.json").read_text())
        for row, clip in zip(rows, made):
            row["verdict"] = judge(clip, row["prompt"])
        by = lambda kind: [r["verdict"] for r in rows if r["kind"] == kind]
        figures = accuracy(by("trained"))
        figures["heldout"] = sum(v["color"] and v["shape"] and v["direction"]
                                 for v in by("heldout")) / max(1, len(by("heldout")))
        figures["words"] = accuracy(by("words")).get("text", 0.0)
        figures["words_heldout"] = accuracy(by("words_heldout")).get("text", 0.0)
        report["prompt_accuracy"] = figures
        # The judge must be seen to fail: the same clips against the prompts of others, in a fixed
        # shuffle.
        trained = [(r["prompt"], c) for r, c in zip(rows, made) if r["kind"] == "trained"]
        order = list(range(len(trained)))
        random.Random(f"shuffle/{cfg.seed}").shuffle(order)
        report["gap"] = {
            "random": accuracy([judge(trained[i][1], trained[j][0]) for i, j in enumerate(order)])
        }
    seconds = read_json(folder / "seconds.json", {})
    seconds["report"] = round(time.monotonic() - began, 2)
    seconds.pop("total", None)
    report["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    report["machine"] = {"threads": torch.get_num_threads(), "device": str(run.device),
                         "ranks": world_size(), "torch": torch.__version__}

    report["dit"] = utilisation(run, read_events(folder / "events.jsonl"))
    draw_curves(folder)
    draw_timeline(folder, report["dit"])
    shown = [i for kind in ("trained", "heldout", "words", "words_heldout")
             for i, r in enumerate(rows) if r["kind"] == kind][:: max(1, len(rows) // 24)]
    contact_sheet(folder / "samples.gif", [made[i] for i in shown[:24]],
                  [rows[i]["prompt"] for i in shown[:24]], cfg.clips.fps)
    write_page(folder, report, rows)
    write_json(folder / "report.json", report)
    return report


@torch.no_grad()
def validation_loss(loaded: Loaded, x1: Tensor, captions: list[str]) -> float:
    """Flow-matching loss on held-out latents at ten fixed times: Movie Gen's proxy for what people
    prefer. As many clips at once as are sampled at once."""
    P, mask, _, _ = loaded.prompts(captions)
    v_fn = lambda *all: torch.cat([loaded.dit(*part) for part in zip(
        *(v.split(loaded.cfg.sample.batch) for v in (*all, P, mask)))])
    return flow.validation_loss(v_fn, x1, loaded.cfg.flow, times=10)[0]


def draw_curves(folder: Path) -> None:
    """curves.png: the loss of each stage."""
    plt = autoencoder.pyplot()
    rows = read_metrics(folder / "metrics.csv")
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    figure, axes = plt.subplots(1, max(1, len(stages)), figsize=(4 * max(1, len(stages)), 3),
                                squeeze=False)
    for ax, stage in zip(axes[0], stages):
        points = [(r["step"], r["loss"]) for r in rows
                  if r["stage"] == stage and math.isfinite(r["loss"])] or [(0, 1.0)]
        ax.plot(*zip(*points), lw=0.4, alpha=0.4, color="C0")
        k = max(1, len(points) // 50)
        means = [sum(p[1] for p in points[i : i + k]) / len(points[i : i + k])
                 for i in range(0, len(points), k)]
        ax.plot([points[min(i + k // 2, len(points) - 1)][0] for i in range(0, len(points), k)],
                means, color="C0")
        ax.set(title=f"{stage}: loss", xlabel="step", yscale="log")
        ax.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def stretches(rows: list[dict]) -> list[tuple[dict, dict]]:
    """The pairs of events between which a stage made steps without an interruption."""
    return [(a, b) for a, b in zip(rows, rows[1:]) if a["stage"] == b["stage"]
            and b["event"] in ("checkpoint", "end", "stopped") and b["step"] > a["step"]]


def measured_peak(device: torch.device) -> float:
    """FLOPs a second of this device in a matrix product, fp32 on a CPU (with all its threads), bf16
    on a GPU; the best of five."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def utilisation(run: Run, rows: list[dict]) -> dict[str, float]:
    """Model FLOPs utilisation of the dit stage: three forward passes a step (what is computed twice
    counts once), by dit.py's formula, over what the ranks could do at --peak-tflops each, or as
    measured here. Clips of each shape count as often as they are drawn. {} where it did not run."""
    seconds = rank_seconds = steps = clips = flops = 0
    for phase in phases(run.cfg):
        stage, cfg, folder = "dit", run.cfg, run.latents
        if phase.name:
            stage, cfg = f"dit/{phase.name}", at_phase(run.cfg, phase)
            folder = run.folder / "latents" / phase.name
        pairs = [p for p in stretches(rows) if p[0]["stage"] == stage]
        if not pairs:
            continue
        longest = dict.fromkeys(text_cond.ENCODERS, 0)
        for path in folder.glob("text_*.safetensors"):
            with opened(path) as f:
                longest = {k: max(n, f.get_slice(k).get_shape()[1]) for k, n in longest.items()}
        L = sum(cfg.text.tokens(k, n) for k, n in longest.items())
        work, buckets = 0, load_latents(run, folder).buckets()
        for shape, there in buckets:
            N = tokens_of(cfg.dit, [shape[1:]] if len(cfg.dit.streams) == 1 else None)
            work += len(there) * sum(backbone.flops(cfg.dit, N, L))
        done = sum(b["step"] - a["step"] for a, b in pairs)
        seconds += sum(b["time"] - a["time"] for a, b in pairs)
        rank_seconds += sum((b["time"] - a["time"]) * b.get("ranks", 1) for a, b in pairs)
        steps, clips = steps + done, clips + done * phase.batch
        flops += 3 * done * phase.batch * work / cfg.clips.count
    if not seconds:
        return {}
    peak = run.peak or measured_peak(run.device)
    figures = {"clips_per_second": clips / seconds, "tflop_per_step": flops / steps / 1e12,
               "peak_tflops": peak / 1e12,
               "mfu_percent": 100 * flops / rank_seconds / peak}
    return {k: float(f"{v:.4g}") for k, v in figures.items()}


def draw_timeline(folder: Path, dit: dict[str, float]) -> None:
    """timeline.png: steps a second between checkpoints, and what happened to the run, over time;
    dit: what `utilisation` found."""
    plt = autoencoder.pyplot()
    rows = read_events(folder / "events.jsonl")
    figure, ax = plt.subplots(figsize=(10, 2.6))
    zero = rows[0]["time"] if rows else 0.0
    colors = {stage: f"C{i}" for i, stage in enumerate(dict.fromkeys(r["stage"] for r in rows))}
    marks = {"skipped": "x", "spike": "^", "rewound": "<", "stopped": "s"}
    for a, b in stretches(rows):
        rate = (b["step"] - a["step"]) / max(b["time"] - a["time"], 1e-3)
        ax.plot([(a["time"] - zero) / 60, (b["time"] - zero) / 60], [rate, rate],
                color=colors[b["stage"]], lw=3)
    for row in rows:
        at = (row["time"] - zero) / 60
        if row["event"] == "start":
            ax.axvline(at, color=colors[row["stage"]], lw=1, ls="-" if row["step"] == 0 else ":",
                       label=f"{row['stage']} " + ("starts" if row["step"] == 0 else "resumes"))
        elif row["event"] in marks:
            ax.plot(at, 0, marks[row["event"]], color="C3", transform=ax.get_xaxis_transform(),
                    clip_on=False, label=row["event"])
    labels = dict(zip(*reversed(ax.get_legend_handles_labels())))
    if labels:
        ax.legend(labels.values(), labels, fontsize=7, loc="upper right")
    ax.set(xlabel="minutes since the start", ylabel="steps a second", ylim=(0, None))
    if dit:
        ax.set_title("dit: {clips_per_second:.3g} clips a second, {mfu_percent:.3g} % of "
                     "{peak_tflops:.3g} TFLOPs a second and rank".format(**dit), fontsize=9)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "timeline.png", dpi=110)
    plt.close(figure)


def contact_sheet(path: Path, clips: list[Tensor], titles: list[str], fps: int,
                  columns: int = 6) -> None:
    """One animated GIF of many clips with their prompts under them."""
    import textwrap

    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"),
                              11)
    side, margin, caption_height = 128, 8, 44
    rows = -(-len(clips) // columns)
    width, height = (columns * (side + margin) + margin,
                     rows * (side + caption_height + margin) + margin)
    sheets = []
    for t in range(clips[0].shape[1]):
        sheet = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(sheet)
        for i, (clip, title) in enumerate(zip(clips, titles)):
            x, y = (margin + i % columns * (side + margin),
                    margin + i // columns * (side + caption_height + margin))
            frame = ((clip[:, t].clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST),
                        (x, y))
            draw.multiline_text((x, y + side + 2), "\n".join(textwrap.wrap(title, 22)[:3]), "black",
                                font, spacing=1)
        sheets.append(sheet.quantize(255, dither=Image.Dither.NONE))
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=round(1000 / fps),
                   loop=0)


def write_page(folder: Path, report: dict, rows: list[dict]) -> None:
    """index.html: figures, curves, reconstructions beside the originals, every sample with its
    prompt and verdict."""
    from html import escape

    def table(d: dict, prefix: str = "") -> str:
        out = ""
        for k, v in d.items():
            shown = f"{v:.4g}" if isinstance(v, float) else escape(str(v))
            row = f"<div>{escape(prefix + k)} <b>{shown}</b></div>"
            out += table(v, f"{prefix}{k}.") if isinstance(v, dict) else row
        return out

    def card(row: dict) -> str:
        verdict = " ".join(f'<span class="{"yes" if ok else "no"}">{k}</span>'
                           for k, ok in row.get("verdict", {}).items())
        file, prompt = f"samples/{row['file']}", escape(row["prompt"])
        image = f'<img src="{file}.gif" width="128" height="128" loading="lazy">'
        return (
            f'<figure><a href="{file}.mp4">{image}</a>'
            f"<figcaption>{prompt}<br>{verdict}</figcaption></figure>"
        )

    names = {"trained": "Prompts of the training grammar",
             "heldout": "Combinations never trained on", "words": "Words of two and three letters",
             "words_heldout": "Words never trained on"}
    sections = ""
    for kind, title in names.items():
        cards = "".join(card(r) for r in rows if r["kind"] == kind)
        sections += f"<h2>{title}</h2><div class=grid>{cards}</div>" if cards else ""
    pairs = "".join(f'<img src="reconstructions/{i:02d}.gif">' for i in range(12))
    title = escape(f"filmstrip: {folder.name}")
    (folder / "index.html").write_text(f"""<!doctype html><meta charset="utf-8">
<title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1><div class=figures>{table(report)}</div>
<h2>Loss</h2><img class=curves src="curves.png">
<h2>What happened when</h2><img class=curves src="timeline.png">
<h2>Held-out clips: original and reconstruction</h2><div class=pairs>{pairs}</div>
{sections}
""")


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em }
.figures { columns: 3; column-gap: 3em }
.figures div { display: flex; justify-content: space-between; border-bottom: 1px solid #ddd }
.grid { display: flex; flex-wrap: wrap; gap: 12px }
.pairs img { height: 128px; margin: 4px }
figure { margin: 0; width: 128px }
figcaption { font-size: 11px; line-height: 1.3 }
img { image-rendering: pixelated }
.curves { max-width: 100%; image-rendering: auto }
.yes, .no { padding: 0 3px; border-radius: 2px; font-size: 10px; display: inline-block }
.yes { background: #d7f0d7 }
.no { background: #f6cfcf; text-decoration: line-through }
"""


# ---- 6. Studies ----------------------------------------------------------------------------------
# A question about one setting is a few runs on the same autoencoder and the same latents. Each is a
# run folder, so a study that is stopped goes on where it was. The stage files ask the questions.


def fork(base: str | Path, folder: str | Path, changes: dict[str, object]) -> Run:
    """A run on the autoencoder and the latents of another, which differs in what comes after them:
    `changes` maps fields to values ("dit.conditioning": "in_context"). Where they concern `clips.`
    or `text.` (but for `without`) it shares the autoencoder alone. Where the run exists already, it
    is continued. Nothing is copied where the file system has hard links."""
    base, folder, cfg = Path(base), Path(folder), None
    if (base / "config.json").exists():
        cfg = read_config(base / "config.json")
    if not cfg or not all((base / "latents" / phase.name / "index.json").exists()
                          for phase in phases(cfg)):
        raise UserError(f"{base}: no run with latents there; first: torchrun train.py --workdir "
                        f"{base} --stage latents")
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if section:
            value = replace(getattr(cfg, section), **{key: value})
        setattr(cfg, section or key, value)
    run = open_run(finish_config(cfg), folder, torch.device("cpu"))

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    other = any(name.startswith(("clips.", "text.")) for name in changes.keys() - {"text.without"})
    for part in ("tae",) if other else ("tae", "latents"):
        if not (folder / part).exists():
            shutil.rmtree(folder / f"{part}.tmp", ignore_errors=True)
            shutil.copytree(base / part, folder / f"{part}.tmp", copy_function=link)
            (folder / f"{part}.tmp").rename(folder / part)
    for name in ("judge.json", "videos.json"):
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    return run


def _compared(folder: Path) -> None:
    torch.set_num_threads(1)
    cfg = read_config(folder / "config.json")
    run, clips = Run(folder, cfg, torch.device("cpu")), clips_of(cfg, table=folder / "videos.json")
    encode_latents(run, clips)
    couple_latents(run)
    train_dit(run)
    make_samples(run)
    make_report(run, clips)


def compare(base: Path, out: Path, variants: dict[str, dict[str, object]], seeds: int = 3,
            workers: int = 2, shown: tuple[str, ...] = COMPARED) -> list[dict]:
    """Train, sample and judge each variant (name -> changes for `fork`) on the latents of `base`,
    `seeds` times, each on one thread, `workers` at a time. Prints mean and spread of the figures in
    `shown`; writes them all to out/study.json, and out/study.png -> one row for each run. UserError
    for a base without a judge, and where `out` holds a study of other settings."""
    plt = autoencoder.pyplot()
    if (base / "config.json").exists() and not (base / "judge.json").exists():
        raise UserError(f"{base}: a run on videos; a study needs the judge of the toy world")
    runs = {(name, seed): out / "study" / f"{name}-{seed}"
            for seed in range(seeds) for name in variants}
    for (name, seed), folder in runs.items():
        fork(base, folder, {"seed": seed, "coupling": "independent", "sample.prompts": 80,
                            **variants[name]})
    todo = [folder for folder in runs.values() if not (folder / "report.json").exists()]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(_compared, (folder,)) for folder in todo]
        for result in tqdm(waiting, desc="study", unit="run", initial=len(runs) - len(todo),
                           total=len(runs)):
            result.get()
    rows = []
    for (name, seed), folder in runs.items():
        report = json.loads((folder / "report.json").read_text())
        steps = json.loads((folder / "config.json").read_text())["train_dit"]["steps"]
        rows.append({"variant": name, "seed": seed, "folder": str(folder), "steps": steps,
                     "loss": report["dit_val_loss"],
                     "parameters": report["parameters"], **report["prompt_accuracy"]})
    write_json(out / "study.json", rows)
    wide = max(map(len, variants)) + 2
    print(f"{'':{wide}}{'steps':>6}" + "".join(f"{k:>17}" for k in shown))
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 3.2))
    for j, name in enumerate(variants):
        mine = [r for r in rows if r["variant"] == name]
        values = torch.tensor([[float(r[k]) for k in shown] for r in mine])     # (seeds, shown)
        pairs = list(zip(values.mean(0).tolist(), values.std(0, correction=seeds > 1).tolist()))
        cells = "".join(f"{f'{mean:.3f} +- {spread:.3f}':>17}" for mean, spread in pairs)
        print(f"{name:{wide}}{mine[0]['steps']:>6}{cells}")
        for ax, (mean, spread) in zip(axes, pairs):
            ax.errorbar(j, mean, spread, fmt="o", color=f"C{j}", capsize=4)
    for ax, title in zip(axes, shown):
        ax.set(title="validation loss" if title == "loss" else title, xlim=(-0.5, j + 0.5))
        ax.set_xticks(range(len(variants)), variants, rotation=35, ha="right", fontsize=7)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "study.png", dpi=120)
    plt.close(figure)
    print(f"wrote {out / 'study.json'}, {out / 'study.png'}")
    return rows


# ---- 7. The plan ---------------------------------------------------------------------------------
# What the dit stage costs on GPUs that need not be there: formulas over the config, and the shapes
# of a model on the meta device. tests/test_plan.py holds them against what steps really allocate,
# send and compute.

LEGEND = """\
R: --replicate, copies of the model. S: ranks that share out one, dp x sp. K: passes of a step,
--train_dit.accumulate. b: clips of a rank in a pass. N: tokens of a clip, of P numbers; n = N / sp
on a rank. L: text tokens. D, F: width of the model and of the SwiGLU. h: heads. e: bytes of a
number in a matrix product, 4 or in bf16 2. A: what autograd keeps of a block. W: a rank's shard."""

# Movie Gen's stages [MG table 3]: frames, size, batch at first, steps, samples. The second batch is
# doubled on the way and the third falls to 512: samples are not batch x steps.
MOVIE_GEN = {"256 px images": (1, 256, 9216, 210_000, 1.94e9),
             "256 px clips": (256, 256, 1536, 185_000, 394.8e6),
             "768 px clips": (256, 768, 1536, 74_500, 73.8e6)}

PRODUCTS = {"bf16": 2, "fp32": 4, "fp64": 4}  # e; fp64, for tests, is planned as fp32


def text_tokens(cfg: Config) -> int:
    """L, the text tokens of the longest prompt: of the toy world's, else text_cond.py's limits."""
    limits = {name: cfg.text.limit(name) for name in text_cond.ENCODERS}
    if cfg.text.mode == "toy" and not cfg.data:
        words = sum(autoencoder.SCRIPTS[cfg.clips.script], ())
        sign = autoencoder.Thing("white", "sign", max(autoencoder.DIRECTIONS, key=len), "slow",
                                 max(words, key=len))
        seen = text_cond.seen_by(caption(autoencoder.World((sign,) * cfg.clips.things)))
        limits = {name: min(n, len(text_cond.toy_ids(name, seen[name])))
                  for name, n in limits.items()}
    return sum(cfg.text.tokens(name, n) for name, n in limits.items())


def tokens_of(dit: backbone.DiTConfig, sizes: Iterable[Iterable[int]] | None = None) -> int:
    """N, the tokens of a clip with latents of these sizes, one a stream; else of the largest."""
    sizes = [s.size for s in dit.streams] if sizes is None else sizes
    return sum(math.prod(n) // math.prod(s.patch) for n, s in zip(sizes, dit.streams, strict=True))


def latent_sizes(cfg: Config) -> list[list[tuple[int, ...]]]:
    """Sizes of the latents, one a stream, of each shape that clips of a phase can have. Where there
    are several aspects, `cfg.dit` has others: the rows of the tallest, the columns of the widest.
    """
    with torch.device("meta"):
        tae = autoencoder.autoencoder(cfg.autoencoder_config)
    return [[tuple(size) for _, *size in tae.streams(*shape)] for shape in shapes_of(cfg)]


def fewest_tokens(cfg: Config) -> int:
    """N of the smallest clip, over all phases: sp ranks need one each."""
    every = [at_phase(cfg, phase) for phase in phases(cfg)]
    return min(tokens_of(here.dit, sizes) for here in every for sizes in latent_sizes(here))


def training_flops(dit: backbone.DiTConfig, N: int, L: int) -> int:
    """FLOPs of one clip, forward and backward, as torch's FlopCounterMode counts them:

        3 forward + (with checkpointing) blocks' forward - 2 (N P + 256) D

    The backward of a matrix product is two, one for each factor; those of the last term would be
    for inputs, clip and time, that ask for no gradient. Text encoders and projections come on top.
    (Flash attention also forms the scores anew in its backward: the kernel's affair, not counted.)
    """
    forward = lambda depth: sum(backbone.flops(replace(dit, depth=depth), N, L))
    again = dit.depth * (forward(2) - forward(1)) if dit.checkpointing else 0
    width = sum(s.width for s in dit.streams)
    return 3 * forward(dit.depth) + again - 2 * (N * width + 256) * dit.dim


def block_bytes(dit: backbone.DiTConfig, n: int, L: int, b: int, e: int, sp: int = 1) -> int:
    """Bytes that autograd keeps of one block, for b clips of n tokens on this rank:

        b (n ((28 + 9 e) D + 4 e F + 8 h + 12) + 2 e L D + 32 D)

    Seven D in fp32: the inputs of three norms, the outputs of the two that are modulated, what the
    two gates multiply. Nine in the dtype of matrix products: the inputs of qkv, q and gate_up; q,
    k, v and output of self-attention; q and output of cross-attention. Four F: gate, up, silu(gate)
    and its product with up. A number a token and head of each softmax, a number of each norm: fused
    attention keeps no N x N scores, with a mask over the text neither. Of the text keys and values;
    eight D of modulation. Ulysses: the output of self-attention once more, from before its second
    exchange. bf16: a copy of the text. qk_norm: q and k before and behind its weight, and
    the output in another order."""
    D, half = dit.dim, e < 4
    token = (28 + 9 * e + (e if sp > 1 else 0)) * D + 4 * e * dit.ffn_width + 8 * dit.heads + 12
    if dit.qk_norm:
        token += (16 + 3 * e if half else 8 + 3 * e) * D + 8 * dit.heads
    return b * (n * token + L * (2 * e * D + (e * dit.text_width if half else 0)) + 32 * D)


def costs(cfg: Config, shapes: tuple[list, list], N: int, L: int, gpus: int, sp: int,
          replicate: int, reshard: bool) -> tuple[dict, dict]:
    """What the fullest rank holds at its fullest moment, and what a rank receives in a step:
    {name: (bytes, formula)} each. shapes: of the parameters of one block; of all outside."""
    t, D, F, depth = cfg.train_dit, cfg.dit.dim, cfg.dit.ffn_width, cfg.dit.depth
    P, e = sum(s.width for s in cfg.dit.streams), PRODUCTS[t.precision]
    R, S, K, n = replicate, gpus // replicate, t.accumulate, -(-N // sp)
    each = -(-t.batch * sp // gpus)  # clips of a rank in a step: K b
    b = -(-each // K)
    numbers = lambda shapes, S: sum(-(-s[0] // S) * math.prod(s[1:]) for s in shapes)
    (block, rest), (blocks, rests) = ([numbers(s, k) for s in shapes] for k in (1, S))
    blocks, params = depth * blocks, depth * block + rest
    W = blocks + rests

    m = {"parameters": (4 * W, "4 W"), "gradients": (4 * W, "4 W"),
         "Adam's two moments": (8 * W, "8 W")}
    if t.ema:
        m["moving average"] = 4 * W, "4 W"
    if S > 1:  # FSDP's whole copies; gradients outside of the blocks come when those are done
        held, why = (2, "one at work, one on its way") if reshard else (depth, "all of them stay")
        m["whole blocks"] = held * e * block, f"{held} e {block:,}: {why}"
        m["whole rest"] = 4 * rest, f"4 x {rest:,}: what is outside of the blocks"
        m["whole gradients"] = (e + 4) * block, f"(e + 4) {block:,}: of a block, and to be sent"
    elif e == 2:
        m["weights in bf16"] = 2 * params, "2 W: autocast's copies"
    inner = block_bytes(cfg.dit, n, L, b, e, sp)
    m["activations"] = ((4 * n * D * (b * depth + 1) + inner, "4 n D (b depth + 1) + b A: inputs "
                         f"of blocks, and of one {inner / 1e9:.3g} GB")
                        if cfg.dit.checkpointing else (depth * inner, "depth b A"))
    toy = 16 * cfg.text.width * cfg.text.layers if cfg.text.mode == "toy" else 0
    m["clips and text"] = (b * (4 * n * P + 20 * N * P + 4 * L * (2 * D + toy)),
                           f"b (4 n P + 20 N P + 4 L (2 D + {toy}))")
    swiglu, head = (4 * D + 2 * e * F, "4 D + 2e F"), (24 * D, "24 D")
    most, why = swiglu if cfg.dit.checkpointing else max(swiglu, head)
    m["backward"] = b * n * most, f"b n ({why}): gradients in a SwiGLU, or the head"

    w, times = {}, K * (2 if reshard else 1)
    if S > 1:
        w["all-gather"] = ((S - 1) * times * (e * blocks + 4 * rests),
                           f"{times} (S - 1) (e {blocks:,} + 4 x {rests:,}): FSDP's parameters")
        w["reduce-scatter"] = K * (S - 1) * 4 * W, "K (S - 1) 4 W: FSDP's gradients"
    if R > 1:
        times, why = (K, "K ") if S > 1 else (1, "")
        w["all-reduce"] = (times * 8 * W * (R - 1) // R,
                           f"{why}8 W (R - 1) / R: gradients, between replicas")
    if sp > 1:
        times = 12 if cfg.dit.checkpointing else 8  # q, k, v, out: forward, backward, and again
        w["all-to-all"] = (times * depth * each * n * D * e * (sp - 1) // sp,
                           f"{times} depth K b n D e (sp - 1) / sp: Ulysses, q k v and output")
        w["velocity"] = 4 * each * (sp - 1) * n * P, "4 K b (sp - 1) n P"
    return m, w


def plan(cfg: Config, gpus: int, sp: int = 1, replicate: int = 1, reshard: bool = True,
         memory: float = 80e9, peak: float = 989e12, utilisation: float = 0.4,
         link: float = 50e9) -> dict:
    """What the dit stage of a finished config costs, by formulas: {"model", "memory", "wire",
    "time": {name: (value, unit, formula)}, "phases", if there are several: {name: (steps, batch, N,
    seconds of compute and of wire a step, days of the longer)}, "problems": [line], "notes":
    [line], "stages": {name: (batch, steps, samples, FLOPs a step, days of compute)}}.

    A GPU has `memory` bytes, computes utilisation x peak FLOP/s and receives `link` bytes/s. Every
    step is taken to be of the largest clips, and all but "phases" is of the last phase; but all
    have to suit the ranks. UserError where gpus are no multiple of sp x replicate, and for another
    conditioning than adaln_zero."""
    if min(gpus, sp, replicate) < 1 or gpus % (sp * replicate):
        raise UserError(f"--gpus {gpus}: not a multiple of --sp {sp} x --replicate {replicate}")
    if cfg.dit.conditioning != "adaln_zero":
        raise UserError(f"--dit.conditioning {cfg.dit.conditioning}: --plan knows only adaln_zero")
    batches = {phase.batch: f" of phase {phase.name}" * bool(phase.name) for phase in phases(cfg)}
    fewest, L, speed = fewest_tokens(cfg), text_tokens(cfg), gpus * peak * utilisation
    whole, every, parts, notes, stages = cfg, phases(cfg), {}, [], {}
    for phase in every:         # what these names hold in the end is of the last one
        cfg = at_phase(whole, phase)
        with torch.device("meta"):
            model = TextToVideo(cfg)
        outside = [p.shape for k, p in model.named_parameters() if not k.startswith("dit.blocks.")]
        shapes = [p.shape for p in model.dit.blocks[0].parameters()], outside
        t, sizes = cfg.train_dit, max(latent_sizes(cfg), key=partial(tokens_of, cfg.dit))
        N = tokens_of(cfg.dit, sizes)
        m, w = costs(cfg, shapes, N, L, gpus, sp, replicate, reshard)
        held, sent = (sum(v for v, _ in figures.values()) for figures in (m, w))
        clip = training_flops(cfg.dit, N, L)
        seconds = t.batch * clip / speed
        parts[phase.name] = (t.steps, t.batch, N, seconds, sent / link,
                             t.steps * max(seconds, sent / link) / 86400)
        if sent / link > seconds:
            notes.append(f"in phase {phase.name} " * bool(phase.name) + "the wire takes longer "
                         "than the compute: more clips a rank, fewer ranks")
    block, rest = (sum(math.prod(s) for s in group) for group in shapes)
    e = PRODUCTS[t.precision]
    params, shares = cfg.dit.depth * block + rest, gpus // sp * t.accumulate
    now = {"dit.checkpointing": cfg.dit.checkpointing, "train_dit.accumulate": t.accumulate,
           "sp": sp, "reshard": reshard, "replicate": replicate, "gpus": gpus}

    def wrong(change: dict) -> list[str]:
        """What does not fit, with some of `now` changed."""
        checkpointing, parts, sp, reshard, replicate, gpus = (now | change).values()
        out, shares = [], gpus // sp * parts
        if gpus % (sp * replicate):
            return ["ranks are left over"]
        out += [f"batch {n}{phase} is no multiple of R dp K = {shares}"
                for n, phase in batches.items() if n % shares]
        if sp > min(cfg.dit.heads, fewest):
            out.append(f"sp {sp} is more than the {cfg.dit.heads} heads or the {fewest:,} tokens "
                       "of the smallest clip")
        if out and change:  # of no use, whatever the memory
            return out
        there = replace(cfg, dit=replace(cfg.dit, checkpointing=checkpointing),
                        train_dit=replace(t, accumulate=parts))
        m, _ = costs(there, shapes, N, L, gpus, sp, replicate, reshard)
        total, most = sum(v for v, _ in m.values()), max(m, key=m.get)
        if total > memory:
            out.append(f"memory {total / 1e9:.3g} GB > {memory / 1e9:g} GB, {most} alone "
                       f"{m[most][0] / 1e9:.3g} GB")
        return out

    problems = wrong({})
    if problems:
        options = {"dit.checkpointing": [True], "reshard": [True], "replicate": [1],
                   "sp": [*range(sp + 1, cfg.dit.heads + 1), *range(sp - 1, 0, -1)],
                   "gpus": [gpus << i for i in range(1, 8)],
                   "train_dit.accumulate": [a for a in (*range(t.accumulate + 1, t.batch + 1),
                                                        *range(t.accumulate - 1, 0, -1))
                                            if t.batch % a == 0]}
        options = {k: [v for v in values if v != now[k]] for k, values in options.items()}
        found = remedies(lambda c: not wrong(c), options) or [
            f"no change of {', '.join('--' + k for k in options)} helps"]
        problems = ["; ".join(problems) + ": " + " or ".join(found)]
    if e == 4 and peak > 500e12:
        notes.append(f"{peak / 1e12:g} TFLOP/s is for bf16: --train_dit.precision bf16")
    if cfg.scale == "30b" and cfg.variant != "vidtwin":
        square = replace(cfg, clips=replace(cfg.clips, aspects=(1, 1), lengths=()))
        for name, (frames, size, batch, steps, samples) in MOVIE_GEN.items():
            try:
                there = at_phase(square, Phase(name, frames, size, steps, batch, t.lr, 0.0)).dit
            except ValueError as error:     # the patches of this model do not cut it
                notes.append(f"Movie Gen's {name} are left out: {error}")
                continue
            flops = training_flops(there, tokens_of(there), L)
            stages[name] = batch, steps, samples, batch * flops, samples * flops / speed / 86400
    again, more = " + blocks' again" * cfg.dit.checkpointing, " + qk_norm's" * cfg.dit.qk_norm
    return {
        "model": {
            "parameters": (params, "", f"{cfg.dit.depth} blocks of {block:,}; {rest:,}"),
            "ranks": (gpus, "", f"R {replicate} x dp {gpus // (sp * replicate)} x sp {sp}"),
            "shard W": (m["parameters"][0] // 4, "", "sum over parameters: ceil(rows / S) columns"),
            "clips b": (-(-t.batch // shares), "",
                        f"batch {t.batch} / (R dp K), K = {t.accumulate}"),
            "tokens N": (N, "", " + ".join(f"{size} / {s.patch}" for size, s in
                                               zip(sizes, cfg.dit.streams))),
            "text tokens L": (L, "", "of the longest prompt"),
            "kept A": (block_bytes(cfg.dit, -(-N // sp), L, 1, e, sp), "B",
                       f"n ((28 + {9 + (sp > 1)}e) D + 4e F + 8h + 12) + {2 + (e < 4)}e L D + 32 D"
                       f"{more}: of a block, a clip")},
        "memory": {k: (v, "B", why) for k, (v, why) in m.items()}
        | {"sum": (held, "B", f"of {memory / 1e9:g} GB")},
        "wire": {k: (v, "B", why) for k, (v, why) in w.items()}
        | {"sum": (sent, "B", "that a rank receives in a step")},
        "time": {
            "FLOPs of a clip": (clip, "FLOP", f"3 dit.flops{again} - 2 (N P + 256) D"),
            "FLOPs of a step": (t.batch * clip, "FLOP", f"batch {t.batch} x that"),
            "compute": (seconds, "s", f"FLOPs / ({gpus:,} x {peak:.3g} x {utilisation:g})"),
            "wire": (sent / link, "s", f"sum / {link:.3g} B/s, in part behind the compute"),
            "days": (t.steps * seconds / 86400, "", f"{t.steps:,} steps of compute")},
        "phases": parts if len(every) > 1 else {},
        "problems": problems, "notes": notes, "stages": stages}


def remedies(fits: Callable[[dict], bool], options: dict[str, Collection]) -> list[str]:
    """The fewest changes after which it fits, as flags; several where several fit, and of each the
    first value that does. options: {flag: values to try, mildest first}."""
    for k in range(1, len(options) + 1):
        found = []
        for flags in itertools.combinations(options, k):
            tries = (dict(zip(flags, v)) for v in itertools.product(*map(options.get, flags)))
            change = next(filter(fits, tries), {})
            if change:
                found.append(" ".join(f"--{f} {str(v).lower()}" for f, v in change.items()))
        if found:
            return found
    return []


def print_plan(rows: dict) -> None:
    """A plan as a table, each figure beside its formula."""
    for section in ("model", "memory", "wire", "time"):
        print(f"{section}{'' if section != 'memory' else ' of the fullest rank'}")
        for name, (value, unit, formula) in rows[section].items():
            power = int(math.log10(max(value, 1)) // 3)
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g} {unit}"
            if unit in ("B", "FLOP"):
                shown = f"{value / 1000 ** power:.4g} {' kMGTPEZY'[power].strip()}{unit}"
            print(f"  {name:20} {shown:>16}  {formula}".rstrip())
    print(LEGEND)
    if rows["phases"]:
        print("The phases, each step of the largest clips; the above is of the last\n"
              f"  {'':16}{'steps':>9}{'batch':>8}{'N':>9}{'compute, s':>12}{'wire, s':>9}"
              f"{'days of the longer':>20}")
        for name, (steps, batch, N, compute, wire, days) in rows["phases"].items():
            print(f"  {name:16}{steps:9,}{batch:8,}{N:9,}{compute:12.3g}{wire:9.3g}{days:20,.2f}")
        print(f"  {'in all':16}{sum(r[-1] for r in rows['phases'].values()):67,.2f}")
    if rows["stages"]:
        print("Movie Gen's stages: batch at first, steps and samples as published; the rest by "
              "these formulas,\non these GPUs, as if every sample were an image or 256 frames, "
              "days of compute alone")
        print(f"  {'':16}{'batch':>8}{'steps':>9}{'samples':>10}{'FLOPs a step':>14}{'days':>11}")
        for name, (batch, steps, samples, flops, days) in rows["stages"].items():
            print(f"  {name:16}{batch:8,}{steps:9,}{samples:10.3g}{flops:14.3g}{days:11,.2f}")
    for mark in ("problems", "notes"):
        for line in rows[mark]:
            print(f"{'does not fit' if mark == 'problems' else 'note'}: {line}")


# ---- 8. Command line -----------------------------------------------------------------------------


def from_dict(kind, value: dict):
    """A config dataclass from JSON: lists become tuples, nested dicts nested configs."""
    default, known = kind(), {f.name for f in fields(kind)}
    unknown = set(value) - known
    if unknown:
        raise UserError(f"config.json: unknown field {', '.join(sorted(unknown))}")
    out = {}
    for name, v in value.items():
        d = getattr(default, name)
        if is_dataclass(d):
            v = from_dict(type(d), v)
        elif isinstance(v, list):
            v = tuple(v)
        if not isinstance(v, (int, float) if type(d) is float else type(d)):
            raise TypeError(f"{name} {v!r}: not of the type of {d!r}")
        out[name] = v
    return kind(**out)


def read_config(path: Path) -> Config:
    """The config.json of a run, fields that are newer than it as by default; UserError that names
    it if it is damaged."""
    try:
        return from_dict(Config, json.loads(path.read_text()))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); move it away or choose another --workdir"
                        ) from None


def flags_of(cfg: Config) -> dict[str, object]:
    """`section.field` -> default value of every field that is a flag."""
    out = {}
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if is_dataclass(value):
            out |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in fields(value)}
        else:
            out[f.name] = value
    return {k: v for k, v in out.items() if k not in DERIVED}


def convert(flag: str, text: list[str], default) -> object:
    """The words after a flag, as the type of its default."""
    kind = "numbers" if isinstance(default, tuple) else type(default).__name__
    try:
        if isinstance(default, tuple):
            value = tuple(int(t) for t in text)
        else:
            (word,) = text
            value = (type(default)(word) if not isinstance(default, bool) else
                     {"true": True, "false": False}[word.lower()])
    except (ValueError, KeyError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false",
                  "numbers": "whole numbers", "str": "one word"}
        raise UserError(f"--{flag} {' '.join(text)}: not {wanted[kind]}") from None
    for n in value if isinstance(value, tuple) else [value]:
        if isinstance(n, float) and not math.isfinite(n):           # nan, inf, and 1e400 is inf
            raise UserError(f"--{flag} {' '.join(text)}: not a finite number")
        if isinstance(n, int) and abs(n) >= 2**63:                  # torch counts in 64 bits
            raise UserError(f"--{flag} {' '.join(text)}: not a number of 64 bits")
    return value


class Parser(argparse.ArgumentParser):
    """Bad arguments give one line and exit status 2."""

    def error(self, message: str):
        print(f"train.py: {message}", file=sys.stderr)
        sys.exit(2)


def parse_args(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Flags -> Config and the few that are not part of it (workdir, stage, device)."""
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a text-to-video system and sample from it; started again, continue.",
    )
    parser.add_argument("--scale", default="toy", metavar="|".join(SCALES),
                        help="preset of all sizes (default toy)")
    parser.add_argument("--workdir", metavar="DIR", help="run folder (default runs/SCALE)")
    parser.add_argument("--data", metavar="DIR",
                        help="folder of captioned videos (default: the toy world)")
    parser.add_argument("--stage", default="all", metavar="|".join((*STAGES, "all")),
                        help="run up to and with this stage")
    parser.add_argument("--tae", metavar="|".join(VARIANTS), help="the autoencoder (default 2.5d)")
    parser.add_argument("--coupling", metavar="|".join(COUPLINGS),
                        help="which noise meets which clip")
    parser.add_argument("--text", metavar="toy|pretrained",
                        help="small encoders trained with the DiT, or UL2, ByT5, MetaCLIP")
    parser.add_argument("--steps", metavar="N", help="steps of the dit stage (= --train_dit.steps)")
    parser.add_argument("--batch", metavar="N",
                        help="clips in a step of the dit stage (= --train_dit.batch)")
    parser.add_argument("--seed", metavar="N", help="of everything random (default 0)")
    parser.add_argument("--export", metavar="FILE",
                        help="write the finished run as one .safetensors file, and end")
    for flag, default, text in (
            ("dp", 0, "ranks that share out parameters and clips (default: all that are left)"),
            ("sp", 1, "ranks that share the tokens of a clip, in the dit stage (default 1)"),
            ("replicate", None, "copies of the model, one or more nodes each, or a rank (default: "
                                "1; of toy and small, if --dp is not given, all that are left)")):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--reshard", default="true", metavar="true|false",
                        help="free a block's parameters after its forward pass (default true)")
    parser.add_argument("--peak-tflops", type=float, default=0.0, metavar="X",
                        help="of one GPU, for the report's utilisation (default: measured), and "
                             "for --plan (default: 989, an H100 in bf16)")
    parser.add_argument("--plan", action="store_true",
                        help="print what the dit stage would take, and end; needs no GPU")
    planned = (
        ("gpus", int, 8, 10**7, "their number (default 8)"),
        ("memory", float, 80.0, 1e9, "of one, GB (default 80)"),
        ("link", float, 50.0, 1e9, "what one can receive, GB a second (default 50: 400 Gbit/s)"),
        ("utilisation", float, 0.4, 1, "of the peak that is reached (default 0.4)"))
    for flag, kind, *_, text in planned:
        parser.add_argument(f"--{flag}", type=kind, metavar="N", help=f"--plan: {text}")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS",
                        help="several ranks: how long one waits for a silent one (default 600)")
    parser.add_argument("--device", default="", metavar="cpu|cuda",
                        help="default: cuda if there is one")
    special = {"scale", "data", "coupling", "seed"}
    every = parser.add_argument_group("every field of the configs (defaults of --scale toy)")
    for name, value in flags_of(finish_config(SCALES["toy"]())).items():
        if name not in special:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            every.add_argument(f"--{name}", nargs="+", metavar="X", help=f"{shown!s}" or "empty")
    args = parser.parse_args(argv)

    one_of("--scale", args.scale, SCALES)
    one_of("--stage", args.stage, (*STAGES, "all"))
    one_of("--device", args.device, ("", "cpu", "cuda"))
    args.reshard = convert("reshard", [args.reshard], True)
    for name, least in (("dp", 0), ("sp", 1), ("replicate", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if not 0 <= args.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {args.peak_tflops:g}: must be above 0")
    for name, _, default, most, _ in planned:
        value = getattr(args, name)
        if value is None:
            setattr(args, name, default)
        elif not 0 < value <= most:
            raise UserError(f"--{name} {value:g}: must be above 0, and at most {most:g}")
        elif not args.plan:
            raise UserError(f"--{name} {value:g}: needs --plan; a run has the ranks of torchrun")
    if args.replicate is None:      # where all of it fits many times over, copies are the faster
        ranks = args.gpus if args.plan else int(os.environ.get("WORLD_SIZE", 1))
        copies = args.scale in ("toy", "small") and not args.dp and ranks % args.sp == 0
        args.replicate = ranks // args.sp if copies else 1
    if not 0 < args.timeout <= 1e9:                  # torch counts it in nanoseconds of 64 bits
        raise UserError(f"--timeout {args.timeout:g}: must be above 0, and at most 1e9")
    if args.export and not args.export.endswith(".safetensors"):
        raise UserError(f"--export {args.export}: must end in .safetensors")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    cfg = SCALES[args.scale]()
    given = {k: v for k, v in vars(args).items() if k in flags_of(cfg) and k not in special}
    for short, long in (("steps", "train_dit.steps"), ("batch", "train_dit.batch")):
        if getattr(args, short) is not None:
            given[long] = [getattr(args, short)]
    defaults = flags_of(cfg)
    for name in ("data", "coupling", "seed"):
        if getattr(args, name) is not None:
            given[name] = [getattr(args, name)]
    if args.tae is not None:
        one_of("--tae", args.tae, VARIANTS)
        cfg.variant = args.tae
    if args.text is not None:
        one_of("--text", args.text, ("toy", "pretrained"))
        cfg.text = replace(cfg.text, mode=args.text)
    changes: dict[str, dict[str, object]] = {}
    for name, text in given.items():
        if text is not None:
            section, _, key = name.rpartition(".")
            changes.setdefault(section, {})[key] = convert(name, text, defaults[name])
    for key, value in changes.pop("", {}).items():
        setattr(cfg, key, value)
    for section, values in changes.items():  # together: a width and its number of heads
        try:
            setattr(cfg, section, replace(getattr(cfg, section), **values))
        except ValueError as error:  # a stage's own check, which names the field
            raise UserError(f"--{section}.{error}") from None
    if cfg.data and given["clips.count"] is None and args.scale in ("toy", "small"):
        cfg.clips.count = 1024  # windows of real videos cost a decoding each
    for name in ("data", "workdir", "export"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} '': no such {'file' if name == 'export' else 'folder'}")
    try:
        cfg = finish_config(cfg)
    except ValueError as error:
        raise UserError(str(error)) from None
    args.workdir = Path(args.workdir or f"runs/{args.scale}")
    return cfg, args


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """`field: there -> here` for each field in which two configs differ."""
    out = []
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(f"{prefix}{key}: {x} there, {y} here")
    return out


def check_shares(cfg: Config, mesh: Mesh, folder: Path, last: str = "all") -> None:
    """UserError where clips or heads cannot be shared out to the ranks in what is still to do, up
    to the stage `last`."""
    shares, parts = mesh.data[1], cfg.train_dit.accumulate
    todo = [("--batch" if not phase.name else f"--batch {cfg.train_dit.batch}, in phase "
             f"{phase.name}", phase.batch, shares * parts) for phase in phases(cfg)
            if last not in ("tae", "latents", "coupling")
            and not (folder / "dit" / f"{phase.name or 'model'}.safetensors").exists()]
    dit = bool(todo)
    if not (folder / "tae/tae.safetensors").exists():
        todo.append(("--train_tae.batch", cfg.train_tae.batch, world_size()))
        if cfg.train_tae.image_steps and not (folder / "tae/image.safetensors").exists():
            todo.append(("--train_tae.image_batch", cfg.train_tae.image_batch, world_size()))
    for flag, n, of in todo:
        if n % of:
            why = f" x --train_dit.accumulate {parts}" if parts > 1 and "--batch" in flag else ""
            raise UserError(f"{flag} {n}: not a multiple of the {of // (parts if why else 1)} ranks"
                            + why)
    if not (dit and mesh.sp > 1):
        return
    for what, most in (("attention heads", cfg.dit.heads),
                       ("tokens in the smallest clip", fewest_tokens(cfg))):
        if mesh.sp > most:
            raise UserError(f"--sp {mesh.sp}: more ranks than {what}, {most}")
    if cfg.dit.conditioning == "in_context":
        raise UserError(f"--sp {mesh.sp}: not with --dit.conditioning in_context, whose time token "
                        "is no video token")


def check_text(cfg: Config, folder: Path, last: str = "all") -> None:
    """UserError, before hours are spent, where a text encoder is not to be had that captions or
    prompts will need in what is still to do, up to the stage `last`."""
    captions = last != "tae" and not all((folder / "latents" / phase.name / "index.json").exists()
                                         for phase in phases(cfg))
    prompts = last in ("sample", "report", "all") and not (folder / "samples/index.json").exists()
    if rank() != 0 or not (captions or prompts and not cfg.text.cache):     # may be in the cache
        return
    try:
        text_cond.check_sources(cfg.text)
    except ValueError as error:
        raise UserError(f"--text.{error}" + ("" if captions else "; samples need it: to end before "
                                             "them, --stage dit")) from None


def open_run(cfg: Config, folder: Path, device: torch.device, mesh: Mesh | None = None,
             patience: float | None = None) -> Run:
    """The run folder, new or continued; a folder of another configuration (but for HOW) is refused,
    and left as it is. patience: the seconds to wait to be `alone` in it, before it is changed."""
    path, mine, changed = folder / "config.json", json.loads(json.dumps(asdict(cfg))), []
    if path.exists():
        there = json.loads(json.dumps(asdict(read_config(path))))
        changed = differences(there, mine)
        moved = "data" * bool(cfg.data and there["data"])               # it keeps to videos.json
        other = [x for x in changed if x.split(":")[0] not in HOW | {moved}]
        if other:
            raise UserError(
                f"--workdir {folder}: holds a run of another configuration ({'; '.join(other)}); "
                "choose another --workdir"
            )
    elif folder.exists() and {p.name for p in folder.iterdir()} - {
            "config.json.tmp", "lock", "seen"}:
        raise UserError(
            f"--workdir {folder}: not empty, and not a run of train.py; choose another --workdir"
        )
    barrier()
    run = Run(folder, cfg, device, mesh)
    if patience is not None:
        seen = folder / "seen"
        run.lock = alone(folder, patience) if rank() == 0 else None
        with contextlib.suppress(OSError):          # a full disk is told of where it matters
            if rank() == 0:
                seen.touch()
        wait_for_rank0("lock")
        sees = from_all(seen.exists())
        if rank() == 0:
            seen.unlink(missing_ok=True)
        if sees[0] and not all(sees):
            raise UserError(f"--workdir {folder}: rank {sees.index(False)} does not see the files "
                            "that rank 0 writes there; it has to be one folder for all nodes")
    if rank() == 0 and (changed or not path.exists()):
        write_json(path, mine)
    barrier()
    return run


def alone(folder: Path, seconds: float):
    """The open file by which this process has the run folder to itself, until it ends, however it
    ends; None where the file system knows no locks. Another process that has it is waited for, as
    it may be one that was cut off, and ends when it finds that out. UserError after `seconds`."""
    path, until, said = folder / "lock", time.monotonic() + seconds, False
    file = path.open("a+")
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            other = f"--workdir {folder}: another run works there ({path.read_text() or 'unknown'})"
            if time.monotonic() > until:
                raise UserError(f"{other}; end it or choose another --workdir") from None
            if not said:
                print(f"{other}; waiting {seconds:g} s for its end", file=sys.stderr)
            said = True
            time.sleep(min(1.0, seconds))
        except OSError:
            return None
        else:
            with contextlib.suppress(OSError):      # a full disk is told of where it matters
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file,
                      flush=True)
            return file


def work(cfg: Config, args: argparse.Namespace) -> None:
    """Ranks, data, run folder, then stage after stage."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.plan:
        if args.dp:
            dp_of(args.gpus, args.dp, args.sp, args.replicate, "--gpus is")
        print_plan(plan(cfg, args.gpus, args.sp, args.replicate, args.reshard, 1e9 * args.memory,
                        1e12 * (args.peak_tflops or 989), args.utilisation, 1e9 * args.link))
        return
    if args.export:
        export(args.workdir, Path(args.export))
        print(f"wrote {args.export}")
        return
    Stop.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # torchrun killed takes no rank with it: PR_SET_PDEATHSIG has each hear SIGTERM then
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            ranks, here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if ranks > here:
                raise UserError(f"--nproc_per_node {ranks}: {here} GPUs here, one rank each; or "
                                "--device cpu")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if (int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
                and os.environ.get("RANK") == "0"
                and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
            print("--max-restarts: a restarted rank finds the dead one's address in torchrun's "
                  "store; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", file=sys.stderr)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(seconds=args.timeout))
    elif "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # some versions of torchrun allow each rank one thread; a single rank may have them all
        torch.set_num_threads(cores())
    mesh = make_mesh(args.dp, args.sp, args.replicate, args.reshard, device.type)
    check_shares(cfg, mesh, args.workdir, args.stage)
    check_text(cfg, args.workdir, args.stage)
    wait_for_rank0("text encoders")
    table = args.workdir / "videos.json"
    clips = clips_of(cfg, rank() != 0, table)
    run = open_run(cfg, args.workdir, device, mesh, args.timeout + 60)
    if cfg.data and rank() == 0 and not table.exists():
        write_json(table, clips.table())
    run.peak = 1e12 * args.peak_tflops
    stages = {"tae": lambda: train_tae(run, clips), "latents": lambda: encode_latents(run, clips),
              "coupling": lambda: couple_latents(run), "dit": lambda: train_dit(run),
              "sample": lambda: make_samples(run), "report": lambda: make_report(run, clips)}
    report = None
    for name, stage in stages.items():
        report = stage()
        wait_for_rank0(name)
        if asked := next(filter(None, from_all(Stop.asked)), ""):     # in the last step of a stage
            raise Stopped(f"stopped by {asked} after {name}; start again to continue")
        if name == args.stage:
            break
    if report:
        print(json.dumps(report, indent=1))
        print(f"look at {run.folder / 'index.html'}")


def first_to_say() -> bool:
    """Whether no other rank has told the user yet: what only one of them met is said, too. Before
    they have met: whether this is the first on its machine."""
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    with contextlib.suppress(dist.DistError):
        return dist.distributed_c10d._get_default_store().add("said", 1) == 1
    return True


def ours(error: BaseException) -> bool:
    """Whether a file of this repository raised it: then it is one of our checks, and says what is
    wrong with the input. Any other ValueError is a defect, and keeps its traceback."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).parent == Path(__file__).parent


def too_large(error: BaseException) -> str:
    """The line for memory that could not be had, of a GPU or of the CPU; "" for another error."""
    text = str(error)
    if "calculation overflowed" in text or "Overflow when unpacking" in text:
        return "sizes that ask for a tensor of more bytes than 64 bits count"
    asked = re.search("DefaultCPUAllocator.* allocate ([0-9]+) bytes", text)
    if not asked and not isinstance(error, torch.OutOfMemoryError):
        return ""
    what = (f"out of memory. Tried to allocate {int(asked[1]) / 2**30:,.2f} GiB." if asked else
            text.split(" GPU ")[0])
    return (f"{what} Go on with --train_dit.accumulate or --dit.checkpointing true, in the tae "
            "stage with --tae.checkpointing true (or --vidtwin.checkpointing); see --plan")


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status."""
    try:
        work(*parse_args(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        if not (isinstance(error, UserError) or ours(error)):
            raise
        if first_to_say():
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        if rank() == 0:
            print(f"train.py: {error}", file=sys.stderr)
    except (RuntimeError, TypeError) as error:
        if large := too_large(error):
            if first_to_say():
                print(f"train.py: {large}", file=sys.stderr, flush=True)
            return 2
        if world_size() == 1 or not sample_parallel.is_loss(error):
            raise
        lost = silent_ranks()
        if rank() == min(set(range(world_size())) - set(lost)):
            print(f"train.py: rank {', '.join(map(str, lost)) or 'unknown'}: hangs, or is gone; "
                  "start again to continue at the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)                            # not through a process group that waits for the dead
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        Stop.forget()
    return 0


if __name__ == "__main__":
    status = main()
    for number in Stop.signals:     # they often come in pairs: the second changes nothing any more
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
