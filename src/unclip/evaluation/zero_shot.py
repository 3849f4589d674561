"""Zero-shot classification with a CLIP: each class is the mean embedding of its captions (Radford et al. 2021, sec. 3.1)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import ConfigError

TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a drawing of a {}")


@torch.no_grad()
def class_embeddings(clip: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors (C, D): for each class name the mean of the unit z_t of its templates, normalised again.

    Raises :class:`ConfigError` for a template that has not exactly one ``{}``.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"template {template!r} must hold {{}} once, where the class name goes")
    device = next(clip.parameters()).device
    means = []
    for name in classes:
        tokens = clip.tokenize([template.replace("{}", name) for template in templates]).to(device)
        means.append(F.normalize(clip.encode_text(tokens)[0].float(), dim=1).mean(dim=0))
    return F.normalize(torch.stack(means), dim=1)


@torch.no_grad()
def zero_shot(
    clip: Any, batches: Iterable[tuple[Tensor, list[int]]], classes: Tensor, ks: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """``top_k``: share of pictures whose class is among the k nearest of ``classes`` (C, D).

    ``batches`` are uint8 pictures (B, 3, H, W) with the numbers of their classes. A k of C or more is left out.
    """
    device, right, count = classes.device, dict.fromkeys((k for k in ks if k < len(classes)), 0), 0
    for pictures, labels in batches:
        scores = F.normalize(clip.encode_image(pictures.to(device)).float(), dim=1) @ classes.T
        order = scores.argsort(dim=1, descending=True)
        hits = order == torch.tensor(labels, device=device)[:, None]
        for k in right:
            right[k] += int(hits[:, :k].sum())
        count += len(labels)
    return {f"top_{k}": hits / count for k, hits in right.items()}
