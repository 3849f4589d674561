"""The page's parts that need no browser: header, runs by name, what a picture is."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio")
from unclip.jobs import Picture
from unclip.ui import page, panel
from unclip.ui.studio import Studio
from unclip.ui.worker import State, Task

ODD = "<script>alert(1)</script>"


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "runs" / "decoder").mkdir(parents=True)
    (tmp_path / "runs" / "decoder" / "metrics.jsonl").write_text("")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text("")
    return Studio(tmp_path / "runs", tmp_path / "files")


@pytest.mark.parametrize("name", ["../secret", "/etc", "decoder/../../secret", "", None, 3, ["decoder"], ODD])
def test_only_runs_below_the_folder_are_shown(studio: Studio, name: object):
    assert "There is no such run; look again." in page._told(studio, name)


def test_a_run_is_shown_and_a_damaged_one_told(studio: Studio):
    assert "has not finished" in page._told(studio, "decoder")
    (studio.runs / "decoder" / "metrics.jsonl").write_text("{\n")
    assert "decoder cannot be shown" in page._told(studio, "decoder")


def test_the_header_says_why_nothing_can_be_drawn(studio: Studio):
    assert "Nothing can be drawn now:" in page._header(studio)


def test_what_people_wrote_is_escaped():
    picture = Picture(
        torch.zeros(3, 1, 1, dtype=torch.uint8), ODD, 3, {"clip": "a" * 64}, {"negative": ODD, "eta": 1.0}
    )
    shown = panel._details(picture)
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "a" * 12 in shown
    assert "a" * 13 not in shown
    assert "<script>" not in panel._failed(ODD)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State.waiting, "Waiting: 2 requests before yours."),
        (State.running, "Drawing: step 3 of 12"),
        (State.cancelled, "Cancelled."),
        (State.failed, "&lt;bad&gt;"),
        (State.done, "Done: 0 pictures, 1.5 s."),
    ],
)
def test_the_state_of_a_request_in_words(state: State, said: str):
    task = Task(lambda progress: iter(()), state, step=3, num_steps=12, seconds=1.5, error="<bad>", notes=[ODD, ODD])
    shown = panel._status(task, 2, "")
    assert said in shown
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") == (0 if state is State.waiting else 1)
    assert json.dumps(shown)
