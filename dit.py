"""The backbone: Movie Gen's diffusion transformer, (x_t, t, text) -> velocity.

    x (B,C,T,H,W) - patchify -> tokens (B,N,Cpqr) - embed -> h (B,N,D) --> block x depth --> head
                                                                            ^  ^  ^           |
    positions (N,D), added at the input of every block ---------------------'  |  |     unpatchify
    t (B,) - x1000, sinusoid, MLP -> c - shared adaLN: shift, scale, gate -----'  |           |
    text (B,L,D_text), mask (B,L) - cross-attention ------------------------------'           v
                                                                                     v (B,C,T,H,W)
    block:  h = h + pos
            h = h + gate * SelfAttention(RMSNorm(h) * (1 + scale) + shift)      bidirectional
            h = h + CrossAttention(RMSNorm(h), text, mask)                      output starts at 0
            h = h + gate * SwiGLU(RMSNorm(h) * (1 + scale) + shift)

The block is LLaMa3's with three changes: cross-attention to the text before the FFN, an adaptive
layer norm that carries t, and full bidirectional attention [MG s3.1.3]. At initialisation the
gates (adaLN-Zero), the last Linear of CrossAttention and that of the head are 0: a block returns
h + pos, the model returns 0.

Papers: Movie Gen, arXiv 2410.13720 [MG]; DiT, arXiv 2212.09748 [DIT]; PixArt-alpha, arXiv
2310.00426 (the shared adaLN); SwiGLU, arXiv 2002.05202.

Contract
    x     (B, C, T, H, W), unit variance; several latents (VidTwin) come flat, (B, sum of C T H W)
    t     (B,) fp32 in [0, 1]: 0 is noise, 1 is data (multiplied by 1000 inside)
    text  (B, L, D_text); mask (B, L) bool, True = attend, at least one True per row; None = all
    ->    v, of the shape and dtype of x
`forward` casts x and text to the precision of the weights, and calls patchify, positions,
condition, embed, blocks, head and unpatchify, all public. Only `block.attend` mixes video tokens;
all else that gets tokens acts on each alone, and may be called on a slice of their axis (but for
`unpatchify` and `in_context`). So a sampler can spread this model over many ranks, and this file
needs no change.

    python dit.py     # zero output at first, overfits one clip; out/dit/gates.png  25 s on 2 cores

Differences from the paper
    - All blocks share one adaLN, and each adds a table of its own, as in PixArt. That is
      inferred from the paper's names of sizes: with a shared adaLN, 1B, 5B and 30B have 0.93, 4.92
      and 29.3 B parameters. One Linear for each block, as in DiT (`adaln="per_block"`), would give
      1.3, 6.7 and 40 B.
    - RMSNorm has no weight, unlike LLaMa3's: the modulation or the next Linear scales instead.
    - Cross-attention comes after an RMSNorm: without it, the queries would grow with the positions
      that each block adds. Its output Linear starts at zero, because it has no gate.
    - "Positions at the input of every layer" is read as: added to the residual stream itself.
    - `qk_norm` and the three other ways for t to enter (section 6) were not found in the paper.

Letters: B batch, C latent channels, T H W latent frames, height and width (in `to_tokens` counted
in tokens), p q r the size of a patch, N video tokens, Cpqr numbers in a token (C p q r), D width, L
text tokens, h (B,N,D) the residual stream, in a rearrange h heads of width d; t flow time.
"""
import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- 1. The idea ---------------------------------------------------------------------------------


def adaln_zero(h, modulation, attention, cross_attention, ffn):
    """Apply one block of the transformer to h (B, N, D), without positions.

    modulation (B, 6, D) comes from t. At initialisation it is zero, and so is the output of
    cross_attention: h is returned unchanged. `Block` in section 4 is the same with weights; the
    demo compares the two."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=1)       # (B, 1, D) each
    norm = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    h = h + gate1 * attention(norm(h) * (1 + scale1) + shift1)  # video tokens see each other,
    h = h + cross_attention(norm(h))                            # then the text,
    h = h + gate2 * ffn(norm(h) * (1 + scale2) + shift2)        # then each is transformed alone
    return h


# ---- 2. Sizes ------------------------------------------------------------------------------------

# Four ways for t to enter the blocks (sections 4, 6), from the best to the worst in [DIT fig. 5].
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")


def one_of(name, value, choices):
    """Raise ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


@dataclass(frozen=True)
class Stream:
    """Describe one latent of a clip (not the residual stream). VidTwin's clips have two."""
    channels: int = 16              # C
    patch: tuple = (1, 2, 2)        # (p, q, r): latent frames, rows, columns that make one token
    size: tuple = (32, 96, 96)      # largest (T, H, W) of a latent: the position tables' range

    def __post_init__(self):
        for name in ("patch", "size"):                  # lists, when they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.patch) != 3 or min(self.patch) < 1 or any(
                n % p for n, p in zip(self.size, self.patch)):
            raise ValueError(f"patch {self.patch}: does not divide the latent size {self.size}")

    @property
    def width(self):
        """Count the numbers in a token: C p q r."""
        return self.channels * math.prod(self.patch)

    @property
    def numel(self):
        """Count the numbers in the whole latent: C T H W."""
        return self.channels * math.prod(self.size)


@dataclass
class DiTConfig:
    """Sizes and switches of the backbone."""

    streams: tuple = (Stream(),)    # the latent, or several of them
    dim: int = 192                  # width of the residual stream
    depth: int = 6                  # blocks
    heads: int = 6                  # heads of self-attention and of cross-attention
    ffn: int = 0                    # of the SwiGLU; 0: 8/3 dim (LLaMa), rounded up to 32s
    text_dim: int = 0               # width of the text tokens; 0: dim
    adaln: str = "shared"           # shared: one Linear, and a table for each block | per_block
    conditioning: str = "adaln_zero"  # how t enters: adaln_zero, adaln, cross_attention, in_context
    qk_norm: bool = False           # RMSNorm of q and k in each head: more stable in bf16
    checkpointing: bool = False     # recompute each block in the backward pass: 1/3 more FLOPs

    def __post_init__(self):
        self.streams = tuple(Stream(**s) if isinstance(s, dict) else s for s in self.streams)
        one_of("adaln", self.adaln, ("shared", "per_block"))
        one_of("conditioning", self.conditioning, CONDITIONINGS)
        for name, least in (("dim", 1), ("depth", 1), ("heads", 1), ("ffn", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be {least} or more")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads}: does not divide dim {self.dim}")
        if self.adaln == "per_block" and self.conditioning != "adaln_zero":
            raise ValueError("adaln per_block: only with conditioning adaln_zero")
        if self.conditioning == "cross_attention" and self.text_width != self.dim:
            raise ValueError(f"text_dim {self.text_dim}: with conditioning cross_attention must "
                             f"be dim {self.dim}, since t is a token of the text")

    # Properties and not fields, so that replace(cfg, dim=...) changes them too.
    @property
    def ffn_width(self):
        """Give the width of the SwiGLU."""
        return self.ffn or -(-8 * self.dim // 96) * 32

    @property
    def text_width(self):
        """Give the width of the text tokens."""
        return self.text_dim or self.dim


# Stream(): 256 frames at 768 px, with a TAE of 8x8x8: latent 32 x 96 x 96, 32 x 48 x 48 = 73,728
# tokens. At this length, attention takes 1.7 times as many FLOPs as all Linears of the 30B model.
PRESETS = {
    "toy":   DiTConfig((Stream(8, (1, 2, 2), (4, 8, 8)),), 160, 4, 4),      # 64 tokens
    "small": DiTConfig((Stream(16, (1, 2, 2), (8, 8, 8)),), 256, 4, 4),     # 128 tokens
    "1b":    DiTConfig((Stream(),), 1536, 24, 16, checkpointing=True),      # the paper's sizes;
    "5b":    DiTConfig((Stream(),), 3072, 32, 24, checkpointing=True),      # its ablations use 5B
    "30b":   DiTConfig((Stream(),), 6144, 48, 48, checkpointing=True),
}


# ---- 3. Primitives, and what stays in fp32 -------------------------------------------------------
# With bf16 autocast, or bf16 parameters, the matrix products of embedding, attention and FFN are in
# bf16. The time MLP, the modulation, the norms, the residual stream and the head stay in fp32. bf16
# has 8 significant bits: it has only 507 of the whole numbers up to 1000, the range of 1000 t; an
# update of size 0.001 would be lost when added to a residual stream of size 1. Tests may use
# float64 throughout.

def fp32(x):
    """Cast half precision to fp32; leave fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Linear32(nn.Linear):
    """Apply a Linear in fp32, even under autocast."""

    def forward(self, x):
        weight, bias = fp32(self.weight), fp32(self.bias)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)


class Linear(nn.Linear):
    """Apply a Linear in the dtype of its weight, or in autocast's. LLaMa's have no bias."""

    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias)

    def forward(self, x):
        # With bf16 weights, fp32 input is cast to bf16. With fp32 weights the input is left alone:
        # autocast may have made it bf16 on purpose.
        x = x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias)


def rms_norm(x):
    """Compute x / sqrt(mean(x^2) + 1e-6); the modulation or the next Linear scales it."""
    return F.rms_norm(fp32(x), x.shape[-1:], eps=1e-6)


def timestep_embedding(t, dim=256):
    """Embed t (B,) as cat[cos, sin](1000 t 1e4^(-i / (dim/2))) (B, dim), cosines first as in DiT.

    Why 1000: periods are 6 to 60,000. For t in [0, 1] itself nearly all entries would be
    constant: the cosine similarity of t = 0.4 and t = 0.5 would be 0.9997, and not 0.46."""
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    angle = 1000 * fp32(t)[:, None] * torch.exp(-math.log(1e4) * i / (dim // 2))    # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                            # (B, dim)


# ---- 4. The block, box by box --------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Let every video token see every other: no causal mask, no biases, no grouped heads."""

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
    """Let video tokens attend to text tokens. It adds no positions to the text: the encoders have
    already put the order into the tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.q = Linear(cfg.dim, cfg.dim)
        self.kv = Linear(cfg.text_width, 2 * cfg.dim)
        self.out = Linear(cfg.dim, cfg.dim)

    def forward(self, x, text, mask=None):
        q = rearrange(self.q(x), "B N (h d) -> B h N d", h=self.heads)
        k, v = rearrange(self.kv(text), "B L (two h d) -> two B h L d", two=2, h=self.heads)
        # The mask is over keys. Without it, padding would be read as text, and the length to which
        # a batch happens to be padded would change the clip.
        mask = None if mask is None else mask[:, None, None]                        # (B, 1, 1, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "B h N d -> B N (h d)"))                       # (B, N, D)


class SwiGLU(nn.Module):
    """Compute W_down (silu(W_gate x) * W_up x): three matrices, so width 8/3 D costs as much
    as DiT's two with width 4 D."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = Linear(cfg.dim, 2 * cfg.ffn_width)
        self.down = Linear(cfg.ffn_width, cfg.dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Apply one block [MG s3.1.3]: positions, self-attention, cross-attention, SwiGLU; adaLN-Zero.

    Only `attend(q, k, v)`, each (B, heads, N, head_dim), mixes video tokens. It is an attribute:
    assign another callable (Ulysses, Ring, a cache of stale K and V) to change it."""

    vectors = 6                         # shift, scale, gate of the attention, then of the FFN
    shared = True                       # DiT.adaln makes them for all blocks

    def __init__(self, cfg):
        super().__init__()
        self.attend = F.scaled_dot_product_attention
        self.self_attention = SelfAttention(cfg)
        self.cross_attention = CrossAttention(cfg)
        self.ffn = SwiGLU(cfg)
        self.table = nn.Parameter(torch.zeros(self.vectors, cfg.dim))

    def modulation(self, c):
        """Map c (B, 1+6, D) of `DiT.condition` to six vectors (B, 1, D), in DiT's order."""
        return (c[:, 1:] + self.table).split(1, dim=1)

    def forward(self, h, pos, c, text, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)           # (B, 1, D) each
        # Why positions in every block and not once: the paper reports less distortion and morphing,
        # mainly in time. They are added to the residual stream itself, so at initialisation it
        # contains n times pos after n blocks.
        h = fp32(h) + pos                                                           # (B, N, D)
        x = rms_norm(h) * (1 + scale1) + shift1
        h = h + gate1 * self.self_attention(x, self.attend)
        h = h + self.cross_attention(rms_norm(h), text, mask)
        x = rms_norm(h) * (1 + scale2) + shift2
        return h + gate2 * self.ffn(x)                                              # (B, N, D)


class Head(nn.Module):
    """Apply norm, shift and scale by t, and a Linear that starts at zero [DIT s3.2]."""

    def __init__(self, cfg, width):
        super().__init__()
        self.adaln = Linear32(cfg.dim, 2 * cfg.dim)
        self.out = Linear32(cfg.dim, width)

    def forward(self, h, c):
        shift, scale = self.adaln(F.silu(c[:, :1])).chunk(2, dim=-1)                # (B, 1, D) each
        return self.out(rms_norm(h) * (1 + scale) + shift)                          # (B, N, Cpqr)


# ---- 5. The model --------------------------------------------------------------------------------

def to_tokens(x, patch):
    """Rearrange x (B, C, T, H, W) into tokens (B, N, Cpqr), ordered by frame, row, column."""
    p, q, r = patch
    return rearrange(x, "B C (T p) (H q) (W r) -> B (T H W) (C p q r)", p=p, q=q, r=r)


def from_tokens(tokens, patch, size):
    """Undo `to_tokens`: (B, N, Cpqr) -> (B, C, T, H, W), with (T, H, W) = size."""
    (p, q, r), (T, H, W) = patch, size
    return rearrange(tokens, "B (T H W) (C p q r) -> B C (T p) (H q) (W r)",
                     T=T // p, H=H // q, W=W // r, p=p, q=q, r=r)


def grid_positions(tables, patch, size):
    """Give the learned positions phi_t + phi_h + phi_w (N, D) of a latent of this size [MG s3.1.3].

    A size beyond the tables raises ValueError: with a clipped or wrapped index the model would
    train badly, and nobody would notice."""
    counts = [n // p for n, p in zip(size, patch)]
    for axis, n, table in zip("THW", counts, tables):
        if n > len(table):
            raise ValueError(f"x {tuple(size)}: {n} tokens along {axis}, the position table has "
                             f"{len(table)} (see expand_positions)")
    frames, rows, columns = (table[:n] for n, table in zip(counts, tables))
    return rearrange(frames[:, None, None] + rows[:, None] + columns,
                     "T H W D -> (T H W) D")                                        # (N, D)


class DiT(nn.Module):
    """Predict the velocity of the flow, shaped like x_t: v = DiT(cfg)(x_t, t, text, mask).

    This is the model for one latent. With several in cfg.streams, DiT(cfg) makes a FlatDiT; other
    conditionings have blocks of their own (section 6)."""

    def __new__(cls, cfg=None):                                 # copy.deepcopy gives no cfg
        return super().__new__(FlatDiT if cls is DiT and cfg and len(cfg.streams) > 1 else cls)

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.width = sum(s.width for s in cfg.streams)          # Cpqr, summed over streams
        kind, head = VARIANTS[cfg.conditioning, cfg.adaln]
        # The paper's Conv3d with kernel = stride = patch is this Linear on rearranged latents.
        self.embed = Linear(self.width, cfg.dim, bias=True)
        self.tables = nn.ModuleList(nn.ParameterList(                               # phi_t, _h, _w
            nn.Parameter(torch.empty(n // p, cfg.dim)) for n, p in zip(s.size, s.patch))
            for s in cfg.streams)
        self.time = nn.Sequential(Linear32(256, cfg.dim), nn.SiLU(), Linear32(cfg.dim, cfg.dim))
        self.blocks = nn.ModuleList(kind(cfg) for _ in range(cfg.depth))
        self.adaln = Linear32(cfg.dim, kind.vectors * cfg.dim) if kind.shared else None
        self.head = head(cfg, self.width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialise as DiT does: xavier, std 0.02 in the time MLP, zero for modulations and the
        head's Linear; zero also for the last Linear of cross-attention, and positions as below.

        Call it again after `to_empty` on a model that was built on the meta device."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, SelfAttention) and m.qk_weight is not None:
                nn.init.ones_(m.qk_weight)
        nn.init.normal_(self.time[0].weight, std=0.02)
        nn.init.normal_(self.time[2].weight, std=0.02)
        # Positions add up over the blocks, to std 1.7 after the last. With std 0.02, usual for word
        # embeddings, attention is slow to learn them. With three times our std they dominate the
        # normalised input, and the demo's loss ends four times higher.
        for w in self.tables.parameters():
            nn.init.normal_(w, std=1 / len(self.blocks))
        for name, w in self.named_parameters():
            if name.endswith(("cross_attention.out.weight", "head.out.weight", ".table",
                              "adaln.weight", "adaln.bias")):
                nn.init.zeros_(w)

    # ---- the parts of forward ----

    def patchify(self, x):
        """Cut x into tokens (B, N, Cpqr)."""
        return to_tokens(x, self.cfg.streams[0].patch)

    def unpatchify(self, tokens, shape):
        """Reassemble tokens (B, N, Cpqr) into an x of this shape."""
        return from_tokens(tokens, self.cfg.streams[0].patch, shape[2:])

    def positions(self, shape):
        """Give the positions (N, D) of the tokens of an x of this shape."""
        return grid_positions(self.tables[0], self.cfg.streams[0].patch, shape[2:])

    def condition(self, t):
        """Map t (B,) to c (B, 1+6, D): the embedding of t, then the modulation that all blocks
        share (for AdaLN 4: no gates). Without a shared one: (B, 1, D)."""
        e = self.time(timestep_embedding(t))                                        # (B, D)
        if self.adaln is None:
            return e[:, None]                                                       # (B, 1, D)
        six = rearrange(self.adaln(F.silu(e)), "B (six D) -> B six D", D=self.cfg.dim)
        return torch.cat([e[:, None], six], dim=1)                                  # (B, 1+6, D)

    def forward(self, x, t, text, mask=None):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask {mask.dtype}: not bool; it would be added to the scores")
        text = text.to(self.embed.weight.dtype)
        tokens = self.patchify(x.to(self.embed.weight.dtype))                       # (B, N, Cpqr)
        pos = self.positions(x.shape)                                               # (N, D)
        c = self.condition(t)                                                       # (B, 1+6, D)
        h = self.embed(tokens)                                                      # (B, N, D)
        for block in self.blocks:
            if self.cfg.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, pos, c, text, mask, use_reentrant=False)
            else:
                h = block(h, pos, c, text, mask)                                    # (B, N, D)
        out = self.head(h, c)                                                       # (B, N, Cpqr)
        return self.unpatchify(out, x.shape).to(x.dtype)                            # like x

    # ---- larger clips ----

    @torch.no_grad()
    def expand_positions(self, *sizes):
        """Grow the tables to new largest latent sizes (T, H, W), one for each stream.

        The paper does so between its training stages: spatial tables twice as long for 256 px
        clips, then three times as long for 768 px. Rows are interpolated linearly, row i of n
        being at (i + 1/2) / n of the axis; a single row (an image's T) is repeated. The tables are
        new parameters: create the optimizer afterwards."""
        if len(sizes) != len(self.tables):
            raise ValueError(f"sizes {sizes}: one (T, H, W) for each of {len(self.tables)} streams")
        streams = tuple(replace(s, size=size) for s, size in zip(self.cfg.streams, sizes))
        for s, tables in zip(streams, self.tables):
            for i, table in enumerate(tables):
                new = F.interpolate(table.T[None], size=s.size[i] // s.patch[i], mode="linear",
                                    align_corners=False)[0].T                       # (n, D)
                tables[i] = nn.Parameter(new.contiguous(), table.requires_grad)
        self.cfg = replace(self.cfg, streams=streams)


# ---- 6. Variants: other ways for t to enter, several latents -------------------------------------
# Text always enters by cross-attention. `python studies/conditionings.py runs/toy` compares the
# ways for t at equal size and training time.

class PerBlockAdaLN(Block):
    """Compute the six vectors by a Linear in each block: DiT's own adaLN-Zero."""

    shared = False

    def __init__(self, cfg):
        super().__init__(cfg)
        self.table = None
        self.adaln = Linear32(cfg.dim, self.vectors * cfg.dim)

    def modulation(self, c):
        return self.adaln(F.silu(c[:, :1])).chunk(self.vectors, dim=-1)             # (B, 1, D) each


class AdaLN(Block):
    """Compute shift and scale from t, without gates."""

    vectors = 4

    def modulation(self, c):
        shift1, scale1, shift2, scale2 = super().modulation(c)
        return shift1, scale1, 1, shift2, scale2, 1


class LearnedNorm(Block):
    """Learn shift and scale, as the bias and weight of an ordinary norm; t enters as a token."""

    vectors, shared = 4, False

    def modulation(self, c):
        shift1, scale1, shift2, scale2 = fp32(self.table)[None].split(1, dim=1)     # (1, 1, D) each
        return shift1, scale1, 1, shift2, scale2, 1


class TimeInText(LearnedNorm):
    """Append t to the text, as one more token."""

    def forward(self, h, pos, c, text, mask=None):
        text = torch.cat([text, c.to(text.dtype)], dim=1)                           # (B, L+1, D)
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        return super().forward(h, pos, c, text, mask)


class TimeInVideo(LearnedNorm):
    """Append t to the video, as one more token without a position, in the first block."""

    def forward(self, h, pos, c, text, mask=None):
        if h.shape[1] == len(pos):
            h = torch.cat([h, c.to(h.dtype)], dim=1)                                # (B, N+1, D)
        return super().forward(h, F.pad(pos, (0, 0, 0, 1)), c, text, mask)


class LearnedHead(nn.Module):
    """Apply norm, learned shift and scale, and Linear: the head where t is a token."""

    def __init__(self, cfg, width):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, cfg.dim))
        self.out = Linear32(cfg.dim, width)

    def forward(self, h, c):
        shift, scale = fp32(self.table)                                             # (D,) each
        return self.out(rms_norm(h) * (1 + scale) + shift)


class TimeInVideoHead(LearnedHead):
    """Remove the token of t, which is the last, and apply the head."""

    def forward(self, h, c):
        return super().forward(h[:, :-1], c)


VARIANTS = {                            # (conditioning, adaln): block, head
    ("adaln_zero", "shared"): (Block, Head),
    ("adaln_zero", "per_block"): (PerBlockAdaLN, Head),
    ("adaln", "shared"): (AdaLN, Head),
    ("cross_attention", "shared"): (TimeInText, LearnedHead),
    ("in_context", "shared"): (TimeInVideo, TimeInVideoHead),
}


class FlatDiT(DiT):
    """Run DiT on several latents of fixed size, flattened and concatenated in x (B, n).

    Their tokens are concatenated too. Each stream fills columns of its own in a token and leaves
    the others zero, so that one Linear has separate weights for each stream."""

    def patchify(self, x):
        out, column = [], 0
        for s, z in zip(self.cfg.streams, x.split([s.numel for s in self.cfg.streams], dim=1)):
            z = to_tokens(z.reshape(-1, s.channels, *s.size), s.patch)              # (B, N_s, _)
            out.append(F.pad(z, (column, self.width - column - s.width)))
            column += s.width
        return torch.cat(out, dim=1)                                                # (B, N, Cpqr)

    def unpatchify(self, tokens, shape):
        counts, out, column = [s.numel // s.width for s in self.cfg.streams], [], 0
        for s, z in zip(self.cfg.streams, tokens.split(counts, dim=1)):
            z = from_tokens(z[..., column:column + s.width], s.patch, s.size)
            out.append(z.flatten(1))
            column += s.width
        return torch.cat(out, dim=1)                                                # (B, n)

    def positions(self, shape):
        return torch.cat([grid_positions(tables, s.patch, s.size)
                          for s, tables in zip(self.cfg.streams, self.tables)])     # (N, D)

    def token_mask(self, shape):
        """Tell which columns of each token hold data: (N, Cpqr) bool. A sampler that works on
        tokens must keep the others at zero."""
        ones = torch.ones(1, *shape[1:], device=self.embed.weight.device)
        return self.patchify(ones)[0].bool()                                        # (N, Cpqr)


# ---- 7. Demo -------------------------------------------------------------------------------------

@torch.no_grad()
def gap_to_the_idea(model, x, t, text):
    """Measure the largest difference between the last block and `adaln_zero` with its weights."""
    block, c, pos = model.blocks[-1], model.condition(t), model.positions(x.shape)
    h = model.embed(model.patchify(x))
    want = adaln_zero(h + pos, c[:, 1:] + block.table,
                      lambda x: block.self_attention(x, F.scaled_dot_product_attention),
                      lambda x: block.cross_attention(x, text), block.ffn)
    return (block(h, pos, c, text) - want).abs().max().item()


def moving_blobs(channels, T, H, W):
    """Draw a clip (C, T, H, W) of unit variance: in each channel a soft blob on a straight line."""
    frame, row, col = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (T, H, W)), indexing="ij")
    start, end = torch.rand(2, channels, 2, 1, 1, 1)
    place = start + (end - start) * frame                                       # (C, 2, T, H, W)
    clip = torch.exp(-8 * ((row - place[:, 0]) ** 2 + (col - place[:, 1]) ** 2))
    return (clip - clip.mean()) / clip.std()


def demo(out, steps):
    """Check that the first output is exactly zero, overfit one clip and draw how the gates open."""
    torch.manual_seed(0)
    cfg = PRESETS["toy"]
    (s,) = cfg.streams
    model = DiT(cfg)
    print(f"toy: {sum(w.numel() for w in model.parameters()) / 1e6:.2f} M parameters")
    B, clip = 4, moving_blobs(s.channels, *s.size)
    text = torch.randn(1, 8, cfg.dim).expand(B, -1, -1)
    x1 = clip.expand(B, -1, -1, -1, -1)
    with torch.no_grad():
        at_start = model(torch.randn(x1.shape), torch.rand(B), text).abs().max().item()

    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses, gates, began = [], [], time.time()
    for step in range(steps):
        for group in opt.param_groups:                  # warm up, then down to 0
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        # Flow matching: x_t = t x1 + (1 - t) x0, and the model has to predict x1 - x0 (flow.py).
        x0, t = torch.randn(x1.shape), torch.rand(B)
        w = t.view(-1, 1, 1, 1, 1)
        loss = (model(w * x1 + (1 - w) * x0, t, text) - (x1 - x0)).square().mean()
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        with torch.no_grad():
            c = model.condition(torch.tensor([0.5]))
            gates.append([[block.modulation(c)[i].abs().mean().item() for i in (2, 5)]
                          for block in model.blocks])
    print(f"  {steps} steps in {time.time() - began:.0f} s: loss {losses[0]:.3f} -> "
          f"{sum(losses[-10:]) / len(losses[-10:]):.3f}")

    with torch.no_grad():                               # ten Euler steps from new noise
        x = torch.randn(x1.shape)
        for i in range(10):
            x = x + model(x, torch.full((B,), i / 10), text) / 10
    error = ((x - clip).square().mean() / clip.square().mean()).sqrt().item()
    gap = gap_to_the_idea(model, torch.randn(x1.shape), torch.rand(B), text)
    draw(out, torch.tensor(gates), losses, clip, x[0])

    ok = True
    for claim, value, bound, good in (
            ("largest output at initialisation", at_start, "0", at_start == 0),
            ("loss at initialisation, 1 + var(x1)", losses[0], "2 +- 0.1", abs(losses[0] - 2) < .1),
            ("one clip learned: relative error of samples", error, "0.15", error < 0.15),
            ("a trained block and the idea of section 1 differ by", gap, "1e-4", gap < 1e-4)):
        ok &= good
        print(f"{'PASS' if good else 'FAIL'} {claim}: {value:.3g} vs {bound}")
    return ok


def draw(out, gates, losses, clip, sample):
    """Draw out/gates.png from gates (steps, depth, 2), losses, and clip and sample (C, T, H, W)."""
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
    middle.set(title="Loss: 2 at first, where the output is 0", xlabel="step", yscale="log")
    both = torch.stack([clip[0], sample[0]])                                        # (2, T, H, W)
    right.imshow(rearrange(both, "two T H W -> (two H) (T W)"), cmap="magma")
    for y in range(1, both.shape[1]):
        right.axvline(y * both.shape[-1] - 0.5, color="w", lw=0.5)
    right.axhline(both.shape[2] - 0.5, color="w", lw=2)
    right.set(title="Channel 0, frame by frame:\nthe clip; a sample", xticks=[], yticks=[])
    fig.tight_layout(); fig.savefig(out / "gates.png", dpi=120); plt.close(fig)
    print(f"  figure: {out / 'gates.png'}")


# ---- 8. Command line -----------------------------------------------------------------------------

def main():
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="The backbone overfits one clip.",
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"dit.py: {message}\n")   # one line, no usage
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("out/dit"), help="folder of the figure")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be 1 or more")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        ok = demo(args.out, args.steps)
    except BrokenPipeError:                             # as by `| head`
        os._exit(0)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
