"""`unclip data shapes`: captioned pictures of coloured solids, written as shards.

DIR/train holds what is trained on, in families of easily confused neighbours, DIR/val fresh scenes of the same kind,
DIR/test scenes whose pairs are never trained on, and DIR/verdict the fixed examination. The bytes depend on the
arguments only, not on the number of workers.
"""

import io
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unclip.data.shapes_render import render
from unclip.data.shapes_scene import FAMILY, Scene, Solid, draw_family, draw_scene, is_held_out, verdict_scenes
from unclip.data.write_lock import WriteLock
from unclip.errors import ConfigError

__all__ = ["Solid", "draw_family", "draw_scene", "is_held_out", "render", "verdict_scenes", "write_shapes"]

_log = logging.getLogger(__name__)
_CHUNK = 32 * FAMILY  # pictures per task of a worker
_SPLITS = {"train": 0, "val": 1, "test": 2, "verdict": 3}

_Row = tuple[str, bytes, str, dict[str, Any]]  # key, PNG, caption, ground truth


@dataclass(frozen=True)
class _Job:
    """One split, with everything that decides its bytes."""

    split: str
    num: int
    size: int
    seed: int
    objects: tuple[int, int]
    signs: float

    def scenes(self, indices: range) -> Iterator[Scene]:
        """The scenes of these numbers; for training, `indices` begins with a family."""
        if self.split == "verdict":
            yield from verdict_scenes()[indices.start : indices.stop]
        elif self.split == "train":
            families = (draw_family(self._rng(i // FAMILY), self.objects, self.signs) for i in indices[::FAMILY])
            yield from itertools.islice(itertools.chain.from_iterable(families), len(indices))
        else:
            for i in indices:
                yield draw_scene(self._rng(i), self.objects, self.signs, held_out=self.split == "test")

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SPLITS[self.split], number])


def encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _rows(job: _Job, indices: range) -> list[_Row]:
    rows: list[_Row] = []
    for index, scene in zip(indices, job.scenes(indices), strict=True):
        rows.append((f"{index:08d}", encode_png(render(scene, job.size)), scene.caption, scene.metadata()))
    return rows


def _check(num: int, size: int, objects: tuple[int, int], signs: float) -> None:
    if num < 1:
        raise ConfigError(f"--num is {num}; ask for at least one picture")
    if size < 16:
        raise ConfigError(f"--size is {size}; below 16 pixels the solids cannot be told apart")
    if not 1 <= objects[0] <= objects[1] <= 8:
        raise ConfigError(f"--objects is {objects[0]}-{objects[1]}; give a range within 1-8, smaller number first")
    if not 0.0 <= signs <= 1.0:
        raise ConfigError(f"--signs is {signs}; it is a share of the scenes, between 0 and 1")


def _can_spawn() -> bool:
    """Spawned processes import the main module again, which a program read from standard input does not allow."""
    main = vars(sys.modules["__main__"]).get("__file__")
    return main is None or Path(main).exists()


def _write_split(job: _Job, out: Path, pool: ProcessPoolExecutor | None, progress: Progress) -> None:
    from unclip.data.shards import ShardWriter  # not at the top: it loads webdataset, which workers do without

    task = progress.add_task(job.split, total=job.num)
    parts = [range(start, min(start + _CHUNK, job.num)) for start in range(0, job.num, _CHUNK)]
    work = partial(_rows, job)
    chunks: Iterator[list[_Row]] = map(work, parts) if pool is None else pool.map(work, parts)
    began = time.monotonic()
    with ShardWriter(out / job.split) as writer:
        for row in itertools.chain.from_iterable(chunks):
            writer.write(*row)
            progress.advance(task)
    _log.info("%s: %d pictures of %d px in %.1f s", out / job.split, job.num, job.size, time.monotonic() - began)


def write_shapes(
    out: Path,
    *,
    num: int,
    size: int = 64,
    seed: int = 0,
    objects: tuple[int, int] = (1, 2),
    signs: float = 0.0,
    workers: int | None = None,
) -> None:
    """Writes `out`/{train,val,test,verdict}, `num` training pictures of `size` pixels; val and test hold num/20, at
    least 64.

    `objects` is the range of solids a scene (within 1 to 8), `signs` the share of scenes with a word on a sign.
    `workers` are processes (default: one per core). The verdict split depends on `size` alone. Raises ConfigError for
    values out of range, DataError for folders that hold shards already, UnclipError where another process writes them.
    The same command again replaces what a killed one left.
    """
    _check(num, size, objects, signs)
    few = max(num // 20, 64)
    nums = {"train": num, "val": few, "test": few, "verdict": len(verdict_scenes())}
    workers = workers or os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with WriteLock(out, list(nums)), Progress(*columns) as progress:
        progress.disable = not progress.console.is_terminal
        if workers == 1 or num < 4 * _CHUNK or not _can_spawn():
            for split, count in nums.items():
                _write_split(_Job(split, count, size, seed, objects, signs), out, None, progress)
            return
        # Spawned, not forked: the caller may hold threads (torch), which a fork would copy half.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for split, count in nums.items():
                _write_split(_Job(split, count, size, seed, objects, signs), out, pool, progress)
