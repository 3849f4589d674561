"""Where two sets of features lie to each other: precision, recall, density, coverage, and nearest neighbours."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.distances import CHUNK, squared_distances


@dataclass
class Overlap:
    """What each picture says; the means are the figures. ``precise`` and ``density`` (N,) of drawn ones, ``recalled`` and
    ``covered`` (M,) of real ones."""

    precise: Tensor
    density: Tensor
    recalled: Tensor
    covered: Tensor


def overlap(drawn: Tensor, real: Tensor, k: int, chunk: int = CHUNK) -> Overlap:
    """Of features (N, D) and (M, D). A picture's ball reaches to its k-th neighbour of its own set, itself not counted.

    Precision: a drawn picture lies in a real one's ball; recall: a real one lies in a drawn one's (Kynkäänniemi et al. 2019,
    eqs. 1 and 2). Density: in how many real balls a drawn picture lies, over k; coverage: a real one's ball holds a drawn
    picture (Naeem et al. 2020, eqs. 3 and 4).
    """
    drawn, real = drawn.double(), real.double()
    of_drawn, of_real = radii(drawn, k, chunk), radii(real, k, chunk)
    inside = torch.zeros(len(drawn), dtype=torch.float64)
    recalled, covered = [], []
    for start in range(0, len(real), chunk):
        squares = squared_distances(real[start : start + chunk], drawn)
        in_real = squares <= of_real[start : start + chunk, None]
        inside += in_real.sum(dim=0)
        covered.append(in_real.any(dim=1))
        recalled.append((squares <= of_drawn).any(dim=1))
    return Overlap((inside > 0).double(), inside / k, torch.cat(recalled).double(), torch.cat(covered).double())


def radii(x: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """(N,) the squared distance of each row to its k-th nearest other row."""
    found = []
    for start in range(0, len(x), chunk):
        squares = squared_distances(x[start : start + chunk], x)
        squares[torch.arange(len(squares)), torch.arange(start, start + len(squares))] = torch.inf
        found.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(found)


def nearest(x: Tensor, y: Tensor, count: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Cosines (N, count) of each row of x (N, D) with the rows of y (M, D) nearest to it, nearest first, and their numbers."""
    unit = F.normalize(y.float(), dim=1)
    found = [(F.normalize(part.float(), dim=1) @ unit.T).topk(count, dim=1) for part in x.split(chunk)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
