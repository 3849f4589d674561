"""How good a prior is: whether its z_i are those of the caption's pictures, and whether they vary as pictures do."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import artifact
from unclip.config import Precision, from_plain, over, to_plain
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.diffusion.noise import Noise
from unclip.errors import ArtifactError, ConfigError
from unclip.evaluation.metrics import retrieval
from unclip.evaluation.rows import Rows
from unclip.progress import track


@runtime_checkable
class Measured(Protocol):
    """A prior that has measures of its own, such as the error at each timestep or nats per code."""

    def measures(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Numbers (B,), one a sample, or (), the batch's mean."""
        ...


@dataclass
class Diversity:
    """Every ``every``-th sample of validation gets ``num_samples`` z_i, whose spread is the diversity."""

    every: int = 16
    num_samples: int = 4

    def __post_init__(self) -> None:
        if self.every < 1 or self.num_samples < 2:
            raise ConfigError(
                f"diversity.every={self.every} must be at least 1 and diversity.num_samples={self.num_samples} at least 2"
            )


class PriorEvaluation:
    """Looks at a prior batch by batch and sums up.

    ``noise`` gives a batch's noise, which must depend on the samples only: then two evaluations differ by the weights and
    not by luck. The caller puts the model into eval mode, and into the weights that it wants to know of.
    """

    def __init__(
        self, model: Any, noise: Callable[[Batch], Noise], how: Any = None, diversity: Diversity | None = None
    ) -> None:
        self.model, self.noise = model, noise
        self.how = how or model.default_sampling()
        self.diversity = diversity or Diversity()
        self.rows = Rows()

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Everything about a batch, which needs its image_emb and text_emb."""
        true, text = (F.normalize(batch.column(name).float(), dim=1) for name in ("image_emb", "text_emb"))
        self.rows.add(batch.position, {"sampled": self._sample(batch), "true": true, "text": text})
        self.rows.add_captions(batch.position, batch.caption)
        self._add_spread(batch, true)
        self.add_losses(batch)
        if isinstance(self.model, Measured):
            self._add_means(batch, self.model.measures(batch, self.noise(batch)))

    def _add_spread(self, batch: Batch, true: Tensor) -> None:
        """Of the samples whose position is a multiple of ``every``. Ranks that share a sharded model must call it alike,
        so a batch without any draws for its first sample and drops the result."""
        some = [i for i, position in enumerate(batch.position) if position % self.diversity.every == 0]
        found = self._spread(batch.picked(some or [0]), true[some or [0]])
        self.rows.add([batch.position[i] for i in some], {name: value[: len(some)] for name, value in found.items()})

    @torch.no_grad()
    def add_losses(self, batch: Batch, prefix: str = "") -> None:
        """The terms of the loss, which need no sampling."""
        self._add_means(batch, self.model.losses(batch, self.noise(batch)), prefix)

    def _add_means(self, batch: Batch, found: dict[str, Tensor], prefix: str = "") -> None:
        rows = {prefix + name: value.expand(len(batch)) for name, value in found.items()}
        self.rows.add(batch.position, rows)

    def summary(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means over the samples of all ranks, by name; docs/prior.md says what they mean. Every rank must call it."""
        return summary(self.rows.of_all_ranks(device))

    def _sample(self, batch: Batch, copies: int = 1) -> Tensor:
        """Unit-norm z_i (B·copies, D), a sample's copies side by side."""
        cond, noise = self.model.cond(batch), self.noise(batch)
        if copies > 1:
            cond, noise = cond.repeat(copies), noise.repeat(copies)
        return F.normalize(self.model.sample(cond, self.how, noise).float(), dim=1)

    def _spread(self, batch: Batch, true: Tensor) -> dict[str, Tensor]:
        """Mean cosine distances (B,) of a caption's samples: among each other, and from the true z_i."""
        count = self.diversity.num_samples
        drawn = self._sample(batch, count).view(len(batch), count, -1)
        # 1 - cos = |a - b|² / 2 of unit vectors, which rounding never makes negative; over all pairs that is the variance
        from_true = (drawn - true[:, None]).square().sum(-1).mean(1) / 2
        return {"diversity": drawn.var(dim=1).sum(-1), "spread_about_true": from_true}


def summary(columns: dict[str, Tensor]) -> dict[str, float]:
    """The measures of the columns that a :class:`PriorEvaluation` gathered; they are used up."""
    captions = columns.pop("caption").tolist()
    sampled, true, text = (columns.pop(name) for name in ("sampled", "true", "text"))
    to_text, baseline = _cosine(sampled, text), _cosine(text, true)
    found = {"cosine_to_true": _cosine(sampled, true), "cosine_to_text": to_text, "cosine_text_to_true": baseline}
    found["cosine_difference"] = to_text - baseline
    other = unrelated(captions)
    if other is not None:
        found["cosine_to_unrelated"] = _cosine(sampled, true[other])
        found["cosine_to_unrelated_text"] = _cosine(sampled, text[other])
        found["cosine_true_to_unrelated"] = _cosine(true, true[other])
    for name, queries in (("recall", sampled), ("recall_by_text", text)):
        scores = retrieval(true, queries, captions)
        found |= {f"{name}_{k}": scores[f"text_to_image_recall_{k}"] for k in (1, 5, 10)}
    found |= {name: value.double().mean().item() for name, value in columns.items()}
    # The truth and a sample from its exact distribution can be exchanged, so the two distances are then equal.
    found["diversity_ratio"] = found["diversity"] / max(found.pop("spread_about_true"), 1e-6)
    return found


def unrelated(captions: Sequence[Hashable]) -> Tensor | None:
    """(N,) for each caption the number of another one's sample, far from it in the order; None if all are the same."""
    count = len(captions)
    if len(set(captions)) < 2:
        return None
    found = []
    for i, caption in enumerate(captions):
        other = (i + count // 2) % count
        while captions[other] == caption:
            other = (other + 1) % count
        found.append(other)
    return torch.tensor(found)


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dim=1).double().mean().item()


@dataclass
class PriorEvaluateConfig:
    """``run``: the folder that gets evaluation.json; ``prior``: a prior's run or artifact.

    The samples are those of ``data.val_split``. ``sampling`` replaces parts of what the artifact says, by the names of its
    own settings: ``sampling.guidance.scale=2``.
    """

    run: str
    prior: str
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    sampling: dict[str, Any] = field(default_factory=dict)
    diversity: Diversity = field(default_factory=Diversity)
    batch_size: int = 256
    precision: Precision = Precision.fp32
    device: str = "auto"


def evaluate_prior(cfg: PriorEvaluateConfig) -> dict[str, Any]:
    """Measure a prior on a split of an embedded data set; returns the measures and what they were made from.

    Raises ConfigError where ``sampling`` does not fit the prior, ArtifactError where the embeddings are of another CLIP.
    """
    if cfg.data.val_split is None:
        raise ConfigError("data.val_split is null; name the split to evaluate on, such as data.val_split=test")
    loaded, manifest = artifact.load(cfg.prior, kind="prior")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    model: Any = loaded.to(device).requires_grad_(True)  # autocast only keeps the casts of such weights
    how = with_changes(model.default_sampling(), cfg.sampling)
    data = UnclipData(_one_split(cfg.data), cfg.seed, cfg.batch_size, needs=model.cfg.columns, raw=model.cfg.is_raw)
    if data.interface.clip != manifest.interface["clip"]:
        raise ArtifactError(
            f"{cfg.prior} was trained on CLIP {manifest.interface['clip'][:8]} but {cfg.data.embeddings} holds embeddings of "
            f"CLIP {data.interface.clip[:8]}; evaluate on embeddings of the prior's own CLIP"
        )
    evaluation = PriorEvaluation(model, lambda batch: Noise.at(cfg.seed, batch.position, device), how, cfg.diversity)
    batches: Any = data.val_dataloader()
    count = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision is Precision.bf16):
        for batch in track(batches, f"evaluating {cfg.prior}", batches.dataset.stop):
            evaluation.add(data.on_after_batch_transfer(batch.to(device), 0))
            count += len(batch)
    return {
        "kind": "prior",
        "model": manifest.model,
        "artifact": str(Path(cfg.prior)),
        "hash": manifest.hash,
        "step": manifest.step,
        "data": data.fingerprint,
        "split": cfg.data.val_split,
        "samples": count,
        "seed": cfg.seed,
        "sampling": to_plain(how),
        "measures": evaluation.summary(),
    }


def with_changes(settings: Any, changes: dict[str, Any]) -> Any:
    """A dataclass of settings with some of its fields, nested ones too, replaced; ConfigError for fields it does not have."""
    try:
        return from_plain(over(to_plain(settings), changes), type(settings))
    except ConfigError as error:
        raise ConfigError(f"sampling: {error}") from error


def _one_split(cfg: DataConfig) -> DataConfig:
    """Only the split to evaluate on need be there."""
    assert cfg.val_split is not None
    path = cfg.path if cfg.val_path is None else cfg.val_path
    return replace(cfg, path=path, val_path=None, train_split=cfg.val_split, others=[])
