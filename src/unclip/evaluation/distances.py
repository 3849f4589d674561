"""Distances between two sets of features: Fréchet, and the maximum mean discrepancy under two kernels.

Features are rows (N, D) float32; what has N^2 entries is computed in chunks of rows. ``weights`` (1 + B, N) are resamples (see
:func:`unclip.evaluation.intervals.resamples`), the first of which is the whole sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import ConfigError
from unclip.evaluation.intervals import Figure, figure

CHUNK = 512
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
Kernel = Callable[[Tensor, Tensor], Tensor]


def kid_figure(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor) -> Figure:
    """Kernel inception distance x 1000: :func:`mmd` under (x.y / D + 1)^3 (Binkowski et al. 2018, sec. 4).

    The usual mean over random subsets estimates the same; this is the mean over all of them.
    """
    return figure(1000 * mmd(x, y, cubic, weights_x, weights_y))


def cmmd_figure(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor) -> Figure:
    """CLIP MMD x 1000 of CLIP's picture embeddings: :func:`mmd` of unit vectors under exp(-|x - y|^2 / (2 σ^2)), σ = 10
    (Jayasumana et al. 2024, sec. 4, eq. 3; their code also counts each row with itself, which adds 2000 / N at most)."""
    return figure(CMMD_SCALE * mmd(F.normalize(x, dim=1), F.normalize(y, dim=1), gaussian, weights_x, weights_y))


def mmd(x: Tensor, y: Tensor, kernel: Kernel, weights_x: Tensor, weights_y: Tensor, chunk: int = CHUNK) -> Tensor:
    """(1 + B,) unbiased squared MMD of x (N, D) and y (M, D): a row is never paired with itself (Gretton et al. 2012, eq. 3)."""
    within = _within(x, kernel, weights_x, chunk) + _within(y, kernel, weights_y, chunk)
    return within - 2 * _pairs(x, y, kernel, weights_x, weights_y, chunk) / (len(x) * len(y))


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    return squared_distances(x, y).div_(-2 * CMMD_SIGMA**2).exp_()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) of rows, which should be float64: near ones cancel out in less."""
    of_x, of_y = (torch.linalg.vector_norm(rows, dim=1).square() for rows in (x, y))
    return torch.addmm(of_y, x, y.T, alpha=-2).add_(of_x[:, None]).clamp_(min=0)


def _within(x: Tensor, kernel: Kernel, weights: Tensor, chunk: int) -> Tensor:
    """(1 + B,) the mean kernel of two different rows."""
    own = torch.cat([kernel(part, part).diagonal() for part in x.double().split(64)])
    repeats = weights.square()
    return (_pairs(x, x, kernel, weights, weights, chunk) - repeats @ own) / (len(x) ** 2 - repeats.sum(dim=1))


def _pairs(x: Tensor, y: Tensor, kernel: Kernel, weights_x: Tensor, weights_y: Tensor, chunk: int) -> Tensor:
    """(1 + B,) the sum of the kernel over all pairs, a row counted as often as it was drawn."""
    found, y = weights_x.new_zeros(len(weights_x)), y.double()
    for start in range(0, len(x), chunk):
        some = slice(start, start + chunk)
        found += ((weights_x[:, some] @ kernel(x[some].double(), y)) * weights_y).sum(dim=1)
    return found


@dataclass
class Moments:
    """Mean (D,) and covariance (D, D), float64, the latter over n - 1."""

    mean: Tensor
    cov: Tensor


def moments(x: Tensor, chunk: int = 4096) -> Moments:
    """Of rows (N, D), in float64, chunk by chunk."""
    mean = torch.stack([part.double().sum(dim=0) for part in x.split(chunk)]).sum(dim=0) / len(x)
    products = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(chunk):
        moved = part.double() - mean
        products += moved.T @ moved
    return Moments(mean, products / (len(x) - 1))


def fid_figure(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor) -> Figure:
    """Fréchet distance of two Gaussians with the rows' moments (Heusel et al. 2017, eq. 6), as torch-fidelity computes it.

    Of Inception's features it is FID. It falls with the number of rows: compare equal numbers only.
    """
    of_x, of_y = moments(x), moments(y)
    found = [_torch_fidelitys(of_x, of_y)]
    for some, others in zip(weights_x[1:], weights_y[1:], strict=True):
        found.append(frechet(_weighted(x, of_x.mean, some), _weighted(y, of_y.mean, others)))
    return figure(torch.tensor(found, dtype=torch.float64))


def frechet(a: Moments, b: Moments) -> float:
    """The same by symmetric matrices, which takes less time: the trace of (A B)^1/2 is that of (A^1/2 B A^1/2)^1/2."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * shared)


def _torch_fidelitys(a: Moments, b: Moments) -> float:
    try:
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    except ImportError:
        raise ConfigError("fid needs the extra eval: pip install 'unclip[eval]'") from None
    statistics: Any = [{"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def _weighted(x: Tensor, centre: Tensor, weights: Tensor, chunk: int = 4096) -> Moments:
    """Of a resample; products in float32 of rows moved by ``centre``, sums in float64."""
    moved_by, count = centre.float(), len(x)
    shift, products = torch.zeros_like(centre), centre.new_zeros(len(centre), len(centre))
    for part, some in zip(x.split(chunk), weights.float().split(chunk), strict=True):
        moved = part - moved_by
        heavy = moved * some[:, None]
        shift += heavy.sum(dim=0, dtype=torch.float64)
        products += heavy.T @ moved
    shift /= count
    return Moments(centre + shift, (products - count * torch.outer(shift, shift)) / (count - 1))
