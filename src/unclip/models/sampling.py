"""How the models turn conditions into samples: typed settings, one object per model."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.schedule import ScheduleName
from unclip.diffusion.settings import DiffusionConfig
from unclip.errors import ConfigError


@dataclass
class NoSampling:
    """Of a model with one answer for a condition: nothing to choose."""


@dataclass
class DiffusionSampling:
    """Sampler and guidance of a decoder."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.sampler.name is Sampler.analytic:
            raise ValueError(
                "sampler.name=analytic is for diffusion priors; here take ancestral, ddim, dpmpp_2m, unipc or heun"
            )


def check_goes_with(how: DiffusionSampling, diffusion: DiffusionConfig) -> None:
    """ConfigError for a sampler or a guidance that a model of this diffusion cannot have."""
    if how.sampler.num_levels > diffusion.num_timesteps:
        raise ConfigError(
            f"sampling.sampler.num_steps is {how.sampler.num_steps}, but diffusion.num_timesteps={diffusion.num_timesteps}: take "
            "fewer steps than the model is trained with"
        )
    if how.sampler.name is Sampler.karlo and diffusion.schedule is ScheduleName.flow:
        raise ConfigError(
            "sampling.sampler.name=karlo is for Karlo's and diffusers' schedules, not for diffusion.schedule=flow"
        )
    if how.guidance.threshold is Threshold.dynamic and diffusion.clip_range is None:
        raise ConfigError(
            "sampling.guidance.threshold=dynamic needs a known range: set diffusion.clip_range (1.0 for pictures), or "
            "threshold=none"
        )


D = TypeVar("D", bound=DiffusionSampling)


def changed(
    how: D,
    stage: str,
    longest: int,
    steps: int | None = None,
    scale: float | None = None,
    sampler: Sampler | None = None,
) -> D:
    """``how`` with other steps, another guidance scale or another sampler, which starts from its own defaults; None keeps
    its own.

    Raises :class:`ConfigError`, which names the ``stage``, for settings that contradict each other and for a sampler that
    would visit more levels than the ``longest`` timesteps that the stage was trained with.
    """
    try:
        if sampler is not None and sampler is not how.sampler.name:
            how = replace(how, sampler=replace(how.sampler, name=sampler, eta=None, temperature=1.0))
        if steps is not None:
            how = replace(how, sampler=replace(how.sampler, num_steps=steps))
        if scale is not None:
            how = replace(how, guidance=replace(how.guidance, scale=scale))
    except ValueError as error:
        raise ConfigError(f"the {stage}: {error}") from error
    if how.sampler.num_levels > longest:
        raise ConfigError(
            f"the {stage} was trained with {longest} timesteps; it cannot sample in {how.sampler.num_steps}: take fewer"
        )
    return how


@dataclass
class PriorSampling(DiffusionSampling):
    """The prior draws ``num_candidates`` z_i for a caption and keeps the one closest to z_t (paper §2.2: 2)."""

    num_candidates: int = 2

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; it must be at least 1")


@dataclass
class UpsamplerSampling(DiffusionSampling):
    """There is nothing to guide by; ``guidance.threshold`` still limits the predicted picture.

    ``noise_level``: deviation of the noise that covers the base's faults; for upsamplers trained with noise.
    ``tile``: side in pixels of the pieces in which the net sees a picture that is larger, to save memory (null: the whole);
    ``tile_overlap``: how far neighbours overlap. Both are multiples of the net's stride.
    """

    noise_level: float = 0.0
    tile: int | None = None
    tile_overlap: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance.scale != 1.0 or self.guidance.interval is not None or self.guidance.rescale:
            raise ValueError("an upsampler has nothing to guide by: leave out guidance.scale, interval and rescale")
        if self.noise_level < 0:
            raise ValueError(f"noise_level is {self.noise_level}, a standard deviation; 0 adds no noise")
        if self.tile is not None and not 0 <= 2 * self.tile_overlap <= self.tile:
            raise ValueError(
                f"tile_overlap={self.tile_overlap} must lie between 0 and half of tile={self.tile}: "
                "no place is seen by more than two tiles in a row"
            )


@dataclass
class ARSampling:
    """Of the autoregressive prior; the paper gives the percentile (50 was best of 50, 70, 85, 95), the rest is ours.

    ``percentile``: the dot product of z_i and z_t is drawn from above it. ``temperature`` divides the logits (0: always the
    likeliest bucket); ``top_p`` leaves out the least likely buckets beyond that share (Holtzman et al. 2020).
    ``guidance_scale`` s makes the logits null + s (conditional - null); 1 is none. Of ``num_candidates`` draws the one
    closest to z_t is kept.
    """

    percentile: float = 50.0
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    num_candidates: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.percentile < 100:
            raise ValueError(f"percentile is {self.percentile}; it must lie in [0, 100), 50 being the top half")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a share, above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("top_p has no effect at temperature=0, which takes the likeliest bucket; leave out one")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be at least 0, 1 being none")
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; it must be at least 1")

    def guided(self, logits: Tensor) -> Tensor:
        """Logits (B, V); with guidance from (2B, V), the unconditional rows last."""
        if self.guidance_scale == 1.0:
            return logits.float()
        cond, null = logits.float().chunk(2)
        return null + self.guidance_scale * (cond - null)

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """A bucket (B,) for each row of logits (B, V), by inverting the distribution function at uniform (B,)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        shares = (logits / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = shares.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            shares = torch.zeros_like(shares).scatter(-1, places, ordered)
        cumulative = shares.cumsum(dim=-1)
        below = cumulative <= uniform[:, None] * cumulative[:, -1:]
        return below.sum(dim=-1).clamp(max=logits.shape[-1] - 1)


AnyPriorSampling = PriorSampling | ARSampling | NoSampling
