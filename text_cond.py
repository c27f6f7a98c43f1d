"""Text conditioning: prompts -> tokens P (B, L, D) and mask (B, L), by Movie Gen's three encoders.

  'FPS-16 a red sign saying "CAT" moving left'
    |- the whole prompt -> words     UL2       what the sentence means  <= 512 tokens -.
    |- CAT              -> bytes     ByT5      how the sign is spelled  <= 128 tokens -+-> P
    '- the whole prompt -> concepts  MetaCLIP  what it looks like       <= 256 tokens -'
                                          each: Linear, LayerNorm; then concatenated

UL2 was trained on text, MetaCLIP on images with captions. ByT5 works on bytes and is given only the
quoted text that should appear in the video [MG s3.1.4]. P goes to the cross-attention of every
block of the backbone; nothing is pooled, except that the toy MetaCLIP makes one token, a mean over
words. The frame rate, FPS-16, is text in front of the prompt.

Papers: Movie Gen, arXiv 2410.13720 [MG]; UL2, arXiv 2205.05131; ByT5, arXiv 2105.13626; MetaCLIP,
arXiv 2309.16671; CLIP, arXiv 2103.00020; Long-CLIP, arXiv 2403.15378 [LC]; classifier-free
guidance, arXiv 2207.12598 [CFG].

Two modes. `toy`: three small encoders with these roles, trained with the backbone; no download.
`pretrained` runs public, frozen encoders through transformers, one after the other, in bf16; for
training their outputs are computed once and kept with the latents.

Contract
    encode(prompts)         -> dict of tensors, a row for each prompt: the frozen part (toy: token
                               ids). Row i depends on prompt i alone, except for its padding
    forward(features, drop) -> P (B, L, D), mask (B, L) bool, True = attend: the trained part.
                               Every row has at least one True, so no softmax is taken over an
                               empty set. L is what this batch needs
    drop (B,) or (B, 3) bool   True: one learned null token replaces this encoder's tokens

    python text_cond.py                                          # demo and figure; 25 s on 2 cores
    python text_cond.py 'a red sign saying "CAT" moving left'    # who sees what; 3 s

Differences from the paper
    - The paper's long-prompt MetaCLIP (256 tokens) is not public. We stretch the 77 positions of
      a public one for longer prompts, without finetuning.
    - The sizes of ByT5 and MetaCLIP, the order of the three in P, and the limits of UL2 and ByT5
      were not found in the paper: the limits are those of an open reimplementation.
    - Nor was its recipe for dropping conditions. Here: a learned null token for each encoder.
      Drops are drawn by sample, for all three together or (`independent`) each with the cube root
      of the rate.
    - Camera motion is one of 16 labels in the paper; here it is any phrase of the prompt.
    - The toy word encoder does not see the quoted letters (see `words_of`).

Letters: B batch, R prompts to encode, L tokens, D width of P, Z numbers of a pooled latent.
"""
import argparse
import logging
import math
import os
import re
import string
import sys
import time
import unicodedata
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---- 1. The idea ---------------------------------------------------------------------------------

ENCODERS = ("words", "bytes", "concepts")       # UL2, ByT5, MetaCLIP: the order of P and of `drop`


def tokens_of(prompt, encoders, projections):
    """Encode three views of a prompt as one sequence of tokens (L, D) for the cross-attention.

    encoders: {name: text -> features (L_name, width)}; projections: {name: Linear and LayerNorm}.
    TextConditioner does the same for a batch; the demo compares the two."""
    quoted = "\n".join(re.findall('"([^"]*)"', prompt))
    seen = {"words": prompt, "bytes": quoted, "concepts": prompt}
    return torch.cat([projections[name](encoders[name](text)) for name, text in seen.items()])


# ---- 2. Sizes ------------------------------------------------------------------------------------

def one_of(name, value, choices):
    """Raise ValueError unless value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: not one of {', '.join(choices)}")


@dataclass
class TextConfig:
    """Choose the encoders and their sizes."""

    mode: str = "toy"           # toy: small ones, trained with the backbone | pretrained: frozen
    dim: int = 192              # D, the width of P
    max_words: int = 512        # UL2: tokens, end token included; longer prompts are truncated
    max_bytes: int = 128        # ByT5: the same
    max_concepts: int = 256     # MetaCLIP: the same
    width: int = 128            # toy: width of the encoders
    layers: int = 2             # toy: layers of the word encoder; the byte encoder has none
    heads: int = 4              # toy: attention heads of those layers
    words: str = "google/ul2"   # pretrained: name on the Hugging Face hub, or a local folder
    bytes: str = "google/byt5-small"  # pretrained: the same
    concepts: str = "facebook/metaclip-h14-fullcc2.5b"  # pretrained: the same
    precision: str = "bf16"     # pretrained: bf16 | fp32, of the frozen encoders and their features
    offload: str = "disk"       # pretrained: unused encoders go to: disk | cpu | never (stay)
    batch: int = 16             # pretrained: prompts at a time
    without: str = ""           # words | bytes | concepts: it runs, its null token stands in

    def __post_init__(self):
        one_of("mode", self.mode, ("toy", "pretrained"))
        one_of("precision", self.precision, ("bf16", "fp32"))
        one_of("offload", self.offload, ("disk", "cpu", "never"))
        one_of("without", self.without, ("", *ENCODERS))
        for name, least in (("dim", 1), ("width", 1), ("layers", 0), ("heads", 1), ("batch", 1),
                            ("max_words", 2), ("max_bytes", 2), ("max_concepts", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be {least} or more")
        if self.width % (2 * self.heads):
            raise ValueError(f"heads {self.heads}: width {self.width} must be a multiple of "
                             f"{2 * self.heads}")

    def limit(self, name):
        """Give the largest number of tokens of an encoder."""
        return getattr(self, "max_" + name)


PRESETS = {
    "toy":   TextConfig("toy", 160, layers=0),
    "small": TextConfig("toy", 256, layers=1),  # one layer binds each object's words together
    "1b":    TextConfig("pretrained", 1536, offload="cpu"),     # "disk" reloads at each call
    "5b":    TextConfig("pretrained", 3072, offload="cpu"),
    "30b":   TextConfig("pretrained", 6144, offload="cpu"),
}

# ---- 3. Prompts, as users type them --------------------------------------------------------------

# Straight, curly (German: from low to high; Swedish: twice the same), guillemets (French; German:
# the other way round), CJK corner brackets, full-width. Single quotes do not count: most of them
# are apostrophes. Nor does a last unclosed quote, or the inch mark of a 5" sign.
QUOTES = re.compile(r'(?<!\d)"([^"]*)"|[“„]([^“„”]*)[”“]|(?<!\d)”([^”]*)”|«([^»]*)»|»([^«]*)«|'
                    '「([^」]*)」|『([^』]*)』|｢([^｣]*)｣|＂([^＂]*)＂')


def clean(prompt):
    """Normalise a prompt to NFC, so that é is the same whether typed as one character or as two.

    ValueError for a lone surrogate (half of a broken emoji), and for NUL, which `words_of` uses."""
    if not isinstance(prompt, str) or re.search("[\0\ud800-\udfff]", prompt):
        raise ValueError(f"prompt {prompt!r:.60}: not text, or it has a NUL or a lone surrogate")
    return unicodedata.normalize("NFC", prompt)


def seen_by(prompt):
    """Give the text for each encoder: {"words": str, "bytes": str, "concepts": str}.

    Quoted strings are separated by line ends, since a sign may contain spaces."""
    prompt = clean(prompt)
    quoted = ("".join(groups).strip() for groups in QUOTES.findall(prompt))
    return {"words": prompt, "bytes": "\n".join(s for s in quoted if s), "concepts": prompt}


# ---- 4. Tokenizers that need no download ---------------------------------------------------------

def byte_ids(text):
    """Tokenize as ByT5 does: each UTF-8 byte + 3, then 1 for the end (0 pads, 2 is unused). A
    character takes up to 4 tokens; an empty text none (in ByT5: 1)."""
    return [b + 3 for b in text.encode("utf-8")] + [1] if text else []


def words_of(text):
    """Split a text into lower-case words without .,;:!?(); `<quoted>` stands for each quoted
    string, `<end>` is last.

    Why not the quoted letters: to a table of whole words "CAT" is an opaque symbol. With it, the
    backbone would memorise the training words and not use the byte encoder; a held-out word, whose
    symbol was never trained, would be drawn at random. (The real UL2 sees the whole prompt: its
    subwords say a little about spelling.)"""
    words = re.findall(r"\0|[^\s.,;:!?()\"\0]+", QUOTES.sub(" \0 ", text).casefold())
    return ["<quoted>" if w == "\0" else w for w in words] + ["<end>"]


def word_id(word):
    """Give a word the id 1 + CRC-32 modulo 2^20; 0 pads. Without a vocabulary there is no unknown
    word, and ids are the same in every process (Python's hash is not). The encoder cannot tell
    words of equal id apart: among 100 words the chance of such a pair is 0.5 %, among 1000 38 %."""
    return 1 + zlib.crc32(word.encode("utf-8")) % 2 ** 20


def toy_ids(name, text):
    """Give the ids of a text for the toy encoder `name`."""
    if name == "bytes":
        return byte_ids(text)
    ids = [word_id(w) for w in words_of(text)]
    return ids if name == "words" else sorted(set(ids[:-1]))        # concepts: a set, so no order


def truncate(ids, limit, name, text):
    """Cut ids to `limit`, keep the last (a sequence's end token), and warn."""
    if len(ids) <= limit:
        return ids
    warnings.warn(f"{name}: {len(ids)} tokens cut to {limit}: {text[:40]!r}...", stacklevel=2)
    return ids[:limit - 1] + ids[-1:]


def pad(rows):
    """Stack rows [(L_i, ...)] to (R, L, ...), with zeros after each; L is at least 1."""
    one = rows[0].new_zeros(1, *rows[0].shape[1:])
    return nn.utils.rnn.pad_sequence([*rows, one], batch_first=True)[:-1]


# ---- 5. Toy encoders -----------------------------------------------------------------------------

class WordEmbedding(nn.Module):
    """Embed 2^20 words with 2 x 1024 rows: the sum of a row for each digit of the id in base 1024.

    Words that share one digit differ in the other."""

    def __init__(self, width):
        super().__init__()
        self.high, self.low = nn.Embedding(1024, width), nn.Embedding(1024, width)

    def forward(self, ids):
        ids = (ids - 1).clamp(min=0)                            # padding is masked, never read
        return self.high(ids // 1024) + self.low(ids % 1024)


class Layer(nn.Module):
    """Apply a pre-norm, bidirectional transformer layer."""

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
    """Map ids (B, L), 0 = padding, to features (B, L, width): the toy UL2 and the toy ByT5.

    Positions enter here, once: the backbone's cross-attention has none for the text, and without
    them CAT and ACT would be the same set of letters. They rotate the embeddings, as RoPE rotates
    queries. If they were added, CAT and ACT would still have the same mean vector, and attention
    would first have to learn to separate places. Rotated, a letter at another place is another
    vector, and the means differ."""

    def __init__(self, embedding, width, layers, heads):
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, ids):
        B, L = ids.shape
        x, y = self.embedding(ids).chunk(2, dim=-1)                             # (B, L, width/2)
        i, l = (torch.arange(n, device=ids.device) for n in (x.shape[-1], L))
        angle = l[:, None] * torch.exp(-math.log(100) * i / len(i))             # (L, width/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x = torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)           # (B, L, width)
        mask = (ids != 0)[:, None, None]        # with layers each row has a token, `<end>`
        for layer in self.layers:
            x = layer(x, mask)
        return x


class BagOfConcepts(nn.Module):
    """Map a set of words (B, L), 0 = padding, to one feature (B, 1, width): the toy MetaCLIP.

    Like CLIP it knows what is in the picture, but not what belongs together: a red circle and a
    blue square are the same to it as a blue circle and a red square."""

    def __init__(self, width):
        super().__init__()
        self.embedding = WordEmbedding(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, ids):
        mask = (ids != 0)[..., None]                                            # (B, L, 1)
        mean = (self.embedding(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.mlp(mean)[:, None]                                          # (B, 1, width)


# ---- 6. The conditioner --------------------------------------------------------------------------

class TextConditioner(nn.Module):
    """Run three encoders, each with a Linear and LayerNorm to D, and concatenate their tokens."""

    def __init__(self, cfg, widths=None):
        """Make the weights. widths: {name: features per token} of pretrained encoders, if known."""
        super().__init__()
        self.cfg, w = cfg, cfg.width
        self.frozen = {}                    # name -> (tokenizer, model) loaded; not parameters
        if cfg.mode == "toy":
            self.encoders = nn.ModuleDict({
                "words": SequenceEncoder(WordEmbedding(w), w, cfg.layers, cfg.heads),
                # Without layers, which mix letters, spelling is learned soonest: studies/README.md.
                "bytes": SequenceEncoder(nn.Embedding(384, w), w, 0, cfg.heads),
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
        # Null tokens pass through the projection too: whatever its LayerNorm learns, they have the
        # same scale as real tokens.
        self.null = nn.ParameterDict({name: nn.Parameter(torch.randn(widths[name]))
                                      for name in ENCODERS})

    # ---- the frozen part ----

    def encode(self, prompts):
        """Map R prompts to {name: (R, L) ids} (toy) or {name: (R, L, width), name_mask: (R, L)}.

        The tensors are on the CPU, to be kept with the latents and indexed by row. Prompts longer
        than an encoder's limit are truncated, with a warning."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts {prompts!r:.60}: not a list of 1 or more texts")
        seen, out = [seen_by(prompt) for prompt in prompts], {}
        for name in ENCODERS:
            texts = [s[name] for s in seen]
            distinct = list(dict.fromkeys(texts))
            if self.cfg.mode == "toy":
                ids = {t: truncate(toy_ids(name, t), self.cfg.limit(name), name, t)
                       for t in distinct}
                out[name] = pad([torch.tensor(ids[t], dtype=torch.int64) for t in texts])
            else:
                features = self.frozen_features(name, distinct)
                out[name] = pad([features[t] for t in texts])
                out[name + "_mask"] = pad([torch.ones(len(features[t]), dtype=torch.bool)
                                           for t in texts])
        return out

    def frozen_features(self, name, texts):
        """Run one pretrained encoder on distinct texts -> {text: features (L, width)}.

        With offload `disk` or `cpu` one encoder at a time is on the device (UL2: 17 GB in
        bf16); `never` keeps all three there."""
        cfg, source = self.cfg, getattr(self.cfg, name)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        width, device, done = self.null[name].numel(), self.null[name].device, {}
        if "" in texts and name == "bytes":                     # nothing quoted: no need of ByT5
            done[""] = torch.zeros(0, width, dtype=dtype)
            texts = [t for t in texts if t]
        if not texts:
            return done
        if name not in self.frozen:
            self.frozen[name] = (load_tokenizer(name, source),
                                 load_encoder(name, source, cfg.limit(name), dtype))
        tokenize, model = self.frozen[name]
        model.to(device)
        ids = {t: truncate(tokenize(t), cfg.limit(name), name, t) for t in texts}
        texts = sorted(texts, key=lambda t: len(ids[t]))        # similar lengths: little padding
        for some in (texts[i:i + cfg.batch] for i in range(0, len(texts), cfg.batch)):
            for text, x in zip(some, run_frozen(model, name, [ids[t] for t in some], device)):
                done[text] = x[:len(ids[text])].to(dtype).clone()               # (L, width)
        if done[texts[0]].shape[1] != width:
            raise ValueError(f"{name} {source}: {done[texts[0]].shape[1]} features per token, "
                             f"not the {width} that this model was made for")
        if cfg.offload == "disk":
            del self.frozen[name]
        elif cfg.offload == "cpu":
            model.to("cpu")
        return done

    # ---- the trained part ----

    def features_of(self, name, features):
        """Trim rows of `encode`, run a toy encoder on them -> (B, L, width), mask (B, L), on self's
        device."""
        x, null = features[name], self.null[name]
        mask = features[name + "_mask"] if self.cfg.mode == "pretrained" else x != 0
        L = max(1, int(mask.sum(1).max()))              # rows are padded for the whole data set
        x, mask = x[:, :L].to(null.device), mask[:, :L].to(null.device)
        if self.cfg.mode == "pretrained":
            return x.to(null.dtype), mask
        if name == "concepts":                                                  # a bag is one token
            mask = torch.ones_like(mask[:, :1])
        return self.encoders[name](x), mask

    def forward(self, features, drop=None):
        """Map rows of `encode` to P (B, L, D), mask (B, L). drop (B,) or (B, 3) bool: null tokens.

        Null tokens are not masked, so a row that drops all encoders still has three tokens. Padding
        is zero and masked."""
        P, masks = [], []
        for i, name in enumerate(ENCODERS):
            x, mask = self.features_of(name, features)                          # (B, L, width)
            dropped = None if drop is None else (drop if drop.dim() == 1 else drop[:, i])
            if name == self.cfg.without:
                dropped = torch.ones(len(x), dtype=torch.bool)
            if dropped is not None:
                dropped = dropped.to(x.device)[:, None]                         # (B, 1)
                first = torch.arange(x.shape[1], device=x.device) == 0
                x = torch.where((dropped & first)[..., None], self.null[name].to(x.dtype), x)
                mask = torch.where(dropped, first, mask)                        # (B, L)
            L = int(mask.sum(1).max())                          # dropped rows are short
            mask = mask[:, :L]
            P.append(self.project[name](x[:, :L]) * mask[..., None])
            masks.append(mask)
        return torch.cat(P, dim=1), torch.cat(masks, dim=1)                     # (B, L, D), (B, L)

    def null_tokens(self, B):
        """Make the prompt of unconditional sampling [CFG]: P (B, 3, D) and mask (B, 3), as
        `forward` makes when all encoders are dropped."""
        P = torch.stack([self.project[name](self.null[name]) for name in ENCODERS])
        return P.expand(B, -1, -1), torch.ones(B, 3, dtype=torch.bool, device=P.device)

    def drop_mask(self, B, p, generator=None, independent=False):
        """Draw for each sample which encoders to drop -> (B, 3) bool, on the CPU.

        By default all three with probability p. Independent: each with p^(1/3), so that all three
        still drop with probability p, and the backbone learns to use one or two."""
        rate = p ** (1 / 3) if independent else p
        return (torch.rand(B, 3 if independent else 1, generator=generator) < rate).expand(B, 3)

    def align(self, features, z):
        """Compute CLIP's loss, a scalar, for the toy bag of concepts: in the batch a caption must
        find its clip, and a clip its caption. z: the clips' latents, (B, C, T, H, W) or (B, ...).

            a = normalise(W_a concept), b = normalise(W_b pool(z)), logits = s a b^T, s <= 100
            (CE(logits, i) + CE(logits^T, i)) / 2, i = 0 .. B-1

        Two clips with the same caption need no special treatment: their text vectors are identical,
        so the summed loss equals the one that counts both clips as positives of both texts."""
        if self.cfg.mode != "toy":
            raise ValueError("align: the pretrained MetaCLIP is frozen, only the toy one learns")
        ids = features["concepts"].to(self.scale.device)
        a = F.normalize(self.text_to_common(self.encoders["concepts"](ids)[:, 0]), dim=-1)
        # 4 x 4 places at 2 times, so that a direction can be seen. Then 256 numbers, so that one
        # Linear fits every autoencoder.
        z = F.adaptive_avg_pool3d(z, (2, 4, 4)) if z.dim() == 5 else z
        z = F.adaptive_avg_pool1d(z.flatten(1)[:, None], 256)[:, 0].to(a.dtype)  # (B, Z)
        b = F.normalize(self.latent_to_common(z), dim=-1)
        logits = self.scale.exp().clamp(max=100) * a @ b.T                      # (B, B)
        own = torch.arange(len(ids), device=ids.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# ---- 7. Pretrained encoders ----------------------------------------------------------------------

WIDTHS = {"google/ul2": 4096, "google/byt5-small": 1472, "google/byt5-base": 1536,
          "facebook/metaclip-b32-400m": 512, "facebook/metaclip-h14-fullcc2.5b": 1024}


def make_torchvision_importable():
    """Let transformers import torchvision where that is installed. With a CPU torch and the CUDA
    wheel of torchvision, the import fails with "operator torchvision::nms does not exist". Two
    schemas without kernels are all that the import needs. Does nothing where torchvision loads."""
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
    """Call transformers.<kind>.from_pretrained(source); any error becomes a one-line ValueError."""
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{name} {source}: no such folder, nor a hub name (OWNER/NAME)")
    try:
        make_torchvision_importable()
        import transformers
        for library in ("huggingface_hub", "transformers"):     # no messages about retries
            logging.getLogger(library).setLevel(logging.ERROR)
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as e:          # of many kinds: offline, no such model, a file that is cut off
        line = str(e).strip().split("\n")[0] or type(e).__name__
        raise ValueError(f"{name} {source}: neither a folder with this encoder nor a model that "
                         f"can be fetched from the hub ({line})") from None


def load_tokenizer(name, source):
    """Make a function from text to ids, with the end token last. ByT5's needs no files."""
    if name == "bytes":
        return byte_ids
    tokenizer = from_hub(name, source, "AutoTokenizer")
    return lambda text: tokenizer(text, truncation=False, verbose=False).input_ids


def check_sources(cfg):
    """Raise ValueError early if a pretrained encoder that will be needed later cannot be found.

    Tokenizers and configs are fetched and read, a few megabytes. Weights are checked in local
    folders; those on the hub are not, until they are loaded."""
    for name in ENCODERS if cfg.mode == "pretrained" else ():
        source, kind = getattr(cfg, name), "CLIP" if name == "concepts" else "T5"
        found = from_hub(name, source, "AutoConfig").model_type
        if found.split("_")[0] != kind.lower():                 # clip, clip_text_model; t5
            raise ValueError(f"{name} {source}: a model of type {found}, not {kind}")
        load_tokenizer(name, source)
        if Path(source).is_dir() and not any(                   # an LFS pointer is a few bytes
                f.suffix in (".safetensors", ".bin") and f.is_file() and f.stat().st_size > 1024
                for f in Path(source).iterdir()):
            raise ValueError(f"{name} {source}: no weights there (model.safetensors), or only "
                             "Git LFS pointers")


def load_encoder(name, source, limit, dtype):
    """Load the frozen encoder `name`, on the CPU."""
    kind = "CLIPTextModel" if name == "concepts" else "T5EncoderModel"
    model, info = from_hub(name, source, kind, dtype=dtype, output_loading_info=True)
    model.eval().requires_grad_(False)
    # Weights that the encoder has no use for, such as a decoder's, are ignored. Missing ones, which
    # transformers would draw at random, are an error.
    if info["missing_keys"]:
        raise ValueError(f"{name} {source}: not the weights of a {kind}, "
                         f"{min(info['missing_keys'])} is missing")
    if name == "concepts":
        add_long_positions(model, limit)
    return model


def add_long_positions(clip, limit, keep=20):
    """Append a table of L = max(77, limit) positions to the 77 of a CLIP text encoder.

    The second table copies the first 20 positions and stretches the others, which captions in
    CLIP's training rarely reached [LC]. Prompts of up to 77 tokens use the first table and are
    encoded exactly as MetaCLIP was trained to; only longer ones use the second."""
    inner = getattr(clip, "text_model", clip)           # older transformers have this level
    old = inner.embeddings.position_embedding.weight                            # (77, width)
    clip.short = len(old)
    tail = F.interpolate(old[keep:].float().T[None], size=max(limit, clip.short) - keep,
                         mode="linear", align_corners=True)[0].T
    table = torch.cat([old, old[:keep], tail.to(old.dtype)])                    # (77+L, width)
    inner.embeddings.position_embedding = nn.Embedding.from_pretrained(table)


def width_of(name, source):
    """Count the features per token, without loading the weights."""
    if source in WIDTHS:
        return WIDTHS[source]
    config = from_hub(name, source, "AutoConfig")
    config = getattr(config, "text_config", None) or config     # CLIP's has one for each tower
    return getattr(config, "d_model", None) or config.hidden_size


@torch.no_grad()
def run_frozen(model, name, rows, device):
    """Run a frozen encoder on rows of ids -> features (B, L, width) on the CPU. Values at
    padding are arbitrary.

    UL2 and ByT5 are bidirectional, and need the mask: without it the padding would leak into every
    token, and a prompt's features would depend on the longest prompt of the batch."""
    ids = pad([torch.tensor(r) for r in rows]).to(device)
    length = torch.tensor([len(r) for r in rows], device=device)[:, None]
    place = torch.arange(ids.shape[1], device=device)                           # (L,)
    more = {}
    if name == "concepts":
        more["position_ids"] = place + model.short * (length > model.short)     # (B, L)
    mask = (place < length).long()
    return model(input_ids=ids, attention_mask=mask, **more).last_hidden_state.cpu()


# ---- 8. Demo -------------------------------------------------------------------------------------

class Speller(nn.Module):
    """Read the three letters of a sign from P as the backbone would: by cross-attention, with one
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
    """Train a conditioner and a Speller -> both, and the share of correct letters in each list."""
    torch.manual_seed(0)
    text, speller = TextConditioner(TextConfig("toy", dim=96, width=64)), Speller(96)
    opt = torch.optim.AdamW([*text.parameters(), *speller.parameters()], weight_decay=0.0)
    encoded, letters = {}, {}
    for words in (trained, held_out):
        encoded[words] = text.encode([template.format(w) for w in words])
        letters[words] = torch.tensor([[string.ascii_uppercase.find(c) % 27 for c in f"{w:3}"]
                                       for w in words])                         # 26: no letter
    for step in range(steps):
        opt.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(trained), (64,))
        guess, _ = speller(*text({k: x[rows] for k, x in encoded[trained].items()}))
        loss = F.cross_entropy(guess.flatten(0, 1), letters[trained][rows].flatten())
        opt.zero_grad(); loss.backward(); opt.step()

    right = []
    for words in (trained, held_out):
        with torch.no_grad():
            same = speller(*text(encoded[words]))[0].argmax(-1) == letters[words]
        right.append(same[letters[words] < 26].float().mean().item())
    return text, speller, right


@torch.no_grad()
def gap_to_the_idea(text, prompt):
    """Measure the largest difference between P of a prompt and `tokens_of` with equal weights."""
    encode = lambda name: lambda s: text.encoders[name](torch.tensor([toy_ids(name, s)]))[0]
    want = tokens_of(prompt, {name: encode(name) for name in ENCODERS}, text.project)
    return (text(text.encode([prompt]))[0][0] - want).abs().max().item()


def demo(out, steps):
    """Show what the byte encoder is for: to spell unseen words, which a table of words cannot."""
    print_tokens('FPS-16 a red sign saying "CAT" moving left')
    g = torch.Generator().manual_seed(1)
    letters = lambda n: [string.ascii_uppercase[i] for i in torch.randint(26, (n,), generator=g)]
    words = sorted({"".join(letters(n)) for n in (2, 3) for _ in range(400)})
    trained, held_out = tuple(words[::2]), tuple(words[1::2])
    print(f"\nreading a sign from P: {len(trained)} words to learn from, {len(held_out)} held out")
    began, found = time.time(), []
    for label, template in (("not quoted: whole words", "a white sign saying {} moving right"),
                            ("quoted: bytes", 'a white sign saying "{}" moving right')):
        text, speller, (seen, unseen) = learn_to_spell(template, trained, held_out, steps)
        print(f"  {label:24} letters right: {seen:.3f} of trained words, {unseen:.3f} of held-out")
        found.append(unseen)
    print(f"  {time.time() - began:.0f} s")
    word = next(w for w in held_out if len(set(w)) == 3)
    prompt = template.format(word)
    with torch.no_grad():
        weight = speller(*text(text.encode([prompt])))[1][0]                    # (3, L)
    draw(out, weight, word, token_strings(prompt))
    (hashed, spelled), gap, ok = found, gap_to_the_idea(text, prompt), True
    for claim, value, bound, good in (
            ("letters of held-out words, through bytes", spelled, "at least 0.95", spelled >= 0.95),
            ("the same through whole words", hashed, "at most 0.3", hashed <= 0.3),
            ("P and the idea of section 1 differ by", gap, "at most 1e-5", gap <= 1e-5)):
        ok &= good
        print(f"{'PASS' if good else 'FAIL'} {claim}: {value:.3g} vs {bound}")
    return ok


def draw(out, weight, word, strings):
    """Draw where the three queries look in the tokens of a prompt -> out/spelling.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 3.4))
    ax.imshow(weight, cmap="magma", vmin=0, vmax=1, aspect="auto")
    labels = [*strings["words"], *strings["bytes"], "(bag)"]
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(3), ["1st letter", "2nd", "3rd"])
    ax.set_title(f"Where each query looks to spell the held-out word {word}")
    fig.tight_layout(); fig.savefig(out / "spelling.png", dpi=120); plt.close(fig)
    print(f"  figure: {out / 'spelling.png'}")


# ---- 9. Command line -----------------------------------------------------------------------------

def token_strings(prompt):
    """Give the tokens of the three toy encoders as readable strings -> {name: [str, ...]}."""
    seen = seen_by(prompt)
    words = words_of(seen["words"])
    spell = lambda i: "<end>" if i == 1 else chr(i - 3) if 32 < i - 3 < 127 else f"<{i - 3:02x}>"
    return {"words": words, "bytes": [spell(i) for i in byte_ids(seen["bytes"])],
            "concepts": sorted(set(words[:-1]), key=word_id)}


def print_tokens(prompt):
    """Print what each toy encoder sees, token by token."""
    if hasattr(sys.stdout, "reconfigure"):      # a terminal may lack letters of the prompt
        sys.stdout.reconfigure(errors="backslashreplace")
    for name, strings in token_strings(prompt).items():
        bag = ", a set: one token of P" if name == "concepts" else ""
        print(f"{name}, {len(strings)} tokens (limit {TextConfig().limit(name)}){bag}")
        nothing = "(nothing is quoted)" if name == "bytes" else "(nothing)"
        print("   ", " ".join(strings) or nothing)


def main():
    """Run the demo, or print what each encoder sees of a prompt."""
    parser = argparse.ArgumentParser(description="Text conditioning: a demo, or what each encoder "
                                     "sees of a prompt", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"text_cond.py: {message}\n")     # one line
    parser.add_argument("prompt", nargs="?", help="print its tokens; without it, the demo")
    parser.add_argument("--steps", type=int, default=450, help="training steps of the demo")
    parser.add_argument("--out", type=Path, default=Path("out/text_cond"), help="figure's folder")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be 1 or more")
    if args.prompt is not None:
        try:
            return print_tokens(args.prompt)
        except ValueError as error:
            parser.error(str(error))
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
