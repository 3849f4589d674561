"""`unclip import embeddings` and `unclip export embeddings`: clip-retrieval's layout, in and out."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]


def import_embeddings(
    src: Annotated[Path, typer.Argument(help="Folder that holds img_emb, text_emb and metadata.")],
    clip: Annotated[Path, typer.Option(help="Run or artifact of the CLIP that made them.")],
    out: Out,
    pictures: Annotated[
        Path | None, typer.Option(help="Some of their pictures, a folder or one split of shards: the CLIP is checked.")
    ] = None,
    val: Annotated[float, typer.Option(help="Share of the rows for validation.")] = 0.01,
) -> None:
    """Public embeddings in the layout of clip-retrieval, so that a prior can be trained on them."""
    from unclip.interop.public_embeddings import ImportConfig
    from unclip.interop.public_embeddings import import_embeddings as run

    found = run(ImportConfig(src, clip, out, pictures, val))
    counts = ", ".join(f"{count} rows of {split}" for split, count in found.written.items())
    typer.echo(f"wrote {out}: {counts}; {'unit-norm' if found.normalised else 'raw'}, {found.dtype}")
    if found.num_pictures:
        typer.echo(f"{found.num_pictures} pictures encoded again: least cosine {found.cosine:.4f}")
    else:
        typer.echo("that this CLIP made them is asserted, not checked: --pictures checks it")


def export_embeddings(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Embeddings, as unclip-embed writes them.")],
    out: Out,
    split: Annotated[str, typer.Option(help="The split to write.")] = "train",
    data: Annotated[Path | None, typer.Option(help="The data set that was embedded, for the captions.")] = None,
    kind: Annotated[str, typer.Option(help="npy (float16) or parquet (float32).")] = "npy",
    raw: Annotated[bool, typer.Option("--raw", help="Keep CLIP's raw norms; else rows are unit-norm.")] = False,
) -> None:
    """Embeddings in the layout of clip-retrieval, which embedding-reader and its indices read."""
    from unclip.interop.public_embeddings import ExportConfig
    from unclip.interop.public_embeddings import export_embeddings as run

    num_rows = run(ExportConfig(folder, out, split, data, kind, raw))
    typer.echo(f"wrote {num_rows} rows of {split} to {out}")
    if "caption" not in _metadata_columns(out):
        typer.echo("without captions, which these embeddings do not hold: --data DATA adds them")


def _metadata_columns(out: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_schema(next((out / "metadata").glob("*.parquet"))).names
