"""The rows of one column over all shards as one array of virtual memory, so that a batch is one copy.

Taking rows shard by shard and putting them into a batch copies each row twice. Here the files are mapped side by side into
one range of addresses, and a row is found by its distance from the range's start.
"""

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from math import gcd

import numpy as np
import torch

from unclip.errors import DataError

_FIXED = 0x10  # MAP_FIXED of Linux and macOS
_PAGE = mmap.ALLOCATIONGRANULARITY
_HEADER = 64  # a .npy file's rows start at a multiple of this (NEP 1)


def supported() -> bool:
    """Whether files can be mapped to chosen addresses: on Linux and macOS."""
    return sys.platform in ("linux", "darwin")


class Joined:
    """Rows of ``row_shape`` and ``dtype`` in files of ``num_rows`` rows; ``open_file(k)`` maps file k when it is needed.

    It returns the k-th file's array as ``np.memmap``. Nothing is read before rows are asked for.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        row_shape: tuple[int, ...],
        dtype: np.dtype,
        open_file: Callable[[int], np.memmap],
    ) -> None:
        self.row_shape, self.dtype, self.open_file = row_shape, dtype, open_file
        self.row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        self.unit = gcd(self.row_bytes, _HEADER)  # bytes; every row starts at a multiple of it
        sizes = np.asarray(num_rows, dtype=np.int64) * self.row_bytes
        self._places = np.cumsum([0, *(-(-sizes // _PAGE) + 2) * _PAGE])  # with room for any header below a page
        self._starts = np.zeros(len(num_rows), dtype=np.int64)  # of each file's first row, in units
        self._open = np.zeros(len(num_rows), dtype=bool)
        self._lock = threading.Lock()
        self._range = _Range(int(self._places[-1]))
        floats = torch.frombuffer(self._range.buffer, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
        count = (int(self._places[-1]) - self.row_bytes) // self.unit + 1
        self._windows = floats.as_strided((count, self.row_bytes // dtype.itemsize), (self.unit // dtype.itemsize, 1))

    def take(self, files: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, …) the rows ``rows`` of ``files``, both (n,) int64."""
        with self._lock:
            for file in np.unique(files[~self._open[files]]).tolist():
                self._map(file)
        windows = self._starts[files] + rows * (self.row_bytes // self.unit)
        found = np.empty((len(rows), self._windows.shape[1]), self.dtype)  # NumPy's large arrays lie in huge pages
        torch.index_select(self._windows, 0, torch.from_numpy(windows), out=torch.from_numpy(found))
        return found.reshape(len(rows), *self.row_shape)

    def _map(self, file: int) -> None:
        mapped = self.open_file(file)
        place, offset = int(self._places[file]), mapped.offset
        if mapped.shape[1:] != self.row_shape or mapped.dtype != self.dtype or offset % _HEADER or offset >= _PAGE:
            raise ValueError(f"{mapped.filename} has {mapped.dtype} rows of {mapped.shape[1:]} after {offset} bytes")
        self._range.put(str(mapped.filename), place, offset + mapped.nbytes)
        self._starts[file] = (place + offset) // self.unit
        self._open[file] = True


class _Range:
    """A range of addresses that holds nothing until files are put into it; given back with the object."""

    def __init__(self, size: int) -> None:
        self._mmap, munmap = _functions()
        self.address = self._call(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.buffer = (ctypes.c_char * size).from_address(self.address)
        weakref.finalize(self.buffer, munmap, self.address, size)  # the tensors over it keep the buffer alive

    def put(self, path: str, place: int, size: int) -> None:
        """Map the first ``size`` bytes of a file ``place`` bytes after the start, to read only."""
        file = os.open(path, os.O_RDONLY)
        try:
            self._call(self.address + place, size, mmap.PROT_READ, mmap.MAP_PRIVATE | _FIXED, file)
        finally:
            os.close(file)

    def _call(self, address: int | None, size: int, protection: int, flags: int, file: int) -> int:
        found = self._mmap(address, size, protection, flags, file, 0)
        if found == ctypes.c_void_p(-1).value:
            error = ctypes.get_errno()
            raise DataError(f"cannot map {size:,} bytes of embeddings into memory: {os.strerror(error)} (ulimit -v?)")
        return found


def _functions() -> tuple[Callable[..., int], Callable[..., int]]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    number, size = ctypes.c_int, ctypes.c_size_t
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_longlong]
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    return libc.mmap, libc.munmap
