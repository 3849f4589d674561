"""The diffusion prior: caption and z_t to z_i (paper §2.2)."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.gaussian import DiffusionConfig, GaussianDiffusion, Predict
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import sample
from unclip.models.decoder import cut_to, guided_context
from unclip.models.interface import Interface, PriorConfig
from unclip.models.sampling import PriorSampling
from unclip.nets.layers import ClipWidths, Cond, Keep
from unclip.nets.transformer import PriorNet, PriorNetConfig, PriorText

PAPER_STD = 0.5375  # 17.2 / sqrt(1024): the paper's scale of z_i, as the standard deviation of one of its numbers
MEASURED_PERCENT = range(5, 100, 10)  # of the schedule, where validation looks


class EmbeddingSpace(Enum):
    """The space of the diffused z_i. scaled: unit norm × a constant (paper); whitened: (raw - mean) / std (Karlo)."""

    scaled = "scaled"
    whitened = "whitened"


@dataclass
class DiffusionPriorConfig(PriorConfig):
    """A diffusion model over z_i that predicts x0 with a squared error and drops the text side 10 % of the time.

    ``embedding_scale`` belongs to the scaled space; its default 0.5375·√d is the paper's 17.2 at d = 1024.
    ``num_draws`` is the number of noise levels drawn for each caption in training; they share its prefix.
    """

    net: PriorNetConfig = field(default_factory=PriorNetConfig)
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(predict=Predict.x0))
    sampling: PriorSampling = field(default_factory=PriorSampling)
    embedding_space: EmbeddingSpace = EmbeddingSpace.scaled
    embedding_scale: float | None = None
    drop_text: float = 0.1
    num_draws: int = 1

    def __post_init__(self) -> None:
        if self.embedding_space is EmbeddingSpace.whitened and self.embedding_scale is not None:
            raise ValueError("embedding_scale belongs to embedding_space=scaled; remove it, whitening sets the scale")
        if self.diffusion.learned_variance:
            raise ValueError("the prior has no learned variance: set diffusion.learned_variance=false")
        if not 0 <= self.drop_text <= 1:
            raise ValueError(f"drop_text is {self.drop_text}; a probability lies in [0, 1]")
        if self.num_draws < 1:
            raise ValueError(f"num_draws is {self.num_draws}; it must be at least 1")

    @property
    def columns(self) -> tuple[str, ...]:
        caption = {PriorText.none: (), PriorText.tokens: ("tokens",), PriorText.clip_states: ("tokens", "text_seq")}
        return ("image_emb", "text_emb", *caption[self.net.text])


class DiffusionPrior(nn.Module):
    """p(z_i | caption, z_t).

    In the scaled space z_t enters the net at unit norm × √d and ``sample`` returns unit-norm z_i. In the whitened space
    z_t enters raw and ``sample`` returns raw z_i; ``fit`` must have stored the statistics.
    """

    clip_mean: Tensor
    clip_std: Tensor

    def __init__(self, cfg: DiffusionPriorConfig, interface: Interface):
        super().__init__()
        self.cfg, self.interface = cfg, interface
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        widths = ClipWidths(interface.embed_dim, interface.text_width, interface.context_length, interface.vocab_size)
        self.net = PriorNet(cfg.net, widths)
        self.register_buffer("clip_mean", torch.zeros(1, interface.embed_dim))
        self.register_buffer("clip_std", torch.ones(1, interface.embed_dim))

    @property
    def whitened(self) -> bool:
        return self.cfg.embedding_space is EmbeddingSpace.whitened

    def fit(self, embeddings: Any) -> None:
        """In the whitened space: take mean and standard deviation of the raw z_i from the training embeddings."""
        if self.whitened:
            self.clip_mean.copy_(torch.as_tensor(embeddings.stats["image_mean"]).view(1, -1))
            self.clip_std.copy_(torch.as_tensor(embeddings.stats["image_std"]).view(1, -1).clamp(min=1e-6))

    def finish(self, embeddings: Any) -> None:
        """Nothing to gather after training."""

    def default_sampling(self) -> PriorSampling:
        return self.cfg.sampling

    def cond(self, batch: Batch) -> Cond:
        """The batch's text side, z_t raw."""
        return Cond(
            text_emb=batch.text_emb,
            text_seq=cut_to(batch.text_seq, batch.tokens),
            tokens=batch.tokens,
            num_rows=len(batch),
        )

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
    def sample(self, cond: Cond, how: PriorSampling, noise: Noise, negative: Cond | None = None) -> Tensor:
        """z_i (B, D): of ``num_candidates`` draws the one with the largest dot product with z_t, both at unit norm."""
        assert cond.text_emb is not None, "the prior needs text_emb (z_t)"
        context = guided_context(
            self.net, self._scaled(cond), how, None if negative is None else self._scaled(negative)
        )
        denoiser = self.diffusion.denoiser(
            self.net,
            context,
            shape=(how.num_candidates, self.interface.embed_dim),
            num_steps=how.sampler.num_steps,
            guidance=how.guidance,
        )
        drawn = self.decode(sample(how.sampler, denoiser, noise))
        return best_candidate(drawn, cond.text_emb)

    def encode(self, image_emb: Tensor) -> Tensor:
        """Raw z_i (B, D) into the space of the diffusion."""
        if self.whitened:
            return (image_emb.float() - self.clip_mean) / self.clip_std
        return F.normalize(image_emb.float(), dim=-1) * self.embedding_scale

    def decode(self, x0: Tensor) -> Tensor:
        """Back from the space of the diffusion: raw z_i if whitened, else unit norm."""
        return x0 * self.clip_std + self.clip_mean if self.whitened else F.normalize(x0, dim=-1)

    @property
    def embedding_scale(self) -> float:
        scale = self.cfg.embedding_scale
        return PAPER_STD * self.interface.embed_dim**0.5 if scale is None else scale

    def _scaled(self, cond: Cond) -> Cond:
        if self.whitened or cond.text_emb is None:
            return cond
        return replace(cond, text_emb=F.normalize(cond.text_emb.float(), dim=-1) * cond.text_emb.shape[-1] ** 0.5)


def best_candidate(drawn: Tensor, text_emb: Tensor) -> Tensor:
    """Of drawn (B, K, D), the candidate of each row closest in angle to text_emb (B, D)."""
    closeness = torch.einsum("bkd,bd->bk", F.normalize(drawn, dim=-1), text_emb.to(drawn.dtype))
    return drawn[torch.arange(len(drawn), device=drawn.device), closeness.argmax(dim=1)]
