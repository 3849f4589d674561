"""What a browser sent, checked before anything is made of it."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.data.transforms import FORMATS, load_image
from unclip.errors import ConfigError, DataError

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_CAPTION = 20_000  # characters; CLIP reads far fewer, which a note then says
MAX_SEED = 2**31 - 1
MOST_PICTURES, MOST_STEPS = 16, 1000


def caption_of(value: Any, what: str = "the caption") -> str:
    """A caption without the spaces around it; ConfigError where it is empty or far too long."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ConfigError(f"{what} is empty; say what the picture shows, for example: a red cube")
    if len(text) > MAX_CAPTION:
        raise ConfigError(
            f"{what} has {len(text):,} characters; take fewer than {MAX_CAPTION:,} (CLIP reads far fewer)"
        )
    return text


def number_of(value: Any, what: str, low: float, high: float) -> float:
    """A number between ``low`` and ``high``, or ConfigError."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not low <= value <= high:
        raise ConfigError(f"{what} is {_shown(value)}; it must be a number from {low:g} to {high:g}")
    return float(value)


def whole_of(value: Any, what: str, low: int, high: int) -> int:
    """A whole number between ``low`` and ``high``, or ConfigError."""
    number = number_of(value, what, low, high)
    if number != int(number):
        raise ConfigError(f"{what} is {_shown(value)}; it must be a whole number")
    return int(number)


def picture_of(value: Any, folder: Path, what: str = "the picture") -> Tensor:
    """uint8 (3, H, W) of an uploaded file, a mapping with its ``path``, which must lie below ``folder``.

    Raises ConfigError where there is none, where it is too large in bytes or pixels, or where it cannot be decoded.
    """
    content = _content(value, folder, what)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{what} claims to have hundreds of megapixels; send a smaller one") from error
    except Exception as error:
        raise _undecodable(what, error) from error
    if width * height > MAX_PIXELS:
        raise ConfigError(
            f"{what} has {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} megapixels; send a smaller one"
        )
    try:
        return load_image(content)
    except DataError as error:
        raise _undecodable(what, error) from error


def mask_of(value: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Picture uint8 (3, H, W) and mask bool (H, W) of a drawing: True where a layer above the background was painted on."""
    if not isinstance(value, dict) or not value.get("background"):
        raise ConfigError("there is no picture yet; choose one, then paint over what is to be drawn anew")
    picture = picture_of(value["background"], folder)
    mask = torch.zeros(picture.shape[1:], dtype=torch.bool)
    for layer in value.get("layers") or []:
        painted = _alpha(layer, folder)
        if painted.shape != mask.shape:
            raise ConfigError(
                f"the mask has {painted.shape[1]}x{painted.shape[0]} pixels but the picture {mask.shape[1]}x"
                f"{mask.shape[0]}; draw it on the picture"
            )
        mask |= painted
    if not bool(mask.any()):
        raise ConfigError("nothing is painted yet; paint over what is to be drawn anew")
    return picture, mask


def _alpha(layer: Any, folder: Path) -> Tensor:
    """Where a layer is opaque, or white in one without transparency."""
    picture_of(layer, folder, "the mask")  # the same checks
    with Image.open(io.BytesIO(_content(layer, folder, "the mask")), formats=FORMATS) as image:
        band = image.convert("RGBA").getchannel("A") if "A" in image.getbands() else image.convert("L")
        return torch.from_numpy(np.array(band) > 127)


def _content(value: Any, folder: Path, what: str) -> bytes:
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{what} is missing; choose a PNG, JPEG or WebP file")
    file = Path(path).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise ConfigError(f"{what} is not a file that was uploaded here; choose it again")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{what} has {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}; send a smaller one")
    return file.read_bytes()


def _undecodable(what: str, error: Exception) -> ConfigError:
    if isinstance(error, DataError):
        return ConfigError(f"{what} cannot be read: {error}; choose a PNG, JPEG or WebP file")
    return ConfigError(f"{what} is damaged or no picture; choose a PNG, JPEG or WebP file")


def _shown(value: Any) -> str:
    return "empty" if value in (None, "") else repr(value)[:40]
