"""The commands that look for what unCLIP is known to get wrong: binding-, words-, busy-, sweep- and enlarge-probe."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.options import BatchSize, Out, Runs, Seed
from unclip.errors import ConfigError

TextDecoder = Annotated[
    Path | None,
    typer.Option(exists=True, help="A decoder of captions alone (model.conditioning.image=false), to compare with."),
]


def binding_probe(
    runs: Runs,
    out: Out,
    text_decoder: TextDecoder = None,
    captions: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="For photographs: lines CAPTION | EXCHANGED CAPTION."),
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(exists=True, help="With --captions: another CLIP's run, or a VQA model's folder.")
    ] = None,
    num: Annotated[
        int, typer.Option(min=1, help="Scenes at most, each drawn with its colours exchanged as well.")
    ] = 64,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """Whether colours stay with their shapes: drawn from captions, from the true z_i, and by a decoder of captions alone."""
    if (captions is None) != (judge is None):
        raise ConfigError("--captions and --judge go together: without them, shapes are drawn and the oracle judges")
    if captions is not None and judge is not None:
        from unclip.cli.probe_captions import probe_caption_pairs

        probe_caption_pairs(
            runs, out, captions, judge, text_decoder=text_decoder, num=num, seed=seed, batch_size=batch_size
        )
        return
    from unclip.cli.probe_binding import probe_binding

    probe_binding(runs, out, text_decoder=text_decoder, num=num, seed=seed, batch_size=batch_size)


def words_probe(
    runs: Runs,
    out: Out,
    text_decoder: TextDecoder = None,
    num: Annotated[int, typer.Option(min=1, help="Captions of each kind of words: seen in training, and not.")] = 48,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """Whether words are written as asked for, read by OCR: words of training signs, and others (needs the extra eval)."""
    from unclip.cli.probe_words import probe_words

    probe_words(runs, out, text_decoder=text_decoder, num=num, seed=seed, batch_size=batch_size)


def busy_probe(
    runs: Runs,
    out: Out,
    num: Annotated[int, typer.Option(min=1, help="Captions; 1 to 8 objects equally often.")] = 128,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """Scenes of up to eight objects: counts by the oracle, KID of patches, fine detail (needs the extra eval)."""
    from unclip.cli.probe_busy import probe_busy

    probe_busy(runs, out, num=num, seed=seed, batch_size=batch_size)


def sweep_probe(
    runs: Runs,
    out: Out,
    split: Annotated[Path, typer.Option("--data", exists=True, help="One split of a data set, such as DATA/test.")],
    what: Annotated[str, typer.Option(help="captions, prior, guidance, eta or theta.")],
    values: Annotated[str | None, typer.Option(help="For guidance, eta and theta: numbers, comma-separated.")] = None,
    text_decoder: TextDecoder = None,
    text_embedding_decoder: Annotated[
        Path | None,
        typer.Option(exists=True, help="For --what prior: a decoder trained on z_t (model.embedding=text)."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Samples, spread evenly over the split.")] = 100,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
) -> None:
    """The same captions with one thing changed: caption path, z_i, guidance, DDIM's η, or θ of edits (needs the extra eval)."""
    from unclip.cli.probe_sweep import sweep
    from unclip.cli.sweep_ways import Sweep

    sweep(Sweep(what, runs, split, out, values, text_decoder, text_embedding_decoder, num, seed, batch_size))


def enlarge_probe(
    upsampler: Annotated[Path, typer.Option(exists=True, help="An upsampler's run or artifact.")],
    split: Annotated[Path, typer.Option("--data", exists=True, help="One split of a data set, such as DATA/test.")],
    out: Out,
    num: Annotated[int, typer.Option(min=4, help="Pictures, spread evenly over the split.")] = 200,
    tile: Annotated[
        int | None,
        typer.Option(min=8, help="Also draw in tiles of so many pixels, and measure the gradients at their edges."),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> None:
    """Real pictures made small and large again: by the upsampler, bicubic, and by Lanczos (needs the extra eval)."""
    from unclip.cli.probe_enlarging import probe_enlarging

    probe_enlarging(upsampler, split, out, num=num, seed=seed, batch_size=batch_size, tile=tile)
