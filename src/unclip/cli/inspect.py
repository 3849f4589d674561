"""``unclip inspect``: what a folder is, in words, tables and plots."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unclip.artifact import MANIFEST, WEIGHTS, Manifest, is_there, locate, read_manifest
from unclip.data.embeddings import Embeddings
from unclip.errors import ConfigError
from unclip.evaluation.inspection import Inspection, inspect_embeddings, reconstruction_error
from unclip.evaluation.metrics import effective_rank, num_components
from unclip.interop.checkpoints import Description, describe
from unclip.progress import counted

NAMES = {"image_emb": "z_i", "text_emb": "z_t"}


def inspect_path(path: Path, out: Path | None, max_rows: int, console: Console | None = None) -> None:
    """Say what ``path`` is: an embeddings folder, a run or artifact folder, or a file of weights. ``out``: where plots go.

    Raises ConfigError for anything else.
    """
    console = console or (Console() if sys.stdout.isatty() else Console(width=200))
    if not path.exists():
        raise ConfigError(
            f"there is no {path}; give an embeddings folder, a run or an artifact, or a checkpoint's file"
        )
    if path.is_file() and out is None:
        _describe_file(describe(path), path, console)
        return
    if _kind(path) == "embeddings":
        _inspect_embeddings(path, out, max_rows, console)
        return
    if out is not None:
        raise ConfigError(f"--out draws plots of embeddings only, and {path} holds none; leave it out")
    if not is_there(path):
        raise ConfigError(
            f"{path} holds neither embeddings nor an artifact; a run has one when its stage, or unclip-embed, has ended"
        )
    _describe(read_manifest(path), locate(path), console)


def _kind(path: Path) -> str | None:
    try:
        return json.loads((path / MANIFEST).read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def _describe(manifest: Manifest, path: Path, console: Console) -> None:
    size, written = (path / WEIGHTS).stat().st_size, (path / MANIFEST).stat().st_mtime
    when = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC")
    console.print(
        f"{path} is a {manifest.kind}: a model '{manifest.model}' of {size / 1e6:.1f} MB, written {when} by unclip "
        f"{manifest.version} at step {manifest.step:,} after {manifest.samples:,} samples."
    )
    parents = [f"{kind} {value[:12]}" for kind, value in manifest.parents.items()]
    console.print(f"Its hash is {manifest.hash[:12]}; it was trained on: {', '.join(parents) or 'no other artifact'}.")
    for title, values in {
        "Interface": manifest.interface, "Measured": manifest.metrics, "Configuration": _flat(manifest.config),
    }.items():  # fmt: skip
        table = Table("name", "value", title=title, title_justify="left")
        for name, value in values.items():
            table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
        if values:
            console.print(table)


def _describe_file(found: Description, path: Path, console: Console) -> None:
    console.print(
        f"{path} is {found.what}; {path.stat().st_size / 1e6:.1f} MB. No code in it was run.",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("part", "tensors", "numbers", "type", title="Weights", title_justify="left")
    for name, part in found.parts.items():
        table.add_row(name, f"{part.tensors:,}", f"{part.numbers:,}", ", ".join(sorted(part.types)))
    console.print(table)
    for name, value in found.values.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if found.left_out:
        console.print(
            f"Left out, since they are no tensors: {', '.join(found.left_out)}.", highlight=False, soft_wrap=True
        )


def _flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return found


def _inspect_embeddings(path: Path, out: Path | None, max_rows: int, console: Console) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    splits = {name: Embeddings(path, name) for name in manifest["data"]}
    some = next(iter(splits.values()))
    variants = some.variants
    console.print(
        f"{path} holds embeddings by CLIP {some.interface.clip[:12]}: {', '.join(some.columns)} in "
        f"{manifest['dtype']}, {some.interface.embed_dim} wide, {variants.captions} caption(s) and {variants.crops} "
        f"crop(s) a picture, {'unit-norm' if manifest['normalised'] else 'raw (not unit-norm)'}."
    )
    found: dict[str, Inspection] = {}
    total = sum(min(len(split), max_rows) for split in splits.values())
    with counted(total, "reading") as advance:
        for name, split in splits.items():
            found[name] = inspect_embeddings(split, max_rows, advance)
    for name, inspection in found.items():
        if inspection.num_rows < inspection.total:
            console.print(f"{name}: {inspection.num_rows:,} of {inspection.total:,} rows were read, spread evenly.")
    console.print(_vector_table(found))
    if any(inspection.pairs is not None for inspection in found.values()):
        console.print(_cosine_table(found))
    for line in _remarks(found):
        console.print(line)
    if out is not None:
        for plot in draw(found, out):
            console.print(f"wrote {plot}")


def _vector_table(found: dict[str, Inspection]) -> Table:
    heads = (
        "split",
        "",
        "rows",
        "norm",
        "smallest",
        "largest",
        "rank",
        "99 % of the variance",
        "not finite",
        "duplicates",
    )
    table = Table(*heads, title="Vectors", title_justify="left")
    for split, inspection in found.items():
        for name, vectors in inspection.columns.items():
            norms = vectors.norms
            table.add_row(
                *(split, NAMES[name], f"{inspection.num_rows:,}", f"{norms.mean():.4g} ± {norms.std():.2g}"),
                *(f"{norms.min():.4g}", f"{norms.max():.4g}", f"{effective_rank(vectors.variances):.1f}"),
                f"{num_components(vectors.variances)} of {len(vectors.variances)} components",
                *(f"{vectors.num_nonfinite:,}", f"{vectors.num_duplicates:,}"),
            )
    return table


def _cosine_table(found: dict[str, Inspection]) -> Table:
    table = Table("split", "z_i and z_t", "mean", "5 %", "median", "95 %", title="Cosines", title_justify="left")
    for split, inspection in found.items():
        for name, values in (("of a picture", inspection.pairs), ("shuffled", inspection.shuffled)):
            if values is not None and len(values):
                low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
                table.add_row(split, name, f"{values.mean():.4f}", f"{low:.4f}", f"{middle:.4f}", f"{high:.4f}")
    return table


def _remarks(found: dict[str, Inspection]) -> list[str]:
    """Sentences about what should not be."""
    said = []
    for split, inspection in found.items():
        for name, vectors in inspection.columns.items():
            if vectors.num_nonfinite:
                said.append(f"{split}: {vectors.num_nonfinite:,} {NAMES[name]} are not finite; embed this data again.")
        images = inspection.columns.get("image_emb")
        if images is not None and images.num_duplicates:
            said.append(
                f"{split}: {images.num_duplicates:,} z_i equal an earlier one to the bit: the same picture twice, most likely."
            )
        pairs, shuffled = inspection.pairs, inspection.shuffled
        if pairs is not None and shuffled is not None and len(pairs) and len(shuffled):
            error = np.hypot(pairs.std() / len(pairs) ** 0.5, shuffled.std() / len(shuffled) ** 0.5)
            if pairs.mean() - shuffled.mean() <= 3 * error:
                said.append(
                    f"{split}: pairs are no nearer than shuffled ones: an untrained CLIP, or captions of other pictures."
                )
    return said


def draw(found: dict[str, Inspection], out: Path) -> list[Path]:
    """Write norms, cosines, spectrum, reconstruction and faults as PNG files; the paths written."""
    from matplotlib.figure import Figure  # takes a second to import

    out.mkdir(parents=True, exist_ok=True)
    columns = {(s, c): vectors for s, inspection in found.items() for c, vectors in inspection.columns.items()}
    labels = {place: f"{place[0]} {NAMES[place[1]]}" for place in columns}

    def norms(axes: Any) -> None:
        for place, vectors in columns.items():
            axes.hist(vectors.norms, bins=100, histtype="step", density=True, label=labels[place])
        axes.set(xlabel="norm", ylabel="density")

    def cosines(axes: Any) -> None:
        for split, inspection in found.items():
            for name, values in (("pairs", inspection.pairs), ("shuffled", inspection.shuffled)):
                if values is not None:
                    axes.hist(values, bins=100, histtype="step", density=True, label=f"{split} {name}")
        axes.set(xlabel="cosine of z_i and z_t", ylabel="density")

    def spectrum(axes: Any) -> None:
        for place, vectors in columns.items():
            axes.semilogy(np.arange(1, len(vectors.variances) + 1), vectors.variances.numpy(), label=labels[place])
        axes.set(xlabel="principal component", ylabel="variance")

    def reconstruction(axes: Any) -> None:
        for place, vectors in columns.items():
            k = num_components(vectors.variances)
            axes.semilogy(reconstruction_error(vectors.variances)[:-1].numpy(), label=f"{labels[place]}: 1 % at {k}")
        axes.axhline(0.01, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel="PCA components k", ylabel="mean squared error / variance", ylim=(1e-6, 1.5))

    def faults(axes: Any) -> None:
        places = np.arange(len(columns))
        not_finite = [vectors.num_nonfinite for vectors in columns.values()]
        duplicates = [vectors.num_duplicates for vectors in columns.values()]
        axes.bar_label(axes.bar(places - 0.2, not_finite, 0.4, label="not finite"))
        axes.bar_label(axes.bar(places + 0.2, duplicates, 0.4, label="duplicates"))
        axes.set_xticks(places, list(labels.values()))
        axes.set(ylabel="rows", ylim=(0, 1.2 * max(*not_finite, *duplicates, 1)))

    plots: dict[str, Callable[[Any], None]] = {"norms": norms, "cosines": cosines, "spectrum": spectrum}
    plots |= {"reconstruction": reconstruction, "faults": faults}
    if all(inspection.pairs is None for inspection in found.values()):
        del plots["cosines"]
    written = []
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.legend()
        figure.savefig(out / f"{name}.png", dpi=120)
        written.append(out / f"{name}.png")
    return written
