"""Losses that pull a caption and its picture together: CLIP's softmax and SigLIP's sigmoid, over the global batch."""

from enum import Enum

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Contrast(Enum):
    """softmax: each picture among all captions and the reverse (CLIP). sigmoid: each pair by itself (SigLIP)."""

    softmax = "softmax"
    sigmoid = "sigmoid"


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of unit vectors (B, D), pair i being row i of both (Radford et al. 2021, figure 3).

    With several ranks, give it the rows of all, see :func:`of_all_ranks`.
    """
    logits = _logits(image_emb, text_emb, scale)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum over all pairs of -log sigmoid(±logit) / B for unit vectors (B, D) (Zhai et al. 2023, algorithm 1).

    The sign is + where caption and picture belong together. Several ranks: as above.
    """
    logits = _logits(image_emb, text_emb, scale) + bias.float()
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def _logits(image_emb: Tensor, text_emb: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines (B, B), float32."""
    with torch.autocast(image_emb.device.type, enabled=False):
        return scale.float() * image_emb.float() @ text_emb.float().T


def of_all_ranks(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, which hold the same number, with their gradients.

    Every rank then computes the loss of the global batch, and averaging gradients over ranks (as DDP and FSDP2 do) gives the
    gradient of a single device.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return embeddings
    from torch.distributed.nn.functional import all_gather

    return tuple(torch.cat(all_gather(rows)) for rows in embeddings)
