"""What an embeddings folder looks like: norms, cosines, spectrum, and the rows that should not be there."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unclip.data.embeddings import Embeddings
from unclip.errors import DataError

VECTORS = ("image_emb", "text_emb")
_CHUNK = 8192


@dataclass
class Vectors:
    """One column of n rows. ``norms`` (m,) and ``variances`` (D,) along the principal components are of the finite ones."""

    norms: np.ndarray
    variances: Tensor
    num_nonfinite: int
    num_duplicates: int


@dataclass
class Inspection:
    """A split, of which ``num_rows`` of ``total`` rows were read.

    ``pairs`` (n,): cosine of z_i and z_t of each picture; ``shuffled``: of the z_i and the z_t of another one. Rows with
    numbers that are not finite are left out of both; they are None where there is no ``text_emb``.
    """

    total: int
    num_rows: int
    columns: dict[str, Vectors] = field(default_factory=dict)
    pairs: np.ndarray | None = None
    shuffled: np.ndarray | None = None


def inspect_embeddings(
    embeddings: Embeddings, max_rows: int, advance: Callable[[int], None] = lambda count: None
) -> Inspection:
    """Read up to ``max_rows`` rows, spread evenly, chunk by chunk; of several captions or crops the first.

    DataError where no row of a column is finite.
    """
    total = len(embeddings)
    count = min(total, max_rows)
    indices = np.arange(count) * total // count
    names = [name for name in VECTORS if name in embeddings.columns]
    seen = {name: _Seen(embeddings.interface.embed_dim) for name in names}
    pairs = []
    for start in range(0, count, _CHUNK):
        some = indices[start : start + _CHUNK]
        rows = embeddings.rows(some, names)
        for name in names:
            seen[name].add(rows[name])
        if len(names) == 2:
            pairs.append(_cosines(rows["image_emb"], rows["text_emb"]))
        advance(len(some))
    found = Inspection(total, count, {name: seen[name].result(f"{name} of {embeddings.split_dir}") for name in names})
    if pairs:
        found.pairs = _finite(np.concatenate(pairs))
        some = np.random.default_rng(0).permutation(indices)[:100_000]
        images = embeddings.rows(some, ["image_emb"])["image_emb"]
        texts = embeddings.rows(np.roll(some, 1), ["text_emb"])["text_emb"]
        found.shuffled = _finite(_cosines(images, texts))
    return found


def reconstruction_error(variances: Tensor) -> Tensor:
    """(D + 1,) mean squared error that PCA with k = 0 … D components leaves, as a share of the variance.

    The error is the sum of the variances that are left out (Jolliffe 2002, "Principal Component Analysis", sec. 2.1).
    """
    left = variances.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)]) / left[0].clamp(min=torch.finfo(left.dtype).tiny)


class _Seen:
    """What one pass over the rows of a column adds up."""

    def __init__(self, width: int) -> None:
        self.num_rows = 0
        self.norms: list[np.ndarray] = []
        self.hashes: list[np.ndarray] = []
        self.shift = np.zeros(width)  # the mean of some rows: keeps the sums small
        self.sum = np.zeros(width)
        self.products = np.zeros((width, width))
        self.weights = np.random.default_rng(0).integers(0, 2**63, width, dtype=np.uint64) * 2 + 1

    def add(self, rows: np.ndarray) -> None:
        self.num_rows += len(rows)
        bits = np.ascontiguousarray(rows).view(f"u{rows.dtype.itemsize}")
        self.hashes.append((bits * self.weights).sum(axis=1, dtype=np.uint64))
        good = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
        self.norms.append(np.linalg.norm(good, axis=1))
        if len(good):
            self.shift = good.mean(axis=0) if len(self.norms) == 1 else self.shift
            moved = good - self.shift
            self.sum += moved.sum(axis=0)
            self.products += moved.T @ moved

    def result(self, what: str) -> Vectors:
        norms = np.concatenate(self.norms)
        if not len(norms):
            raise DataError(f"no row of {what} is finite; check the CLIP and embed again")
        mean = self.sum / len(norms)
        covariance = torch.from_numpy(self.products / len(norms) - np.outer(mean, mean))
        variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
        num_different = len(np.unique(np.concatenate(self.hashes)))
        return Vectors(norms, variances, self.num_rows - len(norms), self.num_rows - num_different)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
