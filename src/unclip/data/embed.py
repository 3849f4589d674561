"""Run CLIP once over every picture and caption of a data set and keep what it says."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from unclip import artifact
from unclip.config import Precision
from unclip.data.batch import Batch
from unclip.data.datamodule import PREFETCH, Batches, trim
from unclip.data.embeddings import COLUMNS, EmbeddingsWriter, lengths
from unclip.data.pictures import Pictures
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError
from unclip.models.clip import CLIP, Tokenizer
from unclip.models.interface import Interface

log = logging.getLogger(__name__)
Columns = dict[str, np.ndarray]


@dataclass
class EmbedConfig:
    """``run``: the folder to write; ``clip``: a CLIP run or artifact; ``data``: a folder with splits.

    ``splits`` empty takes every split that is there. ``columns`` may add ``text_seq``, the caption's token states (many
    bytes). ``dtype`` of the stored embeddings is float32 or float16; ``text_seq`` is always float16.
    """

    run: str
    clip: str
    data: str
    splits: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=lambda: ["image_emb", "text_emb", "tokens"])
    dtype: str = "float32"
    precision: Precision = Precision.fp32
    batch_size: int = 256
    num_workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown or "image_emb" not in self.columns:
            raise ConfigError(f"columns={self.columns} must hold image_emb and otherwise only {', '.join(COLUMNS)}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype={self.dtype} is not one of: float32, float16")


def embed(cfg: EmbedConfig) -> Path:
    """Embed a data set with a CLIP artifact and return the embeddings folder.

    The same command again goes on after the last complete shard. Shards whose data changed are made anew. Raises
    DataError where the folder holds embeddings of another CLIP, with other columns or of another dtype.
    """
    model, manifest = artifact.load(cfg.clip, kind="clip")
    assert isinstance(model, CLIP)
    embed_with(model, replace(model.interface(), clip=manifest.hash), cfg)
    return Path(cfg.run)


def embed_with(clip: CLIP, interface: Interface, cfg: EmbedConfig) -> None:
    """:func:`embed` with a model in memory; ``interface.clip`` identifies it."""
    names = cfg.splits or sorted(path.parent.name for path in Path(cfg.data).glob("*/index.json"))
    if not names:
        raise DataError(f"{cfg.data} holds no split with an index.json; run `unclip data check {cfg.data}`")
    splits = {name: Shards(Path(cfg.data) / name) for name in names}
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    clip = clip.to(device).eval()
    total = sum(len(shards) for shards in splits.values())
    with _progress(total, f"embedding {cfg.data}") as advance:
        for name, shards in splits.items():
            writer = EmbeddingsWriter(Path(cfg.run), name, interface, cfg.columns, cfg.dtype)
            for shard in range(len(shards.names)):
                stem, sha256 = Path(shards.names[shard]).stem, shards.sha256[shard]
                first, last = shards.starts[shard : shard + 2].tolist()
                if not writer.done(stem, sha256):
                    parts = []
                    for part in _shard(clip, shards, range(first, last), cfg):
                        parts.append(part)
                        advance(len(part["image_emb"]))
                    writer.write(stem, sha256, shards.keys[first:last], _joined(parts))
                else:
                    advance(last - first)
            writer.finish(shards)


def _shard(clip: CLIP, shards: Shards, samples: range, cfg: EmbedConfig) -> Iterator[Columns]:
    """The columns of one shard, batch after batch."""
    chunks = [samples[i : i + cfg.batch_size] for i in range(0, len(samples), cfg.batch_size)]
    make = partial(_read, Pictures(shards, clip.image_size), clip.tokenizer, chunks)
    batches = Batches(make, 0, len(chunks))
    ahead = PREFETCH if cfg.num_workers else None
    for batch in DataLoader(batches, batch_size=None, num_workers=cfg.num_workers, prefetch_factor=ahead):
        yield _encode(clip, batch, cfg)


def _read(pictures: Pictures, tokenizer: Tokenizer, chunks: list[range], step: int) -> Batch:
    shards, samples = pictures.shards, chunks[step]
    image, used = pictures.batch(np.array(samples))
    if used.tolist() != list(samples):
        raise DataError(f"{shards.split_dir} has damaged pictures; `unclip data check` takes them out of its index")
    captions = [shards.caption(i) for i in samples]
    return Batch(position=list(samples), caption=captions, image=image, tokens=tokenizer(captions))


@torch.no_grad()
def _encode(clip: CLIP, batch: Batch, cfg: EmbedConfig) -> Columns:
    device = clip.mean.device
    assert batch.image is not None
    assert batch.tokens is not None
    columns: Columns = {"tokens": batch.tokens.int().numpy()}
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision is Precision.bf16):
        columns["image_emb"] = clip.encode_image(batch.image.to(device)).float().cpu().numpy().astype(cfg.dtype)
        if {"text_emb", "text_seq"} & set(cfg.columns):
            text_emb, text_seq = clip.encode_text(trim(batch.tokens).to(device))
            columns["text_emb"] = text_emb.float().cpu().numpy().astype(cfg.dtype)
            columns["text_seq"] = text_seq.half().cpu().numpy()
    for name in ("image_emb", "text_emb"):
        if not np.isfinite(columns.get(name, 0.0)).all():
            raise DataError(f"{name} is not finite in {cfg.dtype}; take dtype=float32 and check the CLIP")
    return {name: columns[name] for name in cfg.columns}


def _joined(parts: list[Columns]) -> Columns:
    """Batches of a shard as whole columns; caption states are as long as the shard's longest, zero after their end."""
    longest = max((part["text_seq"].shape[1] for part in parts if "text_seq" in part), default=0)
    for part in parts:
        if "text_seq" in part:
            states = part["text_seq"]
            part["text_seq"] = np.pad(states, ((0, 0), (0, longest - states.shape[1]), (0, 0)))
            if "tokens" in part:
                part["text_seq"][np.arange(longest) >= lengths(part["tokens"])[:, None]] = 0
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A function that counts samples done: a bar with the time left on a terminal, log lines elsewhere."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last > 30 or done == total:
            log.info("%s: %d of %d, %.0f s left", title, done, total, (now - start) * (total - done) / done)
            last = now

    yield advance
