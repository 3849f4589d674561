"""Bootstrap intervals: how far a figure would move if other pictures had been drawn, or others been taken as real."""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def resamples(count: int, num: int, seed: int) -> Tensor:
    """(1 + num, count) float64: how often each of ``count`` rows is drawn in each resample; in the first one, once each."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.ones(1 + num, count, dtype=torch.float64)
    for row in found[1:]:
        row.copy_(torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count))
    return found


def figure(values: Tensor) -> Figure:
    """The figure of the whole sample, ``values[0]``, and its interval from those of the resamples, ``values[1:]`` (B,).

    The quantiles of the resamples about their mean, laid about the figure: distances of resamples are larger, and their
    diversity smaller, than those of fresh samples, since rows repeat; that shift is no uncertainty (Efron and Tibshirani
    1993, "An Introduction to the Bootstrap", sec. 10).
    """
    value, others = float(values[0]), values[1:].double()
    if not len(others):
        return Figure(value, value, value)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (others - others.mean()).quantile(tails).tolist()
    return Figure(value, value + low, value + high)


def mean_figure(rows: Tensor, weights: Tensor) -> Figure:
    """Of the mean of rows (N,), by the resamples ``weights`` (1 + B, N)."""
    return figure(weights @ rows.double() / len(rows))
