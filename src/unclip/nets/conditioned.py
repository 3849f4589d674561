"""The decoder's and the upsampler's networks: a U-Net with what it is conditioned on."""

from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.nets.empty_caption import add_empty_caption, set_empty_caption, with_empty_captions
from unclip.nets.layers import ClipWidths, Cond, Keep, Null, NullText, TimestepEmbedding, keep_rows, zero_init
from unclip.nets.transformer import TextTransformer, TextTransformerConfig
from unclip.nets.unet import UNet, UNetConfig, UNetContext

NOISE_LEVELS = 1000  # a level of 1 meets the sinusoids as timestep 1000 does


class DecoderText(Enum):
    """The decoder's caption path.

    none; ``clip_states`` of the frozen CLIP text tower (Karlo); an own ``transformer`` (paper); or ``tokens``: an own
    embedding of each token and their sum, which learns a large vocabulary in fewer steps but not the order of words.
    """

    none = "none"
    clip_states = "clip_states"
    transformer = "transformer"
    tokens = "tokens"

    @property
    def is_own(self) -> bool:
        """Whether the decoder itself learns to read the caption's tokens."""
        return self in (DecoderText.transformer, DecoderText.tokens)


@dataclass
class SketchConfig:
    """A small picture drawn from the condition alone: its mean picture, as a perceptron learns it from a loss of its own.

    ``size``: its side in pixels, 0 for none; ``width`` of the perceptron. The U-Net sees it beside the noised picture, since a
    perceptron learns outlines from a vector sooner than a U-Net does (docs/recipes.md). Not in the paper.
    """

    size: int = 0
    width: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 0 or self.width < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"a sketch of size={self.size}, width={self.width}, dropout={self.dropout}: a size is at least 0, a width at "
                "least 1, a dropout in [0, 1)"
            )


@dataclass
class ConditioningConfig:
    """What the decoder sees beside the noised picture.

    ``image``: z_i, added to the timestep embedding and as ``num_image_tokens`` context tokens (paper §2.1).
    ``text``: the caption path. ``text_emb``: z_t, added to the timestep embedding (Karlo; not in the paper).
    ``context_dim``: width of a context token. ``null_image`` and ``null_text``: what stands for a dropped z_i and for a
    dropped caption. ``sketch``: a picture made of z_i, z_t and a caption that the decoder reads itself, see :class:`SketchConfig`.
    """

    image: bool = True
    text: DecoderText = DecoderText.none
    text_emb: bool = False
    context_dim: int = 512
    num_image_tokens: int = 4
    null_image: Null = Null.zero
    null_text: NullText = NullText.zero
    transformer: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)

    def __post_init__(self) -> None:
        if not self.image and self.text is DecoderText.none and not self.text_emb:
            raise ValueError("the decoder has no condition: set image=true or text to clip_states or transformer")
        if self.num_image_tokens < 1 or self.context_dim < 1:
            raise ValueError(
                f"num_image_tokens={self.num_image_tokens} and context_dim={self.context_dim} must be at least 1; "
                "a decoder without z_i has image=false"
            )
        if self.sketch.size and not (self.image or self.text_emb or self.text.is_own):
            raise ValueError(
                "a sketch shows z_i, z_t or a caption that the decoder reads itself, of which there is none: set image or text_emb "
                "to true, or sketch.size=0"
            )
        if self.null_text is not NullText.zero and not self.reads_text:
            raise ValueError(
                f"null_text={self.null_text.name} without a caption path: set text or text_emb, or drop it"
            )

    @property
    def reads_text(self) -> bool:
        """Whether any of the caption, its states and z_t is a condition."""
        return self.text is not DecoderText.none or self.text_emb


class TextProj(nn.Module):
    """Turns z_i, z_t and the caption into context tokens and one vector: the addition to the timestep embedding and, behind it,
    what a sketch is drawn from.

    Names and maths are those of diffusers' UnCLIPTextProjModel; ``transformer``, ``token_embedding`` and
    ``pooled_proj`` exist for captions that the decoder reads itself. Context tokens: those of z_i first, then the caption's.
    """

    def __init__(self, cfg: ConditioningConfig, widths: ClipWidths, vector_dim: int):
        super().__init__()
        self.cfg, self.vector_dim = cfg, vector_dim
        embed_dim = widths.embed_dim
        if cfg.image:
            self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(embed_dim, vector_dim)
            self.clip_extra_context_tokens_proj = nn.Linear(embed_dim, cfg.num_image_tokens * cfg.context_dim)
            if cfg.null_image is Null.learned:
                self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(embed_dim))
        if cfg.text_emb:
            self.embedding_proj = nn.Linear(embed_dim, vector_dim)
            if cfg.null_text is NullText.learned:
                self.null_text_emb = nn.Parameter(torch.zeros(embed_dim))
        if cfg.text is not DecoderText.none:
            width = {
                DecoderText.clip_states: widths.text_width,
                DecoderText.transformer: cfg.transformer.width,
                DecoderText.tokens: cfg.context_dim,
            }[cfg.text]
            self.encoder_hidden_states_proj = nn.Linear(width, cfg.context_dim)
            self.text_encoder_hidden_states_norm = nn.LayerNorm(cfg.context_dim)
        if cfg.text is DecoderText.transformer:
            self.transformer = TextTransformer(cfg.transformer, widths.vocab_size, widths.context_length)
        if cfg.text is DecoderText.tokens:
            self.token_embedding = nn.Embedding(widths.vocab_size, width)  # N(0, 1): smaller learns late
        if cfg.text.is_own:
            self.pooled_proj = nn.Linear(width, vector_dim)
            if cfg.null_text is NullText.learned:
                self.null_pooled = nn.Parameter(torch.zeros(vector_dim))
        if cfg.null_text is NullText.empty:
            states = widths.text_width if cfg.text is DecoderText.clip_states else None
            add_empty_caption(self, embed_dim if cfg.text_emb else None, states)

    @property
    def context_dim(self) -> int:
        """Width of the context tokens; 0 where there are none."""
        return self.cfg.context_dim if self.cfg.image or self.cfg.text is not DecoderText.none else 0

    def forward(self, cond: Cond, keep: Keep) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The condition as one vector (B, vector_dim), context tokens (B, L, context_dim) and their mask.

        The mask (B, L) bool is None where all tokens are real. A condition that is missing counts as dropped.
        """
        rows = cond.rows_given
        if not rows:
            raise ValueError("an empty condition: set Cond.num_rows to the number of pictures")
        if self.cfg.null_text is NullText.empty:
            source = "text_seq" if self.cfg.text is DecoderText.clip_states else "tokens"
            cond, keep = with_empty_captions(self, cond, keep.text, source), Keep(image=keep.image)
        emb = next(self.parameters()).new_zeros(rows, self.vector_dim)
        tokens, masks = [], []
        if self.cfg.image:
            image = self._rows(cond.image_emb, keep.image, "learned_classifier_free_guidance_embeddings", rows)
            emb = emb + self.clip_image_embeddings_project_to_time_embeddings(image)
            # channel-major: a token's channels are num_image_tokens apart
            extra = self.clip_extra_context_tokens_proj(image).unflatten(1, (-1, self.cfg.num_image_tokens))
            tokens.append(extra.transpose(1, 2))
            masks.append(torch.ones(rows, self.cfg.num_image_tokens, dtype=torch.bool, device=emb.device))
        if self.cfg.text_emb:
            emb = emb + self.embedding_proj(self._rows(cond.text_emb, keep.text, "null_text_emb", rows))
        states, mask, pooled = self._caption(cond)
        if self.cfg.text.is_own:
            emb = emb + self._rows(pooled, keep.text, "null_pooled", rows, self.vector_dim)
        if states is None:
            return emb, torch.cat(tokens, dim=1) if tokens else None, None
        tokens.append(self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(states)))
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=emb.device)
        masks.append(mask if keep.text is None else mask & keep.text[:, None])
        return emb, torch.cat(tokens, dim=1), torch.cat(masks, dim=1)

    def set_empty_caption(self, tokens: Tensor, text_emb: Tensor, text_seq: Tensor) -> None:
        """Store the caption "", see :func:`unclip.nets.empty_caption.set_empty_caption`."""
        set_empty_caption(self, tokens, text_emb, text_seq)

    def _rows(self, value: Tensor | None, keep: Tensor | None, null: str, rows: int, width: int = 0) -> Tensor:
        """``value`` with its dropped rows replaced by the parameter named ``null``, or by zeros if there is none."""
        learned = dict(self.named_parameters(recurse=False)).get(null)
        if value is not None:
            return keep_rows(value, keep, learned)
        if learned is not None:
            return learned.expand(rows, -1)
        return next(self.parameters()).new_zeros(rows, width or self._embed_dim)

    @property
    def _embed_dim(self) -> int:
        proj = self.clip_image_embeddings_project_to_time_embeddings if self.cfg.image else self.embedding_proj
        return proj.in_features

    def _caption(self, cond: Cond) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Caption states, their mask, and the caption as one vector (B, vector_dim).

        That vector is the transformer's last state (GLIDE), or the sum of the n tokens' embeddings / sqrt(n).
        """
        if self.cfg.text is DecoderText.transformer and cond.tokens is not None:
            mask = cond.caption_mask()
            states, last = self.transformer(cond.tokens, mask)
            return states, mask, self.pooled_proj(last)
        if self.cfg.text is DecoderText.tokens and cond.tokens is not None:
            mask = cond.caption_mask()
            assert mask is not None
            states = self.token_embedding(cond.tokens)
            total = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
            return states, mask, self.pooled_proj(total)
        if self.cfg.text is DecoderText.clip_states and cond.text_seq is not None:
            return cond.text_seq, cond.caption_mask(), None
        return None, None, None


class Sketch(nn.Module):
    """The condition as one vector (B, width) to a picture (B, 3, size, size)."""

    def __init__(self, cfg: SketchConfig):
        super().__init__()
        self.size = cfg.size
        self.hidden = nn.Linear(cfg.width, cfg.width)
        self.out = zero_init(nn.Linear(cfg.width, 3 * cfg.size**2))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, emb: Tensor) -> Tensor:
        h = self.dropout(F.silu(self.hidden(self.dropout(F.silu(emb)))))
        return self.out(h).unflatten(1, (3, self.size, self.size))


class DecoderNet(nn.Module):
    """The decoder's network: ``text_proj`` prepares the condition, ``sketch`` draws it, ``unet`` denoises."""

    def __init__(self, cfg: UNetConfig, conditioning: ConditioningConfig, widths: ClipWidths, out_channels: int = 3):
        super().__init__()
        sketch = conditioning.sketch
        self._widths = [cfg.time_dim] + ([sketch.width] if sketch.size else [])
        self.text_proj = TextProj(conditioning, widths, sum(self._widths))
        self.sketch = Sketch(sketch) if sketch.size else None
        channels = 6 if sketch.size else 3
        self.unet = UNet(cfg, channels, out_channels, self.text_proj.context_dim if cfg.attention_levels else 0)

    def prepare(self, cond: Cond, keep: Keep) -> UNetContext:
        emb, tokens, mask = self.text_proj(cond, keep)
        time_emb, *own = emb.split(self._widths, dim=1)
        context = self.unet.context(time_emb, tokens, mask)
        if self.sketch is not None:
            context.sketch = self.sketch(*own)
        return context

    def forward(self, x_t: Tensor, timestep: Tensor, context: UNetContext) -> Tensor:
        """x_t (B, 3, S, S), timestep (B,); returns (B, out_channels, S, S)."""
        if context.sketch is None:
            return self.unet(x_t, timestep, context)
        sketch = context.sketch.detach().to(x_t.dtype)  # it has its own loss
        if sketch.shape[-2:] != x_t.shape[-2:]:
            sketch = F.interpolate(sketch, x_t.shape[-2:], mode="bilinear", align_corners=False)
        return self.unet(torch.cat((x_t, sketch), dim=1), timestep, context)


@dataclass
class UpsamplerContext:
    """The low-resolution picture, resized to the target size, and what its noise level adds to the timestep embedding.

    low (B, 3, H, W) in [-1, 1]; emb (B, time_dim), None without noise conditioning.
    """

    low: Tensor
    emb: Tensor | None = None

    def first(self, n: int) -> "UpsamplerContext":
        return UpsamplerContext(self.low[:n], None if self.emb is None else self.emb[:n])

    def cut(self, rows: slice, columns: slice) -> "UpsamplerContext":
        """Of a part of the picture."""
        return UpsamplerContext(self.low[:, :, rows, columns], self.emb)


class UpsamplerNet(nn.Module):
    """The upsampler's network: the resized low-resolution picture joins the noised one on the channels.

    ``noise_conditioning`` adds an embedding of the low-resolution picture's noise level to that of the timestep, under
    diffusers' name ``class_embedding`` (UNet2DModel with ``class_embed_type="timestep"``). With ``residual`` the
    predicted x0 is the resized low-resolution picture plus the U-Net's output.
    """

    def __init__(
        self, cfg: UNetConfig, out_channels: int = 3, noise_conditioning: bool = False, residual: bool = False
    ):
        super().__init__()
        self.residual = residual
        self.unet = UNet(cfg, 6, out_channels)
        self.class_embedding = TimestepEmbedding(cfg.channels[0], cfg.time_dim) if noise_conditioning else None

    def prepare(self, low: Tensor, noise_level: Tensor | None = None) -> UpsamplerContext:
        """``low`` (B, 3, H, W) is never dropped (paper §2.1: no guidance); ``noise_level`` (B,), its noise's deviation."""
        if self.class_embedding is None:
            return UpsamplerContext(low)
        if noise_level is None:
            raise ValueError("an upsampler with noise conditioning needs the level of each picture's noise")
        return UpsamplerContext(low, self.class_embedding(NOISE_LEVELS * noise_level))

    def forward(self, x_t: Tensor, timestep: Tensor, context: UpsamplerContext) -> Tensor:
        """x_t (B, 3, H, W), sides multiples of the net's stride; timestep (B,); returns (B, out_channels, H, W)."""
        out = self.unet(torch.cat((x_t, context.low), dim=1), timestep, UNetContext(context.emb))
        if not self.residual:
            return out
        prediction, *variance = out.split(3, dim=1)
        return torch.cat((prediction + context.low, *variance), dim=1)
