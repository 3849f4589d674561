"""Principal components of embeddings, and the buckets that turn their coefficients into codes."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class Edges(Enum):
    """Where a dimension's buckets end. uniform: equally wide; quantile: equally many training values in each."""

    uniform = "uniform"
    quantile = "quantile"


class BucketValue(Enum):
    """What stands for a bucket: the mean of the training values in it, or its centre."""

    mean = "mean"
    centre = "centre"


class Fitted(nn.Module):
    """A module whose buffers get their shapes from ``fit``, or from the state that is loaded; they are empty before."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and stored is not None:
                setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass
class Scatter:
    """Count, mean (D,) and the sum of (x - mean)(x - mean)ᵀ (D, D), float64; merging is exact (Chan et al. 1979)."""

    count: int
    mean: Tensor
    products: Tensor

    @staticmethod
    def of(rows: Tensor) -> "Scatter":
        rows = rows.double()
        mean = rows.mean(dim=0)
        return Scatter(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: "Scatter") -> "Scatter":
        count = self.count + other.count
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return Scatter(count, self.mean + delta * (other.count / count), self.products + other.products + between)


class PCA(Fitted):
    """The first principal components of vectors (..., D), by decreasing eigenvalue of their covariance.

    ``basis`` (k, D) has orthonormal rows, each with its largest entry positive, so two fits agree in sign; ``eigenvalues``
    (D,) are all variances, also of the components left out. ``encode`` and ``decode`` compute in float32, never autocast:
    codes must not depend on the precision of a run.
    """

    mean: Tensor
    basis: Tensor
    eigenvalues: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("basis", torch.zeros(0, embed_dim))
        self.register_buffer("eigenvalues", torch.zeros(embed_dim))

    @property
    def num_components(self) -> int:
        """k; 0 before the fit."""
        return len(self.basis)

    @property
    def explained(self) -> Tensor:
        """(D,) the share of the variance that the first 1, 2, ... D components hold."""
        return self.eigenvalues.double().cumsum(0) / self.eigenvalues.double().sum()

    def fit(self, blocks: Iterable[Tensor], *, num_components: int | None = None, share: float = 0.99) -> None:
        """From the rows of ``blocks``, each (n, D): the first ``num_components``, or as many as hold ``share``."""
        total: Scatter | None = None
        for rows in blocks:
            total = Scatter.of(rows) if total is None else total.merge(Scatter.of(rows))
        if total is None or total.count < 2:
            raise ValueError("principal components need at least two vectors")
        variances, vectors = torch.linalg.eigh(total.products / total.count)
        variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1).T
        signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        device = self.mean.device
        self.mean, self.eigenvalues = total.mean.float().to(device), variances.float().to(device)
        if num_components is None:
            num_components = min(int((self.explained < share).sum()) + 1, len(variances))
        self.basis = (signs * vectors)[:num_components].float().contiguous().to(device)

    def encode(self, x: Tensor) -> Tensor:
        """Coefficients (..., k) of vectors (..., D)."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.basis.T

    def decode(self, coefficients: Tensor) -> Tensor:
        """The vectors (..., D) with these coefficients (..., k), and the mean's in the components left out."""
        with torch.autocast(coefficients.device.type, enabled=False):
            return coefficients.float() @ self.basis + self.mean


class Buckets(Fitted):
    """Cuts each of k dimensions into ``num_buckets``. ``edges`` (k, B + 1) and ``values`` (k, B), increasing.

    The outer buckets also take what lies beyond the outer edges.
    """

    edges: Tensor
    values: Tensor

    def __init__(self, num_buckets: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(0, num_buckets + 1))
        self.register_buffer("values", torch.zeros(0, num_buckets))

    @property
    def num_buckets(self) -> int:
        return self.values.shape[1]

    def fit(self, rows: Tensor, edges: Tensor, value: BucketValue) -> None:
        """From training values ``rows`` (n, k) and increasing ``edges`` (k, B + 1). An empty bucket keeps its centre."""
        device = self.edges.device
        self.edges = edges.float().to(device)
        centres = (self.edges[:, :-1] + self.edges[:, 1:]) / 2
        self.values = centres
        if value is BucketValue.centre:
            return
        index = (self.encode(rows.to(device)) + torch.arange(len(edges), device=device) * self.num_buckets).flatten()
        size = centres.numel()
        counts = torch.bincount(index, minlength=size)
        sums = torch.bincount(index, rows.to(device).double().flatten(), minlength=size)
        means = (sums / counts.clamp(min=1)).view_as(centres).float()
        self.values = torch.where(counts.view_as(centres) > 0, means, centres)

    def encode(self, x: Tensor) -> Tensor:
        """Bucket numbers (..., k) int64 of x (..., k): bucket b holds edges[b] <= x < edges[b + 1]."""
        columns = x.float().reshape(-1, len(self.edges)).T.contiguous()
        codes = torch.searchsorted(self.edges[:, 1:-1].contiguous(), columns, right=True)
        return codes.T.reshape(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Values (..., k) of bucket numbers (..., k)."""
        return self.values[torch.arange(len(self.values), device=codes.device), codes]


def uniform_edges(std: Tensor, num_buckets: int, reach: float) -> Tensor:
    """(k, B + 1): equally wide buckets from -reach to reach standard deviations ``std`` (k,) about zero."""
    steps = torch.linspace(-reach, reach, num_buckets + 1, device=std.device)
    return std.clamp(min=1e-8)[:, None] * steps


def quantile_edges(rows: Tensor, num_buckets: int) -> Tensor:
    """(k, B + 1): the smallest of each column of ``rows`` (n, k), B - 1 quantiles between, interpolated, the largest."""
    ordered = rows.float().sort(dim=0).values
    places = torch.linspace(0, len(rows) - 1, num_buckets + 1, dtype=torch.float64, device=rows.device)
    low = places.floor().long().clamp(max=len(rows) - 2)
    return torch.lerp(ordered[low], ordered[low + 1], (places - low).float()[:, None]).T.contiguous()
