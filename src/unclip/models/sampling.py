"""How the models turn conditions into samples: typed settings, one object per model."""

from dataclasses import dataclass, field

from unclip.diffusion.guidance import Guidance
from unclip.diffusion.samplers import Sampler, SamplerConfig


@dataclass
class NoSampling:
    """Of a model with one answer for a condition: nothing to choose."""


@dataclass
class DiffusionSampling:
    """Sampler and guidance of a decoder or an upsampler (which has no guidance: its scale must be 1)."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.sampler.name is Sampler.analytic:
            raise ValueError("sampler.name=analytic is for diffusion priors; here take ancestral, ddim or dpmpp_2m")


@dataclass
class PriorSampling(DiffusionSampling):
    """The prior draws ``num_candidates`` z_i for a caption and keeps the one closest to z_t (paper §2.2: 2)."""

    num_candidates: int = 2

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; it must be at least 1")


@dataclass
class UpsamplerSampling(DiffusionSampling):
    """``noise_level``: deviation of the noise that covers the base's faults; for upsamplers trained with noise."""

    noise_level: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_level < 0:
            raise ValueError(f"noise_level is {self.noise_level}, a standard deviation; 0 adds no noise")
