"""The prior's network (a causal transformer) and the text transformer of the decoder. Layer names follow diffusers."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.nets.empty_caption import add_empty_caption, empty_captions, set_empty_caption, with_empty_captions
from unclip.nets.layers import (
    ClipWidths,
    Cond,
    Keep,
    KeyValue,
    NullText,
    TimestepEmbedding,
    attend,
    caption_mask,
    keep_rows,
    merge_heads,
    split_heads,
    zero_init,
)

QK_NORM_EPS = 1e-5  # as in diffusers
ALL = slice(None)


class Attention(nn.Module):
    """Multi-head self-attention. ``past`` keys and values stand before those of x.

    ``qk_norm`` scales queries and keys of every head to a root mean square of one (times learned weights), which keeps
    the scores small in bfloat16 (Henry et al. 2020, with RMSNorm).
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.norm_q = nn.RMSNorm(width // num_heads, eps=QK_NORM_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // num_heads, eps=QK_NORM_EPS) if qk_norm else None

    def keys_values(self, x: Tensor) -> KeyValue:
        keys, values = split_heads(self.to_k(x), self.num_heads), split_heads(self.to_v(x), self.num_heads)
        return (keys if self.norm_k is None else self.norm_k(keys).to(values.dtype)), values

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None, looking: slice = ALL
    ) -> tuple[Tensor, KeyValue]:
        own = self.keys_values(x)
        keys, values = own if past is None else (torch.cat((past[i], own[i]), dim=2) for i in (0, 1))
        query = split_heads(self.to_q(x[:, looking]), self.num_heads)
        if self.norm_q is not None:
            query = self.norm_q(query).to(values.dtype)
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

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, num_heads, qk_norm)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: KeyValue | None = None, looking: slice = ALL
    ) -> tuple[Tensor, KeyValue]:
        """x (B, N, W); mask bool, broadcastable to (B, heads, N, P + N), True = may be seen.

        Returns the new x at the positions ``looking`` (whose rows are the mask's), and the keys and values of the old x.
        """
        update, own = self.attn1(self.norm1(x), mask, past, looking)
        x = x[:, looking] + update
        return x + self.ff(self.norm3(x)), own

    def keys_values(self, x: Tensor) -> KeyValue:
        """What ``forward`` would return beside the new x."""
        return self.attn1.keys_values(self.norm1(x))


class TransformerBlocks(nn.ModuleList):
    """A stack of blocks, initialised as GLIDE's: weights N(0, 0.25² / width), biases zero."""

    def __init__(
        self, width: int, depth: int, num_heads: int, gradient_checkpointing: bool = False, qk_norm: bool = False
    ):
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}; choose a divisor")
        super().__init__(TransformerBlock(width, num_heads, qk_norm) for _ in range(depth))
        self.gradient_checkpointing = gradient_checkpointing
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.25 * width**-0.5)
                nn.init.zeros_(module.bias)

    def run(self, x: Tensor, mask: Tensor | None, past: list[KeyValue] | None = None, wanted: slice = ALL) -> Tensor:
        """All blocks in turn; ``past`` holds each block's earlier keys and values. Returns the ``wanted`` positions:
        the others need not go through the last block."""
        *body, last = range(len(self))
        for index in body:
            x, _ = self._block(self[index], x, mask, past[index] if past is not None else None)
        if wanted != ALL and mask is not None:
            mask = mask[..., wanted, :]
        x, _ = self._block(self[last], x, mask, past[last] if past is not None else None, wanted)
        return x

    def keys_values(self, x: Tensor, mask: Tensor | None, past: list[KeyValue] | None = None) -> list[KeyValue]:
        """Each block's keys and values of x. The last block's output is never read, so it is not computed."""
        collected: list[KeyValue] = []
        *body, last = list(self)
        for index, block in enumerate(body):
            x, own = self._block(block, x, mask, past[index] if past is not None else None)
            collected.append(own)
        assert isinstance(last, TransformerBlock)
        return [*collected, last.keys_values(x)]

    def _block(
        self, block: nn.Module, x: Tensor, mask: Tensor | None, past: KeyValue | None, looking: slice = ALL
    ) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, mask, past, looking, use_reentrant=False)
        return block(x, mask, past, looking)


class PriorText(Enum):
    """The prior's caption: none, states of the frozen CLIP text tower (Karlo), or an own token embedding (paper)."""

    none = "none"
    clip_states = "clip_states"
    tokens = "tokens"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that the caption is read from."""
        return {"none": (), "tokens": ("tokens",), "clip_states": ("tokens", "text_seq")}[self.value]


@dataclass
class PriorNetConfig:
    """A causal transformer. Paper: width 2048, depth 24, 32 heads, text=tokens. Karlo: depth 20, text=clip_states.

    ``null_text``: what stands for a dropped caption and z_t; Karlo's is empty.
    """

    width: int = 512
    depth: int = 8
    num_heads: int = 8
    text: PriorText = PriorText.clip_states
    null_text: NullText = NullText.zero
    qk_norm: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}; choose a divisor")

    @property
    def source(self) -> str:
        """The column of a condition that the caption is read from; z_t where it is not read."""
        return {"none": "text_emb", "tokens": "tokens", "clip_states": "text_seq"}[self.text.value]


@dataclass
class PriorContext:
    """Keys and values of the causal prefix (caption, z_t), one pair a block, (B, heads, L + 1, d); mask (B, L + 1)."""

    keys_values: list[KeyValue]
    mask: Tensor

    def first(self, n: int) -> "PriorContext":
        return PriorContext([(key[:n], value[:n]) for key, value in self.keys_values], self.mask[:n])


def causal(mask: Tensor) -> Tensor:
    """(B, 1, N, N) of a mask (B, N): each position sees itself and the unmasked ones before it."""
    length = mask.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    # a masked position sees at least itself, else its softmax has no key; nobody reads it
    alone = torch.eye(length, dtype=torch.bool, device=mask.device)
    return (before & mask[:, None, :] | alone)[:, None]


class PrefixNet(nn.Module):
    """A causal transformer over L caption states and z_t; ``num_suffix`` further tokens see them, but not the reverse.

    Captions may be shorter than ``context_length``: the last positions of the table always belong to z_t and the
    suffix, so trimming padding changes nothing.
    """

    def __init__(self, cfg: PriorNetConfig, widths: ClipWidths, num_suffix: int):
        super().__init__()
        self.cfg, self.widths = cfg, widths
        width, embed_dim = cfg.width, widths.embed_dim
        self.embedding_proj = nn.Linear(embed_dim, width)
        if cfg.text is PriorText.clip_states:
            self.encoder_hidden_states_proj = nn.Linear(widths.text_width, width)
        elif cfg.text is PriorText.tokens:
            self.token_embedding = nn.Embedding(widths.vocab_size, width)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, self.num_embeddings + 1 + num_suffix, width))
        if cfg.null_text is NullText.learned:
            self.null_text_emb = nn.Parameter(torch.zeros(embed_dim))
        elif cfg.null_text is NullText.empty:
            add_empty_caption(self, embed_dim, widths.text_width if cfg.text is PriorText.clip_states else None)
        self.transformer_blocks = TransformerBlocks(
            width, cfg.depth, cfg.num_heads, cfg.gradient_checkpointing, cfg.qk_norm
        )

    @property
    def num_embeddings(self) -> int:
        return 0 if self.cfg.text is PriorText.none else self.widths.context_length

    @property
    def _null(self) -> Tensor | None:
        return self.null_text_emb if self.cfg.null_text is NullText.learned else None

    def prepare(self, cond: Cond, keep: Keep) -> PriorContext:
        """Run the prefix. Rows with ``keep.text`` False lose the caption (all positions masked) and z_t (null value), or with
        ``null_text`` empty get the caption "" instead.

        Needs ``cond.text_emb`` and, by the config, ``cond.text_seq`` or ``cond.tokens``, at most context_length long.
        """
        if cond.text_emb is None:
            raise ValueError("the prior needs text_emb (z_t)")
        if self.cfg.null_text is NullText.empty:
            cond, keep = with_empty_captions(self, cond, keep.text, self.cfg.source), Keep()
        assert cond.text_emb is not None
        text = self._text_token(keep_rows(cond.text_emb, keep.text, self._null))
        real = torch.ones(text.shape[0], 1, dtype=torch.bool, device=text.device)
        if self.cfg.text is not PriorText.none:
            states, mask = self._caption(cond)
            text = torch.cat((states, text), dim=1)
            real = torch.cat((mask if keep.text is None else mask & keep.text[:, None], real), dim=1)
        return PriorContext(self.transformer_blocks.keys_values(text, causal(real)), real)

    def null_context(self) -> PriorContext:
        """The prefix of a dropped text side, for all rows alike: one row, of one token where the caption is masked."""
        if self.cfg.null_text is NullText.empty:
            return self.prepare(empty_captions(self, 1), Keep())
        null = self._null if self._null is not None else self.embedding_proj.weight.new_zeros(self.widths.embed_dim)
        text = self._text_token(null[None])
        real = torch.ones(1, 1, dtype=torch.bool, device=text.device)
        return PriorContext(self.transformer_blocks.keys_values(text, None), real)

    def set_empty_caption(self, tokens: Tensor, text_emb: Tensor, text_seq: Tensor) -> None:
        """Store the caption "", see :func:`unclip.nets.empty_caption.set_empty_caption`."""
        set_empty_caption(self, tokens, text_emb, text_seq)

    def _text_token(self, text_emb: Tensor) -> Tensor:
        return self.embedding_proj(text_emb)[:, None] + self.positional_embedding[:, self.num_embeddings, None]

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


class PriorNet(PrefixNet):
    """Predicts z_i from its noised form, the caption and z_t (paper §2.2).

    The causal sequence is: L caption states, z_t, timestep, noised z_i, a learned query; the query's output is the
    prediction. Caption and z_t see neither timestep nor noised z_i, so ``prepare`` runs them once for all K draws of a
    caption; ``forward`` runs only the last three tokens (in sampling, :class:`unclip.nets.prior_run.PriorRun` does).
    With the same weights the output equals diffusers' PriorTransformer.

    ``num_channels`` is the width of the diffused z_i, by default CLIP's. With ``self_conditioning`` the token of the
    noised z_i also holds the last predicted one.
    """

    def __init__(
        self,
        cfg: PriorNetConfig,
        widths: ClipWidths,
        num_channels: int | None = None,
        self_conditioning: bool = False,
    ):
        super().__init__(cfg, widths, num_suffix=3)
        width, num_channels = cfg.width, num_channels or widths.embed_dim
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(num_channels, width)
        self.proj_last = zero_init(nn.Linear(num_channels, width, bias=False)) if self_conditioning else None
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, num_channels)

    def forward(self, x_t: Tensor, timestep: Tensor, context: PriorContext, x0_last: Tensor | None = None) -> Tensor:
        """x_t (B, D) or (B, K, D), timestep (B,) or (B, K); returns x_t's shape. The K draws cannot see each other."""
        noised = self.proj_in(x_t)
        if self.proj_last is not None and x0_last is not None:
            noised = noised + self.proj_last(x0_last)
        noised = noised[:, None] if x_t.ndim == 2 else noised
        time = self.time_embedding(timestep if timestep.ndim == 2 else timestep[:, None]).expand_as(noised)
        tokens = torch.stack((time, noised, self.prd_embedding.to(noised.dtype).expand_as(noised)), dim=2)
        tokens = (tokens + self.positional_embedding[:, None, -3:]).flatten(1, 2)
        mask = seen(context.mask, noised.shape[1], 3)
        query = self.transformer_blocks.run(tokens, mask, context.keys_values, wanted=slice(2, None, 3))
        return self.proj_to_clip_embeddings(self.norm_out(query)).view(x_t.shape)

    def timestep_keys_values(self, timesteps: Tensor, context: PriorContext) -> list[KeyValue]:
        """Of the timestep token, for timesteps (S,) that cannot see each other: a pair a block, (B, heads, S, d)."""
        time = self.time_embedding(timesteps) + self.positional_embedding[0, -3]
        time = time.expand(len(context.mask), -1, -1)
        return self.transformer_blocks.keys_values(time, seen(context.mask, len(timesteps), 1), context.keys_values)


def seen(prefix: Tensor, draws: int, size: int) -> Tensor:
    """(B, 1, K·size, P + K·size) bool for a prefix mask (B, P) and K draws of ``size`` tokens each.

    Each draw sees the prefix and, causally, its own tokens.
    """
    index = torch.arange(size * draws, device=prefix.device)
    own = (index[:, None] // size == index // size) & (index[:, None] >= index)
    rows = prefix[:, None, None].expand(-1, 1, size * draws, -1)
    return torch.cat((rows, own.expand(prefix.shape[0], 1, -1, -1)), dim=-1)


@dataclass
class TextTransformerConfig:
    """The decoder's own text encoder. Paper: width 2048, depth 24, 32 heads."""

    width: int = 512
    depth: int = 6
    num_heads: int = 8
    gradient_checkpointing: bool = False


class TextTransformer(nn.Module):
    """GLIDE's text encoder: token embedding, learned positions, pre-norm blocks without a causal mask, final norm."""

    def __init__(self, cfg: TextTransformerConfig, vocab_size: int, context_length: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, cfg.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, context_length, cfg.width))
        self.transformer_blocks = TransformerBlocks(cfg.width, cfg.depth, cfg.num_heads, cfg.gradient_checkpointing)
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
        return states, states[torch.arange(tokens.shape[0], device=tokens.device), last]
