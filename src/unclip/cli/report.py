"""``unclip report``: one self-contained page about a run, or about a folder of runs."""

import html
import json
import math
from pathlib import Path
from typing import Any

import typer

from unclip.artifact import read_manifest
from unclip.cli.verdict import COLUMNS
from unclip.errors import ConfigError
from unclip.report.curves import draw_curves
from unclip.report.page import heading, picture, read_json, read_rows, table, write_page
from unclip.report.probe import measures_of, said
from unclip.report.run import is_run, write_run_report

CURVES = ("contrastive", "mse", "vlb")


def write_report(runs: Path, record: dict[str, float]) -> None:
    """Write ``runs/report.html`` and ``runs/summary.json``; stages and verdicts that are missing are left out.

    Where ``runs`` is one run, write that run's page. Raises :class:`ConfigError` when there is no such folder.
    """
    if not runs.is_dir():
        raise ConfigError(
            f"{runs} is not a folder; give a run, or the folder that holds the runs clip, prior, decoder ..."
        )
    if is_run(runs):
        if any(record.values()):
            raise ConfigError(
                f"{runs} is one run, which keeps its own times: leave out --seconds, --cpu-seconds, --minutes"
            )
        typer.echo(f"wrote {write_run_report(runs)}")
        return
    stages = sorted(path.parent for path in runs.glob("*/metrics.jsonl") if (path.parent / "artifact").exists())
    verdict = read_json(runs / "verdict" / "verdict.json")
    extra = read_json(runs / "measures.json") or {}
    summary: dict[str, Any] = {**record, **extra}
    if verdict:
        summary["oracle"] = verdict
    summary["stages"] = {stage.name: _stage_summary(stage) for stage in stages}
    timings = read_rows(runs / "timings.jsonl")
    summary["commands"] = timings
    (runs / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    parts = [heading(str(runs), 1), _record(record), *_commands(timings), *_stage_table(summary["stages"])]
    if verdict:
        parts += [
            _verdict_table(verdict),
            picture(runs / "verdict" / "verdict.png", "Fixed captions; one picture each"),
        ]
    parts += [part for path in sorted(runs.glob("probes/*.json")) for part in _probe(path)]
    parts += [picture(path, path.stem) for path in sorted(runs.glob("*.png"))]
    parts += [picture(path, "Generated pictures") for path in sorted(runs.glob("pictures/sheet.png"))]
    for stage in stages:
        parts += [heading(stage.name), *draw_curves(read_rows(stage / "metrics.jsonl"), CURVES)]
        sheets = sorted((stage / "samples").glob("*.png"))
        parts += [picture(sheets[-1], f"{stage.name}, {sheets[-1].stem}")] if sheets else []
    write_page(runs / "report.html", runs.name, parts)
    typer.echo(f"wrote {runs / 'report.html'} and {runs / 'summary.json'}")


def _stage_summary(stage: Path) -> dict[str, Any]:
    manifest = read_manifest(stage)
    return {"step": manifest.step, "samples": manifest.samples, "hash": manifest.hash[:12], **_finite(manifest.metrics)}


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN or infinity: null in their place."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _record(record: dict[str, float]) -> str:
    if not record.get("seconds"):
        return ""
    return f"<p>{record['seconds']:.0f} s on the clock, {record['cpu_seconds']:.0f} s of CPU time.</p>"


def _commands(timings: list[dict[str, Any]]) -> list[str]:
    rows = [(row["command"], f"{row['seconds']:.0f}") for row in timings]
    return [heading("Commands"), table(("command", "seconds"), rows)] if rows else []


def _stage_table(stages: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, row in stages.items():
        metrics = ", ".join(
            f"{k.removeprefix('val/')} {v if v is None else format(v, '.4g')}"
            for k, v in row.items()
            if k.startswith("val/")
        )
        rows.append((name, row["step"], row["samples"], f"{row.get('seconds', 0):.0f}", metrics))
    return [heading("Stages"), table(("stage", "steps", "samples", "seconds", "validation"), rows)]


def _probe(path: Path) -> list[str]:
    """The table and the sheet of a probe's finding."""
    found = read_json(path)
    names = measures_of(found["rows"])
    rows = [(title, *(said(row.get(name)) for name in names)) for title, row in found["rows"].items()]
    pictures = [picture(path.with_name(f"{path.stem}{end}.png"), found["title"]) for end in ("-curves", "")]
    return [heading(found["title"]), table(("", *names), rows), *pictures]


def _verdict_table(verdict: dict[str, dict[str, float]]) -> str:
    rows = []
    for name, title in COLUMNS.items():
        row = verdict[name]
        cells = "".join(
            f"<td>{100 * row[k]:.1f} % [{100 * row[k + '_low']:.0f}&ndash;{100 * row[k + '_high']:.0f}]</td>"
            for k in ("objects", "pairs", "relations")
        )
        rows.append(f"<tr><td>{html.escape(title)}</td>{cells}<td>{100 * row['product']:.1f} %</td></tr>")
    head = (
        "<tr><th>decoder sees</th><th>objects</th><th>pairs</th><th>relations</th><th>pairs &times; relations</th></tr>"
    )
    return (
        "<h2>The oracle's verdict</h2><p>64 captions of one object and 192 of two whose combination never occurs in training; "
        "one picture each, never chosen; unreadable counts as wrong; 95 % Wilson intervals.</p>"
        f"<table>{head}{''.join(rows)}</table>"
    )
