"""``unclip reconstruct``: what the bipartite latent (z_i, x_T) gives back of pictures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor

from unclip.batches import Batches, Meter
from unclip.cli.pictures import ddim_sampling, sampling_bar
from unclip.data.shards import Shards
from unclip.data.transforms import load_image
from unclip.errors import ConfigError
from unclip.jobs import Sampling
from unclip.manipulate import find_latents, invertible, need_text, variation_jobs
from unclip.models.pictures import to_uint8
from unclip.pipeline import UnCLIP


def measure_reconstruction(
    runs: Path,
    data: Path,
    *,
    num: int,
    steps: str,
    captions: bool,
    guidance: float,
    refinements: int,
    seed: int,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Print, for each number of steps, the mean PSNR of the decoder's pictures from inverted and from random x_T."""
    pipeline = UnCLIP.load(runs)
    samples = Shards(data / "val" if (data / "val").is_dir() else data).spread(num)
    pictures = torch.stack([load_image(s.image, max(pipeline.clip_size, pipeline.size)) for s in samples])
    if captions:
        need_text(pipeline)
    texts = [s.caption for s in samples] if captions else None
    counts = _counts(steps)
    found = {}
    samplings = [ddim_sampling(pipeline, count, guidance) for count in counts]
    hows = [invertible(pipeline, Sampling(decoder=one, last="decoder", refinements=refinements)) for one in samplings]
    with sampling_bar() as progress:
        batches = Batches(batch_size, Meter(progress, (2 + refinements) * len(samples) * sum(counts)))
        for count, how in zip(counts, hows, strict=True):
            latents = find_latents(pipeline, pictures, texts, how, batches, invert=True)
            jobs = variation_jobs(latents, texts, 1, seed, eta=0.0)
            jobs = [replace(job, seed=seed + i) for i, job in enumerate(jobs)]
            true = to_uint8(pipeline.fitted(pictures, pipeline.base_size(how)))
            inverted = [picture.image for picture in pipeline.run(jobs, how, batches)]
            drawn = pipeline.run([replace(job, x_T=None) for job in jobs], how, batches)
            other = [picture.image for picture in drawn]
            found[str(count)] = {"inverted": psnr(true, inverted), "random": psnr(true, other)}
    facts = {"pictures": len(samples), "size": int(true.shape[-1]), "guidance": guidance, "captions": captions}
    facts["refinements"] = refinements
    typer.echo(json.dumps({"psnr_by_steps": found, **facts}))
    return found


def psnr(true: Tensor, drawn: Sequence[Tensor]) -> float:
    """Mean over pictures of 10 log10(255² / mean squared error), in dB, of uint8 pictures; equal ones count as 100 dB."""
    error = (true.double() - torch.stack(list(drawn)).double()).square().flatten(1).mean(1)
    return float((10 * (255**2 / error.clamp(min=255**2 * 1e-10)).log10()).mean())


def _counts(steps: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in steps.split(",")):
        raise ConfigError(f"--steps {steps} is not a list of numbers such as 25,50,100")
    return [int(part) for part in steps.split(",")]
