"""The ADM U-Net (Dhariwal & Nichol 2021) as GLIDE, Karlo and diffusers use it. Layer names follow diffusers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.nets.layers import KeyValue, TimestepEmbedding, attend, merge_heads, split_heads, zero_init


@dataclass
class UNetConfig:
    """Shape of a U-Net; numbers of channels in and out and the context's width belong to the model that uses it.

    ``attention_levels`` are indices into ``channels`` (0 = full resolution); empty gives the convolution-only net of
    the upsamplers, whose middle block has no attention either. ``groups`` must divide every entry of ``channels``.
    ``patch`` > 1 works on squares of patch x patch pixels: cheaper by patch² at every level. ``scale_shift`` False adds
    the timestep embedding instead (diffusers' UNet2DModel, Karlo's upsamplers).
    Paper: 64 px: [512, 1024, 1536, 2048], 3 blocks, attention_levels [1, 2, 3].
    """

    channels: list[int] = field(default_factory=lambda: [128, 256, 384])
    num_blocks: int = 2
    attention_levels: list[int] = field(default_factory=list)
    head_dim: int = 64
    dropout: float = 0.0
    groups: int = 32
    scale_shift: bool = True
    patch: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.channels or self.num_blocks < 1 or self.patch < 1:
            raise ValueError("a U-Net needs at least one level of channels, one block a level and patch >= 1")
        odd = [width for width in self.channels if width % self.groups]
        if odd:
            raise ValueError(f"groups={self.groups} does not divide channels {odd}; use a common divisor, such as 16")
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ValueError(f"attention level {level} is outside 0..{len(self.channels) - 1}")
        odd = [self.channels[level] for level in self.attention_widths() if self.channels[level] % self.head_dim]
        if odd:
            raise ValueError(f"head_dim={self.head_dim} does not divide channels {odd} of the levels with attention")

    def attention_widths(self) -> list[int]:
        """Levels that hold attention layers; the middle block counts as the last level."""
        return sorted({*self.attention_levels, len(self.channels) - 1}) if self.attention_levels else []

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.channels[0]

    @property
    def stride(self) -> int:
        """Pixels per cell of the coarsest level: a picture's sides must be multiples of it."""
        return self.patch * 2 ** (len(self.channels) - 1)


@dataclass
class UNetContext:
    """Made once per batch or sampling run.

    ``emb`` (B, time_dim) is added to the timestep embedding; ``keys_values`` hold the context tokens of each attention
    layer in the order of the forward pass, (B, heads, L, head_dim) each; ``mask`` (B, L) bool, None if all are real;
    ``sketch`` (B, 3, s, s) is what the condition alone looks like, None without one.
    """

    emb: Tensor | None = None
    keys_values: list[KeyValue] = field(default_factory=list)
    mask: Tensor | None = None
    sketch: Tensor | None = None

    def first(self, n: int) -> "UNetContext":
        return UNetContext(
            emb=None if self.emb is None else self.emb[:n],
            keys_values=[(key[:n], value[:n]) for key, value in self.keys_values],
            mask=None if self.mask is None else self.mask[:n],
            sketch=None if self.sketch is None else self.sketch[:n],
        )


class ResnetBlock(nn.Module):
    """ADM's residual block; ``resample`` is "", "down" (2x2 mean) or "up" (nearest), applied to both branches."""

    def __init__(self, cfg: UNetConfig, in_channels: int, out_channels: int, resample: str = ""):
        super().__init__()
        self.resample, self.scale_shift = resample, cfg.scale_shift
        self.norm1 = nn.GroupNorm(cfg.groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.time_dim, out_channels * (2 if cfg.scale_shift else 1))
        self.norm2 = nn.GroupNorm(cfg.groups, out_channels)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W); emb (B, time_dim), already through SiLU."""
        h = F.silu(normed(self.norm1, x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(value, scale_factor=2.0, mode="nearest").to(value.dtype) for value in (h, x))
        h = self.conv1(h)
        shift = self.time_emb_proj(emb)
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = modulated_norm(self.norm2, h, scale, shift)
        else:
            h = normed(self.norm2, h + shift[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


def normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) in x's precision, as ADM's: a GPU's autocast would leave it, and all up to the next convolution, in float32."""
    return norm(x).to(x.dtype)


def modulated_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift for x (B, C, H, W), scale and shift (B, C).

    On a CPU it is one group norm of B·C channels, whose own weights are each sample's: no further pass over x. The number of
    its groups must be known, which it is not where torch.export leaves B open; and whoever hooks the norm sees it called.
    """
    if not x.is_cpu or isinstance(x.shape[0], torch.SymInt) or norm._forward_hooks:
        return torch.addcmul(shift[:, :, None, None], normed(norm, x), 1 + scale[:, :, None, None])
    wide = torch.promote_types(scale.dtype, torch.float32)
    scale = 1 + scale.to(wide)
    gain, bias = norm.weight.to(wide) * scale, torch.addcmul(shift.to(wide), norm.bias.to(wide), scale)
    channels = x.reshape(1, -1, *x.shape[2:])
    h = F.group_norm(channels, len(x) * norm.num_groups, gain.flatten(), bias.flatten(), norm.eps)
    return h.view(x.shape)


class ContextAttention(nn.Module):
    """Attention of the picture over [context; picture] in one softmax (GLIDE): self- and cross-attention at once."""

    def __init__(self, cfg: UNetConfig, channels: int, context_dim: int):
        super().__init__()
        self.num_heads = channels // cfg.head_dim
        self.group_norm = nn.GroupNorm(cfg.groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        if context_dim:
            self.add_k_proj = nn.Linear(context_dim, channels)
            self.add_v_proj = nn.Linear(context_dim, channels)
        self.to_out = nn.Sequential(zero_init(nn.Linear(channels, channels)))

    def context_keys_values(self, tokens: Tensor) -> KeyValue:
        """tokens (B, L, context_dim) to keys and values (B, heads, L, head_dim)."""
        keys, values = self.add_k_proj(tokens), self.add_v_proj(tokens)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def forward(self, x: Tensor, context: KeyValue | None, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W); mask (B, L) bool over the context."""
        height, width = x.shape[2:]
        # a view where x is channels_last
        h = normed(self.group_norm, x).permute(0, 2, 3, 1).flatten(1, 2)
        query, keys, values = (split_heads(proj(h), self.num_heads) for proj in (self.to_q, self.to_k, self.to_v))
        if context is not None:
            keys, values = torch.cat((context[0], keys), dim=2), torch.cat((context[1], values), dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, height * width), value=True)[:, None, None]
        h = self.to_out(merge_heads(attend(query, keys, values, mask)))
        return x + h.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The blocks of one resolution; attributes carry diffusers' names."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[ContextAttention], resamplers: list[ResnetBlock]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if resamplers:
            self.add_module(f"{resamplers[0].resample}samplers", nn.ModuleList(resamplers))

    def layers(self) -> Iterator[tuple[ResnetBlock, ContextAttention | None]]:
        """Each residual block with the attention that follows it (the middle block's last has none)."""
        attentions = self.attentions if hasattr(self, "attentions") else []
        for resnet, attention in zip_longest(self.resnets, attentions):
            yield cast(ResnetBlock, resnet), cast(ContextAttention | None, attention)

    def resampler(self) -> ResnetBlock | None:
        blocks = next((child for name, child in self.named_children() if name.endswith("samplers")), None)
        return None if blocks is None else cast(ResnetBlock, cast(nn.ModuleList, blocks)[0])


class UNet(nn.Module):
    """U-Net with residual resampling. Without attention levels and context it is the upsamplers' convolution-only net.

    With the same weights, patch 1 and a context it equals diffusers' UNet2DConditionModel in Karlo's form; without
    attention and with ``scale_shift`` False it equals UNet2DModel. From scratch the last convolution of each residual
    block, each attention's output and ``conv_out`` are zero (ADM).
    """

    def __init__(self, cfg: UNetConfig, in_channels: int, out_channels: int, context_dim: int = 0):
        super().__init__()
        self.cfg = cfg
        widths, area = cfg.channels, cfg.patch**2
        self.conv_in = nn.Conv2d(in_channels * area, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], cfg.time_dim)
        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        current = widths[0]
        for level, width in enumerate(widths):
            resnets = [ResnetBlock(cfg, current if j == 0 else width, width) for j in range(cfg.num_blocks)]
            last = level == len(widths) - 1
            down = [] if last else [ResnetBlock(cfg, width, width, "down")]
            self.down_blocks.append(Level(resnets, self._attentions(level, cfg.num_blocks, context_dim), down))
            skips += [width] * (cfg.num_blocks + len(down))
            current = width
        middle = [ContextAttention(cfg, current, context_dim)] if cfg.attention_levels else []
        self.mid_block = Level([ResnetBlock(cfg, current, current) for _ in range(2)], middle, [])
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(cfg.num_blocks + 1):
                resnets.append(ResnetBlock(cfg, current + skips.pop(), width))
                current = width
            up = [] if level == 0 else [ResnetBlock(cfg, width, width, "up")]
            self.up_blocks.append(Level(resnets, self._attentions(level, cfg.num_blocks + 1, context_dim), up))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, widths[0])
        self.conv_out = zero_init(nn.Conv2d(widths[0], out_channels * area, 3, padding=1))

    def context(self, emb: Tensor | None, tokens: Tensor | None, mask: Tensor | None) -> UNetContext:
        """Compute each attention layer's context keys and values. tokens (B, L, context_dim), mask (B, L) bool."""
        keys_values = (
            [] if tokens is None else [layer.context_keys_values(tokens) for layer in self._attention_layers()]
        )
        return UNetContext(emb, keys_values, mask)

    def forward(self, x: Tensor, timestep: Tensor, context: UNetContext) -> Tensor:
        """x (B, in_channels, H, W), sides multiples of ``cfg.stride``; timestep (B,). To (B, out_channels, H, W)."""
        if x.ndim != 4:
            raise ValueError(f"pictures of shape {tuple(x.shape)}; a U-Net takes (B, channels, H, W)")
        if x.shape[-1] % self.cfg.stride or x.shape[-2] % self.cfg.stride:
            raise ValueError(f"a picture of {tuple(x.shape[-2:])} pixels: sides must be multiples of {self.cfg.stride}")
        emb = self.time_embedding(timestep)
        emb = F.silu(emb if context.emb is None else emb + context.emb)
        pairs = iter(context.keys_values)
        h = self.conv_in(F.pixel_unshuffle(x, self.cfg.patch) if self.cfg.patch > 1 else x)
        skips = [h]
        for level in _levels(self.down_blocks):
            for resnet, attention in level.layers():
                h = self._layer(resnet, attention, h, emb, pairs, context.mask)
                skips.append(h)
            if (down := level.resampler()) is not None:
                h = self._layer(down, None, h, emb, pairs, None)
                skips.append(h)
        for resnet, attention in self.mid_block.layers():
            h = self._layer(resnet, attention, h, emb, pairs, context.mask)
        for level in _levels(self.up_blocks):
            for resnet, attention in level.layers():
                h = self._layer(resnet, attention, h, emb, pairs, context.mask, skips.pop())
            if (up := level.resampler()) is not None:
                h = self._layer(up, None, h, emb, pairs, None)
        out = self.conv_out(F.silu(normed(self.conv_norm_out, h)))
        return F.pixel_shuffle(out, self.cfg.patch) if self.cfg.patch > 1 else out

    def _layer(
        self,
        resnet: ResnetBlock,
        attention: ContextAttention | None,
        h: Tensor,
        emb: Tensor,
        pairs: Iterator[KeyValue],
        mask: Tensor | None,
        *skip: Tensor,
    ) -> Tensor:
        context = next(pairs, None) if attention is not None else None

        def run(h: Tensor, emb: Tensor, *skip: Tensor) -> Tensor:
            h = resnet(torch.cat((h, *skip), dim=1) if skip else h, emb)
            return h if attention is None else attention(h, context, mask)

        if self.cfg.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, h, emb, *skip, use_reentrant=False)
        return run(h, emb, *skip)

    def _attentions(self, level: int, count: int, context_dim: int) -> list[ContextAttention]:
        if level not in self.cfg.attention_levels:
            return []
        return [ContextAttention(self.cfg, self.cfg.channels[level], context_dim) for _ in range(count)]

    def _attention_layers(self) -> list[ContextAttention]:
        levels = (*_levels(self.down_blocks), self.mid_block, *_levels(self.up_blocks))
        return [attention for level in levels for _, attention in level.layers() if attention is not None]


def _levels(blocks: nn.ModuleList) -> list[Level]:
    return [cast(Level, block) for block in blocks]
