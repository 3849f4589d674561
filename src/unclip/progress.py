"""How far a long piece of work is, on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
T = TypeVar("T")
EVERY = 30  # seconds between two lines


@contextmanager
def counted(total: int, title: str, *, silent: bool = False) -> Iterator[Callable[[int], None]]:
    """A function that takes how many of ``total`` pieces were done since its last call. ``silent``: all ranks but the first."""
    if silent:
        yield lambda count: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True
        ) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _Lines(total, title)


def track(items: Iterable[T], title: str, total: int, *, silent: bool = False) -> Iterator[T]:
    """``items``, of which there are ``total``, each counted once what is done with it is over."""
    with counted(total, title, silent=silent) as advance:
        for item in items:
            yield item
            advance(1)


class _Lines:
    """One line each ``EVERY`` seconds, and after the first of them one at the end."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title = total, title
        self.done, self.said = 0, False
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < EVERY and not (self.said and self.done >= self.total):
            return
        left = (now - self.start) * (self.total - self.done) / max(self.done, 1)
        log.info("%s: %d of %d, %.0f s left", self.title, self.done, self.total, left)
        self.last, self.said = now, True
