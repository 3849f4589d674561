"""A tiny embedded data set for priors, made without any CLIP: z_i is z_t plus noise."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.data.shards import Shards, ShardWriter
from unclip.models.interface import Interface

COUNTS = {"train": 32, "val": 20, "test": 12}


def make_pairs(root: Path) -> None:
    """``root/data`` and its embeddings ``root/embeddings``, of a CLIP whose hash is 64 times "a"."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    for split, count in COUNTS.items():
        with ShardWriter(root / "data" / split) as writer:
            for i in range(count):
                writer.write(f"{i:04d}", buffer.getvalue(), f"{split} thing {i}", {})
    embed(root, "embeddings", "a" * 64)


def embed(root: Path, name: str, clip: str) -> None:
    """Embeddings ``root/name`` of ``root/data``, as a CLIP with the hash ``clip`` would write them."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        shards = Shards(root / "data" / split)
        writer = EmbeddingsWriter(
            root / name, split, Interface(8, 8, 6, 50, clip), ["image_emb", "text_emb", "tokens"], "float32"
        )
        text = rng.normal(size=(count, 8)).astype(np.float32)
        tokens = rng.integers(1, 40, (count, 6)).astype(np.int32)
        tokens[:, 3], tokens[:, 4:] = 49, 0
        columns = {"image_emb": text + rng.normal(size=(count, 8)).astype(np.float32), "text_emb": text}
        writer.write("00000", shards.sha256[0], shards.keys, {**columns, "tokens": tokens})
        writer.finish(shards)
