"""The backbone: Movie Gen's diffusion transformer, (x_t, t, text) -> velocity.

    x (B,C,T,H,W) - patchify -> tokens (B,N,P) - embed -> h (B,N,D) --> block x depth --> head
                                                                          ^  ^  ^          |
    positions (N,D), added at the input of every block -------------------'  |  |      unpatchify
    t (B,) - x1000, sinusoid, MLP -> c - shared adaLN: shift, scale, gate ---'  |          |
    text (B,L,D_text), mask (B,L) - cross-attention ----------------------------'          v
                                                                                   v (B,C,T,H,W)
    block:  h = h + pos
            h = h + gate * SelfAttention(modulate(RMSNorm(h), shift, scale))    bidirectional
            h = h + CrossAttention(RMSNorm(h), text, mask)                      output starts at 0
            h = h + gate * SwiGLU(modulate(RMSNorm(h), shift, scale))

It is LLaMa3's block with three changes: cross-attention to the text between self-attention and FFN,
an adaptive layer norm that carries t, and full bidirectional attention [MG s3.1.3]. adaLN-Zero
closes every gate at initialisation: the model starts as the identity plus positions, and its
output is exactly 0.

Papers: Movie Gen, arXiv 2410.13720 [MG]; DiT, arXiv 2212.09748 [DIT]; PixArt-alpha, arXiv
2310.00426 (the shared adaLN); SwiGLU, arXiv 2002.05202.

Contract
    x     (B, C, T, H, W), or with several latent streams flat (B, sum of C T H W); unit variance
    t     (B,) fp32 in [0, 1]: 0 is noise, 1 is data (the factor 1000 is in here)
    text  (B, L, D_text); mask (B, L) bool, True = attend, at least one True a row; None = all
    ->    v, of the shape and dtype of x
`forward` is nothing but patchify, positions, condition, embed, blocks, head and unpatchify, all
of them public. Only `block.attend` mixes video tokens; everything else acts on each token alone,
and may be called on a slice of the token axis. So a sampler can spread this model over many ranks,
and no line here has heard of ranks.

    python dit.py             # shapes, zero output, overfits one clip; out/dit/gates.png       25 s
    python dit.py --table     # parameters by part, FLOPs and memory of every preset             6 s
    python dit.py --study runs/toy      # the four conditionings at equal size and time      37 min

Differences from the paper
    - adaLN is shared by all blocks, with one table for each, as in PixArt. For the video model
      this is an inference: 0.93 / 4.92 / 29.3 B fit the published names, and one Linear for each
      block, as in DiT (`adaln="per_block"`), gives 1.3 / 6.7 / 40 B.
    - An RMSNorm stands in front of the cross-attention, and its output Linear starts at zero:
      ungated, it would break the identity at initialisation, and its queries would grow with the
      positions that each block adds to the residual stream.
    - `qk_norm`, class labels and the three other ways for t to enter are options of this file.

Letters: B batch, C latent channels, T H W latent frames, height and width, p q r a patch's share
of them, N video tokens, P numbers in a token (C p q r), D width, L text tokens, K modulation
vectors of a block, h d heads and their width; t flow time.
"""
import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- 1. Sizes ------------------------------------------------------------------------------------

# The four ways of [DIT s3.2] to tell the blocks the time (and the label), best first by the DiT
# paper. The text goes through cross-attention in all of them, so that they differ in nothing else.
CONDITIONINGS = (
    "adaln_zero",       # shift, scale and gate of both branches come from t, and start at 0
    "adaln",            # shift and scale come from t; no gates
    "cross_attention",  # t is one more token beside the text tokens
    "in_context",       # t is one more token beside the video tokens, removed before the head
)


def one_of(name, value, choices):
    """ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


@dataclass(frozen=True)
class Stream:
    """One latent tensor. Most autoencoders make one; VidTwin's latent is several, laid flat."""
    channels: int = 16
    patch: tuple = (1, 2, 2)        # (p, q, r): latent frames, rows, columns that make one token
    size: tuple = (32, 96, 96)      # largest (T, H, W), in latent units: the position tables' end

    def __post_init__(self):
        for name in ("patch", "size"):                  # lists, when they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(n % p for n, p in zip(self.size, self.patch)):
            raise ValueError(f"patch {self.patch}: does not divide the latent size {self.size}")

    @property
    def width(self):
        return self.channels * math.prod(self.patch)

    @property
    def numel(self):
        return self.channels * math.prod(self.size)


@dataclass
class DiTConfig:
    """Sizes and switches of the backbone."""

    streams: tuple = (Stream(),)
    dim: int = 192
    depth: int = 6
    heads: int = 6
    ffn: int = 0                    # width of the SwiGLU; 0: LLaMa's 8/3 dim, rounded up to 32
    text_dim: int = 0               # width of the text tokens; 0: dim
    adaln: str = "shared"           # shared: one Linear, and a table for each block | per_block
    conditioning: str = "adaln_zero"    # one of CONDITIONINGS
    qk_norm: bool = False           # RMSNorm of q and k in each head: steadier in bf16
    num_classes: int = 0            # > 0: labels (B,) join t; -1 is the dropped label
    checkpointing: bool = False     # recompute each block in the backward pass: 1/3 more FLOPs

    def __post_init__(self):
        self.streams = tuple(Stream(**s) if isinstance(s, dict) else s for s in self.streams)
        one_of("adaln", self.adaln, ("shared", "per_block"))
        one_of("conditioning", self.conditioning, CONDITIONINGS)
        for name, least in (("dim", 1), ("depth", 1), ("heads", 1), ("ffn", 0), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be {least} or more")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads}: does not divide dim {self.dim}")
        if self.conditioning == "cross_attention" and self.text_width != self.dim:
            raise ValueError(f"text_dim {self.text_dim}: with conditioning cross_attention t is a "
                             f"token of the text, as wide as dim {self.dim}")

    # Not settled in __post_init__: replace(cfg, dim=...) must change them too.
    @property
    def ffn_width(self):
        return self.ffn or -(-8 * self.dim // 96) * 32

    @property
    def text_width(self):
        return self.text_dim or self.dim

    @property
    def adaptive(self):
        """Does t enter through the norms? In the other two conditionings it enters as a token."""
        return self.conditioning in ("adaln_zero", "adaln")


# 256 frames at 768 px, through a TAE of 8x8x8: 32 x 96 x 96, and 32 x 48 x 48 = 73,728 tokens.
PAPER = Stream(16, (1, 2, 2), (32, 96, 96))
PRESETS = {
    "toy":   DiTConfig((Stream(8, (1, 4, 4), (4, 8, 8)),), 256, 4, 8),      # 16 tokens
    "small": DiTConfig((Stream(16, (1, 2, 2), (8, 32, 32)),), 384, 12, 6),
    "1b":    DiTConfig((PAPER,), 1536, 24, 16, checkpointing=True),         # the paper's sizes;
    "5b":    DiTConfig((PAPER,), 3072, 32, 24, checkpointing=True),         # its ablations use 5B
    "30b":   DiTConfig((PAPER,), 6144, 48, 48, checkpointing=True),
}


# ---- 2. Primitives: islands of fp32 --------------------------------------------------------------
# With bf16 autocast, or bf16 parameters, the matrix products of attention and FFN run in bf16. The
# time MLP, the modulation, the norms, the residual stream and the head stay in fp32. bf16 has 8
# bits of mantissa: it tells about 500 values of 1000 t apart, and a gate that has opened by 0.001
# would add nothing to a residual stream of size 1. float64 stays float64, for the tests.

def fp32(x):
    """Half precision to fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Linear32(nn.Linear):
    """A Linear in fp32, whatever autocast says."""

    def forward(self, x):
        weight, bias = fp32(self.weight), fp32(self.bias)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)


class Linear(nn.Linear):
    """A Linear in the dtype of its weight, or in autocast's. LLaMa's have no bias."""

    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias)

    def forward(self, x):
        # The islands hand fp32 to bf16 weights. To fp32 weights autocast hands bf16, and is let.
        x = x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias)


def rms_norm(x):
    """x / sqrt(mean(x^2) + 1e-6), without a weight: the modulation, or the next Linear, has one."""
    return F.rms_norm(fp32(x), x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """x (1 + scale) + shift [DIT s3.2], in one pass over x: with 0 and 0 nothing happens."""
    return torch.addcmul(shift, x, 1 + scale)


def timestep_embedding(t, dim=256):
    """cat[cos, sin](1000 t 1e4^(-i / (dim/2))), cosines first as in DiT. t (B,) -> (B, dim).

    Why 1000: these periods run from 6 to 60,000. On raw t in [0, 1] nearly all of them stand
    still, and t = 0.4 and t = 0.5 embed with cosine 0.9997; times 1000 it is 0.46."""
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    angle = 1000 * fp32(t)[:, None] * torch.exp(-math.log(1e4) * i / (dim // 2))    # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                            # (B, dim)


# ---- 3. The boxes of a block ---------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Every video token sees every other one: no causal mask, no biases, K and V for every head."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = Linear(cfg.dim, 3 * cfg.dim)
        self.out = Linear(cfg.dim, cfg.dim)
        self.qk_weight = nn.Parameter(torch.ones(2, cfg.dim // cfg.heads)) if cfg.qk_norm else None

    def forward(self, x, attend):
        q, k, v = rearrange(self.qkv(x), "B N (three h d) -> three B h N d",
                            three=3, h=self.heads)
        if self.qk_weight is not None:
            q = (rms_norm(q) * self.qk_weight[0]).to(v.dtype)
            k = (rms_norm(k) * self.qk_weight[1]).to(v.dtype)
        return self.out(rearrange(attend(q, k, v), "B h N d -> B N (h d)"))         # (B, N, D)


class CrossAttention(nn.Module):
    """Video tokens ask, text tokens answer. Text has no positions here: its encoders added them,
    so the answer is that of a set."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.q = Linear(cfg.dim, cfg.dim)
        self.kv = Linear(cfg.text_width, 2 * cfg.dim)
        self.out = Linear(cfg.dim, cfg.dim)

    def forward(self, x, text, mask=None):
        q = rearrange(self.q(x), "B N (h d) -> B h N d", h=self.heads)
        k, v = rearrange(self.kv(text), "B L (two h d) -> two B h L d", two=2, h=self.heads)
        # The mask is over keys. Padding must not be attended to: its features are no text, and the
        # length to which a batch happens to be padded would change the picture.
        mask = None if mask is None else mask[:, None, None]                        # (B, 1, 1, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "B h N d -> B N (h d)"))                       # (B, N, D)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x): three matrices, so 8/3 D costs what DiT's 4 D does."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = Linear(cfg.dim, 2 * cfg.ffn_width)
        self.down = Linear(cfg.ffn_width, cfg.dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


# ---- 4. Block and head ---------------------------------------------------------------------------

class Block(nn.Module):
    """One layer [MG s3.1.3]: positions, self-attention, cross-attention, SwiGLU.

    `attend(q, k, v)`, each (B, heads, N, head_dim), is the one place where video tokens meet. It is
    an attribute: assign another callable (Ulysses, Ring, a cache of stale K and V) to change it."""

    def __init__(self, cfg):
        super().__init__()
        self.conditioning, self.adaptive = cfg.conditioning, cfg.adaptive
        self.K = 6 if cfg.conditioning == "adaln_zero" else 4           # with the two gates, or not
        self.attend = F.scaled_dot_product_attention
        self.self_attention = SelfAttention(cfg)
        self.cross_attention = CrossAttention(cfg)
        self.ffn = SwiGLU(cfg)
        own = cfg.adaptive and cfg.adaln == "per_block"
        self.adaln = Linear32(cfg.dim, self.K * cfg.dim) if own else None
        self.table = None if own else nn.Parameter(torch.zeros(self.K, cfg.dim))

    def modulation(self, c):
        """c (B, 1 or 1+K, D) -> shift, scale, gate of attention, then of the FFN: (B, 1, D) each.

        This is DiT's order. In the conditionings where t is a token, the table alone is left: the
        learned weight and bias of an ordinary norm."""
        if self.adaln is not None:
            m = rearrange(self.adaln(F.silu(c[:, 0])), "B (K D) -> B K D", K=self.K)
        elif self.adaptive:
            m = c[:, 1:] + self.table                                               # (B, K, D)
        else:
            m = self.table[None]                                                    # (1, K, D)
        m = m.split(1, dim=1)                                                       # (B, 1, D) each
        if self.K == 6:
            return m
        one = m[0].new_ones(())
        return *m[:2], one, *m[2:], one

    def forward(self, h, pos, c, text, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)           # (B, 1, D) each
        if self.conditioning == "cross_attention":
            text = torch.cat([text, c.to(text.dtype)], dim=1)                       # (B, L+1, D)
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        # Why positions in every block and not once: the paper reports less distortion and morphing,
        # mainly in time. They join the residual stream, which so holds n pos after n closed blocks.
        h = fp32(h) + pos                                                           # (B, N, D)
        x = modulate(rms_norm(h), shift1, scale1)
        h = torch.addcmul(h, gate1, self.self_attention(x, self.attend))            # h + gate * .
        h = h + self.cross_attention(rms_norm(h), text, mask)
        x = modulate(rms_norm(h), shift2, scale2)
        return torch.addcmul(h, gate2, self.ffn(x))                                 # (B, N, D)


class Head(nn.Module):
    """Norm, modulation by two vectors of its own, Linear to P: 0 at initialisation [DIT s3.2]."""

    def __init__(self, cfg, width):
        super().__init__()
        self.adaln = Linear32(cfg.dim, 2 * cfg.dim) if cfg.adaptive else None
        self.table = None if cfg.adaptive else nn.Parameter(torch.zeros(2, cfg.dim))
        self.out = Linear32(cfg.dim, width)

    def forward(self, h, c):
        if self.adaln is None:
            shift, scale = self.table                                               # (D,) each
        else:
            shift, scale = self.adaln(F.silu(c[:, :1])).chunk(2, dim=-1)            # (B, 1, D) each
        return self.out(modulate(rms_norm(h), shift, scale))                        # (B, N, P)


# ---- 5. The model --------------------------------------------------------------------------------

class DiT(nn.Module):
    """v = DiT(x_t, t, text, mask, labels): the velocity of the flow at x_t, shaped like x_t."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.width = sum(s.width for s in cfg.streams)                              # P
        # The paper's Conv3d with kernel = stride = patch is this Linear on rearranged pixels.
        self.embed = Linear(self.width, cfg.dim, bias=True)
        self.tables = nn.ModuleList(nn.ParameterList(                               # phi_t, _h, _w
            nn.Parameter(torch.empty(n // p, cfg.dim)) for n, p in zip(s.size, s.patch))
            for s in cfg.streams)
        self.time = nn.Sequential(Linear32(256, cfg.dim), nn.SiLU(), Linear32(cfg.dim, cfg.dim))
        self.label = nn.Embedding(cfg.num_classes + 1, cfg.dim) if cfg.num_classes else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        shared = cfg.adaptive and cfg.adaln == "shared"
        self.adaln = Linear32(cfg.dim, self.blocks[0].K * cfg.dim) if shared else None
        self.head = Head(cfg, self.width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """DiT's initialisation: xavier, small time MLP, and zero for whatever must start closed.

        A model built on the meta device calls it again after `to_empty`."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, SelfAttention) and m.qk_weight is not None:
                nn.init.ones_(m.qk_weight)
        small = [self.time[0].weight, self.time[2].weight]
        for w in small if self.label is None else [*small, self.label.weight]:
            nn.init.normal_(w, std=0.02)
        # Positions, which add up over the blocks, end about as loud as the tokens. At 0.02, as for
        # a table of words, tokens are slow to find each other; three times louder than this, the
        # norms drown the tokens in them, and the demo's loss ends four times higher.
        for w in self.tables.parameters():
            nn.init.normal_(w, std=1 / len(self.blocks))
        closed = [self.head.out.weight] + [b.cross_attention.out.weight for b in self.blocks]
        for m in (self, self.head, *self.blocks):
            if m.adaln is not None:
                closed += [m.adaln.weight, m.adaln.bias]
            if m is not self and m.table is not None:
                closed += [m.table]
        for w in closed:
            nn.init.zeros_(w)

    def param_groups(self, weight_decay):
        """For AdamW: matrices decay. Biases, tables and embeddings do not: they are lookups, whose
        seldom used rows would only shrink."""
        matrices = {m.weight for m in self.modules() if isinstance(m, nn.Linear)}
        rest = [w for w in self.parameters() if w not in matrices]
        return [{"params": [w for w in self.parameters() if w in matrices],
                 "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    # ---- tokens in and out ----

    def grids(self, shape):
        """The shape of x -> [(stream, (T, H, W)), ...]; ValueError when x cannot be cut up."""
        streams = self.cfg.streams
        if len(streams) > 1:                            # flat: the sizes are fixed
            flat = sum(s.numel for s in streams)
            if len(shape) != 2 or shape[1] != flat:
                raise ValueError(f"x {tuple(shape)}: not (B, {flat}), {len(streams)} streams flat")
            return [(s, s.size) for s in streams]
        s = streams[0]
        if len(shape) != 5 or shape[1] != s.channels:
            raise ValueError(f"x {tuple(shape)}: not (B, {s.channels}, T, H, W)")
        if any(n % p for n, p in zip(shape[2:], s.patch)):
            raise ValueError(f"x {tuple(shape)}: T, H, W are not multiples of patch {s.patch}")
        return [(s, tuple(shape[2:]))]

    def patchify(self, x):
        """x -> (B, N, P), a pure rearrangement; tokens in the order frame, row, column.

        Several streams: one after the other. Each owns its columns of P, with zeros in those of the
        others, and so one Linear embeds them all as if each had its own."""
        grids, out, column = self.grids(x.shape), [], 0
        parts = x.split([s.numel for s, _ in grids], dim=1) if len(grids) > 1 else [x]
        for (s, (T, H, W)), z in zip(grids, parts):
            p, q, r = s.patch
            z = z.reshape(-1, s.channels, T, H, W)
            z = rearrange(z, "B C (T p) (H q) (W r) -> B (T H W) (C p q r)", p=p, q=q, r=r)
            out.append(F.pad(z, (column, self.width - column - s.width)))
            column += s.width
        return torch.cat(out, dim=1)                                                # (B, N, P)

    def unpatchify(self, tokens, shape):
        """(B, N, P) -> x of this shape: patchify's inverse. A stream reads only its own columns."""
        grids, out, column = self.grids(shape), [], 0
        counts = [math.prod(size) // math.prod(s.patch) for s, size in grids]
        for (s, (T, H, W)), z in zip(grids, tokens.split(counts, dim=1)):
            p, q, r = s.patch
            z = rearrange(z[..., column:column + s.width],
                          "B (T H W) (C p q r) -> B C (T p) (H q) (W r)",
                          T=T // p, H=H // q, W=W // r, p=p, q=q, r=r)
            out.append(z)
            column += s.width
        return out[0] if len(out) == 1 else torch.cat([z.flatten(1) for z in out], dim=1)

    def token_mask(self, shape):
        """(N, P) bool: which columns of a token hold data; None where all do (one stream)."""
        if len(self.cfg.streams) == 1:
            return None
        ones = torch.ones(1, *shape[1:], device=self.embed.weight.device)
        return self.patchify(ones)[0].bool()                                        # (N, P)

    def positions(self, shape):
        """PE(t, h, w) = phi_t + phi_h + phi_w, learned [MG s3.1.3]. The shape of x -> (N, D).

        Any size, aspect ratio and length up to the tables; past them ValueError, since an index
        clipped or wrapped around would train, badly and silently."""
        out = []
        for (s, size), tables in zip(self.grids(shape), self.tables):
            counts = [n // p for n, p in zip(size, s.patch)]
            for axis, n, table in zip("THW", counts, tables):
                if n > len(table):
                    raise ValueError(f"x {tuple(shape)}: {n} tokens along {axis}, the position "
                                     f"table has {len(table)} (see expand_positions)")
            a, b, c = (table[:n] for n, table in zip(counts, tables))
            out.append(rearrange(a[:, None, None] + b[:, None] + c, "T H W D -> (T H W) D"))
        return torch.cat(out)                                                       # (N, D)

    @torch.no_grad()
    def expand_positions(self, *sizes):
        """Grow the tables to new largest latent sizes (T, H, W), one for each stream.

        What the paper does between its stages: twice the spatial rows for 256 px, three times as
        many again for 768 px [MG s3.1.3]. Linear interpolation, row i of n standing for the place
        (i + 1/2) / n of the picture before and after; a single row (an image's T) is repeated. The
        tables are new parameters: make the optimizer afterwards."""
        if len(sizes) != len(self.tables):
            raise ValueError(f"sizes {sizes}: one (T, H, W) for each of {len(self.tables)} streams")
        streams = tuple(replace(s, size=size) for s, size in zip(self.cfg.streams, sizes))
        for s, tables in zip(streams, self.tables):
            for i, table in enumerate(tables):
                new = F.interpolate(table.T[None], size=s.size[i] // s.patch[i], mode="linear",
                                    align_corners=False)[0].T                       # (n, D)
                tables[i] = nn.Parameter(new.contiguous())
        self.cfg = replace(self.cfg, streams=streams)

    # ---- time and label ----

    def condition(self, t, labels=None):
        """t (B,), labels (B,) int64 below num_classes, or -1 = dropped, or None = all dropped
        -> c (B, 1 or 1+K, D).

        Row 0 embeds t (plus the label, as in DiT). The K rows behind it are the shared modulation,
        computed here once for all blocks; `per_block` blocks make theirs from row 0."""
        e = self.time(timestep_embedding(t))                                        # (B, D)
        if self.label is not None:
            labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
            e = e + self.label(labels + 1)                      # row 0: dropped
        elif labels is not None:
            raise ValueError("labels: given to a model with num_classes 0")
        if self.adaln is None:
            return e[:, None]                                                       # (B, 1, D)
        m = rearrange(self.adaln(F.silu(e)), "B (K D) -> B K D", D=self.cfg.dim)
        return torch.cat([e[:, None], m], dim=1)                                    # (B, 1+K, D)

    # ---- all of it ----

    def forward(self, x, t, text, mask=None, labels=None):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask {mask.dtype}: not bool; another one would be added to scores")
        text = text.to(self.embed.weight.dtype)
        tokens = self.patchify(x.to(self.embed.weight.dtype))                       # (B, N, P)
        pos = self.positions(x.shape)                                               # (N, D)
        c = self.condition(t, labels)                                               # (B, 1+K, D)
        h = self.embed(tokens)                                                      # (B, N, D)
        in_context = self.cfg.conditioning == "in_context"
        if in_context:                                  # c is one token, and has no position
            h, pos = torch.cat([h, c.to(h.dtype)], dim=1), F.pad(pos, (0, 0, 0, 1))
        for block in self.blocks:
            if self.cfg.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, pos, c, text, mask, use_reentrant=False)
            else:
                h = block(h, pos, c, text, mask)                                    # (B, N, D)
        out = self.head(h[:, :-1] if in_context else h, c)                          # (B, N, P)
        return self.unpatchify(out, x.shape).to(x.dtype)                            # like x


# ---- 6. What it costs ----------------------------------------------------------------------------

PARTS = {"self_attention": "self-attention", "cross_attention": "cross-attention", "ffn": "SwiGLU",
         "adaln": "adaLN", "table": "adaLN", "time": "time MLP", "label": "time MLP",
         "tables": "positions", "embed": "patch, head", "out": "patch, head"}


def count_params(model):
    """Parameters by part; works on the meta device."""
    count = Counter(dict.fromkeys(PARTS.values(), 0))
    for name, w in model.named_parameters():
        words = [n for n in name.split(".") if n in PARTS]      # blocks.3.ffn.down.weight -> ffn
        count[PARTS[words[0]]] += w.numel()
    return dict(count)


def flops(cfg, N, L):
    """FLOPs of one forward pass for one clip of N tokens and L text tokens: (linear, attention).

    2 for each multiply-add of a matrix product; norms and sums are left out. Training costs three
    times as much, four with checkpointing. Linear grows with N, attention with N^2: at 73,728
    tokens of width 6144 it is 1.7 times the rest. For adaln_zero."""
    D, width = cfg.dim, sum(s.width for s in cfg.streams)
    block = N * (6 * D * D + 3 * D * cfg.ffn_width) + L * 2 * cfg.text_width * D
    adaln = 6 * D * D * (cfg.depth if cfg.adaln == "per_block" else 1) + 2 * D * D      # and head's
    linear = 2 * (cfg.depth * block + adaln + 256 * D + D * D + 2 * N * width * D)
    return linear, cfg.depth * (4 * N * N * D + 4 * N * L * D)


def table():
    """Print what each preset holds and costs at its largest clip. Nothing is allocated."""
    L = 512 + 128 + 256                                 # text_cond.py's limits
    models = {}
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            models[name] = DiT(cfg)
    rows = [("preset", *PRESETS)]
    for field in ("dim", "depth", "heads", "ffn_width"):
        rows.append((field, *(getattr(c, field) for c in PRESETS.values())))
    rows.append(())
    counts = {name: count_params(m) for name, m in models.items()}
    for part in dict.fromkeys(PARTS.values()):
        rows.append((part + ", M", *(f"{c[part] / 1e6:,.2f}" for c in counts.values())))
    total = {name: sum(c.values()) for name, c in counts.items()}
    rows.append(("parameters, B", *(f"{n / 1e9:.3f}" for n in total.values())))
    rows.append(())
    N = {name: sum(math.prod(s.size) // math.prod(s.patch) for s in c.streams)
         for name, c in PRESETS.items()}
    cost = {name: flops(c, N[name], L) for name, c in PRESETS.items()}
    kept = {name: N[name] * c.dim * c.depth * 4 for name, c in PRESETS.items()}
    rows.append(("video tokens N", *(f"{n:,}" for n in N.values())))
    rows.append(("forward, linear, TFLOP", *(f"{a / 1e12:,.4g}" for a, _ in cost.values())))
    rows.append(("forward, attention, TFLOP", *(f"{b / 1e12:,.4g}" for _, b in cost.values())))
    rows.append(("weights in bf16, GB", *(f"{2 * n / 1e9:,.3g}" for n in total.values())))
    rows.append(("training state, GB", *(f"{20 * n / 1e9:,.3g}" for n in total.values())))
    rows.append(("block inputs, GB a clip", *(f"{n / 1e9:,.3g}" for n in kept.values())))
    for row in rows:
        print("".join([f"{row[0]:27}", *(f"{x:>12}" for x in row[1:])]) if row else "")
    print(f"\nFor one clip of the preset's largest size and {L} text tokens. Training state: fp32 "
          "weights, their\naverage (EMA), gradients and Adam's two moments, 20 bytes a parameter. "
          "Block inputs: what is kept\nfor the backward pass with checkpointing, in fp32.")


# ---- 7. Demo -------------------------------------------------------------------------------------

def trace(model, x, t, text):
    """Print each seam of forward with the shape that leaves it."""
    def show(name, y, meaning):
        print(f"  {name:12}{str(tuple(y.shape)):20}{meaning}")
        return y
    show("x", x, "B C T H W: latent clips")
    tokens = show("patchify", model.patchify(x), f"B N P: patches of {model.cfg.streams[0].patch}")
    pos = show("positions", model.positions(x.shape), "N D: phi_t + phi_h + phi_w")
    c = show("condition", model.condition(t), "B 1+K D: t, and shift, scale, gate twice")
    h = show("embed", model.embed(tokens), "B N D")
    show("text", text, "B L D_text: from text_cond.py")
    for block in model.blocks:
        h = block(h, pos, c, text)
    show("blocks", h, f"B N D: {len(model.blocks)} of them")
    out = show("head", model.head(h, c), "B N P")
    return show("unpatchify", model.unpatchify(out, x.shape), "B C T H W: the velocity")


def demo(out, steps):
    """Shapes; exactly zero at first; learns one clip by heart; draws the gates as they open."""
    torch.manual_seed(0)
    cfg = PRESETS["toy"]
    s = cfg.streams[0]
    model, (T, H, W) = DiT(cfg), s.size
    print(f"toy: {sum(count_params(model).values()) / 1e6:.2f} M parameters")
    # One clip: in each channel a soft blob that moves along a straight line, unit variance.
    frame, row, col = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (T, H, W)), indexing="ij")
    start, end = torch.rand(2, s.channels, 2, 1, 1, 1)
    place = start + (end - start) * frame                                       # (C, 2, T, H, W)
    clip = torch.exp(-8 * ((row - place[:, 0]) ** 2 + (col - place[:, 1]) ** 2))
    clip = (clip - clip.mean()) / clip.std()                                        # (C, T, H, W)
    B, text = 4, torch.randn(1, 8, cfg.dim)
    x1, P = clip.expand(B, -1, -1, -1, -1), text.expand(B, -1, -1)

    with torch.no_grad():
        at_start = trace(model, torch.randn(x1.shape), torch.rand(B), P).abs().max().item()

    # Flow matching: x_t = t x1 + (1 - t) x0, and the model is to say x1 - x0 (see flow.py).
    def loss_of(x0, t):
        x_t = t.view(-1, 1, 1, 1, 1) * x1 + (1 - t).view(-1, 1, 1, 1, 1) * x0
        return (model(x_t, t, P) - (x1 - x0)).square().mean()

    probe = torch.tensor([0.5])
    opt = torch.optim.AdamW(model.param_groups(weight_decay=0.0))
    losses, gates, began = [], [], time.time()
    for step in range(steps):
        for group in opt.param_groups:                  # warm up, then down to 0
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of(torch.randn(x1.shape), torch.rand(B))
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        with torch.no_grad():
            c = model.condition(probe)
            gates.append([[block.modulation(c)[i].abs().mean().item() for i in (2, 5)]
                          for block in model.blocks])
    print(f"  {steps} steps in {time.time() - began:.0f} s: loss {losses[0]:.3f} -> "
          f"{sum(losses[-10:]) / 10:.3f}")

    with torch.no_grad():                               # ten Euler steps from new noise
        x = torch.randn(4, *clip.shape)
        for i in range(10):
            x = x + model(x, torch.full((4,), i / 10), text.expand(4, -1, -1)) / 10
    error = ((x - clip).square().mean() / clip.square().mean()).sqrt().item()
    draw(out, torch.tensor(gates), losses, clip, x[0])

    ok = True
    for claim, value, bound, good in (
            ("largest output at initialisation", at_start, "0", at_start == 0),
            ("loss at initialisation, 1 + var(x1)", losses[0], "2 +- 0.1", abs(losses[0] - 2) < .1),
            ("one clip learnt: relative error of samples", error, "0.15", error < 0.15)):
        ok &= good
        print(f"{'PASS' if good else 'FAIL'} {claim}: {value:.3g} vs {bound}")
    return ok


def draw(out, gates, losses, clip, sample):
    """gates (steps, depth, 2); clip, sample (C, T, H, W) -> out/gates.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(5, 4, 4))
    colors = plt.cm.viridis(torch.linspace(0, 0.9, gates.shape[1]).numpy())
    for i, color in enumerate(colors):
        left.plot(gates[:, i, 0], color=color, label=f"block {i}")
        left.plot(gates[:, i, 1], color=color, ls="--")
    left.set(title="The gates open (one shared Linear moves\nall blocks; their tables differ)",
             xlabel="step", ylabel="mean |gate| at t = 0.5")
    left.plot([], [], "k-", label="self-attention"); left.plot([], [], "k--", label="SwiGLU")
    left.legend(fontsize=7, ncols=2)
    middle.plot(losses, lw=0.8)
    middle.set(title="Loss: 2 at first, the model says 0", xlabel="step", yscale="log")
    both = torch.stack([clip[0], sample[0]])                                        # (2, T, H, W)
    right.imshow(rearrange(both, "two T H W -> (two H) (T W)"), cmap="magma")
    for y in range(1, both.shape[1]):
        right.axvline(y * both.shape[-1] - 0.5, color="w", lw=0.5)
    right.axhline(both.shape[2] - 0.5, color="w", lw=2)
    right.set(title="Channel 0, frame by frame:\nthe clip; a sample", xticks=[], yticks=[])
    out.mkdir(parents=True, exist_ok=True)
    fig.tight_layout(); fig.savefig(out / "gates.png", dpi=120); plt.close(fig)
    print(f"  figure: {out / 'gates.png'}")


# ---- 8. Study: four ways to tell the blocks what time it is --------------------------------------
# The ablation of [DIT s5], on video, with text beside the time: the same latents, the same seconds,
# the same number of parameters (the FFN is wider where nothing is spent on modulation). Each model
# is a run folder of train.py, so a study that is stopped goes on where it was.

def matched(base, conditioning):
    """base with another conditioning, its FFN widened until it has as many parameters again."""
    def count(cfg):
        with torch.device("meta"):
            return sum(w.numel() for w in DiT(cfg).parameters())
    cfg, goal = replace(base, conditioning=conditioning), count(base)
    gap = (goal - count(cfg)) / (3 * cfg.dim * cfg.depth)
    return replace(cfg, ffn=cfg.ffn_width + round(gap / 8) * 8)


def seconds_per_step(cfg, conditionings, B=64, L=14, rounds=6):
    """Seconds of a training step of each on one thread, measured in turn: the median."""
    models, seconds = {}, {c: [] for c in conditionings}
    for c in conditionings:
        models[c] = DiT(matched(cfg, c))
        for w in models[c].parameters():
            w.data.add_(torch.randn_like(w), alpha=0.02)            # no gate is closed
    s = cfg.streams[0]
    shape = (s.channels, *s.size) if len(cfg.streams) == 1 else (sum(s.numel for s in cfg.streams),)
    x, t, text = torch.randn(B, *shape), torch.rand(B), torch.randn(B, L, cfg.dim)
    for i in range(rounds):
        for c, model in models.items():
            began = time.process_time()
            model(x, t, text).square().mean().backward()
            model.zero_grad()
            if i:
                seconds[c].append(time.process_time() - began)
    return {c: sorted(times)[len(times) // 2] for c, times in seconds.items()}


def study(base, out, seconds):
    """The conditionings on the latents of the run `base`, each for the same CPU seconds a model,
    3 seeds: out/study.json, out/study.png and a table, in the DiT paper's order."""
    import json

    import train
    cfg, plan = train.load_run(base).cfg.dit, out / "steps.json"
    out.mkdir(parents=True, exist_ok=True)
    if not plan.exists():                       # how many steps a second buys: measured once
        torch.set_num_threads(1)
        plan.write_text(json.dumps(seconds_per_step(cfg, CONDITIONINGS)))
    cost = json.loads(plan.read_text())
    train.compare(base, out, {c: {"dit": matched(cfg, c),
                                  "train_dit.steps": max(1, round(seconds / cost[c]))}
                              for c in CONDITIONINGS})
    print("The DiT paper's order, by FID on images, best first: " + ", ".join(CONDITIONINGS))


# ---- 9. Command line -----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Bad arguments give one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    """The command line."""
    parser = Parser(description="The backbone: a demo, or a table of presets", allow_abbrev=False)
    parser.add_argument("--table", action="store_true", help="parameters, FLOPs, memory; no demo")
    parser.add_argument("--study", metavar="RUN", type=Path,
                        help="compare the conditionings on the latents of a finished run")
    parser.add_argument("--seconds", type=float, default=220.0, help="study: CPU seconds a model")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the demo")
    parser.add_argument("--out", type=Path, default=Path("out/dit"), help="folder of the figure")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: not a positive number")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds:g}: not a positive number")
    if args.table:
        return table()
    try:
        if args.study:
            return study(args.study, args.out, args.seconds)
        ok = demo(args.out, args.steps)
    except ModuleNotFoundError as error:
        parser.error(f"{error}; a study needs the other files of this repository beside this one")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
