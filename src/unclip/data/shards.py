"""Captioned pictures in webdataset tars, with an index beside them that gives every sample's place in bytes.

A split is one folder: ``00000.tar 00001.tar … index.json``. A sample is KEY.png (or jpg, webp), KEY.txt (the caption)
and KEY.json (metadata, optional). The index makes a sample one ``pread`` away, so any order costs the same.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from unclip.data.files import Shard, open_files
from unclip.data.index import (
    IMAGE_TYPES,
    IndexReport,
    build_index,
    read_index,
    scan_shard,
    write_index,
)
from unclip.data.order import BLOCK_SHARDS
from unclip.data.remote import MissingError, Remote, RemoteConfig, is_url
from unclip.data.write_lock import WriteLock
from unclip.drafts import sync
from unclip.errors import DataError

__all__ = [
    "IMAGE_TYPES", "IndexReport", "Sample", "ShardWriter", "Shards", "build_index", "scan_shard", "write_index",
]  # fmt: skip
_MAX_GAP = 64 << 10  # bytes between the members of a sample that are fetched together


@dataclass(frozen=True)
class Sample:
    """One captioned picture: ``image`` holds the encoded file (png, jpg or webp)."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]


class ShardWriter:
    """Context manager that fills a split folder; the same samples give the same bytes.

    A shard is written to ``NAME.tar.tmp`` and renamed when complete; ``index.json`` comes last, so a split without an
    index is unfinished. After an exception nothing is left behind; what a killed writer left is replaced. DataError for
    a folder that already holds shards, UnclipError for one in which another process writes.
    """

    def __init__(self, split_dir: Path, shard_size: int = 1000) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.split_dir = Path(split_dir)
        self.shard_size = shard_size
        self._entries: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._count = 0
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._lock = WriteLock(self.split_dir, ["."])

    def __enter__(self) -> "ShardWriter":
        self._lock.__enter__()
        return self

    def write(self, key: str, image: bytes, caption: str, meta: dict[str, Any], kind: str = "png") -> None:
        """Append one sample, whose picture is a file of the IMAGE_TYPES ``kind``.

        ``key`` is unique in the split and has no dot (webdataset cuts names at the first dot).
        """
        if not key or "." in key or key in self._keys:
            raise DataError(f"{self.split_dir}: the key {key!r} is empty, has a dot, or was written before")
        tar = self._open() if self._tar is None else self._tar
        tar.write(
            {
                "__key__": key,
                kind: image,
                "txt": caption.encode(),
                "json": json.dumps(meta, sort_keys=True, ensure_ascii=False).encode(),
            }
        )
        self._keys.add(key)
        self._count += 1
        if self._count == self.shard_size:
            self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close()
                write_index(self.split_dir, self._entries)
            else:
                self._abandon()
        except BaseException:
            self._abandon()
            raise
        finally:
            self._lock.__exit__(kind, error, trace)

    def _abandon(self) -> None:
        """Leave nothing behind; a full disk must not hide the first error."""
        for file in (self._tar, self._file):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._tar, self._file = None, None
        for left in (*self.split_dir.glob("*.tar"), *self.split_dir.glob("*.tmp"), *self.split_dir.glob("index.json")):
            left.unlink()

    def _name(self) -> str:
        return f"{len(self._entries):05d}.tar"

    def _open(self) -> Any:
        from webdataset.writer import TarWriter  # takes a second to import; readers do not need it

        self._file = (self.split_dir / (self._name() + ".tmp")).open("wb")
        self._tar = TarWriter(self._file, user="unclip", group="unclip", mtime=0, encoder=False, compress=False)
        return self._tar

    def _close(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self.split_dir / self._name()
        os.replace(path.with_name(path.name + ".tmp"), path)
        sync(self.split_dir)
        self._entries.append(scan_shard(path))
        self._tar, self._file, self._count = None, None, 0


class Shards:
    """Random access to one split. Samples are numbered 0 … N-1, shard after shard.

    ``place`` is the split's folder, here or behind an URL, or a list of shards, each with an index in its folder.
    ``fingerprint`` covers all content, ``text_fingerprint`` keys and captions only. Raises DataError when the index is
    missing or does not agree with the files. Safe to share between threads, and between processes (fork or spawn).
    """

    def __init__(self, place: Path | str | Sequence[str], remote: RemoteConfig | None = None) -> None:
        remote = remote or RemoteConfig()
        self.where = place[0].rpartition("/")[0] if isinstance(place, (list, tuple)) else str(place)
        self.split_dir = Path(self.where)
        fingerprints, found = _described(place if isinstance(place, (list, tuple)) else str(place), remote)
        shards = [entry for _, entry in found]
        self.fingerprint = fingerprints[0] if len(fingerprints) == 1 else _sha256("".join(fingerprints))
        self.names: list[str] = [shard["name"] for shard in shards]
        self.sha256: list[str] = [shard["sha256"] for shard in shards]
        self.text_fingerprint = _sha256("".join(shard["text_sha256"] for shard in shards))
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in shards]
        self.keys: list[str] = [key for shard in shards for key in shard["keys"]]
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        files = [
            Shard(f"{folder}/{shard['name']}", shard["size"], shard["sha256"], _advice(folder))
            for folder, shard in found
        ]
        self.files = open_files(files, remote, BLOCK_SHARDS)
        places = [_columns(shard) for shard in shards]
        self._image, self._txt, self._json = (np.concatenate(parts) for parts in zip(*places, strict=True))
        self._ahead = _Ahead()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ahead"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ahead = _Ahead()

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self.files.close()

    def prepare(self, samples: Sequence[int]) -> None:
        """Fetch what these samples need side by side, where it lies behind an URL; this thread's next call forgets it."""
        known = self._ahead.pieces
        self._ahead.pieces = {i: known[i] for i in samples if i in known}
        spans = {i: self._span(i) for i in samples if i not in known}
        contents = self.files.read_all([(self.shard_of(i), *span) for i, span in spans.items()])
        if contents is not None:
            starts = [start for start, _ in spans.values()]
            self._ahead.pieces |= zip(spans, zip(starts, contents, strict=True), strict=True)

    def read(self, i: int) -> Sample:
        """Sample i with all its parts."""
        return Sample(self.keys[i], self.image(i), self.caption(i), self.meta(i))

    def spread(self, num: int) -> list[Sample]:
        """Up to ``num`` samples, evenly over the split."""
        count = min(num, len(self))
        return [self.read(i * len(self) // count) for i in range(count)]

    def image(self, i: int) -> bytes:
        """The encoded picture (png, jpg or webp) of sample i."""
        return self._piece(i, self._image[i])

    def caption(self, i: int) -> str:
        """KEY.txt, or the field "caption" of KEY.json where there is no text file. DataError for bytes that are no UTF-8."""
        if self._txt[i, 0] < 0:
            return str(self.meta(i).get("caption") or "")
        try:
            return self._piece(i, self._txt[i]).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise self._damaged(i, f"the caption is not UTF-8 (byte {error.start})") from error

    def meta(self, i: int) -> dict[str, Any]:
        """KEY.json of sample i, {} where there is none. DataError for one that is no JSON."""
        if self._json[i, 0] < 0:
            return {}
        try:
            found = json.loads(self._piece(i, self._json[i]))
        except ValueError as error:
            raise self._damaged(i, f"the metadata is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise self._damaged(i, "the metadata is no JSON object")
        return found

    def _damaged(self, i: int, what: str) -> DataError:
        shard = self.files.shards[self.shard_of(i)]
        return DataError(
            f"{shard.location}: {self.keys[i]}: {what}; mend it, or delete index.json, and {shard.advice}, which leaves out "
            "what is damaged"
        )

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _span(self, i: int) -> tuple[int, int]:
        """Offset and size of the picture and of its caption, where that stands near."""
        offset, size = self._image[i].tolist()
        text, length = (self._txt if self._txt[i, 0] >= 0 else self._json)[i].tolist()
        start, end = min(offset, text), max(offset + size, text + length)
        return (start, end - start) if end - start <= size + length + _MAX_GAP else (offset, size)

    def _piece(self, i: int, place: np.ndarray) -> bytes:
        offset, size = int(place[0]), int(place[1])
        start, content = self._ahead.pieces.get(i, (0, b""))
        if start <= offset and offset + size <= start + len(content):
            return content[offset - start : offset - start + size]
        return self.files.read(self.shard_of(i), offset, size)


class _Ahead(threading.local):
    """Of samples: bytes that a thread has fetched ahead, and where they begin."""

    def __init__(self) -> None:
        self.pieces: dict[int, tuple[int, bytes]] = {}


def _described(place: str | Sequence[str], remote: RemoteConfig) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """The SHA-256 of each index, and folder and index entry of each shard."""
    if isinstance(place, str):
        folder = place.rstrip("/")
        raw = _raw_index(folder, remote)
        return [hashlib.sha256(raw).hexdigest()], [
            (folder, e) for e in read_index(raw, f"{folder}/index.json")["shards"]
        ]
    known: dict[str, dict[str, dict[str, Any]]] = {}
    found = []
    for location in place:
        folder, _, name = location.rpartition("/")
        folder = folder or "."
        if folder not in known:
            raw = _raw_index(folder, remote)
            known[folder] = {entry["name"]: entry for entry in read_index(raw, f"{folder}/index.json")["shards"]}
        if name not in known[folder]:
            raise DataError(f"{location} is not in {folder}/index.json; {_advice(folder)}")
        found.append((folder, known[folder][name]))
    return [_sha256(json.dumps([entry["sha256"] for _, entry in found]))], found


def _advice(folder: str) -> str:
    if is_url(folder):
        return f"run `unclip data check` where {folder} was made and upload shards and index again"
    return f"run `unclip data check {Path(folder).parent}`"


def _raw_index(folder: str, remote: RemoteConfig) -> bytes:
    if is_url(folder):
        try:
            return Remote(remote.retry_seconds).read(f"{folder}/index.json")
        except MissingError as error:
            raise MissingError(
                f"there is no {folder}/index.json; write it with `unclip data check` where the shards are and upload it, "
                f"or read the shards as a stream by naming them: data.path={folder}/{{00000..00099}}.tar"
            ) from error
    split_dir, path = Path(folder), Path(folder) / "index.json"
    if not split_dir.is_dir():
        siblings = sorted(p.parent.name for p in split_dir.parent.glob("*/index.json"))
        raise DataError(f"there is no folder {split_dir}; {split_dir.parent} holds the splits {siblings}")
    if not path.exists():
        if not any(split_dir.glob("*.tar")):
            raise DataError(f"{split_dir} holds neither shards (*.tar) nor index.json; is it the folder of one split?")
        raise DataError(f"{split_dir} has shards but no index.json; {_advice(folder)}")
    return path.read_bytes()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _columns(shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 2) int64 offsets and sizes of pictures, texts and metadata; offset -1 where a member is missing."""
    missing = np.tile(np.array([-1, 0], dtype=np.int64), (shard["num_samples"], 1))
    columns = {kind: np.array(places, dtype=np.int64).reshape(-1, 2) for kind, places in shard["offsets"].items()}
    image = missing
    for kind in IMAGE_TYPES:
        if kind in columns:
            image = np.where(image[:, :1] >= 0, image, columns[kind])
    return image, columns.get("txt", missing), columns.get("json", missing)
