"""The oracle: it reads clean drawings, forgives small faults, and reads nothing where there is nothing."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from unclip.data.shapes_render import paint, render
from unclip.data.shapes_scene import Placed, Scene, Solid, draw_scene
from unclip.evaluation.probes import Reading, SeenSolid, Share, judge, read_scene, read_scenes


def drawn(count: int, objects: tuple[int, int] = (1, 2)) -> list[Scene]:
    return [draw_scene(np.random.default_rng([41, i]), objects, 0.0, False) for i in range(count)]


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    soft = gaussian_filter(picture.astype(float), (sigma, sigma, 0), mode="nearest")
    return np.rint(soft).clip(0, 255).astype(np.uint8)


def noised(picture: np.ndarray, std: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, std, picture.shape)
    return np.rint(picture + noise).clip(0, 255).astype(np.uint8)


def as_jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def halved(picture: np.ndarray) -> np.ndarray:
    side = picture.shape[0] // 2
    return np.rint(picture.reshape(side, 2, side, 2, 3).mean(axis=(1, 3))).astype(np.uint8)


def share_right(scenes: list[Scene], pictures: list[np.ndarray]) -> float:
    verdict = judge(read_scenes(pictures), [scene.metadata() for scene in scenes])
    return (verdict.objects.hits + verdict.scenes.hits) / len(scenes)


@pytest.mark.parametrize(
    ("side", "shrink", "count", "least"), [(64, False, 200, 0.99), (32, False, 100, 0.97), (64, True, 100, 0.97)]
)
def test_it_reads_fresh_renders(side: int, shrink: bool, count: int, least: float):
    scenes = drawn(count)
    pictures = [halved(render(s, side)) if shrink else render(s, side) for s in scenes]
    assert share_right(scenes, pictures) >= least


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("side", "least"), [(64, 0.99), (32, 0.97)])
def test_it_reads_two_thousand_fresh_renders(side: int, least: float):
    scenes = [draw_scene(np.random.default_rng([97, side, i]), (1, 2), 0.0, False) for i in range(2000)]
    assert share_right(scenes, [render(scene, side) for scene in scenes]) >= least


@pytest.mark.parametrize("side", [64, 32])
def test_it_forgives_softness_noise_and_compression(side: int):
    scenes = drawn(100)
    pictures = [noised(blurred(render(s, side), 0.7), 8.0, i) for i, s in enumerate(scenes)]
    if side == 64:  # at 32 pixels JPEG's colour blocks are as large as a small solid
        pictures = [as_jpeg(picture) for picture in pictures]
    assert share_right(scenes, pictures) >= 0.95


def test_it_forgives_wrong_shades():
    scenes, rng = drawn(60), np.random.default_rng(5)
    pictures = []
    for scene in scenes:
        cast = render(scene, 64) * rng.uniform(0.92, 1.08, 3) + rng.uniform(-6, 6, 3)
        pictures.append(np.rint(cast).clip(0, 255).astype(np.uint8))
    assert share_right(scenes, pictures) >= 0.95


def noise_picture(i: int) -> np.ndarray:
    return noised(np.full((64, 64, 3), 128, np.uint8), 60.0, i)


def flat_picture(i: int) -> np.ndarray:
    return np.broadcast_to(np.random.default_rng(i).integers(0, 256, 3, dtype=np.uint8), (64, 64, 3)).copy()


def blurred_render(i: int) -> np.ndarray:
    return blurred(render(drawn(i + 1)[i], 64), 6.0)


def cloud_picture(i: int) -> np.ndarray:
    """Coloured clouds as wide as solids."""
    clouds = gaussian_filter(np.random.default_rng(i).normal(0, 1, (64, 64, 3)), (6, 6, 0))
    return (clouds * 1300 + 128).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("draw", [noise_picture, flat_picture, blurred_render, cloud_picture])
def test_it_reads_nothing_where_nothing_is(draw: Callable[[int], np.ndarray]):
    readings = read_scenes([draw(i) for i in range(50)])
    assert [reading for reading in readings if reading.objects or reading.relation] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_reads_nothing_in_a_thousand_pictures_of_noise_and_blur():
    scenes = [draw_scene(np.random.default_rng([98, i]), (1, 2), 0.0, False) for i in range(500)]
    pictures = [noise_picture(i) for i in range(500)] + [blurred(render(scene, 64), 6.0) for scene in scenes]
    nothing = [not reading.objects and not reading.relation for reading in read_scenes(pictures)]
    assert sum(nothing) >= 0.99 * len(pictures)


def test_it_reads_no_pair_in_a_crowd():
    assert all(not r.objects for r in read_scenes([render(s, 64) for s in drawn(30, (3, 8))]))


def scene_of(*objects: Placed, relation: str | None = None) -> Scene:
    backdrop = drawn(1)[0].backdrop
    return Scene(objects, relation, backdrop, None, "")


@pytest.mark.parametrize("side", [64, 32])
def test_it_tells_two_touching_solids_of_one_colour_apart(side: int):
    cube = Placed(Solid("red", "cube"), "small", 0.31, 0.5, 0.82 - 0.31 * 0.9397, on_floor=False)
    sphere = Placed(Solid("red", "sphere"), "small", 0.31, 0.5, 0.82)
    reading = read_scene(render(scene_of(cube, sphere, relation="on top of"), side))
    assert [(o.colour, o.shape) for o in reading.objects] == [("red", "cube"), ("red", "sphere")]
    assert reading.relation == "on top of"


def test_it_places_what_it_reads():
    placed = Placed(Solid("blue", "cylinder"), "large", 0.45, 0.4, 0.75)
    reading = read_scene(render(scene_of(placed), 64))
    assert len(reading.objects) == 1
    assert reading.relation is None
    np.testing.assert_allclose(reading.objects[0].bbox, placed.bbox, atol=0.02)
    x0, y0, x1, y1 = placed.bbox
    np.testing.assert_allclose(reading.objects[0].centre, ((x0 + x1) / 2, (y0 + y1) / 2), atol=0.015)
    assert reading.objects[0].confidence > 0.7
    assert reading.residual < 0.05


def test_diagonal_solids_stand_in_no_relation():
    picture = render(scene_of(Placed(Solid("blue", "cube"), "small", 0.3, 0.25, 0.4)), 64).astype(np.float32)
    paint(picture, Placed(Solid("red", "cube"), "small", 0.3, 0.75, 0.9))
    reading = read_scene(np.rint(picture).clip(0, 255).astype(np.uint8))
    assert {o.colour for o in reading.objects} == {"blue", "red"}
    assert reading.relation is None


def test_reading_is_deterministic_and_independent_of_the_batch():
    pictures = [render(s, 64) for s in drawn(6)]
    assert read_scenes(pictures) == [read_scene(p) for p in reversed(pictures)][::-1]


@pytest.mark.parametrize(("shape", "dtype"), [((64, 32, 3), np.uint8), ((64, 64), np.uint8), ((64, 64, 3), np.float32)])
def test_other_arrays_are_refused(shape: tuple[int, ...], dtype: type):
    with pytest.raises(ValueError, match="square RGB"):
        read_scene(np.zeros(shape, dtype))


def reading_of(*solids: tuple[str, str], relation: str | None = None) -> Reading:
    return Reading(tuple(SeenSolid(c, s, (0.0, 0.0, 1.0, 1.0), 1.0) for c, s in solids), relation, 0.0)


def truth_of(*solids: tuple[str, str], relation: str | None = None) -> dict[str, Any]:
    return {"objects": [{"colour": c, "shape": s} for c, s in solids], "relation": relation}


RED, BLUE = ("red", "cube"), ("blue", "ring")


def test_judge_on_cases_made_by_hand():
    beside, stacked = reading_of(RED, BLUE, relation="left of"), reading_of(RED, BLUE, relation="on top of")
    swapped = reading_of(("red", "ring"), ("blue", "cube"), relation="left of")
    left = truth_of(RED, BLUE, relation="left of")
    cases = [
        (reading_of(RED), truth_of(RED)),  # right
        (reading_of(("red", "cone")), truth_of(RED)),  # another shape
        (beside, truth_of(RED)),  # one too many
        (reading_of(), truth_of(RED)),  # unreadable
        (beside, left),  # right
        (beside, truth_of(BLUE, RED, relation="right of")),  # right, told the other way
        (stacked, truth_of(BLUE, RED, relation="under")),  # right, told the other way
        (stacked, truth_of(RED, BLUE, relation="under")),  # upside down
        (reading_of(RED, BLUE), left),  # askew
        (swapped, left),  # the colours on the wrong shapes
        (reading_of(RED), left),  # one is missing
        (
            reading_of(RED, RED, relation="left of"),
            truth_of(RED, RED, relation="right of"),
        ),  # equal solids: both are true
    ]
    verdict = judge([reading for reading, _ in cases], [truth for _, truth in cases])
    assert verdict.objects == Share(1, 4)
    assert verdict.pairs == Share(6, 8)
    assert verdict.relations == Share(4, 6)
    assert verdict.scenes == Share(4, 8)


def test_judge_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="one reading per scene"):
        judge([reading_of(RED)], [])
    with pytest.raises(ValueError, match="3 objects"):
        judge([reading_of(RED)], [truth_of(RED, RED, RED)])


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (96, 192, 0.4299, 0.5701), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(hits: int, total: int, low: float, high: float):
    """Numbers as published for Wilson's score interval without continuity correction."""
    assert Share(hits, total).interval == pytest.approx((low, high), abs=1e-4)
