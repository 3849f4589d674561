"""Which emoji are trained on.

Whole concepts are held out, and single styles of concepts that are trained on in other styles.
"""

import hashlib
from collections.abc import Iterable, Mapping

SPLITS = ("train", "val", "test", "test_styles")
TEST_SHARE = 0.10  # of the concepts
VAL_SHARE = 0.06
STYLE_SHARE = 0.05  # of the (concept, style) pairs of training concepts drawn in MIN_STYLES styles or more
MIN_STYLES = 3


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text only, evenly spread over texts."""
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:8]) / 2**64


def concept_split(concept: str) -> str:
    """train, val or test: the same on any machine and for any set of other concepts."""
    place = share(concept)
    if place < TEST_SHARE:
        return "test"
    return "val" if place < TEST_SHARE + VAL_SHARE else "train"


def split_pairs(pairs: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], str]:
    """The split of each (concept, style) pair.

    No concept of val or test is in train. A pair of test_styles has its concept in train, in at least
    MIN_STYLES - 1 other styles, and is itself in no other split.
    """
    styles: dict[str, set[str]] = {}
    for concept, style in pairs:
        styles.setdefault(concept, set()).add(style)
    splits = {}
    for concept, found in styles.items():
        split = concept_split(concept)
        splits.update(dict.fromkeys(((concept, style) for style in found), split))
        if split == "train" and len(found) >= MIN_STYLES and share(f"{concept} style") < STYLE_SHARE * len(found):
            held_out = min(found, key=lambda style: share(f"{concept} {style}"))
            splits[concept, held_out] = "test_styles"
    return splits
