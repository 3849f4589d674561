"""A tiny CLIP as an artifact, pictures, and their embeddings in the public layout, as others write it."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip import artifact
from unclip.config import to_plain
from unclip.data.shards import ShardWriter
from unclip.models.clip import CLIP, CLIPConfig

PARTS = (20, 28)


def tiny_clip(seed: int, embed_dim: int = 16) -> CLIP:
    torch.manual_seed(seed)
    small = {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}
    small |= {"text_width": 32, "text_layers": 1, "text_heads": 2}
    return CLIP(CLIPConfig(image_size=16, patch_size=8, embed_dim=embed_dim, **small)).eval()


def save_clip(folder: Path, clip: CLIP) -> Path:
    artifact.save(folder, clip, artifact.Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    return folder


@dataclass
class World:
    clip: Path
    stranger: Path
    pictures: Path
    shards: Path
    image: np.ndarray
    text: np.ndarray
    keys: list[str]
    captions: list[str]

    def layout(self, folder: Path, *, unit: bool = True) -> Path:
        """The rows in numpy files of float16 and pandas' parquet files."""
        for name in ("img_emb", "text_emb", "metadata"):
            (folder / name).mkdir(parents=True)
        start = 0
        for number, count in enumerate(PARTS):
            rows = slice(start, start + count)
            for name, values in (("img_emb", self.image), ("text_emb", self.text)):
                part = values[rows] / np.linalg.norm(values[rows], axis=1, keepdims=True) if unit else values[rows]
                np.save(folder / name / f"{name}_{number}.npy", part.astype(np.float16))
            table = pd.DataFrame({"image_path": self.keys[rows], "caption": self.captions[rows]})
            table.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
            start += count
        return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    clip, rng = tiny_clip(0), np.random.default_rng(0)
    images = rng.integers(0, 256, (sum(PARTS), 16, 16, 3), dtype=np.uint8)
    keys = [f"{i:06d}" for i in range(len(images))]
    captions = [f"a thing called {i}\nin two lines" if i % 7 == 0 else f"thing {i}" for i in range(len(images))]
    (root / "pictures").mkdir()
    with ShardWriter(root / "shards" / "train", shard_size=30) as writer:
        for key, pixels, caption in zip(keys, images, captions, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            (root / "pictures" / f"{key}.png").write_bytes(buffer.getvalue())
            writer.write(key, buffer.getvalue(), caption, {})
    with torch.no_grad():
        image = 3 * clip.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        text = clip.encode_text(clip.tokenize(captions))[0].numpy()
    places = save_clip(root / "clip", clip), save_clip(root / "stranger", tiny_clip(1))
    return World(*places, root / "pictures", root / "shards", image, text, keys, captions)


def unit(rows: np.ndarray) -> np.ndarray:
    return F.normalize(torch.from_numpy(rows.astype(np.float32)), dim=1).numpy()


Spoil = Callable[[Path], object]
