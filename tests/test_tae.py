"""tae.py: shapes, inflation, symmetry in time, losses, tiles and streaming, VidTwin, training."""
import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

import tae
from tae import LOSSES, PRESETS, TAE, VIDTWIN_PRESETS, LossConfig, TAEConfig, VidTwin, inflate

TINY = TAEConfig(channels=8, mult=(1, 2, 2, 2), res_blocks=(1, 1, 1, 1), decoder_extra=0,
                 latent_channels=4)
TINY3D = replace(TINY, variant="3d")
SHORT = replace(TINY, shortcut=True)
TWIN = replace(VIDTWIN_PRESETS["toy"], width=32, patch=4, structure_down=1, dynamics_down=1)
BOTH = pytest.mark.parametrize("cfg", [TINY, TINY3D], ids=["2.5d", "3d"])
ALL_STREAMED = pytest.mark.parametrize("cfg", [TINY, TINY3D, SHORT, PRESETS["toy"]],
                                       ids=["2.5d", "3d", "shortcut", "toy"])
ALL = pytest.mark.parametrize("cfg", [TINY, TINY3D, SHORT, TWIN],
                              ids=["2.5d", "3d", "shortcut", "vidtwin"])


def clips(n, T=16):
    return tae.moving_squares(n, T, seed=0)


def randomise_time(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".temporal." in name or ".time." in name or p.ndim in (3, 5):
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


# ---- shapes --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("T", [1, 2, 8, 9, 33])
def test_any_number_of_frames(T, cfg):
    model = TAE(cfg).eval()
    x = torch.randn(1, 3, T, 16, 16)
    with torch.no_grad():
        z = model.encode(x).mean
        assert z.shape[1:] == model.latent_shape(T, 16, 16) == (4, math.ceil(T / 8), 2, 2)
        y = model.decode(z, T)
        assert y.shape == x.shape
        assert torch.equal(y, model.decode(z)[:, :, :T])


def test_sizes_that_do_not_divide_are_padded_and_cropped_back():
    model = TAE(TINY).eval()
    x = torch.rand(1, 3, 3, 21, 30) * 2 - 1
    recon, posterior = model(x)
    assert recon.shape == x.shape and posterior.mean.shape[1:] == model.latent_shape(3, 21, 30)
    whole = F.pad(x, (0, 2, 0, 3, 0, 0), mode="replicate")
    assert torch.equal(posterior.mean, model.encode(whole).mean)


def test_parameters_and_rates():
    with torch.device("meta"):
        paper = TAE(PRESETS["paper"])
    assert sum(p.numel() for p in paper.parameters()) == pytest.approx(114.06e6, rel=1e-4)
    assert paper.latent_shape(256, 768, 768) == (16, 32, 96, 96)
    assert TAE(PRESETS["toy"]).latent_shape(16, 32, 32) == (8, 4, 8, 8)


@pytest.mark.parametrize("cfg, change, message", [
    (TINY, {"variant": "4d"}, "variant 4d: not one of 2.5d, 3d, 2d"),
    (TINY, {"mult": (1, 2)}, "space_stride 2 2 2: must be 1 or 2 each, and one fewer than the 2"),
    (TINY, {"time_stride": (2, 3, 2)}, "time_stride 2 3 2: must be 1 or 2 each, and one fewer"),
    (TINY, {"res_blocks": (1, 0, 1, 1)},
     "res_blocks 1 0 1 1: must be a number for each of 4 levels, 1 or more where widths"),
    (TINY, {"res_blocks": (0, 1, 1, 1)},
     "res_blocks 0 1 1 1: must be a number for each of 4 levels, 1 or more where widths"),
    (TINY, {"channels": 3}, "channels 3: must be 4 or more"),
    (TINY, {"channels": 18}, "channels 18: must be a multiple of 4"),
    (TINY, {"mult": (1, 2, -2, 2)}, "mult 1 2 -2 2: must be 1 or more"),
    (TINY, {"heads": 3}, "heads 3: must divide the width of the last level, 16"),
    (TWIN, {"patch": 5}, "patch 5: must divide size 32"),
    (TWIN, {"heads": 3}, "heads 3: must divide width 32"),
    (TWIN, {"width": 30}, "width 30: must be a multiple of 4"),
    (TWIN, {"query_heads": 3}, "query_heads 3: must divide query_width 32"),
    (LossConfig(), {"gan": -1.0}, "gan -1.0: must be 0 or more"),
    (LossConfig(), {"kl": float("nan")}, "kl nan: must be 0 or more"),
])
def test_a_config_that_cannot_be_is_one_line(cfg, change, message):
    with pytest.raises(ValueError) as error:
        replace(cfg, **change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [4, 12, 20, 36])
def test_every_multiple_of_four_is_a_width(channels):
    model = TAE(replace(TINY, channels=channels))
    assert model(torch.zeros(1, 3, 1, 8, 8))[0].shape == (1, 3, 1, 8, 8)


def test_a_clip_that_cannot_be_is_one_line():
    with pytest.raises(ValueError, match=r"expected \(B, 3, T, H, W\)"):
        TAE(TINY).encode(torch.zeros(1, 4, 2, 16, 16))
    for stream in (False, True):
        with pytest.raises(ValueError, match=r"\(1, 3, 0, 16, 16\): expected \(B, 3, T, H, W\)"):
            TAE(TINY).encode(torch.zeros(1, 3, 0, 16, 16), stream=stream)
    with pytest.raises(ValueError, match="clip of 8 x 32 x 32: this VidTwin takes 16 x 32 x 32"):
        VidTwin(TWIN).encode(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="only both: not one of structure, dynamics"):
        VidTwin(TWIN).decode(torch.zeros(1, 2048), only="both")
    with pytest.raises(ValueError, match="frames 30: must be a multiple of 8"):
        tae.encode_tiled(TAE(TINY), torch.zeros(1, 3, 9, 16, 16), frames=30)
    with pytest.raises(ValueError, match="frames 32, overlap 24: must be multiples of 8, the"):
        tae.decode_tiled(TAE(TINY), torch.zeros(1, 4, 9, 2, 2), overlap=24)
    with pytest.raises(ValueError, match="only 2d"):
        inflate(TAE(TINY))


# ---- inflation and time --------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [TINY, SHORT, PRESETS["toy"]], ids=["8x8x8", "shortcut", "toy"])
def test_inflation_is_exact(cfg):
    torch.manual_seed(0)
    image = TAE(replace(cfg, variant="2d")).eval()
    video = inflate(image).eval()
    x, f = torch.randn(2, 3, 16, 32, 32), cfg.time_factor
    with torch.no_grad():
        per_frame = image.encode(x).mean                       # the image model sees frames alone
        z = video.encode(x).mean
        assert (video.encode(x[:, :, :1]).mean - per_frame[:, :, :1]).abs().max() < 1e-5
        assert (z - per_frame[:, :, ::f]).abs().max() < 1e-5
        y = video.decode(z)
        assert (y - y[:, :, ::f].repeat_interleave(f, 2)).abs().max() < 1e-5
        assert (y[:, :, ::f] - image.decode(z)).abs().max() < 1e-5


@pytest.mark.parametrize("shortcut", [False, True])
def test_inflating_to_3d_leaves_images_as_they_are(shortcut):
    torch.manual_seed(0)
    image = TAE(replace(PRESETS["toy"], variant="2d", shortcut=shortcut)).eval()
    video = inflate(image, "3d").eval()
    x = torch.randn(2, 3, 1, 32, 32)
    with torch.no_grad():
        z = image.encode(x)
        assert (video.encode(x).mean - z.mean).abs().max() < 1e-5
        assert (video.encode(x).logvar - z.logvar).abs().max() < 1e-5
        y = video.decode(z.mean)                                    # four frames of one latent
        clip = torch.randn(1, 3, 16, 32, 32)
        mixed = video.encode(clip).mean - image.encode(clip).mean[:, :, ::4]
    assert (y[:, :, :1] - image.decode(z.mean)).abs().max() < 1e-5
    assert mixed.abs().max() > 1e-3      # joint attention sees all frames


@pytest.mark.parametrize("T", [16, 13])
def test_the_shortcut_can_be_the_best_linear_autoencoder(T):
    """Principal components of patches lose what the truncated SVD leaves out (Eckart and Young), if
    the deep part gives 0. 13 frames are 16, the last one repeated."""
    model = TAE(replace(SHORT, latent_channels=16)).double().eval()
    for conv in (model.encoder.conv_out.temporal, model.decoder.conv_out.temporal):
        for p in conv.parameters():
            p.data.zero_()
    x = clips(8, T).double()
    whole = torch.cat([x, x[:, :, -1:].repeat(1, 1, 16 - T, 1, 1)], 2)
    patches = rearrange(whole, "b c (t f) (h p) (w q) -> (b t h w) (c f p q)", f=8, p=8, q=8)
    mean = patches.mean(0)
    _, values, parts = torch.linalg.svd(patches - mean, full_matrices=False)
    parts = parts[:16]                                                  # (16, 3 8 8 8)
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items() if "linear" in k}
    state["linear_in.weight"][:16] = parts.view(16, 3, 8, 8, 8)
    state["linear_in.bias"][:16] = -parts @ mean
    state["linear_out.weight"][:] = parts.view(16, 3, 8, 8, 8)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():                   # the mean patch, which has its own place in each patch
        again = model.decode(model.encode(x).mean) + repeat(
            mean, "(c f p q) -> c (t f) (h p) (w q)", c=3, f=8, p=8, q=8, t=2, h=4, w=4)
    lost = (again - whole).square().sum()
    assert torch.allclose(lost, values[16:].square().sum(), rtol=1e-3)      # a Posterior is fp32


def test_cost_of_2_5d_against_3d():
    """Multiply-adds for each pair of channels: 9 + 3 against 27. Weights the same."""
    convs = [tae.CONV[v](32, 32) for v in ("2d", "2.5d", "3d")]
    two, two_half, three = (sum(p.numel() for p in c.parameters() if p.ndim > 1) for c in convs)
    assert two_half * 9 == two * 12 and three * 9 == two * 27
    assert TAE(TINY).latent_shape(17, 40, 24) == TAE(TINY3D).latent_shape(17, 40, 24)


def test_convolutions_are_the_joint_ones():
    """Against conv3d of a clip padded by hand, in the plain layout, also with strides. 2.5D against
    conv3d with the outer product of its two kernels, which it factors."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 10, 12)
    for space, time in ((1, 1), (2, 2), (1, 2)):
        conv = tae.Conv3D(4, 6, space_stride=space, time_stride=time)
        conv.weight.data.normal_()
        pad = (0, 1, 0, 1) if space == 2 else (1, 1, 1, 1)
        want = F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (*pad, 0, 0))
        want = F.conv3d(want, conv.weight, conv.bias, (time, space, space))
        got = rearrange(conv(tae.fold(x), 7), "(b t) c h w -> b c t h w", b=2)
        assert torch.allclose(got, want, atol=1e-5)
        conv = tae.Conv25D(4, 6, space_stride=space, time_stride=time)
        conv.temporal.weight.data.normal_()
        conv.bias.data.zero_()
        joint = torch.einsum("oik,icyx->ockyx", conv.temporal.weight, conv.weight)
        whole = F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (*pad, 0, 0))
        want = F.conv3d(whole, joint, conv.temporal.bias, (time, space, space))
        got = rearrange(conv(tae.fold(x), 7), "(b t) c h w -> b c t h w", b=2)
        assert torch.allclose(got, want, atol=1e-4)
        if space == time == 1:
            idea = tae.conv_2_5d(x, conv.weight, conv.temporal.weight)
            assert torch.allclose(idea, want, atol=1e-4)


@BOTH
def test_static_in_static_out_with_random_time(cfg):
    torch.manual_seed(1)
    model = randomise_time(TAE(cfg)).eval()
    x = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 24, -1, -1)
    with torch.no_grad():
        y = model(x)[0]
    assert y.std() > 0.01
    assert (y - y[:, :, :1]).abs().max() < 1e-4
    if cfg is TINY3D:
        return
    # with zero padding the ends would differ: the mutation that this test is for
    zero = tae.TemporalConv.forward

    def zero_padded(self, x, T):
        x = x.unflatten(0, (-1, T)).transpose(1, 2).flatten(3)
        x = F.conv2d(F.pad(x, (0, 0, 1, 1)), self.weight[..., None], self.bias, (self.stride, 1))
        return x.transpose(1, 2).flatten(0, 1).unflatten(2, (int(x.shape[3] ** 0.5), -1))

    tae.TemporalConv.forward = zero_padded
    try:
        with torch.no_grad():
            y = model(x)[0]
    finally:
        tae.TemporalConv.forward = zero
    assert (y - y[:, :, :1]).abs().max() > 1e-2


def test_not_causal_but_no_leak_through_norms():
    torch.manual_seed(2)
    model = randomise_time(TAE(TINY))
    x = torch.randn(1, 3, 16, 16, 16, requires_grad=True)
    model.encode(x).mean[:, :, 0].sum().backward()
    assert x.grad[:, :, -1].abs().max() > 0                    # symmetric: sees the future
    image = TAE(replace(TINY, variant="2d"))              # no temporal layer: norms are left
    x = torch.randn(1, 3, 4, 16, 16, requires_grad=True)
    image(x)[0][:, :, 0].sum().backward()
    assert x.grad[:, :, 1:].abs().max() == 0


@BOTH
def test_every_parameter_has_a_gradient_in_both_kinds_of_batch(cfg):
    torch.manual_seed(3)
    model = randomise_time(TAE(cfg))
    for T in (1, 16):
        model.zero_grad()
        tae.Objective(model, LossConfig())(torch.randn(1, 3, T, 16, 16)).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert [tae.is_image_step(s) for s in range(8)] == [True, False, False, False] * 2


# ---- losses and measures -------------------------------------------------------------------------


def test_outlier_penalty():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 3, 16, 16, generator=g)
    assert tae.outlier_penalty(z) == 0
    spot = z.clone()
    spot[1, :, 2, 5, 5] *= 8
    spot.requires_grad_()
    loss = tae.outlier_penalty(spot)
    loss.backward()
    x, f = spot.detach()[1, :, 2].double(), lambda a: a.flatten(1)
    e = (f(x) - f(x).mean(1, keepdim=True)).norm(dim=0)
    want = (e - 3 * f(x).std(1, unbiased=False).norm()).clamp_min(0).mean() / 6  # of 6 frames
    assert loss.item() == pytest.approx(want.item(), rel=1e-4) and want > 0
    assert spot.grad[0].abs().max() == 0 and spot.grad[1, :, :2].abs().max() == 0
    # counter-example: a scalar std in place of ||Std|| penalises nearly every Gaussian site
    frames = z.transpose(1, 2).flatten(0, 1)                              # (B T, C, H, W)
    distance = (frames - frames.mean((2, 3), keepdim=True)).norm(dim=1)
    assert (distance > 3 * frames.std()).float().mean() > 0.85
    assert tae.outlier_penalty(torch.randn(1, 16, 1, 2, 2)) == 0          # too few sites: no NaN


def test_outlier_penalty_removes_a_planted_spot():
    torch.manual_seed(0)
    z = torch.randn(1, 16, 1, 8, 8)
    z[..., 3, 3] *= 8
    before = z.clone()
    z.requires_grad_()
    opt = torch.optim.SGD([z], lr=5.0)
    for _ in range(400):
        opt.zero_grad()
        tae.outlier_penalty(z).backward()
        opt.step()
    z = z.detach()
    m, s = z.mean((-2, -1), keepdim=True), z.std((-2, -1), keepdim=True, unbiased=False).norm(dim=1)
    assert ((z - m).norm(dim=1) / (3 * s)).max() <= 1.02
    inliers = torch.ones(8, 8, dtype=torch.bool)
    inliers[3, 3] = False
    assert torch.equal(z[..., inliers], before[..., inliers])


def test_kl_and_psnr_and_stats_against_closed_forms():
    mean, logvar = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    assert tae.Posterior(mean, logvar).kl().item() == pytest.approx(want.item(), rel=1e-5)
    assert tae.Posterior(torch.zeros(1, 1), torch.zeros(1, 1)).kl() == 0
    x = torch.zeros(1, 3, 4, 8, 8)
    assert tae.psnr(x, x + 0.2).item() == pytest.approx(20.0, abs=1e-3)   # error 0.1 of a range 1
    assert all(tae.psnr(x.to(d), x.to(d)).item() == pytest.approx(80.0)
               for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    model = TAE(TINY)
    shape = (4, 4, 2, 6, 6)
    posteriors = [tae.Posterior(3 + 2 * torch.randn(shape), torch.full(shape, -1.0))
                  for _ in range(20)]
    model.lat_mean[:], model.lat_std[:] = tae.latent_stats(model, posteriors)
    g = torch.Generator().manual_seed(0)
    z = model.normalize(torch.cat([p.sample(g) for p in posteriors]))
    seen = tae.latent_stats(model, (model.encode(torch.randn(1, 3, 8, 32, 32)) for _ in range(2)))
    assert not any(v.requires_grad for v in seen)               # else all clips stay in memory
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.03
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.03
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-5)


def test_sample_depends_on_the_generator_alone():
    p = tae.Posterior(torch.zeros(2, 3), torch.zeros(2, 3))
    draw = lambda s: p.sample(torch.Generator().manual_seed(s))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path):
    """Without a network the loader must name what is missing, whatever torchvision raises."""
    pytest.importorskip("text_cond").make_torchvision_importable()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with torch.device("meta"), pytest.raises(ValueError, match=r"VGG16 weights \(no network\)"):
        tae.vgg_perceptual()


# ---- long clips ----------------------------------------------------------------------------------


@BOTH
def test_a_clip_of_one_tile_is_the_same(cfg):
    torch.manual_seed(0)
    model = randomise_time(TAE(cfg)).eval()
    x = torch.randn(1, 3, 29, 16, 13)
    with torch.no_grad():
        whole, tiled = model.encode(x), tae.encode_tiled(model, x)
        assert torch.equal(whole.mean, tiled.mean) and torch.equal(whole.logvar, tiled.logvar)
        y = model.decode(whole.mean, 29, (16, 13))
        assert torch.equal(y, tae.decode_tiled(model, whole.mean, 29, (16, 13)))
        assert torch.equal(model.decode(whole.mean), tae.decode_tiled(model, whole.mean))


def test_tiles_are_blended_linearly():
    """Against each tile decoded by itself and blended by hand; a constant latent stays constant."""
    torch.manual_seed(0)
    model = randomise_time(TAE(TINY)).eval()
    x = torch.randn(1, 3, 75, 16, 13)
    with torch.no_grad():
        p = tae.encode_tiled(model, x)
        assert p.mean.shape[1:] == model.latent_shape(75, 16, 13)
        alone = [model.encode(x[:, :, t:t + 32]).mean for t in (0, 32, 64)]     # no overlap
        assert torch.equal(p.mean, torch.cat(alone, 2))
        z = torch.randn(1, 4, 9, 2, 2)
        made = tae.decode_tiled(model, z, 71, (16, 13))
        assert made.shape == (1, 3, 71, 16, 13)
        starts, total, weights = (0, 16, 32, 48), torch.zeros(1, 3, 72, 16, 16), torch.zeros(72)
        for start in starts:
            y = model.decode(z[:, :, start // 8:start // 8 + 4])
            n = y.shape[2]
            w = torch.tensor([min(1.0, (k + 0.5) / 16 if start else 1.0,
                                  (n - k - 0.5) / 16 if start + n < 72 else 1.0) for k in range(n)])
            total[:, :, start:start + n] += w[:, None, None] * y
            weights[start:start + n] += w
        assert torch.allclose(weights, torch.ones(72))
        assert torch.allclose(made, total[:, :, :71, :, :13], atol=1e-5)
        flat = torch.ones(1, 4, 10, 2, 2)
        frame = model.decode(flat[:, :, :4])[:, :, :1]
        assert torch.allclose(tae.decode_tiled(model, flat), frame, atol=1e-4)
        jump = {o: tae.decode_tiled(model, z, overlap=o).diff(dim=2)[:, :, [31]].square().mean()
                for o in (0, 16)}
    assert jump[16] < jump[0]                               # overlap hides the seam


@ALL_STREAMED
@pytest.mark.parametrize("T", [1, 2, 9, 16])
def test_streaming_is_exact(cfg, T):
    model = randomise_time(TAE(cfg)).double().eval()
    x = torch.rand(2, 3, T, 8, 10, dtype=torch.double) * 2 - 1
    with torch.no_grad():
        whole, streamed = model.encode(x), model.encode(x, stream=True)
        assert torch.allclose(whole.mean, streamed.mean, atol=1e-6)             # both are fp32
        assert torch.allclose(whole.logvar, streamed.logvar, atol=1e-6)
        z = whole.mean.double()
        for n, size in ((T, (8, 10)), (None, None), (max(1, T - 3), None), (0, None)):
            made, wanted = model.decode(z, n, size, stream=True), model.decode(z, n, size)
            assert made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-12)


def test_streaming_makes_no_frame_that_is_not_asked_for(monkeypatch):
    model, made = TAE(TINY).eval(), []
    z = torch.randn(1, 4, 2, 2, 2)
    linear = F.linear

    def count(x, weight, bias=None):
        made.append(x.shape[1] if x.ndim == 4 else 0)           # (B, H, W, C) of a temporal conv
        return linear(x, weight, bias)

    monkeypatch.setattr(tae.F, "linear", count)
    with torch.no_grad():
        model.decode(z, 16, stream=True)
        everything = made.count(16)
        made.clear()
        model.decode(z, 3, stream=True)         # three frames, and what they see of the next ones
    assert everything == 16 * 4 and made.count(16) < 7 * 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tiled", "streamed"])
def test_memory_does_not_grow_with_the_clip(way):
    """256 frames against 64: peak memory beyond the clips themselves."""
    code = """if True:
        import re, sys, torch, tae
        torch.set_num_threads(1)
        T, H, stream = int(sys.argv[1]), 64, sys.argv[2] == "streamed"
        model = tae.TAE(tae.TAEConfig(channels=32, mult=(1, 2, 2, 2), res_blocks=(1,) * 4)).eval()
        # the largest memory so far; getrusage's would begin with that of the process before exec
        peak = lambda: int(re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1]) / 1024
        @torch.no_grad()
        def run(x):
            if stream:
                return model.decode(model.encode(x, stream=True).mean, x.shape[2], stream=True)
            return tae.decode_tiled(model, tae.encode_tiled(model, x).mean, x.shape[2])
        run(torch.zeros(1, 3, 40, H, H))                        # one of everything, to warm up
        x = torch.zeros(1, 3, T, H, H)
        y = run(x)
        print(peak() - (x.numel() + y.numel()) * 4 / 2**20)"""
    used = []
    for T in (64, 256):
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        out = subprocess.run([sys.executable, "-c", code, str(T), way], env=env, check=True,
                             capture_output=True, text=True, cwd=os.path.dirname(tae.__file__))
        used.append(float(out.stdout))
    assert max(used) < 1.1 * min(used), used


# ---- VidTwin -------------------------------------------------------------------------------------


def test_vidtwin_of_the_paper():
    with torch.device("meta"):
        model = VidTwin(VIDTWIN_PRESETS["paper"])
        z = model.encode(torch.empty(1, 3, 16, 224, 224))
        assert z.mean.shape == (1, 4928)
        assert model.decode(z.mean).shape == (1, 3, 16, 224, 224)
    assert model.shapes == [(4, 16, 7, 7), (8, 1, 16, 14)]
    rate = lambda model: math.prod(model.latent_shape(16, 224, 224)) / (3 * 16 * 224**2)
    assert 100 * rate(model) == pytest.approx(0.2046, abs=1e-4)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(312.7e6, rel=0.005)                       # the released code's
    with torch.device("meta"):                                              # its own d_S: 0.335 %
        released = VidTwin(replace(VIDTWIN_PRESETS["paper"], structure_channels=8))
    assert 100 * rate(released) == pytest.approx(0.335, abs=1e-3)
    for size, T, H in (("toy", 16, 32), ("small", 16, 64)):                 # as many values
        with torch.device("meta"):
            a, b = TAE(PRESETS[size]), VidTwin(VIDTWIN_PRESETS[size])
        assert math.prod(a.latent_shape(T, H, H)) == math.prod(b.latent_shape(T, H, H))


def lively(cfg=TWIN, seed=0):
    """A VidTwin in which nothing starts at zero."""
    torch.manual_seed(seed)
    model = VidTwin(cfg).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            p.data.normal_(0, 0.1)
    return model


def test_vidtwin_branches():
    model, z = lively(), torch.randn(2, 2048)
    with torch.no_grad():
        s, dh, dw = model.branches(z)
        assert s.shape == dh.shape == dw.shape == (2, 32, 16, 8, 8)
        assert (dh - dh[..., :1, :]).abs().max() == 0 and dh.std(-1).max() > 0      # along height
        assert (dw - dw[..., :1]).abs().max() == 0 and dw.std(-2).max() > 0         # along width
        # each latent moves its own branch, and the sum is all that the decoder sees
        other = z.clone()
        other[:, 1024:] = torch.randn(2, 1024)
        s2, dh2, _ = model.branches(other)
        assert torch.equal(s2, s) and not torch.equal(dh2, dh)
        seen = []
        model.decoder.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
        for only in ("", "structure", "dynamics"):
            assert model.decode(z, only=only).shape == (2, 3, 16, 32, 32)
        assert torch.allclose(seen[0], seen[1] + seen[2], atol=1e-5)
        parts = model.split(z)
        assert [tuple(p.shape[1:]) for p in parts] == model.shapes
        assert torch.equal(torch.cat([p.flatten(1) for p in parts], 1), z)


def test_a_model_without_memory_is_filled_from_a_file():
    """All that forward needs is in the state dict: positions, too."""
    for cfg in (TINY, TWIN):
        model = lively(cfg) if cfg is TWIN else TAE(cfg).eval()
        with torch.device("meta"):
            other = tae.autoencoder(cfg).eval()
        other.load_state_dict(model.state_dict(), assign=True)
        assert not any(v.is_meta for v in (*other.parameters(), *other.buffers()))
        x = clips(1)
        assert torch.equal(other.encode(x).mean, model.encode(x).mean)


def test_vidtwin_has_nothing_to_stream():
    model, a = lively(), torch.rand(2, 3, 16, 32, 32) * 2 - 1
    with torch.no_grad():
        z = model.encode(a, stream=True).mean
        assert torch.equal(model.decode(z, 16, (32, 32), stream=True), model(a)[0])


def test_vidtwin_looks_at_time_where_it_should():
    model, x = lively(), torch.randn(1, 3, 16, 32, 32)
    p = TWIN.patch
    cut = lambda x: rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
    with torch.no_grad():
        h = model.encoder(model.embed(cut(x)))
        later = x.clone()
        later[:, :, 9:] += 1
        assert torch.equal(model.encoder(model.embed(cut(later)))[:, :9], h[:, :9])     # causal
        z = torch.randn(5, 16, 32)                                      # (places, frames, D)
        order = torch.randperm(16)
        q = model.structure_encoder.qformer
        assert torch.allclose(q(z), q(z[:, order]), atol=1e-5)          # a set of frames
        z = torch.randn(1, 32, 16, 8, 8)
        z2 = z.roll(1, 2)                                               # another order is another D
        assert (model.dynamics_encoder(z) - model.dynamics_encoder(z2)).abs().max() > 1e-3


def test_vidtwin_latents_are_normalised_by_channel():
    model = lively()
    mean = torch.randn(64, 2048) * model.expand(torch.arange(1.0, 17)) + 3
    model.lat_mean[:], model.lat_std[:] = tae.latent_stats(model, (
        tae.Posterior(part, torch.full_like(part, -20.0)) for part in mean.split(16)))
    assert torch.allclose(model.lat_std, torch.arange(1.0, 17), rtol=0.05)
    for part in model.split(model.normalize(mean)):
        assert part.mean((0, 2, 3, 4)).abs().max() < 0.02
        assert (part.std((0, 2, 3, 4)) - 1).abs().max() < 0.02
    assert torch.allclose(model.denormalize(model.normalize(mean)), mean, atol=1e-4)


# ---- training ------------------------------------------------------------------------------------


@ALL
def test_bf16_is_finite_and_checkpointing_changes_nothing(cfg):
    torch.manual_seed(0)
    model, x = tae.autoencoder(cfg), clips(1)
    x = x if cfg is TWIN else x[:, :, :5, 8:24, 8:24]
    grads = []
    for recompute in (False, True):
        model.cfg.checkpointing = recompute                     # one config, which all parts share
        model.zero_grad()
        objective = tae.Objective(model, LOSSES["toy"])
        objective(x, generator=torch.Generator().manual_seed(0)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))
    with torch.autocast("cpu", torch.bfloat16):
        recon, posterior = model(x)
        loss = tae.Objective(model, LossConfig(opl=0.5))(x)
    assert posterior.mean.dtype == torch.float32 and recon.isfinite().all()
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


def test_hinge_at_known_logits():
    assert tae.hinge(torch.tensor([2.0]), torch.tensor([-2.0])) == 0
    assert tae.hinge(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert tae.hinge(torch.tensor([-1.0, 1.0]), torch.tensor([3.0, -1.0])) == pytest.approx(1.5)


def test_adversary():
    """Neither side sees the other's gradient; the adaptive weight; a start step; no BatchNorm."""
    torch.manual_seed(0)
    x, cfg = clips(2, T=2), LossConfig(gan=0.1, gan_start=5)
    model = tae.Objective(TAE(PRESETS["toy"]), cfg)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert model.discriminator(x).shape == (4, 1, 2, 2)
    run = lambda step: model(x, step, torch.Generator().manual_seed(0))
    plain = tae.Objective(model.tae, replace(cfg, gan=0.0))
    run(4).backward()                                       # before the start: nothing but zeros
    assert run(4).item() == pytest.approx(plain(x, 4, torch.Generator().manual_seed(0)).item())
    assert all(p.grad is not None and p.grad.abs().max() == 0
               for p in model.discriminator.parameters())
    assert all(p.requires_grad for p in model.parameters())

    model.zero_grad()
    run(5).backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    recon, posterior = model.tae(x, torch.Generator().manual_seed(0))
    tae.hinge(model.discriminator(x), model.discriminator(recon.detach())).backward()
    assert all(torch.allclose(got["discriminator." + k], p.grad, atol=1e-6)
               for k, p in model.discriminator.named_parameters())
    # at the last weight both terms of the generator have the norms that the weight promises
    last = model.tae.last_weight
    grad = lambda term: torch.autograd.grad(term, last, retain_graph=True)[0]
    rec, adv = grad((recon - x).abs().mean()), grad(-model.discriminator(recon).mean())
    want = rec + 0.1 * rec.norm() / (adv.norm() + 1e-4) * adv
    assert torch.allclose(got["tae.decoder.conv_out.temporal.weight"], want, atol=1e-6)


def test_adversary_learns_to_tell():
    torch.manual_seed(0)
    x = clips(4, T=2)
    blurred = F.avg_pool3d(x, (1, 5, 5), 1, (0, 2, 2))
    critic = tae.PatchDiscriminator(16)
    opt = torch.optim.Adam(critic.parameters(), 1e-3)
    for _ in range(60):
        opt.zero_grad()
        loss = tae.hinge(critic(x), critic(blurred))
        loss.backward()
        opt.step()
    assert loss < 0.5


class Still(tae.Autoencoder):
    """An autoencoder whose reconstruction and posterior are given."""

    def __init__(self, recon, posterior):
        super().__init__(1)
        self.results = recon, posterior

    def forward(self, x, generator=None):
        return self.results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["2.5d", "vidtwin"])
def test_a_model_in_another_precision(kind, dtype):
    torch.manual_seed(0)
    model = tae.VidTwin(VIDTWIN_PRESETS["toy"]) if kind == "vidtwin" else TAE(PRESETS["toy"])
    x = torch.rand(1, 3, 16, 32, 32) * 2 - 1
    with torch.no_grad():
        want = model.decode(model.encode(x).mean)
        model.to(dtype)
        got = model.decode(model.encode(x.to(dtype)).mean)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got - want).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-3)


def test_objective_is_the_sum_that_it_says():
    x, y = torch.rand(2, 1, 3, 2, 16, 16)
    posterior = tae.Posterior(torch.randn(1, 4, 1, 2, 2), torch.randn(1, 4, 1, 2, 2))
    calls = []
    perceptual = lambda a, b: calls.append((a, b)) or torch.tensor(4.0)
    cfg = LossConfig(l1=1.0, l2=0.5, kl=0.1, perceptual=0.25)
    loss = tae.Objective(Still(y, posterior), cfg, perceptual)
    want = (x - y).abs().mean() + 0.5 * ((x - y) ** 2).mean() + 0.1 * posterior.kl() + 0.25 * 4
    assert loss(x).item() == pytest.approx(want.item()) and len(calls) == 1
    with pytest.raises(ValueError, match="perceptual 0.25: needs a distance"):
        tae.Objective(Still(y, posterior), cfg)
    off = tae.Objective(Still(y, posterior), LossConfig(kl=0.0), lambda a, b: 1 / 0)
    assert off(x).item() == pytest.approx((x - y).abs().mean().item())


def test_outlier_penalty_is_a_phase():
    mean = torch.randn(1, 16, 1, 8, 8)
    mean[..., 0, 0] *= 9
    x = torch.zeros(1, 3, 1, 8, 8)
    loss = tae.Objective(Still(x, tae.Posterior(mean, torch.zeros_like(mean))),
                         LossConfig(opl=1.0, opl_start=10, kl=0.0))
    assert loss(x, step=9) == 0
    assert loss(x, step=10) == tae.outlier_penalty(mean) > 0
    assert tae.outlier_penalty(torch.randn(2, 2048)) == 0               # VidTwin's is no grid


def psnr_of_one_clip(cfg, steps):
    """PSNR on one clip of an autoencoder trained on nothing else, before and after."""
    torch.manual_seed(0)
    model, x = tae.autoencoder(cfg), clips(1)
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    first = tae.psnr(model.eval()(x)[0], x).item()
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        tae.Objective(model, LOSSES["toy"])(x).backward()
        opt.step()
    return first, tae.psnr(model.eval()(x)[0], x).item()


@ALL
@pytest.mark.slow
def test_every_variant_learns_one_clip(cfg):
    cfg = VIDTWIN_PRESETS["toy"] if cfg is TWIN else replace(PRESETS["toy"], variant=cfg.variant)
    first, last = psnr_of_one_clip(cfg, 300)
    assert last > first + 8


@pytest.mark.slow
def test_more_channels_reconstruct_better():
    few, many = (replace(PRESETS["toy"], latent_channels=C) for C in (2, 8))
    assert psnr_of_one_clip(many, 200)[1] > psnr_of_one_clip(few, 200)[1]


@pytest.mark.slow
def test_outlier_penalty_as_a_finetuning_phase_removes_dots():
    """Train, plant a dot (a huge bias that only one position feels), finetune with and without."""
    torch.manual_seed(0)
    cfg = replace(TINY, latent_channels=16, space_stride=(2, 2, 1), time_stride=(1, 1, 1))
    x = clips(4, T=1)
    dot = torch.zeros(1, 16, 1, 8, 8)
    dot[..., 3, 5] = 6.0
    start = TAE(cfg)
    offset = torch.nn.Parameter(dot)

    def train(model, offset, opl, steps):
        opt = torch.optim.AdamW([*model.parameters(), offset], 1e-3)
        for _ in range(steps):
            opt.zero_grad()
            mean = model.encode(x).mean + offset
            loss = (model.decode(mean, 1) - x).abs().mean() + opl * tae.outlier_penalty(mean)
            loss.backward()
            opt.step()
        with torch.no_grad():
            mean = model.encode(x).mean + offset
            quality = tae.psnr(model.decode(mean, 1), x).mean().item()
            m = mean.mean((-2, -1), keepdim=True)
            s = mean.std((-2, -1), keepdim=True, unbiased=False).norm(dim=1)
            return ((mean - m).norm(dim=1) / (3 * s)).max().item(), quality     # above 1: a dot

    train(start, offset, 0.0, 150)
    result = {}
    for opl in (0.0, 0.5):
        torch.manual_seed(1)
        planted = torch.nn.Parameter(offset.detach().clone())
        result[opl] = train(copy.deepcopy(start), planted, opl, 150)
    assert result[0.0][0] > 1.05 and result[0.5][0] < 1.02
    assert result[0.5][1] > result[0.0][1] - 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    """Weights decide: clips are cast to them, an inflated model has those of its image model, and
    the discriminator, in its own precision, takes what either makes."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 32, 32) * 2 - 1
    video = inflate(TAE(replace(PRESETS["toy"], channels=16, variant="2d")).to(dtype))
    assert {w.dtype for w in video.parameters()} == {dtype}
    assert torch.equal(video.encode(x).mean, video.encode(x.to(dtype)).mean)
    twin = VidTwin(replace(TWIN, frames=8)).to(dtype)
    assert twin.encode(x).mean.isfinite().all()
    losses = LossConfig(gan=0.1)
    for objective in (tae.Objective(video, losses), tae.Objective(video, losses).to(dtype)):
        objective(x[:1, :, :2].to(dtype)).backward()
    with pytest.raises(ValueError, match="clip of torch.uint8: expected floats"):
        video.encode((x + 1).byte())


def test_a_seed_has_bounds(monkeypatch, capsys):
    """It is multiplied by 1000 and given to torch."""
    for seed in ("-1", "99999999999999999999"):
        monkeypatch.setattr(sys, "argv", ["tae.py", "--seed", seed])
        with pytest.raises(SystemExit) as e:
            tae.main()
        assert e.value.code == 2 and f"--seed {seed}: must be 0 to" in capsys.readouterr().err
