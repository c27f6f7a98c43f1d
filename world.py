"""world.py: the toy world. Captioned clips without a download, and a judge that reads them.

    random seed --> World --> render --> clip (B,3,T,H,W) ---> perceive --> facts seen --.
                      |                       ^                                          v
                      |             or a clip that a model has made                    judge
                      |                                                                  ^
                      '-----> caption --> "a red circle moving left" --> parse --> facts asked for

A text-to-video model learns from captioned clips, and what matters is whether a new clip shows what
its prompt asks for. A World is a list of facts: from them the clip is drawn and the caption
written; `judge` measures the facts again from pixels. So prompt following is a number, on a laptop,
in milliseconds per clip.

What is in it. One or more objects, each with a colour and a direction, move at constant velocity in
front of a dark background: circles, squares and triangles, slow or fast, and signs with a word.
Some words and some combinations of colour, shape and direction are held out of training, to see
whether a model composes what it has learned or only repeats it.

Contract
    sample_world(rng)        facts from a random.Random: the same seed gives the same world
    render([World], T, H)    (B,3,T,H,W) float in [-1,1]; sizes are in units of the height, so that
                             one world looks the same at 32 and at 64 pixels
    caption(world)           English of a small grammar; `parse` is its inverse
    judge(clip, prompt)      {"color", "shape", "direction", "speed", and "text" for signs: bool};
                             ValueError for a prompt that is not of the grammar
    test_prompts(seed)       [(kind, prompt)] to sample clips for and to judge them by

Run.   python world.py       # a sheet of clips, and a test of the judge: 10 s

Why a judge of our own, and not CLIP or a video metric: those need downloads, give a score without a
unit, and cannot say which word of the prompt was ignored. Why templates, and not a trained
classifier: a classifier always names a class, whereas no template fits a shape that is none.

Letters: B batch, T frames, H W height and width, K templates. t the number of a frame; S bitmap
pixels to a pixel of the picture. Positions are (x, y) with y down.
"""
import argparse
import math
import os
import random
import re
import sys
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- 1. The idea ---------------------------------------------------------------------------------


def draw_and_measure(vx: float, vy: float, T: int = 16, H: int = 32) -> tuple[float, float]:
    """Draw a square that moves by (vx, vy) pixels a frame, then measure its velocity from pixels.

    Below there is more to draw (`render`), more to measure (`perceive`), and captions for both."""
    t, y, x = torch.meshgrid(torch.arange(T) - (T - 1) / 2, torch.arange(H) - H / 2,
                             torch.arange(H) - H / 2, indexing="ij")
    clip = ((x - vx * t).abs() < 4) & ((y - vy * t).abs() < 4)                          # (T, H, W)
    cx, cy = ((clip * a).sum((1, 2)) / clip.sum((1, 2)) for a in (x, y))                # (T,)
    t = t[:, 0, 0]
    slope = lambda c: (c * t).sum().item() / t.square().sum().item()                # least squares
    return slope(cx), slope(cy)


# ---- 2. Facts ------------------------------------------------------------------------------------

COLORS = {
    "red": (0.95, 0.15, 0.15), "green": (0.15, 0.85, 0.25), "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.90, 0.15), "purple": (0.75, 0.20, 0.90), "white": (1.00, 1.00, 1.00),
}
SPAN = {  # width and height of each shape, in radii of the circle that has the same area
    "circle": (2.0, 2.0), "square": (math.pi**0.5, math.pi**0.5), "triangle": (2.694, 2.333),
}
SHAPES = tuple(SPAN)
DIRECTIONS = {  # (x, y), in the order of their angle
    "right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
    "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1),
}
SPEEDS = {"slow": 0.5, "fast": 1.0}  # pixels a frame in a picture 32 pixels high
LETTERS = tuple("ACEHLNOSTU")  # only ten, so that a short training sees each often
WORDS = tuple(
    "AN AS AT HE LO NO SO TO US ACE ANT ASH ATE CAN COT CUE CUT EAT EEL HAS HEN HOT HUT LET LOT "
    "NET NOT NUT OAT ONE OUT SAT SEA SON TAN TEN THE TOE TON TOO USE".split()
)
HELDOUT_WORDS = tuple("AH LA OH ON ALE CAT HAT HUE SET SUN TEA".split())  # never trained on
SCRIPTS = {  # letters; words; held-out words, whose letters all occur in training
    "latin": (LETTERS, WORDS, HELDOUT_WORDS),
    "chinese": (tuple("人大山水火木日月口田"), tuple(
        "大人 大山 大水 大火 大田 山口 山水 水田 水火 火山 木人 木口 日月 人口 田口".split()),
        tuple("火口 大木 山田 水口 月日".split())),
}


@dataclass(frozen=True)
class Thing:
    """One moving object. Lengths are in units of the picture's height."""

    color: str
    shape: str  # one of SHAPES, or "sign"
    direction: str
    speed: str
    word: str = ""  # the text of a sign
    cap: float = 0.0  # height of a sign's capitals; 0: the largest. Unused by shapes
    radius: float = 0.17  # of the circle with the same area; unused by signs
    x: float = 0.5  # centre in the first frame
    y: float = 0.5


@dataclass(frozen=True)
class World:
    """What a clip shows: objects, each in front of those before it, on a grey background."""

    things: tuple[Thing, ...]
    background: float = 0.0  # grey level in [0, 1]


def is_heldout(thing: Thing) -> bool:
    """Tell whether a thing is held out of training: 15 of the 144 triples (colour, shape,
    direction), at either speed, and signs with held-out words.

    Each colour, shape and direction also occurs in triples that are trained on."""
    if thing.shape == "sign":
        return any(thing.word in heldout for _, _, heldout in SCRIPTS.values())
    c, s = list(COLORS).index(thing.color), SHAPES.index(thing.shape)
    d = list(DIRECTIONS).index(thing.direction)
    return (c + 2 * s + 4 * d) % 9 == 0


def velocity(thing: Thing) -> tuple[float, float]:
    """Give the displacement (x, y) in one frame, in heights; diagonals are no faster."""
    dx, dy = DIRECTIONS[thing.direction]
    v = SPEEDS[thing.speed] / 32 / math.hypot(dx, dy)
    return v * dx, v * dy


# ---- 3. Drawing ----------------------------------------------------------------------------------
# Each object is drawn once as a bitmap at SUPERSAMPLE times the resolution, moved by whole pixels
# of that bitmap, and box-filtered. So motion is smooth below one pixel, and results are cached.

SUPERSAMPLE = 4


@cache
def glyphs(word: str, cap: int) -> Tensor:
    """Draw a word, `cap` pixels high -> (cap, w) bool, True where there is ink.

    Latin capitals in DejaVu Sans Mono Bold, which ships with matplotlib (0.729 em high, 0.602 em
    wide); Chinese in WenQuanYi Micro Hei, where ink fills 0.92 of a square em. ValueError where
    that font is missing."""
    from matplotlib.font_manager import FontProperties, findSystemFonts
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    if word.isascii():
        font = FontProperties(family="DejaVu Sans Mono", weight="bold")
        height, width, below = 72.9, 60.2, 0.0                      # hundredths of an em
    else:
        files = [f for f in findSystemFonts() if Path(f).name == "wqy-microhei.ttc"]
        if not files:
            raise ValueError("script chinese: the font WenQuanYi Micro Hei is not installed "
                             "(Debian: apt install fonts-wqy-microhei)")
        font, (height, width, below) = FontProperties(fname=files[0]), (92.0, 100.0, 9.0)
    path = TextPath((0, 0), word, size=100, prop=font)
    scale = height / cap
    w = round(width * len(word) / scale)
    x, y = torch.meshgrid(torch.arange(w) + 0.5, cap - torch.arange(cap) - 0.5, indexing="xy")
    points = torch.stack([x.flatten() * scale, y.flatten() * scale - below], 1).numpy()
    inside = torch.zeros(cap * w, dtype=torch.bool)
    for outline in path.to_polygons():      # exclusive or: the inner outline of an O cuts a hole
        inside ^= torch.from_numpy(Outline(outline).contains_points(points))
    return inside.view(cap, w)


def check_script(script: str) -> None:
    """Raise ValueError for a script that is unknown or whose font is not installed."""
    if script not in SCRIPTS:
        raise ValueError(f"script {script}: not one of {', '.join(SCRIPTS)}")
    glyphs(SCRIPTS[script][0][0], 8)


@lru_cache(maxsize=1024)
def bitmap(shape: str, word: str, radius: int) -> Tensor:
    """Draw an object -> (2, h, w) float: what it covers, and where it shows its colour (a sign's
    ink is black). radius in supersampled pixels; for a sign, the height of its capitals."""
    if shape == "sign":
        ink = F.pad(glyphs(word, radius).float(), [radius // 4] * 4)    # a margin around the text
        return torch.stack([torch.ones_like(ink), 1 - ink])
    n = math.ceil(1.6 * radius)
    y, x = torch.meshgrid(torch.arange(-n, n) + 0.5, torch.arange(-n, n) + 0.5, indexing="ij")
    if shape == "circle":
        inside = x * x + y * y < radius**2
    elif shape == "square":
        inside = torch.maximum(x.abs(), y.abs()) < radius * SPAN["square"][0] / 2
    else:                                               # an upright equilateral triangle
        h = SPAN["triangle"][1] * radius
        inside = (y < h / 2) & (x.abs() < (y + h / 2) / math.sqrt(3))
    return inside.float().expand(2, -1, -1)


def bitmap_of(thing: Thing, H: int) -> tuple[str, str, int]:
    """Give the arguments of `bitmap` for a picture H pixels high. A lone sign's short words are
    larger: at H = 32 capitals of 16, 11 and 8 pixels; Chinese, which is wider: 15 and 10."""
    cap = thing.cap or {1: 16, 2: 11}.get(len(thing.word), 8) / 32
    cap -= (not thing.word.isascii()) / 32
    size = cap if thing.shape == "sign" else thing.radius
    return thing.shape, thing.word, round(size * H * SUPERSAMPLE)


@lru_cache(maxsize=65536)
def sprite(shape: str, word: str, radius: int, dx: int, dy: int) -> np.ndarray:
    """Move the bitmap by (dx, dy) < SUPERSAMPLE and average it into pixels -> (2, h', w')."""
    b, S = bitmap(shape, word, radius), SUPERSAMPLE
    h, w = b.shape[1] + dy, b.shape[2] + dx
    return F.avg_pool2d(F.pad(b, (dx, -w % S, dy, -h % S)), S).numpy()


def extent(thing: Thing) -> tuple[float, float]:
    """Give the width and height of an object, in heights of the picture."""
    if thing.shape in SPAN:
        w, h = SPAN[thing.shape]
        return w * thing.radius, h * thing.radius
    h, w = bitmap(*bitmap_of(thing, 32)).shape[1:]
    return w / 32 / SUPERSAMPLE, h / 32 / SUPERSAMPLE


def bounce(p: float, lo: float, hi: float) -> float:
    """Reflect p at lo and hi. If lo >= hi there is no room to bounce, and p stays as it is."""
    if lo <= p <= hi or lo >= hi:
        return p
    return lo + (hi - lo) - abs((p - lo) % (2 * (hi - lo)) - (hi - lo))


def render(worlds: list[World], T: int = 16, H: int = 32, interval: float = 1.0,
           start: int = 0) -> Tensor:
    """Draw worlds, H pixels high and wide -> (B, 3, T, H, H) float in [-1, 1].

    start: the first frame drawn. interval: frames of motion between two that are
    drawn; above 1 (`motion_interval`) objects may bounce off the edges of the picture."""
    S = SUPERSAMPLE
    clips = np.empty((len(worlds), 3, T, H, H), np.float32)
    for clip, world in zip(clips, worlds):
        clip[:] = world.background
        for thing in world.things:
            which, (vx, vy), (ew, eh) = bitmap_of(thing, H), velocity(thing), extent(thing)
            h, w = bitmap(*which).shape[1:]
            color = np.array(COLORS[thing.color], np.float32)[:, None, None]
            for t in range(T):
                cx = bounce(thing.x + vx * (start + t) * interval, ew / 2, 1 - ew / 2)
                cy = bounce(thing.y + vy * (start + t) * interval, eh / 2, 1 - eh / 2)
                x, dx = divmod(round(cx * H * S - w / 2), S)            # whole pixels, remainder
                y, dy = divmod(round(cy * H * S - h / 2), S)
                cover, paint = sprite(*which, dx, dy)[:, max(-y, 0) : H - y, max(-x, 0) : H - x]
                region = clip[:, t, max(y, 0) :, max(x, 0) :][:, : cover.shape[0], : cover.shape[1]]
                region *= 1 - cover
                region += paint * color
    return torch.from_numpy(clips).mul_(2).sub_(1)


# ---- 4. Random worlds ----------------------------------------------------------------------------
# A single object always passes near the centre, because a model trained for minutes learns what to
# draw and in which direction it moves, but barely where to put it. For the same reason objects that
# share a picture pass, in mid-clip, through points of a coarse grid.

LONGEST = 16  # frames for which every object has room; with more, some would bounce
WANDER = {"sign": 1 / 32, "shape": 3 / 32}      # how far from the centre a lone object may pass
GRID = 1 / 8                                    # spacing of the points that sharing objects pass


def cap_of(things: int) -> float:
    """Give the height of capitals with so many objects; 0: as large as each word allows."""
    return 6 / 32 if things > 1 else 0.0


def place(thing: Thing, rng: random.Random, frames: int = 16, wander: float = 1.0,
          grid: float = 0.0) -> Thing:
    """Choose where an object starts, so that its path stays in the picture and the middle of the
    path is within `wander` of the picture's centre, and a multiple of `grid` from it."""
    start = []
    for v, size in zip(velocity(thing), extent(thing)):
        travel = v * (frames - 1)
        middle, room = (1 - travel) / 2, max(0.0, min((1 - size - abs(travel)) / 2, wander))
        steps = int(room / grid) if grid else 0
        start.append(middle + (grid * rng.randint(-steps, steps) if grid else
                               room * rng.uniform(-1, 1)))
    return replace(thing, x=start[0], y=start[1])


def apart(a: Thing, b: Thing, frames: int) -> bool:
    """Tell whether two objects stay apart."""
    (aw, ah), (bw, bh), (avx, avy), (bvx, bvy) = extent(a), extent(b), velocity(a), velocity(b)
    return all(abs(a.x - b.x + t * (avx - bvx)) > (aw + bw) / 2
               or abs(a.y - b.y + t * (avy - bvy)) > (ah + bh) / 2 for t in range(frames))


def sample_world(rng: random.Random, things: int = 1, signs: float = 0.4,
                 heldout: bool | None = False, frames: int = 16, overlap: bool = False,
                 script: str = "latin", cap: float = 0.0) -> World:
    """Draw a world of `things` objects, which overlap only if `overlap`. Their colours differ, as
    long as there are enough.

    signs: the share of signs. 70 % of them show one letter, the rest words of each length equally
    often; with `cap` (height of capitals) all lengths are equally frequent. Objects that find no
    room (often two triangles) are redrawn after 20 failures, which favours signs: 0.4 becomes 0.42
    with two objects, 0.6 with three.
    heldout: False as in training, True for what is held out, None for both. ValueError for more
    frames than LONGEST, as objects would bounce and contradict their captions, unless `overlap`."""
    if frames > LONGEST and not overlap:
        raise ValueError(f"frames {frames}: at most {LONGEST} in the toy world, or its objects "
                         "would bounce and contradict their captions")
    if things > 3 and not overlap:
        raise ValueError(f"things {things}: at most 3 have room to pass one another")
    letters, words, never = SCRIPTS[script]
    lengths = sorted({len(w) for w in words})
    single = 1 / (1 + len(lengths)) if cap else 0.7
    shares = (single, *[(1 - single) / len(lengths)] * len(lengths))

    def draw(others: list[Thing], like: Thing | None) -> Thing:
        """Draw an object beside others, with shape, word and speed of `like` if given."""
        while True:
            sign = rng.random() < signs
            length = rng.choices((1, *lengths), shares)[0]
            choice = letters if length == 1 else [w for w in words + never if len(w) == length]
            left = [c for c in COLORS if c not in [d.color for d in others]]
            thing = Thing(
                color=rng.choice(left or list(COLORS)),
                shape="sign" if sign else rng.choice(SHAPES),
                direction=rng.choice(list(DIRECTIONS)),
                speed="slow" if sign else rng.choice(list(SPEEDS)),     # a long word has no room
                word=rng.choice(choice) if sign else "", cap=cap,
                radius=rng.uniform(0.17, 0.19))
            if like:
                thing = replace(thing, shape=like.shape, word=like.word, speed=like.speed)
            if heldout is None or is_heldout(thing) == heldout:
                return thing

    # Shape, word and speed of an object stay; the rest is redrawn until all have room.
    # Otherwise long words, which seldom have room, would be rare.
    grid = GRID if things > 1 and not overlap else 0.0
    drawn, kept, failures = [], {}, 0                           # kept: by the object's number
    while len(drawn) < things:
        thing = draw(drawn, kept.get(len(drawn)))
        kept.setdefault(len(drawn), thing)
        wander = WANDER["sign" if thing.shape == "sign" else "shape"] if things == 1 else 1.0
        for _ in range(20):
            thing = place(thing, rng, frames, wander, grid)
            if overlap or all(apart(thing, d, frames) for d in drawn):
                drawn.append(thing)
                break
        else:
            drawn.clear()
            failures += 1
            if failures % 20 == 0:                          # shapes and words: redraw them, too
                kept.clear()
    return World(tuple(drawn), background=rng.uniform(0.0, 0.15))


def motion_interval(rng: random.Random, done: float, fastest: int) -> float:
    """Draw the time between two frames of a training clip: the motion curriculum.

    Uniform in [1, 1 + (fastest - 1) min(1, done / 0.75)], where done in [0, 1] is the share of the
    training that is finished. At first clips are slow; after three quarters they are up to
    `fastest` times as fast. The curriculum is ours: Movie Gen reports that its autoencoder loses
    fine detail in fast motion, but describes no curriculum."""
    return rng.uniform(1, 1 + (fastest - 1) * min(1.0, done / 0.75))


# ---- 5. Captions ---------------------------------------------------------------------------------


def caption(world: World) -> str:
    """Write `a red circle moving left fast`, `a white sign saying "CAT" moving up`; several objects
    are joined by `and`."""

    def one(t: Thing) -> str:
        what = f'sign saying "{t.word}"' if t.shape == "sign" else t.shape
        return f"a {t.color} {what} moving {t.direction}" + (" fast" if t.speed == "fast" else "")

    return " and ".join(one(t) for t in world.things)


def longest_caption(things: int, script: str) -> str:
    """Write the caption with the most tokens: longest wording, distinct words, longest signs."""
    words = sorted(sum(SCRIPTS[script], ()), key=len, reverse=True)
    ways = ("down right", "up left")                                    # without a common word
    return caption(World(tuple(Thing(color, "sign", ways[i % 2], "slow", word)
                               for i, color, word in zip(range(things), COLORS, words))))


GRAMMAR = re.compile(
    rf"an? (?P<color>{'|'.join(COLORS)}) "
    rf'(?:(?P<shape>{"|".join(SHAPES)})|sign saying "(?P<word>[^" ]+)")'
    rf" moving (?P<direction>{'|'.join(DIRECTIONS)})(?P<fast> fast)?"
)


def parse(prompt: str) -> list[dict[str, str]]:
    """Read what a prompt asks for, one dict for each object; [] if it is not of the grammar, or
    if two objects have the same colour, by which the judge tells them apart."""
    parts = [GRAMMAR.fullmatch(p) for p in " ".join(prompt.split()).split(" and ")]
    if not all(parts) or len({m["color"] for m in parts}) < len(parts):
        return []
    return [{"color": m["color"], "shape": m["shape"] or "sign", "direction": m["direction"],
             "speed": "fast" if m["fast"] else "slow", "text": m["word"] or ""} for m in parts]


def test_prompts(seed: int, n: int = 160, things: int = 1, frames: int = 16,
                 script: str = "latin") -> list[tuple[str, str]]:
    """Draw (kind, prompt) to judge a model by, the same for the same seed.

    n of kind `trained` (3/5 shapes, 2/5 one-letter signs); 3n/10 `heldout`, shapes in held-out
    combinations; n/5 `words` of several letters and n/5 `words_heldout`. With several objects,
    prompts that need signs have at least one, and each object is one with probability 2/5. Their
    words may have any length; `words` has at least one of several letters."""
    rng = random.Random(f"prompts/{seed}")
    want = {"trained": n, "heldout": 3 * n // 10, "words": n // 5, "words_heldout": n // 5}
    out: list[tuple[str, str]] = []
    for kind, count in want.items():
        got = 0
        while got < count:
            sign = kind.startswith("words") or (kind == "trained" and got < 2 * n // 5)
            share = float(sign) if things == 1 else 0.4 * sign
            world = sample_world(rng, things, share, heldout=kind.endswith("heldout"),
                                 frames=frames, script=script, cap=cap_of(things))
            longest = max(len(t.word) for t in world.things)
            fits = longest > 1 if kind != "trained" else (
                longest == 1 or longest > 1 and things > 1)
            if fits or not sign:
                out.append((kind, caption(world)))
                got += 1
    return out


# ---- 6. The judge --------------------------------------------------------------------------------


def seen_colors(x: Tensor) -> Tensor:
    """Name the colour of each pixel: x (3, ...) in [0, 1] -> index into COLORS (...).

    Brightness is divided out, because blur mixes a colour with the dark background."""
    palette = torch.tensor(list(COLORS.values()))
    palette = palette / palette.amax(1, keepdim=True)
    x = x / x.amax(0, keepdim=True).clamp_min(1e-3)
    return (x[None] - palette.view(-1, 3, *[1] * (x.ndim - 1))).square().sum(1).argmin(0)


def track(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Locate an object: opacity alpha (T, H, W) -> alpha without faint pixels, and the centre of
    mass cx, cy, each (T,)."""
    T, H, W = alpha.shape
    alpha = torch.where(alpha > 0.2, alpha, 0)
    mass = alpha.sum((1, 2)).clamp_min(1e-6)
    cx = (alpha.sum(1) * torch.arange(W)).sum(1) / mass
    cy = (alpha.sum(2) * torch.arange(H)).sum(1) / mass
    return alpha, cx, cy


def centred_sprite(alpha: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Remove the motion: shift each frame of alpha (T, H, W) so that its (cx, cy) is at the centre,
    and average the frames -> (H, W). An object that flickers or changes its shape is blurred."""
    T, H, W = alpha.shape
    theta = torch.eye(2, 3).repeat(T, 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = (2 * cx + 1) / W - 1, (2 * cy + 1) / H - 1
    grid = F.affine_grid(theta, (T, 1, H, W), align_corners=False)
    return F.grid_sample(alpha[:, None], grid, align_corners=False).mean((0, 1))


@cache
def templates(H: int, script: str, cap: float = 0.0) -> tuple[Tensor, list[tuple[str, str]]]:
    """Make the sprite of every shape, at eight sizes, and of every word -> (K, H * H) unit rows and
    (shape, word) of each. They come from rendered clips, made as `perceive` makes its own."""
    shape = Thing("white", "circle", "right", "slow", x=0.4)
    things = [replace(shape, shape=s, radius=r / 200) for s in SHAPES for r in range(26, 42, 2)]
    sign = replace(shape, shape="sign", cap=cap, x=0.38)
    things += [replace(sign, word=w) for words in SCRIPTS[script] for w in words]
    rows = [centred_sprite(*track((render([World((thing,))], H=H)[0, 0] + 1) / 2)).flatten()
            for thing in things]
    return F.normalize(torch.stack(rows), dim=1), [(t.shape, t.word) for t in things]


NOTHING = dict.fromkeys(("color", "shape", "direction", "speed", "text"), "none")


def perceive(clip: Tensor, things: int = 1, script: str = "latin") -> list[dict[str, str]]:
    """Measure colour, shape, direction, speed and text of `things` objects in a clip (3, T, H, W)
    in [-1, 1], from its pixels alone; "none" where nothing can be seen (text: or "").

    The background is the median pixel of the rim; objects are the other pixels, by the commonest
    colours. Direction and speed come from a straight line through the centres of mass,
    shape and text from the template that fits best."""
    x = ((clip.float() + 1) / 2).clamp(0, 1)
    T, H, W = x.shape[1:]
    if H != W:
        raise ValueError(f"clip {tuple(clip.shape)}: the judge reads square ones")
    rim = torch.ones(H, W, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    background = x[:, :, rim].flatten(1).median(1).values.view(3, 1, 1, 1)
    alpha = ((x - background).abs().amax(0) / 0.7).clamp(0, 1)                          # (T, H, W)
    colors = seen_colors(x)                                                             # (T, H, W)
    areas = torch.bincount(colors[alpha > 0.75], minlength=len(COLORS))
    bank, labels = templates(H, script, cap_of(things))
    t = torch.arange(T) - (T - 1) / 2
    seen = []
    for color in areas.topk(things).indices.tolist():
        own, cx, cy = track(alpha if things == 1 else torch.where(colors == color, alpha, 0))
        if own.sum((1, 2)).median() < 0.015 * H * W:            # all objects cover 5 % and more
            seen.append(dict(NOTHING))
            continue
        vx, vy = ((c * t).sum() / t.square().sum().clamp_min(0.5) * 32 / H for c in (cx, cy))
        speed, octant = math.hypot(vx, vy), round(math.atan2(vy, vx) / (math.pi / 4)) % 8
        score = bank @ F.normalize(centred_sprite(own, cx, cy).flatten(), dim=0)        # (K,)
        shape, word = labels[score.argmax()] if score.max() > 0.6 else ("none", "")
        seen.append({"color": list(COLORS)[color], "shape": shape, "text": word,
                     "direction": list(DIRECTIONS)[octant] if speed > 0.2 else "none",
                     "speed": "fast" if speed > 0.8 else "slow" if speed > 0.2 else "none"})
    return seen


def judge(clip: Tensor, prompt: str) -> dict[str, bool]:
    """Compare a clip (3, T, H, W) with a prompt: color, shape, direction, speed, and text if the
    prompt has a sign. With several objects, told apart by colour, a verdict holds if it holds
    for all. ValueError for a prompt that is not of the grammar."""
    wanted = parse(prompt)
    if not wanted:
        raise ValueError(f"prompt {prompt!r}: not of the toy world's grammar")
    chinese = any(set(w["text"]) & set(SCRIPTS["chinese"][0]) for w in wanted)
    seen = perceive(clip, len(wanted), "chinese" if chinese else "latin")
    if len(wanted) > 1:
        by_color = {s["color"]: s for s in seen}
        seen = [by_color.get(w["color"], NOTHING) for w in wanted]
    keys = ["color", "shape", "direction", "speed"] + ["text"] * any(w["text"] for w in wanted)
    return {k: all(s[k] == w[k] for s, w in zip(seen, wanted)) for k in keys}


def accuracy(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Give the share of true verdicts for each key, among the verdicts that have it."""
    votes = {key: [v[key] for v in verdicts if key in v] for key in NOTHING}
    return {key: sum(v) / len(v) for key, v in votes.items() if v}


def check_judge(seed: int, n: int = 500, things: int = 1, frames: int = 16, size: int = 32,
                script: str = "latin") -> dict[str, float]:
    """Measure how often the judge agrees with the truth, on n rendered clips (fewer if they are
    large; at least 20)."""
    rng = random.Random(f"judge/{seed}")
    worlds = [sample_world(rng, things, heldout=None, frames=frames, script=script,
                           cap=cap_of(things))
              for _ in range(max(20, min(n, 2**25 // (frames * size * size))))]
    return accuracy([judge(render([w], frames, size)[0], caption(w)) for w in worlds])


# ---- 7. Demo -------------------------------------------------------------------------------------


def draw_sheet(out: Path, seed: int) -> None:
    """Draw world.png: 21 captioned clips, four frames of each."""
    from matplotlib.figure import Figure

    rng = random.Random(f"sheet/{seed}")
    worlds = [sample_world(rng) if i < 15 else sample_world(rng, 2, cap=cap_of(2))
              for i in range(21)]
    clips = render(worlds, H=64).permute(0, 2, 3, 4, 1) / 2 + 0.5               # (B, T, H, W, 3)
    figure = Figure(figsize=(12, 9))
    axes = figure.subplots(7, 3)
    for ax, world, clip in zip(axes.flat, worlds, clips):
        ax.set_axis_off()
        ax.set_title(caption(world).replace(" and ", "\nand "), fontsize=7, pad=2)
        ax.imshow(torch.cat([F.pad(frame, (0, 0, 0, 2), value=1.0) for frame in clip[::5]], 1))
    figure.tight_layout(pad=0.5)
    figure.savefig(out / "world.png", dpi=110)
    print(f"wrote {out / 'world.png'}")


def demo(out: Path, seed: int = 0) -> bool:
    """Draw the sheet; then show that the judge agrees with the truth, and with other clips'
    captions only as often as chance allows."""
    draw_sheet(out, seed)
    vx, vy = draw_and_measure(0.5, -0.25)
    claims = [("error of a measured velocity", math.hypot(vx - 0.5, vy + 0.25), "<=", 0.05)]
    for things, n, size in ((1, 500, 32), (2, 100, 64)):
        claims += [(f"objects: {things}, judge agrees with the truth on {key}", share, ">=",
                    0.97 if key == "text" else 0.99)
                   for key, share in check_judge(seed, n, things, size=size).items()]

    rng = random.Random(f"shuffle/{seed}")
    worlds = [sample_world(rng, heldout=None) for _ in range(500)]
    asked = [caption(w) for w in worlds[1:] + worlds[:1]]
    wrong = accuracy([judge(clip, prompt) for clip, prompt in zip(render(worlds), asked)])
    pairs = [(parse(caption(w))[0], parse(prompt)[0]) for w, prompt in zip(worlds, asked)]
    chance = accuracy([{key: a[key] == b[key] for key in b if b[key]} for a, b in pairs])
    for key, share in wrong.items():            # chance: how often two captions agree
        claims.append((f"shuffled captions, judge agrees on {key}", share, "<=",
                       chance[key] + 0.03))

    held = [value >= bound if sign == ">=" else value <= bound for _, value, sign, bound in claims]
    for (text, value, sign, bound), good in zip(claims, held):
        print(f"{'PASS' if good else 'FAIL'} {text}: {value:.3f} vs {sign} {bound:.2f}")
    return all(held)


def main() -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="Draw a sheet of the toy world, test its judge.",
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"world.py: {message}\n")     # one line, no usage
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, default=Path("out/world"), help="folder of world.png")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        ok = demo(args.out, args.seed)
    except BrokenPipeError:                             # as by `| head`
        os._exit(0)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
