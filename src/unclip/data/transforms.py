"""Encoded pictures to uint8 tensors. No flips and no random crops: captions speak of left and right."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unclip.errors import DataError

_DAMAGE = (  # what PIL's decoders raise for damaged files
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_ORIENTED = (b"Exif\0\0", b"Orientation")  # where a picture may say how the camera was held
FORMATS = ("PNG", "JPEG", "WEBP")  # of PIL's many, whatever a file is called: for EPS it starts a program
MAX_BYTES = 200_000_000
MAX_PIXELS = 80_000_000  # a file of a few kilobytes can claim to hold gigabytes
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS stands in for PIL's two limits


def read_image(path: Path) -> Tensor:
    """The picture of a file as uint8 (3, H, W). Raises DataError, with the path, for one that cannot be read."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}")
        return load_image(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}; give a picture as png, jpg or webp") from error


def load_image(content: bytes, size: int | None = None) -> Tensor:
    """:func:`load_pixels` as a (3, H, W) tensor."""
    return torch.from_numpy(load_pixels(content, size)).permute(2, 0, 1).contiguous()


def load_pixels(content: bytes, size: int | None = None, enlarge: bool = True) -> np.ndarray:
    """Decode a png, jpg or webp file to (H, W, 3) uint8 RGB; with ``size``, cut to a size x size square.

    Transparency is laid on white, the camera's orientation is applied; grey, palette, CMYK and 16-bit pictures become
    RGB, an animation gives its first picture. Raises DataError when the file is damaged, of another format or holds
    more than MAX_PIXELS, and without ``enlarge`` when its shorter side is below ``size``.
    """
    pixels = _plain_jpeg(content, size)
    if pixels is not None:
        if size is None or pixels.shape[:2] == (size, size):
            return pixels
        return np.asarray(square(Image.fromarray(pixels), size, enlarge))
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                megapixels = image.width * image.height / 1e6
                raise ValueError(f"{megapixels:.0f} megapixels, more than {MAX_PIXELS / 1e6:.0f}: make it smaller")
            if size is not None:
                image.draft(
                    "RGB", (2 * size, 2 * size)
                )  # JPEG decodes straight to a fraction of its size; else no effect
            picture = to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise DataError("the picture cannot be decoded (it is no png, jpg or webp)") from error
    except _DAMAGE as error:
        raise DataError(f"the picture cannot be decoded ({error})") from error
    return np.array(picture if size is None else square(picture, size, enlarge))


def _plain_jpeg(content: bytes, size: int | None) -> np.ndarray | None:
    """What PIL's decoder gives, in less time, for JPEGs in YCbCr or grey without orientation; None for all other files.

    Damaged ones too are left to PIL, which decides what can still be read.
    """
    if not content.startswith(b"\xff\xd8\xff") or any(mark in content for mark in _ORIENTED):
        return None
    try:
        *sides, colours, _ = simplejpeg.decode_jpeg_header(content)
        height, width = map(int, sides)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        shrink = 1 if size is None else max((s for s in (8, 4, 2) if min(height, width) // (2 * size) >= s), default=1)
        if shrink == 1:
            return simplejpeg.decode_jpeg(content, "RGB")
        return simplejpeg.decode_jpeg(content, "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink))
    except ValueError:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip, not scale, the values
        grey = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square(image: Image.Image, size: int, enlarge: bool = True) -> Image.Image:
    """The central square, resized to ``size`` pixels a side (bicubic, antialiased); DataError if it may not be enlarged."""
    side = min(image.size)
    if side < size and not enlarge:
        raise DataError(
            f"the picture has {image.width}x{image.height} pixels, too few for a square of {size}: leave such pictures out "
            "(unclip data folder --min-size), or take them enlarged with data.enlarge=true"
        )
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    if side == size:
        return image if image.size == (size, size) else image.crop(box)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """PIL picture of a (3, H, W) uint8 tensor."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
