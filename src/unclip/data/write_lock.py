"""One process at a time writes shards in a folder, and what a killed one left is replaced."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from unclip.errors import DataError
from unclip.run_lock import FolderLock

_WRITING = ".writing"


class WriteLock(FolderLock):
    """Holds ``folder/.writing`` and makes room in its ``splits`` ("." is the folder itself).

    The file goes when the block ends, so one that nobody holds is of a killed process: the shards it left are deleted.
    Raises DataError, and deletes nothing, where a split holds shards that are complete or another program's; UnclipError
    where another process writes there.
    """

    def __init__(self, folder: Path, splits: Sequence[str] = ()) -> None:
        super().__init__(folder / _WRITING, "write to another folder")
        self.splits = [folder / name for name in splits]

    def __enter__(self) -> Self:
        self._remains(self.path.exists())  # before there is a file that says that somebody was writing
        super().__enter__()
        assert self._file is not None
        while not os.fstat(self._file.fileno()).st_nlink:  # its holder ended between our opening and locking it
            super().__exit__(None, None, None)
            super().__enter__()
        try:
            os.fsync(self._file.fileno())
            for old in self._remains(bool(self.left)):
                old.unlink()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        super().__exit__(kind, error, trace)

    def _remains(self, killed: bool) -> list[Path]:
        """What a killed writer left in the splits; DataError where it is no killed writer's."""
        found = [path for split in self.splits for name in ("*.tar", "index.json") for path in split.glob(name)]
        if found and not killed:
            raise DataError(
                f"{found[0].parent} already holds {found[0].name}; remove the folder or write to another one"
            )
        drafts = [path for split in self.splits for path in split.glob("*.tmp")]
        marks = [split / _WRITING for split in self.splits if split != self.path.parent]
        return [*found, *drafts, *(path for path in marks if path.exists())]
