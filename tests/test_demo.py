"""scripts/demo.sh and scripts/emoji.sh: what they refuse, and (slow) the demo to its end; `make` sets up once."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from doc_check import check
from doc_pages import Command
from test_probe_scripts import script, stand_ins  # noqa: F401  the fixture
from tests_support import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["demo.sh", "emoji.sh"])
def test_minutes_that_are_no_number_are_refused_before_anything_is_made(name: str, tmp_path: Path):
    assert "error: x is not a number of minutes" in script(name, "x", str(tmp_path / "runs"), code=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["demo.sh", "emoji.sh"])
def test_another_number_of_minutes_is_refused_where_a_chain_is(name: str, tmp_path: Path):
    """Its CLIP would train on, and fit neither the embeddings nor the later stages any more."""
    (tmp_path / "minutes").write_text("15\n")
    assert f"{tmp_path} holds a chain of 15 minutes: give 15 again" in script(name, "45", str(tmp_path), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["minutes"]


def test_numbers_have_a_point_in_every_language():
    """awk and EPOCHREALTIME write a comma where the language has one, which Hydra reads as two values."""
    for path in (ROOT / "scripts").glob("*.sh"):
        text = path.read_text()
        assert "EPOCHREALTIME" not in text, path
        assert text.count("awk -v") + text.count("awk '") == text.count("LC_ALL=C awk "), path
    assert "LC_ALL=C awk " in (ROOT / "scripts" / "timed.sh").read_text()


@pytest.mark.parametrize("name", ["demo.sh", "emoji.sh"])
@pytest.mark.usefixtures("stand_ins")
def test_every_command_of_the_script_is_one(name: str, tmp_path: Path):
    """Each line that the script prints is looked up: programs, options, settings, presets. The stand-ins do nothing."""
    runs = tmp_path / "runs"
    said = script(name, "10", str(runs))
    lines = [line.removeprefix("$ ") for line in said.splitlines() if line.startswith("$ ")]
    for log in runs.glob("*.log"):
        lines += [line.removeprefix("$ ") for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert {"train-clip", "unclip-embed", "train-prior", "train-decoder", "train-upsampler"} <= {
        s.split()[0] for s in lines
    }
    for number, line in enumerate(lines):
        check(Command(ROOT / "scripts" / name, number, tuple(shlex.split(line))))
    minutes = [float(found) for found in re.findall(r"trainer\.max_minutes=([0-9.]+)", " ".join(lines))]
    assert sum(minutes) > 10, "some stages train side by side"
    assert max(minutes) < 7


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo_ends_with_a_verdict_and_a_report(tmp_path: Path):
    runs = tmp_path / "demo"
    said = script("demo.sh", "0.3", str(runs))
    assert f"Open {runs}/report.html" in said
    for stage in ("clip", "prior", "decoder", "upsampler"):
        assert json.loads((runs / stage / "artifact" / "manifest.json").read_text())["step"] > 0
    assert len(list((runs / "pictures").glob("0*.png"))) == 16
    summary = json.loads((runs / "summary.json").read_text())
    assert summary["minutes"] == 0.3
    assert min(summary["seconds"], summary["cpu_seconds"]) > 0.3 * 60
    assert set(summary["oracle"]) == {"on", "off", "true_embedding", "text_embedding", "caption_only"}
    for row in summary["oracle"].values():
        assert {"objects", "pairs", "relations"} <= set(row)
    commands = [json.loads(line)["command"] for line in (runs / "timings.jsonl").read_text().splitlines()]
    names = ["unclip data", "train-clip", "unclip-embed", "train-prior", "train-upsampler", "train-decoder"]
    names += ["unclip generate", "unclip verdict"]
    assert len(commands) == len(names)
    assert all(any(command.startswith(name) for command in commands) for name in names)
    finished = {path: path.stat().st_mtime_ns for path in runs.rglob("artifact/manifest.json")}
    shutil.rmtree(runs / "decoder")  # as if it had been stopped in there
    again = script("demo.sh", "0.3", str(runs))
    assert again.startswith(f"Going on in {runs} with what an earlier call has finished there")
    assert {p for p, changed in finished.items() if p.stat().st_mtime_ns != changed} == {
        runs / "decoder/artifact/manifest.json"
    }
    page = (runs / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 1
    assert "The oracle's verdict" in page


def planned(root: Path, *arguments: str) -> str:
    """What `make` would do in ``root``."""
    free = {name: value for name, value in environment().items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", *arguments], cwd=root, env=free, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_sets_up_only_once_and_anew_when_the_requirements_change(tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1000, 1000))
    assert "-m pip install" in planned(tmp_path, "setup")
    ready = tmp_path / ".venv" / "ready"
    ready.parent.mkdir()
    ready.touch()
    assert "pip" not in planned(tmp_path, "setup")
    assert planned(tmp_path, "demo", "MINUTES=3").splitlines() == ["scripts/demo.sh 3"]
    assert planned(tmp_path, "emoji").splitlines() == ["scripts/emoji.sh 72"]
    os.utime(ready, (500, 500))
    assert "-m pip install" in planned(tmp_path, "setup")
