"""Training losses of a diffusion model, and the denoiser that samplers call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.diffusion.bound import variational_bound
from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.noise import Noise
from unclip.diffusion.schedule import NoiseSchedule, make_schedule
from unclip.diffusion.settings import DiffusionConfig, Predict, Timesteps, Weighting

STEPS_AT_ONCE = 25  # noise levels of one sample that the network sees together when statistics are gathered
VLB_WEIGHT = 0.001  # lambda of L_hybrid (Nichol & Dhariwal 2021, eq. 16)


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

    def __init__(self, cfg: DiffusionConfig, trained: range | None = None) -> None:
        """trained: the neighbouring steps, of all ``cfg.num_timesteps``, that the losses draw from; None: all."""
        self.cfg = cfg
        dtype = torch.float32 if cfg.float32_tables else torch.float64
        self.schedule = make_schedule(cfg.schedule, cfg.num_timesteps, resolution=cfg.resolution, dtype=dtype)
        self.trained = range(cfg.num_timesteps) if trained is None else trained

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
            terms["vlb"] = VLB_WEIGHT * self.num_trained_steps * bound.mean()
        return terms

    @property
    def num_trained_steps(self) -> int:
        """How many steps :meth:`draw_steps` draws from: the bound is a sum over them."""
        return len(self.trained)

    @torch.no_grad()
    def eps_squares(self, net: Net, x0: Tensor, context: Any, noise: Noise) -> Tensor:
        """(B, T) mean square of the predicted eps at every training step, each with a draw of its own, for x0 (B, D)."""
        self.schedule = schedule = self.schedule.to(x0.device)
        found = []
        for steps in torch.arange(len(schedule), device=x0.device).split(STEPS_AT_ONCE):
            step = steps.expand(len(x0), -1)
            drawn = noise.normal((len(steps), x0.shape[-1]), f"eps of {STEPS_AT_ONCE} steps, part {len(found)}")
            x_t = schedule.q_sample(step, x0[:, None], drawn)
            x0_pred = Guidance().limit(self._predicted(net, step, x_t, context), self.cfg.clip_range)
            found.append(schedule.eps_from_x0(step, x0_pred, x_t).square().mean(-1))
        return torch.cat(found, dim=1)

    def _predicted(self, net: Net, step: Tensor, x_t: Tensor, context: Any) -> Tensor:
        """x0 as in sampling: with self-conditioning the network sees what it predicted itself a pass before."""
        seen = (torch.zeros_like(x_t),) if self.cfg.self_conditioning else ()
        timestep = self.schedule.timesteps[step]
        x0 = self.to_x0(self.schedule, step, self.split(net(x_t, timestep, context, *seen))[0], x_t)
        if seen:
            x0 = self.to_x0(self.schedule, step, self.split(net(x_t, timestep, context, x0))[0], x_t)
        return x0

    @torch.no_grad()
    def _own_prediction(
        self, net: Net, step: Tensor, x_t: Tensor, context: Any, noise: Noise
    ) -> tuple[()] | tuple[Tensor]:
        """For self-conditioning: the x0 that the network predicts without it for half of the rows, zeros for the others."""
        if not self.cfg.self_conditioning:
            return ()
        nothing = torch.zeros_like(x_t)
        output, _ = self.split(net(x_t, self.schedule.timesteps[step], context, nothing))
        torch.clear_autocast_cache()  # of casts of the weights without their gradients
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
        sample_dims: int | None = None,
        x0_var: Tensor | None = None,
    ) -> "NetDenoiser":
        """As `denoiser`, of a network that prepared itself for the steps of ``schedule``.

        sample_dims: how many of the last dimensions of ``shape`` are one sample's, where candidates come first; None: all.
        x0_var: (T,) Var[x0 | x_t] at every training step, a number's average: gives analytic variances.
        """
        guidance = guidance or Guidance()
        if guidance.threshold is Threshold.dynamic and self.cfg.clip_range is None:
            raise ValueError("dynamic thresholding needs a known range: set guidance.threshold=none, or clip_range")
        return NetDenoiser(self, branches, shape, schedule, guidance, sample_dims or len(shape), x0_var)

    def draw_steps(self, noise: Noise, num_draws: int | None = None) -> Tensor:
        """(B,) or (B, num_draws) int64: training steps."""
        shape = () if num_draws is None else (num_draws,)
        match self.cfg.timesteps:
            case Timesteps.uniform:
                u = noise.uniform(shape, "step")
            case Timesteps.low_discrepancy:
                u = noise.low_discrepancy(shape, "step")
            case Timesteps.logit_normal:
                u = noise.normal(shape, "step").sigmoid()
        return self.trained.start + (u * len(self.trained)).long().clamp(max=len(self.trained) - 1)

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
        return (self._predicted(net, step, x_t, context) - x0).square().flatten(2).mean(-1)

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
        """The squared error's weight at each step, shaped like step. Weightings are those of the error in x0; an error in
        eps is SNR times, one in v is SNR + 1 times as large (Hang et al. 2023, sec. 3.4)."""
        snr = self.schedule.snr[step]
        match self.cfg.weighting:
            case Weighting.simple:
                return torch.ones_like(snr)
            case Weighting.min_snr:
                weight = snr.clamp(max=self.cfg.snr_limit)
            case Weighting.clamped_snr:
                weight = snr.clamp(min=1.0, max=self.cfg.snr_limit)
            case Weighting.p2:
                weight = snr / (1 + snr)
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


def steps_below(limit: int, schedule: NoiseSchedule) -> int:
    """How many of a respaced schedule's steps are training steps below ``limit``."""
    return sum(timestep < limit for timestep in schedule.timesteps.tolist())


class Handover:
    """Two networks that share a run's steps: the second one takes the ``last_steps``."""

    def __init__(self, first: Branches, second: Branches, last_steps: int) -> None:
        self.first, self.second, self.last_steps = first, second, last_steps

    def __call__(self, x_t: Tensor, step: int, guided: bool, /, *x0_last: Tensor) -> Tensor:
        branches = self.second if step < self.last_steps else self.first
        return branches(x_t, step, guided, *x0_last)


class Unfinished:
    """A denoiser that knows no training steps below ``limit``: there its last prediction stands."""

    def __init__(self, denoiser: Denoiser, limit: int) -> None:
        self.denoiser, self.schedule, self.shape = denoiser, denoiser.schedule, denoiser.shape
        self.unknown = steps_below(limit, denoiser.schedule)

    def __call__(self, x_t: Tensor, step: int, last: Prediction | None = None) -> Prediction:
        return last if step < self.unknown and last is not None else self.denoiser(x_t, step, last)


class NetDenoiser:
    """A network, its conditions and its guidance, bound to one respaced schedule."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        branches: Branches,
        shape: tuple[int, ...],
        schedule: NoiseSchedule,
        guidance: Guidance,
        sample_dims: int,
        x0_var: Tensor | None,
    ) -> None:
        self.diffusion, self.branches, self.shape, self.schedule = diffusion, branches, shape, schedule
        self.guidance, self.sample_dims = guidance, sample_dims
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
            cond, null = output.chunk(2)
            output = self.guidance.combine(cond, null, self.sample_dims)
        x0 = self.diffusion.to_x0(schedule, step, output, x_t)
        x0 = self.guidance.limit(x0, self.diffusion.cfg.clip_range, self.sample_dims)
        return Prediction(x0, self._log_var(step, fraction, len(x_t)))

    def _log_var(self, step: int, fraction: Tensor | None, rows: int) -> Tensor | None:
        if self.x0_var is not None:
            return self.schedule.analytic_log_var(step, self.x0_var[step])
        return None if fraction is None else self.schedule.interpolated_log_var(step, fraction[:rows])
