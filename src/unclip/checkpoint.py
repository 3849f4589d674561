"""``last.ckpt``: copied in memory at an optimiser step's end, written by a thread while training goes on."""

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from unclip.errors import TrainingError
from unclip.stages.base import Stage
from unclip.stages.parts import AnyCheckpoint, drop_older

FROM_TORCH = ("PytorchStreamWriter", "inline_container")  # how torch says that a file could not be written


class Writer(AnyCheckpoint):
    """Writes one checkpoint at a time in a thread, to a draft that replaces the old file once it is on disk.

    Lightning calls it on rank 0. A write that failed is raised by the next ``check``, ``wait`` or ``save_checkpoint``.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        copy = copied(checkpoint)
        self._thread = threading.Thread(target=self._write, args=(copy, Path(path)), name="unclip-checkpoint")
        self._thread.start()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        draft = path.with_suffix(".tmp")
        try:
            torch.save(checkpoint, draft)  # to a path: that writes without holding up other threads
            move_whole(draft, path)
            drop_older(path)
        except BaseException as error:  # noqa: BLE001  raised by check()
            draft.unlink(missing_ok=True)
            self._error = error

    def check(self) -> None:
        """Raise what a write that has ended raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def move_whole(draft: Path, path: Path) -> None:
    """Replace ``path`` by ``draft`` once that is on disk."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def copied(value: Any) -> Any:
    """The same nested dicts, lists and tuples with their tensors on the CPU, sharing no memory with the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(copied(inner) for inner in value)
    return value


class Checkpoint(pl.Callback):
    """``last.ckpt`` every ``checkpoint_every`` steps, replaced in one move: a kill at any moment leaves a whole one."""

    def __init__(self, path: Path) -> None:
        self.path, self.writer = path, Writer()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        self._told(self.writer.check)
        if trainer.global_step % pl_module.trainer_cfg.checkpoint_every == 0:
            self.begin(trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """Copy the state; it is on disk some time later. A sharded model's is gathered into the file, while all ranks wait."""
        stage = trainer.lightning_module
        assert isinstance(stage, Stage)
        stage.check_finite()
        if stage.is_sharded:
            self._told(lambda: self._save_now(trainer))
        else:
            self._told(lambda: trainer.save_checkpoint(self.path, weights_only=False))  # optimiser and position too

    def _save_now(self, trainer: pl.Trainer) -> None:
        draft = self.path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(draft, weights_only=False)
            if trainer.is_global_zero:
                move_whole(draft, self.path)
                drop_older(self.path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def save(self, trainer: pl.Trainer) -> None:
        """As :meth:`begin`, and wait until it is on disk."""
        self.begin(trainer)
        self._told(self.writer.wait)
        trainer.strategy.barrier("checkpoint")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.writer._thread is not None:
            self.writer._thread.join()  # the last one of before; what it raised matters less than this exception

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not any(mark in str(error) for mark in FROM_TORCH):
                raise
            raise TrainingError(
                f"{self.path} could not be written ({error}); the checkpoint before it, if any, is whole. "
                f"Free disk space there and in {tempfile.gettempdir()}, and run the same command again"
            ) from error
