"""What is to be drawn, how, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.repaint import RePaint
from unclip.models.pictures import resize, to_range, to_uint8
from unclip.models.sampling import AnyPriorSampling, DiffusionSampling, UpsamplerSampling


@dataclass
class Sampling:
    """How each stage samples; None, or an upsampler that is not named, takes what the stage's artifact says.

    ``size``: height and width of the decoder's picture, multiples of its net's stride; None: the square it was trained for.
    ``last``: the stage to stop after, decoder or an upsampler; None: all upsamplers run. ``repaint`` is for inpainting.
    ``refinements``: evaluations of the decoder for each step backwards; more of them reconstruct better.
    """

    prior: AnyPriorSampling | None = None
    decoder: DiffusionSampling | None = None
    upsamplers: dict[str, UpsamplerSampling] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    last: str | None = None
    repaint: RePaint = field(default_factory=RePaint)
    refinements: int = 1


@dataclass
class Job:
    """One picture to draw, by what fixes it: its latent (z_i, x_T), its caption and its seed.

    ``caption`` is what prior and decoder read; None drops it. ``image_emb`` (D,) raw z_i; None: the prior's for the caption.
    ``x_T`` (3, h, w); None: the seed's noise. ``known`` uint8 (3, H, W) is repainted where ``mask`` (H, W) is True. What
    the picture is, for people: ``title``, and ``words``, the operation with its arguments.
    """

    seed: int
    caption: str | None = None
    negative: str | None = None
    image_emb: Tensor | None = None
    x_T: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    title: str = ""
    words: dict[str, Any] = field(default_factory=dict)


@dataclass
class Drawn:
    """What a batch of jobs became: uint8 pictures (3, H, W); the length in tokens that their captions were padded to."""

    images: list[Tensor]
    num_tokens: int


@dataclass
class Picture:
    """One picture: uint8 (3, H, W), its caption or title, its seed, the artifacts' hashes, and what makes it again.

    ``words`` say what was done: ``operation`` and its arguments, such as ``theta``. ``places``: by stage, how large its batch
    was, and its place there, on which rounding depends; ``num_tokens``: what captions were padded to.
    """

    image: Tensor
    caption: str
    seed: int
    artifacts: dict[str, str] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    job: Job = field(default_factory=lambda: Job(0))
    how: Sampling = field(default_factory=Sampling)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_tokens: int = 0
    precision: str = "fp32"


def known_parts(jobs: Sequence[Job], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Known pictures (B, 3, h, w) in [-1, 1] and masks (B, 1, h, w): True where anything of a pixel is repainted."""
    known = torch.cat([resize(to_range(there(job.known)[None]), size) for job in jobs])
    return known, torch.stack([_fitted(there(job.mask), size) for job in jobs])


def laid_over(image: Tensor, job: Job) -> Tensor:
    """The drawn uint8 picture (3, H, W), with the known one where nothing was to be repainted."""
    if job.mask is None:
        return image
    size = (image.shape[-2], image.shape[-1])
    known = to_uint8(resize(to_range(there(job.known)[None]), size))[0]
    return torch.where(_fitted(job.mask, size), image, known)


def there(tensor: Tensor | None) -> Tensor:
    """A field that all jobs of a batch have if one has it."""
    assert tensor is not None, "jobs of one batch must be alike"
    return tensor


def _fitted(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.adaptive_max_pool2d(mask[None].float(), size) > 0
