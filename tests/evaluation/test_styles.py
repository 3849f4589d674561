import pytest
import torch

from unclip.errors import DataError
from unclip.evaluation.styles import StyleClassifier


def drawn(seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    names = [("flat", "round", "noto")[i % 3] for i in range(count)]
    centres = {"flat": 0.0, "round": 1.5, "noto": -1.5}
    shift = torch.tensor([[centres[name]] for name in names])
    return torch.randn(count, 12, generator=generator) * 0.7 + shift, names


def test_styles_are_told_apart_on_fresh_pictures_and_chance_is_chance():
    classifier = StyleClassifier.fit(*drawn(0, 300))
    features, names = drawn(1, 300)
    assert classifier.accuracy(features, names) > 0.97
    assert classifier.accuracy(features, names[1:] + names[:1]) < 0.05
    assert classifier.accuracy(torch.zeros(300, 12), names) == pytest.approx(1 / 3)


def test_one_style_is_refused():
    with pytest.raises(DataError, match="at least two styles"):
        StyleClassifier.fit(torch.zeros(3, 2), ["flat"] * 3)
