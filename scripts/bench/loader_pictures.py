"""Pictures a second: two workers of our loader against two processes that only decode the same bytes.

``pictures_vs_decode_only``: JPEGs of 512 px cut to 256 px, as a stage trains on them; both sides decode and resize with
``load_pixels``. The bare side holds the encoded bytes in memory and drops what it decoded; ours reads shards in shuffled
order, looks captions up, fills batches and hands them to the training process. ``unresized``: the same with JPEGs of
256 px that need no resizing, where the copies weigh most. Worker start-up is not counted on either side.
"""

import io
import multiprocessing
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import turns
from PIL import Image

from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.shards import Shards, ShardWriter
from unclip.data.transforms import load_pixels

WORKERS, BATCH, SIZE = 2, 64, 256
COUNTS = {"smoke": (64, 2), "quick": (512, 120), "full": (512, 240)}  # pictures, measured batches


def jpeg(rng: np.random.Generator, size: int) -> bytes:
    """A smooth picture with some noise: about 1.7 bits a pixel, as photographs at quality 90."""
    colours = rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.integers(-8, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(folder: Path, size: int, count: int) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train", shard_size=64) as writer:
        for i in range(count):
            writer.write(f"{i}", jpeg(rng, size), f"picture {i}", {}, "jpg")
    return folder


def ours(folder: Path, num_batches: int) -> float:
    """Pictures a second that arrive in the training process."""
    cfg = DataConfig(str(folder), image_size=SIZE, num_workers=WORKERS, val_split=None)
    batches = iter(UnclipData(cfg, 0, BATCH, ("image",)).train_dataloader())
    for _ in range(4 * WORKERS):
        next(batches)
    seconds = turns.seconds(lambda: [next(batches) for _ in range(num_batches)] and None)
    return BATCH * num_batches / seconds


def _decode(contents: list[bytes], count: int, barrier: Barrier) -> None:
    for content in contents[:32]:
        load_pixels(content, SIZE)
    barrier.wait()
    for i in range(count):
        load_pixels(contents[i % len(contents)], SIZE)
    barrier.wait()


def bare(folder: Path, num_batches: int) -> float:
    """Pictures a second that two processes decode from memory."""
    shards, count = Shards(folder / "train"), BATCH * num_batches // WORKERS
    contents = [shards.image(i) for i in range(len(shards))]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WORKERS + 1)
    processes = [context.Process(target=_decode, args=(contents, count, barrier)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return count * WORKERS / seconds


def main() -> None:
    size = turns.size_from_command_line(__doc__ or "")
    count, num_batches = COUNTS[size]
    with tempfile.TemporaryDirectory() as name:
        large, small = (write(Path(name) / str(pixels), pixels, count) for pixels in (2 * SIZE, SIZE))
        found = turns.take_turns(
            {
                "ours": lambda: ours(large, num_batches),
                "bare": lambda: bare(large, num_batches),
                "ours_unresized": lambda: ours(small, 2 * num_batches),
                "bare_unresized": lambda: bare(small, 2 * num_batches),
            },
            turns.ROUNDS[size],
        )
    ratios = {
        "pictures_vs_decode_only": turns.ratio(found["ours"], found["bare"]),
        "unresized": turns.ratio(found["ours_unresized"], found["bare_unresized"]),
        "pictures_per_s": turns.ratio(found["ours"], [1.0] * len(found["ours"])),
    }
    turns.report("loader_pictures", ratios, {"workers": WORKERS, "batch": BATCH, "pixels": SIZE, "pictures": count})


if __name__ == "__main__":
    main()
