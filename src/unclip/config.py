"""Typed configuration: YAML and command line in, dataclasses out, nothing undeclared let through.

Hydra composes ``conf/``; :func:`typed` turns the result into one of the dataclasses below and refuses every key that no
dataclass declares, also those forced in with ``+key=value``.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unclip.errors import ConfigError

T = TypeVar("T")
WIDEST_EMA = 0.28  # below 12**-0.5, the relative width of a plain mean over the whole run
FREE = {"free": True}  # metadata of a field that may change between a run and its resumption


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Decay(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class LoggerName(Enum):
    none = "none"
    csv = "csv"
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


@dataclass
class OptimConfig:
    """AdamW with decoupled weight decay on matrices only, warm-up and decay, clipping and EMA.

    ``lr`` is reached after ``warmup_steps`` and then decays over the run to ``final_lr`` x lr. ``grad_clip`` is the
    largest global gradient norm (0: no clipping). ``ema_decay`` is the limit of the EMA decay; early on it is
    (1 + step) / (10 + step), so short runs are not averaged with their initialisation (0: no EMA). ``ema_profiles`` adds
    power-function averages of these relative widths (Karras et al. 2024: [0.05, 0.1]); every ``ema_snapshot_every`` steps
    the run keeps them (0: only at its end), and `unclip ema` makes an average of any width of them. ``sam_rho`` > 0 takes
    each gradient at the worst point of that distance (sharpness-aware minimisation; the paper's CLIP: 0.1), which costs a
    second pass. ``layer_decay`` < 1 multiplies the rate of a layer by it for each layer above (CLIP only). ``muon_lr`` > 0 trains
    matrices and convolutions by Muon with that rate (0.02 is usual) instead of AdamW's; embeddings, norms and biases stay.
    """

    lr: float = 1.2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    decay: Decay = Decay.constant
    final_lr: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    ema_profiles: list[float] = field(default_factory=list)
    ema_snapshot_every: int = field(default=0, metadata=FREE)
    sam_rho: float = 0.0
    layer_decay: float = 1.0
    muon_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be positive")
        if self.muon_lr < 0:
            raise ConfigError(f"optim.muon_lr={self.muon_lr} is a learning rate: 0 leaves all weights to AdamW")
        if self.sam_rho < 0:
            raise ConfigError(f"optim.sam_rho={self.sam_rho} is a distance: 0 switches it off")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must lie in (0, 1]; 1 gives all layers one rate")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"optim.ema_decay={self.ema_decay} must lie in [0, 1); 0 switches the EMA off")
        for width in self.ema_profiles:
            if not 0 < width < WIDEST_EMA:
                raise ConfigError(
                    f"optim.ema_profiles holds {width}; a relative width lies between 0 and {WIDEST_EMA}, usually [0.05, 0.1]"
                )
        if self.ema_snapshot_every < 0 or (self.ema_snapshot_every and not self.ema_profiles):
            raise ConfigError(
                f"optim.ema_snapshot_every={self.ema_snapshot_every} counts steps between snapshots of ema_profiles: set "
                "optim.ema_profiles=[0.05,0.1] beside it, or leave it 0"
            )


class OnNonfinite(Enum):
    """What to do with a step whose loss or gradient is not finite: stop the run, or leave the weights and go on."""

    stop = "stop"
    skip = "skip"


class OnSpike(Enum):
    """What to do when the loss rises far above what it was: say so, or stop the run before its next checkpoint."""

    warn = "warn"
    stop = "stop"


@dataclass
class TrainerConfig:
    """How long, how precisely and on what a stage trains.

    ``batch_size`` is the global batch: samples per optimiser step over all devices, computed in ``accumulate`` parts one
    after another to save memory, with the same result (CLIP encodes twice for that). A run ends at ``max_steps`` or after
    ``max_minutes`` of training, whichever comes first; the learning-rate decay follows the nearer of the two ends.
    A run limited by time is not reproducible to the bit, since the number of its steps depends on the machine.
    ``strategy`` auto is ddp where there are several devices; fsdp2 shards weights, gradients, moments and averages over them.
    ``checkpoint`` of fsdp2: sharded (auto), where each rank writes its share, or full, one file of whole tensors;
    either is read by any number of ranks. ``on_nonfinite`` stop looks every ``log_every`` steps and before each
    checkpoint; skip looks at every step, for which a GPU has to wait. Either writes the batch's keys to
    ``nonfinite.jsonl``. A loss spike is a mean loss over ``log_every`` steps that is more than ``spike_factor`` x the
    median of the last 20 such means (0: never); ``on_spike`` warn or stop. ``deterministic`` makes a resumed run equal to the bit
    on GPUs too, by slower kernels, and warns of operations that have none; on CPUs it is so anyway. After ``stall_seconds``
    without a step every rank prints the stacks of its threads (0: never). ``peak_tflops`` is what one device can do at most,
    for the share of it that training uses (0: known GPUs by name, others by a short multiplication).
    """

    max_steps: int = 100_000
    max_minutes: float | None = field(default=None, metadata=FREE)
    batch_size: int = 256
    accumulate: int = field(default=1, metadata=FREE)
    precision: Precision = Precision.bf16
    channels_last: bool = field(default=True, metadata=FREE)
    compile: bool = field(default=False, metadata=FREE)
    deterministic: bool = field(default=False, metadata=FREE)
    on_nonfinite: OnNonfinite = field(default=OnNonfinite.stop, metadata=FREE)
    on_spike: OnSpike = field(default=OnSpike.warn, metadata=FREE)
    spike_factor: float = field(default=3.0, metadata=FREE)
    stall_seconds: float = field(default=1200.0, metadata=FREE)
    peak_tflops: float = field(default=0.0, metadata=FREE)
    accelerator: str = field(default="auto", metadata=FREE)
    devices: int = field(default=1, metadata=FREE)
    num_nodes: int = field(default=1, metadata=FREE)
    strategy: str = field(default="auto", metadata=FREE)
    checkpoint: str = field(default="auto", metadata=FREE)
    log_every: int = field(default=20, metadata=FREE)
    val_every: int = field(default=1000, metadata=FREE)
    sample_every: int = field(default=5000, metadata=FREE)
    checkpoint_every: int = field(default=1000, metadata=FREE)
    num_samples: int = field(default=16, metadata=FREE)

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ConfigError(f"trainer.max_steps={self.max_steps} must be at least 1")
        if self.strategy not in ("auto", "ddp", "fsdp2"):
            raise ConfigError(
                f"trainer.strategy={self.strategy} is not one of auto, ddp, fsdp2. To shard a model over its ranks take fsdp2, "
                "which replaces fsdp"
            )
        if self.checkpoint not in ("auto", "sharded", "full"):
            raise ConfigError(f"trainer.checkpoint={self.checkpoint} is not one of auto, sharded, full")
        if self.checkpoint == "sharded" and self.strategy != "fsdp2":
            raise ConfigError(
                "trainer.checkpoint=sharded: only trainer.strategy=fsdp2 has shares to write; leave it at auto"
            )
        if self.strategy == "fsdp2" and self.compile:
            raise ConfigError("trainer.compile with trainer.strategy=fsdp2 is untested: leave one of them out")
        if self.spike_factor and self.spike_factor <= 1:
            raise ConfigError(f"trainer.spike_factor={self.spike_factor} must be above 1, or 0 to ignore spikes")
        if self.stall_seconds < 0 or self.peak_tflops < 0:
            raise ConfigError(
                "trainer.stall_seconds and trainer.peak_tflops must not be negative; 0 is the default or off"
            )
        if self.accumulate < 1:
            raise ConfigError(
                f"trainer.accumulate={self.accumulate} must be at least 1, the number of parts of a batch"
            )
        if self.batch_size % (self.devices * self.num_nodes):
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} is the global batch; it must be a multiple of "
                f"devices x nodes = {self.devices * self.num_nodes}"
            )


@dataclass
class LoggerConfig:
    """``metrics.jsonl`` is always written; ``name`` adds another place. ``offline`` keeps wandb on this machine; left unset,
    it does so where wandb's server cannot be reached. ``tracking_uri`` is MLflow's server."""

    name: LoggerName = field(default=LoggerName.tensorboard, metadata=FREE)
    project: str = field(default="unclip", metadata=FREE)
    offline: bool | None = field(default=None, metadata=FREE)
    tracking_uri: str = field(default="", metadata=FREE)

    def __post_init__(self) -> None:
        if self.offline is not None and self.name is not LoggerName.wandb:
            raise ConfigError("logger.offline applies to wandb only: remove it, or set logger=wandb")
        if self.tracking_uri and self.name is not LoggerName.mlflow:
            raise ConfigError("logger.tracking_uri applies to mlflow only: remove it, or set logger=mlflow")


def typed(raw: DictConfig, cls: type[T]) -> T:
    """Build dataclass ``cls`` from a composed configuration.

    Raises :class:`ConfigError` for a key that ``cls`` does not declare (with the nearest declared name), for a value of
    the wrong type, for a missing mandatory value, and for whatever the dataclasses' own ``__post_init__`` refuse.
    """
    plain = OmegaConf.to_container(raw, resolve=True)
    assert isinstance(plain, dict)
    return _build({str(key): value for key, value in plain.items()}, cls, path="")


def _build(raw: dict[str, Any], cls: type[T], path: str) -> T:
    """Fill the fields of ``cls``; a field that holds a base class picks the subclass named by the key ``kind``."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in raw:  # before any value: a misspelt key often leaves another one unset
        if key not in fields:
            name = f"{path}.{key}".lstrip(".")
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown option '{name}'; {hint}")
    filled = {key: _filled(value, fields[key]) for key, value in raw.items()}
    values = {key: _value(value, hints[key], f"{path}.{key}".lstrip(".")) for key, value in filled.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error
    except ZeroDivisionError as error:
        zeros = ", ".join(sorted(key for key, value in values.items() if value == 0 and not isinstance(value, bool)))
        raise ConfigError(f"{path or cls.__name__}: one of these must not be 0: {zeros}") from error


def _filled(value: Any, field: "dataclasses.Field[Any]") -> Any:
    """A group of settings with those that it does not name as the field's own default has them, which may not be its class's."""
    if not isinstance(value, dict) or field.default_factory is dataclasses.MISSING:
        return value
    default = field.default_factory()
    if not dataclasses.is_dataclass(default) or "kind" in value:
        return value
    return over(to_plain(default), value)


def over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what is ``given`` in its place; where both hold a dict, that one likewise."""
    both = {k: over(base[k], v) for k, v in given.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **given, **both}


def _value(value: Any, hint: Any, name: str) -> Any:
    """Convert one value to its declared type through OmegaConf's own conversion rules."""
    if value == "???":
        raise ConfigError(f"{name} is not set; give it on the command line: {name}=...")
    if hint is Any:  # checked where it is used
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        wanted = isinstance(value, list)  # str | list[str]: one or several
        hint, *_ = sorted(
            (a for a in args if a is not type(None)), key=lambda a: (typing.get_origin(a) is list) != wanted
        )
        return _value(value, hint, name)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a group of settings, not {value!r}")
        return _build(value, _subclass(hint, value, name), name)  # type: ignore[arg-type]
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return [_value(v, args[0], f"{name}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
            raise ConfigError(f"{name} must be a list of {len(args)} values, not {value!r}")
        return tuple(_value(v, a, f"{name}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping, not {value!r}")
        return {k: _value(v, args[1], f"{name}.{k}") for k, v in value.items()}
    return _scalar(value, hint, name)


def _scalar(value: Any, hint: Any, name: str) -> Any:
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])
    try:
        node = OmegaConf.merge(OmegaConf.structured(holder), {"value": value})
        return node.value
    except OmegaConfBaseException as error:
        if isinstance(hint, type) and issubclass(hint, Enum):
            choices = ", ".join(member.name for member in hint)
            raise ConfigError(f"{name}={value!r} is not one of: {choices}") from error
        raise ConfigError(f"{name}={value!r} is not a valid {getattr(hint, '__name__', hint)}") from error


def _subclass(base: type, value: dict[str, Any], name: str) -> type:
    """The dataclass to build for a field of type ``base``: ``kind: decoder`` names a registered model."""
    from unclip.models import REGISTRY
    from unclip.models.interface import ModelConfig

    if not issubclass(base, ModelConfig):
        return base
    kind = value.pop("kind", None)
    if kind not in REGISTRY:
        raise ConfigError(f"{name}.kind={kind!r} is not a model; known: {', '.join(sorted(REGISTRY))}")
    config = REGISTRY[kind][0]
    if not issubclass(config, base):
        fitting = ", ".join(sorted(k for k, (c, _) in REGISTRY.items() if issubclass(c, base)))
        raise ConfigError(f"{name}.kind={kind} does not fit this command; choose one of: {fitting}")
    return config


def to_plain(config: Any) -> Any:
    """Dataclasses and enums to what JSON and YAML can hold; the reverse of :func:`from_plain`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {k: to_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(v) for v in config]
    return config


def from_plain(raw: dict[str, Any], cls: type[T]) -> T:
    """Rebuild dataclass ``cls`` from :func:`to_plain`'s output; raises :class:`ConfigError` as :func:`typed` does."""
    return _build(dict(raw), cls, path="")


def identity(config: Any) -> dict[str, Any]:
    """The settings that define a run, dotted name to value: all fields but those marked free."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        if f.metadata.get("free"):
            continue
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{f.name}.{k}": v for k, v in identity(value).items()}
        else:
            found[f.name] = to_plain(value)
    return found
