"""An exact network: the best possible prediction for Gaussian data, in closed form."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, NoiseSchedule, Predict


@dataclass
class Means:
    """A context: the mean of each row's data."""

    mean: Tensor

    def first(self, count: int) -> "Means":
        return Means(self.mean[:count])


class ExactNet:
    """E[. | x_t] for data N(context.mean, std²), in any parametrisation; with the true reverse variance if it is learned."""

    def __init__(self, diffusion: GaussianDiffusion, std: float, schedule: NoiseSchedule | None = None) -> None:
        self.diffusion, self.std = diffusion, std
        self.schedule = schedule or diffusion.schedule  # the one whose steps a learned variance belongs to
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, timestep: Tensor, context: Means) -> Tensor:
        self.rows.append(len(x_t))
        step = torch.searchsorted(self.schedule.timesteps, timestep.contiguous())

        def at(table: Tensor) -> Tensor:
            return table[step].reshape(*step.shape, *(1,) * (x_t.ndim - step.ndim))

        mean = context.mean.reshape(-1, *(1,) * (x_t.ndim - 1))
        precision = self.std**-2 + at(self.schedule.snr)
        x0 = (mean * self.std**-2 + at(self.schedule.alpha / self.schedule.sigma**2) * x_t) / precision
        eps = self.schedule.eps_from_x0(step, x0, x_t)
        v = self.schedule.v_target(step, x0, eps)
        out = {Predict.x0: x0, Predict.eps: eps, Predict.v: v, Predict.flow: eps - x0}[self.diffusion.cfg.predict]
        if not self.diffusion.cfg.learned_variance:
            return out
        low, high = at(self.schedule.posterior_log_var), at(self.schedule.log_beta)
        best = (at(self.schedule.posterior_var) + at(self.schedule.posterior_x0) ** 2 / precision).log()
        return torch.cat([out, (2 * (best - low) / (high - low) - 1).expand_as(out)], dim=1)


@pytest.fixture
def exact_net() -> type[ExactNet]:
    return ExactNet


@pytest.fixture
def means() -> Callable[..., Means]:
    return lambda *values, rows: Means(torch.tensor(values).repeat_interleave(rows))
