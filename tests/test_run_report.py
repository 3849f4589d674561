"""report.html of one run folder: finished, unfinished, damaged, of an evaluation, of embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import Page
from torch import nn

from unclip import artifact, drafts
from unclip.artifact import Manifest
from unclip.cli.report import write_report
from unclip.errors import UnclipError
from unclip.evaluation.sheet import save_picture
from unclip.report import page as page_module
from unclip.report.curves import MOST, draw_curves
from unclip.report.lineage import draw_lineage, find_nodes
from unclip.report.run import MOST_SHEETS, report_quietly, write_run_report

ODD = "<b>a 'red' \"cube\"</b> & <script>"
NOTHING = {"seconds": 0.0, "cpu_seconds": 0.0, "minutes": 0.0}


def save(run: Path, kind: str, bias: float, parents: dict[str, str]) -> str:
    """An artifact of a certain content; returns its hash."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, bias)
    nn.init.constant_(model.weight, bias)
    manifest = Manifest(kind, kind, {}, {}, parents=parents, step=40, samples=320, data="f" * 64)
    manifest.metrics = {"val/mse": 0.25, "val/odd": float("nan"), "seconds": 8.0}
    artifact.save(run, model, manifest)
    return artifact.read_manifest(run).hash


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A prior with 20 sheets, beside its CLIP, whose own start is not there."""
    clip = save(tmp_path / "clip", "clip", 1.0, {"start": "0123456789abcdef" * 4})
    run = tmp_path / "prior"
    save(run, "prior", 2.0, {"clip": clip})
    rows = [{"step": s, "train/mse": 4.0 / s, "train/samples_per_second": 10.0 * s} for s in (10, 20, 40)]
    rows.append({"step": 40, "val/mse": 0.25, "val/odd": float("nan")})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(f"run: {ODD}\n")
    for step in range(1, 21):
        pixels = np.full((4, 4, 3), step, np.uint8)
        save_picture(Image.fromarray(pixels), run / "samples" / f"step-{step:08d}.png")
    (run / "samples" / "captions.json").write_text(json.dumps([ODD, "a blue cone"]))
    return run


def read(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_a_finished_run(run: Path):
    write_report(run, NOTHING)
    page, clip = read(run), artifact.read_manifest(run.parent / "clip").hash
    own = artifact.read_manifest(run).hash
    assert "A prior: model prior, step 40, 320 samples seen" in page.text
    assert page.links == [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(page.links) == MOST_SHEETS
    for shown in ("step 1", "step 20", "8 of 20 sheets", "8 s", "train/mse: 0.4 to 0.1 in 40 steps"):
        assert shown in page.text, shown
    assert "samples a second, median of the log's rows200" in page.text
    assert "steps a second5" in page.text
    assert "val/oddnan" in page.text
    for digest in (own, clip, "0123456789abcdef" * 4, "f" * 64):
        assert digest in page.text, "lineage names each ancestor by its whole hash"
    assert page.tags.count("svg") == 3, "mse, samples a second, lineage"
    assert "not in this folder" in page.text


def test_what_people_wrote_is_shown_not_run(run: Path):
    write_run_report(run)
    page = read(run)
    assert not {"script", "b", "link", "iframe"} & set(page.tags)
    assert page.text.count(ODD) == 2, "as a caption and within the settings"


def test_a_run_that_has_not_finished(run: Path):
    (run / "artifact").unlink()
    write_run_report(run)
    assert "No artifact yet: this run has not finished." in read(run).text
    assert "train/mse: 0.4 to 0.1" in read(run).text


def test_a_damaged_artifact_is_told_in_words(run: Path):
    (run / "artifact" / "manifest.json").write_text("{")
    write_run_report(run)
    assert "The artifact cannot be read:" in read(run).text


def test_an_evaluation(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"measures": {"recall_1": 0.75}}))
    write_run_report(tmp_path)
    assert "recall_10.75" in read(tmp_path).text


def test_a_folder_that_is_no_run_and_times_for_one_run_are_refused(run: Path, tmp_path: Path):
    with pytest.raises(UnclipError, match=r"holds neither metrics\.jsonl nor an artifact"):
        write_run_report(tmp_path / "nothing")
    with pytest.raises(UnclipError, match="is one run, which keeps its own times"):
        write_report(run, {**NOTHING, "seconds": 3.0})


def test_a_full_disk_costs_the_page_only(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unclip.report.run.write_page", full)
    monkeypatch.setattr("unclip.report.run.log.disabled", False)
    report_quietly(run)
    assert "`unclip report" in caplog.text
    assert not (run / "report.html").exists()


def test_a_damaged_log_costs_the_page_only(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = run / "metrics.jsonl"
    rows.write_text('{"step": 1, "tr\n' + rows.read_text())
    (run / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr("unclip.report.run.log.disabled", False)
    report_quietly(run)
    assert "report.html could not be written" in caplog.text
    assert not (run / "report.html").exists()


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(drafts.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        page_module.write_page(tmp_path / "report.html", "t", ["new"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_long_and_negative_curves():
    rows = [{"step": s, "train/cosine": s / 5000 - 0.5} for s in range(1, 10_001)]
    (drawn,) = draw_curves(rows)
    line = drawn.split("points='")[1].split("'")[0].split()
    assert len(line) <= MOST + 1
    assert line[0] == "52.0,170.0", "the lowest value stands in the left lower corner"
    assert line[-1] == "330.0,40.0", "the last and highest in the right upper one"
    assert "log scale" not in drawn


def test_curves_share_a_picture_and_leave_out_what_is_not_finite():
    rows = [{"step": 1, "train/mse": 1.0, "val/mse": float("inf")}, {"step": 2, "train/mse": 0.1, "val/mse": 0.3}]
    rows += [{"step": 3, "val/mse": 0.2, "val/alone": 1.0}]
    (drawn,) = draw_curves(rows)
    assert drawn.count("<polyline") == 2
    assert "train/mse: 1 to 0.1 in 2 steps" in drawn
    assert "log scale" in drawn
    assert "val/mse: 0.3 to 0.2 in 3 steps" in drawn
    assert draw_curves(rows, ["vlb"]) == []


def test_lineage_places_parents_left_of_children(run: Path):
    nodes = find_nodes([run, run.parent / "clip", run.parent / "none"])
    drawn = draw_lineage(nodes)
    x = {
        name: int(drawn.split(f">{name}</text>")[0].rsplit("<text x='", 1)[1].split("'")[0])
        for name in ("clip", "prior")
    }
    assert x["clip"] < x["prior"]
    assert drawn.count("<path") == 2
    assert drawn.count("stroke-dasharray") == 1, "the start that is not in this folder"
    assert draw_lineage({}) == ""
