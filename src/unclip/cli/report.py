"""``unclip report``: one self-contained page about a folder of runs."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import typer

from unclip.artifact import read_manifest
from unclip.cli.verdict import COLUMNS
from unclip.errors import ConfigError

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;border:1px solid #ddd}svg{background:#fafafa;margin:.3em}
figcaption{color:#555}code{background:#f3f3f3;padding:0 .2em}"""
CURVES = ("train/contrastive", "train/mse", "train/vlb", "val/contrastive", "val/mse", "val/vlb")


def write_report(runs: Path, record: dict[str, float]) -> None:
    """Write ``runs/report.html`` and ``runs/summary.json``; stages and verdicts that are missing are left out.

    Raises :class:`ConfigError` when there is no such folder.
    """
    if not runs.is_dir():
        raise ConfigError(f"{runs} is not a folder; give the one that holds the runs clip, prior, decoder ...")
    stages = sorted(path.parent for path in runs.glob("*/metrics.jsonl") if (path.parent / "artifact").exists())
    verdict = _json(runs / "verdict" / "verdict.json")
    extra = _json(runs / "measures.json") or {}
    summary: dict[str, Any] = {**record, **extra}
    if verdict:
        summary["oracle"] = verdict
    summary["stages"] = {stage.name: _stage_summary(stage) for stage in stages}
    timings = _rows(runs / "timings.jsonl")
    summary["commands"] = timings
    (runs / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    parts = [f"<h1>{html.escape(str(runs))}</h1>", _record(record), _commands(timings), _stage_table(summary["stages"])]
    if verdict:
        parts += [
            _verdict_table(verdict),
            _picture(runs / "verdict" / "verdict.png", "Fixed captions; one picture each"),
        ]
    parts += [_picture(path, path.stem) for path in sorted(runs.glob("*.png"))]
    parts += [_picture(path, "Generated pictures") for path in sorted(runs.glob("pictures/sheet.png"))]
    for stage in stages:
        parts += [f"<h2>{html.escape(stage.name)}</h2>", *_curves(stage)]
        sheets = sorted((stage / "samples").glob("*.png"))
        parts += [_picture(sheets[-1], f"{stage.name}, {sheets[-1].stem}")] if sheets else []
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(runs.name)}</title><style>{STYLE}</style>"
    (runs / "report.html").write_text(page + "\n".join(parts), encoding="utf-8")
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


def _commands(timings: list[dict[str, Any]]) -> str:
    if not timings:
        return ""
    rows = "".join(
        f"<tr><td><code>{html.escape(row['command'])}</code></td><td>{row['seconds']:.0f}</td></tr>" for row in timings
    )
    return f"<h2>Commands</h2><table><tr><th>command</th><th>seconds</th></tr>{rows}</table>"


def _stage_table(stages: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, row in stages.items():
        metrics = ", ".join(
            f"{k.removeprefix('val/')} {v if v is None else format(v, '.4g')}"
            for k, v in row.items()
            if k.startswith("val/")
        )
        cells = f"<td>{row['step']:,}</td><td>{row['samples']:,}</td><td>{row.get('seconds', 0):.0f}</td>"
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{html.escape(metrics)}</td></tr>")
    head = "<tr><th>stage</th><th>steps</th><th>samples</th><th>seconds</th><th>validation</th></tr>"
    return f"<h2>Stages</h2><table>{head}{''.join(rows)}</table>"


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


def _picture(path: Path, title: str) -> str:
    if not path.exists():
        return ""
    inline = base64.b64encode(path.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{inline}'><figcaption>{html.escape(title)}</figcaption></figure>"


def _curves(stage: Path) -> list[str]:
    """A small SVG a metric, logarithmic in y."""
    rows = _rows(stage / "metrics.jsonl")
    drawn = []
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row and 0 < row[name] < math.inf]
        if len(points) > 1:
            drawn.append(_svg(name, points))
    return drawn


def _svg(title: str, points: list[tuple[float, float]], width: int = 330, height: int = 150) -> str:
    steps, values = [x for x, _ in points], [math.log10(y) for _, y in points]
    span_x, low = max(steps) - min(steps) or 1, min(values)
    span_y = max(values) - low or 1
    line = " ".join(
        f"{10 + (x - min(steps)) / span_x * (width - 20):.1f},{height - 10 - (y - low) / span_y * (height - 40):.1f}"
        for x, y in zip(steps, values, strict=True)
    )
    text = f"{title}: {points[0][1]:.4g} to {points[-1][1]:.4g} in {points[-1][0]:.0f} steps (log scale)"
    return (
        f"<svg width={width} height={height} role=img><text x=8 y=16 font-size=11>{html.escape(text)}</text>"
        f"<polyline points='{line}' fill=none stroke=steelblue stroke-width=1.5 /></svg>"
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none where it is missing, and without a last line that a crash cut short."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # a whole line ends with a newline
