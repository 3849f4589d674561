"""Embeddings of a data set: memory-mapped columns, one folder per shard, and their statistics.

FOLDER/manifest.json                          which CLIP, which data, which columns, mean and deviation per split
FOLDER/SPLIT/index.json                       the shards of a finished split
FOLDER/SPLIT/SHARD/{COLUMN}.npy keys.txt shard.json

Columns: ``image_emb`` and ``text_emb`` (n, D), CLIP's raw outputs; ``tokens`` (n, context_length) int32, zero after the
end-of-text token; ``text_seq`` (n, L, W) float16, optional, L being the longest caption of the shard.
"""

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclip.data import joined
from unclip.data.shards import Shards, sync_folder, write_atomic
from unclip.errors import DataError
from unclip.models.interface import Interface

VERSION = 1
COLUMNS = ("image_emb", "text_emb", "tokens", "text_seq")
_MANY = 1024  # rows from which on the columns of a batch are copied side by side


@dataclass
class Moments:
    """Count, mean, sum of squared deviations and mean norm of vectors, float64; merging is exact (Chan et al. 1979)."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    norm: float = 0.0

    @staticmethod
    def of(rows: np.ndarray) -> "Moments":
        """Moments of the rows of (n, D)."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        norm = float(np.linalg.norm(rows, axis=1).mean())
        return Moments(len(rows), mean, np.square(rows - mean).sum(axis=0), norm)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of vectors together."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        part = other.count / count
        delta = other.mean - self.mean
        squares = self.squares + other.squares + np.square(delta) * self.count * part
        return Moments(count, self.mean + delta * part, squares, self.norm + (other.norm - self.norm) * part)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "squares": self.squares.tolist(),
            "norm": self.norm,
        }

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Moments":
        return Moments(raw["count"], np.array(raw["mean"]), np.array(raw["squares"]), raw["norm"])


class EmbeddingsWriter:
    """Writes the shards of one split, then its index and the manifest; a shard that is complete is not written again.

    Raises DataError when ``folder`` holds embeddings of another CLIP or with other settings.
    """

    def __init__(self, folder: Path, split: str, interface: Interface, columns: Sequence[str], dtype: str) -> None:
        self.folder, self.split_dir, self.split = Path(folder), Path(folder) / split, split
        self.interface = interface
        self.settings = {"clip": interface.clip, "columns": list(columns), "dtype": dtype}
        self.split_dir.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*/*/shard.json")):
            self._check(path)
        for draft in self.split_dir.glob("*.tmp"):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()

    def done(self, name: str, sha256: str) -> bool:
        """Whether shard ``name`` was finished from the tar with this checksum."""
        path = self.split_dir / name / "shard.json"
        return path.exists() and json.loads(path.read_text())["data"] == sha256

    def write(self, name: str, sha256: str, keys: list[str], columns: dict[str, np.ndarray]) -> None:
        """Write the columns of one shard; ``sha256`` is that of its tar."""
        wrong = {column: len(rows) for column, rows in columns.items() if len(rows) != len(keys)}
        if wrong or sorted(columns) != sorted(self.settings["columns"]):
            raise ValueError(f"{name} has {len(keys)} keys but columns {list(columns)}, of other lengths: {wrong}")
        draft = self.split_dir / f"{name}.tmp"
        draft.mkdir()
        for column, rows in columns.items():
            with (draft / f"{column}.npy").open("wb") as file:
                np.save(file, rows)
                file.flush()
                os.fsync(file.fileno())
        write_atomic(draft / "keys.txt", "".join(key + "\n" for key in keys).encode())
        moments = {c: Moments.of(columns[c]).to_json() for c in ("image_emb", "text_emb") if c in columns}
        facts = {**self.settings, "data": sha256, "num_rows": len(keys), "moments": moments}
        write_atomic(draft / "shard.json", json.dumps(facts).encode())
        final = self.split_dir / name
        if final.exists():  # made from other data
            (self.split_dir / "index.json").unlink(missing_ok=True)
            shutil.rmtree(final)
        os.replace(draft, final)
        sync_folder(self.split_dir)

    def finish(self, shards: "Shards | Written", origin: dict[str, Any] | None = None) -> None:
        """Write the split's index and enter the split into the manifest; ``origin``: what differs from our own making."""
        names = [Path(name).stem for name in shards.names]
        facts = [json.loads((self.split_dir / name / "shard.json").read_text()) for name in names]
        rows = [fact["num_rows"] for fact in facts]
        if rows != shards.shard_sizes:
            raise DataError(
                f"{self.split_dir} has shards of {rows[:5]}… rows, {shards.split_dir} of others; embed again"
            )
        entries = [{"name": name, "num_rows": count} for name, count in zip(names, rows, strict=True)]
        index = {"version": VERSION, "num_rows": sum(rows), "shards": entries}
        write_atomic(self.split_dir / "index.json", json.dumps(index).encode())
        path = self.folder / "manifest.json"
        empty: dict[str, Any] = {"data": {}, "stats": {}}
        manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
        manifest |= {"version": VERSION, "kind": "embeddings", **self.settings, "normalised": False, **(origin or {})}
        manifest |= {"embed_dim": self.interface.embed_dim, "context_length": self.interface.context_length}
        manifest["interface"] = asdict(self.interface)
        manifest["data"][self.split] = {"fingerprint": shards.fingerprint, "text_fingerprint": shards.text_fingerprint}
        manifest["stats"][self.split] = _statistics([fact["moments"] for fact in facts])
        write_atomic(path, (json.dumps(manifest, indent=1) + "\n").encode())

    def _check(self, path: Path) -> None:
        facts = json.loads(path.read_text())
        for name, wanted in self.settings.items():
            if facts[name] != wanted:
                found = f"{name} {_short(facts[name])}, not {_short(wanted)}"
                raise DataError(
                    f"{self.folder} holds embeddings with {found}; write to another folder or remove this one"
                )


@dataclass
class Written:
    """What an index needs to know of the rows of a split that were not made from shards."""

    split_dir: Path
    names: list[str]
    shard_sizes: list[int]
    fingerprint: str
    text_fingerprint: str


class Embeddings:
    """The columns of one finished split, row i belonging to sample i of the shards. Rows are read, not loaded.

    Raises DataError when the folder is unfinished, damaged, or lacks a column that is asked for.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split_dir, self.split = Path(folder), Path(folder) / split, split
        self.manifest = _read_json(self.folder / "manifest.json", self.folder)
        if self.manifest.get("kind") != "embeddings" or self.manifest.get("version") != VERSION:
            raise DataError(f"{self.folder} is not an embeddings folder of version {VERSION}; run unclip-embed")
        if split not in self.manifest["data"]:
            raise DataError(f"{self.folder} has the splits {sorted(self.manifest['data'])}, not {split}; embed it too")
        index = _read_json(self.split_dir / "index.json", self.folder)
        self.names: list[str] = [shard["name"] for shard in index["shards"]]
        self._starts = np.cumsum([0] + [shard["num_rows"] for shard in index["shards"]])
        self._open: dict[tuple[int, str], np.memmap] = {}
        self._joined: dict[str, joined.Joined] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_joined": {}}

    @property
    def interface(self) -> Interface:
        """Widths and hash of the CLIP that made the rows."""
        return Interface(**self.manifest["interface"])

    @property
    def columns(self) -> list[str]:
        return self.manifest["columns"]

    @property
    def shard_sizes(self) -> list[int]:
        return np.diff(self._starts).tolist()

    @property
    def normalised(self) -> bool:
        """Whether the rows are unit-norm, as imported ones may be: CLIP's raw outputs cannot be had from them."""
        return self.manifest["normalised"]

    @property
    def stats(self) -> dict[str, np.ndarray]:
        """Of the split's raw embeddings: count, image_mean and image_std (D,), image_norm; text_… alike."""
        return {name: np.asarray(value) for name, value in self.manifest["stats"][self.split].items()}

    @property
    def keys(self) -> list[str]:
        """The samples' keys, row by row."""
        texts = [(self.split_dir / name / "keys.txt").read_text() for name in self.names]
        return [key for text in texts for key in text.splitlines()]

    def check_belongs_to(self, shards: Shards) -> None:
        """DataError unless row i has key and caption of sample i of ``shards``; pictures may be of another size."""
        if self.manifest["data"][self.split]["text_fingerprint"] == shards.text_fingerprint:
            return
        pairs = zip(self.keys, shards.keys, strict=False)
        first = next(
            (f"row {i} is {a}, not {b}" for i, (a, b) in enumerate(pairs) if a != b), "captions or count differ"
        )
        raise DataError(
            f"{self.split_dir} was made from other data than {shards.split_dir} ({first}); run unclip-embed"
        )

    def rows(self, indices: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """The named columns at ``indices`` (n,) int64, in that order; ``text_seq`` as long as the longest shard's."""
        for column in columns:
            if column not in self.columns:
                raise DataError(
                    f"{self.folder} has the columns {self.columns}, not {column}; embed again with columns=[…]"
                )
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        local = indices - self._starts[shards]
        takers = [partial(self._take, column, shards, local) for column in columns]
        if len(indices) < _MANY or len(columns) == 1:
            return dict(zip(columns, [take() for take in takers], strict=True))
        with ThreadPoolExecutor(len(columns), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [pool.submit(take) for take in takers]  # copying releases the interpreter's lock
            return dict(zip(columns, [job.result() for job in jobs], strict=True))

    def column(self, name: str) -> np.ndarray:
        """A whole column in memory, for statistics such as PCA."""
        return self.rows(np.arange(len(self)), [name])[name]

    def _take(self, column: str, shards: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Rows ``local`` of ``shards``: in one go where all files hold rows of one shape, else shard by shard."""
        if column == "text_seq" or not len(local) or not joined.supported():
            return self._gather(column, shards, local)
        if column not in self._joined:
            first = self._mapped(int(shards[0]), column)
            opener = partial(self._memmap, column)
            self._joined[column] = joined.Joined(self.shard_sizes, first.shape[1:], first.dtype, opener)
        return self._joined[column].take(shards, local)

    def _gather(self, column: str, shards: np.ndarray, local: np.ndarray) -> np.ndarray:
        """One ``take`` per shard that is touched; shards with shorter caption states are filled up with zeros."""
        order = np.argsort(shards, kind="stable")
        touched, firsts = np.unique(shards[order], return_index=True)
        sources = [self._mapped(int(shard), column) for shard in touched]
        shape = np.max([source.shape[1:] for source in sources], axis=0)
        rows = np.zeros((len(local), *shape), dtype=sources[0].dtype)
        for source, places in zip(sources, np.split(order, firsts[1:]), strict=True):
            rows[(places, *(slice(size) for size in source.shape[1:]))] = np.take(source, local[places], axis=0)
        return rows

    def _memmap(self, column: str, shard: int) -> np.memmap:
        return self._mapped(shard, column)

    def _mapped(self, shard: int, column: str) -> np.memmap:
        if (shard, column) not in self._open:
            path = self.split_dir / self.names[shard] / f"{column}.npy"
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path} is missing or damaged ({error}); remove its folder and run unclip-embed"
                ) from error
            if len(mapped) != self._starts[shard + 1] - self._starts[shard]:
                raise DataError(f"{path} has {len(mapped)} rows; its index says otherwise. Remove it, run unclip-embed")
            wanted = self.manifest["embed_dim"]
            if column in ("image_emb", "text_emb") and mapped.shape[-1] != wanted:
                raise DataError(
                    f"{path} has rows of shape {mapped.shape[1:]}, the manifest says {wanted} numbers: two CLIPs in one "
                    "folder? Remove it and run unclip-embed"
                )
            self._open[shard, column] = mapped
        return self._open[shard, column]


def lengths(tokens: np.ndarray) -> np.ndarray:
    """(n,) tokens of each caption, start and end included; the end-of-text token has the largest id."""
    return tokens.argmax(axis=1) + 1


def _statistics(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of a split from the moments of its shards, merged in order."""
    statistics: dict[str, Any] = {}
    for column in shards[0]:
        total = Moments()
        for shard in shards:
            total = total.merge(Moments.from_json(shard[column]))
        side = column.removesuffix("_emb")
        std = np.sqrt(total.squares / total.count)
        statistics |= {"count": total.count, f"{side}_mean": total.mean.tolist(), f"{side}_std": std.tolist()}
        statistics[f"{side}_norm"] = total.norm
    return statistics


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} is missing: {folder} is no finished embeddings folder; run unclip-embed run={folder}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run unclip-embed run={folder} again") from error


def _short(value: Any) -> Any:
    return value[:8] if isinstance(value, str) and len(value) == 64 else value
