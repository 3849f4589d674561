"""Classifier-free guidance as a value: how strongly, where, and what keeps the result in range."""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

DYNAMIC_PERCENTILE = 0.995  # Saharia et al. 2022 (Imagen), app. C


class Threshold(Enum):
    """What happens to a predicted x0 beyond the model's clip_range.

    none: nothing; static: clamp (nothing where the model has no clip_range); dynamic: Imagen's, by the sample's own range.
    """

    none = "none"
    static = "static"
    dynamic = "dynamic"


@dataclass
class Guidance:
    """null + scale (conditional - null) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    It is applied to what the network predicts. For eps, x0 and v that is the same thing: given x_t, each is an affine
    function of the others, and the weights sum to one. Thresholding comes after it, on x0.
    """

    scale: float = 1.0
    """1 is the plain conditional model, 0 the unconditional one; between them the condition counts for less."""
    interval: tuple[float, float] | None = None
    """Where guidance acts (Kynkäänniemi et al. 2024): timestep fractions, 0 clean, 1 pure noise; None: everywhere."""
    rescale: float = 0.0
    """0 to 1: how far a sample's spread is moved back to the conditional one's (Lin et al. 2024, eq. 15-16)."""
    threshold: Threshold = Threshold.static

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(
                f"guidance.scale is {self.scale}; it must be at least 0: 1 is the plain conditional model, 0 the "
                "unconditional one. To steer away from a caption, give it as the negative one"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale}; it must lie in [0, 1] (0 is off, 0.7 usual)")
        if self.interval is None:
            return
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance.interval is {self.interval}; it must be [low, high] with 0 <= low <= high <= 1")

    def acts(self, step: int, num_steps: int) -> bool:
        """Whether this step of an evenly respaced schedule needs the unconditional branch."""
        if self.scale == 1.0:
            return False
        if self.interval is None:
            return True
        fraction = step / (num_steps - 1) if num_steps > 1 else 1.0
        return self.interval[0] <= fraction <= self.interval[1]

    def combine(self, cond: Tensor, null: Tensor, sample_dims: int | None = None) -> Tensor:
        """Both (B, ...): the guided prediction. sample_dims: the last dimensions that are one sample's; None: all but B."""
        guided = null + self.scale * (cond - null)
        if self.rescale == 0:
            return guided
        dims = tuple(range(-(sample_dims or cond.ndim - 1), 0))
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-8)
        return guided * (self.rescale * ratio + (1 - self.rescale))

    def limit(self, x0: Tensor, clip_range: float | None, sample_dims: int | None = None) -> Tensor:
        """x0 (B, ...) brought into [-clip_range, clip_range] as `threshold` says. sample_dims: as for `combine`."""
        if self.threshold is Threshold.none or clip_range is None:
            return x0
        if self.threshold is Threshold.static:
            return x0.clamp(-clip_range, clip_range)
        return dynamic_threshold(x0, clip_range, sample_dims or x0.ndim - 1)


def dynamic_threshold(x0: Tensor, clip_range: float, sample_dims: int) -> Tensor:
    """Clamp each sample to its own 99.5th percentile of |x0|, then shrink to clip_range (Imagen, app. C).

    x0 (..., *sample), the sample being the last ``sample_dims`` dimensions.
    """
    magnitude = x0.abs().flatten(-sample_dims)
    rank = math.ceil(DYNAMIC_PERCENTILE * magnitude.shape[-1])
    limit = magnitude.kthvalue(rank, dim=-1).values.clamp(min=clip_range)
    limit = limit.reshape(*limit.shape, *(1,) * sample_dims)
    return torch.maximum(torch.minimum(x0, limit), -limit) * (clip_range / limit)
