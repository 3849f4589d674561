"""scripts/ablate_decoder.py: its tables from known figures, and (slow) the whole script at a tiny size."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests_support import environment

SCRIPT = Path(__file__).parents[1] / "scripts" / "ablate_decoder.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("ablate_decoder")


def test_bold_is_the_smallest_number_of_steps_within_five_percent_of_the_best(script: ModuleType):
    kids = {(sampler, n): 200.0 for sampler in script.SAMPLERS for n in script.STEPS}
    kids |= {("heun", 64): 100.0, ("unipc", 16): 104.9, ("ddim", 16): 105.1}
    lines = script.steps_table("v simple", kids).splitlines()
    assert lines[:2] == ["| v simple, sampler | 4 | 8 | 16 | 32 | 64 |", "|---|---|---|---|---|---|"]
    assert "| unipc | 200 | 200 | **105** | 200 | 200 |" in lines
    assert "| ddim | 200 | 200 | 105 | 200 | 200 |" in lines
    assert "| heun | 200 | 200 | 200 | 200 | 100 |" in lines


def test_a_parametrisation_has_no_figure_for_a_weighting_that_it_does_not_allow(script: ModuleType):
    kids = {f"{predict} {weighting}": 150.0 for predict, weighting in script.trained()}
    assert len(kids) == 13
    assert script.weightings_table(kids).splitlines()[-1] == "| flow | 150 |  |  |  |"


def test_a_cell_that_cannot_be_trained_ends_it_with_that_commands_words(tmp_path: Path):
    given = ["--data", "nowhere", "--embeddings", "nowhere", "--clip", "nowhere", "--out", "out"]
    command = [sys.executable, str(SCRIPT), *given]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_cell_is_trained_and_drawn_once(styled_chain: Path, tmp_path: Path):
    out = tmp_path / "ablations"
    given = ["--data", styled_chain / "data", "--embeddings", styled_chain / "embeddings", "--out", out]
    given += ["--clip", styled_chain / "runs" / "clip", "--steps", "2", "--num", "8", "--set"]
    given += ["model.net.channels=[16,32]", "model.net.attention_levels=[1]", "model.net.groups=8", "data.max_val=8"]

    def ablate() -> str:
        command = [sys.executable, str(SCRIPT), *map(str, given), "trainer.batch_size=8"]
        return subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout

    said = ablate()
    kids = {path.stem: json.loads(path.read_text()) for path in (out / "kid").iterdir()}
    assert len(kids) == 13 + 34 + 10, "the chosen sampler and guidance are drawn once, in the first table"
    assert all(found["num"] == 8 for found in kids.values())
    assert (out / "table.md").read_text() in said
    assert ": KID " not in ablate(), "drawn again"
