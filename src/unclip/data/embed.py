"""Run CLIP once over every picture and caption of a data set and keep what it says."""

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unclip import artifact
from unclip.config import Precision
from unclip.data.ahead import PREFETCH, Batches, only_from_above
from unclip.data.batch import Batch
from unclip.data.embeddings import COLUMNS, EMPTY_CAPTION, lengths
from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.data.parallel import in_order, num_cores, one_behind
from unclip.data.remote import RemoteConfig, is_url
from unclip.data.shards import Shards
from unclip.data.split import trim
from unclip.data.variants import Crops, Variants, captions_of
from unclip.errors import ConfigError, DataError
from unclip.models.clip import CLIP, Attention, Tokenizer
from unclip.models.interface import Interface
from unclip.progress import counted

log = logging.getLogger(__name__)
Columns = dict[str, np.ndarray]


@dataclass
class EmbedConfig:
    """``run``: the folder to write; ``clip``: a CLIP run or artifact; ``data``: a folder with splits.

    ``splits`` empty takes every split that is there. ``columns`` may add ``text_seq``, the caption's token states (many
    bytes). ``dtype`` of the stored embeddings is float32 or float16; ``text_seq`` is always float16. ``captions`` and
    ``crops``: how many of each picture to embed; ``seed`` places the crops. ``batch_size`` 0 is 32 on a CPU, which
    encodes a batch on each core, and 256 on a GPU.

    ``data`` may lie behind an URL: name its ``splits`` then. ``cache_dir``, ``cache_gb``, ``retry_seconds``: see
    :class:`RemoteConfig`; shards that are cached whole are read much faster than picture by picture.

    ``part`` of ``parts`` (0: from the SLURM job array, if any, else all) takes every ``parts``-th shard; the ranks of
    torchrun share a part. ``num_workers`` 0 reads and encodes in threads; more read in processes of their own.
    """

    run: str
    clip: str
    data: str
    splits: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=lambda: ["image_emb", "text_emb", "tokens"])
    dtype: str = "float32"
    captions: int = 1
    crops: int = 1
    seed: int = 0
    precision: Precision = Precision.fp32
    batch_size: int = 0
    part: int = 0
    parts: int = 0
    num_workers: int = 0
    device: str = "auto"
    cache_dir: str | None = None
    cache_gb: float = 100.0
    retry_seconds: float = 600.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown or "image_emb" not in self.columns:
            raise ConfigError(f"columns={self.columns} must hold image_emb and otherwise only {', '.join(COLUMNS)}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype={self.dtype} is not one of: float32, float16")
        for name in ("captions", "crops"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"{name}={self.__dict__[name]} must be at least 1")
        for name in ("batch_size", "num_workers", "seed"):
            if self.__dict__[name] < 0:
                raise ConfigError(f"{name}={self.__dict__[name]} must not be negative")
        if self.part < 0 or self.part >= max(self.parts, 1):
            raise ConfigError(f"part={self.part} of parts={self.parts}: parts count from 0 to parts - 1")

    @property
    def remote(self) -> RemoteConfig:
        return RemoteConfig(self.cache_dir, self.cache_gb, self.retry_seconds)

    @property
    def variants(self) -> Variants:
        return Variants(self.captions, self.crops, self.seed if self.crops > 1 else 0)

    def share(self) -> tuple[int, int]:
        """This process's part and the number of parts: settings or SLURM's job array, times torchrun's ranks."""
        part, parts = (self.part, self.parts) if self.parts else _array_task()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return part * world_size + rank, parts * world_size


def _array_task() -> tuple[int, int]:
    """Place and number of the tasks of SLURM's job array; ConfigError for one with gaps."""
    if (
        "SLURM_ARRAY_TASK_ID" not in os.environ or "SUBMITIT_EXECUTOR" in os.environ
    ):  # launch=slurm: each task a job of its own
        return 0, 1
    task, first, last, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
    step = (last - first) // max(count - 1, 1) or 1
    if (task - first) % step or (last - first) != step * (count - 1):
        raise ConfigError(
            f"the tasks {first} to {last} of this SLURM job array have gaps; submit the whole range (shards that are "
            "done cost nothing) or set part=… and parts=…"
        )
    return (task - first) // step, count


def embed(cfg: EmbedConfig) -> Path:
    """Embed a data set with a CLIP artifact and return the embeddings folder.

    The same command again goes on after the last complete shard. Shards whose data changed are made anew. Raises
    DataError where the folder holds embeddings of another CLIP, with other columns or of another dtype.
    """
    model, manifest = artifact.load(cfg.clip, kind="clip")
    assert isinstance(model, CLIP)
    if cfg.precision is Precision.bf16:
        _round_weights(model)
    embed_with(model, replace(model.interface(), clip=manifest.hash), cfg)
    return Path(cfg.run)


def _round_weights(clip: CLIP) -> None:
    """Round once what autocast would round to bfloat16 again for every batch; the results are the same to the bit."""
    for module in clip.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
        elif isinstance(module, Attention):
            for parameter in (module.in_proj_weight, module.in_proj_bias):
                parameter.data = parameter.data.bfloat16()


@dataclass(frozen=True)
class _Job:
    """One shard to embed."""

    shards: Shards
    writer: EmbeddingsWriter
    shard: int

    @property
    def samples(self) -> range:
        return range(*self.shards.starts[self.shard : self.shard + 2].tolist())

    @property
    def stem(self) -> str:
        return Path(self.shards.names[self.shard]).stem

    def done(self) -> bool:
        keys = self.shards.keys[self.samples.start : self.samples.stop]
        return self.writer.done(self.stem, self.shards.sha256[self.shard], keys)


def embed_with(clip: CLIP, interface: Interface, cfg: EmbedConfig) -> None:
    """:func:`embed` with a model in memory; ``interface.clip`` identifies it."""
    names = _split_names(cfg)
    splits = {name: Shards(f"{cfg.data.rstrip('/')}/{name}", cfg.remote) for name in names}
    writers = {
        name: EmbeddingsWriter(Path(cfg.run), name, interface, cfg.columns, cfg.dtype, cfg.variants, cfg.precision.name)
        for name in names
    }
    every = [_Job(splits[name], writers[name], shard) for name in names for shard in range(len(splits[name].names))]
    part, parts = cfg.share()
    missing = [not job.done() for job in every]
    check_storage(every, missing, clip, interface, cfg)
    todo = [job for number, job in enumerate(every) if number % parts == part and missing[number]]
    total = sum(len(job.samples) for job in todo)
    title = f"embedding {cfg.data}" + (f", part {part} of {parts}" if parts > 1 else "")
    with (
        counted(total, title) as advance,
        one_behind() as soon,
        contextlib.closing(_encoded(clip, todo, cfg, advance)) as found,
    ):
        for job, columns in found:
            soon(partial(_write, job, columns))
    log.info("%s: done, %d pictures", title, total)
    for name, writer in writers.items():
        if writer.complete(splits[name]):
            writer.finish(splits[name])
        else:
            log.info("%s: other parts are not done; the last one to end writes %s/index.json", name, writer.split_dir)
    writers[names[0]].add_beside(EMPTY_CAPTION, lambda: save(_empty_caption(clip, cfg)))


@torch.inference_mode()
def _empty_caption(clip: CLIP, cfg: EmbedConfig) -> dict[str, Tensor]:
    """What :meth:`unclip.data.embeddings.Embeddings.empty_caption` reads."""
    tokens = trim(clip.tokenizer([""]))
    with torch.autocast(clip.mean.device.type, torch.bfloat16, enabled=cfg.precision is Precision.bf16):
        text_emb, text_seq = clip.encode_text(tokens.to(clip.mean.device))
    found = {"tokens": tokens, "text_emb": text_emb.float(), "text_seq": text_seq.float()}
    return {name: value[0].cpu().contiguous() for name, value in found.items()}


def _split_names(cfg: EmbedConfig) -> list[str]:
    if not cfg.splits and is_url(cfg.data):
        raise ConfigError(
            f"data={cfg.data} is behind an URL, where splits cannot be listed: name them, splits=[train,val]"
        )
    names = cfg.splits or sorted(path.parent.name for path in Path(cfg.data).glob("*/index.json"))
    if not names:
        raise DataError(f"{cfg.data} holds no split with an index.json; run `unclip data check {cfg.data}`")
    return names


def check_storage(every: list[_Job], missing: list[bool], clip: CLIP, interface: Interface, cfg: EmbedConfig) -> None:
    """Log what each column takes; DataError where what is missing does not fit on the disk."""
    total = sum(len(job.samples) for job in every)
    share = sum(len(job.samples) for job, lacks in zip(every, missing, strict=True) if lacks) / max(total, 1)
    itemsize = np.dtype(cfg.dtype).itemsize
    bytes_of = {"image_emb": interface.embed_dim * itemsize, "text_emb": interface.embed_dim * itemsize}
    bytes_of["tokens"] = interface.context_length * 4
    if "text_seq" in cfg.columns:
        bytes_of["text_seq"] = _longest(every, clip.tokenizer, cfg) * interface.text_width * 2
    sizes = {column: total * cfg.variants.of(column) * bytes_of[column] for column in cfg.columns}
    needed, free = round(share * sum(sizes.values())), shutil.disk_usage(cfg.run).free
    each = ", ".join(f"{column} {_gigabytes(size)}" for column, size in sizes.items())
    log.info(
        "%d pictures take %s: %s; %s still to write, %s free",
        *(total, _gigabytes(sum(sizes.values())), each, _gigabytes(needed), _gigabytes(free)),
    )
    if needed > free:
        raise DataError(
            f"{cfg.run} has {_gigabytes(free)} free, the embeddings still need {_gigabytes(needed)} ({each}); make "
            "room, write elsewhere with run=…, or take dtype=float16 or fewer columns"
        )


def _longest(every: list[_Job], tokenizer: Tokenizer, cfg: EmbedConfig, most: int = 256) -> int:
    """The longest caption in tokens among about ``most`` samples of the whole data set."""
    some = every[:: max(1, len(every) // 64)]
    places = [(job.shards, i) for job in some for i in job.samples[:: max(1, len(job.samples) * len(some) // most)]]
    captions = [text for shards, i in places for text in captions_of(shards, i, cfg.captions)]
    return int(lengths(tokenizer(captions).numpy()).max())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _encoded(
    clip: CLIP, jobs: list[_Job], cfg: EmbedConfig, advance: Callable[[int], None]
) -> Generator[tuple[_Job, list[Columns]], None, None]:
    """Each shard with its columns, batch after batch: reading, encoding and the shards overlap."""
    device = torch.device(_device() if cfg.device == "auto" else cfg.device)
    clip = clip.to(device).eval()
    batch_size = cfg.batch_size or (32 if device.type == "cpu" else 256)
    size = max(1, batch_size // max(cfg.captions, cfg.crops))
    chunks = [(job, job.samples[i : i + size]) for job in jobs for i in range(0, len(job.samples), size)]
    crops = {id(job.shards): Crops(job.shards, clip.image_size, cfg.variants) for job in jobs}
    work = [(crops[id(job.shards)], samples) for job, samples in chunks]
    read = partial(_read, clip.tokenizer, work)

    def encode(batch: Batch) -> tuple[Columns, list[str]]:
        return _encode(clip, batch, cfg), _cut(clip.tokenizer, batch)

    if cfg.num_workers:
        batches = Batches(read, 0, len(chunks))
        settings = {"num_workers": cfg.num_workers, "prefetch_factor": PREFETCH, "worker_init_fn": only_from_above}
        loader = DataLoader(batches, batch_size=None, **settings)
        parts = map(encode, loader)
    elif device.type == "cpu":  # one batch a core: no thread waits for another within an operation
        parts = in_order(lambda step: encode(read(step)), range(len(chunks)), torch.get_num_threads())
    else:
        parts = map(encode, in_order(read, range(len(chunks)), min(8, num_cores())))
    counted = zip(chunks, parts, strict=True)
    num_cut, first_cut = 0, ""
    for job, group in itertools.groupby(counted, key=lambda item: item[0][0]):
        found = []
        for (_, samples), (columns, keys) in group:
            found.append(columns)
            num_cut, first_cut = num_cut + len(keys), first_cut or "".join(keys[:1])
            advance(len(samples))
        yield job, found
    if num_cut:
        log.warning(
            "captions that are longer than the %d tokens that CLIP reads: %d, the first of them that of %s; their last words "
            "are not seen: let what matters stand first",
            *(clip.tokenizer.context_length, num_cut, first_cut),
        )


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _read(tokenizer: Tokenizer, work: list[tuple[Crops, range]], step: int) -> Batch:
    """Pictures (B * crops, 3, S, S) and tokens (B * captions, context_length) of one step's samples."""
    crops, samples = work[step]
    shards = crops.central.shards
    image = crops.batch(samples)  # before the captions, which arrive with the pictures where both are far away
    captions = [text for i in samples for text in captions_of(shards, i, crops.variants.captions)]
    keys = [shards.keys[i] for i in samples]
    return Batch(position=list(samples), key=keys, caption=captions, image=image, tokens=tokenizer(captions))


def _cut(tokenizer: Tokenizer, batch: Batch) -> list[str]:
    """The keys of captions that are longer than CLIP reads, one for each caption."""
    # as few as there are: counting tokens takes time
    full: list[int] = batch.column("tokens")[:, -1].nonzero().flatten().tolist()
    long = (row for row in full if tokenizer.length(batch.caption[row]) > tokenizer.context_length)
    return [batch.key[row * len(batch.key) // len(batch.caption)] for row in long]


@torch.inference_mode()
def _encode(clip: CLIP, batch: Batch, cfg: EmbedConfig) -> Columns:
    device = clip.mean.device
    image, tokens = batch.column("image"), batch.column("tokens")
    columns: Columns = {"tokens": tokens.int().numpy()}
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision is Precision.bf16):
        columns["image_emb"] = _stored("image_emb", clip.encode_image(image.to(device)), cfg.dtype, batch.key)
        if {"text_emb", "text_seq"} & set(cfg.columns):
            text_emb, text_seq = clip.encode_text(trim(tokens).to(device))
            columns["text_emb"] = _stored("text_emb", text_emb, cfg.dtype, batch.key)
            if "text_seq" in cfg.columns:
                after = np.arange(text_seq.shape[1]) >= lengths(columns["tokens"])[:, None]
                columns["text_seq"] = _stored("text_seq", text_seq, "float16", batch.key)
                columns["text_seq"][after] = 0
    return {name: cfg.variants.shaped(name, columns[name]) for name in cfg.columns}


def _stored(name: str, values: Tensor, dtype: str, keys: Sequence[str]) -> np.ndarray:
    """The rows in ``dtype``; DataError that names the first sample with a number that is not finite there."""
    exact = values.float().cpu().numpy()
    with np.errstate(over="ignore"):
        rows = exact.astype(dtype)
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if finite.all():
        return rows
    row = int(finite.argmin())
    key = keys[row * len(keys) // len(rows)]
    if not np.isfinite(exact[row]).all():
        raise DataError(
            f"CLIP's {name} of {key} is not finite: try precision=fp32; if that changes nothing, its weights are broken"
        )
    advice = "leave out text_seq" if name == "text_seq" else "take dtype=float32"
    raise DataError(
        f"{name} of {key} reaches {np.abs(exact[row]).max():.4g}, beyond {dtype} ({np.finfo(dtype).max:.4g}): {advice}"
    )


def _write(job: _Job, parts: list[Columns]) -> None:
    shards = job.shards
    path, sha256 = shards.split_dir / shards.names[job.shard], shards.sha256[job.shard]
    if path.exists():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DataError(
                    f"{path} is not the file of its index: it changed since; run `unclip data check "
                    f"{shards.split_dir.parent}` and unclip-embed again"
                )
    job.writer.write(job.stem, sha256, [shards.keys[i] for i in job.samples], _joined(parts))


def _joined(parts: list[Columns]) -> Columns:
    """Batches of a shard as whole columns; caption states are as long as the shard's longest."""
    longest = max((part["text_seq"].shape[-2] for part in parts if "text_seq" in part), default=0)
    for part in parts:
        if "text_seq" in part:
            states = part["text_seq"]
            before = [(0, 0)] * (states.ndim - 2)
            part["text_seq"] = np.pad(states, [*before, (0, longest - states.shape[-2]), (0, 0)])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
