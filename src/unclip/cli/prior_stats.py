"""``unclip prior-stats``: what analytic variances need to know of a trained diffusion prior."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import from_plain
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.diffusion.noise import Noise
from unclip.errors import ArtifactError, ConfigError
from unclip.models.diffusion_prior import DiffusionPrior
from unclip.progress import track


def add_statistics(
    run: Path, *, num: int, seed: int, batch_size: int, data: Path | None = None, embeddings: Path | None = None
) -> Path:
    """Gather statistics over ``num`` training samples and write them into the artifact of ``run``; its hash stays.

    The data is what the prior was trained on, unless given. Raises ArtifactError where the artifact is no diffusion prior,
    or where the embeddings are of another CLIP.
    """
    model, manifest = artifact.load(run, kind="prior")
    if not isinstance(model, DiffusionPrior):
        raise ArtifactError(
            f"{run} holds a prior of kind {manifest.model}; only a diffusion_prior has analytic variances"
        )
    place = _data_config(run, manifest, data, embeddings)
    source = UnclipData(place, seed, min(batch_size, num), model.cfg.columns, raw=model.cfg.is_raw)
    if source.interface.clip != manifest.interface["clip"]:
        raise ArtifactError(
            f"{run} was trained on CLIP {manifest.interface['clip'][:8]} but {source.cfg.embeddings} holds embeddings of CLIP "
            f"{source.interface.clip[:8]}; give the embeddings of the prior's own CLIP with --embeddings"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.gather(_batches(source, num, seed, model.clip_mean.device))
    file = artifact.add_statistics(run, model)
    typer.echo(f"wrote {file}: the prior can now sample with sampler.name=analytic")
    return file


def _data_config(run: Path, manifest: Manifest, data: Path | None, embeddings: Path | None) -> DataConfig:
    raw = dict(manifest.settings.get("data", {}))
    raw |= {name: str(path) for name, path in (("path", data), ("embeddings", embeddings)) if path is not None}
    if not raw.get("embeddings"):  # imported ones need no path
        raise ConfigError(f"{run} does not say what it was trained on; give --data and --embeddings")
    return from_plain(raw, DataConfig)


def _batches(source: UnclipData, num: int, seed: int, device: torch.device) -> Iterator[tuple[Batch, Noise]]:
    count = -(-num // source.batch_size)
    batches = itertools.islice(source.train_dataloader(), count)
    for batch in track(batches, "all noise levels", count):
        batch = source.on_after_batch_transfer(batch.to(device), 0)
        yield batch, Noise.at(seed, batch.position, device).branch("prior-stats")
