"""The autoregressive prior: caption and z_t to z_i, one quantised principal component after another (paper §2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep
from unclip.errors import ConfigError
from unclip.models.diffusion_prior import best_candidate
from unclip.models.inputs import in_parts, scaled, text_side
from unclip.models.interface import Interface, PriorConfig
from unclip.models.pca import PCA, Buckets, BucketValue, Edges, quantile_edges, uniform_edges
from unclip.models.sampling import ARSampling
from unclip.nets.ar_transformer import ARNet, ARNetConfig, ARRun, Prefix
from unclip.nets.layers import ClipWidths, Cond, Keep

BLOCK = 16_384  # rows of embeddings that the fit holds at a time


@dataclass
class ARPriorConfig(PriorConfig):
    """A causal transformer over the quantised principal components of unit-norm z_i.

    Components: as many as hold ``explained_variance`` of the variance, or ``num_components`` of them (the paper's CLIP:
    319 of 1,024), by decreasing eigenvalue. Each is cut into ``num_buckets``, by ``edges``: uniform ones reach from
    -``bucket_range`` to ``bucket_range`` standard deviations, the outermost also take what lies beyond; quantile ones
    hold equally many training values. A code stands for its bucket's ``bucket_value``. All this is fitted on ``fit_rows``
    training rows, spread evenly.

    The paper leaves open: the bucket scheme (uniform over ±4 standard deviations here: error 5·10⁻⁶ of the variance, and
    neighbouring codes are equally far apart in every dimension), the number of the dot product's buckets (``num_dots``
    quantiles, 100 here, so that a percentile is one bucket's edge), whether that token is dropped with the text (it is:
    it is made from z_t, and without it a dropped text side leaves p(z_i)), and how the encoded caption enters: here as
    its states, one token each, which see and are seen causally, then z_t, then the dot product.
    """

    net: ARNetConfig = field(default_factory=ARNetConfig)
    sampling: ARSampling = field(default_factory=ARSampling)
    explained_variance: float | None = 0.99
    num_components: int | None = None
    num_buckets: int = 1024
    edges: Edges = Edges.uniform
    bucket_range: float = 4.0
    bucket_value: BucketValue = BucketValue.mean
    num_dots: int = 100
    fit_rows: int = 262_144
    drop_text: float = 0.1

    def __post_init__(self) -> None:
        if (self.explained_variance is None) == (self.num_components is None):
            raise ValueError(
                "the number of codes: give explained_variance or num_components, and set the other to null"
            )
        if self.explained_variance is not None and not 0 < self.explained_variance <= 1:
            raise ValueError(f"explained_variance is {self.explained_variance}; it is a share, above 0 and at most 1")
        if self.num_components is not None and not 1 <= self.num_components < self.net.context:
            raise ValueError(
                f"num_components is {self.num_components}; it must be at least 1, and net.context={self.net.context} holds "
                f"{self.net.context - 1} codes"
            )
        if self.net.separate_tables and self.num_components is None:
            raise ValueError("net.separate_tables needs num_components: its tables must be sized before the fit")
        if self.num_buckets < 2 or self.num_dots < 2 or self.fit_rows < 2:
            raise ValueError(
                f"num_buckets={self.num_buckets}, num_dots={self.num_dots} and fit_rows={self.fit_rows} must be at least 2"
            )
        if self.edges is Edges.quantile and self.bucket_range != 4.0:
            raise ValueError(
                "bucket_range is the reach of edges=uniform; the data set that of quantile edges: leave it out"
            )
        if self.net.text.gradient_checkpointing:
            raise ValueError("set net.gradient_checkpointing, which holds for the caption's encoder too")
        if self.bucket_range <= 0:
            raise ValueError(f"bucket_range is {self.bucket_range}; standard deviations on either side are positive")
        if not 0 <= self.drop_text <= 1:
            raise ValueError(f"drop_text is {self.drop_text}; a probability lies in [0, 1]")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image_emb", "text_emb", "tokens")

    @property
    def fitted(self) -> tuple[str, ...]:
        codes = ("explained_variance", "num_components", "num_buckets", "edges", "bucket_range", "bucket_value")
        return (*codes, "num_dots", "fit_rows")


class ARPrior(nn.Module):
    """p(z_i | caption, z_t) = p(dot product) · Π p(code j | codes before j, dot product, caption, z_t).

    z_t enters the net at unit norm × √d; ``sample`` returns unit-norm z_i. ``fit`` must have run, or a state been loaded:
    basis, edges, values and quantiles are buffers.
    """

    dot_edges: Tensor

    def __init__(self, cfg: ARPriorConfig, interface: Interface) -> None:
        super().__init__()
        self.cfg, self.interface = cfg, interface
        if (cfg.num_components or 0) > interface.embed_dim:
            raise ValueError(
                f"num_components={cfg.num_components} of embeddings of width {interface.embed_dim}; take fewer"
            )
        widths = ClipWidths(interface.embed_dim, interface.text_width, interface.context_length, interface.vocab_size)
        self.net = ARNet(cfg.net, widths, cfg.num_buckets, cfg.num_dots, cfg.num_components)
        self.pca = PCA(interface.embed_dim)
        self.buckets = Buckets(cfg.num_buckets)
        self.register_buffer("dot_edges", torch.linspace(-1, 1, cfg.num_dots + 1))

    @property
    def num_codes(self) -> int:
        """k; ValueError before the fit."""
        if self.pca.num_components == 0:
            raise ValueError(
                "this autoregressive prior has no components yet: call fit(embeddings), or load an artifact"
            )
        return self.pca.num_components

    def fit(self, embeddings: Any) -> None:
        """Components, buckets and the dot product's quantiles, from rows of the training embeddings.

        Two passes over at most ``fit_rows`` rows; covariance and bucket means in float64. Raises ConfigError where more
        codes are wanted than ``net.context`` holds.
        """
        cfg = self.cfg
        blocks = (images for images, _ in self._blocks(embeddings))
        if cfg.explained_variance is None:
            self.pca.fit(blocks, num_components=cfg.num_components)
        else:
            self.pca.fit(blocks, share=cfg.explained_variance)
        if self.num_codes >= cfg.net.context:
            raise ConfigError(
                f"{cfg.explained_variance:.4g} of the variance takes {self.num_codes} components, but model.net.context="
                f"{cfg.net.context} holds {cfg.net.context - 1}; raise it, or lower model.explained_variance"
            )
        passes = [(self.pca.encode(i.float()), (i * t).sum(1).float()) for i, t in self._blocks(embeddings)]
        coefficients, dots = (torch.cat(parts) for parts in zip(*passes, strict=True))
        if cfg.edges is Edges.uniform:
            spread = self.pca.eigenvalues[: self.num_codes].sqrt()
            edges = uniform_edges(spread, cfg.num_buckets, cfg.bucket_range)
        else:
            edges = quantile_edges(coefficients, cfg.num_buckets)
        self.buckets.fit(coefficients, edges, cfg.bucket_value)
        self.dot_edges.copy_(quantile_edges(dots[:, None], cfg.num_dots)[0])

    def assume_fit(self) -> None:
        """Zeros in the shapes of a fit with as many codes as these settings allow: for a plan, which has no embeddings."""
        count = self.cfg.num_components or self.cfg.net.context - 1
        self.pca.basis = torch.zeros(count, self.interface.embed_dim)
        self.buckets.edges = torch.zeros(count, self.cfg.num_buckets + 1)
        self.buckets.values = torch.zeros(count, self.cfg.num_buckets)

    def default_sampling(self) -> ARSampling:
        return self.cfg.sampling

    def cond(self, batch: Batch) -> Cond:
        """The batch's text side, z_t raw."""
        return text_side(batch)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """{"cross_entropy": ...}, in nats per code. Rows lose the text side, the dot product with it, by chance."""
        keep = noise.uniform((), "drop text") >= self.cfg.drop_text
        return {"cross_entropy": self._nats(batch, Keep(text=keep)).mean()}

    @torch.no_grad()
    def measures(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """(B,) each: ``nats_per_code`` without drops, and what components and buckets lose of z_i whatever the net does.

        ``reconstruction_mse`` is the squared error as a share of the squared norm (the paper's CLIP: below 0.01),
        ``reconstruction_cosine`` the cosine to the true z_i.
        """
        true = F.normalize(batch.column("image_emb").float(), dim=-1)
        again = self.pca.decode(self.buckets.decode(self.encode(true)))
        return {
            "nats_per_code": self._nats(batch, Keep()).mean(dim=1),
            "reconstruction_mse": (again - true).square().sum(dim=1),
            "reconstruction_cosine": F.cosine_similarity(again, true, dim=1),
        }

    @torch.no_grad()
    def sample(
        self,
        cond: Cond,
        how: ARSampling,
        noise: Noise,
        negative: Cond | None = None,
        *,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Unit-norm z_i (B, D): of ``num_candidates`` draws the one with the largest dot product with z_t.

        Guidance is against no text or, where ``negative`` is given, against its caption with the same dot product.
        """
        if cond.text_emb is None:
            raise ValueError("the prior needs text_emb (z_t)")
        prefix = self.net.prepare(self._scaled(cond), Keep()).repeat(how.num_candidates)
        noise = noise.repeat(how.num_candidates)
        dot = self.draw_dot(how, noise)
        if how.guidance_scale != 1.0:
            other, other_dot = self._unguided(negative, len(cond), dot, how.num_candidates)
            prefix, dot = prefix.cat(other), torch.cat((dot, other_dot))
        drawn = self.decode(self._draw(prefix, dot, how, noise, on_step))
        return best_candidate(drawn.view(len(cond), how.num_candidates, -1), cond.text_emb)

    def encode(self, image_emb: Tensor) -> Tensor:
        """Codes (B, k) int64 of raw z_i (B, D), the component of the largest variance first."""
        coefficients = self.pca.encode(F.normalize(image_emb.float(), dim=-1))
        return self.buckets.encode(coefficients.view(len(image_emb), self.num_codes))

    def decode(self, codes: Tensor) -> Tensor:
        """Unit-norm z_i (B, D) of codes (B, k)."""
        return F.normalize(self.pca.decode(self.buckets.decode(codes)), dim=-1)

    def dot_bucket(self, dot: Tensor) -> Tensor:
        """Bucket numbers of dot products of unit-norm z_i and z_t."""
        return torch.bucketize(dot, self.dot_edges[1:-1], right=True)

    def draw_dot(self, how: ARSampling, noise: Noise) -> Tensor:
        """(B,) buckets of dot products drawn from above ``how.percentile`` of the training pairs' distribution."""
        share = how.percentile / 100
        place = (share + (1 - share) * noise.uniform((), "dot product")) * self.cfg.num_dots
        low = place.floor().long().clamp(max=self.cfg.num_dots - 1)
        return self.dot_bucket(torch.lerp(self.dot_edges[low], self.dot_edges[low + 1], place - low))

    def _draw(self, prefix: Prefix, dot: Tensor, how: ARSampling, noise: Noise, on_step: OnStep | None) -> Tensor:
        """Codes (B, k); with guidance, ``prefix`` and ``dot`` hold the unguided rows after the B others."""
        uniform = noise.uniform((self.num_codes,), "codes")
        run, token = ARRun(self.net, prefix, self.num_codes), self.net.embed_dot(dot)
        branches = len(dot) // len(noise)
        codes: list[Tensor] = []
        for number in range(self.num_codes):
            code = how.pick(how.guided(run.step(token.to(prefix.tokens.dtype), number)), uniform[:, number])
            token = self.net.embed_codes(code.repeat(branches)[:, None], number)
            codes.append(code)
            if on_step is not None:
                on_step(number + 1, self.num_codes)
        return torch.stack(codes, dim=1)

    def _unguided(self, negative: Cond | None, rows: int, dot: Tensor, k: int) -> tuple[Prefix, Tensor]:
        if negative is None:
            return self.net.null_prefix(rows * k), torch.full_like(dot, self.cfg.num_dots)
        return self.net.prepare(self._scaled(negative), Keep()).repeat(rows * k // len(negative)), dot

    def _nats(self, batch: Batch, keep: Keep) -> Tensor:
        """(B, k) cross-entropies of the codes."""
        if batch.image_emb is None or batch.text_emb is None or batch.tokens is None:
            raise ValueError(
                "the prior trains on the columns image_emb, text_emb and tokens; ask the data for all three"
            )
        pair = [F.normalize(emb.float(), dim=-1) for emb in (batch.image_emb, batch.text_emb)]
        codes = self.encode(batch.image_emb)
        dot = self.dot_bucket((pair[0] * pair[1]).sum(dim=1))
        if keep.text is not None:
            dot = torch.where(keep.text, dot, self.cfg.num_dots)
        logits = self.net(codes, dot, self.net.prepare(self._scaled(self.cond(batch)), keep))
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="none").view_as(codes)

    def _scaled(self, cond: Cond) -> Cond:
        assert cond.text_emb is not None
        return replace(cond, text_emb=scaled(cond.text_emb))

    def _blocks(self, embeddings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Unit-norm pairs (n, D) of z_i and z_t in float64, of rows spread evenly over the embeddings."""
        for part in in_parts(embeddings, ["image_emb", "text_emb"], BLOCK, self.cfg.fit_rows):
            yield F.normalize(part["image_emb"].double(), dim=1), F.normalize(part["text_emb"].double(), dim=1)
