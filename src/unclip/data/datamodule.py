"""Batches for global steps, in the one order that every device and every resumed run agrees on."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unclip import artifact
from unclip.data.ahead import PREFETCH, Batches, only_from_above
from unclip.data.batch import Batch
from unclip.data.embeddings import Embeddings
from unclip.data.mixture import Mixture
from unclip.data.order import Order, share
from unclip.data.places import is_remote, is_stream_only
from unclip.data.remote import MissingError
from unclip.data.settings import DataConfig, TextStates
from unclip.data.split import Split, Tokenize, trimmed
from unclip.data.stream import Decode, Decoded, DecodeItem, Encoded, Stream, taken
from unclip.errors import ConfigError, DataError
from unclip.models.clip import CLIP
from unclip.models.interface import Interface

log = logging.getLogger(__name__)
COLUMNS = ("image", "tokens", "image_emb", "text_emb", "text_seq")
SHEET_SIZE = 64  # pixels of what a stage shows that does not train on pictures
FEWEST_READ = 1000  # samples, before which a few damaged ones are no share yet


class UnclipData(pl.LightningDataModule):
    """Training batches of ``batch_size`` samples over all ranks, one per global step, and validation batches.

    The training stream is endless. ``set_start(step)`` says where it begins; a sample's position is its place in the
    stream, which depends on nothing but the data and ``seed``. Rank and world size come from the trainer, if any.
    """

    def __init__(
        self, cfg: DataConfig, seed: int, batch_size: int, needs: Sequence[str], tokenize: Tokenize | None = None,
        raw: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        unknown = set(needs) - set(COLUMNS)
        if unknown:
            raise ValueError(f"a batch has the columns {COLUMNS}, not {sorted(unknown)}")
        if not cfg.path and ("image" in needs or not cfg.embeddings):
            raise ConfigError(
                f"data.path is not set; give the folder that holds the splits: data.path=… (this stage reads "
                f"{', '.join(needs)}; only a prior trains on imported embeddings alone)"
            )
        self.cfg, self.seed, self.batch_size = cfg, seed, batch_size
        self.tokenize = tokenize
        self.degrade: Callable[[Batch], Batch] | None = None  # what workers do to a batch, last of all
        self._live = cfg.text_states is TextStates.live and "text_seq" in needs
        if cfg.clip is not None and not self._live:
            raise ConfigError(
                f"data.clip={cfg.clip} makes caption states, which this model does not read: leave it out"
            )
        self.needs = tuple(name for name in needs if name != "text_seq") if self._live else tuple(needs)
        self.rank, self.world_size = 0, 1
        self.parts = 1  # in which training computes a batch
        self._start = 0
        self._splits: dict[str, Split] = {}
        self._sheets: dict[int, Batch] = {}
        self._others: dict[str, Split] = {}
        self.embeddings = Embeddings(cfg.embeddings, cfg.train_split) if cfg.embeddings else None
        self._raw = raw
        if raw and self.embeddings is not None:
            self.embeddings.refuse_unit_norm()
        self.num_read, self.num_replaced = 0, 0  # samples that arrived in this process, and those that others replaced
        self._damaged: list[str] = []
        self._before = [0, 0]  # read and replaced by all ranks when the run was resumed
        self._clip = self._text_tower() if self._live else None

    def _text_tower(self) -> CLIP:
        model, manifest = artifact.load(str(self.cfg.clip), kind="clip")
        if manifest.hash != self.interface.clip:
            raise ConfigError(
                f"data.clip={self.cfg.clip} is CLIP {manifest.hash[:8]} but {self.cfg.embeddings} holds embeddings of CLIP "
                f"{self.interface.clip[:8]}; give the CLIP that made the embeddings"
            )
        assert isinstance(model, CLIP)
        return model

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """With live states: the batch with its ``text_seq``, made on the device that the batch is on."""
        if self._clip is None:
            return batch
        tokens = batch.column("tokens")
        with nullcontext() if self.trainer is None else self.trainer.precision_plugin.forward_context():
            return replace(batch, text_seq=self._clip.to(tokens.device).encode_text(tokens)[1].float())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Without waiting for it: Lightning waits for what is no tensor."""
        return batch.to(device, non_blocking=device.type == "cuda")

    @property
    def interface(self) -> Interface:
        """What the CLIP behind the embeddings fixes; without embeddings all widths are 0."""
        return self.embeddings.interface if self.embeddings is not None else Interface()

    @property
    def fingerprint(self) -> str:
        """Hash of the training data: its shards and, where used, its embeddings."""
        if self.streamed is not None:
            return hashlib.sha256(json.dumps(self.streamed).encode()).hexdigest()
        parts = []
        for split in self._train_splits():
            parts.append(split.shards.fingerprint)
            if split.embeddings is not None:
                parts += split.embeddings.identity
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @cached_property
    def streamed(self) -> list[str] | None:
        """The shards of the training split where they are read as a stream; None where they have an index."""
        place = self.cfg.place(self.cfg.train_split)
        if isinstance(place, str):
            return None
        if not is_stream_only(place):
            try:
                self.split(self.cfg.train_split)
                return None
            except MissingError as error:
                if not is_remote(place):
                    raise
                log.info("streaming: %s. A stream resumes on the same number of ranks only", error)
        alone = {"data.embeddings": self.cfg.embeddings, "data.others": self.cfg.others, "data.cache": self.cfg.cache}
        alone["data.neighbours"] = self.cfg.neighbours > 1
        if used := [name for name, value in alone.items() if value]:
            raise ConfigError(f"{used[0]} needs shards with an index, but {place[0]} is read as a stream")
        wanted = set(self.needs) - {"image", "text_seq"} - ({"tokens"} if self.tokenize else set())
        if wanted:
            raise ConfigError(
                f"this stage needs {', '.join(sorted(wanted))} from embeddings, but {place[0]} is read as a stream: "
                "write its index with `unclip data check`, run unclip-embed and set data.embeddings"
            )
        return place

    def split(self, name: str) -> Split:
        """A split, opened once."""
        if name not in self._splits:
            self._splits[name] = Split(self.cfg, name, self.needs, self.tokenize)
        return self._splits[name]

    def _train_splits(self) -> list[Split]:
        """The training split of each data set; ConfigError where their embeddings are of different CLIPs."""
        splits = [self.split(self.cfg.train_split)]
        for other in self.cfg.others:
            name = f"{other.path} {other.embeddings}"
            if name not in self._others:
                cfg = replace(self.cfg, path=other.path, embeddings=other.embeddings)
                self._others[name] = Split(cfg, self.cfg.train_split, self.needs, self.tokenize)
            splits.append(self._others[name])
        first, *rest = [split.embeddings.interface if split.embeddings else None for split in splits]
        for split in splits[1:]:
            if self._raw and split.embeddings is not None:
                split.embeddings.refuse_unit_norm()
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

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Counts what training read and replaced; DataError where that is too much."""
        if self.trainer is not None and not self.trainer.training:
            return batch
        self.num_read += len(batch)
        found = [key for key in batch.replaced if key]
        self.num_replaced += len(found)
        self._damaged = (self._damaged + found)[-5:]
        if found and self.num_replaced > self.cfg.max_corrupt * max(self.num_read, FEWEST_READ):
            raise DataError(
                f"{self.num_replaced} of {self.num_read} samples read from {self.cfg.path} are damaged or too small, more than "
                f"data.max_corrupt={self.cfg.max_corrupt:g} allows (of at least {FEWEST_READ}); the last ones: "
                f"{', '.join(self._damaged)}. `unclip data check` finds all of them and writes an index without them"
            )
        return batch

    def counts(self) -> dict[str, int]:
        """Samples read and replaced by all ranks since the run began; every rank must ask."""
        mine = torch.tensor([self.num_read, self.num_replaced])
        if self.trainer is not None:
            mine = self.trainer.strategy.reduce(mine.to(self.trainer.strategy.root_device), reduce_op="sum")
        read, replaced = (before + new for before, new in zip(self._before, mine.tolist(), strict=True))
        return {"data/read": read, "data/replaced": replaced}

    def state_dict(self) -> dict[str, Any]:
        place = {"streamed": self.streamed is not None, "world_size": self.world_size, "fingerprint": self.fingerprint}
        return {"counts": list(self.counts().values()), **place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the counts over. ConfigError for a stream on another number of ranks, DataError for other data."""
        if state_dict["fingerprint"] != self.fingerprint or state_dict["streamed"] != (self.streamed is not None):
            raise DataError(
                f"the index of {self.cfg.path}, or what data.embeddings holds, is another one than when this run began, so "
                "it cannot go on with the same samples; put the old files back, or start another run=…"
            )
        if self.streamed is not None and state_dict["world_size"] != self.world_size:
            raise ConfigError(
                f"this run reads {self.streamed[0]} and others as a stream on {state_dict['world_size']} ranks and cannot go "
                f"on with {self.world_size}: nobody knows which samples of each shard were seen. Use as many ranks; shards "
                "with an index go on with any number"
            )
        self._before = list(state_dict["counts"])

    def train_dataloader(self) -> DataLoader:
        if self.batch_size % self.world_size:
            raise ConfigError(f"trainer.batch_size={self.batch_size} is not a multiple of {self.world_size} ranks")
        if self.streamed is not None:
            return self._stream_loader(self.streamed)
        splits = self._train_splits()
        orders = [Order(split.shards.shard_sizes, self.seed, neighbours=self.cfg.neighbours) for split in splits]
        mixture = Mixture(self.cfg.weights, self.seed)
        place = (self.batch_size, self.rank, self.world_size)
        make = partial(_train_batch, splits, orders, mixture, place)
        return self._loader(Batches(self._degraded(make), self._start, None))

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
        at_once = max(1, self.batch_size // self.world_size // self.parts)  # as many as training sees
        num_batches = min(-(-largest // at_once), total // self.world_size)
        mine = np.array_split(np.array_split(samples, self.world_size)[self.rank], num_batches)
        return self._loader(Batches(self._degraded(partial(_val_batch, split, mine)), 0, num_batches))

    def sheet_batch(self, count: int) -> Batch:
        """The first samples of the validation split (else of the training split), with their pictures if there are any."""
        if count not in self._sheets:
            self._sheets[count] = self._sheet_batch(count)
        return self._sheets[count]

    def _sheet_batch(self, count: int) -> Batch:
        name = self.cfg.val_split or self.cfg.train_split
        if name == self.cfg.train_split and self.streamed is not None:
            stream = Stream(self.streamed, self.cfg.retry_seconds, self.seed)
            return self._decode(pictures=True)(next(taken(stream, count, 0)), range(count))
        cfg = replace(self.cfg, cache=False, image_size=self.cfg.image_size or SHEET_SIZE)
        split = Split(cfg, name, {*self.needs, "image"}, self.tokenize)
        samples = np.arange(min(count, len(split.shards)))
        return self.on_after_batch_transfer(split.batch(samples, samples.tolist()).to("cpu"), 0)

    def _stream_loader(self, shards: list[str]) -> DataLoader:
        """One thread reads the shards, whatever the number of workers, which decode only."""
        stream = Stream(shards, self.cfg.retry_seconds, self.seed, self.rank, self.world_size)
        encoded = Encoded(stream, self._start, (self.batch_size, self.rank, self.world_size))
        decode = self._degraded(self._decode("image" in self.needs))
        if not self.cfg.num_workers:
            return self._loader(Decoded(encoded, decode))
        return self._loader(DecodeItem(decode), sampler=encoded)

    def _decode(self, pictures: bool) -> Decode:
        tokenize = partial(trimmed, self.tokenize) if self.tokenize and "tokens" in self.needs else None
        return Decode(str(self.cfg.path), pictures, self.cfg.image_size, tokenize, self.cfg.enlarges)

    def _degraded(self, make: Callable[..., Batch]) -> Callable[..., Batch]:
        return make if self.degrade is None else partial(_then, make, self.degrade)

    def _loader(self, batches: Dataset, sampler: Encoded | None = None) -> DataLoader:
        workers = self.cfg.num_workers
        return DataLoader(
            batches,
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=only_from_above,
        )


def _then(make: Callable[..., Batch], change: Callable[[Batch], Batch], *what: Any) -> Batch:
    return change(make(*what))


def _train_batch(
    splits: list[Split], orders: list[Order], mixture: Mixture, place: tuple[int, int, int], step: int
) -> Batch:
    batch_size, rank, world_size = place
    positions = share(step, batch_size, rank, world_size)
    if len(splits) == 1:
        return _without_captions(splits[0].batch(orders[0].indices(positions.start, len(positions)), positions))
    sources, before = mixture.sources(positions.start, len(positions)), mixture.drawn_before(positions.start)
    parts = []
    for number in np.unique(sources):
        mine = np.flatnonzero(sources == number)
        indices = orders[number].indices(int(before[number]), len(mine))
        parts.append(_without_captions(splits[number].batch(indices, [positions[i] for i in mine])))
    return Batch.merged(parts)


def _without_captions(batch: Batch) -> Batch:
    """In a worker, which would read all of them to send the batch; training asks for none."""
    if get_worker_info() is not None:
        batch.caption = []
    return batch


def _val_batch(split: Split, samples: list[np.ndarray], step: int) -> Batch:
    return split.batch(samples[step], samples[step].tolist())
