"""Files and folders that appear complete or not at all, whatever stops the process that writes them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unclip.errors import ConfigError


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A draft beside ``path``, which takes its name at the end and is removed after an error.

    Several processes may do so at once. ``durable``: it survives a power cut, for which the disk is waited for.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        if durable:
            sync(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before."""
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def complete_or_not(out: Path) -> Iterator[Path]:
    """A draft folder beside ``out``, which takes its name at the end and is removed after an error.

    Raises :class:`ConfigError` where ``out`` is there already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or write to another folder")
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
