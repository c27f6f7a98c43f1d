"""train.plan: each formula against what a real step allocates, sends and computes."""
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dit
import tae
import text_cond
import train

SMALL = dit.DiTConfig((dit.Stream(4, (1, 2, 2), (4, 8, 8)),), 48, 3, 4)        # 64 tokens of 16
N, P, L = 64, 16, 7


def toy(**changes):
    """The toy scale with more tokens than it has, 256 of 8 numbers, so that they outweigh the
    weights; changes of train_dit, or of dit where the field is there."""
    cfg = train.SCALES["toy"]()
    cfg.patch = (1, 1, 1)
    own = {k: v for k, v in changes.items() if hasattr(cfg.dit, k)}
    rest = {k: v for k, v in changes.items() if k not in own}
    cfg.dit = replace(cfg.dit, **{"dim": 96, "depth": 3, "heads": 4, **own})
    cfg.train_dit = replace(cfg.train_dit, **{"batch": 8, **rest})
    return train.finish_config(cfg)


def paper(name="30b", size=768, plain=False, **changes):
    """One of the paper's sizes on 256 frames, in bf16; plain: without checkpointing."""
    t = train.TrainConfig(steps=74_500, batch=1536, lr=6e-5, ema=0.9999, precision="bf16")
    return train.finish_config(train.Config(
        scale=name, coupling="independent", patch=(1, 2, 2), tae=replace(tae.PRESETS["paper"]),
        clips=train.ClipConfig(frames=256, size=size), text=replace(text_cond.PRESETS[name]),
        dit=replace(dit.PRESETS[name], **({"checkpointing": False} if plain else {})),
        train_dit=replace(t, **changes)))


def step(cfg, model):
    """The loss of TextToVideo on one rank's clips of a step, without backward."""
    b, (s,) = cfg.train_dit.batch, cfg.dit.streams
    prompts = ['a white sign saying "ACE" moving down right'] * b       # as long as prompts get
    features = text_cond.TextConditioner(cfg.text).encode(prompts)
    x1, x0 = torch.randn(2, b, s.channels, *s.size).unbind()
    bf16 = cfg.train_dit.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(features, torch.zeros(b, dtype=torch.bool), x1, x0, torch.rand(b))


def alive(cfg):
    """TextToVideo with weights, on the CPU."""
    model = train.TextToVideo(cfg)
    model.dit.to_empty(device="cpu")
    model.dit.init_weights()
    return model


# ---- memory --------------------------------------------------------------------------------------


def saved(cfg, B, mask=None, dtype=torch.float32, axis=None):
    """Bytes that autograd keeps of a forward pass: each storage once, parameters left out."""
    model, seen = dit.DiT(cfg), {}
    if axis:
        train.split_tokens(model, axis)
    model.blocks.to(dtype)                      # as FSDP hands them to a block
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        seen[x.untyped_storage().data_ptr()] = x            # alive, so that no address comes twice
        return x
    text = torch.randn(B, L, cfg.text_width, requires_grad=True)
    with (saved_tensors_hooks(keep, lambda x: x),
          torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)):
        model(torch.randn(B, 4, 4, 8, 8), torch.rand(B), text, mask)
    return sum(x.untyped_storage().nbytes() for k, x in seen.items() if k not in own)


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"ffn": 320}, {"text_dim": 80},
                                    {"dim": 96, "heads": 2}])
@pytest.mark.parametrize("masked", [False, True])
def test_what_autograd_keeps_of_a_block_byte_for_byte(change, masked):
    cfg, B = replace(SMALL, **change), 3
    mask = torch.ones(B, L, dtype=torch.bool) if masked else None
    one, two = (saved(replace(cfg, depth=n), B, mask) for n in (1, 2))
    bias = 4 * B * L if masked else 0           # the mask as numbers to be added to the scores
    assert two - one == train.block_bytes(cfg, N, L, B, 4) + bias


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"ffn": 320}])
def test_what_autograd_keeps_of_a_block_in_bf16(change):
    cfg, B = replace(SMALL, **change), 3
    one, two = (saved(replace(cfg, depth=n), B, dtype=torch.bfloat16) for n in (1, 2))
    # The two outputs in front of the gates: CUDA's autocast widens them for addcmul, the CPU's not.
    planned = train.block_bytes(cfg, N, L, B, 2) - 2 * 2 * B * N * cfg.dim
    assert two - one == pytest.approx(planned, rel=0.03)


class State:
    """AdamW and a moving average, as `optimize` makes them."""

    def __init__(self, model):
        self.optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            self.optimizer.state[p] = {"exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        self.ema = [p.detach().clone() for p in model.parameters()]

    def nbytes(self):
        moments = [x for s in self.optimizer.state.values() for x in s.values()]
        return sum(getattr(x, "_local_tensor", x).untyped_storage().nbytes()
                   for x in [*moments, *self.ema])


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {}, {"checkpointing": True}, {"precision": "bf16"}, {"depth": 6, "dim": 48},
    {"checkpointing": True, "precision": "bf16"}, {"batch": 2, "checkpointing": True, "depth": 8}])
def test_the_peak_of_a_real_step(change):
    cfg = toy(ema=0.9, **change)
    m = train.plan(cfg, 1)["memory"]
    model = alive(cfg)
    state, tracker = State(model), MemTracker()
    tracker.track_external(model)
    with tracker:
        step(cfg, model).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    size = sum(p.numel() for p in model.parameters())
    assert m["parameters"][0] == m["gradients"][0] == m["moving average"][0] == 4 * size
    assert m["Adam's two moments"][0] + m["moving average"][0] == state.nbytes()
    assert m["sum"][0] == sum(v for k, (v, *_) in m.items() if k != "sum")
    measured = peak + state.nbytes()
    print(change, f"planned {m['sum'][0] / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, "
          f"{m['sum'][0] / measured - 1:+.1%}")
    assert m["sum"][0] == pytest.approx(measured, rel=0.1)


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", [{}, {"adaln": "per_block"}, {"text_dim": 20}, {"depth": 1}])
def test_flops_of_a_step_are_those_that_torch_counts(change, checkpointing):
    cfg = replace(SMALL, checkpointing=checkpointing, **change)
    with torch.device("meta"):
        model = dit.DiT(cfg)
        text = torch.zeros(1, L, cfg.text_width, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, 4, 8, 8), torch.zeros(1), text).sum().backward()
    assert train.training_flops(cfg, N, L) == counter.get_total_flops()


def test_days_and_stages_by_hand():
    cfg = paper(steps=1000, batch=512)
    rows = train.plan(cfg, 512, sp=2, peak=1e15, utilisation=0.5)
    linear, attention = dit.flops(cfg.dit, 73_728, 896)
    clip, _, formula = rows["time"]["FLOPs of a clip"]
    assert clip == pytest.approx(4 * (linear + attention), rel=1e-4) and "dit.flops" in formula
    assert clip < 4 * (linear + attention)
    assert rows["time"]["FLOPs of a step"][0] == 512 * clip
    assert rows["time"]["compute"][0] == pytest.approx(512 * clip / (512 * 1e15 * 0.5))
    assert rows["time"]["days"][0] == pytest.approx(1000 * clip / 0.5e15 / 86400)
    assert rows["model"]["tokens N"][0] == 73_728 and rows["model"]["text tokens L"][0] == 896
    images, small, large = rows["stages"].values()
    assert (images[0], small[0], large[0]) == (9216, 1536, 1536)
    assert large[3] == 1536 * clip
    assert large[4] == pytest.approx(73.8e6 * clip / (512 * 0.5e15) / 86400)
    tokens = [replace(cfg.dit, streams=(dit.Stream(16, (1, 2, 2), size),))
              for size in ((1, 32, 32), (32, 32, 32))]
    assert images[3] == 9216 * train.training_flops(tokens[0], 256, 896)
    assert small[3] == 1536 * train.training_flops(tokens[1], 8192, 896)
    assert not train.plan(toy(), 1)["stages"]
    cfg.patch = (2, 2, 2)               # which does not cut an image's latent
    rows = train.plan(train.finish_config(cfg), 512)
    assert list(rows["stages"]) == ["256 px clips", "768 px clips"]
    (note,) = (line for line in rows["notes"] if "256 px images are left out: " in line)
    assert "patch" in note


# ---- many ranks, of which one is here ------------------------------------------------------------


@pytest.fixture
def world(monkeypatch):
    """A process group of 8 ranks whose others are never there: what comes from them is noise."""
    monkeypatch.setattr(train.sample_parallel, "patience", lambda: None)        # it has no time-out
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda *_: None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


class Received(TorchDispatchMode):
    """Bytes that the collectives of a step bring to this rank."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
                                    "velocity"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
        size = lambda x: x.numel() * x.element_size()
        if name == "_allgather_base_":
            self.bytes["all-gather"] += size(args[0]) - size(args[1])
        elif name == "_reduce_scatter_base_":
            self.bytes["reduce-scatter"] += size(args[1]) - size(args[0])
        elif name == "allreduce_":
            self.bytes["all-reduce"] += sum(map(size, args[0]))     # x 2 (R - 1) / R, R = 2
        elif name == "all_to_all_single":
            counts, (group,) = args[1], args[3:]
            mine = dist.get_rank(dist.distributed_c10d._resolve_process_group(group))
            self.bytes["all-to-all"] += (sum(counts) - counts[mine]) * args[0].element_size()
        elif name == "recv_":                   # of the only point-to-point messages, the tokens
            self.bytes["velocity"] += sum(map(size, args[0]))
        elif "c10d" in func.namespace and not name.startswith(("send", "wait", "_wrap")):
            self.bytes[name] = "unknown"
        return out


@pytest.mark.parametrize("sp", [2, 4])
def test_what_autograd_keeps_of_a_block_with_ulysses_byte_for_byte(world, sp):
    axis, B = train.make_mesh(0, sp).tokens, 3
    one, two = (saved(replace(SMALL, depth=n), B, axis=axis) for n in (1, 2))
    assert two - one == train.block_bytes(SMALL, N // sp, L, B, 4, sp)


def placed(cfg, sp, replicate, reshard):
    """The model as train.py spreads it over 8 ranks, the config of one pass of a rank, passes."""
    mesh = train.make_mesh(0, sp, replicate, reshard)
    run = train.Run.__new__(train.Run)
    run.cfg, run.device, run.mesh = cfg, torch.device("cpu"), mesh
    model = train.place(run, train.TextToVideo(cfg), cfg.train_dit.precision)
    if mesh.tokens is not None:
        train.split_tokens(model.dit, mesh.tokens)
    K = cfg.train_dit.accumulate
    b = cfg.train_dit.batch // (mesh.data[1] * K)
    return model, replace(cfg, train_dit=replace(cfg.train_dit, batch=b)), K


@pytest.mark.parametrize("sp,replicate,reshard,change", [
    (1, 1, True, {}), (1, 1, False, {}), (1, 2, True, {}), (2, 1, True, {}),
    (2, 2, True, {"checkpointing": True}), (4, 1, True, {"checkpointing": True, "batch": 16}),
    (1, 1, True, {"precision": "bf16"}), (2, 1, True, {"precision": "bf16", "accumulate": 2}),
    (1, 1, False, {"accumulate": 2, "batch": 16})])
def test_bytes_over_the_wire_and_the_state_of_a_shard(world, sp, replicate, reshard, change):
    cfg = toy(ema=0.9, align=0.1, **change)         # with it, every parameter has a gradient
    model, mine, K = placed(cfg, sp, replicate, reshard)
    with Received() as received:
        for _ in range(K):
            step(mine, model).backward()
    rows = train.plan(cfg, 8, sp, replicate, reshard)
    assert not rows["problems"]
    planned = {k: v for k, (v, *_) in rows["wire"].items() if k != "sum"}
    assert {k: v for k, v in received.bytes.items() if v} == planned
    assert rows["wire"]["sum"][0] == sum(planned.values())
    W = sum(p._local_tensor.numel() for p in model.parameters())
    assert rows["model"]["shard W"][0] == W and rows["memory"]["gradients"][0] == 4 * W
    assert rows["model"]["clips b"][0] == mine.train_dit.batch
    m = rows["memory"]
    assert m["Adam's two moments"][0] + m["moving average"][0] == State(model).nbytes()


@pytest.mark.slow
@pytest.mark.parametrize("sp,reshard,change", [
    (1, True, {}), (1, True, {"checkpointing": True}), (2, True, {}), (1, False, {}),
    (2, True, {"checkpointing": True, "precision": "bf16"}), (1, True, {"accumulate": 2})])
def test_the_peak_of_a_rank_among_many(world, sp, reshard, change):
    cfg = toy(ema=0.9, **{"batch": 32, "depth": 6, **change})
    model, mine, K = placed(cfg, sp, 1, reshard)
    state, tracker = State(model), MemTracker()
    tracker.track_external(model)
    with tracker:
        for _ in range(K):
            step(mine, model).backward()
            tracker.reset_mod_stats()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    measured = peak + state.nbytes()
    planned = train.plan(cfg, 8, sp, 1, reshard)["memory"]["sum"][0]
    print(sp, reshard, change, f"planned {planned / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, "
          f"{planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.1)


# ---- what does not fit ---------------------------------------------------------------------------


def replanned(cfg, now, flags):
    """The plan after a remedy, `--sp 4 --dit.checkpointing true`."""
    words = flags.replace("--", "").split()
    for name, value in zip(words[::2], words[1::2]):
        value = value == "true" if value in ("true", "false") else int(value)
        section, _, field = name.rpartition(".")
        if section:
            cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
        else:
            now = now | {field: value}
    return train.plan(cfg, **now)


@pytest.mark.parametrize("cfg,now,says,flags", [
    (partial(paper), {"gpus": 6144},
     "batch 1536 is no multiple of R dp K = 6144; memory 134 GB > 80 GB, activations alone 119 GB",
     ["--sp 4"]),
    (partial(paper, batch=6144), {"gpus": 6144}, "memory 134 GB > 80 GB, activations",
     ["--sp 2 --gpus 12288", "--sp 2 --train_dit.accumulate 2"]),
    (partial(paper, "1b"), {"gpus": 1536}, "", []),
    (partial(paper, "1b", 256, plain=True), {"gpus": 384}, "activations",
     ["--dit.checkpointing true", "--gpus 768", "--train_dit.accumulate 2"]),
    (partial(paper, "5b", 256), {"gpus": 1536, "reshard": False, "memory": 12e9}, "whole blocks",
     ["--reshard true"]),
    (partial(paper, "5b", 256), {"gpus": 1536, "replicate": 384, "memory": 25e9}, "Adam's",
     ["--replicate 1"]),
    (partial(paper, "30b", 256), {"gpus": 8}, "memory", None),
    (partial(paper, batch=6144), {"gpus": 6144, "memory": 1e9}, "memory", []),
])
def test_what_does_not_fit_and_the_flags_that_make_it_fit(cfg, now, says, flags):
    cfg = cfg()
    problems = train.plan(cfg, **now)["problems"]
    if not says:
        assert not problems
        return
    (line,) = problems
    print(line)
    assert says in line
    found = line.rsplit(": ", 1)[1].split(" or ")
    if flags == []:
        assert found == ["no change of --dit.checkpointing, --reshard, --replicate, --sp, --gpus, "
                         "--train_dit.accumulate helps"]
        return
    assert flags is None or set(found) == set(flags)
    for remedy in found:
        assert not replanned(cfg, now, remedy)["problems"], remedy


def test_more_ranks_than_heads_or_a_mesh_that_is_none():
    assert "sp 64 is more than the 48 heads" in train.plan(paper(), 6144, sp=64)["problems"][0]
    small = train.parse_args(["--scale", "small", "--phases", "progressive"])[0]
    for sp, batch, says in ((1, 48, ""), (1, 24, "batch 8 of phase full is no multiple of"),
                            (2, 48, "sp 2 is more than .* heads or the 1 tokens of the smallest")):
        small.train_dit.batch = batch       # 6 x, 1 x and 1/3 of it in the three phases
        problems = " ".join(train.plan(small, 16, sp=sp)["problems"])
        assert re.search(says, problems) if says else not problems
    with pytest.raises(train.UserError, match="--gpus 6: not a multiple of --sp 4 x --replicate 1"):
        train.plan(toy(), 6, sp=4)
    with pytest.raises(train.UserError, match="in_context: --plan knows only adaln_zero"):
        train.plan(toy(conditioning="in_context"), 1)


def test_clips_of_other_aspects_have_no_more_tokens():
    """The position tables have: the rows of the tallest, and the columns of the widest."""
    for scale, N in (("1b", 1024), ("30b", 73728)):
        flags = ["--scale", scale, "--clips.aspects", "1", "1", "16", "9", "9", "16"]
        cfg = train.parse_args(flags)[0]
        plans = [train.plan(c, 6144) for c in (cfg, train.parse_args(flags[:2])[0])]
        assert [p["model"]["tokens N"][0] for p in plans] == [N, N]
        assert plans[0]["time"] == plans[1]["time"] and plans[0]["stages"] == plans[1]["stages"]
        if scale == "1b":
            last = train.at_phase(cfg, train.phases(cfg)[-1])
            assert train.tokens_of(last.dit) == 1764 > N


def test_days_of_all_phases():
    """Of the slower of compute and wire, each as a plan of that phase alone has them."""
    parts = train.plan(train.parse_args(["--scale", "30b"])[0], 6144, sp=12)["phases"]
    assert [*parts] == ["images", "small", "full"]
    for name, frames, size in (("images", 1, 256), ("small", 256, 256), ("full", 256, 768)):
        steps, batch, N, compute, wire, days = parts[name]
        alone = train.parse_args(["--scale", "30b", "--phases", "one", "--batch", str(batch),
                                  "--clips.frames", str(frames), "--clips.size", str(size),
                                  "--steps", str(steps)])[0]
        rows = train.plan(alone, 6144, sp=12)
        assert not rows["phases"] and rows["model"]["tokens N"][0] == N
        assert [rows["time"][k][0] for k in ("compute", "wire")] == pytest.approx([compute, wire])
        assert days == pytest.approx(steps * max(compute, wire) / 86400)


def test_too_much_is_mended_by_less():
    plan = lambda *flags, **now: train.plan(train.parse_args(["--scale", *flags])[0], **now)
    assert plan("1b", gpus=64, sp=32)["problems"][0].endswith(": --sp 16")
    accumulate = plan("5b", "--train_dit.accumulate", "32", gpus=64)["problems"][0]
    assert "--train_dit.accumulate 16" in accumulate


def test_remedies_are_the_fewest_changes_and_the_mildest_values():
    options = {"a": [1, 2, 3], "b": [True], "c": [5]}
    assert train.remedies(lambda c: c.get("a", 0) >= 2 or c.get("c"), options) == ["--a 2", "--c 5"]
    both = lambda c: c.get("a", 0) >= 2 and c.get("b")
    assert train.remedies(both, options) == ["--a 2 --b true"]
    assert train.remedies(lambda c: False, options) == []


# ---- the text of prompts, the table --------------------------------------------------------------


@pytest.mark.parametrize("scale", ["toy", "small"])
def test_no_prompt_of_the_toy_world_is_longer_than_planned(scale):
    cfg = train.SCALES[scale]()
    cfg.clips.things = 1                        # of two, prompts are drawn until they have room
    cfg = train.finish_config(cfg)
    with torch.device("meta"):
        text = text_cond.TextConditioner(cfg.text)
    features = text.encode([prompt for _, prompt in train.test_prompts(cfg)])
    assert train.text_tokens(cfg) == features["words"].shape[1] + features["bytes"].shape[1] + 1
    cfg.data = "videos"
    assert train.text_tokens(cfg) == 512 + 128 + 1


def test_the_table_has_every_figure_with_its_formula(capsys):
    rows = train.plan(paper(), 6144, sp=4, replicate=2)
    train.print_plan(rows)
    lines = capsys.readouterr().out.splitlines()
    for section in ("model", "memory", "wire", "time"):
        for name, (_, _, formula) in rows[section].items():
            assert formula
            assert any(x.startswith(f"  {name} ") and x.endswith(formula) for x in lines), name
    assert rows["wire"]["all-reduce"][0] == 4 * rows["model"]["shard W"][0]
    assert any(x.startswith("  parameters") and " 29,376,313,856 " in x for x in lines)
    assert any("768 px clips       1,536   74,500  7.38e+07" in x for x in lines)
    assert max(map(len, lines)) <= 120 and not rows["problems"]
    train.print_plan(train.plan(toy(), 1))
    out = capsys.readouterr().out
    assert "Movie Gen" not in out and "note: 989 TFLOP/s is for bf16" in out
    train.print_plan(train.plan(paper(), 6144))
    assert "does not fit: batch 1536" in capsys.readouterr().out
