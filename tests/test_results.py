"""docs/results.md is what scripts/results.py makes of docs/results/, and no row hides where it comes from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "results.py"


def run(*words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    return tmp_path


def test_the_page_is_what_its_command_writes(docs: Path):
    """What `git diff --exit-code` would say after `python scripts/results.py`."""
    run("--docs", str(docs))
    assert (docs / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text(), (
        "run python scripts/results.py"
    )


UNKNOWN = {  # cells that say "not noted", by figure and column, and why nothing else can be said
    ("unresized, JPEGs of 256 px", "commit"): "docs/data.md noted the day and the machine only",
}


def test_every_row_names_command_commit_machine_and_seeds(docs: Path):
    run("--docs", str(docs))
    lines = [line for line in (docs / "results.md").read_text().splitlines() if line.startswith("| ")]
    head = [cell.strip("| ") for cell in lines[0].split(" | ")]
    rows = [line for line in lines if line != lines[0]]
    total = sum(len(json.loads(path.read_text())["rows"]) for path in (docs / "results").glob("*.json"))
    if (docs / "results" / "peer_quality").exists():  # its rows are made of whole pieces
        assert len(rows) > total > 100
    else:
        assert len(rows) == total > 100
    assert head == ["figure", "value", "interval", "goal", "command", "commit", "machine", "date", "seeds"]
    lacking = set()
    for row in rows:
        cells = dict(zip(head, (cell.strip("| ") for cell in row.split(" | ")), strict=True))
        optional = {"interval", "goal"}
        lacking |= {(cells["figure"], name) for name in cells if name not in optional and cells[name] in ("", "—")}
    assert lacking == set(UNKNOWN)


@pytest.mark.parametrize("name", ["command", "commit", "machine", "date", "seeds", "value"])
def test_a_row_that_lacks_its_origin_is_refused(docs: Path, name: str):
    path = docs / "results" / "demo-15.json"
    content = json.loads(path.read_text())
    content["all"].pop(name, None)
    content["rows"][2].pop(name, None)
    path.write_text(json.dumps(content))
    said = run("--docs", str(docs), code=1)
    assert f"does not say its {name}; null means that it was not noted" in said
    assert not (docs / "results.md").exists()


def test_a_misspelt_field_is_refused(docs: Path):
    path = docs / "results" / "emoji.json"
    content = json.loads(path.read_text())
    content["rows"][0]["gaol"] = 1
    path.write_text(json.dumps(content))
    assert "emoji.json, row 1 has gaol; known are" in run("--docs", str(docs), code=1)


def test_an_evaluation_becomes_rows(docs: Path, tmp_path: Path):
    (tmp_path / "seen").mkdir()
    found = {"measures": {"lite0/kid": 12.34567}, "intervals": {"lite0/kid": [11.0, 13.987654]}}
    found |= {"commit": "0123abc", "machine": "2 cores, torch 2"}
    (tmp_path / "seen" / "evaluation.json").write_text(json.dumps(found))
    given = [
        "add",
        "seen",
        "--from",
        str(tmp_path / "seen"),
        "--title",
        "Seen",
        "--command",
        "unclip-evaluate pictures",
    ]
    run("--docs", str(docs), *given, "--seeds", "0")
    assert (
        "| lite0/kid | 12.35 | 11.0 to 13.99 |  | `unclip-evaluate pictures` | 0123abc | 2 cores, torch 2 | 2"
        in (docs / "results.md").read_text()
    )
    run("--docs", str(docs), *given, "--seeds", "0", "--machine", "a small one")
    assert "| 0123abc | a small one | 2" in (docs / "results.md").read_text()
    del found["commit"]
    (tmp_path / "seen" / "evaluation.json").write_text(json.dumps(found))
    said = run("--docs", str(docs), *given, "--seeds", "0", code=1)
    assert "does not say its commit: it is of an older unclip, or not of a checkout; give --commit" in said
    said = run("--docs", str(docs), *given[:3], str(tmp_path), *given[4:], "--seeds", "0", code=1)
    assert "run unclip-evaluate first" in said
