"""Samplers: functions from a denoiser and a noise to samples."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from unclip.diffusion.gaussian import Denoiser, Prediction
from unclip.diffusion.noise import Noise
from unclip.diffusion.schedule import NoiseSchedule

OnStep = Callable[[int, int], None]
"""Called with the evaluations done and their total after each evaluation of the network; what it raises ends the run."""


class Sampler(Enum):
    """ancestral: Ho et al. 2020; ddim: Song et al. 2021; dpmpp_2m: Lu et al. 2022.

    analytic: ancestral with the best variance (Bao et al. 2022), of which `unclip prior-stats` gathers the statistics.
    """

    ancestral = "ancestral"
    analytic = "analytic"
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


@dataclass
class SamplerConfig:
    """Which sampler, and how many network evaluations. Raises ValueError for an option the sampler does not have."""

    name: Sampler = Sampler.ancestral
    num_steps: int = 64
    eta: float | None = None
    """ddim only: 0 (the default) is deterministic, 1 has the noise of ancestral sampling."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"sampler.num_steps is {self.num_steps}; it must be at least 1")
        if self.eta is not None and self.name is not Sampler.ddim:
            raise ValueError("sampler.eta applies to ddim only: remove it, or set sampler.name=ddim")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}; it must lie in [0, 1]")


def sample(
    cfg: SamplerConfig, denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None, on_step: OnStep | None = None
) -> Tensor:
    """(B, *denoiser.shape) samples. Raises ValueError if the denoiser was made for another number of steps."""
    if len(denoiser.schedule) != cfg.num_steps:
        raise ValueError(
            f"the denoiser has {len(denoiser.schedule)} steps but the sampler asks for {cfg.num_steps}; "
            "make it with num_steps=cfg.num_steps"
        )
    if on_step is not None:
        denoiser = _Reporting(denoiser, cfg.num_steps, on_step)
    match cfg.name:
        case Sampler.ancestral | Sampler.analytic:
            return ancestral(denoiser, noise, x_T=x_T)
        case Sampler.ddim:
            return ddim(denoiser, noise, eta=cfg.eta or 0.0, x_T=x_T)
        case Sampler.dpmpp_2m:
            return dpmpp_2m(denoiser, noise, x_T=x_T)


class _Reporting:
    """A denoiser that counts its evaluations aloud."""

    def __init__(self, denoiser: Denoiser, total: int, on_step: OnStep) -> None:
        self.schedule, self.shape = denoiser.schedule, denoiser.shape
        self._denoiser, self._total, self._on_step = denoiser, total, on_step
        self._done = 0

    def __call__(self, x_t: Tensor, step: int, last: Prediction | None = None) -> Prediction:
        prediction = self._denoiser(x_t, step, last)
        self._done += 1
        self._on_step(self._done, self._total)
        return prediction


@torch.no_grad()
def ancestral(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None) -> Tensor:
    """x_{t-1} from N(posterior mean at the predicted x0, variance) (Ho et al. 2020, algorithm 2).

    The variance is the denoiser's own (learned or analytic) where it has one, else the smaller bound beta~ (eq. 7).
    """
    x_t, schedule = _start(denoiser, noise, x_T)
    prediction: Prediction | None = None
    for step in reversed(range(len(schedule))):
        prediction = denoiser(x_t, step, prediction)
        posterior = schedule.posterior(step, prediction.x0, x_t)
        log_var = posterior.log_var if prediction.log_var is None else prediction.log_var
        x_t = posterior.mean
        if step > 0:
            x_t = x_t + (0.5 * log_var).exp() * noise.normal(denoiser.shape, f"step {step}")
    return x_t


@torch.no_grad()
def ddim(denoiser: Denoiser, noise: Noise, *, eta: float = 0.0, x_T: Tensor | None = None) -> Tensor:
    """x_{t-1} = alpha' x0 + sqrt(sigma'² - s²) eps + s z, where s = eta sqrt(beta~) (Song et al. 2021, eq. 12, 16)."""
    x_t, schedule = _start(denoiser, noise, x_T)
    prediction: Prediction | None = None
    for step in reversed(range(len(schedule))):
        prediction = denoiser(x_t, step, prediction)
        x0 = prediction.x0
        eps = schedule.eps_from_x0(step, x0, x_t)
        var = eta**2 * schedule.posterior_var[step]
        x_t = schedule.alpha_prev[step] * x0 + (schedule.sigma_prev[step] ** 2 - var).clamp(min=0).sqrt() * eps
        if eta > 0 and step > 0:
            x_t = x_t + var.sqrt() * noise.normal(denoiser.shape, f"step {step}")
    return x_t


@torch.no_grad()
def dpmpp_2m(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None) -> Tensor:
    """DPM-Solver++(2M), deterministic and of second order in the half log-SNR lambda (Lu et al. 2022, algorithm 2).

    The first step has no predecessor and is of first order. So are the last one onto the schedule, where lambda leaps
    and extrapolating would overshoot, and the one from there to the data, where lambda is infinite: it is x0 itself.
    """
    x_t, schedule = _start(denoiser, noise, x_T)
    lam = schedule.half_log_snr
    last: Prediction | None = None
    for step in reversed(range(1, len(schedule))):
        prediction = denoiser(x_t, step, last)
        x0 = prediction.x0
        h = lam[step - 1] - lam[step]
        slope = 0 if last is None or step == 1 else (x0 - last.x0) * (0.5 * h / (lam[step] - lam[step + 1]))
        ratio = schedule.sigma_prev[step] / schedule.sigma[step]
        x_t = ratio * x_t - schedule.alpha_prev[step] * torch.expm1(-h) * (x0 + slope)
        last = prediction
    return denoiser(x_t, 0, last).x0


def _start(denoiser: Denoiser, noise: Noise, x_T: Tensor | None) -> tuple[Tensor, NoiseSchedule]:
    """The noise to begin with, and the schedule on its device."""
    x_t = noise.normal(denoiser.shape, "x_T") if x_T is None else x_T.float()
    return x_t, denoiser.schedule.to(x_t.device)
