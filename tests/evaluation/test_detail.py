"""Patches and spectra of pictures, against known answers."""

import pytest
import torch

from unclip.errors import DataError
from unclip.evaluation.detail import OCTAVES, octave_powers, patch_features, patches
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid


def noise(count: int, side: int, scale: float, seed: int = 0) -> torch.Tensor:
    values = 128 + scale * torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return values.round().clamp(0, 255).byte().expand(-1, 3, -1, -1).contiguous()


def test_patches_are_cut_row_by_row():
    picture = torch.arange(8 * 9).reshape(1, 1, 8, 9).expand(1, 3, 8, 9).byte()
    found = patches(picture, 4)
    assert found.shape == (4, 3, 4, 4)
    assert torch.equal(found[1], picture[0, :, :4, 4:8])
    assert torch.equal(found[2], picture[0, :, 4:, :4])
    with pytest.raises(DataError, match="pictures of 9x8 px hold no patch of 16 px"):
        patches(picture, 16)


def test_white_noise_has_the_same_power_in_all_octaves_and_a_quarter_at_half_its_scale():
    full, half = octave_powers(noise(64, 64, 40.0)), octave_powers(noise(64, 64, 20.0, seed=1))
    torch.testing.assert_close(full / full[-1], torch.ones(OCTAVES, dtype=torch.float64), atol=0.15, rtol=0)
    torch.testing.assert_close(half / full, torch.full((OCTAVES,), 0.25, dtype=torch.float64), atol=0.05, rtol=0)


def test_a_grating_lies_in_its_own_octave():
    for octave, period in ((OCTAVES - 1, 3.0), (OCTAVES - 2, 6.0), (OCTAVES - 3, 12.0)):
        wave = 128 + 60 * torch.sin(2 * torch.pi * torch.arange(64) / period)
        powers = octave_powers(wave.round().byte().expand(1, 3, 64, 64))
        assert int(powers.argmax()) == octave
        assert powers[octave] / powers.sum() > 0.9


def test_a_spectrum_needs_square_pictures_large_enough():
    for shape in ((1, 3, 32, 32), (1, 3, 64, 80)):
        with pytest.raises(DataError, match="takes square pictures of 64 px or more"):
            octave_powers(torch.zeros(shape, dtype=torch.uint8))


def test_the_kid_of_patches_tells_blurred_patches_from_fresh_ones():
    features = PictureFeatures()
    real, same = noise(4, 64, 40.0), noise(4, 64, 40.0, seed=1)
    reference = patch_features(real, features)
    soft = torch.nn.functional.avg_pool2d(same.float(), 3, 1, 1).byte()
    distances = [kid(patch_features(pictures, features), reference)[0] for pictures in (soft, same)]
    assert distances[0] > 10 * abs(distances[1])
