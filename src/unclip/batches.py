"""Work on many pictures in batches that fit into memory, counted step by step."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from unclip.diffusion.samplers import OnStep
from unclip.errors import ResourceError, is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[int, int], None]
Work = Callable[[list[int], OnStep], T]


class Meter:
    """Counts sampling steps, each as many times as it has pictures, and tells ``progress(done, total)``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def move_to(self, done: int) -> None:
        before, self.done = self.done, min(done, self.total)
        if self.progress is not None and self.done != before:
            self.progress(self.done, self.total)


class Batches:
    """Calls a stage for at most ``size`` pictures at once.

    Where memory does not suffice, the batch is halved, for this stage from then on, and a log line says so.
    ``places[stage][i]`` tells which batch picture i was in: how many pictures it had, and which of them it was. Rounding
    depends on that, so it belongs to what repeats a picture bit for bit.
    """

    def __init__(self, size: int, meter: Meter) -> None:
        self.size, self.meter = size, meter
        self.places: dict[str, list[tuple[int, int]]] = {}
        self._limits: dict[str, int] = {}

    def each(self, stage: str, count: int, steps: int, work: Work[T]) -> list[T]:
        """``work(rows, on_step)`` for parts of range(count), in order; ``steps`` are those of one picture.

        Raises :class:`ResourceError` where memory does not suffice for a single picture.
        """
        found: list[T] = []
        self.places[stage] = []
        while (start := len(self.places[stage])) < count:
            rows = list(range(start, min(start + self._limits.get(stage, self.size), count)))
            result = self._tried(stage, rows, steps, work)
            if result is not None:
                found.append(result)
                self.places[stage] += [(len(rows), i) for i in range(len(rows))]
        return found

    def _tried(self, stage: str, rows: list[int], steps: int, work: Work[T]) -> T | None:
        """None if memory did not suffice: the limit is lower then."""
        before = self.meter.done
        try:
            result = work(rows, lambda done, total: self.meter.move_to(before + len(rows) * steps * done // total))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            self.meter.move_to(before + steps * len(rows))
            return result
        # outside of the handler: the error's traceback holds the tensors that were too many
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            raise ResourceError(
                f"the {stage} runs out of memory with a single picture ({said}); take a smaller size, "
                "keep_in_memory=one, or precision=bf16"
            )
        self._limits[stage] = len(rows) // 2
        log.warning(
            "the %s runs out of memory with %d pictures at once; going on with %d", stage, len(rows), len(rows) // 2
        )
        self.meter.move_to(before)
        return None


class Again(Batches):
    """For one picture that is to come out bit for bit: each stage gets a batch as large as it was, of that picture only."""

    def __init__(self, places: dict[str, tuple[int, int]], pick: Callable[[object, int], object], meter: Meter) -> None:
        super().__init__(1, meter)
        self.known, self.pick = places, pick

    def each(self, stage: str, count: int, steps: int, work: Work[T]) -> list[T]:
        size, index = self.known[stage]
        result = self._tried(stage, [0] * size, steps * count, work)
        if result is None:
            raise ResourceError(
                f"repeating the picture takes a batch of {size} in the {stage}, as when it was drawn; there is no memory"
            )
        return [self.pick(result, index)]  # type: ignore[list-item]


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in order, ``size`` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]
