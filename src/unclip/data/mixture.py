"""Several data sets in one endless stream, each with its share."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

PERIOD = 4096  # positions in which every source gets exactly its share
_CACHED_PERIODS = 4


class Mixture:
    """Which source each position of the stream draws from, in random order with exact shares.

    Of every :data:`PERIOD` positions source k gets the whole number nearest to its share of ``weights``; which ones
    depends on ``seed`` and the period's number only. ValueError for a weight that is not positive, or too small for one.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights of a mixture must be positive, got {list(weights)}")
        self.seed = seed
        ends = np.round(np.cumsum(weights) / np.sum(weights) * PERIOD).astype(np.int64)
        self.counts = np.diff(ends, prepend=0)
        if self.counts.min() == 0:
            raise ValueError(f"a weight of {min(weights)} among {list(weights)} is less than one sample in {PERIOD}")
        self._slots = np.repeat(np.arange(len(weights)), self.counts)
        self._periods: OrderedDict[int, np.ndarray] = OrderedDict()

    def sources(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the sources at positions start … start + count - 1."""
        parts = []
        while count > 0:
            period, offset = divmod(start, PERIOD)
            part = self._period(period)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def drawn_before(self, position: int) -> np.ndarray:
        """(K,) int64: how many samples of each source stand before ``position``: where its own stream goes on."""
        period, offset = divmod(position, PERIOD)
        return period * self.counts + np.bincount(self._period(period)[:offset], minlength=len(self.counts))

    def _period(self, number: int) -> np.ndarray:
        if number not in self._periods:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, number])).random_raw(PERIOD)
            self._periods[number] = self._slots[np.argsort(bits, kind="stable")]
            while len(self._periods) > _CACHED_PERIODS:
                self._periods.popitem(last=False)
        return self._periods[number]
