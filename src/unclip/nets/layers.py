"""Conditioning containers and the layers that the transformer and the U-Net share. Layer names follow diffusers."""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]


class Null(Enum):
    """What stands for a dropped embedding: zeros or a learned vector (paper §2.1 allows both)."""

    zero = "zero"
    learned = "learned"


class NullText(Enum):
    """What a dropped caption (with its z_t) becomes: nothing, its tokens masked and its vectors zero or learned; or ``empty``,
    the caption "" as CLIP reads it, which is stored with the weights (Karlo)."""

    zero = "zero"
    learned = "learned"
    empty = "empty"


@dataclass
class ClipWidths:
    """Sizes that come from the CLIP: embedding width, token state width, longest caption, number of token ids."""

    embed_dim: int
    text_width: int = 0
    context_length: int = 0
    vocab_size: int = 0


@dataclass
class Keep:
    """Which rows keep their conditioning: bool (B,) each, True = keep; None keeps every row.

    ``image`` rules z_i as a condition of the decoder, ``text`` rules the whole text side: caption and z_t.
    """

    image: Tensor | None = None
    text: Tensor | None = None

    @staticmethod
    def halves(batch_size: int, device: torch.device) -> "Keep":
        """Keep the first B rows and null the next B: the two sides of classifier-free guidance."""
        rows = torch.arange(2 * batch_size, device=device) < batch_size
        return Keep(image=rows, text=rows)


@dataclass
class Cond:
    """What a net is conditioned on. B rows; fields that a net does not use may be None.

    ``image_emb`` (B, D) z_i, ``text_emb`` (B, D) z_t, ``text_seq`` (B, L, W) states of the frozen CLIP text tower,
    ``text_mask`` (B, L) bool with True for real tokens, ``tokens`` (B, L) int64 ids. Embeddings are in the value range
    that the net was trained on; the models scale them before they call a net.
    """

    image_emb: Tensor | None = None
    text_emb: Tensor | None = None
    text_seq: Tensor | None = None
    text_mask: Tensor | None = None
    tokens: Tensor | None = None
    num_rows: int = 0  # read only where all fields are None

    def __len__(self) -> int:
        return self.rows_given

    @property
    def rows_given(self) -> int:
        """The number of rows: symbolic under torch.export, which ``len`` cannot be."""
        return next((value.shape[0] for value in self._fields().values()), self.num_rows)

    def caption_mask(self) -> Tensor | None:
        """(B, L) bool, True for real tokens. Without a mask, tokens are real up to the end-of-text token."""
        if self.text_mask is None and self.tokens is not None:
            return caption_mask(self.tokens)
        return self.text_mask

    def without_text(self) -> "Cond":
        """The same rows with neither caption nor z_t: nets use their null values."""
        return Cond(image_emb=self.image_emb, num_rows=len(self))

    def without_image(self) -> "Cond":
        """The same rows without z_i."""
        return replace(self, image_emb=None, num_rows=len(self))

    def repeat(self, k: int) -> "Cond":
        """Each row k times in a row: (B·k, ...)."""
        fields = {name: value.repeat_interleave(k, dim=0) for name, value in self._fields().items()}
        return Cond(**fields, num_rows=k * self.num_rows)

    def rows(self, rows: list[int]) -> "Cond":
        """These rows, in this order, as a batch of their own."""
        return Cond(**{name: value[rows] for name, value in self._fields().items()}, num_rows=len(rows))

    def to(self, device: torch.device | str) -> "Cond":
        return replace(self, **{name: value.to(device) for name, value in self._fields().items()})

    @staticmethod
    def cat(first: "Cond", second: "Cond") -> "Cond":
        """Rows of both, captions padded to the longer. Both must hold the same fields."""
        sides = [replace(side, text_mask=side.caption_mask())._fields() for side in (first, second)]
        if sides[0].keys() != sides[1].keys():
            raise ValueError(f"cannot join conditions that hold {sorted(sides[0])} and {sorted(sides[1])}")
        joined = {name: torch.cat(same_length(value, sides[1][name])) for name, value in sides[0].items()}
        return Cond(**joined, num_rows=first.num_rows + second.num_rows)

    def _fields(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class Context(Protocol):
    """A condition made ready by ``Net.prepare``; it is used for every step of a sampling run."""

    def first(self, n: int) -> Self: ...


class Net(Protocol):
    """What the diffusion maths asks of a network."""

    def prepare(self, cond: Any, keep: Keep) -> Context: ...

    def __call__(self, x_t: Tensor, timestep: Tensor, context: Any) -> Tensor: ...


def caption_mask(tokens: Tensor) -> Tensor:
    """(B, L) bool: True up to and including the end-of-text token, the largest id of a row, as in CLIP."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(dim=1, keepdim=True)


def keep_rows(value: Tensor, keep: Tensor | None, null: Tensor | None) -> Tensor:
    """Replace the rows that are not kept by ``null`` (broadcast to one row), or by zeros where null is None."""
    if keep is None:
        return value
    rows = keep.view(-1, *[1] * (value.ndim - 1))
    replacement = value.new_zeros(()) if null is None else null.to(value.dtype)
    if value.dtype == torch.bool:  # onnxruntime chooses among numbers only
        return rows & value | ~rows & replacement
    return torch.where(rows, value, replacement)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep, cosines first (ADM; diffusers' ``flip_sin_to_cos``). (...) to (..., dim) float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[..., None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoid of width ``in_dim``, then a two-layer perceptron. (...) to (..., dim)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        sinusoid = timestep_embedding(timestep, self.in_dim).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v. query (B, heads, N, d), keys and values (B, heads, M, d); mask bool, True = may be seen.

    A CPU trains by plain products: in bfloat16 its fused kernel takes two to four times as long at a U-Net's sizes.
    """
    if not (query.is_cpu and query.requires_grad):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ values


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, heads, N, C / heads), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads·d)."""
    return x.transpose(1, 2).flatten(2)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all weights of a module to zero, so that its branch starts silent (ADM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pad captions (B, L, ...) with zeros to the longer of the two; a masked position may hold anything."""
    length = max(first.shape[1], second.shape[1])
    pads = [value.new_zeros(value.shape[0], length - value.shape[1], *value.shape[2:]) for value in (first, second)]
    return torch.cat((first, pads[0]), dim=1), torch.cat((second, pads[1]), dim=1)
