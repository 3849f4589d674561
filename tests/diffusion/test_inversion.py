"""DDIM inversion against closed forms."""

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Noise, Predict, Prediction, ScheduleName, ddim
from unclip.diffusion.inversion import ddim_invert

MEAN, STD, D = 0.4, 0.6, 8


class Gaussian:
    """The exact denoiser of N(MEAN, STD²)."""

    def __init__(self, num_steps: int, schedule: ScheduleName = ScheduleName.cosine):
        predict = Predict.flow if schedule is ScheduleName.flow else Predict.v
        cfg = DiffusionConfig(schedule=schedule, predict=predict)
        self.schedule, self.shape = GaussianDiffusion(cfg).schedule.respaced(num_steps), (D,)

    def __call__(self, x_t, step, last=None):
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + gain * (x_t - alpha * MEAN))


class Points(Gaussian):
    """The exact denoiser of data that are one of a few points, blurred: far from linear."""

    def __init__(self, num_steps: int):
        super().__init__(num_steps)
        self.points = torch.randn(6, D, generator=torch.Generator().manual_seed(0))

    def __call__(self, x_t, step, last=None):
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        var = (0.2 * alpha) ** 2 + sigma**2
        share = (-((x_t[:, None] - alpha * self.points) ** 2).sum(-1) / (2 * var)).softmax(dim=1)
        gain = alpha * 0.2**2 / var
        near = self.points + gain * (x_t[:, None] - alpha * self.points)
        return Prediction((share[..., None] * near).sum(1))


def error(denoiser, x0, **arguments) -> float:
    again = ddim(denoiser, Noise(range(len(x0))), x_T=ddim_invert(denoiser, x0, **arguments))
    return float((again - x0).square().mean().sqrt())


def test_inverted_noise_is_the_probability_flow_of_a_gaussian():
    x0 = MEAN + STD * torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    denoiser = Gaussian(500)
    alpha, sigma = denoiser.schedule.alpha[-1], denoiser.schedule.sigma[-1]
    exact = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * (x0 - MEAN) / STD
    assert_close(ddim_invert(denoiser, x0), exact, atol=0.02, rtol=0)


def test_more_steps_reconstruct_better():
    centres = Points(10).points
    x0 = centres + 0.2 * torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    errors = [error(Points(n), x0) for n in (10, 25, 100, 400)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.02
    other = ddim(Points(100), Noise(range(6)))
    assert (other - x0).square().mean().sqrt() > 10 * errors[2], "another x_T gives another sample"


def test_a_second_refinement_reconstructs_better():
    x0 = MEAN + STD * torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    assert error(Gaussian(20), x0, refinements=2) < 0.5 * error(Gaussian(20), x0)


@pytest.mark.parametrize("schedule", [ScheduleName.cosine_zero_snr, ScheduleName.flow, ScheduleName.linear])
def test_every_schedule_can_be_inverted(schedule: ScheduleName):
    x0 = MEAN + STD * torch.randn(4, D, generator=torch.Generator().manual_seed(4))
    assert error(Gaussian(100, schedule), x0) < 0.05


def test_each_evaluation_is_counted():
    steps = []
    ddim_invert(Gaussian(5), torch.zeros(1, D), refinements=2, on_step=lambda *step: steps.append(step))
    assert steps == [(done, 10) for done in range(1, 11)]
    with pytest.raises(ValueError, match="refinements is 0; each step needs at least one evaluation"):
        ddim_invert(Gaussian(5), torch.zeros(1, D), refinements=0)
