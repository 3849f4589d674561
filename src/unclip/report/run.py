"""``report.html`` of one run folder: what was trained, how it went, what came out and where it comes from."""

import html
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.artifact import MANIFEST, Manifest, read_manifest
from unclip.errors import ArtifactError, ConfigError, UnclipError
from unclip.report.curves import draw_curves
from unclip.report.lineage import ancestors, draw_lineage, find_nodes, siblings
from unclip.report.page import folded, heading, paragraph, picture, read_json, read_rows, table, write_page

log = logging.getLogger(__name__)
FILE = "report.html"
CAPTIONS = "captions.json"
MOST_SHEETS = 8


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is one run (training, embedding, evaluation or import) rather than a folder of runs."""
    return any((folder / name).exists() for name in ("artifact", "metrics.jsonl", MANIFEST, "evaluation.json"))


def write_run_report(run: Path) -> Path:
    """Write ``run/report.html``, a page that needs no other file; what the run does not have is left out.

    Raises :class:`ConfigError` when the folder is no run.
    """
    write_page(run / FILE, run.resolve().name, run_parts(run))
    return run / FILE


def run_parts(run: Path) -> list[str]:
    """The page's parts in HTML. Raises :class:`ConfigError` when the folder is no run."""
    if not is_run(run):
        raise ConfigError(f"{run} is no run folder: it holds neither metrics.jsonl nor an artifact")
    manifest, trouble = _manifest(run)
    parts = [heading(run.resolve().name, 1), paragraph(trouble), paragraph(_summary(manifest) if manifest else "")]
    parts += _measures(run, manifest)
    rows = read_rows(run / "metrics.jsonl")
    parts += _section("Timings", [table(("what", "time"), _timings(rows, manifest))])
    parts += _section("Curves", draw_curves(rows))
    parts += _section("Sheets over time", _sheets(run / "samples"))
    parts += _section(
        "Nearest training pictures", [picture(run / "neighbours.png", "of the drawn ones that come nearest")]
    )
    parts += _section("Captions of the sheets", [_list(read_json(run / "samples" / CAPTIONS) or [])])
    parts += _section("Lineage", _lineage(run, manifest))
    return parts + _section("Configuration", [_config(run)])


def report_quietly(run: Path) -> None:
    """:func:`write_run_report` where the run itself is what counts: a full disk or a damaged file costs the page, with a warning.

    A folder in which nothing has been written yet gets none either.
    """
    try:
        if is_run(run):
            write_run_report(run)
    except (OSError, ValueError, KeyError, UnclipError) as error:
        log.warning("%s could not be written (%s); `unclip report %s` writes it later", run / FILE, error, run)


def _manifest(run: Path) -> tuple[Manifest | None, str]:
    """The artifact's manifest or why there is none."""
    if not (run / "artifact").exists():
        return None, "" if (run / MANIFEST).exists() else "No artifact yet: this run has not finished."
    try:
        return read_manifest(run), ""
    except ArtifactError as error:
        return None, f"The artifact cannot be read: {error}"


def _summary(manifest: Manifest) -> str:
    return (
        f"A {manifest.kind}: model {manifest.model}, step {manifest.step:,}, {manifest.samples:,} samples seen, "
        f"hash {manifest.hash[:12]}, data {manifest.data[:12] or 'unknown'}, written by unclip {manifest.version}."
    )


def _section(title: str, content: Sequence[str]) -> list[str]:
    """The content under its title; nothing for nothing."""
    return [heading(title), *content] if any(content) else []


def _measures(run: Path, manifest: Manifest | None) -> list[str]:
    """Validation's figures at the end, and what ``unclip-evaluate`` or ``unclip-embed`` found in this folder."""
    found: dict[str, Any] = dict(manifest.metrics) if manifest else {}
    found.pop("seconds", None)
    found |= (read_json(run / "evaluation.json") or {}).get("measures", {})
    for split, numbers in (read_json(run / MANIFEST) or {}).get("stats", {}).items():
        found |= {f"{split}: {name}": value for name, value in numbers.items() if isinstance(value, int | float)}
    rows = [(name, value if math.isfinite(value) else str(value)) for name, value in found.items()]
    return _section("Measures", [table(("measure", "value"), rows)])


def _timings(rows: list[dict[str, Any]], manifest: Manifest | None) -> list[tuple[str, str]]:
    found = []
    if manifest and manifest.metrics.get("seconds"):
        seconds = manifest.metrics["seconds"]
        found = [("training, on the clock", f"{seconds:,.0f} s"), ("steps a second", f"{manifest.step / seconds:.3g}")]
    speeds = sorted(row["train/samples_per_second"] for row in rows if "train/samples_per_second" in row)
    if speeds:
        found.append(("samples a second, median of the log's rows", f"{speeds[len(speeds) // 2]:.4g}"))
        found.append(("slowest and fastest row", f"{speeds[0]:.4g} to {speeds[-1]:.4g}"))
    return found


def _sheets(folder: Path) -> list[str]:
    """At most ``MOST_SHEETS`` of them, spread evenly, the first and the last included."""
    paths = sorted(folder.glob("step-*.png"))
    if not paths:
        return []
    count = min(len(paths), MOST_SHEETS)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = "".join(picture(path, f"step {int(path.stem.removeprefix('step-')):,}") for path in chosen)
    note = f"{count} of {len(paths)} sheets" if count < len(paths) else ""
    return [paragraph(note), f"<div class=strip>{figures}</div>"]


def _list(captions: Sequence[str]) -> str:
    return f"<ol>{''.join(f'<li>{html.escape(caption)}</li>' for caption in captions)}</ol>" if captions else ""


def _lineage(run: Path, manifest: Manifest | None) -> list[str]:
    """What the run stems from: a graph, and all hashes in full."""
    if manifest is None:
        clip = (read_json(run / MANIFEST) or {}).get("interface", {}).get("clip", "")
        return [paragraph(f"Embedded with the CLIP {clip}.")] if clip else []
    nodes = find_nodes([*siblings(run), run])
    chain = ancestors(nodes, manifest.hash)
    rows = [(node.kind, node.hash, node.name) for node in chain.values()]
    rows += [("data", manifest.data, manifest.settings.get("data", {}).get("path", ""))] if manifest.data else []
    return [draw_lineage(chain, manifest.hash), table(("what", "hash", "where"), rows)]


def _config(run: Path) -> str:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text and (run / MANIFEST).exists():
        text = json.dumps({k: v for k, v in read_json(run / MANIFEST).items() if k not in ("stats", "data")}, indent=2)
    return folded("all settings", f"<pre>{html.escape(text)}</pre>") if text else ""
