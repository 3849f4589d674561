"""scripts/compare_priors.sh: its table from known figures, what it refuses, and (slow) the whole script."""

import json
import subprocess
from pathlib import Path

import pytest
from prior_data import make_pairs
from tests_support import TINY, environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
EVALUATED = {"cosine_to_true": 0.5, "cosine_difference": 0.01, "recall_1": 0.1, "recall_10": 0.4, "diversity": 0.2}


def compare(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(SCRIPTS / "compare_priors.sh"), *arguments],
        capture_output=True, text=True, timeout=600, env=environment(), check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == code, said[-3000:]
    return done.stdout if code == 0 else said


def write(folder: Path, cosines: list[float], kids: list[float]) -> None:
    for seed, cosine in enumerate(cosines):
        run = folder / f"seed-{seed}"
        (run / "chain").mkdir(parents=True)
        measures = {**EVALUATED, "cosine_to_true": cosine, "diversity_ratio": 0.9}
        (run / "evaluation.json").write_text(json.dumps({"step": 100 + seed, "measures": measures}))
        if seed < len(kids):
            measured = {"kid": kids[seed], "style_accuracy": 0.25, "generated_recall_at_1": 0.5}
            (run / "chain" / "measures.json").write_text(json.dumps(measured))


def table(folder: Path) -> str:
    given = ["python", str(SCRIPTS / "compare_priors_table.py"), str(folder)]
    return subprocess.run(given, capture_output=True, text=True, check=True, env=environment()).stdout


def test_the_table_has_means_and_deviations_best_first(tmp_path: Path):
    write(tmp_path / "worse prior", [0.40, 0.42], [])
    write(tmp_path / "better", [0.5, 0.6, 0.7], [100.0, 110.0, 120.0])
    lines = table(tmp_path).strip().splitlines()
    assert lines[0].startswith("| prior | seeds | steps | cosine to true z_i |")
    assert lines[2] == (
        "| better | 3 | 101 ± 1 | 0.600 ± 0.100 | 0.010 ± 0.000 | 10.0 ± 0.0 | 40.0 ± 0.0 | 0.200 ± 0.000 | 0.90 ± 0.00 "
        "| 110.0 ± 10.0 | 25.0 ± 0.0 | 50.0 ± 0.0 |"
    )
    assert lines[3].startswith("| worse prior | 2 | 100 ± 1 | 0.410 ± 0.014 |")
    assert lines[3].endswith("| - | - | - |")
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert (tmp_path / "table.md").read_text().strip().splitlines() == lines


def test_without_pictures_the_table_has_no_columns_for_them(tmp_path: Path):
    write(tmp_path / "one", [0.5], [])
    text = table(tmp_path)
    assert "KID" not in text
    assert "| one | 1 | 100 | 0.500 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --data and --embeddings"),
        (["--data", "d", "--embeddings", "e", "--chain", "c"], "--chain needs --judge RUN"),
        (["--dtaa", "d"], "unknown option --dtaa"),
        (["--data"], "--data needs a value"),
        (
            ["--data", "d", "--embeddings", "e", "no_prior a=b"],
            "conf/model/no_prior.yaml does not exist: no such model",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(given: list[str], message: str):
    assert message in compare(*given, code=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_priors_with_two_seeds_and_again(tmp_path: Path):
    make_pairs(tmp_path)
    short, net = TINY["prior"][:8], TINY["prior"][8:]
    given = ["--data", str(tmp_path / "data"), "--embeddings", str(tmp_path / "embeddings"), "--minutes", "1"]
    given += ["--out", str(tmp_path / "compared"), "--seeds", "0 1", "--split", "test", "--set", " ".join(short)]
    models = [f"tiny one: diffusion_prior {' '.join(net)}", "linear_prior"]
    said = compare(*given, *models)
    assert "| tiny one | 2 | 4 ± 0 |" in said
    assert "| linear_prior | 2 | 0 ± 0 |" in said
    assert (tmp_path / "compared/tiny one/seed-1/evaluation.json").exists()
    assert compare(*given, *models).splitlines()[-4:] == said.splitlines()[-4:]
