import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from unclip.errors import ConfigError
from unclip.evaluation.zero_shot import class_embeddings, zero_shot


class Toy(nn.Module):
    """Captions are embedded by their length, pictures by their mean grey."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[len(caption)] for caption in captions])

    def encode_text(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat((tokens.float(), torch.ones(len(tokens), 1)), dim=1), None

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        grey = images.float().mean((1, 2, 3))
        return torch.stack((grey, torch.ones(len(grey))), dim=1)


def test_a_class_is_the_mean_of_its_unit_captions() -> None:
    found = class_embeddings(Toy(), ["ab", "abcd"], ["{}", "a {}"])
    two, four = (F.normalize(torch.tensor([n, 1.0]), dim=0) for n in (2, 4))
    assert_close(found[0], F.normalize(two + four, dim=0))
    with pytest.raises(ConfigError, match=r"must hold \{\} once"):
        class_embeddings(Toy(), ["ab"], ["a photo"])


def test_shares_by_hand() -> None:
    classes = F.normalize(torch.tensor([[1.0, 1.0], [3.0, 1.0], [20.0, 1.0]]), dim=1)
    pictures = torch.tensor([1, 3, 20, 20], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    found = zero_shot(Toy(), [(pictures[:3], [0, 1, 1]), (pictures[3:], [0])], classes, ks=(1, 2, 3))
    assert found == {"top_1": 0.5, "top_2": 0.75}  # 20 is nearest to class 2, then 1, then 0
