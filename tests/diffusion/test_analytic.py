"""Analytic variances and self-conditioning, on exact networks."""

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Noise, Predict, ScheduleName, ancestral
from unclip.diffusion.gaussian import STEPS_AT_ONCE, NetBranches

MEAN, STD = 1.5, 0.3


def true_variance(diffusion):
    """Var[x0 | x_t] of N(MEAN, STD²)."""
    return 1 / (STD**-2 + diffusion.schedule.snr)


def sampled(diffusion, net, context, num_steps, x0_var):
    schedule = diffusion.schedule.respaced(num_steps)
    branches = NetBranches(net, context, schedule)
    return ancestral(diffusion.denoiser_of(branches, schedule, shape=(16,), x0_var=x0_var), Noise(range(1000)))


@pytest.mark.parametrize("schedule", list(ScheduleName))
@pytest.mark.parametrize("num_steps", [2, 5, 27])
def test_few_steps_have_the_right_spread(schedule, num_steps, exact_net, means):
    """The exact variance makes every step exact, in any subsequence; the last one, to x0, has none: it loses its part."""
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=schedule, predict=Predict.x0))
    net, context = exact_net(diffusion, STD), means(MEAN, rows=1000)
    x = sampled(diffusion, net, context, num_steps, true_variance(diffusion))
    lost = true_variance(diffusion)[0]
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.01, rtol=0)
    assert_close(x.std(), (STD**2 - lost).sqrt(), atol=0.01, rtol=0)
    if num_steps == 5:
        assert sampled(diffusion, net, context, num_steps, None).std() < STD - 0.05


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_the_mean_square_of_eps_gives_the_variance_of_x0(schedule, exact_net, means):
    """Bao et al. 2022, theorem 1: Var[x0 | x_t] = (1 - E eps²) sigma² / alpha², here for steps that are not all noise."""
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=schedule, num_timesteps=60, predict=Predict.x0))
    noise = Noise(range(2000))
    squares = diffusion.eps_squares(
        exact_net(diffusion, STD), MEAN + STD * noise.normal((16,), "data"), means(MEAN, rows=2000), noise
    )
    assert squares.shape == (2000, 60)
    clean = diffusion.schedule.snr > 0.3
    found = (1 - squares.mean(0)) / diffusion.schedule.snr
    error = squares.std(0) / 2000**0.5 / diffusion.schedule.snr
    assert ((found - true_variance(diffusion)).abs() < 5 * error + 1e-6)[clean].all()


def test_measures_are_of_the_network_as_sampling_uses_it(means):
    """With self-conditioning it sees its own first prediction: this net answers 1 to nothing and the truth, 3, to that 1."""
    diffusion = GaussianDiffusion(DiffusionConfig(predict=Predict.x0, self_conditioning=True, num_timesteps=4))

    def net(x_t, timestep, context, x0_last=None):
        assert x0_last is not None
        return 1 + 2 * x0_last

    x0, noise = torch.full((2, 5), 3.0), Noise([0, 1])
    assert_close(diffusion.errors_at(net, x0, means(0.0, rows=2), noise, [1, 3]), torch.zeros(2, 2))
    squares = diffusion.eps_squares(net, x0, means(0.0, rows=2), noise)
    true = noise.normal((4, 5), f"eps of {STEPS_AT_ONCE} steps, part 0").square().mean(-1)
    assert_close(squares, true, atol=1e-3, rtol=1e-3)


def test_the_network_sees_its_last_prediction_every_other_time():
    diffusion = GaussianDiffusion(DiffusionConfig(predict=Predict.x0, self_conditioning=True))
    seen = []

    def net(x_t, timestep, context, x0_last):
        seen.append((x0_last, torch.is_grad_enabled()))
        return torch.full_like(x_t, float(len(seen)))

    diffusion.losses(net, torch.zeros(1000, 3), None, Noise.at(0, range(1000)))
    (first, grad_first), (second, grad_second) = seen
    assert (grad_first, grad_second) == (False, True)
    assert (first == 0).all()
    assert ((second == 1).all(1) | (second == 0).all(1)).all()
    assert 400 < (second == 1).all(1).sum() < 600


def test_sampling_hands_the_last_prediction_on(means):
    diffusion = GaussianDiffusion(DiffusionConfig(predict=Predict.x0, self_conditioning=True))
    seen = []

    def net(x_t, timestep, context, x0_last):
        seen.append(x0_last)
        return torch.full_like(x_t, float(len(seen)))

    ancestral(diffusion.denoiser(net, means(0.0, rows=2), shape=(3,), num_steps=4), Noise([0, 1]))
    assert [float(x.mean()) for x in seen] == [0, 1, 2, 3]
