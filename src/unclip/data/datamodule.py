"""Batches for global steps, in the one order that every device and every resumed run agrees on."""

import hashlib
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unclip.config import FREE
from unclip.data.batch import Batch
from unclip.data.embeddings import Embeddings, lengths
from unclip.data.mixture import Mixture
from unclip.data.order import Order, share
from unclip.data.pictures import Pictures
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError
from unclip.models.interface import Interface

COLUMNS = ("image", "tokens", "image_emb", "text_emb", "text_seq")
PREFETCH = 2  # batches made ahead by the background thread, or by each worker
Tokenize = Callable[[list[str]], Tensor]


@dataclass
class SourceConfig:
    """Another data set to train on, with its weight among all."""

    path: str
    embeddings: str | None = None
    weight: float = 1.0


@dataclass
class DataConfig:
    """Where samples come from. ``path`` holds one folder of shards per split, ``embeddings`` what unclip-embed wrote.

    ``others`` are further data sets to train on, each sample drawn from one of them with a probability in proportion
    to ``weight`` (of the first) and theirs; validation and statistics are those of the first.

    ``image_size``: pixels of the square that a stage trains on (null: pictures as they are). ``cache`` keeps decoded
    pictures in memory. ``num_workers`` 0 prepares batches in a thread, which is best on few cores. ``max_val`` samples
    of validation, spread evenly over the split; ``val_split`` null switches validation off. ``neighbours`` samples that
    stand side by side in a shard stay together in the shuffle: hard negatives for CLIP where the data is written so.
    """

    path: str = ""
    embeddings: str | None = None
    weight: float = 1.0
    others: list[SourceConfig] = field(default_factory=list)
    image_size: int | None = None
    train_split: str = "train"
    neighbours: int = 1
    val_split: str | None = field(default="val", metadata=FREE)
    max_val: int = field(default=1024, metadata=FREE)
    num_workers: int = field(default=0, metadata=FREE)
    cache: bool = field(default=False, metadata=FREE)

    def __post_init__(self) -> None:
        if self.max_val < 1:
            raise ConfigError(
                f"data.max_val={self.max_val} must be positive; data.val_split=null switches validation off"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers={self.num_workers} must not be negative")
        Mixture(self.weights, seed=0)  # refuses useless weights before anything is read
        if self.neighbours < 1:
            raise ConfigError(f"data.neighbours={self.neighbours} must be positive; 1 shuffles single samples")

    @property
    def weights(self) -> list[float]:
        """Of the first data set and of the others."""
        return [self.weight, *(other.weight for other in self.others)]


class Split:
    """One split, able to make the batch of any samples. ``needs`` names the columns of :class:`Batch` to fill.

    ``text_seq`` is filled where the embeddings hold it. Tokens come from the embeddings, or from ``tokenize``.
    """

    def __init__(self, cfg: DataConfig, split: str, needs: Collection[str], tokenize: Tokenize | None) -> None:
        self.shards = Shards(Path(cfg.path) / split)
        self.embeddings = Embeddings(cfg.embeddings, split) if cfg.embeddings else None
        self.needs, self.tokenize = tuple(needs), tokenize
        if self.embeddings is not None:
            self.embeddings.check_belongs_to(self.shards)
        self.pictures = Pictures(self.shards, cfg.image_size, cfg.cache) if "image" in needs else None
        self._stored = self._stored_columns()
        self._tokens: dict[int, Tensor] | None = {} if cfg.cache else None

    def batch(self, indices: np.ndarray, positions: Sequence[int]) -> Batch:
        """The samples ``indices`` as a batch; only what the stage needs is read."""
        batch = Batch(position=list(positions))
        if self.pictures is not None:
            batch.image, indices = self.pictures.batch(indices)
        samples = indices.tolist()
        batch.key = [self.shards.keys[i] for i in samples]
        batch.caption = [self.shards.caption(i) for i in samples]
        if self.embeddings is not None and self._stored:
            rows = self.embeddings.rows(indices, self._stored)
            length = int(lengths(rows["tokens"]).max()) if "tokens" in rows else None
            for column, values in rows.items():
                cut = values[:, :length] if column in ("tokens", "text_seq") else values
                kind = torch.int64 if column == "tokens" else torch.float32
                setattr(batch, column, torch.from_numpy(np.ascontiguousarray(cut)).to(kind))
        elif "tokens" in self.needs:
            batch.tokens = trim(self._tokenized(samples, batch.caption))
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
        missing = [column for column in wanted if column not in has and column != "text_seq"]
        if missing:
            raise ConfigError(f"{self.embeddings.folder} lacks the columns {missing}; embed again with columns=[…]")
        return [column for column in wanted if column in has]


class UnclipData(pl.LightningDataModule):
    """Training batches of ``batch_size`` samples over all ranks, one per global step, and validation batches.

    The training stream is endless. ``set_start(step)`` says where it begins; a sample's position is its place in the
    stream, which depends on nothing but the data and ``seed``. Rank and world size come from the trainer, if any.
    """

    def __init__(
        self, cfg: DataConfig, seed: int, batch_size: int, needs: Sequence[str], tokenize: Tokenize | None = None
    ) -> None:
        super().__init__()
        unknown = set(needs) - set(COLUMNS)
        if unknown:
            raise ValueError(f"a batch has the columns {COLUMNS}, not {sorted(unknown)}")
        if not cfg.path:
            raise ConfigError("data.path is not set; give the folder that holds the splits: data.path=…")
        self.cfg, self.seed, self.batch_size = cfg, seed, batch_size
        self.needs, self.tokenize = tuple(needs), tokenize
        self.rank, self.world_size = 0, 1
        self._start = 0
        self._splits: dict[str, Split] = {}
        self._others: dict[str, Split] = {}
        self.embeddings = Embeddings(cfg.embeddings, cfg.train_split) if cfg.embeddings else None

    @property
    def interface(self) -> Interface:
        """What the CLIP behind the embeddings fixes; without embeddings all widths are 0."""
        return self.embeddings.interface if self.embeddings is not None else Interface()

    @property
    def fingerprint(self) -> str:
        """Hash of the training data: its shards and, where used, its embeddings."""
        parts = []
        for split in self._train_splits():
            parts.append(split.shards.fingerprint)
            if split.embeddings is not None:
                parts += [split.embeddings.interface.clip, str(split.embeddings.manifest["data"][self.cfg.train_split])]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """A split, opened once."""
        if name not in self._splits:
            self._splits[name] = Split(self.cfg, name, self.needs, self.tokenize)
        return self._splits[name]

    def _train_splits(self) -> list[Split]:
        """The training split of each data set; ConfigError where their embeddings are of different CLIPs."""
        splits = [self.split(self.cfg.train_split)]
        for other in self.cfg.others:
            if other.path not in self._others:
                cfg = replace(self.cfg, path=other.path, embeddings=other.embeddings)
                self._others[other.path] = Split(cfg, self.cfg.train_split, self.needs, self.tokenize)
            splits.append(self._others[other.path])
        first, *rest = [split.embeddings.interface if split.embeddings else None for split in splits]
        for other, interface in zip(self.cfg.others, rest, strict=True):
            if interface != first:
                raise ConfigError(
                    f"the embeddings of data.others {other.path} ({other.embeddings}) are not of the CLIP of "
                    f"{self.cfg.embeddings}; embed every data set with one CLIP"
                )
        return splits

    def set_start(self, step: int) -> None:
        """The next ``train_dataloader`` begins with global step ``step``."""
        self._start = step

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> DataLoader:
        splits = self._train_splits()
        orders = [Order(split.shards.shard_sizes, self.seed, neighbours=self.cfg.neighbours) for split in splits]
        mixture = Mixture(self.cfg.weights, self.seed)
        if self.batch_size % self.world_size:
            raise ConfigError(f"trainer.batch_size={self.batch_size} is not a multiple of {self.world_size} ranks")
        place = (self.batch_size, self.rank, self.world_size)
        return self._loader(Batches(partial(_train_batch, splits, orders, mixture, place), self._start, None))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every rank gets a share of the validation samples in the same number of batches; position = sample number."""
        if self.cfg.val_split is None:
            return []
        split = self.split(self.cfg.val_split)
        total = min(len(split.shards), self.cfg.max_val)
        if total < self.world_size:
            raise DataError(f"{split.shards.split_dir} has {total} samples for {self.world_size} ranks")
        samples = np.arange(total, dtype=np.int64) * len(split.shards) // total
        largest = -(-total // self.world_size)
        num_batches = min(-(-largest // max(1, self.batch_size // self.world_size)), total // self.world_size)
        mine = np.array_split(np.array_split(samples, self.world_size)[self.rank], num_batches)
        return self._loader(Batches(partial(_val_batch, split, mine), 0, num_batches))

    def sheet_batch(self, count: int) -> Batch:
        """The first samples of the validation split (else of the training split), always with their pictures."""
        name = self.cfg.val_split or self.cfg.train_split
        split = Split(replace(self.cfg, cache=False), name, {*self.needs, "image"}, self.tokenize)
        samples = np.arange(min(count, len(split.shards)))
        return split.batch(samples, samples.tolist())

    def _loader(self, batches: "Batches") -> DataLoader:
        workers = self.cfg.num_workers
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
        )


def _train_batch(
    splits: list[Split], orders: list[Order], mixture: Mixture, place: tuple[int, int, int], step: int
) -> Batch:
    batch_size, rank, world_size = place
    positions = share(step, batch_size, rank, world_size)
    if len(splits) == 1:
        return splits[0].batch(orders[0].indices(positions.start, len(positions)), positions)
    sources, before = mixture.sources(positions.start, len(positions)), mixture.drawn_before(positions.start)
    parts = []
    for number in np.unique(sources):
        mine = np.flatnonzero(sources == number)
        indices = orders[number].indices(int(before[number]), len(mine))
        parts.append(splits[number].batch(indices, [positions[i] for i in mine]))
    return Batch.merged(parts)


def _val_batch(split: Split, samples: list[np.ndarray], step: int) -> Batch:
    return split.batch(samples[step], samples[step].tolist())


class Batches(IterableDataset):
    """``make(step)`` for step = start, start + 1, … (up to ``stop``), made ahead of their use.

    Worker w of n makes whole batches w, w + n, …; the loader takes them in turn, so the order is kept. Without workers
    a background thread makes them: decoding releases the interpreter's lock.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int | None) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            return prefetched(self._batches(0, 1), PREFETCH)
        return self._batches(worker.id, worker.num_workers)

    def _batches(self, first: int, stride: int) -> Iterator[Batch]:
        step = self.start + first
        while self.stop is None or step < self.stop:
            yield self.make(step)
            step += stride


def prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, made by a background thread up to ``depth`` ahead; its exceptions arrive here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    torch.get_num_threads()  # fixes this thread's number before the other one sets its own

    def work() -> None:
        torch.set_num_threads(1)  # a second pool of threads would spin against the training step's
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="unclip-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)


def trim(tokens: Tensor) -> Tensor:
    """Token ids (B, context_length) cut to the longest caption, int64."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()
