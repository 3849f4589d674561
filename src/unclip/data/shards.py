"""Captioned pictures in webdataset tars, with an index beside them that gives every sample's place in bytes.

A split is one folder: ``00000.tar 00001.tar … index.json``. A sample is KEY.png (or jpg, webp), KEY.txt (the caption)
and KEY.json (metadata, optional). The index makes a sample one ``pread`` away, so any order costs the same.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from unclip.errors import DataError

INDEX_VERSION = 1
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
MEMBER_TYPES = (*IMAGE_TYPES, "txt", "json")
_WRITING = ".writing"  # marks tars of a writer that has not finished, so that a next writer may replace them
_MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Sample:
    """One captioned picture: ``image`` holds the encoded file (png, jpg or webp)."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]


@dataclass
class IndexReport:
    """What ``build_index`` found. ``bad`` maps the keys that were left out to the reason."""

    num_shards: int = 0
    num_samples: int = 0
    bad: dict[str, str] = field(default_factory=dict)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ShardWriter:
    """Context manager that fills a split folder; the same samples give the same bytes.

    A shard is written to ``NAME.tar.tmp`` and renamed when complete; ``index.json`` comes last, so a split without an
    index is unfinished. After an exception nothing is left behind. DataError for a folder that already holds shards.
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

    def __enter__(self) -> "ShardWriter":
        self.split_dir.mkdir(parents=True, exist_ok=True)
        marker = self.split_dir / _WRITING
        found = [*self.split_dir.glob("*.tar"), *self.split_dir.glob("index.json")]
        if found and not marker.exists():
            raise DataError(
                f"{self.split_dir} already holds {found[0].name}; remove the folder or write to another one"
            )
        for old in (*found, *self.split_dir.glob("*.tmp")):
            old.unlink()
        marker.touch()
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
            (self.split_dir / _WRITING).unlink()

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
        sync_folder(self.split_dir)
        self._entries.append(scan_shard(path))
        self._tar, self._file, self._count = None, None, 0


def scan_shard(path: Path, check: Callable[[bytes], object] | None = None, bad: dict[str, str] | None = None) -> dict:
    """One entry of the index: the keys of a tar and each member's offset and size (offset -1: there is no such member).

    Samples without picture or caption, and those whose picture makes ``check`` raise, are left out and put in ``bad``.
    ``text_sha256`` covers keys and captions: it is the same for two sizes of the same pictures.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if info.isfile() and kind.lower() in MEMBER_TYPES:
                    key = f"{folder}/{stem}" if folder else stem
                    members.setdefault(key, {})[kind.lower()] = (info.offset_data, info.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a complete tar file ({error}); fetch or make it again") from error
    good = {}
    with path.open("rb") as file:
        for key, found in members.items():
            outside = key.startswith("/") or ".." in key.split("/")
            reason = "its path leaves the archive" if outside else _why_bad(file, found, check)
            if reason is None:
                good[key] = found
            elif bad is not None:
                bad[key] = reason
        texts = [[key, _caption(file, found)] for key, found in good.items()]
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kinds = [kind for kind in MEMBER_TYPES if any(kind in found for found in good.values())]
    return {
        "name": path.name,
        "num_samples": len(good),
        "size": path.stat().st_size,
        "sha256": digest,
        "text_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "keys": list(good),
        "offsets": {kind: [list(found.get(kind, (-1, 0))) for found in good.values()] for kind in kinds},
    }


def _why_bad(file: BinaryIO, found: dict[str, tuple[int, int]], check: Callable[[bytes], object] | None) -> str | None:
    image = next((found[kind] for kind in IMAGE_TYPES if kind in found), None)
    if image is None:
        return "no picture"
    if "txt" not in found and "json" not in found:
        return "no caption"
    if check is not None:
        try:
            check(os.pread(file.fileno(), image[1], image[0]))
            if not _strict_caption(file, found).strip():
                return "empty caption"
        except (OSError, ValueError, SyntaxError, DataError) as error:
            return str(error) or type(error).__name__
    return None


def _strict_caption(file: BinaryIO, found: dict[str, tuple[int, int]]) -> str:
    """The caption; ValueError for bytes that are not UTF-8, and for metadata that is no JSON object."""
    offset, size = found["txt"] if "txt" in found else found["json"]
    content = os.pread(file.fileno(), size, offset).decode("utf-8")
    if "txt" in found:
        return content
    meta = json.loads(content)
    if not isinstance(meta, dict):
        raise ValueError("the metadata is no JSON object")
    return str(meta.get("caption", ""))


def _caption(file: BinaryIO, found: dict[str, tuple[int, int]]) -> str:
    offset, size = found["txt"] if "txt" in found else found["json"]
    return os.pread(file.fileno(), size, offset).decode("utf-8", errors="replace")


def write_index(split_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Write ``index.json`` atomically. An empty split is refused (DataError)."""
    if not entries:
        raise DataError(f"{split_dir} got no samples; nothing was written")
    total = sum(entry["num_samples"] for entry in entries)
    index = {"version": INDEX_VERSION, "num_samples": total, "shards": entries}
    write_atomic(split_dir / "index.json", json.dumps(index, ensure_ascii=False).encode())


def build_index(split_dir: Path, check: Callable[[bytes], object] | None = None) -> IndexReport:
    """Index the ``*.tar`` files that are there (shards that others made, or after damaged samples were found).

    ``check`` is called with each encoded picture; the samples for which it raises leave the index and are reported.
    """
    split_dir = Path(split_dir)
    report = IndexReport()
    paths = sorted(split_dir.glob("*.tar"))
    if not paths:
        raise DataError(f"{split_dir} holds no *.tar file; is it the folder of one split?")
    entries = [scan_shard(path, check, report.bad) for path in paths]
    entries = [entry for entry in entries if entry["num_samples"] > 0]
    write_index(split_dir, entries)
    report.num_shards, report.num_samples = len(entries), sum(entry["num_samples"] for entry in entries)
    return report


class Shards:
    """Random access to one split. Samples are numbered 0 … N-1, shard after shard.

    ``fingerprint`` covers all content, ``text_fingerprint`` keys and captions only. Raises DataError when the index is
    missing or does not agree with the files. Safe to share between threads, and between processes (fork or spawn).
    """

    def __init__(self, split_dir: Path | str) -> None:
        self.split_dir = Path(split_dir)
        raw, index = _read_index(self.split_dir)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        shards = index["shards"]
        self.names: list[str] = [shard["name"] for shard in shards]
        self.sha256: list[str] = [shard["sha256"] for shard in shards]
        texts_sha256 = "".join(shard["text_sha256"] for shard in shards)
        self.text_fingerprint = hashlib.sha256(texts_sha256.encode()).hexdigest()
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in shards]
        self.keys: list[str] = [key for shard in shards for key in shard["keys"]]
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        for shard in shards:
            self._check_size(shard["name"], shard["size"])
        places = [_columns(shard) for shard in shards]
        self._image, self._txt, self._json = (np.concatenate(parts) for parts in zip(*places, strict=True))
        self._init_files()

    def _init_files(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_files()

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if "_lock" in self.__dict__:
            self.close()

    def read(self, i: int) -> Sample:
        """Sample i with all its parts."""
        return Sample(self.keys[i], self.image(i), self.caption(i), self.meta(i))

    def image(self, i: int) -> bytes:
        """The encoded picture (png, jpg or webp) of sample i."""
        return self._pread(i, self._image[i])

    def caption(self, i: int) -> str:
        """KEY.txt, or the field "caption" of KEY.json where there is no text file."""
        if self._txt[i, 0] >= 0:
            return self._pread(i, self._txt[i]).decode("utf-8").strip()
        return str(self.meta(i).get("caption", ""))

    def meta(self, i: int) -> dict[str, Any]:
        """KEY.json of sample i, {} where there is none."""
        return json.loads(self._pread(i, self._json[i])) if self._json[i, 0] >= 0 else {}

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _pread(self, i: int, place: np.ndarray) -> bytes:
        shard = self.shard_of(i)
        offset, size = int(place[0]), int(place[1])
        with self._lock:
            content = os.pread(self._open(shard), size, offset)
        if len(content) != size:
            path = self.split_dir / self.names[shard]
            raise DataError(f"{path} ends before {self.keys[i]}; run `unclip data check {self.split_dir.parent}`")
        return content

    def _open(self, shard: int) -> int:
        """File descriptor of a shard; the least recently used one is closed when too many are open."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = os.open(self.split_dir / self.names[shard], os.O_RDONLY)
            if len(self._files) > _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def _check_size(self, name: str, size: int) -> None:
        path = self.split_dir / name
        advice = f"run `unclip data check {self.split_dir.parent}`"
        if not path.exists():
            raise DataError(f"{path} is in the index but not on disk; fetch it again or {advice}")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes but its index says {size}; {advice}")


def _read_index(split_dir: Path) -> tuple[bytes, dict[str, Any]]:
    path = split_dir / "index.json"
    if not split_dir.is_dir():
        siblings = sorted(p.parent.name for p in split_dir.parent.glob("*/index.json"))
        raise DataError(f"there is no folder {split_dir}; {split_dir.parent} holds the splits {siblings}")
    if not path.exists():
        if not any(split_dir.glob("*.tar")):
            raise DataError(f"{split_dir} holds neither shards (*.tar) nor index.json; is it the folder of one split?")
        raise DataError(f"{split_dir} has shards but no index.json; run `unclip data check {split_dir.parent}`")
    raw = path.read_bytes()
    try:
        index = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run `unclip data check {split_dir.parent}`") from error
    if index.get("version") != INDEX_VERSION:
        raise DataError(f"{path} has version {index.get('version')}, this unclip reads {INDEX_VERSION}")
    return raw, index


def _columns(shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 2) int64 offsets and sizes of pictures, texts and metadata; offset -1 where a member is missing."""
    missing = np.tile(np.array([-1, 0], dtype=np.int64), (shard["num_samples"], 1))
    columns = {kind: np.array(places, dtype=np.int64).reshape(-1, 2) for kind, places in shard["offsets"].items()}
    image = missing
    for kind in IMAGE_TYPES:
        if kind in columns:
            image = np.where(image[:, :1] >= 0, image, columns[kind])
    return image, columns.get("txt", missing), columns.get("json", missing)
