"""Low-resolution pictures as they come from elsewhere: BSR, the random degradations of Zhang et al. 2021.

"Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", section 3, written from its description.
The loader's workers apply it to the uint8 target, one picture at a time: the order of the operations differs between
pictures, and JPEG runs on a CPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.models.pictures import Bsr, training_pictures

KERNELS = range(7, 23, 2)  # sides of the blur kernels in pixels
HALVED = 0.25  # share of pictures halved before the rest, where the scale is 4 or more
DOWN_UP = 0.25  # share of pictures that take a detour over a third size
COMPRESSED = 0.75  # share of pictures with JPEG among the shuffled operations, beside the last one
GENERAL, GREY = 0.2, 0.4  # shares of correlated and of grey noise; the rest is independent between channels
RESIZES = (
    ("bilinear", True),
    ("bilinear", False),
    ("bicubic", False),
)  # with antialiasing? "nearest" would move a picture
NUM_DRAWS = 32


@dataclass(frozen=True)
class Strength:
    """``blur``: share of the paper's kernel widths; ``noise``: deviation in levels of 255; ``quality`` of JPEG."""

    blur: float
    noise: tuple[float, float]
    quality: tuple[int, int]


STRENGTHS = {
    Bsr.light: Strength(blur=0.25, noise=(1.0, 2.0), quality=(80, 95)),  # milder, as for latent diffusion's upsampler
    Bsr.full: Strength(blur=1.0, noise=(1.0, 25.0), quality=(30, 95)),  # section 3 of the paper
}


class Degrade:
    """Adds ``low``, the degraded picture of ``low_size`` pixels, to batches of targets of at least ``image_size``.

    What happens to a sample depends on the run's seed and the sample's position only.
    """

    def __init__(self, bsr: Bsr, image_size: int, low_size: int, seed: int) -> None:
        self.strength = STRENGTHS[bsr]
        self.image_size, self.low_size, self.seed = image_size, low_size, seed

    def __call__(self, batch: Batch) -> Batch:
        """The batch with ``low`` uint8 (B, 3, low_size, low_size). Raises ValueError for pictures that are too small."""
        image = batch.column("image")
        low = []
        for row, position in enumerate(batch.position):  # one by one: what fits a core's cache is done sooner
            picture = (training_pictures(image[row : row + 1], self.image_size)[0] + 1) / 2
            noise = Noise.at(self.seed, [position]).branch("degrade")
            low.append(degraded(picture, self.low_size, self.strength, noise))
        return replace(batch, low=torch.stack(low))


def degraded(picture: Tensor, low_size: int, strength: Strength, noise: Noise) -> Tensor:
    """A picture (3, S, S) in [0, 1] as uint8 (3, low_size, low_size); noise: of one sample.

    Two blurs, the change of size, Gaussian noise and JPEG in random order, then JPEG once more.
    """
    draws = iter(noise.uniform((NUM_DRAWS,), "parameters")[0].tolist())
    scale = picture.shape[-1] / low_size
    if next(draws) < HALVED and scale >= 4:
        picture = _resized(picture, picture.shape[-1] // 2, next(draws))
        scale /= 2
    compressed = next(draws) < COMPRESSED
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda x: blurred(x, isotropic(scale, strength, *_take(draws, 2))),
        lambda x: blurred(x, anisotropic(scale, strength, *_take(draws, 4))),
        lambda x: shrunk(x, low_size, *_take(draws, 4)),
        lambda x: noised(x, strength, noise, *_take(draws, 2)),
        lambda x: as_jpeg(x, strength, *_take(draws, 1)) if compressed else x,
    ]
    for place in np.argsort(_take(draws, len(operations))):
        picture = operations[place](picture)
    return (as_jpeg(picture, strength, next(draws)) * 255).round().to(torch.uint8)


def isotropic(scale: float, strength: Strength, size: float, width: float) -> Tensor:
    """A round Gaussian kernel; all numbers but ``scale`` in [0, 1). Its deviation is 0.1 to 2.8 pixels at scale 4."""
    sigma = strength.blur * _between(0.1, 2.0 + 0.2 * scale, width)
    return gaussian_kernel(_kernel_size(size), sigma, sigma, 0.0)


def anisotropic(scale: float, strength: Strength, size: float, angle: float, width: float, height: float) -> Tensor:
    """An oblong Gaussian kernel at any angle, with deviations of 0.5 to 8 pixels at scale 4."""
    sigma_1, sigma_2 = (strength.blur * _between(0.5, 4.0 + scale, value) for value in (width, height))
    return gaussian_kernel(_kernel_size(size), sigma_1, sigma_2, math.pi * angle)


def gaussian_kernel(size: int, sigma_1: float, sigma_2: float, angle: float) -> Tensor:
    """(size, size) with sum 1; ``sigma_1`` lies along the direction ``angle``, counted from the rows' direction."""
    line = torch.arange(size) - (size - 1) / 2
    along = math.cos(angle) * line + math.sin(angle) * line[:, None]
    across = math.cos(angle) * line[:, None] - math.sin(angle) * line
    kernel = torch.exp(-0.5 * ((along / sigma_1) ** 2 + (across / sigma_2) ** 2))
    return kernel / kernel.sum()


def blurred(picture: Tensor, kernel: Tensor) -> Tensor:
    """A picture (C, H, W) under a symmetric kernel of odd side, with reflected borders, by fast Fourier transforms."""
    height, width = picture.shape[-2:]
    radius = min(len(kernel) // 2, height - 1, width - 1)
    cut = len(kernel) // 2 - radius  # for pictures smaller than the kernel
    kernel = kernel[cut : len(kernel) - cut, cut : len(kernel) - cut]
    kernel = kernel / kernel.sum()
    padded = F.pad(picture, (radius,) * 4, mode="reflect")
    shape = [-(-side // 32) * 32 for side in padded.shape[-2:]]  # sizes whose transforms are fast
    product = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernel, s=shape)
    start = 2 * radius
    return torch.fft.irfft2(product, s=shape)[:, start : start + height, start : start + width]


def shrunk(picture: Tensor, size: int, detour: float, between: float, first: float, last: float) -> Tensor:
    """The picture resized to ``size``, sometimes over a third size between half of it and the picture's own."""
    if detour < DOWN_UP:
        picture = _resized(picture, round(_between(size / 2, picture.shape[-1], between)), first)
    return _resized(picture, size, last)


def noised(picture: Tensor, strength: Strength, noise: Noise, level: float, kind: float) -> Tensor:
    """Gaussian noise: with random correlations between the channels, grey, or independent in each channel."""
    sigma = _between(*strength.noise, level) / 255
    shape = tuple(picture.shape)
    if kind < GENERAL:
        root = _covariance_root(noise.normal((3, 3), "axes")[0], noise.uniform((3,), "lengths")[0])
        grain = torch.einsum("ij,jhw->ihw", root, noise.normal(shape, "grain")[0])
    elif kind < GENERAL + GREY:
        grain = noise.normal((1, *shape[1:]), "grain")[0]
    else:
        grain = noise.normal(shape, "grain")[0]
    return torch.add(picture, grain, alpha=sigma).clamp_(0, 1)


def _covariance_root(axes: Tensor, lengths: Tensor) -> Tensor:
    """(3, 3) square root of a covariance with random axes, whose variances along them are ``lengths`` in [0, 1)."""
    rotation = torch.linalg.qr(axes).Q
    return rotation * lengths.sqrt()


def as_jpeg(picture: Tensor, strength: Strength, quality: float) -> Tensor:
    """The picture (3, H, W) in [0, 1] after compression with halved colour resolution."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    number = round(_between(*strength.quality, quality))
    encoded = simplejpeg.encode_jpeg(pixels, quality=number, colorsubsampling="420")
    return torch.from_numpy(simplejpeg.decode_jpeg(encoded)).permute(2, 0, 1).float() / 255


def _resized(picture: Tensor, size: int, kind: float) -> Tensor:
    mode, antialias = RESIZES[int(kind * len(RESIZES))]
    return F.interpolate(picture[None], (size, size), mode=mode, antialias=antialias, align_corners=False)[0].clamp_(
        0, 1
    )


def _kernel_size(size: float) -> int:
    return KERNELS[int(size * len(KERNELS))]


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def _take(draws: Iterator[float], count: int) -> list[float]:
    return list(islice(draws, count))
