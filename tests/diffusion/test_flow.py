"""Flow matching: the straight line x_t = (1 - t) x0 + t eps, in the same code as the variance-preserving processes."""

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    Noise,
    Predict,
    ScheduleName,
    ancestral,
    ddim,
    dpmpp_2m,
    heun,
    make_schedule,
    unipc,
)

MEAN, STD = 1.5, 0.3
SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "ddim eta=1": lambda denoiser, noise: ddim(denoiser, noise, eta=1.0),
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "heun": heun,
}


def flow(predict=Predict.flow, **options):
    return GaussianDiffusion(DiffusionConfig(schedule=ScheduleName.flow, predict=predict, **options))


def test_the_path_is_a_straight_line_that_ends_in_pure_noise():
    schedule = make_schedule("flow", 1000)
    assert_close(schedule.alpha + schedule.sigma, torch.ones(1000))
    assert_close(schedule.sigma, torch.arange(1, 1001) / 1000)
    assert schedule.alpha[-1] == 0
    assert torch.equal(schedule.sigma_prev[1:], schedule.sigma[:-1])
    assert schedule.sigma_prev[0] == 0


@pytest.mark.parametrize("count", [1000, 40])
def test_posterior_is_bayes_rule(count):
    """q(x_{t-1} | x_t, x0), from N(x_{t-1}; a' x0, s'²) and N(x_t; (a/a') x_{t-1}, s² - (a/a')² s'²)."""
    schedule = make_schedule("flow", 1000).respaced(count)
    t = (schedule.timesteps.double() + 1) / 1000
    before, after = t[:-1, None], t[1:, None]
    ratio, var = (1 - after) / (1 - before), after**2 - ((1 - after) / (1 - before) * before) ** 2
    step = torch.arange(1, count)
    x0, x_t = torch.linspace(-2, 2, count - 1)[:, None], torch.linspace(3, -1, count - 1)[:, None]
    precision = 1 / before**2 + ratio**2 / var
    mean = ((1 - before) * x0 / before**2 + ratio * x_t / var) / precision
    posterior = schedule.posterior(step, x0, x_t)
    assert_close(posterior.mean, mean.float(), atol=1e-5, rtol=1e-4)
    assert_close(posterior.var, (1 / precision).float(), atol=1e-9, rtol=1e-4)
    assert_close(schedule.beta[1:, None], var.float(), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("predict", [Predict.flow, Predict.x0])
def test_samples_have_the_mean_and_spread_of_the_data(name, predict, exact_net, means):
    diffusion = flow(predict)
    denoiser = diffusion.denoiser(exact_net(diffusion, STD), means(MEAN, rows=1000), shape=(16,), num_steps=250)
    x = SAMPLERS[name](denoiser, Noise(range(1000)))
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.02, rtol=0)
    assert_close(x.std(), torch.tensor(STD), atol=0.02, rtol=0)


def test_ddim_without_noise_is_eulers_method(exact_net, means):
    """x_{t - h} = x_t - h u (Liu et al. 2023, eq. 5)."""
    diffusion = flow()
    net, context = exact_net(diffusion, STD), means(MEAN, rows=4)
    denoiser = diffusion.denoiser(net, context, shape=(3,), num_steps=10)
    x = x_T = Noise(range(4)).normal((3,), "x_T")
    times = [(t + 1) / 1000 for t in denoiser.schedule.timesteps.tolist()]
    for step in reversed(range(10)):
        u = net(x, denoiser.schedule.timesteps[step].expand(4), context)
        x = x - (times[step] - (times[step - 1] if step else 0)) * u
    assert_close(ddim(denoiser, Noise(range(4)), x_T=x_T), x, atol=1e-5, rtol=0)
