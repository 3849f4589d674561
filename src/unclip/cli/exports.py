"""`unclip export open-clip | diffusers | onnx`: our artifacts in the formats of others."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.errors import ConfigError

Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
CHAIN = "Folder with the runs clip, prior, decoder and upsampler*."


def export_open_clip(
    clip: Annotated[Path, typer.Argument(help="Run or artifact of a CLIP.")],
    out: Out,
) -> None:
    """A CLIP as a folder that open_clip reads: open_clip.create_model("local-dir:FOLDER")."""
    from unclip.interop.open_clip_folder import export_open_clip as run

    run(clip, out)
    typer.echo(f'wrote {out}: open_clip.create_model("local-dir:{out}")')


def export_diffusers(
    runs: Annotated[Path, typer.Argument(help=CHAIN)],
    out: Out,
    compat: Annotated[
        str, typer.Option("--diffusers-compat", help="current: diffusers from 0.38 on; legacy: up to 0.37.")
    ] = "current",
    prior: Annotated[
        bool, typer.Option("--prior/--without-prior", help="Without: for picture variations alone.")
    ] = True,
) -> None:
    """A chain in Karlo's form as a folder of UnCLIPPipeline and UnCLIPImageVariationPipeline, checked with diffusers."""
    if compat not in ("current", "legacy"):
        raise ConfigError(f"--diffusers-compat is {compat}; it must be current (from 0.38 on) or legacy (up to 0.37)")
    from unclip.interop.diffusers_export import export_diffusers as run
    from unclip.pipeline import Memory, UnCLIP

    folders = UnCLIP.load(runs, device="cpu", keep_in_memory=Memory.one).folders
    if not prior:
        folders.pop("prior", None)
    found = run(folders, out, legacy=compat == "legacy")
    typer.echo(
        f"wrote {out}; diffusers {found.version} loads the same weights, computes the same (largest difference "
        f"{found.forward:.1g}) and draws the same pictures (mean difference {found.mean:.1g}, {100 * found.share:.1g} % of "
        "the values above 1e-3)"
    )
    if found.shimmed:
        typer.echo("this is a legacy folder: diffusers from 0.38 on reads it only after what docs/export.md says")


def export_onnx(
    runs: Annotated[Path, typer.Argument(help=CHAIN + " Or one run or artifact.")],
    out: Out,
    programs: Annotated[
        bool, typer.Option("--programs", help="Also what torch.export made of each: NAME.pt2.")
    ] = False,
) -> None:
    """The nets as ONNX: CLIP's towers and one step of prior, decoder and upsamplers, checked with onnxruntime."""
    from unclip.interop.onnx_export import export_onnx as run

    for file, difference in run(runs, out, programs=programs).items():
        typer.echo(f"wrote {out / file}; onnxruntime's outputs differ by at most {difference:.1g}")
