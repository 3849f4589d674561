"""Work in threads with the results in order."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # results that wait for their turn, beside those in the making


def in_order(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """``function`` of each item, made by ``num_threads`` threads a little ahead, in the order of the items.

    Each thread computes alone (torch's threads inside an operation would wait and spin for one another). The first
    exception is raised in its turn; the work that has not begun is dropped then, and where the iterator is closed.
    """
    before = torch.get_num_threads()  # also fixes this thread's number before the others set theirs
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_threads, "unclip", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= num_threads + _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown(wait=True)
        torch.set_num_threads(before)  # the number is what threads to come start with


@contextlib.contextmanager
def one_behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that runs another one in a thread, after the one before; their exceptions arrive here."""
    last: Future[None] | None = None
    with ThreadPoolExecutor(1, "unclip-write") as pool:

        def soon(work: Callable[[], None]) -> None:
            nonlocal last
            if last is not None:
                last.result()
            last = pool.submit(work)

        yield soon
        if last is not None:
            last.result()


def num_cores() -> int:
    """Cores that this process may use. macOS and Windows do not say: there it is all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
