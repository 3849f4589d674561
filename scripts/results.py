"""The page of results, docs/results.md, from the files in docs/results/. usage:

python scripts/results.py                                        writes the page
python scripts/results.py add NAME --from RUN --title TITLE --command "COMMAND" --seeds "0"
                                                                 makes docs/results/NAME.json of RUN/evaluation.json, which
                                                                 names commit and machine; --commit and --machine replace them

docs/results/peer_quality/ holds the pieces of scripts/bench/peer_quality.py, of which the page gives the figures.

A file holds a ``title``, an ``order`` on the page, perhaps a ``note``, and ``rows``. Each row names its ``figure`` and ``value``
(a number or words), and where it comes from: ``command``, ``commit``, ``machine``, ``date`` and ``seeds``, null where that was not
noted at the time. Optional are ``unit``, ``interval`` and ``goal``. What all rows have in common may stand under ``all``.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
ORIGIN = ("command", "commit", "machine", "date", "seeds")
FIELDS = {"figure", "value", "unit", "interval", "goal", *ORIGIN}
GOALS = {
    "prior_time_to_peer_quality": "≥ 4 at the lower end",
    "decoder_time_to_peer_quality": "≥ 4 at the lower end",
    "sampling_to_equal_kid_vs_dalle2_pytorch": "≥ 8",
}
HEAD = """# Results

Written by `python scripts/results.py` from [docs/results/](results/); do not edit. Every row says which command found it, at which
commit, on which machine, with which seeds; a dash means that this was not noted at the time. What the figures mean:
[evaluation.md](evaluation.md), [recipes.md](recipes.md) and [benchmarks.md](benchmarks.md), which also tell how they came about.
"""
COLUMNS = ("figure", "value", "interval", "goal", "command", "commit", "machine", "date", "seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with results/, which gets results.md")
    commands = parser.add_subparsers(dest="what")
    add = commands.add_parser("add")
    add.add_argument("name")
    add.add_argument("--from", dest="run", type=Path, required=True, help="an evaluated run")
    for option in ("title", "command", "seeds"):
        add.add_argument(f"--{option}", required=True)
    for option in ("commit", "machine"):
        add.add_argument(f"--{option}", help="where evaluation.json does not say it, or says too little")
    asked = parser.parse_args()
    try:
        if asked.what == "add":
            write_result(asked)
        (asked.docs / "results.md").write_text(page(asked.docs / "results"), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")


def page(folder: Path) -> str:
    """The page in Markdown. ValueError, with file and row, for one that lacks something."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    found += side_by_side(folder / "peer_quality")
    found.sort(key=lambda content: (content.get("order", 100), content["title"]))
    parts = [HEAD]
    for content in found:
        parts += [f"\n## {content['title']}\n"]
        parts += [f"\n{content['note']}\n"] if content.get("note") else []
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(cell(row, column) for column in COLUMNS)} |" for row in content["rows"]]
        parts += ["\n" + "\n".join(lines) + "\n"]
    return "".join(parts)


def side_by_side(folder: Path) -> list[dict[str, Any]]:
    """What the complete pieces of the comparison with dalle2-pytorch say, in the form of a file; nothing without any."""
    if not folder.is_dir():
        return []
    sys.path.insert(0, str(Path(__file__).parent / "bench"))
    from quality_pieces import Records, figures

    rows = []
    for stage, sides in Records(folder).complete().items():
        Records(folder).refuse_mixtures(piece for of in sides.values() for piece, _ in of)
        records = [json.loads(Records(folder).path(piece).read_text()) for of in sides.values() for piece, _ in of]
        steps = records[0]["sampling"]
        origin = {name: joined(record[name] for record in records) for name in ("command", "commit", "date")}
        origin["machine"] = joined(
            f"{record['machine']['threads']} of {record['machine']['cores']} cores, {record['machine']['cpu']}"
            for record in records
        )
        origin["seeds"] = joined(str(piece.seed) for of in sides.values() for piece, _ in of)
        for name, value in figures(stage, sides, steps["curve"]["unclip"], steps["readme"]).items():
            ends = [rounded(value["min"]), rounded(value["max"])]
            goal = {"goal": GOALS[name]} if name in GOALS else {}
            rows.append({"figure": name, "value": rounded(value["median"]), "interval": ends, **goal, **origin})
    return [{"title": "Side by side with dalle2-pytorch", "order": 90, "rows": rows}] if rows else []


def joined(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def read(path: Path) -> dict[str, Any]:
    """One file, its rows complete."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content.get("title") or not content.get("rows"):
        raise ValueError(f"{path} needs a title and rows")
    for i, row in enumerate(content["rows"]):
        row = {**content.get("all", {}), **row}
        content["rows"][i] = row
        lacking = [name for name in ("figure", "value", *ORIGIN) if name not in row]
        if lacking:
            raise ValueError(
                f"{path}, row {i + 1} does not say its {', '.join(lacking)}; null means that it was not noted"
            )
        if unknown := sorted(set(row) - FIELDS):
            raise ValueError(f"{path}, row {i + 1} has {', '.join(unknown)}; known are {', '.join(sorted(FIELDS))}")
    return content


def cell(row: dict[str, Any], column: str) -> str:
    value, unit = row.get(column), f" {row['unit']}" if row.get("unit") else ""
    if column == "interval":
        return f"{value[0]} to {value[1]}" if value else ""
    if column == "goal":
        return "" if value is None else f"{value}"
    if value is None:
        return "—"
    if column == "command":
        return f"`{value}`" if "`" not in value else value
    return str(value).replace("|", "\\|") + (unit if column == "value" else "")


def write_result(asked: argparse.Namespace) -> None:
    """A file of the figures that ``unclip-evaluate`` found."""
    source = asked.run / "evaluation.json"
    if not source.exists():
        raise ValueError(f"there is no {source}; run unclip-evaluate first")
    found = json.loads(source.read_text())
    common = {"command": asked.command, "seeds": asked.seeds}
    for name in ("commit", "machine"):
        common[name] = getattr(asked, name) or found.get(name)
        if not common[name]:
            raise ValueError(
                f"{source} does not say its {name}: it is of an older unclip, or not of a checkout; give --{name}"
            )
    common["date"] = time.strftime("%Y-%m-%d", time.gmtime(source.stat().st_mtime))
    rows = [
        {"figure": name, "value": rounded(value)} | _interval(found, name) for name, value in found["measures"].items()
    ]
    path = asked.docs / "results" / f"{asked.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": asked.title, "all": common, "rows": rows}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _interval(found: dict[str, Any], name: str) -> dict[str, Any]:
    interval = found.get("intervals", {}).get(name)
    return {"interval": [rounded(end) for end in interval]} if interval else {}


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
