"""What the models take from batches and embeddings: the text side, and many rows in parts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.batch import Batch
from unclip.nets.layers import Cond


def text_side(batch: Batch) -> Cond:
    """The batch's tokens, their states cut to the length of the (trimmed) tokens, and raw z_t; what it lacks is None."""
    states = batch.text_seq
    if states is not None and batch.tokens is not None:
        states = states[:, : batch.tokens.shape[1]]
    return Cond(text_emb=batch.text_emb, text_seq=states, tokens=batch.tokens, num_rows=len(batch))


def scaled(emb: Tensor) -> Tensor:
    """At unit norm × √d, float32: each number has a mean square of one."""
    return F.normalize(emb.float(), dim=-1) * emb.shape[-1] ** 0.5


def in_parts(
    embeddings: Any, columns: Sequence[str], size: int = 65536, num_rows: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The named columns of all rows, or of ``num_rows`` spread evenly over them, ``size`` at a time, in memory."""
    count = len(embeddings) if num_rows is None else min(len(embeddings), num_rows)
    chosen = np.linspace(0, len(embeddings) - 1, count).round().astype(np.int64)
    for start in range(0, count, size):
        part = embeddings.rows(chosen[start : start + size], columns)
        yield {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in part.items()}
