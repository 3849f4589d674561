"""One thread that draws, for all visitors in turn, and what each of them can see of it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from unclip.batches import Progress
from unclip.errors import ConfigError, UnclipError, is_out_of_memory
from unclip.jobs import Picture

log = logging.getLogger(__name__)
MOST_WAITING = 20  # tasks of all visitors together
Work = Callable[[Progress], Iterator[Picture]]
Save = Callable[[Picture], Path]
Remove = Callable[[Path], None]


class State(Enum):
    waiting = "waiting"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.done, State.failed, State.cancelled)


class CancelledError(Exception):
    """Raised within a sampling step of a task that its visitor gave up."""


@dataclass
class Task:
    """One request: how far it is, its pictures with their files, what it warned of, and why it failed, in words."""

    work: Work
    state: State = State.waiting
    step: int = 0
    num_steps: int = 0
    started: float = 0.0  # time.monotonic()
    seconds: float = 0.0
    pictures: list[tuple[Picture, Path]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    number: int = 0

    def __post_init__(self) -> None:
        self._cancelled, self._forgotten = threading.Event(), threading.Event()

    def cancel(self) -> None:
        """Ends the task at its next sampling step, or before its first."""
        self._cancelled.set()
        if self.state is State.waiting:
            self.state = State.cancelled

    def forget(self, remove: Remove) -> None:
        """Cancel for good: whatever was saved, or is being saved just now, is removed."""
        self._forgotten.set()
        self.cancel()
        self.remove_if_forgotten(remove)

    def remove_if_forgotten(self, remove: Remove) -> None:
        if self._forgotten.is_set():
            for _, path in self.pictures:
                remove(path)

    def go_on(self) -> None:
        """Raises :class:`CancelledError` if the task was given up."""
        if self._cancelled.is_set():
            raise CancelledError

    def progress(self, done: int, total: int) -> None:
        """Note how far the task is; raises :class:`CancelledError` if it was given up."""
        self.go_on()
        self.step, self.num_steps = done, total

    def left(self) -> float | None:
        """Seconds that the steps so far foretell; None before the first."""
        if not self.step or self.state is not State.running:
            return None
        return (time.monotonic() - self.started) * (self.num_steps - self.step) / self.step


class Worker:
    """Runs tasks one after another, in the order in which they came. An error ends its task, never the thread."""

    def __init__(self, save: Save, remove: Remove) -> None:
        self._save, self._remove = save, remove
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._lock = threading.Lock()
        self._open: list[Task] = []
        self._count = 0

    def submit(self, work: Work, pictures: list[tuple[Picture, Path]]) -> Task:
        """Queue a task, which shows ``pictures`` from the start. Raises ConfigError where too many wait already."""
        with self._lock:
            self._open = [task for task in self._open if not task.state.ended]
            if len(self._open) > MOST_WAITING:
                raise ConfigError(f"{len(self._open)} requests are waiting already; try again in a while")
            self._count += 1
            task = Task(work, pictures=pictures, number=self._count)
            self._open.append(task)
        self._pool.submit(self._run, task)
        return task

    def ahead(self, task: Task) -> int:
        """How many tasks come before this one, the running one included."""
        with self._lock:
            return sum(not other.state.ended and other.number < task.number for other in self._open)

    def close(self) -> None:
        with self._lock:
            for task in self._open:
                task.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: Task) -> None:
        if task.state is State.cancelled:
            return
        task.state, task.started = State.running, time.monotonic()
        notes = _Notes(task)
        logging.getLogger("unclip").addHandler(notes)
        try:
            for picture in task.work(task.progress):
                task.go_on()
                task.pictures.append((picture, self._save(picture)))
            state = State.done
        except CancelledError:
            state = State.cancelled
        except Exception as error:  # noqa: BLE001  logged there; the thread must go on
            task.error, state = in_words(error), State.failed
        finally:
            logging.getLogger("unclip").removeHandler(notes)
            task.seconds = time.monotonic() - task.started
            task.remove_if_forgotten(self._remove)
        task.state = state  # last: whoever sees it also sees the rest


def in_words(error: Exception) -> str:
    """What a visitor is told. Nothing of an unforeseen error but its kind: that stands in the log."""
    if isinstance(error, UnclipError):
        return str(error)
    log.error("a request failed", exc_info=error)
    if is_out_of_memory(error):
        return "The server ran out of memory. Ask for fewer pictures, or wait until others have finished."
    return f"The server failed at this ({type(error).__name__}); its log says more. Other requests still work."


class _Notes(logging.Handler):
    """Keeps a task's warnings: a caption that was cut, a batch that was halved."""

    def __init__(self, task: Task) -> None:
        super().__init__(logging.WARNING)
        self._task, self._thread = task, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.levelno < logging.ERROR:
            self._task.notes.append(record.getMessage())
