"""One process in a run folder, whatever happens to the process before it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import TINY, run_command
from tiny_chain import write_tiny_chain

from unclip.data.shapes import write_shapes
from unclip.errors import UnclipError
from unclip.run_lock import RunLock

HOLD = """
import os, sys
from pathlib import Path
from unclip.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    helper = os.fork() if "fork" in sys.argv else None
    if helper != 0:
        print(helper or os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def hold(run: Path, *options: str) -> tuple[subprocess.Popen, int]:
    """A process that holds the lock until its standard input ends, and the number it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def close(process: subprocess.Popen) -> None:
    process.communicate()


def test_a_second_process_is_refused_by_name_until_the_first_ends(tmp_path: Path):
    run = tmp_path / "runs" / "a"
    process, pid = hold(run)
    try:
        with (
            pytest.raises(UnclipError, match=rf'{run} is in use by .*"pid": {pid}, .*choose another run=') as error,
            RunLock(run),
        ):
            pass
        assert os.uname().nodename in str(error.value)
    finally:
        close(process)
    with RunLock(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("options", [(), ("fork",)], ids=["alone", "with a worker that outlives it"])
def test_a_killed_process_lets_go(tmp_path: Path, options: tuple[str, ...]):
    process, number = hold(tmp_path, *options)
    try:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        if options:
            os.kill(number, 0)  # the worker still lives
        with RunLock(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    finally:
        close(process)


def test_an_error_in_the_block_lets_go(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        _ = 1 / 0
    close(hold(tmp_path)[0])


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_other_ranks_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    process, _ = hold(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(name, "1")
    try:
        with RunLock(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] != os.getpid()
    finally:
        close(process)


@pytest.mark.parametrize(
    "given",
    [
        ["train-upsampler", "run=run", "data.path=data", *TINY["upsampler"], "logger=none"],
        ["unclip-embed", "run=run", "clip=chain/clip", "data=data"],
    ],
    ids=lambda given: given[0],
)
def test_a_command_leaves_a_folder_in_use_as_it_is(tmp_path: Path, given: list[str]):
    write_shapes(tmp_path / "data", num=16, size=32, workers=1)
    write_tiny_chain(tmp_path / "chain")
    run = tmp_path / "run"
    process, pid = hold(run)

    def files() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}

    try:
        (run / "metrics.jsonl").write_text('{"step": 9, "train/mse": 1.0}\n')  # as of the process that is at work
        before = files()
        said = run_command(*given, cwd=tmp_path, code=1)
        assert "error: run is in use by" in said
        assert f'"pid": {pid}' in said
        assert "Traceback" not in said
        assert files() == before
    finally:
        close(process)
    run_command(*given, cwd=tmp_path)
    assert len(files()) > 2
