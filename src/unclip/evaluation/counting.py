"""Counts the solids of a busy scene: three to eight of one size that do not cover each other; nothing is learned.

As in scene_fit, the picture becomes one complex plane. For each size that the scenes of the shapes data have, the template
that explains most of what is left is taken away, again and again; the size that leaves the least wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy import fft

from unclip.data.shapes_render import draw_sprite
from unclip.data.shapes_solids import SHAPES
from unclip.evaluation.probes import Share, read_scene
from unclip.evaluation.scene_fit import GLOSS_LOSS, ONE_IS_ENOUGH, colour_of, signal

SIDE = 64  # every picture is read at this size: the smallest solids are 14 pixels wide
UNITS = (
    0.2175,
    0.29,
    0.395,
)  # sides of the picture: of two rows of four, of three or two rows of three, of two rows of two
_STRETCH = (0.93, 1.0, 1.07)  # a drawn solid is not exactly as large
_PAD = 96  # transforms are this wide, so that correlations do not wrap around
_FAINT = 0.18  # of a solid's chroma: what is less counts as noise
_AMPLITUDE = (0.55, 1.45)  # of a solid's chroma, against its colour's
_WORTH = 0.45  # of its template's energy that a solid must explain
_CLEAN = 0.30  # the share of energy that a readable scene may leave unexplained
_MOST = 12  # solids: more than any scene has


@dataclass(frozen=True)
class Count:
    """Colour and shape of each solid; none, and a residual of 1, where the picture is no clean scene."""

    objects: tuple[tuple[str, str], ...]
    residual: float


@lru_cache(maxsize=256)
def _template(shape: str, unit: float) -> tuple[np.ndarray, np.ndarray, float, int, int]:
    """Diffuse light of a solid on the grid, its transform, its energy, and the offset of its first pixel."""
    planes, left, top = draw_sprite(shape, unit * SIDE, 0.0, 0.0)
    light = np.maximum(planes[..., 1] - GLOSS_LOSS * planes[..., 2], 0).astype(np.float32)
    return light, np.conj(fft.fft2(light, (_PAD, _PAD))).astype(np.complex64), float((light**2).sum()), left, top


@cache
def _choices(unit: float) -> list[tuple[str, float]]:
    return [(shape, unit * stretch) for shape in SHAPES for stretch in _STRETCH]


def _greedy(plane: np.ndarray, unit: float) -> Count:
    """Matching pursuit (Mallat & Zhang 1993) with the templates of one size."""
    rest, total = plane.copy(), float((np.abs(plane) ** 2).sum())
    objects: list[tuple[str, str]] = []
    for _ in range(_MOST):
        transform = fft.fft2(rest, (_PAD, _PAD))
        best, found = 0.0, None
        for shape, size in _choices(unit):
            light, conjugate, energy, _, _ = _template(shape, size)
            height, width = light.shape
            match = fft.ifft2(transform * conjugate)[: SIDE - height + 1, : SIDE - width + 1]
            strength = np.abs(match) / energy
            explained = np.where(
                (strength > _AMPLITUDE[0]) & (strength < _AMPLITUDE[1]), np.abs(match) ** 2 / energy, 0
            )
            row, column = np.unravel_index(int(explained.argmax()), explained.shape)
            if explained[row, column] > max(best, _WORTH * energy):
                best = float(explained[row, column])
                found = (shape, light, complex(match[row, column]) / energy, int(row), int(column))
        if found is None:
            break
        shape, light, amplitude, row, column = found
        rest[row : row + light.shape[0], column : column + light.shape[1]] -= amplitude * light
        objects.append((colour_of(amplitude)[0], shape))
    return Count(tuple(objects), float((np.abs(rest) ** 2).sum()) / max(total, 1e-9))


def count_solids(picture: np.ndarray) -> Count:
    """Reads a square RGB picture, (S, S, 3) uint8, of one to eight solids: one or two, however they stand, by
    :func:`read_scene`; more where they do not cover each other."""
    few = read_scene(picture)
    if few.objects:
        return Count(tuple((one.colour, one.shape) for one in few.objects), few.residual)
    plane = signal(picture, SIDE)
    plane = np.where(np.abs(plane) < _FAINT, 0, plane).astype(np.complex64)
    best = Count((), 1.0)
    for unit in UNITS:
        best = min(best, _greedy(plane, unit), key=lambda one: one.residual)
        if best.residual < ONE_IS_ENOUGH:
            break
    return best if best.residual <= _CLEAN else Count((), 1.0)


def count_shares(counts: Sequence[Count], scenes: Sequence[Mapping[str, Any]]) -> dict[str, Share]:
    """By number of objects asked for, "1" to "8", and "all": how often as many are seen, of whatever kind. ``right``: all
    scenes of which every colour and shape is right as well; ``readable``: with any solid at all."""
    found: dict[str, list[bool]] = {}
    right, readable = [], []
    for count, scene in zip(counts, scenes, strict=True):
        asked = sorted((one["colour"], one["shape"]) for one in scene["objects"])
        hit = len(count.objects) == len(asked)
        found.setdefault(str(len(asked)), []).append(hit)
        found.setdefault("all", []).append(hit)
        right.append(sorted(count.objects) == asked)
        readable.append(bool(count.objects))
    shares = {name: Share(sum(hits), len(hits)) for name, hits in sorted(found.items())}
    return {**shares, "right": Share(sum(right), len(right)), "readable": Share(sum(readable), len(readable))}
