"""Draws a scene of solids: cached anti-aliased sprites over a pale wall and floor, soft shadows, a sign."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip.data.shapes_scene import PALETTE, Backdrop, Placed, Scene
from unclip.data.shapes_solids import extent, shade

_SCALE_STEPS = 256  # sprites come in multiples of 1/256 of the side, so that few are drawn and many are reused
_SAMPLES = 4  # per pixel and axis
_SIGN_BOX = (0.20, 0.04, 0.80, 0.24)


def draw_sprite(shape: str, scale: float, dx: float, dy: float) -> tuple[np.ndarray, int, int]:
    """The solid with its unit `scale` pixels long and its base point at pixel position (dx, dy).

    Returns (h, w, 3) float32 planes (coverage, coverage x diffuse, coverage x gloss, see `shade`) and the column and
    row, possibly negative, of the planes' first pixel.
    """
    half, below, above = (scale * e for e in extent(shape))
    left, top = int(np.floor(dx - half)), int(np.floor(dy - above))
    width, height = int(np.ceil(dx + half)) - left, int(np.ceil(dy + below)) - top
    columns = left + (np.arange(width * _SAMPLES) + 0.5) / _SAMPLES
    rows = top + (np.arange(height * _SAMPLES) + 0.5) / _SAMPLES
    x, y = np.meshgrid((columns - dx) / scale, (dy - rows) / scale)
    planes = shade(shape, x, y).reshape(height, _SAMPLES, width, _SAMPLES, 3).mean(axis=(1, 3))
    return planes.astype(np.float32), left, top


_sprite = lru_cache(maxsize=4096)(draw_sprite)


def paint(canvas: np.ndarray, placed: Placed) -> None:
    """Draws the solid onto `canvas` (S, S, 3) float32, 0 to 255; what lies outside is cut off."""
    side = canvas.shape[0]
    parts = 4 if side <= 64 else 1  # sub-pixel positions: they matter in small pictures only
    x, y = (round(v * side * parts) / parts for v in (placed.x, placed.y))
    scale = round(placed.scale * _SCALE_STEPS) / _SCALE_STEPS * side
    planes, left, top = _sprite(placed.solid.shape, scale, x % 1, y % 1)
    left, top = left + int(x // 1), top + int(y // 1)
    rows = slice(max(top, 0), min(top + planes.shape[0], side))
    columns = slice(max(left, 0), min(left + planes.shape[1], side))
    seen = planes[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    coverage, diffuse, gloss = seen[..., :1], seen[..., 1:2], seen[..., 2:]
    colour = np.array(PALETTE[placed.solid.colour], dtype=np.float32)
    region = canvas[rows, columns]
    region *= 1 - coverage
    region += np.minimum(diffuse * colour + 255 * gloss, 255 * coverage)


@lru_cache(maxsize=8)
def _grid(side: int) -> np.ndarray:
    """Pixel centres in sides of the picture, (side,) float32."""
    return ((np.arange(side) + 0.5) / side).astype(np.float32)


def _paint_backdrop(backdrop: Backdrop, side: int) -> np.ndarray:
    grid = _grid(side)
    wall, floor = np.array(backdrop.wall, dtype=np.float32), np.array(backdrop.floor, dtype=np.float32)
    below = np.clip((grid - backdrop.horizon) * 24 + 0.5, 0, 1)[:, None]  # a soft edge, about a twentieth of the side
    column = wall * (1 - below) + floor * below + (grid[:, None] - 0.5) * 14
    row = (grid[:, None] - 0.5) * np.float32(backdrop.slope)
    return np.clip(column[:, None] + row[None], 0, 255).astype(np.float32)


def _paint_shadow(canvas: np.ndarray, placed: Placed) -> None:
    """Darkens the floor around the base and a little to the right of it, away from the light."""
    grid = _grid(canvas.shape[0])
    half = placed.scale * extent(placed.solid.shape)[0]
    across = (grid - placed.x - 0.18 * placed.scale) / (half * 1.15)
    down = (grid - placed.y) / (placed.scale * 0.20)
    canvas *= 1 - 0.30 * (np.exp(-(down**2))[:, None] * np.exp(-(across**4))[None])[..., None]


@lru_cache(maxsize=64)
def _sign(word: str, side: int) -> Image.Image:
    """A pale board with a dark word; the whole picture's size, transparent elsewhere."""
    big = max(side, 256)
    layer = Image.new("RGBA", (big, big), (90, 90, 96, 0))
    draw = ImageDraw.Draw(layer)
    x0, y0, x1, y1 = (v * big for v in _SIGN_BOX)
    draw.rectangle((x0, y0, x1, y1), fill=(250, 250, 246, 255), outline=(90, 90, 96, 255), width=max(big // 64, 1))
    middle, font = ((x0 + x1) / 2, (y0 + y1) / 2), ImageFont.load_default(big * 0.15)
    draw.text(middle, word.upper(), font=font, fill=(34, 34, 44, 255), anchor="mm")
    return layer.resize((side, side), Image.Resampling.BOX)


def render(scene: Scene, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    canvas = _paint_backdrop(scene.backdrop, side)
    for placed in scene.objects:
        if placed.on_floor:
            _paint_shadow(canvas, placed)
    for placed in sorted(scene.objects, key=lambda p: not p.on_floor):  # what rests on another solid comes last
        paint(canvas, placed)
    picture = np.rint(canvas).clip(0, 255).astype(np.uint8)
    if scene.sign is None:
        return picture
    layer = _sign(scene.sign, side)
    return np.asarray(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB"))
