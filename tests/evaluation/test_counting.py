"""The oracle of busy scenes: it counts real renders, sees what is missing, and counts nothing where there is nothing."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from unclip.data.shapes_exams import MOST, busy_scenes
from unclip.data.shapes_render import render
from unclip.evaluation.counting import Count, count_shares, count_solids
from unclip.evaluation.probes import Share

NUM = 2 * MOST


def softened(picture: np.ndarray, seed: int) -> np.ndarray:
    soft = gaussian_filter(picture.astype(float), (0.7, 0.7, 0), mode="nearest")
    return np.rint(soft + np.random.default_rng(seed).normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)


def test_busy_scenes_have_all_numbers_equally_often():
    assert [len(scene.objects) for scene in busy_scenes(2 * MOST)] == [*range(1, MOST + 1)] * 2
    assert busy_scenes(8) == busy_scenes(16)[:8]
    assert busy_scenes(8, seed=1) != busy_scenes(8)


@pytest.mark.parametrize(("side", "soft"), [(64, False), (128, True)])
def test_it_counts_fresh_renders_soft_and_noisy_ones_too(side: int, soft: bool):
    scenes = busy_scenes(NUM, seed=5)
    pictures = [render(scene, side) for scene in scenes]
    if soft:
        pictures = [softened(picture, i) for i, picture in enumerate(pictures)]
    shares = count_shares([count_solids(p) for p in pictures], [scene.metadata() for scene in scenes])
    assert shares["all"].hits >= NUM - 1
    assert shares["right"].hits >= NUM - 2


def test_it_sees_that_one_is_missing():
    scenes = [scene for scene in busy_scenes(MOST, seed=6) if len(scene.objects) > 3]
    fewer = [replace(scene, objects=scene.objects[1:]) for scene in scenes]
    counts = [count_solids(render(scene, 64)) for scene in fewer]
    right = sum(len(c.objects) == len(s.objects) for c, s in zip(counts, fewer, strict=True))
    assert right >= len(scenes) - 1
    assert count_shares(counts, [scene.metadata() for scene in scenes])["all"].hits <= 1


def test_it_counts_nothing_in_noise_and_plain_colour():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (noise, np.full((64, 64, 3), 200, np.uint8)):
        assert count_solids(picture).objects == ()


def test_shares_by_number_of_objects():
    red, two = ("red", "cube"), [{"colour": "red", "shape": "cube"}, {"colour": "blue", "shape": "ring"}]
    scenes = [{"objects": two[:1]}, {"objects": two}, {"objects": two}]
    counts = [Count((red,), 0.0), Count((red, ("blue", "cone")), 0.0), Count((), 1.0)]
    assert count_shares(counts, scenes) == {
        "1": Share(1, 1), "2": Share(1, 2), "all": Share(2, 3), "right": Share(1, 3), "readable": Share(2, 3)
    }  # fmt: skip
