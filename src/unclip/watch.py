"""Watching a run: speed, share of the device's peak, waiting for data, memory, loss spikes, stalls and a heartbeat."""

import faulthandler
import json
import logging
import os
import resource
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from unclip.config import OnSpike, Precision, TrainerConfig
from unclip.data.batch import Batch
from unclip.data.datamodule import UnclipData
from unclip.drafts import write_atomic
from unclip.errors import DivergedError
from unclip.stages.base import Stage

log = logging.getLogger(__name__)
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40": 181, "4090": 165, "3090": 71, "V100": 125}  # dense bf16 TFLOP/s
BEAT = 10.0  # seconds between two heartbeats
PAST, FEWEST = 20, 5  # log intervals whose losses a spike is compared with, and how many there must be


class Metrics(pl.Callback):
    """Every ``log_every`` steps, with one wait for the device: training losses, gradient norm, learning rate, samples a
    second, the share of the devices' peak, the share of the time spent waiting for batches, and the most memory used."""

    def __init__(self) -> None:
        self._start, self._count, self._waited = 0.0, 0, 0.0
        self._losses: deque[float] = deque(maxlen=PAST)
        self._flops = 0.0  # of one training step on this device
        self._peak = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(time.monotonic())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(time.monotonic())

    def _begin(self, now: float) -> None:
        self._start, self._count, self._waited = now, 0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Stage, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self._waited += time.monotonic() - pl_module.clock
        if not self._peak:
            self._peak = peak_flops(pl_module.device, pl_module.trainer_cfg)
            self._flops = step_flops(pl_module, batch)
            pl_module.clock = time.monotonic()
            self._begin(pl_module.clock)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:  # type: ignore[override]
        self._count += 1
        if trainer.global_step % pl_module.trainer_cfg.log_every:
            return
        pl_module.check_finite()
        data: UnclipData = trainer.datamodule  # type: ignore[attr-defined]
        losses = pl_module.averages()
        values: dict[str, float] = {**losses, **data.counts()}
        now = time.monotonic()
        spent = now - self._start
        values["train/samples_per_second"] = self._count * pl_module.trainer_cfg.batch_size / spent
        values["train/share_of_peak"] = self._count * self._flops / spent / self._peak
        values["train/data_wait_share"] = self._waited / spent
        values["train/memory_gb"] = memory_gb(pl_module.device)
        values["train/lr"] = pl_module.adamw.param_groups[0]["lr"]
        self._begin(now)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._check_spike(pl_module.trainer_cfg, losses, trainer.global_step)

    def _check_spike(self, cfg: TrainerConfig, losses: dict[str, float], step: int) -> None:
        """All ranks see the same means, so they agree."""
        if not cfg.spike_factor or not losses:
            return
        loss = sum(value for name, value in losses.items() if name != "train/grad_norm")
        usual = statistics.median(self._losses) if len(self._losses) >= FEWEST else 0.0
        self._losses.append(loss)
        if usual <= 0 or loss <= cfg.spike_factor * usual:
            return
        message = f"step {step}: the loss is {loss:.4g}, more than {cfg.spike_factor:g} x its usual {usual:.4g}"
        if cfg.on_spike is OnSpike.warn:
            log.warning("%s", message)
            return
        raise DivergedError(
            f"{message}. The last checkpoint, if any, is older. Run again with another seed or a lower optim.lr in another "
            "run=..., or go on from it with trainer.on_spike=warn"
        )


def memory_gb(device: torch.device) -> float:
    """The most memory that this process ever held, on the device or, without a GPU, in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step_flops(stage: Stage, batch: Batch) -> float:
    """Floating-point operations of one training step on this device: three times those of the losses' forward pass.

    Counted once, on a few samples, without gradients; frozen weights are counted as if they were trained.
    """
    part = batch.picked(list(range(min(len(batch), 4))))
    training = stage.model.training
    stage.model.eval()
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), stage.trainer.precision_plugin.forward_context(), counter:
        stage.model.losses(part, stage.noise(part))
    stage.model.train(training)
    return 3.0 * counter.get_total_flops() * len(batch) / len(part)


def peak_flops(device: torch.device, cfg: TrainerConfig) -> float:
    """Operations a second that the device can do: as set, as known for a GPU, or as a matrix product reaches."""
    if cfg.peak_tflops:
        return cfg.peak_tflops * 1e12
    if device.type == "cuda" and cfg.precision is Precision.bf16:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAKS.items():
            if part in name:
                return tflops * 1e12
    return measured_flops(device, torch.bfloat16 if cfg.precision is Precision.bf16 else torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2.0 * side**3 / best


class Watchdog(pl.Callback):
    """A thread that writes ``heartbeat.json`` (rank 0) and, when no step ends for ``stall_seconds``, prints the stacks of all
    threads. A rank that hangs holds up the others, so that each prints its own."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._step, self._rank, self._last = 0, 0, time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:  # type: ignore[override]
        self._step, self._rank, self._last = trainer.global_step, trainer.global_rank, time.monotonic()
        self._thread = threading.Thread(
            target=self._watch, args=(pl_module.trainer_cfg.stall_seconds,), name="unclip-watchdog", daemon=True
        )
        self._thread.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # type: ignore[override]
        self._step, self._last = trainer.global_step, time.monotonic()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, limit: float) -> None:
        told = -1.0  # the step's end after which the last stall was told
        wait = min(BEAT, limit / 4) if limit else BEAT
        while True:
            self._beat()
            quiet = time.monotonic() - self._last
            if limit and quiet > limit and told != self._last:
                told = self._last
                self._tell(quiet)
            if self._stop.wait(wait):
                self._beat()
                return

    def _beat(self) -> None:
        if self._rank == 0:
            now = {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 1), "step": self._step}
            now["seconds_since_step"] = round(time.monotonic() - self._last, 1)
            path = self.run / "heartbeat.json"
            try:
                write_atomic(path, (json.dumps(now) + "\n").encode())
            except OSError as error:  # a full disk: the checkpoint is what says so
                log.warning("%s could not be written (%s)", path, error)

    def _tell(self, quiet: float) -> None:
        """To standard error, and to a file of the run for those who see no other rank's output."""
        message = f"rank {self._rank}: no step for {quiet:.0f} s after step {self._step}; what each thread is doing:"
        log.warning("%s", message)
        with (self.run / f"stall-rank-{self._rank}.txt").open("a") as file:
            file.write(message + "\n")
            file.flush()
            faulthandler.dump_traceback(file)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)
