"""What the drawing commands share: sampling settings, input pictures, and the files that they write."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from unclip.cli.options import Overrides, Request
from unclip.config import Precision
from unclip.data.shards import Shards
from unclip.data.transforms import load_image, read_image, square, to_pil, to_tensor
from unclip.diffusion.repaint import RePaint
from unclip.diffusion.samplers import Sampler
from unclip.errors import ConfigError
from unclip.evaluation.sheet import draw_gallery, draw_table, save_picture
from unclip.manipulate import INVERTIBLE, check_share
from unclip.models.sampling import AnyPriorSampling, ARSampling, DiffusionSampling, NoSampling, changed
from unclip.pipeline import Memory, Picture, Sampling, UnCLIP
from unclip.recipe import from_png, text_chunks, to_image


def sampling(options: Overrides, pipeline: UnCLIP, invertible: bool = False) -> Sampling:
    """The artifacts' own settings with the options in their place; ``invertible``: DDIM without guidance is the decoder's own.

    Raises :class:`ConfigError` for what a stage cannot do.
    """
    own = INVERTIBLE if invertible else pipeline.defaults["decoder"]
    decoder = (options.decoder_steps, options.decoder_guidance, options.decoder_sampler)
    upsampler = (options.upsampler_steps, None, options.upsampler_sampler)
    last = options.stop_after
    if last == "upsampler" and pipeline.upsamplers:  # the first one, where there are several
        last = pipeline.upsamplers[0]
    enlarging = pipeline.upsamplers and last != "decoder"
    for option, value in (("--upsampler-steps", upsampler[0]), ("--upsampler-sampler", upsampler[2])):
        if value is not None and not enlarging:
            raise ConfigError(f"{option} {value}: no upsampler runs here; leave it out")
    return Sampling(
        prior=_prior_sampling(options, pipeline),
        decoder=_changed(pipeline, "decoder", own, *decoder),
        upsamplers={n: _changed(pipeline, n, pipeline.defaults[n], *upsampler) for n in pipeline.upsamplers},
        size=None if options.size is None else parse_size(options.size),
        last=last,
    )


def _prior_sampling(options: Overrides, pipeline: UnCLIP) -> AnyPriorSampling | None:
    if "prior" not in pipeline.manifests:
        return None
    how, name = pipeline.defaults["prior"], pipeline.manifests["prior"].model
    diffusing = (options.prior_steps, options.prior_guidance, options.prior_sampler)
    if not pipeline.sees_z_i and any(value is not None for value in (options.candidates, *diffusing)):
        raise ConfigError(
            "the decoder of this chain sees no z_i, so no prior runs: leave out --candidates and --prior-…"
        )
    if isinstance(how, NoSampling):
        if any(value is not None for value in (options.candidates, *diffusing)):
            raise ConfigError(
                f"the prior of this chain, a {name}, has one answer for a caption: leave out --candidates, "
                "--prior-steps, --prior-guidance and --prior-sampler"
            )
        return how
    if isinstance(how, ARSampling):
        for option, value in (("--prior-steps", options.prior_steps), ("--prior-sampler", options.prior_sampler)):
            if value is not None:
                raise ConfigError(
                    f"the prior of this chain ({name}) draws code by code, not in steps: leave out {option}"
                )
        if options.prior_guidance is not None:
            try:
                how = replace(how, guidance_scale=options.prior_guidance)
            except ValueError as error:
                raise ConfigError(f"the prior: {error}") from error
    else:
        how = _changed(pipeline, "prior", how, *diffusing)
    return how if options.candidates is None else replace(how, num_candidates=options.candidates)


def _changed(
    pipeline: UnCLIP, stage: str, how: Any, steps: int | None, scale: float | None, sampler: str | None
) -> Any:
    """The sampling settings ``how`` of a stage with these in their place."""
    if sampler is not None and sampler not in Sampler.__members__:
        raise ConfigError(f"there is no sampler {sampler}; choose one of {', '.join(Sampler.__members__)}")
    longest = pipeline.configs[stage].diffusion.num_timesteps
    return changed(how, stage, longest, steps, scale, None if sampler is None else Sampler[sampler])


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT, as 96x64."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise ConfigError(f"--size {text} is not WIDTHxHEIGHT in pixels of the decoder, such as 96x64")
    return int(match[2]), int(match[1])


def parse_numbers(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text} is not a list of numbers such as 0.25,0.5") from error


def even_thetas(largest: float, num: int) -> list[float]:
    """From 0 to ``largest`` in even steps; a single one is ``largest``."""
    check_share("theta", largest)
    return [largest] if num == 1 else [largest * i / (num - 1) for i in range(num)]


def repainting(how: Sampling, jump_length: int | None, num_resamples: int | None) -> Sampling:
    """``how`` with another resampling schedule; None keeps its own."""
    cfg = how.repaint
    return replace(how, repaint=RePaint(jump_length or cfg.jump_length, num_resamples or cfg.num_resamples))


def ddim_sampling(pipeline: UnCLIP, steps: int, guidance: float | None = None) -> DiffusionSampling:
    """The decoder's settings of what is inverted; ConfigError for what it cannot do."""
    return _changed(pipeline, "decoder", INVERTIBLE, steps, guidance, None)


def load(request: Request) -> UnCLIP:
    """The chain, as asked for. ConfigError for what is no choice, and for a folder ``out`` that cannot be made."""
    there = next(path for path in (request.out, *request.out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"--out {request.out}: {there} {why}; name another folder")
    if request.precision not in Precision.__members__:
        raise ConfigError(f"--precision {request.precision} is not one of {', '.join(Precision.__members__)}")
    if request.keep_in_memory not in Memory.__members__:
        raise ConfigError(f"--keep-in-memory {request.keep_in_memory} is not one of {', '.join(Memory.__members__)}")
    return UnCLIP.load(
        request.runs, precision=Precision[request.precision], keep_in_memory=Memory[request.keep_in_memory]
    )


Draw = Callable[[UnCLIP, Sampling, Callable[[int, int], None]], Iterator[Picture]]


def write_drawn(request: Request, draw: Draw, *, per_row: int, invertible: bool = False) -> list[Picture]:
    """Draw, write ``NNNN-title-seed.png`` files and ``sheet.png`` to ``request.out``, and say so."""
    if request.stop_after == "prior":
        raise ConfigError("--stop-after prior is for `unclip generate`: nothing else begins with the prior")
    pipeline = load(request)
    how = sampling(request, pipeline, invertible)
    found, rows = [], []
    with sampling_bar() as progress:
        for i, picture in enumerate(draw(pipeline, how, progress)):
            path = request.out / f"{i:04d}-{_slug(picture.caption)}-{picture.seed}.png"
            save_picture(to_image(picture), path, text_chunks(picture))
            rows.append({"file": str(path), "caption": picture.caption, "seed": picture.seed, **picture.words})
            found.append(picture)
    shown = [(picture.caption, picture.image.permute(1, 2, 0).numpy()) for picture in found]
    save_picture(draw_gallery(shown, per_row=per_row), request.out / "sheet.png")
    height, width = found[0].image.shape[1:]
    if request.as_json:
        sheet = str(request.out / "sheet.png")
        typer.echo(json.dumps({"pictures": rows, "sheet": sheet, "width": width, "height": height}))
    else:
        size = f"{width} pixels" if width == height else f"{width}x{height} pixels"
        typer.echo(f"wrote {len(found)} pictures of {size} and sheet.png to {request.out}")
    return found


@contextmanager
def sampling_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, fed by the yielded function with the steps done and of how many."""
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling steps", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """uint8 (B, 3, H, W): as they are where all have one size, else the middle square of each, as large as the smallest."""
    pictures = [read_image(path) for path in paths]
    if len({picture.shape for picture in pictures}) == 1:
        return torch.stack(pictures)
    side = min(min(picture.shape[1:]) for picture in pictures)
    return torch.stack([to_tensor(square(to_pil(picture), side)) for picture in pictures])


def read_mask(path: Path) -> Tensor:
    """bool (H, W): True where the picture is white, or at least lighter than middle grey."""
    return read_image(path).float().mean(dim=0) > 127


def read_lines(path: Path | None) -> list[str]:
    """The lines of a file that are not empty. ConfigError for one that is not UTF-8."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def write_embeddings(request: Request, captions: list[str], num: int, negative: str | None) -> None:
    """What the prior makes of captions: ``image_emb.npy`` (N, D) float32 and ``rows.json`` below ``request.out``."""
    pipeline = load(request)
    for option in (
        "decoder_steps",
        "decoder_guidance",
        "decoder_sampler",
        "upsampler_steps",
        "upsampler_sampler",
        "size",
    ):
        if vars(request)[option] is not None:
            raise ConfigError(f"--{option.replace('_', '-')} is not for --stop-after prior, where only the prior runs")
    how = sampling(replace(request, stop_after=None), pipeline)
    with sampling_bar() as progress:
        z_i = pipeline.sample_embeddings(
            captions,
            num=num,
            seed=request.seed,
            how=how,
            batch_size=request.batch_size,
            progress=progress,
            negative=negative,
        )
    rows = [{"caption": caption, "seed": request.seed + j} for caption in captions for j in range(num)]
    request.out.mkdir(parents=True, exist_ok=True)
    np.save(request.out / "image_emb.npy", z_i.numpy())
    (request.out / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    if request.as_json:
        typer.echo(json.dumps({"image_emb": str(request.out / "image_emb.npy"), "rows": rows}))
    else:
        typer.echo(f"wrote {len(rows)} embeddings of width {z_i.shape[1]} to {request.out / 'image_emb.npy'}")


def repeat_picture(file: Path, runs: Path, out: Path, as_json: bool) -> None:
    """Draw the picture of a PNG again, in the precision that it was drawn in, and say how far the two differ."""
    picture = from_png(file)
    pipeline = UnCLIP.load(runs, precision=Precision[picture.precision])
    with sampling_bar() as progress:
        again = pipeline.repeat(picture, progress)
    save_picture(to_image(again), out, text_chunks(again))
    difference = int((again.image.int() - picture.image.int()).abs().max())
    if as_json:
        typer.echo(json.dumps({"file": str(out), "largest_difference": difference}))
    else:
        said = "the same, bit for bit" if difference == 0 else f"colours differ by up to {difference} of 255"
        typer.echo(f"wrote {out}: {said}")


def compare_split(runs: Path, split: Path, out: Path, *, num: int, seed: int, batch_size: int) -> None:
    """One sheet: the real picture, one from its caption through the prior, one from its own z_i; caption path on."""
    pipeline = UnCLIP.load(runs)
    samples = Shards(split).spread(num)
    clip_size = pipeline.clip_size
    rows = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        captions, seeds = [s.caption for s in part], [seed + start + i for i in range(len(part))]
        text = pipeline.embed_text(captions)
        true = pipeline.embed_image(torch.stack([load_image(s.image, clip_size) for s in part]))
        from_prior = pipeline.decode(replace(text, image_emb=pipeline.sample_prior(text, seeds)), seeds)
        from_true = pipeline.decode(replace(text, image_emb=true), seeds)
        real = [load_image(s.image, pipeline.size) for s in part]
        for caption, *pictures in zip(captions, real, from_prior, from_true, strict=True):
            rows.append((caption, [p.permute(1, 2, 0).numpy() for p in pictures]))
    columns = ["the real picture", "drawn from the caption", "drawn from the real z_i"]
    save_picture(draw_table(rows, columns, blocks=2), out)
    typer.echo(f"wrote {len(rows)} captions to {out}")


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48].strip("-") or "picture"
