"""Lite0 orders pictures as a person would: the sharp ones are nearer to each other than to blurred ones."""

import numpy as np
import torch

from unclip.data.shapes import draw_scene, render
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid


def scenes(seed: int, count: int) -> torch.Tensor:
    drawn = [render(draw_scene(np.random.default_rng([seed, i]), (1, 2), 0.0, False), 32) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def test_features_tell_blurred_pictures_from_sharp_ones():
    features = PictureFeatures()
    some, others = scenes(1, 24), scenes(2, 24)
    blurred = torch.nn.functional.avg_pool2d(others.float(), 5, 1, 2).to(torch.uint8)
    found = features(some)
    assert found.shape == (24, 1280)
    torch.testing.assert_close(features(some[:7], batch_size=3), found[:7], atol=1e-4, rtol=1e-3)
    same, error = kid(found, features(others))
    far, _ = kid(found, features(blurred))
    assert far > 3 * max(same, error)
