"""The forward process: noise schedules, their respacing and their posteriors."""

import math
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

BASE_RESOLUTION = 64  # at which a shifted schedule is not shifted (Hoogeboom et al. 2023, sec. 3.1)
Step = int | Tensor  # index of a schedule, 0 = cleanest; one int for all rows, or a (B,) or (B, K) int64 tensor


class ScheduleName(Enum):
    """cosine: Nichol & Dhariwal 2021; linear: Ho et al. 2020; cosine_zero_snr: cosine, but ending in pure noise.

    flow: the straight line x_t = (1 - t) x0 + t eps of flow matching (Lipman et al. 2023; Liu et al. 2023).
    """

    cosine = "cosine"
    linear = "linear"
    cosine_zero_snr = "cosine_zero_snr"
    flow = "flow"


@dataclass
class Posterior:
    """q(x_{t-1} | x_t, x0) = N(mean, var); var and log_var broadcast against mean.

    var is 0 at step 0. There log_var repeats step 1's: a finite bound for learned variances (Nichol & Dhariwal's code).
    """

    mean: Tensor
    var: Tensor
    log_var: Tensor


class NoiseSchedule:
    """A process q(x_t | x0) = N(alpha x0, sigma² I), by default variance-preserving: alpha² = 1 - sigma² (Ho et al. 2020).

    Every table has one float32 entry per step, 0 = cleanest; `*_prev` is the next cleaner step's, at step 0 the data's.
    `alpha_bar` is alpha², `beta` the variance of q(x_t | x_{t-1}). Tables are computed in the dtype of their sources:
    float64 keeps 1 - alpha_bar exact where it is tiny.
    """

    def __init__(
        self,
        alpha_bar: Tensor,
        beta: Tensor,
        timesteps: Tensor,
        device: torch.device | str = "cpu",
        noise: Tensor | None = None,
    ) -> None:
        """alpha_bar, beta: (N,) float64 or float32 on the CPU; timesteps: (N,) int64, what the network is told.

        noise: (N,) sigma², where it is not 1 - alpha_bar.
        """
        self._sources = (alpha_bar, beta, timesteps)
        self._noise = noise
        prev = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        sigma2, sigma2_prev = 1 - alpha_bar, 1 - prev
        kept = 1 - beta  # alpha²(t) / alpha²(t - 1)
        if noise is not None:
            sigma2, kept = noise, alpha_bar / prev
            sigma2_prev = torch.cat([torch.zeros_like(noise[:1]), noise[:-1]])
        var = sigma2_prev / sigma2 * beta
        smallest = var[1:2] if len(var) > 1 else beta[:1]

        def table(values: Tensor) -> Tensor:
            return values.to(device, torch.float32)

        self.timesteps = timesteps.to(device)
        self.alpha_bar, self.beta = table(alpha_bar), table(beta)
        self.alpha, self.sigma = table(alpha_bar.sqrt()), table(sigma2.sqrt())
        self.alpha_prev, self.sigma_prev = table(prev.sqrt()), table(sigma2_prev.sqrt())
        self.snr = table(alpha_bar / sigma2)
        self.half_log_snr = table(0.5 * (alpha_bar.log() - sigma2.log()))
        self.posterior_var, self.log_beta = table(var), table(beta.log())
        self.posterior_log_var = table(torch.cat([smallest, var[1:]]).log())
        self.posterior_x0 = table(prev.sqrt() * beta / sigma2)
        self.posterior_x_t = table(kept.sqrt() * sigma2_prev / sigma2)

    @classmethod
    def from_betas(cls, beta: Tensor) -> "NoiseSchedule":
        """beta: (T,) variances of q(x_t | x_{t-1}), in the dtype to compute in."""
        return cls(torch.cumprod(1 - beta, dim=0), beta, torch.arange(len(beta), device=beta.device))

    @classmethod
    def straight(cls, num_timesteps: int, dtype: torch.dtype, shift: float = 1.0) -> "NoiseSchedule":
        """alpha = 1 - t, sigma = t for t = 1/T, 2/T, ... 1: the last step is pure noise.

        shift: multiplies sigma / alpha, which moves t on the line (Esser et al. 2024, eq. 23).
        """
        sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        if shift != 1.0:
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        alpha_bar, noise = ((1 - sigma) ** 2).to(dtype), (sigma**2).to(dtype)
        return cls(alpha_bar, _transition_var(alpha_bar, noise), torch.arange(num_timesteps), noise=noise)

    def in_float32(self) -> "NoiseSchedule":
        """The schedule with tables computed in float32 throughout, as Karlo and diffusers do; a training schedule's only.

        Raises ValueError for the flow, which they do not have.
        """
        if self._noise is not None:
            raise ValueError("sampler.name=karlo is for the schedules of Karlo and diffusers, not for schedule=flow")
        return NoiseSchedule.from_betas(self._sources[1].float()).to(self.timesteps.device)

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """This schedule with its tables on `device`; itself when they are there already."""
        here = self.timesteps.device == torch.device(device)
        return self if here else NoiseSchedule(*self._sources, device, self._noise)

    def respaced(self, num_steps: int) -> "NoiseSchedule":
        """num_steps evenly strided, rounded steps, 0 and T - 1 included (Nichol & Dhariwal 2021, sec. 4).

        One step keeps T - 1 only. Raises ValueError unless 1 <= num_steps <= len(self).
        """
        T = len(self)
        if not 1 <= num_steps <= T:
            raise ValueError(f"num_steps is {num_steps}; this schedule has {T} steps: choose 1 to {T}")
        if num_steps == T:
            return self
        stride = (T - 1) / max(num_steps - 1, 1)
        kept = [round(i * stride) for i in range(num_steps)] if num_steps > 1 else [T - 1]
        neighbours = torch.tensor([step - before == 1 for before, step in pairwise([-1, *kept])])
        alpha_bar, beta, timesteps = (source[torch.tensor(kept)] for source in self._sources)
        if self._noise is not None:
            noise = self._noise[torch.tensor(kept)]
            return NoiseSchedule(alpha_bar, _transition_var(alpha_bar, noise), timesteps, self.timesteps.device, noise)
        skipped = 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return NoiseSchedule(alpha_bar, torch.where(neighbours, beta, skipped), timesteps, self.timesteps.device)

    def q_sample(self, step: Step, x0: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4)."""
        return self._at(self.alpha, step, x0) * x0 + self._at(self.sigma, step, x0) * eps

    def x0_from_eps(self, step: Step, eps: Tensor, x_t: Tensor) -> Tensor:
        """x0 = (x_t - sigma eps) / alpha: q_sample, solved for x0. Infinite at zero SNR."""
        return (x_t - self._at(self.sigma, step, x_t) * eps) / self._at(self.alpha, step, x_t)

    def eps_from_x0(self, step: Step, x0: Tensor, x_t: Tensor) -> Tensor:
        """eps = (x_t - alpha x0) / sigma: q_sample, solved for eps."""
        return (x_t - self._at(self.alpha, step, x_t) * x0) / self._at(self.sigma, step, x_t)

    def v_target(self, step: Step, x0: Tensor, eps: Tensor) -> Tensor:
        """v = alpha eps - sigma x0 (Salimans & Ho 2022, app. D)."""
        return self._at(self.alpha, step, x0) * eps - self._at(self.sigma, step, x0) * x0

    def x0_from_v(self, step: Step, v: Tensor, x_t: Tensor) -> Tensor:
        """x0 = alpha x_t - sigma v (Salimans & Ho 2022, app. D)."""
        return self._at(self.alpha, step, x_t) * x_t - self._at(self.sigma, step, x_t) * v

    def x0_from_flow(self, step: Step, u: Tensor, x_t: Tensor) -> Tensor:
        """x0 = x_t - sigma u: the straight line's x_t, with u = eps - x0, solved for x0."""
        return x_t - self._at(self.sigma, step, x_t) * u

    def analytic_log_var(self, step: int, x0_var: Tensor) -> Tensor:
        """log(beta~ + c² Var[x0 | x_t]), the best variance of p(x_{t-1} | x_t) (Bao et al. 2022, theorem 1, lambda² = beta~).

        c is the posterior mean's coefficient of x0. It and beta~ are this schedule's, which may be a subsequence; x0_var,
        a scalar, is a property of x_t alone (section 4).
        """
        return (self.posterior_var[step] + self.posterior_x0[step] ** 2 * x0_var).log()

    def posterior(self, step: Step, x0: Tensor, x_t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6-7); at step 0 the mean is x0 and the variance 0."""
        mean = self._at(self.posterior_x0, step, x_t) * x0 + self._at(self.posterior_x_t, step, x_t) * x_t
        return Posterior(mean, self._at(self.posterior_var, step, x_t), self._at(self.posterior_log_var, step, x_t))

    def interpolated_log_var(self, step: Step, fraction: Tensor) -> Tensor:
        """fraction log beta + (1 - fraction) log beta~: a learned variance (Nichol & Dhariwal 2021, eq. 15)."""
        low, high = self._at(self.posterior_log_var, step, fraction), self._at(self.log_beta, step, fraction)
        if self._sources[0].dtype == torch.float32:  # in the order of Karlo and diffusers, to the bit
            return fraction * high + (1 - fraction) * low
        return low + fraction * (high - low)

    @staticmethod
    def _at(table: Tensor, step: Step, x: Tensor) -> Tensor:
        """The table's entries at `step`, shaped to broadcast over the trailing dimensions of x."""
        values = table[step]
        return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def make_schedule(
    name: ScheduleName | str,
    num_timesteps: int,
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> NoiseSchedule:
    """A training schedule of num_timesteps steps.

    resolution: side of the pictures; adds 2 log(64 / resolution) to the log-SNR (Hoogeboom et al. 2023, sec. 3.1).
    dtype: what the tables are computed in. float32 repeats the rounding of Karlo and diffusers (of 1 - alpha_bar at
    step 0 it keeps three digits), for the numbers of models trained there.
    """
    shift = 1.0 if resolution is None else resolution / BASE_RESOLUTION
    match ScheduleName(name):
        case ScheduleName.linear:
            beta = _linear_betas(num_timesteps)
        case ScheduleName.cosine:
            beta = _cosine_betas(num_timesteps)
        case ScheduleName.cosine_zero_snr:
            beta = _zero_terminal_snr(_cosine_betas(num_timesteps))
        case ScheduleName.flow:
            return NoiseSchedule.straight(num_timesteps, dtype, shift)
    return NoiseSchedule.from_betas((beta if shift == 1.0 else _shifted(beta, shift)).to(dtype))


def _linear_betas(num_timesteps: int) -> Tensor:
    """(T,) from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, sec. 4), scaled by 1000 / T as Dhariwal & Nichol 2021 do."""
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)


def _cosine_betas(num_timesteps: int) -> Tensor:
    """(T,) with alpha_bar(t) = cos²((t/T + s) / (1 + s) pi/2), s = 0.008, beta <= 0.999 (Nichol & Dhariwal, eq. 17)."""
    alpha_bar = [math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(num_timesteps + 1)]
    betas = [1 - after / before for before, after in pairwise(alpha_bar)]
    return torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)


def _zero_terminal_snr(beta: Tensor) -> Tensor:
    """(T,) betas, shifted and scaled so that alpha ends at 0 and starts where it did (Lin et al. 2024, algorithm 1)."""
    alpha = torch.cumprod(1 - beta, dim=0).sqrt()
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def _shifted(beta: Tensor, shift: float) -> Tensor:
    """(T,) betas of the schedule with `shift` times the sigma / alpha."""
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    alpha_bar = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def _transition_var(alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """(N,) variance of q(x_t | x_{t-1}): sigma²(t) - alpha²(t) / alpha²(t - 1) sigma²(t - 1)."""
    alpha_bar_prev = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    noise_prev = torch.cat([torch.zeros_like(noise[:1]), noise[:-1]])
    return noise - alpha_bar / alpha_bar_prev * noise_prev
