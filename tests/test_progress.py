"""How far a long piece of work is: lines where there is no terminal, a bar where there is one, nothing from other ranks."""

import logging
import sys

import pytest

from unclip import progress
from unclip.progress import counted, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_line_each_half_minute_and_one_at_the_end(clock: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    for _ in track(range(8), "drawing", 8):
        clock[0] += 10
    assert lines(caplog) == ["drawing: 3 of 8, 50 s left", "drawing: 6 of 8, 20 s left", "drawing: 8 of 8, 0 s left"]


def test_short_work_says_nothing(clock: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    assert list(track(iter("abc"), "drawing", 3)) == ["a", "b", "c"]
    assert lines(caplog) == []


def test_other_ranks_say_nothing(clock: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with counted(100, "embedding", silent=True) as advance:
        for _ in range(10):
            clock[0] += 60
            advance(10)
    assert lines(caplog) == []


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2, 3, 4], "drawing", 4)) == [1, 2, 3, 4]
    found = capsys.readouterr()
    assert "drawing" in found.err
    assert "4/4" in found.err
    assert found.out == ""
