"""`unclip push` and `unclip pull`: stages to and from the Hugging Face hub; and hf:// places in `--from`."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.errors import ArtifactError, UnclipError


def push(
    runs: Annotated[Path, typer.Argument(help="Folder with the runs clip, prior, decoder and upsampler*, or one run.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; it is made where it is not there.")],
    licence: Annotated[
        str,
        typer.Option("--license", help="Of the weights, by the hub's identifier: apache-2.0, cc-by-4.0, other, ..."),
    ],
    private: Annotated[bool, typer.Option("--private", help="A new repository is visible to you alone.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Add stages",
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", help="Folder to write instead of sending anything.")
    ] = None,
) -> None:
    """Send stages to the Hugging Face hub, with a model card written from their manifests."""
    from unclip.drafts import complete_or_not
    from unclip.interop.hub import Push, prepare
    from unclip.interop.hub import push as send

    cfg = Push(runs, repo, licence, private, message)
    if dry_run is None:
        typer.echo(f"pushed {send(cfg)}")
        return
    with complete_or_not(dry_run) as draft:
        prepare(cfg, draft)
    typer.echo(f"wrote {dry_run}, which is what would be sent")


def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs to write.")],
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.")] = None,
) -> None:
    """Fetch stages that were pushed to the Hugging Face hub, and check them."""
    from unclip.interop.hub import pull as fetch

    for name, manifest in fetch(repo, out, revision).items():
        typer.echo(f"wrote {out / name}: {manifest.kind} {manifest.hash[:12]}")


def runs_folder(place: str) -> Path:
    """The argument of ``--from``: a folder, or hf://OWNER/NAME[@REVISION], which is fetched."""
    if not place.startswith("hf://"):
        return Path(place)
    from unclip.interop.hub import fetched

    try:
        return fetched(place)
    except UnclipError as error:  # a ConfigError is a ValueError too, of which typer would drop the text
        raise ArtifactError(str(error)) from error
