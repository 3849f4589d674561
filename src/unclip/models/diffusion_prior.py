"""The diffusion prior: caption and z_t to z_i (paper §2.2)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.gaussian import GaussianDiffusion
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, Sampler, sample
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models.inputs import in_parts, scaled, text_side
from unclip.models.interface import Interface, PriorConfig
from unclip.models.pca import PCA
from unclip.models.sampling import PriorSampling, check_goes_with
from unclip.nets.layers import ClipWidths, Cond, Keep, NullText
from unclip.nets.prior_run import PriorRun
from unclip.nets.transformer import PriorContext, PriorNet, PriorNetConfig

PAPER_STD = 0.5375  # 17.2 / sqrt(1024): the paper's scale of z_i, as the standard deviation of one of its numbers
MEASURED_PERCENT = range(5, 100, 10)  # of the schedule, where validation looks


class EmbeddingSpace(Enum):
    """The space of the diffused z_i. scaled: unit norm × a constant (paper); whitened: (raw - mean) / std (Karlo).

    pca: whitened along the ``num_components`` first principal components of the raw z_i; the others stay at their mean.
    """

    scaled = "scaled"
    whitened = "whitened"
    pca = "pca"


@dataclass
class DiffusionPriorConfig(PriorConfig):
    """A diffusion model over z_i that predicts x0 with a squared error and drops the text side 10 % of the time.

    ``embedding_scale`` belongs to the scaled space; its default 0.5375·√d is the paper's 17.2 at d = 1024.
    ``num_components`` belongs to the pca space (null: all). ``num_draws`` is the number of noise levels drawn for each
    caption in training; they share its prefix.
    """

    net: PriorNetConfig = field(default_factory=PriorNetConfig)
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(predict=Predict.x0))
    sampling: PriorSampling = field(default_factory=PriorSampling)
    embedding_space: EmbeddingSpace = EmbeddingSpace.scaled
    embedding_scale: float | None = None
    num_components: int | None = None
    drop_text: float = 0.1
    num_draws: int = 1

    def __post_init__(self) -> None:
        if self.embedding_space is not EmbeddingSpace.scaled and self.embedding_scale is not None:
            raise ValueError("embedding_scale belongs to embedding_space=scaled; remove it, whitening sets the scale")
        if self.embedding_space is not EmbeddingSpace.pca and self.num_components is not None:
            raise ValueError("num_components belongs to embedding_space=pca: remove it, or set embedding_space=pca")
        if self.num_components is not None and self.num_components < 1:
            raise ValueError(f"num_components is {self.num_components}; it must be at least 1")
        if self.diffusion.resolution is not None:
            raise ValueError("diffusion.resolution is that of pictures; a prior has none: set it to null")
        if self.diffusion.learned_variance:
            raise ValueError("the prior has no learned variance: set diffusion.learned_variance=false")
        if not 0 <= self.drop_text <= 1:
            raise ValueError(f"drop_text is {self.drop_text}; a probability lies in [0, 1]")
        if self.num_draws < 1:
            raise ValueError(f"num_draws is {self.num_draws}; it must be at least 1")
        self.check(self.sampling)

    def check(self, how: PriorSampling) -> None:
        """ConfigError for sampling settings that do not go with these."""
        check_goes_with(how, self.diffusion)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb", *self.net.text.columns)

    @property
    def is_raw(self) -> bool:
        return self.embedding_space is not EmbeddingSpace.scaled

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("embedding_space",)


class DiffusionPrior(nn.Module):
    """p(z_i | caption, z_t).

    In the scaled space z_t enters the net at unit norm × √d and ``sample`` returns unit-norm z_i. In the whitened and pca
    spaces z_t enters raw and ``sample`` returns raw z_i; ``fit`` must have stored the statistics.
    """

    clip_mean: Tensor
    clip_std: Tensor
    x0_var: Tensor

    def __init__(self, cfg: DiffusionPriorConfig, interface: Interface):
        super().__init__()
        self.cfg, self.interface = cfg, interface
        if (cfg.num_components or 0) > interface.embed_dim:
            raise ValueError(
                f"num_components={cfg.num_components} of embeddings of width {interface.embed_dim}; take fewer"
            )
        self.num_channels = cfg.num_components or interface.embed_dim
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        widths = ClipWidths(interface.embed_dim, interface.text_width, interface.context_length, interface.vocab_size)
        self.net = PriorNet(cfg.net, widths, self.num_channels, cfg.diffusion.self_conditioning)
        self.register_buffer("clip_mean", torch.zeros(1, interface.embed_dim))
        self.register_buffer("clip_std", torch.ones(1, self.num_channels))
        if cfg.embedding_space is EmbeddingSpace.pca:
            self.pca = PCA(interface.embed_dim)
        self.register_buffer("x0_var", torch.empty(0), persistent=False)  # empty: not gathered yet

    @property
    def scaled(self) -> bool:
        return self.cfg.embedding_space is EmbeddingSpace.scaled

    def fit(self, embeddings: Any) -> None:
        """Before training: outside the scaled space mean, standard deviation and axes of the raw z_i, from the training
        embeddings; and the caption "" where it stands for a dropped one."""
        if self.cfg.net.null_text is NullText.empty:
            if embeddings is None:
                raise ConfigError('net.null_text=empty needs the caption "" as CLIP reads it: set data.embeddings')
            self.set_empty_caption(**embeddings.empty_caption())
        match self.cfg.embedding_space:
            case EmbeddingSpace.whitened:
                self.clip_mean.copy_(torch.as_tensor(embeddings.stats["image_mean"]).view(1, -1))
                self.clip_std.copy_(torch.as_tensor(embeddings.stats["image_std"]).view(1, -1).clamp(min=1e-6))
            case EmbeddingSpace.pca:
                blocks = (part["image_emb"] for part in in_parts(embeddings, ["image_emb"]))
                self.pca.fit(blocks, num_components=self.num_channels)
                kept = self.pca.eigenvalues[: self.num_channels]
                usable = int((kept > 1e-6 * kept[0]).sum())
                if usable < len(kept):
                    raise ConfigError(
                        f"z_i of {embeddings.folder} vary along {usable} of the {len(kept)} principal components only, and the "
                        f"others cannot be whitened: set model.num_components={usable}"
                    )
                self.clip_std.copy_(kept.sqrt())

    def set_empty_caption(self, tokens: Tensor, text_emb: Tensor, text_seq: Tensor) -> None:
        """Store the caption "", z_t (D,) raw; see :func:`unclip.nets.empty_caption.set_empty_caption`."""
        self.net.set_empty_caption(tokens, scaled(text_emb) if self.scaled else text_emb, text_seq)

    def statistics(self) -> dict[str, Tensor]:
        """What :meth:`gather` found; empty before."""
        return {"x0_var": self.x0_var} if len(self.x0_var) else {}

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        self.x0_var = statistics["x0_var"].to(self.clip_mean.device)

    def default_sampling(self) -> PriorSampling:
        """As configured; as long as no statistics are there, without analytic variances."""
        how = self.cfg.sampling
        if how.sampler.name is not Sampler.analytic or len(self.x0_var):
            return how
        return replace(how, sampler=replace(how.sampler, name=Sampler.ancestral))

    def cond(self, batch: Batch) -> Cond:
        """The batch's text side, z_t raw."""
        return text_side(batch)

    def prepare(self, cond: Cond, keep: Keep) -> PriorContext:
        """The net's context of a condition as CLIP makes it, z_t raw."""
        return self.net.prepare(self._scaled(cond), keep)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """{"mse": ...} between the predicted and the true z_i, in the space they are diffused in."""
        if batch.image_emb is None or batch.text_emb is None:
            raise ValueError("the prior trains on the columns image_emb and text_emb; ask the data for both")
        keep = Keep(text=noise.uniform((), "drop text") >= self.cfg.drop_text)
        context = self.net.prepare(self._scaled(self.cond(batch)), keep)
        draws = None if self.cfg.num_draws == 1 else self.cfg.num_draws
        return self.diffusion.losses(self.net, self.encode(batch.image_emb), context, noise, num_draws=draws)

    @torch.no_grad()
    def measures(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """``mse_at_05`` ... ``mse_at_95`` (B,): squared errors of the predicted x0 at so many percent of the schedule.

        In the space z_i is diffused in; no caption is dropped.
        """
        context = self.net.prepare(self._scaled(self.cond(batch)), Keep())
        steps = [len(self.diffusion.schedule) * percent // 100 for percent in MEASURED_PERCENT]
        errors = self.diffusion.errors_at(self.net, self.encode(batch.column("image_emb")), context, noise, steps)
        return {f"mse_at_{percent:02}": errors[:, i] for i, percent in enumerate(MEASURED_PERCENT)}

    @torch.no_grad()
    def sample(
        self,
        cond: Cond,
        how: PriorSampling,
        noise: Noise,
        negative: Cond | None = None,
        *,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """z_i (B, D): of ``num_candidates`` draws the one with the largest dot product with z_t, both at unit norm.

        Guidance is against a dropped text side or, where ``negative`` is given, against its captions: B of them, or one.
        """
        assert cond.text_emb is not None, "the prior needs text_emb (z_t)"
        self.cfg.check(how)
        schedule = how.sampler.levels_of(self.diffusion.schedule).to(cond.text_emb.device)
        branches = [self.net.prepare(self._scaled(cond), Keep())]
        if how.guidance.scale != 1.0:
            branches.append(
                self.net.null_context() if negative is None else self.net.prepare(self._scaled(negative), Keep())
            )
        run = PriorRun(self.net, branches, schedule.timesteps, how.num_candidates)
        denoiser = self.diffusion.denoiser_of(
            run,
            schedule,
            shape=(how.num_candidates, self.num_channels),
            guidance=how.guidance,
            sample_dims=1,
            x0_var=self._variances(how),
        )
        drawn = self.decode(sample(how.sampler, denoiser, noise, on_step=on_step))
        return best_candidate(drawn, cond.text_emb)

    def _variances(self, how: PriorSampling) -> Tensor | None:
        if how.sampler.name is not Sampler.analytic:
            return None
        if not len(self.x0_var):
            raise ConfigError(
                "sampler.name=analytic needs statistics that this prior lacks: run `unclip prior-stats RUN`, or take "
                "sampler.name=ancestral"
            )
        return self.x0_var

    @torch.no_grad()
    def gather(self, batches: Iterable[tuple[Batch, Noise]]) -> None:
        """Var[x0 | x_t] at every training step, a number's average, for analytic variances (Bao et al. 2022).

        Γ, the mean square of the predicted eps, is a Monte-Carlo average over the batches (eq. 8 there); then
        Var[x0 | x_t] = (1 - Γ) sigma² / alpha². It is limited as there (theorem 2): to at least 0, and to at most what is
        known of the data, which here is its own variance. No caption is dropped.
        """
        schedule = self.diffusion.schedule
        total, rows, moments = 0.0, 0, torch.zeros(2, self.num_channels, dtype=torch.float64)
        for batch, noise in batches:
            x0 = self.encode(batch.column("image_emb"))
            context = self.net.prepare(self._scaled(self.cond(batch)), Keep())
            total = total + self.diffusion.eps_squares(self.net, x0, context, noise).double().sum(0).cpu()
            rows += len(batch)
            moments += torch.stack((x0.sum(0), x0.square().sum(0))).double().cpu()
        mean, square = moments / rows
        spread = (square - mean**2).mean()
        snr = schedule.snr.double().cpu()
        x0_var = torch.where(snr > 0, (1 - total / rows) / snr, spread)
        self.x0_var = x0_var.clamp(min=0).clamp(max=spread).float().to(self.clip_mean.device)

    def encode(self, image_emb: Tensor) -> Tensor:
        """Raw z_i (..., D) into the space of the diffusion."""
        if self.scaled:
            return F.normalize(image_emb.float(), dim=-1) * self.embedding_scale
        if self.cfg.embedding_space is EmbeddingSpace.pca:
            return self.pca.encode(image_emb) / self.clip_std
        return (image_emb.float() - self.clip_mean) / self.clip_std

    def decode(self, x0: Tensor) -> Tensor:
        """Back from the space of the diffusion: unit norm if scaled, else raw z_i."""
        if self.scaled:
            return F.normalize(x0, dim=-1)
        spread = x0 * self.clip_std
        return self.pca.decode(spread) if self.cfg.embedding_space is EmbeddingSpace.pca else spread + self.clip_mean

    @property
    def embedding_scale(self) -> float:
        scale = self.cfg.embedding_scale
        return PAPER_STD * self.interface.embed_dim**0.5 if scale is None else scale

    def _scaled(self, cond: Cond) -> Cond:
        if not self.scaled or cond.text_emb is None:
            return cond
        return replace(cond, text_emb=scaled(cond.text_emb))


def best_candidate(drawn: Tensor, text_emb: Tensor) -> Tensor:
    """Of drawn (B, K, D), the candidate of each row closest in angle to text_emb (B, D)."""
    closeness = torch.einsum("bkd,bd->bk", F.normalize(drawn, dim=-1), text_emb.to(drawn.dtype))
    return drawn[torch.arange(len(drawn), device=drawn.device), closeness.argmax(dim=1)]
