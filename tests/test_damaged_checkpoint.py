"""A checkpoint that is cut short, or holds code: one message, and nothing of it is run."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tests_support import TINY, Canary, run_command

from unclip.stages.parts import split, write_part

pytestmark = pytest.mark.timeout(300)
GIVEN = ["train-upsampler", "run=run", "data.path=data", *TINY["upsampler"], "logger=none"]
MORE = [*GIVEN, "trainer.max_steps=6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run of four steps."""
    root = tmp_path_factory.mktemp("damaged")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    run_command(*GIVEN, cwd=root)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy", symlinks=True)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def refused(root: Path, file: str) -> None:
    last = Path("run/checkpoints/last.ckpt")
    before = (root / "run/metrics.jsonl").read_bytes()
    said = run_command(*MORE, cwd=root, code=1)
    assert f"error: {Path('run/checkpoints') / file} is damaged or holds more than tensors; no code was run" in said
    assert f"or remove {last} to start anew" in said
    assert "Traceback" not in said
    assert "weights_only" not in said
    assert (root / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["zip", "plain"])
def test_code_in_a_checkpoint_is_not_run(root: Path, kind: str):
    canary, last = root / "canary", root / "run/checkpoints/last.ckpt"
    checkpoint = {**torch.load(last, weights_only=True), "loops": Canary(canary)}
    if kind == "zip":
        torch.save(checkpoint, last)
        torch.load(last, weights_only=False)
    else:
        last.write_bytes(pickle.dumps({"global_step": 4, "loops": Canary(canary)}))
        pickle.loads(last.read_bytes())
    canary.rmdir()  # it was there: the file does run code where it may
    refused(root, "last.ckpt")
    assert not canary.exists()


@pytest.mark.parametrize("what", ["cut short", "empty", "other tensors"])
def test_a_damaged_checkpoint_is_told_and_removing_it_helps(root: Path, what: str):
    last = root / "run/checkpoints/last.ckpt"
    if what == "cut short":
        cut(last)
    elif what == "empty":
        last.write_bytes(b"")
    else:
        torch.save({"weight": torch.ones(2)}, last)
    refused(root, "last.ckpt")
    if what == "cut short":
        last.unlink()
        assert "from step 0" in run_command(*MORE, cwd=root)


def test_a_part_that_is_cut_short_is_told(root: Path):
    last = root / "run/checkpoints/last.ckpt"
    rest, tensors = split(torch.load(last, weights_only=True))
    folder = last.parent / "parts-00000004"
    folder.mkdir()
    write_part(folder, tensors, 0, 1, full=True)
    torch.save({**rest, "parts": {"folder": folder.name, "count": 1}}, last)
    part = folder / "00000-of-00001.safetensors"
    whole = part.read_bytes()
    cut(part)
    refused(root, "parts-00000004/00000-of-00001.safetensors")
    part.write_bytes(whole)
    assert "from step 4" in run_command(*MORE, cwd=root)
