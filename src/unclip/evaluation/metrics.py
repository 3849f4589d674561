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
    ks: tuple[int, ...] = (1, 5, 10),
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


def spectrum(embeddings: Tensor) -> Tensor:
    """Variances (D,) of embeddings (N, D) along their principal components, largest first, in float64."""
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    return torch.linalg.eigvalsh(centred.T @ centred / len(centred)).flip(0).clamp(min=0)


def effective_rank(variances: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007): 1 to D."""
    shares = variances.sqrt() / variances.sqrt().sum()
    return torch.special.entr(shares).sum().exp().item()


def num_components(variances: Tensor, share: float = 0.99) -> int:
    """How many principal components hold ``share`` of the variance (the paper's CLIP: 319 of 1,024 hold nearly all)."""
    held = variances.cumsum(0) / variances.sum()
    return int((held < share).sum()) + 1


def kid(
    features: Tensor, others: Tensor, *, num_subsets: int = 10, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance x 1000 of two sets of features (N, D) and (M, D): mean and standard error over subsets.

    The unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, sec. 4), averaged over subsets of
    ``subset_size`` rows (default: half of the smaller set). It may be slightly negative for equal distributions. The
    subsets share rows, so the error, their spread / sqrt(num_subsets), tells less than all of the uncertainty.
    """
    size = min(len(features), len(others)) // 2 if subset_size is None else subset_size
    if not 2 <= size <= min(len(features), len(others)):
        raise ValueError(
            f"subsets of {size} rows from {len(features)} and {len(others)}: ask for 2 rows up to the fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num_subsets):
        x, y = (rows[torch.randperm(len(rows), generator=generator)[:size]].double() for rows in (features, others))
        within = sum(_kernel(z, z).fill_diagonal_(0).sum() / (size * (size - 1)) for z in (x, y))
        found.append(1000 * float(within - 2 * _kernel(x, y).mean()))
    spread = torch.tensor(found, dtype=torch.float64)
    return spread.mean().item(), (spread.std() / num_subsets**0.5).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _ranks(queries: Tensor, query_group: Tensor, items: Tensor, item_group: Tensor, chunk: int) -> Tensor:
    """(N,) for each query: how many wrong items score at least as high as its best right one; NaN is never a hit."""
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ items.T
        right = query_group[start : start + chunk, None] == item_group
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(scores < best) & ~right).sum(dim=1))
    return torch.cat(ranks)
