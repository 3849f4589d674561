"""Muon (Jordan et al. 2024): the momentum of a matrix, made orthogonal, is its step."""

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of the quintic; after 5 all singular values are about 1
FEWEST = 8  # rows and columns: smaller matrices have little to orthogonalise


def is_hidden_matrix(p: Tensor) -> bool:
    """Whether a weight is a matrix, or a convolution taken as one of (out, in * height * width), of some size."""
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= FEWEST


@torch.no_grad()
def muon_step(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """w <- (1 - lr * weight_decay) w - lr * sqrt(max(1, rows / columns)) * orthogonal(Nesterov momentum of the gradient).

    The momentum is ``state[w]["momentum"]``; weights without a gradient stay.
    """
    weights = [p for p in group["params"] if p.grad is not None]
    updates = []
    for p in weights:
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p)
            state[p]["step"] = torch.zeros(())  # AdamW asks every state for it when it is loaded
        momentum = state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        updates.append(p.grad.lerp(momentum, MOMENTUM).flatten(1))
    for p, step in zip(weights, _all_orthogonal(updates), strict=True):
        rows, columns = step.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(step.view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _all_orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """:func:`orthogonal` of each. Ranks, which all hold the same matrices, share the work."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    shapes: dict[torch.Size, list[int]] = {}
    for i in _shares(matrices, ranks)[dist.get_rank() if ranks > 1 else 0]:
        shapes.setdefault(matrices[i].shape, []).append(i)
    found: dict[int, Tensor] = {}
    for indices in shapes.values():  # those of one shape go through together
        found |= zip(indices, orthogonal(torch.stack([matrices[i] for i in indices])), strict=True)
    if ranks == 1 or not matrices:
        return [found[i] for i in range(len(matrices))]
    everyones = torch.zeros(sum(m.numel() for m in matrices), dtype=torch.bfloat16, device=matrices[0].device)
    parts = everyones.split([m.numel() for m in matrices])
    for i, matrix in found.items():
        parts[i].copy_(matrix.flatten())
    dist.all_reduce(everyones)  # exact: one rank's number and zeros
    return [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]


def _shares(matrices: list[Tensor], ranks: int) -> list[list[int]]:
    """Which matrices each rank takes: the costliest first, each by the rank with the least to do."""
    costs = [m.numel() * min(m.shape) for m in matrices]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += costs[i]
    return shares


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) with nearly the same singular vectors and singular values about 1 (0.7 to 1.2), bfloat16.

    Five Newton-Schulz iterations in bfloat16, which converge for values in (0, 1]: hence the division by the norm.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
