"""Which style a picture is drawn in: logistic regression on perceptual features."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import DataError

PENALTY = 1e-3  # on the squared weights


@dataclass
class StyleClassifier:
    """Trained by :meth:`fit` on features (N, D) of real pictures and the names of their styles."""

    styles: list[str]
    mean: Tensor
    std: Tensor
    net: nn.Linear

    @classmethod
    def fit(cls, features: Tensor, styles: list[str]) -> "StyleClassifier":
        """Multinomial logistic regression with a ridge penalty, by L-BFGS from zero: the same data, the same classifier."""
        names = sorted(set(styles))
        if len(names) < 2:
            raise DataError(f"a style classifier needs pictures of at least two styles, got {names}")
        mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
        x, target = (features - mean) / std, torch.tensor([names.index(style) for style in styles])
        net = nn.Linear(x.shape[1], len(names))
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(net(x), target) + PENALTY * net.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(names, mean, std, net.requires_grad_(False))

    def predict(self, features: Tensor) -> list[str]:
        """The most likely style of each row of (N, D)."""
        return [self.styles[i] for i in self.net((features - self.mean) / self.std).argmax(dim=1).tolist()]

    def accuracy(self, features: Tensor, styles: list[str]) -> float:
        """The share of rows that are given their own style."""
        return sum(a == b for a, b in zip(self.predict(features), styles, strict=True)) / len(styles)
