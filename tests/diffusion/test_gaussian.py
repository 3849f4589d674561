import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Noise, Predict, ScheduleName, Timesteps, Weighting
from unclip.diffusion.bound import gaussian_kl, pixel_log_likelihood, variational_bound

VP = [Predict.eps, Predict.x0, Predict.v]  # of the variance-preserving schedules
MEAN, STD = 0.2, 0.3


def data(noise, shape=(16,)):
    return MEAN + STD * noise.normal(shape, "data")


def average(diffusion, net, means, term="mse", **options):
    """The loss's mean over 24 batches of 256, and its standard error."""
    values = []
    for batch in range(24):
        noise = Noise.at(0, range(256 * batch, 256 * (batch + 1)))
        values.append(diffusion.losses(net, data(noise), means(MEAN, rows=256), noise, **options)[term])
    values = torch.stack(values)
    return values.mean(), values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("weighting", [Weighting.simple, Weighting.min_snr])
@pytest.mark.parametrize("predict", VP)
def test_several_draws_have_the_loss_of_one(predict, weighting, exact_net, means):
    """Var[x0 | x_t] = 1 / (1/s² + SNR); an error in eps is SNR times, one in v is 1 / sigma² times the one in x0."""
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict, weighting=weighting))
    schedule = diffusion.schedule
    snr = schedule.snr.double()
    scale = {Predict.x0: torch.ones_like(snr), Predict.eps: snr, Predict.v: 1 / schedule.sigma.double() ** 2}[predict]
    weight = scale if weighting is Weighting.simple else snr.clamp(max=5)
    expected = (weight / (STD**-2 + snr)).mean()
    mean, error = average(diffusion, exact_net(diffusion, STD), means, num_draws=4)
    assert error < 0.05 * expected
    assert abs(mean - expected) < 3 * error


@pytest.mark.parametrize("predict", [Predict.eps, Predict.x0, Predict.v])
def test_errors_at_given_steps_are_the_posterior_variances_there(predict, exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict))
    steps = [50, 500, 950]
    noise = Noise.at(0, range(2000))
    errors = diffusion.errors_at(exact_net(diffusion, STD), data(noise), means(MEAN, rows=2000), noise, steps)
    assert errors.shape == (2000, 3)
    assert_close(errors.mean(0), 1 / (STD**-2 + diffusion.schedule.snr[steps]), rtol=0.03, atol=0)


def test_a_worse_network_has_a_larger_loss(exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(predict=Predict.x0))
    best, error = average(diffusion, exact_net(diffusion, STD), means)
    worse, _ = average(diffusion, exact_net(diffusion, 2 * STD), means)
    assert worse > best + 5 * error


@pytest.mark.parametrize(
    ("predict", "schedule"),
    [*((predict, name) for predict in VP for name in ("cosine", "linear")), *((p, "cosine_zero_snr") for p in VP[1:])],
)
def test_bound_at_the_optimum_is_the_gap_between_the_variances(predict, schedule, exact_net, means):
    """With the true reverse variance v* = beta~ + c² Var[x0 | x_t], the mean KL is log(v* / beta~) / 2."""
    cfg = DiffusionConfig(ScheduleName(schedule), predict=predict, learned_variance=True, clip_range=1.0)
    diffusion = GaussianDiffusion(cfg)
    net, schedule = exact_net(diffusion, STD), diffusion.schedule
    for t in (1, 10, 300, 700, 990):
        noise = Noise.at(t, range(4096))
        step = torch.full((4096,), t)
        x0 = data(noise)
        x_t = schedule.q_sample(step, x0, noise.normal((16,), "eps"))
        output, fraction = diffusion.split(net(x_t, step, means(MEAN, rows=4096)))
        x0_pred, log_var = diffusion.to_x0(schedule, step, output, x_t), schedule.interpolated_log_var(step, fraction)
        bound = variational_bound(schedule, step, x0, x_t, x0_pred, log_var)
        true = schedule.posterior_var[t] + schedule.posterior_x0[t] ** 2 / (STD**-2 + schedule.snr[t])
        expected = 0.5 * (true / schedule.posterior_var[t]).log2()
        assert bound.shape == (4096,)
        assert abs(bound.mean() - expected) < 3 * bound.std() / 64 + 2e-5


def test_true_variance_minimises_the_bound(exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=True, clip_range=1.0))
    net = exact_net(diffusion, STD)

    def shifted(delta):
        def forward(x_t, timestep, context):
            eps, v = net(x_t, timestep, context).chunk(2, dim=1)
            return torch.cat([eps, v + delta], dim=1)

        return average(diffusion, forward, means, "vlb")[0]

    best = shifted(0.0)
    assert shifted(0.2) > best
    assert shifted(-0.2) > best


def test_hybrid_loss_is_mse_plus_a_thousandth_of_the_whole_bound(exact_net, means):
    """Nichol & Dhariwal 2021, eq. 16: the bound sums over T steps, a draw stands for one of them."""
    for T in (100, 1000):
        cfg = DiffusionConfig(num_timesteps=T, learned_variance=True, clip_range=1.0)
        diffusion = GaussianDiffusion(cfg)
        net, noise, schedule = exact_net(diffusion, STD), Noise.at(0, range(64)), diffusion.schedule
        x0 = data(noise).clamp(-1, 1)
        terms = diffusion.losses(net, x0, means(MEAN, rows=64), noise)
        step = diffusion.draw_steps(noise)
        x_t = schedule.q_sample(step, x0, noise.normal((16,), "eps"))
        eps, fraction = diffusion.split(net(x_t, step, means(MEAN, rows=64)))
        x0_pred, log_var = schedule.x0_from_eps(step, eps, x_t), schedule.interpolated_log_var(step, fraction)
        bound = variational_bound(schedule, step, x0, x_t, x0_pred, log_var)
        assert set(terms) == {"mse", "vlb"}
        assert_close(terms["vlb"], bound.mean() * T / 1000)


def test_bound_trains_the_variance_only_and_stays_finite():
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=True, clip_range=1.0))
    output = torch.full((1000, 6, 2, 2), 3.0, requires_grad=True)
    noise = Noise.at(0, range(1000))
    terms = diffusion.losses(lambda x, t, c: output, noise.uniform((3, 2, 2), "x") * 2 - 1, None, noise)
    terms["vlb"].backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert (output.grad[:, :3] == 0).all()
    assert (output.grad[:, 3:] != 0).any()


@pytest.mark.parametrize("learned", [False, True])
def test_autocast_outputs_are_scored_in_float32(learned):
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=learned, clip_range=1.0))
    linear, noise = torch.nn.Linear(4, 8 if learned else 4), Noise.at(0, range(8))
    with torch.autocast("cpu", torch.bfloat16):
        terms = diffusion.losses(lambda x, t, c: linear(x), torch.zeros(8, 4), None, noise)
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_the_bound_of_an_output_in_bfloat16_is_that_of_the_same_numbers_in_float32():
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=True, clip_range=1.0))
    noise = Noise.at(0, range(64))
    output = noise.normal((6, 4, 4), "output").bfloat16()
    x0 = noise.uniform((3, 4, 4), "x") * 2 - 1
    half, full = (diffusion.losses(lambda x, t, c, o=o: o, x0, None, noise) for o in (output, output.float()))
    for name, value in full.items():
        assert_close(half[name], value, rtol=1e-6, atol=0)


def test_kl_is_the_closed_form():
    generator = torch.manual_seed(0)
    mean_q, log_var_q, mean_p, log_var_p = torch.randn(4, 100, generator=generator)
    q, p = Normal(mean_q, (0.5 * log_var_q).exp()), Normal(mean_p, (0.5 * log_var_p).exp())
    assert_close(gaussian_kl(mean_q, log_var_q, mean_p, log_var_p), kl_divergence(q, p), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.02), (-1.2, 0.1), (1.3, 0.5), (0.0, 0.001)])
def test_pixel_likelihood_is_a_distribution_over_256_levels(mean, std):
    levels = torch.arange(256) / 127.5 - 1
    log_p = pixel_log_likelihood(levels, torch.full((256,), mean), torch.full((256,), 2 * math.log(std)))
    assert_close(log_p.exp().sum(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert abs(levels[log_p.argmax()] - max(-1, min(1, mean))) < 1 / 127


def test_pixel_likelihood_is_the_density_times_the_width_where_it_is_smooth():
    x, mean, std = torch.tensor([10 / 127.5 - 1 + 0.5]), torch.tensor([-0.3]), torch.tensor([0.3])
    expected = Normal(mean, std).log_prob(x) + math.log(2 / 255)
    assert_close(pixel_log_likelihood(x, mean, 2 * std.log()), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("timesteps", [Timesteps.uniform, Timesteps.low_discrepancy])
def test_steps_cover_the_schedule_uniformly(timesteps):
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=10, timesteps=timesteps))
    counts = diffusion.draw_steps(Noise.at(0, range(20000))).bincount(minlength=10)
    spread = (counts - 2000).abs().max()
    assert len(counts) == 10
    assert spread < (4 * math.sqrt(1800) if timesteps is Timesteps.uniform else 10)


def test_draws_have_their_own_steps_and_noise():
    diffusion = GaussianDiffusion(DiffusionConfig(predict=Predict.x0))
    seen = {}

    def net(x_t, timestep, context):
        seen.update(x_t=x_t, timestep=timestep)
        return torch.zeros_like(x_t)

    x0 = torch.arange(2.0)[:, None].expand(2, 3)
    terms = diffusion.losses(net, x0, None, Noise.at(0, [0, 1]), num_draws=4)
    assert seen["x_t"].shape == (2, 4, 3)
    assert seen["timestep"].shape == (2, 4)
    assert len(seen["timestep"].unique()) == 8
    assert_close(terms["mse"], torch.tensor(0.5))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"learned_variance": True}, "clip_range=1.0"),
        ({"learned_variance": True, "clip_range": 5.0}, "learned_variance=false"),
        ({"clip_range": -1.0}, "1.0 for pictures"),
        ({"num_timesteps": 0}, "usually 1000"),
        ({"resolution": 0}, "or null for no shift"),
    ],
)
def test_contradicting_settings_are_refused_with_advice(settings, advice):
    with pytest.raises(ValueError, match=advice):
        DiffusionConfig(**settings)


def test_draws_with_learned_variances_are_refused():
    diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=True, clip_range=1.0))
    with pytest.raises(ValueError, match="num_draws"):
        diffusion.losses(lambda x, t, c: x, torch.zeros(2, 3), None, Noise.at(0, [0, 1]), num_draws=2)
