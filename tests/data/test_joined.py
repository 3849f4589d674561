"""Rows over all files of a column in one copy."""

import gc
from pathlib import Path

import numpy as np
import pytest

from unclip.data.joined import Joined


def files(folder: Path, sizes: list[int], shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
    rng, arrays = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        arrays.append((rng.normal(0, 1000, (size, *shape))).astype(dtype))
        np.save(folder / f"{number}.npy", arrays[-1])
    return arrays


def joined(folder: Path, sizes: list[int], shape: tuple[int, ...], dtype: str, opened: list[int]) -> Joined:
    def open_file(number: int) -> np.memmap:
        opened.append(number)
        return np.load(folder / f"{number}.npy", mmap_mode="r")

    return Joined(sizes, shape, np.dtype(dtype), open_file)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
@pytest.mark.parametrize("shape", [(768,), (77,), (5,), (1,), (3, 7), (1024,)])
def test_rows_are_those_of_the_files(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    sizes = [7, 1, 300, 64]
    arrays, opened = files(tmp_path, sizes, shape, dtype), []
    column = joined(tmp_path, sizes, shape, dtype, opened)
    rng = np.random.default_rng(1)
    which = rng.integers(0, len(sizes), 500)
    rows = rng.integers(0, np.array(sizes)[which])
    rows[:4], which[:4] = [6, 0, 299, 63], [0, 1, 2, 3]  # the last of each
    found = column.take(which, rows)
    assert np.array_equal(found, np.stack([arrays[f][r] for f, r in zip(which, rows, strict=True)]))
    assert found.flags.c_contiguous
    assert sorted(opened) == [0, 1, 2, 3], "each file is opened once"
    column.take(which, rows)
    assert len(opened) == 4


def test_only_what_is_asked_for_is_opened_and_rows_outlive_the_files(tmp_path: Path) -> None:
    arrays, opened = files(tmp_path, [4] * 9, (8,), "float16"), []
    column = joined(tmp_path, [4] * 9, (8,), "float16", opened)
    found = column.take(np.array([5, 5, 2]), np.array([0, 3, 1]))
    assert opened == [2, 5]
    del column
    gc.collect()
    assert np.array_equal(found, np.stack([arrays[5][0], arrays[5][3], arrays[2][1]]))


def test_a_range_is_given_back(tmp_path: Path) -> None:
    files(tmp_path, [1000], (64,), "float32")

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path / "0.npy"))

    column = joined(tmp_path, [1000], (64,), "float32", [])
    column.take(np.array([0]), np.array([999]))
    assert maps() >= 1
    del column
    gc.collect()
    assert maps() == 0


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    files(tmp_path, [4], (8,), "float16")
    with pytest.raises(ValueError, match=r"0\.npy has float16 rows of \(8,\) after 128 bytes"):
        joined(tmp_path, [4], (9,), "float16", []).take(np.array([0]), np.array([0]))
