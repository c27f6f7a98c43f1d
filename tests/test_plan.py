"""train.plan against a real step: what it allocates and computes."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train
import world


def parsed(*flags, gpus=1):
    cfg, command = train.parse([*map(str, flags), "--plan", "--gpus", str(gpus)])
    command.replicate = train.copies(cfg, command, gpus)
    return cfg, command


def real_step(cfg, b, model=None):
    """TextToVideo with gradients, and its forward and backward pass on b clips."""
    model, (s,) = model or train.TextToVideo(cfg), cfg.dit.streams
    prompts = [world.longest_caption(cfg.clips.things, cfg.clips.script)] * b
    features = train.text_cond.TextConditioner(cfg.text).encode(prompts)
    x1, x0 = torch.randn(2, b, s.channels, *s.size).unbind()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.train_dit.precision == "bf16"):
            loss = model(features, torch.zeros(b, dtype=torch.bool), x1, x0, torch.rand(b))
        loss.backward()
    return model, step


@pytest.mark.parametrize("flags", [
    ("--batch", 32),
    pytest.param(("--scale", "small", "--batch", 8), marks=pytest.mark.slow),
    pytest.param(("--patch", 1, 1, 1, "--batch", 8), marks=pytest.mark.slow),
    pytest.param(("--patch", 1, 1, 1, "--batch", 8, "--dit.checkpointing", "true"),
                 marks=pytest.mark.slow),
    pytest.param(("--scale", "small", "--batch", 8, "--dit.checkpointing", "true"),
                 marks=pytest.mark.slow),
    pytest.param(("--scale", "small", "--batch", 8, "--train_dit.precision", "bf16"),
                 marks=pytest.mark.slow),
    pytest.param(("--batch", 32, "--train_dit.accumulate", 2), marks=pytest.mark.slow)])
def test_memory_is_that_of_a_real_step(monkeypatch, flags):
    cfg, command = parsed(*flags)
    monkeypatch.setattr(train, "step_flops", lambda *_: 0)              # it has its own test
    planned = train.plan(cfg, command)["memory"]
    model, step = real_step(cfg, cfg.train_dit.batch // cfg.train_dit.accumulate)
    state = 5 * sum(p.nbytes for p in model.parameters())   # gradient, two moments, moving average
    assert planned["weights, gradients, Adam"] + planned["moving average"] == state
    total, measured = sum(planned.values()), state + peak_bytes(step)
    print(flags, f"planned {total / 1e6:.1f} MB, measured {measured / 1e6:.1f}")
    assert total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("flags", [(), ("--dit.depth", 1, "--dit.adaln", "per_block"),
                                   ("--dit.checkpointing", "true", "--coupling", "independent",
                                    "--clips.others", "16x32x64")])
def test_flops_are_those_that_torch_counts(flags):
    cfg, _ = parsed(*flags)
    N = max(train.tokens_of(cfg, shape) for shape in cfg.clips.shapes)
    L, latent = 9, train.parts_of(cfg, max(cfg.clips.shapes))[0]
    text = torch.randn(2, L, cfg.dit.dim, requires_grad=True)       # of trained projections
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.backbone.DiT(cfg.dit)(torch.randn(2, *latent), torch.rand(2), text,
                                    torch.ones(2, L, dtype=torch.bool)).sum().backward()
    assert 2 * train.by_depth(train.step_flops, cfg.dit, N, L) == counter.get_total_flops()


def test_a_rank_of_many_holds_its_share(monkeypatch):
    """Rank 0 of 8, whose others are never there: two copies over four ranks each, of which two
    share the tokens of a clip. A step runs."""
    cfg, command = parsed("--batch", 16, "--train_dit.precision", "bf16", gpus=8)
    command.sp, command.replicate = 2, 2
    monkeypatch.setattr(train, "by_depth", lambda *_: 0)
    planned = train.plan(cfg, command)["memory"]
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        run = SimpleNamespace(cfg=cfg, mesh=train.make_mesh(0, 2, 2), device=torch.device("cpu"))
        model = train.place(run, lambda: train.TextToVideo(cfg), "bf16", fresh=False)
        train.split_tokens(model.dit, run.mesh.tokens)
        _, step = real_step(cfg, 4, model)
        step()
    finally:
        dist.destroy_process_group()
    held = sum(p.grad.to_local().nbytes for p in model.parameters())    # and as much of each of:
    assert planned["weights, gradients, Adam"] == pytest.approx(4 * held, rel=2e-3)


# ---- the print -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, billions, says", [
    pytest.param("--scale toy", 0.003, "", marks=pytest.mark.slow),
    pytest.param("--scale 30b --gpus 6144 --sp 12", 29.4, "", marks=pytest.mark.slow),
    pytest.param("--scale small --gpus 1", 0.006, "", marks=pytest.mark.slow),
    pytest.param("--scale 1b --gpus 8", 0.94, "", marks=pytest.mark.slow),
    pytest.param("--scale 5b --gpus 64", 4.9, "", marks=pytest.mark.slow),
    pytest.param("--scale 5b --gpus 8", 4.9, "GB > 80 GB; use less", marks=pytest.mark.slow),
])
def test_a_plan_for_every_scale(capsys, flags, billions, says):
    assert train.main([*flags.split(), "--plan"]) == 0
    out = capsys.readouterr().out
    assert float(out.split()[0]) == pytest.approx(billions, rel=0.05)
    assert all(word in out for word in ("memory of a rank: ", "FLOP", "days"))
    assert says in out if says else "does not fit" not in out


@pytest.mark.parametrize("flags, says", [
    ("--memory 0.1", "GB > 0.1 GB"), ("--batch 63", "--batch 63 is no multiple of 8")])
def test_what_does_not_fit_is_said(monkeypatch, capsys, flags, says):
    monkeypatch.setattr(train, "activation_bytes", lambda *_: 10**8)
    monkeypatch.setattr(train, "step_flops", lambda *_: 10**9)
    assert train.main([*flags.split(), "--plan"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "does not fit" in x]
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("flags, says", [
    ("--sp 16 --gpus 16", "--sp 16: more ranks than attention heads, 4"),
    ("--sp 2 --gpus 2 --coupling independent --clips.others 4x8x8",
     "--sp 2: more ranks than tokens in the smallest clip, 1"),
    ("--sp 2 --gpus 2 --dit.conditioning in_context", "--sp 2: not with --dit.conditioning"),
    ("--scale 1b --text.words /no/such/folder", "--text.words /no/such/folder: no such folder")])
def test_a_plan_refuses_what_a_run_refuses(monkeypatch, capsys, flags, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train.main([*flags.split(), "--plan"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("flags, gpus, copies", [
    ("", 4, 4), ("--sp 2", 4, 2), ("--dp 2", 4, 2), ("--dp 2 --sp 2", 8, 2), ("--dp 3", 4, 1),
    ("--replicate 1", 4, 1), ("--scale 1b", 4, 1)])
def test_a_small_scale_has_as_many_copies_as_fit(flags, gpus, copies):
    assert parsed(*flags.split(), gpus=gpus)[1].replicate == copies


@pytest.mark.parametrize("scale", ["toy", "small"])
def test_no_prompt_is_longer_than_planned(scale):
    cfg, _ = parsed("--scale", scale)
    text = train.text_cond.TextConditioner(cfg.text)
    prompts = [p for _, p in world.test_prompts(0, 40, cfg.clips.things)]
    assert text(text.encode(prompts))[1].shape[1] <= train.text_tokens(cfg)
    assert train.text_tokens(replace(cfg, data="videos")) == 512 + 128 + 1
