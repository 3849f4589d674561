"""How good what the sides of scripts/bench/peer_quality.py drew is, on all evaluation samples and on halves of them."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from quality_pieces import MEASURES, halves
from torch import Tensor

from unclip.evaluation.features import PictureFeatures

WORST = {"cosine": -1.0, "recall_1": 0.0, "kid": 1e6}
Measured = tuple[dict[str, float], dict[str, list[float]]]  # of all samples; of each half


class Judge:
    """Knows the evaluation samples of ``arrays`` (quality_arrays.py). The features of the real pictures are made once."""

    def __init__(self, arrays: Path) -> None:
        folder = arrays / "eval"
        self.true = F.normalize(torch.from_numpy(np.load(folder / "image_emb.npy")).float(), dim=1)
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())
        self.halves = halves(len(self.true))
        self._pictures = folder / "image.npy"
        self._features: PictureFeatures | None = None
        self._real = torch.empty(0)

    def __call__(self, stage: str, drawn: np.ndarray) -> Measured:
        """drawn: z_i (N, D) of a prior, or uint8 pictures (N, 3, H, W) of a decoder. What is not finite, because the training
        diverged, gets the WORST values: another learning rate is chosen then."""
        if len(drawn) != len(self.true):
            raise ValueError(f"{len(drawn)} samples were drawn, {len(self.true)} asked for")
        if not np.isfinite(drawn).all():
            values = {name: WORST[name] for name in MEASURES[stage]}
            return values, {name: [value] * len(self.halves) for name, value in values.items()}
        return self._prior(torch.from_numpy(drawn)) if stage == "prior" else self._decoder(torch.from_numpy(drawn))

    def _prior(self, drawn: Tensor) -> Measured:
        sampled = F.normalize(drawn.float(), dim=1)
        rows = {"cosine": (sampled * self.true).sum(1), "recall_1": first_hits(sampled, self.true, self.captions)}
        values = {name: value.double().mean().item() for name, value in rows.items()}
        return values, {
            name: [round(value[half].double().mean().item(), 5) for half in self.halves] for name, value in rows.items()
        }

    def _decoder(self, drawn: Tensor) -> Measured:
        if self._features is None:
            self._features = PictureFeatures()
            self._real = self._features(torch.from_numpy(np.load(self._pictures)))
        value, *of_halves = kids(self._features(drawn), self._real, [np.arange(len(drawn)), *self.halves])
        return {"kid": value}, {"kid": [round(kid, 3) for kid in of_halves]}


def first_hits(sampled: Tensor, true: Tensor, captions: list[str]) -> Tensor:
    """(N,) 1 where the nearest of the unit rows ``true`` belongs to the row's own caption (ties count as misses), else 0."""
    number: dict[str, int] = {}
    group = torch.tensor([number.setdefault(caption, len(number)) for caption in captions])
    own = group[:, None] == group
    scores = sampled @ true.T
    return (scores.masked_fill(~own, -torch.inf).amax(1) > scores.masked_fill(own, -torch.inf).amax(1)).float()


def kids(features: Tensor, real: Tensor, subsets: list[np.ndarray]) -> list[float]:
    """:func:`unclip.evaluation.metrics.kid` of the same rows of both sets, for many subsets: the kernels are made once."""
    x, y = features.double(), real.double()
    within_x, within_y, between = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    found = []
    for rows in subsets:
        index, size = torch.from_numpy(rows), len(rows)
        some = [matrix[index][:, index] for matrix in (within_x, within_y, between)]
        own = sum((matrix.sum() - matrix.diagonal().sum()) / (size * (size - 1)) for matrix in some[:2])
        found.append(1000 * float(own - 2 * some[2].mean()))
    return found


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
