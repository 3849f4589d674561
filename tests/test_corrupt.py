"""Damaged pictures in a training run: counted over resumptions, and too many of them stop it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests_support import TINY, run_command

from unclip.data.settings import DataConfig
from unclip.data.shards import ShardWriter
from unclip.errors import ConfigError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures, of which k3 is damaged."""
    folder = tmp_path_factory.mktemp("corrupt")
    with ShardWriter(folder / "data/train", shard_size=8) as writer:
        for i in range(16):
            buffer = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(buffer, "PNG")
            writer.write(f"k{i}", buffer.getvalue() if i != 3 else b"broken", f"{i}", {})
    return folder


def arguments(run: str, *more: str) -> list[str]:
    return ["train-upsampler", f"run={run}", "data.path=data", "data.val_split=null", *TINY["upsampler"], *more]


def test_replaced_samples_are_counted_over_resumptions(root: Path) -> None:
    for steps in (4, 8):  # 8 samples a step: two and four epochs
        said = run_command(*arguments("run", f"trainer.max_steps={steps}"), cwd=root)
        assert "k3: the picture cannot be decoded" in said
    rows = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines() if "data/read" in line]
    assert [(row["step"], row["data/read"], row["data/replaced"]) for row in rows] == [
        (step, 8 * step, step // 2) for step in (2, 4, 6, 8)
    ]


def test_too_many_replaced_samples_stop_the_run_with_their_keys(root: Path) -> None:
    said = run_command(*arguments("stopped", "data.max_corrupt=0.001"), cwd=root, code=1)
    assert "2 of 32 samples read from data are damaged or too small, more than data.max_corrupt=0.001 allows" in said
    assert "the last ones: k3, k3. `unclip data check` finds all of them" in said
    with pytest.raises(ConfigError, match=r"data\.max_corrupt=1\.5 is a share, from 0 to 1"):
        DataConfig(max_corrupt=1.5)
