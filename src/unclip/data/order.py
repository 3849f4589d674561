"""The order of samples: one endless stream of seeded epochs, the same on any number of devices."""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

BLOCK_SHARDS = 16  # that samples are shuffled among
_CACHED_BLOCKS = 4


class Order:
    """Maps positions 0, 1, 2 … of the endless stream to sample numbers 0 … N-1.

    Epoch e covers positions [e·N, (e+1)·N) and holds each sample once: the shards are shuffled and cut into blocks of
    ``block_shards``, and the samples within a block are shuffled. Reading stays within a few files at a time, and no
    epoch's permutation is needed as a whole. The stream depends on the arguments only. Runs of ``neighbours`` samples of
    a shard stay together and in order: 1 shuffles single samples.
    """

    def __init__(
        self, shard_sizes: list[int], seed: int, block_shards: int = BLOCK_SHARDS, neighbours: int = 1
    ) -> None:
        if not shard_sizes or min(shard_sizes) < 1:
            raise ValueError(f"every shard needs at least one sample, got sizes {shard_sizes[:10]}")
        if block_shards < 1 or neighbours < 1 or seed < 0:
            raise ValueError(
                f"block_shards and neighbours must be positive and seed not negative, got {block_shards}, {neighbours} "
                f"and {seed}"
            )
        self.seed = seed
        self.block_shards, self.neighbours = block_shards, neighbours
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def index(self, position: int) -> int:
        """The sample at one position."""
        return int(self.indices(position, 1)[0])

    def indices(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the samples at positions start … start + count - 1; may cross the end of an epoch."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_samples)
            _, ends = self._epoch(epoch)
            block = int(np.searchsorted(ends, offset, side="right"))
            samples = self._block(epoch, block)
            first = offset - (int(ends[block]) - len(samples))
            part = samples[first : first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards and the offset at which each of its blocks ends."""
        if epoch not in self._epochs:
            shards = self._permutation(len(self._sizes), epoch, 0)
            ends = np.cumsum(np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self.block_shards)))
            self._epochs[epoch] = (shards, ends)
            while len(self._epochs) > _CACHED_BLOCKS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _block(self, epoch: int, block: int) -> np.ndarray:
        """The shuffled samples of one block of shards."""
        if (epoch, block) not in self._blocks:
            shards = self._epoch(epoch)[0][block * self.block_shards : (block + 1) * self.block_shards]
            sizes = self._sizes[shards]
            samples = np.concatenate([np.arange(size) + self._starts[s] for size, s in zip(sizes, shards, strict=True)])
            if self.neighbours == 1:  # the same as below, with one sort instead of three
                self._keep(epoch, block, samples[self._permutation(len(samples), epoch, block + 1)])
                return self._blocks[epoch, block]
            runs_before = np.cumsum(-(-sizes // self.neighbours)) - -(-sizes // self.neighbours)
            run = np.concatenate([np.arange(n) // self.neighbours + r for n, r in zip(sizes, runs_before, strict=True)])
            place = np.argsort(self._permutation(int(run[-1]) + 1, epoch, block + 1))  # of each run
            self._keep(epoch, block, samples[np.argsort(place[run], kind="stable")])
        return self._blocks[epoch, block]

    def _keep(self, epoch: int, block: int, samples: np.ndarray) -> None:
        self._blocks[epoch, block] = samples
        while len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)

    def _permutation(self, count: int, epoch: int, stream: int) -> np.ndarray:
        return seeded_permutation(count, self.seed, epoch, stream)


def seeded_permutation(count: int, *seed: int) -> np.ndarray:
    """0 … count - 1 in an order that depends on ``seed``, on any version of NumPy."""
    # Raw bits and a stable sort: NumPy promises both for ever, but not the output of Generator.permutation.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


def seeded_bits(*seed: int) -> Iterator[int]:
    """Numbers below 2**64 without end that depend on ``seed``, on any version of NumPy."""
    source = np.random.PCG64(np.random.SeedSequence(seed))
    while True:
        yield from source.random_raw(4096).tolist()


def share(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Positions that one rank takes of global step ``step``: a contiguous part of [s·G, (s+1)·G), G = batch_size."""
    if batch_size % world_size:
        raise ValueError(f"the global batch of {batch_size} cannot be shared evenly by {world_size} ranks")
    local = batch_size // world_size
    start = step * batch_size + rank * local
    return range(start, start + local)
