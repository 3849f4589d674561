"""Scenes of coloured solids: what stands where, the caption, and which pairs are never trained on.

A scene is drawn in fractions of the picture's side, so the same seed gives the same scene at every picture size.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from unclip.data.shapes_caption import INVERSE, RELATIONS, noun_phrase, say_many, say_pair, say_sign, say_single
from unclip.data.shapes_solids import SHAPES, extent, rise

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 24, 30),
    "orange": (255, 130, 0),
    "yellow": (255, 226, 16),
    "green": (20, 158, 48),
    "cyan": (0, 202, 222),
    "blue": (30, 64, 228),
    "purple": (130, 30, 178),
    "pink": (255, 112, 186),
}
COLOURS: tuple[str, ...] = tuple(PALETTE)
SIZES: dict[str, tuple[float, float]] = {"small": (0.29, 0.33), "large": (0.42, 0.46)}  # units, in sides of the picture
_TOLD = """stop go open exit sale hello yes no taxi cafe zoo wow bus menu hot new tea bar gym shop east west north soup
    cake rice milk pizza hotel bank farm park lake road town beach music film work rest left join king queen jazz vote fix club"""
_KEPT_BACK = "wait slow help push pull free fish salad bread train south juice lemon river house ticket"
WORDS: tuple[str, ...] = tuple(_TOLD.split())  # on training signs
HELD_OUT_WORDS: tuple[str, ...] = tuple(_KEPT_BACK.split())  # never on one, though each of their letters is

FAMILY = 8  # neighbouring training scenes that are easily confused
_SINGLE_SHARE = 1 / 3  # of the scenes with one or two objects
_HELD_OUT_SHARE = 0.10
_HELD_OUT_SALT = "unclip shapes 1"
_SIGN_FLOOR = 0.26  # with a sign, the objects keep below this height


@dataclass(frozen=True, order=True)
class Solid:
    """What a caption names: one of 8 colours and one of 5 shapes."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Placed:
    """A solid in the picture: `scale` is its unit, (`x`, `y`) the middle of its base, in sides of the picture, y
    downwards.
    """

    solid: Solid
    size: str
    scale: float
    x: float
    y: float
    on_floor: bool = True

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the silhouette, in sides of the picture."""
        half, below, above = (self.scale * e for e in extent(self.solid.shape))
        return self.x - half, self.y - above, self.x + half, self.y + below


@dataclass(frozen=True)
class Backdrop:
    """Two pale tints (RGB, 0 to 255) and where they meet; `slope` is the change of brightness from left to right."""

    wall: tuple[float, float, float]
    floor: tuple[float, float, float]
    horizon: float
    slope: float


@dataclass(frozen=True)
class Scene:
    """`objects` in the caption's order; `relation` tells how the first of exactly two stands to the second."""

    objects: tuple[Placed, ...]
    relation: str | None
    backdrop: Backdrop
    sign: str | None
    caption: str

    def metadata(self) -> dict[str, Any]:
        """The ground truth as JSON: bbox and centre in sides of the picture, y downwards."""
        objects = []
        for placed in self.objects:
            x0, y0, x1, y1 = (round(v, 4) for v in placed.bbox)
            centre = [round((x0 + x1) / 2, 4), round((y0 + y1) / 2, 4)]
            objects.append({**asdict(placed.solid), "size": placed.size, "bbox": [x0, y0, x1, y1], "centre": centre})
        return {"objects": objects, "relation": self.relation, "sign": self.sign}


SOLIDS: tuple[Solid, ...] = tuple(Solid(c, s) for c, s in itertools.product(COLOURS, SHAPES))


@cache
def is_held_out(a: Solid, b: Solid) -> bool:
    """Whether the unordered pair never occurs in training: one pair in ten, by a fixed hash that knows no seed."""
    first, second = sorted((a, b))
    text = f"{_HELD_OUT_SALT}|{first.colour} {first.shape}|{second.colour} {second.shape}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < _HELD_OUT_SHARE * 2**64


HELD_OUT: tuple[tuple[Solid, Solid], ...] = tuple(
    pair for pair in itertools.combinations_with_replacement(SOLIDS, 2) if is_held_out(*pair)
)


def _any_solid(rng: np.random.Generator) -> Solid:
    return SOLIDS[int(rng.integers(len(SOLIDS)))]


def _trained_pair(rng: np.random.Generator) -> tuple[Solid, Solid]:
    while True:
        a, b = _any_solid(rng), _any_solid(rng)
        if not is_held_out(a, b):
            return a, b


def _held_out_pair(rng: np.random.Generator) -> tuple[Solid, Solid]:
    a, b = HELD_OUT[int(rng.integers(len(HELD_OUT)))]
    return (a, b) if rng.random() < 0.5 else (b, a)


def _backdrop(rng: np.random.Generator) -> Backdrop:
    def tint(low: float, high: float) -> tuple[float, float, float]:
        level, (r, g, b) = rng.uniform(low, high), rng.uniform(-9, 9, size=3)
        return level + r, level + g, level + b

    return Backdrop(tint(222, 246), tint(186, 218), float(rng.uniform(0.45, 0.66)), float(rng.uniform(-10, 10)))


def _sized(rng: np.random.Generator) -> tuple[str, float]:
    size = "small" if rng.random() < 0.5 else "large"
    return size, float(rng.uniform(*SIZES[size]))


def _within(rng: np.random.Generator, low: float, high: float, spread: float = 1.0) -> float:
    """Uniform in the middle `spread` share of [low, high]; the middle itself where there is no room."""
    middle, half = (low + high) / 2, max(high - low, 0.0) / 2 * spread
    return float(rng.uniform(middle - half, middle + half))


def _place_single(rng: np.random.Generator, solid: Solid) -> tuple[Placed, ...]:
    size, scale = _sized(rng)
    half, below, above = (scale * e for e in extent(solid.shape))
    x = _within(rng, half + 0.04, 0.96 - half, 0.6)
    y = _within(rng, above + 0.04, 0.96 - below, 0.5) + 0.08
    return (Placed(solid, size, scale, x, y),)


def _place_beside(rng: np.random.Generator, left: Solid, right: Solid) -> tuple[Placed, Placed]:
    """Two solids on the floor with a gap between their silhouettes; the first is the left one."""
    (size_l, scale_l), (size_r, scale_r) = _sized(rng), _sized(rng)
    half_l, half_r = scale_l * extent(left.shape)[0], scale_r * extent(right.shape)[0]
    room = 1.0 - 2 * (half_l + half_r)
    gap = _within(rng, 0.02, min(0.12, room - 0.04))
    start = _within(rng, 0.02, room - gap - 0.02, 0.8)
    y = float(rng.uniform(0.68, 0.78))
    y_l, y_r = y + float(rng.uniform(-0.02, 0.02)), y + float(rng.uniform(-0.02, 0.02))
    return (
        Placed(left, size_l, scale_l, start + half_l, y_l),
        Placed(right, size_r, scale_r, start + 2 * half_l + gap + half_r, y_r),
    )


def _place_stacked(rng: np.random.Generator, upper: Solid, lower: Solid) -> tuple[Placed, Placed]:
    """The first rests on the second."""
    (size_u, scale_u), (size_l, scale_l) = _sized(rng), _sized(rng)
    reach = scale_l * rise(lower.shape)
    top = reach + scale_u * extent(upper.shape)[2]
    y = _within(rng, top + 0.02, 0.98 - scale_l * extent(lower.shape)[1], 0.7)
    half = max(scale_u * extent(upper.shape)[0], scale_l * extent(lower.shape)[0])
    x = _within(rng, half + 0.04, 0.96 - half, 0.6)
    shift = float(rng.uniform(-0.01, 0.01))
    return Placed(upper, size_u, scale_u, x + shift, y - reach, on_floor=False), Placed(lower, size_l, scale_l, x, y)


def _place_pair(rng: np.random.Generator, a: Solid, relation: str, b: Solid) -> tuple[Placed, Placed]:
    if relation == "left of":
        return _place_beside(rng, a, b)
    if relation == "on top of":
        return _place_stacked(rng, a, b)
    second, first = _place_pair(rng, b, INVERSE[relation], a)
    return first, second


def _place_many(rng: np.random.Generator, solids: Sequence[Solid]) -> tuple[Placed, ...]:
    """Three to eight solids of one size in one row, or in two with the front row lower, in shuffled slots."""
    rows = 1 if len(solids) == 3 else 2
    columns = -(-len(solids) // rows)
    scale = min(0.87 / columns, 0.79 / rows)
    slots = [(row, column) for row in range(rows) for column in range(columns)]
    chosen = sorted(slots[i] for i in rng.permutation(len(slots))[: len(solids)])  # the back row is drawn first
    order = rng.permutation(len(solids))
    placed: list[Placed] = []
    for (row, column), i in zip(chosen, order, strict=True):
        x = 0.04 + 0.92 * (column + 0.5) / columns + float(rng.uniform(-0.01, 0.01))
        y = (0.68 if rows == 1 else 0.45 + 0.46 * row) + float(rng.uniform(-0.01, 0.01))
        placed.append(Placed(solids[i], "small" if scale < SIZES["large"][0] else "large", scale, x, y))
    return tuple(placed)


def _below_sign(placed: Placed) -> Placed:
    keep = 1 - _SIGN_FLOOR
    x, y = 0.5 + (placed.x - 0.5) * keep, _SIGN_FLOOR + placed.y * keep
    return Placed(placed.solid, placed.size, placed.scale * keep, x, y, placed.on_floor)


def single_scene(rng: np.random.Generator, solid: Solid) -> Scene:
    """The solid alone, somewhere on the floor."""
    objects = _place_single(rng, solid)
    caption = say_single(rng, noun_phrase(rng, objects[0].size, solid.colour, solid.shape))
    return Scene(objects, None, _backdrop(rng), None, caption)


def pair_scene(rng: np.random.Generator, a: Solid, relation: str, b: Solid) -> Scene:
    """`a` stands in `relation` to `b`, and the caption begins with `a`."""
    objects = _place_pair(rng, a, relation, b)
    first, second = (noun_phrase(rng, p.size, p.solid.colour, p.solid.shape) for p in objects)
    return Scene(objects, relation, _backdrop(rng), None, say_pair(rng, first, relation, second))


def many_scene(rng: np.random.Generator, count: int, pair: tuple[Solid, Solid] | None) -> Scene:
    """`count` solids of one to three kinds; the held-out `pair` is among them, or without one, no two are held out."""
    while True:
        kinds = list(pair) if pair else [_any_solid(rng) for _ in range(int(rng.integers(1, min(count, 3) + 1)))]
        solids = kinds + [kinds[int(rng.integers(len(kinds)))] for _ in range(count - len(kinds))]
        if pair or not any(is_held_out(a, b) for a, b in itertools.combinations(solids, 2)):
            break
    groups = [(solids.count(kind), kind.colour, kind.shape) for kind in dict.fromkeys(solids)]
    return Scene(_place_many(rng, solids), None, _backdrop(rng), None, say_many(rng, groups))


def _with_sign(rng: np.random.Generator, scene: Scene, words: Sequence[str] = WORDS) -> Scene:
    return with_word(rng, scene, words[int(rng.integers(len(words)))])


def with_word(rng: np.random.Generator, scene: Scene, word: str) -> Scene:
    """The scene made smaller, below a sign that says ``word``; the caption tells it."""
    objects = tuple(_below_sign(p) for p in scene.objects)
    return Scene(objects, scene.relation, scene.backdrop, word, say_sign(rng, scene.caption, word))


def _draw_count(rng: np.random.Generator, low: int, high: int) -> int:
    if (low, high) == (1, 2):
        return 1 if rng.random() < _SINGLE_SHARE else 2
    return int(rng.integers(low, high + 1))


def draw_scene(rng: np.random.Generator, objects: tuple[int, int], signs: float, held_out: bool) -> Scene:
    """One random scene of `objects[0]` to `objects[1]` solids (within 1 to 8), with a sign in a share `signs` of
    scenes.

    With `held_out`, every scene that can hold a pair holds a held-out one, and every sign a held-out word; without, none
    does.
    """
    low, high = max(objects[0], min(objects[1], 2)) if held_out else objects[0], objects[1]
    count = _draw_count(rng, low, high)
    pick = _held_out_pair if held_out else _trained_pair
    if count == 1:
        scene = single_scene(rng, _any_solid(rng))
    elif count == 2:
        a, b = pick(rng)
        scene = pair_scene(rng, a, RELATIONS[int(rng.integers(len(RELATIONS)))], b)
    else:
        scene = many_scene(rng, count, pick(rng) if held_out else None)
    return _with_sign(rng, scene, HELD_OUT_WORDS if held_out else WORDS) if rng.random() < signs else scene


def draw_family(rng: np.random.Generator, objects: tuple[int, int], signs: float) -> list[Scene]:
    """FAMILY training scenes that differ in what is easily confused, so that a contrastive batch can hold them together.

    Single solids: two colours, four shapes. Pairs: the four places of one solid beside the other, and the same again
    with their shapes exchanged, or where that is no other pair or a held-out one, with another shape for the second.
    Larger scenes have nothing but their number of solids in common. No pair is held out.
    """
    count = _draw_count(rng, *objects)
    if count == 1:
        colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:2]]
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[: FAMILY // 2]]
        scenes = [single_scene(rng, Solid(c, s)) for c, s in itertools.product(colours, shapes)]
    elif count == 2:
        a, b = _trained_pair(rng)
        pairs = ((a, b), _confusable(rng, a, b))
        scenes = [_told_either_way(rng, *pair, relation) for pair, relation in itertools.product(pairs, RELATIONS)]
    else:
        scenes = [many_scene(rng, count, None) for _ in range(FAMILY)]
    return [_with_sign(rng, scene) if rng.random() < signs else scene for scene in scenes]


def _confusable(rng: np.random.Generator, a: Solid, b: Solid) -> tuple[Solid, Solid]:
    """Another pair that is not held out: the same colours with the shapes exchanged, else with another second shape."""
    others = [(a, Solid(b.colour, SHAPES[i])) for i in rng.permutation(len(SHAPES)) if SHAPES[i] != b.shape]
    candidates = [(Solid(a.colour, b.shape), Solid(b.colour, a.shape)), *others]
    return next(pair for pair in candidates if set(pair) != {a, b} and not is_held_out(*pair))


def _told_either_way(rng: np.random.Generator, a: Solid, b: Solid, relation: str) -> Scene:
    """`a` stands in `relation` to `b`; the caption begins with either of them."""
    return pair_scene(rng, a, relation, b) if rng.random() < 0.5 else pair_scene(rng, b, INVERSE[relation], a)


@cache
def verdict_scenes() -> tuple[Scene, ...]:
    """The fixed examination: 64 single solids (all 40 occur), then 192 held-out pairs, 48 of each relation; without
    seed.
    """
    rng = np.random.default_rng(20220413)
    singles = list(SOLIDS) + [SOLIDS[i] for i in rng.permutation(len(SOLIDS))[: 64 - len(SOLIDS)]]
    scenes = [single_scene(rng, solid) for solid in singles]
    asked: set[tuple[Solid, str, Solid]] = set()
    order = [HELD_OUT[i] for _ in range(4) for i in rng.permutation(len(HELD_OUT))]
    for pair in order:
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        relation = RELATIONS[len(asked) % len(RELATIONS)]
        if len(asked) < 192 and (a, relation, b) not in asked:
            asked.add((a, relation, b))
            scenes.append(pair_scene(rng, a, relation, b))
    return tuple(scenes)
