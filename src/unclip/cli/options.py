"""The options that the drawing commands share, each written down once."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli.hub import runs_folder

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
DecoderGuidance = Annotated[float | None, typer.Option(help="Guidance scale of the decoder.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Pictures drawn at once; halved where memory does not suffice for them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")]


@dataclass
class Overrides:
    """Sampling settings from the command line; None keeps what the artifact says."""

    size: Annotated[
        str | None,
        typer.Option(help="Of the decoder's picture, WIDTHxHEIGHT; by default the square it was trained for."),
    ] = None
    stop_after: Annotated[
        str | None,
        typer.Option(help="The last stage to run: decoder, or an upsampler; `generate` also takes prior (writes z_i)."),
    ] = None
    candidates: Annotated[int | None, typer.Option(min=1, help="z_i drawn by the prior, the best by z_t is kept.")] = (
        None
    )
    prior_steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of the prior.")] = None
    prior_sampler: Annotated[str | None, typer.Option(help="ancestral, analytic, ddim, dpmpp_2m, ...")] = None
    prior_guidance: Annotated[float | None, typer.Option(help="Guidance scale of the prior.")] = None
    decoder_steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of the decoder.")] = None
    decoder_sampler: Annotated[str | None, typer.Option(help="ancestral, ddim, dpmpp_2m, ...")] = None
    decoder_guidance: DecoderGuidance = None
    upsampler_steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of each upsampler.")] = None
    upsampler_sampler: Annotated[str | None, typer.Option(help="ancestral, ddim, dpmpp_2m, ...")] = None


@dataclass(kw_only=True)
class Request(Overrides):
    """What the drawing commands have in common."""

    runs: Runs
    out: Out
    seed: Seed = 0
    batch_size: BatchSize = 16
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32"
    keep_in_memory: Annotated[str, typer.Option(help="Stages: all, or one at a time.")] = "all"
    as_json: Json = False


PRIOR = ("candidates", "prior_steps", "prior_sampler", "prior_guidance")  # of commands that may draw z_i


def drawing(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, in place of its parameter ``request``, an option for each field of Request but those ``without``.

    Typer reads a command's options from its signature, so that is what changes.
    """
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=field.type,
        )
        for field in fields(Request)
        if field.name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "request"]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            request = Request(**{p.name: given.pop(p.name) for p in shared})
            command(request=request, **given)

        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
