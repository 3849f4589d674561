"""The prior's network (a causal transformer) and the text transformer of the decoder. Layer names follow diffusers."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.nets.layers import (
    ClipWidths,
    Cond,
    Keep,
    KeyValue,
    Null,
    TimestepEmbedding,
    attend,
    caption_mask,
    keep_rows,
    merge_heads,
    split_heads,
)


class Attention(nn.Module):
    """Multi-head self-attention. ``past`` keys and values stand before those of x."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def keys_values(self, x: Tensor) -> KeyValue:
        return split_heads(self.to_k(x), self.num_heads), split_heads(self.to_v(x), self.num_heads)

    def forward(self, x: Tensor, mask: Tensor | None, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        own = self.keys_values(x)
        keys, values = own if past is None else (torch.cat((past[i], own[i]), dim=2) for i in (0, 1))
        query = split_heads(self.to_q(x), self.num_heads)
        return self.to_out(merge_heads(attend(query, keys, values, mask))), own


class Gelu(nn.Module):
    """Linear, then the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(Gelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then a perceptron of four times the width."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, num_heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """x (B, N, W); mask bool, broadcastable to (B, heads, N, P + N), True = may be seen.

        Returns the new x, and the keys and values of the old one.
        """
        update, own = self.attn1(self.norm1(x), mask, past)
        x = x + update
        return x + self.ff(self.norm3(x)), own

    def keys_values(self, x: Tensor) -> KeyValue:
        """What ``forward`` would return beside the new x."""
        return self.attn1.keys_values(self.norm1(x))


class TransformerBlocks(nn.ModuleList):
    """A stack of blocks, initialised as GLIDE's: weights N(0, 0.25² / width), biases zero."""

    def __init__(self, width: int, depth: int, num_heads: int, gradient_checkpointing: bool = False):
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}; choose a divisor")
        super().__init__(TransformerBlock(width, num_heads) for _ in range(depth))
        self.gradient_checkpointing = gradient_checkpointing
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.25 * width**-0.5)
                nn.init.zeros_(module.bias)

    def run(self, x: Tensor, mask: Tensor | None, past: list[KeyValue] | None = None) -> Tensor:
        """All blocks in turn; ``past`` holds each block's earlier keys and values."""
        for index, block in enumerate(self):
            x, _ = self._block(block, x, mask, past[index] if past is not None else None)
        return x

    def keys_values(self, x: Tensor, mask: Tensor | None) -> list[KeyValue]:
        """Each block's keys and values of x. The last block's output is never read, so it is not computed."""
        collected: list[KeyValue] = []
        *body, last = list(self)
        for block in body:
            x, own = self._block(block, x, mask, None)
            collected.append(own)
        assert isinstance(last, TransformerBlock)
        return [*collected, last.keys_values(x)]

    def _block(self, block: nn.Module, x: Tensor, mask: Tensor | None, past: KeyValue | None) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, mask, past, use_reentrant=False)
        return block(x, mask, past)


class PriorText(Enum):
    """The prior's caption: none, states of the frozen CLIP text tower (Karlo), or an own token embedding (paper)."""

    none = "none"
    clip_states = "clip_states"
    tokens = "tokens"


@dataclass
class PriorNetConfig:
    """A causal transformer. Paper: width 2048, depth 24, 32 heads, text=tokens. Karlo: depth 20, text=clip_states."""

    width: int = 512
    depth: int = 8
    num_heads: int = 8
    text: PriorText = PriorText.clip_states
    null_text: Null = Null.zero
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}; choose a divisor")


@dataclass
class PriorContext:
    """Keys and values of the causal prefix (caption, z_t), one pair a block, (B, heads, L + 1, d); mask (B, L + 1)."""

    keys_values: list[KeyValue]
    mask: Tensor

    def first(self, n: int) -> "PriorContext":
        return PriorContext([(key[:n], value[:n]) for key, value in self.keys_values], self.mask[:n])


class PriorNet(nn.Module):
    """Predicts z_i from its noised form, the caption and z_t (paper §2.2).

    The causal sequence is: L caption states, z_t, timestep, noised z_i, a learned query; the query's output is the
    prediction. Caption and z_t see neither timestep nor noised z_i, so ``prepare`` runs them once for all steps of a
    sampling run and for all K draws of a caption; ``forward`` runs only the last three tokens.

    Captions may be shorter than ``context_length``: the last four positions of the table always belong to z_t,
    timestep, z_i and query, so trimming padding changes nothing. With the same weights the output equals diffusers'
    PriorTransformer.
    """

    def __init__(self, cfg: PriorNetConfig, widths: ClipWidths):
        super().__init__()
        self.cfg, self.widths = cfg, widths
        width, embed_dim = cfg.width, widths.embed_dim
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(embed_dim, width)
        self.embedding_proj = nn.Linear(embed_dim, width)
        if cfg.text is PriorText.clip_states:
            self.encoder_hidden_states_proj = nn.Linear(widths.text_width, width)
        elif cfg.text is PriorText.tokens:
            self.token_embedding = nn.Embedding(widths.vocab_size, width)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, self.num_embeddings + 4, width))
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, width))
        if cfg.null_text is Null.learned:
            self.null_text_emb = nn.Parameter(torch.zeros(embed_dim))
        self.transformer_blocks = TransformerBlocks(width, cfg.depth, cfg.num_heads, cfg.gradient_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embed_dim)

    @property
    def num_embeddings(self) -> int:
        return 0 if self.cfg.text is PriorText.none else self.widths.context_length

    def prepare(self, cond: Cond, keep: Keep) -> PriorContext:
        """Run the prefix. Rows with ``keep.text`` False lose the caption (all positions masked) and z_t (null value).

        Needs ``cond.text_emb`` and, by the config, ``cond.text_seq`` or ``cond.tokens``, at most context_length long.
        """
        if cond.text_emb is None:
            raise ValueError("the prior needs text_emb (z_t)")
        null = self.null_text_emb if self.cfg.null_text is Null.learned else None
        text = self.embedding_proj(keep_rows(cond.text_emb, keep.text, null))[:, None]
        text = text + self.positional_embedding[:, self.num_embeddings, None]
        real = torch.ones(len(text), 1, dtype=torch.bool, device=text.device)
        if self.cfg.text is not PriorText.none:
            states, mask = self._caption(cond)
            text = torch.cat((states, text), dim=1)
            real = torch.cat((mask if keep.text is None else mask & keep.text[:, None], real), dim=1)
        length = text.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()
        # a masked position sees at least itself, else its softmax has no key; nobody reads it
        alone = torch.eye(length, dtype=torch.bool, device=text.device)
        mask = (causal & real[:, None, :] | alone)[:, None]
        return PriorContext(self.transformer_blocks.keys_values(text, mask), real)

    def forward(self, x_t: Tensor, timestep: Tensor, context: PriorContext) -> Tensor:
        """x_t (B, D) or (B, K, D), timestep (B,) or (B, K); returns x_t's shape. The K draws cannot see each other."""
        noised = x_t[:, None] if x_t.ndim == 2 else x_t
        batch, draws, _ = noised.shape
        noised = self.proj_in(noised)
        time = self.time_embedding(timestep if timestep.ndim == 2 else timestep[:, None]).expand_as(noised)
        tokens = torch.stack((time, noised, self.prd_embedding.to(noised.dtype).expand_as(noised)), dim=2)
        tokens = (tokens + self.positional_embedding[:, None, -3:]).flatten(1, 2)
        mask = self._suffix_mask(context.mask, draws)
        tokens = self.transformer_blocks.run(tokens, mask, context.keys_values)
        query = tokens.view(batch, draws, 3, -1)[:, :, 2]
        return self.proj_to_clip_embeddings(self.norm_out(query)).view(x_t.shape)

    def _caption(self, cond: Cond) -> tuple[Tensor, Tensor]:
        source = cond.tokens if self.cfg.text is PriorText.tokens else cond.text_seq
        if source is None:
            name = "tokens" if self.cfg.text is PriorText.tokens else "text_seq"
            raise ValueError(f"a prior with text={self.cfg.text.value} needs {name}")
        length = source.shape[1]
        if length > self.num_embeddings:
            raise ValueError(f"caption of {length} tokens; the prior holds at most {self.num_embeddings}")
        mask = cond.caption_mask()
        if mask is None:
            mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
        embed = self.token_embedding if self.cfg.text is PriorText.tokens else self.encoder_hidden_states_proj
        return embed(source) + self.positional_embedding[:, :length], mask

    @staticmethod
    def _suffix_mask(prefix: Tensor, draws: int) -> Tensor:
        """(B, 1, 3K, L + 1 + 3K): each draw sees the prefix and, causally, its own three tokens."""
        index = torch.arange(3 * draws, device=prefix.device)
        own = (index[:, None] // 3 == index // 3) & (index[:, None] >= index)
        rows = prefix[:, None, None].expand(-1, 1, 3 * draws, -1)
        return torch.cat((rows, own.expand(len(prefix), 1, -1, -1)), dim=-1)


@dataclass
class TextTransformerConfig:
    """The decoder's own text encoder. Paper: width 2048, depth 24, 32 heads."""

    width: int = 512
    depth: int = 6
    num_heads: int = 8


class TextTransformer(nn.Module):
    """GLIDE's text encoder: token embedding, learned positions, pre-norm blocks without a causal mask, final norm."""

    def __init__(self, cfg: TextTransformerConfig, vocab_size: int, context_length: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, cfg.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, context_length, cfg.width))
        self.transformer_blocks = TransformerBlocks(cfg.width, cfg.depth, cfg.num_heads)
        self.norm_out = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, L) int64, mask (B, L) bool (default: real up to end-of-text).

        Returns states (B, L, W) and the last real one (B, W).
        """
        mask = caption_mask(tokens) if mask is None else mask
        length = tokens.shape[1]
        if length > self.positional_embedding.shape[1]:
            raise ValueError(
                f"caption of {length} tokens; the text transformer holds {self.positional_embedding.shape[1]}"
            )
        position = torch.arange(length, device=tokens.device)
        visible = mask | (position == 0)  # a caption without any real token still needs one key
        states = self.token_embedding(tokens) + self.positional_embedding[:, :length]
        states = self.norm_out(self.transformer_blocks.run(states, visible[:, None, None]))
        last = (mask * position).amax(dim=1)
        return states, states[torch.arange(len(tokens), device=tokens.device), last]
