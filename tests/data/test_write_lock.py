"""Two commands that write to one folder, and one that was killed while it wrote."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from picture_sets import noise

from unclip.data import emoji, folder, shapes
from unclip.data.shards import Shards, ShardWriter
from unclip.errors import DataError, UnclipError

WRITE = """
import sys
from pathlib import Path
from unclip.data.shards import ShardWriter
from unclip.data.write_lock import WriteLock
with WriteLock(Path(sys.argv[1]), ["train", "val"]), ShardWriter(Path(sys.argv[1]) / "train", 1) as train:
    train.write("a", b"picture", "caption", {})
    with ShardWriter(Path(sys.argv[1]) / "val") as val:  # it is complete, and train is not
        val.write("b", b"picture", "caption", {})
    print("half done", flush=True)
    sys.stdin.read()
    train.write("c", b"picture", "caption", {})
"""


@contextmanager
def half_done(out: Path) -> Iterator[subprocess.Popen]:
    """A process that has written a part of what it writes to ``out`` and goes on when its standard input ends."""
    command = [sys.executable, "-c", WRITE, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half done\n"
        yield process
    finally:
        process.communicate()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    src = tmp_path / "src"
    src.mkdir()
    for i in range(4):
        (src / f"{i}.png").write_bytes(noise(i))
        (src / f"{i}.txt").write_text(f"picture {i}")
    return src


def write_shapes(out: Path, pictures: Path) -> None:
    shapes.write_shapes(out, num=8, size=16, workers=1)


def write_folder(out: Path, pictures: Path) -> None:
    folder.write_folder(pictures, out, val=0)


def write_emoji(out: Path, pictures: Path) -> None:
    emoji.write_emoji(out, sizes=(64,), workers=1)


def write_shards(out: Path, pictures: Path) -> None:
    with ShardWriter(out / "train") as writer:
        writer.write("a", b"picture", "caption", {})


@pytest.mark.parametrize("write", [write_shapes, write_folder, write_emoji, write_shards])
def test_a_second_writer_is_refused_by_name_and_the_first_loses_nothing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr(emoji, "_read_sources", lambda cache, tones: [])
    out = tmp_path / "out"
    (out / "64.tmp").mkdir(parents=True)
    with half_done(out) as process:
        with pytest.raises(UnclipError, match=rf'in use by .*"pid": {process.pid}, .*or write to another folder'):
            write(out, pictures)
        with pytest.raises(DataError, match="val already holds 00000"), ShardWriter(out / "val"):
            pass
    assert process.returncode == 0
    assert (Shards(out / "train").keys, Shards(out / "val").keys) == (["a", "c"], ["b"])
    assert (out / "64.tmp").is_dir()
    assert not list(out.rglob(".writing"))


@pytest.mark.parametrize("write", [write_shapes, write_folder])
def test_what_a_killed_process_left_is_replaced(
    tmp_path: Path, pictures: Path, write: Callable[[Path, Path], None]
) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    with half_done(out) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert (out / "train/00000.tar").exists()
    assert (out / "val/index.json").exists()
    write(out, pictures)
    write(expected, pictures)
    assert contents(out) == contents(expected)


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_killed_command_can_be_repeated(tmp_path: Path, pictures: Path) -> None:
    """As a user sees it: the command itself is killed when it has two shards, by its own hand, and given again."""
    killed = """
import os, signal, sys
from unclip.cli.app import main
from unclip.data import folder
class Dies(folder.ShardWriter):
    def __init__(self, place):
        super().__init__(place, 1)
    def _close(self):
        super()._close()
        if len(self._entries) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
folder.ShardWriter = Dies
main()
"""
    out = tmp_path / "out"
    given = ["data", "folder", str(pictures), "--out", str(out), "--val", "0"]
    assert subprocess.run([sys.executable, "-c", killed, *given], check=False).returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.rglob("*.tar")) == ["00000.tar", "00001.tar"]
    command = [sys.executable, "-c", "from unclip.cli.app import main; main()", *given]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert len(Shards(out / "train")) == 4
    assert json.loads((out / "report.json").read_text())["written"] == {"train": 4}


def test_shards_of_others_are_never_taken_for_a_killed_writers(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.tar").write_bytes(b"somebody's")
    for _ in range(2):
        with pytest.raises(DataError, match=r"train already holds a\.tar; remove the folder"):
            write_shards(tmp_path, tmp_path)
    assert contents(tmp_path) == {"train/a.tar": b"somebody's"}


def test_a_mark_that_goes_before_it_is_locked_is_no_killed_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".writing").write_text("the first writer")
    lock = os.fstat

    def first_ends(file: int) -> os.stat_result:
        if (tmp_path / ".writing").exists() and not (tmp_path / "index.json").exists():
            (tmp_path / ".writing").unlink()
            (tmp_path / "a.tar").write_bytes(b"the first writer's")
            (tmp_path / "index.json").write_text("{}")
        return lock(file)

    monkeypatch.setattr(os, "fstat", first_ends)
    with pytest.raises(DataError, match="already holds"), ShardWriter(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index.json"]
