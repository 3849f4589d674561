"""RePaint against the conditional distribution of a Gaussian."""

import pytest
import torch

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Noise, Prediction
from unclip.diffusion.repaint import RePaint, repaint

RHO = 0.9


class Pair:
    """The exact denoiser of two standard normals with correlation RHO."""

    def __init__(self, num_steps: int):
        self.schedule, self.shape = GaussianDiffusion(DiffusionConfig()).schedule.respaced(num_steps), (2,)

    def __call__(self, x_t, step, last=None):
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]])
        return Prediction(x_t @ torch.linalg.solve(alpha**2 * covariance + sigma**2 * torch.eye(2), alpha * covariance))


def mean_of_the_other(cfg: RePaint) -> tuple[float, int]:
    known, mask = torch.tensor([[1.5, -7.0]]).expand(4000, 2), torch.tensor([False, True])
    steps = []
    x = repaint(Pair(40), known, mask, Noise(range(4000)), cfg, on_step=lambda *step: steps.append(step))
    assert torch.equal(x[:, 0], known[:, 0])
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    return float(x[:, 1].mean()), len(steps)


def test_the_moves_are_those_of_the_schedule():
    down, up = True, False
    assert RePaint(1, 1).moves(3) == [down] * 3
    assert RePaint(2, 2).moves(4) == [down, down, down, down, up, up, down, down]
    again = [up, up, down, down]
    assert RePaint(2, 3).moves(6) == [*[down] * 4, *again, *again, down, down, *again, *again]


def test_resampling_finds_the_conditional_mean():
    straight, evaluations = mean_of_the_other(RePaint(4, 1))
    assert evaluations == 40
    resampled, more = mean_of_the_other(RePaint(4, 10))
    assert more == 40 + 9 * 9 * 4
    assert abs(resampled - RHO * 1.5) < 0.1
    assert abs(straight - RHO * 1.5) > 2 * abs(resampled - RHO * 1.5)


def test_a_low_temperature_adds_less_noise():
    known, mask = torch.tensor([[1.5, -7.0]]).expand(2000, 2), torch.tensor([False, True])
    spreads = [
        float(repaint(Pair(40), known, mask, Noise(range(2000)), RePaint(4, 10), temperature=t)[:, 1].std())
        for t in (1.0, 0.5, 0.0)
    ]
    assert abs(spreads[0] - (1 - RHO**2) ** 0.5) < 0.1
    assert spreads[0] > 1.1 * spreads[1] > 1.1 * spreads[2]  # the noise of the known part stays


def test_a_schedule_without_moves_is_refused():
    with pytest.raises(ValueError, match=r"repaint.jump_length=0 and num_resamples=4 must be at least 1"):
        RePaint(jump_length=0)
