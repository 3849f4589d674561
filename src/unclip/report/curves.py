"""Curves of a run's metrics as inline SVG."""

import html
import math
from collections.abc import Sequence
from typing import Any

COLOURS = {"train": "steelblue", "val": "darkorange"}
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 40, 20  # margins: numbers at the left, titles above, steps below
MOST = 400  # points a line

Points = list[tuple[float, float]]


def draw_curves(rows: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> list[str]:
    """One SVG a metric of ``metrics.jsonl``, training and validation in one; ``names`` chooses some, all by default.

    Values that are not finite are left out, and so is a metric with fewer than two points.
    """
    found: dict[str, dict[str, Points]] = {}
    for row in rows:
        for key, value in row.items():
            part, _, name = key.partition("/")
            if part in COLOURS and name and (name in names or not names) and math.isfinite(value):
                found.setdefault(name, {}).setdefault(part, []).append((row["step"], value))
    drawn = []
    for name in sorted(found, key=lambda name: (list(names).index(name) if names else 0, len(found[name]) == 1, name)):
        lines = {f"{part}/{name}": found[name][part] for part in COLOURS if part in found[name]}
        if max(len(points) for points in lines.values()) > 1:
            drawn.append(_svg(lines))
    return drawn


def _svg(lines: dict[str, Points]) -> str:
    """Lines over the steps; logarithmic in y where all values are positive."""
    lines = {name: _thinned(points) for name, points in lines.items()}
    values = [y for points in lines.values() for _, y in points]
    steps = [x for points in lines.values() for x, _ in points]
    logarithmic = min(values) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    first, span_x, span_y = min(steps), max(steps) - min(steps) or 1, high - low or 1

    def place(point: tuple[float, float]) -> str:
        x = LEFT + (point[0] - first) / span_x * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (scale(point[1]) - low) / span_y * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [_grid(low, high, logarithmic), _text(LEFT, HEIGHT - 6, f"{first:.0f}")]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, f"step {max(steps):.0f}", "end"))
    if logarithmic:
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "log scale", "middle", "#999"))
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[name.partition("/")[0]]
        text = f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g} in {points[-1][0]:.0f} steps"
        parts.append(_text(8, 14 + 15 * number, text, fill=colour))
        parts.append(f"<polyline points='{' '.join(map(place, points))}' fill=none stroke={colour} stroke-width=1.5 />")
    return (
        f"<svg width={WIDTH} height={HEIGHT} role=img font-size=11 font-family='system-ui,sans-serif'>"
        f"<rect width={WIDTH} height={HEIGHT} fill='#fafafa' />{''.join(parts)}</svg>"
    )


def _grid(low: float, high: float, logarithmic: bool) -> str:
    """Three lines with their values."""
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        value = low + share * (high - low)
        parts.append(f"<path d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}' stroke='#ddd' />")
        parts.append(_text(LEFT - 4, y + 4, f"{10**value if logarithmic else value:.3g}", "end", "#777"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = "#555") -> str:
    return f"<text x={x:.0f} y={y:.0f} text-anchor={anchor} fill='{fill}'>{html.escape(text)}</text>"


def _thinned(points: Points) -> Points:
    """Every n-th point and the last one."""
    stride = -(-len(points) // MOST)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]
