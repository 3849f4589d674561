"""Whether colours stay with their shapes: readings of scenes of two colours and two shapes, sorted by what went wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from unclip.evaluation.probes import Reading, Share


def binding_shares(readings: Sequence[Reading], scenes: Sequence[Mapping[str, Any]]) -> dict[str, Share]:
    """Of all pictures: both solids right; the colours exchanged between the shapes; both colours there; both shapes there;
    readable as one or two solids at all.

    ``scenes`` are the shapes' metadata with two colours and two shapes each. ``same colours`` and ``same shapes`` without
    ``right`` are what a bag of words reaches. Raises ValueError for other scenes.
    """
    counts = dict.fromkeys(("right", "exchanged", "same colours", "same shapes", "readable"), 0)
    for reading, scene in zip(readings, scenes, strict=True):
        asked = sorted(pair_of(scene))
        seen = sorted((one.colour, one.shape) for one in reading.objects)
        counts["right"] += seen == asked
        counts["exchanged"] += seen == sorted(exchanged(asked))
        counts["same colours"] += sorted(c for c, _ in seen) == sorted(c for c, _ in asked)
        counts["same shapes"] += sorted(s for _, s in seen) == sorted(s for _, s in asked)
        counts["readable"] += bool(seen)
    return {name: Share(hits, len(scenes)) for name, hits in counts.items()}


def pair_of(scene: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(colour, shape) of both solids; ValueError where the exchange of their colours would change nothing."""
    pair = [(one["colour"], one["shape"]) for one in scene["objects"]]
    if len(pair) != 2 or pair[0][0] == pair[1][0] or pair[0][1] == pair[1][1]:
        raise ValueError(f"binding is told from two colours on two shapes, not from {pair}")
    return pair


def exchanged(pair: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same shapes, each with the other's colour."""
    (first, one), (second, other) = pair
    return [(second, one), (first, other)]


def both(right: Sequence[bool]) -> Share:
    """Of neighbours in a row (a scene and its exchange): how often both are right."""
    return Share(sum(a and b for a, b in zip(right[::2], right[1::2], strict=True)), len(right) // 2)


def is_right(reading: Reading, scene: Mapping[str, Any]) -> bool:
    """Exactly the scene's solids, wherever they stand."""
    asked = sorted((one["colour"], one["shape"]) for one in scene["objects"])
    return sorted((one.colour, one.shape) for one in reading.objects) == asked
