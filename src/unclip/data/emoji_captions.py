"""Turns the Unicode CLDR names of emoji into natural English phrases: "flag: Belarus" becomes "the flag of Belarus"."""

import re

from unclip.data.emoji_phrases import (
    COUNTABLE,
    COUNTRIES,
    NO_ARTICLE,
    PHRASES,
    SINGULAR_IN_S,
    THE_COUNTRIES,
)

TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}

_GENDERS = {"man": "male", "woman": "female"}
_PERSON_GROUPS = {"person-role", "person-fantasy"}
_SIGN_GROUPS = {"transport-sign": "sign", "warning": "sign", "religion": "symbol", "av-symbol": "symbol"}
_NAMES_A_SIGN = re.compile(r"(?:sign|symbol|button|cross|star|crescent|David|dharma|menorah)$")
_HEAD_ENDS = re.compile(
    r" (?:with|without|of|in|on|at|and|over|under|behind|showing|pointing|tilted|facing|fluttering|curving|not|holding"
    r"|lifting|wrestling|for|from)\b"
)
_INNER = re.compile(
    r"\b(with|without|in|on|behind|wearing|getting|rowing|bouncing|taking|feeding|tipping|raising|blowing) ("
    + "|".join(sorted(map(re.escape, COUNTABLE), key=len, reverse=True))
    + r")$"
)
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n)|use|eu|ewe|one\b|ufo|u\b)", re.IGNORECASE)
_VOWEL_SOUND = re.compile(r"(?:[aeiou]|hour|x-ray|(?-i:SOS|NG|MX)\b)", re.IGNORECASE)


def indefinite(words: str) -> str:
    """`words` behind the article that its first sound asks for: an hourglass, a unicorn, an x-ray."""
    an = _VOWEL_SOUND.match(words) and not _CONSONANT_SOUND.match(words)
    return f"{'an' if an else 'a'} {words}"


def phrase(label: str, subgroup: str = "", tone: int | None = None) -> str:
    """What the picture named `label` shows, as a noun phrase in the middle of a sentence.

    Args:
        label: the CLDR short name without its skin tone, such as "red apple" or "keycap: 5".
        subgroup: the CLDR subgroup, such as "food-fruit"; some names read well only as "a ... sign".
        tone: skin tone, 1 (light) to 5 (dark).
    """
    text = label.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    words = PHRASES.get(text) or _by_form(text, subgroup) or _by_article(text)
    if tone is None:
        return words
    joint = " and " if " with " in words and "facing right" not in words else " with "
    return f"{words}{joint}{TONES[tone]} skin tone"


def caption(words: str, style: str) -> str:
    return f"{words}, {style} style"


def _by_form(text: str, subgroup: str) -> str | None:
    """Names built to a pattern: "man: bald", "three-thirty", "family: man, boy". None for any other name."""
    if ": " in text:
        return _with_colon(text)
    if subgroup == "time" and (hour := re.fullmatch(r"(\w+)(?:-(thirty)| (o'clock))", text)):
        return f"a clock showing {hour[1]} {hour[2] or hour[3]}"
    if subgroup == "zodiac":
        return f"the zodiac sign {text}"
    if text.startswith("regional indicator "):
        return f"a regional indicator letter {text[-1]}"
    if button := re.fullmatch(r"(\w+) button \(blood type\)", text):
        return f"{indefinite(button[1])} blood type button"
    if subgroup in _PERSON_GROUPS and (person := re.fullmatch(r"(man|woman) (?!with|in |wearing|feeding)(.+)", text)):
        return f"a {_GENDERS[person[1]]} {person[2]}"
    if subgroup in _SIGN_GROUPS:
        return indefinite(text if _NAMES_A_SIGN.search(text) else f"{text} {_SIGN_GROUPS[subgroup]}")
    return None


def _with_colon(text: str) -> str:
    head, rest = text.split(": ", 1)
    if rest == "facing right":
        return f"{_by_article(head)} facing right"
    if head == "flag":
        return f"the flag of {country(rest)}"
    if head == "keycap":
        return f"a keycap with the number {rest}"
    people = _people(rest.split(", "))
    if head == "family":
        return f"a family with {people}"
    if head == "kiss":
        return f"{people} kissing"
    if head == "couple with heart":
        return f"{people} with a heart"
    if rest == "bald":
        return f"a bald {head}"
    return f"a {head} with {'a beard' if rest == 'beard' else rest}"


def _people(members: list[str]) -> str:
    """Members of a family in words: ["man", "man", "girl"] gives "two men and a girl"."""
    plurals = {"man": "men", "woman": "women", "child": "children"}
    words = [
        f"two {plurals.get(member, member + 's')}" if members.count(member) == 2 else indefinite(member)
        for member in dict.fromkeys(members)
    ]
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def country(name: str) -> str:
    """A CLDR country name in running text: "the Netherlands", "Trinidad and Tobago"."""
    name = COUNTRIES.get(name, name.replace(" & ", " and ").replace("St. ", "Saint "))
    takes_the = name in THE_COUNTRIES or name.endswith((" Islands", " Republic", "Territories", "Territory", "Kingdom"))
    return f"the {name}" if takes_the and not name.startswith(("the ", "South Georgia", "Heard")) else name


def _by_article(text: str) -> str:
    """Plurals and substances go without an article, all else takes a or an."""
    text = _INNER.sub(lambda found: f"{found[1]} {indefinite(found[2])}", text)
    head = _HEAD_ENDS.split(text)[0]
    if text in NO_ARTICLE or _is_plural(head.split()[-1]):
        return text
    return indefinite(text)


def _is_plural(noun: str) -> bool:
    if noun in ("people", "men", "women"):
        return True
    return noun.endswith("s") and not noun.endswith(("ss", "us", "is", "'s")) and noun.lower() not in SINGULAR_IN_S
