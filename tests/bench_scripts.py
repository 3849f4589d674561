"""The benchmarks of scripts/bench: run at their smallest, or loaded as modules."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests_support import environment

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
PEER = BENCH.parents[1] / ".venv-peer" / "bin" / "python"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark or worker as a module, for this test only."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def smoke(
    name: str, *arguments: str, folder: Path = BENCH, **variables: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The ended process of ``folder/NAME.py --smoke``, and its last line as JSON; ``variables`` of its environment."""
    done = subprocess.run(
        [sys.executable, str(folder / f"{name}.py"), "--smoke", *arguments],
        capture_output=True, text=True, env=environment() | variables, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads(done.stdout.splitlines()[-1])
