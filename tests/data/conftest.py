"""A tiny captioned data set, made once per test module."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.data.shards import ShardWriter

SIZES = {"train": 20, "val": 7}


def picture(split: str, number: int, size: int = 16) -> np.ndarray:
    """(size, size, 3) uint8, different for every sample."""
    seed = number + 1000 * sorted(SIZES).index(split)
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_set(folder: Path, size: int = 16, prefix: str = "") -> Path:
    for split, count in SIZES.items():
        with ShardWriter(folder / split, shard_size=6) as writer:
            for i in range(count):
                buffer = io.BytesIO()
                Image.fromarray(picture(split, i, size)).save(buffer, "PNG")
                writer.write(f"{prefix}{split}{i}", buffer.getvalue(), "word " * (i % 5) + f"number {i}", {})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples with larger pictures."""
    return make_set(tmp_path_factory.mktemp("larger"), size=24)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other samples of the same number."""
    return make_set(tmp_path_factory.mktemp("other"), prefix="x")


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    """(N, 3, 16, 16) uint8 of each split."""
    return {split: np.stack([picture(split, i).transpose(2, 0, 1) for i in range(n)]) for split, n in SIZES.items()}
