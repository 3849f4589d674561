"""Imports point one way, and no file outgrows a reader."""

import ast
from pathlib import Path

import pytest

import unclip

ROOT = Path(unclip.__file__).parent
# A module may import from its own layer and from those below it.
LAYERS = [
    {"diffusion", "nets", "errors", "drafts", "job_notes", "run_lock", "tensor_file", "muon", "progress"},
    {"models", "config", "artifact", "ema"},
    {"data", "evaluation"},
    {"stages", "interop", "report"},
    {"wandb_files", "loggers", "checkpoint", "watch"},
    {"callbacks", "optim", "batches", "jobs", "loading", "recipe", "plan", "tuning", "run_settings"},
    {"chain"},
    {"manipulate"},
    {"pipeline"},
    {"train", "ui"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
RANK |= {"optim": 1}  # used by the stages, uses the configuration only
TYPES_ONLY = {("models", "unclip.data.batch")}  # models name the batch they are given
PURE = {"diffusion", "nets"}
LIGHTNING = {"stages", "train", "callbacks", "checkpoint", "loggers", "watch"}
FILES = sorted(p for p in ROOT.rglob("*.py") if "conf" not in p.relative_to(ROOT).parts)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by dots: write unclip. in full"
            assert node.module is not None
            alone = node.module == "unclip"  # from unclip import pipeline
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            found += [f"unclip.{name}" for name in names] if alone else [node.module]
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path):
    own = part(path)
    if own == "__init__":
        return
    for module in imports(path):
        pieces = module.split(".")
        if pieces[0] == "unclip" and len(pieces) > 1 and (own, module) not in TYPES_ONLY:
            assert RANK[pieces[1]] <= RANK[own], f"{path.name} imports {module}, which lies above it"
        if own in PURE:
            assert pieces[0] != "unclip" or pieces[1] in PURE, f"{path.name} is pure tensor code but imports {module}"
        if pieces[0] in ("pytorch_lightning", "lightning"):
            assert own in LIGHTNING or path.name == "datamodule.py", f"{path.name} imports Lightning"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path):
    assert len(path.read_text().splitlines()) <= 400, "split this file: nobody reads 400 lines"
