"""The wording of the shapes captions: the same scene can be said in many ways."""

from collections.abc import Sequence

import numpy as np

RELATIONS: tuple[str, ...] = ("left of", "right of", "on top of", "under")
INVERSE: dict[str, str] = {"left of": "right of", "right of": "left of", "on top of": "under", "under": "on top of"}

_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight")
_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "on top of": ("on top of", "on top of", "on", "above"),
    "under": ("under", "beneath", "below"),
}
_PLACES = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "on top of": ("on top", "below"),
    "under": ("below", "on top"),
}
_SINGLE = ("{a}", "{a}", "{a}", "there is {a}", "a picture of {a}", "{a} on the floor")
_PAIR = (
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} is {rel} {b}",
    "there is {a} {rel} {b}",
    "a picture of {a} {rel} {b}",
    "{a} {here} and {b} {there}",
)
_MANY = ("{list}", "{list}", "there {verb} {list}", "a picture of {list}")
_SIGN = (
    "{scene}, with a sign that says {word}",
    "{scene} and a sign saying {word}",
    "{scene} under a sign with the word {word}",
)
_SIZE_SHARE = 0.35  # how often an object's size is told


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def noun_phrase(rng: np.random.Generator, size: str, colour: str, shape: str) -> str:
    """'a red cube', 'an orange ring', sometimes with a size word: 'a small red cube'."""
    words = f"{colour} {shape}"
    if rng.random() < _SIZE_SHARE:
        words = f"{_pick(rng, _SIZE_WORDS[size])} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plain_phrase(colour: str, shape: str) -> str:
    """'a red cube', 'an orange ring': without a size, the same every time."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def say_single(rng: np.random.Generator, phrase: str) -> str:
    return _pick(rng, _SINGLE).format(a=phrase)


def say_pair(rng: np.random.Generator, first: str, relation: str, second: str) -> str:
    """`first` stands in `relation` to `second`; both are noun phrases."""
    here, there = _PLACES[relation]
    words = _pick(rng, _RELATION_WORDS[relation])
    return _pick(rng, _PAIR).format(a=first, b=second, rel=words, here=here, there=there)


def say_many(rng: np.random.Generator, groups: Sequence[tuple[int, str, str]]) -> str:
    """Groups of (count, colour, shape), counts 1 to 8: 'three red cubes and a blue sphere'."""
    parts = []
    for count, colour, shape in groups:
        number = _NUMBERS[count] if count != 1 else ("an" if colour[0] in "aeiou" else "a")
        parts.append(f"{number} {colour} {shape}{'s' if count > 1 else ''}")
    told = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return _pick(rng, _MANY).format(list=told, verb="are" if groups[0][0] > 1 else "is")


def say_sign(rng: np.random.Generator, scene: str, word: str) -> str:
    return _pick(rng, _SIGN).format(scene=scene, word=word)
