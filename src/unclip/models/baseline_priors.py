"""Priors to beat: one answer for a caption, without diffusion."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep
from unclip.models.contrastive import ALL, of_all_ranks
from unclip.models.inputs import in_parts, scaled, text_side
from unclip.models.interface import Interface, PriorConfig
from unclip.models.sampling import NoSampling
from unclip.nets.layers import ClipWidths, Cond, Keep, NullText
from unclip.nets.transformer import PrefixNet, PriorNetConfig


@dataclass
class IdentityConfig(PriorConfig):
    """z_t as z_i: the caption's embedding straight into the decoder (paper §5.1)."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb")

    @property
    def trains(self) -> bool:
        return False


@dataclass
class LinearPriorConfig(PriorConfig):
    """Ridge regression from z_t, and with ``caption_mean`` also from the caption's mean state, to z_i.

    ``ridge`` is the penalty on the weights as a share of the inputs' mean variance.
    """

    ridge: float = 1e-3
    caption_mean: bool = False

    def __post_init__(self) -> None:
        if self.ridge < 0:
            raise ValueError(f"ridge is {self.ridge}; it must not be negative")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb", *(("tokens", "text_seq") if self.caption_mean else ()))

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("ridge",)

    @property
    def trains(self) -> bool:
        return False


@dataclass
class MLPPriorConfig(PriorConfig):
    """A perceptron from z_t to z_i with ``depth`` hidden layers."""

    width: int = 1024
    depth: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width={self.width} and depth={self.depth} must be at least 1")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb")


@dataclass
class EclipsePriorConfig(PriorConfig):
    """ECLIPSE (Patel et al. 2023, eq. 3-5): a transformer that predicts z_i at once, by MSE + ``contrast`` · InfoNCE.

    The InfoNCE term tells each predicted z_i's z_t from the batch's others, at CLIP's ``temperature``.
    """

    net: PriorNetConfig = field(default_factory=PriorNetConfig)
    contrast: float = 0.2
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.contrast < 0 or self.temperature <= 0:
            raise ValueError(
                f"contrast={self.contrast} must not be negative, temperature={self.temperature} be positive"
            )
        if self.contrast == 0 and self.temperature != 0.07:
            raise ValueError("temperature is that of the contrast, which contrast=0 leaves out: leave it out too")
        if self.net.null_text is not NullText.zero:
            raise ValueError(f"net.null_text={self.net.null_text.name}: this prior drops no captions; leave it at zero")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb", *self.net.text.columns)


class BaselinePrior(nn.Module):
    """What they share: z_t enters ``predict`` at unit norm × √d, whose z_i is compared with the true one at that norm."""

    def __init__(self, cfg: Any, interface: Interface) -> None:
        super().__init__()
        self.cfg, self.interface = cfg, interface

    def predict(self, cond: Cond) -> Tensor:
        """z_i (B, D) of any norm, for z_t at unit norm × √d."""
        raise NotImplementedError

    def fit(self, embeddings: Any) -> None:
        """Nothing to gather before training."""

    def default_sampling(self) -> NoSampling:
        return NoSampling()

    def cond(self, batch: Batch) -> Cond:
        """The batch's text side, z_t raw."""
        return text_side(batch)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """{"mse": ...} between the predicted and the true z_i, this one at unit norm × √d."""
        return {"mse": F.mse_loss(self._predicted(self.cond(batch)).float(), scaled(batch.column("image_emb")))}

    @torch.no_grad()
    def sample(self, cond: Cond, how: NoSampling, noise: Noise, *, on_step: OnStep | None = None) -> Tensor:
        """Unit-norm z_i (B, D); the noise changes nothing."""
        predicted = self._predicted(cond)
        if on_step is not None:
            on_step(1, 1)
        return F.normalize(predicted.float(), dim=-1)

    def _predicted(self, cond: Cond) -> Tensor:
        if cond.text_emb is None:
            raise ValueError("the prior needs text_emb (z_t)")
        return self.predict(replace(cond, text_emb=scaled(cond.text_emb)))


class IdentityPrior(BaselinePrior):
    def predict(self, cond: Cond) -> Tensor:
        assert cond.text_emb is not None
        return cond.text_emb


class LinearPrior(BaselinePrior):
    """z_i = z_t W + b, solved at once in ``fit``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, cfg: LinearPriorConfig, interface: Interface) -> None:
        super().__init__(cfg, interface)
        inputs = interface.embed_dim + (interface.text_width if cfg.caption_mean else 0)
        self.register_buffer("weight", torch.zeros(inputs, interface.embed_dim))
        self.register_buffer("bias", torch.zeros(interface.embed_dim))

    def fit(self, embeddings: Any) -> None:
        """The weights with the least squared error over all rows plus ridge · mean variance · |W|²."""
        size, outputs = self.weight.shape
        xx, xy = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, outputs, dtype=torch.float64)
        x_sum, y_sum = xx.new_zeros(size), xx.new_zeros(outputs)
        at_once = 1024 if self.cfg.caption_mean else 65536  # states are large
        for part in in_parts(embeddings, self.cfg.columns, at_once):
            cond = Cond(text_emb=scaled(part["text_emb"]), text_seq=part.get("text_seq"), tokens=part.get("tokens"))
            x, y = self._inputs(cond).double(), scaled(part["image_emb"]).double()
            xx, xy, x_sum, y_sum = xx + x.T @ x, xy + x.T @ y, x_sum + x.sum(0), y_sum + y.sum(0)
        x_mean, y_mean = x_sum / len(embeddings), y_sum / len(embeddings)
        covariance = xx / len(embeddings) - x_mean[:, None] * x_mean
        penalty = self.cfg.ridge * covariance.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        weight = torch.linalg.solve(covariance + penalty, xy / len(embeddings) - x_mean[:, None] * y_mean)
        self.weight.copy_(weight)
        self.bias.copy_(y_mean - x_mean @ weight)

    def predict(self, cond: Cond) -> Tensor:
        return self._inputs(cond).float() @ self.weight + self.bias

    def _inputs(self, cond: Cond) -> Tensor:
        """z_t and, by the config, the mean of the caption's states."""
        assert cond.text_emb is not None
        if not self.cfg.caption_mean:
            return cond.text_emb
        return torch.cat((cond.text_emb, caption_mean(cond)), dim=1)


class MLPPrior(BaselinePrior):
    def __init__(self, cfg: MLPPriorConfig, interface: Interface) -> None:
        super().__init__(cfg, interface)
        layers: list[nn.Module] = []
        for number in range(cfg.depth):
            layers += [
                nn.Linear(cfg.width if number else interface.embed_dim, cfg.width),
                nn.LayerNorm(cfg.width),
                nn.GELU(),
            ]
        self.net = nn.Sequential(*layers, nn.Linear(cfg.width, interface.embed_dim))

    def predict(self, cond: Cond) -> Tensor:
        return self.net(cond.text_emb)


class EclipsePrior(BaselinePrior):
    """The sequence is: caption states, z_t, a learned query, whose output is the prediction."""

    def __init__(self, cfg: EclipsePriorConfig, interface: Interface) -> None:
        super().__init__(cfg, interface)
        widths = ClipWidths(interface.embed_dim, interface.text_width, interface.context_length, interface.vocab_size)
        self.net = PrefixNet(cfg.net, widths, num_suffix=1)
        self.query = nn.Parameter(0.01 * torch.randn(1, 1, cfg.net.width))
        self.norm_out = nn.LayerNorm(cfg.net.width)
        self.head = nn.Linear(cfg.net.width, interface.embed_dim)

    def predict(self, cond: Cond) -> Tensor:
        context = self.net.prepare(cond, Keep())
        query = (self.query + self.net.positional_embedding[:, -1:]).expand(len(context.mask), -1, -1)
        mask = F.pad(context.mask, (0, 1), value=True)[:, None, None]
        return self.head(self.norm_out(self.net.transformer_blocks.run(query, mask, context.keys_values)))[:, 0]

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """{"mse": ..., "contrast": ...}, the second weighted. In training it tells apart the rows of all ranks."""
        predicted = self._predicted(self.cond(batch)).float()
        mse = F.mse_loss(predicted, scaled(batch.column("image_emb")))
        pair = F.normalize(predicted, dim=1), F.normalize(batch.column("text_emb").float(), dim=1)
        (image_emb, text_emb), mine = of_all_ranks(*pair) if self.training else (pair, ALL)
        logits = image_emb[mine] @ text_emb.T
        own = torch.arange(len(image_emb), device=logits.device)[mine]
        return {"mse": mse, "contrast": self.cfg.contrast * F.cross_entropy(logits / self.cfg.temperature, own)}


def caption_mean(cond: Cond) -> Tensor:
    """(B, W) mean of the caption's states over its real tokens."""
    if cond.text_seq is None or cond.tokens is None:
        raise ValueError("caption_mean=true needs tokens and text_seq; embed with columns=[…,text_seq]")
    mask = cond.caption_mask()
    assert mask is not None
    mask = mask[:, : cond.text_seq.shape[1], None].float()
    return (cond.text_seq.float() * mask).sum(1) / mask.sum(1)
