"""tae.py: the temporal autoencoders, video <-> latent: 2.5D, 3D and VidTwin behind one interface.

    clip (B,3,T,H,W)                                                 clip (B,3,T,H,W)
         |  conv_in                                                       ^  conv_out
         v                                                                |
    [ResBlocks] -> Down (space, time)              Up (space, time) <- [ResBlocks]   (x levels)
         |                                                                ^
         v  ResBlock, attention over space, attention over time, ResBlock |          (the middle)
    mean, logvar ---- z = mean + std * noise, (B,C,T',H',W') -------------'

Papers. Movie Gen, arXiv 2410.13720, s3.1.1 [MG]; latent diffusion, 2112.10752 [LDM], whose image
autoencoder is the trunk; VidTwin, 2412.17726 [VT]; VQGAN, 2012.09841 [VQ], for the adaptive weight
of the GAN loss; PatchGAN, 1611.07004; DC-AE, 2410.10733 [DC], for the shortcut. "2.5D" [MG]: every
2D convolution is followed by a 1D convolution along time, every spatial attention by a temporal
one. "3D": joint convolutions and joint attention, the alternative, which [MG] found slightly better
but too expensive. Both start from an image autoencoder (`inflate`). VidTwin splits a clip into two
latents (section 6): structure (content, global movement) and dynamics (fine detail, fast movement).
The loss is reconstruction + KL + outlier penalty [MG] + GAN loss (section 7).

Contract
    encode(x)        x (B,3,T,H,W) float in [-1,1], any T >= 1 (an image is T = 1), any H and W
                     -> Posterior over z; z (B,C,T',H',W'), T' = ceil(T / time factor). VidTwin
                     takes one size, and its z is flat, (B,n): two latents, which `split` separates
    decode(z, num_frames, size)      -> (B,3,T,H,W); surplus frames and padding are dropped
    encode, decode   take stream=True: frame by frame, the same result up to rounding; memory for
                     activations grows with the latent frames only. (VidTwin ignores it; a shortcut
                     sees whole clips.)
    normalize(z)     makes each channel mean 0, std 1; `latent_stats` are in lat_mean, lat_std

Run.   python tae.py     # image training, inflation, video training, long clip; 40 s on 2 CPU cores

Differences from the papers
  Not found in [MG]: weights of the L1, KL, perceptual and GAN terms (ours: `LOSSES`), the kernel
  size in time (ours: 3), where the temporal strides are (ours: after the spatial ones), how new
  layers start (ours: convolutions as the identity, attention as zero, so that inflation is exact),
  and over what the outlier penalty takes mean and deviation (ours: a frame, detached).
  All losses are averages, so weights do not depend on the clip's size. [MG]'s weight
  1e5 of the outlier penalty seems meant for a loss that is summed over the pixels of a frame, as in
  [LDM]'s code; beside an average 0.1 to 1 does the same. Perceptual loss (needs a download),
  GAN loss and outlier penalty (need a trained autoencoder) are off in every preset, also in
  "paper", and VidTwin's published weights (0.05, 0.05, KL 0.001 of a sum) are not taken over.
  Norms see one frame at a time. A ResBlock's 1x1 skip convolution has no temporal one. Where two
  tiles share n frames, frame k of the later tile has the weight (k + 1/2) / n.
  TAEConfig.shortcut, off in every preset, adds one linear map of whole patches to the encoder and
  one to the decoder. [DC] has shortcuts at each change of resolution, and none has weights.
  Toy and small compress 4x4x4 and 2x8x8, not 8x8x8. They fold 4x4 pixels into channels first: on a
  CPU convolutions at full resolution would take most of the time. They are trained on the
  squared error, which reached a given PSNR sooner than L1 did.
  VidTwin: no dropout in the Q-Former, no learned scale of the loss, Kaiming initialisation between
  the backbones; in evaluation the mean is decoded, as in the paper but not in the released code. A
  block adds its temporal branch without a gate; the code multiplies it by the spatial branch's.
  Rows and columns of the dynamics latent have a decoder branch each; the code uses one for both
  (0.6 M parameters fewer). Like the code, unlike the paper: no MLP before the Q-Former, and the
  head of the dynamics latent sees rows and columns in turn, where the paper concatenates first.

Letters: B batch, T frames, H W height and width, C channels, D width of a transformer, N tokens of
a frame. In the convolutional autoencoders frames stay folded into the batch, (B T,C,H,W) in
channels_last memory, from the first convolution to the last: 2D kernels are the fast ones on every
device.
"""
import argparse
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- 1. The idea ---------------------------------------------------------------------------------


def conv_2_5d(x: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """Convolve a clip (B, C, T, H, W) as Movie Gen does: each frame with a 2D kernel, then each
    pixel along time with a 1D kernel of 3, the first and the last frame repeated beyond the ends.

    If the 1D kernel is the identity, this is the 2D convolution of every frame. So a video
    autoencoder can start as a trained image autoencoder, and learn time from there."""
    T, H, W = x.shape[2:]
    x = F.conv2d(rearrange(x, "b c t h w -> (b t) c h w"), spatial, padding="same")
    x = rearrange(x, "(b t) c h w -> (b h w) c t", t=T)
    x = F.conv1d(F.pad(x, (1, 1), mode="replicate"), temporal)
    return rearrange(x, "(b h w) c t -> b c t h w", h=H, w=W)


# ---- 2. Configuration ----------------------------------------------------------------------------

Variant = Literal["2.5d", "3d", "2d"]


def at_least(cfg, **bounds: float) -> None:
    """Raise ValueError unless each field, or each number in it, is at least its bound."""
    for name, bound in bounds.items():
        value = getattr(cfg, name)
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(n >= bound for n in numbers):
            raise ValueError(f"{name} {' '.join(map(str, numbers))}: must be {bound} or more")


@dataclass
class TAEConfig:
    """Sizes of the convolutional autoencoders. The defaults are Movie Gen's, where published."""

    variant: Variant = "2.5d"                       # 2d: frames alone; the others start from it
    channels: int = 128                             # width of the first level, a multiple of 4
    mult: tuple[int, ...] = (1, 2, 4, 4)            # width of each level, in units of `channels`
    space_stride: tuple[int, ...] = (2, 2, 2)       # in space, between levels: 1 or 2
    time_stride: tuple[int, ...] = (2, 2, 2)        # in time, at the same places: 1 or 2
    stem: int = 1                                   # n: n x n pixels are folded into channels first
    res_blocks: tuple[int, ...] = (2, 2, 2, 2)      # ResBlocks of each level of the encoder
    decoder_extra: int = 1                          # additional ResBlocks of each decoder level
    latent_channels: int = 16                       # C
    heads: int = 1                                  # heads of the attention in the middle
    shortcut: bool = False                          # add linear maps to the deep ones (section 5)
    checkpointing: bool = False                     # recompute blocks in the backward pass

    def __post_init__(self):
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant {self.variant}: not one of {', '.join(get_args(Variant))}")
        at_least(self, channels=4, mult=1, space_stride=1, time_stride=1, stem=1, res_blocks=0,
                 decoder_extra=0, latent_channels=1, heads=1)
        for name in ("space_stride", "time_stride"):
            strides = getattr(self, name)
            if len(strides) != len(self.mult) - 1 or any(n > 2 for n in strides):
                raise ValueError(f"{name} {' '.join(map(str, strides))}: must be 1 or 2 each, and "
                                 f"one fewer than the {len(self.mult)} levels of mult")
        if self.channels % 4:
            raise ValueError(f"channels {self.channels}: must be a multiple of 4")
        m, n, extra = self.mult, self.res_blocks, self.decoder_extra
        # widths and ResBlocks of each level and the next coarser one
        if len(n) != len(m) or any(a != b and not (coarse and fine + extra)
                                   for a, b, fine, coarse in zip(m, m[1:], n, n[1:])):
            raise ValueError(f"res_blocks {' '.join(map(str, self.res_blocks))}: must be a number "
                             f"for each of {len(m)} levels, 1 or more where widths change")
        if self.channels * self.mult[-1] % self.heads:
            raise ValueError(f"heads {self.heads}: must divide the width of the last level, "
                             f"{self.channels * self.mult[-1]}")

    @property
    def space_factor(self) -> int:
        return self.stem * math.prod(self.space_stride)

    @property
    def time_factor(self) -> int:
        return 1 if self.variant == "2d" else math.prod(self.time_stride)


@dataclass
class VidTwinConfig:
    """Sizes of VidTwin. The defaults are the paper's: 4928 values for 16 frames of 224 x 224."""

    frames: int = 16                # T of every clip
    size: int = 224                 # H = W of every clip
    patch: int = 16                 # a token is patch x patch pixels of one frame
    width: int = 768                # D, width of the backbone
    depth: int = 16                 # blocks of the encoder, and as many of the decoder
    heads: int = 12                 # heads of the backbone's attention
    queries: int = 16               # n_q: "frames" of the structure latent
    query_width: int = 64           # d_q, width of the Q-Former
    query_layers: int = 6           # layers of the Q-Former; every second one has cross-attention
    query_heads: int = 8            # heads of the Q-Former's attention
    query_ffn: int = 768            # hidden width of its feed-forward layers
    structure_down: int = 1         # how many times its height and width are halved: 14 -> 7
    structure_channels: int = 4     # d_S, channels of the structure latent
    dynamics_down: int = 1          # how many times its height and width are halved
    dynamics_channels: int = 8      # d_D, channels of the dynamics latent
    checkpointing: bool = False     # recompute blocks in the backward pass

    def __post_init__(self):
        sizes = dict.fromkeys(vars(self).keys() - {"checkpointing"}, 1)
        at_least(self, **sizes | {"structure_down": 0, "dynamics_down": 0})
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch}: must divide size {self.size}")
        if self.width % 4:                      # sines and cosines of rows and of columns
            raise ValueError(f"width {self.width}: must be a multiple of 4")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads}: must divide width {self.width}")
        if self.query_width % self.query_heads:
            raise ValueError(f"query_heads {self.query_heads}: must divide query_width "
                             f"{self.query_width}")

    @property
    def grid(self) -> int:
        """Give the tokens along one side of a frame."""
        return self.size // self.patch

    def after(self, downs: int) -> int:
        """Give the side of the grid after `downs` strided convolutions (14 -> 7 -> 4 -> 2)."""
        return -(-self.grid // 2**downs)


@dataclass
class LossConfig:
    """Weights of the losses. Each loss is an average; weight 0 switches it off."""

    l1: float = 1.0             # weight of the absolute error
    l2: float = 0.0             # weight of the squared error
    kl: float = 1e-6            # weight of the KL divergence, which keeps latents near N(0, I)
    opl: float = 0.0            # weight of Movie Gen's outlier penalty, as an average: 0.1 to 1
    opl_start: int = 0          # its first step (Movie Gen has it in the last 10K of 60K)
    opl_r: float = 3.0          # r: the distance from the mean allowed, in std
    perceptual: float = 0.0     # weight of the perceptual loss; downloads VGG16
    gan: float = 0.0            # factor of the GAN loss's adaptive weight: 0.05 to 0.2
    gan_start: int = 0          # its first step: best when reconstruction has converged

    def __post_init__(self):
        at_least(self, **dict.fromkeys(vars(self), 0))


PRESETS = {
    # 4x4x4: a clip of 16 x 32 x 32 becomes (8, 4, 8, 8)
    "toy": TAEConfig(channels=64, mult=(1, 1, 1), space_stride=(1, 1), time_stride=(2, 2), stem=4,
                     res_blocks=(0, 1, 1), decoder_extra=0, latent_channels=8),
    # 2x8x8: a clip of 16 x 64 x 64 becomes (16, 8, 8, 8)
    "small": TAEConfig(channels=96, mult=(1, 1, 1), space_stride=(2, 1), time_stride=(2, 1), stem=4,
                       res_blocks=(0, 1, 1), decoder_extra=0),
    # 8x8x8
    "paper": TAEConfig(),                                                   # 114.06 M parameters
}
VIDTWIN_PRESETS = {     # toy and small: as many values as the presets above, half in each latent
    "toy": VidTwinConfig(size=32, patch=8, width=128, depth=2, heads=4, queries=8, query_width=32,
                         query_layers=2, query_heads=4, query_ffn=64, structure_down=0,
                         structure_channels=8, dynamics_down=0),
    "small": VidTwinConfig(size=64, patch=8, width=256, depth=6, heads=8, queries=8,
                           query_layers=4, query_ffn=256, structure_channels=32,
                           dynamics_channels=32),
    "paper": VidTwinConfig(),                                               # 312.1 M
}
LOSSES = {
    "toy": LossConfig(l1=0.0, l2=4.0, kl=5e-3),
    "small": LossConfig(l1=0.0, l2=4.0, kl=5e-3),
    "paper": LossConfig(),
}

# ---- 3. Convolutions -----------------------------------------------------------------------------
# One class for each variant, with the same parameter names, so that the weights of an image
# autoencoder can be copied by name: `weight` and `bias` are the spatial part, `temporal` is new.


def fold(x: Tensor) -> Tensor:
    """Fold frames into the batch: (B, C, T, H, W) -> (B T, C, H, W), channels last in memory."""
    x = rearrange(x, "b c t h w -> (b t) c h w")
    return x.contiguous(memory_format=torch.channels_last)


class Conv2D(nn.Conv2d):
    """Convolve each frame of (B T, C, H, W) alone, kernel 3 or 1, as in an image autoencoder."""

    def __init__(self, cin: int, cout: int, space_stride: int = 1, time_stride: int = 1,
                 kernel: int = 3):
        super().__init__(cin, cout, kernel, space_stride,
                         padding=kernel // 2 if space_stride == 1 else 0)

    def forward(self, x: Tensor, T: int = 1) -> Tensor:
        if self.stride[0] == 2:         # [LDM] pads a strided convolution right and at the bottom
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class TemporalConv(nn.Module):
    """Convolve folded frames (B T, C, H, W) along time: kernel 3, symmetric *replicate* padding.
    Stride 2 leaves ceil(T / 2) frames.

    Why not zeros: they change a static clip near both ends, and people notice the first frame. Why
    symmetric and not causal: [MG] does so, and latent frame i is then centred on frame (time
    factor) * i. The kernel starts as the identity, so inserting the layer does not change what a
    trained image autoencoder computes."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.eye_(self.weight.data[:, :, 1])

    def forward(self, x: Tensor, T: int) -> Tensor:
        H = x.shape[2]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=T)     # a view: channels last in memory
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        x = F.conv2d(x, self.weight[..., None], self.bias, stride=(self.stride, 1))
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=H)


class Conv25D(Conv2D):
    """Convolve in space, then along time [MG]: 9 + 3 multiply-adds for each pair of channels, where
    a joint kernel takes 27."""

    def __init__(self, cin: int, cout: int, space_stride: int = 1, time_stride: int = 1):
        super().__init__(cin, cout, space_stride)
        self.temporal = TemporalConv(cout, time_stride)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.temporal(super().forward(x), T)


class Conv3D(nn.Module):
    """Convolve folded frames in time and space at once, kernel 3x3x3, replicate padding in time."""

    def __init__(self, cin: int, cout: int, space_stride: int = 1, time_stride: int = 1):
        super().__init__()
        like = nn.Conv2d(cin, cout, 3)                          # initialised as torch's 2D
        self.stride = (time_stride, space_stride, space_stride)
        self.weight = nn.Parameter(centre_slice(like.weight.data))
        self.bias = nn.Parameter(like.bias.data)

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = rearrange(x, "(b t) c h w -> b c t h w", t=T)       # a view, channels_last_3d
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        return fold(self.unpadded(x))

    def unpadded(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T, H, W) without padding in time."""
        pad = 1
        if self.stride[1] == 2:
            x, pad = F.pad(x, (0, 1, 0, 1)), 0
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, pad, pad))


def centre_slice(w: Tensor) -> Tensor:
    """Put a 2D kernel (cout, cin, k, k) between zeros: (cout, cin, 3, k, k)."""
    return F.pad(w[:, :, None], (0, 0, 0, 0, 1, 1))


CONV = {"2d": Conv2D, "2.5d": Conv25D, "3d": Conv3D}

# ---- 4. The convolutional autoencoder, 2.5D and 3D -----------------------------------------------


class FrameNorm(nn.GroupNorm):
    """Normalise each frame by itself, in up to 32 groups as in [LDM], of 4 channels or more.
    Statistics over all frames would change what the image autoencoder
    computes, and could not be streamed."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels // 4), channels, eps=1e-6)


class NormSiLU(FrameNorm):
    """Normalise each frame, then apply SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResBlock(nn.Module):
    """Apply norm, SiLU, conv, norm, SiLU, conv and add the input [LDM]."""

    def __init__(self, variant: str, cin: int, cout: int):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(cin), CONV[variant](cin, cout)
        self.norm2, self.conv2 = NormSiLU(cout), CONV[variant](cout, cout)
        self.skip = Conv2D(cin, cout, kernel=1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, T: int) -> Tensor:
        h = self.conv1(self.norm1(x), T)
        h = self.conv2(self.norm2(h), T)
        return self.skip(x) + h


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Compute softmax(q k' / sqrt(d)) v for each head: q (..., n, C), k and v (..., m, C)."""
    q, k, v = (rearrange(x, "... n (a d) -> ... a n d", a=heads) for x in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(h, "... a n d -> ... n (a d)")


class Attention(nn.Module):
    """Attend over the pixels of a frame ("space"), the frames of a pixel ("time"), or both at once
    ("joint"), and add the input.

    It has no position embeddings, so that T, H and W are free; the convolutions around it
    carry the positions."""

    patterns = {"space": "(b t) c h w -> (b t) (h w) c", "time": "(b t) c h w -> (b h w) t c",
                "joint": "(b t) c h w -> b (t h w) c"}

    def __init__(self, channels: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.pattern = heads, self.patterns[axis]
        self.norm = FrameNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if axis == "time":                          # so that inflation changes nothing
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, T: int) -> Tensor:
        H, W = x.shape[2:]
        h = rearrange(self.norm(x), self.pattern, t=T)                          # (sequences, n, C)
        h = self.out(attend(*self.qkv(h).chunk(3, -1), self.heads))
        left, right = self.pattern.split(" -> ")
        return x + rearrange(h, f"{right} -> {left}", t=T, h=H, w=W)


class Middle(nn.Module):
    """Apply ResBlock, attention over space, attention over time (3D: one attention over both) and
    ResBlock, at the coarsest level."""

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
    """Change the resolution between two levels. Down: a strided convolution, T -> ceil(T / 2),
    H -> H / 2. Up: nearest neighbour in space and in time [MG], each before its convolution.

    Where the image autoencoder has no spatial stride, there is no 2D kernel to copy. The layer is
    then a temporal convolution (3D: a joint one) that starts as the identity; without a temporal
    stride, too (the second of small), it does nothing."""

    def __init__(self, variant: str, channels: int, space_stride: int, time_stride: int, up: bool):
        super().__init__()
        self.up, self.space_stride = up, space_stride
        self.time_stride = 1 if variant == "2d" else time_stride
        strides = (1, 1) if up else (space_stride, self.time_stride)
        self.conv = CONV[variant](channels, channels, *strides) if space_stride == 2 else None
        if space_stride == 1 and self.time_stride == 2:
            self.conv = TemporalConv(channels, strides[1])
            if variant == "3d":
                self.conv = Conv3D(channels, channels, *strides)
                nn.init.dirac_(self.conv.weight)
                nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, T: int) -> Tensor:
        conv = self.conv
        if self.up and self.space_stride == 2:
            x = F.interpolate(x, scale_factor=2.0)
        if isinstance(conv, Conv25D):       # the spatial half first, before frames are repeated
            x, conv = Conv2D.forward(conv, x), conv.temporal
        if self.up and self.time_stride == 2:
            x = x.repeat_interleave(2, 0).contiguous(memory_format=torch.channels_last)
            T = 2 * T                       # (b t) becomes (b t 2): each frame twice
        return conv(x, T) if conv else x


def run_blocks(blocks: Iterable[nn.Module], h: Tensor, T: int,
               checkpointing: bool) -> tuple[Tensor, int]:
    """Pass folded frames, T of each clip, through blocks -> (folded frames, their new T). With
    `checkpointing`, keep only each block's input and recompute the rest in the backward pass."""
    B = len(h) // T
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            h = checkpoint(block, h, T, use_reentrant=False)
        else:
            h = block(h, T)
        T = len(h) // B
    return h, T


class Encoder(nn.Module):
    """Map (B, 3, T, H, W) to mean and logvar, concatenated along channels: (B, 2C, T', H', W')."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        self.cfg, v, width = cfg, cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.conv_in = CONV[v](3 * cfg.stem**2, width[0])
        self.levels = nn.ModuleList()
        for i, w in enumerate(width):
            previous = width[max(i - 1, 0)]
            blocks = [ResBlock(v, previous if j == 0 else w, w) for j in range(cfg.res_blocks[i])]
            if i < len(width) - 1:
                blocks.append(Resample(v, w, cfg.space_stride[i], cfg.time_stride[i], up=False))
            self.levels.append(nn.ModuleList(blocks))
        self.middle = Middle(cfg, width[-1])
        self.norm_out = NormSiLU(width[-1])
        self.conv_out = CONV[v](width[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        T, s = x.shape[2], self.cfg.stem
        x = rearrange(x, "b c t (h p) (w q) -> (b t) (c p q) h w", p=s, q=s)  # (BT, 3ss, H/s, W/s)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last), T)
        blocks = itertools.chain(*self.levels, [self.middle])
        h, T = run_blocks(blocks, h, T, self.cfg.checkpointing)
        h = self.conv_out(self.norm_out(h), T)
        return rearrange(h, "(b t) c h w -> b c t h w", t=T)                   # (B, 2C, T', H', W')


class Decoder(nn.Module):
    """Map (B, C, T', H', W') to (B, 3, T' * time factor, H, W)."""

    def __init__(self, cfg: TAEConfig):
        super().__init__()
        self.cfg, v, width = cfg, cfg.variant, [cfg.channels * m for m in cfg.mult]
        self.conv_in = CONV[v](cfg.latent_channels, width[-1])
        self.middle = Middle(cfg, width[-1])
        self.levels = nn.ModuleList()
        for i, w in reversed(list(enumerate(width))):
            previous = width[min(i + 1, len(width) - 1)]
            count = cfg.res_blocks[i] + cfg.decoder_extra
            blocks = [ResBlock(v, previous if j == 0 else w, w) for j in range(count)]
            if i > 0:
                blocks.append(
                    Resample(v, w, cfg.space_stride[i - 1], cfg.time_stride[i - 1], up=True))
            self.levels.append(nn.ModuleList(blocks))
        self.norm_out = NormSiLU(width[0])
        self.conv_out = CONV[v](width[0], 3 * cfg.stem**2)

    def forward(self, z: Tensor) -> Tensor:
        T, s = z.shape[2], self.cfg.stem
        h = self.conv_in(fold(z), T)
        blocks = itertools.chain([self.middle], *self.levels)
        h, T = run_blocks(blocks, h, T, self.cfg.checkpointing)
        h = self.conv_out(self.norm_out(h), T)
        return rearrange(h, "(b t) (c p q) h w -> b c t (h p) (w q)", t=T, p=s, q=s)


# ---- 5. One interface ----------------------------------------------------------------------------


@dataclass
class Posterior:
    """Diagonal Gaussian q(z | x) [LDM]: mean and logvar, shaped like z, fp32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw mean + std * noise. With a CPU generator the noise does not depend on the device."""
        at = self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator,
                            device=generator.device if generator else at).to(at)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Average KL(q || N(0, I)) = (mean^2 + var - 1 - logvar) / 2 over latent values."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).mean()


class Autoencoder(nn.Module):
    """Hold what all autoencoders share. Each defines `encode`, `decode`, `parts` and
    `last_weight`; VidTwin, whose latent has two parts, also `split` and `expand`."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("lat_mean", torch.zeros(channels))
        self.register_buffer("lat_std", torch.ones(channels))

    def forward(self, x: Tensor,
                generator: torch.Generator | None = None) -> tuple[Tensor, Posterior]:
        """Reconstruct (B,3,T,H,W) from a sample of the posterior (in eval mode from its mean) ->
        (reconstruction, posterior)."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if self.training else posterior.mean
        return self.decode(z, x.shape[2], x.shape[-2:]), posterior

    # (T, H, W) of a clip -> the shape (C, T', H', W') of each part of its latent; VidTwin has two.
    parts: Callable[[int, int, int], list[tuple[int, int, int, int]]]

    def split(self, z: Tensor) -> list[Tensor]:
        """Cut latents into a tensor (B, C, T', H', W') for each part."""
        return [z]

    def expand(self, per_channel: Tensor) -> Tensor:
        """Reshape one number for each channel (C,) so that it broadcasts over latents."""
        return per_channel.view(-1, 1, 1, 1)

    def latent_shape(self, T: int, H: int, W: int) -> tuple[int, ...]:
        """Give the shape of one clip's latent: (C, T', H', W'), or (n,) where it has several parts,
        which are flattened and concatenated."""
        parts = self.parts(T, H, W)
        return parts[0] if len(parts) == 1 else (sum(map(math.prod, parts)),)

    def normalize(self, z: Tensor) -> Tensor:
        """Bring each channel to mean 0 and std 1: what the flow model sees."""
        return (z - self.expand(self.lat_mean)) / self.expand(self.lat_std)

    def denormalize(self, z: Tensor) -> Tensor:
        """Undo `normalize`."""
        return z * self.expand(self.lat_std) + self.expand(self.lat_mean)


def check_clip(x: Tensor) -> None:
    """Raise ValueError unless x is a float (B, 3, T, H, W)."""
    if x.ndim != 5 or x.shape[1] != 3 or not x.numel():
        raise ValueError(f"clip of shape {tuple(x.shape)}: expected (B, 3, T, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"clip of {x.dtype}: expected floats in [-1, 1]")


class TAE(Autoencoder):
    """The temporal autoencoder of [MG s3.1.1], 2.5D or 3D, or the image autoencoder, 2D."""

    def __init__(self, cfg: TAEConfig):
        super().__init__(cfg.latent_channels)
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        # On real videos a small network takes very long to match the best linear map of patches. So
        # add such a map; the network learns the rest: the idea of [DC]'s residual autoencoding.
        if cfg.shortcut:
            C, patch = cfg.latent_channels, (cfg.time_factor, *(cfg.space_factor,) * 2)
            self.linear_in = nn.Conv3d(3, 2 * C, patch, patch)
            self.linear_out = nn.ConvTranspose3d(C, 3, patch, patch)
        for p in self.parameters():
            if p.ndim >= 4:
                last = torch.channels_last if p.ndim == 4 else torch.channels_last_3d
                p.data = p.data.contiguous(memory_format=last)

    @property
    def last_weight(self) -> nn.Parameter:
        """Give the last layer's weight, whose gradients set the weight of the GAN loss."""
        conv = self.decoder.conv_out
        return conv.temporal.weight if self.cfg.variant == "2.5d" else conv.weight

    def parts(self, T: int, H: int, W: int) -> list[tuple[int, int, int, int]]:
        c, f = self.cfg, self.cfg.space_factor
        return [(c.latent_channels, -(-T // c.time_factor), -(-H // f), -(-W // f))]

    def encode(self, x: Tensor, stream: bool = False) -> Posterior:
        """(B,3,T,H,W) in [-1,1] -> Posterior over (B,C,T',H',W'). H and W that the spatial factor
        does not divide are padded by repeating the last row and column; `decode(..., size=(H, W))`
        crops them back. stream: one frame at a time (section 8). ValueError if x is not a clip."""
        check_clip(x)
        x = x.to(self.last_weight.dtype)
        H, W, f = *x.shape[-2:], self.cfg.space_factor
        if H % f or W % f:
            x = F.pad(x, (0, -W % f, 0, -H % f, 0, 0), mode="replicate")
        moments = encode_stream(self.encoder, x) if stream else self.encoder(x)
        if self.cfg.shortcut:
            more = -x.shape[2] % self.cfg.time_factor
            moments = moments + self.linear_in(F.pad(x, (0, 0, 0, 0, 0, more), mode="replicate"))
        mean, logvar = moments.float().chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor, num_frames: int | None = None,
               size: tuple[int, int] | None = None, stream: bool = False) -> Tensor:
        """(B,C,T',H',W') -> (B,3,T,H,W). The decoder makes T' * (time factor) frames, of which the
        first `num_frames` are kept [MG]: so an image costs as much as (time factor) frames. With
        `stream` later frames are not computed. `size` (H, W) crops what `encode` padded."""
        z = z.to(self.last_weight.dtype)                # a Posterior is fp32, whatever the model is
        if stream:
            x = decode_stream(self.decoder, z, num_frames)
        else:
            x = self.decoder(z)[:, :, :num_frames]
        if self.cfg.shortcut:
            used = max(1, -(-x.shape[2] // self.cfg.time_factor))
            x = x + self.linear_out(z[:, :, :used])[:, :, : x.shape[2]]
        return x if size is None else x[..., : size[0], : size[1]]


def inflate(image_tae: TAE, variant: str = "2.5d") -> TAE:
    """Start a video autoencoder from a trained image autoencoder [MG s3.1.1].

    2.5D: spatial weights are copied; temporal convolutions start as the identity and temporal
    attention as zero. So the latent of one frame does not change, the latent of a clip is the image
    latent of every (time factor)-th frame, and all the frames decoded from one latent frame are
    equal. From there, time is learned.
    3D: each 2D kernel becomes the middle slice of a joint one. The latent of one frame does not
    change; in a clip the joint attention mixes the frames from the first step on.
    """
    if image_tae.cfg.variant != "2d":
        raise ValueError(f"inflate: variant {image_tae.cfg.variant}: only 2d can be inflated")
    video = TAE(replace(image_tae.cfg, variant=variant)).to(image_tae.lat_mean)  # dtype, device
    state = video.state_dict()
    for name, w in image_tae.state_dict().items():
        if name == "linear_in.weight":      # an image is a patch's first frame
            w = F.pad(w, (0, 0, 0, 0, 0, state[name].shape[2] - 1))
        state[name].copy_(centre_slice(w) if w.ndim < state[name].ndim else w)
    return video


# ---- 6. VidTwin ----------------------------------------------------------------------------------
# Two latents [VT] of features z, the paper's letter for E(x). Structure z_S keeps the grid of
# places, but sees time only through n_q learned queries: content and its global movement. Dynamics
# z_D keeps every frame, but only the mean of each row and of each column: fine detail and fast
# movement.
#
#   z = E(x)             --> Q-Former over time, n_q queries for T frames --> convs --> z_S
#   (B,D,T,h,w)                                                      (B,d_S,n_q,h',w')
#                            .--> mean over height --> columns (T,w') --.
#                --> convs --+                                          +--> head --> z_D
#                            '--> mean over width  --> rows    (T,h') --'   (B,d_D,1,T,w'+h')
#
#   u_S(z_S) + u_Dh(columns of z_D) + u_Dw(rows of z_D) --> decoder --> x
#
# Three branches u bring the latents back to the full grid (B,D,T,h,w), where they are summed. So a
# latent can be decoded alone, and the structure of one clip with the dynamics of another.


class TokenAttention(nn.Module):
    """Attend over the last axis but one of x (..., n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        return self.out(attend(*self.qkv(x).chunk(3, -1), self.heads, causal))


class STBlock(nn.Module):
    """Apply attention within each frame, causal attention along time, and an MLP [VT D.1]. Norms
    have no weights: a learned table gives shift, scale and gate (none in time), as in a DiT without
    a timestep."""

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
        """x (B, T, N, D); `when` (T, D): positions in time, which only the first block adds."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.table
        x = x + gate1 * self.space(self.norm(x) * (1 + scale1) + shift1)
        h = rearrange(x, "b t n d -> b n t d")
        h = self.time(h if when is None else h + when, causal=True)
        x = x + rearrange(h, "b n t d -> b t n d")
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


def sincos(n: int, width: int) -> Tensor:
    """Make fixed position embeddings (n, width): sines, then cosines."""
    angle = torch.arange(n)[:, None] * 1e4 ** (-torch.arange(width // 2) / (width / 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


class STTransformer(nn.Module):
    """Apply `depth` blocks to tokens (B, T, N, D): the backbone of encoder and of decoder."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        self.cfg = cfg
        self.blocks = nn.ModuleList(STBlock(cfg.width, cfg.heads) for _ in range(cfg.depth))
        row = sincos(cfg.grid, cfg.width // 2)
        where = torch.cat([repeat(row, "h d -> (h w) d", w=cfg.grid),
                           repeat(row, "w d -> (h w) d", h=cfg.grid)], 1)
        self.register_buffer("where", where)                                # (N, D)
        self.register_buffer("when", sincos(cfg.frames, cfg.width))         # (T, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.where
        for i, block in enumerate(self.blocks):
            when = self.when if i == 0 else None
            if self.cfg.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, when, use_reentrant=False)
            else:
                x = block(x, when)
        return x


class QFormer(nn.Module):
    """Let n_q learned queries look at the T frames of one place: (B, T, D) -> (B, n_q, d_q)
    [VT 3.2.1].

    Places are in the batch axis, so all places share the queries. Norms come after the
    additions, as in BERT and BLIP-2. Positions in time are not added: the order of the frames is
    known only from what the backbone has written into z."""

    def __init__(self, cfg: VidTwinConfig):
        super().__init__()
        w = cfg.query_width
        self.heads = cfg.query_heads
        self.queries = nn.Parameter(torch.randn(cfg.queries, w) * 0.02)
        self.norm = nn.LayerNorm(w)
        self.layers = nn.ModuleList()
        for i in range(cfg.query_layers):
            layer = {"self": TokenAttention(w, cfg.query_heads), "norm1": nn.LayerNorm(w)}
            if i % 2 == 0:          # as in BLIP-2
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
                h = attend(layer["q"](x), *layer["kv"](z).chunk(2, -1), self.heads)
                x = layer["norm2"](x + layer["out"](h))
            x = layer["norm3"](x + layer["mlp"](x))
        return x


def halvings(channels: list[int]) -> list[nn.Module]:
    """Make strided 3x3 convolutions with ReLU from channels[0] to channels[-1]."""
    return [m for cin, cout in zip(channels[:-1], channels[1:])
            for m in (nn.Conv2d(cin, cout, 3, 2, 1), nn.ReLU())]


class StructureEncoder(nn.Module):
    """Map z (B, D, T, h, w) to mean and logvar of z_S (B, 2 d_S, n_q, h', w')."""

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
    """Map z (B, D, T, h, w) to mean and logvar of z_D (B, 2 d_D, 1, T, w' + h'): columns (averaged
    over height), then along the same axis rows (averaged over width) [VT 3.2.2]."""

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
    """Map z_S (B, d_S, n_q, h', w') to u_S (B, D, T, h, w) [VT 3.3]."""

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
        at = (u.shape[-1] - n) // 2                                          # e.g. 8, cropped to 7
        u = F.relu(self.widen(rearrange(u[..., at : at + n, at : at + n],
                                        "(b n) c h w -> b h w n c", b=B)))      # (B, h, w, n_q, D)
        u = F.relu(self.frames(rearrange(u, "b h w n d -> b h w d n")))         # (B, h, w, D, T)
        return rearrange(u, "b h w d t -> b d t h w")


class DynamicsBranch(nn.Module):
    """Map the columns or the rows of z_D (B, d_D, T, n') to (B, D, T, n). The caller repeats the
    result along the other axis."""

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
    """VidTwin [VT s3]: structure and dynamics. Clips have one size, that of the config; z is flat
    (B, n): z_S (d_S, n_q, h', w'), then z_D (d_D, 1, T, w' + h')."""

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
        # Kaiming initialisation between the backbones (ours). torch's own has a gain of 1 / sqrt(3)
        # per layer, which cost 1.5 dB after 100 toy steps.
        for part in (self.structure_encoder.convs, self.dynamics_encoder, self.structure,
                     self.columns, self.rows):
            for m in part.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                    nn.init.zeros_(m.bias)
        for head in (self.structure_encoder.convs[-1], self.dynamics_encoder.head):
            nn.init.constant_(head.bias[len(head.bias) // 2 :], -6.0)   # noise starts near std e^-3

    @property
    def last_weight(self) -> nn.Parameter:
        return self.out.weight

    def parts(self, T: int, H: int, W: int) -> list[tuple[int, int, int, int]]:
        c = self.cfg
        if (c.frames, c.size, c.size) != (T, H, W):
            raise ValueError(f"clip of {T} x {H} x {W}: this VidTwin takes {c.frames} x {c.size} x "
                             f"{c.size} and nothing else")
        s, d = c.after(c.structure_down), c.after(c.dynamics_down)
        return [(c.structure_channels, c.queries, s, s), (c.dynamics_channels, 1, c.frames, 2 * d)]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Give the shapes of z_S and z_D."""
        return self.parts(self.cfg.frames, self.cfg.size, self.cfg.size)

    def split(self, z: Tensor) -> list[Tensor]:
        parts = z.split([math.prod(s) for s in self.shapes], 1)
        return [p.reshape(-1, *s) for p, s in zip(parts, self.shapes)]

    def expand(self, per_channel: Tensor) -> Tensor:
        parts = zip(per_channel.split([s[0] for s in self.shapes]), self.shapes)
        return torch.cat([p.repeat_interleave(math.prod(s[1:])) for p, s in parts])

    def encode(self, x: Tensor, stream: bool = False) -> Posterior:
        """(B,3,T,H,W) in [-1,1] -> Posterior over (B, n). `stream` changes nothing: all clips have
        one size, so memory is bounded anyway. ValueError for another T, H or W."""
        check_clip(x)
        self.parts(*x.shape[2:])
        x = x.to(self.last_weight.dtype)
        p = self.cfg.patch
        h = self.embed(rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p))
        z = rearrange(self.encoder(h), "b t (h w) d -> b d t h w", h=self.cfg.grid)
        halves = [m.float().chunk(2, 1) for m in (self.structure_encoder(z),
                                                  self.dynamics_encoder(z))]
        mean, logvar = (torch.cat([p.flatten(1) for p in kind], 1) for kind in zip(*halves))
        return Posterior(mean, logvar.clamp(-30, 20))

    def branches(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring z (B, n) back to the grid: u_S, u_Dh (constant along height) and u_Dw (constant
        along width), each (B, D, T, h, w)."""
        s, d = self.split(z)
        n = self.cfg.grid
        columns, rows = d[:, :, 0].chunk(2, -1)                              # (B, d_D, T, w' or h')
        return (self.structure(s), repeat(self.columns(columns), "b d t w -> b d t h w", h=n),
                repeat(self.rows(rows), "b d t h -> b d t h w", w=n))

    def decode(self, z: Tensor, num_frames: int | None = None, size: tuple[int, int] | None = None,
               stream: bool = False, only: str = "") -> Tensor:
        """(B, n) -> (B,3,T,H,W); only="structure" or "dynamics" leaves the other latent out. Clips
        have one size: num_frames, size and stream change nothing."""
        if only not in ("", "structure", "dynamics"):
            raise ValueError(f"only {only}: not one of structure, dynamics")
        s, dh, dw = self.branches(z.to(self.last_weight.dtype))
        u = s if only == "structure" else dh + dw if only == "dynamics" else s + dh + dw
        h = self.decoder(rearrange(u, "b d t h w -> b t (h w) d"))
        shift, scale = self.table
        h = self.out(self.norm(h) * (1 + scale) + shift)
        p = self.cfg.patch
        return rearrange(h, "b t (h w) (c p q) -> b c t (h p) (w q)", h=self.cfg.grid, p=p, q=p)


def autoencoder(cfg: TAEConfig | VidTwinConfig) -> Autoencoder:
    """Make the model of a config."""
    return VidTwin(cfg) if isinstance(cfg, VidTwinConfig) else TAE(cfg)


# ---- 7. Losses -----------------------------------------------------------------------------------


def outlier_penalty(mean: Tensor, r: float = 3.0) -> Tensor:
    """Penalise latent outliers [MG s3.1.1]: the mean over positions of
    max(||X_ij - Mean(X)|| - r ||Std(X)||, 0), with norms over channels, Mean and Std over the
    positions of a frame.

    Without it the encoder stores global information at a few positions of very high norm, which
    decode to spots. On Gaussian latents the distance is sqrt(C) and the threshold r sqrt(C), so
    nothing is penalised; a scalar Std in place of the norm would penalise nearly everything.
    (B, C, T, H, W) -> scalar. Zero for frames of fewer than 16 positions, too few for a std (up to
    10 no distance can exceed the threshold at r = 3), and for VidTwin's flat latents.
    """
    if mean.ndim != 5 or mean.shape[-2] * mean.shape[-1] < 16:
        return mean.new_zeros(())
    x = mean.float()
    # Both are detached. Otherwise the encoder could lower the loss by spreading the inliers, which
    # raises the threshold.
    m = x.mean((-2, -1), keepdim=True).detach()
    s = x.std((-2, -1), keepdim=True, unbiased=False).detach()
    return F.relu((x - m).norm(dim=1) - r * s.norm(dim=1)).mean()               # over (B, T, H, W)


class PatchDiscriminator(nn.Module):
    """Judge patches of frames [PatchGAN]: (B, 3, T, H, W) -> logits (B T, 1, H', W'). It has no
    BatchNorm, which would mix the clips of a batch and fail on a batch of one."""

    def __init__(self, width: int = 64):
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for stride in (2, 2, 1):
            modules += [nn.Conv2d(width, 2 * width, 4, stride, 1), FrameNorm(2 * width),
                        nn.LeakyReLU(0.2)]
            width = 2 * width
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layers[0].weight.dtype)           # clips and reconstructions are fp32
        return self.layers(rearrange(x, "b c t h w -> (b t) c h w"))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Give the discriminator's loss: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 [VQ]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vgg_perceptual() -> Callable[[Tensor, Tensor], Tensor]:
    """Make a distance of clips: LPIPS with equal weights, on VGG16's features after five stages,
    each of unit length at each position. Downloads torchvision's VGG16; ValueError if that fails.
    """
    try:
        from torchvision.models import VGG16_Weights, vgg16
        net = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.eval().requires_grad_(False)
    except Exception as error:      # no compiled operators, no network or no disk
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"perceptual: needs torchvision's VGG16 weights ({line})") from None
    stages = [net[a:b] for a, b in itertools.pairwise((0, 4, 9, 16, 23, 30))]
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        both = rearrange(torch.cat([x, y]), "b c t h w -> (b t) c h w") / 2 + 0.5
        h, total = (both.float() - mean.to(x.device)) / std.to(x.device), 0.0
        net.to(x.device)
        for stage in stages:
            h = stage(h)
            a, b = F.normalize(h, dim=1).chunk(2)
            total = total + (a - b).square().sum(1).mean()
        return total

    return distance


class Objective(nn.Module):
    """Compute the training loss of an autoencoder and, where the GAN weight is not 0, of its
    discriminator: reconstruction + KL [LDM] + outlier penalty [MG] + GAN loss [VQ].

    One backward pass serves both. The reconstruction is judged with the discriminator held fixed,
    and the discriminator learns from the detached reconstruction, so neither gets the other's
    gradient. The GAN loss is weighted by gan * clamp(||d rec|| / (||d adv|| + 1e-4), 0, 1e4), the
    gradients at `last_weight` [VQ], so that it cannot outweigh the reconstruction."""

    def __init__(self, tae: Autoencoder, cfg: LossConfig, perceptual: Callable | None = None):
        super().__init__()
        if cfg.perceptual and perceptual is None:
            raise ValueError(f"perceptual {cfg.perceptual}: needs a distance: vgg_perceptual()")
        self.tae, self.cfg, self.perceptual = tae, cfg, perceptual
        self.discriminator = PatchDiscriminator() if cfg.gan else None

    def forward(self, x: Tensor, step: int = 0, generator: torch.Generator | None = None) -> Tensor:
        cfg, (recon, posterior) = self.cfg, self.tae(x, generator)
        recon = recon.float()
        d = recon - x
        rec = cfg.l1 * d.abs().mean() + cfg.l2 * d.square().mean()
        if cfg.perceptual:
            rec = rec + cfg.perceptual * self.perceptual(recon, x)
        loss = rec + cfg.kl * posterior.kl()
        if cfg.opl and step >= cfg.opl_start:
            loss = loss + cfg.opl * outlier_penalty(posterior.mean, cfg.opl_r)
        if self.discriminator is None:
            return loss
        if step < cfg.gan_start:            # idle; but DDP needs every gradient, here 0
            return loss + 0 * sum(p.sum() for p in self.discriminator.parameters())
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(recon).mean()
        self.discriminator.requires_grad_(True)
        if torch.is_grad_enabled():
            d_rec, d_adv = (
                torch.autograd.grad(term, self.tae.last_weight, retain_graph=True)[0].norm()
                for term in (rec, adversarial))
            adversarial = (d_rec / (d_adv + 1e-4)).clamp(0, 1e4) * adversarial
        return (loss + cfg.gan * adversarial
                + hinge(self.discriminator(x), self.discriminator(recon.detach())))


def is_image_step(step: int) -> bool:
    """Tell whether a step trains on images: one batch of images for three of video [MG]."""
    return step % 4 == 0


# ---- 8. Long clips in bounded memory -------------------------------------------------------------
# For 256 frames of 768 x 768, one tensor of the first level takes 36 GiB in bf16.
#
# Tiles [MG]: time is cut into tiles of 32 frames, without overlap in the encoder, with 16 frames of
# overlap in the decoder, blended linearly. A tile does not see its neighbours, so the result is not
# that of the whole clip: train on clips as long as a tile.


@torch.no_grad()
def encode_tiled(tae: TAE, x: Tensor, frames: int = 32) -> Posterior:
    """Encode x (B,3,T,H,W) in tiles of `frames` frames, a multiple of the time factor."""
    if frames < 1 or frames % tae.cfg.time_factor:
        raise ValueError(f"frames {frames}: must be a multiple of {tae.cfg.time_factor}")
    tiles = [tae.encode(part) for part in x.split(frames, 2)]
    return Posterior(torch.cat([p.mean for p in tiles], 2), torch.cat([p.logvar for p in tiles], 2))


@torch.no_grad()
def decode_tiled(tae: TAE, z: Tensor, num_frames: int | None = None,
                 size: tuple[int, int] | None = None, frames: int = 32,
                 overlap: int = 16) -> Tensor:
    """Decode z (B,C,T',H',W') in tiles of `frames` frames, each of which shares `overlap` frames
    with the tile before it. Both are multiples of the time factor, the overlap at most half of the
    tile. Shared frame k of n is w new + (1 - w) old, with w = (k + 1/2) / n."""
    f = tae.cfg.time_factor
    if frames < 1 or frames % f or overlap % f or not 0 <= 2 * overlap <= frames:
        raise ValueError(f"frames {frames}, overlap {overlap}: must be multiples of {f}, "
                         "the overlap at most half")
    w = ((torch.arange(overlap) + 0.5) / max(1, overlap))[:, None, None].to(z)
    out = None
    for start in range(0, max(1, z.shape[2] - overlap // f), (frames - overlap) // f):
        new, at = tae.decode(z[:, :, start : start + frames // f], size=size), start * f
        if out is None:
            out = new.new_empty(*new.shape[:2], z.shape[2] * f, *new.shape[3:])
        else:
            new[:, :, :overlap] = w * new[:, :, :overlap] + (1 - w) * out[:, :, at : at + overlap]
        out[:, :, at : at + new.shape[2]] = new
    return out[:, :, :num_frames]


# Streaming (ours) gives the same result as the whole clip, up to rounding. Frames pass one by one;
# a temporal convolution needs the next frame, so its output is one frame late. Written as
# iterators, all layers fit into one function, and each holds a few frames. Only the attention in
# the middle needs all frames, but there they are small.


def windows(frames: Iterable[Tensor], stride: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the three frames that a kernel of 3 sees, edges repeated: (0, 0, 1), (0, 1, 2), ...
    (n - 2, n - 1, n - 1); of these, every stride-th."""
    frames = iter(frames)
    past = now = next(frames)
    for i in itertools.count():
        after = next(frames, None)
        last = now if after is None else after
        if i % stride == 0:     # advance first, or `past` would stay while the caller works
            yield past, (past := now), (now := last)
        else:
            past, now = now, last
        if after is None:
            return


def stream(layer: nn.Module, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Apply a layer to frames (B, C, H, W) that arrive one after the other. Why `map`: a generator
    expression would hold on to its last frame."""
    if isinstance(layer, nn.ModuleList):
        for each in layer:
            frames = stream(each, frames)
        return frames
    if isinstance(layer, Conv25D):
        return stream(layer.temporal, map(partial(Conv2D.forward, layer), frames))
    if isinstance(layer, TemporalConv):
        weight = rearrange(layer.weight, "o i k -> o (k i)")

        def one(window):            # one matrix product, the three frames side by side
            x = torch.cat([x.movedim(1, 3) for x in window], 3)
            return F.linear(x, weight, layer.bias).movedim(3, 1)

        return map(one, windows(frames, layer.stride))
    if isinstance(layer, Conv3D):
        joint = lambda window: fold(layer.unpadded(torch.stack(window, 2)))
        return map(joint, windows(frames, layer.stride[0]))
    if isinstance(layer, ResBlock):
        skipped: deque[Tensor] = deque()

        def leave(x):               # x waits for h, which is two frames late
            skipped.append(x)
            return layer.norm1(x)

        def meet(h):
            return layer.skip(skipped.popleft()) + h

        h = stream(layer.conv1, map(leave, frames))
        return map(meet, stream(layer.conv2, map(layer.norm2, h)))
    if isinstance(layer, Resample):
        conv = layer.conv
        if layer.up and layer.space_stride == 2:
            frames = map(partial(F.interpolate, scale_factor=2.0), frames)
        if isinstance(conv, Conv25D):
            frames, conv = map(partial(Conv2D.forward, conv), frames), conv.temporal
        if layer.up and layer.time_stride == 2:
            frames = (x for x in frames for _ in range(2))
        return stream(conv, frames) if conv else frames
    return map(layer, frames)               # Conv2D: each frame alone


def encode_stream(encoder: Encoder, x: Tensor) -> Tensor:
    """Do what Encoder.forward does, frame by frame up to the middle."""
    s = encoder.cfg.stem
    frames = (rearrange(frame, "b c (h p) (w q) -> b (c p q) h w", p=s, q=s)
              .contiguous(memory_format=torch.channels_last) for frame in x.unbind(2))
    frames = list(stream(encoder.levels, stream(encoder.conv_in, frames)))
    h, T = fold(torch.stack(frames, 2)), len(frames)
    h = encoder.conv_out(encoder.norm_out(encoder.middle(h, T)), T)
    return rearrange(h, "(b t) c h w -> b c t h w", t=T)


def decode_stream(decoder: Decoder, z: Tensor, num_frames: int | None = None) -> Tensor:
    """Do what Decoder.forward does, frame by frame after the middle. It stops after
    `num_frames` frames; layers run ahead only as they must."""
    T, s, f = z.shape[2], decoder.cfg.stem, decoder.cfg.space_factor
    n = T * decoder.cfg.time_factor
    n = n if num_frames is None else min(num_frames, n)
    out = z.new_empty(len(z), 3, n, z.shape[3] * f, z.shape[4] * f)
    h = decoder.middle(decoder.conv_in(fold(z), T), T)
    frames = stream(decoder.levels, rearrange(h, "(b t) c h w -> t b c h w", t=T))
    frames = stream(decoder.conv_out, map(decoder.norm_out, frames))
    for t, x in zip(range(n), frames):
        out[:, :, t] = rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=s, q=s)
    return out


# ---- 9. Measures and statistics ------------------------------------------------------------------


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio in dB of clips (B, 3, T, H, W) in [-1, 1] -> (B,), the
    mean over frames. Identical frames count as 80 dB."""
    x, y = (v if v.dtype == torch.float64 else v.float() for v in (x, y))
    d = (x.clamp(-1, 1) - y.clamp(-1, 1)) / 2                       # of values in [0, 1]
    return (-10 * d.square().mean((1, 3, 4)).clamp_min(1e-8).log10()).mean(1)


@torch.no_grad()
def latent_stats(tae: Autoencoder, posteriors: Iterable[Posterior]) -> tuple[Tensor, Tensor]:
    """Measure mean and std (C,) of each channel under the posteriors, summed in float64.

    Why: the flow mixes latents with unit noise, so their scale sets the signal-to-noise ratio at
    each time t."""
    sums = torch.zeros(3, len(tae.lat_mean), dtype=torch.float64)
    for posterior in posteriors:
        mean, var = posterior.mean.double(), posterior.logvar.double().exp()
        parts = zip(*(tae.split(v.cpu()) for v in (mean, mean.square() + var)))
        sums += torch.cat([torch.stack([torch.ones_like(m), m, s]).sum((1, 3, 4, 5))
                           for m, s in parts], 1)
    n, total, square = sums
    mean = total / n
    return mean.float(), (square / n - mean**2).clamp_min(1e-12).sqrt().float()


# ---- 10. Demo ------------------------------------------------------------------------------------


def moving_squares(n: int, T: int, seed: int, H: int = 32) -> Tensor:
    """Draw n clips (n, 3, T, H, H) of three coloured squares that bounce off the edges."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda channels=1: torch.rand(n, channels, 1, 1, 1, generator=g)
    t, place = torch.arange(T).view(T, 1, 1), torch.arange(H) + 0.5
    x = (0.15 * rand()).expand(n, 3, T, H, H)                                   # the background
    for _ in range(3):
        radius, color, cover = 3 + 4 * rand(), rand(3), 1.0
        for axis in (place.view(1, H), place.view(H, 1)):
            way = (2 * rand() * H + (2 * rand() - 1) * t) % (2 * H)         # up to 1 pixel a frame
            centre = H - (way - H).abs()                                    # there and back
            cover = cover * (radius + 0.5 - (axis - centre).abs()).clamp(0, 1)      # soft edges
        x = x + cover * (color - x)
    return 2 * x - 1


def train(tae: TAE, steps: int, seed: int) -> TAE:
    """Train a toy autoencoder: an image autoencoder on frames, a video autoencoder on windows of 8
    frames and, every fourth step, on images."""
    from tqdm import trange

    objective = Objective(tae.train(), LossConfig(l1=0.0, l2=4.0, kl=1e-3))
    opt = torch.optim.AdamW(tae.parameters(), 1e-3, (0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(        # warm-up, cosine
        opt, lambda i: min(1, (i + 1) / 20) * (1 + math.cos(math.pi * i / steps)) / 2)
    for step in trange(steps, desc=f"{tae.cfg.variant:5}", unit="step"):
        x = moving_squares(8, 16, seed + step)
        if tae.cfg.variant == "2d":
            x = rearrange(x[:, :, ::4], "b c t h w -> (b t) c 1 h w")
        else:
            x = x[:, :, :1] if is_image_step(step) else x[:, :, step % 9 : step % 9 + 8]
        opt.zero_grad()
        objective(x).backward()
        nn.utils.clip_grad_norm_(tae.parameters(), 1.0)
        opt.step()
        rate.step()
    return tae.eval()


def draw(out: Path, x: Tensor, recon: Tensor) -> None:
    """Draw reconstruction.png: every second frame of four clips, the reconstruction below each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(8, 1, figsize=(10, 6.2))
    for i, ax in enumerate(axes):
        clip = (recon if i % 2 else x)[i // 2, :, ::2].clamp(-1, 1) / 2 + 0.5
        ax.imshow(rearrange(clip, "c t h w -> h (t w) c").numpy())
        ax.set_axis_off()
        ax.set_title("reconstruction" if i % 2 else "every second frame", fontsize=7, pad=2)
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "reconstruction.png", dpi=130)
    plt.close(figure)
    print(f"wrote {out / 'reconstruction.png'}")


def demo(out: Path, seed: int = 0) -> bool:
    """Train an image autoencoder, inflate it and train on; draw reconstructions and check
    this file's claims on convolution, inflation, training and streaming."""
    torch.manual_seed(seed)
    image = train(TAE(replace(PRESETS["toy"], variant="2d")), 100, 1000 * seed)
    inflated = inflate(image).eval()
    tae = train(inflate(image), 180, 1000 * seed + 100)
    x, long = moving_squares(32, 16, 1000 * seed + 900), moving_squares(1, 96, 1000 * seed + 901)
    with torch.no_grad():
        conv = Conv25D(3, 4)
        nn.init.normal_(conv.temporal.weight)
        nn.init.zeros_(conv.bias)
        folded = rearrange(conv(fold(x), 16), "(b t) c h w -> b c t h w", t=16)
        plain = conv_2_5d(x, conv.weight, conv.temporal.weight)
        first = inflated.encode(x[:, :, :1]).mean - image.encode(x[:, :, :1]).mean
        before, recon = inflated(x)[0], tae(x)[0]
        z = tae.encode(long).mean
        whole, tiled = tae.decode(z), decode_tiled(tae, encode_tiled(tae, long).mean)
        streamed = tae.decode(tae.encode(long, stream=True).mean, stream=True)
    draw(out, x, recon)
    before, after = (psnr(y, x).mean().item() for y in (before, recon))
    print(f"reconstruction: {before:.1f} dB inflated, {after:.1f} dB trained")
    print(f"96 frames in tiles of 32: {psnr(tiled, whole).item():.1f} dB against the whole clip")
    ok = True
    for claim, value, bound in (
            ("Conv25D of folded frames and conv_2_5d differ by", (folded - plain).abs().max(),
             1e-4),
            ("inflation changes image latents by", first.abs().max(), 1e-5),
            ("streaming changes 96 frames by", (streamed - whole).abs().max(), 1e-4),
            ("dB of the inflated model, at least 2 below the trained one", before, after - 2)):
        ok &= bool(value <= bound)
        print(f"{'PASS' if value <= bound else 'FAIL'} {claim}: {value:.3g} vs <= {bound:.3g}")
    return ok


def main() -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="The temporal autoencoders on moving squares.",
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"tae.py: {message}\n")       # one line, no usage
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips")
    parser.add_argument("--out", type=Path, default=Path("out/tae"), help="folder of the figure")
    args = parser.parse_args()
    if not 0 <= args.seed < 10**9:
        parser.error(f"--seed {args.seed}: must be 0 to 999999999")
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
