"""How much pictures differ among themselves, and whether they fit their captions."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.intervals import Figure, figure

NUM_WRONG = 99


def vendi_figure(x: Tensor, weights: Tensor) -> Figure:
    """Vendi score of features (N, D): exp of the entropy of the eigenvalues of the cosines over N (Friedman and Dieng 2023, eq. 1).

    The number of pictures, unlike each other, that would be as diverse: 1 to min(N, D). The eigenvalues are those of the
    D x D matrix of products, so N pictures take no N x N matrix. ``weights`` (1 + B, N) are resamples.
    """
    unit = F.normalize(x.float(), dim=1)
    found = []
    for row in weights.float():
        products = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for part, some in zip(unit.split(4096), row.split(4096), strict=True):
            products += (part * some[:, None]).T @ part
        shares = torch.linalg.eigvalsh(products / len(x)).clamp(min=0)
        found.append(torch.special.entr(shares).sum().exp())
    return figure(torch.stack(found))


def cosines(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    """(N,) of rows that belong together; their mean is the CLIP score (Hessel et al. 2021, without their factor of 2.5)."""
    return (F.normalize(image_emb.double(), dim=1) * F.normalize(text_emb.double(), dim=1)).sum(dim=1)


def r_precise(image_emb: Tensor, text_emb: Tensor, captions: Sequence[Hashable], seed: int) -> Tensor:
    """(N,) 1.0 where a picture's own caption has a higher cosine than each of 99 others drawn at random (Xu et al. 2018, sec. 4.1).

    The others are distinct and differ from its own; ties count against it. At least 100 distinct captions are needed.
    """
    number: dict[Hashable, int] = {}
    group = np.array([number.setdefault(caption, len(number)) for caption in captions])
    firsts = torch.from_numpy(np.unique(group, return_index=True)[1])
    images, texts = F.normalize(image_emb.double(), dim=1), F.normalize(text_emb.double(), dim=1)
    distinct, found = texts[firsts], []
    for row, own in enumerate(group.tolist()):
        others = np.random.default_rng([seed, row]).choice(len(number) - 1, NUM_WRONG, replace=False)
        others = torch.from_numpy(others + (others >= own))  # those from its own number on move up by one
        found.append((images[row] @ texts[row]) > (distinct[others] @ images[row]).max())
    return torch.stack(found).double()


def pairs_of(captions: Sequence[Hashable], num: int, seed: int) -> tuple[np.ndarray, bool]:
    """Up to ``num`` pairs (P, 2) of pictures to compare, and whether they are pairs of one caption.

    Where most captions have several pictures, each is paired with the next one of its caption; else all pictures by chance,
    since a few captions that occur twice are no sample.
    """
    last: dict[Hashable, int] = {}
    found, several = [], set()
    for place, caption in enumerate(captions):
        if caption in last:
            found.append((last[caption], place))
            several.add(caption)
        last[caption] = place
    rng = np.random.default_rng(seed)
    if 2 * len(several) > len(last):
        return np.array(found)[np.sort(rng.permutation(len(found))[:num])], True
    order = rng.permutation(len(captions))[: 2 * min(num, len(captions) // 2)]
    return order.reshape(-1, 2), False
