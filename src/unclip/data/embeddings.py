"""Embeddings of a data set: memory-mapped columns, one folder per shard, and their statistics.

FOLDER/manifest.json                          which CLIP, which data, which columns, mean and deviation per split
FOLDER/empty_caption.safetensors              what the CLIP makes of the caption ""
FOLDER/SPLIT/index.json                       the shards of a finished split
FOLDER/SPLIT/SHARD/{COLUMN}.npy keys.txt shard.json

Columns: ``image_emb`` and ``text_emb`` (n, D), CLIP's raw outputs; ``tokens`` (n, context_length) int32, zero after the
end-of-text token; ``text_seq`` (n, L, W) float16, optional, L being the longest caption of the shard. With several crops
or captions a picture they gain a dimension after n, see :mod:`unclip.data.variants`.
"""

import errno
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unclip.data import joined
from unclip.data.shards import Shards
from unclip.data.variants import Variants
from unclip.errors import ConfigError, DataError
from unclip.models.interface import Interface

VERSION = 1
COLUMNS = ("image_emb", "text_emb", "tokens", "text_seq")
EMPTY_CAPTION = "empty_caption.safetensors"
_MANY = 1024  # rows from which on the columns of a batch are copied side by side
_MOST_OPEN = 128  # mapped files, of each process


class Embeddings:
    """The columns of one finished split, row i belonging to sample i of the shards. Rows are read, not loaded.

    Raises DataError when the folder is unfinished, damaged, or lacks a column that is asked for.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split_dir, self.split = Path(folder), Path(folder) / split, split
        self.manifest = _read_json(self.folder / "manifest.json", self.folder)
        if self.manifest.get("kind") != "embeddings" or self.manifest.get("version") != VERSION:
            raise DataError(f"{self.folder} is not an embeddings folder of version {VERSION}; run unclip-embed")
        if split not in self.manifest["data"]:
            raise DataError(f"{self.folder} has the splits {sorted(self.manifest['data'])}, not {split}; embed it too")
        index = _read_json(self.split_dir / "index.json", self.folder)
        self.names: list[str] = [shard["name"] for shard in index["shards"]]
        self._starts = np.cumsum([0] + [shard["num_rows"] for shard in index["shards"]])
        self._open: dict[tuple[int, str], np.memmap] = {}
        self._joined: dict[str, joined.Joined] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # with the process that it belongs to

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_joined": {}, "_pool": None}

    @property
    def interface(self) -> Interface:
        """Widths and hash of the CLIP that made the rows."""
        return Interface(**self.manifest["interface"])

    @property
    def columns(self) -> list[str]:
        return self.manifest["columns"]

    @property
    def variants(self) -> Variants:
        """How many captions and crops a picture has."""
        return Variants(**self.manifest.get("variants", {}))

    @property
    def shard_sizes(self) -> list[int]:
        return np.diff(self._starts).tolist()

    @property
    def normalised(self) -> bool:
        """Whether the rows are unit-norm, as imported ones may be: CLIP's raw outputs cannot be had from them."""
        return self.manifest["normalised"]

    def refuse_unit_norm(self) -> None:
        """ConfigError for unit-norm rows, which a model of raw outputs cannot take."""
        if self.normalised:
            raise ConfigError(
                f"{self.folder} holds unit-norm rows, but the model takes CLIP's raw outputs, which cannot be had from them: run "
                "unclip-embed, or take model.embedding_space=scaled (a prior), model.embedding_norm=unit (a decoder)"
            )

    @property
    def identity(self) -> list[str]:
        """What tells these rows from others: the CLIP, the shards, and how they were embedded."""
        how = [str(self.manifest.get(name)) for name in ("dtype", "variants", "precision")]
        return [self.interface.clip, str(self.manifest["data"][self.split]), *how]

    @property
    def stats(self) -> dict[str, np.ndarray]:
        """Of the split's raw embeddings: count of pictures; image_count, image_mean and image_std (D,), image_norm; text_…"""
        return {name: np.asarray(value) for name, value in self.manifest["stats"][self.split].items()}

    def empty_caption(self) -> dict[str, Tensor]:
        """The caption "": ``tokens`` (L,) int64, ``text_emb`` (D,) and ``text_seq`` (L, W) float32, CLIP's raw outputs.

        DataError where the folder lacks it, as imported embeddings do.
        """
        path = self.folder / EMPTY_CAPTION
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f'{path} is missing or damaged: the same unclip-embed again adds what CLIP makes of the caption "", without '
                "embedding anew; imported embeddings cannot have it: take null_text=zero or learned (in model.conditioning of a "
                "decoder, in model.net of a prior)"
            ) from error

    @property
    def keys(self) -> list[str]:
        """The samples' keys, row by row."""
        texts = [(self.split_dir / name / "keys.txt").read_text() for name in self.names]
        return [key for text in texts for key in text.splitlines()]

    def check_belongs_to(self, shards: Shards) -> None:
        """DataError unless row i has key and caption of sample i of ``shards``; pictures may be of another size."""
        if self.manifest["data"][self.split]["text_fingerprint"] == shards.text_fingerprint:
            return
        pairs = zip(self.keys, shards.keys, strict=False)
        first = next(
            (f"row {i} is {a}, not {b}" for i, (a, b) in enumerate(pairs) if a != b), "captions or count differ"
        )
        raise DataError(
            f"{self.split_dir} was made from other data than {shards.split_dir} ({first}); run unclip-embed"
        )

    def rows(self, indices: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """The named columns at ``indices`` (n,) int64, in that order; ``text_seq`` as long as the longest shard's.

        Of several captions or crops the first.
        """
        variants = self.variants
        return {name: variants.first(name, values) for name, values in self.all_variants(indices, columns).items()}

    def all_variants(self, indices: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """:meth:`rows` with all captions and crops; see :mod:`unclip.data.variants` for the shapes."""
        for column in columns:
            if column not in self.columns:
                raise DataError(
                    f"{self.folder} has the columns {self.columns}, not {column}; embed again with columns=[…]"
                )
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        local = indices - self._starts[shards]
        takers = [partial(self._take, column, shards, local) for column in columns]
        if len(indices) < _MANY or len(columns) == 1:
            return dict(zip(columns, [take() for take in takers], strict=True))
        jobs = [self._copiers().submit(take) for take in takers]  # copying releases the interpreter's lock
        return dict(zip(columns, [job.result() for job in jobs], strict=True))

    def _copiers(self) -> ThreadPoolExecutor:
        """Threads that copy columns, kept: new ones for every batch take as long as the copy. A fork starts its own."""
        if self._pool is None or self._pool[0] != os.getpid():
            count = min(len(COLUMNS), os.cpu_count() or 1)
            self._pool = (
                os.getpid(),
                ThreadPoolExecutor(count, "unclip-rows", initializer=torch.set_num_threads, initargs=(1,)),
            )
        return self._pool[1]

    def column(self, name: str) -> np.ndarray:
        """A whole column in memory, for statistics such as PCA."""
        return self.rows(np.arange(len(self)), [name])[name]

    def _take(self, column: str, shards: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Rows ``local`` of ``shards``: in one go where all files hold rows of one shape, else shard by shard."""
        if column == "text_seq" or not len(local) or not joined.supported():
            return self._gather(column, shards, local)
        if column not in self._joined:
            first = self._load(int(shards[0]), column)
            opener = partial(self._load, column=column)
            self._joined[column] = joined.Joined(self.shard_sizes, first.shape[1:], first.dtype, opener)
        return self._joined[column].take(shards, local)

    def _gather(self, column: str, shards: np.ndarray, local: np.ndarray) -> np.ndarray:
        """One ``take`` per shard that is touched; shards with shorter caption states are filled up with zeros."""
        order = np.argsort(shards, kind="stable")
        touched, firsts = np.unique(shards[order], return_index=True)
        sources = [self._mapped(int(shard), column) for shard in touched]
        shape = np.max([source.shape[1:] for source in sources], axis=0)
        rows = np.zeros((len(local), *shape), dtype=sources[0].dtype)
        for source, places in zip(sources, np.split(order, firsts[1:]), strict=True):
            rows[(places, *(slice(size) for size in source.shape[1:]))] = np.take(source, local[places], axis=0)
        return rows

    def _mapped(self, shard: int, column: str) -> np.memmap:
        """:meth:`_load`, of the files used first kept no longer than others are: each holds a file descriptor."""
        mapped = self._open.get((shard, column))
        if mapped is None:
            mapped = self._load(shard, column)
            self._open[shard, column] = mapped
            for old in list(self._open)[:-_MOST_OPEN]:
                self._open.pop(old, None)
        return mapped

    def _load(self, shard: int, column: str) -> np.memmap:
        path = self.split_dir / self.names[shard] / f"{column}.npy"
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise DataError(
                    f"{path} cannot be opened ({error.strerror}): raise the limit, as ulimit -n 65536"
                ) from error
            raise DataError(
                f"{path} is missing or damaged ({error}); remove its folder and run unclip-embed"
            ) from error
        if len(mapped) != self._starts[shard + 1] - self._starts[shard]:
            raise DataError(f"{path} has {len(mapped)} rows; its index says otherwise. Remove it, run unclip-embed")
        wanted = self.manifest["embed_dim"]
        if column in ("image_emb", "text_emb") and mapped.shape[-1] != wanted:
            raise DataError(
                f"{path} has rows of shape {mapped.shape[1:]}, the manifest says {wanted} numbers: two CLIPs in one "
                "folder? Remove it and run unclip-embed"
            )
        return mapped


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of each caption, start and end included; the end-of-text token has the largest id. (…, L) to (…)."""
    return tokens.argmax(axis=-1) + 1


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} is missing: {folder} is no finished embeddings folder; run unclip-embed run={folder}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run unclip-embed run={folder} again") from error
