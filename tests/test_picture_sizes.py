"""Pictures of many sizes, as people have them: every stage cuts them to its own, and none learns to draw from enlarged ones."""

from pathlib import Path

import pytest
from picture_sets import noise
from ranks import train_all
from tests_support import TINY, run_command

from unclip.data.shards import ShardWriter
from unclip.errors import DataError

SIDES = [(64, 40), (40, 64), (48, 48), (90, 33), (32, 32)]
PLAIN = ["data.path=data", "logger=none", "trainer.accelerator=cpu", "trainer.sample_every=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sizes")
    for split, count in (("train", 40), ("val", 8)):
        with ShardWriter(root / "data" / split) as writer:
            for i in range(count):
                kind = ("PNG", "JPEG")[i % 2]
                writer.write(f"{split}{i}", noise(i, SIDES[i % 5], kind), f"picture number {i}", {})
    return root


def without_size(stage: str) -> list[str]:
    return [setting for setting in TINY[stage] if not setting.startswith("data.image_size")]


def test_every_stage_takes_them_without_being_told_a_size(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    train_all([("clip", ["run=clip", *without_size("clip"), *PLAIN])])
    run_command("unclip-embed", "run=embeddings", "clip=clip", "data=data", cwd=root)
    embedded = [*PLAIN, "data.embeddings=embeddings"]
    train_all([(stage, [f"run={stage}", *without_size(stage), *embedded]) for stage in ("prior", "decoder")])
    train_all([("upsampler", ["run=upsampler", *without_size("upsampler"), *PLAIN])])
    for stage in ("clip", "prior", "decoder", "upsampler"):
        assert (root / stage / "artifact").is_dir()
        assert list((root / stage / "samples").glob("*.png"))


def test_smaller_ones_are_left_out_of_drawing_unless_they_are_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Three of five have a side below 40; more than 10 of them stop the run."""
    monkeypatch.chdir(root)
    larger = [*without_size("upsampler"), *PLAIN, "model.low_size=20", "model.image_size=40", "trainer.max_steps=8"]
    with pytest.raises(DataError, match=r"damaged or too small, more than data\.max_corrupt=0\.01 allows"):
        train_all([("upsampler", ["run=refused", *larger])])
    assert "32x32 pixels, too few for a square of 40: leave such pictures out" in caplog.text
    train_all([("upsampler", ["run=taken", *larger, "data.enlarge=true"])])
    train_all([("upsampler", ["run=without", *larger, "data.max_corrupt=1"])])
