"""The decoder: z_i, and optionally the caption, to a picture (paper §2.1)."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.gaussian import (
    Branches,
    Denoiser,
    GaussianDiffusion,
    Handover,
    NetBranches,
    Unfinished,
    steps_below,
)
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, SamplerConfig, sample
from unclip.diffusion.settings import DiffusionConfig, Timesteps, Weighting
from unclip.errors import ConfigError
from unclip.models.inputs import text_side
from unclip.models.interface import Interface, ModelConfig
from unclip.models.pictures import resize, training_pictures
from unclip.models.sampling import DiffusionSampling, check_goes_with
from unclip.models.second_net import take_first
from unclip.nets.conditioned import ConditioningConfig, DecoderNet, DecoderText, SketchConfig
from unclip.nets.layers import ClipWidths, Cond, Keep, NullText
from unclip.nets.unet import UNetConfig, UNetContext


class EmbeddingNorm(Enum):
    """What a model does to CLIP's raw outputs: scale them to unit norm (the paper's form), or nothing (Karlo's)."""

    unit = "unit"
    raw = "raw"


class Embedding(Enum):
    """Which of CLIP's embeddings stands in z_i's place in training: the picture's, or the caption's (the paper's ablation)."""

    image = "image"
    text = "text"


@dataclass
class DecoderConfig(ModelConfig):
    """A diffusion model of ``image_size`` pixels. The paper drops z_i 10 %, the caption 50 % of the time.

    ``embedding_norm`` unit: z_i and z_t enter the net at unit norm × ``embedding_scale``, whose default is √d, so that
    each number has a variance of about one. With raw the default scale is 1.
    ``embedding`` text trains on z_t in place of z_i; such a decoder draws after a prior that hands z_t on (model=identity).

    ``split`` > 0: two nets share the timesteps (expert denoisers, Balaji et al. 2022, sec. 4.1; not in the paper). ``net`` learns
    those above this share of them; ``last_net``, of a shape of its own, those below, which are the last of a sampling run. They
    are trained one after the other: without ``last_net`` the run is of the first one; with it, of the second, and ``first`` is
    the run of a decoder alike but for this, whose net is kept as it is.
    """

    image_size: int = 64
    net: UNetConfig = field(default_factory=lambda: UNetConfig(attention_levels=[1, 2]))
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(learned_variance=True, clip_range=1.0))
    sampling: DiffusionSampling = field(
        default_factory=lambda: DiffusionSampling(SamplerConfig(num_steps=250), Guidance(1.25))
    )
    drop_image: float = 0.1
    drop_text: float = 0.5
    embedding_norm: EmbeddingNorm = EmbeddingNorm.unit
    embedding_scale: float | None = None
    embedding: Embedding = Embedding.image
    split: float = 0.0
    last_net: UNetConfig | None = None
    first: str | None = None

    def __post_init__(self) -> None:
        if self.embedding is Embedding.text and not self.conditioning.image:
            raise ValueError(
                "embedding=text puts z_t in z_i's place, which image=false leaves out: set one of them only"
            )
        for name, net in self.nets.items():
            if not net.attention_levels:
                raise ValueError(
                    f"the decoder reads its context by attention: set {name}.attention_levels, for example [1, 2]"
                )
            if self.image_size % net.stride:
                raise ValueError(
                    f"image_size={self.image_size} is not a multiple of {net.stride}, the stride of {name}"
                )
        self._check_split()
        if self.diffusion.self_conditioning:
            raise ValueError("self-conditioning is for the diffusion prior: set diffusion.self_conditioning=false")
        for name, rate in (("drop_image", self.drop_image), ("drop_text", self.drop_text)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} is {rate}; a probability lies in [0, 1]")

        check_goes_with(self.sampling, self.diffusion)

    def _check_split(self) -> None:
        if not 0 <= self.split < 1 or (self.split and not 0 < self.limit < self.diffusion.num_timesteps):
            raise ValueError(f"split is {self.split}, a share of the timesteps: above 0 and below 1, or 0 for one net")
        if self.last_net is not None and not self.split:
            raise ValueError("last_net takes over from net at a share of the timesteps: set split, or last_net=null")
        if self.first is not None and self.last_net is None:
            raise ValueError("first is the run that last_net takes over from: give the second net's shape in last_net")

    @property
    def nets(self) -> dict[str, UNetConfig]:
        """The nets by name, in the order in which they sample."""
        return {"net": self.net} | ({} if self.last_net is None else {"last_net": self.last_net})

    @property
    def stride(self) -> int:
        """Sides of pictures must be multiples of it."""
        return math.lcm(*(net.stride for net in self.nets.values()))

    @property
    def is_half(self) -> bool:
        """Whether the net for the cleaner timesteps is still to be trained."""
        return bool(self.split) and self.last_net is None

    @property
    def limit(self) -> int:
        """The first timestep that belongs to ``net``, all below being ``last_net``'s."""
        return round(self.split * self.diffusion.num_timesteps)

    def kind_of_net(self) -> tuple[Any, ...]:
        """What two decoders share of which one's net may take over from the other's."""
        net = replace(self.net, dropout=0.0, gradient_checkpointing=False)
        transformer = replace(self.conditioning.transformer, gradient_checkpointing=False)
        sketch = replace(self.conditioning.sketch, dropout=0.0)
        conditioning = replace(self.conditioning, transformer=transformer, sketch=sketch)
        embedding = self.embedding, self.embedding_norm, self.embedding_scale
        # how each net learns is its own affair
        diffusion = replace(self.diffusion, weighting=Weighting.simple, snr_limit=5.0, timesteps=Timesteps.uniform)
        return self.image_size, net, conditioning, diffusion, self.split, embedding

    @property
    def is_raw(self) -> bool:
        return self.embedding_norm is EmbeddingNorm.raw and (self.conditioning.image or self.conditioning.text_emb)

    @property
    def columns(self) -> tuple[str, ...]:
        conditioning = self.conditioning
        return (
            "image",
            *(("image_emb",) if conditioning.image and self.embedding is Embedding.image else ()),
            *(("text_emb",) if conditioning.text_emb or self.embedding is Embedding.text else ()),
            *(("tokens",) if conditioning.text is not DecoderText.none else ()),
            *(("text_seq",) if conditioning.text is DecoderText.clip_states else ()),
        )


class Decoder(nn.Module):
    """p(picture | z_i, caption). ``losses`` trains it, ``sample`` draws pictures in [-1, 1]."""

    def __init__(self, cfg: DecoderConfig, interface: Interface):
        super().__init__()
        self.cfg, self.interface = cfg, interface
        self.diffusion = GaussianDiffusion(cfg.diffusion, range(cfg.limit, cfg.diffusion.num_timesteps))
        widths = ClipWidths(interface.embed_dim, interface.text_width, interface.context_length, interface.vocab_size)
        out_channels = 6 if cfg.diffusion.learned_variance else 3
        self.net = DecoderNet(cfg.net, cfg.conditioning, widths, out_channels)
        self.last_net: DecoderNet | None = None
        if cfg.last_net is not None:
            conditioning = replace(cfg.conditioning, sketch=SketchConfig())  # x_t itself shows more than a sketch
            self.last_net = DecoderNet(cfg.last_net, conditioning, widths, out_channels)
            self.net.requires_grad_(False)
            self.last_diffusion = GaussianDiffusion(cfg.diffusion, range(cfg.limit))

    def fit(self, embeddings: Any) -> None:
        """Before training: take the first net from the run ``first`` where this trains a second one, and store the caption ""
        where it stands for a dropped one, from the training embeddings. ConfigError for another's net."""
        if self.last_net is not None:
            take_first(self, "decoder")
        if self.cfg.conditioning.null_text is not NullText.empty:
            return
        if embeddings is None:
            raise ConfigError('conditioning.null_text=empty needs the caption "" as CLIP reads it: set data.embeddings')
        self.set_empty_caption(**embeddings.empty_caption())

    def set_empty_caption(self, tokens: Tensor, text_emb: Tensor, text_seq: Tensor) -> None:
        """Store the caption "", z_t (D,) raw; see :func:`unclip.nets.empty_caption.set_empty_caption`."""
        emb = self._scaled_emb(text_emb)
        assert emb is not None
        for net in (self.net, self.last_net):
            if net is not None:
                net.text_proj.set_empty_caption(tokens, emb, text_seq)

    def default_sampling(self) -> DiffusionSampling:
        return self.cfg.sampling

    def cond(self, batch: Batch) -> Cond:
        """The batch's conditions, CLIP's raw outputs as they are; columns that the batch lacks are None."""
        own = batch.text_emb if self.cfg.embedding is Embedding.text else batch.image_emb
        return replace(text_side(batch), image_emb=own)

    def prepare(self, cond: Cond, keep: Keep, net: DecoderNet | None = None) -> UNetContext:
        """A net's context, the first one's if none is given, of a condition as CLIP makes it, its embeddings raw."""
        return (net or self.net).prepare(self._scaled(cond), keep)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Scalars whose sum is the loss. Rows lose z_i and the text side by chance, independently."""
        pictures = training_pictures(batch.image, self.cfg.image_size)
        cond = self.cond(batch)
        self._check_columns(cond)
        self._check_widths(cond)
        keep = Keep(
            image=noise.uniform((), "drop image") >= self.cfg.drop_image,
            text=noise.uniform((), "drop text") >= self.cfg.drop_text,
        )
        if self.last_net is not None:
            return self.last_diffusion.losses(self.last_net, pictures, self.prepare(cond, keep, self.last_net), noise)
        context = self.prepare(cond, keep)
        terms = self.diffusion.losses(self.net, pictures, context, noise)
        if context.sketch is not None:
            terms["sketch"] = F.mse_loss(context.sketch.float(), resize(pictures, self.cfg.conditioning.sketch.size))
        return terms

    @torch.no_grad()
    def sample(
        self,
        cond: Cond,
        how: DiffusionSampling,
        noise: Noise,
        negative: Cond | None = None,
        x_T: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], one for each row of ``cond``. Missing conditions count as dropped.

        Guidance is against no condition at all or, where ``negative`` is given, against its caption without z_i.
        ``size``: height and width; None: image_size, which the decoder was trained for.
        """
        denoiser = self.denoiser(cond, how, negative, size)
        return sample(how.sampler, denoiser, noise, x_T=x_T, on_step=on_step).clamp(-1, 1)

    @torch.no_grad()
    def denoiser(
        self,
        cond: Cond,
        how: DiffusionSampling,
        negative: Cond | None = None,
        size: tuple[int, int] | None = None,
    ) -> Denoiser:
        """The decoder under its conditions, as samplers see it; the arguments are those of :meth:`sample`.

        Of a half one the prediction of its last step stands for all cleaner ones.
        """
        shape = (3, *(size or (self.cfg.image_size, self.cfg.image_size)))
        self._check_widths(cond)
        cond, negative = self._scaled(cond), None if negative is None else self._scaled(negative)
        schedule = how.sampler.levels_of(self.diffusion.schedule)

        def branches_of(net: DecoderNet) -> NetBranches:
            return NetBranches(net, guided_context(net, cond, how, negative), schedule)

        branches: Branches = branches_of(self.net)
        if self.last_net is not None:
            branches = Handover(branches, branches_of(self.last_net), steps_below(self.cfg.limit, schedule))
        denoiser = self.diffusion.denoiser_of(branches, schedule, shape=shape, guidance=how.guidance)
        return Unfinished(denoiser, self.cfg.limit) if self.cfg.is_half else denoiser

    def _check_columns(self, cond: Cond) -> None:
        """In training a missing condition is a mistake; in sampling it counts as dropped."""
        conditioning = self.cfg.conditioning
        needed = {
            "image_emb": conditioning.image,
            "text_emb": conditioning.text_emb,
            "text_seq": conditioning.text is DecoderText.clip_states,
            "tokens": conditioning.text.is_own,
        }
        for column, is_needed in needed.items():
            if is_needed and vars(cond)[column] is None:
                raise ValueError(f"the batch has no column {column}, which this decoder trains on; add it to the data")

    def _check_widths(self, cond: Cond) -> None:
        for name, wanted in (("image_emb", self.interface.embed_dim), ("text_emb", self.interface.embed_dim)):
            value: Tensor | None = vars(cond)[name]
            if value is not None and value.shape != (len(cond), wanted):
                raise ValueError(
                    f"{name} has the shape {tuple(value.shape)} where this decoder takes ({len(cond)}, {wanted}), a row for "
                    "each picture as its CLIP makes them: embed with that CLIP"
                )

    def _scaled(self, cond: Cond) -> Cond:
        return replace(cond, image_emb=self._scaled_emb(cond.image_emb), text_emb=self._scaled_emb(cond.text_emb))

    def _scaled_emb(self, emb: Tensor | None) -> Tensor | None:
        if emb is None:
            return None
        scale = self.cfg.embedding_scale
        if self.cfg.embedding_norm is EmbeddingNorm.raw:
            return emb.float() * (1.0 if scale is None else scale)
        return F.normalize(emb.float(), dim=-1) * (emb.shape[-1] ** 0.5 if scale is None else scale)


def guided_context(net: Any, cond: Cond, how: DiffusionSampling, negative: Cond | None = None) -> Any:
    """B rows if guidance never acts; else 2B: first all conditions, then none, or the negative caption without z_i."""
    if how.guidance.scale == 1.0:
        return net.prepare(cond, Keep())
    rows = len(cond)
    keep = Keep.halves(rows, next(net.parameters()).device)
    if negative is None:
        return net.prepare(Cond.cat(cond, cond), keep)
    return net.prepare(Cond.cat(cond, replace(negative, image_emb=cond.image_emb)), Keep(image=keep.image))
