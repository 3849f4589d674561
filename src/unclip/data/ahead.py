"""Batches made ahead of their use, by worker processes or a thread."""

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from unclip.data.batch import Batch

PREFETCH = 2  # batches made ahead by the background thread, or by each worker
T = TypeVar("T")


def only_from_above(worker: int) -> None:
    """In a loader's worker: leave signals to the main process.

    SLURM and terminals send theirs to every process. The main one notes it, and then needs batches until all ranks have saved.
    Only its own SIGTERM, sent when it ends, ends a worker; torch's handler would die of anyone's.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_until_told, daemon=True).start()


def _until_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class Batches(IterableDataset):
    """``make(step)`` for step = start, start + 1, … (up to ``stop``), made ahead of their use.

    Worker w of n makes whole batches w, w + n, …; the loader takes them in turn, so the order is kept. Without workers
    a background thread makes them: decoding releases the interpreter's lock.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int | None) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            return prefetched(self.of_worker(0, 1), PREFETCH)
        return self.of_worker(worker.id, worker.num_workers)

    def of_worker(self, number: int, workers: int) -> Iterator[Batch]:
        """The batches that one of several workers makes."""
        step = self.start + number
        while self.stop is None or step < self.stop:
            yield self.make(step)
            step += workers


def prefetched(batches: Iterator[T], depth: int) -> Iterator[T]:
    """The same batches, made by a background thread up to ``depth`` ahead; its exceptions arrive here."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    torch.get_num_threads()  # fixes this thread's number before the other one sets its own

    def work() -> None:
        torch.set_num_threads(1)  # a second pool of threads would spin against the training step's
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="unclip-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)
