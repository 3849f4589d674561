"""Bytes behind an URL, read again and again while the server is away."""

import asyncio
import errno
import io
import logging
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from unclip.errors import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
PIPE = "pipe:"  # before a shell command that prints a shard
CHUNK = 8 << 20  # bytes of one request when a shard is read from its beginning to its end
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0  # seconds
_CONNECT, _READ = 10, 60  # seconds until a silent server counts as away
_REFUSED = (  # of botocore: credentials that are missing, incomplete, out of date or named wrongly
    *(
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "ConfigParseError",
    ),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError"),
)
_FINAL_STATUS = range(400, 500)  # answers that asking again does not change, but for these:
_BUSY_STATUS = (408, 425, 429)
_FINAL_ERRNO = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RemoteConfig:
    """How shards behind an URL are read.

    ``cache_dir`` keeps whole shards in a local folder, at most ``cache_gb`` of them, the least recently used ones removed
    first; None reads each sample by a range request. While a server is away, reads wait up to ``retry_seconds`` for it.
    """

    cache_dir: str | None = None
    cache_gb: float = 100.0
    retry_seconds: float = 600.0


@dataclass(frozen=True)
class Stamp:
    """What a server says about a file: its size in bytes and its ETag or time of change ("" where it says nothing)."""

    size: int
    tag: str


def is_url(location: str) -> bool:
    """Whether ``location`` is behind a server: it begins with a scheme such as ``s3://``."""
    return "://" in location


class Remote:
    """Reads files behind URLs (http, https, s3, and every other scheme that fsspec has a handler for).

    A read that fails since the server is away, busy or silent is tried again after 0.25, 0.5, 1 … at most 30 s (a little
    less, at random, so that thousands of ranks do not come back in one moment), until ``retry_seconds`` have passed.
    DataError then, and at once for what waiting does not change: a missing file, refused credentials, an unknown scheme.
    """

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        self._systems: dict[tuple[int, str], Any] = {}  # by process: a filesystem does not survive a fork
        self._said = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_systems": {}}

    def read(self, url: str, offset: int = 0, size: int | None = None) -> bytes:
        """``size`` bytes from ``offset`` (None: the whole file); fewer where the file ends before."""
        if size is None:
            return self._patiently(url, lambda system: system.cat_file(url))
        content = self._range(url, offset, size)
        return content if len(content) <= size else content[offset : offset + size]

    def chunks(self, url: str, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes piece by piece, each of which waits for the server by itself."""
        place = 0
        while place < size:
            want = min(CHUNK, size - place)
            content = self._range(url, place, want)
            content = content if len(content) <= want else content[place:size]
            if not content:
                return
            yield content
            place += len(content)

    def _range(self, url: str, offset: int, size: int) -> bytes:
        """A piece of a file, or all of it where the server ignores range requests."""
        content = self._patiently(url, lambda system: system.cat_file(url, start=offset, end=offset + size))
        if len(content) > size:
            self._say(f"{url}: this server ignores range requests; data.cache_dir fetches each shard once")
        return content

    def stamp(self, url: str) -> Stamp:
        """Size and tag of a file now."""

        def ask(system: Any) -> dict[str, Any]:
            system.invalidate_cache()
            try:
                return system.info(url)
            except FileNotFoundError as error:  # over http, every failure looks so
                if isinstance(error.__cause__, _failures()) and not _is_missing(error.__cause__):
                    raise error.__cause__ from None
                raise

        info = self._patiently(url, ask)
        if info["size"] is None:
            raise DataError(f"the server of {url} does not tell its size; set data.cache_dir to fetch whole shards")
        return Stamp(
            int(info["size"]), str(info.get("ETag") or info.get("Last-Modified") or info.get("LastModified") or "")
        )

    def exists(self, url: str) -> bool:
        """Whether there is such a file; waits for a server that is away."""
        try:
            self.stamp(url)
        except MissingError:
            return False
        return True

    def open(self, url: str) -> BinaryIO:
        """The file from its beginning on, read in chunks, each of which waits for the server by itself."""
        size = self.stamp(url).size
        return io.BufferedReader(_Pieces(self.chunks(url, size), url, size), 1 << 20)

    def _patiently(self, url: str, ask: Callable[[Any], T]) -> T:
        system = self._system(url)
        start, delay = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                return ask(system)
            except _failures() as error:
                said = f"{type(error).__name__}: {error}".rstrip(": ")
                if _is_missing(error):
                    raise MissingError(f"there is no {url}; fetch or upload it again") from error
                if _is_refusal(error):
                    raise DataError(
                        f"{url} may not be read ({said}); check the credentials (for s3: AWS_ACCESS_KEY_ID, "
                        "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and AWS_ENDPOINT_URL) and who may read the bucket"
                    ) from error
                if _is_final(error):
                    raise DataError(f"{url} cannot be read ({said})") from error
                waited = time.monotonic() - start
                if waited + delay > self.retry_seconds:
                    raise DataError(
                        f"{url} could not be read for {waited:.0f} s ({said}); is the address right and the server up? "
                        f"data.retry_seconds (now {self.retry_seconds:g}) says how long to wait; the same command again "
                        "goes on from the last checkpoint"
                    ) from error
                wait = delay * random.SystemRandom().uniform(0.75, 1.0)
                self._say(
                    f"waiting for {url} ({said}): next try in {wait:.1f} s, {waited:.0f} of at most "
                    f"{self.retry_seconds:g} s are over"
                )
                time.sleep(wait)
                delay = min(2 * delay, _LONGEST_WAIT)

    def _say(self, message: str) -> None:
        """A warning, at most one a second: many reads wait side by side."""
        if time.monotonic() - self._said > 1:
            self._said = time.monotonic()
            log.warning(message)

    def _system(self, url: str) -> Any:
        scheme = url.split("://")[0]
        if (os.getpid(), scheme) not in self._systems:
            self._systems[os.getpid(), scheme] = _filesystem(scheme, url)
        return self._systems[os.getpid(), scheme]


class MissingError(DataError):
    """There is no such file, and the server is there to say so."""


def _filesystem(scheme: str, url: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_CONNECT, sock_read=_READ)}
    if scheme in ("s3", "s3a"):
        silence = {"connect_timeout": _CONNECT, "read_timeout": _READ}
        options["config_kwargs"] = {**silence, "retries": {"total_max_attempts": 1}}
    try:
        system: Any = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        what = "pip install 'unclip[remote]'" if scheme.startswith("s3") else str(error)
        raise DataError(f"{url}: reading {scheme}:// needs another package: {what}") from error
    except ValueError as error:
        raise DataError(
            f"{url}: nothing here reads {scheme}://; known are local paths, http://, https://, s3://, pipe:COMMAND and "
            "the schemes of fsspec's packages"
        ) from error
    if scheme in ("s3", "s3a"):
        system.retries = 1  # one loop waits, and says so
    return system


def _failures() -> tuple[type[Exception], ...]:
    """What a filesystem raises; OSError holds most of it."""
    import aiohttp

    found: tuple[type[Exception], ...] = (OSError, asyncio.TimeoutError, aiohttp.ClientError)
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return found
    return (*found, BotoCoreError, ClientError)


def _is_missing(error: BaseException) -> bool:
    import aiohttp

    return isinstance(error, FileNotFoundError) or (
        isinstance(error, aiohttp.ClientResponseError) and error.status in (404, 410)
    )


def _is_refusal(error: Exception) -> bool:
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (401, 403)
    return isinstance(error, PermissionError) or type(error).__name__ in _REFUSED


def _is_final(error: Exception) -> bool:
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _FINAL_STATUS and error.status not in _BUSY_STATUS
    if isinstance(error, OSError):
        return error.errno in _FINAL_ERRNO
    return isinstance(error, aiohttp.InvalidURL)


class _Pieces(io.RawIOBase):
    """Pieces of a file as a stream of ``size`` bytes; DataError where they are fewer."""

    def __init__(self, pieces: Iterator[bytes], url: str, size: int) -> None:
        self._pieces, self._url, self._left = pieces, url, size
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._piece:
            self._piece = memoryview(next(self._pieces, b""))
        count = min(len(target), len(self._piece))
        if not count and self._left:
            raise DataError(f"{self._url} changed while it was read: it ends {self._left} bytes too early")
        target[:count] = self._piece[:count]
        self._piece, self._left = self._piece[count:], self._left - count
        return count


class Command(io.RawIOBase):
    """What a shell command prints, as a stream. DataError where it ends with another code than 0."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with this stream
        self._process = subprocess.Popen(line, shell=True, stdout=subprocess.PIPE, stderr=self._errors)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        assert self._process.stdout is not None
        content = self._process.stdout.read(len(target))
        if not content:
            self._check()
        target[: len(content)] = content
        return len(content)

    def _check(self) -> None:
        code = self._process.wait()
        if code:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-500:]
            raise DataError(f"pipe:{self._line} ended with code {code}: {said or 'it said nothing'}")

    def close(self) -> None:
        """Ends the command, also in the middle of what it has to say."""
        if not self.closed:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.kill()
            self._process.wait()
            self._errors.close()
        super().close()
