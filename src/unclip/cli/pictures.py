"""``unclip generate``: pictures with their history, and a sheet of them."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import Progress

from unclip import __version__
from unclip.data.shards import Shards
from unclip.data.transforms import load_image
from unclip.errors import ConfigError
from unclip.evaluation.sheet import draw_gallery, draw_table, save_picture
from unclip.models.sampling import AnyPriorSampling, ARSampling, NoSampling
from unclip.pipeline import Picture, Sampling, UnCLIP


@dataclass
class Overrides:
    """Sampling settings from the command line; None keeps what the artifact says."""

    candidates: int | None = None
    prior_steps: int | None = None
    prior_guidance: float | None = None
    decoder_steps: int | None = None
    decoder_guidance: float | None = None
    upsampler_steps: int | None = None

    def apply(self, pipeline: UnCLIP) -> Sampling:
        """The artifacts' own settings with these in their place."""
        upsamplers = {name: _changed(pipeline, name, self.upsampler_steps, None) for name in pipeline.upsamplers}
        decoder = _changed(pipeline, "decoder", self.decoder_steps, self.decoder_guidance)
        return Sampling(prior=self._prior(pipeline), decoder=decoder, upsamplers=upsamplers)

    def _prior(self, pipeline: UnCLIP) -> AnyPriorSampling:
        how, name = pipeline.models["prior"].default_sampling(), pipeline.manifests["prior"].model
        if isinstance(how, NoSampling):
            if self.candidates is not None or self.prior_steps is not None or self.prior_guidance is not None:
                raise ConfigError(
                    f"the prior of this chain, a {name}, has one answer for a caption: leave out --candidates, "
                    "--prior-steps and --prior-guidance"
                )
            return how
        if isinstance(how, ARSampling):
            if self.prior_steps is not None:
                raise ConfigError(
                    f"the prior of this chain ({name}) draws code by code, not in steps: leave out --prior-steps"
                )
            how = how if self.prior_guidance is None else replace(how, guidance_scale=self.prior_guidance)
        else:
            how = _changed(pipeline, "prior", self.prior_steps, self.prior_guidance)
        return how if self.candidates is None else replace(how, num_candidates=self.candidates)


def _changed(pipeline: UnCLIP, stage: str, steps: int | None, scale: float | None) -> Any:
    """The stage's own sampling settings with these in their place."""
    model = pipeline.models[stage]
    how = model.default_sampling()
    longest = model.cfg.diffusion.num_timesteps
    if steps is not None and steps > longest:
        raise ConfigError(f"the {stage} was trained with {longest} timesteps; it cannot sample in {steps}: take fewer")
    if steps is not None:
        how = replace(how, sampler=replace(how.sampler, num_steps=steps))
    if scale is not None:
        how = replace(how, guidance=replace(how.guidance, scale=scale))
    return how


def write_pictures(
    runs: Path, captions: list[str], out: Path, overrides: Overrides, *, num: int, seed: int, batch_size: int
) -> None:
    """Generate, write ``NNNN-caption-seed.png`` files and ``sheet.png`` below ``out``."""
    pipeline = UnCLIP.load(runs)
    how = overrides.apply(pipeline)
    drawn = []
    with Progress(transient=True) as bar:
        task = bar.add_task("pictures", total=len(captions) * num)
        pictures = pipeline.generate(
            captions,
            num=num,
            seed=seed,
            how=how,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done),
        )
        for i, picture in enumerate(pictures):
            image = Image.fromarray(picture.image.permute(1, 2, 0).numpy())
            _save(image, picture, out / f"{i:04d}-{_slug(picture.caption)}-{picture.seed}.png")
            drawn.append((picture.caption, picture.image.permute(1, 2, 0).numpy()))
    save_picture(draw_gallery(drawn, per_row=max(num, 4)), out / "sheet.png")
    typer.echo(f"wrote {len(drawn)} pictures of {pipeline.size} pixels and sheet.png to {out}")


def compare_split(runs: Path, split: Path, out: Path, *, num: int, seed: int, batch_size: int) -> None:
    """One sheet: the real picture, one from its caption through the prior, one from its own z_i; caption path on."""
    pipeline = UnCLIP.load(runs)
    shards = Shards(split)
    samples = [shards.read(i * len(shards) // num) for i in range(min(num, len(shards)))]
    clip_size = pipeline.models["clip"].image_size
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


def _save(image: Image.Image, picture: Picture, path: Path) -> None:
    info = PngInfo()
    history = {"caption": picture.caption, "seed": picture.seed, "artifacts": picture.artifacts, "version": __version__}
    info.add_itxt("unclip", json.dumps(history))
    info.add_itxt("Description", picture.caption)
    save_picture(image, path, info)


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48] or "caption"
