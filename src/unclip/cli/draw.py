"""The commands that draw: generate, vary, interpolate, edit, mix, inpaint and repeat."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.hub import runs_folder
from unclip.errors import ConfigError

Runs = Annotated[
    Path,
    typer.Option(
        "--from",
        parser=runs_folder,
        metavar="RUNS",
        help="Folder with the runs clip, prior, decoder and upsampler*, or hf://OWNER/NAME of the hub.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Picture = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A picture: png, jpg or webp.")]
Pictures = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Pictures: png, jpg or webp.")]
Prompts = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="File with a caption a line.")]
Size = Annotated[
    str | None, typer.Option(help="Of the decoder's picture, WIDTHxHEIGHT; by default the square it was trained for.")
]
StopAfter = Annotated[str | None, typer.Option(help="The last stage to run: decoder, or an upsampler.")]
Candidates = Annotated[int | None, typer.Option(min=1, help="z_i drawn by the prior, the best by z_t is kept.")]
PriorSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of the prior.")]
PriorSampler = Annotated[str | None, typer.Option(help="ancestral, analytic, ddim, dpmpp_2m, ...")]
PriorGuidance = Annotated[float | None, typer.Option(help="Guidance scale of the prior.")]
DecoderSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of the decoder.")]
DecoderSampler = Annotated[str | None, typer.Option(help="ancestral, ddim, dpmpp_2m, ...")]
DecoderGuidance = Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")]
UpsamplerSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of each upsampler.")]
UpsamplerSampler = Annotated[str | None, typer.Option(help="ancestral, ddim, dpmpp_2m, ...")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Pictures drawn at once; halved where memory does not suffice for them.")
]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
KeepInMemory = Annotated[str, typer.Option(help="Stages: all, or one at a time.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")]


def generate(
    runs: Runs,
    out: Out,
    captions: Annotated[list[str] | None, typer.Argument(help="Captions, each in quotes.")] = None,
    prompts: Prompts = None,
    negative: Annotated[str | None, typer.Option(help="A caption that guidance leads away from.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures a caption.")] = 4,
    seed: Seed = 0,
    size: Size = None,
    stop_after: Annotated[
        str | None, typer.Option(help="The last stage to run: prior (writes z_i), decoder, or an upsampler.")
    ] = None,
    candidates: Candidates = None,
    prior_steps: PriorSteps = None,
    prior_sampler: PriorSampler = None,
    prior_guidance: PriorGuidance = None,
    decoder_steps: DecoderSteps = None,
    decoder_sampler: DecoderSampler = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """Captions to pictures; each PNG carries what is needed to draw it again, and a contact sheet shows all."""
    from unclip.cli.pictures import Overrides, Request, read_lines, write_drawn, write_embeddings

    wanted = [caption.strip() for caption in [*(captions or []), *read_lines(prompts)] if caption.strip()]
    if not wanted:
        raise ConfigError('give at least one caption, for example "a red cube", or --prompts FILE')
    overrides = Overrides(
        candidates, prior_steps, prior_guidance, decoder_steps, decoder_guidance, upsampler_steps,
        prior_sampler, decoder_sampler, upsampler_sampler, size, stop_after,
    )  # fmt: skip
    request = Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides)
    if stop_after == "prior":
        write_embeddings(request, wanted, num, negative)
        return
    write_drawn(
        request,
        lambda unclip, how, progress: unclip.generate(
            wanted, num=num, seed=seed, how=how, batch_size=batch_size, progress=progress, negative=negative
        ),
        per_row=max(num, 4),
    )


def vary(
    pictures: Pictures,
    runs: Runs,
    out: Out,
    num: Annotated[int, typer.Option(min=1, help="Variations of each picture.")] = 4,
    eta: Annotated[float, typer.Option(help="0 reconstructs the picture, 1 varies it most.")] = 1.0,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File with a caption a line, one for each picture.")
    ] = None,
    seed: Seed = 0,
    size: Size = None,
    stop_after: StopAfter = None,
    decoder_steps: DecoderSteps = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """Variations of pictures: what their z_i says is kept, the rest is drawn anew from their inverted noise by DDIM."""
    from unclip.cli.pictures import Overrides, Request, read_lines, read_pictures, write_drawn

    overrides = Overrides(
        decoder_steps=decoder_steps, decoder_guidance=decoder_guidance, upsampler_steps=upsampler_steps,
        upsampler_sampler=upsampler_sampler, size=size, stop_after=stop_after,
    )  # fmt: skip
    captions, images = read_lines(prompts) or None, read_pictures(pictures)
    write_drawn(
        Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides),
        lambda unclip, how, progress: unclip.vary(
            images, captions=captions, num=num, seed=seed, eta=eta, how=how, batch_size=batch_size, progress=progress
        ),
        per_row=max(num, 4),
        invertible=True,
    )


def interpolate(
    pictures: Pictures,
    runs: Runs,
    out: Out,
    num: Annotated[int, typer.Option(min=2, help="Pictures from one to the next, with both ends.")] = 9,
    noise: Annotated[str, typer.Option(help="slerp: between the pictures' own noise; fixed: the seed's.")] = "slerp",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of the film, from one picture to the next.")] = 2.0,
    seed: Seed = 0,
    size: Size = None,
    stop_after: StopAfter = None,
    decoder_steps: DecoderSteps = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """From picture to picture: frames, sheet, interpolation.gif and, with the extra video, interpolation.mp4."""
    from unclip.cli.film import write_films
    from unclip.cli.pictures import Overrides, Request, read_pictures, write_drawn

    overrides = Overrides(
        decoder_steps=decoder_steps, decoder_guidance=decoder_guidance, upsampler_steps=upsampler_steps,
        upsampler_sampler=upsampler_sampler, size=size, stop_after=stop_after,
    )  # fmt: skip
    images = read_pictures(pictures)
    found = write_drawn(
        Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides),
        lambda unclip, how, progress: unclip.interpolate(
            images, frames=num, seed=seed, noise=noise, how=how, batch_size=batch_size, progress=progress
        ),
        per_row=num,
        invertible=True,
    )
    write_films([picture.image for picture in found], out / "interpolation", rate=(num - 1) / seconds)


def edit(
    picture: Picture,
    runs: Runs,
    out: Out,
    captions: Annotated[list[str] | None, typer.Argument(help="What it is to become, each caption in quotes.")] = None,
    prompts: Prompts = None,
    base: Annotated[str, typer.Option(help='What it is now; "" leaves the base out.')] = "a photo",
    theta: Annotated[float, typer.Option(help="How far to turn at most; the paper takes 0.25 to 0.5.")] = 0.5,
    num: Annotated[int, typer.Option(min=1, help="Pictures a caption, from no turn to the whole.")] = 6,
    seed: Seed = 0,
    size: Size = None,
    stop_after: StopAfter = None,
    decoder_steps: DecoderSteps = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """Turn a picture towards a caption: its z_i by the difference of two captions, its noise as it is."""
    from unclip.cli.pictures import Overrides, Request, even_thetas, read_lines, read_pictures, write_drawn

    wanted = [*(captions or []), *read_lines(prompts)]
    if not wanted:
        raise ConfigError('say what the picture is to become, for example "a blue cube", or give --prompts FILE')
    overrides = Overrides(
        decoder_steps=decoder_steps, decoder_guidance=decoder_guidance, upsampler_steps=upsampler_steps,
        upsampler_sampler=upsampler_sampler, size=size, stop_after=stop_after,
    )  # fmt: skip
    (image,) = read_pictures([picture])
    thetas = even_thetas(theta, num)

    def draw(unclip, how, progress):
        for caption in wanted:
            yield from unclip.edit(
                image, caption, base_caption=base or None, thetas=thetas, seed=seed, how=how,
                batch_size=batch_size, progress=progress,
            )  # fmt: skip

    request = Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides)
    write_drawn(request, draw, per_row=num, invertible=True)


def mix(
    picture: Picture,
    caption: Annotated[str, typer.Argument(help="The caption, in quotes.")],
    runs: Runs,
    out: Out,
    weights: Annotated[
        str, typer.Option(help="Of the caption, comma-separated; the picture has the rest.")
    ] = "0.25,0.5,0.75",
    num: Annotated[int, typer.Option(min=1, help="Pictures a weight.")] = 4,
    seed: Seed = 0,
    size: Size = None,
    stop_after: StopAfter = None,
    candidates: Candidates = None,
    prior_steps: PriorSteps = None,
    prior_sampler: PriorSampler = None,
    prior_guidance: PriorGuidance = None,
    decoder_steps: DecoderSteps = None,
    decoder_sampler: DecoderSampler = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """A picture and a caption in one: between the picture's z_i and the prior's for the caption."""
    from unclip.cli.pictures import Overrides, Request, parse_numbers, read_pictures, write_drawn

    overrides = Overrides(
        candidates, prior_steps, prior_guidance, decoder_steps, decoder_guidance, upsampler_steps,
        prior_sampler, decoder_sampler, upsampler_sampler, size, stop_after,
    )  # fmt: skip
    (image,), shares = read_pictures([picture]), parse_numbers("--weights", weights)
    write_drawn(
        Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides),
        lambda unclip, how, progress: unclip.mix(
            image, caption, weights=shares, num=num, seed=seed, how=how, batch_size=batch_size, progress=progress
        ),
        per_row=max(num, 4),
    )


def inpaint(
    picture: Picture,
    runs: Runs,
    out: Out,
    mask: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A picture of the same size: white is repainted.")
    ],
    captions: Annotated[list[str] | None, typer.Argument(help="What the result shows, each caption in quotes.")] = None,
    prompts: Prompts = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures, or pictures a caption.")] = 4,
    jump_length: Annotated[int | None, typer.Option(min=1, help="RePaint: steps to go back at once.")] = None,
    num_resamples: Annotated[int | None, typer.Option(min=1, help="RePaint: how often each stretch is drawn.")] = None,
    seed: Seed = 0,
    size: Size = None,
    stop_after: StopAfter = None,
    candidates: Candidates = None,
    prior_steps: PriorSteps = None,
    prior_sampler: PriorSampler = None,
    prior_guidance: PriorGuidance = None,
    decoder_steps: DecoderSteps = None,
    decoder_guidance: DecoderGuidance = None,
    upsampler_steps: UpsamplerSteps = None,
    upsampler_sampler: UpsamplerSampler = None,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    keep_in_memory: KeepInMemory = "all",
    as_json: Json = False,
) -> None:
    """Repaint what is white in the mask, by RePaint; the rest of the picture stays as it is."""
    from unclip.cli.pictures import Overrides, Request, read_lines, read_mask, read_pictures, repainting, write_drawn

    overrides = Overrides(
        candidates, prior_steps, prior_guidance, decoder_steps, decoder_guidance, upsampler_steps,
        prior_sampler, None, upsampler_sampler, size, stop_after,
    )  # fmt: skip
    (image,), hole = read_pictures([picture]), read_mask(mask)
    wanted = [*(captions or []), *read_lines(prompts)] or [None]

    def draw(unclip, how, progress):
        how = repainting(how, jump_length, num_resamples)
        for caption in wanted:
            yield from unclip.inpaint(
                image, hole, caption, num=num, seed=seed, how=how, batch_size=batch_size, progress=progress
            )

    request = Request(runs, out, seed, batch_size, precision, keep_in_memory, as_json, overrides)
    write_drawn(request, draw, per_row=max(num, 4))


def repeat(
    picture: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A PNG that unclip drew.")],
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="The PNG file to write.")],
    as_json: Json = False,
) -> None:
    """Draw a picture again from what its PNG says, and compare: on the same machine it is the same bit for bit."""
    from unclip.cli.pictures import repeat_picture

    repeat_picture(picture, runs, out, as_json)
