"""Batches that do not fit into memory are halved."""

import logging
import resource
from pathlib import Path

import pytest
import torch

from unclip.batches import Batches, Meter, is_out_of_memory
from unclip.errors import ResourceError


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("unclip.batches"), "disabled", False)  # Hydra, in this process, sets it
    caplog.set_level(logging.WARNING)
    return caplog


def too_many(most: int, error: Exception, calls: list[int]):
    def work(rows, on_step):
        calls.append(len(rows))
        on_step(1, 2)
        if len(rows) > most:
            raise error
        on_step(2, 2)
        return torch.tensor(rows)

    return work


OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 40000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "oneDNN": RuntimeError("could not create a primitive"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_and_said_so(kind: str, warnings: pytest.LogCaptureFixture):
    told, calls = [], []
    batches = Batches(8, Meter(lambda *step: told.append(step), 40))
    found = batches.each("decoder", 10, 4, too_many(3, OUT_OF_MEMORY[kind], calls))
    assert torch.cat(found).tolist() == list(range(10))
    assert calls == [8, 4, 2, 2, 2, 2, 2]
    assert batches.places["decoder"] == [(2, 0), (2, 1)] * 5
    assert told[-1] == (40, 40)
    assert "the decoder runs out of memory with 8 pictures at once; going on with 4" in warnings.text
    assert "going on with 2" in warnings.text
    calls.clear()
    batches.each("decoder", 4, 4, too_many(3, OUT_OF_MEMORY[kind], calls))
    assert calls == [2, 2], "the smaller batch is kept"


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_one_picture_that_does_not_fit_is_an_error_in_words(kind: str):
    with pytest.raises(ResourceError, match=r"the decoder runs out of memory with a single picture \(.*smaller size"):
        Batches(4, Meter(None, 0)).each("decoder", 4, 4, too_many(0, OUT_OF_MEMORY[kind], []))


def test_other_errors_pass():
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        Batches(4, Meter(None, 0)).each("decoder", 4, 4, too_many(0, RuntimeError("shapes"), []))


def test_under_a_memory_limit(warnings: pytest.LogCaptureFixture):
    """The CPU allocator's own error, under a limit on this process's address space."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def work(rows, on_step):
        return torch.empty(len(rows), 100 * 2**20, dtype=torch.uint8)[:, 0].clone()

    try:
        resource.setrlimit(resource.RLIMIT_AS, (now + 350 * 2**20, hard))
        found = Batches(8, Meter(None, 0)).each("decoder", 8, 1, work)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert len(torch.cat(found)) == 8
    assert "the decoder runs out of memory with 8 pictures at once; going on with 4" in warnings.text


def test_what_progress_raises_ends_the_job():
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError, match="cancelled"):
        Batches(2, Meter(stop, 40)).each("decoder", 10, 4, too_many(3, OUT_OF_MEMORY["cpu"], calls))
    assert calls == [2]
