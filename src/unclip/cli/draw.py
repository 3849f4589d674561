"""The commands that draw: generate, vary, interpolate, edit, mix, inpaint and repeat."""

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.options import PRIOR, Json, Picture, Pictures, Prompts, Request, Runs, drawing
from unclip.errors import ConfigError


@drawing()
def generate(
    request: Request,
    captions: Annotated[list[str] | None, typer.Argument(help="Captions, each in quotes.")] = None,
    prompts: Prompts = None,
    negative: Annotated[str | None, typer.Option(help="A caption that guidance leads away from.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures a caption.")] = 4,
) -> None:
    """Captions to pictures; each PNG carries what is needed to draw it again, and a contact sheet shows all."""
    from unclip.cli.pictures import read_lines, write_drawn, write_embeddings
    from unclip.manipulate import check_captions

    wanted = [*(captions or []), *read_lines(prompts)]
    if not wanted:
        raise ConfigError('give at least one caption, for example "a red cube", or --prompts FILE')
    wanted = check_captions(wanted)
    if request.stop_after == "prior":
        write_embeddings(request, wanted, num, negative)
        return
    write_drawn(
        request,
        lambda unclip, how, progress: unclip.generate(
            wanted, num=num, seed=request.seed, how=how, batch_size=request.batch_size, progress=progress,
            negative=negative,
        ),
        per_row=max(num, 4),
    )  # fmt: skip


@drawing(*PRIOR, "decoder_sampler")
def vary(
    pictures: Pictures,
    request: Request,
    num: Annotated[int, typer.Option(min=1, help="Variations of each picture.")] = 4,
    eta: Annotated[float, typer.Option(help="0 reconstructs the picture, 1 varies it most.")] = 1.0,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File with a caption a line, one for each picture.")
    ] = None,
) -> None:
    """Variations of pictures: what their z_i says is kept, the rest is drawn anew from their inverted noise by DDIM."""
    from unclip.cli.pictures import read_lines, read_pictures, write_drawn

    captions, images = read_lines(prompts) or None, read_pictures(pictures)
    write_drawn(
        request,
        lambda unclip, how, progress: unclip.vary(
            images, captions=captions, num=num, seed=request.seed, eta=eta, how=how, batch_size=request.batch_size,
            progress=progress,
        ),
        per_row=max(num, 4),
        invertible=True,
    )  # fmt: skip


@drawing("decoder_sampler")
def interpolate(
    request: Request,
    pictures: Annotated[
        list[Path] | None, typer.Argument(exists=True, dir_okay=False, help="Pictures: png, jpg or webp.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File with a caption a line, each one more end after the pictures."
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Pictures from one to the next, with both ends.")] = 9,
    noise: Annotated[str, typer.Option(help="slerp: between the pictures' own noise; fixed: the seed's.")] = "slerp",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of the film, from one picture to the next.")] = 2.0,
) -> None:
    """From picture or caption to the next: frames, sheet, interpolation.gif and, with the extra video, interpolation.mp4."""
    from unclip.cli.film import write_films
    from unclip.cli.pictures import read_lines, read_pictures, write_drawn

    captions, images = read_lines(prompts), read_pictures(pictures) if pictures else None
    if not captions:
        _refuse_prior(request)
    found = write_drawn(
        request,
        lambda unclip, how, progress: unclip.interpolate(
            images,
            captions=captions,
            frames=num,
            seed=request.seed,
            noise=noise,
            how=how,
            batch_size=request.batch_size,
            progress=progress,
        ),
        per_row=num,
        invertible=True,
    )
    write_films([picture.image for picture in found], request.out / "interpolation", rate=(num - 1) / seconds)


@drawing(*PRIOR, "decoder_sampler")
def edit(
    picture: Picture,
    request: Request,
    captions: Annotated[list[str] | None, typer.Argument(help="What it is to become, each caption in quotes.")] = None,
    prompts: Prompts = None,
    base: Annotated[str, typer.Option(help='What it is now; "" leaves the base out.')] = "a photo",
    theta: Annotated[float, typer.Option(help="How far to turn at most; the paper takes 0.25 to 0.5.")] = 0.5,
    num: Annotated[int, typer.Option(min=1, help="Pictures a caption, from no turn to the whole.")] = 6,
) -> None:
    """Turn a picture towards a caption: its z_i by the difference of two captions, its noise as it is."""
    from unclip.cli.pictures import even_thetas, read_lines, read_pictures, write_drawn

    wanted = [*(captions or []), *read_lines(prompts)]
    if not wanted:
        raise ConfigError('say what the picture is to become, for example "a blue cube", or give --prompts FILE')
    (image,) = read_pictures([picture])
    thetas = even_thetas(theta, num)

    def draw(unclip, how, progress):
        edits = [  # all are checked before the first one is drawn
            unclip.edit(
                image, caption, base_caption=base or None, thetas=thetas, seed=request.seed, how=how,
                batch_size=request.batch_size, progress=progress,
            )
            for caption in wanted
        ]  # fmt: skip
        return chain.from_iterable(edits)

    write_drawn(request, draw, per_row=num, invertible=True)


@drawing()
def mix(
    picture: Picture,
    caption: Annotated[str, typer.Argument(help="The caption, in quotes.")],
    request: Request,
    weights: Annotated[
        str, typer.Option(help="Of the caption, comma-separated; the picture has the rest.")
    ] = "0.25,0.5,0.75",
    num: Annotated[int, typer.Option(min=1, help="Pictures a weight.")] = 4,
) -> None:
    """A picture and a caption in one: between the picture's z_i and the prior's for the caption."""
    from unclip.cli.pictures import parse_numbers, read_pictures, write_drawn

    (image,), shares = read_pictures([picture]), parse_numbers("--weights", weights)
    write_drawn(
        request,
        lambda unclip, how, progress: unclip.mix(
            image, caption, weights=shares, num=num, seed=request.seed, how=how, batch_size=request.batch_size,
            progress=progress,
        ),
        per_row=max(num, 4),
    )  # fmt: skip


@drawing("decoder_sampler")
def inpaint(
    picture: Picture,
    request: Request,
    mask: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A picture of the same size: white is repainted.")
    ],
    captions: Annotated[list[str] | None, typer.Argument(help="What the result shows, each caption in quotes.")] = None,
    prompts: Prompts = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures, or pictures a caption.")] = 4,
    jump_length: Annotated[int | None, typer.Option(min=1, help="RePaint: steps to go back at once.")] = None,
    num_resamples: Annotated[int | None, typer.Option(min=1, help="RePaint: how often each stretch is drawn.")] = None,
) -> None:
    """Repaint what is white in the mask, by RePaint; the rest of the picture stays as it is."""
    from unclip.cli.pictures import read_lines, read_mask, read_pictures, repainting, write_drawn

    (image,), hole = read_pictures([picture]), read_mask(mask)
    wanted = [*(captions or []), *read_lines(prompts)] or [None]
    if wanted == [None]:
        _refuse_prior(request)

    def draw(unclip, how, progress):
        how = repainting(how, jump_length, num_resamples)
        sets = [  # all are checked before the first one is drawn
            unclip.inpaint(
                image, hole, caption, num=num, seed=request.seed, how=how, batch_size=request.batch_size,
                progress=progress,
            )
            for caption in wanted
        ]  # fmt: skip
        return chain.from_iterable(sets)

    write_drawn(request, draw, per_row=max(num, 4))


def _refuse_prior(request: Request) -> None:
    if any(getattr(request, option) is not None for option in PRIOR):
        raise ConfigError("without a caption the prior draws nothing: leave out --candidates and --prior-...")


def repeat(
    picture: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A PNG that unclip drew.")],
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="The PNG file to write.")],
    as_json: Json = False,
) -> None:
    """Draw a picture again from what its PNG says, and compare: on the same machine it is the same bit for bit."""
    from unclip.cli.pictures import repeat_picture

    repeat_picture(picture, runs, out, as_json)
