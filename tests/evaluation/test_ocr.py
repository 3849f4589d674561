"""Written words: distances of letters, the words that training keeps back, and a reader that reads real renders."""

import sys

import numpy as np
import pytest

from unclip.data.shapes_exams import sign_scenes
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import HELD_OUT_WORDS, WORDS
from unclip.errors import ConfigError
from unclip.evaluation.ocr import WordReader, edit_distance, word_measures, word_share


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "abc", 3), ("stop", "stop", 0), ("stop", "shop", 1), ("kitten", "sitting", 3), ("open", "pen", 1)],
)
def test_edit_distance(first: str, second: str, distance: int):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_measures_of_known_readings():
    found = word_measures([["stop", "x"], ["pen"], [], ["quite", "other"]], ["stop", "open", "go", "hi"])
    assert (found["words"], found["anything"]) == (word_share([["stop"], [], [], []], ["stop"] * 4), found["anything"])
    assert found["words"].hits == 1
    assert found["anything"].hits == 3
    assert found["letters"] == pytest.approx((1 + 0.75 + 0 + 0) / 4)
    with pytest.raises(ValueError, match="1 pictures read but 2 words asked for"):
        word_measures([["a"]], ["a", "b"])


def test_words_of_training_and_words_kept_back_share_their_letters_only():
    assert not set(WORDS) & set(HELD_OUT_WORDS)
    assert set("".join(HELD_OUT_WORDS)) <= set("".join(WORDS))
    assert all(word.isascii() and word.islower() for word in WORDS + HELD_OUT_WORDS)


def test_it_reads_real_renders_and_nothing_without_a_sign():
    reader = WordReader()
    scenes = sign_scenes(WORDS, 12) + sign_scenes(HELD_OUT_WORDS, 12)
    read = [reader(render(scene, 64)) for scene in scenes]
    assert word_share(read, [str(scene.sign) for scene in scenes]).hits >= 23
    assert reader(np.full((64, 64, 3), 200, np.uint8)) == []


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"needs the extra eval: pip install 'unclip\[eval\]'"):
        WordReader()
