"""report.html and summary.json of a folder of runs, whole or in parts."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.report import write_report
from unclip.cli.verdict import COLUMNS
from unclip.errors import UnclipError
from unclip.evaluation.sheet import save_picture

RECORD = {"seconds": 61.0, "cpu_seconds": 122.0, "minutes": 15.0}
ODD = "<script>\"a\" & 'b'"


class Page(HTMLParser):
    """The tags, the sources and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / ODD
    for step, name in ((8, "clip"), (40, "<i>prior")):
        stage = runs / name
        manifest = Manifest("clip", "clip", {}, {}, step=step, samples=8 * step)
        manifest.metrics = {"val/mse": 0.25, "seconds": 3.0}
        artifact.save(stage, nn.Linear(1, 1), manifest)
        rows = [{"step": s, "train/mse": 1.0 / s} for s in (2, 4, 8)]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_picture(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), stage / "samples" / "step-00000008.png")
    return runs


def add_the_rest(runs: Path) -> None:
    row = {f"{k}{end}": 0.5 for k in ("objects", "pairs", "relations") for end in ("", "_low", "_high")}
    (runs / "verdict").mkdir()
    (runs / "verdict/verdict.json").write_text(json.dumps({name: {**row, "product": 0.125} for name in COLUMNS}))
    (runs / "measures.json").write_text(json.dumps({"test_cosine": 0.75}))
    (runs / "timings.jsonl").write_text(json.dumps({"command": f"unclip {ODD}", "seconds": 12.3}) + "\n")
    for path in (runs / "verdict" / "verdict.png", runs / f"{ODD}.png", runs / "pictures" / "sheet.png"):
        save_picture(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), path)


def read(runs: Path) -> tuple[Page, dict]:
    return Page((runs / "report.html").read_text()), json.loads((runs / "summary.json").read_text())


def test_a_whole_folder(runs: Path):
    add_the_rest(runs)
    write_report(runs, RECORD)
    page, summary = read(runs)
    assert summary.items() >= {**RECORD, "test_cosine": 0.75}.items()
    assert set(summary["oracle"]) == set(COLUMNS)
    assert summary["stages"]["clip"].items() >= {"step": 8, "samples": 64, "val/mse": 0.25, "seconds": 3.0}.items()
    assert summary["commands"] == [{"command": f"unclip {ODD}", "seconds": 12.3}]
    assert page.links == [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(page.links) == 5, "verdict, one of the folder, generated ones, and a sheet for each stage"
    assert page.tags.count("svg") == 2
    assert "train/mse: 0.5 to 0.125 in 8 steps" in page.text
    assert "61 s on the clock, 122 s of CPU time." in page.text
    assert "50.0 % [50\u201350]" in page.text


def test_names_and_commands_are_shown_not_run(runs: Path):
    add_the_rest(runs)
    write_report(runs, RECORD)
    page, _ = read(runs)
    assert not {"script", "i", "link", "iframe", "object"} & set(page.tags)
    for shown in (str(runs), f"unclip {ODD}", "<i>prior"):
        assert shown in page.text


def test_what_is_missing_is_left_out(runs: Path):
    (runs / "clip" / "metrics.jsonl").unlink()
    write_report(runs, {"seconds": 0.0, "cpu_seconds": 0.0, "minutes": 0.0})
    page, summary = read(runs)
    assert set(summary) == {"seconds", "cpu_seconds", "minutes", "stages", "commands"}
    assert list(summary["stages"]) == ["<i>prior"]
    assert "oracle" not in page.text
    assert "on the clock" not in page.text
    assert "Commands" not in page.text


def test_a_line_cut_short_by_a_crash_is_skipped(runs: Path):
    with (runs / "clip" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/m')
    write_report(runs, RECORD)
    assert read(runs)[0].text.count("train/mse: 0.5 to 0.125 in 8 steps") == 2


def test_an_empty_folder_and_none_at_all(tmp_path: Path):
    write_report(tmp_path, RECORD)
    assert read(tmp_path)[1]["stages"] == {}
    with pytest.raises(UnclipError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere", RECORD)
