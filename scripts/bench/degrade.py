"""Degraded low-resolution pictures a second: two worker processes that do nothing else.

``light_per_s``, ``full_per_s``: targets of 256 px in memory to pictures of 64 px. ``full_vs_bare``: against the least that
can be done, an antialiased resize and one JPEG of each (PIL and simplejpeg).
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

import numpy as np
import simplejpeg
import torch
import turns
from PIL import Image

from unclip.data.batch import Batch
from unclip.data.degrade import Degrade
from unclip.models.pictures import Bsr

WORKERS, SIZE, LOW, BATCH = 2, 256, 64, 32
COUNTS = {"smoke": 64, "quick": 2048, "full": 2048}  # pictures a worker


def pictures() -> torch.Tensor:
    """uint8 (BATCH, 3, SIZE, SIZE): smooth ones with some noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (BATCH, SIZE // 16, SIZE // 16, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in colours]
    noisy = np.stack(smooth).astype(np.int16) + rng.integers(-8, 8, (BATCH, SIZE, SIZE, 3))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def ours(bsr: Bsr) -> Callable[[int], None]:
    image, degrade = pictures(), Degrade(bsr, SIZE, LOW, seed=0)

    def work(number: int) -> None:
        degrade(Batch(position=list(range(number * BATCH, (number + 1) * BATCH)), image=image))

    return work


def bare() -> Callable[[int], None]:
    image = [np.ascontiguousarray(picture.permute(1, 2, 0).numpy()) for picture in pictures()]

    def work(number: int) -> None:
        for picture in image:
            low = np.asarray(Image.fromarray(picture).resize((LOW, LOW), Image.Resampling.BICUBIC))
            simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(low, quality=80))

    return work


def _repeat(make: Callable[[], Callable[[int], None]], batches: int, barrier: Barrier) -> None:
    torch.set_num_threads(1)
    work = make()
    work(0)
    barrier.wait()
    for number in range(batches):
        work(number)
    barrier.wait()


def rate(make: Callable[[], Callable[[int], None]], count: int) -> float:
    """Pictures a second of all workers; their start is not counted."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WORKERS + 1)
    batches = count // BATCH
    processes = [context.Process(target=_repeat, args=(make, batches, barrier)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return WORKERS * BATCH * batches / seconds


def main() -> None:
    size = turns.size_from_command_line(__doc__ or "")
    count = COUNTS[size]
    sides = {
        "light": lambda: rate(lambda: ours(Bsr.light), count),
        "full": lambda: rate(lambda: ours(Bsr.full), count),
        "bare": lambda: rate(bare, count),
    }
    found = turns.take_turns(sides, turns.ROUNDS[size])
    ones = [1.0] * len(found["bare"])
    ratios = {
        "light_per_s": turns.ratio(found["light"], ones),
        "full_per_s": turns.ratio(found["full"], ones),
        "full_vs_bare": turns.ratio(found["full"], found["bare"]),
    }
    turns.report("degrade", ratios, {"workers": WORKERS, "pixels": SIZE, "low": LOW, "pictures": count * WORKERS})


if __name__ == "__main__":
    main()
