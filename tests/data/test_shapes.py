"""The shapes data: what is drawn, what is told, and what is kept from training."""

import hashlib
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.data import shapes
from unclip.data.shapes import is_held_out, render, verdict_scenes, write_shapes
from unclip.data.shapes_caption import INVERSE, RELATIONS
from unclip.data.shapes_scene import (
    COLOURS,
    HELD_OUT,
    HELD_OUT_WORDS,
    PALETTE,
    SOLIDS,
    WORDS,
    Scene,
    Solid,
    draw_family,
    draw_scene,
)
from unclip.data.shapes_solids import SHAPES, extent, shade
from unclip.data.shards import Shards
from unclip.errors import ConfigError


def scenes(
    count: int, objects: tuple[int, int] = (1, 2), signs: float = 0.0, held_out: bool = False, seed: int = 0
) -> list[Scene]:
    return [draw_scene(np.random.default_rng([seed, i]), objects, signs, held_out) for i in range(count)]


def pairs_within(scene: Scene) -> list[tuple[Solid, Solid]]:
    return list(itertools.combinations([placed.solid for placed in scene.objects], 2))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_there_are_eight_colours_and_five_shapes():
    assert len(COLOURS) == 8
    assert len(SHAPES) == 5
    assert len(SOLIDS) == 40
    assert len(RELATIONS) == 4


def test_a_tenth_of_the_unordered_pairs_is_held_out():
    pairs = list(itertools.combinations_with_replacement(SOLIDS, 2))
    share = sum(is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert len(pairs) == 820
    assert 0.09 <= share <= 0.11
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)


def test_the_hold_out_is_pinned():
    """It must never change: a model trained before would have seen pairs that count as unseen."""
    text = ";".join(f"{a.colour} {a.shape}|{b.colour} {b.shape}" for a, b in HELD_OUT)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "dd26dd8916b0da1c"


@pytest.mark.parametrize("objects", [(1, 2), (3, 8)])
def test_training_scenes_hold_no_held_out_pair_and_every_solid(objects: tuple[int, int]):
    drawn = scenes(800, objects)
    assert not any(is_held_out(*pair) for scene in drawn for pair in pairs_within(scene))
    assert {placed.solid for scene in drawn for placed in scene.objects} == set(SOLIDS)


def test_test_scenes_hold_held_out_pairs_only():
    drawn = scenes(200, held_out=True)
    assert all(len(scene.objects) == 2 and is_held_out(*pairs_within(scene)[0]) for scene in drawn)
    assert all(any(is_held_out(*p) for p in pairs_within(s)) for s in scenes(100, (3, 8), held_out=True))


def test_verdict_covers_all_solids_and_relations_evenly():
    singles, pairs = verdict_scenes()[:64], verdict_scenes()[64:]
    assert {scene.objects[0].solid for scene in singles} == set(SOLIDS)
    assert all(len(scene.objects) == 1 for scene in singles)
    assert Counter(scene.relation for scene in pairs) == dict.fromkeys(RELATIONS, 48)
    assert all(is_held_out(*pairs_within(scene)[0]) for scene in pairs)
    asked = {(s.objects[0].solid, s.relation, s.objects[1].solid) for s in pairs}
    assert len(asked) == 192


def test_the_verdict_captions_are_pinned():
    text = "\n".join(scene.caption for scene in verdict_scenes())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "eb91b36c080dfd4f"


def test_the_first_training_captions_are_pinned():
    """The same seed must go on giving the same data: runs that resume and figures that are quoted rest on it."""
    captions = [scene.caption for scene in draw_family(np.random.default_rng([0, 0, 0]), (1, 2), 0.0)]
    assert captions[:4] == [
        "a picture of a yellow cube to the right of a large cyan cube",
        "a yellow cube to the left of a cyan cube",
        "a big cyan cube on top and a yellow cube below",
        "a cyan cube below a yellow cube",
    ]


def families(count: int, objects: tuple[int, int] = (1, 2)) -> list[list[Scene]]:
    return [draw_family(np.random.default_rng([7, i]), objects, 0.0) for i in range(count)]


def test_a_family_of_pairs_differs_in_place_and_binding_only():
    exchanged = 0
    for family in families(60, (2, 2)):
        layouts: Counter[tuple[object, ...]] = Counter()
        for scene in family:
            assert scene.relation is not None
            a, b = (placed.solid for placed in scene.objects)
            turned = scene.relation in ("right of", "under")
            layouts[(INVERSE[scene.relation], b, a) if turned else (scene.relation, a, b)] += 1
        assert len({tuple(sorted(p.solid.colour for p in scene.objects)) for scene in family}) == 1
        twins = any(a == b for _, a, b in layouts)  # a red cube left of a red cube has no other order
        assert twins or set(layouts.values()) == {1}
        exchanged += len({tuple(sorted(p.solid.shape for p in scene.objects)) for scene in family}) == 1
    assert exchanged > 25


def test_a_family_of_single_solids_has_two_colours_and_four_shapes():
    for family in families(20, (1, 1)):
        solids = {scene.objects[0].solid for scene in family}
        assert (len(solids), len({s.colour for s in solids}), len({s.shape for s in solids})) == (8, 2, 4)


@pytest.mark.parametrize("objects", [(1, 2), (3, 8)])
def test_families_hold_no_held_out_pair_and_every_solid(objects: tuple[int, int]):
    drawn = [scene for family in families(150, objects) for scene in family]
    assert not any(is_held_out(*pair) for scene in drawn for pair in pairs_within(scene))
    assert {placed.solid for scene in drawn for placed in scene.objects} == set(SOLIDS)


def test_captions_name_their_solids_and_vary():
    drawn = scenes(600)
    for scene in drawn:
        for placed in scene.objects:
            assert f"{placed.solid.colour} {placed.solid.shape}" in scene.caption
        assert " a orange" not in f" {scene.caption}"
    captions = [f" {scene.caption} " for scene in drawn]
    for words in ("is", "there is", "and", "a picture of", "under", "beneath", "below", "on top of", "above"):
        assert sum(f" {words} " in caption for caption in captions) >= 10, words
    sized = sum(any(f" {w} " in c for w in ("small", "little", "large", "big")) for c in captions)
    assert 0.3 < sized / len(captions) < 0.8


def test_captions_count_the_solids():
    numbers = {"a": 1, "an": 1} | {
        w: i for i, w in enumerate(["two", "three", "four", "five", "six", "seven", "eight"], start=2)
    }
    for scene in scenes(100, (3, 8)):
        told = sum(numbers.get(word, 0) for word in scene.caption.replace("a picture of ", "").split())
        assert told == len(scene.objects)


def test_relations_hold_in_the_layout():
    for scene in scenes(400):
        if scene.relation is None:
            continue
        first, second = (placed.bbox for placed in scene.objects)
        if scene.relation == "left of":
            assert first[2] <= second[0]
        elif scene.relation == "right of":
            assert second[2] <= first[0]
        else:
            upper, lower = (first, second) if scene.relation == "on top of" else (second, first)
            assert upper[1] < lower[1]
            assert upper[3] < lower[3]
            touching, shown = upper[3] - lower[1] >= -0.02, (lower[3] - upper[3]) / (lower[3] - lower[1])
            assert touching
            assert shown > 0.4
            assert abs(upper[0] + upper[2] - lower[0] - lower[2]) < 0.03


@pytest.mark.parametrize("objects", [(1, 2), (3, 8)])
def test_solids_stay_in_the_picture(objects: tuple[int, int]):
    for scene in scenes(300, objects):
        for placed in scene.objects:
            x0, y0, x1, y1 = placed.bbox
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_extent_is_the_silhouettes_box(shape: str):
    half, below, above = extent(shape)
    edge = np.linspace(-1, 1, 401)
    for x, y in ((half + 0.01, edge), (-half - 0.01, edge), (edge, above + 0.01), (edge, -below - 0.01)):
        assert not shade(shape, x + 0 * edge, y + 0 * edge)[..., 0].any()
    inside = np.stack(np.meshgrid(np.linspace(-half, half, 200), np.linspace(-below, above, 200)))
    covered = shade(shape, *inside)[..., 0] > 0
    assert covered[:, [2, -3]].any()
    assert covered[2].any()
    assert covered[-3].any()


def test_sphere_and_ring_have_the_areas_of_geometry():
    grid = (np.arange(400) + 0.5) / 400 * 1.2
    x, y = np.meshgrid(grid - 0.6, grid - 0.2)
    pixel = (1.2 / 400) ** 2
    assert shade("sphere", x, y)[..., 0].sum() * pixel == pytest.approx(np.pi * 0.25, rel=2e-3)
    assert shade("ring", x, y)[..., 0].sum() * pixel == pytest.approx(np.pi * (0.25 - 0.19**2), rel=2e-3)


def test_a_cube_shows_three_faces_lit_from_the_upper_left():
    top, left, right = (shade("cube", np.array(x), np.array(y))[1] for x, y in ((0.0, 0.75), (-0.2, 0.3), (0.3, 0.3)))
    assert top > left + 0.15 > right + 0.3


@pytest.mark.parametrize("side", [32, 64])
def test_pictures_show_the_palette_at_the_solids(side: int):
    for scene in scenes(40, (1, 1)):
        placed = scene.objects[0]
        if placed.solid.shape in ("ring", "cube"):
            continue
        x0, y0, x1, y1 = placed.bbox
        seen = render(scene, side)[int((y0 + y1) / 2 * side), int((x0 + x1) / 2 * side)].astype(float)
        colour = np.array(PALETTE[placed.solid.colour], dtype=float)
        seen, colour = seen - seen.mean(), colour - colour.mean()
        assert seen @ colour / np.linalg.norm(seen) / np.linalg.norm(colour) > 0.97


def test_the_scene_does_not_depend_on_the_size():
    scene = scenes(1, (2, 2), seed=4)[0]
    large, small = render(scene, 128).astype(float), render(scene, 32).astype(float)
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - small).mean() < 2.0


def test_signs_are_drawn_and_told():
    drawn = scenes(400, signs=1.0)
    assert {scene.sign for scene in drawn} == set(WORDS)
    assert {scene.sign for scene in scenes(200, signs=1.0, held_out=True)} == set(HELD_OUT_WORDS)
    families = [scene for i in range(40) for scene in draw_family(np.random.default_rng(i), (1, 2), 1.0)]
    assert {scene.sign for scene in families} == set(WORDS)
    for scene in drawn:
        assert scene.sign is not None
        assert scene.sign in scene.caption.split()
        assert all(placed.bbox[1] >= 0.24 for placed in scene.objects)
    board = render(drawn[0], 64)[3:15, 14:50].astype(int)
    assert (board.min(axis=-1) > 235).mean() > 0.4
    assert (board.max(axis=-1) < 110).sum() > 10


def test_write_shapes_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shapes, "_CHUNK", 24)  # so that 100 pictures are worth two processes
    for name, workers in (("one", 1), ("two", 2)):
        write_shapes(tmp_path / name, num=100, size=32, seed=3, workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(Shards(tmp_path / "one" / "train")) == 100
    assert len(Shards(tmp_path / "one" / "val")) == len(Shards(tmp_path / "one" / "test")) == 64


def test_write_shapes_keeps_picture_caption_and_truth_together(tmp_path: Path):
    write_shapes(tmp_path / "a", num=80, size=32, seed=1, workers=1)
    write_shapes(tmp_path / "b", num=90, size=32, seed=2, workers=1)
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert a["verdict/00000.tar"] == b["verdict/00000.tar"]
    assert a["train/00000.tar"] != b["train/00000.tar"]
    assert a["val/00000.tar"] != b["val/00000.tar"]
    sample = Shards(tmp_path / "a" / "verdict").read(200)
    scene = verdict_scenes()[200]
    assert sample.caption == scene.caption
    assert sample.meta == json.loads(json.dumps(scene.metadata()))
    assert sample.meta["relation"] in RELATIONS
    assert len(sample.meta["objects"]) == 2
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), render(scene, 32))


@pytest.mark.parametrize(
    "wrong", [{"num": 0}, {"num": 9, "size": 8}, {"num": 9, "objects": (2, 9)}, {"num": 9, "signs": 1.5}]
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict):
    with pytest.raises(ConfigError, match="--"):
        write_shapes(tmp_path / "out", workers=1, **wrong)
    assert not (tmp_path / "out").exists()
