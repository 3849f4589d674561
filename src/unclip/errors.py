"""Errors that a user can act on. The commands print their message without a traceback and exit with 1."""

import errno
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
    """A run cannot go on: it diverged, or its checkpoint cannot be written."""


class DivergedError(TrainingError):
    """The loss is not finite, or far above what it was."""


class ResourceError(UnclipError):
    """The machine has too little memory for what was asked."""


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Around a command: errors for users, and a full disk, end in one message and exit code 1."""
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
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)
