"""The benchmark of the loader's rows at its smallest: it runs, and checks that both sides hand over the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


def test_rows_of_the_loader_smoke() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "loader.py"), "--smoke"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("rows_vs_take", "rows_per_s", "take_per_s", "reader_per_s"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    assert found["settings"]["batch"] == 4096


def test_pictures_of_the_loader_smoke() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "loader_pictures.py"), "--smoke"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("pictures_vs_decode_only", "unresized", "pictures_per_s"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    assert found["settings"]["workers"] == 2
