"""tae.py: the toy world, inflation, symmetry in time, losses and measures."""
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tae
from tae import PRESETS, TAE, TAEConfig, inflate

TINY = TAEConfig(channels=8, mult=(1, 2, 2, 2), res_blocks=(1, 1, 1, 1), extra=0, latent_channels=4)


def clips(n, seed=0, T=16, H=32, **kwargs):
    rng = random.Random(seed)
    return tae.render([tae.sample_world(rng, **kwargs) for _ in range(n)], T, H)


def randomise_time(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".temporal." in name or ".time." in name or p.ndim == 3:
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


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 15, 16, 17, 33])
def test_any_number_of_frames(T):
    model = TAE(TINY).eval()
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
    with pytest.raises(ValueError, match="not one of"):
        TAE(replace(TINY, variant="4d"))
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


def test_static_in_static_out_with_random_time():
    torch.manual_seed(1)
    model = randomise_time(TAE(TINY)).eval()
    x = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 24, -1, -1)
    with torch.no_grad():
        y = model(x)[0]
    assert y.std() > 0.01
    assert (y - y[:, :, :1]).abs().max() < 1e-4
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


def test_every_parameter_has_a_gradient_in_both_kinds_of_batch():
    torch.manual_seed(3)
    model = randomise_time(TAE(TINY))
    for T in (1, 16):
        model.zero_grad()
        recon, posterior = model(torch.randn(1, 3, T, 16, 16))
        tae.tae_loss(TINY, torch.zeros_like(recon), recon, posterior).backward()
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
    want = (e - 3 * f(x).std(1).norm()).clamp_min(0).mean() / 6           # one of B T = 6 frames
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
    m, s = z.mean((-2, -1), keepdim=True), z.std((-2, -1), keepdim=True).norm(dim=1)
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
    model.lat_mean[:], model.lat_std[:] = tae.latent_stats(posteriors)
    g = torch.Generator().manual_seed(0)
    z = model.normalize(torch.cat([p.sample(g) for p in posteriors]))
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.03
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.03
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-5)


def test_sample_depends_on_the_generator_alone():
    p = tae.Posterior(torch.zeros(2, 3), torch.zeros(2, 3))
    draw = lambda s: p.sample(torch.Generator().manual_seed(s))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.slow
def test_learns_one_clip():
    torch.manual_seed(0)
    cfg, x = PRESETS["toy"], clips(1)
    model = TAE(cfg)
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    with torch.no_grad():
        first = tae.psnr(model.eval()(x)[0], x).item()
    model.train()
    for _ in range(200):
        opt.zero_grad()
        recon, posterior = model(x)
        tae.tae_loss(cfg, x, recon, posterior).backward()
        opt.step()
    with torch.no_grad():
        assert tae.psnr(model.eval()(x)[0], x).item() > first + 8
