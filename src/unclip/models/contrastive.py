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


ALL = slice(None)


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor, mine: slice = ALL) -> Tensor:
    """Symmetric cross-entropy of unit vectors (B, D), pair i being row i of both (Radford et al. 2021, figure 3).

    With several ranks, give it the rows of all and which are ``mine``, see :func:`of_all_ranks`: the mean over ranks is the
    loss of the whole batch, and no rank holds more than its share of the (B, B) cosines.
    """
    target = torch.arange(len(image_emb), device=image_emb.device)[mine]
    found = F.cross_entropy(_logits(image_emb[mine], text_emb, scale), target)
    return (found + F.cross_entropy(_logits(text_emb[mine], image_emb, scale), target)) / 2


def sigmoid_loss(image_emb: Tensor, text_emb: Tensor, scale: Tensor, bias: Tensor, mine: slice = ALL) -> Tensor:
    """Sum over all pairs of -log sigmoid(±logit) / B for unit vectors (B, D) (Zhai et al. 2023, algorithm 1).

    The sign is + where caption and picture belong together. Several ranks: as above.
    """
    logits = _logits(image_emb[mine], text_emb, scale) + bias.float()
    sign = 2 * torch.eye(len(image_emb), device=logits.device)[mine] - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def _logits(rows: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines (rows, others), float32."""
    with torch.autocast(rows.device.type, enabled=False):
        return scale.float() * rows.float() @ others.float().T


def of_all_ranks(*embeddings: Tensor) -> tuple[tuple[Tensor, ...], slice]:
    """The rows of all ranks, which hold the same number, with their gradients, and where this rank's own stand.

    Every rank computes the loss of its own rows among all, and averaging gradients over ranks (as DDP and FSDP2 do) gives the
    gradient of a single device.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return embeddings, ALL
    from torch.distributed.nn.functional import all_gather

    first = dist.get_rank() * len(embeddings[0])
    mine = slice(first, first + len(embeddings[0]))
    return tuple(torch.cat(all_gather(rows)) for rows in embeddings), mine
