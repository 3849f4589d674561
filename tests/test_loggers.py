"""What a run logs, and at which step."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import cfg  # noqa: F401  the fixture

from unclip.artifact import read_manifest
from unclip.config import LoggerConfig, LoggerName
from unclip.data.embed import EmbedConfig, embed
from unclip.data.embeddings import Embeddings
from unclip.data.shards import Shards
from unclip.stages.clip import ClipStage
from unclip.train import ClipTrainConfig, train


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_steps_and_figures_of_jsonl_and_csv(cfg: ClipTrainConfig):  # noqa: F811
    train(cfg)
    run = Path(cfg.run)
    rows = logged(run)
    losses = [row for row in rows if "train/contrastive" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/contrastive" in row] == [2, 4, 6], "a validation stands at its step"
    for row in losses:
        assert row["train/share_of_peak"] > 0
        assert 0 <= row["train/data_wait_share"] <= 1
        assert 0.01 < row["train/memory_gb"] < 100
        assert row["train/grad_norm"] > 0
        assert row["train/samples_per_second"] > 0
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items() if value} for row in table] == rows
    assert json.loads((run / "heartbeat.json").read_text())["step"] == 6


def test_tensorboard_holds_every_step_of_a_resumed_run_once(
    cfg: ClipTrainConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    cfg = replace(cfg, logger=LoggerConfig(name=LoggerName.tensorboard), trainer=replace(cfg.trainer, sample_every=2))

    def dying(stage: ClipStage, *args: Any) -> None:
        if stage.global_step == 5:
            raise KeyError("killed one step after a checkpoint")

    with monkeypatch.context() as context:
        context.setattr(ClipStage, "on_train_batch_start", dying)
        with pytest.raises(KeyError, match="killed"):
            train(cfg)
    run = Path(cfg.run)
    first = {path.name for path in (run / "tensorboard").iterdir()}
    assert max(row["step"] for row in logged(run)) == 5
    train(cfg)
    assert {path.name for path in (run / "tensorboard").iterdir()} > first
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    rows = logged(run)
    figures = {name for row in rows for name in row} - {"step", "seconds"}
    assert {"train/contrastive", "val/contrastive"} <= figures
    assert figures == set(events.Tags()["scalars"]) - {"epoch"}
    for name in figures:
        wanted = {row["step"]: row[name] for row in rows if name in row}
        found = events.Scalars(name)
        assert [event.step for event in found] == sorted(wanted)
        assert [event.value for event in found] == pytest.approx([wanted[step] for step in sorted(wanted)])
    sheets = events.Images("sheet")
    assert [sheet.step for sheet in sheets] == [2, 4, 6]
    for sheet in sheets:
        drawn = np.asarray(Image.open(run / "samples" / f"step-{sheet.step:08d}.png").convert("RGB"))
        shown = Image.open(io.BytesIO(sheet.encoded_image_string)).convert("RGB")
        assert np.array_equal(np.asarray(shown), drawn)


def test_the_recall_of_a_clip_is_that_of_its_artifacts_embeddings(cfg: ClipTrainConfig):  # noqa: F811
    cfg = replace(cfg, data=replace(cfg.data, max_val=64))
    train(cfg)
    run = Path(cfg.run)
    folder = embed(EmbedConfig(run=str(run.parent / "embeddings"), clip=cfg.run, data=cfg.data.path, splits=["val"]))
    columns = Embeddings(folder, "val")
    shards = Shards(Path(cfg.data.path) / "val")
    captions = [shards.caption(i) for i in range(len(shards))]
    pictures, texts = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (columns.column("image_emb").astype(np.float64), columns.column("text_emb").astype(np.float64))
    )
    distinct = sorted(set(captions))
    told = {captions[i]: texts[i] for i in reversed(range(len(captions)))}
    nearest_captions = [sorted(distinct, key=lambda caption: -(picture @ told[caption])) for picture in pictures]
    nearest_pictures = [np.argsort(-pictures @ text) for text in texts]
    metrics = read_manifest(run).metrics
    for k in (1, 5):
        found = np.mean([caption in near[:k] for caption, near in zip(captions, nearest_captions, strict=True)])
        assert metrics[f"val/image_to_text_recall_{k}"] == pytest.approx(found)
        found = np.mean(
            [
                caption in {captions[i] for i in near[:k]}
                for caption, near in zip(captions, nearest_pictures, strict=True)
            ]
        )
        assert metrics[f"val/text_to_image_recall_{k}"] == pytest.approx(found)
    assert 0 < metrics["val/text_to_image_recall_5"] < 1, "a share that says something"
