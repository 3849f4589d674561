"""A loss that is not finite stops a run before a checkpoint is spoilt, or is left out; its samples are written down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unclip import artifact
from unclip.config import LoggerConfig, LoggerName, OnNonfinite, OptimConfig, Precision, TrainerConfig
from unclip.data.datamodule import DataConfig
from unclip.data.shapes import write_shapes
from unclip.errors import ConfigError, TrainingError
from unclip.models import CLIPConfig
from unclip.models.clip import CLIP
from unclip.train import ClipTrainConfig, train

BAD_STEP = 3


@pytest.fixture
def cfg(tmp_path: Path) -> ClipTrainConfig:
    write_shapes(tmp_path / "data", num=64, size=16, workers=1)
    small = {"embed_dim": 16, "image_size": 16, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}
    return ClipTrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(path=str(tmp_path / "data"), image_size=16, max_val=8),
        trainer=TrainerConfig(max_steps=6, batch_size=8, precision=Precision.fp32, checkpoint_every=2, num_samples=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        logger=LoggerConfig(name=LoggerName.none),
        model=CLIPConfig(**small, text_width=32, text_layers=1, text_heads=2),
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes the training loss of step BAD_STEP NaN; collects the keys of its batch."""
    keys: list[list[str]] = []
    losses = CLIP.losses

    def spoil(model, batch, noise=None):
        found = losses(model, batch, noise)
        if model.training and batch.position[0] == BAD_STEP * len(batch):
            keys.append(batch.key)
            found = {name: value * torch.nan for name, value in found.items()}
        return found

    monkeypatch.setattr(CLIP, "losses", spoil)
    return keys


def test_a_run_stops_with_a_whole_checkpoint_and_the_keys(cfg: ClipTrainConfig, poisoned: list[list[str]]) -> None:
    with pytest.raises(TrainingError, match=r"nonfinite\.jsonl"):
        train(cfg)
    run = Path(cfg.run)
    (row,) = map(json.loads, (run / "nonfinite.jsonl").read_text().splitlines())
    assert (row["step"], row["keys"]) == (BAD_STEP, poisoned[0])
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert not (run / "artifact").exists()


def test_the_same_run_goes_on_with_such_steps_left_out(cfg: ClipTrainConfig, poisoned: list[list[str]]) -> None:
    with pytest.raises(TrainingError):
        train(cfg)
    cfg = replace(cfg, trainer=replace(cfg.trainer, on_nonfinite=OnNonfinite.skip))
    train(cfg)
    model, manifest, *_ = artifact.load(Path(cfg.run), kind="clip")
    assert manifest.step == 6
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(poisoned) == 2
    assert len((Path(cfg.run) / "nonfinite.jsonl").read_text().splitlines()) == 2


def test_batch_norms_are_not_trained_on_with_steps_left_out(cfg: ClipTrainConfig) -> None:
    """A NaN in an activation would stay in their running statistics."""
    cfg.model = CLIPConfig(image_size=32, vision_width=4, vision_blocks=[1, 1, 1, 1])
    cfg.trainer.on_nonfinite = OnNonfinite.skip
    with pytest.raises(ConfigError, match="whose statistics a NaN spoils for good: take stop"):
        train(cfg)
