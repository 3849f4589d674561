"""``unclip plan``: what a training would take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import typer
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from unclip.cli.train import CONF, forced, with_init
from unclip.config import typed
from unclip.errors import ConfigError
from unclip.models import Interface
from unclip.plan import Step, measure_step, on_devices, seconds_of
from unclip.train import CONFIGS, ClipTrainConfig, TrainConfig, TunableTrainConfig


@dataclass
class PlanSettings:
    """What `unclip plan` takes beside the stage's own settings.

    ``stage``: clip, prior, decoder or upsampler; by default the one that the experiment or the model names, else decoder.
    ``batch``: trainer.batch_size. ``gpus``: by default trainer.devices times trainer.num_nodes. ``tflops``: what a GPU does in
    bfloat16 at best, by default an A100's; ``mfu``: the share of it that the training reaches. The widths are those of the CLIP,
    by default ViT-L/14's.
    """

    stage: str = ""
    gpus: int = 1
    batch: int = 0
    tflops: float = 312.0
    mfu: float = 0.4
    embed_dim: int = 768
    text_width: int = 768
    context_length: int = 77
    vocab_size: int = 49408

    def __post_init__(self) -> None:
        if self.stage and self.stage not in CONFIGS:
            raise ConfigError(f"stage={self.stage} is not one of: {', '.join(CONFIGS)}")
        for name, value in vars(self).items():
            if name not in ("stage", "batch") and value <= 0:
                raise ConfigError(f"{name}={value} must be positive")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu={self.mfu} is a share of tflops, above 0 and at most 1; 0.3 to 0.5 are usual")
        if self.batch < 0:
            raise ConfigError(f"batch={self.batch} must be positive")

    @property
    def interface(self) -> Interface:
        return Interface(self.embed_dim, self.text_width, self.context_length, self.vocab_size)


def print_plan(arguments: list[str]) -> None:
    """Print the plan of a training given as its command would be: experiment=… and further settings."""
    settings, cfg, stage = read(arguments)
    batch = settings.batch or cfg.trainer.batch_size
    if batch % (settings.gpus * cfg.trainer.accumulate):
        raise ConfigError(
            f"batch={batch} is not a multiple of gpus={settings.gpus} times trainer.accumulate={cfg.trainer.accumulate}"
        )
    rows = batch // settings.gpus // cfg.trainer.accumulate
    step = measured(settings, cfg, stage, rows)
    for line in describe(stage, settings, cfg, step, batch, rows):
        typer.echo(line)


def measured(settings: PlanSettings, cfg: TrainConfig, stage: str, rows: int) -> Step:
    """What :func:`read` found, followed through one step of ``rows`` samples."""
    model_cfg: Any = cfg.model  # type: ignore[attr-defined]
    interface = Interface() if stage in ("clip", "upsampler") else settings.interface
    return measure_step(model_cfg, interface, cfg.optim, cfg.trainer.precision, rows)


def read(arguments: Sequence[str]) -> tuple[PlanSettings, TrainConfig, str]:
    """The plan's own settings, the stage's, and the stage. ConfigError for what neither knows."""
    pairs = [argument.partition("=") for argument in arguments]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"{bad[0]!r} is not a setting: write unclip plan experiment=paper_decoder gpus=64 batch=2048")
    own = {name: value for name, _, value in pairs if name in PlanSettings.__dataclass_fields__}
    settings = typed(OmegaConf.create(own), PlanSettings)
    stage = settings.stage or _stage_of({name: value for name, _, value in pairs})
    others = [argument for argument in arguments if argument.partition("=")[0] not in own]
    needed = ["run=plan", "data.path=plan"]
    if stage in ("prior", "decoder"):
        needed.append("data.embeddings=plan")
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            raw = compose(f"train_{stage}", [forced(argument) for argument in [*needed, *others]])
    except HydraException as error:
        raise ConfigError(f"{error}; is {stage} the stage? Say stage=clip, prior, decoder or upsampler") from error
    cfg = typed(with_init(raw, stage), CONFIGS[stage])
    if (cfg.model if isinstance(cfg, ClipTrainConfig) else cast(TunableTrainConfig, cfg)).lora_rank:
        raise ConfigError("unclip plan follows whole weights, not adapters: leave out lora_rank")
    given = cfg.trainer.devices * cfg.trainer.num_nodes
    if "gpus" not in own:
        settings = replace(settings, gpus=given)
    elif given not in (1, settings.gpus):
        raise ConfigError(
            f"gpus={settings.gpus}, but trainer.devices times trainer.num_nodes is {given}: leave out one of them"
        )
    return settings, cfg, stage


def _stage_of(given: dict[str, str]) -> str:
    """By the name of the experiment or the model, which end in their stage; a base such as base128 is a decoder."""
    for name in (given.get("experiment", ""), given.get("model", "")):
        for stage in CONFIGS:
            if stage in name.split("_"):
                return stage
    return "prior" if given.get("model") == "identity" else "decoder"


def describe(stage: str, settings: PlanSettings, cfg: TrainConfig, step: Step, batch: int, rows: int) -> list[str]:
    """The plan in lines."""
    flops = step.flops * settings.gpus * cfg.trainer.accumulate
    total = flops * cfg.trainer.max_steps
    parts = cfg.trainer.accumulate * cfg.trainer.max_steps
    seconds = parts * seconds_of(step, settings.tflops, settings.mfu)
    frozen = step.parameters - step.trainable
    lines = [
        f"{stage}: {step.parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""),
        f"a step: {batch:,} samples, {step.flops / rows:.3g} FLOP each, {flops:.3g} in all",
        f"a GPU: {rows:,} samples at once"
        + (f", {cfg.trainer.accumulate} times a step" if cfg.trainer.accumulate > 1 else ""),
    ]
    for name, kinds in on_devices(step, settings.gpus, cfg.trainer.precision).items():
        parts = ", ".join(f"{kind} {_gigabytes(size)}" for kind, size in kinds.items())
        lines.append(f"memory, {name}: {_gigabytes(sum(kinds.values()))} ({parts})")
    lines.append(
        f"the recipe: {cfg.trainer.max_steps:,} steps, {cfg.trainer.max_steps * batch:,} samples, {total:.3g} FLOP: "
        f"{seconds / 86400:.3g} days on {settings.gpus} GPU{'s' if settings.gpus > 1 else ''} "
        f"at {settings.mfu:.0%} of {settings.tflops:g} TFLOP/s (mfu=, tflops=)"
    )
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
