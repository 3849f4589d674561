"""What happens around training steps: progress, sheets, the time limit and signals."""

import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unclip.checkpoint import Checkpoint
from unclip.data.datamodule import UnclipData
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.loggers import MlflowRun, WandbRun
from unclip.stages.base import Stage

log = logging.getLogger(__name__)


class SampleSheet(pl.Callback):
    """Every ``sample_every`` steps: pictures for the first validation captions, by the averaged weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        if trainer.global_step % pl_module.trainer_cfg.sample_every == 0:
            self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, stage: Stage) -> None:
        if not (trainer.is_global_zero or stage.is_sharded):  # of a sharded model, all ranks gather the weights
            return
        data: UnclipData = trainer.datamodule  # type: ignore[attr-defined]
        batch = data.sheet_batch(stage.trainer_cfg.num_samples).to(stage.device)
        optimizer: Any = trainer.optimizers[0]
        stage.eval()
        with torch.no_grad(), optimizer.ema_weights(), trainer.precision_plugin.forward_context():
            rows = stage.sheet(batch)
        stage.train()
        table = [(row.caption, [p.permute(1, 2, 0).numpy() for p in row.pictures]) for row in rows]
        if not trainer.is_global_zero:
            return
        picture = draw_table(table, stage.columns)
        path = self.folder / f"step-{trainer.global_step:08d}.png"
        save_picture(picture, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_image("sheet", [picture], step=trainer.global_step)
            elif isinstance(logger, MlflowRun):
                logger.experiment.log_artifact(str(logger.run_id), str(path), "samples")
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("sheet", np.asarray(picture), trainer.global_step, dataformats="HWC")


class StopOnLimitOrSignal(pl.Callback):
    """Ends training at ``max_minutes``; on SIGINT or SIGTERM saves at the next step's end and stops.

    The handler only sets a flag: saving inside it can hang a distributed run.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        agree = trainer.strategy.reduce_boolean_decision
        if agree(self.received is not None, all=False):
            self.checkpoint.save(trainer)
            trainer.should_stop = True
        elif agree(pl_module.progress >= 1, all=False):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class ProgressBar(pl.Callback):
    """A rich bar with the loss and the time left on a terminal; log lines elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None
        self._next_line = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
            self._bar = Progress(*columns, *times, transient=False)
            self._bar.add_task(self.title, total=1.0, loss="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        if self._bar is not None:
            text = f"step {trainer.global_step}"
            self._bar.update(self._bar.task_ids[0], completed=pl_module.progress, loss=text)
        elif trainer.is_global_zero and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 30
            left = pl_module.seconds * (1 - pl_module.progress) / max(pl_module.progress, 1e-9)
            log.info(
                "%s: step %d, %.0f %%, %.0f s left", self.title, trainer.global_step, 100 * pl_module.progress, left
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()
