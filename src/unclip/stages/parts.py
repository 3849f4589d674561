"""FSDP2's checkpoints: ``last.ckpt`` holds everything but the tensors, which stand in safetensors files in a folder beside it.

*Sharded*: each rank writes its own rows of each tensor, all at the same time. *Full*: rank 0 writes one file of whole tensors,
gathered one by one. No rank ever holds more than its share and one whole tensor. Any number of ranks
of any strategy reads either.
"""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from unclip.errors import TrainingError, is_out_of_memory
from unclip.tensor_file import BROKEN, write_tensors


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stays in ``last.ckpt``, and the tensors by name: ``w/NAME`` and ``o/OPTIMISER/NUMBER/NAME``."""
    tensors = {f"w/{name}": value for name, value in checkpoint["state_dict"].items()}
    optimizers = []
    for i, optimizer in enumerate(checkpoint["optimizer_states"]):
        for number, values in optimizer["state"].items():
            tensors |= {f"o/{i}/{number}/{name}": value for name, value in values.items()}
        optimizers.append({"param_groups": optimizer["param_groups"]})
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    return {**rest, "optimizer_states": optimizers}, tensors


def joined(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The reverse of :func:`split`."""
    checkpoint = {**rest, "state_dict": {}}
    del checkpoint["parts"]
    checkpoint["optimizer_states"] = [{**optimizer, "state": {}} for optimizer in rest["optimizer_states"]]
    for name, value in tensors.items():
        kind, _, own = name.partition("/")
        if kind == "w":
            checkpoint["state_dict"][own] = value
        else:
            i, number, field = own.split("/")
            checkpoint["optimizer_states"][int(i)]["state"].setdefault(int(number), {})[field] = value
    return checkpoint


def unused_folder(checkpoints: Path, step: int) -> str:
    """The name of a new folder: the one in use stays until ``last.ckpt`` is replaced."""
    names = [f"parts-{step:08d}", *(f"parts-{step:08d}-{n}" for n in range(2, 100))]
    return next(name for name in names if not (checkpoints / name).exists())


def write_part(folder: Path, tensors: dict[str, Tensor], rank: int, ranks: int, full: bool) -> None:
    """This rank's part of the writing; all ranks call it."""
    if full:
        write_tensors(_file(folder, 0, 1) if rank == 0 else None, tensors)
        return
    own = {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
        if rank == 0 or isinstance(value, DTensor)
    }
    write_tensors(_file(folder, rank, ranks), own)


def _file(folder: Path, part: int, parts: int) -> Path:
    return folder / f"{part:05d}-of-{parts:05d}.safetensors"


class Parts:
    """The tensors of a checkpoint, of which any rows can be read."""

    def __init__(self, files: list[Any]) -> None:
        self._files = files
        self.holders: dict[str, list[Any]] = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                self.holders.setdefault(name, []).append(file)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [file.get_slice(name).get_shape() for file in self.holders[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else tuple(shapes[0])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (not included), of those files that have some of them."""
        pieces, start = [], 0
        for file in self.holders[name]:
            rows = file.get_slice(name)
            count = rows.get_shape()[0]
            low, high = max(first - start, 0), min(last - start, count)
            if low < high:
                pieces.append(rows[low:high])
            start += count
        if not pieces:
            return self.holders[name][0].get_slice(name)[0:0]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def whole(self, name: str) -> Tensor:
        holders = self.holders[name]
        return holders[0].get_tensor(name) if len(holders) == 1 else self.rows(name, 0, self.shape(name)[0])


@contextmanager
def opened(path: Path, rest: dict[str, Any]) -> Iterator[Parts]:
    """The files beside ``last.ckpt``; TrainingError where one is missing or damaged."""
    with _told(path, path):
        folder, count = path.parent / rest["parts"]["folder"], int(rest["parts"]["count"])
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(_opened(_file(folder, n, count), path)) for n in range(count)]
        except OSError as error:
            raise TrainingError(
                f"{path} needs the {count} files in {folder}, of which one is missing ({error}); copy the whole folder "
                f"{path.parent} again, or remove {path} to start anew"
            ) from error
        yield Parts(files)


def _opened(file: Path, path: Path) -> Any:
    with _told(file, path):
        return safe_open(file, "pt")


@contextmanager
def _told(file: Path, path: Path) -> Iterator[None]:
    """Around reading ``file`` of the checkpoint ``path``: what is raised for a damaged or foreign one, in words."""
    try:
        yield
    except OSError:
        raise
    except (pickle.UnpicklingError, *BROKEN) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{file} is damaged or holds more than tensors; no code was run. Copy {path.parent} again from where it is "
            f"whole, or remove {path} to start anew"
        ) from error


def read_last(path: Path) -> dict[str, Any]:
    """What stands in ``last.ckpt`` itself, with its tensors mapped into memory; pickled code is not run.

    Raises :class:`TrainingError` for a file that is damaged, holds code, or is no checkpoint of a run.
    """
    with _told(path, path):
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not {"global_step", "optimizer_states"} <= found.keys() or not {"state_dict", "parts"} & found.keys():
            raise KeyError("a run's checkpoint has other entries")
        return found


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of any kind with whole tensors; TrainingError as for :func:`read_last` and :func:`opened`."""
    checkpoint = read_last(path)
    if "parts" not in checkpoint:
        return checkpoint
    with opened(path, checkpoint) as parts:
        return joined(checkpoint, {name: parts.whole(name) for name in parts.holders})


def drop_older(path: Path) -> None:
    """Remove the folders that ``last.ckpt`` does not name."""
    folders = list(path.parent.glob("parts-*"))
    if folders:
        used = read_last(path).get("parts", {}).get("folder")
        for folder in folders:
            if folder.name != used:
                shutil.rmtree(folder, ignore_errors=True)


class AnyCheckpoint(TorchCheckpointIO):
    """For the other strategies: they write one file, and read FSDP2's too."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))
