"""scripts/compare_priors.sh: its table from known figures, what it refuses, and (slow) the whole script."""

import json
import subprocess
from pathlib import Path

import pytest
from tests_support import TINY, environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
EVALUATED = {"cosine_to_true": 0.5, "cosine_difference": 0.01, "recall_1": 0.1, "recall_5": 0.3, "recall_10": 0.4}


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
        run.mkdir(parents=True)
        for split, higher in (("val", 0.0), ("styles", 0.1)):
            measures = {**EVALUATED, "cosine_to_true": cosine + higher, "diversity_ratio": 0.9}
            found = {"step": 100 + seed, "samples": 50, "measures": measures}
            (run / f"evaluation-{split}.json").write_text(json.dumps(found))
        if seed < len(kids):
            found = {"kid": kids[seed], "style_accuracy": 0.25, "num_test": 30, "num_styles": 20}
            (run / "drawn.json").write_text(json.dumps(found))


def tables(folder: Path) -> list[str]:
    given = ["python", str(SCRIPTS / "compare_priors_table.py"), str(folder)]
    return subprocess.run(given, capture_output=True, text=True, check=True, env=environment()).stdout.split("\n\n")


def test_the_tables_have_means_and_deviations_best_first(tmp_path: Path):
    write(tmp_path / "worse prior", [0.40, 0.42], [])
    write(tmp_path / "better", [0.5, 0.6, 0.7], [100.0, 110.0, 120.0])
    (tmp_path / "true-z_i.json").write_text(json.dumps({"kid": 90.0, "style_accuracy": 0.5}))
    titles, found = tables(tmp_path)[::2], [text.strip().splitlines() for text in tables(tmp_path)[1::2]]
    assert [title.strip() for title in titles] == [
        "val, 50 samples:",
        "styles, 50 samples:",
        "drawn, 30 captions for the KID and 20 for the style:",
    ]
    val, styles, drawn = found
    assert val[0].startswith("| prior | seeds | cosine to true z_i |")
    assert val[2:] == [
        "| better | 3 | 0.600 ± 0.100 | 0.010 ± 0.000 | 10.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 0.90 ± 0.00 | 101 ± 1 |",
        "| worse prior | 2 | 0.410 ± 0.014 | 0.010 ± 0.000 | 10.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 0.90 ± 0.00 | 100 ± 1 |",
    ]
    assert [line.split(" | ")[2] for line in styles[2:]] == ["0.700 ± 0.100", "0.510 ± 0.014"]
    assert drawn == [
        "| prior | seeds | KID x 1000 | style accuracy, % |",
        "|---|---|---|---|",
        "| better | 3 | 110.0 ± 10.0 | 25.0 ± 0.0 |",
        "| (true z_i) | 1 | 90.0 | 50.0 |",
    ]
    assert (tmp_path / "table.md").read_text().strip() == "\n\n".join(tables(tmp_path)).strip()


def test_without_pictures_there_is_no_table_of_them(tmp_path: Path):
    write(tmp_path / "one", [0.5], [])
    text = "".join(tables(tmp_path))
    assert "KID" not in text
    assert "| one | 1 | 0.500 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --data and --embeddings"),
        (["--data", "d", "--embeddings", "e", "--chain", "no"], "--chain no has no clip"),
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
@pytest.mark.timeout(600)
def test_priors_are_trained_then_drawn_with_and_nothing_is_done_twice(styled_chain: Path, tmp_path: Path):
    out, cell = tmp_path / "compared", tmp_path / "compared" / "tiny one" / "seed-1"
    given = ["--data", str(styled_chain / "data"), "--embeddings", str(styled_chain / "embeddings"), "--minutes", "1"]
    given += ["--out", str(out), "--seeds", "1", "--splits", "val test_styles", "--set", " ".join(TINY["prior"][:8])]
    models = [f"tiny one: diffusion_prior {' '.join(TINY['prior'][8:])}", "identity"]
    said = compare(*given, *models)
    assert "| tiny one | 1 | " in said
    assert "KID" not in said
    assert json.loads((cell / "evaluation-test_styles.json").read_text())["step"] == 4
    (cell / "evaluation-val.json").write_text(
        (cell / "evaluation-val.json").read_text().replace('"recall_5"', '"kept"')
    )
    said = compare(*given, "--chain", str(styled_chain / "runs"), "--num", "4", *models)
    assert said.count("is finished") == 2, "trained again"
    assert "kept" in (cell / "evaluation-val.json").read_text(), "evaluated again"
    assert "drawn, 4 captions for the KID and 4 for the style" in said
    assert {"kid", "style_accuracy"} <= json.loads((cell / "drawn.json").read_text()).keys()
    assert "| (true z_i) | 1 | " in said
