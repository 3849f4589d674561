"""Keys and captions that stand beside embeddings, for training without the shards that they were made of."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from unclip.data.embeddings import Embeddings
from unclip.drafts import write_atomic
from unclip.errors import DataError

CAPTIONS = "captions.json"
_KEPT_SHARDS = 64  # whose texts stay in memory


class Samples(Protocol):
    """What a batch takes from a split beside its columns: numbered samples with keys and captions."""

    @property
    def shard_sizes(self) -> list[int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def split_dir(self) -> Path: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def caption(self, i: int) -> str: ...


class StoredTexts:
    """Keys and captions of a split of imported embeddings. Raises DataError where the embeddings hold no captions."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings, self.split_dir = embeddings, embeddings.split_dir
        self.shard_sizes = embeddings.shard_sizes
        self._starts = np.cumsum([0, *self.shard_sizes])
        if not (self.split_dir / embeddings.names[0] / CAPTIONS).exists():
            raise DataError(
                f"{embeddings.folder} holds no captions: unclip-embed leaves them in the shards. Give data.path too"
            )
        self._init_cache()

    def _init_cache(self) -> None:
        self._lock = threading.Lock()
        self._texts: OrderedDict[int, tuple[list[str], list[str]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_texts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_cache()

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def fingerprint(self) -> str:
        """Of the rows that were imported."""
        return self.embeddings.manifest["data"][self.embeddings.split]["fingerprint"]

    @property
    def keys(self) -> Sequence[str]:
        """The samples' keys, read when they are asked for."""
        return Lookup(self._key, range(len(self)))

    def _key(self, i: int) -> str:
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shard(shard)[0][i - int(self._starts[shard])]

    def caption(self, i: int) -> str:
        """The caption of sample i."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shard(shard)[1][i - int(self._starts[shard])]

    def _shard(self, shard: int) -> tuple[list[str], list[str]]:
        with self._lock:
            if shard not in self._texts:
                folder = self.split_dir / self.embeddings.names[shard]
                self._texts[shard] = read_texts(folder, self.shard_sizes[shard])
                while len(self._texts) > _KEPT_SHARDS:
                    self._texts.popitem(last=False)
            self._texts.move_to_end(shard)
            return self._texts[shard]


def read_texts(folder: Path, num_rows: int) -> tuple[list[str], list[str]]:
    """Keys and captions of one shard. DataError where a file is missing, damaged or of another length."""
    try:
        keys = (folder / "keys.txt").read_text(encoding="utf-8").splitlines()
        captions = json.loads((folder / CAPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the texts of {folder} are missing or damaged ({error}); import the embeddings again"
        ) from error
    if not len(keys) == len(captions) == num_rows:
        raise DataError(
            f"{folder} has {len(keys)} keys and {len(captions)} captions for {num_rows} rows; import the embeddings again"
        )
    return keys, captions


def write_captions(folder: Path, captions: Sequence[str]) -> None:
    """Put the captions of one shard beside its columns."""
    write_atomic(folder / CAPTIONS, json.dumps(list(captions), ensure_ascii=False).encode())


def text_sha256(keys: Sequence[str], captions: Sequence[str]) -> str:
    """What an index says of a shard's keys and captions."""
    return hashlib.sha256(json.dumps([list(pair) for pair in zip(keys, captions, strict=True)]).encode()).hexdigest()


class Lookup(Sequence[str]):
    """Strings of samples that are looked up when somebody reads them: training rarely does. Pickles as a list."""

    def __init__(self, of: Callable[[int], str], samples: Sequence[int] | np.ndarray) -> None:
        self._of, self._samples = of, samples

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Lookup": ...
    def __getitem__(self, index: int | slice) -> "str | Lookup":
        if isinstance(index, slice):
            return Lookup(self._of, self._samples[index])
        return self._of(int(self._samples[index]))

    def __iter__(self) -> Iterator[str]:
        return (self._of(int(i)) for i in self._samples)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[type[list], tuple[list[str]]]:
        return list, (list(self),)
