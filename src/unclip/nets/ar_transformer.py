"""The autoregressive prior's network: a caption encoder, and a causal transformer over codes."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.nets.layers import ClipWidths, Cond, Keep, Null, keep_rows, merge_heads, split_heads
from unclip.nets.transformer import TextTransformer, TextTransformerConfig, TransformerBlock, TransformerBlocks, causal


@dataclass
class ARNetConfig:
    """Paper (table 3): width 1664, depth 24, 26 heads, context 384; its caption encoder: width 2048, depth 24, 32 heads.

    ``context`` is the number of positions for z_t, the dot product and the codes: at least k + 1. With
    ``separate_tables`` each dimension has its own embeddings of the codes and its own output layer (k times as many
    weights); without, the position alone tells dimensions apart.
    """

    width: int = 512
    depth: int = 8
    num_heads: int = 8
    context: int = 384
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    null_text: Null = Null.zero
    separate_tables: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}; choose a divisor")
        if self.context < 2:
            raise ValueError(f"context={self.context} has no room for z_t and the dot product; it must be at least 2")


@dataclass
class Prefix:
    """What stands before dot product and codes: tokens (B, P, W), the caption's states then z_t; mask (B, P)."""

    tokens: Tensor
    mask: Tensor

    def cat(self, other: "Prefix") -> "Prefix":
        """Rows of both; the shorter is filled up on its left, where a caption's states have no place of their own."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        sides = [self._padded(length), other._padded(length)]
        return Prefix(torch.cat([side.tokens for side in sides]), torch.cat([side.mask for side in sides]))

    def repeat(self, k: int) -> "Prefix":
        """Each row k times in a row."""
        return Prefix(self.tokens.repeat_interleave(k, dim=0), self.mask.repeat_interleave(k, dim=0))

    def _padded(self, length: int) -> "Prefix":
        missing = length - self.mask.shape[1]
        return Prefix(F.pad(self.tokens, (0, 0, missing, 0)), F.pad(self.mask, (missing, 0)))


class ARNet(nn.Module):
    """Predicts each code from the caption, z_t, the dot product and the codes before it.

    The causal sequence is: L encoded caption tokens, z_t, the dot product's bucket, codes; what stands at the dot product
    predicts the first code. The caption's states bring the positions of their own encoder with them, so trimming a
    caption changes nothing and ``context`` counts the rest only.

    ``num_codes`` is read with ``separate_tables`` only; otherwise any number of codes that the context holds is one net.
    """

    def __init__(
        self, cfg: ARNetConfig, widths: ClipWidths, num_buckets: int, num_dots: int, num_codes: int | None = None
    ) -> None:
        super().__init__()
        self.cfg, self.widths, self.num_buckets, self.num_dots = cfg, widths, num_buckets, num_dots
        if cfg.separate_tables and num_codes is None:
            raise ValueError("separate_tables needs a fixed number of codes")
        self.num_tables = (num_codes or 1) if cfg.separate_tables else 1
        width = cfg.width
        self.encoder = TextTransformer(cfg.text, widths.vocab_size, widths.context_length)
        self.encoder.transformer_blocks.gradient_checkpointing = cfg.gradient_checkpointing
        self.encoder_hidden_states_proj = nn.Linear(cfg.text.width, width)
        self.embedding_proj = nn.Linear(widths.embed_dim, width)
        if cfg.null_text is Null.learned:
            self.null_text_emb = nn.Parameter(torch.zeros(widths.embed_dim))
        self.dot_embedding = nn.Embedding(num_dots + 1, width)  # the last row stands for a dropped text side
        self.code_embedding = nn.Embedding(self.num_tables * num_buckets, width)
        for table in (self.dot_embedding, self.code_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, cfg.context, width))
        self.transformer_blocks = TransformerBlocks(width, cfg.depth, cfg.num_heads, cfg.gradient_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.head_weight = nn.Parameter(width**-0.5 * torch.randn(self.num_tables, num_buckets, width))
        self.head_bias = nn.Parameter(torch.zeros(self.num_tables, num_buckets))

    def prepare(self, cond: Cond, keep: Keep) -> Prefix:
        """Encode the captions. Rows with ``keep.text`` False lose theirs (masked) and z_t (null value)."""
        if cond.text_emb is None or cond.tokens is None:
            raise ValueError("the autoregressive prior needs text_emb (z_t) and tokens")
        mask = cond.caption_mask()
        assert mask is not None
        states, _ = self.encoder(cond.tokens, mask)
        text = self._text_token(keep_rows(cond.text_emb, keep.text, self._null))
        mask = mask if keep.text is None else mask & keep.text[:, None]
        tokens = torch.cat((self.encoder_hidden_states_proj(states).to(text.dtype), text), dim=1)
        return Prefix(tokens, F.pad(mask, (0, 1), value=True))

    def null_prefix(self, rows: int) -> Prefix:
        """That of dropped text sides: z_t's null value alone, for ``rows`` rows."""
        null = self._null if self._null is not None else self.embedding_proj.weight.new_zeros(self.widths.embed_dim)
        text = self._text_token(null.expand(rows, -1))
        return Prefix(text, torch.ones(rows, 1, dtype=torch.bool, device=text.device))

    def forward(self, codes: Tensor, dot: Tensor, prefix: Prefix) -> Tensor:
        """Logits (B, k, num_buckets) of codes (B, k), each from those before it; dot (B,) in [0, num_dots]."""
        inputs = torch.cat((self.embed_dot(dot), self.embed_codes(codes[:, :-1], 0)), dim=1).to(prefix.tokens.dtype)
        x = torch.cat((prefix.tokens, inputs), dim=1)
        mask = causal(F.pad(prefix.mask, (0, codes.shape[1]), value=True))
        x = self.transformer_blocks.run(x, mask)
        return self.logits(x[:, prefix.tokens.shape[1] :], 0)

    def embed_dot(self, dot: Tensor) -> Tensor:
        """(B,) to (B, 1, W); ``num_dots`` stands for a dropped text side."""
        return self.dot_embedding(dot)[:, None] + self.positional_embedding[:, 1:2]

    def embed_codes(self, codes: Tensor, first: int) -> Tensor:
        """codes (B, n) of the dimensions ``first``, ``first`` + 1, ...: (B, n, W)."""
        places = slice(2 + first, 2 + first + codes.shape[1])
        return self.code_embedding(codes + self._tables(first, codes.shape[1])) + self.positional_embedding[:, places]

    def logits(self, x: Tensor, first: int) -> Tensor:
        """Outputs x (B, n, W) that predict the dimensions ``first``, ``first`` + 1, ...: (B, n, num_buckets)."""
        x = self.norm_out(x)
        if self.num_tables == 1:
            return F.linear(x, self.head_weight[0], self.head_bias[0])
        own = slice(first, first + x.shape[1])
        return torch.einsum("bnw,nvw->bnv", x, self.head_weight[own]) + self.head_bias[own]

    @property
    def _null(self) -> Tensor | None:
        return self.null_text_emb if self.cfg.null_text is Null.learned else None

    def _text_token(self, text_emb: Tensor) -> Tensor:
        return self.embedding_proj(text_emb)[:, None] + self.positional_embedding[:, :1]

    def _tables(self, first: int, count: int) -> Tensor | int:
        """Where each dimension's rows of the code table begin."""
        if self.num_tables == 1:
            return 0
        return torch.arange(first, first + count, device=self.code_embedding.weight.device) * self.num_buckets


class ARRun:
    """Codes one after another: keys and values of all earlier tokens are kept, so a step runs one token a row."""

    def __init__(self, net: ARNet, prefix: Prefix, num_codes: int) -> None:
        self.net = net
        self._blocks = [block for block in net.transformer_blocks if isinstance(block, TransformerBlock)]
        self._dtype = self._blocks[0].norm1.weight.dtype  # of sharded blocks bfloat16, whatever the tokens are
        pairs = net.transformer_blocks.keys_values(prefix.tokens, causal(prefix.mask))
        self._memory = [tuple(F.pad(side, (0, 0, 0, num_codes)) for side in pair) for pair in pairs]
        self._mask = F.pad(prefix.mask, (0, num_codes), value=True)[:, None, None]
        self._length = prefix.mask.shape[1]

    def step(self, token: Tensor, number: int) -> Tensor:
        """The next token (B, 1, W), the dot product's or a code's: logits (B, num_buckets) of dimension ``number``."""
        place = self._length
        self._length += 1
        x, mask = token.to(self._dtype), self._mask[..., : self._length]
        for block, (keys, values) in zip(self._blocks, self._memory, strict=True):
            attention, inner = block.attn1, block.norm1(x)
            own_keys, own_values = attention.keys_values(inner)
            keys[:, :, place : place + 1], values[:, :, place : place + 1] = own_keys, own_values
            query = split_heads(attention.to_q(inner), attention.num_heads)
            seen = (side[:, :, : self._length] for side in (keys, values))
            mixed = F.scaled_dot_product_attention(query, *seen, attn_mask=mask)
            x = x + attention.to_out(merge_heads(mixed))
            x = x + block.ff(block.norm3(x))
        return self.net.logits(x, number)[:, 0]
