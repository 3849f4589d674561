"""Numbers that say how good a stage is."""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def retrieval(
    image_emb: Tensor,
    text_emb: Tensor,
    captions: Sequence[Hashable],
    *,
    ks: tuple[int, ...] = (1, 5),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall at k both ways, in [0, 1], of embeddings (N, D) that need not be normalised; row i belongs to caption i.

    ``image_to_text_recall_k``: the share of pictures with their own caption among the k nearest *distinct* captions.
    ``text_to_image_recall_k``: the share of captions with a picture of that very caption among the k nearest. A wrong
    item with the same score as the right one counts as nearer, so constant embeddings score 0 and not 1. Of rows with
    the same caption the first text embedding stands for all in image-to-text.
    """
    number: dict[Hashable, int] = {}
    group = torch.tensor([number.setdefault(caption, len(number)) for caption in captions])
    if not len(group) == len(image_emb) == len(text_emb):
        raise ValueError(f"{len(image_emb)} pictures, {len(text_emb)} texts and {len(captions)} captions are not pairs")
    group = group.to(image_emb.device)
    images, texts = F.normalize(image_emb.float(), dim=1), F.normalize(text_emb.float(), dim=1)
    firsts = torch.full((len(number),), len(group), device=group.device)
    firsts.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    distinct = torch.arange(len(number), device=group.device)
    ranks = {
        "image_to_text": _ranks(images, group, texts[firsts], distinct, chunk),
        "text_to_image": _ranks(texts, group, images, group, chunk),
    }
    return {f"{way}_recall_{k}": (rank < k).float().mean().item() for way, rank in ranks.items() for k in ks}


def _ranks(queries: Tensor, query_group: Tensor, items: Tensor, item_group: Tensor, chunk: int) -> Tensor:
    """(N,) for each query: how many wrong items score at least as high as its best right one."""
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ items.T
        right = query_group[start : start + chunk, None] == item_group
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)
