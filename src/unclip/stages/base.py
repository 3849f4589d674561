"""What every stage shares: one optimiser step, validation with averaged weights, and a sheet of pictures."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor

from unclip.config import OnNonfinite, OptimConfig, TrainerConfig
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import DivergedError
from unclip.optim import (
    AdamWEMA,
    clip_gradients,
    learning_rate,
    make_optimizer,
    no_optimizer,
    perturbed,
    resting_statistics,
)
from unclip.stages.sharded import average_scalars, shard


@dataclass
class Row:
    """One line of a sheet: a caption and uint8 pictures (3, H, W), of any sizes."""

    caption: str
    pictures: list[Tensor] = field(default_factory=list)


class Stage(pl.LightningModule):
    """Trains ``model`` by manual optimisation.

    Every random number of step s depends on the run's seed and on the global positions of its samples (dropout masks: on
    the seed, s and the rank), so a resumed run continues bit for bit.
    """

    columns: tuple[str, ...] = ()  # headings of the sheet's pictures
    sheet_rows = 4  # samples of a sheet that are drawn at once; 0: all

    def __init__(self, model: Any, trainer_cfg: TrainerConfig, optim_cfg: OptimConfig, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.trainer_cfg, self.optim_cfg, self.seed = trainer_cfg, optim_cfg, seed
        self.seconds = 0.0  # spent training, over all resumptions
        self.clock = time.monotonic()  # the end of the last step, or of the validation after it
        self._sums: dict[str, Tensor] = {}
        self._count = 0  # steps in the sums
        self._unchecked: list[
            tuple[int, Sequence[str], Tensor]
        ] = []  # step, keys, a number that is finite if all is well
        self._swap = contextlib.ExitStack()
        self._val_sums: dict[str, Tensor] = {}
        self._val_counts: dict[str, int] = {}
        self.validated_at = -1  # the step of the last validation, and what it found
        self.val_metrics: dict[str, float] = {}
        self.is_sharded = False
        self._rehearsed = self._rehearsing = False
        self.bind()

    def bind(self) -> None:
        """Take the model's methods as they are now: sharding replaces them."""
        self._losses = torch.compile(self.model.losses) if self.trainer_cfg.compile else self.model.losses

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.is_sharded:
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"], self.trainer_cfg.precision)
            self.is_sharded = True
            self.bind()

    def configure_optimizers(self) -> AdamWEMA:
        return make_optimizer(self.model, self.optim_cfg) if self.model.cfg.trains else no_optimizer(self.optim_cfg)

    @property
    def adamw(self) -> AdamWEMA:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, AdamWEMA)
        return optimizer

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]: by steps or by minutes, whichever is further."""
        by_steps = self.global_step / self.trainer_cfg.max_steps
        minutes = self.trainer_cfg.max_minutes
        return min(1.0, max(by_steps, self.seconds / (60 * minutes) if minutes else 0.0))

    def noise(self, batch: Batch) -> Noise:
        return Noise.at(self.seed, batch.position, self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Before the first step of this process: the same gradients once more, for nothing, where more than two ranks sum them.

        DDP lays its gradients out anew after its first pass, in the order in which they came. The sum over more than two ranks is
        taken in an order that depends on the place in that layout, so a resumed run would round its first step otherwise than
        an undisturbed one does.
        """
        first, self._rehearsed = not self._rehearsed, True
        if first and isinstance(self.trainer.strategy, DDPStrategy) and self.trainer.world_size > 2:
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            self._rehearsing = True
            self.trainer.strategy.training_step(batch, batch_idx)
            self._rehearsing = False
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self._rehearsing:
            self._backward(batch)
            self.adamw.zero_grad(set_to_none=True)
            return
        terms = self._gradients(batch)
        if self.is_sharded:
            average_scalars(self.model)
        loss = torch.stack(list(terms.values())).sum()
        norm = clip_gradients(list(self.model.parameters()), self.optim_cfg.grad_clip)
        self._unchecked.append((self.global_step, batch.key, loss.detach() + norm))
        skipped = self.trainer_cfg.on_nonfinite is OnNonfinite.skip and self._any_nonfinite()
        if skipped:
            self.adamw.zero_grad(set_to_none=True)  # the step counts, and changes nothing
        for group in self.adamw.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(self.optim_cfg, self.global_step, self.progress)
        self.optimizers().step()  # type: ignore[union-attr]
        self.adamw.zero_grad(set_to_none=True)
        self._remember({} if skipped else {**terms, "grad_norm": norm})

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Fill the gradients of one step; returns the terms of the loss."""
        if not self.optim_cfg.sam_rho:
            return self._backward(batch)
        with self._unsynced():  # each rank climbs by its own gradient, as in the paper
            terms = self._backward(batch)
        with perturbed(list(self.model.parameters()), self.optim_cfg.sam_rho), resting_statistics(self.model):
            self._backward(batch)
        return terms

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradients of the batch's loss, part by part."""
        sums: dict[str, Tensor] = {}
        parts = batch.split(self.trainer_cfg.accumulate)
        for i, part in enumerate(parts):
            self.seed_dropout(i)
            terms = {
                name: value * (len(part) / len(batch)) for name, value in self._losses(part, self.noise(part)).items()
            }
            with self._unsynced(i < len(parts) - 1):
                self.manual_backward(torch.stack(list(terms.values())).sum())
            sums = {name: value.detach() + sums.get(name, 0) for name, value in terms.items()}
        return sums

    def seed_dropout(self, part: int) -> None:
        """The same masks whenever this part of this step is computed."""
        torch.manual_seed(_hash(self.seed, self.global_step, self.global_rank, *([part] if part else [])))

    def _unsynced(self, yes: bool = True) -> contextlib.AbstractContextManager[None]:
        """Where DDP keeps the gradients of a backward pass to their rank."""
        strategy = self.trainer.strategy
        return (
            strategy.block_backward_sync()
            if yes and isinstance(strategy, ParallelStrategy)
            else contextlib.nullcontext()
        )

    def on_fit_start(self) -> None:
        self.validated_at, self.val_metrics = self.trainer.strategy.broadcast((self.validated_at, self.val_metrics))

    def on_train_start(self) -> None:
        """A run that ended between a checkpoint and the validation that was due then has it before it goes on."""
        step = self.global_step
        if step and step % self.trainer_cfg.val_every == 0 and self.validated_at != step:
            self.trainer.validating = True
            val_loop = self.trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            val_loop.run()
            self.trainer.training = True
        self.clock = time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def check_finite(self) -> None:
        """Raise DivergedError if a step since the last check had a loss or gradient that is not finite; one host sync."""
        if self._any_nonfinite():
            raise DivergedError(
                f"the loss or its gradient is not finite; step and keys of its samples are in {self._nonfinite}. The last "
                "checkpoint, if any, is older and whole. Look at the samples; leave such steps out with "
                "trainer.on_nonfinite=skip, or start another run with a lower optim.lr or trainer.precision=fp32"
            )

    def _any_nonfinite(self) -> bool:
        """Whether an unchecked step is not finite on any rank; the first on each is written down with its samples."""
        unchecked, self._unchecked = self._unchecked, []
        values = torch.stack([value for *_, value in unchecked]) if unchecked else torch.zeros(1)
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            step, keys, _ = unchecked[bad[0]]
            with self._nonfinite.open("a") as file:
                file.write(json.dumps({"step": step, "rank": self.global_rank, "keys": list(keys)}) + "\n")
        return self.trainer.strategy.reduce_boolean_decision(bool(bad), all=False)

    @property
    def _nonfinite(self) -> Path:
        return Path(self.trainer.default_root_dir) / "nonfinite.jsonl"

    def _remember(self, terms: dict[str, Tensor]) -> None:
        self._count += bool(terms)
        for name, value in terms.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def averages(self) -> dict[str, float]:
        """Means of the training terms since the last call over all ranks, without skipped steps; a host sync."""
        sums, count = self._sums, self._count
        self._sums, self._count = {}, 0
        if not sums:
            return {}
        totals: Any = self.trainer.strategy.reduce(torch.stack(list(sums.values())).float(), reduce_op="mean")
        return {f"train/{name}": total / count for name, total in zip(sums, totals.tolist(), strict=True)}

    # Validation: averaged weights, fixed noise (a sample's position in validation is its index).

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self._swap.enter_context(self.adamw.ema_weights())
        self._val_sums, self._val_counts = {}, {}
        self.start_validation()

    def on_validation_end(self) -> None:
        self._swap.close()
        self.validated_at = self.global_step
        found = self.trainer.callback_metrics
        self.val_metrics = {name: float(value) for name, value in found.items() if name.startswith("val/")}
        for logger in self.trainer.loggers:  # Lightning would log them one step low: it has not counted this one yet
            logger.log_metrics(self.val_metrics, step=self.global_step)
        self.clock = time.monotonic()

    def start_validation(self) -> None:
        """Hook for stages that gather something over the validation set."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for name, value in self.model.losses(batch, self.noise(batch)).items():
            self.add_mean(name, value, len(batch))

    def add_mean(self, name: str, value: Tensor, size: int) -> None:
        """The mean of a figure over ``size`` samples of validation."""
        self._val_sums[name] = self._val_sums.get(name, 0) + value.detach().float() * size
        self._val_counts[name] = self._val_counts.get(name, 0) + size

    def on_validation_epoch_end(self) -> None:
        """Log the means over the samples of all ranks. Lightning's own divide by a mean count, cut to an integer."""
        for name, total in self._val_sums.items():
            both = torch.stack([total, total.new_tensor(self._val_counts[name])])
            total, count = self.trainer.strategy.reduce(both, reduce_op="sum")
            self.found({name: total / count})

    def found(self, values: Mapping[str, Any]) -> None:
        """Figures of this validation, of all ranks together; their names get the prefix ``val/``."""
        self.log_dict({f"val/{name}": value for name, value in values.items()}, logger=False)

    def sheet(self, batch: Batch) -> list[Row]:
        """Rows to show for a validation batch; called with averaged weights, in eval mode and without gradients."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds = checkpoint["seconds"]


def _hash(*numbers: int) -> int:
    """A 63-bit seed from several integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
