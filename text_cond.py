"""Text conditioning: prompts -> tokens P (B, L, D) and mask (B, L), by Movie Gen's three encoders.

  'a red sign saying "CAT" moving left', at 16 frames a second
    |- FPS-16 a red sign ... -> words     UL2       what the sentence means  <= 512 tokens -.
    |- CAT                   -> bytes     ByT5      how the sign is spelled  <= 128 tokens -+-> P
    '- FPS-16 a red sign ... -> concepts  MetaCLIP  what it looks like       <= 256 tokens -'
                                                each: Linear, LayerNorm; then one after another

UL2 has read text alone, MetaCLIP has also seen pictures, and ByT5 knows letters: it reads nothing
but the text that is to be drawn, which is whatever stands in quotes [MG s3.1.4]. P goes to the
cross-attention of every block of the backbone; nothing is pooled.

Papers: Movie Gen, arXiv 2410.13720 [MG]; UL2, arXiv 2205.05131; ByT5, arXiv 2105.13626; MetaCLIP,
arXiv 2309.16671; CLIP, arXiv 2103.00020; Long-CLIP, arXiv 2403.15378 [LC].

Two modes. `toy` trains three small encoders with the backbone: no download. They keep the three
roles. `pretrained` runs the real, frozen encoders through transformers, one after the other, in
bf16; their outputs are computed once and kept.

Contract
    encode(prompts, fps, camera) -> dict of tensors, a row for each prompt: the frozen part. Row i
                                    depends on prompt i alone (but for the length of the padding)
    forward(features, drop)      -> P (B, L, D), mask (B, L) bool, True = attend: the trained part
                                    No row is ever without a True. L is what this batch needs
    drop (B,) or (B, 3) bool     True: one learned null token stands for this encoder

    python text_cond.py                                              # demo and figure          25 s
    python text_cond.py 'a red sign saying "CAT" moving left'        # who sees what             3 s
    python text_cond.py --text pretrained --words DIR --concepts DIR 'a prompt'
    python text_cond.py --run runs/toy 'a red circle moving left'    # where its video tokens look
    python text_cond.py --study runs/toy        # each encoder taken away in turn           55 min

Differences from the paper
    - Its long-prompt MetaCLIP (256 tokens) is not public. A public one is stretched from 77, for
      the prompts that need it, and not tuned afterwards. UL2's and ByT5's limits are those of open
      reimplementations.
    - Its recipe for dropping conditions could not be checked. Here: a learned null token for each
      encoder, drawn for each sample, for all three together or (`independent`) for each with the
      cube root of the rate.
    - Camera motion is one of 16 labels there; here it is any phrase.
    - The toy word encoder does not see the quoted letters (see `words_of`).

Letters: B batch, R prompts to encode, L tokens, D width of P, Z numbers of a pooled latent.
"""
import argparse
import contextlib
import hashlib
import logging
import math
import os
import re
import string
import sys
import time
import unicodedata
import uuid
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---- 1. Sizes ------------------------------------------------------------------------------------

ENCODERS = ("words", "bytes", "concepts")               # the order of P, and of drop's columns
UMASK = os.umask(0o077)                                 # the only way to read it is to set it
os.umask(UMASK)


def one_of(name, value, choices):
    """ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


@dataclass
class TextConfig:
    """Which encoders, and how wide."""

    mode: str = "toy"           # toy: small ones, trained with the backbone | pretrained: frozen
    dim: int = 192              # D, the width of P
    max_words: int = 512        # tokens of each encoder, end token included; longer is cut
    max_bytes: int = 128
    max_concepts: int = 256
    width: int = 128            # toy: width, layers and heads of the word and the byte encoder
    layers: int = 2
    heads: int = 4
    words: str = "google/ul2"   # pretrained: names on the Hugging Face hub, or local folders
    bytes: str = "google/byt5-small"
    concepts: str = "facebook/metaclip-h14-fullcc2.5b"
    precision: str = "bf16"     # pretrained: bf16 | fp32, of the frozen encoders and their features
    offload: str = "disk"       # pretrained: where an encoder waits after use: disk | cpu | never
    cache: str = ""             # pretrained: folder that keeps features by encoder and text
    batch: int = 16             # pretrained: prompts at a time
    without: str = ""           # words | bytes | concepts: an encoder that never says anything

    def __post_init__(self):
        one_of("mode", self.mode, ("toy", "pretrained"))
        one_of("precision", self.precision, ("bf16", "fp32"))
        one_of("offload", self.offload, ("disk", "cpu", "never"))
        one_of("without", self.without, ("", *ENCODERS))
        for name in ENCODERS:
            if self.limit(name) < 2:
                raise ValueError(f"max_{name} {self.limit(name)}: less than a token and its end")
        for name in ("dim", "width", "heads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
        if self.layers < 0:
            raise ValueError(f"layers {self.layers}: must be 0 or more")
        for name in ENCODERS:
            if not getattr(self, name):
                raise ValueError(f"{name} '': must be a name or a folder")
        if self.width % (2 * self.heads):
            raise ValueError(f"heads {self.heads}: twice that does not divide width {self.width}")

    def limit(self, name):
        return getattr(self, "max_" + name)

    def tokens(self, name, ids):
        """How many tokens of P come from so many ids of an encoder: the toy's bag is one."""
        return 1 if self.mode == "toy" and name == "concepts" else ids


PRESETS = {
    "toy":   TextConfig("toy", 256),
    "small": TextConfig("toy", 384),
    "1b":    TextConfig("pretrained", 1536, offload="cpu"),     # many captions, much memory
    "5b":    TextConfig("pretrained", 3072, offload="cpu"),
    "30b":   TextConfig("pretrained", 6144, offload="cpu"),
}

# ---- 2. Prompts, as users type them --------------------------------------------------------------

# Straight, curly (German: from low to high; Swedish: twice the same), guillemets (French; German:
# the other way round), CJK corner brackets, full-width. Not the single quotes: they are apostrophes
# far more often. A quote that is never closed is no quote; nor is the inch of a 5" sign.
QUOTES = re.compile(r'(?<!\d)"([^"]*)"|[“„]([^“„”]*)[”“]|”([^”]*)”|«([^»]*)»|»([^«]*)«|'
                    '「([^」]*)」|『([^』]*)』|｢([^｣]*)｣|＂([^＂]*)＂')


def clean(prompt):
    """The prompt in NFC, so that é typed as one character or as two is one thing to all encoders.

    ValueError for what is no text: a lone surrogate (half of a broken emoji), a NUL."""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r}: not a string")
    for i, c in enumerate(prompt):
        if c == "\0" or "\ud800" <= c <= "\udfff":
            what = "a NUL" if c == "\0" else "a lone surrogate"
            raise ValueError(f"prompt {prompt[:60]!r}: {what} at character {i + 1}")
    return unicodedata.normalize("NFC", prompt)


def visual_text(prompt):
    """The strings to be drawn. One to a line, since a sign may well hold a space."""
    found = ("".join(groups).strip() for groups in QUOTES.findall(prompt))
    return "\n".join(s for s in found if s)


def seen_by(prompt, fps=None, camera=None):
    """What each encoder is given: {"words": str, "bytes": str, "concepts": str}.

    The sampling rate stands in front as text, FPS-16 [MG s3.1.4], and so does the camera motion.
    ByT5 sees neither: nobody wants them drawn."""
    prompt = clean(prompt)
    if fps is not None and not fps > 0:
        raise ValueError(f"fps {fps}: not a positive number")
    whole = " ".join(s for s in (None if fps is None else f"FPS-{fps:g}",
                                 camera and clean(camera) + ".", prompt) if s)
    return {"words": whole, "bytes": visual_text(prompt), "concepts": whole}


# ---- 3. Tokenizers that need no download ---------------------------------------------------------

def byte_ids(text):
    """ByT5's tokenizer: each UTF-8 byte + 3, then 1 for the end (0 pads, 2 is unused). No text, no
    tokens. One character takes up to 4 of them."""
    return [b + 3 for b in text.encode("utf-8")] + [1] if text else []


def words_of(text):
    """Toy words: lower case without punctuation, `<quoted>` for each quoted string, then `<end>`.

    Why not the quoted letters: to a table of whole words "CAT" is an opaque symbol. The backbone
    would learn the training words by heart from it and leave the byte encoder idle, and a held-out
    word, whose symbol was never trained, would come out as anything. (The real UL2 sees the whole
    prompt: its subwords do spell, a little.)"""
    words = re.findall(r"\0|[^\s.,;:!?()\"\0]+", QUOTES.sub(" \0 ", text).casefold())
    return ["<quoted>" if w == "\0" else w for w in words] + ["<end>"]


def word_id(word):
    """1 + CRC-32 modulo 2^20; 0 pads. No vocabulary, so no unknown word, and the same in every
    process (Python's own hash is not). Two words with one id are one word to the encoder: for a
    vocabulary of 100 words the chance that any two meet is 0.5 %, for 1000 words 38 %."""
    return 1 + zlib.crc32(word.encode("utf-8")) % 2 ** 20


def toy_ids(name, text):
    """The ids that the toy encoder `name` reads of a text."""
    if name == "bytes":
        return byte_ids(text)
    ids = [word_id(w) for w in words_of(text)]
    return ids if name == "words" else sorted(set(ids[:-1]))        # concepts: a set, so no order


def cut(ids, limit, name, text):
    """The first `limit` ids, the end token kept; says so."""
    if len(ids) <= limit:
        return ids
    warnings.warn(f"{name}: {len(ids)} tokens cut to {limit}: {text[:40]!r}...", stacklevel=2)
    return ids[:limit - 1] + ids[-1:]


def pad(rows, fill=0):
    """[(L_i, ...)] -> (R, L, ...): `fill` behind each row; at least one column."""
    out = rows[0].new_full((len(rows), max(1, *map(len, rows)), *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return out


# ---- 4. Toy encoders -----------------------------------------------------------------------------

class WordEmbedding(nn.Module):
    """2^20 words in 2 x 1024 rows: the id's two digits to the base 1024 pick a row each, summed.

    Words that share one digit are told apart by the other; only two shared digits are one word."""

    def __init__(self, width):
        super().__init__()
        self.high, self.low = nn.Embedding(1024, width), nn.Embedding(1024, width)

    def forward(self, ids):
        ids = (ids - 1).clamp(min=0)                            # padding is masked, never read
        return self.high(ids // 1024) + self.low(ids % 1024)


class Layer(nn.Module):
    """A pre-norm transformer layer, bidirectional."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, mask):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "B L (three h d) -> three B h L d",
                            three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(rearrange(y, "B h L d -> B L (h d)"))
        return x + self.mlp(self.norm2(x))                                      # (B, L, width)


class SequenceEncoder(nn.Module):
    """The toy UL2 and the toy ByT5: ids (B, L), 0 = padding -> features (B, L, width).

    Positions are added here, once: the backbone's cross-attention has none for the text, and
    without them CAT and ACT would be the same set of letters."""

    def __init__(self, embedding, width, layers, heads):
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, ids):
        B, L = ids.shape
        x = self.embedding(ids)                                                 # (B, L, width)
        i, l = (torch.arange(n, device=ids.device) for n in (x.shape[-1] // 2, L))
        angle = l[:, None] * torch.exp(-math.log(1e4) * i / len(i))             # (L, width/2)
        x = x + torch.cat([angle.cos(), angle.sin()], dim=-1)
        # A row without a single token (nothing quoted) would have nothing to attend to: NaN in
        # some kernels. It looks at its first padding instead, and nobody looks at it.
        mask = (ids != 0) | (l == 0)                                            # (B, L)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x


class BagOfConcepts(nn.Module):
    """The toy MetaCLIP: the set of words (B, L), 0 = padding -> one feature (B, 1, width).

    Like CLIP it knows what is in the picture, and not who does what: a red circle beside a blue
    square and a blue circle beside a red square are one to it."""

    def __init__(self, width):
        super().__init__()
        self.embedding = WordEmbedding(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, ids):
        there = (ids != 0)[..., None]                                           # (B, L, 1)
        mean = (self.embedding(ids) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.mlp(mean)[:, None]                                          # (B, 1, width)


# ---- 5. Pretrained encoders ----------------------------------------------------------------------

WIDTHS = {"google/ul2": 4096, "google/byt5-small": 1472, "google/byt5-base": 1536,
          "facebook/metaclip-b32-400m": 512, "facebook/metaclip-h14-fullcc2.5b": 1024}


def make_torchvision_importable():
    """transformers imports torchvision if it is installed. Where a CPU torch sits beside the CUDA
    wheel of torchvision, that import stops at "operator torchvision::nms does not exist". Two
    schemas, without kernels, are all that it needs. Does nothing where torchvision loads."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        make_torchvision_importable.keep = library      # the schemas live as long as this does
    except ImportError:
        pass


def from_hub(name, source, kind, **options):
    """transformers.<kind>.from_pretrained(source), with one line for whatever goes wrong."""
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{name} {source}: no such folder, and no name on the hub (OWNER/NAME)")
    try:
        make_torchvision_importable()
        import transformers
        for talker in ("huggingface_hub", "transformers"):      # of retries, and of unread weights
            logging.getLogger(talker).setLevel(logging.ERROR)
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as e:          # of many kinds: offline, no such model, a file that is cut off
        line = str(e).strip().split("\n")[0] or type(e).__name__
        raise ValueError(f"{name} {source}: neither a folder with this encoder nor a model that "
                         f"can be fetched from the hub ({line})") from None


def load_tokenizer(name, source):
    """-> a function, text -> ids with the end token last. ByT5's needs no files."""
    if name == "bytes":
        return byte_ids
    tokenizer = from_hub(name, source, "AutoTokenizer")
    return lambda text: tokenizer(text, truncation=False, verbose=False).input_ids


def check_sources(cfg):
    """Pretrained encoders will be wanted later: ValueError now for one that is not to be had.

    Tokenizers and configs are fetched and read, a few megabytes. Of weights it is looked whether a
    folder has any; those of the hub show when they are loaded. With a cache, which may have all
    that is wanted, only what a model cannot be made without is asked for."""
    for name in ENCODERS if cfg.mode == "pretrained" else ():
        source, kind, types = getattr(cfg, name), "T5", ("t5",)
        if name == "concepts":
            kind, types = "CLIP", ("clip", "clip_text_model")
        if cfg.cache:
            width_of(name, source)
            continue
        found = from_hub(name, source, "AutoConfig").model_type
        if found not in types:
            raise ValueError(f"{name} {source}: a model of type {found}, where {kind} is read")
        load_tokenizer(name, source)
        weights = [f for f in Path(source).glob("*")
                   if f.suffix in (".safetensors", ".bin") and f.stat().st_size > 1024]
        if Path(source).is_dir() and not weights:
            raise ValueError(f"{name} {source}: no weights there, or only Git LFS's pointers to "
                             "them (model.safetensors)")


def load_encoder(name, source, limit, dtype):
    """The frozen encoder of this role, on the CPU."""
    kind = "CLIPTextModel" if name == "concepts" else "T5EncoderModel"
    model, told = from_hub(name, source, kind, dtype=dtype, output_loading_info=True)
    model.eval().requires_grad_(False)
    # What it has no place for, as a decoder, is left out; what is missing would be drawn at random.
    if told["missing_keys"]:
        raise ValueError(f"{name} {source}: not the weights of a {kind}, "
                         f"{min(told['missing_keys'])} is missing")
    if name == "concepts":
        add_long_positions(model, limit)
    return model


def add_long_positions(clip, limit, kept=20):
    """Give a CLIP text encoder of 77 positions a second table of `limit` rows, behind the first.

    The first 20 rows are kept and the others stretched: CLIP was trained on captions that rarely
    reach further [LC]. Prompts of up to 77 tokens use the first table and are encoded exactly
    as MetaCLIP was trained to; only longer ones use the second."""
    inner = getattr(clip, "text_model", clip)           # transformers 5.0 has one more level
    old = inner.embeddings.position_embedding.weight                            # (77, width)
    clip.short = len(old)
    tail = F.interpolate(old[kept:].float().T[None], size=max(limit, clip.short) - kept,
                         mode="linear", align_corners=True)[0].T
    table = torch.cat([old, old[:kept], tail.to(old.dtype)])                    # (77+limit, width)
    inner.embeddings.position_embedding = nn.Embedding.from_pretrained(table)


def width_of(name, source):
    """Features per token, without loading the weights."""
    if source in WIDTHS:
        return WIDTHS[source]
    config = from_hub(name, source, "AutoConfig")
    config = getattr(config, "text_config", None) or config     # CLIP's has one for each tower
    return getattr(config, "d_model", None) or config.hidden_size


@torch.no_grad()
def run_frozen(model, name, rows, device):
    """ids of each text, unpadded -> features (B, L, width) on the CPU; those behind a row are void.

    T5 and ByT5 are bidirectional, and need the mask: without it the padding would leak into every
    token, and a prompt's features would depend on the longest prompt beside it."""
    ids = pad([torch.tensor(r) for r in rows]).to(device)
    length = torch.tensor([len(r) for r in rows], device=device)[:, None]
    place = torch.arange(ids.shape[1], device=device)                           # (L,)
    more = {}
    if name == "concepts":
        more["position_ids"] = place + model.short * (length > model.short)     # (B, L)
    mask = (place < length).long()
    return model(input_ids=ids, attention_mask=mask, **more).last_hidden_state.cpu()


# ---- 6. The conditioner --------------------------------------------------------------------------

class TextConditioner(nn.Module):
    """Three encoders, each with its own Linear and LayerNorm into D, one behind the other."""

    def __init__(self, cfg, widths=None):
        """widths: {name: features a token} of pretrained encoders, so that none is asked for it."""
        super().__init__()
        self.cfg, w = cfg, cfg.width
        self.frozen = {}                    # name -> (tokenizer, model) in use; not parameters
        if cfg.mode == "toy":
            self.encoders = nn.ModuleDict({
                "words": SequenceEncoder(WordEmbedding(w), w, cfg.layers, cfg.heads),
                "bytes": SequenceEncoder(nn.Embedding(384, w), w, cfg.layers, cfg.heads),
                "concepts": BagOfConcepts(w)})
            widths = dict.fromkeys(ENCODERS, w)
            # For `align`, CLIP's two projections to a common space and its learned scale.
            self.text_to_common = nn.Linear(w, 64)
            self.latent_to_common = nn.Linear(256, 64)
            self.scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # (1,): FSDP shards no scalar
        else:
            widths = widths or {name: width_of(name, getattr(cfg, name)) for name in ENCODERS}
        self.project = nn.ModuleDict({
            name: nn.Sequential(nn.Linear(widths[name], cfg.dim), nn.LayerNorm(cfg.dim))
            for name in ENCODERS})
        # The null token takes an encoder's place before the projection: whatever the LayerNorm
        # learns, null and real tokens leave it with the same scale.
        self.null = nn.ParameterDict({name: nn.Parameter(torch.randn(widths[name]))
                                      for name in ENCODERS})

    # ---- the frozen part ----

    def encode(self, prompts, fps=None, camera=None):
        """R prompts -> {name: (R, L) int64} (toy), or {name: (R, L, width), name_mask: (R, L)}.

        fps and camera: one for all, or a list. Tensors on the CPU, to be kept with the latents and
        indexed by row. Warns where a prompt is longer than an encoder's limit, and cuts it."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts {prompts[:60]!r}: not a list of prompts")
        if not prompts:
            raise ValueError("prompts []: nothing to encode")
        each = {"fps": fps, "camera": camera}
        for name, x in each.items():
            each[name] = x if isinstance(x, (list, tuple)) else [x] * len(prompts)
            if len(each[name]) != len(prompts):
                raise ValueError(f"{name} {x}: not one for all or one for each of the "
                                 f"{len(prompts)} prompts")
        seen = [seen_by(*row) for row in zip(prompts, each["fps"], each["camera"])]
        out = {}
        for name in ENCODERS:
            texts = [s[name] for s in seen]
            if self.cfg.mode == "toy":
                ids = {t: cut(toy_ids(name, t), self.cfg.limit(name), name, t) for t in set(texts)}
                out[name] = pad([torch.tensor(ids[t], dtype=torch.int64) for t in texts])
            else:
                rows = self.frozen_features(name, list(dict.fromkeys(texts)))
                rows = [rows[t] for t in texts]
                out[name] = pad(rows)
                out[name + "_mask"] = pad([torch.ones(len(r), dtype=torch.bool) for r in rows])
        return out

    def frozen_features(self, name, texts):
        """Distinct texts -> {text: features (L, width)}, from `cache` or from the encoder.

        An encoder is loaded when a text is not in the cache. One at a time is on the device
        (`disk`, `cpu`), since UL2's alone has 17 GB in bf16; `never` keeps all three there."""
        cfg, source = self.cfg, getattr(self.cfg, name)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        width, done = self.null[name].numel(), {}
        if "" in texts and name == "bytes":                     # nothing quoted: ByT5 is not asked
            done[""] = torch.zeros(0, width, dtype=dtype)
        for text in texts:
            if cfg.cache and text not in done and self.cache_file(name, text).exists():
                from safetensors import SafetensorError
                from safetensors.torch import load_file
                with contextlib.suppress(SafetensorError):      # damaged: made again
                    done[text] = load_file(self.cache_file(name, text))["features"]
        missing = [t for t in texts if t not in done]
        if not missing:
            return done
        if name not in self.frozen:
            self.frozen[name] = (load_tokenizer(name, source),
                                 load_encoder(name, source, cfg.limit(name), dtype))
        tokenize, model = self.frozen[name]
        device = self.null[name].device
        model.to(device)
        ids = {t: cut(tokenize(t), cfg.limit(name), name, t) for t in missing}
        missing.sort(key=lambda t: len(ids[t]))                 # like with like: little padding
        for i in range(0, len(missing), cfg.batch):
            some = missing[i:i + cfg.batch]
            for text, x in zip(some, run_frozen(model, name, [ids[t] for t in some], device)):
                done[text] = x[:len(ids[text])].to(dtype).clone()               # (L, width)
                if done[text].shape[1] != width:
                    raise ValueError(f"{name} {source}: {done[text].shape[1]} features a token, "
                                     f"not the {width} that this model was made for")
                if cfg.cache:
                    self.write_cache(name, text, done[text])
        if cfg.offload == "disk":
            del self.frozen[name]
        elif cfg.offload == "cpu":
            model.to("cpu")
        return done

    def cache_file(self, name, text):
        """One file for each text and encoder: its name is a digest of all that decides it."""
        cfg, source = self.cfg, getattr(self.cfg, name)
        weights = ()                            # of a folder, which may change under its name
        if Path(source).is_dir():
            weights = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns)
                             for f in Path(source).iterdir())
        key = "\0".join((source, str(weights), str(cfg.limit(name)), cfg.precision, text))
        digest = hashlib.sha256(key.encode("utf-8")).hexdigest()
        return Path(cfg.cache) / name / digest[:2] / f"{digest}.safetensors"

    def write_cache(self, name, text, features):
        """Complete or not at all, also when several processes write the same file. OSError without
        space for it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        file = self.cache_file(name, text)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            save_file({"features": features.contiguous()}, part)
            part.chmod(0o666 & ~UMASK)          # like other files, not its owner's alone
        except SafetensorError as error:
            part.unlink(missing_ok=True)
            raise OSError(f"{file}: could not be written ({error})") from None
        os.replace(part, file)

    # ---- the trained part ----

    def features_of(self, name, features):
        """One encoder's rows -> (B, L, width), mask (B, L), on this module's device."""
        null = self.null[name]
        there = features[name + "_mask"] if self.cfg.mode == "pretrained" else features[name] != 0
        L = max(1, int(there.sum(1).max()))             # cached rows are padded for all prompts
        x, mask = features[name][:, :L].to(null.device), there[:, :L].to(null.device)
        if self.cfg.mode == "pretrained":
            return x.to(null.dtype), mask
        if name == "concepts":                                                  # a bag is one token
            mask = torch.ones_like(mask[:, :1])
        return self.encoders[name](x), mask

    def forward(self, features, drop=None):
        """Rows of `encode` -> P (B, L, D), mask (B, L). drop (B,) or (B, 3) bool: null tokens.

        A null token is one that may be attended to, so that a row without any text still has three
        tokens, and no softmax is ever over nothing. Padding is zero and masked."""
        P, masks = [], []
        if self.cfg.without:
            lost = torch.tensor([name == self.cfg.without for name in ENCODERS])
            drop = lost[None] if drop is None else lost | drop.cpu().view(len(drop), -1)
        for i, name in enumerate(ENCODERS):
            x, mask = self.features_of(name, features)                          # (B, L, width)
            if drop is not None:
                gone = (drop if drop.dim() == 1 else drop[:, i]).to(x.device)[:, None]
                first = torch.arange(x.shape[1], device=x.device) == 0
                x = torch.where((gone & first)[..., None], self.null[name].to(x.dtype), x)
                mask = torch.where(gone, first, mask)                           # (B, L)
            L = int(mask.sum(1).max())                          # no longer than this batch needs
            mask = mask[:, :L]
            P.append(self.project[name](x[:, :L]) * mask[..., None])
            masks.append(mask)
        return torch.cat(P, dim=1), torch.cat(masks, dim=1)                     # (B, L, D), (B, L)

    def null_tokens(self, B):
        """The prompt of unconditional sampling: P (B, 3, D), mask (B, 3), as `drop` makes it."""
        P = torch.stack([self.project[name](self.null[name]) for name in ENCODERS])
        return P.expand(B, -1, -1), torch.ones(B, 3, dtype=torch.bool, device=P.device)

    def drop_mask(self, B, p, generator=None, independent=False):
        """Which samples train without which encoder -> (B, 3) bool. Each sample draws for itself.

        Together: all three with probability p. Independent: each with p^(1/3), so that all three
        still go together with probability p, and the others learn to stand in for a missing one."""
        if not 0 <= p <= 1:
            raise ValueError(f"p {p}: not a probability")
        rate = p ** (1 / 3) if independent else p
        return (torch.rand(B, 3 if independent else 1, generator=generator) < rate).expand(B, 3)

    def align(self, features, z):
        """CLIP's loss for the toy bag of concepts: a caption must find its clip, and a clip its
        caption, in the batch. z: the clips' latents, (B, C, T, H, W) or (B, F). Scalar.

            a = normalise(W_a concept), b = normalise(W_b pool(z)), logits = s a b^T
            (CE(logits, i) + CE(logits^T, i)) / 2, i = 0 .. B-1

        Two clips of one caption need no care: their texts are one vector, so the sum of their terms
        is that of counting both as right for both, and no pair of them is pushed apart."""
        if self.cfg.mode != "toy":
            raise ValueError("align: the pretrained MetaCLIP is frozen, only the toy one learns")
        ids = features["concepts"].to(self.scale.device)
        a = F.normalize(self.text_to_common(self.encoders["concepts"](ids)[:, 0]), dim=-1)
        # Coarse in space, and two moments, so that a direction can be told. Then 256 numbers,
        # whatever the autoencoder: one Linear fits them all.
        z = F.adaptive_avg_pool3d(z, (2, 4, 4)) if z.dim() == 5 else z
        z = F.adaptive_avg_pool1d(z.flatten(1)[:, None], 256)[:, 0]             # (B, Z)
        b = F.normalize(self.latent_to_common(z), dim=-1)
        logits = self.scale.exp().clamp(max=100) * a @ b.T                      # (B, B)
        own = torch.arange(len(ids), device=ids.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# ---- 7. Demo -------------------------------------------------------------------------------------

class Speller(nn.Module):
    """Reads letters 1 to 3 of a sign from P as the backbone would: by cross-attention, with one
    query for each place on the sign."""

    def __init__(self, dim):
        super().__init__()
        self.place = nn.Parameter(torch.randn(3, dim))
        self.kv, self.letter = nn.Linear(dim, 2 * dim), nn.Linear(dim, 27)      # A-Z and "none"

    def forward(self, P, mask):
        k, v = self.kv(P).chunk(2, dim=-1)                                      # (B, L, D)
        score = self.place @ k.transpose(1, 2) / k.shape[-1] ** 0.5             # (B, 3, L)
        weight = score.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.letter(weight @ v), weight                                  # (B, 3, 27)


def learn_to_spell(template, trained, held_out, steps):
    """-> (conditioner, speller, [(step, accuracy on trained, on held-out words), ...])."""
    torch.manual_seed(0)
    text = TextConditioner(TextConfig("toy", dim=96, width=64))
    speller = Speller(96)
    both = nn.ModuleList([text, speller])
    opt = torch.optim.AdamW(both.parameters(), lr=3e-3, weight_decay=0.0)
    encoded = {words: text.encode([template.format(w) for w in words])
               for words in (trained, held_out)}
    letters = {words: torch.tensor([[string.ascii_uppercase.find(c) % 27 for c in f"{w:3}"]
                                    for w in words]) for words in encoded}      # 26: no letter
    written = {words: torch.tensor([[i < len(w) for i in range(3)] for w in words])
               for words in encoded}

    def accuracy(words):
        with torch.no_grad():
            right = speller(*text(encoded[words]))[0].argmax(-1) == letters[words]
        return right[written[words]].float().mean().item()

    curve = []
    for step in range(steps + 1):
        if step % 20 == 0 or step == steps:
            curve.append((step, accuracy(trained), accuracy(held_out)))
        for group in opt.param_groups:
            group["lr"] = 3e-3 * (1 - step / (steps + 1))
        rows = torch.randint(len(trained), (64,))
        guess, _ = speller(*text({k: x[rows] for k, x in encoded[trained].items()}))
        loss = F.cross_entropy(guess.flatten(0, 1), letters[trained][rows].flatten())
        opt.zero_grad(); loss.backward(); opt.step()
    return text, speller, curve


def demo(out, steps):
    """Why a byte encoder: it spells words that it has never seen. A table of words cannot."""
    show('a red sign saying "CAT" moving left', fps=16)
    dice = torch.Generator().manual_seed(1)
    letters = lambda n: [string.ascii_uppercase[i] for i in torch.randint(26, (n,), generator=dice)]
    words = sorted({"".join(letters(n)) for n in (2, 3) for _ in range(400)})
    trained, held_out = tuple(words[::2]), tuple(words[1::2])
    print(f"\nreading a sign from P: {len(trained)} words to learn from, {len(held_out)} held out")
    templates = {"quoted: bytes": 'a white sign saying "{}" moving right',
                 "not quoted: whole words": "a white sign saying {} moving right"}
    runs, began = {}, time.time()
    for label, template in templates.items():
        runs[label] = learn_to_spell(template, trained, held_out, steps)
        _, seen, unseen = runs[label][2][-1]
        print(f"  {label:24} letters right: {seen:.3f} of trained words, {unseen:.3f} of held-out")
    print(f"  {time.time() - began:.0f} s")
    draw(out, runs, held_out)
    spelled, hashed = (run[2][-1][2] for run in runs.values())
    ok = True
    for claim, value, bound, good in (
            ("letters of held-out words, through bytes", spelled, "at least 0.95", spelled >= 0.95),
            ("the same through whole words", hashed, "at most 0.3", hashed <= 0.3)):
        ok &= good
        print(f"{'PASS' if good else 'FAIL'} {claim}: {value:.3f} vs {bound}")
    return ok


def draw(out, runs, held_out):
    """Learning curves, and where the three queries look in a held-out word -> out/spelling.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), width_ratios=(2, 3))
    for i, (label, (_, _, curve)) in enumerate(runs.items()):
        step, seen, unseen = zip(*curve)
        left.plot(step, seen, f"C{i}--", label=f"{label}, trained words")
        left.plot(step, unseen, f"C{i}-", label=f"{label}, held out")
    left.axhline(1 / 26, color="gray", lw=0.8, ls=":")
    left.set(title="Letters read from P", xlabel="step", ylabel="fraction right", ylim=(0, 1.03))
    left.legend(fontsize=8)
    text, speller, _ = next(iter(runs.values()))
    word = next(w for w in held_out if len(set(w)) == 3)
    prompt = f'a white sign saying "{word}" moving right'
    with torch.no_grad():
        weight = speller(*text(text.encode([prompt])))[1][0]                    # (3, L)
    labels = [t for name in ("words", "bytes") for t in tokens(name, seen_by(prompt)[name])]
    right.imshow(weight, cmap="magma", vmin=0, vmax=1, aspect="auto")
    right.set_xticks(range(len(labels) + 1), [*labels, "(bag)"], rotation=45, ha="right")
    right.set_yticks(range(3), ["1st letter", "2nd", "3rd"])
    right.set_title(f"Where each query looks: the held-out word {word}")
    out.mkdir(parents=True, exist_ok=True)
    fig.tight_layout(); fig.savefig(out / "spelling.png", dpi=120); plt.close(fig)
    print(f"  figure: {out / 'spelling.png'}")


# ---- 8. In a trained run: where video tokens look, and what each encoder is good for -------------

@torch.no_grad()
def look(folder, prompt, out):
    """Sample one clip of a finished toy run, and draw how much of the cross-attention of its video
    tokens falls on each token of the prompt (all heads, blocks and steps) -> out/attention.png."""
    import matplotlib

    import train
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    run = train.load_run(folder)
    if (run.cfg.text.mode != "toy" or run.cfg.text.without or len(run.cfg.dit.streams) > 1
            or not run.cfg.dit.adaptive):
        raise ValueError(f"--run {folder}: only the three toy encoders, a single latent stream and "
                         "t in the norms are drawn")
    P, mask, _, _ = run.prompts([prompt])
    seen = []

    def weights(layer, args, result):
        x, text, *_ = args
        if torch.equal(text, P):                                # not the null prompt of guidance
            q = rearrange(layer.q(x), "B N (h d) -> B h N d", h=layer.heads)
            k = rearrange(layer.kv(text), "B L (two h d) -> two B h L d", two=2, h=layer.heads)[0]
            seen.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))       # (N, L)

    hooks = [block.cross_attention.register_forward_hook(weights) for block in run.dit.blocks]
    clip = run.generate([prompt], [0])[0]                                       # (3, T, H, W)
    for hook in hooks:
        hook.remove()
    stream = run.cfg.dit.streams[0]
    T, H, W = (n // p for n, p in zip(stream.size, stream.patch))
    maps = rearrange(torch.stack(seen).mean(0), "(T H W) L -> L T H W", T=T, H=H).mean(1)
    said = seen_by(prompt)
    labels = [t for name in ("words", "bytes") for t in tokens(name, said[name])] + ["(bag)"]
    fig, axes = plt.subplots(2, len(labels) + 1, figsize=(1.1 * len(labels) + 1, 2.7),
                             height_ratios=(3, 1), squeeze=False)
    frame = clip[:, clip.shape[1] // 2].permute(1, 2, 0) / 2 + 0.5
    axes[0, 0].imshow(frame.cpu(), extent=(0, W, H, 0))
    axes[0, 0].set_title("middle frame", fontsize=7)
    for i, label in enumerate(labels):
        axes[0, i + 1].imshow(maps[i].cpu(), cmap="magma", vmin=0, vmax=maps.max().item())
        axes[0, i + 1].set_title(label, fontsize=7)
        axes[1, i + 1].bar([0], [maps[i].mean().item()], color="C0")
        axes[1, i + 1].set_ylim(0, maps.mean((1, 2)).max().item())
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    axes[1, 0].set_axis_off()
    axes[1, 1].set_ylabel("share", fontsize=7)
    out.mkdir(parents=True, exist_ok=True)
    fig.tight_layout(pad=0.3); fig.savefig(out / "attention.png", dpi=130); plt.close(fig)
    for label, share in zip(labels, maps.mean((1, 2)).tolist()):
        print(f"  {label:12}{100 * share:5.1f} %")
    print(f"  figure: {out / 'attention.png'}")


def study(folder, out, steps):
    """The toy system with each encoder taken away in turn, on the latents of a finished run. Then
    signs in Latin letters, one byte each, against signs in Chinese characters, three bytes each:
    the same autoencoder, which saw only the first; out/scripts."""
    import train
    variants = {"all three": {}} | {f"without {name}": {"text.without": name} for name in ENCODERS}
    train.compare(folder, out, {k: {**v, "train_dit.steps": steps} for k, v in variants.items()},
                  shown=("loss", "color", "shape", "direction", "text", "words", "heldout"))
    scripts = ["latin", "chinese"]
    try:
        train.autoencoder.glyphs(train.autoencoder.SCRIPTS["chinese"][0][0], 16)
    except ValueError as e:
        print(f"Chinese signs: skipped, {e}")
        scripts.pop()
    train.compare(folder, out / "scripts", {script: {
        "clips.script": script, "clips.count": 6144, "train_dit.steps": steps}
        for script in scripts}, shown=("loss", "color", "shape", "text", "words", "words_heldout"))


# ---- 9. Command line -----------------------------------------------------------------------------

def tokens(name, text, cfg=None):
    """The tokens as text, for people."""
    if name == "bytes":
        return [chr(i - 3) if 32 < i - 3 < 127 else "<end>" if i == 1 else f"<{i - 3:02x}>"
                for i in byte_ids(text)]
    if cfg is None or cfg.mode == "toy":
        words = words_of(text)
        return words if name == "words" else sorted(set(words[:-1]), key=word_id)
    tokenizer = from_hub(name, getattr(cfg, name), "AutoTokenizer")
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def show(prompt, fps=None, camera=None, cfg=None):
    """Print what each encoder sees, token by token."""
    cfg = cfg or PRESETS["toy"]
    for name, text in seen_by(prompt, fps, camera).items():
        found = tokens(name, text, cfg)
        source = "toy" if cfg.mode == "toy" else getattr(cfg, name)
        bag = ", a set: one token of P" if cfg.mode == "toy" and name == "concepts" else ""
        print(f"{name} ({source}), {len(found)} of at most {cfg.limit(name)} tokens{bag}")
        print("   ", " ".join(found) if found else "(nothing in quotes, so nothing)")


class Parser(argparse.ArgumentParser):
    """Bad arguments give one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    """The command line."""
    parser = Parser(description="Text conditioning: a demo, or what each encoder sees of a prompt",
                    allow_abbrev=False)
    parser.add_argument("prompt", nargs="?", help="print its tokens; without it, the demo")
    parser.add_argument("--fps", type=float, help="frames a second, put in front of the prompt")
    parser.add_argument("--camera", help="camera motion, put in front of the prompt")
    parser.add_argument("--text", default="toy", choices=("toy", "pretrained"), help="encoders")
    for name in ("words", "concepts"):
        parser.add_argument(f"--{name}", default=getattr(TextConfig, name), metavar="NAME",
                            help="pretrained: hub name or folder (default: %(default)s)")
    parser.add_argument("--run", type=Path, help="draw where video tokens look in this toy run")
    parser.add_argument("--study", metavar="RUN", type=Path,
                        help="train on its latents with each encoder taken away in turn")
    parser.add_argument("--steps", type=int,
                        help="training steps of the demo (300), or of each run of the study (400)")
    parser.add_argument("--out", type=Path, default=Path("out/text_cond"), help="figure's folder")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 400 if args.study else 300
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: not a positive number")
    if args.prompt is not None and not args.prompt.strip():
        parser.error(f"prompt {args.prompt!r}: is empty")
    try:
        if args.study:
            return study(args.study, args.out, args.steps)
        if args.run:
            return look(args.run, args.prompt or 'a red sign saying "A" moving left', args.out)
        if args.prompt is None:
            sys.exit(0 if demo(args.out, args.steps) else 1)
        cfg = TextConfig(args.text, words=args.words, concepts=args.concepts)
        show(args.prompt, args.fps, args.camera, cfg)
    except ModuleNotFoundError as e:
        parser.error(f"{e}; --study and --run need the other files of this repository beside this "
                     "one")
    except (ValueError, OSError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
