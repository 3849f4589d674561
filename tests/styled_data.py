"""A tiny data set that names styles and concepts, as the emoji do, and a chain trained on it by the commands."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tests_support import TINY, run_command

from unclip.data.shards import ShardWriter

COUNTS = {"train": 24, "val": 8, "test": 8, "test_styles": 8}


def png(seed: int, grey: bool) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("L" if grey else "RGB").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def train_chain(root: Path) -> Path:
    """``root/data``, ``root/embeddings``, and in ``root/runs`` clip, judge, prior, decoder and upsampler."""
    for number, (split, count) in enumerate(COUNTS.items()):
        with ShardWriter(root / "data" / split) as writer:
            for i in range(count):
                style = ("grey", "colour")[i % 2]
                meta = {"style": style, "concept": f"{split} {i // 2}"}
                writer.write(f"{i:04d}", png(100 * number + i, style == "grey"), f"thing {i // 2}, {style} style", meta)
    run_command("train-clip", "run=runs/clip", "data.path=data", *TINY["clip"], cwd=root)
    run_command("train-clip", "run=runs/judge", "seed=1", "data.path=data", *TINY["clip"], cwd=root)
    run_command("unclip-embed", "run=embeddings", "clip=runs/clip", "data=data", cwd=root)
    embedded = ["data.path=data", "data.embeddings=embeddings"]
    run_command("train-prior", "run=runs/prior", *embedded, *TINY["prior"], cwd=root)
    run_command("train-decoder", "run=runs/decoder", *embedded, *TINY["decoder"], cwd=root)
    run_command("train-upsampler", "run=runs/upsampler", "data.path=data", *TINY["upsampler"], cwd=root)
    return root
