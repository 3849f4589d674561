"""Writing embeddings, by several processes at once if need be: each shard appears whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.embeddings import VERSION
from unclip.data.shards import Shards
from unclip.data.variants import ONE, Variants
from unclip.drafts import sync, write_atomic
from unclip.errors import DataError
from unclip.models.interface import Interface

log = logging.getLogger(__name__)


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

    Several processes may write to one folder, on one machine or on many: a shard and every other file appear complete
    or not at all, and whoever finds all shards there writes index and manifest, one after another.

    Raises DataError when ``folder`` holds embeddings of another CLIP or with other settings.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        interface: Interface,
        columns: Sequence[str],
        dtype: str,
        variants: Variants = ONE,
        precision: str = "",
    ) -> None:
        self.folder, self.split_dir, self.split = Path(folder), Path(folder) / split, split
        self.interface, self.variants = interface, variants
        self.settings = {"clip": interface.clip, "columns": list(columns), "dtype": dtype, "variants": asdict(variants)}
        self.settings["precision"] = precision
        self.split_dir.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*/*/shard.json")):
            if path.parent.suffix != ".tmp":
                self._check(path)
        self._sweep()

    def done(self, name: str, sha256: str, keys: Sequence[str]) -> bool:
        """Whether shard ``name`` was finished from the tar with this checksum, of which an index names the samples ``keys``."""
        facts = _shard_facts(self.split_dir / name / "shard.json")
        if facts is None or facts["data"] != sha256 or facts["num_rows"] != len(keys):
            return False
        return facts["keys"] in ("", _keys_sha256(keys))  # older folders do not say

    def write(self, name: str, sha256: str, keys: list[str], columns: dict[str, np.ndarray]) -> None:
        """Write the columns of one shard; ``sha256`` is that of its tar."""
        wrong = {column: len(rows) for column, rows in columns.items() if len(rows) != len(keys)}
        if wrong or sorted(columns) != sorted(self.settings["columns"]):
            raise ValueError(f"{name} has {len(keys)} keys but columns {list(columns)}, of other lengths: {wrong}")
        draft = self.split_dir / f"{name}.{socket.gethostname()}-{os.getpid()}.tmp"
        shutil.rmtree(draft, ignore_errors=True)  # of a killed process with this one's number, as containers have
        draft.mkdir()
        try:
            self._fill(draft, sha256, keys, columns)
            self._appear(draft, name, sha256, keys)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _fill(self, draft: Path, sha256: str, keys: list[str], columns: dict[str, np.ndarray]) -> None:
        for column, rows in columns.items():
            with (draft / f"{column}.npy").open("wb") as file:
                np.save(file, rows)
                file.flush()
                os.fsync(file.fileno())
        write_atomic(draft / "keys.txt", "".join(key + "\n" for key in keys).encode())
        vectors = {c: columns[c].reshape(-1, columns[c].shape[-1]) for c in ("image_emb", "text_emb") if c in columns}
        moments = {column: Moments.of(rows).to_json() for column, rows in vectors.items()}
        facts = {**self.settings, "data": sha256, "num_rows": len(keys), "moments": moments}
        facts["keys"] = _keys_sha256(keys)
        write_atomic(draft / "shard.json", json.dumps(facts).encode())

    def _appear(self, draft: Path, name: str, sha256: str, keys: Sequence[str]) -> None:
        """The draft becomes the shard, unless another process was faster with the same one."""
        final = self.split_dir / name
        with _alone(self.folder):
            if self.done(name, sha256, keys):
                return
            old = draft.with_name(f"{name}.old.{draft.name.removeprefix(f'{name}.')}")
            if final.exists():  # made from other data
                log.info("%s was made from other data: made anew", final)
                (self.split_dir / "index.json").unlink(missing_ok=True)
                os.replace(final, old)
            os.replace(draft, final)
            sync(self.split_dir)
            shutil.rmtree(old, ignore_errors=True)

    def add_beside(self, name: str, content: Callable[[], bytes]) -> None:
        """A file beside the splits, unless it is there."""
        with _alone(self.folder):
            if not (self.folder / name).exists():
                write_atomic(self.folder / name, content())

    def complete(self, shards: Shards) -> bool:
        """Whether every shard is there, made from these tars."""
        ends = shards.starts.tolist()
        return all(
            self.done(Path(name).stem, sha256, shards.keys[start:end])
            for name, sha256, start, end in zip(shards.names, shards.sha256, ends[:-1], ends[1:], strict=True)
        )

    def finish(self, shards: "Shards | Written", origin: dict[str, Any] | None = None) -> None:
        """Write the split's index and enter the split into the manifest; the same result whoever does it, and again.

        ``origin``: what differs from our own making.
        """
        names = [Path(name).stem for name in shards.names]
        facts = [facts for name in names if (facts := _shard_facts(self.split_dir / name / "shard.json")) is not None]
        rows = [fact["num_rows"] for fact in facts]
        if rows != shards.shard_sizes:
            raise DataError(
                f"{self.split_dir} has shards of {rows[:5]}… rows, {shards.split_dir} of others; embed again"
            )
        entries = [{"name": name, "num_rows": count} for name, count in zip(names, rows, strict=True)]
        index = {"version": VERSION, "num_rows": sum(rows), "shards": entries}
        stats = {"count": sum(rows), **_statistics([fact["moments"] for fact in facts])}
        data = {"fingerprint": shards.fingerprint, "text_fingerprint": shards.text_fingerprint}
        path = self.folder / "manifest.json"
        empty: dict[str, Any] = {"data": {}, "stats": {}}
        with _alone(self.folder):
            write_atomic(self.split_dir / "index.json", json.dumps(index).encode())
            manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
            manifest |= {
                "version": VERSION,
                "kind": "embeddings",
                **self.settings,
                "normalised": False,
                **(origin or {}),
            }
            manifest |= {"embed_dim": self.interface.embed_dim, "context_length": self.interface.context_length}
            manifest["interface"] = asdict(self.interface)
            manifest["data"] = dict(sorted({**manifest["data"], self.split: data}.items()))
            manifest["stats"] = dict(sorted({**manifest["stats"], self.split: stats}.items()))
            write_atomic(path, (json.dumps(manifest, indent=1) + "\n").encode())

    def _check(self, path: Path) -> None:
        facts = _shard_facts(path) or self.settings  # another process has just made it anew
        for name, wanted in self.settings.items():
            if facts[name] != wanted:
                found = f"{name} {_short(facts[name])}, not {_short(wanted)}"
                raise DataError(
                    f"{self.folder} holds embeddings with {found}; write to another folder or remove this one"
                )

    def _sweep(self) -> None:
        """Remove what processes that were killed on this machine left half written."""
        host = socket.gethostname()
        for draft in self.split_dir.glob(f"*.{host}-*.tmp"):
            if not _alive(int(draft.name.removesuffix(".tmp").rpartition("-")[2])):
                shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is in here for the same folder; the kernel lets go however this one ends."""
    with (folder / "write.lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _shard_facts(path: Path) -> dict[str, Any] | None:
    """shard.json, None where there is none; DataError where it is damaged."""
    try:
        facts = json.loads(path.read_text())
        facts = {"variants": asdict(ONE), "precision": "", "keys": "", **facts}  # which older folders lack
        names = ("clip", "columns", "dtype", "variants", "precision", "data", "num_rows", "moments", "keys")
        return {name: facts[name] for name in names}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove {path.parent}, run unclip-embed") from error


def _keys_sha256(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


@dataclass
class Written:
    """What an index needs to know of the rows of a split that were not made from shards."""

    split_dir: Path
    names: list[str]
    shard_sizes: list[int]
    fingerprint: str
    text_fingerprint: str


def _statistics(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of a split from the moments of its shards, merged in order."""
    statistics: dict[str, Any] = {}
    for column in shards[0]:
        total = Moments()
        for shard in shards:
            total = total.merge(Moments.from_json(shard[column]))
        side = column.removesuffix("_emb")
        std = np.sqrt(total.squares / total.count)
        statistics |= {f"{side}_count": total.count, f"{side}_mean": total.mean.tolist(), f"{side}_std": std.tolist()}
        statistics[f"{side}_norm"] = total.norm
    return statistics


def _short(value: Any) -> Any:
    return value[:8] if isinstance(value, str) and len(value) == 64 else value
