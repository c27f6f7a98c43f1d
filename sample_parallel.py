r"""One prompt, many ranks, the same clip: xDiT's parallel modes for a video DiT.

        cfg 0: the prompt (cfg 1: the null text, on ranks that are arranged in the same way)
         pp 0: first half of the blocks     pp 1: second half
        .-----------------------------.    .-----------------------------.
        | tokens of patch m           | h  | tokens of patch m - 1       |-> v, gathered over cfg,
        |  .- ring 0 -. .- ring 1 -.  |--->|  .- ring 0 -. .- ring 1 -.  |   guided, Euler step of
        |  | u 0  u 1 | | u 0  u 1 |  |    |  | u 0  u 1 | | u 0  u 1 |  |   patch, back to pp 0
        '-----------------------------'    '-----------------------------'
      CFG-parallel   prompt, null text on two groups; all-gather of v each step or patch [XD]
      PipeFusion     blocks on stages, patches flow through; K, V of later patches are stale [PF]
      Ring           tokens on ranks; K and V travel round the ring [RA]
      Ulysses        tokens on ranks; inside attention, heads on ranks [UL]
      parallel VAE   rows of the picture on ranks, to decode the clip [XD]

The model stays as it is and knows nothing about ranks. Only self-attention mixes tokens, so
replacing `block.attend(q, k, v)` is enough. The callables nest:
    Ulysses( StaleKV( Ring or plain attention ) )
What is left is a schedule: who works on which tokens when. `emulate`, right below, is the whole
algorithm in one process, without ranks; many ranks must produce what it produces.

Papers.  [XD] xDiT, arXiv 2411.01738.  [PF] PipeFusion, 2405.14430.  [DF] DistriFusion, 2402.19481.
[UL] DeepSpeed-Ulysses, 2309.14509.  [RA] Ring Attention, 2310.01889.  [USP] Ulysses x Ring,
2405.07719.  [FA] FlashAttention, 2205.14135 (the online softmax).

Contract.  ParallelSampler(model, mesh).sample(x0, text, mask, null, null_mask, guidance, steps)
    x0 (B, ...) noise, fp32; text (B, L, D_text), in the model's precision; mask (B, L) bool, True =
    attend -> x1 like x0, on every rank. Inputs are broadcast from rank 0, so a different seed on
    another rank cannot turn the clip into noise.
    model: any with these methods (its seams); those on tokens must accept any part of the tokens
        patchify(x) -> (B,N,P)      positions(x.shape) -> (N,D)      condition(t (b,)) -> c
        embed(tokens) -> h (b,n,D)  blocks[i](h, pos, c, text, mask) -> h      head(h, c) -> (B,n,P)
        blocks[i].attend(q, k, v), its self-attention, each (B, heads, n, head_dim): replaceable
        unpatchify(tokens, x.shape) -> x        optional: token_mask(x.shape) -> (N,P) bool or None
    and with parameters(); `sample_every` also reads cfg.heads

Run.   python sample_parallel.py       # every mode on a tiny model, and a time line   (25 s)
       torchrun --nproc_per_node 4 sample_parallel.py --workdir runs/toy \
           --prompt "a red circle moving left" --cfg 2 --ulysses 2 --check    # (25 s to launch)

Which mode.  CFG-parallel first, it is nearly free. Then Ulysses inside a node with fast links,
PipeFusion across slow ones (its traffic does not grow with depth, and a rank needs only its own
blocks), Ring where Ulysses runs out of heads. Section 8 counts the bytes.

Differences from the paper.
    - PipeFusion for video. xDiT has it for image models only. For Wan: pds-amd/xDiT, Raylight, pull
      requests to vLLM-Omni (6098) and ChituDiffusion (no. 3: banding, no steady speed-up). Patches
      are bands of frames here by default (--patch-axis), bands of rows in xDiT.
    - Uneven shares everywhere (tokens, heads, patches, blocks), and no padding, since padding would
      be attended to. xDiT and Wan require divisibility, diffusers by default.
    - At least one warm-up step, which is xDiT's default. xDiT also allows none: its first step then
      attends to K, V that a dummy run has left in the cache.
    - Euler only: with two evaluations a step, "the previous step's K, V" would be half a step old.
    - No tensor parallelism (PipeFusion divides the weights), no data parallelism.

Letters.  B samples, b entries of a batch (2B with guidance, B with cfg 2); N video tokens, n those
of a rank or a patch; P numbers in a token; D width; M patches; S steps; W warm-up steps (in section
7 width); U, R Ulysses and Ring degrees; H, d heads and their width (in section 7 H: height); L text
tokens; t flow time.
"""
import argparse
import itertools
import math
import os
import sys
import tempfile
import time
import types
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes
from torch.overrides import TorchFunctionMode

attention = F.scaled_dot_product_attention


# ---- 1. The idea: every mode in one process ------------------------------------------------------
@torch.no_grad()
def emulate(mode, model, x0, text, mask=None, null=None, null_mask=None, guidance=1.0, steps=50,
            ts=None, patches=1, warmup=1, patch_axis="t"):
    """Sample x1 like x0 in one process, with the K, V that the ranks of `mode` see:

        exact          all tokens at once: the clip of CFG-parallel, Ulysses, Ring and their hybrids
        pipefusion     patch m sees this step's K, V of patches 0..m, the last step's of the others
        distrifusion   each patch sees this step's K, V of itself, the last step's of all others
        no_exchange    after the warm-up each patch sees only itself, as tiles do
    (Which K, V are fresh is as in the code of [XD] and [DF]. Only `emulate` has the last two.)

    The number of pipeline stages does not occur here: dividing the *blocks* among ranks changes who
    computes, not what is computed. ParallelSampler is tested against this function."""
    one_of("mode", mode, ("exact", "pipefusion", "distrifusion", "no_exchange"))
    if mode in ("pipefusion", "distrifusion") and warmup < 1:
        raise ValueError(f"warmup {warmup}: patches need the K, V of at least one whole step")
    ts = (torch.linspace(0, 1, steps + 1) if ts is None else ts).to(x0.device)          # (S + 1,)
    text, mask = both_branches(len(x0), text, mask, null, null_mask)               # (b, L, D_text)
    b, dtype = len(text), next(model.parameters()).dtype
    order = token_order(model, x0.shape, patch_axis, x0.device)                         # (N,)
    x = model.patchify(x0.float())[:, order]                       # (B, N, P): the state of the ODE
    pos, real = model.positions(x0.shape)[order], data_columns(model, x0.shape, order)
    everything = slice(None)
    old, new = {}, {}                        # block -> its K, V of the last step, and of this step

    def attend(block, q, k, v):                         # `part`: set by the loop below
        if mode in ("exact", "no_exchange"):            # all tokens given see each other
            return attention(q, k, v)
        if part == everything:                          # warm-up: nothing is stale
            new[block] = torch.stack((k, v))
            return attention(q, k, v)
        new[block][..., part, :] = torch.stack((k, v))
        if mode == "pipefusion":                        # of later patches: the last step's
            return attention(q, *new[block])
        seen = old[block].clone()
        seen[..., part, :] = new[block][..., part, :]
        return attention(q, *seen)

    with swapped_attention({block: partial(attend, block) for block in model.blocks}):
        for i in range(len(ts) - 1):
            c, whole = model.condition(ts[i].expand(b)), mode == "exact" or i < warmup
            for part in [everything] if whole else spans(split(x.shape[1], patches)):
                h = model.embed(torch.cat([x[:, part]] * (b // len(x))).to(dtype))      # (b, n, D)
                for block in model.blocks:
                    h = block(h, pos[part], c, text, mask)
                v = model.head(h, c).float()                                            # (b, n, P)
                v = v if null is None else guide(v, guidance)                           # (B, n, P)
                x[:, part] += (ts[i + 1] - ts[i]) * v * real[part]      # Euler, of these tokens
            if mode == "distrifusion":
                old = {block: kv.clone() for block, kv in new.items()}
    back = torch.empty_like(x)
    back[:, order] = x
    return model.unpatchify(back, x0.shape)


def guide(v, guidance):
    """Guide v (of prompts, then of null texts): v_null + guidance (v_prompt - v_null)."""
    prompt, null = v.chunk(2)
    return null + guidance * (prompt - null)


def both_branches(B, text, mask=None, null=None, null_mask=None):
    """Join prompt and null text in one batch, prompts first: (text (b, L, D_text), mask (b, L)).
    The shorter text is padded with tokens that the mask hides."""
    for m in (mask, null_mask):
        if m is not None and m.dtype != torch.bool:
            raise ValueError(f"mask {m.dtype}: not bool; it would be added to the scores")
    if null is None:
        return text, mask
    L = max(text.shape[1], null.shape[1])
    both = (text, mask), (null.expand(B, *null.shape[-2:]), null_mask)
    if text.shape[1] != null.shape[1] or mask is not None or null_mask is not None:
        ones = lambda x: torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        masks = [ones(x) if m is None else m.expand(x.shape[:2]) for x, m in both]
        mask = torch.cat([F.pad(m, (0, L - m.shape[1])) for m in masks])                # (2B, L)
    return torch.cat([F.pad(x, (0, 0, 0, L - x.shape[1])) for x, _ in both]), mask


def data_columns(model, shape, rows):
    """Mark with 1 the columns that hold data, for the tokens `rows`: (n, P) or (n, 1). If x is
    several flattened latents, a token's other columns belong to other latents: x stays 0 there."""
    mask = model.token_mask(shape) if hasattr(model, "token_mask") else None
    return torch.ones(len(rows), 1, device=rows.device) if mask is None else mask[rows].float()


@contextmanager
def swapped_attention(attends):
    """Replace each block's `attend` by that of {block: callable}, within this context."""
    before = {block: block.attend for block in attends}
    try:
        for block, attend in attends.items():
            block.attend = attend
        yield
    finally:
        for block, attend in before.items():
            block.attend = attend


# ---- 2. Shares -----------------------------------------------------------------------------------
def one_of(name, value, choices):
    """Raise ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


def split(n, parts):
    """Share n things as equally as possible: split(7, 3) = [3, 2, 2]. Every division uses it."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def spans(sizes):
    """Turn sizes [3, 2, 2] into the slices 0:3, 3:5, 5:7."""
    return [slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def token_order(model, shape, axis, device=None):
    """Give the order (N,) that sorts the tokens along `axis` (t, h, w): a band becomes a slice.

    To find their places, patchify a video whose values are coordinates."""
    one_of("patch-axis", axis, ("t", "h", "w"))
    if len(shape) != 5:                     # several flattened latents: they have no common axis
        if axis != "t":
            raise ValueError(f"patch-axis {axis}: only t (the order of the tokens) is possible for "
                             f"x {tuple(shape)}, which is not (B, C, T, H, W)")
        return torch.arange(len(model.positions(shape)), device=device)
    d = "thw".index(axis) + 2
    coordinate = torch.arange(shape[d], device=device, dtype=torch.float32)
    x = coordinate.view([-1 if i == d else 1 for i in range(5)]).expand(1, *shape[1:])
    return model.patchify(x)[0, :, 0].argsort(stable=True)                  # (N,)


class Layout:
    """Say which tokens a rank has: M patches of consecutive tokens, each cut into R x U shares.

    `order` sorts the N tokens so that a patch is a run: for bands of frames it is the model's own
    order, for bands of rows or columns a permutation. Nothing else changes, because positions
    travel with their tokens. A rank holds its share of *every* patch, one after another, during the
    warm-up too: so it owns the same tokens from first to last, and the work on a patch overwrites
    exactly the K, V rows that the warm-up wrote."""

    def __init__(self, order, M=1, R=1, U=1):
        if len(order) < M * R * U:
            raise ValueError(f"patches {M} x ring {R} x ulysses {U}: more shares than the "
                             f"{len(order)} tokens")
        self.order, self.M, self.R, self.U = order, M, R, U
        self.counts = torch.tensor([split(n, R * U) for n in split(len(order), M)]).view(M, R, U)

    def tokens(self, m, r):
        """Count patch m's tokens (None: all) on each Ulysses member of ring rank r."""
        return (self.counts[:, r].sum(0) if m is None else self.counts[m, r]).tolist()

    def cached(self):
        """Count the K, V rows of each ring rank: all patches, all its Ulysses members."""
        return self.counts.sum((0, 2)).tolist()

    def rows(self, r, u):
        """List the model's tokens that rank (r, u) holds, patch after patch: (n,) indices."""
        shares = self.order.split(self.counts.flatten().tolist())           # M x R x U of them
        return torch.cat(shares[r * self.U + u :: self.R * self.U])

    def local(self, m, r, u):
        """Find patch m (None: everything) within the rows of rank (r, u)."""
        return slice(None) if m is None else spans(self.counts[:, r, u].tolist())[m]

    def slot(self, m, r):
        """Find patch m within the K, V cache of ring rank r."""
        return spans(self.counts[:, r].sum(1).tolist())[m]

    def splice(self, r):
        """Give the permutation from the order of a warm-up's all-to-all to that of the cache.

        With PipeFusion x Ulysses a rank needs K, V of all tokens [XD], so it caches those after the
        all-to-all. In a warm-up they come rank after rank, u0: p0 p1 | u1: p0 p1. Later come those
        of one patch, p0: u0 u1, which must replace its own rows. So the cache is kept by patch,
        p0: u0 u1 | p1: u0 u1. In the wrong order a patch overwrites half of itself and half of a
        neighbour, and the clip looks right all the same (0.4 % off on the demo's model, where
        staleness costs 1 %)."""
        patch = torch.arange(self.M).repeat(self.U).repeat_interleave(self.counts[:, r].T.flatten())
        return patch.argsort(stable=True).to(self.order.device)


# ---- 3. Ranks, and what they send ----------------------------------------------------------------
# Outermost to innermost, as in [XD]. Ulysses communicates in every layer, so its ranks are
# neighbours, on the fastest links. CFG and PipeFusion (once a step or patch) may cross nodes.
AXES = ("cfg", "pp", "ring", "ulysses")


@dataclass
class Axis:
    """An axis of the mesh as seen by this rank: the number of ranks, its own index, the group."""
    size: int = 1
    index: int = 0
    group: object = None


def check_degrees(world, cfg=1, pp=1, ring=1, ulysses=1, patches=0, warmup=1, guided=True,
                  depth=None, heads=None, steps=None):
    """Raise ValueError, the same on all ranks, for what cannot work or leaves some of them idle."""
    product = cfg * pp * ring * ulysses
    for wrong, line in (
            *((n < 1, f"{name} {n}: must be 1 or more") for name, n in
              dict(cfg=cfg, pp=pp, ring=ring, ulysses=ulysses, warmup=warmup).items()),
            (cfg > 2, f"cfg {cfg}: not one of 1, 2 (guidance has two branches)"),
            (product != world, f"cfg {cfg} x pp {pp} x ring {ring} x ulysses {ulysses} = {product}"
                               f": not the number of ranks, {world}"),
            (cfg == 2 and not guided, "cfg 2: needs guidance, that is a null text"),
            (patches < 0, f"patches {patches}: must be 1 or more, or 0 for as many as stages"),
            (pp == 1 and patches, f"patches {patches}: needs pp 2 or more (they fill a pipeline)"),
            (0 < patches < pp, f"patches {patches}: fewer than the pp {pp} stages"),
            (steps and warmup > steps, f"warmup {warmup}: more than the {steps} steps"),
            (depth and pp > depth, f"pp {pp}: more stages than the model's {depth} blocks"),
            (heads and ulysses > heads,
             f"ulysses {ulysses}: more ranks than the model's {heads} attention heads")):
        if wrong:
            raise ValueError(line)


def rank_and_world():
    """Give this process's rank and the number of ranks; 0 and 1 without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make_mesh(cfg=1, pp=1, ring=1, ulysses=1, device="cpu"):
    """Make the DeviceMesh (cfg, pp, ring, ulysses) over all ranks; None in a single process.

    torch accepts a mesh smaller than the world and leaves the other ranks out. We do not."""
    check_degrees(rank_and_world()[1], cfg, pp, ring, ulysses)
    if not dist.is_initialized():
        return None
    return init_device_mesh(device, (cfg, pp, ring, ulysses), mesh_dim_names=AXES)


def everyone(value):
    """Gather a list of the values of all ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


SENT = Counter()        # bytes that this rank has sent, by purpose: `traffic` predicts them


def exchange(parts, shapes, axis, what):
    """Exchange tensors of any sizes: parts[u] goes to member u, shapes[u] comes from it.

    The call returns at once, and the first use of a result waits. So exchanges that are started
    together overlap with each other and with compute. The gradient is the exchange back."""
    sizes, counts = [p.numel() for p in parts], [math.prod(s) for s in shapes]
    SENT[what] += (sum(sizes) - sizes[axis.index]) * parts[0].element_size()
    sent = torch.cat([p.reshape(-1) for p in parts])
    got = all_to_all_single_autograd(sent, counts, sizes, axis.group)
    return [g.view(s) for g, s in zip(got.split(counts), shapes)]


def gather(x, sizes, dim, axis, what="gather"):
    """Join the x of all ranks, of `sizes` along dim, on every rank. The gradient of a rank's
    rows is summed over all ranks."""
    shape = lambda n: [*x.shape[:dim], n, *x.shape[dim + 1:]]
    return torch.cat(exchange([x] * axis.size, [shape(n) for n in sizes], axis, what), dim)


# ---- 4. Attention over ranks ---------------------------------------------------------------------
# Each takes q, k, v (b, heads, n, head_dim) after positions and norms, and returns what the model's
# own attention would return for the rows of q. Cross-attention needs no care: every rank has all of
# the text. (Where text and video share one sequence, as in MM-DiT, the text must enter each
# attention exactly once, not once per ring rank.)
class Ulysses:
    """DeepSpeed-Ulysses [UL]: an all-to-all turns (all heads, my tokens) into (my heads, all
    tokens), a second one turns the output back.

    core: the attention inside, over the tokens of all U members: plain, Ring or StaleKV. tokens:
    how many each member has, a list that the schedule may refill between calls. U need not divide
    tokens or heads. Q, K and V travel in one message. The result is that of one process up to
    rounding: a matrix product of fewer rows may sum in another order."""

    def __init__(self, axis, core=attention, tokens=None):
        self.axis, self.core, self.tokens = axis, core, tokens

    def __call__(self, q, k, v):
        q_k_v = torch.cat(self.to_heads(q, k, v), dim=3)             # (3, b, my heads, all n, d)
        o = self.core(*q_k_v)                                        # (b, my heads, all n, d)
        return torch.cat(self.to_tokens(o, q.shape[1]), dim=1)       # (b, all heads, n, d)

    def to_heads(self, q, k, v):
        (b, H, _, d), U = q.shape, self.axis.size
        heads = split(H, U)
        parts = zip(*(x.split(heads, dim=1) for x in (q, k, v)))          # U x 3 x (b, h_u, n, d)
        shapes = [(3, b, heads[self.axis.index], n_u, d) for n_u in self.tokens]
        return exchange([torch.stack(p) for p in parts], shapes, self.axis, "ulysses")

    def to_tokens(self, o, H):
        (b, _, _, d), n = o.shape, self.tokens[self.axis.index]
        shapes = [(b, h_u, n, d) for h_u in split(H, self.axis.size)]
        return exchange(o.split(self.tokens, dim=2), shapes, self.axis, "ulysses")


class UlyssesInPieces:
    """Ulysses on some heads at a time: all pieces are sent at once, and one travels while another
    is computed. (On gloo a blocking exchange cost a third of the step.)"""

    def __init__(self, axis, cores, tokens):
        self.pieces = [Ulysses(axis, core, tokens) for core in cores]

    def __call__(self, q, k, v):
        H, U = q.shape[1], self.pieces[0].axis.size
        heads = [U * n for n in split(H // U, min(len(self.pieces), H // U))]
        heads[-1] += H % U                                  # all but the last divide evenly
        there = [u.to_heads(*qkv) for u, *qkv in
                 zip(self.pieces, *(x.split(heads, dim=1) for x in (q, k, v)))]
        back = [u.to_tokens(u.core(*torch.cat(qkv, dim=3)), h)
                for u, qkv, h in zip(self.pieces, there, heads)]
        return torch.cat(sum(back, []), dim=1)                            # (b, all heads, n, d)


def attention_lse(q, k, v):
    """Attend to some of the keys, and return what a merge with the rest needs:
    o = softmax(q k^T / sqrt(d)) v  and  lse = log sum exp(q k^T / sqrt(d)), (b, heads, n), fp32.
    The flash kernels compute lse anyway and never build (n, n). On a GPU they take 16 bits and a
    head_dim of 8 k up to 256; the definition serves the rest (fp32, too), and builds (n, n)."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in range(8, 257, 8)
    if q.is_cuda and fits:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    s = (q @ k.mT).float() / math.sqrt(q.shape[-1])                         # the definition
    return s.softmax(-1).to(v.dtype) @ v, s.logsumexp(-1)


class Ring:
    """Ring attention [RA]: queries stay, K and V travel round in R - 1 hops, each while the
    rank attends to those it has.

    Two partial softmaxes merge exactly, in fp32 [RA, FA: the online softmax]:
        o += sigmoid(lse_i - lse) (o_i - o),   lse = logaddexp(lse, lse_i)
    Attention is not causal, so the ranks have equal work and no zigzag order is needed. Send
    and receive of a hop start together: a blocking send before the receive would deadlock."""

    def __init__(self, axis, sizes):
        self.axis, self.sizes = axis, sizes                     # K, V rows of each ring rank

    def __call__(self, q, k, v):
        R, r, group = self.axis.size, self.axis.index, self.axis.group
        # The fused op and the messages need contiguous tensors.
        q, kv = q.contiguous(), torch.stack((k, v)).contiguous()            # kv (2, b, h, n_r, d)
        o, lse = 0, torch.tensor(-math.inf, device=q.device)
        for hop in range(R):
            works = []
            if hop < R - 1:
                coming = kv.new_empty(*kv.shape[:3], self.sizes[(r - hop - 1) % R], kv.shape[4])
                works = dist.batch_isend_irecv([
                    dist.P2POp(dist.isend, kv, group=group, group_peer=(r + 1) % R),
                    dist.P2POp(dist.irecv, coming, group=group, group_peer=(r - 1) % R)])
                SENT["ring"] += kv.nbytes
            o_i, lse_i = attention_lse(q, *kv)
            o_i, lse_i = o_i.float(), lse_i[..., None]                  # (b, h, n, d), (b, h, n, 1)
            o = o + torch.sigmoid(lse_i - lse) * (o_i - o)
            lse = torch.logaddexp(lse, lse_i)
            for work in works:
                work.wait()
            kv = coming if works else kv
        return o.to(q.dtype)


class StaleKV:
    """PipeFusion's attention [PF]: the queries of one patch meet K, V of all patches, and those of
    later patches are one step old.

    The warm-up attends to everything and keeps K, V. Later patch m writes its rows, then attends
    to the whole cache: patches 0..m of this step, m+1..M-1 of the last. On average (M+1)/(2M) of it
    is fresh, with DistriFusion 1/M (our count). Each sample starts with a new cache, so K, V of
    another prompt, or of another batch size (guidance on or off), never enter.

    K, V are those after the Ulysses all-to-all (all rows, my heads: no extra traffic); with Ring,
    of the ring rank's rows."""

    def __init__(self, core, layout, r, at):
        self.core, self.layout, self.r, self.at = core, layout, r, at
        self.splice = layout.splice(r)

    def __call__(self, q, k, v):
        if self.at.patch is None:
            self.k, self.v = k[:, :, self.splice], v[:, :, self.splice]         # copies, by patch
        else:
            slot = self.layout.slot(self.at.patch, self.r)
            self.k[:, :, slot], self.v[:, :, slot] = k, v
        return self.core(q, self.k, self.v)


# ---- 5. The sampler ------------------------------------------------------------------------------
def inbox(shapes, dtype, src, group, device):
    """Yield the messages from one rank. Before one is yielded, the receive of the next starts, so
    that it arrives while we compute. gloo sends bytes, no shapes: both ends must know them."""
    coming = None
    for shape in (*shapes, None):
        ready = coming
        if shape is not None:
            buffer = torch.empty(shape, dtype=dtype, device=device)
            coming = buffer, dist.irecv(buffer, src, group)
        if ready is not None:
            ready[1].wait()
            yield ready[0]


class Outbox:
    """Send messages to one rank, and keep each tensor alive until it has left.

    most: how many may be on their way, which bounds the memory. Too few would deadlock: stage
    0 receives a patch's latent only at that patch's next turn, M patches later."""

    def __init__(self, what, dst, group, most):
        self.what, self.dst, self.group, self.most, self.flying = what, dst, group, most, deque()

    def send(self, x):
        x = x.contiguous()
        SENT[self.what] += x.nbytes
        self.flying.append((x, dist.isend(x, self.dst, self.group)))
        if len(self.flying) > self.most:
            self.flying.popleft()[1].wait()

    def flush(self):
        while self.flying:
            self.flying.popleft()[1].wait()


class Share:
    """Hold one rank's share of a sample: its tokens, the same rows in every step, and the text (of
    both branches of guidance; with cfg 2 of one)."""

    def __init__(self, sampler, x0, text, mask, null, null_mask, ts):
        s, self.model = sampler, sampler.model
        positions, self.guided = self.model.positions(x0.shape), null is not None
        order = token_order(self.model, x0.shape, s.patch_axis, x0.device)
        self.layout = Layout(order, s.M, s.ring.size, s.ulysses.size)
        self.rows = self.layout.rows(s.ring.index, s.ulysses.index)             # (n,)
        self.pos = positions[self.rows]                                         # (n, D)
        self.real = data_columns(self.model, x0.shape, self.rows)               # (n, P) or (n, 1)
        self.x = self.model.patchify(x0)[:, self.rows]                          # (B, n, P) fp32
        self.text, self.mask = both_branches(len(x0), text, mask, null, null_mask)
        if s.cfg.size == 2:
            self.text = self.text.chunk(2)[s.cfg.index]                         # (b, L, D_text)
            self.mask = None if self.mask is None else self.mask.chunk(2)[s.cfg.index]
        self.ts = ts.to(x0.device)                      # once: a copy in each step would sync
        self.dtype = next(self.model.parameters()).dtype

    def embed(self, part):
        """Embed some of the tokens, once for each branch: (b, n, D)."""
        x = torch.cat([self.x[:, part]] * (len(self.text) // len(self.x)))
        return self.model.embed(x.to(self.dtype))

    def condition(self, i):
        """Compute the model's condition c at the start of step i."""
        return self.model.condition(self.ts[i].expand(len(self.text)))


class ParallelSampler:
    """Sample any model with the methods of the contract (module docstring) over `make_mesh(...)`.

        patches     M; 0: as many as stages
        warmup      W whole steps before the pipeline fills
        patch_axis  bands of frames (t), rows (h) or columns (w)
    `settings` are those with which `emulate` makes the same clip. After a sample, `sent` holds the
    bytes that its steps sent (without the broadcast of the inputs and the reduction of the clip),
    `expected` what `traffic` predicts, `items` the schedule: (step, patch or None)."""

    def __init__(self, model, mesh=None, patches=0, warmup=1, patch_axis="t"):
        axis = lambda m: Axis(m.size(), m.get_local_rank(), m.get_group())
        self.cfg, self.pp, self.ring, self.ulysses = (
            Axis() if mesh is None else axis(mesh[name]) for name in AXES)
        self.degrees = {name: getattr(self, name).size for name in AXES}
        self.rank, self.world = rank_and_world()
        self.model, self.warmup, self.patch_axis = model, warmup, patch_axis
        config, depth = getattr(model, "cfg", None), len(model.blocks)
        check_degrees(self.world, **self.degrees, patches=patches, warmup=warmup, depth=depth)
        one_of("patch-axis", patch_axis, ("t", "h", "w"))
        if getattr(config, "conditioning", None) == "in_context":
            raise ValueError("conditioning in_context: each rank would add a time token of its own")
        piped = self.pp.size > 1
        self.M = (patches or self.pp.size) if piped else 1
        self.settings = dict(mode="pipefusion" if piped else "exact", patches=self.M,
                             warmup=warmup, patch_axis=patch_axis)
        self.mine = spans(split(depth, self.pp.size))[self.pp.index]        # my stage's blocks
        self.first, self.last = self.pp.index == 0, self.pp.index == self.pp.size - 1
        self.prev = self.next = None                # (rank, group) of my two links in the pipeline
        if piped:
            self._open_links(mesh, next(model.parameters()).device)

    def _open_links(self, mesh, device):
        """Make a group for each link of a pipeline, each used in one direction. NCCL runs the
        messages of a group in the order of the calls: with two links in a group, a send would wait
        behind the receive of a later patch. NCCL connects two ranks at their first message, which
        blocks both: so it is sent here, link after link."""
        one = torch.zeros(1, device=device)
        for line in rearrange(mesh.mesh, "c p r u -> (c r u) p").tolist():
            for a, b in zip(line, line[1:] + line[:1]):
                group = dist.new_group([a, b])
                if self.rank == a:
                    self.next = b, group
                    dist.isend(one, b, group).wait()
                if self.rank == b:
                    self.prev = a, group
                    dist.irecv(one, a, group).wait()

    def _agree(self, **mine):
        """Raise ValueError on all ranks if arguments differ: the ranks would hang later."""
        first, *others = everyone(mine)
        for rank, theirs in enumerate(others, 1):
            for name, value in theirs.items():
                if str(value) != str(first[name]):                  # as text: NaN != NaN
                    raise ValueError(f"{name}: rank {rank} has {value}, rank 0 {first[name]}")

    def _from_rank0(self, x):
        if x is None or self.world == 1:
            return x
        sent = (x.to(torch.uint8) if x.dtype == torch.bool else x.clone()).contiguous()
        dist.broadcast(sent, 0)
        return sent.to(x.dtype)

    @torch.no_grad()
    def sample(self, x0, text, mask=None, null=None, null_mask=None, guidance=1.0, steps=50,
               ts=None, progress=False):
        """Sample x1, on every rank, from x0 (B, ...), text (B, L, D_text) and mask (B, L). null (B
        or 1, L', D_text) turns guidance on. ts (S+1,) is a schedule from 0 to 1; without it there
        are `steps` equal steps. progress: a bar, on rank 0."""
        ts = torch.linspace(0, 1, steps + 1) if ts is None else ts
        assert len(text) == len(x0) and (null is None or len(null) in (1, len(x0))), "batch sizes"
        check_degrees(self.world, **self.degrees, warmup=self.warmup, guided=null is not None,
                      steps=len(ts) - 1)
        inputs = x0.float(), text, mask, null, null_mask
        self._agree(shapes=[None if x is None else tuple(x.shape) for x in inputs],
                    settings=(self.degrees, self.settings), guidance=guidance, ts=ts.tolist())
        share = Share(self, *map(self._from_rank0, inputs), ts)
        return self.model.unpatchify(self._steps(share, guidance, progress), x0.shape)

    def _steps(self, share, guidance, progress):
        """Take every step of this rank's share -> x1 as tokens, (B, N, P)."""
        layout, blocks = share.layout, list(self.model.blocks[self.mine])
        q, hidden = self._probe(share, blocks[0])
        self.steps = S = len(share.ts) - 1
        self.items = [(i, None) for i in range(S if self.pp.size == 1 else self.warmup)]
        self.items += [(i, m) for i in range(len(self.items), S) for m in range(self.M)]
        # Both change with each item; patch None is all tokens (warm-up, and without PipeFusion).
        at, tokens = types.SimpleNamespace(patch=None), []
        attends = {block: self._attend(layout, tokens, at) for block in blocks}
        received, outbox = self._open_mail(share, hidden)

        SENT.clear()
        items = self.items
        if progress and self.rank == 0:
            from tqdm import tqdm
            items = tqdm(items, desc="sample", unit="step" if self.pp.size == 1 else "patch")
        with swapped_attention(attends):
            for step, at.patch in items:
                tokens[:] = layout.tokens(at.patch, self.ring.index)
                self._work(share, step, at.patch, blocks, guidance, received, outbox)
        if outbox:
            outbox.flush()
        (B, _, P), N, depth = share.x.shape, len(layout.order), len(self.model.blocks)
        self.sent = Counter(SENT)
        self.expected = traffic(N, hidden.shape[-1], depth, P, B, 1 + share.guided, S, self.warmup,
                                self.M, q.element_size(), hidden.element_size(),
                                **self.degrees)
        self.equal_shares = not (N % (layout.M * layout.R * layout.U) or q.shape[1] % layout.U
                                 or depth % self.pp.size)
        return self._assemble(share)

    def _probe(self, share, block):
        """Send one token through a block -> (its q, its output), which tell heads, width and dtypes
        of any model."""
        seen = []
        with swapped_attention({block: lambda q, k, v: seen.append(q) or attention(q, k, v)}):
            hidden = block(share.embed(slice(1)), share.pos[:1], share.condition(0), share.text,
                           share.mask)
        check_degrees(self.world, **self.degrees, heads=seen[0].shape[1])
        return seen[0], hidden

    def _open_mail(self, share, hidden):
        """Prepare a pipeline stage's messages -> (those to receive, an Outbox). Stage p gets hidden
        tokens from stage p - 1 for every item; stage 0 gets latents from the last stage, for every
        item before the last step."""
        if self.pp.size == 1:
            return None, None
        n = lambda m: share.layout.tokens(m, self.ring.index)[self.ulysses.index]
        (B, _, P), (b, _, D) = share.x.shape, hidden.shape
        shapes, dtype = [(b, n(m), D) for _, m in self.items], hidden.dtype
        if self.first:
            shapes = [(B, n(m), P) for i, m in self.items if i < self.steps - 1]
            dtype = share.x.dtype
        outbox = Outbox("latent" if self.last else "hidden", *self.next,
                        most=2 * self.M + self.pp.size)
        return inbox(shapes, dtype, *self.prev, share.x.device), outbox

    def _work(self, share, i, m, blocks, guidance, received, outbox):
        """Do this stage's work on patch m (None: all tokens) of step i, and send the result on."""
        local = lambda m: share.layout.local(m, self.ring.index, self.ulysses.index)
        part = local(m)
        if m in (None, 0):
            share.c = share.condition(i)
        if self.first:
            # The last stage sends x after step i - 1: after a warm-up step all of it (received with
            # the first patch), later patch m.
            if received and i > 0 and (m in (None, 0) or i > self.warmup):
                share.x[:, local(m if i > self.warmup else None)] = next(received)
            h = share.embed(part)                                               # (b, n, D)
        else:
            h = next(received)                                                  # (b, n, D)
        for block in blocks:
            h = block(h, share.pos[part], share.c, share.text, share.mask)
        if not self.last:
            return outbox.send(h)
        v = self.model.head(h, share.c).float()                                 # (b, n, P)
        if self.cfg.size == 2:                          # CFG-parallel: both branches, prompt first
            v = gather(v, [len(v)] * 2, 0, self.cfg, "cfg")                     # (2B, n, P)
        v = guide(v, guidance) if share.guided else v                           # (B, n, P)
        share.x[:, part] += (share.ts[i + 1] - share.ts[i]) * v * share.real[part]      # Euler
        if outbox and i < self.steps - 1:
            outbox.send(share.x[:, part])       # perhaps a view: not changed until it has arrived

    def _attend(self, layout, tokens, at):
        """Nest a block's attention: Ulysses( StaleKV( Ring or plain ) ), without degrees of 1."""
        core = Ring(self.ring, layout.cached()) if self.ring.size > 1 else attention
        cached = lambda: StaleKV(core, layout, self.ring.index, at) if self.pp.size > 1 else core
        if self.ulysses.size == 1:
            return cached()
        return UlyssesInPieces(self.ulysses, [cached(), cached()], tokens)

    def _assemble(self, share):
        """Join the final tokens of all ranks, on every rank: (B, N, P). Once a sample, since a
        token's Euler step needs no other. Each rank writes its rows into zeros, and the sum over
        ranks is exact."""
        B, _, P = share.x.shape
        full = share.x.new_zeros(B, len(share.layout.order), P)
        if self.last and self.cfg.index == 0:
            full[:, share.rows] = share.x
        if self.world > 1:
            dist.all_reduce(full)
        return full


# ---- 6. The blocks of a stage --------------------------------------------------------------------
class Elsewhere(nn.Module):
    """Takes the place of a block that another stage has: no weights, and it cannot run."""

    def forward(self, *_):
        raise RuntimeError("this block belongs to another pipeline stage")


def keep_stage(model, pp, index):
    """Drop the blocks of the other stages, in place: a PipeFusion rank needs 1/pp of them. As
    `prepare` of train.load_run it works on the meta device, so their weights are never read."""
    mine = spans(split(len(model.blocks), pp))[index]
    for i in range(len(model.blocks)):
        if not mine.start <= i < mine.stop:
            model.blocks[i] = Elsewhere()
    return model


# ---- 7. Decoding over ranks ----------------------------------------------------------------------
class Halo(TorchFunctionMode):
    """The parallel VAE of [XD] (DistVAE): runs a decoder on a band of rows as if it had the whole
    picture. The decoder stays as it is: in this mode those of torch's functions that look across
    rows are replaced.

        convolution            gets the neighbours' rows; zeros at the picture's own edge
        group norm             mean and variance over all bands
        attention over space   K and V of all bands; attention over time stays as it is
        transposed convolution allowed where its patches do not overlap: it sees no other row
        NOT_IN_BANDS           ValueError, also for strides, paddings that change the number of rows
    Anything else that looks across rows (a mean in plain arithmetic, a smooth interpolation) is not
    replaced and sees this rank's band alone: check a new decoder once, as `--check` does.
    Pictures are (frames, C, H, W) or (B, C, T, H, W), attention (sequences, heads, tokens, d) with
    tokens row by row."""

    NOT_IN_BANDS = (
        F.avg_pool2d, F.avg_pool3d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d, F.instance_norm)

    def __init__(self, axis, rows, width):
        super().__init__()
        self.axis, self.rows, self.width = axis, rows, width    # latent rows of each band; columns
        self.replace = dict.fromkeys(self.NOT_IN_BANDS, self.refuse) | {
            F.conv2d: self.conv, F.conv3d: self.conv, F.pad: self.pad,
            F.conv_transpose2d: self.conv_transpose, F.conv_transpose3d: self.conv_transpose,
            F.group_norm: self.group_norm, attention: self.attend}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.replace:
            return self.replace[func](func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def refuse(self, func, *args, **kwargs):
        raise ValueError(f"decode halo: {func.__name__} looks across rows in a way that is not "
                         "supported, use --decode one")

    def conv(self, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        each = lambda a: [a] * (weight.dim() - 2) if isinstance(a, int) else list(a)
        stride, padding, dilation = each(stride), each(padding), each(dilation)
        p, padding[-2] = padding[-2], 0                             # rows are the last but one
        reach = dilation[-2] * (weight.shape[-2] - 1)
        if stride[-2] != 1 or (2 * p != reach if p else input.shape[-2] <= reach):
            self.refuse(func)                                       # it changes the number of rows
        # Without padding: 1x1, or over time, which tae.py gives as (B, C, T, H W).
        x = self.extend(input, p) if p else input
        return func(x, weight, bias, stride, padding, dilation, groups)

    def conv_transpose(self, func, input, weight, bias=None, stride=1, padding=0, output_padding=0,
                       groups=1, dilation=1):
        rows = [a if isinstance(a, int) else a[-2]
                for a in (stride, padding, output_padding, dilation)]
        if rows != [weight.shape[-2], 0, 0, 1]:
            self.refuse(func)                                       # its patches overlap
        return func(input, weight, bias, stride, padding, output_padding, groups, dilation)

    def extend(self, x, p):
        """Join p rows of the band above, x, p rows of the band below; zeros beyond the picture."""
        i, size = self.axis.index, self.axis.size
        if min(self.rows) * x.shape[-2] // self.rows[i] < p:
            raise ValueError(f"decode halo: bands of {min(self.rows)} latent rows are too thin, "
                             "use fewer ranks")
        shape = lambda n: (*x.shape[:-2], n, x.shape[-1])
        parts = [x[..., :p if u == i - 1 else 0, :] if u < i else
                 x[..., x.shape[-2] - (p if u == i + 1 else 0):, :] for u in range(size)]
        got = exchange(parts, [shape(p if abs(u - i) == 1 else 0) for u in range(size)], self.axis,
                       "halo")
        zeros = x.new_zeros(shape(p))
        return torch.cat([got[i - 1] if i > 0 else zeros, x,
                          got[i + 1] if i < size - 1 else zeros], dim=-2)

    def pad(self, func, input, pad, *args, **kwargs):
        if any(pad[2:4]):                                           # left right, top bottom, ...
            self.refuse(func)
        return func(input, pad, *args, **kwargs)

    def group_norm(self, func, input, num_groups, weight=None, bias=None, eps=1e-5):
        x = input
        if x.dim() < 4 and not self.over_space(x.shape[-1], len(x), x.device):
            # Over time: this band has all frames of its pixels.
            return func(x, num_groups, weight, bias, eps)
        groups = x.float().reshape(x.shape[0], num_groups, -1)
        total = partial(torch.sum, dim=-1, dtype=torch.float64)
        sums = torch.stack([torch.full_like(total(groups), groups.shape[-1]), total(groups),
                            total(groups.square())])
        dist.all_reduce(sums, group=self.axis.group)
        n, s, ss = sums
        mean, rstd = s / n, (ss / n - (s / n) ** 2 + eps).rsqrt()
        y = ((groups - mean[..., None].float()) * rstd[..., None].float()).view(x.shape)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = y if weight is None else y * weight.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(x.dtype)

    def over_space(self, n, sequences, device):
        """Tell whether a batch of `sequences` of n tokens each is over space, or over time.

        Over space n is a multiple of the band's pixels, over time `sequences` is. One
        rank may find both possible, another only one: they keep what all find possible."""
        pixels = self.rows[self.axis.index] * self.width
        possible = torch.tensor([n % pixels == 0, sequences % pixels == 0], device=device).int()
        dist.all_reduce(possible, dist.ReduceOp.MIN, group=self.axis.group)
        space, time = possible.tolist()
        if space == time:
            raise ValueError(f"decode halo: {sequences} sequences of {n} tokens: over space or over"
                             " time? use --decode one")
        return space

    def attend(self, func, query, key, value, *args, **kwargs):
        n = key.shape[-2]
        if self.over_space(n, len(query), query.device):
            sizes = [n // self.rows[self.axis.index] * r for r in self.rows]
            key, value = gather(torch.stack((key, value)), sizes, 3, self.axis, "halo")
        return func(query, key, value, *args, **kwargs)


def can_be_split(shape, world):
    """Tell whether `halo_decode` can share one latent of this shape among `world` ranks: each gets
    a row or more, the latent is not flat (VidTwin's is), and `over_space` can tell pixels from
    frames (8 ranks cannot share small's 8 x 8 x 8)."""
    return len(shape) == 4 and (world == 1 or shape[2] >= world and any(
        shape[1] % (n * shape[3]) for n in split(shape[2], world)))


@torch.no_grad()
def halo_decode(decode, z):
    """Decode z (B, C, T, H, W), the same on all ranks, with a band of rows on each -> the clip,
    equal to decode(z) up to rounding, on rank 0 (None on the others). Memory for activations falls
    with the number of ranks."""
    rank, world = rank_and_world()
    if z.dim() != 5 or z.shape[3] < world:
        raise ValueError(f"decode halo: latent {tuple(z.shape)} has no {world} bands of rows, use "
                         "--decode one")
    if world == 1:
        return decode(z)
    axis, rows = Axis(world, rank, dist.group.WORLD), split(z.shape[3], world)
    with Halo(axis, rows, z.shape[4]):
        y = decode(z[:, :, :, spans(rows)[axis.index]])
    heights, W = everyone(y.shape[3]), z.shape[4]
    f = heights[0] // rows[0]                   # columns must grow as rows do, but may be cropped
    if heights != [f * r for r in rows] or not f * (W - 1) < y.shape[4] <= f * W:
        raise ValueError(f"decode halo: {rows} latent rows of {W} became {heights} of {y.shape[4]},"
                         " not a picture in bands, use --decode one")
    clip = y.new_zeros(*y.shape[:3], sum(heights), y.shape[4])      # each writes its band
    clip[:, :, :, spans(heights)[axis.index]] = y
    dist.reduce(clip, 0)
    return clip if axis.index == 0 else None


# ---- 8. What is sent -----------------------------------------------------------------------------
# Bytes that one rank sends in a step of the 30b model (73,728 tokens, b = 1, q, k, v in bf16, 8
# ranks; CFG: 2): Ring 76 GB while it computes, Ulysses 19 GB, half of it while it computes,
# PipeFusion 1.8 GB while it computes (what goes from stage to stage is fp32), CFG-parallel 0.02 GB.
# With PipeFusion, Ring sends its whole K, V cache for each patch: M times the bytes of a block, M /
# pp times those of a rank.
def traffic(N, D, depth, P, B=1, branches=2, S=1, W=1, M=1, size=2, hidden_bytes=None, cfg=1, pp=1,
            ring=1, ulysses=1):
    """Compute the bytes that one rank sends in S steps, by purpose, for equal shares. Numbers sent
    in one step (our count; [XD]: O(...) only):

        ulysses   4 b n D (U-1)/U depth/pp Q, K, V out and O back; n = N/UR, b entries of a batch
        ring      2 b n D (R-1) depth/pp   K, V, R - 1 hops; in PipeFusion the whole cache, M times
        cfg       B n P                    the output, once a step, fp32
        hidden    b n D                    to the next stage; does not grow with depth
        latent    B n P                    last stage to first, fp32, in every step but the last
    In a pipeline the last stage sends cfg and latent, all others hidden. size: bytes of a number in
    q, k, v; hidden_bytes: of one between blocks, if that differs (a residual stream in fp32).

    Where compute hides all messages, a pipeline is S / (W + ((S - W) M + pp - 1) / (M pp)) times as
    fast as one rank (our count); another mode as many times as it has ranks."""
    b, n, layers = B * branches / cfg, N / (ring * ulysses), math.ceil(depth / pp)
    rounds = W + (S - W) * M if pp > 1 else S
    sent = {
        "ulysses": 4 * b * n * D * (ulysses - 1) / ulysses * layers * size * S,
        "ring": 2 * b * n * D * (ring - 1) * layers * size * rounds,
        "cfg": B * n * P * 4 * S if cfg == 2 else 0,
        "hidden": b * n * D * (hidden_bytes or size) * S if pp > 1 else 0,
        "latent": B * n * P * 4 * (S - 1) if pp > 1 else 0,
    }
    return {k: v for k, v in sent.items() if v}


# ---- 9. A run and its check ----------------------------------------------------------------------
DECODED = 1e-4      # how far decoding in bands of rows may move a clip, in fp32


def rounding(model, steps):
    """Bound how far rounding may move a clip, relative to its largest value: six errors of 2^-24
    (bf16: 2^-8) for each block and step, all adding up; at most 3 %. Measured errors are a tenth of
    it. In fp32 a wrong algorithm stands out, at 1e-3 or more (the demo shows one); in bf16 it may
    not."""
    unit = torch.finfo(next(model.parameters()).dtype).eps / 2
    return min(6 * len(model.blocks) * steps * unit, 0.03)


def difference(a, b):
    """Compute the largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def measure(sampler, **inputs):
    """Sample once -> (x1, row of the table: mode, seconds, most bytes of a rank, ...)."""
    start = time.perf_counter()
    x1 = sampler.sample(**inputs)
    if x1.is_cuda:
        torch.cuda.synchronize()
    seconds, sent, steps = time.perf_counter() - start, everyone(sampler.sent), sampler.steps
    parts = [f"{axis} {n}" for axis, n in sampler.degrees.items() if n > 1]
    parts += [f"M {sampler.M}"] if sampler.pp.size > 1 else []
    return x1, {"mode": " x ".join(parts) or "one process", "seconds": seconds,
                "sent": {k: max(s[k] for s in sent) for k in sorted(set().union(*sent))},
                "expected": sampler.expected, "equal": sampler.equal_shares,
                "steps": steps, "settings": sampler.settings,
                "rounding": rounding(sampler.model, steps)}


TABLE_HEAD = f"  {'mode':22s} difference {'':12s}   kB/step   formula  {'sent for':24s} seconds"


def agrees(row, x1, want):
    """Print a row of the table -> whether x1 is what one process makes, up to rounding, and the
    bytes are the formula's. Marks: = equal; ! not equal; ~ shares are uneven: some rank sends
    more than an equal share, and only the purposes are compared."""
    sent, expected, off = row["sent"], row["expected"], difference(x1, want)
    right = sent == expected if row["equal"] else sent.keys() == expected.keys()
    mark = "!" if not right else "=" if row["equal"] else "~"
    a, b = (sum(x.values()) / row["steps"] / 1e3 for x in (sent, expected))
    print(f"  {row['mode']:22s} {off:10.1e} vs "
          f"{'exact' if row['settings']['mode'] == 'exact' else 'emulation':9s} {a:9.1f} {mark} "
          f"{b:7.1f}  {'+'.join(sent) or '-':24s} {row['seconds']:6.2f}", flush=True)
    return off < row["rounding"] and right


def sample_every(model, inputs, device="cpu", warmup=1, patch_axis="t"):
    """Sample once with each mesh that these ranks and this model allow -> [(x1, row)]."""
    (_, world), heads = rank_and_world(), model.cfg.heads
    tokens = model.patchify(inputs["x0"]).shape[1]
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    modes = [(d, M) for d in itertools.product((1, 2), divisors, divisors, divisors)
             if math.prod(d) == world and d[1] <= len(model.blocks) and d[3] <= heads
             for M in ([d[1], 2 * d[1]] if d[1] > 1 else [0])
             if max(1, M) * d[2] * d[3] <= tokens]
    if not modes:
        raise ValueError(f"--mode every: no mesh of {world} ranks fits {tokens} tokens")
    return [measure(ParallelSampler(model, make_mesh(*degrees, device=device), M, warmup,
                                    patch_axis), **inputs)
            for degrees, M in modes]


def count_right(model, inputs, results):
    """Print what `sample_every` found, against one process -> how many modes agree with it."""
    wanted, right = {}, 0
    print(TABLE_HEAD)
    for x1, row in results:
        key = str(row["settings"])
        if key not in wanted:
            wanted[key] = emulate(model=model, **inputs, **row["settings"])
        right += agrees(row, x1, wanted[key])
    return right


def verdict(ok, text):
    """Print PASS or FAIL and the text -> ok."""
    print(f"{'PASS' if ok else 'FAIL'} {text}", flush=True)
    return ok


def launch(fn, world, *args):
    """Run fn(*args) on `world` forked ranks, joined by gloo over a file -> their results. The first
    error ends all ranks and is raised here. Forking takes 0.1 s."""
    import torch._dynamo  # noqa: F401  (else each rank's first exchange imports it, in 1 s)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (fn, args, world, folder), world, start_method="fork")
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]


def _rank(rank, fn, args, world, folder):
    torch.set_num_threads(1)        # OpenMP hangs in a child whose parent has used it
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world, timeout=timedelta(minutes=2))
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    dist.barrier()                                  # no rank leaves while others need it
    dist.destroy_process_group()


# ---- 10. Demo ------------------------------------------------------------------------------------
class TinyBlock(nn.Module):
    """A transformer block with `attend`."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.attend = heads, attention
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q, self.kv, self.cross = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.ffn = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.table = nn.Parameter(torch.zeros(4, D))

    def forward(self, h, pos, c, text, mask=None):
        shift1, scale1, shift2, scale2 = (c + self.table).unbind(1)                     # 4 x (b, D)
        heads = lambda x, k: rearrange(x, "b N (k h d) -> k b h N d", k=k, h=self.heads)
        norm = lambda x: F.layer_norm(x, x.shape[-1:])
        x = norm(h + pos) * (1 + scale1[:, None]) + shift1[:, None]                     # (b, n, D)
        h = h + self.out(rearrange(self.attend(*heads(self.qkv(x), 3)), "b h N d -> b N (h d)"))
        x = attention(*heads(self.q(norm(h)), 1), *heads(self.kv(text), 2),
                      attn_mask=None if mask is None else mask[:, None, None])
        h = h + self.cross(rearrange(x, "b h N d -> b N (h d)"))
        return h + self.ffn(norm(h) * (1 + scale2[:, None]) + shift2[:, None])


class TinyDiT(nn.Module):
    """The methods of the contract and nothing more, with random weights."""

    def __init__(self, channels=2, grid=(8, 8, 8), patch=(1, 2, 4), D=64, depth=4, heads=4):
        super().__init__()
        self.patch, self.cfg = patch, types.SimpleNamespace(heads=heads)
        P = channels * math.prod(patch)
        self.embed = nn.Linear(P, D)
        self.table = nn.Parameter(torch.randn(*(n // p for n, p in zip(grid, patch)), D) * 0.5)
        self.time = nn.Sequential(nn.Linear(32, D), nn.SiLU(), nn.Linear(D, 4 * D))
        self.blocks = nn.ModuleList(TinyBlock(D, heads) for _ in range(depth))
        self.out = nn.Linear(D, P)

    def patchify(self, x):
        p, q, r = self.patch
        return rearrange(x, "B C (T p) (H q) (W r) -> B (T H W) (C p q r)", p=p, q=q, r=r)

    def unpatchify(self, tokens, shape):
        p, q, r = self.patch
        return rearrange(tokens, "B (T H W) (C p q r) -> B C (T p) (H q) (W r)", p=p, q=q, r=r,
                         T=shape[2] // p, H=shape[3] // q)

    def positions(self, shape):
        T, H, W = (n // p for n, p in zip(shape[2:], self.patch))
        return rearrange(self.table[:T, :H, :W], "T H W D -> (T H W) D")

    def condition(self, t):
        angle = t[:, None] * 8 * torch.arange(16, device=t.device) ** 1.3
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.out.weight.dtype)
        return rearrange(self.time(waves), "B (k D) -> B k D", k=4)

    def head(self, h, c):
        return self.out(F.layer_norm(h, h.shape[-1:]))


class TinyDecoder(nn.Module):
    """A small decoder with the three operations that look across rows in real ones: convolution,
    group norm and attention."""

    def __init__(self, C=2, width=16):
        super().__init__()
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        self.enter, self.mid, self.leave = conv(C, width), conv(width, width), conv(width, 3)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, z):
        B, _, T, H, W = z.shape
        h = self.enter(rearrange(z, "B C T H W -> (B T) C H W"))
        x = rearrange(self.norm1(h), "F C H W -> F 1 (H W) C")
        h = h + rearrange(F.scaled_dot_product_attention(x, x, x), "F 1 (H W) C -> F C H W", H=H)
        h = F.silu(self.norm2(self.mid(F.interpolate(h, scale_factor=2.0))))
        return rearrange(self.leave(h), "(B T) C H W -> B C T H W", B=B)


def demo_rank(model, decoder, inputs, z):
    """Sample with every mode, then decode: what each forked rank of the demo does."""
    return sample_every(model, inputs), halo_decode(decoder, z)


def wrong_splice_rank(model, inputs):
    """Make the mistake on purpose: the cache keeps the order of the warm-up's all-to-all."""
    Layout.splice = lambda self, r: torch.arange(self.cached()[r])
    return ParallelSampler(model, make_mesh(pp=2, ulysses=2), 4).sample(**inputs)


def timeline_rank(model, inputs, pp, patches):
    """Record one rank's stage at work -> [(step, patch, start, end)]."""
    sampler, clock = ParallelSampler(model, make_mesh(pp=pp), patches), []
    sampler.sample(**inputs)                                # once for the allocator and the sockets
    mine, tick = model.blocks[sampler.mine], lambda *_: clock.append(time.perf_counter())
    mine[0].register_forward_pre_hook(tick)
    mine[-1].register_forward_hook(tick)
    sampler.sample(**inputs)
    clock = clock[-2 * len(sampler.items):]                 # without the probe by one token
    return [(*item, *ends) for item, ends in zip(sampler.items, zip(clock[::2], clock[1::2]))]


def draw_timeline(events, M, path):
    """Draw what each stage worked on, and when (above; recorded in real processes, which share a
    clock), and from which step its K, V are (below; PipeFusion's rule)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    items, zero = [e[:2] for e in events[0]], events[0][0][2]
    names = ["all" if m is None else f"p{m}" for _, m in items]
    color = plt.get_cmap("viridis", items[-1][0] + 1)
    fig, (top, below) = plt.subplots(2, figsize=(11, 4.4), layout="constrained")
    for stage, row in enumerate(events):
        for (step, _, start, end), name in zip(row, names):
            left, width = 1e3 * (start - zero), 1e3 * (end - start)
            top.barh(stage, width, left=left, color=color(step), edgecolor="white")
            top.text(left + width / 2, stage, name, ha="center", va="center", fontsize=7,
                     color="white" if step < items[-1][0] else "black")
    top.set(yticks=range(len(events)), yticklabels=[f"stage {p}" for p in range(len(events))],
            xlabel="milliseconds", ylim=(len(events) - 0.5, -0.5),
            title="PipeFusion as it ran: a box is one stage at work on one patch (gaps: waiting)")
    of_step = [[step - (patch is not None and m > patch) for step, patch in items]
               for m in range(M)]
    below.pcolormesh(of_step, cmap=color, edgecolors="white")
    for x, (_, patch) in enumerate(items):
        for m in range(M):
            what = "written" if patch in (None, m) else "stale" if m > patch else ""
            below.text(x + 0.5, m + 0.5, what, ha="center", va="center", fontsize=6,
                       color="white" if of_step[m][x] < items[-1][0] else "black")
    below.set(yticks=[m + 0.5 for m in range(M)], yticklabels=[f"K, V of p{m}" for m in range(M)],
              xticks=[x + 0.5 for x in range(len(items))], xlabel="step and patch",
              xticklabels=[f"{i}\n{name}" for (i, _), name in zip(items, names)],
              title="What a stage attends to, patch by patch (colour: the step of K, V)")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def demo(out="out/sample_parallel"):
    """Compare every mode on a tiny model with one process -> whether all claims hold. The weights
    are random and show how errors behave; `--check` measures them in a trained run."""
    torch.set_num_threads(1)
    begin, claims = time.perf_counter(), []

    def claim(text, value, bound, ok):
        claims.append(verdict(ok, f"{text}: {value} vs {bound}"))

    torch.manual_seed(0)
    model, many = TinyDiT().eval(), {"x0": torch.randn(4, 2, 8, 8, 8), "guidance": 2.0,
                                     "text": torch.randn(4, 2, 64), "null": torch.randn(1, 2, 64)}
    inputs = dict(many, x0=many["x0"][:1], text=many["text"][:1], steps=8)
    z, decoder = emulate("exact", model, **inputs), TinyDecoder().eval()
    with torch.no_grad():
        clip, bands = decoder(z), torch.cat([decoder(band) for band in z.chunk(4, dim=3)], dim=3)

    print("every mode, 8 steps with guidance, against the same algorithm in one process "
          "(64 tokens, 4 blocks of width 64; a rank's most bytes by purpose)")
    right = same = modes = 0
    for world in (2, 4):
        ranks = launch(demo_rank, world, model, decoder, inputs, z)
        results, halo = ranks[0]
        modes, right = modes + len(results), right + count_right(model, inputs, results)
        same += sum(all(torch.equal(x1, other[0][i][0]) for other in ranks)
                    for i, (x1, _) in enumerate(results))
    bound = rounding(model, 8)
    claim(f"every mode equals one process within {bound:.0e}, and sends the bytes of the formula",
          f"{right} modes", modes, right == modes)
    claim("all ranks hold the same clip", f"{same} modes", modes, same == modes)
    wrong = launch(wrong_splice_rank, 4, model, inputs)[0]
    splice = difference(wrong, emulate("pipefusion", model, **inputs, patches=4))
    claim("the wrong K, V splice order is seen", f"{splice:.1e}", "> 1e-3", splice > 1e-3)
    a, b = difference(halo, clip), difference(bands, clip)
    claim("halo decode by 4 ranks equals one", f"{a:.1e} (independent bands: {b:.1e})",
          f"{bound:.0e} (> 1e-2)", a < bound and b > 1e-2)

    print("\nwhat staleness costs: error relative to the exact clip of the same steps "
          "(L2; 4 clips, W = 1, bands of frames; random weights)")
    l2 = lambda a, b: ((a - b).norm() / b.norm()).item()
    limit, errors = emulate("exact", model, **many, steps=64), {}
    columns = [("pipefusion", 2), ("pipefusion", 4), ("distrifusion", 2), ("distrifusion", 4),
               ("no_exchange", 4)]
    print("  steps  Euler itself " + " ".join(f"{mode:>12s} {M}" for mode, M in columns))
    for S in (8, 16, 32):
        exact = emulate("exact", model, **many, steps=S)
        errors[S] = [l2(emulate(mode, model, **many, steps=S, patches=M), exact)
                     for mode, M in columns]
        print(f"  {S:5d} {l2(exact, limit):13.4f} " + " ".join(f"{e:14.4f}" for e in errors[S]),
              flush=True)
    claim("PipeFusion's error falls with the steps (M 2, 8 -> 32)", f"{errors[32][0]:.4f}",
          f"{errors[8][0]:.4f}", errors[32][0] < errors[8][0])
    claim("and is below DistriFusion's at equal patches (32 steps, M 2)", f"{errors[32][0]:.4f}",
          f"{errors[32][2]:.4f}", errors[32][0] < errors[32][2])

    # Large enough that a patch takes longer than its launch.
    large = TinyDiT(grid=(8, 16, 16), D=96, depth=8).eval()
    inputs = {"x0": torch.randn(1, 2, 8, 16, 16), "text": torch.randn(1, 2, 96),
              "null": torch.randn(1, 2, 96), "steps": 4}
    events = launch(timeline_rank, 2, large, inputs, 2, 4)
    path = Path(out) / "timeline.png"
    draw_timeline(events, 4, path)
    print(f"\n{path}: which stage worked on which patch of which step, what was fresh, what stale")
    print(f"{sum(claims)} of {len(claims)} claims hold, {time.perf_counter() - begin:.0f} s")
    return all(claims)


# ---- 11. Command line ----------------------------------------------------------------------------
def fail(message):
    """Print one line and exit with status 2. torchrun ends all ranks of a node at the first exit:
    so ranks above 0 wait, and an error common to all is printed once."""
    if rank := int(os.environ.get("RANK", 0)):
        time.sleep(2)
        message = f"rank {rank}: {message}"
    print(f"sample_parallel.py: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def open_stderr():
    """Open stderr if it is closed, as by 2>&-: else the next file opened would get its number."""
    if sys.stderr is None:
        os.dup2(1 if sys.stdout else os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115


def number(kind, low, high):
    """Make the type of an argument: a number of this kind between these bounds."""
    def read(word):
        value = kind(word)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{word}: must be {low} to {high}")
        return value
    read.__name__ = kind.__name__                       # which argparse names in its message
    return read


def parse(argv=None):
    """Parse the command line, and check what needs neither run nor ranks."""
    # torchrun accepts abbreviations and would swallow a flag that is a prefix of one of its own
    # (--n, --m, --r, --log): none here is.
    p = argparse.ArgumentParser(
        allow_abbrev=False, description="Sample a trained run with many ranks (torchrun); without "
        "--workdir, show every mode on a tiny model.",
        epilog="cfg x pp x ring x ulysses must be the number of ranks.")
    p.error = lambda message: fail(message.removeprefix("argument "))
    a, ranks = p.add_argument, number(int, 1, 4096)
    a("--workdir", help="folder of a run of train.py, or its model.safetensors")
    a("--prompt", action="append", default=[], help="a caption; may be repeated")
    a("--prompt-file", help="a text file with one prompt a line")
    a("--mode", default="mesh", choices=("mesh", "every"), help="mesh: that of the degrees below; "
      "every (with --check): try each mesh of these ranks, write no clip")
    a("--cfg", type=number(int, 1, 2), default=1, help="2: prompt and null text on two groups")
    a("--pp", type=ranks, default=1, help="PipeFusion stages")
    a("--patches", type=ranks, default=0, help="PipeFusion patches (default: as many as stages)")
    a("--warmup", type=ranks, default=1, help="whole steps before the pipeline fills (default 1)")
    a("--patch-axis", default="t", choices=("t", "h", "w"),
      help="patches are bands of frames, rows or columns")
    a("--ring", type=ranks, default=1, help="Ring ranks")
    a("--ulysses", type=ranks, default=1, help="Ulysses ranks")
    a("--steps", type=number(int, 1, 10_000), help="of the solver (default: the run's)")
    a("--schedule", choices=("linear", "linear_quadratic", "shifted"), help="(default: the run's)")
    a("--guidance", type=number(float, -100, 100), help="guidance scale (default: the run's)")
    a("--seed", type=number(int, 0, 2**63 - 1), default=0, help="the same seed, the same clip")
    a("--out", default="out/sample_parallel/clip.mp4",
      help="FILE.mp4 or .gif, with several prompts FILE-0.mp4, FILE-1.mp4 ...")
    a("--decode", default="auto", choices=("auto", "one", "halo"), help="one: rank 0; halo: bands "
      "of rows, the same clip; auto: halo where there are rows for all")
    a("--check", action="store_true", help="compare with one process; exit status 1 if it differs")
    a("--device", default="cpu", choices=("cpu", "cuda"), help="gloo, or NCCL with a GPU a rank")
    args = p.parse_args(argv)
    if args.workdir == "":
        p.error("--workdir '': no such folder")
    given = [n for n, value in vars(args).items() if value != p.get_default(n)]
    flag_of = lambda name: f"--{name.replace('_', '-')}"
    if given and not args.workdir:
        p.error(f"--workdir: needed with {flag_of(given[0])} (without it, the demo runs)")
    for name in given:                                  # a flag that would do nothing is a mistake
        flag, value = flag_of(name), getattr(args, name)
        if args.mode == "every" and name in (*AXES, "patches"):
            p.error(f"{flag}: leave it out, --mode every chooses the mesh itself")
        if args.mode == "every" and name in ("out", "decode"):
            p.error(f"{flag} {value}: leave it out, --mode every writes no clip")
        if args.mode == "mesh" and args.pp == 1 and name in ("patches", "warmup", "patch_axis"):
            p.error(f"{flag} {value}: needs --pp 2 or more (without a pipeline nothing is stale)")
    if args.mode == "every" and not args.check:
        p.error("--mode every: needs --check")
    if Path(args.out).suffix not in (".mp4", ".gif"):
        p.error(f"--out {args.out}: must end in .mp4 or .gif")
    gpus = torch.cuda.device_count() if args.device == "cuda" else math.inf
    if gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        p.error(f"--device cuda: torch sees {gpus} GPUs here, and each rank needs one")
    return args


def prompts_of(args):
    """List the prompts of --prompt, then those of --prompt-file."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:                                        # utf-8-sig: a byte order mark is dropped
            text = Path(args.prompt_file).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {args.prompt_file}: {error}") from None
        prompts += [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError("--prompt: needed with --workdir (or --prompt-file), and not empty")
    if args.mode == "every" and len(prompts) > 1:
        raise ValueError(f"--mode every: takes one prompt, not {len(prompts)}")
    return prompts


def sample_run(args):
    """Do what --workdir asks, on every rank -> exit status."""
    prompts, world = prompts_of(args), int(os.environ.get("WORLD_SIZE", 1))
    degrees = {axis: getattr(args, axis) for axis in AXES}
    if args.mode == "every":
        degrees["ring"] = world            # one that always fits; `sample_every` goes through all
    fits = partial(check_degrees, world, **degrees, patches=args.patches, warmup=args.warmup)
    fits(steps=args.steps)
    try:
        import train
    except ModuleNotFoundError as error:
        raise ValueError(f"--workdir: needs train.py and its siblings here ({error})") from None
    ts, guidance = check_run(args, train, prompts, world, fits)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:       # hours, because with --check the others wait while rank 0 works alone
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                timeout=timedelta(hours=4))
    if args.mode == "every":
        ok = check_every(args, train, prompts[0], ts, guidance)
    else:
        ok = sample_prompts(args, train, prompts, degrees, ts, guidance)
    ok = everyone(ok)[0]
    if world > 1:
        dist.destroy_process_group()
    return 0 if ok else 1


def check_run(args, train, prompts, world, fits):
    """Check prompts and shapes before ranks meet (ValueError), resolve --decode auto, and make the
    folder of --out -> (schedule ts, guidance)."""
    for prompt in prompts:
        train.text_cond.clean(prompt)                           # ValueError for what is no text
    run = train.load_run(args.workdir, device="meta")           # all shapes, no weights
    config, shape = run.cfg.sample, tuple(run.latent_shape)
    if run.cfg.flow.objective != "flow":
        raise ValueError(f"--workdir {args.workdir}: trained as diffusion, not as a flow")
    ts = run.schedule(args.steps or config.steps, args.schedule)
    fits(steps=len(ts) - 1, depth=len(run.dit.blocks), heads=run.dit.cfg.heads)
    bands = can_be_split(shape, world)
    if args.decode == "halo" and not bands:
        raise ValueError(f"--decode halo: {world} ranks cannot decode latents {shape} in bands of "
                         "rows, use --decode one")
    if args.decode == "auto":
        args.decode = "halo" if bands and world > 1 else "one"
    if int(os.environ.get("RANK", 0)) == 0:
        out = Path(args.out)
        if args.mode != "every":                # after all other checks, before sampling
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--out {out}: {error}") from None
            if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
                raise ValueError(f"--out {out}: cannot be written there")
        if config.solver != "euler":
            print(f"the run samples with {config.solver}; here with Euler", file=sys.stderr)
    return ts, config.guidance if args.guidance is None else args.guidance


def check_every(args, train, prompt, ts, guidance):
    """Compare each mesh that these ranks allow with one process -> whether all agree."""
    run = train.load_run(args.workdir, args.device)
    inputs = inputs_of(run, prompt, args.seed, guidance, ts)
    results = sample_every(run.dit, inputs, args.device, args.warmup, args.patch_axis)
    if rank_and_world()[0] > 0:
        return True
    right = count_right(run.dit, inputs, results)
    return verdict(right == len(results), f"{right} of {len(results)} modes equal one process, and "
                   "send the bytes of the formula")


def sample_prompts(args, train, prompts, degrees, ts, guidance):
    """Sample, decode and write a clip for each prompt -> False if --check finds a difference."""
    (rank, _), ok, whole = rank_and_world(), True, None
    mesh = make_mesh(**degrees, device=args.device)
    if rank == 0 and mesh is not None:              # who shares what: the commonest first question
        for c, p, r in itertools.product(*map(range, mesh.mesh.shape[:3])):
            print(f"  cfg {c}  stage {p}  ring {r}: ranks {mesh.mesh[c, p, r].tolist()}")
    stage = 0 if mesh is None else mesh["pp"].get_local_rank()
    run = train.load_run(args.workdir, args.device,
                         prepare=lambda dit: keep_stage(dit, args.pp, stage))
    sampler = ParallelSampler(run.dit, mesh, args.patches, args.warmup, args.patch_axis)
    if args.check and rank == 0:                # all blocks, whatever the sampler has
        whole = run.dit if args.pp == 1 else train.load_run(args.workdir, args.device).dit
    for j, prompt in enumerate(prompts):
        inputs = inputs_of(run, prompt, args.seed + j, guidance, ts)
        z, row = measure(sampler, **inputs, progress=True)
        clip = (halo_decode(run.decode, z) if args.decode == "halo" else
                run.decode(z) if rank == 0 else None)
        if rank == 0:
            out = Path(args.out)
            path = out if len(prompts) == 1 else out.with_stem(f"{out.stem}-{j}")
            T, H, W = run.cfg.clips.shape
            clip = clip[:, :, :T, :H, :W]                   # without what encode padded
            train.write_video(path, clip[0].float().cpu(), run.fps_of(prompt))
            print(f"{path}: {prompt}   ({row['seconds']:.1f} s)", flush=True)
        if whole is not None:
            ok &= check(whole, inputs, z, row, clip, run.decode(z)[:, :, :T, :H, :W])
    return ok


def inputs_of(run, prompt, seed, guidance, ts):
    """Make what ParallelSampler.sample and emulate take, for one prompt of a run. Only rank 0 runs
    the text encoders: pretrained ones are large."""
    features = None
    if rank_and_world()[0] == 0:
        try:
            features = run.encode([prompt])
        except ValueError as error:                 # raised on all ranks, or the others would wait
            features = error
    features = everyone(features)[0]
    if isinstance(features, ValueError):
        raise features
    text, mask, null, null_mask = run.prompts([prompt], features)
    return {"x0": run.noise([seed]), "text": text, "mask": mask, "null": null,
            "null_mask": null_mask, "guidance": guidance, "ts": ts}


def check(model, inputs, z, row, clip, alone):
    """Print latents and clip of the ranks against those of one process, and what staleness costs
    -> whether they are equal, up to rounding."""
    print(TABLE_HEAD)
    ok = agrees(row, z, emulate(model=model, **inputs, **row["settings"]))
    if row["settings"]["mode"] != "exact":
        ts, exact = inputs["ts"], emulate("exact", model, **inputs)
        halves = torch.cat([torch.stack((ts[:-1], (ts[:-1] + ts[1:]) / 2), 1).flatten(), ts[-1:]])
        finer = emulate("exact", model, **dict(inputs, ts=halves))
        stale, euler = ((x.norm() / exact.norm()).item() for x in (z - exact, 2 * (finer - exact)))
        print(f"  against the exact clip, L2: staleness {stale:.3f}, Euler itself {euler:.3f} "
              "(estimated by half steps)")
    decoded = difference(clip, alone)
    print(f"  decode: {decoded:.1e} from rank 0 alone")
    return verdict(ok and decoded < DECODED,
                   f"{row['mode']} equals one process within {row['rounding']:.0e}, decoded within "
                   f"{DECODED:.0e}")


def main(argv=None):
    """Run the demo or sample a run -> exit status."""
    open_stderr()
    if hasattr(sys.stdout, "reconfigure"):      # a prompt may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse(argv)
    try:
        if args.workdir:
            return sample_run(args)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--workdir: needed under torchrun (the demo forks ranks of its own)")
        return 0 if demo() else 1
    except BrokenPipeError:                                 # as by `| head`
        os._exit(0)
    except (ValueError, OSError) as error:
        fail((str(error).strip().splitlines() or [type(error).__name__])[0])


if __name__ == "__main__":
    sys.exit(main())
