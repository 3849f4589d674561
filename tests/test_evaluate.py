"""`unclip-evaluate prior` as a user runs it, and what a prior's training leaves in its metrics."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from prior_data import embed, make_pairs
from tests_support import TINY, run_command

from unclip import __version__
from unclip.cli.evaluate import evaluate
from unclip.cli.train import CONF, forced
from unclip.errors import UnclipError

pytestmark = pytest.mark.timeout(280)
ALL = {
    *("mse", *(f"mse_at_{percent:02}" for percent in range(5, 100, 10))),
    *("cosine_to_true", "cosine_to_text", "cosine_to_unrelated", "cosine_text_to_true", "cosine_true_to_unrelated"),
    "cosine_to_unrelated_text",
    *("cosine_difference", "diversity", "diversity_ratio"),
    *(f"{way}_{k}" for way in ("recall", "recall_by_text") for k in (1, 5, 10)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    make_pairs(root)
    embed(root, "others", "b" * 64)
    given = ["run=runs/prior", "data.path=data", "data.embeddings=embeddings", *TINY["prior"]]
    run_command("train-prior", *given, "trainer.val_every=3", "data.max_val=20", "optim.lr=0.1", cwd=root)
    return root


GIVEN = ["prior=runs/prior", "data.path=data", "data.embeddings=embeddings"]


def evaluated_here(*overrides: str) -> dict[str, Any]:
    """The command without its process, in the working directory."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose("evaluate", [forced(o) for o in ("evaluation=prior", *overrides)])
    return evaluate("prior", raw)


def test_training_reports_averaged_and_trained_weights_apart(root: Path):
    rows = [json.loads(line) for line in (root / "runs/prior/metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "val/mse" in row]
    assert len(validations) == 2
    for row in validations:
        assert {name.removeprefix("val/") for name in row if name.startswith("val/")} == ALL | {"online/mse"}
    assert validations[1]["val/online/mse"] != validations[1]["val/mse"], "the average lags behind"
    metrics = json.loads((root / "runs/prior/artifact/manifest.json").read_text())["metrics"]
    assert {name: metrics[name] for name in metrics if name.startswith("val/")} == pytest.approx(
        {name: value for name, value in validations[1].items() if name.startswith("val/")}, abs=1e-6
    )


def test_a_prior_without_its_embeddings_says_which_key_is_missing(root: Path):
    for model in ("linear_prior", "ar_prior"):
        said = run_command("train-prior", "run=runs/none", "data.path=data", f"model={model}", cwd=root, code=1)
        assert "run unclip-embed and set data.embeddings" in said, said


def test_evaluation_of_the_same_samples_agrees_with_the_training_runs_last_validation(root: Path):
    given = ["run=runs/again", *GIVEN, "precision=bf16", "batch_size=8", "device=cpu"]
    said = run_command("unclip-evaluate", "prior", *given, cwd=root)
    found = json.loads((root / "runs/again/evaluation.json").read_text())
    manifest = json.loads((root / "runs/prior/artifact/manifest.json").read_text())
    assert (found["hash"], found["step"], found["split"], found["samples"]) == (manifest["hash"], 4, "val", 20)
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=CONF, capture_output=True, text=True, check=False
    )
    assert (found["version"], (found["commit"] or "").rstrip("*")) == (__version__, head.stdout.strip())
    assert re.fullmatch(rf"\d+ cores, .+, torch {re.escape(torch.__version__)}", found["machine"])
    assert set(found["measures"]) == ALL
    assert all(name in said for name in ALL)
    for name in ("mse", "cosine_to_true", "cosine_text_to_true", "mse_at_05", "mse_at_95"):
        assert found["measures"][name] == pytest.approx(manifest["metrics"][f"val/{name}"], abs=0.02), name


def test_another_split_and_other_sampling(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    given = [*GIVEN, "data.val_split=test", "diversity.every=1"]
    plain, unconditional = (
        evaluated_here(*given, f"run=runs/scale{scale}", f"sampling.guidance.scale={scale}") for scale in (1, 0)
    )
    assert json.loads((root / "runs/scale0/evaluation.json").read_text()) == unconditional
    assert (plain["split"], plain["samples"], plain["sampling"]["guidance"]["scale"]) == ("test", 12, 1.0)
    assert unconditional["measures"]["mse"] == plain["measures"]["mse"], "the loss needs no sampling"
    assert unconditional["measures"]["cosine_to_true"] != plain["measures"]["cosine_to_true"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*GIVEN[:2], "data.embeddings=others"], "CLIP aaaaaaaa but others holds embeddings of CLIP bbbbbbbb"),
        ([*GIVEN, "sampling.guidnace=3"], "sampling: unknown option 'guidnace'; did you mean 'guidance'"),
        ([*GIVEN, "data.val_split=null"], "name the split to evaluate on"),
        (GIVEN[1:], "prior is not set; give it on the command line: prior="),
        ([*GIVEN, "diversity.num_samples=1"], "diversity.num_samples=1 at least 2"),
    ],
)
def test_refusals_write_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str):
    monkeypatch.chdir(root)
    with pytest.raises(UnclipError, match=re.escape(message)):
        evaluated_here("run=x", *given)
    assert not (root / "x" / "evaluation.json").exists()


@pytest.mark.parametrize("given", [["run=x"], ["decoder", "run=x"], []])
def test_the_kind_of_evaluation_must_be_named(tmp_path: Path, given: list[str]):
    said = run_command("unclip-evaluate", *given, cwd=tmp_path, code=1)
    assert (
        "say first what to evaluate: unclip-evaluate KIND run=...; kinds: coco, coco_filtered, pictures, prior" in said
    )
