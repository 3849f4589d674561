"""Train one stage: set up, fit or resume, validate, draw, export."""

import logging
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from unclip import artifact
from unclip.callbacks import ProgressBar, SampleSheet, Snapshots, StopOnLimitOrSignal
from unclip.checkpoint import Checkpoint
from unclip.config import LoggerConfig, OptimConfig, Precision, TrainerConfig, to_plain
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.degrade import Degrade
from unclip.errors import ConfigError
from unclip.job_notes import ERROR
from unclip.loggers import JsonlLogger, MlflowRun, WandbRun, make_loggers
from unclip.models import (
    CLIP,
    CLIPConfig,
    DecoderConfig,
    EclipsePriorConfig,
    ModelConfig,
    UpsamplerConfig,
    build,
    name_of,
)
from unclip.models.interface import PriorConfig
from unclip.models.lora import add_lora, merge_lora
from unclip.models.pictures import Bsr
from unclip.report.run import report_quietly
from unclip.run_lock import RunLock
from unclip.run_settings import compare_settings, write_settings
from unclip.stages.base import Stage
from unclip.stages.clip import ClipStage
from unclip.stages.decoder import DecoderStage
from unclip.stages.parts import read_last
from unclip.stages.prior import PriorStage
from unclip.stages.sharded import Sharded
from unclip.stages.upsampler import UpsamplerStage
from unclip.tensor_file import write_tensors
from unclip.tuning import note_parent, parents_of, start_from
from unclip.watch import Metrics, Watchdog

log = logging.getLogger(__name__)
for _name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):  # they raise their own level when imported
    logging.getLogger(_name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
warnings.filterwarnings(
    "ignore", message="It is recommended to use `self.log"
)  # those figures are of all ranks already


@dataclass
class TrainConfig:
    """One training run. ``run`` is its folder; the same command again resumes it."""

    run: str
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")
        if self.optim.sam_rho and self.trainer.strategy == "fsdp2":
            raise ConfigError(
                "optim.sam_rho with trainer.strategy=fsdp2: each rank climbs by its own whole gradient, "
                "which sharded training never has; take trainer.strategy=ddp, or optim.sam_rho=0"
            )
        if self.optim.muon_lr and self.trainer.strategy == "fsdp2":
            raise ConfigError(
                "optim.muon_lr with trainer.strategy=fsdp2: Muon needs whole matrices, of which each rank has a share; take "
                "trainer.strategy=ddp, or optim.muon_lr=0"
            )


@dataclass
class ClipTrainConfig(TrainConfig):
    model: CLIPConfig = field(default_factory=CLIPConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.lora_rank and self.trainer.strategy == "fsdp2":
            raise ConfigError(
                "model.lora_rank with trainer.strategy=fsdp2: adapters compute their layers' weights anew in each pass, which "
                "sharded layers do not allow; take trainer.strategy=ddp"
            )


@dataclass
class TunableTrainConfig(TrainConfig):
    """``init``: a run or artifact to start from, with its weights, statistics and settings of the model; those that are given
    here come on top. ``lora_rank`` > 0 trains low-rank additions to its matrices; the artifact holds the sum."""

    init: str | None = None
    lora_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0 or (self.lora_rank and self.init is None):
            raise ConfigError(
                f"lora_rank={self.lora_rank} adds to trained weights: give init=RUN beside it, or set it to 0"
            )
        if self.lora_rank and self.trainer.strategy == "fsdp2":
            raise ConfigError("lora_rank with trainer.strategy=fsdp2 is untested: take trainer.strategy=ddp")
        if self.lora_rank and self.optim.ema_profiles:
            raise ConfigError(
                "optim.ema_profiles averages whole weights, which lora_rank does not train: leave one out"
            )


@dataclass
class PriorTrainConfig(TunableTrainConfig):
    model: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainer.accumulate > 1 and isinstance(self.model, EclipsePriorConfig) and self.model.contrast:
            raise ConfigError(
                "trainer.accumulate with eclipse_prior: its contrast is among the whole batch; take 1, or model.contrast=0"
            )


@dataclass
class DecoderTrainConfig(TunableTrainConfig):
    model: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class UpsamplerTrainConfig(TunableTrainConfig):
    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)


STAGES: dict[type[TrainConfig], tuple[str, type[Stage]]] = {
    ClipTrainConfig: ("clip", ClipStage),
    PriorTrainConfig: ("prior", PriorStage),
    DecoderTrainConfig: ("decoder", DecoderStage),
    UpsamplerTrainConfig: ("upsampler", UpsamplerStage),
}
CONFIGS = {kind: config for config, (kind, _) in STAGES.items()}


def train(cfg: TrainConfig) -> Path:
    """Train the stage that ``cfg`` describes in ``cfg.run`` and return its artifact folder.

    A run that was interrupted goes on where its last checkpoint stands; a finished one returns at once. Raises
    :class:`ConfigError` when ``cfg`` differs from the run's own settings in anything that defines it.
    """
    run = Path(cfg.run)
    kind, stage_class = STAGES[type(cfg)]
    _check_ranks(cfg)
    with RunLock(run):
        compare_settings(run, cfg)
        if _finished(run, cfg):
            log.info("%s is finished; raise trainer.max_steps or trainer.max_minutes to train on", run)
            return artifact.locate(run)
        last = run / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True, exist_ok=True)
        start = read_last(last)["global_step"] if last.exists() else 0

        model, data = _model_and_data(cfg, kind, fresh=not last.exists())
        adapters = None
        if isinstance(cfg, TunableTrainConfig) and cfg.lora_rank:
            adapters = add_lora(model, name_of(_model_config(cfg)), cfg.lora_rank)
        fingerprint = data.fingerprint[:12]  # opens the data: a wrong path ends here
        write_settings(run, cfg)  # from here on the folder is this run's
        (run / ERROR).unlink(missing_ok=True)
        stage = stage_class(model, cfg.trainer, cfg.optim, cfg.seed)
        data.set_start(start)
        trainer = _trainer(cfg, run, start, data, title=f"{kind} in {run}")
        _recall_validation(stage, trainer, start)
        size = artifact.describe(stage.model)
        if trainer.is_global_zero:
            log.info("data %s", fingerprint)
            log.info("%s: %.1f M parameters, from step %d", kind, size["trainable"] / 1e6, start)
        stop = next(found for found in trainer.callbacks if isinstance(found, StopOnLimitOrSignal))  # type: ignore[attr-defined]
        try:
            with stop.listening(trainer):
                trainer.fit(stage, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
                folder = _finish(trainer, stage, data, cfg, kind, stop, adapters)
        except BaseException:
            _close(trainer, code=1)
            if trainer.is_global_zero:
                report_quietly(run)
            raise
        _close(trainer, code=0)
        return folder


def _model_and_data(cfg: TrainConfig, kind: str, fresh: bool) -> tuple[Any, UnclipData]:
    model_cfg = _model_config(cfg)
    draws = isinstance(model_cfg, (DecoderConfig, UpsamplerConfig))
    place = cfg.data.for_drawing(model_cfg.image_size) if draws else cfg.data
    data = UnclipData(place, cfg.seed, cfg.trainer.batch_size, needs=model_cfg.columns, raw=model_cfg.is_raw)
    data.parts = cfg.trainer.accumulate
    if isinstance(model_cfg, UpsamplerConfig) and model_cfg.bsr is not Bsr.none:
        data.degrade = Degrade(model_cfg.bsr, model_cfg.image_size, model_cfg.low_size, cfg.seed)
    if kind != "clip":  # whose captions are not tokenised yet
        _ = data.fingerprint  # tells what is missing before a model asks for it
    torch.manual_seed(cfg.seed)  # not before: reading a CLIP for live states draws numbers too
    model = build(model_cfg, data.interface)
    if kind == "clip":
        data.tokenize = model.tokenize
        data.cfg = replace(data.cfg, image_size=data.cfg.image_size or model.image_size)
    if fresh and isinstance(cfg, TunableTrainConfig) and cfg.init is not None:
        start_from(cfg.init, model, kind, data.interface, Path(cfg.run))
    elif fresh:
        model.fit(data.embeddings)
    if fresh and (first := getattr(model_cfg, "first", None)) is not None:
        note_parent(Path(cfg.run), "first", first)
    dense = cfg.trainer.strategy != "fsdp2"  # which shards contiguous weights only
    if cfg.trainer.channels_last and dense and torch.cuda.is_available() and kind in ("decoder", "upsampler"):
        model = model.to(memory_format=torch.channels_last)  # on a CPU it makes GroupNorm several times slower
    return model, data


def _model_config(cfg: TrainConfig) -> ModelConfig:
    return cfg.model  # type: ignore[attr-defined]


def _trainer(cfg: TrainConfig, run: Path, start: int, data: UnclipData, title: str) -> pl.Trainer:
    """A model without weights to train is only validated, on one device."""
    trains = _model_config(cfg).trains
    checkpoint = Checkpoint(run / "checkpoints" / "last.ckpt")
    callbacks = [
        Metrics(),
        SampleSheet(run / "samples"),
        Snapshots(run, start),
        StopOnLimitOrSignal(checkpoint),
        checkpoint,
        ProgressBar(title),
        Watchdog(run),
    ]
    lineage = {"data": data.fingerprint, "clip": data.interface.clip}
    group = run.resolve().parent.name if (run / "trial.json").exists() else None
    loggers = make_loggers(cfg.logger, run, start, {**to_plain(cfg), "lineage": lineage}, group)
    return pl.Trainer(
        default_root_dir=run,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices if trains else 1,
        num_nodes=cfg.trainer.num_nodes if trains else 1,
        strategy=_strategy(cfg.trainer) if trains else "auto",
        plugins=_plugins([] if trains and cfg.trainer.strategy == "fsdp2" else [checkpoint.writer]),
        deterministic="warn" if cfg.trainer.deterministic else None,
        benchmark=not cfg.trainer.deterministic,
        precision="bf16-mixed" if cfg.trainer.precision is Precision.bf16 else "32-true",
        max_steps=cfg.trainer.max_steps if trains else 0,
        max_epochs=-1,
        val_check_interval=cfg.trainer.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=cfg.trainer.log_every,
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )


def _strategy(cfg: TrainerConfig) -> str | Sharded:
    if cfg.strategy != "fsdp2":
        return cfg.strategy
    return Sharded(cfg.devices * cfg.num_nodes, full=cfg.checkpoint == "full")


def _plugins(own: list[Any]) -> list[Any]:
    """What writes and reads checkpoints, and what to know of SLURM.

    Lightning's own requeueing saves within the signal's handler, which can hang; see StopOnLimitOrSignal.
    """
    return [SLURMEnvironment(auto_requeue=False), *own] if _under_srun() else own


def _under_srun() -> bool:
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _check_ranks(cfg: TrainConfig) -> None:
    """ConfigError where a SLURM job has other ranks than the settings say."""
    trains = _model_config(cfg).trains
    wanted = {
        "trainer.devices": (cfg.trainer.devices if trains else 1, "SLURM_NTASKS_PER_NODE"),
        "trainer.num_nodes": (cfg.trainer.num_nodes if trains else 1, "SLURM_NNODES"),
    }
    for name, (number, variable) in wanted.items():
        given = os.environ.get(variable, str(number))
        if _under_srun() and given != str(number):
            why = "" if trains else " (this model has no weights to train, so it takes one)"
            raise ConfigError(
                f"{name}={number}{why}, but this SLURM job has {variable}={given}; let them agree, "
                "or submit by train.sbatch or launch=slurm, which see to it"
            )


def _recall_validation(stage: Stage, trainer: pl.Trainer, start: int) -> None:
    """So that a validation whose results stand in ``metrics.jsonl`` is not repeated."""
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger) and (found := logger.validation(start)):
            stage.validated_at, stage.val_metrics = start, found


def _close(trainer: pl.Trainer, code: int) -> None:
    """After success, the ranks that this process started have ended too: their time counts as its, and nothing writes on."""
    for rank in getattr(trainer.strategy.launcher, "procs", []) if code == 0 else []:
        rank.wait()
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.close(code)


def _finish(
    trainer: pl.Trainer,
    stage: Stage,
    data: UnclipData,
    cfg: TrainConfig,
    kind: str,
    stop: StopOnLimitOrSignal,
    adapters: Any,
) -> Path:
    """Validate with the averaged weights, draw the last sheet, write the artifact."""
    run = Path(cfg.run)
    step, seconds = trainer.global_step, stage.seconds
    optimizer: Any = trainer.optimizers[0]
    stop.stop_if_told(trainer)
    if stage.validated_at != step:  # Lightning validates when it stops, but not always
        with optimizer.ema_weights():
            trainer.validate(stage, datamodule=data, verbose=False, weights_only=True)
    metrics = stage.val_metrics
    stop.stop_if_told(trainer)
    if not stage.is_sharded:  # Lightning has put it onto the CPU
        stage.to(trainer.strategy.root_device)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (Checkpoint, Snapshots)):
            callback.save(trainer)
        if isinstance(callback, SampleSheet):
            callback.draw(trainer, stage)
    stop.stop_if_told(trainer)
    with optimizer.ema_weights():
        if adapters is not None:
            merge_lora(adapters)
        interface = data.interface
        if isinstance(stage.model, CLIP):
            stage.model.finish()
            interface = stage.model.interface()
        manifest = artifact.Manifest(
            kind=kind,
            model=name_of(cfg.model),  # type: ignore[attr-defined]
            config=to_plain(stage.model.cfg),
            interface=to_plain(interface),
            parents={**({"clip": interface.clip} if interface.clip else {}), **parents_of(run)},
            step=step,
            samples=step * cfg.trainer.batch_size,
            metrics={**metrics, "seconds": seconds},
            data=data.fingerprint,
            settings=to_plain(cfg),
        )
        weights = stage.model.state_dict()
        if trainer.is_global_zero:
            folder = artifact.save(run, weights, manifest)
            for logger in trainer.loggers:
                if isinstance(logger, (WandbRun, MlflowRun)):
                    logger.log_lineage(manifest, folder)
            report_quietly(run)
        elif stage.is_sharded:
            write_tensors(None, weights)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        log.info(
            "%s: %d steps in %.0f s; %s", kind, step, seconds, ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        )
    return artifact.locate(run)


def _finished(run: Path, cfg: TrainConfig) -> bool:
    if not (run / "artifact").exists():
        return False
    manifest = artifact.read_manifest(run)
    minutes = cfg.trainer.max_minutes
    if not _model_config(cfg).trains:
        return True
    by_time = minutes is not None and manifest.metrics["seconds"] >= 60 * minutes
    return manifest.step >= cfg.trainer.max_steps or by_time
