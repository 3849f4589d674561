"""The oracle of the shapes data: what a picture shows, read without learned weights, and how often it is what was
asked for.

A probe tells whether a model binds colours to shapes and places them: let it draw the captions of the verdict split,
read the drawings, and judge them against the scenes' ground truth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclip.data.shapes_caption import INVERSE
from unclip.evaluation.scene_fit import Fit, colour_of, fit_solids, sharpness, signal

_CLEAN = 0.20  # the share of coloured energy that a clean scene may leave unexplained
_SHARP = 0.40  # see `sharpness`; a blur of 2 of 32 pixels
_SECOND_BRINGS = 0.5  # a second solid must bring the rest down by this factor
_SECOND_SHOWS = 0.35  # and be this visible
_AMPLITUDE = (0.6, 1.4)  # of a solid's chroma, against its colour's
_ASKEW = 0.8  # two solids whose centres are this diagonal stand in no relation


@dataclass(frozen=True)
class SeenSolid:
    """One solid as read: bbox (x0, y0, x1, y1), centre in sides of the picture, y downwards; confidence in [0, 1]."""

    colour: str
    shape: str
    bbox: tuple[float, float, float, float]
    confidence: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.bbox[0] + self.bbox[2]) / 2, (self.bbox[1] + self.bbox[3]) / 2


@dataclass(frozen=True)
class Reading:
    """What a picture shows; no objects if it is no clean scene of one or two solids.

    Two solids are ordered from left to right or from top to bottom, so `relation` is "left of" or "on top of" (None
    when they stand askew, and for fewer solids). `residual` is the share of the coloured energy that the best fit
    leaves unexplained, 1 where none was tried.
    """

    objects: tuple[SeenSolid, ...]
    relation: str | None
    residual: float


def _choose(single: Fit, pair: Fit | None) -> Fit:
    if pair is None or pair.residual > _SECOND_BRINGS * single.residual or pair.visible < _SECOND_SHOWS:
        return single
    return pair


def _relate(first: SeenSolid, second: SeenSolid) -> str | None:
    across, down = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    if abs(down) < _ASKEW * abs(across):
        return "left of" if across > 0 else "right of"
    if abs(across) < _ASKEW * abs(down):
        return "on top of" if down > 0 else "under"
    return None


def read_scene(picture: np.ndarray) -> Reading:
    """Reads a square RGB picture, (S, S, 3) uint8, from its pixels alone. Raises ValueError for other arrays."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise ValueError(f"expected a square RGB picture (S, S, 3) uint8, got {picture.shape} {picture.dtype}")
    plane = signal(picture)
    if sharpness(plane) < _SHARP:
        return Reading((), None, 1.0)
    fits = fit_solids(plane)
    if fits is None:
        return Reading((), None, 1.0)
    best = _choose(*fits)
    strength = [abs(u) for u in best.amplitudes]
    if best.residual > _CLEAN or min(strength) < _AMPLITUDE[0] or max(strength) > _AMPLITUDE[1]:
        return Reading((), None, best.residual)
    objects: list[SeenSolid] = []
    for pose, amplitude in zip(best.poses, best.amplitudes, strict=True):
        colour, off = colour_of(amplitude)
        objects.append(SeenSolid(colour, pose.shape, pose.bbox, (1 - off) * (1 - best.residual / _CLEAN)))
    relation = _relate(*objects) if len(objects) == 2 else None
    if relation in ("right of", "under"):
        objects, relation = objects[::-1], INVERSE[relation]
    return Reading(tuple(objects), relation, best.residual)


def read_scenes(pictures: Sequence[np.ndarray] | np.ndarray) -> list[Reading]:
    """Reads pictures (N, S, S, 3) uint8, or a sequence of (S, S, 3) of any sizes, one by one."""
    return [read_scene(picture) for picture in pictures]


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with the Wilson score interval at 95 %; a share of nothing is 0 within [0, 1]."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        return self.hits / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927): the values that a two-sided score test at 5 % does not reject."""
        if self.total == 0:
            return 0.0, 1.0
        z, n, p = 1.959963984540054, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({self.hits}/{self.total}, 95 %: {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class Verdict:
    """How often drawings show what their captions ask for. An unreadable picture is a wrong one.

    `objects`: single captions with exactly that solid. `pairs`: pair captions with exactly those two solids.
    `relations`: right relations among the right pairs. `scenes`: pair captions with all of it right, the product of
    the two.
    """

    objects: Share
    pairs: Share
    relations: Share
    scenes: Share


def _relation_is_right(reading: Reading, scene: Mapping[str, Any]) -> bool:
    """For a pair already found right; two equal solids stand in a relation and in its inverse at once."""
    if reading.relation is None:
        return False
    seen = [(o.colour, o.shape) for o in reading.objects]
    asked = [(o["colour"], o["shape"]) for o in scene["objects"]]
    same_order, swapped = seen == asked, seen == asked[::-1]
    wanted = scene["relation"]
    return (same_order and reading.relation == wanted) or (swapped and INVERSE[reading.relation] == wanted)


def judge(readings: Sequence[Reading], scenes: Sequence[Mapping[str, Any]]) -> Verdict:
    """Compares readings with the scenes' ground truth (the metadata beside each picture of the shapes data), in order.

    Raises ValueError when the lengths differ or a scene holds other than one or two objects.
    """
    if len(readings) != len(scenes):
        raise ValueError(f"{len(readings)} readings but {len(scenes)} scenes; give one reading per scene")
    single, pair, right = [], [], []
    for reading, scene in zip(readings, scenes, strict=True):
        count = len(scene["objects"])
        if count not in (1, 2):
            raise ValueError(f"a scene with {count} objects: only scenes of one or two can be judged")
        seen = sorted((o.colour, o.shape) for o in reading.objects)
        hit = seen == sorted((o["colour"], o["shape"]) for o in scene["objects"])
        (single if count == 1 else pair).append(hit)
        if count == 2 and hit:
            right.append(_relation_is_right(reading, scene))
    return Verdict(
        objects=Share(sum(single), len(single)),
        pairs=Share(sum(pair), len(pair)),
        relations=Share(sum(right), len(right)),
        scenes=Share(sum(right), len(pair)),
    )
