"""Checkpoints that a thread writes: what they hold, and what becomes of a write that fails."""

import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip.artifact import read_manifest
from unclip.checkpoint import Writer, copied
from unclip.config import LoggerConfig, LoggerName, OptimConfig, Precision, TrainerConfig
from unclip.data.datamodule import DataConfig
from unclip.data.shapes import write_shapes
from unclip.errors import TrainingError
from unclip.models import CLIPConfig
from unclip.train import ClipTrainConfig, train


def test_a_copy_keeps_the_structure_and_shares_no_memory():
    weight = torch.arange(3.0)
    state = OrderedDict(a=weight, b=[weight, ("x", 2)], c={0: {"ema": weight}}, d=None)
    copy = copied(state)
    weight += 1
    assert isinstance(copy, OrderedDict)
    for value in (copy["a"], copy["b"][0], copy["c"][0]["ema"]):
        assert value.tolist() == [0, 1, 2]
    assert (copy["b"][1], copy["d"]) == (("x", 2), None)


def test_training_goes_on_while_the_file_is_written_and_the_old_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go, save = threading.Event(), torch.save

    def slowly(*arguments: Any) -> None:
        assert go.wait(20)
        save(*arguments)

    writer, weight, path = Writer(), torch.ones(2), tmp_path / "last.ckpt"
    writer.save_checkpoint({"weight": weight * 0}, path)
    writer.wait()
    monkeypatch.setattr(torch, "save", slowly)
    writer.save_checkpoint({"weight": weight}, path)
    weight += 1
    writer.check()
    assert torch.load(path, weights_only=True)["weight"].tolist() == [0, 0]
    go.set()
    writer.wait()
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def cfg(tmp_path: Path) -> ClipTrainConfig:
    write_shapes(tmp_path / "data", num=64, size=16, workers=1)
    small = {"embed_dim": 16, "image_size": 16, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}
    trainer = TrainerConfig(max_steps=6, batch_size=8, precision=Precision.fp32, checkpoint_every=2, num_samples=1)
    return ClipTrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(path=str(tmp_path / "data"), image_size=16, max_val=8),
        trainer=replace(trainer, log_every=1, val_every=2, peak_tflops=0.001),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        logger=LoggerConfig(name=LoggerName.csv),
        model=CLIPConfig(**small, text_width=32, text_layers=1, text_heads=2),  # type: ignore[arg-type]
    )


def test_a_write_that_fails_stops_the_run_and_the_same_command_goes_on(
    cfg: ClipTrainConfig, monkeypatch: pytest.MonkeyPatch
):
    whole = replace(cfg, run=cfg.run + "-whole")
    train(whole)
    save = torch.save

    def failing(checkpoint: Any, *arguments: Any) -> None:
        if checkpoint["global_step"] == 4:
            raise OSError(28, "No space left on device")
        save(checkpoint, *arguments)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(TrainingError, match=r"last\.ckpt could not be written"):
        train(cfg)
    monkeypatch.setattr(torch, "save", save)
    folder = Path(cfg.run) / "checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    train(cfg)
    assert read_manifest(Path(cfg.run)).hash == read_manifest(Path(whole.run)).hash
