"""The markdown tables of scripts/compare_priors.sh: a row a model, mean ± standard deviation over its seeds."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TRUE = "true-z_i.json"  # what the decoder draws from the real pictures' z_i
DRAWN = "drawn"
Columns = dict[str, tuple[str, float, int]]  # heading: measure, factor, digits
EVALUATED: Columns = {
    "cosine to true z_i": ("cosine_to_true", 1, 3),
    "to z_t, less baseline": ("cosine_difference", 1, 3),
    "recall@1, %": ("recall_1", 100, 1),
    "recall@5, %": ("recall_5", 100, 1),
    "recall@10, %": ("recall_10", 100, 1),
    "diversity ratio": ("diversity_ratio", 1, 2),
    "steps": ("step", 1, 0),
}
PICTURES: Columns = {
    "KID x 1000": ("kid", 1, 1),
    "style accuracy, %": ("style_accuracy", 100, 1),
}
Cells = dict[str, list[dict[str, float]]]  # the measures of each seed, by label


def tables(folder: Path) -> str:
    """One table for each split of LABEL/seed-N/evaluation-SPLIT.json below ``folder``, and one of LABEL/seed-N/drawn.json."""
    found = {path.stem for path in folder.glob("*/seed-*/evaluation-*.json")}
    if not found:
        raise SystemExit(f"error: {folder} holds no */seed-*/evaluation-*.json")
    names = sorted(found, key=lambda name: (name != "evaluation-val", name))
    order: list[str] = []
    texts = []
    for name in names:
        cells = gathered(folder, name)
        order = order or sorted(cells, key=lambda label: -mean(cells[label], "cosine_to_true"))
        samples = next(iter(cells.values()))[0]["samples"]
        texts.append(f"{name.removeprefix('evaluation-')}, {samples} samples:\n\n" + table(cells, order, EVALUATED))
    drawn = gathered(folder, DRAWN)
    if drawn:
        pictures = next(iter(drawn.values()))[0]
        if (folder / TRUE).exists():
            drawn["(true z_i)"] = [json.loads((folder / TRUE).read_text())]
        title = f"drawn, {pictures['num_test']} captions for the KID and {pictures['num_styles']} for the style"
        texts.append(f"{title}:\n\n" + table(drawn, [*order, "(true z_i)"], PICTURES))
    return "\n".join(texts)


def gathered(folder: Path, name: str) -> Cells:
    cells: Cells = {}
    for path in sorted(folder.glob(f"*/seed-*/{name}.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        flat = {**content, **content.pop("measures", {})}
        cells.setdefault(path.parts[-3], []).append(flat)
    return cells


def table(cells: Cells, order: list[str], columns: Columns) -> str:
    shown = {h: c for h, c in columns.items() if any(c[0] in seed for seeds in cells.values() for seed in seeds)}
    lines = ["| prior | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for label in order:
        if label in cells:
            found = [cell(cells[label], *column) for column in shown.values()]
            lines.append(f"| {label} | {len(cells[label])} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def mean(seeds: list[dict[str, float]], name: str) -> float:
    return statistics.mean(seed[name] for seed in seeds)


def cell(seeds: list[dict[str, float]], name: str, factor: float, digits: int) -> str:
    values = [factor * seed[name] for seed in seeds if name in seed]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    middle = round(statistics.mean(values), digits) + 0.0  # no -0.00
    return f"{middle:.{digits}f}{spread}"


if __name__ == "__main__":
    text = tables(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "table.md").write_text(text)
    print("\n" + text, end="")
