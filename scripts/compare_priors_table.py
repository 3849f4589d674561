"""The markdown table of scripts/compare_priors.sh: a row a model, mean ± standard deviation over its seeds."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

COLUMNS = {  # heading: file, measure, factor, digits
    "steps": ("evaluation", "step", 1, 0),
    "cosine to true z_i": ("evaluation", "cosine_to_true", 1, 3),
    "to z_t, less baseline": ("evaluation", "cosine_difference", 1, 3),
    "recall@1, %": ("evaluation", "recall_1", 100, 1),
    "recall@10, %": ("evaluation", "recall_10", 100, 1),
    "diversity": ("evaluation", "diversity", 1, 3),
    "diversity ratio": ("evaluation", "diversity_ratio", 1, 2),
    "KID x 1000": ("measures", "kid", 1, 1),
    "style accuracy, %": ("measures", "style_accuracy", 100, 1),
    "drawn recall@1, %": ("measures", "generated_recall_at_1", 100, 1),
}


def table(folder: Path) -> str:
    """All evaluated runs below ``folder``: LABEL/seed-N/evaluation.json and chain/measures.json."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/seed-*/evaluation.json")):
        evaluation = json.loads(path.read_text())
        drawn = path.parent / "chain" / "measures.json"
        measures = json.loads(drawn.read_text()) if drawn.exists() else {}
        evaluated = {**evaluation["measures"], "step": evaluation["step"]}
        runs.setdefault(path.parts[-3], []).append({"evaluation": evaluated, "measures": measures})
    if not runs:
        raise SystemExit(f"error: {folder} holds no */seed-*/evaluation.json")
    shown = {h: c for h, c in COLUMNS.items() if any(c[1] in seed[c[0]] for seeds in runs.values() for seed in seeds)}
    lines = ["| prior | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    order = sorted(
        runs, key=lambda label: -statistics.mean(seed["evaluation"]["cosine_to_true"] for seed in runs[label])
    )
    for label in order:
        cells = [_cell(runs[label], *column) for column in shown.values()]
        lines.append(f"| {label} | {len(runs[label])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(seeds: list[dict[str, Any]], file: str, name: str, factor: float, digits: int) -> str:
    values = [factor * seed[file][name] for seed in seeds if name in seed[file]]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    text = table(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "table.md").write_text(text)
    print("\n" + text, end="")
