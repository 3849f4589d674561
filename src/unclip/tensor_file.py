"""Writing safetensors with one tensor in memory at a time: sharded ones are gathered when their turn comes. What reading raises."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

BROKEN = (  # what torch.load and safetensors raise for a file that is cut short or damaged
    SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError,
    AssertionError,
)  # fmt: skip
# In the order of the safetensors library, which puts the last ones first: files are the same to the byte.
NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors``, and words about them, to ``path`` and on to the disk.

    Where some are sharded all ranks call it, all but one with None.
    """
    rank = {dtype: n for n, dtype in enumerate(NAMES)}
    kinds = {name: _Kind.of(tensors[name]) for name in tensors}  # one at a time: they may be read from a file
    order = sorted(kinds, key=lambda name: (-rank[kinds[name].dtype], name))
    if path is None:
        for name in order:
            _whole(tensors[name])
        return
    try:
        with path.open("wb") as file:
            file.write(_header({name: kinds[name] for name in order}, metadata))
            for name in order:
                data = _whole(tensors[name]).detach().cpu().contiguous().reshape(-1)
                file.write(data.view(torch.uint8).numpy().data)
                del data  # before the next one is gathered
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing alone does not name the file


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class _Kind:
    """What a file says of a tensor before its numbers."""

    dtype: torch.dtype
    shape: list[int]
    num_bytes: int

    @staticmethod
    def of(tensor: Tensor) -> "_Kind":
        return _Kind(tensor.dtype, list(tensor.shape), tensor.numel() * tensor.element_size())


def _header(kinds: Mapping[str, _Kind], metadata: Mapping[str, str] | None) -> bytes:
    """Its length in eight bytes, then names, types, shapes and places as JSON, padded with spaces to a multiple of eight."""
    found: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, kind in kinds.items():
        start, end = end, end + kind.num_bytes
        found[name] = {"dtype": NAMES[kind.dtype], "shape": kind.shape, "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
