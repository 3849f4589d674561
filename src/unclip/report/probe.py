"""What a probe found: a table, a sheet of pictures, and JSON that `unclip report` shows."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.drafts import write_atomic
from unclip.evaluation.probes import Share
from unclip.evaluation.sheet import save_picture

Cell = Share | float


@dataclass
class Finding:
    """``rows``: by way of drawing, its measures by name; a row may lack some. ``facts``: settings, artifacts, other numbers."""

    name: str
    title: str
    rows: dict[str, dict[str, Cell]]
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path, sheet: Image.Image) -> str:
        """NAME.json, NAME.md (the table) and NAME.png below ``out``; returns the table."""
        rows = {title: {name: _plain(cell) for name, cell in row.items()} for title, row in self.rows.items()}
        told = {"probe": self.name, "title": self.title, "facts": self.facts, "rows": rows}
        text = markdown(rows)
        out.mkdir(parents=True, exist_ok=True)
        save_picture(sheet, out / f"{self.name}.png")
        write_atomic(out / f"{self.name}.md", f"{self.title}\n\n{text}\n".encode())
        write_atomic(out / f"{self.name}.json", (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
        return text


@dataclass(frozen=True)
class Point:
    """Where a row lies on the plot of a sweep: the line it belongs to ("" for the only one), and the value that was swept."""

    line: str
    value: float


def draw_curves(
    rows: Mapping[str, Mapping[str, Cell]], points: Mapping[str, Point], names: Sequence[str], axis: str
) -> bytes:
    """A PNG with one plot for each of the measures ``names`` over the swept value, one line for each kind of drawing."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(4.6 * len(names), 3.4), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for line in dict.fromkeys(point.line for point in points.values()):
            mine = [(point.value, rows[title][name]) for title, point in points.items() if point.line == line]
            heights = [cell.share if isinstance(cell, Share) else cell for _, cell in mine]
            axes.plot([value for value, _ in mine], heights, marker="o", label=line or "unCLIP")
        axes.set_xlabel(axis)
        axes.set_title(name)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Share):
        return {"share": cell.share, "hits": cell.hits, "total": cell.total, "interval": list(cell.interval)}
    return float(cell)


def said(cell: Any) -> str:
    """A cell of the JSON in words: a share in percent with its 95 % interval, a number with three digits, or nothing."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        low, high = cell["interval"]
        return f"{100 * cell['share']:.1f} [{100 * low:.0f}-{100 * high:.0f}]"
    return f"{cell:.3g}"


def measures_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of all measures, in the order of their first row."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table; shares in percent."""
    names = measures_of(rows)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(said(row.get(name)) for name in names)} |" for title, row in rows.items()]
    return "\n".join(lines)
