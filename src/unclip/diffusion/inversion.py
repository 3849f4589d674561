"""DDIM inversion: the noise x_T from which a deterministic sampler draws a given sample again."""

import torch
from torch import Tensor

from unclip.diffusion.gaussian import Denoiser
from unclip.diffusion.samplers import OnStep


@torch.no_grad()
def ddim_invert(denoiser: Denoiser, x0: Tensor, *, refinements: int = 1, on_step: OnStep | None = None) -> Tensor:
    """x_T (B, *denoiser.shape) of x0, such that `ddim` with eta = 0 leads back to it (Dhariwal & Nichol 2021, app. F).

    ddim goes from x_t to x_{t-1} = alpha' / alpha x_t - c alpha' / alpha eps(x_t), c = sigma - alpha sigma' / alpha'. This
    solves each of its steps for x_t = alpha / alpha' x_{t-1} + c eps(x_t), by ``refinements`` iterations that begin with
    the eps of the step before (Pan et al. 2023, sec. 3.2). ``refinements`` · len(schedule) evaluations of the network.
    With guidance, eps is the guided one, so that sampling must be guided likewise.
    """
    if refinements < 1:
        raise ValueError(f"refinements is {refinements}; each step needs at least one evaluation")
    schedule = denoiser.schedule
    blind = [bool(alpha == 0) for alpha in schedule.alpha.cpu()]  # at zero SNR, eps says nothing that x_t does not
    schedule = schedule.to(x0.device)
    x_t, eps = x0.float(), torch.zeros_like(x0, dtype=torch.float32)
    for step in range(len(schedule)):
        ratio = schedule.alpha[step] / schedule.alpha_prev[step]
        rest = schedule.sigma[step] - ratio * schedule.sigma_prev[step]
        before = x_t
        x_t = ratio * before + rest * eps
        for number in range(refinements):
            if not blind[step]:
                eps = schedule.eps_from_x0(step, denoiser(x_t, step).x0, x_t)
                x_t = ratio * before + rest * eps
            if on_step is not None:
                on_step(step * refinements + number + 1, len(schedule) * refinements)
    return x_t
