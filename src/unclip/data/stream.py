"""Shards without an index, read from beginning to end: behind an URL, or printed by a command (``pipe:COMMAND``)."""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from unclip.data.ahead import PREFETCH, prefetched
from unclip.data.batch import Batch
from unclip.data.index import IMAGE_TYPES, MEMBER_TYPES, key_and_kind
from unclip.data.order import seeded_bits, seeded_permutation, share
from unclip.data.pictures import stacked
from unclip.data.remote import PIPE, Command, Remote, is_url
from unclip.data.shards import Sample
from unclip.data.transforms import load_pixels
from unclip.errors import DataError

log = logging.getLogger(__name__)
BUFFER = 1024  # samples that are shuffled among


class Stream:
    """One rank's samples, epoch after epoch without end, in an order that depends on the arguments only.

    Each epoch shuffles the shards and deals them out to the ranks, so each sample is read by one rank, once; a rank
    shuffles among ``buffer`` samples that it holds. No sample's place is known before it was read, so a stream begins at
    its first sample only: a resumed run reads again what it had read, and needs the same ``world_size``.
    """

    def __init__(
        self,
        shards: list[str],
        retry_seconds: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        buffer: int = BUFFER,
    ) -> None:
        if len(shards) < world_size:
            raise DataError(
                f"{len(shards)} shards ({shards[0]} …) are too few for {world_size} ranks, each of which reads its own; "
                "write more and smaller shards, or an index (`unclip data check`)"
            )
        self.shards, self.seed, self.rank, self.world_size, self.buffer = shards, seed, rank, world_size, buffer
        self.remote = Remote(retry_seconds)

    def __iter__(self) -> Iterator[Sample]:
        epoch = 0
        while True:
            found = 0
            for sample in self._shuffled(epoch):
                found += 1
                yield sample
            if not found:
                raise DataError(f"{self.shards[0]} and the other shards of rank {self.rank} hold no captioned picture")
            epoch += 1

    def _shuffled(self, epoch: int) -> Iterator[Sample]:
        """The rank's samples of one epoch. Each that arrives takes the place of one in the buffer, which goes out."""
        held: list[Sample] = []
        bits = seeded_bits(self.seed, epoch, self.rank + 1)
        for sample in self._read(epoch):
            if len(held) < self.buffer:
                held.append(sample)
                continue
            place = next(bits) % self.buffer
            yield held[place]
            held[place] = sample
        while held:
            place = next(bits) % len(held)
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()

    def _read(self, epoch: int) -> Iterator[Sample]:
        order = seeded_permutation(len(self.shards), self.seed, epoch, 0)
        first = epoch * len(self.shards)  # the number of this epoch's first shard among those of all epochs
        for number, shard in enumerate(order.tolist(), first):
            if number % self.world_size == self.rank:
                yield from samples_of(self.shards[shard], self.remote)


def samples_of(location: str, remote: Remote) -> Iterator[Sample]:
    """The samples of one shard in its order; members without picture or caption are left out, with a line in the log."""
    with _opened(location, remote) as file:
        whole = _Whole(file)
        try:
            with tarfile.open(fileobj=whole, mode="r|") as tar:  # type: ignore[call-overload]
                yield from _grouped(tar, location)
            while whole.read(1 << 16):  # what stands behind the archive's end, so that a command can end by itself
                pass
            if any(whole.tail) or not whole.tail:
                raise EOFError("its end is missing")
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{location} is not a complete tar file ({error}); fetch or make it again") from error


class _Whole:
    """A stream that remembers its last block: zeros, unless the archive was cut, which tarfile may take for its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.tail = (self.tail + content)[-tarfile.BLOCKSIZE :]
        return content


def _opened(location: str, remote: Remote) -> BinaryIO:
    if location.startswith(PIPE):
        return io.BufferedReader(Command(location.removeprefix(PIPE)), 1 << 20)
    if is_url(location):
        return remote.open(location)
    try:
        return open(location, "rb")
    except FileNotFoundError:
        raise DataError(f"there is no {location}; fetch it again") from None


def _grouped(tar: tarfile.TarFile, location: str) -> Iterator[Sample]:
    """Samples from members that stand side by side."""
    key, members = "", dict[str, bytes]()
    for info in tar:
        own, kind = key_and_kind(info.name)
        if not info.isfile() or kind not in MEMBER_TYPES:
            continue
        if own != key:
            yield from _sample(key, members, location)
            key, members = own, {}
        file = tar.extractfile(info)
        assert file is not None
        members[kind] = file.read()
    yield from _sample(key, members, location)


def _sample(key: str, members: dict[str, bytes], location: str) -> Iterator[Sample]:
    if not members:
        return
    image = next((members[kind] for kind in IMAGE_TYPES if kind in members), None)
    try:
        meta = json.loads(members.get("json", b"{}"))
        caption = members["txt"].decode("utf-8-sig").strip() if "txt" in members else str(meta["caption"] or "")
        if not caption:
            raise ValueError("an empty one")
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: %s has no caption (%r); left out", location, key, error)
        return
    if image is None:
        log.warning("%s: %s has no picture; left out", location, key)
        return
    yield Sample(key, image, caption, meta if isinstance(meta, dict) else {})


def taken(stream: Stream, batch: int, start: int) -> Iterator[list[Sample]]:
    """Batches of the stream from number ``start`` on; what stands before is read and dropped."""
    if start:
        log.info("reading again the %d samples before step %d; shards with an index need not", start * batch, start)
    samples = iter(stream)
    for _ in range(start * batch):
        next(samples)
    while True:
        yield [next(samples) for _ in range(batch)]


@dataclass
class Decode:
    """Makes the batch of encoded samples. A damaged picture is replaced by the next good one of its batch.

    ``size``: pixels of the square (None: as they are); ``tokenize`` None: the batch has no tokens.
    """

    where: str
    pictures: bool
    size: int | None
    tokenize: Callable[[list[str]], Tensor] | None
    enlarge: bool = True

    def __call__(self, samples: list[Sample], positions: Sequence[int]) -> Batch:
        batch = Batch(position=list(positions))
        if self.pictures:
            samples, batch.replaced, batch.image = self._decoded(samples)
        batch.key = [sample.key for sample in samples]
        batch.caption = [sample.caption for sample in samples]
        if self.tokenize is not None:
            batch.tokens = self.tokenize(batch.caption)
        return batch

    def _decoded(self, samples: list[Sample]) -> tuple[list[Sample], list[str], Tensor]:
        found: dict[int, np.ndarray] = {}
        for place, sample in enumerate(samples):
            try:
                found[place] = load_pixels(sample.image, self.size, self.enlarge)
            except DataError as error:
                log.warning("%s: %s; taking the next sample of its batch instead", sample.key, error)
        if not found:
            raise DataError(f"no picture of a batch from {self.where} can be decoded, such as {samples[0].key}")
        count = len(samples)
        used = [next(p % count for p in range(place, place + count) if p % count in found) for place in range(count)]
        replaced = ["" if place in found else sample.key for place, sample in enumerate(samples)]
        pictures = stacked((found[place] for place in used), count, self.where)
        return [samples[place] for place in used], replaced, torch.from_numpy(pictures)


class Encoded:
    """The encoded samples and positions of a rank's steps from ``start`` on, read ahead by a thread."""

    def __init__(self, stream: Stream, start: int, place: tuple[int, int, int]) -> None:
        self.stream, self.start, self.place = stream, start, place

    def __iter__(self) -> Iterator[tuple[list[Sample], range]]:
        return prefetched(self.steps(), PREFETCH)

    def steps(self) -> Iterator[tuple[list[Sample], range]]:
        batch_size, rank, world_size = self.place
        for step, samples in enumerate(taken(self.stream, batch_size // world_size, self.start), self.start):
            yield samples, share(step, batch_size, rank, world_size)


class Decoded(IterableDataset):
    """Batches of a stream, read and decoded by one thread."""

    def __init__(self, encoded: Encoded, decode: Callable[..., Batch]) -> None:
        self.encoded, self.decode = encoded, decode

    def __iter__(self) -> Iterator[Batch]:
        return prefetched((self.decode(samples, positions) for samples, positions in self.encoded.steps()), PREFETCH)


class DecodeItem(Dataset):
    """What a worker does with the samples that it is handed."""

    def __init__(self, decode: Callable[..., Batch]) -> None:
        self.decode = decode

    def __getitem__(self, item: tuple[list[Sample], range]) -> Batch:
        return self.decode(*item)
