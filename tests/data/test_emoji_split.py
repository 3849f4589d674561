import pytest

from unclip.data.emoji_sources import concept, normal_code
from unclip.data.emoji_split import STYLE_SHARE, concept_split, split_pairs


def test_a_concept_has_no_tone_gender_or_direction():
    variants = ["1F468-1F3FB-200D-2695-FE0F", "1F469-200D-2695-FE0F", "1F9D1-1F3FF-200D-2695-FE0F"]
    assert {concept(code) for code in variants} == {"1f9d1-200d-2695"}
    assert concept("1F6B6-1F3FB-200D-2642-FE0F-200D-27A1-FE0F") == concept("1F6B6") == "1f6b6"
    assert concept("1F469-200D-2764-FE0F-200D-1F48B-200D-1F468") == concept("1F48F")
    assert concept("2640") == "2640", "the female sign itself stays a concept"
    assert concept("27A1-FE0F") == "27a1", "so does the right arrow"
    assert concept("1F3FB") == "1f3fb", "and a swatch of a skin tone"
    assert concept("1f468") != concept("1f466"), "a man is not a boy"


def test_codes_have_one_spelling():
    assert normal_code("0023-FE0F-20E3") == normal_code("23-20e3") == "23-20e3"
    assert normal_code("1f3f4-e0067_e007f") == "1f3f4-e0067-e007f"


def many_pairs(styles=("noto", "twemoji", "fluent flat", "fluent 3d")):
    return [(f"{code:x}", style) for code in range(0x1F300, 0x1F300 + 2000) for style in styles]


def test_no_concept_of_val_or_test_is_trained_on():
    splits = split_pairs(many_pairs())
    concepts = {name: {c for (c, _), split in splits.items() if split == name} for name in ("train", "val", "test")}
    assert sum(len(found) for found in concepts.values()) == 2000
    assert 160 < len(concepts["test"]) < 240
    assert 80 < len(concepts["val"]) < 160


def test_a_held_out_style_is_trained_on_in_other_styles_only():
    splits = split_pairs(many_pairs())
    held_out = [pair for pair, split in splits.items() if split == "test_styles"]
    train = [pair for pair, split in splits.items() if split == "train"]
    assert len(held_out) / (len(held_out) + len(train)) == pytest.approx(STYLE_SHARE, rel=0.2)
    trained_in: dict[str, set[str]] = {}
    for name, style in train:
        trained_in.setdefault(name, set()).add(style)
    assert all(len(trained_in[name]) == 3 and style not in trained_in[name] for name, style in held_out)
    assert {style for _, style in held_out} == {"noto", "twemoji", "fluent flat", "fluent 3d"}


def test_concepts_in_two_styles_keep_both():
    assert "test_styles" not in split_pairs(many_pairs(("noto", "twemoji"))).values()


def test_splits_do_not_depend_on_the_order_or_on_other_concepts():
    pairs = many_pairs()
    splits = split_pairs(pairs)
    assert split_pairs(reversed(pairs)) == splits
    assert split_pairs(pairs[:400]) == {pair: splits[pair] for pair in pairs[:400]}
    sample = {"1f34e": "train", "1f34c": "val", "1f363": "test"}
    assert {code: concept_split(code) for code in sample} == sample
