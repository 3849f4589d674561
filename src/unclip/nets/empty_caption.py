"""The caption "" as CLIP reads it, stored with the weights of a net that takes it for a dropped one (Karlo)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unclip.nets.layers import Cond, caption_mask, keep_rows, same_length

EMPTY_LENGTH = 2  # tokens of the caption "": its start and its end


def add_empty_caption(module: nn.Module, embed_dim: int | None, text_width: int | None) -> None:
    """Give ``module`` the buffers: its tokens, z_t of width ``embed_dim`` and states of ``text_width`` (None: not read)."""
    module.register_buffer("empty_tokens", torch.zeros(EMPTY_LENGTH, dtype=torch.int64))
    if embed_dim is not None:
        module.register_buffer("empty_text_emb", torch.zeros(embed_dim))
    if text_width is not None:
        module.register_buffer("empty_text_seq", torch.zeros(EMPTY_LENGTH, text_width))


def set_empty_caption(module: nn.Module, tokens: Tensor, text_emb: Tensor, text_seq: Tensor) -> None:
    """Store the caption "": tokens (L,), z_t (D,) in the range that the net is given, and states (L, W).

    Raises ValueError where it has more than :data:`EMPTY_LENGTH` tokens up to its end.
    """
    given = {"empty_tokens": tokens, "empty_text_emb": text_emb, "empty_text_seq": text_seq}
    length = int(caption_mask(tokens[None]).sum())
    if length > EMPTY_LENGTH:
        raise ValueError(
            f'this CLIP reads the caption "" as {length} tokens; set conditioning.null_text=zero, or of a prior net.null_text=zero'
        )
    for name, buffer in _stored(module).items():
        value = given[name][:length] if name != "empty_text_emb" else text_emb
        buffer.zero_()[: len(value)] = value


def empty_captions(module: nn.Module, rows: int) -> Cond:
    """The stored caption ``rows`` times."""
    stored = _stored(module)
    mask = caption_mask(stored["empty_tokens"][None])[0]
    fields = {name.removeprefix("empty_"): value.expand(rows, *value.shape) for name, value in stored.items()}
    return Cond(**fields, text_mask=mask.expand(rows, -1), num_rows=rows)


def with_empty_captions(module: nn.Module, cond: Cond, keep: Tensor | None, source: str) -> Cond:
    """The condition with "" in place of dropped captions, and of all where the column ``source`` of captions is missing."""
    stored = _stored(module)
    tokens = stored["empty_tokens"]
    empty = {"tokens": tokens, "text_mask": caption_mask(tokens[None])[0]}
    empty |= {name: stored[f"empty_{name}"] for name in ("text_emb", "text_seq") if f"empty_{name}" in stored}
    if vars(cond)[source] is None:
        cond = replace(cond, tokens=None, text_seq=None, text_mask=None)
    mask = cond.caption_mask()
    if mask is None and cond.text_seq is not None:
        mask = torch.ones(cond.text_seq.shape[:2], dtype=torch.bool, device=cond.text_seq.device)
    found: dict[str, Tensor] = {}
    for name, null in empty.items():
        value = mask if name == "text_mask" else vars(cond)[name]
        if value is None:
            found[name] = null.expand(cond.rows_given, *null.shape)
        elif name == "text_emb":
            found[name] = keep_rows(value, keep, null)
        else:
            value, row = same_length(value, null[None])
            found[name] = keep_rows(value, keep, row)
    return replace(cond, **found)


def _stored(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith("empty_")}
