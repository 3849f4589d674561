"""What happens around training steps: progress, sheets, the time limit and signals."""

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unclip.checkpoint import Checkpoint
from unclip.data.datamodule import UnclipData
from unclip.ema import drop_after, save_snapshot
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.job_notes import STOPPED, note
from unclip.loggers import MlflowRun, WandbRun
from unclip.report.run import CAPTIONS
from unclip.stages.base import Stage
from unclip.stages.sharded import gathered

log = logging.getLogger(__name__)
PATIENCE = 3.0  # seconds after which another SIGINT is meant
LIMIT = 0.5  # the reason to stop that is no signal's number


class SampleSheet(pl.Callback):
    """Every ``sample_every`` steps: pictures for the first validation captions, by the averaged weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn_at = -1  # the step of the last sheet

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        if trainer.global_step % pl_module.trainer_cfg.sample_every == 0:
            self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Draw the sheet of this step, unless that is done."""
        if self._drawn_at == trainer.global_step:
            return
        self._drawn_at = trainer.global_step
        if not (trainer.is_global_zero or stage.is_sharded):  # of a sharded model, all ranks gather the weights
            return
        data: UnclipData = trainer.datamodule  # type: ignore[attr-defined]
        batch = data.sheet_batch(stage.trainer_cfg.num_samples).to(stage.device)
        optimizer: Any = trainer.optimizers[0]
        stage.eval()
        with torch.no_grad(), optimizer.ema_weights(), trainer.precision_plugin.forward_context():
            at_once = stage.sheet_rows or len(batch)
            rows = [row for part in batch.split(-(-len(batch) // at_once)) for row in stage.sheet(part)]
        stage.train()
        table = [(row.caption, [p.permute(1, 2, 0).numpy() for p in row.pictures]) for row in rows]
        if not trainer.is_global_zero:
            return
        picture = draw_table(table, stage.columns)
        path = self.folder / f"step-{trainer.global_step:08d}.png"
        save_picture(picture, path)
        (self.folder / CAPTIONS).write_text(json.dumps([row.caption for row in rows]) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_image("sheet", [picture], step=trainer.global_step)
            elif isinstance(logger, MlflowRun):
                logger.experiment.log_artifact(str(logger.run_id), str(path), "samples")
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("sheet", np.asarray(picture), trainer.global_step, dataformats="HWC")


class Snapshots(pl.Callback):
    """Keeps the power-function averages every ``ema_snapshot_every`` steps, for `unclip ema`."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        self.run = run
        drop_after(run, resumed_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        every = pl_module.optim_cfg.ema_snapshot_every
        if every and trainer.global_step % every == 0:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        stage = trainer.lightning_module
        assert isinstance(stage, Stage)
        optimizer: Any = trainer.optimizers[0]
        averages = {
            width: gathered(optimizer.profile(stage.model, i)) for i, width in enumerate(stage.optim_cfg.ema_profiles)
        }
        if averages and trainer.is_global_zero:
            save_snapshot(self.run, trainer.global_step, averages)


class StopOnLimitOrSignal(pl.Callback):
    """Ends training at ``max_minutes``; on SIGINT, SIGTERM or SIGUSR1 all ranks save after the same step and stop.

    The handler only sets a flag: saving inside it hangs a distributed run, whose other ranks may wait in a collective call.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM's: preemption, and the time limit

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self._hosts: Any = None  # the ranks' process group beside that of the devices
        self._insisting_from = 0.0  # time.monotonic()

    @contextmanager
    def listening(self, trainer: pl.Trainer) -> Iterator[None]:
        """Inside, from before the first step to after the artifact, signals are noted, and Lightning's own handler, which
        broadcasts from within, is not installed. SIGINT ends at once if the first one, seconds before, did not help: a launcher
        such as torchrun passes on what the terminal has sent already."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                if signal.getsignal(number) == self._note:  # not once it has stopped: then they are ignored
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT and time.monotonic() > self._insisting_from:
            raise KeyboardInterrupt
        if not self.received:
            self._insisting_from = time.monotonic() + PATIENCE
        self.received = number

    def stop_if_told(self, trainer: pl.Trainer) -> None:
        """Between two parts of what follows the last step. All ranks must call it alike."""
        if number := int(self._largest(trainer, self.received)):
            self._stop(trainer, number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        reason = self._largest(trainer, self.received or (LIMIT if pl_module.progress >= 1 else 0))
        if reason == LIMIT:
            trainer.should_stop = True
        elif reason:
            self._stop(trainer, int(reason))

    def _largest(self, trainer: pl.Trainer, value: float) -> float:
        """The largest value of all ranks, exchanged between the hosts: no GPU waits."""
        if trainer.world_size == 1:
            return value
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        mine = torch.tensor(float(value))
        dist.all_reduce(mine, dist.ReduceOp.MAX, self._hosts)
        return float(mine)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        """Save and end at once: there may be no time for a validation."""
        self.checkpoint.save(trainer)
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            note(run, STOPPED, signal=number, step=trainer.global_step)
            log.info("stopped by signal %d at step %d; the same command resumes %s", number, trainer.global_step, run)
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        trainer.strategy.barrier()
        raise SystemExit(128 + number)


class ProgressBar(pl.Callback):
    """A rich bar with the step and the time left on a terminal; log lines elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None
        self._next_line = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[step]}"))
            self._bar = Progress(*columns, *times, console=Console(stderr=True))
            self._bar.add_task(self.title, total=1.0, step="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        if self._bar is not None:
            text = f"step {trainer.global_step}"
            self._bar.update(self._bar.task_ids[0], completed=pl_module.progress, step=text)
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
