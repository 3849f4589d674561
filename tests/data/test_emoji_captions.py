import re

import pytest

from unclip.data.emoji_captions import caption, country, phrase
from unclip.data.emoji_sources import STYLES

CAPTIONS = [
    ("red apple", "food-fruit", None, "a red apple"),
    ("onion", "food-vegetable", None, "an onion"),
    ("bread", "food-prepared", None, "bread"),
    ("grapes", "food-fruit", None, "grapes"),
    ("cactus", "plant-other", None, "a cactus"),
    ("unicorn", "animal-mammal", None, "a unicorn"),
    ("ewe", "animal-mammal", None, "a ewe"),
    ("hourglass done", "time", None, "an hourglass that has run out"),
    ("flag: Belarus", "country-flag", None, "the flag of Belarus"),
    ("flag: Netherlands", "country-flag", None, "the flag of the Netherlands"),
    ("flag: St. Kitts & Nevis", "country-flag", None, "the flag of Saint Kitts and Nevis"),
    ("three o’clock", "time", None, "a clock showing three o'clock"),  # noqa: RUF001
    ("three-thirty", "time", None, "a clock showing three thirty"),
    ("face with monocle", "face-glasses", None, "a face with a monocle"),
    ("face with tears of joy", "face-smiling", None, "a face with tears of joy"),
    ("keycap: 5", "keycap", None, "a keycap with the number 5"),
    ("keycap: #", "keycap", None, "a keycap with a hash sign"),
    ("police officer", "person-role", 5, "a police officer with dark skin tone"),
    ("man health worker", "person-role", 2, "a male health worker with medium-light skin tone"),
    ("man: red hair", "person", 1, "a man with red hair and light skin tone"),
    ("man: bald", "person", None, "a bald man"),
    ("person lifting weights", "person-sport", None, "a person lifting weights"),
    ("women wrestling", "person-sport", None, "women wrestling"),
    ("woman rowing boat", "person-sport", 3, "a woman rowing a boat with medium skin tone"),
    ("person walking: facing right", "person-activity", None, "a person walking facing right"),
    ("family: man, man, girl", "family", None, "a family with two men and a girl"),
    ("kiss: woman, man", "family", None, "a woman and a man kissing"),
    ("no smoking", "warning", None, "a no smoking sign"),
    ("Aries", "zodiac", None, "the zodiac sign Aries"),
    ("Japanese “secret” button", "alphanum", None, 'a Japanese "secret" button'),
    ("SOS button", "alphanum", None, "an SOS button"),
    ("AB button (blood type)", "alphanum", None, "an AB blood type button"),
    ("wheelchair symbol", "transport-sign", None, "a wheelchair symbol"),
    ("bow and arrow", "tool", None, "a bow and arrow"),
]


@pytest.mark.parametrize(("label", "subgroup", "tone", "expected"), CAPTIONS)
def test_names_become_natural_phrases(label, subgroup, tone, expected):
    assert phrase(label, subgroup, tone) == expected


def test_a_caption_names_the_style_and_no_company():
    assert caption("a red apple", "fluent 3d") == "a red apple, fluent 3d style"
    brands = re.compile("google|twitter|microsoft|lobe|apple", re.IGNORECASE)
    assert not [style.name for style in STYLES if brands.search(style.name)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Isle of Man", "the Isle of Man"),
        ("Falkland Islands", "the Falkland Islands"),
        ("Congo - Kinshasa", "the Democratic Republic of the Congo"),
        ("South Georgia & South Sandwich Islands", "South Georgia and the South Sandwich Islands"),
        ("Hong Kong SAR China", "Hong Kong"),
    ],
)
def test_countries_read_well_in_a_sentence(name, expected):
    assert country(name) == expected
