"""Watching a run: operations counted, spikes told, stalls with stacks, a heartbeat."""

import json
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclip.config import OnSpike, TrainerConfig
from unclip.data.batch import Batch
from unclip.errors import DivergedError
from unclip.watch import Metrics, Watchdog, peak_flops, step_flops


class Layer(nn.Module):
    """Twenty rows by thirty columns, on each sample's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(20, 30, bias=False), nn.Dropout(0.5)

    def losses(self, batch: Batch, noise: Any) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {"sum": self.dropout(self.inner(batch.column("image_emb"))).sum()}


def test_the_operations_of_a_step_are_three_forward_passes_and_change_nothing():
    stage: Any = SimpleNamespace(model=Layer().train(), noise=lambda batch: None)
    stage.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch = Batch(image_emb=torch.ones(6, 20), position=list(range(6)))
    assert step_flops(stage, batch) == 3 * 2 * 6 * 20 * 30
    assert stage.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_is_what_the_settings_say_or_a_measured_product():
    assert peak_flops(torch.device("cpu"), TrainerConfig(peak_tflops=2.0)) == 2e12
    assert 1e8 < peak_flops(torch.device("cpu"), TrainerConfig()) < 1e15


def test_a_loss_spike_is_told_or_stops_the_run(caplog: pytest.LogCaptureFixture):
    cfg, metrics = TrainerConfig(), Metrics()
    for step, loss in enumerate([9.0, 1.0, 1.1, 0.9, 1.0, 1.2, 2.9]):
        metrics._check_spike(cfg, {"train/mse": loss, "train/grad_norm": 50.0}, step)
    assert not caplog.records, "the first losses are high, and 2.9 is below three times the median"
    metrics._check_spike(cfg, {"train/mse": 3.4, "train/grad_norm": 50.0}, 7)
    assert "step 7: the loss is 3.4, more than 3 x its usual 1.1" in caplog.text
    with pytest.raises(DivergedError, match=r"step 8: the loss is 40, .* or go on from it with trainer\.on_spike=warn"):
        metrics._check_spike(replace(cfg, on_spike=OnSpike.stop), {"train/mse": 40.0}, 8)
    metrics._check_spike(replace(cfg, spike_factor=0.0, on_spike=OnSpike.stop), {"train/mse": 1e9}, 9)


def test_the_figures_of_speed_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch):
    """Four steps of 8 samples in 2 s, of which 0.5 s were spent waiting for batches; 10 operations a step, at most 100 a second."""
    now = [100.0]
    monkeypatch.setattr("unclip.watch.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("unclip.watch.peak_flops", lambda *_: 100.0)
    monkeypatch.setattr("unclip.watch.step_flops", lambda *_: 10.0)
    told: list[dict[str, float]] = []
    metrics = Metrics()
    trainer: Any = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(counts=dict))
    trainer.loggers = [SimpleNamespace(log_metrics=lambda values, step: told.append({"step": step, **values}))]
    stage: Any = SimpleNamespace(clock=100.0, device=torch.device("cpu"), check_finite=lambda: None)
    stage.trainer_cfg = TrainerConfig(log_every=4, batch_size=8, on_spike=OnSpike.stop)
    stage.adamw = SimpleNamespace(param_groups=[{"lr": 0.5}])
    stage.averages = lambda: {"train/mse": 100.0 if trainer.global_step == 28 else 1.0}
    metrics.on_train_start(trainer, stage)

    def interval() -> None:
        for _ in range(4):
            stage.clock = now[0]
            now[0] += 0.125
            metrics.on_train_batch_start(trainer, stage, None, 0)  # type: ignore[arg-type]
            now[0] += 0.375
            trainer.global_step += 1
            metrics.on_train_batch_end(trainer, stage, None, None, 0)  # type: ignore[arg-type]

    for _ in range(6):
        interval()
    assert [row["step"] for row in told] == [4, 8, 12, 16, 20, 24]
    for row in told[1:]:  # before the first the operations are counted, off the clock
        assert row["train/samples_per_second"] == 16
        assert row["train/share_of_peak"] == pytest.approx(4 * 10 / 2 / 100)
        assert row["train/data_wait_share"] == 0.25
        assert row["train/lr"] == 0.5
    with pytest.raises(DivergedError, match="step 28: the loss is 100"):
        interval()


def watched(watchdog: Watchdog, rank: int, limit: float) -> tuple[Any, Any]:
    trainer: Any = SimpleNamespace(global_step=3, global_rank=rank)
    stage: Any = SimpleNamespace(trainer_cfg=TrainerConfig(stall_seconds=limit))
    watchdog.on_train_start(trainer, stage)
    return trainer, stage


def wait_for(path: Path, text: str) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and text in (said := path.read_text()):
            return said
        time.sleep(0.02)
    raise AssertionError(f"{path} never held {text!r}")


def test_a_stall_prints_the_stacks_once_and_again_after_another_step(tmp_path: Path):
    watchdog = Watchdog(tmp_path)
    trainer, stage = watched(watchdog, rank=1, limit=0.2)
    said = wait_for(tmp_path / "stall-rank-1.txt", "in wait_for")
    assert re.match(r"rank 1: no step for \d+ s after step 3; what each thread is doing:", said)
    trainer.global_step = 4
    watchdog.on_train_batch_end(trainer, stage, None, None, 0)
    wait_for(tmp_path / "stall-rank-1.txt", "after step 4")
    watchdog.on_train_end(trainer, stage)
    assert (tmp_path / "stall-rank-1.txt").read_text().count("no step for") == 2
    assert not (tmp_path / "heartbeat.json").exists(), "that is rank 0's"


def test_the_heartbeat_holds_the_step(tmp_path: Path):
    watchdog = Watchdog(tmp_path)
    trainer, stage = watched(watchdog, rank=0, limit=0.0)
    assert json.loads(wait_for(tmp_path / "heartbeat.json", '"step": 3'))["pid"] > 0
    trainer.global_step = 5
    watchdog.on_train_batch_end(trainer, stage, None, None, 0)
    watchdog.on_train_end(trainer, stage)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert beat["step"] == 5
    assert abs(beat["time"] - time.time()) < 60
    assert not list(tmp_path.glob("stall*"))
