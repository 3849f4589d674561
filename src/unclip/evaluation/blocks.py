"""Rows of numbers about many pictures, gathered block by block: by several ranks, and over several starts of one command.

A block is a file, so what is there is never made again. Its rows depend on its place only and not on who makes it: any
number of ranks writes the same files, and all figures come from all rows, never from one rank's.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from unclip.drafts import write_atomic
from unclip.errors import ConfigError, DataError

BLOCK = 64  # rows; one number for all, since a sum's rounding depends on its batch
ABOUT = "about.json"


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of torchrun."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the other ranks, over gloo, where torchrun started some."""
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(rank, count)

    def mine(self, num_rows: int) -> Iterator[tuple[int, range]]:
        """Number and rows of each block of this rank."""
        for block in range(self.rank, -(-num_rows // BLOCK), self.count):
            yield block, range(block * BLOCK, min((block + 1) * BLOCK, num_rows))

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def device(self) -> torch.device:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


class Blocks:
    """``folder`` with a file of rows (B, D) float32 for each block of ``num_rows`` rows.

    ``about`` says what the rows are of. ConfigError, with the difference, where the folder holds rows of something else.
    """

    def __init__(self, folder: Path, num_rows: int, about: dict[str, str]) -> None:
        self.folder, self.num_rows = folder, num_rows
        claim(folder, about)

    def has(self, block: int) -> bool:
        return self._path(block).exists()

    def write(self, block: int, rows: Tensor) -> None:
        content = io.BytesIO()
        np.save(content, rows.float().numpy())
        write_atomic(self._path(block), content.getvalue())

    def read(self) -> Tensor:
        """All rows (N, D), by number. DataError for a block that is missing."""
        count = -(-self.num_rows // BLOCK)
        lacking = [self._path(block) for block in range(count) if not self.has(block)]
        if lacking:
            raise DataError(f"{lacking[0]} is missing: all ranks must see one run folder; run the same command again")
        first = np.load(self._path(0))
        rows = np.empty((self.num_rows, first.shape[1]), np.float32)
        for block in range(count):
            rows[block * BLOCK : (block + 1) * BLOCK] = np.load(self._path(block))
        return torch.from_numpy(rows)

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npy"


def claim(folder: Path, about: dict[str, str]) -> None:
    """Say in ``folder`` what is kept there, or raise ConfigError where it says something else."""
    path = folder / ABOUT
    if path.exists():
        there = json.loads(path.read_text())
        different = [
            f"{k}: {there.get(k)} there, {about.get(k)} now" for k in about | there if there.get(k) != about.get(k)
        ]
        if different:
            raise ConfigError(
                f"{folder} was made from something else ({'; '.join(different)}): take another run, or remove that folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(about, indent=2).encode())
