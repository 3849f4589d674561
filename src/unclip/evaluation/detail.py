"""How much fine detail pictures have: KID of small patches, and the spectrum by octaves."""

import itertools

import torch
from torch import Tensor

from unclip.errors import DataError
from unclip.evaluation.features import PictureFeatures

OCTAVES = 4


def patches(pictures: Tensor, side: int) -> Tensor:
    """Non-overlapping squares of uint8 pictures (N, 3, H, W), row by row: (N·k, 3, side, side); edges are left out."""
    if min(pictures.shape[-2:]) < side:
        raise DataError(f"pictures of {pictures.shape[-1]}x{pictures.shape[-2]} px hold no patch of {side} px")
    cut = pictures.unfold(2, side, side).unfold(3, side, side)  # (N, 3, rows, columns, side, side)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()


def patch_features(pictures: Tensor, features: PictureFeatures) -> Tensor:
    """Features of the quarters of uint8 pictures (N, 3, S, S), each looked at as large as a whole picture is: their KID tells
    what is wrong with the detail, wherever it stands."""
    return features(patches(pictures, pictures.shape[-1] // 2))


def octave_powers(pictures: Tensor) -> Tensor:
    """(OCTAVES,) mean power of the luminance of uint8 pictures (N, 3, S, S) by octaves of frequency, the finest last.

    The finest is 1/4 to 1/2 cycles a pixel, each other one half of the next. A Hann window keeps the picture's edges out.
    """
    side = pictures.shape[-1]
    if pictures.shape[-2] != side or side < 2 ** (OCTAVES + 2):
        raise DataError(
            f"the spectrum takes square pictures of {2 ** (OCTAVES + 2)} px or more, not {tuple(pictures.shape[-2:])}"
        )
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    grey = (pictures.double() * weights).sum(dim=1)
    window = torch.hann_window(side, periodic=False, dtype=torch.float64)
    flat = (grey - grey.mean(dim=(1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(flat).abs().square().mean(dim=0)
    axis = torch.fft.fftfreq(side, dtype=torch.float64)
    radius = (axis[:, None].square() + axis.square()).sqrt()
    edges = [0.5 * 2.0 ** (i - OCTAVES) for i in range(OCTAVES + 1)]
    bands = [power[(radius >= low) & (radius < high)].mean() for low, high in itertools.pairwise(edges)]
    return torch.stack(bands)
