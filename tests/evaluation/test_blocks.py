"""Blocks of rows on disk: shared out among ranks, kept, and never mixed with those of something else."""

import re
from pathlib import Path

import pytest
import torch

from unclip.errors import ConfigError, DataError
from unclip.evaluation.blocks import BLOCK, Blocks, Ranks


def test_ranks_share_all_rows_without_overlap():
    for count in (1, 2, 3, 7):
        found = [pair for rank in range(count) for pair in Ranks(rank, count).mine(5 * BLOCK + 3)]
        assert sorted(block for block, _ in found) == list(range(6))
        assert sorted(row for _, rows in found for row in rows) == list(range(5 * BLOCK + 3))
    assert list(Ranks(3, 4).mine(BLOCK)) == [], "a rank may have nothing to do"


def test_rows_come_back_by_number_whoever_wrote_them(tmp_path: Path):
    rows = torch.randn(2 * BLOCK + 5, 3)
    store = Blocks(tmp_path / "f", len(rows), {"net": "a"})
    for block in (2, 0):
        store.write(block, rows[block * BLOCK : (block + 1) * BLOCK])
    with pytest.raises(DataError, match=re.escape("000001.npy is missing: all ranks must see one run folder")):
        store.read()
    assert [store.has(block) for block in range(3)] == [True, False, True]
    Blocks(tmp_path / "f", len(rows), {"net": "a"}).write(1, rows[BLOCK : 2 * BLOCK])
    assert torch.equal(store.read(), rows)


def test_rows_of_something_else_are_refused(tmp_path: Path):
    Blocks(tmp_path / "f", 3, {"net": "a", "size": "8"})
    with pytest.raises(
        ConfigError, match=re.escape("(net: a there, b now; size: 8 there, None now): take another run")
    ):
        Blocks(tmp_path / "f", 3, {"net": "b"})
