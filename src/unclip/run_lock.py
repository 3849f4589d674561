"""One process at a time in a folder."""

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from unclip.errors import UnclipError

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of torchrun, Lightning and SLURM; 0 or unset on rank zero


class FolderLock:
    """Holds the file ``path`` while the block runs; the kernel lets go of it however the process ends.

    Raises :class:`UnclipError` when another process holds it, naming that process and ``instead``, what to do otherwise.
    ``left`` is what the holder before wrote there, "" if there was none. The lock is the process's own (POSIX): a data
    worker that outlives a killed run does not keep it.
    """

    def __init__(self, path: Path, instead: str) -> None:
        self.path, self.instead = path, instead
        self.left = ""
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UnclipError(
                f"{self.path.parent} is in use by {owner}; wait for it, stop it, or {self.instead}"
            ) from error
        file.seek(0)
        self.left = file.read().strip()
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(owner))
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


class RunLock(FolderLock):
    """A run's ``run/NAME``. Ranks other than zero take no lock."""

    def __init__(self, run: Path, name: str = "lock") -> None:
        super().__init__(run / name, "choose another run=...")

    def __enter__(self) -> Self:
        if not any(os.environ.get(name, "") not in ("", "0") for name in RANKS):
            return super().__enter__()
        self.path.parent.mkdir(parents=True, exist_ok=True)  # torchrun's other ranks may come before rank zero
        return self
