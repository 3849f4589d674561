"""``unclip import karlo``: others' unCLIP stages as runs."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="Folder of the runs to write: clip, prior, decoder, upsampler.")]


def import_karlo(
    folder: Annotated[
        Path, typer.Argument(help="A pipeline of diffusers (Karlo, Kandinsky's prior), or Karlo's .ckpt files.")
    ],
    out: Out,
    clip: Annotated[
        Path | None,
        typer.Option(exists=True, help="Run of the CLIP, where the folder brings none or another is wanted."),
    ] = None,
    image_encoder: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with CLIP's picture tower, where the pipeline has none.")
    ] = None,
) -> None:
    """Make runs of Karlo's weights (or of Kandinsky's prior), to draw with, to fine-tune and to export again."""
    from unclip.artifact import read_manifest
    from unclip.interop.karlo import import_karlo as import_folder
    from unclip.report.run import report_quietly

    for run in import_folder(folder, out, clip, image_encoder):
        manifest = read_manifest(run)
        report_quietly(run)
        typer.echo(f"wrote {run}: {manifest.kind} {manifest.hash[:12]}")
