"""What a training step gets: one batch of samples of the endless stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Batch:
    """B samples; a column that the stage did not ask for is None.

    ``image`` (B, 3, H, W) uint8; ``low`` (B, 3, h, w) uint8, a small degraded copy of it (data/degrade.py); ``tokens``
    (B, L) int64, zero after the end-of-text token, cut to the batch's longest caption; ``image_emb`` and ``text_emb``
    (B, D) float32, the raw outputs of CLIP (unit-norm only where imported ones are); ``text_seq`` (B, L, W), the caption's
    token states; ``position``: the place in the endless stream, the seed of a sample's noise. ``replaced``: the key of the
    damaged sample whose place another one took, else "".
    The loader hands columns over as they are stored, half-precision and int32; :meth:`to` widens them on the device.
    """

    key: Sequence[str] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    caption: Sequence[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    image: Tensor | None = None
    low: Tensor | None = None
    tokens: Tensor | None = None
    image_emb: Tensor | None = None
    text_emb: Tensor | None = None
    text_seq: Tensor | None = None

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on ``device``, widened to float32 and int64 there; the lists stay on the host."""
        return self._map(lambda tensor: _widened(tensor.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def split(self, parts: int) -> "list[Batch]":
        """At most ``parts`` batches of consecutive rows, as equal as they can be; views of this one's tensors."""
        size = -(-len(self) // parts)
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    @staticmethod
    def merged(batches: "list[Batch]") -> "Batch":
        """All rows in the order of their positions; shorter captions are padded with zeros."""
        order = sorted(range(sum(map(len, batches))), key=[p for batch in batches for p in batch.position].__getitem__)
        columns: dict[str, Any] = {}
        for f in fields(Batch):
            values = [batch.__dict__[f.name] for batch in batches]
            if isinstance(values[0], Sequence):
                rows = [row for value in values for row in value]
                columns[f.name] = [rows[i] for i in order] if rows else []
            elif values[0] is not None:
                columns[f.name] = _cat_padded(values)[order]
        return Batch(**columns)

    def rows(self, rows: slice) -> "Batch":
        """The batch of these rows; views of this one's tensors."""
        return replace(
            self, **{f.name: value[rows] for f in fields(self) if (value := self.__dict__[f.name]) is not None}
        )

    def picked(self, rows: list[int]) -> "Batch":
        """The batch of these rows, in this order."""
        columns: dict[str, Any] = {}
        for f in fields(self):
            value = self.__dict__[f.name]
            if value is not None and len(value):
                columns[f.name] = value[rows] if isinstance(value, Tensor) else [value[i] for i in rows]
        return Batch(**columns)

    def column(self, name: str) -> Tensor:
        """The column ``name``, which must be there; ValueError if the stage did not ask the data for it."""
        value = self.__dict__[name]
        if value is None:
            raise ValueError(f"the batch has no column {name}: the stage's configuration does not ask for it")
        return value

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        columns = {f.name: value for f in fields(self) if isinstance(value := self.__dict__[f.name], Tensor)}
        return replace(self, **{name: function(value) for name, value in columns.items()})


def _widened(tensor: Tensor) -> Tensor:
    """float16 to float32 and int32 to int64; pictures stay uint8."""
    return tensor.to({torch.float16: torch.float32, torch.int32: torch.int64}.get(tensor.dtype, tensor.dtype))


def _cat_padded(values: list[Tensor]) -> Tensor:
    """Tensors that may differ in their second dimension, the length of captions."""
    if values[0].ndim not in (2, 3):
        return torch.cat(values)
    longest = max(value.shape[1] for value in values)
    below = (0, 0) * (values[0].ndim - 2)
    return torch.cat([F.pad(value, (*below, 0, longest - value.shape[1])) for value in values])
