"""Muon (Jordan et al. 2024): the momentum of a matrix, made orthogonal, is its step."""

from collections.abc import MutableMapping
from typing import Any

import torch
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

    The momentum is ``state[w]["momentum"]``; weights without a gradient stay. Matrices of one shape go through together.
    """
    updates: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p)
            state[p]["step"] = torch.zeros(())  # AdamW asks every state for it when it is loaded
        momentum = state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(momentum, MOMENTUM).flatten(1)
        updates.setdefault((update.shape[0], update.shape[1]), []).append((p, update))
    for (rows, columns), pairs in updates.items():
        steps = orthogonal(torch.stack([update for _, update in pairs]))
        for (p, _), step in zip(pairs, steps, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step.view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) with nearly the same singular vectors and singular values about 1 (0.7 to 1.2), float32.

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
    return (x.mT if tall else x).float()
