"""Reading pieces of the shards that an index lists: on this machine, cached on it, or by range requests."""

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unclip.data.remote import Remote, RemoteConfig, Stamp, is_url
from unclip.errors import ConfigError, DataError

_MAX_OPEN_FILES = 64
_AT_ONCE = 16  # requests side by side
_LOOK_AGAIN = 60.0  # seconds after which a remote file is asked again whether it changed
_STALE = 3600.0  # seconds after which an unfinished download was surely given up

Piece = tuple[int, int, int]  # number of the shard, offset, size


@dataclass(frozen=True)
class Shard:
    """A shard file as its index describes it. ``advice`` says what to do where the file is another one."""

    location: str
    size: int
    sha256: str
    advice: str


class Files(Protocol):
    """Reads pieces of numbered shards; safe to share between threads, and between processes (fork or spawn)."""

    shards: list[Shard]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes; DataError where the file ends before or is not the one of the index."""
        ...

    def read_all(self, pieces: Sequence[Piece]) -> list[bytes] | None:
        """Many pieces at once, where that is faster than one after another; else None, maybe after fetching files."""
        ...

    def close(self) -> None: ...


def open_files(shards: list[Shard], config: RemoteConfig, at_once: int) -> Files:
    """The way to read ``shards``; ``at_once`` is how many of them an order goes back and forth between."""
    remote = [is_url(shard.location) for shard in shards]
    if not any(remote):
        return LocalFiles(shards)
    if not all(remote):
        raise DataError(f"{shards[0].location} and others: shards here and behind an URL do not mix; list one kind")
    if config.cache_dir is None:
        return RemoteFiles(shards, config)
    return CachedFiles(shards, config, at_once)


class LocalFiles:
    """Files of this machine. They must stay as they were when this was made, which every read checks."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self._seen = self._look()
        self._init_files()

    def _look(self) -> list[tuple[int, int]]:
        """Size and time of change of every file."""
        seen = []
        for shard in self.shards:
            try:
                found = os.stat(shard.location)
            except FileNotFoundError:
                raise DataError(
                    f"{shard.location} is in the index but not on disk; fetch it again or {shard.advice}"
                ) from None
            if found.st_size != shard.size:
                raise DataError(
                    f"{shard.location} has {found.st_size} bytes but its index says {shard.size}; {shard.advice}"
                )
            seen.append((found.st_size, found.st_mtime_ns))
        return seen

    def _init_files(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_files()

    def __del__(self) -> None:
        if "_lock" in self.__dict__:
            self.close()

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._opened(shard)
            self._check(shard, file)
            content = os.pread(file, size, offset)
        if len(content) != size:
            found = self.shards[shard]
            raise DataError(f"{found.location} ends before byte {offset + size}; {found.advice}")
        return content

    def read_all(self, pieces: Sequence[Piece]) -> list[bytes] | None:
        return None

    def _opened(self, shard: int) -> int:
        """File descriptor of a shard; the least recently used one is closed when too many are open."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = self._open(shard)
            if len(self._files) > _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def _open(self, shard: int) -> int:
        try:
            return os.open(self.shards[shard].location, os.O_RDONLY)
        except FileNotFoundError:
            location = self.shards[shard].location
            raise DataError(f"{location} was there when the run began and is gone; put it back") from None

    def _check(self, shard: int, file: int) -> None:
        found = os.fstat(file)
        if (found.st_size, found.st_mtime_ns) != self._seen[shard]:
            raise DataError(
                f"{self.shards[shard].location} was changed while a run read it, so its order cannot be kept; put the "
                f"old file back, or {self.shards[shard].advice} and start a new run"
            )


class CachedFiles(LocalFiles):
    """Files behind an URL, each fetched whole into a bounded folder that all processes and runs may share.

    A file there is named by its content's SHA-256, checked when it is fetched, and complete or absent. The least
    recently used ones make room for new ones; one that is still being read stays readable.
    """

    def __init__(self, shards: list[Shard], config: RemoteConfig, at_once: int) -> None:
        assert config.cache_dir is not None
        self.folder, self.limit = Path(config.cache_dir), int(config.cache_gb * 1e9)
        self.remote = Remote(config.retry_seconds)
        needed = sum(sorted((shard.size for shard in shards), reverse=True)[:at_once])
        if self.limit < needed:
            raise ConfigError(
                f"data.cache_gb={config.cache_gb:g} is too little: the order reads {at_once} shards at a time, up to "
                f"{needed / 1e9:.3g} GB, and would fetch them again and again; raise it, or leave data.cache_dir out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        super().__init__(shards)

    def _look(self) -> list[tuple[int, int]]:
        return []

    def _check(self, shard: int, file: int) -> None:
        """Nothing: names of cached files are checksums."""

    def read_all(self, pieces: Sequence[Piece]) -> list[bytes] | None:
        missing = [shard for shard in {piece[0] for piece in pieces} if not self._path(shard).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(_AT_ONCE // 4) as pool:
                list(pool.map(self._fetch, missing))
        return None

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.shards[shard].sha256}.tar"

    def _open(self, shard: int) -> int:
        while True:
            self._fetch(shard)
            for other in [other for other, file in self._files.items() if not os.fstat(file).st_nlink]:
                os.close(self._files.pop(other))  # was removed to make room, which it takes while it is open
            try:
                file = os.open(self._path(shard), os.O_RDONLY)
            except FileNotFoundError:  # another process just made room
                continue
            if os.fstat(file).st_size == self.shards[shard].size:
                os.utime(file)
                return file
            os.close(file)
            self._path(shard).unlink(missing_ok=True)

    def _fetch(self, shard: int) -> None:
        path = self._path(shard)
        if path.exists():
            return
        with _locked(self.folder / f"{path.name[:2]}.lock"):
            if path.exists():
                return
            draft = path.with_suffix(".tmp")
            with _locked(self.folder / "room.lock"):
                self._make_room(self.shards[shard].size)
                with draft.open("wb") as file:  # its size counts from now on
                    file.truncate(self.shards[shard].size)
            try:
                self._download(self.shards[shard], draft)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            os.replace(draft, path)

    def _download(self, shard: Shard, draft: Path) -> None:
        digest, place = hashlib.sha256(), 0
        with draft.open("r+b") as file:
            for content in self.remote.chunks(shard.location, shard.size):
                digest.update(content)
                place += file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if place != shard.size or digest.hexdigest() != shard.sha256:
            raise DataError(f"{shard.location} is not the file that its index describes; {shard.advice}")

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until ``size`` more bytes fit."""
        found = []
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.tmp")):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        used = sum(size for _, size, _ in found)
        for changed, freed, path in sorted(found):
            if used + size <= self.limit:
                return
            if path.suffix == ".tar" or time.time() - changed > _STALE:
                path.unlink(missing_ok=True)
                used -= freed


class RemoteFiles:
    """Files behind an URL, read piece by piece. Each is asked for its size, and every minute whether it changed."""

    def __init__(self, shards: list[Shard], config: RemoteConfig) -> None:
        self.shards, self.remote = shards, Remote(config.retry_seconds)
        self._stamps: dict[int, tuple[float, Stamp]] = {}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        self._check(shard)
        content = self.remote.read(self.shards[shard].location, offset, size)
        if len(content) != size:
            found = self.shards[shard]
            raise DataError(f"{found.location} ends before byte {offset + size}; {found.advice}")
        return content

    def read_all(self, pieces: Sequence[Piece]) -> list[bytes] | None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._check, sorted({piece[0] for piece in pieces})))
            return list(pool.map(lambda piece: self.read(*piece), pieces))

    def close(self) -> None:
        """Nothing is open."""

    def _check(self, shard: int) -> None:
        now = time.monotonic()
        if shard in self._stamps and now - self._stamps[shard][0] < _LOOK_AGAIN:
            return
        found, stamp = self.shards[shard], self.remote.stamp(self.shards[shard].location)
        if stamp.size != found.size:
            raise DataError(f"{found.location} has {stamp.size} bytes but its index says {found.size}; {found.advice}")
        if shard in self._stamps and self._stamps[shard][1] != stamp:
            raise DataError(
                f"{found.location} was changed while a run read it, so its order cannot be kept; put the old file back, "
                f"or {found.advice} and start a new run"
            )
        self._stamps[shard] = (now, stamp)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process or thread at a time; freed when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
