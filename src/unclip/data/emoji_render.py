"""Draws emoji on white, and tells which drawings look the same. Worker processes import this module only."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

BASE_SIZE = (
    256  # every size up to this one is scaled down from one rendering, so a size's bytes do not depend on the others
)
THUMB_SIZE = 32
NEAR = 0.6  # of 255, mean absolute difference of two thumbs


@dataclass(frozen=True)
class Drawing:
    """One picture's source: SVG text, or an encoded raster of BASE_SIZE pixels with transparency."""

    key: str
    svg: str | None = None
    raster: bytes | None = None


@dataclass(frozen=True)
class Rendered:
    """`pngs` maps sizes to encoded RGB pictures; `thumb` is (THUMB_SIZE, THUMB_SIZE, 3) uint8."""

    key: str
    pngs: dict[int, bytes]
    thumb: np.ndarray


def draw(drawing: Drawing, size: int) -> Image.Image:
    """RGB on white, size x size. A raster source is never enlarged (ValueError)."""
    if drawing.svg is not None:
        import resvg_py

        png = resvg_py.svg_to_bytes(
            svg_string=drawing.svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        return Image.open(io.BytesIO(png)).convert("RGB")
    if drawing.raster is None:
        raise ValueError(f"{drawing.key} has neither an SVG nor a raster source")
    picture = Image.open(io.BytesIO(drawing.raster)).convert("RGBA")
    if min(picture.size) < size:
        raise ValueError(f"{drawing.key} has {picture.size} pixels and is not enlarged to {size}")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def render(drawing: Drawing, sizes: Sequence[int]) -> Rendered:
    """The picture at each of `sizes` (at most BASE_SIZE), scaled down from one rendering."""
    base = draw(drawing, BASE_SIZE)
    thumb = np.asarray(base.resize((THUMB_SIZE, THUMB_SIZE), Image.Resampling.BOX))
    pngs = {
        size: encode(base if size == BASE_SIZE else base.resize((size, size), Image.Resampling.LANCZOS))
        for size in sizes
    }
    return Rendered(drawing.key, pngs, thumb)


def render_large(drawing: Drawing, size: int) -> bytes:
    """PNG of a vector source drawn at `size` itself."""
    return encode(draw(drawing, size))


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def distinct(thumbs: np.ndarray) -> list[bool]:
    """For each of the (N, H, W, 3) uint8 thumbs: does it differ from every earlier distinct one by at least NEAR?

    The mean absolute difference of 8 x 8 block means never exceeds that of the pixels, so they rule out most pairs.
    """
    count, height, width, _ = thumbs.shape
    pixels = thumbs.astype(np.float32)
    coarse = pixels.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4)).reshape(count, -1)
    keep = np.zeros(count, bool)
    for i in range(count):
        near = np.flatnonzero(keep[:i])
        near = near[np.abs(coarse[near] - coarse[i]).mean(1) < NEAR]
        keep[i] = not (np.abs(pixels[near] - pixels[i]).mean((1, 2, 3)) < NEAR).any()
    return keep.tolist()
