"""Every benchmark runs at its smallest size and ends in the JSON line that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import environment

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
RATIOS = {"embed": {"embed_vs_bare", "embed_vs_bare_torch_threads"}}  # of each script, at the least
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem in RATIOS)


def test_every_benchmark_promises_ratios():
    helpers = {"turns"}
    main = 'if __name__ == "__main__":'
    assert {p.stem for p in BENCH.glob("*.py") if main in p.read_text()} - helpers == set(RATIOS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(name: str):
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), "--smoke"],
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["benchmark"] == name
    assert RATIOS[name] <= set(said)
    for ratio in RATIOS[name]:
        assert 0 < said[ratio]["min"] <= said[ratio]["median"] <= said[ratio]["max"]
    assert said["settings"]["size"] == "smoke"
