"""Rows of all ranks, for figures that are not a mean over samples."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Rows:
    """Named columns with a row a sample, collected batch by batch on each rank. A column may leave samples out."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, position: Sequence[int], columns: dict[str, Tensor]) -> None:
        """A batch: positions of its samples and a row (…) of each column for each of them."""
        places = torch.tensor(list(position), dtype=torch.int64)
        for name, rows in columns.items():
            rows = rows.detach().float() if rows.is_floating_point() else rows.detach()
            self._parts.setdefault(name, []).append((places, rows.cpu()))

    def add_captions(self, position: Sequence[int], captions: Sequence[str]) -> None:
        """The column "caption": a number (int64) for each, equal for equal ones."""
        self.add(position, {"caption": torch.tensor([_number(caption) for caption in captions], dtype=torch.int64)})

    def of_all_ranks(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The columns by position: the same on every rank.

        Every rank must call it, with the same columns; ``device`` is one that ranks exchange tensors on.
        """
        found = {}
        for name, parts in self._parts.items():
            places, rows = (_all(torch.cat(part).to(device)).cpu() for part in zip(*parts, strict=True))
            found[name] = rows[places.argsort()]
        return found


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
