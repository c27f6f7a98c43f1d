"""tae.py: the temporal autoencoder, video <-> latent.

    clip (B,3,T,H,W)                                                 clip (B,3,T,H,W)
         |  conv_in                                                       ^  conv_out
         v                                                                |
    [ResBlocks] -> SpaceDown -> TimeDown       TimeUp <- SpaceUp <- [ResBlocks]      (x levels)
         |                                                                ^
         v  ResBlock, attention over space, attention over time, ResBlock |  (the middle)
    mean, logvar ---- z = mean + std * noise, (B,C,T',H',W') -------------'

Papers. Movie Gen, arXiv 2410.13720, s3.1.1 [MG]; latent diffusion, 2112.10752 [LDM], whose image
autoencoder is the trunk. "2.5D" [MG]: every 2D convolution is followed by a 1D convolution along
time, every spatial attention by a temporal one. The video autoencoder starts from an image
autoencoder (`inflate`): spatial weights are copied, temporal convolutions start as the identity
and temporal attention as zero, so that at step 0 a single frame is encoded exactly as before.

Contract
    encode(x)        x (B,3,T,H,W) float in [-1,1], any T >= 1 (an image is T = 1), any H and W
                     -> Posterior over (B,C,T',H',W'), T' = ceil(T / time factor)
    decode(z, T)     (B,C,T',H',W') -> (B,3,T,H,W); surplus frames of the last latent are dropped
    normalize(z)     to mean 0, std 1 per channel, with the buffers of `latent_stats`
    sample_world(rng), render([World])    the toy world: captioned motion without a download

Run.   python tae.py          # image training, inflation, video training, figure; 80 s on 2 CPUs
       python tae.py --trace  # the shape of the tensor after each layer, toy and paper size: 2 s

Differences from the paper. The weights of L1, KL and perceptual terms are not published: ours are
chosen, and losses are means, so that they weigh the same at every size (the 1e5 of the outlier
penalty goes with a sum; about 0.1 to 1 here). Norms see one frame at a time. The toy preset
compresses 4x4x4, not 8x8x8, and folds 4x4 pixels into channels first: convolutions at full
resolution are what costs on a CPU. It is trained on the squared error alone, which there reached
a given PSNR sooner than L1.

Letters: B batch, T frames, H W height and width, C channels, F = B T frames folded into the batch.
Frames stay folded, (F,C,H,W) in channels_last memory, from the first convolution to the last: 2D
kernels are the fast ones on every device.
"""

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass
class TAEConfig:
    """Sizes and loss weights. The defaults are Movie Gen's, as far as they are published."""

    variant: str = "2.5d"  # "2.5d", or "2d" for the image autoencoder that it is inflated from
    channels: int = 128  # width of the first level
    mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in units of `channels`
    space: tuple[int, ...] = (2, 2, 2)  # spatial stride between one level and the next, 1 or 2
    time: tuple[int, ...] = (2, 2, 2)  # temporal stride at the same places
    stem: int = 1  # space-to-depth factor in front of the first convolution
    res_blocks: tuple[int, ...] = (
        2,
        2,
        2,
        2,
    )  # residual blocks per level, encoder; the decoder has `extra` more
    extra: int = 1  # [LDM]
    latent_channels: int = 16  # C
    heads: int = 1  # attention heads in the middle
    l1: float = 1.0  # loss weights; all losses are means
    l2: float = 0.0
    kl: float = 1e-6
    opl: float = 0.0  # outlier penalty loss [MG]; 0.1-1 in the finetuning phase
    opl_r: float = 3.0

    @property
    def space_factor(self) -> int:
        return self.stem * math.prod(self.space)

    @property
    def time_factor(self) -> int:
        return math.prod(self.time)


PRESETS = {
    # 4x4x4: a clip of 16 x 32 x 32 becomes (8, 4, 8, 8)
    "toy": TAEConfig(
        channels=64, mult=(1, 1, 1), space=(1, 1), time=(2, 2), stem=4, res_blocks=(0, 1, 1),
        extra=0, latent_channels=8, l1=0.0, l2=4.0, kl=5e-3,
    ),
    # 8x8x8 from here on
    "small": TAEConfig(channels=64, mult=(1, 2, 4, 4), res_blocks=(1, 1, 1, 1), kl=1e-5),
    "paper": TAEConfig(),  # 114.5 M parameters
}

# ---- 2. The toy world ----------------------------------------------------------------------------
# Captioned motion that needs no download: coloured shapes, and signs that carry a word, move at a
# constant velocity in front of a dark background. Everything is drawn at 4 times the resolution and
# box-filtered, so that motion is smooth below one pixel. train.py turns a World into a caption, and
# measures from pixels alone what a generated clip shows.

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
        return thing.word in HELDOUT_WORDS
    c, s = list(COLORS).index(thing.color), SHAPES.index(thing.shape)
    d = list(DIRECTIONS).index(thing.direction)
    return (c + 2 * s + 4 * d) % 9 == 0


@cache
def glyphs(word: str, cap: int) -> Tensor:
    """Ink of `word` in DejaVu Sans Mono Bold, capitals `cap` pixels high -> (cap, w) bool.

    The font ships with matplotlib. Its capitals are 0.729 em high, its letters 0.602 em wide."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans Mono", weight="bold")
    path = TextPath((0, 0), word, size=100, prop=font)
    scale = 72.9 / cap
    w = round(60.2 * len(word) / scale)
    x, y = torch.meshgrid(torch.arange(w) + 0.5, cap - torch.arange(cap) - 0.5, indexing="xy")
    points = torch.stack([x.flatten(), y.flatten()], 1).numpy() * scale
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
    H = 32 capitals of 14, 10 and 8 pixels."""
    cap = {1: 14, 2: 10}.get(len(thing.word), 8) / 32
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


def place(thing: Thing, rng: random.Random, frames: int = 16) -> Thing:
    """The same thing, starting at a random point from which its whole path stays in the picture."""
    start = []
    for v, size in zip(velocity(thing), extent(thing)):
        travel = v * (frames - 1)
        lo, hi = size / 2 - min(travel, 0), 1 - size / 2 - max(travel, 0)
        start.append(rng.uniform(lo, hi) if lo < hi else (lo + hi) / 2)
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
    rng: random.Random, things: int = 1, signs: float = 0.5, heldout: bool | None = False,
    frames: int = 16, overlap: bool = False,
) -> World:
    """Draw a world. heldout: False for training, True for combinations that training never shows,
    None for both. Things of different colour; they never overlap, unless `overlap`."""
    drawn: list[Thing] = []
    tries = 0
    while len(drawn) < things:
        tries += 1
        if tries % 50 == 0:  # nothing fits beside what is there
            drawn.clear()
        sign = rng.random() < signs
        length = rng.choices((1, 2, 3), (0.7, 0.15, 0.15))[0]
        words = LETTERS if length == 1 else [w for w in WORDS + HELDOUT_WORDS if len(w) == length]
        thing = Thing(
            color=rng.choice([c for c in COLORS if c not in [d.color for d in drawn]]),
            shape="sign" if sign else rng.choice(SHAPES),
            direction=rng.choice(list(DIRECTIONS)),
            speed="slow" if sign else rng.choice(list(SPEEDS)),  # a long word has no room
            word=rng.choice(words) if sign else "",
            radius=rng.uniform(0.15, 0.19),
        )
        if heldout is None or is_heldout(thing) == heldout:
            thing = place(thing, rng, frames)
            if overlap or all(apart(thing, d, frames) for d in drawn):
                drawn.append(thing)
    return World(tuple(drawn), background=rng.uniform(0.0, 0.15))


def render(worlds: list[World], T: int = 16, H: int = 32, W: int | None = None) -> Tensor:
    """Draw worlds -> (B, 3, T, H, W) float in [-1, 1]. Later things pass in front of earlier."""
    W, S = W or H, SUPERSAMPLE
    clips = np.empty((len(worlds), 3, T, H, W), np.float32)
    for clip, world in zip(clips, worlds):
        clip[:] = world.background
        for thing in world.things:
            which, (vx, vy) = bitmap_of(thing, H), velocity(thing)
            h, w = bitmap(*which).shape[1:]
            color = np.array(COLORS[thing.color], np.float32)[:, None, None]
            for t in range(T):
                x, dx = divmod(round((thing.x + vx * t) * H * S - w / 2), S)
                y, dy = divmod(round((thing.y + vy * t) * H * S - h / 2), S)
                cover, paint = sprite(*which, dx, dy)[:, max(-y, 0) : H - y, max(-x, 0) : W - x]
                region = clip[:, t, max(y, 0) :, max(x, 0) :][:, : cover.shape[0], : cover.shape[1]]
                region *= 1 - cover
                region += paint * color
    return torch.from_numpy(clips).mul_(2).sub_(1)


# ---- 3. Primitives -------------------------------------------------------------------------------


class SpatialConv(nn.Conv2d):
    """3x3 (or 1x1) convolution of each frame: (F, C, H, W)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1):
        super().__init__(cin, cout, kernel, stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.stride[0] == 2
        ):  # LDM pads the strided convolution on the right and at the bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class TemporalConv(nn.Module):
    """1D convolution along time, kernel 3, symmetric *replicate* padding, on folded frames (B T,
    C, H, W).

    Why not zeros: a static clip would darken towards both ends, and the first frame is what people
    notice. Why not causal: [MG] is not, which is why any T works and latent frame i is centred on
    frame (time factor) * i. The kernel starts as the identity (centre tap = I), so inserting it
    into a trained image model changes nothing. With stride 2 the output has ceil(T / 2) frames.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.eye_(self.weight.data[:, :, 1])

    def forward(self, x: Tensor, T: int) -> Tensor:
        C, H, W = x.shape[1:]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=T)  # a view: channels stay last in memory
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        x = F.conv2d(x, self.weight[..., None], self.bias, stride=(self.stride, 1))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)


class Conv25D(nn.Module):
    """[MG]: a 2D convolution followed by a 1D convolution along time. 9 + 3 multiply-adds per
    channel pair, a joint 3D kernel takes 27. In the image autoencoder ("2d") the temporal half
    does not exist."""

    def __init__(
        self, variant: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, time: bool = True
    ):
        super().__init__()
        self.spatial = SpatialConv(cin, cout, kernel, stride)
        self.temporal = TemporalConv(cout) if time and variant == "2.5d" else None

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = self.spatial(x)
        return self.temporal(x, T) if self.temporal else x


class FrameNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself. Over (T,H,W), frame 15 would move the latent of frame 0,
    and tiles would not agree where they meet."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels // 4), channels, eps=1e-6)


# ---- 4. Blocks -----------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input [LDM]."""

    def __init__(self, variant: str, cin: int, cout: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(cin), Conv25D(variant, cin, cout)
        self.norm2, self.conv2 = FrameNorm(cout), Conv25D(variant, cout, cout)
        self.skip = SpatialConv(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, T: int) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), T)
        h = self.conv2(F.silu(self.norm2(h)), T)
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of a frame ("space") or over the frames of a pixel
    ("time")."""

    def __init__(self, channels: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.norm = FrameNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if axis == "time":  # inflation: at first, time is not looked at
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, T: int) -> Tensor:
        H, W = x.shape[2:]
        space, time = "(b t) c h w -> (b t) (h w) c", "(b t) c h w -> (b h w) t c"
        fold = space if self.axis == "space" else time
        h = rearrange(self.norm(x), fold, t=T)  # (sequences, tokens, C)
        q, k, v = rearrange(self.qkv(h), "s n (three a d) -> three s a n d", three=3, a=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "s a n d -> s n (a d)")
        back = " -> ".join(reversed(fold.split(" -> ")))
        return x + rearrange(self.out(h), back, t=T, h=H, w=W)


class Middle(nn.Module):
    """ResBlock, attention over space, then over time, ResBlock, at the coarsest level."""

    def __init__(self, cfg: TAEConfig, channels: int):
        super().__init__()
        self.block1 = ResBlock(cfg.variant, channels, channels)
        self.space = Attention(channels, cfg.heads, "space")
        self.time = Attention(channels, cfg.heads, "time") if cfg.variant == "2.5d" else None
        self.block2 = ResBlock(cfg.variant, channels, channels)

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = self.space(self.block1(x, T), T)
        x = self.time(x, T) if self.time else x
        return self.block2(x, T)


class TimeDown(TemporalConv):
    """Halves the frames: T -> ceil(T / 2). Output i is centred on input 2 i."""

    def __init__(self, channels: int):
        super().__init__(channels, stride=2)


class TimeUp(TemporalConv):
    """Doubles the frames: each is repeated (nearest neighbour), then convolved [MG]."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = rearrange(x, "(b t) c h w -> b t c h w", t=T).repeat_interleave(2, 1)
        x = rearrange(x, "b t c h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        return super().forward(x, 2 * T)


class SpaceDown(Conv25D):
    """Halves height and width. A TimeDown behind it is its temporal convolution."""

    def __init__(self, variant: str, channels: int, time: bool):
        super().__init__(variant, channels, channels, stride=2, time=time)


class SpaceUp(Conv25D):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, variant: str, channels: int, time: bool):
        super().__init__(variant, channels, channels, time=time)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0), T)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> moments (B, 2C, T', H', W')."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        v, width = cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.stem = cfg.stem
        self.conv_in = Conv25D(v, 3 * cfg.stem**2, width[0])
        self.levels = nn.ModuleList()
        for i, w in enumerate(width):
            previous = width[max(i - 1, 0)]
            blocks = [ResBlock(v, previous if j == 0 else w, w) for j in range(cfg.res_blocks[i])]
            if i < len(width) - 1:  # spatial stride, then temporal stride
                if cfg.space[i] == 2:
                    blocks.append(SpaceDown(v, w, time=cfg.time[i] == 1))
                if cfg.time[i] == 2 and v != "2d":
                    blocks.append(TimeDown(w))
            self.levels.append(nn.ModuleList(blocks))
        self.middle = Middle(cfg, width[-1])
        self.norm_out = FrameNorm(width[-1])
        self.conv_out = Conv25D(v, width[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        T, s = x.shape[2], self.stem
        x = rearrange(x, "b c t (h p) (w q) -> (b t) (c p q) h w", p=s, q=s)  # (F, 3 s s, H/s, W/s)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last), T)
        for level in self.levels:
            for block in level:
                h = block(h, T)
                T = (T + 1) // 2 if isinstance(block, TimeDown) else T
        h = F.silu(self.norm_out(self.middle(h, T)))
        return rearrange(
            self.conv_out(h, T), "(b t) c h w -> b c t h w", t=T
        )  # (B, 2C, T', H', W')


class Decoder(nn.Module):
    """(B, C, T', H', W') -> (B, 3, T' * time factor, H, W)."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        v, width = cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.stem = cfg.stem
        self.conv_in = Conv25D(v, cfg.latent_channels, width[-1])
        self.middle = Middle(cfg, width[-1])
        self.levels = nn.ModuleList()
        for i in reversed(range(len(width))):
            previous = width[min(i + 1, len(width) - 1)]
            count = cfg.res_blocks[i] + cfg.extra
            blocks = [ResBlock(v, previous if j == 0 else width[i], width[i]) for j in range(count)]
            if i > 0:
                if cfg.space[i - 1] == 2:
                    blocks.append(SpaceUp(v, width[i], time=cfg.time[i - 1] == 1))
                if cfg.time[i - 1] == 2 and v != "2d":
                    blocks.append(TimeUp(width[i]))
            self.levels.append(nn.ModuleList(blocks))
        self.norm_out = FrameNorm(width[0])
        self.conv_out = Conv25D(v, width[0], 3 * cfg.stem**2)

    def forward(self, z: Tensor) -> Tensor:
        T, s = z.shape[2], self.stem
        h = rearrange(z, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        h = self.middle(self.conv_in(h, T), T)
        for level in self.levels:
            for block in level:
                h = block(h, T)
                T = 2 * T if isinstance(block, TimeUp) else T
        h = self.conv_out(F.silu(self.norm_out(h)), T)
        return rearrange(h, "(b t) (c p q) h w -> b c t (h p) (w q)", t=T, p=s, q=s)


# ---- 5. The autoencoder --------------------------------------------------------------------------


@dataclass
class Posterior:
    """Diagonal Gaussian q(z | x): mean and logvar (B, C, T', H', W'), fp32."""

    mean: Tensor
    logvar: Tensor = field(repr=False)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise. With a CPU generator the noise does not depend on the device."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(
            self.mean.device
        )
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) = (mean^2 + var - 1 - logvar) / 2, averaged over all latent values."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).mean()


class TAE(nn.Module):
    """The temporal autoencoder of [MG s3.1.1] (module docstring: contract)."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        if cfg.variant not in ("2d", "2.5d"):
            raise ValueError(f"variant {cfg.variant}: not one of 2.5d, 2d")
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.register_buffer("lat_mean", torch.zeros(cfg.latent_channels))
        self.register_buffer("lat_std", torch.ones(cfg.latent_channels))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> Posterior:
        """(B,3,T,H,W) in [-1,1] -> Posterior over (B,C,T',H',W'). H and W that the spatial factor
        does not divide are padded by repeating the last row and column; `decode(..., size=(H, W))`
        crops them back."""
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"clip of shape {tuple(x.shape)}: expected (B, 3, T, H, W)")
        H, W = x.shape[-2:]
        f = self.cfg.space_factor
        if H % f or W % f:
            x = F.pad(x, (0, -W % f, 0, -H % f, 0, 0), mode="replicate")
        mean, logvar = self.encoder(x).float().chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(
        self, z: Tensor, num_frames: int | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """(B,C,T',H',W') -> (B,3,T,H,W). The decoder makes (time factor) * T' frames; those past
        `num_frames` are surplus of the last latent frame and are dropped [MG]."""
        x = self.decoder(z)[:, :, :num_frames]
        return x if size is None else x[..., : size[0], : size[1]]

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Posterior]:
        """Reconstruction (B,3,T,H,W) of a posterior sample (of the mean in eval mode), and the
        posterior."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if self.training else posterior.mean
        return self.decode(z, x.shape[2], x.shape[-2:]), posterior

    def latent_shape(self, T: int, H: int, W: int) -> tuple[int, int, int, int]:
        """Shape (C, T', H', W') of the latent of a clip of T x H x W."""
        time = 1 if self.cfg.variant == "2d" else self.cfg.time_factor
        return (
            self.cfg.latent_channels,
            -(-T // time),
            *(-(-n // self.cfg.space_factor) for n in (H, W)),
        )

    def compression_rate(self, T: int, H: int, W: int) -> float:
        """Latent values divided by video values. Quote it next to every PSNR."""
        return math.prod(self.latent_shape(T, H, W)) / (3 * T * H * W)

    def normalize(self, z: Tensor) -> Tensor:
        """To mean 0 and std 1 per channel: what the flow model sees."""
        return (z - self.lat_mean.view(-1, 1, 1, 1)) / self.lat_std.view(-1, 1, 1, 1)

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.lat_std.view(-1, 1, 1, 1) + self.lat_mean.view(-1, 1, 1, 1)


def inflate(image_tae: TAE, variant: str = "2.5d") -> TAE:
    """A video autoencoder that starts from a trained image autoencoder [MG s3.1.1].

    Spatial weights are copied; temporal convolutions start as the identity and temporal attention
    as zero, so the latent of one frame does not change, the latent of a clip is the image latent
    of every (time factor)-th frame, and all the frames decoded from one latent frame are equal.
    From there, time is learned.
    """
    if image_tae.cfg.variant != "2d":
        raise ValueError(f"inflate: variant {image_tae.cfg.variant}: only 2d can be inflated")
    video = TAE(replace(image_tae.cfg, variant=variant)).to(image_tae.lat_mean.device)
    state = image_tae.state_dict()

    target = video.state_dict()
    spatial = [
        k
        for k in target
        if ".temporal." not in k and ".time." not in k and not _is_time_stride(video, k)
    ]
    if len(spatial) != len(state):
        raise ValueError("inflate: the two autoencoders have different spatial layers")
    video.load_state_dict({**target, **{new: state[old] for new, old in zip(spatial, state)}})
    return video


def _is_time_stride(tae: TAE, key: str) -> bool:
    module = key.rpartition(".")[0]
    return "levels" in key and isinstance(tae.get_submodule(module), TimeDown | TimeUp)


# ---- 6. Losses and measures ----------------------------------------------------------------------


def outlier_penalty(mean: Tensor, r: float = 3.0) -> Tensor:
    """Outlier penalty loss [MG s3.1.1]: mean over positions of max(||X_ij - Mean(X)|| - r
    ||Std(X)||, 0).

    Without it the encoder stores global information at a few positions of very high norm, which
    decode to spots. Mean and Std are over the positions of one frame, the norms over channels: on
    Gaussian latents the distance is sqrt(C) and the threshold r sqrt(C), so nothing is penalised.
    A scalar Std in place of the norm would penalise nearly everything. mean (B, C, T, H, W) ->
    scalar; zero for frames of fewer than 16 positions, where no outlier can exceed r = 3.
    """
    if mean.shape[-2] * mean.shape[-1] < 16:
        return mean.new_zeros(())
    x = mean.float()
    m = x.mean((-2, -1), keepdim=True).detach()
    s = x.std(
        (-2, -1), keepdim=True
    ).detach()  # detached: otherwise inliers spread out to raise the threshold
    return F.relu((x - m).norm(dim=1) - r * s.norm(dim=1)).mean()


def tae_loss(cfg: TAEConfig, x: Tensor, recon: Tensor, posterior: Posterior) -> Tensor:
    """Weighted sum of L1, L2, KL and outlier penalty, each a mean -> scalar."""
    d = recon.float() - x
    loss = cfg.l1 * d.abs().mean() + cfg.kl * posterior.kl()
    if cfg.l2:
        loss = loss + cfg.l2 * d.square().mean()
    if cfg.opl:
        loss = loss + cfg.opl * outlier_penalty(posterior.mean, cfg.opl_r)
    return loss


def is_image_step(step: int) -> bool:
    """[MG]: one batch of images for three of video."""
    return step % 4 == 0


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clips (B, 3, T, H, W) in [-1, 1] -> (B,), the mean over
    frames."""
    mse = (
        (x.clamp(-1, 1) - y.clamp(-1, 1)).square().div(4).mean((1, 3, 4))
    )  # (B, T), of values in [0, 1]
    return (-10 * mse.clamp_min(1e-8).log10()).mean(1)


def latent_stats(posteriors) -> tuple[Tensor, Tensor]:
    """Mean and std per channel (C,), (C,) of posterior samples, from an iterable of Posterior;
    sums in float64.

    A rectified flow compares latents with unit noise: the signal-to-noise ratio at a time t
    depends on their scale.
    """
    n, total, square = 0, 0.0, 0.0
    for p in posteriors:
        mean, var = p.mean.double(), p.logvar.double().exp()
        n += mean.numel() // mean.shape[1]
        total = total + mean.sum((0, 2, 3, 4))
        square = square + (mean.square() + var).sum((0, 2, 3, 4))
    mean = total / n
    return mean.float(), (square / n - mean**2).clamp_min(1e-12).sqrt().float()


# ---- 7. Demo -------------------------------------------------------------------------------------


def trace(name: str, cfg: TAEConfig, T: int, H: int) -> None:
    """Print the shape of the tensor after each layer, frames unfolded. Meta device: no memory."""
    with torch.device("meta"):
        tae = TAE(cfg)
        count = sum(p.numel() for p in tae.parameters())
        print(f"{name}: {count / 1e6:.1f} M parameters")
        rows: list[tuple[str, int, tuple[int, ...]]] = []

        def hook(label):
            return lambda module, inputs, out: rows.append((label, out.shape[0], out.shape[1:]))

        for part, net in (("encoder", tae.encoder), ("decoder", tae.decoder)):
            layers = {"conv_in": net.conv_in, "middle": net.middle, "conv_out": net.conv_out}
            for i, level in enumerate(net.levels):
                for block in level:
                    layers[f"level {i} {type(block).__name__}"] = block
            for label, block in layers.items():
                block.register_forward_hook(hook(f"{part} {label}"))
        x = torch.empty(1, 3, T, H, H)
        print(f"  {'clip':34}{tuple(x.shape[1:])}")
        z = tae.encode(x).mean
        y = tae.decode(z, T)
        for label, F_, (C, h, w) in rows:
            print(f"  {label:34}{(C, F_, h, w)}")
        rate = tae.compression_rate(T, H, H)
        print(f"  {'latent':34}{tuple(z.shape[1:])}, {100 * rate:.2f} % of the values")
        print(f"  {'reconstruction':34}{tuple(y.shape[1:])}")


def demo(out: Path, seconds: float = 55.0, seed: int = 0) -> bool:
    """Image training, inflation, video training on the toy world within `seconds`; a figure of
    reconstructions; PASS when inflation is exact and video training gains 3 dB over it."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    cfg = PRESETS["toy"]

    def clips(split: str, i: int, n: int, things: int) -> Tensor:
        rng = random.Random(f"{split}/{seed}/{i}")
        return render([sample_world(rng, things, overlap=things > 1) for _ in range(n)])

    def train(tae: TAE, share: float, images: bool) -> None:
        opt, start, step = torch.optim.AdamW(tae.parameters(), 2e-3, (0.9, 0.99)), time.time(), 0
        bar = tqdm(total=100, desc="image" if images else "video", unit="%")
        while (done := (time.time() - start) / (share * seconds)) < 1:
            for group in opt.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
            x = clips("images" if images else "video", step, 8, things=6)
            if images:
                x = rearrange(x[:, :, ::4], "b c t h w -> (b t) c 1 h w")
            else:
                x = x[:, :, :1] if is_image_step(step) else x[:, :, step % 9 : step % 9 + 8]
            recon, posterior = tae(x)
            loss = tae_loss(cfg, x, recon, posterior)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tae.parameters(), 1.0)
            opt.step()
            step += 1
            bar.update(round(100 * done) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.3f}", steps=step, refresh=False)
        bar.close()

    x = clips("heldout", 0, 32, things=1)
    image = TAE(replace(cfg, variant="2d"))
    train(image, 0.15, images=True)
    tae = inflate(image).eval()
    with torch.no_grad():
        gap = (tae.encode(x[:, :, :1]).mean - image.encode(x[:, :, :1]).mean).abs().max().item()
        before = psnr(tae(x)[0], x).mean().item()
    train(tae.train(), 0.85, images=False)
    with torch.no_grad():
        recon = tae.eval()(x)[0]
    after = psnr(recon, x).mean().item()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(8, 1, figsize=(10, 6.2))
    for i, ax in enumerate(axes):
        clip = (x if i % 2 == 0 else recon)[i // 2, :, ::2].clamp(-1, 1)
        ax.imshow(rearrange(clip, "c t h w -> h (t w) c").numpy() / 2 + 0.5)
        ax.set_axis_off()
        ax.set_title("reconstruction" if i % 2 else "every second frame", fontsize=7, pad=2)
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "reconstruction.png", dpi=130)
    print(f"wrote {out / 'reconstruction.png'}")
    ok = gap <= 1e-5 and after - before >= 3
    verdict = "PASS" if ok else "FAIL"
    print(f"{verdict} inflation leaves image latents as they are: {gap:.1e} vs 1e-05")
    gain = f"{before:.1f} -> {after:.1f} dB, {after - before:+.1f} vs +3.0"
    print(f"{verdict} video training over the inflated image model: {gain}")
    return ok


def main() -> int:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            print(f"tae.py: {message}", file=sys.stderr)
            sys.exit(2)

    parser = Parser(description="The temporal autoencoder on the toy world.", allow_abbrev=False)
    parser.add_argument("--trace", action="store_true", help="print the shapes, toy and paper size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/tae"), help="folder of the figure")
    args = parser.parse_args()
    trace("toy, 16 frames of 32 x 32", PRESETS["toy"], 16, 32)
    if args.trace:
        trace("paper, one tile of 32 frames of 768 x 768", PRESETS["paper"], 32, 768)
        return 0
    return 0 if demo(args.out, seed=args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
