"""train.py: the whole system, from captioned clips to a model, and from prompts to new clips.

    stage     reads                   leaves in the run folder
    tae       clips                   tae/: tae.safetensors, the autoencoder with latent statistics
                                      (image.safetensors, the weights before inflation to video)
    latents   tae, clips, captions    latents/: mean and logvar of each clip, text features
    coupling  tae, latents            coupling.pt: which noise meets which clip (only sdot)
    dit       tae, latents, coupling  model.safetensors: autoencoder, text, DiT, config
    sample    model (--data: latents) samples/: a clip for each prompt
    report    everything above        report.json, index.html and its pictures: samples.gif,
                                      curves.png, reconstructions/

Also: config.json, every setting; log.jsonl, one JSON object a line (time, stage, step, then
loss, lr and grad_norm, or an event); judge.json, how far the toy world's judge can be trusted;
videos.json, the videos of --data; tae/image/step_*, tae/video/step_* and dit/step_*, the last two
checkpoints of each training (three while one is written); lock, against a second run.

This file connects the others (tae.py, text_cond.py, dit.py, flow.py, sdot.py, the toy world of
world.py, and sample_parallel.py for --sp), and adds what they do not have: videos, ranks,
checkpoints, the loop, the command line. It begins with the loop, `optimize`, which trains both
models. `Checkpoints` (section 4) writes and reads the step_* folders. `dit_batches` (section 5)
makes the noise, latents and text of a step of the DiT; `TextToVideo.forward` turns them into the
loss. --dp, --replicate and --sp act in `data_parallel`, in `Mesh`, `make_mesh`, `place` and
`split_tokens` (section 3), and in `dit_batches`. `work` (section 9) goes through the stages.

Run.   torchrun train.py --scale toy                    # all stages; no download, no GPU, no data
       torchrun train.py --scale toy --data DIR --workdir runs/mine       # captioned videos
       torchrun --nproc_per_node 2 train.py --scale toy --dp 2            # parameters sharded
       torchrun train.py --init runs/mine --data DIR --workdir runs/more  # from another's weights
       python train.py --scale 30b --plan --gpus 6144 --sp 12   # its memory and time, without a GPU
       python train.py --help                           # every setting is a flag

Started again, a run continues: finished stages are skipped (the report is made again), an
unfinished one resumes at its last checkpoint. What training draws is derived from (seed, stage,
step), in the autoencoder also from the rank, so a resumed run gives the result of an uninterrupted
one. Ctrl-C, SIGTERM and SIGUSR1 in a training loop write a checkpoint first. No file of a run can
execute code when it is read: tensors are safetensors or read with weights_only=True, and the table
of contents of a checkpoint, which is a pickle, may name only the classes of such a table.

Letters: B batch, T frames, H W height and width, M clips in the data set, P text embedding, L text
tokens, N video tokens, t flow time; hp the settings of a training.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import fcntl
import inspect
import io
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
import typing
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")   # or DDP warns that no parameter is unused
if __name__ == "__main__":      # for `listen`; before numpy starts threads, which inherit the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dit as backbone
import flow
import sample_parallel
import sdot
import tae as autoencoder
import text_cond
import world
from flow import FlowConfig
from sample_parallel import everyone
from sdot import SDOTConfig

# ---- 1. The loop ---------------------------------------------------------------------------------
# It trains the autoencoder and the DiT alike; what differs is `batch` (section 5), and the model,
# whose forward is the loss.


def optimize(run: "Run", stage: str, model: nn.Module, hp: "TrainConfig", steps: int,
             batch: Callable[[int], list[tuple]], workers: int = 0) -> dict[str, Tensor]:
    """Train a model from `place` for `steps` -> its weights (averaged if hp.ema), whole, on rank 0.

    batch(step) returns a tuple of model.forward's arguments for each part of this rank's clips;
    forward returns the loss. `batch` is pure, so a resumed loop only starts at another number.
    Checkpoints are written to the run's folder `stage`/step_*.

    Skips a step whose loss or gradient is not finite; UserError after three in a row."""
    weights = dict(model.named_parameters())
    optimizer, net, bad = adamw(weights, hp), data_parallel(run, model), 0
    average = {k: p.detach().clone() for k, p in weights.items()} if hp.ema else {}
    checkpoints = Checkpoints(run.folder / stage, {
        "model": {k: p.data for k, p in weights.items()}, "average": average,
        "optimizer": {k: optimizer.state[p] for k, p in weights.items()}}, run.mesh)
    first = checkpoints.load()
    run.log(stage, first, event="resume" if first else "begin", ranks=world_size())
    TRAINING.set()
    todo = tqdm(range(first, steps), stage, steps, initial=first, unit="step", mininterval=1.0,
                dynamic_ncols=True, disable=rank() != 0)
    for step, parts in zip(todo, read_ahead(batch, range(first, steps), workers)):
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, hp, steps)
        loss = forward_backward(net, parts, hp.precision == "bf16")
        total = nn.utils.get_total_norm([p.grad for p in weights.values() if p.grad is not None])
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        # Wait until the last checkpoint is on disk: then a kill loses at most `every` steps. (The
        # weights may change before that, as it is written from a copy.)
        checkpoints.wait()

        # All ranks agree on the loss, and whether any of them was asked to stop.
        loss, norm, stop = mean_over_ranks(loss, norm, torch.full_like(loss, STOP.is_set()))
        todo.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if math.isfinite(loss) and math.isfinite(norm):
            if norm > hp.clip:
                nn.utils.clip_grads_with_norm_(weights.values(), hp.clip, total)
            optimizer.step()
            if average:
                torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()],
                                     1 - min(hp.ema, (step + 1) / (step + 10)))
            run.log(stage, step, loss=loss, lr=lr, grad_norm=norm)
            bad = 0
        else:
            run.log(stage, step, event="skipped", detail=f"loss {loss}, gradient norm {norm}")
            bad += 1
            if bad == 3:
                raise UserError(f"{stage}: loss {loss}, gradient norm {norm} at step {step}, the "
                                f"third step in a row; lower the learning rate {hp.lr:g}")
        optimizer.zero_grad()

        if stop or (step + 1) % hp.every == 0 and step + 1 < steps:
            checkpoints.save(step + 1)
        if stop:
            checkpoints.wait()
            todo.close()
            run.log(stage, step + 1, event="stopped")
            raise Stopped(f"{stage}: stopped after step {step + 1}, checkpoint written; start "
                          "again to continue")
    TRAINING.clear()
    checkpoints.wait()
    run.log(stage, steps, event="end")
    return gathered(average or checkpoints.state["model"])


def forward_backward(net: nn.Module, parts: list[tuple], bf16: bool) -> Tensor:
    """Compute the gradients of a step, one part of this rank's clips after the other -> the loss.
    DDP averages them once, after the last part."""
    loss, device = 0.0, next(net.parameters()).device.type
    for k, part in enumerate(parts):
        not_yet = isinstance(net, DistributedDataParallel) and k + 1 < len(parts)
        with (torch.autocast(device, torch.bfloat16, enabled=bf16),
              net.no_sync() if not_yet else contextlib.nullcontext()):
            part_loss = net(*part) / len(parts)
        part_loss.backward()
        loss = loss + part_loss.detach()
    return loss


def read_ahead(fn: Callable, items: Iterable, workers: int = 0) -> Iterator:
    """Map fn over items; `workers` threads, if any, compute ahead. Threads are enough:
    PyAV releases the GIL while it decodes."""
    if not workers:
        yield from map(fn, items)
        return
    items, pool = iter(items), ThreadPoolExecutor(workers)
    ahead = collections.deque(pool.submit(fn, item) for item in itertools.islice(items, workers))
    try:
        while ahead:
            ahead.extend(pool.submit(fn, item) for item in itertools.islice(items, 1))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def data_parallel(run: "Run", model: nn.Module) -> nn.Module:
    """Wrap a model in DDP if each of several ranks has a copy. find_unused_parameters keeps DDP
    from rebuilding its buckets after the first step, which would make a resumed run sum gradients
    in another order."""
    if run.mesh.fsdp is not None or world_size() == 1:
        return model
    return DistributedDataParallel(model, bucket_cap_mb=4, find_unused_parameters=True,
                                   gradient_as_bucket_view=True)


def adamw(weights: dict[str, nn.Parameter], hp: "TrainConfig") -> torch.optim.AdamW:
    """Make AdamW with weight decay for matrices and kernels. Biases and norms have none, nor do
    tables and embeddings, whose rarely used rows would only shrink. AdamW's state is allocated now,
    for a checkpoint to be loaded into."""
    none = lambda name: any(word in name for word in ("table", "embedding", "qk_weight"))
    decay = [p for k, p in weights.items() if p.ndim >= 2 and not none(k)]
    rest = [p for k, p in weights.items() if p.ndim < 2 or none(k)]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], hp.lr,
                                  (0.9, hp.beta2), weight_decay=hp.weight_decay, fused=True)
    for p in weights.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, hp: "TrainConfig", steps: int) -> float:
    """Warm up linearly, stay flat, then fall as a cosine to 0 in the last `decay` of the steps."""
    up = min(1.0, (step + 1) / max(1, hp.warmup))
    past = max(0.0, (step / steps - (1 - hp.decay)) / max(hp.decay, 1e-9))
    return hp.lr * up * 0.5 * (1 + math.cos(math.pi * past))


def mean_over_ranks(*values: Tensor) -> list[float]:
    """Average scalars over all ranks."""
    sums = torch.stack([v.double() for v in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums / world_size()).tolist()


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather whole tensors in fp32 on the CPU of rank 0, one after the other; {} on other ranks."""
    out = {}
    for k, v in state.items():
        whole = v.full_tensor() if isinstance(v, DTensor) else v.detach()
        if rank() == 0:
            out[k] = whole.to("cpu", torch.float32, copy=True)
    return out


class Stopped(Exception):
    """The run was asked to end, and can be continued: exit status 0."""


STOP, TRAINING = threading.Event(), threading.Event()
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}       # blocked at the top of this file


def listen() -> None:
    """In a thread, wait for Ctrl-C, SIGTERM and SIGUSR1 (SLURM may send one before it ends a job).
    While a model trains, the first signal makes `optimize` write a checkpoint and stop.
    Otherwise, or at a second signal 3 s later, the process ends at once: files that later stages
    read are written whole or not at all. A handler in the main thread would be delayed by whatever
    that thread waits for."""

    def hear() -> None:
        name = signal.Signals(signal.sigwait(SIGNALS)).name
        if TRAINING.is_set():
            STOP.set()
            heard = time.monotonic()
            while time.monotonic() < heard + 3:     # Ctrl-C comes again, from torchrun
                name = signal.Signals(signal.sigwait(SIGNALS)).name
        status = 0 if world_size() == 1 and not STOP.is_set() else 1
        threading.Timer(2, os._exit, [status]).start()      # as `say` may block
        say(f"train.py: ended by {name}; start again to continue")
        os._exit(status)

    threading.Thread(target=hear, daemon=True).start()


# ---- 2. Configuration ----------------------------------------------------------------------------
# The comment beside a field is its --help, its type is what the flag accepts, and `__post_init__`
# holds the bounds. What concerns more than one config is checked in `finish`.


TINY = math.ulp(0.0)            # the least number above 0


class UserError(ValueError):
    """A mistake that the user can correct: printed as one line, exit status 2."""


@contextlib.contextmanager
def named(flag: str):
    """Turn a ValueError into a UserError that begins with the name of a flag."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{flag}{error}") from None


def within(cfg, low: float, high: float, *names: str) -> None:
    """Raise ValueError unless each of these fields lies in [low, high]."""
    limits = ("above 0" if low == TINY else f"{low:g} or more" if high == math.inf else
              f"from {low:g} to {high:g}")
    for name in names:
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"{name} {getattr(cfg, name)}: must be {limits}")


@dataclass
class ClipConfig:
    """What a clip is, and how many there are."""

    frames: int = 16  # T
    size: int = 32  # H = W
    fps: int = 8  # frames a second of the files that are written, if a prompt has no FPS-N
    things: int = 1  # toy world: moving objects in a clip
    script: Literal[tuple(world.SCRIPTS)] = "latin"  # toy world: the letters of its signs
    signs: float = 0.4  # toy world: share of signs among the objects that the DiT is trained on
    count: int = 6144  # M, the clips that the DiT is trained on (toy, small with --data: 1024)
    others: tuple[str, ...] = ()  # further shapes in the dit stage, as 8x32x32 16x24x40 (T x H x W)
    images: float = 0.0  # dit stage: images for each clip of several frames (Movie Gen: 0.1)
    max_interval: int = 4  # videos: take every n-th frame, n drawn from 1 to this
    tell_fps: bool = False  # videos: begin captions with the clip's frame rate, FPS-12
    workers: int = 2  # videos: threads that decode ahead

    def __post_init__(self):
        within(self, 1, math.inf, "frames", "fps", "things", "count", "max_interval")
        within(self, 2, math.inf, "size")
        within(self, 0, math.inf, "workers")
        within(self, 0, 1e9, "images")
        within(self, 0, 1, "signs")
        for text in self.others:
            if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}", text):
                raise ValueError(f"others {text}: not frames x height x width, as 8x32x32")

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, H, W of a clip, and of a sample."""
        return self.frames, self.size, self.size

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The (T, H, W) that clips of the dit stage can have; that of a sample comes first."""
        clips = [self.shape, *(tuple(map(int, text.split("x"))) for text in self.others)]
        return list(dict.fromkeys(clips + [(1, H, W) for _, H, W in clips if self.images]))

    def drawn_shape(self, key: str, aspect: float | None = None) -> tuple[int, int, int]:
        """Draw (T, H, W): first image or clip, then T, then the shape of that T whose H / W is
        nearest to the aspect ratio; without one, any shape of that T."""
        if len(self.shapes) == 1:
            return self.shape
        rng = random.Random(key)
        image = rng.random() < self.images / (1 + self.images)
        lengths = sorted({T for T, _, _ in self.shapes if T > 1 or not self.images})
        T = 1 if image or not lengths else rng.choice(lengths)
        sides = [s for s in self.shapes if s[0] == T]
        if aspect is None:
            return rng.choice(sides)
        return min(sides, key=lambda s: abs(math.log(s[1] / s[2] / aspect)))


@dataclass
class TrainConfig:
    """Settings of a training, common to the autoencoder and the DiT."""

    steps: int = 1000  # optimizer steps
    batch: int = 8  # clips in a step, over all ranks
    lr: float = 2e-3  # learning rate at its highest
    warmup: int = 20  # steps of linear warm-up
    decay: float = 1.0  # share of the steps, at the end, in which the rate falls to 0 (cosine)
    weight_decay: float = 0.01  # of matrices and kernels; tables, norms and biases have none
    beta2: float = 0.99  # of AdamW
    clip: float = 1.0  # the largest gradient norm
    ema: float = 0.0  # decay of the weights' moving average; 0: none
    every: int = 200  # steps between checkpoints: a kill loses at most that many
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products (--scale small on a GPU: bf16)

    def __post_init__(self):
        within(self, 0, 1e12, "steps", "warmup")
        within(self, 1, 1e12, "batch", "every")
        within(self, 0, math.inf, "weight_decay")
        within(self, 0, 1, "decay", "ema")
        within(self, 0, 0.9999, "beta2")
        within(self, TINY, math.inf, "lr", "clip")


@dataclass
class TrainTAE(TrainConfig):
    """How the autoencoder is trained."""

    image_steps: int = 0  # steps on single frames, before the model is inflated to video
    image_batch: int = 32  # frames in such a step
    crowd: int = 1  # toy world: objects in a training clip; many, as background teaches nothing
    signs: float = 0.4  # toy world: share of signs in such a crowd; letters are the hardest part
    window: int = 16  # frames of a training clip
    motion: int = 1  # curriculum: clips speed up to this many times; 1: off
    finish: float = 0.0  # share of the steps, at the end, on whole clips without a crowd

    def __post_init__(self):
        super().__post_init__()
        within(self, 0, 1e12, "image_steps")
        within(self, 1, 1e12, "image_batch", "window", "motion")
        within(self, 1, 100, "crowd")
        within(self, 0, 1, "finish", "signs")


@dataclass
class TrainDiT(TrainConfig):
    """How the DiT and the toy text encoders are trained."""

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # of matrix products; fp64: for tests
    accumulate: int = 1  # parts of a rank's clips in a step, done one by one
    drop: float = 0.1  # share of clips whose text is dropped, for classifier-free guidance
    drop_each: bool = False  # drop each text encoder by itself, not all three together
    align: float = 0.0  # weight of the loss that aligns the toy MetaCLIP with the clips

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, 1e12, "accumulate")
        within(self, 0, 1, "drop")
        within(self, 0, math.inf, "align")


@dataclass
class SampleConfig:
    """How clips are made."""

    steps: int = 25  # Euler steps, or those of another solver
    schedule: str = "linear"  # linear, linear_quadratic or shifted: where the steps are
    solver: Literal[tuple(flow.SOLVERS)] = "euler"  # of the ODE
    guidance: float = 3.0  # scale of classifier-free guidance; 1: none
    batch: int = 32  # clips at a time
    prompts: int = 160  # prompts like training's; toy world: + 3/10 held out, 4/10 words

    def __post_init__(self):
        within(self, 1, 1e6, "steps", "batch", "prompts")


@dataclass
class Config:
    """The settings of a run, as config.json holds them."""

    scale: Literal["toy", "small", "1b", "5b", "30b"] = "toy"  # preset of all sizes
    data: str = ""  # folder of captioned videos; without it: the toy world
    base: str = ""  # run to take autoencoder from, and latents if clips and text agree
    init: str = ""  # run to take autoencoder and weights from, position tables stretched
    seed: int = 0  # of data and training
    coupling: Literal["independent", "minibatch", "sdot", "sdot-global"] = "sdot"  # noise to clips
    variant: Literal["2.5d", "3d", "vidtwin"] = "2.5d"  # the autoencoder
    patch: tuple[int, ...] = (1, 4, 4)  # latent frames, rows and columns in one token
    patch_structure: tuple[int, ...] = (8, 1, 1)  # of VidTwin's structure (queries, h, w)
    patch_dynamics: tuple[int, ...] = (1, 4, 2)  # of VidTwin's dynamics (1, T, rows + columns)
    clips: ClipConfig = field(default_factory=ClipConfig)
    tae: autoencoder.TAEConfig = field(default_factory=autoencoder.TAEConfig)
    vidtwin: autoencoder.VidTwinConfig = field(default_factory=autoencoder.VidTwinConfig)
    loss: autoencoder.LossConfig = field(default_factory=autoencoder.LossConfig)
    train_tae: TrainTAE = field(default_factory=TrainTAE)
    text: text_cond.TextConfig = field(default_factory=text_cond.TextConfig)
    dit: backbone.DiTConfig = field(default_factory=backbone.DiTConfig)
    train_dit: TrainDiT = field(default_factory=TrainDiT)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sdot: SDOTConfig = field(default_factory=SDOTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def autoencoder_config(self) -> autoencoder.TAEConfig | autoencoder.VidTwinConfig:
        """Sizes of the autoencoder that `variant` names."""
        return self.vidtwin if self.variant == "vidtwin" else self.tae

    @property
    def patches(self) -> dict[str, tuple[int, ...]]:
        """The patch of each latent of the autoencoder, by the name of its field."""
        if self.variant == "vidtwin":
            return {name: getattr(self, name) for name in ("patch_structure", "patch_dynamics")}
        return {"patch": self.patch}

    @property
    def workers(self) -> int:
        """Threads that read clips ahead; the toy world is drawn where it is needed."""
        return self.clips.workers if self.data else 0


# Fields that follow from others, and so have no flags.
DERIVED = {"dit.streams", "dit.text_dim", "text.dim", "tae.variant", "vidtwin.frames",
           "vidtwin.size"}
# Fields that change how a run is computed, not its result: a resumed run may change them. (With
# --train_dit.align, on in toy and small, accumulate does change it: it compares clips of one part.)
HOW = {"train_tae.every", "train_dit.every", "train_dit.accumulate", "tae.checkpointing",
       "vidtwin.checkpointing", "dit.checkpointing", "clips.workers", "text.offload", "text.batch",
       "sdot.memory"}
STAGES = ("tae", "latents", "coupling", "dit", "sample", "report")


def paper_scale(name: str, clips: ClipConfig, train_tae: TrainTAE, train_dit: TrainDiT) -> Config:
    """Make a config of the papers' sizes, in bf16. They are planned only, never run whole."""
    return Config(
        scale=name, coupling="independent", patch=(1, 2, 2), clips=clips,
        tae=replace(autoencoder.PRESETS["paper"], checkpointing=True),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["paper"]),
        loss=replace(autoencoder.LOSSES["paper"]),
        train_tae=replace(train_tae, lr=1e-4, warmup=1000, every=1000, window=16, precision="bf16"),
        text=replace(text_cond.PRESETS[name]), dit=replace(backbone.PRESETS[name]),
        train_dit=replace(train_dit, warmup=2000, weight_decay=0.1, beta2=0.95, ema=0.9999,
                          every=500, precision="bf16"),
        sample=SampleConfig(steps=50, schedule="linear_quadratic", batch=1),
    )


SCALES: dict[str, Callable[[], Config]] = {
    # 2 CPU cores, minutes: 16 x 32 x 32 clips, latent (8, 4, 8, 8), 64 tokens. Small batches: more
    # steps learn more from the same number of clips. studies/README.md says what else was tried
    "toy": lambda: Config(
        patch=(1, 2, 2),                        # a token is 8 x 8 pixels of 4 frames
        tae=replace(autoencoder.PRESETS["toy"], shortcut=True),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["toy"]),
        loss=replace(autoencoder.LOSSES["toy"]),
        train_tae=TrainTAE(steps=1300, batch=8, lr=3e-3, decay=0.5, image_steps=150, crowd=3,
                           window=8, finish=0.15),
        text=replace(text_cond.PRESETS["toy"]),
        dit=replace(backbone.PRESETS["toy"]),
        clips=ClipConfig(count=10240),
        train_dit=TrainDiT(steps=2200, batch=16, lr=2e-3, warmup=100, decay=0.5, ema=0.995,
                           align=0.1),
        flow=FlowConfig(std=1.3, shift=2.0),   # place and direction are decided near the noise
        sdot=SDOTConfig(solver="pot"),
        sample=SampleConfig(steps=16, schedule="shifted", guidance=5.0),
    ),
    # 2 CPU cores, hours: 16 x 64 x 64 clips with two objects, latent (16, 8, 8, 8), 128 tokens. The
    # autoencoder learns from crowds of signs: edges and letters are what is hard
    "small": lambda: Config(
        scale="small", coupling="independent", patch=(1, 2, 2),
        clips=ClipConfig(size=64, things=2, signs=0.6, count=20_480),
        tae=replace(autoencoder.PRESETS["small"]),
        vidtwin=replace(autoencoder.VIDTWIN_PRESETS["small"]),
        loss=replace(autoencoder.LOSSES["small"]),
        train_tae=TrainTAE(steps=10_000, batch=4, lr=2e-3, image_steps=300, crowd=30, signs=0.7,
                           window=8, finish=0.2),
        text=replace(text_cond.PRESETS["small"]),
        dit=replace(backbone.PRESETS["small"]),
        train_dit=TrainDiT(steps=20_000, batch=16, lr=1.2e-3, warmup=200, decay=0.4, ema=0.999,
                           every=200, align=0.1),
        flow=FlowConfig(std=1.3, shift=3.0),    # latents hold four times the toy's values
        sample=SampleConfig(steps=25, schedule="shifted", guidance=4.0),
    ),
    # 8 GPUs, days: 4 s at 8 frames a second, 256 px; 4 x 16 x 16 = 1024 tokens
    "1b": lambda: paper_scale(
        "1b", ClipConfig(frames=32, size=256, count=1_000_000, images=0.1, workers=8),
        TrainTAE(steps=100_000, batch=64, image_steps=50_000, image_batch=256),
        TrainDiT(steps=200_000, batch=512, lr=2e-4)),
    # 64 GPUs and more: 8 s at 16 frames a second, 256 px; 16 x 16 x 16 = 4096 tokens
    "5b": lambda: paper_scale(
        "5b", ClipConfig(frames=128, size=256, fps=16, count=4_000_000, images=0.1, workers=8),
        TrainTAE(steps=200_000, batch=256, image_steps=100_000, image_batch=1024),
        TrainDiT(steps=200_000, batch=1024, lr=1e-4)),
    # thousands of GPUs: Movie Gen's last stage [MG table 3], 16 s at 768 px, 73,728 tokens; README
    # has the commands of the two stages before it
    "30b": lambda: paper_scale(
        "30b", ClipConfig(frames=256, size=768, fps=16, count=10_000_000, images=0.1,
                          tell_fps=True, workers=8),
        TrainTAE(steps=200_000, batch=512, image_steps=100_000, image_batch=2048),
        TrainDiT(steps=74_500, batch=512, lr=6e-5)),
}


def parts_of(cfg: Config, shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Give the shapes of a clip's latents: one (C, T', H', W'), or VidTwin's two."""
    with torch.device("meta"):
        return autoencoder.autoencoder(cfg.autoencoder_config).parts(*shape)


def finish(cfg: Config) -> Config:
    """Fill in the fields that follow from others; UserError for fields that do not agree."""
    c, hp = cfg.clips, cfg.train_tae
    if not cfg.data:
        with named("--clips."):
            world.check_script(c.script)
        if c.things > 3:
            raise UserError(f"--clips.things {c.things}: at most 3 have room to pass one another")
    with named("--sample."):
        flow.schedule(cfg.sample.schedule, cfg.sample.steps, shift=cfg.flow.shift)
    if cfg.flow.objective == "diffusion" and cfg.sample.solver != "euler":
        raise UserError(f"--sample.solver {cfg.sample.solver}: diffusion is sampled with euler")
    if cfg.variant == "vidtwin":                        # whole clips of one size, and no images
        if cfg.loss.opl:
            raise UserError(f"--loss.opl {cfg.loss.opl}: not with --variant vidtwin, whose latent "
                            "is flat")
        cfg.vidtwin = replace(cfg.vidtwin, frames=c.frames, size=c.size)
        cfg.train_tae = replace(hp, window=c.frames, image_steps=0)
    else:
        cfg.tae = replace(cfg.tae, variant=cfg.variant)
    if cfg.loss.gan and c.size < 24:
        raise UserError(f"--clips.size {c.size}: the discriminator of --loss.gan needs 24 or more")
    if len(c.shapes) > 1 and cfg.coupling.startswith("sdot"):
        raise UserError(f"--coupling {cfg.coupling}: for clips of one shape; with --clips.others "
                        "or --clips.images: independent")
    if len(c.shapes) > 1 and cfg.variant == "vidtwin":
        raise UserError("--variant vidtwin: its clips have one shape; drop --clips.others and "
                        "--clips.images")
    streams, parts = [], [parts_of(cfg, shape) for shape in c.shapes]
    for (name, patch), sizes in zip(cfg.patches.items(), zip(*parts)):
        for shape, (_, *size) in zip(c.shapes, sizes):
            if len(patch) != 3 or min(patch) < 1 or any(n % p for n, p in zip(size, patch)):
                raise UserError(f"--{name} {' '.join(map(str, patch))}: not three divisors of the "
                                f"latent {tuple(size)} of {'x'.join(map(str, shape))}")
        C, *largest = map(max, zip(*sizes))
        streams.append(backbone.Stream(C, tuple(patch), tuple(largest)))
    cfg.dit = replace(cfg.dit, streams=tuple(streams), text_dim=cfg.dit.dim)
    cfg.text = replace(cfg.text, dim=cfg.dit.dim)
    return cfg


def from_dict(kind, value: dict):
    """Make a config dataclass from JSON: lists become tuples, nested objects nested configs."""
    default, out = vars(kind()), {}
    for name, v in value.items():
        if name not in default:
            raise ValueError(f"unknown field {name}")
        d = default[name]
        v = from_dict(type(d), v) if is_dataclass(d) else tuple(v) if isinstance(v, list) else v
        v = float(v) if type(d) is float and type(v) is int else v
        plain = isinstance(d, tuple) and d and isinstance(d[0], (int, str))
        if type(v) is not type(d) or plain and any(type(x) is not type(d[0]) for x in v):
            raise ValueError(f"{name} {v!r}: not of the type of {d!r}")
        out[name] = v
    return kind(**out)


def read_config(run: Path | str) -> Config:
    """Read the config of a run, given its folder or its model.safetensors; fields newer than
    the file get Config's defaults."""
    path = Path(run)
    if path.is_file():
        with opened(path) as f:
            text = (f.metadata() or {}).get("config")
        if text is None:
            raise UserError(f"{path}: not a model.safetensors of train.py")
    elif (path / "config.json").exists():
        path = path / "config.json"
        text = read_text(path)
    else:
        raise UserError(f"{run}: no run there; train first: torchrun train.py --workdir {run}")
    try:
        return from_dict(Config, json.loads(text))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({error}); choose another folder") from None


def result_of(run: Path) -> Path:
    """Find the model.safetensors of a finished run, given its folder or that file."""
    if run.is_file():
        return run
    if not (run / "model.safetensors").exists():
        read_config(run)                                # UserError if there is no run at all
        raise UserError(f"{run}: not finished; continue it with the command that began it")
    return run / "model.safetensors"


# ---- 3. Ranks ------------------------------------------------------------------------------------


def rank() -> int:
    """Give this process's number; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count the processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank0(mine):
    """Broadcast rank 0's object."""
    box = [mine]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def share(n: int, index: int, parts: int) -> range:
    """Cut range(n) into parts as equal as possible, and give part `index`."""
    return range(index * n // parts, (index + 1) * n // parts)


@dataclass
class Mesh:
    """replicate x dp x sp ranks, outermost to innermost. The model is held `replicate` times, each
    time sharded over dp x sp ranks (FSDP2), or whole where that is one rank (DDP). The clips of a
    step are shared out to replicate x dp ranks; in the dit stage, sp ranks that have the same clips
    share the tokens (`split_tokens`). In other stages all ranks have clips of their own."""

    replicate: int = 1
    dp: int = 1
    sp: int = 1
    reshard: bool = True                        # free a block's parameters after its forward pass
    fsdp: DeviceMesh | None = None              # of FSDP2; None: each rank has the whole model
    tokens: sample_parallel.Axis | None = None  # the sp ranks that share this rank's clips
    meeting: dist.ProcessGroup | None = None    # gloo, on GPUs too: `meet`
    files: dist.ProcessGroup | None = None      # gloo, for the thread that writes checkpoints: its
                                                # messages must not be taken for the main thread's

    @property
    def data(self) -> tuple[int, int]:
        """Give this rank's share of the clips of a step: (index, number of shares)."""
        return rank() // self.sp, self.replicate * self.dp

    def meet(self, what: str) -> None:
        """Wait up to a day for all ranks, since one may work alone; an error names the missing."""
        if self.meeting is not None:
            try:
                dist.monitored_barrier(self.meeting, timedelta(days=1), wait_all_ranks=True)
            except RuntimeError as error:
                raise RuntimeError(f"{what}: {error}") from None


def make_mesh(dp: int = 0, sp: int = 1, replicate: int = 1, reshard: bool = True,
              device: str = "cpu", timeout: float = 600.0) -> Mesh:
    """Arrange all ranks in a mesh; dp 0: as many as are left. timeout: seconds that a rank waits
    for the others in a collective, before it considers one hung."""
    dp, limit = dp_of(world_size(), dp, sp, replicate), timedelta(seconds=timeout)
    mesh = Mesh(replicate, dp, sp, reshard)
    if dist.is_initialized():
        mesh.meeting, mesh.files = (dist.new_group(backend="gloo", timeout=limit)
                                    for _ in range(2))
        ranks = init_device_mesh(device, (replicate, dp * sp),
                                 mesh_dim_names=("replicate", "shard"))
        groups = init_device_mesh(device, (replicate * dp, sp), mesh_dim_names=("data", "sp"))
        for m, name in ((ranks, "replicate"), (ranks, "shard"), (groups, "sp")):
            # Else torch's time-outs hold: 10 minutes (NCCL), 30 (gloo).
            dist.distributed_c10d._set_pg_timeout(limit, m.get_group(name))
        if dp * sp > 1:
            mesh.fsdp = ranks if replicate > 1 else ranks["shard"]
        if sp > 1:
            group = groups.get_group("sp")
            mesh.tokens = sample_parallel.Axis(sp, dist.get_rank(group), group)
    return mesh


def dp_of(ranks: int, dp: int, sp: int, replicate: int) -> int:
    """Give dp; for 0, as many ranks as are left. UserError unless the product is `ranks`."""
    for flag, n in (("--sp", sp), ("--replicate", replicate)):
        if n < 1 or ranks % n:
            raise UserError(f"{flag} {n}: does not divide the {ranks} ranks")
    dp = dp or max(1, ranks // (sp * replicate))
    if replicate * dp * sp != ranks:
        raise UserError(f"--replicate {replicate} --dp {dp} --sp {sp}: {replicate * dp * sp} ranks "
                        f"in all, but there are {ranks}")
    return dp


def place(run: "Run", build: Callable[[], nn.Module], precision: str = "fp32", fresh: bool = True
          ) -> nn.Module:
    """Build a model on this rank's device, whole or sharded as the mesh says. FSDP2 shards each
    block of the DiT by itself; its products may be in bf16, gradients are summed in fp32.

    With shards, rank 0 initialises the model in its host's memory and broadcasts one tensor after
    the other. So it starts the same on any number of ranks, and no device holds all of it. `build`
    also runs on device "meta", where it must not load weights. With fresh False a checkpoint will
    fill the model."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    torch.manual_seed(run.cfg.seed + 1)
    if run.mesh.fsdp is None:
        return build().to(run.device, dtype)
    whole = build().to(dtype).state_dict() if fresh and rank() == 0 else {}
    with torch.device("meta"):
        model = build().to(dtype)
    for p in model.parameters():            # FSDP asks for contiguous weights, not channels_last
        p.data = p.data.contiguous()
    rule = {"mesh": run.mesh.fsdp, "reshard_after_forward": run.mesh.reshard}
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.dit.blocks if hasattr(model, "dit") else ():
        fully_shard(block, **rule, mp_policy=policy)
    fully_shard(model, **rule)
    model.to_empty(device=run.device)
    model.to(run.device)        # moves nothing; FSDP's outermost group looks at its shards anew
    if fresh:
        run.mesh.meet("initial weights")        # rank 0 may have taken long
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole, options=how)
    return model


def split_tokens(dit: backbone.DiT, axis: sample_parallel.Axis) -> None:
    """Sequence parallelism (--sp): let this rank carry only its share of a clip's tokens through
    the blocks. Attention trades tokens for heads (Ulysses); every rank gets the whole velocity.
    The model's code is unchanged: patchify, positions, unpatchify and block.attend are replaced."""
    sizes: list[int] = []                               # tokens of each rank; may be uneven
    patchify, positions, unpatchify = dit.patchify, dit.positions, dit.unpatchify

    def mine(tokens: Tensor) -> Tensor:
        sizes[:] = sample_parallel.split(tokens.shape[-2], axis.size)
        return tokens.split(sizes, -2)[axis.index]

    dit.patchify = lambda x: mine(patchify(x))
    dit.positions = lambda shape: mine(positions(shape))
    # All sp ranks compute the same loss, so `gather` sums sp equal gradients; FSDP's average over
    # the ranks divides by sp again.
    dit.unpatchify = lambda tokens, shape: unpatchify(
        sample_parallel.gather(tokens, list(sizes), 1, axis), shape)
    for block in dit.blocks:
        block.attend = sample_parallel.Ulysses(axis, tokens=sizes)


# ---- 4. Files: text, tensors, checkpoints, the log -----------------------------------------------
# Files that a later stage reads are written beside their place and renamed, so that they are there
# whole or not at all; log.jsonl grows by a line at a time, and pictures are simply made again. Text
# is read as utf-8 with or without a byte order mark, and written as utf-8.


def read_text(path: Path) -> str:
    """Read a text file; lines end with \\n."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start})"
                        ) from None


def say(line: str) -> None:
    """Print a line on stderr, above the progress bars."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def reason(error: BaseException) -> str:
    """Give the last line of an error, without what torch wraps it in."""
    causes = [e for e, _ in getattr(error, "failures", {}).values()] or [error]
    text = str(causes[0]).strip().splitlines() or [type(causes[0]).__name__]
    return text[-1][:200]


@contextlib.contextmanager
def writing(path: Path):
    """Turn a library's error about writing into a UserError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written ({reason(error)}); free some space or fix "
                        "the cause, and start again") from None


@contextlib.contextmanager
def swapped_in(path: Path):
    """Give a path to write to, which takes the place of `path` if all goes well."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())            # else a power cut can leave the name without content
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path):
    """Do as `swapped_in`, and make the folder; UserError if the file cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with swapped_in(path) as part:
            yield part


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # for undecodable names


def read_json(path: Path):
    """Read a JSON file of a run; a UserError names one that is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove it and start the run again") from None


def write_json(path: Path, value) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata or None)
        part.chmod(mode)                    # safetensors gives files to their owner alone


@contextlib.contextmanager
def opened(path: Path):
    """Open a safetensors file; a UserError names one that is damaged."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: damaged or missing ({error}); remove it and start the run again"
                        ) from None


def load_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Map a safetensors file into memory, or those of its tensors that have these names."""
    with opened(path) as f:
        return {k: f.get_tensor(k) for k in f.keys() if names is None or k in names}  # noqa: SIM118


def readable(path: Path) -> bool:
    """Tell whether a safetensors file is there and as long as its header says."""
    with contextlib.suppress(UserError), opened(path):
        return True
    return False


def only(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keep the entries under a prefix, and cut it off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


class SafeUnpickler(pickle.Unpickler):
    """Read the pickled table of contents of a DCP checkpoint, which may name the classes of such a
    table and nothing else. No BytesStorageMetadata, whose entries DCP would unpickle."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"},
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
    """DCP's reader, with SafeUnpickler."""

    def read_metadata(self, *_, **__):
        with (Path(self.path) / ".metadata").open("rb") as f:
            metadata = SafeUnpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SummedWriter(dcp.FileSystemWriter):
    """DCP's writer, and a checksum of each file: DCP notices a file that is cut short, but
    not a flipped bit."""

    def write_data(self, plan, planner):
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:       # it hides the disk's error
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        self.sum(f"__{rank()}_*")
        return written

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)       # .metadata, the mark of a whole checkpoint
        self.sum(".metadata")

    def sum(self, pattern: str) -> None:
        for path in list(Path(self.path).glob(pattern)):
            with swapped_in(path.with_name(path.name + ".crc32")) as part:
                part.write_text(crc32(path))


def crc32(path: Path) -> str:
    """CRC-32 of a file in hexadecimal: finds damage, not malice."""
    value = 0
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


warnings.filterwarnings("ignore", message="torch.distributed is disabled")      # DCP, on one rank


def step_of(path: Path) -> int:
    """Count the steps made before the checkpoint step_N."""
    return int(path.name.removeprefix("step_"))


def checkpoints_in(folder: Path, whole: bool = True) -> list[Path]:
    """List the checkpoints that are whole, newest first; if not `whole`, all folders step_N.
    Folders of other names, such as a user's copy, are left out."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted((p for p in found if not whole or (p / ".metadata").exists()), key=step_of,
                  reverse=True)


class Checkpoints:
    """The checkpoints of one model, folders step_N in DCP's format. A thread writes them while
    training goes on (async_save), and the last two are kept. A checkpoint is whole if it has a
    .metadata: DCP writes that last, when all ranks have written their files."""

    def __init__(self, folder: Path, state: dict, mesh: Mesh):
        self.folder, self.state, self.mesh = folder, state, mesh
        self.pending = None                     # path, future of the one that is being written
        self.damaged: set[Path] = set()
        if rank() == 0:                         # what a kill or a full disk left half written
            for path in set(checkpoints_in(folder, whole=False)) - set(checkpoints_in(folder)):
                shutil.rmtree(path, ignore_errors=True)
        mesh.meet(f"{folder}")

    def save(self, step: int) -> None:
        """Begin to write; the caller has waited for the one before."""
        path = self.folder / f"step_{step:07d}"
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)                 # a damaged one of this step
        plan = dcp.DefaultSavePlanner(enable_plan_caching=True)     # the global one is made once
        self.pending = path, dcp.async_save(
            self.state, storage_writer=SummedWriter(path), planner=plan,
            process_group=self.mesh.files, no_dist=self.mesh.files is None)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; UserError if that fails."""
        if self.pending is None:
            return
        (path, future), self.pending = self.pending, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:   # what the file system says, wrapped
            raise UserError(f"{path}: could not be written ({reason(error)}); the one before is "
                            "kept; free some space or fix the cause, and start again"
                            ) from None
        if rank() == 0:
            self.damaged.discard(path)
            whole = checkpoints_in(self.folder)
            sound = [p for p in whole if p not in self.damaged]
            for old in set(whole) - set(sound[:2]):
                shutil.rmtree(old, ignore_errors=True)

    def load(self) -> int:
        """Fill the state from the newest sound checkpoint -> its step; 0 if there is none."""
        for path in from_rank0(checkpoints_in(self.folder)):
            try:
                self.check(path)
                dcp.load(self.state, storage_reader=SafeReader(path),
                         no_dist=not dist.is_initialized())
                return step_of(path)
            except (CheckpointException, ValueError, OSError) as error:
                self.damaged.add(path)
                if rank() == 0:
                    say(f"{path}: damaged ({reason(error)}), using the one before if there is one")
        if self.damaged:
            raise UserError(f"{self.folder}: none of its checkpoints can be read; move them away "
                            "to begin again")
        return 0

    def check(self, path: Path) -> None:
        """Raise ValueError, on all ranks, if a file is not as written; they share the work."""
        sums, wrong = sorted(path.glob("*.crc32")), ""
        try:
            for file in sums[rank() :: world_size()]:
                if crc32(file.with_suffix("")) != file.read_text():
                    wrong = f"{file.stem} is not what was written"
        except (OSError, ValueError) as error:
            wrong = reason(error)
        if wrong := next(filter(None, everyone(wrong)), ""):
            raise ValueError(wrong)


class Run:
    """A run folder, its config, and the ranks that work on it."""

    def __init__(self, folder: Path, cfg: Config, device: torch.device | str = "cpu",
                 mesh: Mesh | None = None):
        self.folder, self.cfg = folder, cfg
        self.device, self.mesh = torch.device(device), mesh or Mesh()
        self.lock = None                        # held by rank 0 of a run at work

    def has(self, name: str) -> bool:
        """Tell all ranks whether a file is there, as rank 0 sees it now: all branch alike."""
        return from_rank0((self.folder / name).exists())

    def save(self, name: str, tensors: dict[str, Tensor], **metadata: str) -> None:
        """Write rank 0's tensors as a safetensors file; the other ranks wait for it."""
        if rank() == 0:
            save_tensors(self.folder / name, tensors, **metadata)
        self.mesh.meet(f"{self.folder / name}")

    def log(self, stage: str, step: int, **figures) -> None:
        """Append a row to log.jsonl. A resumed run repeats some steps: the last row counts."""
        if rank() == 0:
            path = self.folder / "log.jsonl"
            row = {"time": round(time.time(), 3), "stage": stage, "step": step, **figures}
            cut = (figures.get("event") == "start" and path.exists()
                   and path.read_bytes()[-1:] not in (b"", b"\n"))      # by a kill
            with writing(path), path.open("a", encoding="utf-8") as f:
                f.write("\n" * cut + json.dumps(row) + "\n")
            if "detail" in figures:
                say(f"{stage} step {step}: {figures['event']}, {figures['detail']}")

    def rows(self) -> list[dict]:
        """Read the rows of log.jsonl; a half-written one is left out."""
        path, rows = self.folder / "log.jsonl", []
        for line in read_text(path).split("\n") if path.exists() else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def losses(self) -> dict[str, dict[int, float]]:
        """Read the losses -> {stage: {step: loss}} of all steps that were made."""
        out: dict[str, dict[int, float]] = {}
        for row in self.rows():
            if "loss" in row:
                out.setdefault(row["stage"], {})[row["step"]] = row["loss"]
        return out

    def seconds(self) -> dict[str, float]:
        """Sum the seconds of each stage, over all starts: the time between one row and the next."""
        out: dict[str, float] = {}
        for a, b in itertools.pairwise(self.rows()):
            if b.get("event") != "start":           # not the time between two starts
                stage = b["stage"].split("/")[0]
                out[stage] = out.get(stage, 0.0) + b["time"] - a["time"]
        return {stage: round(s, 1) for stage, s in out.items()}


def generator(*key) -> torch.Generator:
    """Make a CPU generator that depends on nothing but the key, e.g. (seed, "dit", step)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---- 5. The stages -------------------------------------------------------------------------------


def train_tae(run: Run, clips) -> None:
    """Make tae/tae.safetensors: image training, inflation, video training, latent statistics. An
    image is a clip with T = 1. With --base or --init the autoencoder is taken over."""
    cfg, hp = run.cfg, run.cfg.train_tae
    if run.has("tae/tae.safetensors"):
        return
    if cfg.base or cfg.init:
        run.save("tae/tae.safetensors", load_tensors(Path(cfg.base) / "tae/tae.safetensors")
                 if cfg.base else only(load_tensors(result_of(Path(cfg.init))), "tae."))
        return
    if not cfg.data and rank() == 0:            # before hours are spent: can the judge be trusted?
        c = cfg.clips
        said = world.check_judge(cfg.seed, things=c.things, frames=c.frames, size=c.size,
                                 script=c.script)
        write_json(run.folder / "judge.json", said)
        say("judge agrees with the truth: " + ", ".join(f"{k} {v:.3f}" for k, v in said.items()))
    with named("--loss."):
        perceptual = autoencoder.vgg_perceptual() if cfg.loss.perceptual else None
    objective = partial(autoencoder.Objective, perceptual=perceptual)
    image = lambda: autoencoder.TAE(replace(cfg.tae, variant="2d"))

    if cfg.variant != "vidtwin" and not run.has("tae/image.safetensors"):
        plain = replace(cfg.loss, opl=0.0, gan=0.0)     # these two in video training only
        model = place(run, lambda: objective(image(), plain), hp.precision)
        state = optimize(run, "tae/image", model, hp, hp.image_steps,
                         tae_batches(run, clips, False), cfg.workers)
        run.save("tae/image.safetensors", only(state, "tae."))

    def build() -> nn.Module:
        if cfg.variant == "vidtwin":
            return objective(autoencoder.VidTwin(cfg.vidtwin), cfg.loss)
        tae = image()
        if not next(tae.parameters()).is_meta:
            tae.load_state_dict(load_tensors(run.folder / "tae/image.safetensors"), strict=False)
        return objective(autoencoder.inflate(tae, cfg.tae.variant), cfg.loss)

    model = place(run, build, hp.precision)
    state = optimize(run, "tae/video", model, hp, hp.steps, tae_batches(run, clips, True),
                     cfg.workers)

    tae = autoencoder.autoencoder(cfg.autoencoder_config).eval()
    if rank() == 0:
        tae.load_state_dict(only(state, "tae."), strict=False)
        found = encoded(run, tae.to(run.device), clips, "train", range(256), cfg.clips.shape)
        tae.lat_mean[:], tae.lat_std[:] = autoencoder.latent_stats(tae, (p for _, _, p in found))
    run.save("tae/tae.safetensors", tae.state_dict())


def tae_batches(run: Run, clips, video: bool) -> Callable[[int], list[tuple]]:
    """Make the `batch` of the autoencoder: frames in image training; in video training windows,
    every fourth batch images [MG s3.1.1], and in the last steps (--train_tae.finish) whole clips,
    without a crowd."""
    cfg, hp = run.cfg, run.cfg.train_tae
    steps, n = (hp.steps, hp.batch) if video else (hp.image_steps, hp.image_batch)

    def batch(step: int) -> list[tuple]:
        finishing = video and step >= round(steps * (1 - hp.finish))
        image = autoencoder.is_image_step(step) and cfg.variant != "vidtwin"
        T = (max(cfg.clips.frames, hp.window) if finishing else
             1 if image or not video else hp.window)
        shape = T, cfg.clips.size, cfg.clips.size
        x = torch.stack([clips.clip("train" if finishing else "tae", step * n + i, shape,
                                    step / steps)[0] for i in share(n, rank(), world_size())])
        return [(x.to(run.device), step, generator(cfg.seed, "tae", video, step, rank()))]

    return batch


SHARD = 256         # clips in one file of latents
LARGE = 2**23       # pixels; larger clips pass through the autoencoder one frame at a time


def large(shape: tuple[int, int, int]) -> bool:
    """Tell whether encode and decode have to stream a clip of T x H x W, to keep within memory."""
    return math.prod(shape) > LARGE


@torch.no_grad()
def encoded(run: Run, tae: autoencoder.Autoencoder, clips, split: str, rows: Iterable[int],
            shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, list[str], object]]:
    """Read and encode these clips -> (clips, captions, posterior), several at a time."""
    rows, n = list(rows), max(1, min(32, LARGE // math.prod(shape)))
    whole = max(n // CROPS, 1) * CROPS          # a window is decoded once for all of its crops

    def read(part: list[int]) -> tuple[Tensor, list[str]]:
        x, captions = zip(*(clips.clip(split, i, shape) for i in part))
        return torch.stack(x), list(captions)

    parts = [rows[k : k + whole] for k in range(0, len(rows), whole)]
    for xs, captions in read_ahead(read, parts, run.cfg.workers):
        for k, x in enumerate(xs.split(n)):
            yield (x, captions[k * n : (k + 1) * n],
                   tae.encode(x.to(run.device), stream=large(shape)))


def load_tae(run: Run) -> autoencoder.Autoencoder:
    """Load the trained autoencoder, frozen."""
    tae = autoencoder.autoencoder(run.cfg.autoencoder_config)
    tae.load_state_dict(load_tensors(run.folder / "tae/tae.safetensors"))
    return tae.to(run.device).eval().requires_grad_(False)


def shards_of(clips, count: int) -> dict[str, tuple[tuple[int, int, int], list[int]]]:
    """Share clips out to files -> {name: (shape, clips)}, SHARD clips of one shape to a file."""
    rows: dict[tuple[int, int, int], list[int]] = {}
    for i in range(count):
        rows.setdefault(clips.shape(i), []).append(i)
    parts = [(shape, mine[i : i + SHARD]) for shape, mine in sorted(rows.items())
             for i in range(0, len(mine), SHARD)]
    return {f"shard_{s:05d}.safetensors": part for s, part in enumerate(parts)}


def encode_latents(run: Run, clips) -> None:
    """Make latents/: shards with mean and logvar of each clip, its caption, and its features by
    the frozen part of the text encoders. Shards that exist are kept, damaged ones encoded again
    (and named, if the stage was done). With --base the folder is a link to that run's, if
    `same_latents`."""
    cfg, folder = run.cfg, run.folder / "latents"
    linked = bool(cfg.base) and from_rank0(folder.is_symlink())
    if cfg.base and (linked or not run.has("latents/index.json")) and same_latents(cfg):
        if rank() == 0:
            source = Path(cfg.base).resolve() / "latents"
            if not (source / "index.json").exists():
                raise UserError(f"{source}: no latents there; first continue that run with --stage "
                                "latents, by the command that began it")
            with writing(folder):                   # anew, since both may have been moved or copied
                folder.unlink(missing_ok=True)
                folder.symlink_to(os.path.relpath(source, run.folder.resolve()))
        run.mesh.meet(f"{folder}")
        linked = True
    if linked:                                      # never written to: they are another run's
        mine = Latents(folder).names[rank() :: world_size()]
        if bad := sum(everyone([name for name in mine if not readable(folder / name)]), []):
            raise UserError(f"{folder.resolve()}: damaged or missing: {some_of(bad)}; first "
                            "continue that run with --stage latents, by the command that began it")
        return
    shards, complete = shards_of(clips, cfg.clips.count), run.has("latents/index.json")
    todo = [name for name in list(shards)[rank() :: world_size()] if not readable(folder / name)]
    if complete and not any(everyone(bool(todo))):
        return
    if todo:
        tae = load_tae(run)
        with named("--text."):
            text = text_cond.TextConditioner(cfg.text).to(run.device)
    for name in tqdm(todo, "latents", unit="shard", disable=rank() != 0):
        if complete:
            say(f"{folder / name}: damaged or missing, encoded again")
        shape, rows = shards[name]
        mean, logvar, captions = [], [], []
        for _, texts, posterior in encoded(run, tae, clips, "dit", rows, shape):
            mean.append(posterior.mean.cpu())
            logvar.append(posterior.logvar.cpu())
            captions += texts
        unique = list(dict.fromkeys(captions))          # crops of one window share their caption
        with named("text: "):
            features = {f"text.{k}": v for k, v in text.encode(unique).items()}
        save_tensors(folder / name, {
            "mean": torch.cat(mean), "logvar": torch.cat(logvar), **features,
            "caption": torch.tensor([unique.index(c) for c in captions])},
            captions=json.dumps(captions))
    run.mesh.meet(f"{folder}")
    if rank() == 0:
        rows = []
        for name in shards:
            with opened(folder / name) as f:
                rows.append([name, *f.get_slice("mean").get_shape()])
        if complete:                                    # the latents may differ now
            (run.folder / "coupling.pt").unlink(missing_ok=True)
        write_json(folder / "index.json", rows)
    run.mesh.meet(f"{folder}/index.json")


def same_latents(cfg: Config) -> bool:
    """Tell whether the latents of --base can serve this run: the same clips and text encoders. Its
    seed, which draws the clips, may differ."""
    free = {"clips.fps", "clips.workers", "text.dim", "text.width", "text.layers", "text.heads",
            "text.without", "text.offload", "text.batch"}   # latents/ depends on none of these
    other, mine = ({k: v for k, v in flat(asdict(c)).items()
                    if k.startswith(("clips.", "text.", "data")) and k not in free}
                   for c in (read_config(cfg.base), cfg))
    return other == mine


class Latents:
    """The data set of the dit stage, written by `encode_latents`. Shards are mapped into memory on
    demand, and the last thousand stay mapped. Clips are numbered across all shards."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        table = read_json(self.folder / "index.json")
        self.names = [name for name, *_ in table]
        self.starts = torch.tensor([0] + [n for _, n, *_ in table]).cumsum(0)       # (shards + 1,)
        self.shapes = [torch.Size(shape) for _, _, *shape in table]         # (C, T', H', W') each
        self.file = lru_cache(1000)(lambda s: load_tensors(self.folder / self.names[s]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, index: Tensor) -> list[tuple[dict[str, Tensor], int]]:
        """Find the shard of each clip, and its row there."""
        s = torch.searchsorted(self.starts, index, right=True) - 1
        rows = (index - self.starts[s]).tolist()
        return [(self.file(i), row) for i, row in zip(s.tolist(), rows)]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Read mean and logvar of these clips, of one shape: (B, C, T', H', W') each."""
        found = self.find(index)
        return tuple(torch.stack([f[k][row] for f, row in found]) for k in ("mean", "logvar"))

    def text(self, index: Tensor) -> dict[str, Tensor]:
        """Read what the text encoders made of the captions, padded to the longest, (B, L, ...)."""
        found = [(f, f["caption"][row]) for f, row in self.find(index)]
        return {k.removeprefix("text."): nn.utils.rnn.pad_sequence(
                    [f[k][row] for f, row in found], batch_first=True)
                for k in found[0][0] if k.startswith("text.")}

    def buckets(self) -> list[tuple[torch.Size, range]]:
        """List (shape of a latent, range of clips that have it); a shape may come twice."""
        out: list[tuple[torch.Size, range]] = []
        for shape, a, b in zip(self.shapes, self.starts.tolist(), self.starts[1:].tolist()):
            if out and out[-1][0] == shape:
                a = out.pop()[1].start
            out.append((shape, range(a, b)))
        return out

    @cached_property
    def captions(self) -> list[str]:
        """The caption of each clip. Reads all of them."""
        out: list[str] = []
        for name in self.names:
            with opened(self.folder / name) as f:
                out += json.loads(f.metadata()["captions"])
        return out

    @property
    def mean(self) -> Tensor:
        """(M, C, T', H', W'): all of them, read into memory. Only where all have one shape."""
        return torch.cat([self.file(s)["mean"] for s in range(len(self.names))])

    def concepts(self) -> Tensor | None:
        """Embed each caption, (M, D), as the mean of MetaCLIP's features; None where the text
        encoders are toys."""
        rows = []
        for s in range(len(self.names)):
            file = self.file(s)
            if "text.concepts_mask" not in file:
                return None
            x, mask = file["text.concepts"].float(), file["text.concepts_mask"]
            x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            rows.append(F.normalize(x, dim=1)[file["caption"]])
        return torch.cat(rows)


def normalizer_of(run: Run) -> autoencoder.Autoencoder:
    """Make the autoencoder without its weights: it can normalise latents, and takes no memory."""
    with torch.device("meta"):
        tae = autoencoder.autoencoder(run.cfg.autoencoder_config)
    stats = load_tensors(run.folder / "tae/tae.safetensors", ("lat_mean", "lat_std"))
    tae.load_state_dict(stats, strict=False, assign=True)
    return tae


def couple_latents(run: Run) -> None:
    """Make coupling.pt: the dual weights of the semi-discrete coupling of N(0, I) with the
    normalised latents, solved within groups of one caption, or of similar ones (sdot-global: not in
    groups)."""
    cfg, path = run.cfg, run.folder / "coupling.pt"
    if not cfg.coupling.startswith("sdot") or run.has("coupling.pt"):
        return
    latents, groups = Latents(run.folder / "latents"), None
    if cfg.coupling == "sdot":
        groups = sdot.caption_groups(latents.captions, latents.concepts(), cfg.sdot.cluster)
    elif rank() == 0:
        say("--coupling sdot-global ignores captions, so samples without guidance ignore them too")
    with named(f"--coupling {cfg.coupling}: "):
        coupling = sdot.Coupling.fit(
            normalizer_of(run).normalize(latents.mean), groups, cfg=cfg.sdot, progress=True,
            ranks=dist.is_initialized(), device=run.device)
    if rank() == 0:
        with writing(path):
            coupling.save(path)
        say(coupling.report())
    run.mesh.meet(f"{path}")


class TextToVideo(nn.Module):
    """What the dit stage trains: text projections (and toy encoders) and the DiT; its forward is
    the loss. widths: those of the pretrained encoders, which then need not be loaded."""

    def __init__(self, cfg: Config, widths: dict[str, int] | None = None):
        super().__init__()
        self.text = text_cond.TextConditioner(cfg.text, widths)
        self.dit = backbone.DiT(cfg.dit)
        self.flow, self.align = cfg.flow, cfg.train_dit.align if cfg.text.mode == "toy" else 0.0

    def forward(self, features: dict[str, Tensor], drop: Tensor, x1: Tensor, x0: Tensor, t: Tensor
                ) -> Tensor:
        P, mask = self.text(features, drop)
        loss = flow.loss(lambda x, t: self.dit(x, t, P, mask), x1, x0, t, self.flow)
        return loss + self.align * self.text.align(features, x1) if self.align else loss


def train_dit(run: Run) -> None:
    """Make model.safetensors, the result of a run: the autoencoder, the averaged weights of
    TextToVideo trained on the latents, and the config."""
    cfg, hp = run.cfg, run.cfg.train_dit
    if run.has("model.safetensors"):
        return
    latents, widths = Latents(run.folder / "latents"), {}
    if cfg.text.mode == "pretrained":
        first = latents.text(torch.tensor([0]))
        widths = {k: first[k].shape[2] for k in text_cond.ENCODERS}
    fresh = from_rank0(not checkpoints_in(run.folder / "dit"))

    def build() -> nn.Module:
        model = TextToVideo(cfg, widths)
        if cfg.init and fresh and not next(model.parameters()).is_meta:
            model.load_state_dict(start_from(result_of(Path(cfg.init)), cfg))
        return model

    model = place(run, build, hp.precision, fresh)
    if run.mesh.tokens is not None:
        split_tokens(model.dit, run.mesh.tokens)
    state = optimize(run, "dit", model, hp, hp.steps, dit_batches(run, latents, model.text))
    tae = load_tensors(run.folder / "tae/tae.safetensors")
    run.save("model.safetensors", {f"tae.{k}": v for k, v in tae.items()} | state,
             config=json.dumps(asdict(cfg)))


def dit_batches(run: Run, latents: Latents, text: text_cond.TextConditioner
                ) -> Callable[[int], list[tuple]]:
    """Make the `batch` of the dit stage. Every rank draws rows, times and dropped prompts for the
    batch of all ranks, from the step, and takes its share, in --train_dit.accumulate parts."""
    cfg, hp, tae = run.cfg, run.cfg.train_dit, normalizer_of(run)
    mine, buckets, coupling = share(hp.batch, *run.mesh.data), latents.buckets(), None
    dtype = torch.float64 if hp.precision == "fp64" else torch.float32    # bf16: products only
    if cfg.coupling.startswith("sdot"):
        path = run.folder / "coupling.pt"
        try:
            coupling = sdot.Coupling.load(path, tae.normalize(latents.mean))
            coupling.cfg = cfg.sdot                             # --sdot.memory may be another now
        except ValueError as error:
            raise UserError(f"{error}; remove it, and the next start solves it again") from None
    number = {c: i for i, c in enumerate(latents.captions)} if cfg.coupling == "minibatch" else {}

    def batch(step: int) -> list[tuple]:
        g = generator(cfg.seed, "dit", step)
        # All clips of a step have one shape, drawn in proportion to its clips.
        at = int(torch.randint(len(latents), (), generator=g))
        shape, clips = next(b for b in buckets if at in b[1])
        t = flow.sample_t(hp.batch, cfg.flow, g)[mine]
        drop = text.drop_mask(hp.batch, hp.drop, g, independent=hp.drop_each)[mine]
        rows = clips.start + torch.randint(len(clips), (hp.batch,), generator=g)
        # Each clip's noise has a generator of its own, so that a rank can draw its own alone.
        draw = lambda what, numbers: torch.stack([torch.randn(
            shape, generator=generator(cfg.seed, what, step, i)) for i in numbers])

        # Which noise meets which clip.
        if coupling is not None:    # draw a caption group by frequency; the noise picks the clip
            x0 = draw("x0", mine)
            groups = coupling.draw_group(hp.batch, g)[mine] if cfg.coupling == "sdot" else None
            rows = coupling.couple(x0, groups)
        elif cfg.coupling == "minibatch":       # within captions, over the batch of all ranks
            x0 = flow.minibatch_pairing(
                draw("x0", range(hp.batch)), tae.normalize(latents.rows(rows)[0]),
                torch.tensor([number[latents.captions[i]] for i in rows.tolist()]))[mine]
            rows = rows[mine]
        else:
            x0, rows = draw("x0", mine), rows[mine]

        mean, logvar = latents.rows(rows)
        x1 = tae.normalize(mean + (0.5 * logvar).exp() * draw("posterior", mine))
        parts = []                              # arguments of TextToVideo.forward
        for i, dropped, *rest in zip(*(v.chunk(hp.accumulate) for v in (rows, drop, x1, x0, t))):
            features = {k: v.to(run.device) for k, v in latents.text(i).items()}
            parts.append((features, dropped.to(run.device),
                          *(v.to(run.device, dtype) for v in rest)))
        return parts

    return batch


def start_from(file: Path, cfg: Config) -> dict[str, Tensor]:
    """Read the weights of TextToVideo that another run ended with, position tables stretched to
    this run's sizes, as Movie Gen does between its stages."""
    state = {k: v for k, v in load_tensors(file).items() if not k.startswith("tae.")}
    with torch.device("meta"):
        grown = backbone.DiT(read_config(file).dit)
    grown.tables.load_state_dict(only(state, "dit.tables."), strict=False, assign=True)
    grown.expand_positions(*(s.size for s in cfg.dit.streams))
    return state | {f"dit.tables.{k}": v for k, v in grown.tables.state_dict().items()}


FPS = re.compile(r"FPS-(\d+(?:\.\d+)?(?:e\+\d+)?)(?!\S)")       # in front of a prompt [MG s3.1.4]


@dataclass
class Loaded:
    """A trained run, ready to use: tae, text and dit (both with averaged weights), in eval mode."""

    cfg: Config
    tae: autoencoder.Autoencoder
    text: text_cond.TextConditioner
    dit: backbone.DiT
    device: torch.device

    @property
    def fps(self) -> int:
        return self.cfg.clips.fps

    def fps_of(self, prompt: str) -> int:
        """Give the frame rate that a prompt begins with; by default the run's."""
        rate = FPS.match(prompt) if self.tells_fps else None
        return max(1, round(float(rate[1]))) if rate else self.fps

    @property
    def tells_fps(self) -> bool:
        return self.cfg.clips.tell_fps and bool(self.cfg.data)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.tae.latent_shape(*self.cfg.clips.shape)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts with the text encoders. ValueError for what is no list of texts."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts {prompts!r}: must be a list of one or more texts")
        if self.tells_fps:
            prompts = [p if FPS.match(p) else f"FPS-{self.fps} {p}" for p in prompts]
        return self.text.encode(prompts)

    def prompts(self, prompts: list[str], features: dict[str, Tensor] | None = None
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make P (B, L, D), mask (B, L) of the prompts, and P, mask of as many null prompts.
        features: what `encode` made of the prompts, if that was called before."""
        features = features or self.encode(prompts)
        P, mask = self.text({k: v.to(self.device) for k, v in features.items()})
        return P, mask, *self.text.null_tokens(len(P))

    def noise(self, seeds: list[int]) -> Tensor:
        """Draw x0 (B, C, T', H', W'): the same seed gives the same noise on every device."""
        try:
            seeds = [operator.index(s) for s in seeds]
        except TypeError:
            raise ValueError(f"seeds {seeds}: must be whole numbers") from None
        return torch.stack([torch.randn(self.latent_shape, generator=generator("sample", s))
                            for s in seeds]).to(self.device)

    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents (B, C, T', H', W') -> clips (B, 3, T, H, W) in [-1, 1]."""
        T, H, W = shape = self.cfg.clips.shape
        x = self.tae.decode(self.tae.denormalize(z), T, (H, W), stream=large(shape))
        return x.clamp(-1, 1)

    def schedule(self, steps: int | None = None, name: str | None = None) -> Tensor:
        """Give the solver's times (steps + 1,) from 0 to 1; by default as configured."""
        s = self.cfg.sample
        steps = s.steps if steps is None else steps
        return flow.schedule(name or s.schedule, steps, shift=self.cfg.flow.shift)

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int] | None = None,
                 features: dict[str, Tensor] | None = None) -> Tensor:
        """Sample clips (B, 3, T, H, W) in [-1, 1] for prompts, with classifier-free guidance;
        steps, solver and scale as configured. seeds: one a prompt, by default 0 to B - 1. features:
        as in `prompts`."""
        s = self.cfg.sample
        P, mask, P0, mask0 = self.prompts(prompts, features)
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds {seeds}: must be one for each of {len(prompts)} prompts")
        if len(P) != len(prompts):
            raise ValueError(f"features of {len(P)} prompts: there are {len(prompts)}")
        v_fn = flow.guided(lambda x, t: self.dit(x, t, P, mask),
                           lambda x, t: self.dit(x, t, P0, mask0), s.guidance)
        z = flow.sample(v_fn, self.noise(seeds), self.schedule(), solver=s.solver,
                        cfg=self.cfg.flow)
        return self.decode(z)


def load_run(path: str | Path, device: str | torch.device = "cpu",
             prepare: Callable[[nn.Module], object] = lambda dit: None) -> Loaded:
    """Load a finished run, given its folder or a copy of its model.safetensors. prepare(dit) may
    first take blocks out of the DiT, which are then not read. On device "meta" no weights are read,
    for callers that ask for shapes only."""
    device, file = torch.device(device), result_of(Path(path))
    cfg, widths = read_config(file), {}
    if cfg.text.mode == "pretrained":           # the encoders themselves may be elsewhere
        with opened(file) as f:
            widths = {k: f.get_slice(f"text.null.{k}").get_shape()[0] for k in text_cond.ENCODERS}
    with torch.device("meta"):                  # neither memory nor random numbers
        model = TextToVideo(cfg, widths)
        tae = autoencoder.autoencoder(cfg.autoencoder_config)
    prepare(model.dit)
    if device.type != "meta":
        for part, prefix in ((model, ""), (tae, "tae.")):
            names = {prefix + k for k in part.state_dict()}
            part.load_state_dict(only(load_tensors(file, names), prefix), assign=True)
    for part in (model, tae):
        part.to(device).eval().requires_grad_(False)
    return Loaded(cfg, tae, model.text, model.dit, device)


def make_samples(run: Run) -> None:
    """Make samples/: a GIF (toy world) or an MP4 for each prompt, the clips as tensors, and
    index.json. Ranks share the batches; a thread writes files while the next batch is sampled. What
    an earlier start has made is kept."""
    folder, cfg, n = run.folder / "samples", run.cfg, run.cfg.sample.batch
    if cfg.data:
        captions = list(dict.fromkeys(Latents(run.folder / "latents").captions))
        todo = [("trained", captions[i % len(captions)])
                for i in range(min(cfg.sample.prompts, 2 * len(captions)))]
    else:
        todo = world.test_prompts(cfg.seed, cfg.sample.prompts, cfg.clips.things, cfg.clips.frames,
                                  cfg.clips.script)
    suffix = "mp4" if cfg.data else "gif"
    prompts = [prompt for _, prompt in todo]
    file = lambda i: folder / f"clips_{i:04d}.safetensors"
    mine = [i for i in range(0, len(todo), n)[rank() :: world_size()] if not readable(file(i))]

    def write(i: int, clips: Tensor) -> None:
        for j, clip in enumerate(clips, i):
            write_video(folder / f"{j:04d}.{suffix}", clip, loaded.fps_of(prompts[j]))
        save_tensors(file(i), {"clips": clips})             # the mark that all of them are there

    if mine:
        with writing(folder):
            folder.mkdir(exist_ok=True)
        loaded = load_run(run.folder, run.device)
        with named("text: "):
            features = loaded.encode(prompts)               # no encoder is loaded twice
        with ThreadPoolExecutor(1) as pool:
            written = [pool.submit(write, i, loaded.generate(
                prompts[i : i + n], range(i, min(i + n, len(todo))),
                {k: v[i : i + n] for k, v in features.items()}).cpu())
                for i in tqdm(mine, "sample", unit="batch", disable=rank() != 0)]
            for future in written:
                future.result()
    run.mesh.meet(f"{folder}")
    if rank() == 0:
        write_json(folder / "index.json", [
            {"file": f"{j:04d}.{suffix}", "kind": kind, "prompt": prompt, "seed": j}
            for j, (kind, prompt) in enumerate(todo)])


# ---- 6. Clips: the toy world, and folders of videos ----------------------------------------------
# A clip is a pure function of (seed, split, i, shape, done), so any rank or thread can make it.
# Splits: `tae` (the autoencoder's training), `train` (its last steps, and the statistics of its
# latents), `dit` (toy world: `train` with another share of signs), `heldout` (toy world: other
# clips of the same combinations).


class ToyClips:
    """Captioned clips of the toy world."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        most = longest_window(cfg)
        if most > world.LONGEST:
            raise UserError(f"--clips.frames, --clips.others or --train_tae.window {most}: at most "
                            f"{world.LONGEST} frames in the toy world; longer clips need --data")

    def shape(self, i: int) -> tuple[int, int, int]:
        """Draw (T, H, W) of clip i of the dit stage."""
        return self.cfg.clips.drawn_shape(f"shape/{self.cfg.seed}/{i}")

    def clip(self, split: str, i: int, shape: tuple[int, int, int], done: float = 0.0
             ) -> tuple[Tensor, str]:
        """Draw a clip (3, T, H, W) in [-1, 1], or a window of a longer one, and its caption. done:
        the share of the `tae` training that is past, for the motion curriculum."""
        c, hp, (T, H, W) = self.cfg.clips, self.cfg.train_tae, shape
        rng = random.Random(f"{'train' if split == 'dit' else split}/{self.cfg.seed}/{i}")
        length = max(c.frames, hp.window, T)
        what = {"tae": {"things": max(c.things, hp.crowd), "signs": hp.signs, "overlap": True},
                "dit": {"things": c.things, "signs": c.signs}}.get(split, {"things": c.things})
        scene = world.sample_world(rng, **what, frames=length, script=c.script,
                                   cap=world.cap_of(c.things))
        fast = split == "tae" and hp.motion > 1
        interval = world.motion_interval(rng, done, hp.motion) if fast else 1.0
        side, start = max(H, W), rng.randint(0, length - T)
        (x,) = world.render([scene], T, side, interval=interval, start=start)
        top, left = (side - H) // 2, (side - W) // 2                # the middle of a larger square
        return x[:, :, top : top + H, left : left + W], world.caption(scene)


CROPS = 4           # consecutive clips are crops of one window: decoding is what costs
NO_VIDEOS = {".txt", ".csv", ".json", ".jsonl", ".md", ".srt", ".vtt", ".py", ".html"}


class VideoFolder:
    """Clips of captioned videos (`find_videos`). A clip is a random window: T frames at a random
    start and frame interval, scaled to 1 to 1.5 times the least size that covers a clip, and
    cropped at random. The last fifth of each video, one clip at least, is held out of training,
    if a clip is left to train on.

    Frames are decoded when needed, one at a time, and scaled immediately: memory does not grow with
    the number, the length or the resolution of the videos.
    """

    def __init__(self, cfg: Config, videos: list[list]):
        self.cfg, self.root, self.videos = cfg, Path(cfg.data), videos
        self.lost: set[str] = set()
        self.longest = longest_window(cfg)
        self.last = threading.local()               # the window that this thread decoded last

    def shape(self, i: int) -> tuple[int, int, int]:
        """Draw (T, H, W) of clip i of the dit stage, with an aspect ratio near to its video's."""
        aspect = self.videos[i // CROPS % len(self.videos)][4]
        return self.cfg.clips.drawn_shape(f"shape/{self.cfg.seed}/{i // CROPS}", aspect)

    def clip(self, split: str, i: int, shape: tuple[int, int, int], done: float = 0.0
             ) -> tuple[Tensor, str]:
        """Read (3, T, H, W) in [-1, 1] and its caption, as in ToyClips."""
        key = (split, i // CROPS, shape, done)
        if getattr(self.last, "key", None) != key:
            self.last.key, self.last.window = key, self.window(*key)
        x, rate, caption = self.last.window                                         # (T, h, w, 3)
        rng = random.Random(f"{split}/{self.cfg.seed}/{i}/crop")
        _, H, W = shape
        top, left = (rng.randint(0, n - m) for n, m in zip(x.shape[1:3], (H, W)))
        x = rearrange(x[:, top : top + H, left : left + W], "T H W C -> C T H W")
        prefix = f"FPS-{rate:.3g} " if self.cfg.clips.tell_fps else ""              # [MG s3.1.4]
        return x.float() / 127.5 - 1, prefix + caption

    def window(self, split: str, w: int, shape: tuple[int, int, int], done: float
               ) -> tuple[Tensor, float, str]:
        """Read window number w -> (T, height, width, 3) uint8, frame rate, caption. A video that
        cannot be read any more is named once, and the next one takes its place."""
        for k in range(len(self.videos)):
            video = self.videos[(w + k) % len(self.videos)]
            try:
                return self.read(video, split, random.Random(f"{split}/{self.cfg.seed}/{w}"),
                                 shape, done)
            except Exception as error:      # whatever PyAV raises for what it could read before
                if video[0] not in self.lost:
                    say(f"{self.root / video[0]}: cannot be read any more ({reason(error)}); the "
                        "next video takes its place")
                self.lost.add(video[0])
        raise UserError(f"--data {self.root}: none of its videos can be read any more")

    def read(self, video: list, split: str, rng: random.Random, shape: tuple[int, int, int],
             done: float) -> tuple[Tensor, float, str]:
        """Read a random window of one video."""
        name, caption, frames, rate, aspect = video
        (T, H, W), fastest = shape, self.cfg.clips.max_interval
        if split == "tae" and self.cfg.train_tae.motion > 1:
            fastest = round(world.motion_interval(rng, done, self.cfg.train_tae.motion))
        cut = held_out(self.longest, frames)
        low, high = (cut, frames) if split == "heldout" else (0, cut or frames)
        interval = rng.randint(1, max(1, min(fastest, (high - low) // T)))
        start = rng.randint(low, max(low, high - interval * (T - 1) - 1))
        covering = max(H, W * aspect) if aspect < 1 else max(W, H / aspect)     # short side
        size = max(round(covering * rng.uniform(1.0, 1.5)), math.ceil(covering))
        x = read_window(self.root / name, start, interval, T, size, rate)
        if x.shape[1] < H or x.shape[2] < W:                # its shape has changed on the way
            grow = max(H / x.shape[1], W / x.shape[2])
            x = resized(x, [math.ceil(n * grow) for n in x.shape[1:3]])
        return x, rate / interval, caption


def longest_window(cfg: Config) -> int:
    """Count the frames of the longest window that any stage reads."""
    return max(cfg.train_tae.window, *(T for T, _, _ in cfg.clips.shapes))


def held_out(T: int, frames: int) -> int:
    """Find the first of the frames that are held out of training: the last fifth, or T frames if
    that is more. 0 if the video is too short for that: then nothing is held out."""
    cut = min(int(0.8 * frames), frames - T)
    return cut if cut >= T else 0


def find_videos(cfg: Config, mesh: "Mesh | None" = None) -> list[list]:
    """Look through --data -> [name, caption, frames, rate, height / width] of each video.

    A video is whatever PyAV can open, in subfolders too, except still pictures and hidden files.
    Its caption stands in NAME.txt beside it, or in a metadata.csv (`file_name,text`) of its folder
    or of a folder above. The files are shared out to the ranks; what is passed over is named."""
    root, mesh = Path(cfg.data), mesh or Mesh()
    if not root.is_dir():
        raise UserError(f"--data {cfg.data}: no such folder")
    paths = sorted(path for path in root.rglob("*")         # not only files: `look` names the rest
                   if (path.is_file() or path.is_symlink() or not os.access(path, os.R_OK)
                       or path.suffix.lower() == ".txt")
                   and not any(part.startswith(".") for part in path.relative_to(root).parts)
                   ) if rank() == 0 else []
    mesh.meet(f"--data {cfg.data}")
    paths = from_rank0(paths)
    captions = read_captions(root, [p for p in paths if p.name.lower() == "metadata.csv"])
    files = [p for p in paths if p.suffix.lower() not in NO_VIDEOS]
    relative = lambda path: same_name(path.relative_to(root).as_posix())
    beside = {relative(p.with_suffix("")): p for p in paths if p.suffix.lower() == ".txt"}

    def look(path: Path) -> list | str:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            return f"{name}: a folder that is {'a link' if path.is_symlink() else 'not readable'}"
        try:
            frames, rate, aspect = probe(path)
        except Exception as error:          # whatever PyAV raises for what is no video
            return f"{name}: not a video that can be read ({reason(error)})"
        caption = caption_of(path, beside.get(relative(path.with_suffix(""))),
                             captions.get(same_name(name)))
        return [name, caption, frames, rate, aspect] if caption else f"{name}: no caption"

    mine = files[rank() :: world_size()]
    with ThreadPoolExecutor(8) as pool:
        found = list(tqdm(pool.map(look, mine), desc="videos", total=len(mine), unit="file",
                          leave=False, delay=3, disable=rank() != 0))
    mesh.meet(f"--data {cfg.data}")
    every = everyone(found)
    rows = [every[i % world_size()][i // world_size()] for i in range(len(files))]  # as in `files`
    videos = [row for row in rows if isinstance(row, list)]
    if rank() == 0:
        tell_of_videos(cfg, videos, [row for row in rows if isinstance(row, str)],
                       captions.keys() - {relative(p) for p in files})
    if not videos:
        raise UserError(f"--data {cfg.data}: no video in it that can be read and has a caption, in "
                        "NAME.txt beside it or in metadata.csv (file_name,text)")
    return videos


def tell_of_videos(cfg: Config, videos: list[list], passed: list[str], absent: set[str]) -> None:
    """Say what of --data is not used, or not as one would expect."""
    c = cfg.clips
    for line in passed[:20]:
        say(f"--data: passed over {line}")
    if len(passed) > 20:
        say(f"--data: passed over {len(passed) - 20} more files")
    if absent:
        say(f"--data: metadata.csv names {some_of(absent)}: no such file here")
    if short := [name for name, _, frames, *_ in videos if frames < c.frames]:
        say(f"--data: shorter than {c.frames} frames, the last one is repeated: {some_of(short)}")
    if whole := [name for name, _, frames, *_ in videos
                 if frames >= c.frames and not held_out(longest_window(cfg), frames)]:
        say("--data: too short to hold out a clip for validation, the whole video is used for "
            f"training: {some_of(whole)}")
    seen = math.ceil(c.count / CROPS)
    if seen < len(videos):
        say(f"--clips.count {c.count}: the dit stage sees {seen} of the {len(videos)} videos, "
            f"{CROPS} crops of each; {CROPS * len(videos)} to see all")


def same_name(name: str) -> str:
    """Spell a path inside --data in one way: a/b.mp4 for ./a//b.mp4, a\\b.mp4; Unicode as NFC."""
    return os.path.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def read_captions(root: Path, tables: list[Path]) -> dict[str, str]:
    """Read each metadata.csv -> {file: caption}, files relative to `root`."""
    captions: dict[str, str] = {}
    real = lru_cache(os.path.realpath)                  # of folders, which may be links
    for table in tables:
        rows = csv.DictReader(io.StringIO(read_text(table)), strict=True)
        try:
            if not {"file_name", "text"} <= set(rows.fieldnames or ()):
                raise UserError(f"{table}: its first line must be file_name,text")
            for row in rows:
                if None in row:
                    raise UserError(f"{table}: line {rows.line_num}: more columns than the first "
                                    'line has; put a text with a comma in "..."')
                if not (file := (row["file_name"] or "").strip()):
                    raise UserError(f"{table}: line {rows.line_num}: no file_name")
                path = table.parent / file.replace("\\", "/").replace("\0", "")
                name = same_name(os.path.relpath(f"{real(path.parent)}/{path.name}", real(root)))
                text = (row["text"] or "").strip()
                if captions.setdefault(name, text) != text:
                    raise UserError(f"{table}: line {rows.line_num}: a second caption of {name}")
        except csv.Error as error:
            raise UserError(f"{table}: {error}; is a quotation mark not closed?") from None
    return captions


def caption_of(path: Path, beside: Path | None, listed: str | None) -> str:
    """Find a video's caption, in its NAME.txt or as listed in metadata.csv; "" if there is none."""
    caption = read_text(beside).strip() if beside else listed
    if caption is None:
        return ""
    if caption and listed and caption != listed:
        raise UserError(f"{path}: one caption in {beside.name}, another in metadata.csv")
    if not caption:
        raise UserError(f"{path}: its caption is empty")
    with named(f"{path}: its caption is no text: "):
        text_cond.clean(caption)
    return caption


def some_of(names: Iterable[str], most: int = 20) -> str:
    """List names, for a line that somebody will read."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# What is read below is what a player shows, not what a header says: without the frames that an edit
# list hides, at the times of the frames themselves, with square pixels, upright, and black where
# the picture is transparent.


def open_video(path: Path):
    """Open a file with PyAV -> (container, its video stream). A cover picture is no video."""
    import av

    container = av.open(str(path.absolute()), metadata_errors="replace")    # else a:b is a URL
    if container.format.name == "tty":              # FFmpeg shows .nfo, .asc, ... as on a terminal
        container.close()
        raise ValueError("a text")
    cover, best = av.stream.Disposition.attached_pic, container.streams.best("video")
    streams = [s for s in container.streams.video if s.codec_context]
    films = [s for s in streams if not s.disposition & cover]
    if not films:
        container.close()
        raise ValueError("a cover picture and no video" if streams else "no video stream")
    # FFmpeg's choice, unless it has one frame: then it is an unmarked cover.
    stream = max(films, key=lambda s: (s.frames != 1, s.index == best.index))
    stream.codec_context.thread_count = 1           # frame threads would hold many decoded frames
    return container, stream


def decoded(container, stream) -> Iterator:
    """Decode the frames of a stream in the order in which they are shown, from its position on."""
    import av

    codec, shown = stream.codec_context, False
    if {k.lower(): v for k, v in stream.metadata.items()}.get("alpha_mode") == "1":
        # Only libvpx sees the transparency of WebM.
        codec = av.CodecContext.create("libvpx-vp9" if codec.name == "vp9" else "libvpx", "r")
    for packet in container.demux(stream):
        try:
            frames = codec.decode(packet if packet.size else None)
        except av.error.InvalidDataError:
            if shown or packet.is_keyframe:
                raise
            continue                                # the file begins between two key frames
        shown = shown or bool(frames)
        yield from frames


def from_first(container, stream) -> tuple[object, Iterator]:
    """Decode a stream from its beginning -> (its first frame, all of its frames)."""
    frames = decoded(container, stream)
    first = next(frames, None)
    if first is None:
        raise ValueError("nothing can be decoded")
    return first, itertools.chain([first], frames)


def probe(path: Path) -> tuple[int, float, float]:
    """Measure a video -> (frames, frames a second, height / width as shown). Reads every packet and
    decodes one frame; raises what PyAV raises if it cannot."""
    container, stream = open_video(path)
    with container:
        first, _ = from_first(container, stream)
        w, h, (a, b, _, _) = shown_as(first, stream.sample_aspect_ratio)
        aspect = h / w if abs(a) >= abs(b) else w / h
    container, stream = open_video(path)
    with container:
        hidden = lambda p: p.is_discard or (            # VP8's reference frames that are not shown
            stream.codec_context.name == "vp8" and not bytes(p)[0] & 16)
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream)
                   if p.size and not hidden(p)]
        usual = float(stream.average_rate or stream.guessed_rate or 25)
        unit = float(stream.time_base or 0)
    count = counted(container) or first.pts is None or any(t is None for t, _ in packets)
    if count:                           # what is shown begins with a key frame, if any is marked
        packets = list(itertools.dropwhile(lambda p: not p[1], packets)) or packets
    else:
        packets = [p for p in packets if p[0] >= first.pts]
    if len(packets) < 2:
        raise ValueError("a still picture")
    if len(packets) < 3 or count:
        return len(packets), usual if usual < 1000 else 25.0, aspect    # 1000: a time base
    times = torch.tensor(sorted({t for t, _ in packets})).double() * unit
    gaps, span = times.diff(), (times[-1] - times[0]).item()
    mean, median = gaps.mean().item(), gaps.median().item()
    gap = mean if mean < 2 * median else median                     # uneven: the median
    return round(span / gap) + 1, 1 / gap, aspect


def counted(container) -> bool:
    """Tell whether frames have to be counted, for want of times: AVI and raw streams have none, and
    MPEG program streams change theirs after a seek."""
    no_times = 0x80                                                     # AVFMT_NOTIMESTAMPS
    return container.format.name in ("avi", "mpeg") or bool(container.format.flags & no_times)


def shown_as(frame, pixel_aspect) -> tuple[float, float, list[int]]:
    """Give width and height of a frame with square pixels, before it is turned, and how to turn
    it: [a, b, c, d] of the display matrix, which maps (x, y) to (a x + c y, b x + d y)."""
    from av.sidedata.sidedata import SideDataContainer

    turn = [1, 0, 0, 1]
    with contextlib.suppress(ValueError):       # side data that FFmpeg knows and PyAV does not
        for side in SideDataContainer(frame):   # frame.side_data would keep the frame: a cycle
            if "DISPLAYMATRIX" in str(side.type):
                a, b, _, c, d = memoryview(bytes(side)).cast("i")[:5]
                turn = [a, b, c, d]
    return frame.width * float(pixel_aspect or 1), frame.height, turn


def upright(frame, short_side: int, pixel_aspect) -> Tensor:
    """Make the picture that a player shows: (h, w, 3) uint8, short side scaled to short_side."""
    w, h, (a, b, c, d) = shown_as(frame, pixel_aspect)
    scale = short_side / min(w, h)
    w, h = max(short_side, round(w * scale)), max(short_side, round(h * scale))
    alpha = any(part.is_alpha for part in frame.format.components)
    x = torch.from_numpy(frame.to_ndarray(format="rgba" if alpha else "rgb24", width=w, height=h,
                                          interpolation="AREA"))
    if alpha:
        x = (x[..., :3].float() * x[..., 3:] / 255).round().byte()
    if abs(b) > abs(a):                                     # turned by a quarter
        x, a, d = x.transpose(0, 1), c, b
    return x.flip([dim for dim, sign in ((1, a), (0, d)) if sign < 0])


def read_window(path: Path, start: int, interval: int, T: int, size: int, rate: float,
                ahead: float = 0) -> Tensor:
    """Read T frames from frame `start` on, every `interval`-th, short side = size -> (T, h, w, 3)
    uint8. Frame k is shown at k / rate seconds; a picture that is shown longer is repeated, and so
    is the last one if the video ends early, unless more than a second before `start`: ValueError.

    Decoding begins at the key frame `ahead` seconds before `start`. If that proves to be too late,
    it begins earlier; if times cannot be trusted, frames are counted from the first one on."""
    container, stream = open_video(path)
    again = partial(read_window, path, start, interval, T, size, rate)
    out: list[Tensor] = []
    wanted = lambda: start + len(out) * interval
    with container:
        first, frames = from_first(container, stream)
        origin, unit = first.pts, float(stream.time_base)
        pixel_aspect = stream.sample_aspect_ratio
        count = ahead == math.inf or counted(container) or origin is None
        sought = not count and start / rate > ahead
        if sought:
            container.seek(origin + int((start / rate - ahead) / unit), stream=stream)
        last, at = None, -1                                 # the frame before, and its number
        for frame in decoded(container, stream) if sought else frames:
            if not count and (frame.pts is None or last is not None and frame.pts <= last.pts):
                return again(ahead=math.inf)
            # Frames count up by one, whatever small errors their times have; only a gap of two
            # frames or more skips numbers.
            due = at + 1 if count else (frame.pts - origin) * unit * rate
            at = round(due) if last is None or due >= at + 2 else at + 1
            if sought and last is None and at > start:      # the seek went too far
                return again(ahead=2 * ahead + 1)
            while len(out) < T and wanted() < at:
                out.append(upright(last or frame, size, pixel_aspect))
            if len(out) < T and wanted() == at:
                out.append(upright(frame, size, pixel_aspect))
            last = frame
            if len(out) == T:
                break
        if not out:
            if sought and last is None:
                return again(ahead=2 * ahead + 1)
            if last is None or start - at > max(rate, 3):
                raise ValueError(f"nothing can be decoded from frame {start} on")
            out.append(upright(last, size, pixel_aspect))
    shape = out[0].shape                            # a recording may change its shape on the way
    out = [x if x.shape == shape else resized(x[None], shape[:2])[0] for x in out]
    return torch.stack(out + out[-1:] * (T - len(out)))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring pictures (T, h, w, 3) uint8 to another size."""
    x = F.interpolate(x.movedim(3, 1).float(), list(size), mode="bilinear", antialias=True)
    return x.round().byte().movedim(1, 3)


def in_bytes(x: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to uint8, on the CPU."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()


def save_gif(path: Path, frames: list, fps: float) -> None:
    """Write Pillow images as a GIF. Its delays are hundredths of a second, and browsers show those
    below two as ten. So delays vary by one, and above 50 frames a second frames are left out."""
    if fps > 50:
        frames = [frames[int(k * fps / 50)] for k in range(math.ceil(len(frames) * 50 / fps))]
    ends = [round(100 * k / min(fps, 50)) for k in range(len(frames) + 1)]
    with writing(path):
        frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                       duration=[10 * (b - a) for a, b in zip(ends, ends[1:])])


def write_video(path: str | Path, clip: Tensor, fps: float = 8, zoom: int = 1) -> None:
    """Write a clip (3, T, H, W) in [-1, 1] as .mp4 or .gif, each pixel enlarged `zoom` times."""
    path = Path(path)
    if not 0.002 <= fps < math.inf:                     # the longest delay of a GIF is 655 s
        raise ValueError(f"fps {fps}: must be finite, 0.002 or more")
    frames = rearrange(in_bytes(clip), "C T H W -> T H W C").numpy()
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(f).quantize(255) for f in frames]         # before enlarging
        save_gif(path, [i.resize((zoom * i.width, zoom * i.height), Image.Resampling.NEAREST)
                        for i in images], fps)
    elif path.suffix == ".mp4":
        import av

        frames = frames.repeat(zoom, 1).repeat(zoom, 2)
        h, w = (n - n % 2 for n in frames.shape[1:3])                       # 4:2:0: even sides
        if not h * w:
            raise ValueError(f"{path}: a picture of .mp4 needs 2 x 2 pixels or more")
        with writing(path), av.open(str(path), "w") as container:
            rate = Fraction(float(fps)).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
            stream.height, stream.width, stream.pix_fmt = h, w, "yuv420p"
            for f in frames:
                frame = av.VideoFrame.from_ndarray(f[:h, :w].copy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        raise ValueError(f"{path}: not .mp4 or .gif")


# ---- 7. The report -------------------------------------------------------------------------------


KINDS = {"trained": "Prompts like those of training",               # of samples, in their order
         "heldout": "Combinations of colour, shape and direction that training never showed",
         "words": "Words of two and three letters", "words_heldout": "Words never trained on"}


def make_report(run: Run, clips) -> dict:
    """Make report.json (every figure by name), index.html and its pictures."""
    if rank() != 0:
        return {}
    cfg, folder = run.cfg, run.folder
    loaded = load_run(folder, run.device)
    report: dict = {"scale": cfg.scale, "seed": cfg.seed, "data": cfg.data or "toy world",
                    "coupling": cfg.coupling}
    report["tae_psnr_db"], report["dit_val_loss"] = on_held_out(run, loaded, clips)
    report["parameters"] = {name: sum(p.numel() for p in m.parameters()) for name, m in (
        ("tae", loaded.tae), ("text", loaded.text), ("dit", loaded.dit))}
    rows = read_json(folder / "samples/index.json")
    n = cfg.sample.batch
    clip = lambda i: load_tensors(                          # mapped, so that memory holds a few
        folder / f"samples/clips_{i - i % n:04d}.safetensors")["clips"][i % n]
    if not cfg.data:
        if (folder / "judge.json").exists():
            report["judge"] = read_json(folder / "judge.json")
        report |= judged(rows, clip, cfg.seed)
    report["seconds"] = run.seconds()
    report["seconds"]["total"] = round(sum(report["seconds"].values()), 1)
    report["machine"] = {"threads": torch.get_num_threads(), "device": str(run.device),
                         "ranks": world_size(), "torch": torch.__version__}
    draw_curves(folder / "curves.png", run.losses())
    shown = range(len(rows))[:: max(1, len(rows) // 24)][:24]
    contact_sheet(folder / "samples.gif", [clip(i) for i in shown],
                  [rows[i]["prompt"] for i in shown], cfg.clips.fps)
    write_page(folder, report, rows)
    write_json(folder / "report.json", report)
    return report


@torch.no_grad()
def on_held_out(run: Run, loaded: Loaded, clips) -> tuple[float, float]:
    """Measure 64 held-out clips -> (PSNR of the autoencoder, validation loss of the DiT). The first
    twelve are written to reconstructions/, each beside what the autoencoder makes of it."""
    T, H, W = shape = run.cfg.clips.shape
    tae, folder, psnr, z, captions = loaded.tae, run.folder / "reconstructions", [], [], []
    with writing(folder):
        folder.mkdir(exist_ok=True)
    for x, texts, posterior in encoded(run, tae, clips, "heldout", range(64), shape):
        again = tae.decode(posterior.mean, T, (H, W), stream=large(shape)).cpu()
        psnr.append(autoencoder.psnr(again, x))
        for i, (a, b) in enumerate(zip(x[: max(0, 12 - len(captions))], again), len(captions)):
            pair = torch.cat([a, torch.full_like(a[..., :2], -1), b], dim=-1)
            write_video(folder / f"{i:02d}.gif", pair, run.cfg.clips.fps)
        z.append(tae.normalize(posterior.mean))
        captions += texts
    loss = validation_loss(loaded, torch.cat(z), captions)
    return round(torch.cat(psnr).mean().item(), 2), round(loss, 4)


@torch.no_grad()
def validation_loss(loaded: Loaded, z: Tensor, captions: list[str]) -> float:
    """Measure the flow-matching loss of the DiT on normalised latents (B, C, T', H', W'), at ten
    fixed times: Movie Gen's proxy for human preference."""
    P, mask, _, _ = loaded.prompts(captions)
    v_fn = lambda *x_t: torch.cat([loaded.dit(*part) for part in zip(       # as in sampling
        *(v.split(loaded.cfg.sample.batch) for v in (*x_t, P, mask)))])
    return flow.validation_loss(v_fn, z, loaded.cfg.flow, times=10)


def judged(rows: list[dict], clip: Callable[[int], Tensor], seed: int) -> dict:
    """Add the judge's verdict to each row -> prompt_accuracy, and gap.random, the control: the same
    with prompts shuffled among the clips. Kinds without a row are left out."""
    for i, row in enumerate(rows):
        row["verdict"] = world.judge(clip(i), row["prompt"])
    by = lambda kind: [r["verdict"] for r in rows if r["kind"] == kind]
    figures = world.accuracy(by("trained"))
    if held := by("heldout"):
        figures["heldout"] = sum(v["color"] and v["shape"] and v["direction"]
                                 for v in held) / len(held)
    figures |= {kind: world.accuracy(by(kind))["text"] for kind in ("words", "words_heldout")
                if by(kind)}
    trained = [i for i, r in enumerate(rows) if r["kind"] == "trained"]
    order = trained.copy()
    random.Random(f"shuffle/{seed}").shuffle(order)
    shuffled = [world.judge(clip(i), rows[j]["prompt"]) for i, j in zip(trained, order)]
    return {"prompt_accuracy": figures, "gap": {"random": world.accuracy(shuffled)}}


def plot_losses(figure, losses: dict[str, dict[int, float]]) -> None:
    """Plot {stage: {step: loss}} side by side, every step and running means."""
    for i, (stage, points) in enumerate(losses.items(), 1):
        ax = figure.add_subplot(1, len(losses), i)
        steps, values = (torch.tensor(v).double() for v in zip(*sorted(points.items())))
        ax.plot(steps, values, lw=0.4, alpha=0.4, color="C0")
        k = max(1, len(steps) // 50)
        ax.plot(*([part.mean() for part in v.split(k)] for v in (steps, values)), color="C0")
        ax.set(title=f"{stage}: loss", xlabel="step", yscale="log")
        ax.grid(alpha=0.3, which="both")


def draw_curves(path: Path, losses: dict[str, dict[int, float]]) -> None:
    """Write the losses of a run as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * max(1, len(losses)), 3))
    plot_losses(figure, losses)
    figure.tight_layout()
    with writing(path):
        figure.savefig(path, dpi=110)


def contact_sheet(path: Path, clips: list[Tensor], titles: list[str], fps: int) -> None:
    """Write one animated GIF of many clips, with their prompts under them."""
    import textwrap

    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"),
                              11)
    side, gap, below, columns = 128, 8, 44, 6
    across, down = side + gap, side + below + gap
    places = [(gap + i % columns * across, gap + i // columns * down) for i in range(len(clips))]
    empty = Image.new("RGB", (columns * across + gap, places[-1][1] + down), "white")
    for (x, y), title in zip(places, titles):
        ImageDraw.Draw(empty).multiline_text(
            (x, y + side + 2), "\n".join(textwrap.wrap(title, 22)[:3]), "black", font, spacing=1)
    sheets = []
    for k in range(clips[0].shape[1]):
        sheet = empty.copy()
        for place, clip in zip(places, clips):
            frame = in_bytes(clip[:, k]).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST),
                        place)
        sheets.append(sheet.quantize(255, dither=Image.Dither.NONE))
    save_gif(path, sheets, fps)


def write_page(folder: Path, report: dict, rows: list[dict]) -> None:
    """Write index.html: every sample with its prompt and verdict, then reconstructions, curves, and
    the figures in words."""
    from html import escape

    def card(row: dict) -> str:
        file, prompt = f"samples/{row['file']}", escape(row["prompt"])
        verdict = " ".join(f'<span class="{"yes" if ok else "no"}">{SHOWN.get(k, k)}</span>'
                           for k, ok in row.get("verdict", {}).items())
        look = (f'<video src="{file}" autoplay loop muted playsinline></video>'
                if file.endswith("mp4") else f'<img src="{file}" loading="lazy">')
        return f"<figure>{look}<figcaption>{prompt}<br>{verdict}</figcaption></figure>"

    parts = []
    for kind, title in KINDS.items():
        if cards := "".join(card(r) for r in rows if r["kind"] == kind):
            parts.append(f"<h2>{title}</h2><div class=grid>{cards}</div>")
    pairs = "".join(f'<img src="reconstructions/{i:02d}.gif">' for i in range(12))
    words = in_words(report)
    figures = "".join(f"<li>{escape(line)}" for line in words)
    title = escape(f"filmstrip: {folder.name}")
    write_text(folder / "index.html", f"""<!doctype html><meta charset="utf-8">
<title>{title}</title><style>{CSS}</style><h1>{title}</h1>
<p>{escape(words[0])}.{" Under a clip: what the judge saw as asked, and what it did not."
   if "prompt_accuracy" in report else ""}</p>
{"".join(parts)}
<h2>Held-out clips, each beside what the autoencoder makes of it</h2><div class=pairs>{pairs}</div>
<h2>Training</h2><img class=curves src="curves.png">
<h2>Figures</h2><ul>{figures}</ul><p>All of them by name: <a href="report.json">report.json</a>.</p>
""")


SHOWN = {"color": "colour", "text": "letters", "tae": "autoencoder", "dit": "DiT"}
KINDS_IN_WORDS = {"heldout": "all correct on combinations never trained on",
                  "words": "words of two and three letters that are read",
                  "words_heldout": "words never trained on that are read"}


def in_words(report: dict) -> list[str]:
    """Put a report's figures into words for people who do not know its keys."""
    percent = lambda d: ", ".join(f"{SHOWN.get(k, k)} {100 * v:.0f} %" for k, v in d.items())
    lines = []
    if seen := dict(report.get("prompt_accuracy", {})):
        rest = {title: seen.pop(k) for k, title in KINDS_IN_WORDS.items() if k in seen}
        lines = [f"Prompts followed: {percent(seen)}",
                 *(f"{title}: {100 * v:.0f} %" for title, v in rest.items()),
                 "the same clips against the prompts of others: "
                 + percent(report["gap"]["random"])]
    if "judge" in report:
        lines.append(f"the judge is right about rendered clips: {percent(report['judge'])}")
    lines.append(f"Reconstruction of held-out clips: {report['tae_psnr_db']:.1f} dB PSNR")
    lines.append(f"validation loss of the DiT: {report['dit_val_loss']:.3f}")
    lines.append("parameters: " + ", ".join(f"{SHOWN.get(k, k)} {v / 1e6:.1f} M"
                                            for k, v in report["parameters"].items()))
    lines.append("seconds: " + ", ".join(f"{SHOWN.get(k, k)} {v:,.0f}"
                                         for k, v in report["seconds"].items()))
    return lines


CSS = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em }
.grid { display: flex; flex-wrap: wrap; gap: 12px }
figure { margin: 0; width: 128px } figure img, figure video { width: 128px; height: 128px }
figcaption { font-size: 11px; line-height: 1.3 }
.pairs img { height: 128px; margin: 4px } img { image-rendering: pixelated }
.curves { max-width: 100%; image-rendering: auto }
.yes, .no { padding: 0 3px; border-radius: 2px; font-size: 10px; display: inline-block }
.yes { background: #d7f0d7 } .no { background: #f6cfcf; text-decoration: line-through }
"""


# ---- 8. The plan ---------------------------------------------------------------------------------
# What the dit stage costs on GPUs that need not be there. Activations and FLOPs of a step are
# measured with two blocks and with three of the real model, on tensors without content, and
# extrapolated to any depth; the rest is counted.


def tokens_of(cfg: Config, shape: tuple[int, int, int]) -> int:
    """Count N, the video tokens of a clip of T x H x W frames."""
    return sum(math.prod(size) // math.prod(stream.patch)
               for stream, (_, *size) in zip(cfg.dit.streams, parts_of(cfg, shape)))


def text_tokens(cfg: Config) -> int:
    """Count L, the text tokens of the longest prompt: the toy world's, or the encoders' limits."""
    if cfg.text.mode == "toy" and not cfg.data:
        text = text_cond.TextConditioner(cfg.text)
        longest = world.longest_caption(cfg.clips.things, cfg.clips.script)
        return text(text.encode([longest]))[1].shape[1]
    bag = lambda name: name == "concepts" and cfg.text.mode == "toy"        # one token
    return sum(1 if bag(name) else cfg.text.limit(name) for name in text_cond.ENCODERS)


def one_step(dit: backbone.DiTConfig, b: int, n: int, L: int, bf16: bool = False,
             text_grad: bool = False):
    """Make a DiT with gradients, and a function that makes a step with b clips of n tokens."""
    s = dit.streams[0]                                      # n tokens in a row
    model = backbone.DiT(replace(dit, streams=(replace(s, size=(n * s.patch[0], *s.patch[1:])),)))
    for p in model.blocks.parameters() if bf16 else ():
        p.data = p.data.bfloat16()                          # as FSDP hands them out
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(b, s.channels, n * s.patch[0], *s.patch[1:])
    text = torch.randn(b, L, dit.dim, requires_grad=text_grad)
    t, mask = torch.rand(b), torch.ones(b, L, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(x, t, text, mask).square().mean().backward()

    return model, step


def activation_bytes(dit: backbone.DiTConfig, b: int, n: int, L: int, bf16: bool) -> int:
    """Measure the peak bytes of a step with b clips of n tokens, beyond weights and gradients.
    The text has no gradient here: with checkpointing MemTracker would count one for each block,
    where a real step holds about eight."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model, step = one_step(dit, b, n, L, bf16)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - 2 * sum(p.nbytes for p in model.parameters())


def step_flops(dit: backbone.DiTConfig, N: int, L: int) -> int:
    """Count a clip's FLOPs, forward and backward, with torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        one_step(dit, 1, N, L, text_grad=True)[1]()
    return counter.get_total_flops()


def by_depth(figure: Callable, dit: backbone.DiTConfig, *args) -> int:
    """Extrapolate figure(dit, *args), linear in the depth, from two and three blocks."""
    two, three = (figure(replace(dit, depth=depth), *args) for depth in (2, 3))
    return two + (dit.depth - 2) * (three - two)


def plan(cfg: Config, asked: "Command") -> dict[str, dict[str, float]]:
    """Count what the dit stage costs on asked.gpus GPUs, for the largest clips -> {"memory": bytes
    of the fullest rank, "step": sizes, FLOPs and seconds}."""
    hp, dit, L = cfg.train_dit, cfg.dit, text_tokens(cfg)
    with named("--text."), torch.device("meta"):
        model = TextToVideo(cfg)
    params, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.dit.blocks[0]))
    rest = params - dit.depth * block
    N = max(tokens_of(cfg, shape) for shape in cfg.clips.shapes)
    S = asked.gpus // asked.replicate                   # ranks of one copy
    bf16, e = hp.precision == "bf16", 2 if hp.precision == "bf16" else 4
    n, b = math.ceil(N / asked.sp), math.ceil(hp.batch * asked.sp / (asked.gpus * hp.accumulate))
    held = 2 if asked.reshard else dit.depth        # whole blocks: one in use, one prefetched
    memory = {
        "weights, gradients, Adam": 16 * params / S,
        "moving average": 4 * bool(hp.ema) * params / S,
        "whole blocks, one's gradient": (S > 1) * (held * e + e + 4) * block,
        "whole rest": (S > 1) * 4 * rest, "bf16 copies": (S == 1 and bf16) * 2 * params,
        "activations": by_depth(activation_bytes, dit, b, n, L, bf16)}
    flops = hp.batch * by_depth(step_flops, dit, N, L)
    seconds = flops / (asked.gpus * asked.peak * 1e12 * asked.utilisation)
    return {"memory": memory, "step": {
        "parameters": params, "N": N, "L": L, "clips of a rank": b, "flops": flops,
        "seconds": seconds, "days": hp.steps * seconds / 86400}}


def print_plan(cfg: Config, asked: "Command") -> None:
    """Print a plan, and what does not fit."""
    memory, step = plan(cfg, asked).values()
    hp, total = cfg.train_dit, sum(memory.values())
    shares = asked.gpus // asked.sp * hp.accumulate
    print(f"{step['parameters'] / 1e9:.3f} B parameters on {asked.gpus} GPUs: {asked.replicate} "
          f"copies, each sharded over {asked.gpus // asked.replicate}; {asked.sp} share the tokens "
          f"of a clip\na step: {hp.batch} clips, {step['clips of a rank']} at a time on a rank; "
          f"{step['N']:,} video tokens and {step['L']} text tokens a clip")
    print(f"memory of a rank: {total / 1e9:.3g} GB")
    print("".join(f"  {k:30} {v / 1e9:10.3f} GB\n" for k, v in memory.items() if v), end="")
    print(f"a step: {step['flops']:.4g} FLOP, {step['seconds']:.3g} s at "
          f"{100 * asked.utilisation:g} % of {asked.peak:g} TFLOP/s\n"
          f"{hp.steps:,} steps: {step['days']:.3g} days")
    for wrong, line in (
            (total > 1e9 * asked.memory, f"{total / 1e9:.3g} GB > {asked.memory:g} GB; use less "
             "with --dit.checkpointing true, --train_dit.accumulate, --sp, --reshard true, --gpus"),
            (hp.batch % shares, f"--batch {hp.batch} is no multiple of {shares}: --gpus / --sp x "
             "--train_dit.accumulate")):
        if wrong:
            print(f"does not fit: {line}")


# ---- 9. Command line -----------------------------------------------------------------------------


@dataclass
class Command:
    """Flags that are no part of a run's config."""

    workdir: str = ""  # run folder (default: runs/SCALE)
    stage: Literal[(*STAGES, "all")] = "all"  # run up to and including this stage
    device: Literal["", "cpu", "cuda"] = ""  # default: cuda if there is one; choices
    dp: int = 0  # ranks that share out parameters and clips; 0: all that are left
    sp: int = 1  # ranks that share the tokens of a clip, in the dit stage
    replicate: int = 0  # copies of the model; 0: for toy and small as many as fit, else one
    reshard: bool = True  # free a block's parameters after its forward pass
    timeout: float = 600.0  # seconds that a rank waits for the others in a collective
    plan: bool = False  # print what the dit stage would take, and end; needs no GPU
    gpus: int = 8  # --plan: GPUs
    memory: float = 80.0  # --plan: GB of a GPU
    peak: float = 989.0  # --plan: TFLOP/s of a GPU, as its maker says (989: an H100 in bf16)
    utilisation: float = 0.4  # --plan: share of the peak that is reached

    def __post_init__(self):
        within(self, 0, 10**7, "dp", "replicate")
        within(self, 1, 10**7, "sp", "gpus")
        within(self, TINY, 1e9, "timeout", "memory", "peak", "utilisation")


PLANNED = {"gpus", "memory", "peak", "utilisation"}                     # only with --plan
NAMES = {"variant": "tae", "text.mode": "text", "train_dit.steps": "steps",
         "train_dit.batch": "batch"}                                    # short names of fields


def help_of(kind) -> dict[str, str]:
    """Read the comment beside each field of a dataclass."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        # inspect.getsource(base) would parse the whole file, each time: a second for all classes.
        text = inspect.getsource(sys.modules[base.__module__])
        body = re.search(rf"^class {base.__name__}\b.*?(?=^\S|\Z)", text, re.M | re.S)[0]
        found |= dict(re.findall(r"^    (\w+): .*?  +# (.*)$", body, re.M))
    return found


def value_of(kind, word: str):
    """Convert a word of the command line to a type: int, float, bool, str or a Literal."""
    if typing.get_origin(kind) is Literal:
        if word not in typing.get_args(kind):
            raise argparse.ArgumentTypeError(
                f"{word}: not one of {', '.join(filter(None, typing.get_args(kind)))}")
        return word
    try:
        value = ({"true": True, "false": False}[word.lower()] if kind is bool else kind(word))
        if kind is not str and not abs(value) < 2**63:          # nan, too
            raise ValueError
        return value
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a finite number", bool: "true or false"}[kind]
        raise argparse.ArgumentTypeError(f"{word}: not {wanted}") from None


def add_flags(parser: argparse.ArgumentParser, prefix: str, cfg) -> None:
    """Add a flag for each field of a dataclass; those not given stay out of the result."""
    notes, kinds = help_of(type(cfg)), typing.get_type_hints(type(cfg))
    group = parser.add_argument_group(prefix.rstrip(".") or None, cfg.__doc__.split("\n")[0])
    for f in fields(cfg):
        name, value, kind = prefix + f.name, getattr(cfg, f.name), kinds[f.name]
        if is_dataclass(value) or name in DERIVED:
            continue
        many = typing.get_origin(kind) is tuple
        shown = " ".join(map(str, value)) if many else str(value).lower() if kind is bool else value
        choices = ", ".join(filter(None, typing.get_args(kind))) if typing.get_origin(
            kind) is Literal else ""
        how = {"nargs": "*"} if many else {"nargs": "?", "const": "true"} if name == "plan" else {}
        group.add_argument(*(f"--{n}" for n in (name, NAMES.get(name)) if n), dest=name,
                           type=partial(value_of, typing.get_args(kind)[0] if many else kind),
                           default=argparse.SUPPRESS, metavar="X", **how,
                           help=(notes.get(f.name, "") + f": {choices}" * bool(choices)
                                 + f" (default: {shown})" * (shown != "")).replace("%", "%%"))


def changed(cfg, prefix: str, given: dict):
    """Replace the fields of a dataclass whose flags were given."""
    new = {f.name: given[prefix + f.name] for f in fields(cfg) if prefix + f.name in given}
    with named(f"--{prefix}"):
        return replace(cfg, **new)


def make_parser() -> argparse.ArgumentParser:
    """Make a parser with a flag for each field of Command, Config and its sections. What it does
    not understand is a UserError."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage="train.py [--flag value ...]", allow_abbrev=False,
        description="Train a text-to-video system and sample from it. Started again, a run "
        "continues. The defaults are those of --scale toy.")

    def error(message: str):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise UserError(message)

    parser.error = error
    defaults = finish(SCALES["toy"]())
    add_flags(parser, "", Command())
    add_flags(parser, "", defaults)
    for name, section in vars(defaults).items():
        if is_dataclass(section):
            add_flags(parser, f"{name}.", section)
    return parser


def parse(argv: list[str]) -> tuple[Config, Command]:
    """Parse flags -> the run's config and the rest. A flag wins over --base or --init, whose
    settings win over the preset of --scale."""
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(make_parser().parse_args(argv)).items()}
    command = changed(Command(), "", given)
    if not command.plan and (idle := sorted(given.keys() & PLANNED)):
        raise UserError(f"--{idle[0]} {given[idle[0]]}: needs --plan; a run has the ranks of "
                        "torchrun")
    for name in ("data", "workdir", "base", "init"):
        if given.get(name) == "":
            raise UserError(f"--{name} '': no such folder")
    taken = taken_over(given)
    cfg = taken or SCALES[given.get("scale", "toy")]()
    if not taken and cfg.scale == "small" and (command.plan or device_of(command).type == "cuda"):
        cfg.train_tae.precision = cfg.train_dit.precision = "bf16"
    if "data" in given and not cfg.data and cfg.scale in ("toy", "small"):
        cfg.clips.count = 1024                          # each window must be decoded
        cfg.tae.shortcut |= not taken                   # an autoencoder stays as it was trained
    for name, section in list(vars(cfg).items()):
        if is_dataclass(section):
            setattr(cfg, name, changed(section, f"{name}.", given))
    cfg = changed(cfg, "", given)
    with named(""):
        return finish(cfg), command


def taken_over(given: dict) -> Config | None:
    """Read the config of the run that --base or --init names, if any. UserError for a run that is
    not far enough, and for a flag that would change what is taken over."""
    if "base" in given and "init" in given:
        raise UserError("--base, --init: one or the other")
    how = "base" if "base" in given else "init"
    if how not in given:
        return None
    other = given[how]
    with named(f"--{how} "):
        cfg = replace(read_config(other), base="", init="")
        cfg.dit = replace(cfg.dit, text_dim=0)          # `finish` sets it again, for another dim
    if given.get("scale", cfg.scale) != cfg.scale:
        raise UserError(f"--scale {given['scale']}: {other} is a run of --scale {cfg.scale}")
    fixed = ("tae.", "vidtwin.", "loss.", "train_tae.", "variant",
             *(("text.", "dit.", "patch") if how == "init" else ()),
             *(("clips.size", "clips.frames") if cfg.variant == "vidtwin" else ()))
    for name in given.keys() - HOW - {"text.without"}:
        if name.startswith(fixed):
            value = given[name]
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name} {words}: --{how} {other} has settled it")
    with named(f"--{how} "):
        if how == "init":
            result_of(Path(other))
        elif not (Path(other) / "tae/tae.safetensors").exists():
            raise UserError(f"{other}: no run with an autoencoder there; train first: "
                            f"torchrun train.py --workdir {other}")
    return cfg


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """Flatten a config as JSON -> {name of the flag: value}."""
    out: dict[str, object] = {}
    for name, value in config.items():
        out |= (flat(value, f"{prefix}{name}.") if isinstance(value, dict) else
                {prefix + name: value})
    return out


def open_run(cfg: Config, folder: Path, device: torch.device | str = "cpu",
             mesh: Mesh | None = None) -> Run:
    """Open the run folder, new or continued, and keep other processes out. UserError for a run of
    another configuration (except HOW), and if nodes see different folders."""
    path, run = folder / "config.json", Run(folder, cfg, device, mesh)
    if path.exists():
        begun, mine = flat(asdict(read_config(folder))), flat(asdict(cfg))
        moved = {"data"} if cfg.data and begun["data"] else set()   # a run keeps to videos.json
        if other := [f"{k}: {begun[k]} there, {v} here" for k, v in mine.items()
                     if v != begun[k] and k not in HOW | DERIVED | moved]:
            raise UserError(f"--workdir {folder}: holds a run of another configuration "
                            f"({'; '.join(other)}); choose another --workdir")
    elif folder.exists() and {p.name for p in folder.iterdir()} - {
            "lock", "seen", "config.json.part"}:             # a kill may have left these
        raise UserError(f"--workdir {folder}: not empty, and not a run of train.py; choose another "
                        "--workdir")
    run.mesh.meet(f"{folder}")
    if rank() == 0:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            run.lock = (folder / "lock").open("a")
        try:
            fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--workdir {folder}: another run works there; end it, or choose "
                            "another --workdir") from None
        except OSError:                     # a file system that knows no locks
            pass
        (folder / "seen").touch()
    run.mesh.meet(f"{folder}/lock")
    sees = everyone((folder / "seen").exists())
    if rank() == 0:
        (folder / "seen").unlink(missing_ok=True)
    if not all(sees):
        raise UserError(f"--workdir {folder}: rank {sees.index(False)} does not see the files that "
                        "rank 0 writes there; it has to be one folder for all nodes")
    if rank() == 0:
        text = json.dumps(asdict(cfg), indent=1)
        if not path.exists() or read_text(path) != text:
            write_text(path, text)
    run.mesh.meet(f"{path}")
    return run


def check_sp(cfg: Config, sp: int) -> None:
    """Raise UserError if heads or tokens cannot be shared out to sp ranks."""
    fewest = min(tokens_of(cfg, shape) for shape in cfg.clips.shapes)
    for what, most in (("attention heads", cfg.dit.heads), ("tokens in the smallest clip", fewest)):
        if sp > most:
            raise UserError(f"--sp {sp}: more ranks than {what}, {most}")
    if sp > 1 and cfg.dit.conditioning == "in_context":
        raise UserError(f"--sp {sp}: not with --dit.conditioning in_context, whose time token is "
                        "no video token")


def check_shares(cfg: Config, mesh: Mesh, folder: Path, last: str) -> None:
    """Raise UserError if the clips of the stages that are still to come, up to `last`, cannot be
    shared out."""
    parts, todo = cfg.train_dit.accumulate, []
    if last not in STAGES[:3] and not (folder / "model.safetensors").exists():
        todo.append(("--batch", cfg.train_dit.batch, mesh.data[1] * parts))
    if not (cfg.base or cfg.init or (folder / "tae/tae.safetensors").exists()):
        todo.append(("--train_tae.batch", cfg.train_tae.batch, world_size()))
        if cfg.train_tae.image_steps:
            todo.append(("--train_tae.image_batch", cfg.train_tae.image_batch, world_size()))
    for flag, n, of in todo:
        if n % of:
            raise UserError(f"{flag} {n}: not a multiple of {of}, the ranks that share it" + (
                f" x --train_dit.accumulate {parts}" if flag == "--batch" and parts > 1 else ""))


def device_of(command: Command) -> torch.device:
    """Give the device of --device, or what there is."""
    return torch.device(command.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def start_ranks(command: Command) -> torch.device:
    """Join the other ranks, if torchrun started several -> this rank's device."""
    device = device_of(command)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Ranks would outlive a torchrun that is killed: PR_SET_PDEATHSIG sends them SIGTERM then.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            ranks, here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if ranks > here:
                raise UserError(f"--nproc_per_node {ranks}: {here} GPUs here, one rank each; or "
                                "--device cpu")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(seconds=command.timeout))
    return device


def copies(cfg: Config, command: Command, ranks: int) -> int:
    """Give --replicate. For 0: as many copies as fit for toy and small (least to send), else one
    sharded copy."""
    if command.replicate:
        return command.replicate
    each = command.sp * max(1, command.dp)
    return ranks // each if cfg.scale in ("toy", "small") and ranks % each == 0 else 1


def known_videos(cfg: Config, folder: Path, mesh: Mesh) -> list[list]:
    """Read videos.json of the run, or of a --base with the same latents; else `find_videos`."""
    places = [folder, Path(cfg.base)] if cfg.base and same_latents(cfg) else [folder]
    tables = from_rank0([p / "videos.json" for p in places if (p / "videos.json").exists()])
    return read_json(tables[0]) if tables else find_videos(cfg, mesh)


def work(cfg: Config, command: Command) -> None:
    """Print the plan; or arrange ranks, clips and run folder, then work through the stages."""
    if command.plan:
        command.replicate = copies(cfg, command, command.gpus)
        dp_of(command.gpus, command.dp, command.sp, command.replicate)
        check_sp(cfg, command.sp)
        print_plan(cfg, command)
        return
    device, folder = start_ranks(command), Path(command.workdir or f"runs/{cfg.scale}")
    mesh = make_mesh(command.dp, command.sp, copies(cfg, command, world_size()), command.reshard,
                     device.type, command.timeout)
    check_sp(cfg, mesh.sp)
    check_shares(cfg, mesh, folder, command.stage)
    if cfg.text.mode == "pretrained" and rank() == 0:
        with named("--text."):              # now, and not when captions or prompts are encoded
            text_cond.check_sources(cfg.text)
    clips = VideoFolder(cfg, known_videos(cfg, folder, mesh)) if cfg.data else ToyClips(cfg)
    run = open_run(cfg, folder, device, mesh)
    if cfg.data and rank() == 0 and not (folder / "videos.json").exists():
        write_json(folder / "videos.json", clips.videos)
    run.log("run", 0, event="start", ranks=world_size(), device=str(device))
    stages = {"tae": lambda: train_tae(run, clips), "latents": lambda: encode_latents(run, clips),
              "coupling": lambda: couple_latents(run), "dit": lambda: train_dit(run),
              "sample": lambda: make_samples(run), "report": lambda: make_report(run, clips)}
    for name in STAGES:
        report = stages[name]()
        run.log(name, 0, event="done")
        run.mesh.meet(name)
        if name == command.stage:
            break
        if any(everyone(STOP.is_set())):    # a signal came after the stage's last step
            raise Stopped(f"{name}: stopped after this stage; start again to continue")
    if report:
        try:
            print(*in_words(report), f"look at {run.folder / 'index.html'}", sep="\n", flush=True)
        except BrokenPipeError:             # train.py | head: Python would flush again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Stderr:
    """stderr; once its reader is gone (2>&1 | head), the lines are lost and the run goes on."""

    def __init__(self):
        sample_parallel.open_stderr()
        self.stream = sys.stderr

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:                     # or Python would try once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def first_to_say(line: str) -> bool:
    """Tell whether no other rank has said this: many errors occur on all ranks."""
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    with contextlib.suppress(RuntimeError):
        return dist.distributed_c10d._get_default_store().add(line, 1) == 1
    return False                            # the store ended with rank 0, which has said why


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status: 0, or 2 after one line about what the user can fix."""
    with contextlib.redirect_stderr(Stderr()), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"train.py: {message}")
        try:
            work(*parse(sys.argv[1:] if argv is None else argv))
        except (UserError, OSError) as error:
            if first_to_say(str(error)):
                say(f"train.py: {error}")
            return 2
        except Stopped as error:
            if rank() == 0:
                say(f"train.py: {error}")
        except RuntimeError as error:
            if not re.search("out of memory|DefaultCPUAllocator|calculation overflowed",
                             str(error)):
                raise
            say(f"train.py: {reason(error)}. Use less with --train_dit.accumulate, "
                "--dit.checkpointing true, in the tae stage --tae.checkpointing true; see --plan")
            return 2
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    listen()
    sys.exit(main())
