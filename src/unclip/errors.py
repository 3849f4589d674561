"""Errors that a user can act on. The commands print their message without a traceback and exit with 1."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UnclipError(Exception):
    """Base of every error whose message says what is wrong, where, and what to do next."""


class ConfigError(UnclipError, ValueError):
    """A setting is misspelt, of the wrong type, or contradicts another one."""


class ArtifactError(UnclipError):
    """An artifact is missing, damaged, of another kind, or belongs to another CLIP."""


class DataError(UnclipError):
    """A data set or an embeddings folder is missing, damaged or does not match."""


class TrainingError(UnclipError):
    """A run cannot go on: it diverged, or its checkpoint cannot be written or read."""


class DivergedError(TrainingError):
    """The loss is not finite, or far above what it was."""


class ResourceError(UnclipError):
    """The machine has too little memory for what was asked."""


_OUT_OF_MEMORY = re.compile(  # the last two are oneDNN's
    "can't allocate memory|not enough memory|out of memory|bad_alloc|bad allocation|could not create a memory"
    "|could not create a primitive(?! descriptor)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (its devices or its CPU allocator) or Python could not have the memory they asked for."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Around a command: errors for users, a full disk and too little memory end in one message and exit code 1."""
    try:
        yield
    except UnclipError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"no space left for {error.filename or 'a file'}; free some and run the same command again "
            "(for `unclip data`: after removing what it wrote)"
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}); ask for smaller "
            "batches or pictures, or for one stage in memory at a time where the command has --keep-in-memory"
        )
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)
