"""One split of a data set, able to make the batch of any of its samples."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from unclip.data.batch import Batch
from unclip.data.embeddings import Embeddings, lengths
from unclip.data.pictures import Pictures
from unclip.data.settings import DataConfig
from unclip.data.shards import Shards
from unclip.data.texts import Lookup, Samples, StoredTexts
from unclip.data.variants import ONE, captions_of, picked
from unclip.errors import ConfigError

Tokenize = Callable[[list[str]], Tensor]


class Split:
    """One split, able to make the batch of any samples. ``needs`` names the columns of :class:`Batch` to fill.

    Tokens come from the embeddings, or from ``tokenize``.
    """

    def __init__(self, cfg: DataConfig, split: str, needs: Collection[str], tokenize: Tokenize | None) -> None:
        self.embeddings = Embeddings(cfg.embeddings, split) if cfg.embeddings else None
        self.needs, self.tokenize = tuple(needs), tokenize
        self.shards, self.pictures = self._samples(cfg, split)
        self._stored = self._stored_columns()
        self._tokens: dict[int, Tensor] | None = {} if cfg.cache else None

    def _samples(self, cfg: DataConfig, split: str) -> tuple[Samples, Pictures | None]:
        """Keys and captions, and the pictures where the stage needs them."""
        if not cfg.path and self.embeddings is not None:
            return StoredTexts(self.embeddings), None
        shards = Shards(cfg.place(split), cfg.remote)
        if self.embeddings is not None:
            self.embeddings.check_belongs_to(shards)
        if "image" not in self.needs:
            return shards, None
        return shards, Pictures(shards, cfg.image_size, cfg.cache, cfg.enlarges)

    def batch(self, indices: np.ndarray, positions: Sequence[int]) -> Batch:
        """The samples ``indices`` as a batch; only what the stage needs is read."""
        batch = Batch(position=list(positions))
        if self.pictures is not None:
            batch.image, used = self.pictures.batch(indices)
            batch.replaced = ["" if i == j else self.shards.keys[int(i)] for i, j in zip(indices, used, strict=True)]
            indices = used
        batch.key, batch.caption = Lookup(self.shards.keys.__getitem__, indices), Lookup(self.shards.caption, indices)
        if self.embeddings is not None and self._stored:
            rows = self.embeddings.all_variants(indices, self._stored)
            if (variants := self.embeddings.variants) != ONE:
                assert isinstance(self.shards, Shards)  # imported embeddings have one caption and one crop
                rows, chosen = picked(rows, variants, positions, central=self.pictures is not None)
                if variants.captions > 1:
                    every = [captions_of(self.shards, i, variants.captions) for i in indices.tolist()]
                    batch.caption = [captions[k] for captions, k in zip(every, chosen, strict=True)]
            length = int(lengths(rows["tokens"]).max()) if "tokens" in rows else None
            for column, values in rows.items():
                cut = values[:, :length] if column in ("tokens", "text_seq") else values
                setattr(batch, column, torch.from_numpy(np.ascontiguousarray(cut)))
        elif "tokens" in self.needs:
            batch.tokens = trim(self._tokenized(indices.tolist(), list(batch.caption)))
        return batch

    def _tokenized(self, samples: list[int], captions: list[str]) -> Tensor:
        assert self.tokenize is not None
        if self._tokens is None:
            return self.tokenize(captions)
        new = {i: caption for i, caption in zip(samples, captions, strict=True) if i not in self._tokens}
        if new:
            self._tokens.update(zip(new, self.tokenize(list(new.values())), strict=True))
        return torch.stack([self._tokens[i] for i in samples])

    def _stored_columns(self) -> list[str]:
        """The columns to take from the embeddings; ConfigError where a needed one has no source."""
        wanted = [column for column in self.needs if column != "image"]
        if self.embeddings is None:
            have = {"text_seq"} if self.tokenize is None else {"text_seq", "tokens"}
            missing = ", ".join(column for column in wanted if column not in have)
            if missing:
                raise ConfigError(f"this stage needs {missing}; run unclip-embed and set data.embeddings to its folder")
            return []
        has = self.embeddings.columns
        missing = [column for column in wanted if column not in has]
        if missing:
            live = ", or take data.text_states=live data.clip=CLIP" if missing == ["text_seq"] else ""
            raise ConfigError(
                f"{self.embeddings.folder} lacks the columns {missing}; embed again with columns=[…]{live}"
            )
        return wanted


def trim(tokens: Tensor) -> Tensor:
    """Token ids (B, context_length) cut to the longest caption, int64."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


def trimmed(tokenize: Tokenize, captions: list[str]) -> Tensor:
    return trim(tokenize(captions))
