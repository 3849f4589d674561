"""A run on a full disk ends in one message, leaves no half file, and goes on when there is room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_support import TINY, lacks, run_command


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, less than one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        lacks("tmpfs", "mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=tmp_path)
    given = ["train-upsampler", "run=disk/run", "data.path=data", *TINY["upsampler"], "logger=none"]
    said = run_command(*given, cwd=tmp_path, code=1)
    # the first to find the disk full: the thread that writes the checkpoint, or the step that goes on meanwhile
    assert "last.ckpt could not be written" in said or "metrics.jsonl could not be written" in said
    assert "Free disk space there" in said
    assert "Traceback" not in said
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    run_command(*given, cwd=tmp_path)
    assert (small_disk / "run" / "artifact" / "weights.safetensors").exists()


def test_a_full_disk_under_a_data_set_is_one_message(small_disk: Path, tmp_path: Path) -> None:
    said = run_command(
        "unclip", "data", "shapes", "--out", "disk/data", "--num", "900", "--size", "64", cwd=tmp_path, code=1
    )
    assert "no space left" in said
    assert not [path for path in small_disk.rglob("*") if path.is_file()]
