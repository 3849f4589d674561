"""The wheel alone is enough: it holds the configurations and its commands run outside the repository."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tests_support import TINY

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that has the wheel, and borrows every other package from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    packages = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # A path in a .pth file is added without the .pth files in it: the editable install of this repository stays behind.
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder)
    return python.parent


def run(command: list[str], cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, env={**clean, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


def test_the_commands_help_and_train_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    where = run([str(installed / "python"), "-c", "import unclip; print(unclip.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert Path(where.strip()).with_name("py.typed").exists(), "type checkers read the annotations"
    assert "doctor" in run([str(installed / "unclip"), "--help"], tmp_path)
    assert "run: ???" in run([str(installed / "train-prior"), "--help"], tmp_path)
    shown = run([str(installed / "train-prior"), "launch=slurm", "--cfg", "hydra"], tmp_path)
    assert "hydra_plugins.unclip_launcher.SlurmLauncher" in shown
    script = run([str(installed / "python"), "-c", "from unclip.cli.launch import SCRIPT; print(SCRIPT)"], tmp_path)
    assert "exec unclip job" in Path(script.strip()).read_text()
    run([str(installed / "unclip"), "data", "shapes", "--out", "data", "--num", "64", "--size", "16"], tmp_path)
    one_step = [*TINY["clip"], "trainer.max_steps=1", "run=run", "data.path=data"]
    run([str(installed / "train-clip"), *one_step], tmp_path)
    assert (tmp_path / "run" / "artifact" / "manifest.json").exists()
