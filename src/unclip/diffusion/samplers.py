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
    """ancestral: Ho et al. 2020; ddim: Song et al. 2021; dpmpp_2m: Lu et al. 2022; unipc: Zhao et al. 2023; heun: of
    Karras et al. 2022.

    analytic: ancestral with the best variance (Bao et al. 2022), of which `unclip prior-stats` gathers the statistics.
    karlo: ancestral with the rounding of Karlo and of diffusers' UnCLIPScheduler, whatever the model's own tables.
    """

    ancestral = "ancestral"
    analytic = "analytic"
    karlo = "karlo"
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    heun = "heun"


@dataclass
class SamplerConfig:
    """Which sampler, and how many network evaluations. Raises ValueError for an option the sampler does not have."""

    name: Sampler = Sampler.ancestral
    num_steps: int = 64
    """Evaluations of the network; guidance makes one of its two halves. heun visits half as many noise levels."""
    eta: float | None = None
    """ddim only: 0 (the default) is deterministic, 1 has the noise of ancestral sampling."""
    temperature: float = 1.0
    """What the noise of every step is multiplied by, for samplers that add some. Below 1 samples are smoother and vary less; 0
    takes each step's mean."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"sampler.num_steps is {self.num_steps}; it must be at least 1")
        if self.eta is not None and self.name is not Sampler.ddim:
            raise ValueError("sampler.eta applies to ddim only: remove it, or set sampler.name=ddim")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}; it must lie in [0, 1]")
        if not 0 <= self.temperature <= 1:
            raise ValueError(f"sampler.temperature is {self.temperature}; it must lie in [0, 1]")
        if self.temperature < 1 and not self.adds_noise:
            raise ValueError(
                f"sampler.temperature is {self.temperature}, but {self.name.name} adds no noise: leave it at 1, or set "
                "sampler.name=ancestral"
            )

    @property
    def adds_noise(self) -> bool:
        return self.name in (Sampler.ancestral, Sampler.analytic, Sampler.karlo) or bool(self.eta)

    @property
    def num_levels(self) -> int:
        """Steps of the schedule that the sampler visits, which is what a denoiser is made with.

        One for each evaluation; heun evaluates twice between two of them and once at the last: 2 levels are 3 evaluations,
        or 2 where the first step goes uncorrected.
        """
        return self.num_steps // 2 + 1 if self.name is Sampler.heun else self.num_steps

    def levels_of(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The steps of a training schedule that the sampler visits. Raises ValueError where there are not so many."""
        return (schedule.in_float32() if self.name is Sampler.karlo else schedule).respaced(self.num_levels)


def sample(
    cfg: SamplerConfig, denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None, on_step: OnStep | None = None
) -> Tensor:
    """(B, *denoiser.shape) samples. Raises ValueError if the denoiser was made for another number of steps."""
    if len(denoiser.schedule) != cfg.num_levels:
        raise ValueError(
            f"the denoiser has {len(denoiser.schedule)} steps but the sampler asks for {cfg.num_levels}; "
            "make it with num_steps=cfg.num_levels"
        )
    if on_step is not None:
        denoiser = _Reporting(denoiser, cfg.num_steps, on_step)
    match cfg.name:
        case Sampler.ancestral | Sampler.analytic | Sampler.karlo:
            return ancestral(denoiser, noise, x_T=x_T, temperature=cfg.temperature)
        case Sampler.ddim:
            return ddim(denoiser, noise, eta=cfg.eta or 0.0, x_T=x_T, temperature=cfg.temperature)
        case Sampler.dpmpp_2m:
            return dpmpp_2m(denoiser, noise, x_T=x_T)
        case Sampler.unipc:
            return unipc(denoiser, noise, x_T=x_T)
        case Sampler.heun:
            return heun(denoiser, noise, x_T=x_T, num_evaluations=cfg.num_steps)


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
def ancestral(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """x_{t-1} from N(posterior mean at the predicted x0, temperature² variance) (Ho et al. 2020, algorithm 2).

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
            x_t = x_t + temperature * (0.5 * log_var).exp() * noise.normal(denoiser.shape, f"step {step}")
    return x_t


@torch.no_grad()
def ddim(
    denoiser: Denoiser, noise: Noise, *, eta: float = 0.0, x_T: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """x_{t-1} = alpha' x0 + sqrt(sigma'² - s²) eps + temperature s z, s = eta sqrt(beta~) (Song et al. 2021, eq. 12, 16)."""
    x_t, schedule = _start(denoiser, noise, x_T)
    prediction: Prediction | None = None
    for step in reversed(range(len(schedule))):
        prediction = denoiser(x_t, step, prediction)
        x0 = prediction.x0
        eps = schedule.eps_from_x0(step, x0, x_t)
        var = eta**2 * schedule.posterior_var[step]
        x_t = schedule.alpha_prev[step] * x0 + (schedule.sigma_prev[step] ** 2 - var).clamp(min=0).sqrt() * eps
        if eta > 0 and step > 0:
            x_t = x_t + temperature * var.sqrt() * noise.normal(denoiser.shape, f"step {step}")
    return x_t


@torch.no_grad()
def dpmpp_2m(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None) -> Tensor:
    """DPM-Solver++(2M), deterministic and of second order in the half log-SNR lambda (Lu et al. 2022, algorithm 2).

    The first step has no predecessor and is of first order. So are the last one onto the schedule, where lambda leaps
    and extrapolating would overshoot, and the one from there to the data, where lambda is infinite: it is x0 itself.
    """
    x_t, schedule = _start(denoiser, noise, x_T)
    last: Prediction | None = None
    for step in reversed(range(1, len(schedule))):
        prediction = denoiser(x_t, step, last)
        x_t = _towards(schedule, step, x_t, _extrapolated(schedule, step, prediction, last))
        last = prediction
    return denoiser(x_t, 0, last).x0


@torch.no_grad()
def unipc(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None) -> Tensor:
    """UniPC-2: a step of dpmpp_2m, corrected by the prediction at its end (Zhao et al. 2023, algorithms 1-2, B_2).

    Deterministic; the correction raises the order in lambda to three and costs no evaluation, since the next step begins
    with that prediction. The last step, onto the data, is not corrected: it would need one more.
    """
    x_t, schedule = _start(denoiser, noise, x_T)
    before = x_t
    older: Prediction | None = None
    last: Prediction | None = None
    for step in reversed(range(1, len(schedule))):
        prediction = denoiser(x_t, step, last)
        if last is not None:
            x_t = _towards(schedule, step + 1, before, _interpolated(schedule, step + 1, prediction, last, older))
        before = x_t
        x_t = _towards(schedule, step, x_t, _extrapolated(schedule, step, prediction, last))
        older, last = last, prediction
    return denoiser(x_t, 0, last).x0


@torch.no_grad()
def heun(denoiser: Denoiser, noise: Noise, *, x_T: Tensor | None = None, num_evaluations: int | None = None) -> Tensor:
    """Heun's method on the probability flow dx = x0 dalpha + eps dsigma, deterministic and of second order.

    On the flow schedule that is Heun's method in time. Karras et al. (2022, algorithm 1) take it in sigma / alpha, which
    has no end on schedules that reach pure noise. A step to the next level is DDIM's, then done again with the mean of x0
    and eps at both of its ends. From the cleanest level it goes to x0, as there. So L levels take 2L - 1 evaluations;
    with ``num_evaluations`` 2L - 2 the first step, where little is known of x0, is left as it is.
    """
    x_t, schedule = _start(denoiser, noise, x_T)
    plain = len(schedule) - 1 if num_evaluations == 2 * len(schedule) - 2 else None
    last: Prediction | None = None
    for step in reversed(range(1, len(schedule))):
        here = denoiser(x_t, step, last)
        eps = schedule.eps_from_x0(step, here.x0, x_t)
        guess = schedule.alpha_prev[step] * here.x0 + schedule.sigma_prev[step] * eps
        last = here
        if step == plain:
            x_t = guess
            continue
        last = there = denoiser(guess, step - 1, here)
        x0, eps = (here.x0 + there.x0) / 2, (eps + schedule.eps_from_x0(step - 1, there.x0, guess)) / 2
        along = schedule.alpha_prev[step] - schedule.alpha[step]
        x_t = x_t + along * x0 + (schedule.sigma_prev[step] - schedule.sigma[step]) * eps
    return denoiser(x_t, 0, last).x0


def _towards(schedule: NoiseSchedule, step: int, x_t: Tensor, x0: Tensor) -> Tensor:
    """x at the next cleaner step if x0 does not change on the way: the flow's exact solution (Lu et al. 2022, prop. 4.1)."""
    h = schedule.half_log_snr[step - 1] - schedule.half_log_snr[step]
    ratio = schedule.sigma_prev[step] / schedule.sigma[step]
    return ratio * x_t - schedule.alpha_prev[step] * torch.expm1(-h) * x0


def _extrapolated(schedule: NoiseSchedule, step: int, here: Prediction, last: Prediction | None) -> Tensor:
    """The x0 of a step from `here` on, with the slope since the prediction before it: dpmpp_2m's and UniP-2's."""
    if last is None or step == 1:
        return here.x0
    lam = schedule.half_log_snr
    h = lam[step - 1] - lam[step]
    return here.x0 + (here.x0 - last.x0) * (0.5 * h / (lam[step] - lam[step + 1]))


def _interpolated(
    schedule: NoiseSchedule, step: int, there: Prediction, here: Prediction, last: Prediction | None
) -> Tensor:
    """The x0 of a step from `here` to `there`, with the slopes to `there` and `last` (Zhao et al. 2023, UniC-2).

    With r the place of `last` in steps of h, their weights a solve a1 + a2 = b1 and r a1 + a2 = b2. UniC-1 takes 1/2, as the
    authors' code does.
    """
    if last is None:
        return (here.x0 + there.x0) / 2
    lam = schedule.half_log_snr
    h = lam[step - 1] - lam[step]
    r = (lam[step + 1] - lam[step]) / h
    inverse = -1 / torch.expm1(-h)
    b1 = inverse - 1 / h
    b2 = inverse - 2 * b1 / h
    a1 = (b1 - b2) / (1 - r)
    return here.x0 + (a1 / r) * (last.x0 - here.x0) + (b1 - a1) * (there.x0 - here.x0)


def _start(denoiser: Denoiser, noise: Noise, x_T: Tensor | None) -> tuple[Tensor, NoiseSchedule]:
    """The noise to begin with, and the schedule on its device."""
    x_t = noise.normal(denoiser.shape, "x_T") if x_T is None else x_T.float()
    return x_t, denoiser.schedule.to(x_t.device)
