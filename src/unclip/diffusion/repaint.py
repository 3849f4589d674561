"""Inpainting by an unconditional model: RePaint (Lugmayr et al. 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.diffusion.gaussian import Denoiser, Prediction
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep


@dataclass
class RePaint:
    """The resampling schedule: after each ``jump_length`` steps of denoising, so many of noising, ``num_resamples`` times in all.

    Going back and forth lets the new part agree with the known one. The paper has 10 and 10 on 250 steps; num_resamples=1
    goes straight down.
    """

    jump_length: int = 5
    num_resamples: int = 4

    def __post_init__(self) -> None:
        if self.jump_length < 1 or self.num_resamples < 1:
            raise ValueError(
                f"repaint.jump_length={self.jump_length} and num_resamples={self.num_resamples} must be at least 1"
            )

    def moves(self, num_steps: int) -> list[bool]:
        """Denoise (True) or noise (False), in order: from pure noise to the data (the paper's app. B, figure 9).

        Every level that is a multiple of jump_length, but for the noisiest, is left upwards num_resamples - 1 times.
        """
        left = dict.fromkeys(range(0, num_steps - self.jump_length, self.jump_length), self.num_resamples - 1)
        found: list[bool] = []
        level = num_steps
        while level > 0:
            level -= 1
            found.append(True)
            if left.get(level, 0) > 0:
                left[level] -= 1
                found += [False] * self.jump_length
                level += self.jump_length
        return found


@torch.no_grad()
def repaint(
    denoiser: Denoiser,
    known: Tensor,
    mask: Tensor,
    noise: Noise,
    cfg: RePaint,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """(B, *denoiser.shape): ``known`` where ``mask`` (broadcast against it, bool) is False, drawn where it is True.

    Steps as in ancestral sampling, their noise times ``temperature``; before each, the known part is the noised truth of that
    level (algorithm 1).
    """
    schedule = denoiser.schedule.to(known.device)
    moves = cfg.moves(len(schedule))
    total, done = sum(moves), 0
    level = len(schedule)  # x_t is at step level - 1; level 0: the data
    x_t = noise.normal(denoiser.shape, "x_T")
    prediction: Prediction | None = None
    for number, denoise in enumerate(moves):
        drawn = noise.normal(denoiser.shape, f"move {number}")
        if not denoise:
            ratio = schedule.alpha[level] / schedule.alpha_prev[level]
            spread = (schedule.sigma[level] ** 2 - (ratio * schedule.sigma_prev[level]) ** 2).clamp(min=0).sqrt()
            x_t = ratio * x_t + spread * drawn
            level += 1
            continue
        step = level - 1
        prediction = denoiser(x_t, step, prediction)
        posterior = schedule.posterior(step, prediction.x0, x_t)
        log_var = posterior.log_var if prediction.log_var is None else prediction.log_var
        x_t, truth = posterior.mean, known.float()
        if step > 0:
            x_t = x_t + temperature * (0.5 * log_var).exp() * drawn
            truth = schedule.q_sample(step - 1, truth, noise.normal(denoiser.shape, f"known {number}"))
        x_t = torch.where(mask, x_t, truth)
        level, done = level - 1, done + 1
        if on_step is not None:
            on_step(done, total)
    return x_t
