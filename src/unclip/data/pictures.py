"""Decoded pictures of a split, by sample number: bad ones replaced, and kept in memory if wanted."""

import logging
import mmap
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from unclip.data.shards import Shards
from unclip.data.transforms import load_pixels
from unclip.errors import DataError

log = logging.getLogger(__name__)


class Pictures:
    """Reads and decodes samples of ``shards``, ``size`` pixels square (None: as they are, all alike).

    With ``cache``, every picture is decoded once and then kept (N · 3 · size² bytes, shared with forked workers). A
    damaged picture is replaced by the next good sample of its shard, counted in ``num_replaced`` and logged once; so is,
    without ``enlarge``, a smaller one.
    """

    def __init__(self, shards: Shards, size: int | None, cache: bool = False, enlarge: bool = True) -> None:
        self.shards, self.size, self.enlarge = shards, size, enlarge
        self.num_replaced = 0
        self._instead: dict[int, int] = {}
        self._wants_cache = cache
        self._shape: tuple[int, ...] = ()  # (H, W, 3)
        self._cached: np.ndarray | None = None  # (N, 3, H, W)
        self._filled: np.ndarray | None = None  # (N,) bool
        if cache:
            self.prepare_cache()

    def prepare_cache(self) -> None:
        """Reserve memory, which is taken page by page as pictures are decoded. DataError for too large sets."""
        self._shape = self._load_or_replace(np.array([0]), 0).shape
        num_bytes = len(self.shards) * int(np.prod(self._shape))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > memory // 2:
            raise DataError(
                f"data.cache would keep {num_bytes / 1e9:.1f} GB of pictures of {self.shards.where} in memory, "
                f"more than half of this machine's {memory / 1e9:.1f} GB; set data.cache=false"
            )
        self._cached = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8).reshape(len(self.shards), 3, *self._shape[:2])
        self._filled = np.frombuffer(mmap.mmap(-1, len(self.shards)), np.bool_)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None, "_filled": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._wants_cache:
            self.prepare_cache()

    def batch(self, indices: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """uint8 (B, 3, H, W) and the samples that they really are: ``indices`` with damaged ones replaced."""
        used = np.array([self._instead.get(i, i) for i in indices.tolist()])
        if self._cached is None or self._filled is None:
            self.shards.prepare(used.tolist())
            pictures = (self._load_or_replace(used, place) for place in range(len(used)))
            return torch.from_numpy(stacked(pictures, len(used), self.shards.where)), used
        new = np.flatnonzero(~self._filled[used])
        self.shards.prepare(used[new].tolist())
        for place in new:
            picture = self._load_or_replace(used, int(place))
            if picture.shape != self._shape:
                raise _several_shapes(self.shards.where, {picture.shape, self._shape})
            self._cached[used[place]] = picture.transpose(2, 0, 1)
            self._filled[used[place]] = True
        return torch.from_numpy(self._cached[used]), used

    def _load_or_replace(self, used: np.ndarray, place: int) -> np.ndarray:
        """The picture of sample ``used[place]``; if it is damaged, that entry moves on to a good one."""
        wanted = int(used[place])
        shard = self.shards.shard_of(wanted)
        start, count = int(self.shards.starts[shard]), self.shards.shard_sizes[shard]
        for step in range(count):
            sample = start + (wanted - start + step) % count
            content = self.shards.image(sample)
            try:
                picture = load_pixels(content, self.size, self.enlarge)
            except DataError as error:
                if step == 0 and wanted not in self._instead:
                    log.warning("%s: %s; taking the next sample instead", self.shards.keys[wanted], error)
                continue
            if step:
                self.num_replaced += 1
                self._instead[wanted] = sample
                used[place] = sample
            return picture
        raise DataError(f"no picture of {self.shards.where}/{self.shards.names[shard]} can be decoded")


def stacked(pictures: Iterable[np.ndarray], count: int, where: str) -> np.ndarray:
    """(count, 3, H, W) of pictures (H, W, 3); DataError where their shapes differ."""
    found = np.empty(0, np.uint8)
    for place, picture in enumerate(pictures):
        if place == 0:
            found = np.empty((count, 3, *picture.shape[:2]), np.uint8)
        if found.shape[2:] != picture.shape[:2]:
            raise _several_shapes(where, {(*found.shape[2:], 3), picture.shape})
        found[place] = picture.transpose(2, 0, 1)
    return found


def _several_shapes(where: str, shapes: set[tuple[int, ...]]) -> DataError:
    return DataError(f"{where} has pictures of shapes {sorted(shapes)}; set data.image_size")
