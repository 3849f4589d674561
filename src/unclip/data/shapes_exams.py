"""Fixed scenes for probes: the same every time, whatever the data's seed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from unclip.data.shapes_caption import RELATIONS, plain_phrase
from unclip.data.shapes_scene import (
    HELD_OUT,
    SOLIDS,
    Placed,
    Scene,
    Solid,
    draw_scene,
    pair_scene,
    single_scene,
    with_word,
)

_SEED = 20220413
MOST = 8  # objects of a busy scene


@cache
def binding_scenes() -> tuple[tuple[Scene, Scene], ...]:
    """Scenes of two colours and two shapes, each beside the same scene with its colours exchanged.

    Every held-out pair of that kind occurs in two relations; the exchanged pair may be one that is trained on. Captions
    name no sizes, so that a scene and its neighbour are told with the same words.
    """
    rng = np.random.default_rng(_SEED)
    pairs = [(a, b) for a, b in HELD_OUT if a.colour != b.colour and a.shape != b.shape]
    order = [pairs[i] for _ in range(2) for i in rng.permutation(len(pairs))]
    found = []
    for i, pair in enumerate(order):
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        scene = pair_scene(rng, a, RELATIONS[i % len(RELATIONS)], b)
        first, second = scene.objects
        exchanged = (_coloured(first, second.solid.colour), _coloured(second, first.solid.colour))
        found.append((_plainly_told(scene), _plainly_told(replace(scene, objects=exchanged))))
    return tuple(found)


def _coloured(placed: Placed, colour: str) -> Placed:
    return replace(placed, solid=Solid(colour, placed.solid.shape))


def _plainly_told(scene: Scene) -> Scene:
    first, second = (plain_phrase(placed.solid.colour, placed.solid.shape) for placed in scene.objects)
    return replace(scene, caption=f"{first} {scene.relation} {second}")


def sign_scenes(words: Sequence[str], num: int) -> list[Scene]:
    """``num`` single solids below a sign, the words in turn."""
    rng = np.random.default_rng(_SEED)
    return [
        with_word(rng, single_scene(rng, SOLIDS[int(rng.integers(len(SOLIDS)))]), words[i % len(words)])
        for i in range(num)
    ]


def busy_scenes(num: int, seed: int = _SEED) -> list[Scene]:
    """``num`` scenes of 1 to 8 solids, all numbers equally often, none with a held-out pair; another seed, other scenes."""
    rng = np.random.default_rng(seed)
    counts = [1 + i % MOST for i in range(num)]
    return [draw_scene(rng, (count, count), 0.0, held_out=False) for count in counts]
