"""sample_parallel.py: one prompt, many ranks, the same clip: xDiT's parallel modes for a video DiT.

               cfg 0: the prompt (cfg 1, the null text, is a second picture like this one)
         pp 0: first half of the blocks     pp 1: second half
        .-----------------------------.    .-----------------------------.
        | tokens of patch m           | h  | tokens of patch m - 1       |-> v, gathered over cfg,
        |  .- ring 0 -. .- ring 1 -.  |--->|  .- ring 0 -. .- ring 1 -.  |   guided, Euler step of
        |  | u 0  u 1 | | u 0  u 1 |  |    |  | u 0  u 1 | | u 0  u 1 |  |   patch, back to pp 0
        '-----------------------------'    '-----------------------------'
      CFG-parallel   prompt and null text on two groups; one all-gather of v a step
      PipeFusion     blocks on stages, patches flow through; K, V of later patches are stale
      Ring           tokens on ranks, K and V go round
      Ulysses        tokens on ranks, but within attention heads on ranks

The model is not touched and knows nothing of ranks. Only self-attention mixes tokens, so each mode
is one callable in the place of `block.attend(q, k, v)`, and they nest:
    Ulysses( StaleKV( Ring or plain attention ) )
What is left is a schedule: who works on which tokens when. Read `emulate` first: the whole
algorithm in one process, without ranks.

Papers: xDiT 2411.01738 [XD]; PipeFusion 2405.14430 [PF]; DistriFusion 2402.19481 [DF]; Ulysses
2309.14509; Ring Attention 2310.01889; USP (Ulysses in Ring) 2405.07719; Movie Gen 2410.13720 [MG].

Contract: ParallelSampler(model, mesh).sample(x0, text, mask, null, null_mask, guidance, steps)=x1
    x0 (B, ...) noise, fp32; text (B, L, D_text); mask (B, L) bool, True = attend
    x1 is on every rank. x0 and the text are rank 0's: other seeds elsewhere cannot make static.
    model: any with these seams; those on tokens must accept slices of the token axis
        patchify(x) -> (B,N,P)      positions(x.shape) -> (N,D)      condition(t (B,)) -> c
        embed(tokens) -> h (B,n,D)  blocks[i](h, pos, c, text, mask) -> h      head(h, c) -> (B,n,P)
        blocks[i].attend(q, k, v), its self-attention, each (B, heads, n, head_dim), assignable
        unpatchify(tokens, x.shape) -> x        optional: token_mask(x.shape) -> (N,P) bool or None

    python sample_parallel.py       # demo: every mode, PASS lines, time line     (25 s when idle)
    torchrun --nproc_per_node 4 sample_parallel.py --workdir runs/toy \\
        --prompt "a red circle moving left" --cfg 2 --ulysses 2 --check      # (25 s, mostly launch)
    python sample_parallel.py --plan --size 30b --gpus 16 --link 25   # what each mesh costs (3 s)

Which mode: CFG-parallel first, it is nearly free. Then Ulysses inside a node with fast links,
PipeFusion across slow ones (its traffic does not grow with depth), Ring where Ulysses runs out of
heads. `--plan` has the numbers.

Differences from the paper
    - PipeFusion for a video DiT: xDiT itself has it for image models only. Patches are bands of
      frames (--patch-axis t) by default, where its are bands of rows.
    - Uneven shares everywhere (tokens, heads, patches, blocks), by split lists, without padding.
      xDiT, Wan and diffusers ask for divisibility; padding would be attended to.
    - Ring inside PipeFusion: each rank caches its own K, V, and the whole cache goes round at every
      micro-step: M times the ring's traffic. Correct and seldom wise; Ulysses pays no such price.
    - Warm-up is at least one step (xDiT allows 0, and then attends to what a dummy run left over).
    - Euler only: with two evaluations a step, "the previous step's K, V" would be half a step old.
    - No tensor parallelism: PipeFusion and FSDP share out the weights.

Letters: B samples, b rows of a batch (2B with guidance in one process); N video tokens, n those of
a rank or a patch; P numbers in a token; D width; M patches; S steps; W warm-up steps; U, R Ulysses
and Ring degrees; L text tokens, but blocks where bytes are counted; t flow time.
"""
import argparse
import itertools
import math
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode

# ---- 1. Sizes and shares -------------------------------------------------------------------------

# Outermost to innermost, as in [XD]: neighbouring ranks, on the fastest links, do Ulysses, which
# talks in every layer; CFG, which talks once a step, and PipeFusion, once a patch, may cross nodes.
AXES = ("cfg", "pp", "ring", "ulysses")


@dataclass
class Size:
    """What `--plan` has to know of a model. A block has 4 D^2 weights in self-attention, 4 D^2 in
    cross-attention and 3 D ffn in the SwiGLU, as in Movie Gen."""
    dim: int
    depth: int
    heads: int
    ffn: int
    width: int = 64                 # P, numbers in a token: 16 channels x (1, 2, 2)
    frames: int = 8                 # video frames, and pixels each way, that one token stands for:
    pixels: int = 16                #   the TAE's compression times the patch

    @property
    def block(self):
        return 8 * self.dim**2 + 3 * self.dim * self.ffn

    @property
    def rest(self):       # embed, head, time MLP, shared adaLN: about, and less than 2 % from 1b on
        return 8 * self.dim**2 + 2 * self.dim * self.width


PRESETS = {
    "toy":   Size(256, 4, 8, 704, 128, 4, 16),
    "small": Size(384, 12, 6, 1024),
    "1b":    Size(1536, 24, 16, 4096),                               # the paper's sizes [MG s3.1.3]
    "5b":    Size(3072, 32, 24, 8192),
    "30b":   Size(6144, 48, 48, 16384),
}


def one_of(name, value, choices):
    """ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


def split(n, parts):
    """n things over parts, as equal as can be: split(7, 3) = [3, 2, 2]. The only rule of sharing in
    this file."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def spans(sizes):
    """[3, 2, 2] -> the slices 0:3, 3:5, 5:7."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


class Layout:
    """Which tokens a rank has: M patches of consecutive tokens, each cut into R x U shares.

    `order` sorts the N tokens so that a patch is a run: for bands of frames the model's own order,
    for bands of rows or columns a permutation, and nothing else changes, because positions travel
    with their tokens. A rank holds its share of *every* patch, one after another (patch-major),
    during the warm-up too: so it never changes tokens, and K, V computed in the warm-up are those
    that later micro-steps replace."""

    def __init__(self, order, M=1, R=1, U=1):
        if len(order) < M * R * U:
            raise ValueError(f"patches {M} x ring {R} x ulysses {U}: more shares than the "
                             f"{len(order)} tokens")
        self.order, self.M, self.R, self.U = order, M, R, U
        self.patch = spans(split(len(order), M))
        self.share = [split(n, R * U) for n in split(len(order), M)]           # share[m][r * U + u]

    def size(self, m, r, u):
        """How many tokens of patch m (None: of all patches) are on rank (r, u)."""
        return sum(self.share[i][r * self.U + u] for i in (range(self.M) if m is None else [m]))

    def shard(self, r):
        """How many K, V rows ring rank r holds: all patches, all its Ulysses members."""
        return sum(self.size(None, r, u) for u in range(self.U))

    def rows(self, r, u):
        """Indices into the model's tokens of what rank (r, u) holds, patch-major."""
        s = r * self.U + u
        return torch.cat([self.order[p][spans(self.share[m])[s]] for m, p in enumerate(self.patch)])

    def local(self, m, r, u):
        """Where patch m (None: everything) lies within the rows of rank (r, u)."""
        return slice(None) if m is None else spans([self.size(i, r, u) for i in range(self.M)])[m]

    def slot(self, m, r):
        """Where patch m lies within the K, V cache of ring rank r."""
        return spans([sum(self.size(i, r, u) for u in range(self.U)) for i in range(self.M)])[m]

    def splice(self, r):
        """Permutation from the order in which a warm-up's all-to-all delivers K, V to the cache's.

        The trap of PipeFusion x Ulysses. A warm-up delivers rows by rank, u0: p0 p1 | u1: p0 p1.
        Later micro-steps deliver one patch, p0: u0 u1, which must land on the very rows that it
        replaces: so the cache is kept by patch, p0: u0 u1 | p1: u0 u1. With the orders mixed up a
        patch overwrites half of itself and half of a neighbour. The clip looks as if nothing had
        happened (1.7 % off on the demo's model, staleness costs 5 %): only an oracle sees it."""
        patch = [torch.full((self.size(m, r, u),), m, device=self.order.device)
                 for u in range(self.U) for m in range(self.M)]
        return torch.cat(patch).argsort(stable=True)


def token_order(model, shape, axis, device=None):
    """(N,) permutation that makes bands along `axis` (t, h, w) runs of tokens, else in order.

    It asks the model itself: patchify a video whose every value is its own coordinate."""
    one_of("patch-axis", axis, ("t", "h", "w"))
    if len(shape) != 5:                      # several latent streams laid flat: no axis to speak of
        if axis != "t":
            raise ValueError(f"patch-axis {axis}: x {tuple(shape)} is not (B, C, T, H, W), only t "
                             "(the order of the tokens) is possible")
        return torch.arange(model.positions(shape).shape[0], device=device)
    d = {"t": 2, "h": 3, "w": 4}[axis]
    coordinate = torch.arange(shape[d], device=device, dtype=torch.float32)
    x = coordinate.view([-1 if i == d else 1 for i in range(5)]).expand(1, *shape[1:])
    return model.patchify(x)[0, :, 0].argsort(stable=True)                  # (N,)


# ---- 2. Ranks and the wire -----------------------------------------------------------------------

def check_degrees(world, cfg=1, pp=1, ring=1, ulysses=1, patches=0, warmup=1, guided=True,
                  depth=None, heads=None, steps=None):
    """ValueError for what can be known to be wrong before any rank talks: the same on all."""
    for name, value in {"cfg": cfg, "pp": pp, "ring": ring, "ulysses": ulysses}.items():
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if cfg > 2:
        raise ValueError(f"cfg {cfg}: not one of 1, 2 (guidance has two branches)")
    if cfg * pp * ring * ulysses != world:
        raise ValueError(f"cfg {cfg} x pp {pp} x ring {ring} x ulysses {ulysses} = "
                         f"{cfg * pp * ring * ulysses}: not the number of ranks, {world}")
    if cfg == 2 and not guided:
        raise ValueError("cfg 2: needs guidance, that is a null text")
    if pp == 1 and patches > 1:
        raise ValueError(f"patches {patches}: needs pp 2 or more (patches fill a pipeline)")
    if pp > 1 and 0 < patches < pp:
        raise ValueError(f"patches {patches}: fewer than the pp {pp} stages, some would idle")
    if patches < 0:
        raise ValueError(f"patches {patches}: must be 1 or more, or 0 for as many as stages")
    if warmup < 1:
        raise ValueError(f"warmup {warmup}: must be at least 1 (the first K, V come from it)")
    if steps is not None and pp > 1 and warmup > steps:
        raise ValueError(f"warmup {warmup}: more than the {steps} steps")
    if depth is not None and pp > depth:
        raise ValueError(f"pp {pp}: more stages than the model's {depth} blocks")
    if heads is not None and ulysses > heads:
        raise ValueError(f"ulysses {ulysses}: more ranks than the model's {heads} attention heads")


def make_mesh(cfg=1, pp=1, ring=1, ulysses=1, device="cpu"):
    """The DeviceMesh (cfg, pp, ring, ulysses) over all ranks; None in a process on its own.

    torch accepts a mesh smaller than the world, and leaves the other ranks out. We do not."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    check_degrees(world, cfg, pp, ring, ulysses)
    if not dist.is_initialized():
        return None
    mesh = init_device_mesh(device, (cfg, pp, ring, ulysses), mesh_dim_names=AXES)
    for name in AXES:
        dist.distributed_c10d._set_pg_timeout(patience(), mesh.get_group(name))
    return mesh


def patience():
    """The time-out of the whole world, for the groups made after it: torch would give them half an
    hour, for which all would wait in silence if one rank hung."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return dist.group.WORLD._get_backend(device).options._timeout


@dataclass
class Axis:
    """One axis of the mesh as this rank sees it."""
    size: int = 1
    index: int = 0
    group: object = None
    pairs: object = None            # for messages between two, where `group` has collectives, too


class Wire:
    """Bytes that this rank has sent, by purpose, counted where torch.distributed gets them."""

    def __init__(self):
        self.sent = Counter()

    def count(self, what, *tensors):
        self.sent[what] += sum(x.numel() * x.element_size() for x in tensors)


class Inbox:
    """Messages of known shapes from the rank src of the world. The irecv of the next one is always
    posted before this one is used, so that it arrives while we compute. (Shapes must be known: gloo
    sends bytes, not sizes.)"""

    def __init__(self, shapes, src, group, dtype, device):
        self.shapes, self.src, self.group = iter(shapes), src, group
        self.kind = {"dtype": dtype, "device": device}
        self._post()

    def _post(self):
        shape = next(self.shapes, None)
        if shape is not None:
            buffer = torch.empty(shape, **self.kind)
            self.next = buffer, dist.irecv(buffer, self.src, self.group)

    def get(self):
        buffer, work = self.next
        work.wait()
        self._post()
        return buffer


class Outbox:
    """isends in flight to the rank dst of the world: their tensors must stay alive and unchanged
    until they are gone.

    `limit` bounds the memory. It must not be below M: the last stage's latents are taken M
    micro-steps later."""

    def __init__(self, dst, group, wire, what, limit):
        self.dst, self.group, self.wire, self.what, self.limit = dst, group, wire, what, limit
        self.flying = deque()

    def send(self, x):
        x = x.contiguous()
        self.wire.count(self.what, x)
        self.flying.append((x, dist.isend(x, self.dst, self.group)))
        if len(self.flying) > self.limit:
            self.flying.popleft()[1].wait()

    def flush(self):
        while self.flying:
            self.flying.popleft()[1].wait()


def post_all_gather(x, sizes, dim, axis):
    """Everybody's x, of `sizes` along `dim` -> (works, parts). all_gather wants equal shapes."""
    x = x.contiguous()
    shape = lambda n: [n if i == dim % x.dim() else s for i, s in enumerate(x.shape)]
    parts = [x if i == axis.index else x.new_empty(shape(n)) for i, n in enumerate(sizes)]
    others, group = [i for i in range(axis.size) if i != axis.index], axis.pairs or axis.group
    ops = [dist.P2POp(dist.isend, x, group=group, group_peer=i) for i in others]
    ops += [dist.P2POp(dist.irecv, parts[i], group=group, group_peer=i) for i in others]
    return (dist.batch_isend_irecv(ops) if ops else []), parts


# ---- 3. Attention over ranks ---------------------------------------------------------------------
# Each takes q, k, v (b, heads, n, head_dim) after positions and norms, and answers for the rows of
# q, as the model's own attention would. Text needs nothing: in cross-attention every rank has all
# of it. (In models that put text and video into one sequence it must be neither forgotten nor
# counted once per ring rank: a real simplification of this design.)

attention = F.scaled_dot_product_attention


def attention_lse(q, k, v):
    """Attention over some of the keys, with what is needed to merge it with the rest:
    o = softmax(q k^T / sqrt(d)) v  and  lse = log sum exp(q k^T / sqrt(d)), (b, heads, n), fp32.
    On a GPU the fused kernel is there for 16-bit numbers; in fp32 the plain form builds (n, n), and
    is meant for small sizes."""
    if q.device.type == "cpu":          # fused kernels have the lse at hand, and never build (n, n)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    s = (q @ k.mT).float() / math.sqrt(q.shape[-1])                         # the definition
    return s.softmax(-1).to(v.dtype) @ v, s.logsumexp(-1)


class Ring:
    """Ring attention: queries stay, K and V go round in R - 1 hops behind the compute.

    Two partial softmaxes merge exactly, in fp32:
        o += sigmoid(lse_i - lse) (o_i - o),   lse = logaddexp(lse, lse_i)
    Not causal, so the ranks have equal work as they are and no zigzag order is needed. Both
    directions of a hop are posted together: a blocking send before the receive would deadlock."""

    def __init__(self, axis, sizes, wire):
        self.axis, self.sizes, self.wire = axis, sizes, wire    # sizes: K, V rows of each ring rank

    def __call__(self, q, k, v):
        R, r, group = self.axis.size, self.axis.index, self.axis.group
        # Contiguous: the fused op trusts q's strides, the wire kv's.
        q, kv = q.contiguous(), torch.stack((k, v)).contiguous()            # kv (2, b, h, n_r, d)
        o = lse = None
        for hop in range(R):
            works = []
            if hop < R - 1:
                coming = kv.new_empty(*kv.shape[:3], self.sizes[(r - hop - 1) % R], kv.shape[4])
                works = dist.batch_isend_irecv([
                    dist.P2POp(dist.isend, kv, group=group, group_peer=(r + 1) % R),
                    dist.P2POp(dist.irecv, coming, group=group, group_peer=(r - 1) % R)])
                self.wire.count("ring", kv)
            o_i, lse_i = attention_lse(q, *kv)
            o_i, lse_i = o_i.float(), lse_i[..., None]                  # (b, h, n, d), (b, h, n, 1)
            if o is None:
                o, lse = o_i, lse_i
            else:
                o = o + torch.sigmoid(lse_i - lse) * (o_i - o)
                lse = torch.logaddexp(lse, lse_i)
            for work in works:
                work.wait()
            if works:
                kv = coming
        return o.to(q.dtype)


class Ulysses:
    """DeepSpeed-Ulysses: one all-to-all turns (my tokens, all heads) into (all tokens, my heads),
    another turns back.

    Q, K, V travel packed in one message. The heads go in `len(cores)` pieces, each with its own
    pair of all-to-alls, all posted at once: piece 2 travels while piece 1 is computed. (On gloo a
    blocking exchange cost a third of the step.) Heads and tokens need not divide. `cores[i]` is the
    attention inside, over all the tokens of these U ranks: plain, Ring or StaleKV. Each output row
    is computed exactly as in one process: with plain attention inside, the clip is equal bit for
    bit."""

    def __init__(self, axis, cores, tokens, wire):
        self.axis, self.cores, self.wire = axis, cores, wire
        self.tokens = tokens                                # () -> the tokens of each member now

    def _post(self, parts, counts):
        """All-to-all: parts[u], flat, go to member u, and counts[u] numbers come from it."""
        sent = torch.cat([p for part in parts for p in part])
        sizes = [sum(p.numel() for p in part) for part in parts]
        if sent.requires_grad:          # training: the same exchange, with its transpose backwards
            got = all_to_all_single_autograd(sent, counts, sizes, self.axis.group)
            return None, got, sent
        got = sent.new_empty(sum(counts))
        work = dist.all_to_all_single(got, sent, counts, sizes, group=self.axis.group,
                                      async_op=True)
        self.wire.sent["ulysses"] += (sent.numel() - sizes[self.axis.index]) * sent.element_size()
        return work, got, sent                             # `sent` must live until the work is done

    def __call__(self, q, k, v):
        b, H, n, d = q.shape
        U, me, tokens = self.axis.size, self.axis.index, self.tokens()
        heads = split(H, U)
        if heads[-1] == 0:
            raise ValueError(f"ulysses {U}: more ranks than the model's {H} attention heads")
        pieces = min(len(self.cores), heads[-1])
        owned = spans(heads)                           # piece i of every member's heads: span[u][i]
        span = [[slice(o.start + s.start, o.start + s.stop) for s in spans(split(h, pieces))]
                for o, h in zip(owned, heads)]
        mine = split(heads[me], pieces)
        there, back = [], []
        for i in range(pieces):
            parts = [[a[:, span[u][i]].reshape(-1) for a in (q, k, v)] for u in range(U)]
            there.append(self._post(parts, [3 * b * mine[i] * t * d for t in tokens]))
        for i, (work, got, _) in enumerate(there):
            if work is not None:
                work.wait()
            got = got.split([3 * b * mine[i] * t * d for t in tokens])
            qkv = torch.cat([g.view(3, b, mine[i], t, d) for g, t in zip(got, tokens)], dim=3)
            o = self.cores[i](*qkv)                                   # (b, my heads, all tokens, d)
            parts = [[o_u.reshape(-1)] for o_u in o.split(tokens, dim=2)]
            back.append(self._post(parts,
                                   [b * split(heads[u], pieces)[i] * n * d for u in range(U)]))
        out = torch.empty_like(q)
        for i, (work, got, _) in enumerate(back):
            if work is not None:
                work.wait()
            for u, g in enumerate(got.split([b * split(heads[u], pieces)[i] * n * d
                                             for u in range(U)])):
                out[:, span[u][i]] = g.view(b, -1, n, d)
        return out                                                    # (b, all heads, my tokens, d)


@dataclass
class Now:
    """Where the schedule stands; the attentions look here."""
    step: int = 0
    patch: int | None = None        # None: the whole sequence (warm-up, and without PipeFusion)


class StaleKV:
    """PipeFusion's attention [PF]: Q of one patch against K, V of all, of which the later ones are
    one step old.

    Warm-up: attend to everything, keep K, V. Then patch m writes its rows and attends to the whole
    cache: patches 0..m are of this step, m+1..M-1 of the last, a fresh share of (M+1)/2M on average
    where DistriFusion has 1/M. The cache is made anew for each sample: K, V of another prompt, or
    of another batch size after guidance was switched, never get in.

    K, V are kept after the Ulysses exchange (all rows, my heads: no extra traffic), or per Ring
    rank (my rows, all heads)."""

    def __init__(self, core, layout, r, now):
        self.core, self.layout, self.r, self.now = core, layout, r, now
        self.splice = layout.splice(r)
        self.age = [None] * layout.M   # the step of the K, V in each slot: what the time line draws

    def __call__(self, q, k, v):
        m = self.now.patch
        if m is None:
            q, k, v = (a[:, :, self.splice] for a in (q, k, v))                # patch-major, copies
            self.k, self.v = k, v
            self.age = [self.now.step] * self.layout.M
            o = torch.empty_like(q)
            o[:, :, self.splice] = self.core(q, k, v)                                   # and back
            return o
        slot = self.layout.slot(m, self.r)
        self.k[:, :, slot], self.v[:, :, slot] = k, v
        self.age[m] = self.now.step
        return self.core(q, self.k, self.v)


class DistriFusion:
    """Baseline [DF]: every rank does its own patch, all at once; K, V of the others are one step
    old and travel behind the compute of a whole step. exchange=False: they do not travel at all,
    which is what independent tiles are."""

    def __init__(self, axis, sizes, now, warmup, wire, exchange=True):
        self.axis, self.sizes, self.now, self.warmup, self.wire = axis, sizes, now, warmup, wire
        self.exchange, self.flying = exchange, ([], [])

    def __call__(self, q, k, v):
        fresh = self.now.step < self.warmup
        if not fresh and not self.exchange:
            return attention(q, k, v)
        kv, stale = torch.stack((k, v)), self.flying
        self.flying = post_all_gather(kv, self.sizes, 3, self.axis)
        self.wire.sent["kv"] += kv.nbytes * (self.axis.size - 1)
        works, parts = self.flying if fresh else stale      # stale: posted in this layer a step ago
        while works:
            works.pop().wait()
        parts[self.axis.index] = kv
        return attention(q, *torch.cat(parts, dim=3))

    def finish(self):
        for work in self.flying[0]:
            work.wait()


# ---- 4. The oracle: each mode in one process -----------------------------------------------------

def both_branches(B, text, mask=None, null=None, null_mask=None):
    """Prompt and null text as one batch (prompt rows first): the shorter is padded with tokens that
    the mask hides."""
    if null is None:
        return text, mask
    null = null.expand(B, *null.shape[-2:])
    L = max(text.shape[1], null.shape[1])
    pairs = (text, mask), (null, null_mask)
    if text.shape[1] != null.shape[1] or mask is not None or null_mask is not None:
        all_true = lambda P: torch.ones(P.shape[:2], dtype=torch.bool, device=P.device)
        masks = [all_true(P) if m is None else m.expand(P.shape[:2]) for P, m in pairs]
        mask = torch.cat([F.pad(m, (0, L - m.shape[1])) for m in masks])                # (2B, L)
    return torch.cat([F.pad(P, (0, 0, 0, L - P.shape[1])) for P, _ in pairs]), mask     # (2B, L, D)


def times(ts, steps):
    """The times to visit (S + 1,), fp32: ts, or `steps` equal steps. ValueError unless they lead
    from 0, noise, to 1, data."""
    if ts is None:
        if steps < 1:
            raise ValueError(f"steps {steps}: must be at least 1")
        return torch.linspace(0, 1, steps + 1)
    ts = torch.as_tensor(ts).float().cpu()
    if ts.dim() != 1 or len(ts) < 2 or ts[0].abs() > 1e-6 or not (ts[-1] - 1).abs() < 1e-6:
        raise ValueError(f"ts {ts.tolist()}: needs two times or more, from 0 to 1")
    return ts


def guide(v, guidance):
    """Classifier-free guidance of a batch with both: v_null + guidance (v_prompt - v_null)."""
    prompt, null = v.chunk(2)
    return null + guidance * (prompt - null)


@torch.no_grad()
def emulate(mode, model, x0, text, mask=None, null=None, null_mask=None, guidance=1.0, steps=50,
            ts=None, patches=1, warmup=1, patch_axis="t"):
    """x1 like x0 in one process, patch by patch, with the K, V that the ranks of `mode` see.

        exact          all tokens at once: the clip that every exact mode must reproduce
        pipefusion     patch m sees this step's K, V of patches 0..m, the last step's of others [PF]
        distrifusion   every patch sees its own fresh K, V and the last step's of all others    [DF]
        no_exchange    every patch sees itself alone

    The number of stages does not occur: cutting the *blocks* among ranks changes who computes, not
    what. The real samplers are tested against this function, bit for bit where the arithmetic is
    the same."""
    one_of("mode", mode, ("exact", "pipefusion", "distrifusion", "no_exchange"))
    ts = times(ts, steps).to(x0.device)
    guided, B, dtype = null is not None, x0.shape[0], next(model.parameters()).dtype
    text, mask = both_branches(B, text, mask, null, null_mask)
    b = B * (2 if guided else 1)
    M = 1 if mode == "exact" else patches
    N = model.positions(x0.shape).shape[0]
    order = (token_order(model, x0.shape, patch_axis, x0.device) if M > 1
             else torch.arange(N, device=x0.device))
    pos = model.positions(x0.shape)[order]                                              # (N, D)
    x = model.patchify(x0.float())[:, order]                       # (B, N, P): the state of the ODE
    real = real_columns(model, x0.shape, order)
    stale, fresh = {}, {}                      # block number -> [K, V] of the last and of this step

    def attend(block, q, k, v):
        kv = torch.stack((k, v))
        if part == slice(None):                        # whole sequence: keep K and V of all patches
            stale[block] = kv
            fresh[block] = kv.clone()
            return attention(q, k, v)
        if mode == "pipefusion":             # one cache: earlier patches have already written to it
            stale[block][:, :, :, part] = kv
            return attention(q, *stale[block])
        if mode == "distrifusion":       # two caches: nobody sees this step's K, V of another patch
            fresh[block][:, :, :, part] = kv
            seen = stale[block].clone()
            seen[:, :, :, part] = kv
            return attention(q, *seen)
        return attention(q, k, v)

    with swapped_attention({block: partial(attend, i) for i, block in enumerate(model.blocks)}):
        for i in range(len(ts) - 1):
            whole = mode == "exact" or i < warmup
            c = model.condition(ts[i].expand(b))
            for part in [slice(None)] if whole else Layout(order, M).patch:
                h = model.embed(torch.cat([x[:, part]] * (b // B)).to(dtype))           # (b, n, D)
                for block in model.blocks:
                    h = block(h, pos[part], c, text, mask)
                v = model.head(h, c).float()                                            # (b, n, P)
                v = guide(v, guidance) if guided else v
                x[:, part] += (ts[i + 1] - ts[i]) * v * real[part]      # Euler, of these tokens
            if mode == "distrifusion" and not whole:
                stale, fresh = fresh, stale
    back = torch.empty_like(x)
    back[:, order] = x
    return model.unpatchify(back, x0.shape)


def real_columns(model, shape, rows):
    """(n, P) of 1 where a token has data, or 1.0. Tokens of several latent streams carry columns
    that are not theirs: embed must find zeros there, at every step."""
    mask = model.token_mask(shape) if hasattr(model, "token_mask") else None
    return torch.ones(len(rows), 1, device=rows.device) if mask is None else mask[rows].float()


@contextmanager
def swapped_attention(attends):
    """{block: callable}: within this context the blocks attend so, afterwards as before."""
    before = {block: block.attend for block in attends}
    try:
        for block, attend in attends.items():
            block.attend = attend
        yield
    finally:
        for block, attend in before.items():
            block.attend = attend


# ---- 5. The sampler ------------------------------------------------------------------------------

class LostRank(RuntimeError):
    """Another rank died, or was silent for longer than the time-out."""


def is_loss(error):
    """torch.distributed has no exception of its own for this on gloo, only words."""
    words, text = ("gloo", "connection", "barrier", "timed out", "timeout"), str(error).lower()
    return isinstance(error, LostRank | dist.DistError) or any(w in text for w in words)


class ParallelSampler:
    """Samples any model that has the seams (module docstring) over the ranks of `make_mesh(...)`.

        patches      M; 0: as many as stages      warmup      W whole steps before the pipe fills
        patch_axis   bands of frames (t), rows (h) or columns (w)           pieces      see Ulysses
        baseline     "distrifusion" or "no_exchange", on the mesh's ring axis
        record       keep `events`: (stage, step, patch, start, end, age of each K, V slot)
    After a sample, `wire.sent` holds the bytes sent in its steps (not those that deal out the noise
    and the text, and put the clip together: once each), and `facts` what `traffic` predicts them
    from.
    ValueError for settings that cannot work, on every rank; LostRank when another one is gone."""

    def __init__(self, model, mesh=None, patches=0, warmup=1, patch_axis="t", baseline=None,
                 pieces=2, record=False):
        one = lambda m: Axis(m.size(), m.get_local_rank(), m.get_group())
        axes = [Axis() if mesh is None else one(mesh[name]) for name in AXES]
        self.cfg, self.pp, self.ring, self.ulysses = axes
        self.degrees = {name: axis.size for name, axis in zip(AXES, axes)}
        joined = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.model, self.warmup, self.patch_axis = model, warmup, patch_axis
        self.baseline, self.pieces, self.record = baseline, pieces, record
        depth, config = len(model.blocks), getattr(model, "cfg", None)
        check_degrees(self.world, **self.degrees, patches=patches, warmup=warmup, depth=depth,
                      heads=getattr(config, "heads", None))
        one_of("patch-axis", patch_axis, ("t", "h", "w"))
        if getattr(config, "conditioning", None) == "in_context":
            raise ValueError("conditioning in_context: its time token is no video token, parallel "
                             "sampling cannot place it")
        if baseline is not None:
            one_of("baseline", baseline, ("distrifusion", "no_exchange"))
            if self.pp.size > 1 or self.ulysses.size > 1:
                raise ValueError(f"baseline {baseline}: needs pp 1 and ulysses 1")
        self.M = (patches or self.pp.size) if self.pp.size > 1 else 1
        self.mine = spans(split(depth, self.pp.size))[self.pp.index]        # my stage's blocks
        self.first, self.last = self.pp.index == 0, self.pp.index == self.pp.size - 1
        # A group for each link of a pipeline's circle, used in one direction. NCCL runs a group's
        # messages in the order of their posting: with two links in it, a send would wait behind the
        # receive of a later patch. And it makes a pair at its first message, where both wait for
        # each other: so here, link by link. (Nor does the mesh's own group serve: it may be the
        # world, whose collectives TORCH_DISTRIBUTED_DEBUG=DETAIL counts with messages.)
        self.prev = self.next = None                # (rank, group) of my two links
        if self.pp.size > 1:
            one = torch.zeros(1, device=next(model.parameters()).device)
            for line in rearrange(mesh.mesh, "c p r u -> (c r u) p").tolist():
                for a, b in zip(line, line[1:] + line[:1]):
                    group = dist.new_group([a, b], patience())
                    if self.rank == a:
                        self.next = b, group
                        dist.isend(one, b, group).wait()
                    if self.rank == b:
                        self.prev = a, group
                        dist.irecv(one, a, group).wait()
        self.wire, self.events, self.facts = Wire(), [], {}
        self._agree(settings=(self.degrees, self.M, warmup, patch_axis, baseline),
                    **self._fingerprint())

    # -- before: all ranks hold the same things ----------------------------------------------------

    def _fingerprint(self):
        """A sum for each weight here: a rank with other weights would turn the clip to noise."""
        plain = lambda p: not p.is_meta and type(p) is nn.Parameter  # FSDP's shards differ, rightly
        weights = self.model.named_parameters()
        return {f"weights {name}": p.detach().double().sum().item()
                for name, p in weights if plain(p)}

    def _agree(self, **mine):
        if self.world == 1:
            return
        everyone, first = [None] * self.world, {}           # a stage has only some of the weights
        dist.all_gather_object(everyone, mine)
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                other, wanted = first.setdefault(name, (rank, value))
                near = isinstance(value, float) and math.isclose(value, wanted, rel_tol=1e-6,
                                                                 abs_tol=1e-6)
                if not near and str(value) != str(wanted):              # as words, NaN is itself
                    raise ValueError(f"{name}: rank {rank} has another than rank {other}")

    def _from_rank0(self, x):
        if x is None or self.world == 1:
            return x
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x.clone().contiguous()
        dist.broadcast(sent, 0)
        return sent.to(x.dtype)

    # -- the sample --------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, x0, text, mask=None, null=None, null_mask=None, guidance=1.0, steps=50,
               ts=None, progress=False):
        """x0 (B, ...), text (B, L, D_text), mask (B, L); null (B or 1, L', D_text) turns guidance
        on. -> x1 like x0, on every rank. ts (S+1,) is a schedule from 0 to 1; without it `steps`
        equal steps. progress: a bar, on rank 0."""
        ts = times(ts, steps)
        guided, self.step = null is not None, 0
        for name, P, sizes in (("text", text, [len(x0)]), ("null", null, [1, len(x0)])):
            if P is not None and len(P) not in sizes:
                raise ValueError(f"{name}: a batch of {len(P)}, but x0 is one of {len(x0)}")
        check_degrees(self.world, **self.degrees, warmup=self.warmup, guided=guided,
                      steps=len(ts) - 1)
        shapes = [None if a is None else tuple(a.shape) for a in (x0, text, mask, null, null_mask)]
        try:
            self._agree(shapes=shapes, guidance=guidance, ts=ts.tolist())
            x0, text, mask, null, null_mask = map(self._from_rank0,
                                                  (x0.float(), text, mask, null, null_mask))
            return self._sample(x0, text, mask, null, null_mask, guidance, ts, progress)
        except RuntimeError as error:
            if not is_loss(error):
                raise
            reason = str(error).strip().splitlines()[0][:160]
            raise LostRank(f"rank {self.rank}: lost contact with another rank in step {self.step} "
                           f"({reason})") from error

    def _sample(self, x0, text, mask, null, null_mask, guidance, ts, progress):
        model, now, wire = self.model, Now(), Wire()
        guided, B, S = null is not None, x0.shape[0], len(ts) - 1
        ts = ts.to(x0.device)                           # here, once: each such copy stops the CPU
        N = model.positions(x0.shape).shape[0]
        order = (token_order(model, x0.shape, self.patch_axis, x0.device)
                 if self.M > 1 or self.baseline else torch.arange(N, device=x0.device))
        layout = Layout(order, self.M, self.ring.size, self.ulysses.size)
        me = self.ring.index, self.ulysses.index
        rows = layout.rows(*me)                             # my tokens, for the whole sample
        pos = model.positions(x0.shape)[rows]                                           # (n, D)
        real = real_columns(model, x0.shape, rows)
        x = model.patchify(x0)[:, rows].clone()                             # (B, n, P) fp32

        # Text: both branches in one batch, or with cfg 2 this rank's branch.
        text, mask = both_branches(B, text, mask, null, null_mask)
        if self.cfg.size == 2:
            text = text.chunk(2)[self.cfg.index]
            mask = None if mask is None else mask.chunk(2)[self.cfg.index]
        b = text.shape[0]
        dtype = next(model.parameters()).dtype
        condition = lambda i: model.condition(ts[i].expand(b))

        # One token through one block tells width, dtype and heads of whatever model this is.
        blocks, heads = list(model.blocks[self.mine]), []

        def look(q, k, v):
            heads.extend((q.shape[1], q.element_size()))
            return attention(q, k, v)
        with swapped_attention({blocks[0]: look}):
            h = model.embed(torch.cat([x[:, :1]] * (b // B)).to(dtype))
            h = blocks[0](h, pos[:1], condition(0), text, mask)
        D, hidden_dtype = h.shape[-1], h.dtype
        check_degrees(self.world, **self.degrees, heads=heads[0])
        self.facts = {"N": N, "D": D, "L": len(model.blocks), "P": x.shape[-1], "B": B,
                      "branches": 1 + guided, "S": S, "W": self.warmup, "M": self.M,
                      "size": heads[1], "hidden_size": h.element_size(), "heads": heads[0]}

        attends = {block: self._attend(layout, now, wire) for block in blocks}
        items = [(i, None) for i in range(S if self.pp.size == 1 else self.warmup)]
        items += [(i, m) for i in range(len(items), S) for m in range(self.M)]

        # Mail. Stage p gets hidden tokens from stage p - 1 for every item; the first stage gets the
        # tokens that the last has stepped, for every item but those of the last step.
        n = lambda m: layout.size(m, *me)
        inbox = outbox = None
        if self.pp.size > 1:
            hidden = [(b, n(m), D) for _, m in items], *self.prev, hidden_dtype
            latent = [(B, n(m), x.shape[-1]) for i, m in items if i < S - 1], *self.prev, x.dtype
            inbox = Inbox(*(latent if self.first else hidden), x.device)
            outbox = Outbox(*self.next, wire, "latent" if self.last else "hidden",
                            2 * self.M + self.pp.size)

        bar = None
        if progress and self.rank == 0:
            from tqdm import tqdm
            bar = tqdm(total=S, desc="sample", unit="step")
        self.events, c, c_step = [], None, None
        with swapped_attention(attends):
            for i, m in items:
                now.step, now.patch, self.step = i, m, i
                part = layout.local(m, *me)
                if c_step != i:
                    c, c_step = condition(i), i
                if self.first:
                    # Step i - 1 of these tokens comes back from the last stage: whole after a
                    # warm-up step (taken with the first patch), else patch by patch.
                    if inbox and i > 0 and (m in (None, 0) or i > self.warmup):
                        x[:, layout.local(m if i > self.warmup else None, *me)] = inbox.get()
                    start = time.perf_counter()
                    h = model.embed(torch.cat([x[:, part]] * (b // B)).to(dtype))       # (b, n, D)
                else:
                    h = inbox.get()                                                     # (b, n, D)
                    start = time.perf_counter()
                for block in blocks:
                    h = block(h, pos[part], c, text, mask)
                if not self.last:
                    end = time.perf_counter()
                    outbox.send(h)
                else:
                    v = model.head(h, c).float()                                        # (b, n, P)
                    if self.cfg.size == 2:
                        v = self._gather_branches(v, wire)                              # (2B, n, P)
                    v = guide(v, guidance) if guided else v
                    x[:, part] += (ts[i + 1] - ts[i]) * v * real[part]  # Euler, of these tokens
                    end = time.perf_counter()
                    if outbox and i < S - 1:
                        outbox.send(x[:, part])         # rows that change only after it was used
                if self.record:
                    inner = attends[blocks[0]]
                    inner = inner.cores[0] if isinstance(inner, Ulysses) else inner
                    self.events.append((self.pp.index, i, m, start, end,
                                        tuple(getattr(inner, "age", ()))))
                if bar is not None and m in (None, self.M - 1):
                    bar.update()
        if outbox:
            outbox.flush()
        for attend in attends.values():
            if isinstance(attend, DistriFusion):
                attend.finish()
        if bar is not None:
            bar.close()
        self.wire = wire
        return model.unpatchify(self._assemble(x, rows, N), x0.shape)

    def _attend(self, layout, now, wire):
        """A block's attention: Ulysses( StaleKV( Ring or plain ) ), less what has degree 1."""
        shards = [layout.shard(r) for r in range(layout.R)]
        if self.baseline:
            return DistriFusion(self.ring, shards, now, self.warmup, wire,
                                self.baseline == "distrifusion")
        core = Ring(self.ring, shards, wire) if self.ring.size > 1 else attention
        cached = lambda: StaleKV(core, layout, self.ring.index, now) if self.pp.size > 1 else core
        if self.ulysses.size == 1:
            return cached()
        tokens = lambda: [layout.size(now.patch, self.ring.index, u)
                          for u in range(self.ulysses.size)]
        return Ulysses(self.ulysses, [cached() for _ in range(self.pieces)], tokens, wire)

    def _gather_branches(self, v, wire):
        """CFG-parallel: my branch of v (B, n, P) -> both, prompt first (2B, n, P)."""
        both = [torch.empty_like(v), torch.empty_like(v)]
        dist.all_gather(both, v.contiguous(), group=self.cfg.group)
        wire.count("cfg", v)
        return torch.cat(both)

    def _assemble(self, x, rows, N):
        """Everybody's final tokens -> all tokens on every rank, (B, N, P): once a sample, since
        Euler itself is token-wise and needs no gather. Each writes its rows into zeros, and the sum
        over ranks is exact."""
        full = x.new_zeros(x.shape[0], N, x.shape[2])
        if self.last and self.cfg.index == 0:
            full[:, rows] = x
        if self.world > 1:
            dist.all_reduce(full)
        return full


# ---- 6. Weights over ranks -----------------------------------------------------------------------

class Elsewhere(nn.Module):
    """Stands for a block that another stage has: no weights, and no way to run it by mistake."""

    def forward(self, *_):
        raise RuntimeError("this block belongs to another pipeline stage")


def keep_stage(model, pp, index):
    """Drop the blocks of the other stages, in place: a PipeFusion rank needs 1/pp of them. Done to
    a model on the meta device, the others are never read (`prepare` of train.load_run)."""
    mine = spans(split(len(model.blocks), pp))[index]
    for i in range(len(model.blocks)):
        if not mine.start <= i < mine.stop:
            model.blocks[i] = Elsewhere()
    return model


def shard_weights(model, mesh):
    """FSDP2 over the ranks that share tokens, not blocks (ring x ulysses): each keeps a slice of
    every block, and gathers a block while it runs. Only blocks: the rest is used outside of
    `forward`, where FSDP's hooks do not see it."""
    from torch.distributed.fsdp import fully_shard
    ranks = mesh["ring", "ulysses"]._flatten("sequence")
    for block in model.blocks:
        if not isinstance(block, Elsewhere):
            fully_shard(block, mesh=ranks, reshard_after_forward=True)
    return model


# ---- 7. Decoding over ranks ----------------------------------------------------------------------

class Halo(TorchFunctionMode):
    """Runs a convolutional decoder on a band of rows as if it had the whole picture. The decoder is
    not touched: this mode sees torch's functions on their way and changes what looks across rows.

        padding above and below    the neighbour's rows; the picture's own edge keeps its padding
        group norm                 mean and variance over all bands
        attention over space       K and V of all bands; attention over time stays as it is
        refused, by a ValueError   strides across rows, kernels that change their number, pooling,
                                   unfolding, smooth interpolation, norms over rows or the batch
    Layouts: pictures (frames, C, H, W) or (B, C, T, H, W), attention (sequences, heads, tokens, d)
    with tokens row by row. These functions are all that it knows: a mean or a flip over rows in
    plain arithmetic stays one of the band. So check a new decoder once, as `--check` does."""

    def __init__(self, axis, rows, width, wire=None):
        super().__init__()
        self.axis, self.wire = axis, wire or Wire()
        self.rows, self.width = rows, width                 # latent rows of each band; columns
        self.replace = {
            F.conv2d: self.conv, F.conv3d: self.conv, F.pad: self.pad,
            F.group_norm: self.group_norm,
            F.scaled_dot_product_attention: self.attend, F.interpolate: self.interpolate,
            F.layer_norm: self.layer_norm, F.rms_norm: self.layer_norm,
            F.batch_norm: self.batch_norm}
        self.replace |= dict.fromkeys((
            F.conv_transpose2d, F.conv_transpose3d, F.instance_norm, F.avg_pool2d, F.avg_pool3d,
            F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
            F.adaptive_max_pool2d, F.adaptive_max_pool3d, F.grid_sample, F.unfold, F.fold),
            self.refuse)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.replace:
            return self.replace[func](func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def refuse(self, func, *args, **kwargs):
        raise ValueError(f"decode halo: {func.__name__} looks across rows in a way that is not "
                         "supported, use --decode one")

    def extend(self, x, top, bottom, edge):
        """x (..., h, w) with `top` rows of the neighbour above and `bottom` of the one below.
        edge(x, top, bottom): the padding at the picture's own edge."""
        i, last = self.axis.index, self.axis.size - 1
        if min(self.rows) * x.shape[-2] // self.rows[i] < max(top, bottom):
            raise ValueError(f"decode halo: bands of {min(self.rows)} latent rows are too "
                             "thin, use fewer ranks")
        row = lambda n: x.new_empty(*x.shape[:-2], n, x.shape[-1])
        above, below, ops = row(top if i > 0 else 0), row(bottom if i < last else 0), []
        for peer, mine, theirs in ((i - 1, x[..., :bottom, :], above),
                                   (i + 1, x[..., x.shape[-2] - top:, :], below)):
            if 0 <= peer <= last:
                mine = mine.contiguous()
                self.wire.count("halo", mine)
                ops += [dist.P2POp(op, a, group=self.axis.pairs, group_peer=peer)
                        for op, a in ((dist.isend, mine), (dist.irecv, theirs)) if a.numel()]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        x = torch.cat([above, x, below], dim=-2)
        return edge(x, top if i == 0 else 0, bottom if i == last else 0)

    def conv(self, func, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        k = weight.dim() - 2
        if isinstance(padding, str):
            self.refuse(func)
        padding, steps, spread = ([a] * k if isinstance(a, int) else list(a)
                                  for a in (padding, stride, dilation))
        p, padding[k - 2] = padding[k - 2], 0
        reach = spread[k - 2] * (weight.shape[-2] - 1)
        if steps[k - 2] != 1 or p and 2 * p != reach or not p and x.shape[-2] <= reach:
            self.refuse(func)
        if p:                                           # without: not over rows, or after F.pad
            x = self.extend(x, p, p, lambda x, top, bottom: F.pad(x, (0, 0, top, bottom)))
        return func(x, weight, bias, stride, padding, dilation, groups)

    def pad(self, func, x, pad, mode="constant", value=None):
        pad = list(pad)
        if x.dim() < 4 or len(pad) < 4 or pad[2] == pad[3] == 0:
            return func(x, pad, mode, value)
        if mode == "circular" or min(pad[2:4]) < 0:
            self.refuse(func)
        top, bottom, pad[2], pad[3] = pad[2], pad[3], 0, 0
        zeros = [0] * (len(pad) - 4)

        def edge(x, top, bottom):
            return func(x, [0, 0, top, bottom, *zeros], mode, value)
        return func(self.extend(x, top, bottom, edge), pad, mode, value)

    def group_norm(self, func, x, num_groups, weight=None, bias=None, eps=1e-5):
        if x.dim() < 4:                                # one pixel's frames: nothing of another band
            return func(x, num_groups, weight, bias, eps)
        groups = x.float().reshape(x.shape[0], num_groups, -1)
        var, mean = (a.double() for a in torch.var_mean(groups, dim=-1, correction=0))
        n = torch.full_like(mean, groups.shape[-1])
        n, s, ss = sums = torch.stack([n, n * mean, n * (var + mean**2)])
        dist.all_reduce(sums, group=self.axis.group)
        self.wire.count("halo", sums)
        mean = s / n
        rstd = (ss / n - mean**2 + eps).rsqrt()
        y = ((groups - mean[..., None].float()) * rstd[..., None].float()).view(x.shape)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = y if weight is None else y * weight.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(x.dtype)

    def layer_norm(self, func, x, normalized_shape, *args, **kwargs):
        if len(normalized_shape) > 1:
            self.refuse(func)
        return func(x, normalized_shape, *args, **kwargs)

    def batch_norm(self, func, *args, training=False, **kwargs):
        if training:
            self.refuse(func)
        return func(*args, training=training, **kwargs)

    def attend(self, func, q, k, v, *args, **kwargs):
        # Tokens that are a multiple of the band's pixels: over space. Sequences that are: over
        # time. What one rank cannot tell, another may, so they say what is possible for each.
        n, pixels = k.shape[-2], self.rows[self.axis.index] * self.width
        possible = torch.tensor([n % pixels == 0, q.shape[0] % pixels == 0], device=q.device).int()
        dist.all_reduce(possible, dist.ReduceOp.MIN, group=self.axis.group)
        space, elsewhere = possible.tolist()
        if space == elsewhere:
            raise ValueError(f"decode halo: attention of {q.shape[0]} sequences of {n} tokens: "
                             "over space or over time? use --decode one")
        if space:
            sizes = [n // self.rows[self.axis.index] * r for r in self.rows]
            works, parts = post_all_gather(torch.stack((k, v)), sizes, -2, self.axis)
            for work in works:
                work.wait()
            self.wire.sent["halo"] += 2 * k.numel() * k.element_size() * (self.axis.size - 1)
            k, v = torch.cat(parts, dim=-2)
        return func(q, k, v, *args, **kwargs)

    def interpolate(self, func, x, *args, **kwargs):
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "nearest")
        scale = kwargs.get("scale_factor", args[1] if len(args) > 1 else None)
        scale = scale[-2] if isinstance(scale, (tuple, list)) else scale
        if not mode.startswith("nearest") or scale is None or scale != int(scale):
            self.refuse(func)
        return func(x, *args, **kwargs)


@lru_cache(maxsize=1)
def pairs_of(world):
    """A process group of its own for point-to-point traffic."""
    return dist.new_group(timeout=patience())


def everyone():
    """The whole world as one axis: decoding needs no mesh."""
    if not dist.is_initialized():
        return Axis()
    world = dist.group.WORLD
    return Axis(dist.get_world_size(), dist.get_rank(), world, pairs_of(world))


@torch.no_grad()
def halo_decode(decode, z):
    """decode(z) by all ranks, each on a band of rows of z (B, C, T, H, W), the same z on all. ->
    the clip on rank 0, equal to decode(z) up to rounding; None on the others. Memory
    for activations falls with the number of ranks."""
    axis = everyone()
    if z.dim() != 5 or z.shape[3] < axis.size:
        raise ValueError(f"decode halo: latent {tuple(z.shape)} has no {axis.size} bands of rows, "
                         "use --decode one")
    if axis.size == 1:
        return decode(z)
    rows = split(z.shape[3], axis.size)
    with Halo(axis, rows, z.shape[4]):
        y = decode(z[:, :, :, spans(rows)[axis.index]])
    heights, W = [None] * axis.size, z.shape[4]
    dist.all_gather_object(heights, y.shape[3])
    per_row = heights[0] // rows[0]
    whole = per_row * (W - 1) < y.shape[4] <= per_row * W   # columns grow likewise, may be cropped
    if heights != [per_row * r for r in rows] or not whole:
        raise ValueError(f"decode halo: {rows} latent rows of {W} became {heights} of "
                         f"{y.shape[4]}, not a picture in bands, use --decode one")
    if axis.index > 0:
        dist.isend(y.contiguous(), group=axis.pairs, group_dst=0).wait()
        return None
    parts = [y] + [y.new_empty(*y.shape[:3], per_row * r, y.shape[4]) for r in rows[1:]]
    coming = [dist.irecv(parts[i], group=axis.pairs, group_src=i) for i in range(1, axis.size)]
    for work in coming:
        work.wait()
    return torch.cat(parts, dim=3)


@torch.no_grad()
def tiled_decode(decode, z, tile=4, overlap=2):
    """Movie Gen's decoding in tiles along time [MG s3.1.1]: `tile` latent frames, `overlap` of them
    shared and blended linearly; tile i goes to rank i mod ranks. -> the clip on rank 0; None on the
    others. The same clip at every number of ranks, but not that of one pass: each tile knows only
    its own frames. No exchange at all: for slow links and long clips."""
    axis = everyone()
    if z.dim() != 5 or not 0 <= overlap < tile:
        raise ValueError(f"decode tiles: latent {tuple(z.shape)}, tile {tile}, overlap {overlap}: "
                         "needs (B, C, T, H, W) and overlap < tile")
    T = z.shape[2]
    starts = list(range(0, max(T - overlap, 1), tile - overlap))
    if len(starts) == 1:
        return decode(z) if axis.index == 0 else None
    mine = {s: decode(z[:, :, s:s + tile]) for s in starts[axis.index::axis.size]}
    if axis.index > 0:
        for y in mine.values():
            dist.isend(y.contiguous(), group=axis.pairs, group_dst=0).wait()
        return None
    f, odd = divmod(mine[0].shape[2], tile)                         # video frames of a latent frame
    if odd:
        raise ValueError(f"decode tiles: {mine[0].shape[2]} frames from {tile} latent ones, the "
                         "decoder drops some; use --decode one")
    for i, s in enumerate(starts):
        if i % axis.size:
            mine[s] = mine[0].new_empty(*mine[0].shape[:2], f * min(tile, T - s),
                                        *mine[0].shape[3:])
            dist.irecv(mine[s], group=axis.pairs, group_src=i % axis.size).wait()
    clip = mine[0].new_zeros(*mine[0].shape[:2], f * T, *mine[0].shape[3:])
    for s in starts:
        y, n = mine[s], f * overlap
        ramp = torch.ones(y.shape[2], device=y.device)
        if s > 0:
            ramp[:n] = (torch.arange(n, device=y.device) + 0.5) / max(n, 1)
        ramp = ramp.view(1, 1, -1, 1, 1)
        window = clip[:, :, f * s:f * s + y.shape[2]]
        window.copy_(window * (1 - ramp) + y * ramp)    # earlier tiles fade out here
    return clip


# ---- 8. What it costs ----------------------------------------------------------------------------

def traffic(N, D, L, P, B=1, branches=2, S=1, W=1, M=1, size=2, hidden_size=None, cfg=1, pp=1,
            ring=1, ulysses=1, **_):
    """Bytes that one rank sends during S steps, by purpose, for equal shares [XD table 1, made
    exact].

        ulysses   4 b n D (U-1)/U L/pp     Q, K, V out and O back; n = N/UR, b rows of a batch
        ring      2 b n D (R-1) L/pp       K, V, R - 1 hops; in PipeFusion the whole cache, M times
        cfg       B n P                    the output, once a step, fp32
        hidden    b n D                    a stage to the next. No L: it does not grow with depth
        latent    B n P                    the last stage to the first, fp32, but for the last step
    A rank of the last stage has cfg and latent, one of any other has hidden. size: bytes of a
    number in q, k, v; hidden_size: between blocks, where that differs (autocast)."""
    b, n, layers = B * branches / cfg, N / (ring * ulysses), math.ceil(L / pp)
    rounds = W + (S - W) * M if pp > 1 else S
    sent = {
        "ulysses": 4 * b * n * D * (ulysses - 1) / ulysses * layers * size * S,
        "ring": 2 * b * n * D * (ring - 1) * layers * size * rounds,
        "cfg": B * n * P * 4 * S if cfg == 2 else 0,
        "hidden": b * n * D * (hidden_size or size) * S if pp > 1 else 0,
        "latent": B * n * P * 4 * (S - 1) if pp > 1 else 0,
    }
    return {k: v for k, v in sent.items() if v}


def cost(model, N, S, W, M, link, flops, B=1, size=2, **degrees):
    """(seconds per clip, bytes a step of the busiest rank, bytes of memory a rank) of one mesh,
    from formulas alone.

    One step is 2 (params N + 2 N^2 D L) FLOPs a row, shared without loss. Ulysses and CFG wait for
    their bytes; Ring hides them behind the attention, PipeFusion behind the micro-step; a pipeline
    needs pp - 1 micro-steps to fill."""
    cfg, pp, ring, ulysses = (degrees[a] for a in AXES)
    D, L, b = model.dim, model.depth, 2 * B / cfg
    params = L * model.block + model.rest
    attend = 4 * N**2 * D * L * 2 * B / flops                      # seconds of a step on one device
    whole = attend + 2 * params * N * 2 * B / flops
    one = traffic(N, D, L, model.width, B, 2, 1, 1, 1, size, **degrees)    # bytes of one whole step
    exchange = (one.get("ulysses", 0) + one.get("cfg", 0)) / link
    wait = exchange + max(0, one.get("ring", 0) / link - attend / (cfg * pp * ring * ulysses))
    step = whole / (cfg * ring * ulysses) + pp * wait             # serial stages, as in the warm-up
    if pp == 1:
        seconds, M = S * step, 1
    else:
        ring_wait = max(0, one.get("ring", 0) * M / link - attend / (cfg * pp * ring * ulysses))
        micro = (whole / (cfg * pp * ring * ulysses) + exchange + ring_wait) / M
        micro = max(micro, one["hidden"] / M / link)
        seconds = W * (step + pp * one["hidden"] / link) + ((S - W) * M + pp - 1) * micro
    layers, n = math.ceil(L / pp), N / (ring * ulysses) / M
    cache = 2 * b * (N / ring) * (D / ulysses) * layers * size if pp > 1 else 0
    busy = b * n * (8 * D + 3 * model.ffn) * size                               # one block at work
    memory = (layers * model.block + model.rest) * size + cache + busy
    total = traffic(N, D, L, model.width, B, 2, S, W, M, size, **degrees)
    stages = (("ulysses", "ring", "hidden"), ("ulysses", "ring", "cfg", "latent"))
    return seconds, max(sum(total.get(k, 0) for k in ks) for ks in stages) / S, memory


def plan(model, N, world, S=50, W=1, link=50e9, flops=400e12, memory=80e9, guided=True):
    """Every mesh of `world` ranks with its cost, best first; what exceeds `memory` comes last."""
    base = cost(model, N, S, W, 1, link, flops, cfg=1, pp=1, ring=1, ulysses=1)[0]
    rows, parts = [], [d for d in range(1, world + 1) if world % d == 0]
    for cfg, pp, ring in itertools.product((1, 2)[:1 + guided], parts, parts):
        ulysses = world // (cfg * pp * ring)
        if cfg * pp * ring * ulysses != world or pp > model.depth or ulysses > model.heads:
            continue
        for M in [1] if pp == 1 else [pp, 2 * pp]:
            if M * ring * ulysses > N or (pp > 1 and W > S):
                continue
            degrees = {"cfg": cfg, "pp": pp, "ring": ring, "ulysses": ulysses}
            seconds, sent, used = cost(model, N, S, W, M, link, flops, **degrees)
            ideal = cost(model, N, S, W, M, 1e30, flops, **degrees)[0]
            rows.append(dict(degrees, patches=M, sent=sent, memory=used, fits=used <= memory,
                             seconds=seconds, ideal=base / ideal, speedup=base / seconds))
    simplest = lambda r: r["pp"] * r["ring"] * r["ulysses"]
    return sorted(rows, key=lambda r: (not r["fits"], r["seconds"], simplest(r)))


def print_plan(rows, memory, limit=40):
    """The cost table of `--plan`, and the mesh that `--mode auto` takes."""
    print("  cfg  pp ring ulysses patches | MB sent/step memory GB | ideal speed  this link s/clip")
    for i, r in enumerate(rows[:limit]):
        M = r["patches"] if r["pp"] > 1 else "-"
        note = "" if r["fits"] else f"   does not fit into {memory / 1e9:g} GB"
        note += "   <- chosen" if i == 0 else ""
        print(f"  {r['cfg']:3d} {r['pp']:3d} {r['ring']:4d} {r['ulysses']:7d} {M:>7} | "
              f"{r['sent'] / 1e6:12.1f} {r['memory'] / 1e9:9.1f} | "
              f"{r['ideal']:10.2f}x {r['speedup']:9.2f}x {r['seconds']:7.1f}{note}")
    if len(rows) > limit:
        print(f"  ... and {len(rows) - limit} more, slower or too large")
    best = rows[0]
    print("mesh: " + " ".join(f"--{a} {best[a]}" for a in AXES)
          + (f" --patches {best['patches']}" if best["pp"] > 1 else ""))


# ---- 9. A run and its check ----------------------------------------------------------------------

def all_sent(sampler):
    """{purpose: bytes of the busiest rank} of the last sample, on every rank."""
    sent = [dict(sampler.wire.sent)] * sampler.world
    if sampler.world > 1:
        dist.all_gather_object(sent, dict(sampler.wire.sent))
    return {k: max(s.get(k, 0) for s in sent) for k in sorted(set().union(*sent))}


def name_of(degrees, M=1, baseline=None):
    """A mode as people write it: `cfg 2 x pp 2 x M 4`."""
    if baseline:
        return f"{baseline} {degrees['ring']}"
    parts = [f"{a} {degrees[a]}" for a in AXES if degrees[a] > 1]
    return " x ".join(parts + ([f"M {M}"] if degrees["pp"] > 1 else [])) or "one process"


def measure(sampler, *args, **kwargs):
    """Sample once -> (x1, a row of the table: mode, seconds, kB a step by purpose, the formula's).
    Bytes are compared as whole numbers; "~" where shares are unequal and the busiest rank sends
    more than the formula's equal share."""
    start = time.perf_counter()
    x1 = sampler.sample(*args, **kwargs)
    if x1.is_cuda:
        torch.cuda.synchronize()
    seconds, sent, f = time.perf_counter() - start, all_sent(sampler), sampler.facts
    expected = traffic(**f, **sampler.degrees)
    kv = expected.get("ring", 0)
    if sampler.baseline == "distrifusion":
        expected = {"kv": kv} if kv else {}                 # the same K and V, but a step late
    elif sampler.baseline:
        expected = {"kv": kv * min(1, f["W"] / f["S"])} if kv else {}   # in the warm-up only
    R, U, pp = (sampler.degrees[a] for a in ("ring", "ulysses", "pp"))
    equal = f["N"] % (f["M"] * R * U) == 0 and f["heads"] % U == 0 and f["L"] % pp == 0
    return x1, {"mode": name_of(sampler.degrees, sampler.M, sampler.baseline), "seconds": seconds,
                "sent": sent, "expected": expected, "equal": equal, "steps": f["S"]}


def oracle(sampler):
    """The mode and the patches with which `emulate` does what this sampler does."""
    if sampler.pp.size > 1:
        return "pipefusion", sampler.M
    return (sampler.baseline, sampler.ring.size) if sampler.baseline else ("exact", 1)


def difference(a, b):
    """Largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def bytes_agree(row):
    """Whether the counted bytes are the formula's; with unequal shares, whether the kinds are."""
    keys = row["sent"].keys() | row["expected"].keys()
    close = [row["sent"].get(k, 0) == row["expected"].get(k, 0) for k in keys]
    return all(close) if row["equal"] else row["sent"].keys() == row["expected"].keys()


def print_row(row, reference, diff):
    """Marks: = the bytes are the formula's, ~ the shares are unequal, ! the bytes are wrong."""
    mark = "!" if not bytes_agree(row) else "=" if row["equal"] else "~"
    sent, expected = (sum(row[k].values()) / row["steps"] / 1e3 for k in ("sent", "expected"))
    print(f"  {row['mode']:22s} {diff:10.1e} vs {reference:9s} {sent:9.1f} {mark} {expected:7.1f}"
          f"  {'+'.join(row['sent']) or '-':24s} {row['seconds']:6.2f}", flush=True)


TABLE_HEAD = (f"  {'mode':22s} difference {'':12s}   kB/step   formula  {'sent for':24s} seconds")


def launch(fn, world, *args, timeout=120, strict=True):
    """Fork `world` ranks here, joined by gloo over a file, run fn(*args) on each -> their results.

    Forking takes 0.1 s (torchrun takes 8) and inherits args without copies; it asks for one thread
    a rank, because a child that starts OpenMP after its parent used it hangs. The first rank that
    fails ends all, with its error; strict=False gives None for a rank that died."""
    if torch.get_num_threads() != 1:
        raise ValueError("launch: call torch.set_num_threads(1) before any computation")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [mp.get_context("fork").Process(target=_rank_main,
                                                args=(fn, args, r, world, folder, timeout))
                 for r in range(world)]
        for p in ranks:
            p.start()
        deadline = time.monotonic() + timeout
        try:
            while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
                if strict and any(p.exitcode not in (None, 0) for p in ranks):
                    time.sleep(0.5)                       # time for the others to say what they saw
                    break
                time.sleep(0.01)
            late = [r for r, p in enumerate(ranks) if p.is_alive() and time.monotonic() >= deadline]
        finally:
            for p in ranks:
                if p.is_alive():
                    p.kill()
                p.join()
        errors = [Path(folder, f"{r}.err").read_text() for r in range(world)
                  if Path(folder, f"{r}.err").exists()]
        if late:
            raise RuntimeError(f"launch: ranks {late} did not end within {timeout} s")
        if strict and any(p.exitcode for p in ranks):
            raise RuntimeError(errors[0] if errors
                               else f"launch: exit codes {[p.exitcode for p in ranks]}")
        results = [Path(folder, f"{r}.pt") for r in range(world)]           # our own children's
        return [torch.load(f, weights_only=False) if f.exists() else None for f in results]


def _rank_main(fn, args, rank, world, folder, timeout):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                world_size=world, timeout=timedelta(seconds=timeout))
        result = fn(*args)
        torch.save(result, f"{folder}/{rank}.tmp")
        os.replace(f"{folder}/{rank}.tmp", f"{folder}/{rank}.pt")
        dist.barrier()                               # nobody leaves while another still talks to it
        code = 0
    except BaseException:
        Path(folder, f"{rank}.err").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)                 # not through the parent's exit handlers, of which this is a fork


# ---- 10. Demo ------------------------------------------------------------------------------------

class TinyBlock(nn.Module):
    """A transformer block with the seam `attend`."""

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
    """The seams and nothing more: what a model needs to be sampled in parallel."""

    def __init__(self, channels=2, grid=(8, 8, 8), patch=(1, 2, 4), D=64, depth=4, heads=4):
        super().__init__()
        self.patch, self.grid = patch, tuple(n // p for n, p in zip(grid, patch))
        P = channels * math.prod(patch)
        self.embed = nn.Linear(P, D)
        self.table = nn.Parameter(torch.randn(*self.grid, D) * 0.5)
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
        c = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        return rearrange(c, "B (k D) -> B k D", k=4)

    def head(self, h, c):
        return self.out(F.layer_norm(h, h.shape[-1:]))

    def forward(self, x, t, text, mask=None):
        h, pos, c = self.embed(self.patchify(x)), self.positions(x.shape), self.condition(t)
        for block in self.blocks:
            h = block(h, pos, c, text, mask)
        return self.unpatchify(self.head(h, c), x.shape)


def moving_blobs(n, generator, grid=(8, 8, 8)):
    """Latent clips of a blob that moves left, right, up, down -> x1 (n, 2, T, H, W), way (n,)."""
    T, H, W = grid
    way = torch.randint(4, (n,), generator=generator)
    v = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])[way] * 4 / T       # (n, 2), cells a frame
    at = torch.rand(n, 2, generator=generator) * 3 + 2
    at = at - v.clamp(max=0) * T / 2 - v.clamp(min=0) * T / 4
    at = at[:, :, None] + v[:, :, None] * torch.arange(T)                               # (n, 2, T)
    y, x = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    blob = torch.exp(-((y - at[:, 0, :, None, None]) ** 2 + (x - at[:, 1, :, None, None]) ** 2) / 3)
    return torch.stack([3 * blob - 0.6, 1.5 * (x - 3.5) / 3.5 * blob], 1), way


def train_tiny(steps=120, seed=0, grid=(8, 8, 8), batch=16, **kwargs):
    """A TinyDiT that learned the blobs by flow matching, and its text: 5 x 2 tokens, null last."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = TinyDiT(grid=grid, **kwargs)
    text = torch.randn(5, 2, model.embed.out_features, generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        x1, way = moving_blobs(batch, g, grid)
        way[torch.rand(batch, generator=g) < 0.15] = 4
        x0, t = torch.randn(x1.shape, generator=g), torch.rand(batch, generator=g)
        x_t = t.view(-1, 1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1, 1)) * x0
        loss = F.mse_loss(model(x_t, t, text[way]), x1 - x0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 20, (steps - step) / (steps / 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), text


class TinyDecoder(nn.Module):
    """A 2.5D decoder in small: 2D and temporal convolutions, norms of each frame, attention over
    space, 2x upsampling."""

    def __init__(self, C=2, width=16):
        super().__init__()
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate")
        self.enter, self.mid, self.leave = conv(C, width), conv(width, width), conv(width, 3)
        self.qkv = nn.Linear(width, 3 * width)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, z):
        B, _, T, H, W = z.shape
        h = self.enter(rearrange(z, "B C T H W -> (B T) C H W"))
        q, k, v = self.qkv(rearrange(self.norm1(h), "F C H W -> F 1 (H W) C")).chunk(3, -1)
        h = h + rearrange(F.scaled_dot_product_attention(q, k, v), "F 1 (H W) C -> F C H W", H=H)
        h = self.time(rearrange(h, "(B T) C H W -> B C T H W", B=B))
        h = F.interpolate(rearrange(h, "B C T H W -> (B T) C H W"), scale_factor=2.0)
        h = self.leave(F.silu(self.norm2(self.mid(h))))
        return rearrange(h, "(B T) C H W -> B C T H W", B=B)


DEMO_MODES = {                                              # world -> degrees and settings
    2: [{"cfg": 2}, {"ulysses": 2}, {"ring": 2}, {"pp": 2, "patches": 2}, {"pp": 2, "patches": 5}],
    4: [{"ulysses": 4}, {"ring": 4}, {"ring": 2, "ulysses": 2},
        {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2},
        {"pp": 4, "patches": 4}, {"pp": 4, "patches": 8}, {"cfg": 2, "pp": 2, "patches": 4},
        {"pp": 2, "ulysses": 2, "patches": 4}, {"pp": 2, "ring": 2, "patches": 4},
        {"ring": 4, "baseline": "distrifusion"}, {"ring": 4, "baseline": "no_exchange"}],
}


def demo_rank(model, decoder, modes, inputs, z):
    """What each forked rank of the demo does: every mode once, then the two decoders."""
    rows = []
    for mode in modes:
        mesh = make_mesh(**{k: v for k, v in mode.items() if k in AXES})
        sampler = ParallelSampler(model, mesh, mode.get("patches", 0),
                                  baseline=mode.get("baseline"))
        x1, row = measure(sampler, **inputs)
        rows.append((mode, x1, row, oracle(sampler)))
    return rows, halo_decode(decoder, z), tiled_decode(decoder, z)


def timeline_rank(model, inputs, pp, patches):
    """One rank of the recorded run: its events."""
    sampler = ParallelSampler(model, make_mesh(pp=pp), patches, record=True)
    sampler.sample(**dict(inputs, steps=4))                 # once for the allocator and the sockets
    sampler.sample(**dict(inputs, steps=4))
    return sampler.events


def draw_timeline(events, M, path):
    """Above: what each stage did when. Below: how old the K, V were that the first stage attended
    to. From recorded events of real processes (one clock for all of them), nothing is drawn by
    hand."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    flat = [e for stage in events for e in stage]
    zero, pp = min(e[3] for e in flat), len(events)
    steps = max(e[1] for e in flat) + 1
    colors = plt.get_cmap("viridis")([0.15 + 0.75 * i / max(steps - 1, 1) for i in range(steps)])
    fig, (top, below) = plt.subplots(2, 1, figsize=(11, 2.2 + 0.5 * pp + 0.32 * M),
                                     layout="constrained",
                                     gridspec_kw={"height_ratios": [0.6 * pp + 0.4,
                                                                     0.34 * M + 0.5]})
    for stage, step, patch, start, end, _ in flat:
        x, width = 1e3 * (start - zero), 1e3 * (end - start)
        top.barh(stage, width, left=x, color=colors[step], edgecolor="white", height=0.8)
        top.text(x + width / 2, stage, "all" if patch is None else f"p{patch}", ha="center",
                 va="center", fontsize=7, color="white" if step < steps / 2 else "black")
    top.set(yticks=range(pp), yticklabels=[f"stage {p}" for p in range(pp)], xlabel="milliseconds",
            title="PipeFusion as it ran: a box is one stage at work on one patch (gaps: waiting)")
    top.invert_yaxis()
    top.legend(handles=[Patch(color=colors[i],
                              label=f"step {i}" + (" (warm-up)" if i == 0 else ""))
                              for i in range(steps)],
               ncols=steps, fontsize=7, loc="upper center",
               bbox_to_anchor=(0.5, -0.28 if pp < 3 else -0.2), frameon=False)
    micro = events[0]
    for x, (_, step, patch, _, _, age) in enumerate(micro):
        for m, a in enumerate(age):
            own = patch is None or patch == m
            below.add_patch(plt.Rectangle((x, m), 1, 1, facecolor=colors[a],
                                          edgecolor="black" if own else "white",
                                          linewidth=1.5 if own else 0.5, zorder=3 if own else 2))
            if a < step:
                below.text(x + 0.5, m + 0.5, "stale", ha="center", va="center", fontsize=6,
                           color="white", zorder=4)
    below.set(xlim=(0, len(micro)), ylim=(M, 0), yticks=[m + 0.5 for m in range(M)],
              yticklabels=[f"K, V of p{m}" for m in range(M)],
              xticks=[x + 0.5 for x in range(len(micro))],
              xticklabels=[f"{e[1]}\n" + ("all" if e[2] is None else f"p{e[2]}") for e in micro],
              title="What stage 0 attends to at each micro-step: colour = the step of K, V, "
                    "outlined = written now")
    below.set_xlabel("step and patch")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def demo(out="out/sample_parallel"):
    """Every mode on a tiny trained model, against one process. -> True if all claims hold."""
    torch.set_num_threads(1)
    begin, claims = time.perf_counter(), []

    def claim(text, value, threshold, ok):
        claims.append(ok)
        print(f"{'PASS' if ok else 'FAIL'} {text}: {value} vs {threshold}", flush=True)

    print("training a tiny video DiT on moving blobs ...", flush=True)
    model, text = train_tiny()
    x0 = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = {"x0": x0, "text": text[:1], "null": text[4:], "guidance": 2.0, "steps": 8}
    print(f"  64 tokens, 4 blocks of width 64, {time.perf_counter() - begin:.0f} s\n")

    decoder = TinyDecoder().eval()
    z = emulate("exact", model, **inputs)
    with torch.no_grad():
        clip = decoder(z)
        naive = torch.cat([decoder(band) for band in z.chunk(4, dim=3)], dim=3)
    print("every mode, 8 steps with guidance, against the same algorithm in one process "
          "(bytes: of the busiest rank)")
    print(TABLE_HEAD)
    results = []
    for world, modes in DEMO_MODES.items():
        ranks = launch(demo_rank, world, model, decoder, modes, inputs, z)
        rows, halo, tiles = ranks[0]
        for i, (mode, x1, row, (name, patches)) in enumerate(rows):
            want = emulate(name, model, **inputs, patches=patches)
            diff = difference(x1, want)
            same = all(torch.equal(x1, other[0][i][1]) for other in ranks)
            results.append((mode, diff, row, torch.equal(x1, want), same))
            print_row(row, "exact" if name == "exact" else "emulation", diff)
    tiled = difference(tiles, tiled_decode(decoder, z))
    bitwise = [r for r in results if r[0].get("cfg", 1) == 1 and r[0].get("ring", 1) == 1]
    rounded = [r for r in results if r not in bitwise and not r[0].get("baseline")]
    claim("Ulysses and PipeFusion (with Ulysses, too) equal one process bit for bit",
          f"{sum(r[3] for r in bitwise)} modes", f"{len(bitwise)}", all(r[3] for r in bitwise))
    worst = max(r[1] for r in rounded)
    claim("Ring, USP, CFG-parallel and every hybrid equal one process, relative", f"{worst:.1e}",
          "1e-5", worst < 1e-5)
    claim("all ranks hold the same clip", f"{sum(r[4] for r in results)} modes", len(results),
          all(r[4] for r in results))
    ok = [bytes_agree(r[2]) for r in results]
    claim("bytes sent equal the formula exactly, but for odd shares", f"{sum(ok)} modes", len(ok),
          all(ok))

    wrong = launch(wrong_splice_rank, 4, model, inputs)[0]
    right = emulate("pipefusion", model, **inputs, patches=4)
    splice = difference(wrong, right)
    claim("the wrong K, V splice order is seen", f"{splice:.2%} off", "> 0.1%", splice > 1e-3)
    halo_diff, naive_diff = difference(halo, clip), difference(naive, clip)
    claim("halo decode by 4 ranks equals one, relative",
          f"{halo_diff:.1e} (independent tiles: {naive_diff:.1e})",
          "1e-5 (1e-2)", halo_diff < 1e-5 < 1e-2 < naive_diff)
    claim("time tiles over 4 ranks equal the same tiles on one", f"{tiled:.1e}", "0", tiled == 0)

    print("\nwhat staleness costs: error relative to the exact clip of the same steps "
          "(L2; 4 clips, W = 1, bands of frames)")
    g = torch.Generator().manual_seed(2)
    many = {"x0": torch.randn(4, 2, 8, 8, 8, generator=g), "text": text[:4], "null": text[4:],
            "guidance": 2.0}
    l2 = lambda a, b: ((a - b).norm() / b.norm()).item()
    limit = emulate("exact", model, **many, steps=64)
    errors = {}
    columns = ("Euler itself", "PipeFusion 2", "4", "DistriFusion 2", "4", "no exchange 4")
    print("  steps " + " ".join(f"{c:>{max(len(c), 7)}s}" for c in columns) + "   (patches)")
    for S in (8, 16, 32):
        exact = emulate("exact", model, **many, steps=S)
        errors[S] = [l2(exact, limit)]
        for mode, M in (("pipefusion", 2), ("pipefusion", 4), ("distrifusion", 2),
                        ("distrifusion", 4), ("no_exchange", 4)):
            errors[S].append(l2(emulate(mode, model, **many, steps=S, patches=M), exact))
        cells = (f"{e:{max(len(c), 7)}.3f}" for c, e in zip(columns, errors[S]))
        print(f"  {S:5d} " + " ".join(cells), flush=True)
    claim("PipeFusion's error falls with the steps (M 2, 8 -> 32)", f"{errors[32][1]:.3f}",
          f"{errors[8][1]:.3f}", errors[32][1] < errors[8][1])
    claim("and is below DistriFusion's at equal patches (32 steps, M 2)", f"{errors[32][1]:.3f}",
          f"{errors[32][3]:.3f}", errors[32][1] < errors[32][3])

    events = launch(timeline_rank, 2, *timeline_model(), 2, 4)
    path = Path(out) / "timeline.png"
    draw_timeline(events, 4, path)
    seconds = time.perf_counter() - begin
    print(f"\n{path}: which stage worked on which patch of which step, what was fresh, what stale")
    print(f"{sum(claims)} of {len(claims)} claims hold, {seconds:.0f} s")
    return all(claims)


def timeline_model():
    """Large enough that a micro-step takes longer than starting it; its weights do not matter."""
    torch.manual_seed(0)
    model = TinyDiT(grid=(8, 16, 16), D=96, depth=8).eval()
    return model, {"x0": torch.randn(1, 2, 8, 16, 16), "text": torch.randn(1, 2, 96),
                   "null": torch.randn(1, 2, 96)}


def wrong_splice_rank(model, inputs):
    """The bug on purpose: the cache keeps the order of the warm-up's all-to-all."""
    Layout.splice = lambda self, r: torch.arange(self.shard(r))
    return ParallelSampler(model, make_mesh(pp=2, ulysses=2), 4).sample(**inputs)


# ---- 11. Command line ----------------------------------------------------------------------------
# torchrun takes a flag that is a prefix of one of its own for its own (--n, --m, --r, --log are
# "ambiguous"), so none here is.

def fail(message):
    """One line, once, exit status 2. Other ranks wait: torchrun ends all at the first exit."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"sample_parallel.py: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Bad arguments give one line and exit status 2."""

    def error(self, message):
        fail(message)


def parse(argv=None):
    """The command line, checked."""
    p = Parser(allow_abbrev=False, description="Sample a trained run with many ranks (torchrun); "
               "without --workdir, show every mode on a tiny model.",
               epilog="cfg x pp x ring x ulysses must be the number of ranks.")
    a = p.add_argument
    a("--workdir", help="folder of a run of train.py")
    a("--prompt", action="append", default=[], help="a caption; may be given several times")
    a("--prompt-file", help="a text file with one prompt a line")
    a("--mode", default="mesh", choices=("mesh", "auto", "every", "distrifusion", "no_exchange"),
      help="mesh: as the degrees say; auto: what --plan would choose; baselines over all ranks; "
           "every: with --check, all meshes of so many ranks and both baselines; writes no clip")
    a("--cfg", type=int, default=1, metavar="1|2",
      help="2: prompt and null text on two groups of ranks")
    a("--pp", type=int, default=1, metavar="N", help="PipeFusion stages")
    a("--patches", type=int, default=0, metavar="M",
      help="PipeFusion patches (default: as many as stages)")
    a("--warmup", type=int, default=1, metavar="W",
      help="whole steps before the pipeline fills (default 1)")
    a("--patch-axis", default="t", choices=("t", "h", "w"),
      help="patches are bands of frames, rows or columns")
    a("--ring", type=int, default=1, metavar="R", help="ring attention ranks")
    a("--ulysses", type=int, default=1, metavar="U", help="Ulysses ranks")
    a("--shard", action="store_true",
      help="FSDP2: slices of each block over the ring x ulysses ranks")
    a("--steps", type=int, help="of the solver (default: the run's; --plan: 50)")
    a("--schedule", choices=("linear", "linear_quadratic", "shifted"),
      help="times of the steps, by flow.py (default: the run's)")
    a("--guidance", type=float, help="classifier-free guidance scale (default: the run's)")
    a("--seed", type=int, default=0,
      help="the same seed gives the same clip with every number of ranks")
    a("--out", default=None,
      help="FILE.mp4 or .gif, with several prompts FILE-0.mp4 ... (out/sample_parallel/clip.mp4)")
    a("--decode", default="auto", choices=("auto", "one", "halo", "tiles"),
      help="one: rank 0; halo: bands of rows, the same clip; tiles: along time, blended; "
           "auto: halo where there are rows for all ranks")
    a("--check", action="store_true",
      help="sample in one process too, print difference and bytes; exit 1 if one is off")
    a("--device", default="cpu", choices=("cpu", "cuda"),
      help="cpu (gloo) or cuda (NCCL, one GPU a rank)")
    a("--timeout", type=float, default=600, metavar="SECONDS",
      help="how long a rank waits for a silent one (default 600)")
    a("--plan", action="store_true",
      help="print what every mesh of --gpus would cost, and choose one")
    a("--size", default="30b", choices=tuple(PRESETS), help="--plan: the model")
    a("--resolution", default="256x768x768", metavar="TxHxW",
      help="--plan: the video (default 256x768x768)")
    a("--gpus", type=int, default=8, help="--plan: how many")
    a("--link", type=float, default=50.0, metavar="GB/S",
      help="--plan, --mode auto: what one rank sends a second (default 50)")
    a("--tflops", type=float, default=400.0,
      help="--plan, --mode auto: what one rank reaches (default 400)")
    a("--memory", type=float, default=80.0, metavar="GB",
      help="--plan, --mode auto: of one rank (default 80)")
    args = p.parse_args(argv)
    for name in ("steps", "gpus", "link", "tflops", "memory", "timeout"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            fail(f"--{name} {getattr(args, name)}: must be above 0")
    if args.timeout > 1e9:                           # torch counts it in nanoseconds of 64 bits
        fail(f"--timeout {args.timeout:g}: must be at most 1e9")
    if args.guidance is not None and not math.isfinite(args.guidance):
        fail(f"--guidance {args.guidance}: not a finite number")
    for name in ("steps", "warmup", "seed", "patches", *AXES):
        if getattr(args, name) is not None and abs(getattr(args, name)) >= 2**63:
            fail(f"--{name} {getattr(args, name)}: not a number of 64 bits")
    for name in ("workdir", "prompt-file", "out"):
        if getattr(args, name.replace("-", "_")) == "":
            fail(f"--{name} '': is empty")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device here")
    gpus = torch.cuda.device_count() if args.device == "cuda" else math.inf
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        fail(f"--device cuda: {gpus} GPUs here, one rank each")
    if args.gpus > 4096:
        fail(f"--gpus {args.gpus}: a table of at most 4096")
    if args.mode in ("auto", "every") and (args.patches or args.shard):
        fail(f"--mode {args.mode}: chooses --patches itself, and shards nothing; leave out "
             "--patches and --shard")
    if args.mode == "every" and (not args.check or args.out or args.decode != "auto"):
        fail("--mode every: checks and writes no clip; give --check, leave out --out and --decode")
    planning, costs = ("plan", "size", "resolution", "gpus"), ("link", "tflops", "memory")
    for name in vars(args):                          # a flag that would do nothing is a mistake
        flag = "--" + name.replace("_", "-")
        if getattr(args, name) == p.get_default(name):
            continue
        if args.plan and name not in (*planning, *costs, "steps", "warmup"):
            fail(f"{flag}: --plan has no use for it")
        if not args.plan and name in planning:
            fail(f"--plan: needed with {flag}")
        if not args.plan and not args.workdir:
            fail(f"--workdir: needed with {flag} (without it, the demo runs)")
        if not args.plan and name in costs and args.mode not in ("auto", "every"):
            fail(f"{flag}: needs --plan or --mode auto")
        needs_pp = ("warmup", "patches", "patch_axis") if args.mode == "mesh" else ("patches",)
        if name in needs_pp and args.workdir and args.pp == 1:
            fail(f"{flag} {getattr(args, name)}: needs --pp 2 or more (without a pipeline there "
                 "are no patches, and no K, V are stale)")
    return args


def plan_command(args):
    """--plan: the cost table."""
    check_degrees(1, warmup=args.warmup)
    try:
        T, H, W = (int(n) for n in args.resolution.lower().split("x"))
        assert min(T, H, W) > 0
    except (ValueError, AssertionError):
        raise ValueError(f"resolution {args.resolution}: not TxHxW, like 256x768x768") from None
    model, args.steps = PRESETS[args.size], args.steps or 50
    N = math.ceil(T / model.frames) * math.ceil(H / model.pixels) * math.ceil(W / model.pixels)
    params = model.depth * model.block + model.rest
    rows = plan(model, N, args.gpus, args.steps, args.warmup, args.link * 1e9, args.tflops * 1e12,
                args.memory * 1e9)
    if not rows:
        raise ValueError(f"gpus {args.gpus}: no mesh of so many ranks for {model.depth} blocks, "
                         f"{model.heads} heads, {N} tokens")
    print(f"{args.size}: {params / 1e9:.2f} B parameters, {T}x{H}x{W} = {N:,} tokens, "
          f"{args.steps} steps with guidance, bf16, "
          f"{args.gpus} ranks, {args.link:g} GB/s, {args.tflops:g} TFLOP/s, W = {args.warmup}")
    print_plan(rows, args.memory * 1e9)
    print("(formulas, not measurements: compute is shared without loss, and hides what Ring and "
          "PipeFusion send for as long as it lasts)")


def prompts_of(args):
    """The prompts of --prompt and --prompt-file, in order."""
    prompts = list(args.prompt)
    if args.prompt_file:
        try:
            prompts += [line.strip()
                        for line in Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
                        if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {args.prompt_file}: {error}") from None
    if not prompts:
        raise ValueError("--prompt: needed with --workdir (or --prompt-file)")
    if not all(p.strip() for p in prompts):
        raise ValueError("--prompt: is empty")
    return prompts


def live_size(model, shape):
    """What the cost formulas need, read off a model and the shape of its latent -> Size, N."""
    with torch.no_grad():
        tokens = model.patchify(torch.zeros(1, *shape, device=next(model.parameters()).device))
        D = model.embed(tokens[:, :1].to(next(model.parameters()).dtype)).shape[-1]
    heads = getattr(getattr(model, "cfg", None), "heads", 1)
    ffn = max(0, sum(p.numel() for p in model.blocks[0].parameters()) - 8 * D * D) // (3 * D)
    return Size(D, len(model.blocks), heads, ffn, tokens.shape[2]), tokens.shape[1]


def sample_run(args):
    """--workdir: what every rank does. -> exit status"""
    prompts = prompts_of(args)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    degrees = {a: getattr(args, a) for a in AXES}
    if args.mode != "mesh" and any(d > 1 for d in degrees.values()):
        raise ValueError(f"--mode {args.mode}: chooses the degrees itself; leave out --cfg, --pp, "
                         "--ring and --ulysses")
    if args.mode in ("distrifusion", "no_exchange"):
        degrees["ring"] = world
    chosen = args.mode in ("auto", "every")                 # the degrees, by plan
    if args.mode == "every" and len(prompts) > 1:
        raise ValueError(f"--mode every: takes one prompt, not {len(prompts)}")
    if not chosen:
        check_degrees(world, **degrees, patches=args.patches, warmup=args.warmup, steps=args.steps)
    out = Path(args.out or "out/sample_parallel/clip.mp4")
    if out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {args.out}: must end in .mp4 or .gif")
    if args.shard and degrees["ring"] * degrees["ulysses"] == 1:
        raise ValueError("--shard: needs ring x ulysses of 2 or more ranks to share the weights")
    try:
        import train
    except ModuleNotFoundError as error:
        raise ValueError(f"--workdir: needs {error.name}.py beside this file") from None
    for prompt in prompts:
        train.text_cond.clean(prompt)                           # ValueError for what is no text
    device = args.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    sketch = train.load_run(args.workdir, device="meta")        # all shapes, no weights
    if sketch.config["flow"]["objective"] != "flow":
        raise ValueError(f"--workdir {args.workdir}: trained by diffusion, not a flow to follow")
    shape, settings = tuple(sketch.latent_shape), sketch.config["sample"]
    if settings["solver"] != "euler" and rank == 0:
        print(f"the run samples with {settings['solver']}; here it is Euler", file=sys.stderr)
    bands = len(shape) == 4 and shape[2] >= world           # (C, T, H, W), not VidTwin's flat ones
    if args.decode == "halo" and not bands or args.decode == "tiles" and len(shape) != 4:
        raise ValueError(f"--decode {args.decode}: latents {shape} cannot be cut so for {world} "
                         "ranks, use --decode one")
    args.steps = args.steps or settings["steps"]
    guidance = settings["guidance"] if args.guidance is None else args.guidance
    ts = sketch.schedule(args.steps, args.schedule)
    patches = args.patches
    if not chosen:
        check_degrees(world, **degrees, patches=patches, warmup=args.warmup, steps=args.steps,
                      depth=len(sketch.dit.blocks), heads=sketch.dit.cfg.heads)
    else:
        size, N = live_size(sketch.dit, shape)
        rows = plan(size, N, world, args.steps, args.warmup, args.link * 1e9, args.tflops * 1e12,
                    args.memory * 1e9)
        if not rows:
            raise ValueError(f"--mode {args.mode}: no mesh of {world} ranks for {size.depth} "
                             f"blocks and {size.heads} heads")
        degrees, patches = {a: rows[0][a] for a in AXES}, rows[0]["patches"]
    if rank == 0 and args.mode != "every":      # after all that can be wrong, and before sampling
        out.parent.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=timedelta(seconds=args.timeout))
    if args.mode == "every":
        run = train.load_run(args.workdir, device)
        ok = check_every(run, rows, inputs_of(run, prompts[0], args.seed, guidance, ts), args)
        if world > 1:
            dist.destroy_process_group()
        return 0 if ok else 1
    mesh = make_mesh(**degrees, device=device)
    if rank == 0:
        print(f"ranks {world}: {name_of(degrees, patches or degrees['pp'])}")
        if mesh is not None:                         # who shares what: the commonest first question
            for c, branch in enumerate(mesh.mesh.tolist()):
                for s, stage in enumerate(branch):
                    shares = (f"ring {r}: ranks {ranks}" for r, ranks in enumerate(stage))
                    print(f"  cfg {c}  stage {s}: " + " | ".join(shares))
    baseline = args.mode if args.mode in ("distrifusion", "no_exchange") else None
    pp, stage = degrees["pp"], mesh["pp"].get_local_rank() if mesh is not None else 0
    run = train.load_run(args.workdir, device, prepare=lambda dit: keep_stage(dit, pp, stage))
    reference = None
    if args.check and rank == 0:                # all blocks, unsharded, whatever the sampler's are
        reference = train.load_run(args.workdir, device).dit
    sampler = ParallelSampler(run.dit, mesh, patches, args.warmup, args.patch_axis, baseline)
    if args.shard:
        shard_weights(run.dit, mesh)
    halo = args.decode == "halo" or (args.decode == "auto" and world > 1 and bands)
    ok = True
    for j, prompt in enumerate(prompts):
        inputs = inputs_of(run, prompt, args.seed + j, guidance, ts)
        z, row = measure(sampler, **inputs, progress=True)
        clip = None
        if halo:
            try:
                clip = halo_decode(run.decode, z)
            except ValueError:                   # raised by all ranks: this decoder cannot be split
                if args.decode == "halo":
                    raise
                halo = False
        if args.decode == "tiles":
            clip = tiled_decode(run.decode, z)
        elif not halo and rank == 0:
            clip = run.decode(z)
        if rank == 0:
            clips = run.config["clips"]                                 # without the TAE's padding
            clip = clip[:, :, :clips["frames"], :clips["size"]]
            path = out if len(prompts) == 1 else out.with_stem(f"{out.stem}-{j}")
            train.write_video(path, clip[0].float().cpu(), run.fps_of(prompt))
            print(f"{path}: {prompt}   ({row['seconds']:.1f} s)", flush=True)
        if reference is not None:
            ok &= check(sampler, reference, inputs, z, row, clip, run.decode, args,
                        prompt if len(prompts) > 1 else "")
        ok = after_rank0(f"prompt {j}", ok)
    if world > 1:
        dist.destroy_process_group()
    return 0 if ok else 1


def inputs_of(run, prompt, seed, guidance, ts):
    """What ParallelSampler.sample and emulate take, for one prompt of a run."""
    text, mask, null, null_mask = run.prompts([prompt])
    x0 = run.noise([seed])                                  # drawn whole, before anything is split
    return {"x0": x0, "text": text, "mask": mask, "null": null, "null_mask": null_mask,
            "guidance": guidance, "ts": ts}


def between_looks():
    """Wait before the next look at the store, which is one for all ranks."""
    time.sleep(min(1.0, max(0.1, dist.get_world_size() / 1000)))


def after_rank0(what, verdict):
    """Wait until rank 0 got here -> its verdict. Decoding and checking alone may take it longer
    than any time-out that is there to find a silent rank: so the others look, and do not listen."""
    if not dist.is_initialized():
        return verdict
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set(what, str(int(verdict)))
    while not store.check([what]):                            # raises when whoever keeps it is gone
        between_looks()
    return store.get(what) == b"1"


def tolerance_of(model):
    """How far sums in another order may be apart, relative."""
    return 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2


def check_every(run, rows, inputs, args):
    """Prints a line for each mesh of `rows` (by `plan`) and both baselines, against one process
    -> whether all are equal up to rounding, with the bytes that the formula says."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    modes = [({a: r[a] for a in AXES}, r["patches"] if r["pp"] > 1 else 0, None) for r in rows]
    if world > 1:
        over_all = {"cfg": 1, "pp": 1, "ring": world, "ulysses": 1}
        modes += [(over_all, 0, name) for name in ("distrifusion", "no_exchange")]
    rank, wanted, ok = int(os.environ.get("RANK", 0)), {}, True
    if rank == 0:
        print(TABLE_HEAD, flush=True)
    for degrees, patches, baseline in modes:
        sampler = ParallelSampler(run.dit, make_mesh(**degrees, device=args.device), patches,
                                  args.warmup, args.patch_axis, baseline)
        z, row = measure(sampler, **inputs)
        if rank == 0:
            key = oracle(sampler)
            if key not in wanted:
                wanted[key] = emulate(key[0], run.dit, **inputs, patches=key[1],
                                      warmup=args.warmup, patch_axis=args.patch_axis)
            diff = difference(z, wanted[key])
            ok &= diff < tolerance_of(run.dit) and bytes_agree(row)
            print_row(row, "exact" if key[0] == "exact" else "emulation", diff)
        ok = after_rank0(row["mode"], ok)
    if rank == 0:
        print(f"{'PASS' if ok else 'FAIL'} {len(modes)} modes equal one process within "
              f"{tolerance_of(run.dit):.0e}, and send the bytes of the formula", flush=True)
    return ok


def check(sampler, model, inputs, z, row, clip, decode, args, prompt=""):
    """Prints the ranks' clip against one process -> whether they are equal up to rounding."""
    mode, patches = oracle(sampler)
    want = emulate(mode, model, **inputs, patches=patches, warmup=args.warmup,
                   patch_axis=args.patch_axis)
    diff = difference(z, want)
    tolerance = tolerance_of(model)
    print(f"{prompt}\n{TABLE_HEAD}" if prompt else TABLE_HEAD)
    print_row(row, "exact" if mode == "exact" else "emulation", diff)
    for kind in sorted(row["sent"].keys() | row["expected"].keys()):
        sent, expected = (row[k].get(kind, 0) / row["steps"] / 1e3 for k in ("sent", "expected"))
        print(f"    {kind:45s} {sent:9.1f}   {expected:7.1f}")
    if mode != "exact":
        ts, exact = inputs["ts"], emulate("exact", model, **inputs)
        halves = torch.cat([torch.stack((ts[:-1], (ts[:-1] + ts[1:]) / 2), 1).flatten(), ts[-1:]])
        finer = emulate("exact", model, **dict(inputs, ts=halves))
        stale, euler = ((a.norm() / exact.norm()).item() for a in (z - exact, 2 * (finer - exact)))
        print(f"  error of {mode} against the exact clip, L2: {stale:.3f} (what staleness costs)")
        print(f"  error of Euler itself at these steps, by half steps: {euler:.3f}")
    ok = diff < tolerance and bytes_agree(row)
    if args.decode != "tiles" and sampler.world > 1:
        alone = difference(clip, decode(z)[..., :clip.shape[-2], :])
        ok &= alone < tolerance
        print(f"  decode: {alone:.1e} from rank 0 alone")
    verdict = "PASS" if ok else "FAIL"
    print(f"{verdict} {row['mode']} equals one process: {diff:.1e} vs {tolerance:.0e}", flush=True)
    return ok


def main(argv=None):
    """The command line."""
    args = parse(argv)
    try:
        if args.plan:
            plan_command(args)
            return 0
        if args.workdir:
            return sample_run(args)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--workdir: needed under torchrun (the demo forks ranks of its own)")
        return 0 if demo() else 1
    except BrokenPipeError:                                 # `| head` has seen enough
        os._exit(0)
    except (ValueError, OSError) as error:
        fail(str(error).strip().splitlines()[0])
    except RuntimeError as error:          # LostRank, or gloo's own words during start and decoding
        if not is_loss(error):
            raise
        print(f"sample_parallel.py: {str(error).strip().splitlines()[0][:240]}", file=sys.stderr,
              flush=True)
        os._exit(1)                            # not through a process group that waits for the dead


if __name__ == "__main__":
    sys.exit(main())
