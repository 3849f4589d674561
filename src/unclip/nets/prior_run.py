"""PriorNet in sampling: all that does not change from step to step is made ready once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.nets.transformer import PriorContext, PriorNet, TransformerBlock, seen

AHEAD = 64  # timesteps whose tokens are computed together


class PriorRun:
    """One sampling run: B rows with K candidates each, over the S timesteps of a schedule. Outputs equal the net's own.

    The sequence is causal, so neither the caption and z_t nor the timestep's token see the noised z_i: their keys and
    values are computed before the steps and shared by all candidates, those of the timesteps many at a time. A step runs
    two tokens a candidate, the noised z_i and the query, by weights in the precision of the run, query, key and value as
    one matrix. The unconditional branch may be a single row (:meth:`PriorNet.null_context`).
    """

    def __init__(self, net: PriorNet, branches: list[PriorContext], timesteps: Tensor, num_candidates: int) -> None:
        """branches: the conditional rows, then for guidance the unconditional ones: as many, or one for all."""
        device, dtype = timesteps.device, net.proj_in.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self._blocks = [_Block(block, dtype) for block in net.transformer_blocks if isinstance(block, TransformerBlock)]
        self._proj_in, self._head = _affine(net.proj_in, dtype), _affine(net.proj_to_clip_embeddings, dtype)
        self._proj_last = None if net.proj_last is None else _affine(net.proj_last, dtype)
        self._norm_out = _norm(net.norm_out)
        self._noised = net.positional_embedding[:, -2]
        self._query = net.prd_embedding[:, 0] + net.positional_embedding[:, -1]
        rows = len(branches[0].mask)
        self._memories = [_Memory(net, branch, timesteps, (rows, num_candidates), dtype) for branch in branches]
        self._dtype, self._device = dtype, device

    def __call__(self, x_t: Tensor, step: int, guided: bool, /, *x0_last: Tensor) -> Tensor:
        """x_t (B, K, D) at ``timesteps[step]``; returns (B, K, D), or guided (2B, K, D), the unconditional rows last."""
        memories = self._memories[: 1 + guided]
        for memory in memories:
            memory.go_to(step)
        with torch.autocast(self._device.type, enabled=False):
            noised = F.linear(x_t.to(self._dtype), *self._proj_in)
            if self._proj_last is not None and x0_last:
                noised = noised + F.linear(x0_last[0].to(self._dtype), *self._proj_last)
            noised = noised + self._noised
            x = torch.stack((noised, self._query.to(noised.dtype).expand_as(noised)), dim=2).flatten(1, 2)
            x = torch.cat([x] * len(memories))
            for number, block in enumerate(self._blocks):
                x = block(x, number, memories, last=number == len(self._blocks) - 1)
            return F.linear(self._norm_out(x).to(self._dtype), *self._head)


class _Memory:
    """Keys and values of one branch, (depth, B, heads, P + 1 + 2K, d): prefix, timestep, and the candidates' own two.

    The last 1 + 2K places are overwritten at every step. ``bias`` (B, 1, 2K, P + 1 + 2K) is 0 where a token sees, else -inf.
    """

    def __init__(
        self, net: PriorNet, context: PriorContext, timesteps: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.net, self.context, self.timesteps = net, context, timesteps
        (rows, candidates), (_, length) = shape, context.mask.shape
        key = context.keys_values[0][0]
        if key.is_cpu:
            dtype = torch.float32  # with few queries a CPU's fused attention takes up to twice as long in bfloat16
        size = (len(context.keys_values), rows, key.shape[1], length + 1 + 2 * candidates, key.shape[3])
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=key.device) for _ in range(2))
        for number, (keys, values) in enumerate(context.keys_values):
            self.keys[number, :, :, :length] = keys
            self.values[number, :, :, :length] = values
        self.length, self.own = length, 2 * candidates
        mask = seen(F.pad(context.mask, (0, 1), value=True), candidates, 2).expand(rows, -1, -1, -1)
        self.bias = torch.zeros(mask.shape, dtype=dtype, device=key.device).masked_fill_(~mask, float("-inf"))
        self._first = len(timesteps)  # of the timesteps whose tokens are ready
        self._ahead: tuple[Tensor, Tensor] | None = None

    def go_to(self, step: int) -> None:
        """Put the timestep's token in its place."""
        if self._ahead is None or not self._first <= step < self._first + len(self._ahead[0]):
            self._first = max(0, step - AHEAD + 1)  # samplers walk from the last step to the first
            pairs = self.net.timestep_keys_values(self.timesteps[self._first : step + 1], self.context)
            keys, values = (torch.stack(side).permute(3, 0, 1, 2, 4) for side in zip(*pairs, strict=True))
            self._ahead = keys, values  # (S, depth, B, heads, d)
        keys, values = self._ahead
        self.keys[:, :, :, self.length] = keys[step - self._first]
        self.values[:, :, :, self.length] = values[step - self._first]

    def attend(self, number: int, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Each (B, N, heads, d): the block's new keys and values, and who looks; returns (B, N, heads·d)."""
        all_keys, all_values = self.keys[number], self.values[number]
        all_keys[:, :, -self.own :] = keys.transpose(1, 2)
        all_values[:, :, -self.own :] = values.transpose(1, 2)
        query = query.transpose(1, 2).to(all_keys.dtype)
        mixed = F.scaled_dot_product_attention(query, all_keys, all_values, attn_mask=bias)
        return mixed.transpose(1, 2).flatten(2)


class _Block:
    """A transformer block with its weights in the precision of the run."""

    def __init__(self, block: TransformerBlock, dtype: torch.dtype) -> None:
        attention = block.attn1
        self.norm1, self.norm3, self.num_heads = _norm(block.norm1), _norm(block.norm3), attention.num_heads
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv = tuple(torch.cat(side).to(dtype) for side in zip(*(_weights(p) for p in projections), strict=True))
        self.out = _affine(attention.to_out[0], dtype)
        self.up, self.down = (_affine(part, dtype) for part in (block.ff.net[0].proj, block.ff.net[2]))
        self.dtype = dtype

    def __call__(self, x: Tensor, number: int, memories: list[_Memory], last: bool) -> Tensor:
        """x (rows of all branches, 2K, W). In the last block only the queries (every second token) look and go on."""
        query, keys, values = self._project(x)
        looking = slice(1, None, 2) if last else slice(None)
        x, query = x[:, looking], query[:, looking]
        parts = zip(memories, *(side.chunk(len(memories)) for side in (query, keys, values)), strict=True)
        mixed = [memory.attend(number, q, k, v, memory.bias[:, :, looking]) for memory, q, k, v in parts]
        x = x + F.linear(torch.cat(mixed).to(self.dtype), *self.out)
        hidden = F.gelu(F.linear(self.norm3(x).to(self.dtype), *self.up))
        return x + F.linear(hidden, *self.down)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = F.linear(self.norm1(x).to(self.dtype), *self.qkv)
        query, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.norm_q is not None and self.norm_k is not None:
            query, keys = self.norm_q(query).to(self.dtype), self.norm_k(keys).to(self.dtype)
        return query, keys, values


def _affine(linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight and bias."""
    weight, bias = _weights(linear)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _weights(linear: Any) -> Any:
    """Weight and bias of a linear layer; of one with a low-rank addition beside it, as peft has it, those of the sum."""
    if isinstance(linear, nn.Linear):
        return linear.weight, linear.bias
    return linear.base_layer.weight + linear.get_delta_weight("default"), linear.base_layer.bias


def _norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """The layer in float32, as is what it norms, whatever precision its weights are held in."""
    shape, weight, bias, eps = layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)
