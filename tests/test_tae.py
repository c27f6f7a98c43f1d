"""tae.py: the toy world, inflation, symmetry in time, tiles, VidTwin, losses and measures."""
import copy
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import tae
from tae import LOSSES, PRESETS, TAE, VIDTWIN_PRESETS, LossConfig, TAEConfig, VidTwin, inflate

TINY = TAEConfig(channels=8, mult=(1, 2, 2, 2), res_blocks=(1, 1, 1, 1), extra=0, latent_channels=4)
TINY3D = replace(TINY, variant="3d")
TWIN = replace(VIDTWIN_PRESETS["toy"], width=32, patch=4, structure_down=1, dynamics_down=1)
BOTH = pytest.mark.parametrize("cfg", [TINY, TINY3D], ids=["2.5d", "3d"])
ALL_STREAMED = pytest.mark.parametrize("cfg", [TINY, TINY3D, PRESETS["toy"]],
                                       ids=["2.5d", "3d", "toy"])
ALL = pytest.mark.parametrize("cfg", [TINY, TINY3D, TWIN], ids=["2.5d", "3d", "vidtwin"])


def clips(n, seed=0, T=16, H=32, **kwargs):
    rng = random.Random(seed)
    return tae.render([tae.sample_world(rng, **kwargs) for _ in range(n)], T, H)


def randomise_time(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".temporal." in name or ".time." in name or p.ndim in (3, 5):
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


# ---- the toy world -------------------------------------------------------------------------------


def test_motion_is_the_stated_velocity_and_area():
    for direction, (dx, dy) in tae.DIRECTIONS.items():
        thing = tae.Thing("white", "circle", direction, "fast", radius=0.17, x=0.5, y=0.5)
        x = (tae.render([tae.World((thing,))], T=5, H=64)[0, 0] + 1) / 2      # (T, H, W)
        cx = (x.sum(1) * torch.arange(64)).sum(1) / x.sum((1, 2))
        cy = (x.sum(2) * torch.arange(64)).sum(1) / x.sum((1, 2))
        step = tae.SPEEDS["fast"] * 2 / math.hypot(dx, dy)                    # pixels at H = 64
        assert torch.allclose(cx.diff(), torch.full((4,), step * dx), atol=0.3)
        assert torch.allclose(cy.diff(), torch.full((4,), step * dy), atol=0.3)
    for shape in tae.SHAPES:                                                  # equal areas
        thing = tae.Thing("white", shape, "left", "slow", radius=0.17)
        area = ((tae.render([tae.World((thing,))], T=1, H=64) + 1) / 2)[0, 0].sum().item()
        assert area == pytest.approx(math.pi * (0.17 * 64) ** 2, rel=0.04)


def test_everything_stays_inside_and_apart():
    rng = random.Random(3)
    for _ in range(60):
        a, b = tae.sample_world(rng, things=2).things
        assert tae.apart(a, b, 16) and a.color != b.color
        alone = [(tae.render([tae.World((t,))])[0].amax(0) + 1) / 2 for t in (a, b)]  # (T, H, W)
        for x in alone:                       # what leaves the picture no longer counts
            area = x.sum((1, 2))
            assert (area / area.mean() - 1).abs().max() < 0.03
        assert torch.minimum(*alone).max() < 0.6      # at most two half-covered rims meet
    crowded = [tae.sample_world(rng, things=4, overlap=True).things for _ in range(20)]
    assert not all(tae.apart(t[0], t[1], 16) for t in crowded)


def test_what_moves_alone_passes_near_the_middle():
    rng = random.Random(4)
    seen = {"sign": [], "shape": []}
    for _ in range(400):
        (thing,) = tae.sample_world(rng, signs=0.5).things
        vx, vy = tae.velocity(thing)
        off = max(abs(thing.x + 7.5 * vx - 0.5), abs(thing.y + 7.5 * vy - 0.5))
        seen["sign" if thing.shape == "sign" else "shape"].append(off)
    for kind, off in seen.items():
        assert 0.9 * tae.WANDER[kind] < max(off) <= tae.WANDER[kind] + 1e-9
    assert any(abs(t.x - 0.5) > 0.25 for _ in range(20) for t in tae.sample_world(rng, 2).things)


def test_heldout_is_never_drawn_and_leaves_no_word_or_colour_out():
    rng = random.Random(0)
    drawn = [tae.sample_world(rng).things[0] for _ in range(3000)]
    assert not any(tae.is_heldout(t) for t in drawn)
    for key, values in (("color", tae.COLORS), ("direction", tae.DIRECTIONS)):
        assert {getattr(t, key) for t in drawn} == set(values)
    held = [tae.sample_world(rng, heldout=True).things[0] for _ in range(300)]
    assert all(tae.is_heldout(t) for t in held)
    assert {t.shape for t in held} == {*tae.SHAPES, "sign"}
    assert not set(tae.WORDS) & set(tae.HELDOUT_WORDS)


def test_chinese_signs_or_one_clear_line(monkeypatch):
    letters, words, never = tae.SCRIPTS["chinese"]
    assert len(letters) == 10 and not set(words) & set(never)
    assert set("".join(never)) <= set("".join(words)) <= set(letters)     # new words, known letters
    try:
        ink = {w: tae.glyphs(w, 60) for w in letters}
    except ValueError as error:
        assert "fonts-wqy-microhei" in str(error) and "\n" not in str(error)
        pytest.skip("fonts-wqy-microhei is not installed")
    for w, g in ink.items():
        assert 0.1 < g.float().mean() < 0.6, w
        assert not g[:, 0].any() and not g[:, -1].any()                   # nothing is cut off
    assert not ink["口"][25:35, 25:35].any() and ink["田"][25:35, 25:35].any()
    rng = random.Random(0)
    drawn = [tae.sample_world(rng, signs=1.0, script="chinese").things[0] for _ in range(300)]
    assert {t.word for t in drawn} <= {*letters, *words} and not any(map(tae.is_heldout, drawn))


def test_letters_have_holes():
    for letter, holes in (("O", 1), ("B", 2), ("I", 0)):
        ink = F.pad(tae.glyphs(letter, 40), [2] * 4)
        outside, reached = ~ink, torch.zeros_like(ink)
        reached[0, 0] = True
        for _ in range(400):                                                  # flood fill
            reached = (F.max_pool2d(reached[None].float(), 3, 1, 1)[0] > 0) & outside
        inner, count = outside & ~reached, 0
        while inner.any():
            seed = torch.zeros_like(inner)
            seed.view(-1)[inner.flatten().nonzero()[0]] = True
            for _ in range(100):
                seed = (F.max_pool2d(seed[None].float(), 3, 1, 1)[0] > 0) & inner
            inner, count = inner & ~seed, count + 1
        assert count == holes, letter


# ---- shapes --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 15, 16, 17, 33])
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
    assert sum(p.numel() for p in paper.parameters()) == pytest.approx(114.5e6, rel=0.01)
    assert paper.latent_shape(256, 768, 768) == (16, 32, 96, 96)
    assert paper.compression_rate(256, 768, 768) == pytest.approx(16 / (3 * 512))
    assert TAE(PRESETS["toy"]).latent_shape(16, 32, 32) == (8, 4, 8, 8)


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match=r"expected \(B, 3, T, H, W\)"):
        TAE(TINY).encode(torch.zeros(1, 4, 2, 16, 16))
    with pytest.raises(ValueError, match="variant 4d: not one of 2.5d, 3d, 2d"):
        replace(TINY, variant="4d")
    with pytest.raises(ValueError, match="one stride less"):
        replace(TINY, mult=(1, 2))
    with pytest.raises(ValueError, match="none where the width changes"):
        replace(TINY, res_blocks=(1, 0, 1, 1))
    with pytest.raises(ValueError, match="clip of 8 x 32 x 32: this VidTwin takes 16 x 32 x 32"):
        VidTwin(TWIN).encode(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="only both: not one of structure, dynamics"):
        VidTwin(TWIN).decode(torch.zeros(1, 2048), only="both")
    with pytest.raises(ValueError, match="does not divide the size"):
        replace(TWIN, patch=5)
    for bad in ({"frames": 30}, {"size": 100}, {"overlap": 200}):
        with pytest.raises(ValueError, match="the overlap at most half"):
            TAE(TINY).encode_tiled(torch.zeros(1, 3, 9, 16, 16), **bad)
    with pytest.raises(ValueError, match="only 2d"):
        inflate(TAE(TINY))


# ---- inflation and time --------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [TINY, PRESETS["toy"]], ids=["8x8x8", "toy"])
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


def test_inflating_to_3d_leaves_images_as_they_are():
    torch.manual_seed(0)
    image = TAE(replace(PRESETS["toy"], variant="2d")).eval()
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


def test_cost_of_2_5d_against_3d():
    """Multiply-adds for each pair of channels: 9 + 3 against 27. Weights the same."""
    convs = [tae.CONV[v](32, 32) for v in ("2d", "2.5d", "3d")]
    two, two_half, three = (sum(p.numel() for p in c.parameters() if p.ndim > 1) for c in convs)
    assert two_half * 9 == two * 12 and three * 9 == two * 27
    assert TAE(TINY).latent_shape(17, 40, 24) == TAE(TINY3D).latent_shape(17, 40, 24)


def test_3d_convolution_is_the_joint_one():
    """Against conv3d of a clip padded by hand, in the plain layout; stride 2 in all three axes."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 10, 12)
    for space, time in ((1, 1), (2, 2), (1, 2)):
        conv = tae.Conv3D(4, 6, space=space, time=time)
        conv.weight.data.normal_()
        pad = (0, 1, 0, 1) if space == 2 else (1, 1, 1, 1)
        want = F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (*pad, 0, 0))
        want = F.conv3d(want, conv.weight, conv.bias, (time, space, space))
        got = rearrange(conv(tae.fold(x), 7), "(b t) c h w -> b c t h w", b=2)
        assert torch.allclose(got, want, atol=1e-5)


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
        T = x.shape[2]
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
        recon, posterior = model(torch.randn(1, 3, T, 16, 16))
        tae.tae_loss(LossConfig(), torch.zeros_like(recon), recon, posterior).backward()
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
    assert tae.psnr(x, x).item() == pytest.approx(80.0)
    model = TAE(TINY)
    shape = (4, 4, 2, 6, 6)
    posteriors = [tae.Posterior(3 + 2 * torch.randn(shape), torch.full(shape, -1.0))
                  for _ in range(20)]
    stats = tae.LatentStats(model)
    for i, p in enumerate(posteriors):
        if i == 7:                                              # stopped here, and gone on with
            stats = tae.LatentStats(model, stats.sums.clone())
        stats.update(p)
    model.lat_mean[:], model.lat_std[:] = stats.result()
    g = torch.Generator().manual_seed(0)
    z = model.normalize(torch.cat([p.sample(g) for p in posteriors]))
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.03
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.03
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-5)


def test_sample_depends_on_the_generator_alone():
    p = tae.Posterior(torch.zeros(2, 3), torch.zeros(2, 3))
    draw = lambda s: p.sample(torch.Generator().manual_seed(s))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_ssim_against_its_definition():
    """A window at a time, in float64; and closed forms."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 1, 13, 14, dtype=torch.float64) * 2 - 1
    k = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    w = torch.outer(k, k) / k.sum() ** 2
    values = []
    for c in range(3):
        for i in range(3):
            for j in range(4):
                a, b = (v[0, c, 0, i:i + 11, j:j + 11] / 2 + 0.5 for v in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
                              / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    assert tae.ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-6)
    assert tae.ssim(x, x).item() == pytest.approx(1)
    flat = torch.zeros(1, 3, 2, 16, 16)                         # grey 0.5 against grey 0.75
    assert tae.ssim(flat, flat + 0.5).item() == pytest.approx(
        (2 * 0.5 * 0.75 + 1e-4) / (0.25 + 0.5625 + 1e-4), abs=1e-4)


def test_measures_in_time_against_closed_forms():
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 8, 1, 1).expand(1, 3, 8, 16, 16)
    still = torch.zeros_like(ramp)
    assert tae.temporal_error(ramp, still).item() == pytest.approx(1 / 7, rel=1e-5)
    image = still[:, :, :1]
    assert tae.temporal_error(ramp, ramp + 0.0) == 0 and tae.temporal_error(image, image) == 0
    step = torch.cat([still[:, :, :4], still[:, :, 4:] + 0.5], 2)
    step = step + 0.01 * torch.randn(1, 3, 8, 16, 16)
    assert tae.seam_score(step, [4]).item() > 20
    noise = torch.randn(1, 3, 40, 32, 32)
    assert tae.seam_score(noise, [8, 16]).item() == pytest.approx(1, abs=0.05)
    z = torch.randn(2, 16, 2, 16, 16)
    assert (tae.spot_ratio(z) < 1).all()
    z[1, :, 0, 3, 3] *= 8
    assert tae.spot_ratio(z)[0] < 1 < tae.spot_ratio(z)[1]


def test_frechet_distance_of_gaussians_in_closed_form():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40_000, 3, generator=g, dtype=torch.float64)
    b = b * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0])
    assert tae.frechet(a, b) == pytest.approx(1 + (2 - 1) ** 2 + 0 + 0.5**2, rel=0.03)
    assert abs(tae.frechet(a, a)) < 1e-8


def test_weights_that_cannot_be_had_are_one_line(monkeypatch):
    """No network here: the loaders must name what is missing, whatever torchvision raises."""
    monkeypatch.setenv("TORCH_HOME", "/nonexistent/for/this/test")
    monkeypatch.setattr("torch.hub.download_url_to_file",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    for load, name in ((tae.vgg_perceptual, "VGG16"), (tae.video_features, "R3D-18")):
        with pytest.raises(ValueError, match=f"needs torchvision's {name} weights"):
            load()


# ---- tiles ---------------------------------------------------------------------------------------


def test_tile_weights_sum_to_one():
    for n in (1, 3, 4, 5, 8, 17, 32):
        for tile, overlap in ((4, 2), (4, 0), (6, 3)):
            total = torch.zeros(8 * n)
            for span in tae.spans(n, tile, overlap):
                total[8 * span[0]:8 * span[1]] += tae.ramp(span, n, overlap, 8, down=False)
            assert torch.allclose(total, torch.ones(8 * n))
    assert len(tae.spans(256, 32, 0)) == 8 and len(tae.spans(32, 4, 2)) == 15          # [MG]
    assert tae.spans(32, 4, 2)[-1] == (28, 32)
    w = tae.ramp((2, 6), 8, 2, 8, down=False)
    assert torch.allclose(w[:16], (torch.arange(16) + 0.5) / 16)                # linear, not 1/2


@BOTH
def test_a_clip_of_one_tile_is_the_same_to_the_bit(cfg):
    torch.manual_seed(0)
    model = randomise_time(TAE(cfg)).eval()
    x = torch.randn(1, 3, 29, 24, 21)
    with torch.no_grad():
        whole, tiled = model.encode(x), model.encode_tiled(x)
        assert torch.equal(whole.mean, tiled.mean) and torch.equal(whole.logvar, tiled.logvar)
        y = model.decode(whole.mean, 29, (24, 21))
        assert torch.equal(y, model.decode_tiled(whole.mean, 29, (24, 21)))
        assert torch.equal(model.decode(whole.mean), model.decode_tiled(whole.mean))


def test_tiles_in_time_and_space():
    torch.manual_seed(0)
    model = randomise_time(TAE(TINY)).eval()
    x = torch.randn(1, 3, 75, 48, 41)
    with torch.no_grad():
        p = model.encode_tiled(x, size=32, overlap=16)
        assert p.mean.shape[1:] == model.latent_shape(75, 48, 41)
        # time is cut without overlap: each tile of 32 frames by itself
        narrow = model.encode_tiled(x).mean
        alone = [model.encode(x[:, :, t:t + 32]).mean for t in (0, 32, 64)]
        assert torch.equal(narrow, torch.cat(alone, 2))
        y = model.decode_tiled(p.mean, 75, (48, 41), tile=32, overlap=16)
        assert y.shape == x.shape and y.isfinite().all()
        # a constant latent: inside, tiles are those of a constant clip, and so is the blend
        flat = torch.ones(1, 4, 10, 2, 2)
        frame = model.decode(flat[:, :, :4])[:, :, :1]
        assert torch.allclose(model.decode_tiled(flat), frame, atol=1e-4)
        # overlap hides seams
        z = torch.randn(1, 4, 16, 3, 3, generator=torch.Generator().manual_seed(1))
        score = {o: tae.seam_score(model.decode_tiled(z, overlap_frames=o),
                                   [32, 64, 96]).item() for o in (0, 16)}
    assert score[16] < score[0]


@ALL_STREAMED
@pytest.mark.parametrize("T", [1, 2, 9, 16])
def test_streaming_is_exact(cfg, T):
    model = randomise_time(TAE(cfg)).double().eval()
    x = torch.rand(2, 3, T, 16, 20, dtype=torch.double) * 2 - 1
    with torch.no_grad():
        whole, streamed = model.encode(x), model.encode(x, stream=True)
        assert torch.allclose(whole.mean, streamed.mean, atol=1e-6)             # both are fp32
        assert torch.allclose(whole.logvar, streamed.logvar, atol=1e-6)
        z = whole.mean.double()
        for n, size in ((T, (16, 20)), (None, None), (max(1, T - 3), None)):
            made, wanted = model.decode(z, n, size, stream=True), model.decode(z, n, size)
            assert made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-12)


def test_streaming_makes_no_frame_that_is_not_asked_for(monkeypatch):
    model, made = TAE(TINY).eval(), []
    z = torch.randn(1, 4, 2, 2, 2)
    one = tae.TemporalConv.one
    monkeypatch.setattr(tae.TemporalConv, "one",
                        lambda self, w: (made.append(w[0].shape[-1]), one(self, w))[1])
    with torch.no_grad():
        model.decode(z, 16, stream=True)
        everything = made.count(16)
        made.clear()
        model.decode(z, 3, stream=True)         # three frames, and what they see of the next ones
    assert everything == 16 * 4 and made.count(16) < 7 * 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip():
    """256 frames against 64, then four times the area: peak memory beyond the clips themselves."""
    code = """if True:
        import re, sys, torch, tae
        torch.set_num_threads(1)
        T, H = int(sys.argv[1]), int(sys.argv[2])
        model = tae.TAE(tae.TAEConfig(channels=32, mult=(1, 2, 2, 2), res_blocks=(1,) * 4)).eval()
        # the largest memory so far; getrusage's would begin with that of the process before exec
        peak = lambda: int(re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1]) / 1024
        tile = dict(overlap=16)
        model.decode_tiled(model.encode_tiled(torch.zeros(1, 3, 33, 72, 72), size=64, **tile).mean,
                           tile=64, **tile)                     # one of everything, to warm up
        x = torch.zeros(1, 3, T, H, H)
        z = model.encode_tiled(x, size=64, **tile).mean
        y = model.decode_tiled(z, T, tile=64, **tile)
        print(peak() - (x.numel() + y.numel()) * 4 / 2**20)"""
    used = []
    for T, H in ((64, 128), (256, 128), (64, 256)):
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        out = subprocess.run([sys.executable, "-c", code, str(T), str(H)], env=env, check=True,
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
    assert 100 * model.compression_rate(16, 224, 224) == pytest.approx(0.2046, abs=1e-4)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(312.7e6, rel=0.005)                       # the released code's
    with torch.device("meta"):                                              # its own d_S: 0.335 %
        released = VidTwin(replace(VIDTWIN_PRESETS["paper"], structure_channels=8))
    assert 100 * released.compression_rate(16, 224, 224) == pytest.approx(0.335, abs=1e-3)
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


def test_vidtwin_reenacts():
    model, (a, b) = lively(), torch.rand(2, 2, 3, 16, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(model.reenact(a, a), model(a)[0], atol=1e-6)
        assert (model.reenact(a, b) - model(a)[0]).abs().max() > 1e-4
        assert (model.reenact(a, b) - model(b)[0]).abs().max() > 1e-4


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
    mean = torch.randn(64, 2048) * model.spread(torch.arange(1.0, 17)) + 3
    stats = tae.LatentStats(model)
    for part in mean.split(16):
        stats.update(tae.Posterior(part, torch.full_like(part, -20.0)))
    model.lat_mean[:], model.lat_std[:] = stats.result()
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
    grads = []
    for remember in (False, True):
        for m in model.modules():
            if hasattr(m, "remember"):
                m.remember = remember
            if hasattr(m, "cfg") and hasattr(m.cfg, "checkpointing"):
                m.cfg.checkpointing = remember
        model.zero_grad()
        recon, posterior = model(x, torch.Generator().manual_seed(0))
        tae.tae_loss(LOSSES["toy"], x, recon, posterior).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))
    with torch.autocast("cpu", torch.bfloat16):
        recon, posterior = model(x)
    assert posterior.mean.dtype == torch.float32 and recon.isfinite().all()
    loss = tae.tae_loss(LossConfig(opl=0.5), x, recon, posterior)
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
    assert model.critic(x).shape == (4, 1, 2, 2)
    run = lambda step: model(x, step, torch.Generator().manual_seed(0))
    plain = tae.Objective(model.tae, replace(cfg, gan=0.0))
    run(4).backward()                                       # before the start: nothing but zeros
    assert run(4).item() == pytest.approx(plain(x, 4, torch.Generator().manual_seed(0)).item())
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.critic.parameters())
    assert all(p.requires_grad for p in model.parameters())

    model.zero_grad()
    run(5).backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    recon, posterior = model.tae(x, torch.Generator().manual_seed(0))
    tae.hinge(model.critic(x), model.critic(recon.detach())).backward()
    assert all(torch.allclose(got["critic." + k], p.grad, atol=1e-6)
               for k, p in model.critic.named_parameters())
    # at the last weight both terms of the generator have the norms that the weight promises
    last = model.tae.last_weight
    grad = lambda term: torch.autograd.grad(term, last, retain_graph=True)[0]
    rec, adv = grad((recon - x).abs().mean()), grad(-model.critic(recon).mean())
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


def test_perceptual_loss_is_a_callable_that_is_used():
    x, y = torch.rand(2, 1, 3, 2, 16, 16)
    calls = []
    loss = tae.reconstruction_loss(LossConfig(perceptual=0.5), x, y,
                                   lambda a, b: calls.append((a, b)) or torch.tensor(4.0))
    assert loss.item() == pytest.approx((x - y).abs().mean().item() + 2) and len(calls) == 1
    assert tae.reconstruction_loss(LossConfig(), x, y, lambda a, b: 1 / 0) == (x - y).abs().mean()


def test_outlier_penalty_is_a_phase():
    mean = torch.randn(1, 16, 1, 8, 8)
    mean[..., 0, 0] *= 9
    p, x = tae.Posterior(mean, torch.zeros_like(mean)), torch.zeros(1, 3, 1, 8, 8)
    cfg = LossConfig(opl=1.0, opl_start=10, kl=0.0)
    assert tae.tae_loss(cfg, x, x, p, step=9) == 0
    assert tae.tae_loss(cfg, x, x, p, step=10) == tae.outlier_penalty(mean) > 0
    assert tae.outlier_penalty(torch.randn(2, 2048)) == 0               # VidTwin's is no grid


def test_motion_curriculum():
    rng = random.Random(0)
    assert all(tae.motion_interval(rng, 0.0, 8) == 1 for _ in range(9))
    late = [tae.motion_interval(rng, 0.9, 8) for _ in range(500)]
    assert 1 <= min(late) < 2 and 7 < max(late) <= 8
    middle = [tae.motion_interval(rng, 0.375, 8) for _ in range(500)]
    assert max(middle) <= 4.5
    # bouncing: a slow clip is what it was, a fast one stays in the picture and moves further
    assert [tae.bounce(p, 0, 10) for p in (3, 10, 11, 19, 21, -2)] == [3, 10, 9, 1, 1, 2]
    thing = tae.Thing("white", "circle", "right", "fast", radius=0.17, x=0.3, y=0.5)
    slow, fast = (tae.render([tae.World((thing,))], interval=i)[0, 0] for i in (1.0, 6.0))
    area = (fast + 1).sum((1, 2))
    assert (area / area.mean() - 1).abs().max() < 0.03                  # nothing leaves
    assert torch.equal(fast[1], tae.render([tae.World((thing,))])[0, 0, 6])
    assert fast.diff(dim=0).abs().mean() > 2 * slow.diff(dim=0).abs().mean()


def psnr_of_one_clip(cfg, steps):
    """PSNR on one clip of an autoencoder trained on nothing else, before and after."""
    torch.manual_seed(0)
    model, x = tae.autoencoder(cfg), clips(1)
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    first = tae.psnr(model.eval()(x)[0], x).item()
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        recon, posterior = model(x)
        tae.tae_loss(LOSSES["toy"], x, recon, posterior).backward()
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
    cfg = replace(TINY, latent_channels=16, space=(2, 2, 1), time=(1, 1, 1))
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
            return tae.spot_ratio(mean).max().item(), quality

    train(start, offset, 0.0, 150)
    result = {}
    for opl in (0.0, 0.5):
        torch.manual_seed(1)
        planted = torch.nn.Parameter(offset.detach().clone())
        result[opl] = train(copy.deepcopy(start), planted, opl, 150)
    assert result[0.0][0] > 1.05 and result[0.5][0] < 1.02
    assert result[0.5][1] > result[0.0][1] - 0.5
