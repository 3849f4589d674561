"""Rows of all ranks, for figures that are not a mean over samples."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Rows:
    """Columns of embeddings with their captions, collected batch by batch on each rank."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, position: Sequence[int], captions: Sequence[str], *columns: Tensor) -> None:
        """A batch: (B,) positions of its samples and B rows of each column."""
        numbers = torch.tensor([list(position), [_number(caption) for caption in captions]])
        self._parts.append((*numbers, *(column.float().cpu() for column in columns)))

    def of_all_ranks(self, device: torch.device) -> tuple[list[int], list[Tensor]]:
        """A number for each caption (equal for equal ones) and the columns, by position: the same on every rank.

        Every rank must call it; ``device`` is one that ranks exchange tensors on.
        """
        position, captions, *columns = (
            _all(torch.cat(part).to(device)).cpu() for part in zip(*self._parts, strict=True)
        )
        order = position.argsort()
        return captions[order].tolist(), [column[order] for column in columns]


def _number(caption: str) -> int:
    """63 bits of its hash: two of a billion captions share one with a probability of 5 %."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1


def _all(rows: Tensor) -> Tensor:
    """The rows (n, …) of each rank in turn; n may differ between them."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])
