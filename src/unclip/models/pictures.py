"""Pictures on the device: value range, antialiased resizing, blur and crops."""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


class Bsr(Enum):
    """How strongly the low-resolution pictures of training are degraded (Zhang et al. 2021; data/degrade.py).

    ``full``: the paper's strengths. ``light``: milder ones, as latent diffusion takes them.
    """

    none = "none"
    light = "light"
    full = "full"


def to_range(image: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def resize(image: Tensor, size: int | tuple[int, int], clamp: bool = True) -> Tensor:
    """Antialiased bicubic resize of float32 (B, 3, H, W) in [-1, 1], clamped to [-1, 1] or not; size: a side, or (H, W)."""
    shape = (size, size) if isinstance(size, int) else size
    if tuple(image.shape[-2:]) == shape:
        return image
    resized = F.interpolate(image, shape, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1) if clamp else resized


def middle(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest central part of (..., H, W) that has the proportions of ``size``, height and width."""
    height, width = image.shape[-2:]
    scale = min(height / size[0], width / size[1])
    inner = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return image[..., top : top + inner[0], left : left + inner[1]]


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] to uint8 on the CPU."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def training_pictures(image: Tensor | None, size: int) -> Tensor:
    """A batch's uint8 pictures as float32 (B, 3, size, size) in [-1, 1].

    Larger ones are resized; smaller ones and such as are not square are refused.
    """
    if image is None:
        raise ValueError("this model trains on pictures but the batch has none; ask the data for the column image")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"pictures of shape {tuple(image.shape)}; this takes (B, 3, H, W): convert grey and alpha to RGB"
        )
    if image.shape[-2] != image.shape[-1]:
        raise ValueError(
            f"pictures of {tuple(image.shape[-2:])} pixels, which are not square: "
            f"set data.image_size={size}, which takes their central square"
        )
    if min(image.shape[-2:]) < size:
        raise ValueError(
            f"pictures of {tuple(image.shape[-2:])} pixels but the model makes {size}; "
            f"use data of at least {size} pixels or a smaller image_size"
        )
    return resize(to_range(image), size)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a 3x3 kernel and reflected borders (SR3, Saharia et al. 2021). (B, C, H, W) alike."""
    side = torch.exp(torch.tensor(-0.5 / sigma**2))
    line = torch.stack((side, torch.ones(()), side))
    line = (line / line.sum()).to(image.device, non_blocking=True)
    planes = F.pad(image.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    planes = F.conv2d(F.conv2d(planes, line.view(1, 1, 3, 1)), line.view(1, 1, 1, 3))
    return planes.view(image.shape)


def crop(image: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Cut a square of ``size`` pixels from each picture (B, C, H, W) at its own corner; top and left (B,) int64."""
    span = torch.arange(size, device=image.device)
    rows = (top[:, None] + span)[:, :, None]
    columns = (left[:, None] + span)[:, None, :]
    batch = torch.arange(len(image), device=image.device)[:, None, None]
    cut = image.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
    return cut.contiguous()  # else CPUs would go on in channels_last, in which their GroupNorm is slow
