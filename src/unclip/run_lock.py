"""One process at a time in a run folder."""

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from unclip.errors import UnclipError

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of torchrun, Lightning and SLURM; 0 or unset on rank zero


class RunLock:
    """Holds ``run/NAME`` while the block runs; the kernel lets go of it however the process ends.

    Raises :class:`UnclipError` when another process holds it, naming that process. Ranks other than zero take no lock.
    The lock is the process's own (POSIX): a data worker that outlives a killed run does not keep it.
    """

    def __init__(self, run: Path, name: str = "lock") -> None:
        self.path = run / name
        self._file = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)  # torchrun's other ranks may come before rank zero
        if any(os.environ.get(name, "") not in ("", "0") for name in RANKS):
            return self
        file = self.path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UnclipError(
                f"{self.path.parent} is in use by {owner}; wait for it, stop it, or choose another run=..."
            ) from error
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
