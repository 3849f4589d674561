"""The commands that look into latents: reconstruct, edit-verdict, pca-probe and typographic-probe."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.options import BatchSize, DecoderGuidance, Json, Out, Pictures, Runs, Seed

Steps = Annotated[int, typer.Option(min=1, help="DDIM steps, forwards and backwards.")]


def reconstruct(
    runs: Runs,
    data: Annotated[Path, typer.Option("--data", exists=True, help="A data set (its val), or one split of it.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures, spread evenly over the split.")] = 64,
    steps: Annotated[str, typer.Option(help="Numbers of DDIM steps, comma-separated.")] = "25,50,100",
    captions: Annotated[bool, typer.Option("--captions", help="The decoder also reads the captions.")] = False,
    decoder_guidance: Annotated[float, typer.Option(help="Guidance scale of the decoder.")] = 1.0,
    refinements: Annotated[int, typer.Option(min=1, help="Evaluations of the decoder for each step backwards.")] = 1,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """How well z_i with the inverted noise gives pictures back, and with other noise: PSNR in dB, as JSON."""
    from unclip.cli.reconstruct import measure_reconstruction

    measure_reconstruction(
        runs, data, num=num, steps=steps, captions=captions, guidance=decoder_guidance, refinements=refinements,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip


def edit_verdict(
    runs: Runs,
    out: Out,
    base: Annotated[str, typer.Option(help="z_t0: own (the picture's caption), photo (a photo), or none.")] = "own",
    thetas: Annotated[str, typer.Option(help="How far to turn, comma-separated; 0 reconstructs.")] = "0,0.25,0.5",
    num: Annotated[int, typer.Option(min=1, max=100, help="Cases; they are the same every time.")] = 100,
    decoder_steps: Steps = 50,
    decoder_guidance: DecoderGuidance = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """Turn the colour of 100 fixed single shapes by text difference; the oracle reads colour and shape back. JSON."""
    from unclip.cli.edit_verdict import judge_edits

    judge_edits(
        runs, out, base=base, thetas=thetas, num=num, steps=decoder_steps, guidance=decoder_guidance, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip


def pca_probe(
    pictures: Pictures,
    runs: Runs,
    out: Out,
    embeddings: Annotated[Path, typer.Option(exists=True, help="Embeddings by the same CLIP, which give the axes.")],
    components: Annotated[
        str | None, typer.Option(help="How many to keep, comma-separated; by default as in the paper, by width.")
    ] = None,
    decoder_steps: Steps = 50,
    decoder_guidance: DecoderGuidance = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """What the first principal components of z_i hold: each picture drawn from 20, 30, 40 ... of them, with one noise."""
    from unclip.cli.probes import probe_components

    probe_components(
        pictures, runs, out, embeddings, components, steps=decoder_steps, guidance=decoder_guidance, seed=seed,
        batch_size=batch_size, as_json=as_json,
    )  # fmt: skip


def typographic_probe(
    pictures: Pictures,
    runs: Runs,
    out: Out,
    classes: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="File with a class name a line.")],
    word: Annotated[
        list[str] | None, typer.Option(help="Also each picture with this word written upon it; may be repeated.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures drawn from each z_i.")] = 4,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Whether a written word deceives CLIP, and the decoder: zero-shot probabilities beside pictures drawn from z_i."""
    from unclip.cli.probes import probe_typography

    probe_typography(
        pictures, runs, out, classes, word or [], num=num, seed=seed, batch_size=batch_size, as_json=as_json
    )
