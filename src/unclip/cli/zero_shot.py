"""``unclip zero-shot``: how often a CLIP finds a picture's class among class names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from unclip import artifact
from unclip.cli.pictures import read_lines
from unclip.data.shards import Shards
from unclip.data.transforms import load_image
from unclip.errors import DataError
from unclip.evaluation.zero_shot import TEMPLATES, class_embeddings, zero_shot
from unclip.progress import track


def write_accuracy(
    clip_run: Path, split: Path, classes: Path, templates: Path | None, *, label: str, batch_size: int
) -> dict[str, float]:
    """Print the shares. A sample's class is its metadata's ``label``: a name of ``classes`` (one a line), or its number."""
    names = _lines(classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip: Any = artifact.load(clip_run, kind="clip")[0].to(device)
    shards = Shards(split)
    embeddings = class_embeddings(clip, names, _lines(templates) if templates else TEMPLATES)
    found = zero_shot(clip, _batches(shards, names, label, clip.image_size, batch_size), embeddings)
    typer.echo(f"{len(shards)} pictures, {len(names)} classes")
    for name, value in found.items():
        typer.echo(
            f"{name:8} {100 * value:.1f} %   (by chance {100 * int(name.removeprefix('top_')) / len(names):.1f} %)"
        )
    return found


def _lines(path: Path) -> list[str]:
    lines = read_lines(path)
    if len(lines) != len(set(lines)) or not lines:
        raise DataError(f"{path} must hold different lines, at least one")
    return lines


def _batches(
    shards: Shards, names: list[str], label: str, size: int, batch_size: int
) -> Iterator[tuple[Tensor, list[int]]]:
    numbers = {name: i for i, name in enumerate(names)}
    starts = range(0, len(shards), batch_size)
    for start in track(starts, "looking", len(starts)):
        samples = [shards.read(i) for i in range(start, min(start + batch_size, len(shards)))]
        labels = []
        for sample in samples:
            value = sample.meta.get(label)
            number = value if isinstance(value, int) else numbers.get(str(value), -1)
            if not 0 <= number < len(names):
                raise DataError(
                    f"sample {sample.key} has {label}={value!r} in its metadata, which is none of the classes"
                )
            labels.append(number)
        yield torch.stack([load_image(sample.image, size) for sample in samples]), labels
