"""Training losses of a diffusion model, and the denoiser that samplers call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.noise import Noise
from unclip.diffusion.schedule import NoiseSchedule, ScheduleName, make_schedule

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, sec. 3.4
STEPS_AT_ONCE = 25  # noise levels of one sample that the network sees together when statistics are gathered
VLB_WEIGHT = 0.001  # lambda of L_hybrid (Nichol & Dhariwal 2021, eq. 16)


class Predict(Enum):
    """What the network's output means.

    v: alpha eps - sigma x0 (Salimans & Ho 2022). flow: eps - x0, the velocity of flow matching (Lipman et al. 2023).
    """

    eps = "eps"
    x0 = "x0"
    v = "v"
    flow = "flow"


class Weighting(Enum):
    """Weight of the squared error at each step.

    simple: 1 (Ho et al. 2020, eq. 14). min_snr: min(SNR, 5) for the error in x0 (Hang et al. 2023). clamped_snr: the SNR
    within [1, 5], so that noisy steps keep their part: max(SNR, 1) of Salimans & Ho (2022, sec. 4) with Min-SNR's limit.
    """

    simple = "simple"
    min_snr = "min_snr"
    clamped_snr = "clamped_snr"


class Timesteps(Enum):
    """How training steps are drawn: independently, or spread evenly over neighbouring samples of the stream."""

    uniform = "uniform"
    low_discrepancy = "low_discrepancy"


@dataclass
class DiffusionConfig:
    """A diffusion model, apart from its network. Raises ValueError for settings that contradict each other."""

    schedule: ScheduleName = ScheduleName.cosine
    num_timesteps: int = 1000
    predict: Predict = Predict.eps
    learned_variance: bool = False
    """The network has 2C output channels: the prediction, then the variance's place v in [-1, 1] between its bounds."""
    weighting: Weighting = Weighting.simple
    timesteps: Timesteps = Timesteps.uniform
    clip_range: float | None = None
    """Predicted x0 is limited to [-clip_range, clip_range] in sampling: 1.0 for pictures; None: unlimited."""
    float32_tables: bool = False
    """Compute the schedule in float32, as Karlo and diffusers do: for models imported from there."""
    self_conditioning: bool = False
    """The network also sees its last prediction of x0, in training every other time (Chen et al. 2023). Prior only."""

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; a schedule needs at least one, usually 1000")
        if self.clip_range is not None and self.clip_range <= 0:
            raise ValueError(
                f"clip_range is {self.clip_range}; give the data's largest |x0| (1.0 for pictures) or null"
            )
        if self.learned_variance and self.clip_range != 1.0:
            raise ValueError(
                "learned_variance scores step 0 as the likelihood of 8-bit pixels in [-1, 1]: "
                "set clip_range=1.0 for pictures, or learned_variance=false for embeddings"
            )
        if ScheduleName(self.schedule) is ScheduleName.cosine_zero_snr:
            if self.predict is Predict.eps:
                raise ValueError("eps says nothing about x0 at zero SNR: set predict=v or x0, or schedule=cosine")
            if self.weighting is Weighting.min_snr:
                raise ValueError("min_snr never trains the zero-SNR step: set weighting=simple, or schedule=cosine")
        self._check_flow()

    def _check_flow(self) -> None:
        is_flow = ScheduleName(self.schedule) is ScheduleName.flow
        if self.predict is Predict.flow and not is_flow:
            raise ValueError("predict=flow is the velocity of a straight line: set schedule=flow")
        if not is_flow:
            return
        if self.predict in (Predict.eps, Predict.v):
            raise ValueError(
                f"schedule=flow ends in pure noise, on a straight line: set predict=flow or x0, not {self.predict.name}"
            )
        if self.learned_variance:
            raise ValueError("learned variances are bounded by those of the cosine and linear schedules, not of flow")
        if self.weighting is not Weighting.simple:
            raise ValueError(
                f"schedule=flow is trained with equal weights: set weighting=simple, not {self.weighting.name}"
            )


class Context(Protocol):
    """What a network's `prepare` made of the conditions. For guidance: 2B rows, the conditional ones first."""

    def first(self, count: int, /) -> Any: ...


class Net(Protocol):
    """A network's forward: x_t (B, ...), timestep (B,) or (B, K), its context -> prediction, shaped like x_t.

    With self-conditioning it also gets the last predicted x0 (zeros where there is none), shaped like x_t.
    """

    def __call__(self, x_t: Tensor, timestep: Tensor, context: Any, /, *x0_last: Tensor) -> Tensor: ...


class Branches(Protocol):
    """A network with its conditions, made ready for the steps of one sampling run."""

    def __call__(self, x_t: Tensor, step: int, guided: bool, /, *x0_last: Tensor) -> Tensor:
        """The output for x_t (B, ...) at a step of the run's schedule; guided: 2B rows, the unconditional ones last."""
        ...


@dataclass
class Prediction:
    """x0 (B, ...) and, for learned or analytic variances, log_var of p(x_{t-1} | x_t), which broadcasts against it."""

    x0: Tensor
    log_var: Tensor | None = None


class Denoiser(Protocol):
    """All that a sampler knows: a schedule of len(schedule) steps, the shape of one sample, and x_t -> x0.

    `step` is a Python int, one for the whole batch, so a sampling loop never waits for the device. `last` is the
    prediction of the step before, for self-conditioning.
    """

    schedule: NoiseSchedule
    shape: tuple[int, ...]

    def __call__(self, x_t: Tensor, step: int, last: Prediction | None = None) -> Prediction: ...


class GaussianDiffusion:
    """The forward process, the meaning of the network's output, and the losses that follow (Ho et al. 2020)."""

    def __init__(self, cfg: DiffusionConfig) -> None:
        self.cfg = cfg
        dtype = torch.float32 if cfg.float32_tables else torch.float64
        self.schedule = make_schedule(cfg.schedule, cfg.num_timesteps, dtype=dtype)

    def losses(
        self, net: Net, x0: Tensor, context: Any, noise: Noise, *, num_draws: int | None = None
    ) -> dict[str, Tensor]:
        """Scalars whose sum is the training loss: "mse", and "vlb" (weighted) for learned variances.

        x0: (B, ...). num_draws: K noise levels and draws for each sample: the network then sees x_t (B, K, ...) and
        timestep (B, K) with one context, so only networks that take a K axis support it.
        """
        if num_draws is not None and self.cfg.learned_variance:
            raise ValueError("num_draws is for embeddings; learned variances are for pictures: drop one of the two")
        self.schedule = schedule = self.schedule.to(x0.device)
        x0 = x0.float()
        if num_draws is not None:
            x0 = x0.unsqueeze(1).expand(-1, num_draws, *x0.shape[1:])
        step = self.draw_steps(noise, num_draws)
        eps = noise.normal(tuple(x0.shape[1:]), "eps")
        x_t = schedule.q_sample(step, x0, eps)

        timestep = schedule.timesteps[step]
        x0_last = self._own_prediction(net, step, x_t, context, noise)
        output, fraction = self.split(net(x_t, timestep, context, *x0_last))
        error = (output - self.target(step, x0, eps)) ** 2
        terms = {"mse": (self.weight(step) * error.flatten(step.ndim).mean(-1)).mean()}
        if fraction is not None:
            x0_pred = self.to_x0(schedule, step, output.detach(), x_t)
            log_var = schedule.interpolated_log_var(step, fraction)
            bound = variational_bound(schedule, step, x0, x_t, x0_pred, log_var)
            terms["vlb"] = VLB_WEIGHT * len(schedule) * bound.mean()
        return terms

    @torch.no_grad()
    def eps_squares(self, net: Net, x0: Tensor, context: Any, noise: Noise) -> Tensor:
        """(B, T) mean square of the predicted eps at every training step, each with a draw of its own, for x0 (B, D)."""
        self.schedule = schedule = self.schedule.to(x0.device)
        found = []
        for steps in torch.arange(len(schedule), device=x0.device).split(STEPS_AT_ONCE):
            step = steps.expand(len(x0), -1)
            drawn = noise.normal((len(steps), x0.shape[-1]), f"eps of {STEPS_AT_ONCE} steps, part {len(found)}")
            x_t = schedule.q_sample(step, x0[:, None], drawn)
            output, _ = self.split(net(x_t, schedule.timesteps[step], context))
            x0_pred = Guidance().limit(self.to_x0(schedule, step, output, x_t), self.cfg.clip_range)
            found.append(schedule.eps_from_x0(step, x0_pred, x_t).square().mean(-1))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def _own_prediction(
        self, net: Net, step: Tensor, x_t: Tensor, context: Any, noise: Noise
    ) -> tuple[()] | tuple[Tensor]:
        """For self-conditioning: the x0 that the network predicts without it for half of the rows, zeros for the others."""
        if not self.cfg.self_conditioning:
            return ()
        nothing = torch.zeros_like(x_t)
        output, _ = self.split(net(x_t, self.schedule.timesteps[step], context, nothing))
        x0 = self.to_x0(self.schedule, step, output, x_t)
        half = noise.uniform(tuple(step.shape[1:]), "self-conditioning") < 0.5
        return (torch.where(half.reshape(half.shape + (1,) * (x_t.ndim - half.ndim)), x0, nothing),)

    def denoiser(
        self, net: Net, context: Context, *, shape: tuple[int, ...], num_steps: int, guidance: Guidance | None = None
    ) -> "NetDenoiser":
        """The network as samplers see it. shape: one sample's, without the batch; guidance: None is scale 1.

        context: B rows, or for guidance 2B, the conditional ones first. Raises ValueError for too many steps, and for
        dynamic thresholding of a model without clip_range.
        """
        schedule = self.schedule.respaced(num_steps)
        return self.denoiser_of(NetBranches(net, context, schedule), schedule, shape=shape, guidance=guidance)

    def denoiser_of(
        self,
        branches: Branches,
        schedule: NoiseSchedule,
        *,
        shape: tuple[int, ...],
        guidance: Guidance | None = None,
        x0_var: Tensor | None = None,
    ) -> "NetDenoiser":
        """As `denoiser`, of a network that prepared itself for the steps of ``schedule``.

        x0_var: (T,) Var[x0 | x_t] at every training step, a number's average: gives analytic variances.
        """
        guidance = guidance or Guidance()
        if guidance.threshold is Threshold.dynamic and self.cfg.clip_range is None:
            raise ValueError("dynamic thresholding needs a known range: set guidance.threshold=none, or clip_range")
        return NetDenoiser(self, branches, shape, schedule, guidance, x0_var)

    def draw_steps(self, noise: Noise, num_draws: int | None = None) -> Tensor:
        """(B,) or (B, num_draws) int64: training steps, uniform over the schedule."""
        shape = () if num_draws is None else (num_draws,)
        low_discrepancy = self.cfg.timesteps is Timesteps.low_discrepancy
        u = noise.low_discrepancy(shape, "step") if low_discrepancy else noise.uniform(shape, "step")
        return (u * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output as float32: the prediction, and the variance's place between its bounds (0 to 1) or None."""
        if not self.cfg.learned_variance:
            return output.float(), None
        prediction, v = output.float().chunk(2, dim=1)
        return prediction, (v + 1) / 2

    @torch.no_grad()
    def errors_at(self, net: Net, x0: Tensor, context: Any, noise: Noise, steps: Sequence[int]) -> Tensor:
        """(B, K) squared errors of the predicted x0 (B, ...), mean over its numbers, at K given training steps.

        Each step has its own draw of noise. The network sees x_t (B, K, ...) as with num_draws.
        """
        self.schedule = schedule = self.schedule.to(x0.device)
        step = torch.tensor(steps, device=x0.device).expand(len(x0), -1)
        x0 = x0.float().unsqueeze(1).expand(-1, len(steps), *x0.shape[1:])
        x_t = schedule.q_sample(step, x0, noise.normal(tuple(x0.shape[1:]), "eps of given steps"))
        output, _ = self.split(net(x_t, schedule.timesteps[step], context))
        return (self.to_x0(schedule, step, output, x_t) - x0).square().flatten(2).mean(-1)

    def target(self, step: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should output."""
        match self.cfg.predict:
            case Predict.eps:
                return eps
            case Predict.x0:
                return x0
            case Predict.v:
                return self.schedule.v_target(step, x0, eps)
            case Predict.flow:
                return eps - x0

    def to_x0(self, schedule: NoiseSchedule, step: int | Tensor, output: Tensor, x_t: Tensor) -> Tensor:
        """The x0 that the network's output stands for."""
        match self.cfg.predict:
            case Predict.eps:
                return schedule.x0_from_eps(step, output, x_t)
            case Predict.x0:
                return output
            case Predict.v:
                return schedule.x0_from_v(step, output, x_t)
            case Predict.flow:
                return schedule.x0_from_flow(step, output, x_t)

    def weight(self, step: Tensor) -> Tensor:
        """The squared error's weight at each step, shaped like step. The clamped SNR is the weight of the error in x0;
        an error in eps is SNR times, one in v is SNR + 1 times as large (Hang et al. 2023, sec. 3.4)."""
        snr = self.schedule.snr[step]
        if self.cfg.weighting is Weighting.simple:
            return torch.ones_like(snr)
        lowest = 1.0 if self.cfg.weighting is Weighting.clamped_snr else None
        weight = snr.clamp(min=lowest, max=MIN_SNR_GAMMA)
        match self.cfg.predict:
            case Predict.eps:
                return weight / snr
            case Predict.x0:
                return weight
            case Predict.v:
                return weight / (snr + 1)
            case Predict.flow:
                raise AssertionError("flow has equal weights")


class NetBranches:
    """The general case: one forward, of 2B rows where guidance acts, of B elsewhere."""

    def __init__(self, net: Net, context: Context, schedule: NoiseSchedule) -> None:
        self.net, self.context, self.schedule = net, context, schedule

    def __call__(self, x_t: Tensor, step: int, guided: bool, /, *x0_last: Tensor) -> Tensor:
        self.schedule = self.schedule.to(x_t.device)
        timestep = self.schedule.timesteps[step].expand((1 + guided) * len(x_t))
        if not guided:
            return self.net(x_t, timestep, self.context.first(len(x_t)), *x0_last)
        return self.net(torch.cat([x_t, x_t]), timestep, self.context, *(torch.cat([x, x]) for x in x0_last))


class NetDenoiser:
    """A network, its conditions and its guidance, bound to one respaced schedule."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        branches: Branches,
        shape: tuple[int, ...],
        schedule: NoiseSchedule,
        guidance: Guidance,
        x0_var: Tensor | None,
    ) -> None:
        self.diffusion, self.branches, self.shape, self.schedule = diffusion, branches, shape, schedule
        self.guidance = guidance
        self.x0_var = None if x0_var is None else x0_var[schedule.timesteps.to(x0_var.device)]

    def __call__(self, x_t: Tensor, step: int, last: Prediction | None = None) -> Prediction:
        """x_t (B, *shape) at a step of the schedule. The guided variance is the conditional one: there is no guided one."""
        self.schedule = schedule = self.schedule.to(x_t.device)
        guided = self.guidance.acts(step, len(schedule))
        x0_last = ()
        if self.diffusion.cfg.self_conditioning:
            x0_last = (torch.zeros_like(x_t) if last is None else last.x0,)
        output, fraction = self.diffusion.split(self.branches(x_t, step, guided, *x0_last))
        if guided:
            output = self.guidance.combine(*output.chunk(2))
        x0 = self.diffusion.to_x0(schedule, step, output, x_t)
        return Prediction(
            self.guidance.limit(x0, self.diffusion.cfg.clip_range), self._log_var(step, fraction, len(x_t))
        )

    def _log_var(self, step: int, fraction: Tensor | None, rows: int) -> Tensor | None:
        if self.x0_var is not None:
            return self.schedule.analytic_log_var(step, self.x0_var[step])
        return None if fraction is None else self.schedule.interpolated_log_var(step, fraction[:rows])


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
