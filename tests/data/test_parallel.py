"""Threads that work a little ahead, and how many of them there may be."""

import os

import pytest

from unclip.data.parallel import in_order, num_cores


def test_results_come_in_order_and_the_first_error_in_its_turn():
    assert list(in_order(lambda n: n * n, range(20), 3)) == [n * n for n in range(20)]
    found = in_order(lambda n: 6 // (2 - n), range(20), 3)
    assert [next(found), next(found)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_cores_are_counted_also_where_a_process_cannot_be_bound_to_some(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert num_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_cores() == os.cpu_count()
