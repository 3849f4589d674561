import math

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Guidance, Noise, Predict, Threshold, ancestral, ddim
from unclip.diffusion.guidance import dynamic_threshold

VP = [Predict.eps, Predict.x0, Predict.v]  # of the variance-preserving schedules


@pytest.mark.parametrize("predict", VP)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guided_gaussians_have_the_product_mean(predict, scale, exact_net, means):
    """Scores of N(1, 0.3²) and N(0.5, 0.3²), extrapolated, are the score of N(0.5 + scale 0.5, 0.3²)."""
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict))
    denoiser = diffusion.denoiser(
        exact_net(diffusion, 0.3), means(1.0, 0.5, rows=2000), shape=(8,), num_steps=100, guidance=Guidance(scale)
    )
    x = ddim(denoiser, Noise(range(2000)))
    assert_close(x.mean(), torch.tensor(0.5 + scale * 0.5), atol=0.02, rtol=0)
    assert_close(x.std(), torch.tensor(0.3), atol=0.02, rtol=0)


def test_guidance_is_the_same_for_every_parametrisation(exact_net, means):
    x_t, context = torch.linspace(-2, 2, 10).reshape(2, 5), means(1.0, -0.5, rows=2)
    guided = []
    for predict in VP:
        diffusion = GaussianDiffusion(DiffusionConfig(predict=predict))
        denoiser = diffusion.denoiser(
            exact_net(diffusion, 0.3), context, shape=(5,), num_steps=1000, guidance=Guidance(4.0)
        )
        guided.append(denoiser(x_t, 500).x0)
    assert_close(guided[0], guided[1])
    assert_close(guided[0], guided[2])


@pytest.mark.parametrize("learned", [False, True])
def test_scale_one_is_the_conditional_model(learned, exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=learned, clip_range=1.0))
    net, noise = exact_net(diffusion, 0.3), Noise(range(4))

    def run(context, guidance):
        return ancestral(diffusion.denoiser(net, context, shape=(6,), num_steps=20, guidance=guidance), noise)

    plain = run(means(0.5, rows=4), None)
    assert torch.equal(run(means(0.5, -0.5, rows=4), Guidance(1.0)), plain)
    assert_close(run(means(0.5, -0.5, rows=4), Guidance(1.0 + 1e-6)), plain, atol=1e-4, rtol=0)
    assert not torch.allclose(run(means(0.5, -0.5, rows=4), Guidance(2.0)), plain, atol=0.1)


def test_one_forward_per_step(exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig())
    net = exact_net(diffusion, 0.3)
    ddim(
        diffusion.denoiser(net, means(0.5, 0.0, rows=4), shape=(6,), num_steps=10, guidance=Guidance(2.0)),
        Noise(range(4)),
    )
    assert net.rows == [8] * 10


def test_interval_leaves_out_the_unconditional_half(exact_net, means):
    """11 steps stand at the fractions 1.0, 0.9, ... 0.0: the interval [0.25, 0.75] holds 0.7 ... 0.3."""
    diffusion = GaussianDiffusion(DiffusionConfig())
    net, guidance = exact_net(diffusion, 0.3), Guidance(2.0, interval=(0.25, 0.75))
    denoiser = diffusion.denoiser(net, means(0.5, 0.0, rows=4), shape=(6,), num_steps=11, guidance=guidance)
    ddim(denoiser, Noise(range(4)))
    assert net.rows == [4] * 3 + [8] * 5 + [4] * 3


def test_full_interval_is_no_interval(exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig())
    x = []
    for interval in (None, (0.0, 1.0)):
        denoiser = diffusion.denoiser(
            exact_net(diffusion, 0.3),
            means(0.5, 0.0, rows=2),
            shape=(6,),
            num_steps=8,
            guidance=Guidance(3.0, interval=interval),
        )
        x.append(ddim(denoiser, Noise([1, 2])))
    assert torch.equal(x[0], x[1])


def test_variance_comes_from_the_conditional_branch():
    """A network whose variance channels say 1 for conditional rows and -1 for null ones: the result is log beta."""
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=True, clip_range=1.0))

    class Rows:
        def first(self, count):
            return self

    def net(x_t, timestep, context):
        sign = torch.ones_like(x_t)
        sign[len(x_t) // 2 :] = -1
        return torch.cat([x_t, sign], dim=1)

    denoiser = diffusion.denoiser(net, Rows(), shape=(3, 2, 2), num_steps=50, guidance=Guidance(3.0))
    log_var = denoiser(torch.zeros(2, 3, 2, 2), 20).log_var
    assert log_var.shape == (2, 3, 2, 2)
    assert_close(log_var, denoiser.schedule.log_beta[20].expand_as(log_var))


def test_rescale_restores_the_conditional_spread():
    generator = torch.manual_seed(0)
    cond, null = torch.randn(3, 4, 5, 5, generator=generator), torch.randn(3, 4, 5, 5, generator=generator)
    plain = Guidance(5.0).combine(cond, null)
    full = Guidance(5.0, rescale=1.0).combine(cond, null)
    assert (plain.flatten(1).std(1) > 4 * cond.flatten(1).std(1)).all()
    assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    assert_close(Guidance(5.0, rescale=0.7).combine(cond, null), 0.7 * full + 0.3 * plain)


def test_static_threshold_clamps():
    x0 = torch.tensor([[-3.0, 0.5, 1.5]])
    assert_close(Guidance().limit(x0, 1.0), torch.tensor([[-1.0, 0.5, 1.0]]))
    assert torch.equal(Guidance().limit(x0, None), x0)
    assert torch.equal(Guidance(threshold=Threshold.none).limit(x0, 1.0), x0)


def test_dynamic_threshold_is_imagens():
    """One sample in range (untouched), one with 1000 values up to 4: its 995th largest magnitude becomes 1."""
    inside, outside = torch.linspace(-1, 1, 1000), torch.arange(1, 1001) * 0.004
    limited = dynamic_threshold(torch.stack([inside, -outside]), 1.0, 1)
    assert torch.equal(limited[0], inside)
    assert_close(limited[1], -(outside.clamp(max=3.98) / 3.98))


def test_dynamic_threshold_needs_a_range(exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig())
    with pytest.raises(ValueError, match="clip_range"):
        diffusion.denoiser(
            exact_net(diffusion, 0.3),
            means(0.0, rows=1),
            shape=(4,),
            num_steps=5,
            guidance=Guidance(threshold=Threshold.dynamic),
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"rescale": 1.5},
        {"interval": (0.8, 0.2)},
        {"interval": (0, 2)},
        {"interval": (0.5,)},
        {"scale": -0.5},
        {"scale": math.nan},
        {"scale": math.inf},
    ],
)
def test_impossible_guidance_is_refused(bad):
    with pytest.raises(ValueError, match=rf"guidance\.{next(iter(bad))} is"):
        Guidance(**bad)


def test_a_negative_scale_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"at least 0: 1 is the plain conditional model.*give it as the negative one"):
        Guidance(-1.0)


def test_candidates_share_neither_spread_nor_range():
    """(B, K, D) with one-dimensional samples: what is done to a candidate does not depend on the other one."""
    generator = torch.manual_seed(0)
    cond, null = torch.randn(2, 3, 50, generator=generator), torch.randn(2, 3, 50, generator=generator)
    guidance = Guidance(5.0, rescale=1.0, threshold=Threshold.dynamic)
    guided, limited = guidance.combine(cond, null, 1), guidance.limit(3 * cond, 1.0, 1)
    assert_close(guided.std(-1), cond.std(-1))
    assert_close(limited.abs().amax(-1), torch.ones(2, 3))
    assert_close(guidance.combine(cond[:, 1], null[:, 1]), guided[:, 1])
    assert_close(guidance.limit(3 * cond[:, 1], 1.0), limited[:, 1])
