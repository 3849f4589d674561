"""AdamW whose state holds the EMA of the weights, weight-decay groups, learning-rate progress and gradient clipping.

The averages live beside Adam's moments (``state[p]["ema"]`` and ``["ema_profile_0"]``, …; float32), so that checkpoints and
sharding carry them with no further code. They cover trainable weights, never a frozen CLIP, and the running statistics of batch
norms, which stand beside their weight's (``["ema_running_mean"]``, ``["ema_running_var"]``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unclip.config import Decay, OptimConfig
from unclip.ema import exponent
from unclip.errors import ConfigError
from unclip.muon import is_hidden_matrix, muon_step

NOT_HIDDEN = ("positional_embedding", "head_weight")  # tables and outputs in the shape of matrices


class AdamWEMA(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) and an exponential moving average of the weights."""

    def __init__(
        self, groups: list[dict[str, Any]], cfg: OptimConfig, batch_norms: Sequence[nn.BatchNorm2d] = ()
    ) -> None:
        """``batch_norms``: those whose running statistics are averaged."""
        self.ema_decay = cfg.ema_decay
        self.exponents = {f"ema_profile_{i}": exponent(width) for i, width in enumerate(cfg.ema_profiles)}
        super().__init__(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
        self._trained: list[tuple[Tensor, Tensor]] = []  # weights and their trained values, within ema_weights
        self.batch_norms = batch_norms
        for group in self.param_groups:
            group["updates"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of AdamW, or of Muon for groups with ``muon``; then the averages.

        ema <- decay * ema + (1 - decay) * weights with decay = min(limit, (1 + n) / (10 + n)).
        The profiles' decay is (1 - 1 / n)^(gamma + 1) (Karras et al. 2024, eq. 2), also in a step without gradients.
        """
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                muon_step(group, self.state)
        for group in every:
            n = group["updates"] = group["updates"] + 1
            weights = [p for p in group["params"] if p.grad is not None]
            if self.ema_decay and weights:
                share = 1 - min(self.ema_decay, (1 + n) / (10 + n))
                self._lerp(weights, "ema", share)
                self._lerp_statistics(weights, share)
            weights = [p for p in group["params"] if p.grad is not None or p in self.state]
            for name, gamma in self.exponents.items():
                if weights:
                    self._lerp(weights, name, 1 - (1 - 1 / n) ** (gamma + 1))
        return result

    def _lerp(self, weights: list[Tensor], name: str, share: float) -> None:
        """state[p][name] <- (1 - share) state[p][name] + share p; a new average starts at p."""
        for p in weights:
            if name not in self.state[p]:
                self.state[p][name] = p.detach().float().clone()
        averages = [self.state[p][name] for p in weights]
        torch._foreach_lerp_(_local(averages), _local(weights), share)  # pyright: ignore[reportPrivateImportUsage]

    def _lerp_statistics(self, weights: list[Tensor], share: float) -> None:
        if not self.batch_norms:
            return
        moved = {id(p) for p in weights}
        for weight, name, value in self._statistics():
            if id(weight) in moved:
                self.state[weight].setdefault(f"ema_{name}", value.clone()).lerp_(value, share)

    def _statistics(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Each batch norm's weight, and the name and value of a running statistic."""
        for norm in self.batch_norms:
            for name in ("running_mean", "running_var"):
                yield norm.weight, name, getattr(norm, name)

    def profile(self, model: nn.Module, index: int) -> dict[str, Tensor]:
        """The power-function average of ``cfg.ema_profiles[index]``, by the names of the model's weights."""
        name = f"ema_profile_{index}"
        return {
            n: self.state[p][name] for n, p in model.named_parameters() if p in self.state and name in self.state[p]
        }

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the block the model holds its averaged weights; afterwards the trained ones, bit for bit."""
        if self._trained:  # a block within a block
            yield
            return
        averaged = self._averaged()
        self._trained = [(p, p.detach().clone()) for p, _ in averaged]
        _copy_into(averaged)
        try:
            yield
        finally:
            trained, self._trained = self._trained, []
            _copy_into(trained)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a run with another memory layout too: the fused step wants each state in its weight's."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, DTensor) or value.shape != p.shape or value.stride() == p.stride():
                    continue
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """A block within :meth:`ema_weights` in which the model holds its trained weights after all."""
        _copy_into(self._trained)
        try:
            yield
        finally:
            _copy_into(self._averaged())

    def _averaged(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and statistics, each with its average."""
        weights = [(p, s["ema"]) for p, s in self.state.items() if "ema" in s]
        statistics = [(value, self.state.get(p, {}).get(f"ema_{name}")) for p, name, value in self._statistics()]
        return weights + [(value, average) for value, average in statistics if average is not None]


@torch.no_grad()
def _copy_into(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for p, value in pairs:
        p.copy_(value)
    torch.clear_autocast_cache()  # of casts of what they were


def no_optimizer(cfg: OptimConfig) -> AdamWEMA:
    """Over nothing: for a model that has no weights to train."""
    return AdamWEMA([{"params": [nn.Parameter(torch.empty(0))], "lr_scale": 1.0}], cfg)


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> AdamWEMA:
    """AdamW over the trainable weights; weight decay applies to matrices and convolutions, not to biases, norms and tables.

    Tables are embeddings: a row that no caption used would otherwise decay to nothing. Each group's ``lr_scale`` is what
    ``optim.layer_decay`` makes of its layers, times ``muon_lr / lr`` for those that Muon trains. Scalars have groups of their own:
    FSDP2 cannot shard them.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    scales = _learning_rate_scales(model, cfg.layer_decay)
    groups: dict[tuple[bool, float, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in tables
            muon = bool(cfg.muon_lr) and decays and is_hidden_matrix(p) and name.rpartition(".")[2] not in NOT_HIDDEN
            scale = scales.get(name, 1.0) * (cfg.muon_lr / cfg.lr if muon else 1.0)
            groups.setdefault((muon, scale, not decays, p.ndim == 0), []).append(p)
    if not groups:
        raise ConfigError("nothing is left to train: all weights are frozen")
    if batch_norms_of(model) and cfg.ema_profiles:
        raise ConfigError(
            "optim.ema_profiles with batch norms (a CLIP's ResNet), whose statistics an average made after training would lack: "
            "leave it empty"
        )
    return AdamWEMA(
        [
            {
                "params": groups[muon, scale, plain, scalar],
                "weight_decay": 0.0 if plain else cfg.weight_decay,
                "lr_scale": scale,
                "muon": muon,
            }
            for muon, scale, plain, scalar in sorted(groups)
        ],
        cfg,
        batch_norms_of(model),
    )


def batch_norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The modules with running statistics that training moves (a frozen tower's are of another class)."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _learning_rate_scales(model: Any, layer_decay: float) -> dict[str, float]:
    if layer_decay == 1.0:
        return {}
    if not hasattr(model, "learning_rate_scales"):
        raise ConfigError("optim.layer_decay is for fine-tuning CLIP; this model has no order of layers: set it to 1")
    return model.learning_rate_scales(layer_decay)


@contextmanager
def resting_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block batch norms leave their running statistics as they are."""
    norms = batch_norms_of(model)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


@contextmanager
def perturbed(parameters: list[nn.Parameter], rho: float) -> Iterator[None]:
    """Sharpness-aware minimisation (Foret et al. 2021, eq. 2): inside the block the weights are w + rho * g / |g|.

    g are the gradients, taken over all of ``parameters`` and then cleared. Afterwards the weights are w again, bit for
    bit, and the gradients those that the block has left.
    """
    weights = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in weights if p.grad is not None]
    scale = rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p, gradient in zip(weights, gradients, strict=True):
            p.add_(gradient * scale)
            p.grad = None
    torch.clear_autocast_cache()  # of casts of the weights before the climb
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(weights, before, strict=True):
                p.copy_(value)
        torch.clear_autocast_cache()


def learning_rate(cfg: OptimConfig, step: int, progress: float) -> float:
    """Linear warm-up over ``warmup_steps``, then decay with ``progress`` (0 at the start of the run, 1 at its end)."""
    warmup = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    progress = min(1.0, max(0.0, progress))
    decay = {
        Decay.constant: 1.0,
        Decay.linear: 1 - (1 - cfg.final_lr) * progress,
        Decay.cosine: cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)),
    }[cfg.decay]
    return cfg.lr * warmup * decay


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their global L2 norm is at most ``limit`` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients)
    if limit:
        torch._foreach_mul_(_local(gradients), (limit / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm over all of ``tensors``; of sharded ones over all ranks' shares."""
    shares = [t for t in tensors if isinstance(t, DTensor)]
    if not shares:
        return torch.nn.utils.get_total_norm(tensors)
    sharded = torch.nn.utils.get_total_norm(shares)
    assert isinstance(sharded, DTensor)
    rest = [t for t in tensors if not isinstance(t, DTensor)]
    if not rest:
        return sharded.full_tensor()
    whole = torch.nn.utils.get_total_norm(rest)
    return torch.hypot(sharded.full_tensor(), whole.to(sharded.device))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shares, as plain tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
