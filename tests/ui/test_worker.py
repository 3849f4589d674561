"""Tasks in turn, their errors in words, and a thread that outlives them all."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from unclip.batches import Batches, Meter
from unclip.errors import ConfigError
from unclip.jobs import Picture
from unclip.ui import worker as module
from unclip.ui.worker import State, Task, Worker

Progress = Callable[[int, int], None]


def picture(seed: int) -> Picture:
    return Picture(torch.zeros(3, 2, 2, dtype=torch.uint8), "a red cube", seed)


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker(lambda picture: Path(f"{picture.seed}.png"), lambda path: None)
    yield found
    found.close()


def wait(task: Task) -> Task:
    limit = time.monotonic() + 60
    while not task.state.ended:
        assert time.monotonic() < limit, "a task does not end"
        time.sleep(0.005)
    return task


def good(progress: Progress) -> Iterator[Picture]:
    progress(1, 2)
    yield picture(7)


def raises(error: BaseException) -> Callable[[Progress], Iterator[Picture]]:
    def work(progress: Progress) -> Iterator[Picture]:
        raise error
        yield

    return work


def test_a_task_ends_with_pictures_and_files(worker: Worker):
    task = wait(worker.submit(good, []))
    assert task.state is State.done
    assert [(p.seed, path) for p, path in task.pictures] == [(7, Path("7.png"))]
    assert (task.step, task.num_steps, task.error) == (1, 2, "")


def test_what_is_saved_while_its_visitor_leaves_is_removed(tmp_path: Path):
    """The picture that is being saved at that moment, too; those that would follow are not saved."""
    saving, left = threading.Event(), threading.Event()

    def save(picture: Picture) -> Path:
        saving.set()
        assert left.wait(60)
        path = tmp_path / f"{picture.seed}.png"
        path.write_text("")
        return path

    worker = Worker(save, Path.unlink)
    task = worker.submit(lambda progress: iter([picture(1), picture(2)]), [])
    assert saving.wait(60)
    task.forget(Path.unlink)
    left.set()
    worker.close()
    assert task.state is State.cancelled
    assert [path.name for _, path in task.pictures] == ["1.png"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("theta is 7; it must lie in [0, 1]"), "theta is 7; it must lie in [0, 1]"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "The server ran out of memory."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "The server ran out of memory."),
        (MemoryError(), "The server ran out of memory."),
        (ZeroDivisionError("secret/path"), "The server failed at this (ZeroDivisionError); its log says more."),
    ],
    ids=["of users", "of a device", "of the CPU", "of Python", "unforeseen"],
)
def test_errors_are_told_in_words_and_the_next_task_works(worker: Worker, error: Exception, said: str):
    task = wait(worker.submit(raises(error), []))
    assert task.state is State.failed
    assert task.error.startswith(said)
    assert "secret" not in task.error
    assert wait(worker.submit(good, [])).state is State.done


def test_a_halved_batch_is_told_and_the_task_goes_on(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unclip.batches.log.disabled", False)  # Hydra may have disabled it

    def work(progress: Progress) -> Iterator[Picture]:
        def stage(rows: list[int], on_step: Progress) -> int:
            if len(rows) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return len(rows)

        assert Batches(4, Meter(progress, 4)).each("decoder", 4, 1, stage) == [2, 2]
        yield picture(0)

    task = wait(worker.submit(work, []))
    assert task.state is State.done
    assert any("runs out of memory with 4 pictures at once; going on with 2" in note for note in task.notes)


def test_notes_of_one_task_are_not_shown_to_another(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.log, "disabled", False)
    logging.getLogger("unclip.ui.worker").warning("from another thread")
    assert wait(worker.submit(good, [])).notes == []


def test_cancelling_ends_a_running_task_at_its_next_step_and_a_waiting_one_at_once(worker: Worker):
    started = threading.Event()

    def endless(progress: Progress) -> Iterator[Picture]:
        for step in range(1, 10**6):
            progress(step, 10**6)
            started.set()
            time.sleep(0.002)
        yield picture(0)

    running, waiting = worker.submit(endless, []), worker.submit(good, [])
    assert started.wait(60)
    assert (worker.ahead(running), worker.ahead(waiting)) == (0, 1)
    assert running.left() is not None
    waiting.cancel()
    assert waiting.state is State.cancelled
    running.cancel()
    assert wait(running).state is State.cancelled
    assert running.pictures == []
    assert wait(worker.submit(good, [])).state is State.done
    assert waiting.pictures == []


def test_too_many_requests_are_refused(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    hold = threading.Event()

    def held(progress: Progress) -> Iterator[Picture]:
        assert hold.wait(60)
        yield picture(0)

    tasks = [worker.submit(held, []), worker.submit(held, [])]
    with pytest.raises(ConfigError, match="2 requests are waiting already; try again in a while"):
        worker.submit(good, [])
    hold.set()
    assert [wait(task).state for task in tasks] == [State.done, State.done]
    assert wait(worker.submit(good, [])).state is State.done
