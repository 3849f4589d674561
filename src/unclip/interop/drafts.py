"""Folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unclip.errors import ConfigError


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
