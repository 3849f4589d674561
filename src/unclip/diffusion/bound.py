"""The variational bound of a diffusion model, which trains learned variances."""

import math

import torch
from torch import Tensor

from unclip.diffusion.schedule import NoiseSchedule


def variational_bound(
    schedule: NoiseSchedule, step: Tensor, x0: Tensor, x_t: Tensor, x0_pred: Tensor, log_var: Tensor
) -> Tensor:
    """(B,) one term of the variational bound, in bits per dimension (Ho et al. 2020, eq. 5), computed in float32.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at step 0 -log p(x0 | x_1), with x0 8-bit pixels in [-1, 1].
    """
    true = schedule.posterior(step, x0, x_t)
    mean = schedule.posterior(step, x0_pred, x_t).mean
    kl = gaussian_kl(true.mean, true.log_var, mean, log_var).flatten(1).mean(1)
    nll = -pixel_log_likelihood(x0, mean, log_var).flatten(1).mean(1)
    return torch.where(step == 0, nll, kl) / math.log(2)


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(N(mean_q, e^log_var_q) || N(mean_p, e^log_var_p)) of each element, in nats."""
    spread = log_var_p - log_var_q + (log_var_q - log_var_p).exp() - 1
    return 0.5 * (spread + (mean_q - mean_p) ** 2 * (-log_var_p).exp())


def pixel_log_likelihood(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Nats: log N(mean, e^log_var) of the 2/255 wide bin around each 8-bit pixel x in [-1, 1] (Ho et al. 2020, eq. 13).

    The outermost bins reach to infinity. Below 1e-12 the probability counts as 1e-12.
    """
    inverse_std = (-0.5 * log_var).exp()
    upper = (x - mean + 1 / 255) * inverse_std
    lower = (x - mean - 1 / 255) * inverse_std
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    floor = math.log(1e-12)
    darkest = torch.special.log_ndtr(upper).clamp(min=floor)
    brightest = torch.special.log_ndtr(-lower).clamp(min=floor)
    return torch.where(x < -0.999, darkest, torch.where(x > 0.999, brightest, inside))
