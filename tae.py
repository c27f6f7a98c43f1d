"""tae.py: the temporal autoencoders, video <-> latent: 2.5D, 3D and VidTwin behind one interface.

    clip (B,3,T,H,W)                                                 clip (B,3,T,H,W)
         |  conv_in                                                       ^  conv_out
         v                                                                |
    [ResBlocks] -> Down (space, time)              Up (space, time) <- [ResBlocks]   (x levels)
         |                                                                ^
         v  ResBlock, attention over space, attention over time, ResBlock |          (the middle)
    mean, logvar ---- z = mean + std * noise, (B,C,T',H',W') -------------'

Papers. Movie Gen, arXiv 2410.13720, s3.1.1 [MG]; latent diffusion, 2112.10752 [LDM], whose image
autoencoder is the trunk; VidTwin, 2412.17726 [VT]; PatchGAN, 1611.07004; VQGAN's adaptive weight,
2012.09841. "2.5D" [MG]: every 2D convolution is followed by a 1D convolution along time, every
spatial attention by a temporal one. "3D": joint convolutions and joint attention, the alternative
that [MG] found slightly better and too dear. Both start from an image autoencoder (`inflate`).
VidTwin splits a clip into what is there (structure) and how it moves (dynamics): section 5.

Contract
    encode(x)        x (B,3,T,H,W) float in [-1,1], any T >= 1 (an image is T = 1), any H and W
                     -> Posterior over z; z (B,C,T',H',W'), T' = ceil(T / time factor); VidTwin: of
                     one fixed T, H, W, z flat (B, n), to be cut up by `streams`
    decode(z, T)     z -> (B,3,T,H,W); surplus frames of the last latent are dropped
                     both: stream=True for the same result, frame by frame, in bounded memory
    normalize(z)     to mean 0, std 1 per channel, with the buffers that `LatentStats` fills
    sample_world(rng), render([World])    the toy world: captioned motion without a download

Run.   python tae.py          # image training, inflation, video training, figure; 80 s on 2 CPUs
       python tae.py --trace  # the shape of the tensor after each layer, toy and paper size: 3 s
       python tae.py --study  # three variants, motion curriculum on and off: 30 min, resumable
       python tae.py --reenact  # VidTwin: structure of one clip, dynamics of another: 15 min

Differences from the papers. [MG] does not publish the weights of L1, KL and perceptual terms, nor
the kernel size in time, nor where the temporal strides sit: ours are chosen (3; behind the spatial
ones). Losses are means, so that they weigh the same at every size (the 1e5 of the outlier penalty
goes with a sum; about 0.1 to 1 here). Norms see one frame at a time. The toy preset compresses
4x4x4, not 8x8x8, and folds 4x4 pixels into channels first: convolutions at full resolution are what
costs on a CPU; it is trained on the squared error, which there reached a given PSNR sooner than L1.
VidTwin: no dropout in the Q-Former, no learned scale of the loss, and the mean is decoded in
evaluation, as the paper says and its code does not.

Letters: B batch, T frames, H W height and width, C channels, D width of a transformer, N tokens of
a frame, F = B T frames folded into the batch. In the convolutional autoencoders frames stay folded,
(F,C,H,W) in channels_last memory, from the first convolution to the last: 2D kernels are the fast
ones on every device.
"""
import argparse
import itertools
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- 1. Configuration ----------------------------------------------------------------------------


def at_least(cfg, bounds):
    """ValueError unless each field, or each number in it, is its bound or more."""
    for name, least in bounds.items():
        value = getattr(cfg, name)
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(n >= least for n in numbers):
            raise ValueError(f"{name} {' '.join(map(str, numbers))}: must be {least} or more")


@dataclass
class TAEConfig:
    """Sizes of the convolutional autoencoders. The defaults are Movie Gen's, where published."""

    variant: str = "2.5d"                           # 2.5d | 3d; 2d: the image model they start from
    channels: int = 128                             # width of the first level
    mult: tuple[int, ...] = (1, 2, 4, 4)            # width of each level, in units of `channels`
    space: tuple[int, ...] = (2, 2, 2)              # spatial stride between levels, 1 or 2
    time: tuple[int, ...] = (2, 2, 2)               # temporal stride at the same places
    stem: int = 1                                   # space-to-depth in front of the first conv
    res_blocks: tuple[int, ...] = (2, 2, 2, 2)      # per level of the encoder;
    extra: int = 1                                  # the decoder has so many more [LDM]
    latent_channels: int = 16                       # C
    heads: int = 1                                  # of the attention in the middle
    checkpointing: bool = False                     # recompute blocks in the backward pass

    def __post_init__(self):
        if self.variant not in ("2.5d", "3d", "2d"):
            raise ValueError(f"variant {self.variant}: not one of 2.5d, 3d, 2d")
        at_least(self, {"channels": 1, "stem": 1, "latent_channels": 1, "heads": 1, "extra": 0,
                        "mult": 1, "space": 1, "time": 1, "res_blocks": 0})
        if not len(self.mult) == len(self.res_blocks) == len(self.space) + 1 == len(self.time) + 1:
            raise ValueError(f"mult {self.mult}, res_blocks {self.res_blocks}, space {self.space}, "
                             f"time {self.time}: one stride less than there are levels")
        widths = zip(self.mult, self.mult[:1] + self.mult, self.res_blocks)
        if any(m != before and not blocks for m, before, blocks in widths):
            raise ValueError(f"res_blocks {self.res_blocks}: none where the width changes")
        if self.channels * self.mult[-1] % self.heads:
            raise ValueError(f"heads {self.heads}: does not divide the width "
                             f"{self.channels * self.mult[-1]} of the last level")

    @property
    def space_factor(self) -> int:
        return self.stem * math.prod(self.space)

    @property
    def time_factor(self) -> int:
        return 1 if self.variant == "2d" else math.prod(self.time)


@dataclass
class VidTwinConfig:
    """Sizes of VidTwin. The defaults are the paper's: 4928 values for 16 frames of 224 x 224."""

    frames: int = 16                # T, fixed
    size: int = 224                 # H = W, fixed
    patch: int = 16                 # pixels on a side of a token; a token is one frame deep
    width: int = 768                # D
    depth: int = 16                 # blocks of the encoder, and of the decoder
    heads: int = 12
    queries: int = 16               # n_q: "frames" of the structure latent
    query_width: int = 64           # d_q
    query_layers: int = 6           # of the Q-Former; cross-attention in every second
    query_heads: int = 8
    query_ffn: int = 768
    structure_down: int = 1         # times that height and width are halved: 14 -> 7
    structure_channels: int = 4     # d_S
    dynamics_down: int = 1
    dynamics_channels: int = 8      # d_D
    checkpointing: bool = False

    def __post_init__(self):
        sizes = [f.name for f in fields(self) if f.name != "checkpointing"]
        at_least(self, {name: 0 if name.endswith("_down") else 1 for name in sizes})
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch}: does not divide the size {self.size}")
        if self.width % (4 * self.heads) or self.query_width % self.query_heads:
            raise ValueError(f"heads {self.heads}, query_heads {self.query_heads}: must divide a "
                             f"quarter of width {self.width}, and query_width {self.query_width}")

    @property
    def grid(self) -> int:
        return self.size // self.patch

    def after(self, downs: int) -> int:
        """Side of the token grid after so many strided convolutions (14 -> 7 -> 4 -> 2)."""
        return -(-self.grid // 2**downs)


@dataclass
class LossConfig:
    """Weights of the losses; 0 switches one off. All are means over elements."""

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6
    opl: float = 0.0            # outlier penalty [MG]: 0.1 to 1,
    opl_start: int = 0          # from this step on: a finetuning phase in [MG], 10K after 50K steps
    opl_r: float = 3.0
    perceptual: float = 0.0     # needs the weights of VGG16
    gan: float = 0.0            # 0.05 to 0.2; times the adaptive weight
    gan_start: int = 0          # first step of the discriminator: once reconstruction has converged

    def __post_init__(self):
        at_least(self, {f.name: 0 for f in fields(self)})


PRESETS = {
    # 4x4x4: a clip of 16 x 32 x 32 becomes (8, 4, 8, 8)
    "toy": TAEConfig(channels=64, mult=(1, 1, 1), space=(1, 1), time=(2, 2), stem=4,
                     res_blocks=(0, 1, 1), extra=0, latent_channels=8),
    # 8x8x8 from here on
    "small": TAEConfig(channels=64, mult=(1, 2, 4, 4), res_blocks=(1, 1, 1, 1)),
    "paper": TAEConfig(),                                                   # 114.5 M parameters
}
VIDTWIN_PRESETS = {     # toy and small: as many values as the presets above, half in each latent
    "toy": VidTwinConfig(size=32, patch=8, width=128, depth=2, heads=4, queries=8, query_width=32,
                         query_layers=2, query_heads=4, query_ffn=64, structure_down=0,
                         structure_channels=8, dynamics_down=0),
    "small": VidTwinConfig(size=64, patch=8, width=256, depth=6, heads=8, queries=8,
                           query_layers=4, query_ffn=256, structure_channels=8),
    "paper": VidTwinConfig(),                                               # 312.1 M
}
LOSSES = {
    "toy": LossConfig(l1=0.0, l2=4.0, kl=5e-3),
    "small": LossConfig(kl=1e-5),
    "paper": LossConfig(),
}

# ---- 2. The toy world ----------------------------------------------------------------------------
# Captioned motion that needs no download: coloured shapes, and signs that carry a word, move at a
# constant velocity in front of a dark background. What moves alone passes near the middle of the
# picture: a model of minutes learns what to draw and whither it goes, and hardly where. Everything
# is drawn at 4 times the resolution and box-filtered, so that motion is smooth below one pixel.
# train.py turns a World into a caption, and measures from pixels what a generated clip shows.

COLORS = {
    "red": (0.95, 0.15, 0.15), "green": (0.15, 0.85, 0.25), "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.90, 0.15), "purple": (0.75, 0.20, 0.90), "white": (1.00, 1.00, 1.00),
}
SPAN = {  # width and height of each shape, in radii of the circle that has the same area
    "circle": (2.0, 2.0), "square": (math.pi**0.5, math.pi**0.5), "triangle": (2.694, 2.333),
}
SHAPES = tuple(SPAN)
DIRECTIONS = {  # steps (x, y), y down; in the order of their angle
    "right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
    "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1),
}
SPEEDS = {"slow": 0.5, "fast": 1.0}  # pixels per frame in a picture 32 pixels high
LETTERS = tuple("ACEHLNOSTU")  # ten, so that each is seen often enough in minutes
WORDS = tuple(
    "AN AS AT HE LO NO SO TO US ACE ANT ASH ATE CAN COT CUE CUT EAT EEL HAS HEN HOT HUT LET LOT "
    "NET NOT NUT OAT ONE OUT SAT SEA SON TAN TEN THE TOE TON TOO USE".split()
)
HELDOUT_WORDS = tuple("AH LA OH ON ALE CAT HAT HUE SET SUN TEA".split())  # never trained on
SCRIPTS = {  # letters; words; words never trained on, of letters that are
    "latin": (LETTERS, WORDS, HELDOUT_WORDS),
    "chinese": (tuple("人大山水火木日月口田"), tuple(
        "大人 大山 大水 大火 大田 山口 山水 水田 水火 火山 木人 木口 日月 人口 田口".split()),
        tuple("火口 大木 山田 水口 月日".split())),
}
WANDER = {"sign": 1 / 32, "shape": 3 / 32}  # how far from the middle a lone thing passes at most
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One moving object. Lengths are in units of the picture height, so that every size shows the
    same scene."""

    color: str
    shape: str  # one of SHAPES, or "sign"
    direction: str
    speed: str
    word: str = ""  # the text of a sign
    radius: float = 0.17  # of the circle with the same area; unused by signs
    x: float = 0.5  # centre in the first frame
    y: float = 0.5


@dataclass(frozen=True)
class World:
    """What a clip of the toy world shows."""

    things: tuple[Thing, ...]
    background: float = 0.0  # grey level in [0, 1]


def is_heldout(thing: Thing) -> bool:
    """Whether training never draws this: 1 in 9 (colour, shape, direction) triples, some words.

    Each colour, shape and direction is held out with some partners and trained with others."""
    if thing.shape == "sign":
        return any(thing.word in heldout for _, _, heldout in SCRIPTS.values())
    c, s = list(COLORS).index(thing.color), SHAPES.index(thing.shape)
    d = list(DIRECTIONS).index(thing.direction)
    return (c + 2 * s + 4 * d) % 9 == 0


@cache
def glyphs(word: str, cap: int) -> Tensor:
    """Ink of `word`, capitals `cap` pixels high -> (cap, w) bool. Latin letters in DejaVu Sans Mono
    Bold, which ships with matplotlib: capitals are 0.729 em high, letters 0.602 em wide. Chinese in
    WenQuanYi Micro Hei (Debian: fonts-wqy-microhei), a square em of which 0.92 holds ink."""
    from matplotlib.font_manager import FontProperties, findSystemFonts
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    if word.isascii():
        font = FontProperties(family="DejaVu Sans Mono", weight="bold")
        height, width, below = 72.9, 60.2, 0.0                      # hundredths of an em
    else:
        files = [f for f in findSystemFonts() if Path(f).name == "wqy-microhei.ttc"]
        if not files:
            raise ValueError("the font WenQuanYi Micro Hei is not installed (Debian: apt install "
                             "fonts-wqy-microhei)")
        font, (height, width, below) = FontProperties(fname=files[0]), (92.0, 100.0, 9.0)
    path = TextPath((0, 0), word, size=100, prop=font)
    scale = height / cap
    w = round(width * len(word) / scale)
    x, y = torch.meshgrid(torch.arange(w) + 0.5, cap - torch.arange(cap) - 0.5, indexing="xy")
    points = torch.stack([x.flatten() * scale, y.flatten() * scale - below], 1).numpy()
    inside = torch.zeros(cap * w, dtype=torch.bool)
    for outline in path.to_polygons():  # exclusive or: the inner outline of an O is a hole
        inside ^= torch.from_numpy(Outline(outline).contains_points(points))
    return inside.view(cap, w)


@lru_cache(maxsize=1024)
def bitmap(shape: str, word: str, radius: int) -> Tensor:
    """(2, h, w) float: what an object covers, and what of that carries its colour (not ink).

    radius in supersampled pixels; for a sign it is the height of its capitals."""
    if shape == "sign":
        ink = F.pad(glyphs(word, radius).float(), [radius // 4] * 4)  # a margin around the text
        return torch.stack([torch.ones_like(ink), 1 - ink])
    n = math.ceil(1.6 * radius)
    y, x = torch.meshgrid(torch.arange(-n, n) + 0.5, torch.arange(-n, n) + 0.5, indexing="ij")
    if shape == "circle":
        inside = x * x + y * y < radius**2
    elif shape == "square":
        inside = torch.maximum(x.abs(), y.abs()) < radius * SPAN["square"][0] / 2
    else:  # an upright equilateral triangle of the same area
        w, h = (s * radius for s in SPAN["triangle"])
        inside = (y < h / 2) & (x.abs() < (y + h / 2) / math.sqrt(3))
    return inside.float().expand(2, -1, -1)


def bitmap_of(thing: Thing, H: int) -> tuple[str, str, int]:
    """Arguments of `bitmap` for a thing in a picture H pixels high. Short words are larger: at
    H = 32 capitals of 16, 11 and 8 pixels; the wider Chinese characters of 15 and 10."""
    cap = {1: 16, 2: 11}.get(len(thing.word), 8) / 32 - (not thing.word.isascii()) / 32
    size = cap if thing.shape == "sign" else thing.radius
    return thing.shape, thing.word, round(size * H * SUPERSAMPLE)


@lru_cache(maxsize=65536)
def sprite(shape: str, word: str, radius: int, dx: int, dy: int) -> np.ndarray:
    """The bitmap moved by (dx, dy) < SUPERSAMPLE and box-filtered to pixels -> (2, h', w')."""
    b, S = bitmap(shape, word, radius), SUPERSAMPLE
    h, w = b.shape[1] + dy, b.shape[2] + dx
    return F.avg_pool2d(F.pad(b, (dx, -w % S, dy, -h % S)), S).numpy()


def velocity(thing: Thing) -> tuple[float, float]:
    """Displacement (x, y) per frame in units of the picture height, equal in all directions."""
    dx, dy = DIRECTIONS[thing.direction]
    v = SPEEDS[thing.speed] / 32 / math.hypot(dx, dy)
    return v * dx, v * dy


def extent(thing: Thing) -> tuple[float, float]:
    """Width and height of a thing in units of the picture height."""
    if thing.shape in SPAN:
        w, h = SPAN[thing.shape]
        return w * thing.radius, h * thing.radius
    h, w = bitmap(*bitmap_of(thing, 32)).shape[1:]
    return w / 32 / SUPERSAMPLE, h / 32 / SUPERSAMPLE


def place(thing: Thing, rng: random.Random, frames: int = 16, wander: float = 1.0) -> Thing:
    """The same thing, starting at a random point from which its whole path stays in the picture,
    and the middle of that path within `wander` of the middle of the picture."""
    start = []
    for v, size in zip(velocity(thing), extent(thing)):
        travel = v * (frames - 1)
        middle, room = (1 - travel) / 2, (1 - size - abs(travel)) / 2
        start.append(middle + rng.uniform(-1, 1) * max(0.0, min(room, wander)))
    return replace(thing, x=start[0], y=start[1])


def apart(a: Thing, b: Thing, frames: int) -> bool:
    """Whether two things never overlap."""
    (aw, ah), (bw, bh), va, vb = extent(a), extent(b), velocity(a), velocity(b)
    return all(
        abs(a.x - b.x + t * (va[0] - vb[0])) > (aw + bw) / 2
        or abs(a.y - b.y + t * (va[1] - vb[1])) > (ah + bh) / 2
        for t in range(frames)
    )


def sample_world(
    rng: random.Random, things: int = 1, signs: float = 0.4, heldout: bool | None = False,
    frames: int = 16, overlap: bool = False, script: str = "latin",
) -> World:
    """Draw a world. heldout: False for training, True for combinations that training never shows,
    None for both. Things of different colour; they never overlap, unless `overlap`. script: of the
    signs. 70 % of them show one letter, the others words."""
    letters, words, never = SCRIPTS[script]
    lengths = sorted({len(w) for w in words})
    drawn: list[Thing] = []
    tries = 0
    while len(drawn) < things:
        tries += 1
        if tries % 50 == 0:  # nothing fits beside what is there
            drawn.clear()
        sign = rng.random() < signs
        rest = 0.3 / len(lengths)
        length = rng.choices((1, *lengths), (0.7, *(rest for _ in lengths)))[0]
        choice = letters if length == 1 else [w for w in words + never if len(w) == length]
        thing = Thing(
            color=rng.choice([c for c in COLORS if c not in [d.color for d in drawn]]),
            shape="sign" if sign else rng.choice(SHAPES),
            direction=rng.choice(list(DIRECTIONS)),
            speed="slow" if sign else rng.choice(list(SPEEDS)),  # a long word has no room
            word=rng.choice(choice) if sign else "",
            radius=rng.uniform(0.17, 0.19),
        )
        if heldout is None or is_heldout(thing) == heldout:
            wander = WANDER["sign" if sign else "shape"] if things == 1 else 1.0
            thing = place(thing, rng, frames, wander)
            if overlap or all(apart(thing, d, frames) for d in drawn):
                drawn.append(thing)
    return World(tuple(drawn), background=rng.uniform(0.0, 0.15))


def bounce(p: float, lo: float, hi: float) -> float:
    """A point that moves straight on, reflected at lo and hi; where nothing fits between them,
    not."""
    if lo <= p <= hi or lo >= hi:
        return p
    return lo + (hi - lo) - abs((p - lo) % (2 * (hi - lo)) - (hi - lo))


def render(worlds: list[World], T: int = 16, H: int = 32, W: int | None = None,
           interval: float | list[float] = 1.0) -> Tensor:
    """Draw worlds -> (B, 3, T, H, W) float in [-1, 1]. Later things pass in front of earlier.

    interval: frames between one and the next, for all or for each world: above 1 everything is
    faster, and bounces off the edges of the picture (see `motion_interval`)."""
    W, S = W or H, SUPERSAMPLE
    clips = np.empty((len(worlds), 3, T, H, W), np.float32)
    intervals = interval if isinstance(interval, list) else [interval] * len(worlds)
    for clip, world, interval in zip(clips, worlds, intervals):
        clip[:] = world.background
        for thing in world.things:
            which, (vx, vy), (ew, eh) = bitmap_of(thing, H), velocity(thing), extent(thing)
            h, w = bitmap(*which).shape[1:]
            color = np.array(COLORS[thing.color], np.float32)[:, None, None]
            for t in range(T):
                cx = bounce(thing.x + vx * t * interval, ew / 2, W / H - ew / 2)
                cy = bounce(thing.y + vy * t * interval, eh / 2, 1 - eh / 2)
                x, dx = divmod(round(cx * H * S - w / 2), S)
                y, dy = divmod(round(cy * H * S - h / 2), S)
                cover, paint = sprite(*which, dx, dy)[:, max(-y, 0) : H - y, max(-x, 0) : W - x]
                region = clip[:, t, max(y, 0) :, max(x, 0) :][:, : cover.shape[0], : cover.shape[1]]
                region *= 1 - cover
                region += paint * color
    return torch.from_numpy(clips).mul_(2).sub_(1)


def motion_interval(rng: random.Random, done: float, most: int) -> float:
    """The motion curriculum: how many frames lie between one frame of a training clip and the next.

    Uniform in [1, 1 + (most - 1) min(1, done / 0.75)], done in [0, 1] the share of the training
    that is past: clips begin slow, and after three quarters of it are up to `most` times as fast.
    Not from [MG], where none is described; fine detail in fast motion is the failure that it
    reports."""
    return rng.uniform(1, 1 + (most - 1) * min(1.0, done / 0.75))


# ---- 3. Primitives -------------------------------------------------------------------------------
# One class of convolution for each variant, with the same parameter names, so that the weights of
# an image model can be copied by name: `weight` and `bias` are the spatial part, `temporal` is new.


class Conv2D(nn.Conv2d):
    """3x3 (or 1x1) convolution of each frame: (F, C, H, W). Knows no time: the image
    autoencoder."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, space: int = 1, time: int = 1):
        super().__init__(cin, cout, kernel, space, padding=kernel // 2 if space == 1 else 0)

    def forward(self, x: Tensor, T: int = 1) -> Tensor:
        if self.stride[0] == 2:         # [LDM] pads a strided convolution right and at the bottom
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same of frames (B, C, H, W) that come one after the other (section 4, streaming)."""
        return map(partial(Conv2D.forward, self), frames)


def windows(frames: Iterable[Tensor], stride: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a kernel of 3 sees, replicate padded: (0, 0, 1), (0, 1, 2), ... (n - 2, n - 1, n - 1);
    with a stride, every stride-th of them. A window is out as soon as its last frame is in, and
    two frames are kept for the next."""
    frames = iter(frames)
    past = now = next(frames)
    for i in itertools.count():
        after = next(frames, None)
        last = now if after is None else after
        if i % stride == 0:
            yield past, (past := now), (now := last)    # moves on before it waits: two, not three
        else:
            past, now = now, last
        if after is None:
            return


class TemporalConv(nn.Module):
    """1D convolution along time, kernel 3, symmetric *replicate* padding, on folded frames (B T,
    C, H, W). With stride 2 the output has ceil(T / 2) frames.

    Why not zeros: a static clip would darken towards both ends, and the first frame is what people
    notice. Why not causal: [MG] is not, which is why any T works and latent frame i is centred on
    frame (time factor) * i. The kernel starts as the identity (centre tap = I), so inserting it
    into a trained image model changes nothing."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.eye_(self.weight.data[:, :, 1])

    def forward(self, x: Tensor, T: int) -> Tensor:
        H = x.shape[2]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=T)     # a view: channels are last there
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        x = F.conv2d(x, self.weight[..., None], self.bias, stride=(self.stride, 1))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        return map(self.one, windows(frames, self.stride))

    def one(self, window: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The frame that three frames (B, C, H, W) make: one matrix product, taps side by side."""
        x = torch.cat([x.permute(0, 2, 3, 1) for x in window], 3)
        x = F.linear(x, rearrange(self.weight, "o i k -> o (k i)"), self.bias)
        return x.permute(0, 3, 1, 2)


class Conv25D(Conv2D):
    """[MG]: a 2D convolution, then a 1D convolution along time. 9 + 3 multiply-adds for each pair
    of channels, where a joint kernel takes 27."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, space: int = 1, time: int = 1):
        super().__init__(cin, cout, kernel, space)
        self.temporal = TemporalConv(cout, time)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.temporal(super().forward(x), T)

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.temporal.stream(super().stream(frames))


class Conv3D(nn.Module):
    """Joint 3x3x3 convolution over time and space of folded frames; replicate padding in time."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, space: int = 1, time: int = 1):
        super().__init__()
        like = nn.Conv2d(cin, cout, kernel)                     # its initialisation, in the centre
        self.stride, self.kernel = (time, space, space), kernel
        self.weight = nn.Parameter(centre_slice(like.weight.data))
        self.bias = nn.Parameter(like.bias.data)

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = rearrange(x, "(b t) c h w -> b c t h w", t=T)       # a view, channels_last_3d
        return self.convolve(torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2), self.stride[0])

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        return map(self.one, windows(frames, self.stride[0]))

    def one(self, window: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The frame that three frames make."""
        return self.convolve(torch.stack(window, 2))

    def convolve(self, x: Tensor, stride: int = 1) -> Tensor:
        """(B, C, T + 2, H, W) -> folded frames."""
        pad, space = self.kernel // 2, self.stride[1]
        if space == 2:
            x, pad = F.pad(x, (0, 1, 0, 1)), 0
        return fold(F.conv3d(x, self.weight, self.bias, (stride, space, space), (0, pad, pad)))


def centre_slice(w: Tensor) -> Tensor:
    """A 2D kernel (cout, cin, k, k) as the middle of a 3D one (cout, cin, 3, k, k) of zeros."""
    return F.pad(w[:, :, None], (0, 0, 0, 0, 1, 1))


def fold(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W), channels last in memory."""
    x = rearrange(x, "b c t h w -> (b t) c h w")
    return x.contiguous(memory_format=torch.channels_last)


CONV = {"2d": Conv2D, "2.5d": Conv25D, "3d": Conv3D}


class FrameNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself. Over (T,H,W), frame 15 would move the latent of frame 0,
    and tiles would not agree where they meet."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels // 4), channels, eps=1e-6)

    def silu(self, x: Tensor) -> Tensor:
        """The norm, and the SiLU that follows it everywhere but in attention."""
        return F.silu(self(x))


# ---- 4. The convolutional autoencoder, 2.5D and 3D -----------------------------------------------


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input [LDM]."""

    def __init__(self, variant: str, cin: int, cout: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(cin), CONV[variant](cin, cout)
        self.norm2, self.conv2 = FrameNorm(cout), CONV[variant](cout, cout)
        self.skip = Conv2D(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, T: int) -> Tensor:
        h = self.conv1(self.norm1.silu(x), T)
        h = self.conv2(self.norm2.silu(h), T)
        return self.skip(x) + h

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        waiting: deque[Tensor] = deque()        # x, for h, which is two frames late

        def enter(x: Tensor) -> Tensor:
            waiting.append(x)
            return self.norm1.silu(x)

        h = self.conv1.stream(map(enter, frames))
        h = self.conv2.stream(map(self.norm2.silu, h))
        return map(lambda y: self.skip(waiting.popleft()) + y, h)  # noqa: C417, it would keep y


class Attention(nn.Module):
    """Self-attention over the pixels of a frame ("space"), the frames of a pixel ("time"), or
    both at once ("joint")."""

    folds = {"space": "(b t) c h w -> (b t) (h w) c", "time": "(b t) c h w -> (b h w) t c",
             "joint": "(b t) c h w -> b (t h w) c"}

    def __init__(self, channels: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.fold = heads, self.folds[axis]
        self.norm = FrameNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if axis == "time":                          # inflation: at first, time is not looked at
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, T: int) -> Tensor:
        H, W = x.shape[2:]
        h = rearrange(self.norm(x), self.fold, t=T)                             # (sequences, n, C)
        q, k, v = rearrange(self.qkv(h), "s n (three a d) -> three s a n d", three=3, a=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "s a n d -> s n (a d)")
        back = " -> ".join(reversed(self.fold.split(" -> ")))
        return x + rearrange(self.out(h), back, t=T, h=H, w=W)


class Middle(nn.Module):
    """ResBlock, attention over space, then over time (3D: one over both), ResBlock, at the coarsest
    level."""

    def __init__(self, cfg: TAEConfig, channels: int):
        super().__init__()
        self.block1 = ResBlock(cfg.variant, channels, channels)
        self.space = Attention(channels, cfg.heads, "joint" if cfg.variant == "3d" else "space")
        self.time = Attention(channels, cfg.heads, "time") if cfg.variant == "2.5d" else None
        self.block2 = ResBlock(cfg.variant, channels, channels)

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = self.space(self.block1(x, T), T)
        x = self.time(x, T) if self.time else x
        return self.block2(x, T)


class Resample(nn.Module):
    """A stride between two levels. Down: a strided convolution, T -> ceil(T / 2), H -> H / 2. Up:
    nearest neighbour in time [MG] and in space, then a convolution.

    A level that the image autoencoder does not stride (the toy's) has no kernel there, and time
    starts as the identity, like every other layer that the image model lacks."""

    def __init__(self, variant: str, channels: int, space: int, time: int, up: bool):
        super().__init__()
        self.space, self.time, self.up = space, time if variant != "2d" else 1, up
        strides = (1, 1) if up else (space, self.time)
        self.conv = CONV[variant](channels, channels, 3, *strides) if space == 2 else None
        if space == 1 and self.time == 2:
            self.conv = TemporalConv(channels, strides[1])
            if variant == "3d":
                self.conv = Conv3D(channels, channels, 3, *strides)
                nn.init.zeros_(self.conv.weight)
                nn.init.eye_(self.conv.weight.data[:, :, 1, 1, 1])
                nn.init.zeros_(self.conv.bias)

    def frames(self, T: int) -> int:
        """How many frames T become."""
        return T * self.time if self.up else -(-T // self.time)

    def forward(self, x: Tensor, T: int) -> Tensor:
        joint = not isinstance(self.conv, Conv25D)
        if self.up and self.space == 2:
            x = F.interpolate(x, scale_factor=2.0)
        if not joint:               # its spatial half first: repeated frames need it but once
            x = Conv2D.forward(self.conv, x)
        if self.up and self.time == 2:          # repeat_interleave: nearest is not there in 5D bf16
            x = fold(rearrange(x, "(b t) c h w -> b c t h w", t=T).repeat_interleave(2, 2))
            T = 2 * T
        if not joint:
            return self.conv.temporal(x, T)
        return self.conv(x, T) if self.conv else x

    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        joint = not isinstance(self.conv, Conv25D)
        if self.up and self.space == 2:
            frames = map(partial(F.interpolate, scale_factor=2.0), frames)
        if not joint:
            frames = Conv2D.stream(self.conv, frames)
        if self.up and self.time == 2:
            frames = (x for x in frames for _ in range(2))
        if not joint:
            return self.conv.temporal.stream(frames)
        return self.conv.stream(frames) if self.conv else frames


def run_blocks(blocks: Iterable[nn.Module], h: Tensor, T: int,
               remember: bool) -> tuple[Tensor, int]:
    """Folded frames through one block after the other -> (frames, T); `remember` nothing but their
    inputs for the backward pass (activation checkpointing)."""
    for block in blocks:
        if remember and torch.is_grad_enabled():
            h = checkpoint(block, h, T, use_reentrant=False)
        else:
            h = block(h, T)
        T = block.frames(T) if isinstance(block, Resample) else T
    return h, T


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> moments (B, 2C, T', H', W')."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        self.cfg, v, width = cfg, cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.conv_in = CONV[v](3 * cfg.stem**2, width[0])
        self.levels = nn.ModuleList()
        for i, w in enumerate(width):
            previous = width[max(i - 1, 0)]
            blocks = [ResBlock(v, previous if j == 0 else w, w) for j in range(cfg.res_blocks[i])]
            if i < len(width) - 1:
                blocks.append(Resample(v, w, cfg.space[i], cfg.time[i], up=False))
            self.levels.append(nn.ModuleList(blocks))
        self.middle = Middle(cfg, width[-1])
        self.norm_out = FrameNorm(width[-1])
        self.conv_out = CONV[v](width[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        T, s = x.shape[2], self.cfg.stem
        x = rearrange(x, "b c t (h p) (w q) -> (b t) (c p q) h w", p=s, q=s)  # (F, 3 s s, H/s, W/s)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last), T)
        for level in self.levels:
            h, T = run_blocks(level, h, T, self.cfg.checkpointing)
        return self.finish(h, T)

    def finish(self, h: Tensor, T: int) -> Tensor:
        h, T = run_blocks([self.middle], h, T, self.cfg.checkpointing)
        h = self.conv_out(self.norm_out.silu(h), T)
        return rearrange(h, "(b t) c h w -> b c t h w", t=T)                   # (B, 2C, T', H', W')

    def stream(self, x: Tensor) -> Tensor:
        """The same, frame by frame as far as the middle, whose attention needs all of them."""
        s = self.cfg.stem
        patches = lambda x: rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=s, q=s)
        frames = self.conv_in.stream(
            patches(x[:, :, t]).contiguous(memory_format=torch.channels_last)
            for t in range(x.shape[2]))
        for block in itertools.chain(*self.levels):
            frames = block.stream(frames)
        h = torch.stack(list(frames), 2)
        return self.finish(fold(h), h.shape[2])


class Decoder(nn.Module):
    """(B, C, T', H', W') -> (B, 3, T' * time factor, H, W)."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        self.cfg, v, width = cfg, cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.conv_in = CONV[v](cfg.latent_channels, width[-1])
        self.middle = Middle(cfg, width[-1])
        self.levels = nn.ModuleList()
        for i in reversed(range(len(width))):
            previous = width[min(i + 1, len(width) - 1)]
            count = cfg.res_blocks[i] + cfg.extra
            blocks = [ResBlock(v, previous if j == 0 else width[i], width[i]) for j in range(count)]
            if i > 0:
                blocks.append(Resample(v, width[i], cfg.space[i - 1], cfg.time[i - 1], up=True))
            self.levels.append(nn.ModuleList(blocks))
        self.norm_out = FrameNorm(width[0])
        self.conv_out = CONV[v](width[0], 3 * cfg.stem**2)

    def forward(self, z: Tensor) -> Tensor:
        T, s = z.shape[2], self.cfg.stem
        h = self.conv_in(fold(z), T)
        h, T = run_blocks([self.middle], h, T, self.cfg.checkpointing)
        for level in self.levels:
            h, T = run_blocks(level, h, T, self.cfg.checkpointing)
        h = self.conv_out(self.norm_out.silu(h), T)
        return rearrange(h, "(b t) (c p q) h w -> b c t (h p) (w q)", t=T, p=s, q=s)

    def stream(self, z: Tensor, out: Tensor) -> Tensor:
        """The same, frame by frame from the middle on, into out (B, 3, T, H, W). Nothing is
        computed that out has no room for."""
        T, s = z.shape[2], self.cfg.stem
        h, _ = run_blocks([self.middle], self.conv_in(fold(z), T), T, False)
        frames = rearrange(h, "(b t) c h w -> t b c h w", t=T)
        for block in itertools.chain(*self.levels):
            frames = block.stream(frames)
        frames = self.conv_out.stream(map(self.norm_out.silu, frames))
        for t, h in zip(range(out.shape[2]), frames):
            out[:, :, t] = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=s, q=s)
        return out


@dataclass
class Posterior:
    """Diagonal Gaussian q(z | x): mean and logvar, shaped like z, fp32."""

    mean: Tensor
    logvar: Tensor = field(repr=False)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise. With a CPU generator the noise does not depend on the device."""
        at = self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator,
                            device=generator.device if generator else at).to(at)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) = (mean^2 + var - 1 - logvar) / 2, averaged over all latent values."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).mean()


class Autoencoder(nn.Module):
    """What the variants share: `encode` and `decode` are theirs, the rest is here."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("lat_mean", torch.zeros(channels))
        self.register_buffer("lat_std", torch.ones(channels))

    def forward(self, x: Tensor,
                generator: torch.Generator | None = None) -> tuple[Tensor, Posterior]:
        """Reconstruction (B,3,T,H,W) of a posterior sample (of the mean in eval mode), and the
        posterior."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if self.training else posterior.mean
        return self.decode(z, x.shape[2], x.shape[-2:]), posterior

    def streams(self, T: int, H: int, W: int) -> list[tuple[int, int, int, int]]:
        """Shapes (C, T', H', W') of the parts of the latent of a clip: one, but for VidTwin."""
        raise TypeError(f"{type(self).__name__}: has no streams of its own")

    def split(self, z: Tensor) -> list[Tensor]:
        """The latent as tensors (B, C, T', H', W'), one for each stream."""
        return [z]

    def latent_shape(self, T: int, H: int, W: int) -> tuple[int, ...]:
        """Shape of the latent of one clip of T x H x W: (C, T', H', W'), or (n,) where the streams
        are several and laid flat one behind the other."""
        streams = self.streams(T, H, W)
        return streams[0] if len(streams) == 1 else (sum(math.prod(s) for s in streams),)

    def compression_rate(self, T: int, H: int, W: int) -> float:
        """Latent values divided by video values. Quote it next to every PSNR [VT]."""
        return math.prod(self.latent_shape(T, H, W)) / (3 * T * H * W)

    def spread(self, per_channel: Tensor) -> Tensor:
        """(C,) as it broadcasts over a batch of latents."""
        return per_channel.view(-1, 1, 1, 1)

    def normalize(self, z: Tensor) -> Tensor:
        """To mean 0 and std 1 per channel: what the flow model sees."""
        return (z - self.spread(self.lat_mean)) / self.spread(self.lat_std)

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return z * self.spread(self.lat_std) + self.spread(self.lat_mean)


class TAE(Autoencoder):
    """The temporal autoencoder of [MG s3.1.1], 2.5D or 3D (module docstring: contract)."""

    def __init__(self, cfg: TAEConfig):
        super().__init__(cfg.latent_channels)
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        for p in self.parameters():
            if p.ndim >= 4:
                last = torch.channels_last if p.ndim == 4 else torch.channels_last_3d
                p.data = p.data.contiguous(memory_format=last)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the very last operation, where the adaptive GAN weight is measured."""
        conv = self.decoder.conv_out
        return conv.temporal.weight if self.cfg.variant == "2.5d" else conv.weight

    def encode(self, x: Tensor, stream: bool = False) -> Posterior:
        """(B,3,T,H,W) in [-1,1] -> Posterior over (B,C,T',H',W'). H and W that the spatial factor
        does not divide are padded by repeating the last row and column; `decode(..., size=(H, W))`
        crops them back. ValueError for another shape. stream: one frame at a time (below)."""
        check_clip(x)
        H, W, f = *x.shape[-2:], self.cfg.space_factor
        if H % f or W % f:
            x = F.pad(x, (0, -W % f, 0, -H % f, 0, 0), mode="replicate")
        moments = self.encoder.stream(x) if stream else self.encoder(x)
        mean, logvar = moments.float().chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor, num_frames: int | None = None,
               size: tuple[int, int] | None = None, stream: bool = False) -> Tensor:
        """(B,C,T',H',W') -> (B,3,T,H,W). The decoder makes (time factor) * T' frames; those past
        `num_frames` are surplus of the last latent frame and are dropped [MG]: an image costs as
        many frames as one latent frame holds; with `stream` they are never made. `size` (H, W)
        crops what `encode` padded."""
        if stream:
            f, T = self.cfg.space_factor, z.shape[2] * self.cfg.time_factor
            H, W = z.shape[3] * f, z.shape[4] * f
            x = self.decoder.stream(z, z.new_empty(len(z), 3, min(num_frames or T, T), H, W))
        else:
            x = self.decoder(z)[:, :, :num_frames]
        return x if size is None else x[..., : size[0], : size[1]]

    def streams(self, T: int, H: int, W: int) -> list[tuple[int, int, int, int]]:
        c, f = self.cfg, self.cfg.space_factor
        return [(c.latent_channels, -(-T // c.time_factor), -(-H // f), -(-W // f))]

    # ---- long and large clips in bounded memory: streaming, and tiles ----
    # 256 frames of 768 px make one activation of the first level 36 GiB. [MG] cuts time into tiles
    # of 32 frames, without overlap in the encoder, and with 16 frames of overlap, blended linearly,
    # in the decoder. Space is cut in the same way. Tiles are another function than the whole: train
    # at the length of a tile.
    # Along time there is a way that is exact, `stream`: frames pass one by one, and each temporal
    # convolution, which has to see the next frame, answers one frame late. It is written with
    # generators (`windows` is all it takes), and a generator does no more than it is asked for.
    # Only the middle's attention sees all frames, but there they are small.

    @torch.no_grad()
    def encode_tiled(self, x: Tensor, frames: int = 32, size: int = 256,
                     overlap: int = 64) -> Posterior:
        """`encode` in tiles of `frames` x `size` x `size` pixels; tiles share `overlap` pixels in
        space, none in time. A clip no larger than a tile: the same to the bit."""
        check_clip(x)
        f, t = self.cfg.space_factor, self.cfg.time_factor
        tile, shared = check_tiles((frames, size, size), (0, overlap, overlap), (t, f, f))
        C, *grid = self.latent_shape(*x.shape[2:])
        out = x.new_zeros(len(x), 2 * C, *grid, dtype=torch.float32)

        def moments(part: Tensor) -> Tensor:
            p = self.encode(part)
            return torch.cat([p.mean, p.logvar], 1)

        blend_tiles(moments, x, out, tile, shared, (t, f, f), down=True)
        return Posterior(*out.chunk(2, 1))

    @torch.no_grad()
    def decode_tiled(self, z: Tensor, num_frames: int | None = None,
                     size: tuple[int, int] | None = None, frames: int = 32,
                     overlap_frames: int = 16, tile: int = 256, overlap: int = 64) -> Tensor:
        """`decode` in tiles of `frames` x `tile` x `tile` pixels, that share `overlap_frames` and
        `overlap` pixels with the one before. A latent no larger than a tile: the same to the
        bit."""
        f, t = self.cfg.space_factor, self.cfg.time_factor
        check_tiles((frames, tile, tile), (overlap_frames, overlap, overlap), (t, f, f))
        T, (H, W) = num_frames or z.shape[2] * t, size or (z.shape[3] * f, z.shape[4] * f)
        out = z.new_zeros(len(z), 3, T, H, W, dtype=torch.float32)
        return blend_tiles(self.decode, z, out, (frames // t, tile // f, tile // f),
                           (overlap_frames // t, overlap // f, overlap // f), (t, f, f), down=False)


def check_clip(x: Tensor) -> None:
    """ValueError unless x is (B, 3, T, H, W)."""
    if x.ndim != 5 or x.shape[1] != 3:
        raise ValueError(f"clip of shape {tuple(x.shape)}: expected (B, 3, T, H, W)")


def check_tiles(tile: tuple, overlap: tuple, factor: tuple) -> tuple[tuple, tuple]:
    """ValueError for tiles whose edges are not edges of the latent, or that overlap by over
    half."""
    for n, o, f in zip(tile, overlap, factor):
        if n < 1 or n % f or o % f or not 0 <= 2 * o <= n:
            raise ValueError(f"tile {n}, overlap {o}: multiples of {f}, the overlap at most half")
    return tile, overlap


def spans(n: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles that cover 0 .. n; each shares `overlap` with the one before
    it."""
    return [(s, min(s + tile, n)) for s in range(0, max(1, n - overlap), tile - overlap)]


def rescale(n: int, scale: int, down: bool) -> int:
    """A row of the input in rows of the output."""
    return -(-n // scale) if down else n * scale


def ramp(span: tuple[int, int], n: int, overlap: int, scale: int, down: bool) -> Tensor:
    """Weights of a tile along one axis, in units of the output. In an overlap of O output rows the
    new tile has (k + 1/2) / O and the old one the rest, so that all weights sum to one
    everywhere."""
    w = torch.ones(rescale(span[1], scale, down) - rescale(span[0], scale, down))
    O = rescale(overlap, scale, down)
    up = (torch.arange(O) + 0.5) / O
    if O and span[0] > 0:
        w[:O] *= up
    if O and span[1] < n:
        w[-O:] *= 1 - up
    return w


def blend_tiles(fn: Callable[[Tensor], Tensor], x: Tensor, out: Tensor, tile: tuple, overlap: tuple,
                scale: tuple, down: bool) -> Tensor:
    """out (B, C', T', H', W') = the tiles fn(part of x), weighted and summed. tile and overlap are
    in units of x; the output has 1 / scale (`down`) or scale times the rows of x, or fewer: surplus
    is dropped. Beside x and out, memory holds one tile at a time."""
    sizes = x.shape[2:]
    for place in itertools.product(*map(spans, sizes, tile, overlap)):
        (t0, t1), (h0, h1), (w0, w1) = place
        y = fn(x[:, :, t0:t1, h0:h1, w0:w1])
        for axis in range(3):
            w = ramp(place[axis], sizes[axis], overlap[axis], scale[axis], down).to(y)
            y = y * w.view(-1, *[1] * (2 - axis))
        a, b, c = (rescale(p[0], s, down) for p, s in zip(place, scale))
        region = out[:, :, a : a + y.shape[2], b : b + y.shape[3], c : c + y.shape[4]]
        region += y[:, :, : region.shape[2], : region.shape[3], : region.shape[4]]
    return out


def inflate(image_tae: TAE, variant: str = "2.5d") -> TAE:
    """A video autoencoder that starts from a trained image autoencoder [MG s3.1.1].

    2.5D: spatial weights are copied; temporal convolutions start as the identity and temporal
    attention as zero. So the latent of one frame does not change, the latent of a clip is the image
    latent of every (time factor)-th frame, and all the frames decoded from one latent frame are
    equal. From there, time is learned.
    3D: each 2D kernel becomes the middle slice of a joint one. The latent of one frame does not
    change; in a clip the joint attention mixes the frames from the first step on.
    """
    if image_tae.cfg.variant != "2d":
        raise ValueError(f"inflate: variant {image_tae.cfg.variant}: only 2d can be inflated")
    video = TAE(replace(image_tae.cfg, variant=variant)).to(image_tae.lat_mean.device)
    state, image = video.state_dict(), image_tae.state_dict()
    if missing := set(image) - set(state):
        raise ValueError(f"inflate: {sorted(missing)[0]}: no such layer in the video autoencoder")
    for name, w in image.items():
        state[name].copy_(centre_slice(w) if w.ndim < state[name].ndim else w)
    return video


# ---- 5. VidTwin ----------------------------------------------------------------------------------
# What is in a clip changes slowly: a few "frames" of fine detail hold it (structure). How it moves
# is coarse, but there in every frame (dynamics). So two latents, each poor where the other is rich
# [VT]:
#
#   z = E(x)  (B,D,T,h,w)  --> Q-Former over time: n_q queries for T frames --> convs --> S
# (n_q,h',w')                          --> convs, mean over height --> (T,w') \  one head --> D (T,
# w' + h')                              convs, mean over width  --> (T,h') /
#   u_S + u_Dh + u_Dw  (B,D,T,h,w)  --> decoder --> x
#
# Each latent is brought back to the full grid by a branch of its own, and the three are summed. So
# a part alone can be decoded, and structure of one clip with dynamics of another (`reenact`).


class TokenAttention(nn.Module):
    """Self-attention over the last axis but one of x (..., n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "... n (three a d) -> three ... a n d",
                            three=3, a=self.heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(rearrange(h, "... a n d -> ... n (a d)"))


class STBlock(nn.Module):
    """Attention within each frame, attention along time (causal), MLP [VT D.1]. The norms have no
    weights of their own: a learned table shifts, scales and gates, as in a DiT without a
    timestep."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.space, self.time = TokenAttention(width, heads), TokenAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width))
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        nn.init.zeros_(self.time.out.weight)
        nn.init.zeros_(self.time.out.bias)

    def forward(self, x: Tensor, when: Tensor | None = None) -> Tensor:
        """x (B, T, N, D); `when` (T, D): positions in time, for the first block alone."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.table
        x = x + gate1 * self.space(self.norm(x) * (1 + scale1) + shift1)
        h = rearrange(x, "b t n d -> b n t d")
        h = self.time(h if when is None else h + when, causal=True)
        x = x + rearrange(h, "b n t d -> b t n d")
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


def sincos(n: int, width: int) -> Tensor:
    """Fixed positions (n, width): sines, then cosines, of n places."""
    angle = torch.arange(n)[:, None] * 1e4 ** (-torch.arange(width // 2) / (width / 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


class STTransformer(nn.Module):
    """The backbone of encoder and decoder: (B, T, N, D) -> the same, through `depth` blocks."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        self.remember = cfg.checkpointing
        self.blocks = nn.ModuleList(STBlock(cfg.width, cfg.heads) for _ in range(cfg.depth))
        row = sincos(cfg.grid, cfg.width // 2)
        where = torch.cat([repeat(row, "h d -> (h w) d", w=cfg.grid),
                           repeat(row, "w d -> (h w) d", h=cfg.grid)], 1)
        self.register_buffer("where", where, persistent=False)                          # (N, D)
        self.register_buffer("when", sincos(cfg.frames, cfg.width), persistent=False)   # (T, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.where
        for i, block in enumerate(self.blocks):
            when = self.when if i == 0 else None
            if self.remember and torch.is_grad_enabled():
                x = checkpoint(block, x, when, use_reentrant=False)
            else:
                x = block(x, when)
        return x


class QFormer(nn.Module):
    """n_q learned queries look at the T frames of one place: (B, T, D) -> (B, n_q, d_q) [VT 3.2.1].

    Places are in the batch axis, so that a query asks the same everywhere. Norms behind the
    additions, as in BERT and BLIP-2. It adds no positions: on a given z the order of the frames
    does not matter, whatever order there is the backbone has written into z."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        w = cfg.query_width
        self.heads = cfg.query_heads
        self.queries = nn.Parameter(torch.randn(cfg.queries, w) * 0.02)
        self.norm = nn.LayerNorm(w)
        self.layers = nn.ModuleList()
        for i in range(cfg.query_layers):
            layer = {"self": TokenAttention(w, cfg.query_heads), "norm1": nn.LayerNorm(w)}
            if i % 2 == 0:          # keys and values come straight from the width of z
                layer |= {"q": nn.Linear(w, w), "kv": nn.Linear(cfg.width, 2 * w),
                          "out": nn.Linear(w, w), "norm2": nn.LayerNorm(w)}
            layer |= {"mlp": nn.Sequential(nn.Linear(w, cfg.query_ffn), nn.GELU(),
                                           nn.Linear(cfg.query_ffn, w)), "norm3": nn.LayerNorm(w)}
            self.layers.append(nn.ModuleDict(layer))

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(self.queries).expand(len(z), -1, -1)                      # (B, n_q, d_q)
        for layer in self.layers:
            x = layer["norm1"](x + layer["self"](x))
            if "kv" in layer:
                q = rearrange(layer["q"](x), "b n (a d) -> b a n d", a=self.heads)
                k, v = rearrange(layer["kv"](z), "b t (two a d) -> two b a t d",
                                 two=2, a=self.heads)
                h = rearrange(F.scaled_dot_product_attention(q, k, v), "b a n d -> b n (a d)")
                x = layer["norm2"](x + layer["out"](h))
            x = layer["norm3"](x + layer["mlp"](x))
        return x


def halvings(channels: list[int]) -> list[nn.Module]:
    """Strided 3x3 convolutions with ReLU from channels[0] to channels[-1]."""
    return [m for cin, cout in zip(channels[:-1], channels[1:])
            for m in (nn.Conv2d(cin, cout, 3, 2, 1), nn.ReLU())]


class StructureEncoder(nn.Module):
    """z (B, D, T, h, w) -> moments of S (B, 2 d_S, n_q, h', w')."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        self.qformer = QFormer(cfg)
        c = [2 * cfg.query_width * 2**i for i in range(cfg.structure_down + 1)]
        self.convs = nn.Sequential(nn.Conv2d(cfg.query_width, c[0], 3, 1, 1), *halvings(c),
                                   nn.Conv2d(c[-1], 2 * cfg.structure_channels, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        B, h = z.shape[0], z.shape[3]
        q = self.qformer(rearrange(z, "b d t h w -> (b h w) t d"))              # (B h w, n_q, d_q)
        s = self.convs(rearrange(q, "(b h w) n c -> (b n) c h w", b=B, h=h))
        return rearrange(s, "(b n) c h w -> b c n h w", b=B)


class DynamicsEncoder(nn.Module):
    """z (B, D, T, h, w) -> moments of D (B, 2 d_D, 1, T, w' + h'): the mean over height, which
    leaves the columns, beside the mean over width, which leaves the rows [VT 3.2.2]. One head for
    both."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        self.convs = nn.Sequential(*halvings([cfg.width] * (cfg.dynamics_down + 1)))
        self.head = nn.Conv2d(cfg.width, 2 * cfg.dynamics_channels, 3, 1, 1)    # over (time, space)

    def forward(self, z: Tensor) -> Tensor:
        T = z.shape[2]
        z = self.convs(rearrange(z, "b d t h w -> (b t) d h w"))
        z = rearrange(z, "(b t) d h w -> b d t h w", t=T)
        return torch.cat([self.head(z.mean(3)), self.head(z.mean(4))], -1)[:, :, None]


class StructureBranch(nn.Module):
    """S (B, d_S, n_q, h', w') -> u_S (B, D, T, h, w) [VT 3.3]."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        self.grid = cfg.grid
        c = [2 * cfg.query_width * 2**i for i in range(cfg.structure_down + 1)][::-1]
        layers = [nn.Conv2d(cfg.structure_channels, c[0], 3, 1, 1), nn.ReLU()]
        for cin, cout in zip(c[:-1], c[1:]):
            layers += [nn.Conv2d(cin, cout, 3, 1, 1), nn.ReLU(), nn.Upsample(scale_factor=2.0)]
        self.convs = nn.Sequential(*layers, nn.Conv2d(c[-1], cfg.query_width, 3, 1, 1))
        self.widen = nn.Linear(cfg.query_width, cfg.width)
        self.frames = nn.Linear(cfg.queries, cfg.frames)    # the paper's convolution with kernel 1

    def forward(self, s: Tensor) -> Tensor:
        B, n = s.shape[0], self.grid
        u = self.convs(rearrange(s, "b c n h w -> (b n) c h w"))
        at = (u.shape[-1] - n) // 2                                          # 4 -> 8 -> 7: cropped
        u = F.relu(self.widen(rearrange(u[..., at : at + n, at : at + n],
                                        "(b n) c h w -> b h w n c", b=B)))      # (B, h, w, n_q, D)
        u = F.relu(self.frames(rearrange(u, "b h w n d -> b h w d n")))         # (B, h, w, D, T)
        return rearrange(u, "b h w d t -> b d t h w")


class DynamicsBranch(nn.Module):
    """One half of D (B, d_D, T, n') -> (B, D, T, n), n tokens along the axis that is left; whoever
    calls repeats it along the other."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        d, n = cfg.width, cfg.grid
        self.widen = nn.Sequential(nn.Linear(cfg.dynamics_channels, d), nn.ReLU(),
                                   nn.Linear(d, d), nn.ReLU())
        self.places = nn.Sequential(nn.Linear(cfg.after(cfg.dynamics_down), n), nn.ReLU(),
                                    nn.Linear(n, n), nn.ReLU())

    def forward(self, d: Tensor) -> Tensor:
        u = self.widen(rearrange(d, "b c t n -> b t n c"))
        return self.places(rearrange(u, "b t n d -> b d t n"))


class VidTwin(Autoencoder):
    """VidTwin [VT s3]: structure and dynamics. Clips of one size, (T, H, W) of the config; z is
    flat (B, n): S (d_S, n_q, h', w'), then D (d_D, 1, T, w' + h')."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__(cfg.structure_channels + cfg.dynamics_channels)
        self.cfg = cfg
        self.embed = nn.Linear(3 * cfg.patch**2, cfg.width)
        self.encoder, self.decoder = STTransformer(cfg), STTransformer(cfg)
        self.structure_encoder, self.dynamics_encoder = StructureEncoder(cfg), DynamicsEncoder(cfg)
        self.structure, self.columns, self.rows = (
            StructureBranch(cfg), DynamicsBranch(cfg), DynamicsBranch(cfg))
        self.norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.table = nn.Parameter(torch.randn(2, cfg.width) / cfg.width**0.5)
        self.out = nn.Linear(cfg.width, 3 * cfg.patch**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.init_branches()

    @torch.no_grad()
    def init_branches(self) -> None:
        """He's initialisation between backbone and backbone, and latents that begin with a noise of
        e^-3. A dozen layers in a row with torch's own, whose gain is 1 / sqrt(3), leave a hundredth
        of the signal: after 100 toy steps that was 1.5 dB behind."""
        for part in (self.structure_encoder.convs, self.dynamics_encoder, self.structure,
                     self.columns, self.rows):
            for m in part.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                    nn.init.zeros_(m.bias)
        for head in (self.structure_encoder.convs[-1], self.dynamics_encoder.head):
            head.bias[len(head.bias) // 2 :] = -6.0

    @property
    def last_weight(self) -> nn.Parameter:
        return self.out.weight

    def streams(self, T: int, H: int, W: int) -> list[tuple[int, int, int, int]]:
        c = self.cfg
        if (c.frames, c.size, c.size) != (T, H, W):
            raise ValueError(f"clip of {T} x {H} x {W}: this VidTwin takes {c.frames} x {c.size} x "
                             f"{c.size} and nothing else")
        s, d = c.after(c.structure_down), c.after(c.dynamics_down)
        return [(c.structure_channels, c.queries, s, s), (c.dynamics_channels, 1, c.frames, 2 * d)]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return self.streams(self.cfg.frames, self.cfg.size, self.cfg.size)

    def split(self, z: Tensor) -> list[Tensor]:
        parts = z.split([math.prod(s) for s in self.shapes], 1)
        return [p.reshape(-1, *s) for p, s in zip(parts, self.shapes)]

    def spread(self, per_channel: Tensor) -> Tensor:
        parts = zip(per_channel.split([s[0] for s in self.shapes]), self.shapes)
        return torch.cat([p.repeat_interleave(math.prod(s[1:])) for p, s in parts])

    def encode(self, x: Tensor) -> Posterior:
        """(B,3,T,H,W) in [-1,1] -> Posterior over (B, n). ValueError for another T, H or W."""
        check_clip(x)
        self.streams(*x.shape[2:])
        p = self.cfg.patch
        h = self.embed(rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p))
        z = rearrange(self.encoder(h), "b t (h w) d -> b d t h w", h=self.cfg.grid)
        moments = self.structure_encoder(z), self.dynamics_encoder(z)
        mean, logvar = (torch.cat([m.float().chunk(2, 1)[i].flatten(1) for m in moments], 1)
                        for i in (0, 1))
        return Posterior(mean, logvar.clamp(-30, 20))

    def branches(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u_S, u_Dh (constant along height), u_Dw (constant along width), each (B, D, T, h, w)."""
        s, d = self.split(z)
        n = self.cfg.grid
        columns, rows = d[:, :, 0].chunk(2, -1)                              # (B, d_D, T, w' or h')
        return (self.structure(s), repeat(self.columns(columns), "b d t w -> b d t h w", h=n),
                repeat(self.rows(rows), "b d t h -> b d t h w", w=n))

    def decode(self, z: Tensor, num_frames: int | None = None, size: tuple[int, int] | None = None,
               only: str = "") -> Tensor:
        """(B, n) -> (B,3,T,H,W); only="structure" or "dynamics" leaves the other branch out."""
        if only not in ("", "structure", "dynamics"):
            raise ValueError(f"only {only}: not one of structure, dynamics")
        s, dh, dw = self.branches(z)
        u = s if only == "structure" else dh + dw if only == "dynamics" else s + dh + dw
        h = self.decoder(rearrange(u, "b d t h w -> b t (h w) d"))
        shift, scale = self.table
        h = self.out(self.norm(h) * (1 + scale) + shift)
        p = self.cfg.patch
        x = rearrange(h, "b t (h w) (c p q) -> b c t (h p) (w q)", h=self.cfg.grid, p=p, q=p)
        x = x[:, :, :num_frames]
        return x if size is None else x[..., : size[0], : size[1]]

    def reenact(self, structure_of: Tensor, dynamics_of: Tensor) -> Tensor:
        """Clips (B,3,T,H,W): what is in the first with the motion of the second [VT 4.4.1]."""
        n = math.prod(self.shapes[0])
        a, b = self.encode(structure_of).mean, self.encode(dynamics_of).mean
        return self.decode(torch.cat([a[:, :n], b[:, n:]], 1))


def autoencoder(cfg: TAEConfig | VidTwinConfig) -> Autoencoder:
    """The model of a config."""
    return VidTwin(cfg) if isinstance(cfg, VidTwinConfig) else TAE(cfg)


# ---- 6. Losses -----------------------------------------------------------------------------------


def site_distances(mean: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, T, H, W) -> ||X_ij - Mean(X)|| (B, T, H, W) and ||Std(X)|| (B, T, 1, 1), in fp32. Mean
    and Std are over the positions of one frame, the norms over channels. Both are constants to the
    gradient: otherwise inliers spread out to raise the threshold."""
    x = mean.float()
    m = x.mean((-2, -1), keepdim=True).detach()
    s = x.std((-2, -1), keepdim=True, unbiased=False).detach()
    return (x - m).norm(dim=1), s.norm(dim=1)


def outlier_penalty(mean: Tensor, r: float = 3.0) -> Tensor:
    """Outlier penalty loss [MG s3.1.1]: mean over positions of max(||X_ij - Mean(X)|| - r
    ||Std(X)||, 0).

    Without it the encoder stores global information at a few positions of very high norm, which
    decode to spots. On Gaussian latents the distance is sqrt(C) and the threshold r sqrt(C), so
    nothing is penalised; a scalar Std in place of the norm would penalise nearly everything.
    (B, C, T, H, W) -> scalar; zero for frames of fewer than 16 positions, where no outlier can
    exceed r = 3, and for latents that are no grid.
    """
    if mean.ndim != 5 or mean.shape[-2] * mean.shape[-1] < 16:
        return mean.new_zeros(())
    distance, s = site_distances(mean)
    return F.relu(distance - r * s).mean()


def reconstruction_loss(cfg: LossConfig, x: Tensor, recon: Tensor,
                        perceptual: Callable | None = None) -> Tensor:
    """Weighted sum of L1, L2 and perceptual loss, each a mean -> scalar."""
    d = recon.float() - x
    loss = cfg.l1 * d.abs().mean()
    if cfg.l2:
        loss = loss + cfg.l2 * d.square().mean()
    if cfg.perceptual and perceptual is not None:
        loss = loss + cfg.perceptual * perceptual(recon.float(), x)
    return loss


def tae_loss(cfg: LossConfig, x: Tensor, recon: Tensor, posterior: Posterior, step: int = 0,
             perceptual: Callable | None = None) -> Tensor:
    """Reconstruction, KL and, from `opl_start` on, outlier penalty -> scalar."""
    loss = reconstruction_loss(cfg, x, recon, perceptual) + cfg.kl * posterior.kl()
    if cfg.opl and step >= cfg.opl_start:
        loss = loss + cfg.opl * outlier_penalty(posterior.mean, cfg.opl_r)
    return loss


class PatchDiscriminator(nn.Module):
    """PatchGAN over frames: (B, 3, T, H, W) -> logits (B T, 1, H', W'), one for each patch. Norms
    are over groups of channels: a BatchNorm would compare the clips of a batch, and breaks at
    one."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            cin, cout = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            modules += [nn.Conv2d(cin, cout, 4, 2 if i < layers else 1, 1), FrameNorm(cout),
                        nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*modules, nn.Conv2d(cout, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(rearrange(x, "b c t h w -> (b t) c h w"))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vgg_perceptual() -> Callable[[Tensor, Tensor], Tensor]:
    """Distance of VGG16 features after each of its five stages, unit length at each position, as in
    LPIPS with all weights equal. Fetches torchvision's weights; ValueError where it cannot."""
    try:
        from torchvision.models import VGG16_Weights, vgg16
        net = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.eval().requires_grad_(False)
    except Exception as error:      # no compiled operators, no network, no disk: all the same here
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"perceptual: needs torchvision's VGG16 weights ({line})") from None
    stages = [net[a:b] for a, b in ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))]
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        both = rearrange(torch.cat([x, y]), "b c t h w -> (b t) c h w") / 2 + 0.5
        h, total = (both - mean.to(x)) / std.to(x), 0.0
        net.to(x.device)
        for stage in stages:
            h = stage(h)
            a, b = F.normalize(h, dim=1).chunk(2)
            total = total + (a - b).square().sum(1).mean()
        return total

    return distance


class Objective(nn.Module):
    """Autoencoder and, where the GAN weight is not 0, its discriminator: forward is a training
    loss.

    One backward pass serves both. The reconstruction is judged with the discriminator held fixed,
    the discriminator is taught on the detached reconstruction, so neither sees the other's
    gradient. The adversarial loss is weighted by gan * ||d rec|| / (||d adv|| + 1e-4), both with
    respect to the last weight (VQGAN): an adversary cannot drown what it is to refine."""

    def __init__(self, tae: Autoencoder, cfg: LossConfig, perceptual: Callable | None = None):
        super().__init__()
        self.tae, self.cfg, self.perceptual = tae, cfg, perceptual
        self.critic = PatchDiscriminator() if cfg.gan else None

    def forward(self, x: Tensor, step: int = 0, generator: torch.Generator | None = None) -> Tensor:
        recon, posterior = self.tae(x, generator)
        loss = tae_loss(self.cfg, x, recon, posterior, step, self.perceptual)
        if self.critic is None:
            return loss
        if step < self.cfg.gan_start:       # idle, but with a gradient for every parameter
            return loss + 0 * sum(p.sum() for p in self.critic.parameters())
        recon = recon.float()
        self.critic.requires_grad_(False)
        adversarial = -self.critic(recon).mean()
        self.critic.requires_grad_(True)
        if torch.is_grad_enabled():
            rec = reconstruction_loss(self.cfg, x, recon, self.perceptual)
            rec, adv = (torch.autograd.grad(term, self.tae.last_weight, retain_graph=True)[0].norm()
                        for term in (rec, adversarial))
            adversarial = (rec / (adv + 1e-4)).clamp(0, 1e4) * adversarial
        return (loss + self.cfg.gan * adversarial
                + hinge(self.critic(x), self.critic(recon.detach())))


def is_image_step(step: int) -> bool:
    """[MG]: one batch of images for three of video."""
    return step % 4 == 0


# ---- 7. Measures and statistics ------------------------------------------------------------------


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clips (B, 3, T, H, W) in [-1, 1] -> (B,), the mean over
    frames. Identical frames count 80 dB."""
    d = (x.clamp(-1, 1) - y.clamp(-1, 1)) / 2                       # of values in [0, 1]
    return (-10 * d.square().mean((1, 3, 4)).clamp_min(1e-8).log10()).mean(1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of clips in [-1, 1] -> (B,), the mean over frames and channels.
    Gaussian window of 11 pixels, sigma 1.5, K = 0.01 and 0.03; positions where the window fits."""
    k = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(k, k) / k.sum() ** 2)[None, None].to(x.device, torch.float64)
    a, b = (rearrange(v.double().clamp(-1, 1) / 2 + 0.5, "b c t h w -> (b c t) 1 h w")
            for v in (x, y))                # float64: a variance is a difference of two squares
    blur = lambda v: F.conv2d(v, window)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    s = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return s.reshape(len(x), -1).mean(1).float()


def temporal_error(x: Tensor, y: Tensor) -> Tensor:
    """RMS difference between the frame-to-frame changes of two clips, in units of [0, 1] -> (B,).
    Flicker and lag show here that PSNR hardly sees; 0 for images."""
    if x.shape[2] == 1:
        return x.new_zeros(len(x))
    d = (x.clamp(-1, 1) - y.clamp(-1, 1)).diff(dim=2) / 2
    return d.square().mean((1, 2, 3, 4)).sqrt()


def spot_ratio(mean: Tensor) -> Tensor:
    """Worst latent outlier, in units of the penalty's threshold: max ||X_ij - Mean|| / (3 ||Std||)
    over positions and frames, (B, C, T, H, W) -> (B,). Above 1 there are "latent dots"."""
    distance, s = site_distances(mean)
    return (distance / (3 * s).clamp_min(1e-12)).amax((1, 2, 3))


def seam_score(x: Tensor, borders: list[int]) -> Tensor:
    """RMS change from frame b - 1 to frame b at the tile borders b, divided by that everywhere else
    -> (B,); 1 where no seam can be seen. x (B, 3, T, H, W)."""
    change = x.diff(dim=2).square().mean((1, 3, 4))                 # (B, T - 1)
    at = torch.zeros(change.shape[1], dtype=torch.bool)
    at[[b - 1 for b in borders]] = True
    return (change[:, at].mean(1) / change[:, ~at].mean(1).clamp_min(1e-20)).sqrt()


def video_features() -> Callable[[Tensor], Tensor]:
    """clips (B, 3, T, H, W) in [-1, 1] -> (B, 512): torchvision's R3D-18, trained on Kinetics-400,
    for `frechet`. Fetches its weights; ValueError where it cannot."""
    try:
        from torchvision.models.video import R3D_18_Weights, r3d_18
        net = r3d_18(weights=R3D_18_Weights.KINETICS400_V1).eval().requires_grad_(False)
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"rFVD: needs torchvision's R3D-18 weights ({line})") from None
    net.fc = nn.Identity()
    mean, std = (torch.tensor(v).view(3, 1, 1, 1)
                 for v in ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)))

    def features(x: Tensor) -> Tensor:
        x = F.interpolate(x.clamp(-1, 1) / 2 + 0.5, (x.shape[2], 112, 112), mode="trilinear")
        return net((x - mean) / std)

    return features


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians through two sets of features (n, d):
    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)). With `video_features` a reconstruction FVD; published
    ones use another network (I3D), so compare only with each other."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


class LatentStats:
    """Mean and std of each channel of posterior samples, summed up batch by batch in float64.

    A rectified flow compares latents with unit noise: the signal-to-noise ratio at a time t depends
    on their scale. `sums` (3, C) is all there is to save and to restore."""

    def __init__(self, tae: Autoencoder, sums: Tensor | None = None):
        self.tae = tae
        self.sums = torch.zeros(3, len(tae.lat_mean), dtype=torch.float64) if sums is None else sums

    def update(self, posterior: Posterior) -> None:
        """Add the posteriors of a batch of clips."""
        mean, var = posterior.mean.double(), posterior.logvar.double().exp()
        parts = zip(*(self.tae.split(v.cpu()) for v in (mean, mean.square() + var)))
        over = (0, 2, 3, 4)
        self.sums += torch.cat([
            torch.stack([torch.full_like(m.sum(over), m.numel() / m.shape[1]), m.sum(over),
                         s.sum(over)]) for m, s in parts], 1)

    def result(self) -> tuple[Tensor, Tensor]:
        """mean (C,), std (C,), fp32."""
        n, total, square = self.sums
        mean = total / n
        return mean.float(), (square / n - mean**2).clamp_min(1e-12).sqrt().float()


# ---- 8. Demo and study ---------------------------------------------------------------------------


def trace(name: str, model: Autoencoder, T: int, H: int) -> None:
    """Print the shape of the tensor after each layer, without the batch (frames unfolded). The
    model is on the meta device: no memory."""
    rows: list[tuple[str, tuple[int, ...]]] = []
    if isinstance(model, TAE):
        layers = {}
        for part, net in (("encoder", model.encoder), ("decoder", model.decoder)):
            blocks = {f"level {i} {type(b).__name__}": b for i, level in enumerate(net.levels)
                      for b in level}
            layers |= {f"{part} {k}": m for k, m in
                       {"conv_in": net.conv_in, "middle": net.middle, "conv_out": net.conv_out,
                        **blocks}.items()}
        show = lambda out: (out.shape[1], out.shape[0], *out.shape[2:])         # (C, T, H, W)
    else:
        names = ("embed", "encoder", "structure_encoder.qformer", "structure_encoder",
                 "dynamics_encoder", "structure", "columns", "rows", "decoder", "out")
        layers = {n: model.get_submodule(n) for n in names}
        show = lambda out: tuple(out.shape[1:])
    for label, layer in layers.items():
        layer.register_forward_hook(
            lambda module, inputs, out, label=label: rows.append((label, show(out))))
    count = sum(p.numel() for p in model.parameters())
    x = torch.empty(1, 3, T, H, H, device="meta")
    z = model.encode(x).mean
    rows.append(("latent", tuple(z.shape[1:])))
    y = model.decode(z, T)
    print(f"{name}: {count / 1e6:.1f} M parameters")
    rows = [("clip", tuple(x.shape[1:])), *rows, ("reconstruction", tuple(y.shape[1:]))]
    for label, shape in rows:
        print(f"  {label:34}{shape}")
    print(f"  {100 * model.compression_rate(T, H, H):.4g} % of the values")


def toy_clips(split: str, i: int, n: int, things: int = 1,
              interval: Callable[[random.Random], float] = lambda rng: 1.0) -> Tensor:
    """n clips of the toy world from (split, i) alone; several things overlap."""
    rng = random.Random(f"{split}/{i}")
    worlds = [sample_world(rng, things, overlap=things > 1) for _ in range(n)]
    return render(worlds, interval=[interval(rng) for _ in worlds])


def fit(variant: str, seconds: float, seed: int, most: int = 1, clock=time.monotonic,
        progress: bool = True, things: int = 6) -> tuple[Autoencoder, TAE | None]:
    """Train a toy autoencoder for so many seconds by `clock` -> (it, the image model it began as).

    2.5D and 3D: 15 % of the time goes to images, the rest to windows of 8 frames, every fourth step
    one frame. VidTwin takes whole clips. most: of the motion curriculum; 1 is off. things: objects
    in a clip."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    loss_cfg, image = LOSSES["toy"], None

    def train(tae: Autoencoder, share: float, images: bool) -> None:
        opt = torch.optim.AdamW(tae.parameters(), 2e-3, (0.9, 0.99))
        start, step, done = clock(), 0, 0.0
        bar = tqdm(total=100, desc=f"{variant} {'image' if images else 'video'}", unit="%",
                   disable=not progress)
        while done < 1:
            for group in opt.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
            pace = lambda rng, done=done: motion_interval(rng, done, most) if most > 1 else 1.0
            x = toy_clips(f"{'image' if images else 'video'}/{seed}", step, 8, things, pace)
            if images:
                x = rearrange(x[:, :, ::4], "b c t h w -> (b t) c 1 h w")
            elif isinstance(tae, TAE):
                x = x[:, :, :1] if is_image_step(step) else x[:, :, step % 9 : step % 9 + 8]
            recon, posterior = tae(x)
            loss = tae_loss(loss_cfg, x, recon, posterior)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tae.parameters(), 1.0)
            opt.step()
            step, done = step + 1, (clock() - start) / (share * seconds)
            bar.update(min(100, round(100 * done)) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.3f}", steps=step, refresh=False)
        bar.close()

    if variant == "vidtwin":
        tae = VidTwin(VIDTWIN_PRESETS["toy"])
        train(tae, 1.0, images=False)
    else:
        image = TAE(replace(PRESETS["toy"], variant="2d"))
        train(image, 0.15, images=True)
        tae = inflate(image, variant)
        train(tae, 0.85, images=False)
    return tae.eval(), image


def strip(ax, clip: Tensor, title: str, every: int = 2) -> None:
    """Draw every second frame of a clip (3, T, H, W) side by side."""
    ax.imshow(rearrange(clip[:, ::every].clamp(-1, 1), "c t h w -> h (t w) c").numpy() / 2 + 0.5)
    ax.set_axis_off()
    ax.set_title(title, fontsize=7, pad=2)


def pyplot():
    """matplotlib without a display, imported when it is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def demo(out: Path, seconds: float = 55.0, seed: int = 0) -> bool:
    """Image training, inflation, video training on the toy world within `seconds`; a figure of
    reconstructions; PASS when inflation is exact and video training gains 3 dB over it."""
    x = toy_clips(f"heldout/{seed}", 0, 32)
    tae, image = fit("2.5d", seconds, seed)
    image.eval()
    with torch.no_grad():
        inflated = inflate(image).eval()
        first = x[:, :, :1]
        gap = (inflated.encode(first).mean - image.encode(first).mean).abs().max().item()
        before = psnr(inflated(x)[0], x).mean().item()
        recon = tae(x)[0]
    after = psnr(recon, x).mean().item()

    plt = pyplot()
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(8, 1, figsize=(10, 6.2))
    for i, ax in enumerate(axes):
        strip(ax, (x if i % 2 == 0 else recon)[i // 2],
              "reconstruction" if i % 2 else "every second frame")
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "reconstruction.png", dpi=130)
    print(f"wrote {out / 'reconstruction.png'}")
    ok = gap <= 1e-5 and after - before >= 3
    verdict = "PASS" if ok else "FAIL"
    print(f"{verdict} inflation leaves image latents as they are: {gap:.1e} vs 1e-05")
    gain = f"{before:.1f} -> {after:.1f} dB, {after - before:+.1f} vs +3.0"
    print(f"{verdict} video training over the inflated image model: {gain}")
    return ok


def study_job(variant: str, most: int, seed: int, seconds: float, folder: Path) -> None:
    """Train one autoencoder for so many CPU seconds on one thread, measure it on slow and on fast
    clips, leave VARIANT-MOST-SEED.json and .pt in the folder."""
    import json

    torch.set_num_threads(1)
    tae, _ = fit(variant, seconds, seed, most, clock=time.process_time, progress=False)
    row: dict = {"variant": variant, "most": most, "seed": seed}
    for name, interval in (("slow", 1.0), ("fast", 6.0)):
        x = toy_clips(f"study/{name}", 0, 64, interval=lambda rng, interval=interval: interval)
        with torch.no_grad():
            y = torch.cat([tae(part)[0] for part in x.split(16)]).clamp(-1, 1)
        for measure in (psnr, ssim, temporal_error):
            row[f"{name}_{measure.__name__}"] = measure(x, y).mean().item()
    row["values"] = math.prod(tae.latent_shape(16, 32, 32))
    row["parameters"] = sum(p.numel() for p in tae.parameters())
    name = f"{variant}-{most}-{seed}"
    torch.save(tae.state_dict(), folder / f"{name}.pt")
    tmp = folder / f"{name}.tmp"
    tmp.write_text(json.dumps(row))
    tmp.replace(folder / f"{name}.json")            # the last thing: a job is done or it is not


def study(out: Path, seconds: float = 180.0, seeds: int = 3, workers: int = 2) -> None:
    """Three variants, the same number of latent values, the same CPU time; each with and without
    the motion curriculum, `seeds` times. Continues where it was stopped. Writes study.json and
    study.png."""
    import json
    import multiprocessing

    from tqdm import tqdm

    folder = out / "study"
    folder.mkdir(parents=True, exist_ok=True)
    grid = [(v, m, s) for s in range(seeds) for v in ("2.5d", "3d", "vidtwin") for m in (1, 8)]
    todo = [j for j in grid if not (folder / f"{j[0]}-{j[1]}-{j[2]}.json").exists()]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(study_job, (*j, seconds, folder)) for j in todo]
        for job in tqdm(jobs, desc="study", unit="model", initial=len(grid) - len(todo),
                        total=len(grid)):
            job.get()
    rows = [json.loads((folder / f"{v}-{m}-{s}.json").read_text()) for v, m, s in grid]
    measures = [f"{speed}_{name}" for speed in ("slow", "fast")
                for name in ("psnr", "ssim", "temporal_error")]
    table = {}
    print(f"{'':24}" + "".join(f"{m:>22}" for m in measures))
    for v in ("2.5d", "3d", "vidtwin"):
        for m in (1, 8):
            values = torch.tensor([[r[k] for k in measures] for r in rows
                                   if (r["variant"], r["most"]) == (v, m)])
            mean, spread = values.mean(0), values.std(0)
            table[f"{v}, curriculum {'on' if m > 1 else 'off'}"] = {
                k: [a.item(), b.item()] for k, a, b in zip(measures, mean, spread)}
            cells = "".join(f"{f'{a:.3f} +- {b:.3f}':>22}" for a, b in zip(mean, spread))
            print(f"{v:8} curriculum {'on' if m > 1 else 'off':5}{cells}")
    (out / "study.json").write_text(json.dumps(
        {"seconds": seconds, "seeds": seeds, "table": table, "rows": rows}, indent=1))

    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for ax, name, label in zip(axes, ("psnr", "ssim", "temporal_error"),
                               ("PSNR, dB", "SSIM", "temporal error")):
        for i, (row, values) in enumerate(table.items()):
            for j, speed in enumerate(("slow", "fast")):
                a, b = values[f"{speed}_{name}"]
                ax.errorbar(j + 0.08 * (i - 2.5), a, b, fmt="os"[i % 2], color=f"C{i // 2}",
                            mfc=f"C{i // 2}" if i % 2 else "w", capsize=3,
                            label=row if j == 0 else None)
        ax.set_xticks([0, 1], ["slow clips", "fast clips"])
        ax.set(xlim=(-0.5, 1.5), ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "study.png", dpi=130)
    plt.close(figure)
    print(f"wrote {out / 'study.json'}, {out / 'study.png'}")


def reenactments(out: Path, seconds: float = 900.0, seed: int = 0) -> None:
    """VidTwin, trained on clips of one object for so many CPU seconds (kept in `out`), then: the
    structure of one clip with the dynamics of another. reenact.png, and what the judge of train.py
    sees in 64 of them, against what was in the first and in the second clip."""
    import train

    weights = out / f"reenact-{seconds:g}-{seed}.pt"
    out.mkdir(parents=True, exist_ok=True)
    if weights.exists():
        tae = VidTwin(VIDTWIN_PRESETS["toy"]).eval()
        tae.load_state_dict(torch.load(weights, weights_only=True))
    else:
        torch.set_num_threads(1)
        tae, _ = fit("vidtwin", seconds, seed, clock=time.process_time, things=1)
        torch.save(tae.state_dict(), weights.with_suffix(".tmp"))
        weights.with_suffix(".tmp").replace(weights)
    a, b = (toy_clips(f"reenact/{i}", 0, 64) for i in "ab")
    with torch.no_grad():
        made = {"A": tae(a)[0], "B": tae(b)[0], "structure of A, dynamics of B": tae.reenact(a, b)}
        for part in ("structure", "dynamics"):
            made[f"{part} of A alone"] = tae.decode(tae.encode(a).mean, only=part)
    seen = {k: [train.perceive(clip)[0] for clip in v] for k, v in
            {"a": a, "b": b, **made}.items()}
    print(f"reconstruction of A: {psnr(made['A'].clamp(-1, 1), a).mean():.2f} dB")
    for k in made:
        share = lambda side, what, k=k: sum(
            x[what] == y[what] for x, y in zip(seen[k], seen[side])) / len(a)
        of = {side: [f"{what} {share(side, what):.2f}" for what in ("color", "shape", "direction")]
              for side in "ab"}
        print(f"{k:32} agrees with A in {', '.join(of['a'])}; with B in {', '.join(of['b'])}")
    plt = pyplot()
    clips = {"clip A": a, "clip B": b, **made}
    figure, axes = plt.subplots(2 * len(clips), 1, figsize=(9, 1.05 * 2 * len(clips)))
    for i in range(2):
        for j, (title, x) in enumerate(clips.items()):
            strip(axes[i * len(clips) + j], x[i], title)
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "reenact.png", dpi=130)
    plt.close(figure)
    print(f"wrote {out / 'reenact.png'}")


def main() -> int:
    """The command line."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            print(f"tae.py: {message}", file=sys.stderr)
            sys.exit(2)

    parser = Parser(description="The temporal autoencoders on the toy world.", allow_abbrev=False)
    parser.add_argument("--trace", action="store_true", help="print the shapes, toy and paper size")
    parser.add_argument("--study", action="store_true", help="compare the variants: 30 minutes")
    parser.add_argument("--reenact", action="store_true",
                        help="train VidTwin, swap structure and dynamics of clips: 15 minutes")
    parser.add_argument("--seconds", type=float,
                        help="CPU seconds a model (--study 180, --reenact 900)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/tae"), help="folder of the figures")
    args = parser.parse_args()
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g}: must be above 0")
    if args.study:
        study(args.out, args.seconds or 180.0)
        return 0
    if args.reenact:
        try:
            reenactments(args.out, args.seconds or 900.0, args.seed)
        except ModuleNotFoundError as error:
            parser.error(f"{error}; --reenact needs the other files of this repository beside it")
        return 0
    with torch.device("meta"):
        trace("2.5D, toy, 16 frames of 32 x 32", TAE(PRESETS["toy"]), 16, 32)
        if args.trace:
            trace("2.5D, paper, one tile of 32 frames of 768 x 768", TAE(PRESETS["paper"]), 32, 768)
            trace("3D, paper, the same", TAE(replace(PRESETS["paper"], variant="3d")), 32, 768)
            trace("VidTwin, toy", VidTwin(VIDTWIN_PRESETS["toy"]), 16, 32)
            trace("VidTwin, paper", VidTwin(VIDTWIN_PRESETS["paper"]), 16, 224)
            return 0
    return 0 if demo(args.out, seed=args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
