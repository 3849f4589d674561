"""``unclip enlarge-probe``: what an upsampler adds to bicubic and Lanczos enlargement of real pictures."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from unclip import artifact
from unclip.batches import Batches, Meter
from unclip.cli.pictures import sampling_bar
from unclip.cli.reconstruct import psnr
from unclip.data.shards import Sample, Shards
from unclip.data.transforms import load_image
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep
from unclip.errors import ConfigError, DataError
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid
from unclip.evaluation.sheet import draw_table
from unclip.models.pictures import resize, to_range, to_uint8
from unclip.models.sampling import UpsamplerSampling
from unclip.models.upsampler import Upsampler
from unclip.nets.tiles import border_ratio
from unclip.report.probe import Cell, Finding

SHOWN = 8
CELL = 160  # pixels of a picture on the sheet, at least


def probe_enlarging(
    upsampler: Path, split: Path, out: Path, *, num: int, seed: int, batch_size: int, tile: int | None
) -> Finding:
    """Up to ``num`` pictures of one split, reduced and enlarged again: ``enlarging.json|md|png``.

    ``distance`` (:meth:`PictureFeatures.distance`) and ``PSNR`` in dB compare with the picture itself, mean over pictures with
    the standard error; ``KID`` x 1000 compares the sets. Low distance and KID: it looks like the real ones; high PSNR: pixel
    by pixel the same, which smooth pictures are more easily. With ``tile`` the upsampler also draws in tiles that
    overlap by a quarter, and ``borders`` is :func:`border_ratio` at their edges, of the picture itself too.
    """
    samples = Shards(split).spread(num)
    if len(samples) < 4:
        raise DataError(f"{split} has {len(samples)} samples; at least 4 are needed to compare pictures by")
    model, manifest = artifact.load(upsampler, kind="upsampler")
    assert isinstance(model, Upsampler)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    features = PictureFeatures(device)
    size, low_size = model.cfg.image_size, model.cfg.low_size
    real = torch.stack([_picture(sample, size, split) for sample in samples])
    low = to_uint8(resize(to_range(real), low_size))
    how = replace(model.default_sampling(), tile=None)
    ways = {"upsampler": how}
    if tile is not None:
        if tile >= size:
            raise ConfigError(f"--tile {tile} is not smaller than the upsampler's pictures of {size} px")
        ways["in tiles"] = replace(how, tile=tile, tile_overlap=tile // 4)
        model.cfg.check(ways["in tiles"])

    def drawn(how: UpsamplerSampling, rows: list[int], on_step: OnStep) -> Tensor:
        noise = Noise([seed + row for row in rows], device).branch("upsampler")
        with torch.autocast(device, torch.bfloat16):
            return to_uint8(model.sample(to_range(low[rows]).to(device), how, noise, on_step=on_step))

    with sampling_bar() as progress:
        steps = how.sampler.num_steps
        batches = Batches(batch_size, Meter(progress, len(ways) * len(low) * steps))
        drawings = {
            name: torch.cat(batches.each(name, len(low), steps, partial(drawn, way))) for name, way in ways.items()
        }
    enlarged = {
        **drawings,
        "bicubic": to_uint8(resize(to_range(low), size)),
        "Lanczos": torch.stack([_lanczos(picture, size) for picture in low]),
    }
    known = features(real)
    rows = {name: _measures(pictures, real, known, features) for name, pictures in enlarged.items()}
    if tile is not None:
        rows["the picture"] = {}
        for name, pictures in {**enlarged, "the picture": real}.items():
            rows[name]["borders"] = border_ratio(pictures.float(), tile, tile // 4)
    facts: dict[str, Any] = {"pictures": len(real), "seed": seed, "from": low_size, "to": size}
    facts |= {"steps": steps, "tile": tile, "artifacts": {"upsampler": manifest.hash}}
    finding = Finding("enlarging", f"Enlarging {len(real)} pictures, {low_size} to {size} px", rows, facts)
    shown = {"the picture": real, "reduced": low, **enlarged}
    lines = [(samples[i].caption, [_rows(p[i]) for p in shown.values()]) for i in range(min(SHOWN, len(real)))]
    typer.echo(finding.write(out, draw_table(lines, list(shown), cell=max(CELL, size))))
    return finding


def _picture(sample: Sample, size: int, split: Path) -> Tensor:
    """The sample's central square at ``size``. DataError where it is smaller: it could not tell what enlarging lacks."""
    side = min(load_image(sample.image).shape[-2:])
    if side < size:
        raise DataError(f"{sample.key} of {split} is {side} px and the upsampler makes {size}: give larger pictures")
    return load_image(sample.image, size)


def _lanczos(picture: Tensor, size: int) -> Tensor:
    image = Image.fromarray(_rows(picture)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _measures(drawn: Tensor, real: Tensor, known: Tensor, features: PictureFeatures) -> dict[str, Cell]:
    distances = torch.cat(
        [features.distance(a, b) for a, b in zip(drawn.split(64), real.split(64), strict=True)]
    ).double()
    value, error = kid(features(drawn), known)
    return {
        "distance": distances.mean().item(),
        "its error": (distances.std() / len(distances) ** 0.5).item(),
        "PSNR": psnr(real, list(drawn)),
        "KID": value,
        "KID's error": error,
    }


def _rows(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).contiguous().numpy()
