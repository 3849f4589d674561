"""Sweeps as a user runs them: numbered trials, killed ones go on, and an end with table, plot and command."""

import csv
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prior_data import make_pairs
from tests_support import TINY, kill_beyond

from unclip.artifact import read_manifest
from unclip.cli import train as commands
from unclip.cli.sweep import Trial, ready_command, trials

pytestmark = pytest.mark.timeout(900)
GIVEN = ["data.path=data", "data.embeddings=embeddings", "logger=none", *TINY["prior"]]
STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweeps")
    make_pairs(root)
    return root


@pytest.fixture
def call(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a Hydra command in this process; returns what it printed, and fails unless it ends with ``code``."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "200")

    def run(main: Callable[[], None], *arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        if code:
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == code
        else:
            main()
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_a_killed_sweep_goes_on_where_it_was(root: Path, call: Callable[..., str]):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    sweep = root / "optuna"
    given = ["sweep=prior_lr_dropout", "run=optuna", *GIVEN, f"trainer.max_steps={STEPS}", "hydra.sweeper.num_trials=3"]
    killed_at = kill_beyond(2, sweep / "1/checkpoints/last.ckpt", ["train-prior", *given], root)
    assert 2 < killed_at < STEPS
    assert not (sweep / "1/artifact").exists()
    before = [trial.own for trial in trials(sweep)]
    first = (sweep / "0/artifact/manifest.json").stat().st_mtime_ns
    (sweep / "optuna.jsonl.lock").symlink_to("nowhere")  # as a kill inside of Optuna would leave it
    with (sweep / "optuna.jsonl").open("a") as file:
        file.write('{"op_code": 5, "wor')

    said = call(commands.train_prior, *given)
    assert len(before) == 2
    assert [trial.own for trial in trials(sweep)][:2] == before
    assert (sweep / "0/artifact/manifest.json").stat().st_mtime_ns == first, "a finished trial is not run again"
    steps = [
        json.loads(line)["step"] for line in (sweep / "1/metrics.jsonl").read_text().splitlines() if "train/" in line
    ]
    assert steps == list(range(2, STEPS + 1, 2)), "the killed trial was resumed"
    study = optuna.load_study(
        study_name="sweep", storage=JournalStorage(JournalFileBackend(str(sweep / "optuna.jsonl")))
    )
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3
    found = {t.number: read_manifest(sweep / str(t.number)).metrics["val/cosine_to_true"] for t in study.trials}
    assert [t.value for t in study.trials] == list(found.values())
    best = max(found, key=found.__getitem__)
    assert study.best_trial.number == best
    assert f"best: trial {best}, val/cosine_to_true" in said
    arguments = shlex.split((sweep / "best.txt").read_text())
    assert arguments[:2] == ["train-prior", "run=optuna-best"]
    own = {text.lstrip("+") for text in trials(sweep)[best].own}
    assert set(arguments[2:]) == {*GIVEN, f"trainer.max_steps={STEPS}"} - {"trainer.max_steps=4"} | own
    assert len({tuple(trial.own) for trial in trials(sweep)}) == 3
    call(commands.train_prior, *given)
    assert len(trials(sweep)) == 3, "a finished sweep runs nothing"


def test_a_grid_over_a_trained_priors_sampling(root: Path, call: Callable[..., str]):
    call(commands.train_prior, "run=prior", *GIVEN)
    given = [
        "prior",
        "sweep=prior_guidance_steps",
        "run=grid",
        "prior=prior",
        *GIVEN[:2],
        "device=cpu",
        "data.max_val=8",
    ]
    values = ["sampling.guidance.scale=1,3", "sampling.sampler.num_steps=2,4"]
    said = call(commands.evaluate, *given, *values)
    rows = list(csv.reader((root / "grid/trials.csv").read_text().splitlines()))
    assert rows[0] == ["trial", "sampling.guidance.scale", "sampling.sampler.num_steps", "cosine_to_true"]
    assert sorted(row[:3] for row in rows[1:]) == [["0", "1", "2"], ["1", "1", "4"], ["2", "3", "2"], ["3", "3", "4"]]
    results = [json.loads((root / f"grid/{n}/evaluation.json").read_text()) for n in range(4)]
    assert [(r["sampling"]["guidance"]["scale"], r["sampling"]["sampler"]["num_steps"]) for r in results] == [
        (1, 2), (1, 4), (3, 2), (3, 4),
    ]  # fmt: skip
    best = max(range(4), key=lambda n: results[n]["measures"]["cosine_to_true"])
    assert rows[1][0] == str(best)
    assert said.splitlines()[-1].startswith("unclip-evaluate prior run=grid-best prior=prior data.path=data")
    assert (root / "grid/trials.png").read_bytes()[:4] == b"\x89PNG"

    (root / "grid/2/evaluation.json").unlink()  # as if killed there
    kept = (root / "grid/1/evaluation.json").stat().st_mtime_ns
    call(commands.evaluate, *given, *values)
    assert json.loads((root / "grid/2/evaluation.json").read_text()) == results[2]
    assert (root / "grid/1/evaluation.json").stat().st_mtime_ns == kept
    said = call(commands.evaluate, *given, values[0], "sampling.sampler.num_steps=2,8", code=1)
    assert "grid/1 was run with ++sampling.guidance.scale=1 ++sampling.sampler.num_steps=4, not" in said
    said = call(commands.evaluate, *given, "seed=1", *values, code=1)
    assert "grid/0 was run with other settings: nothing -> ++seed=1; use the same settings" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["optim.lrr=1e-3,1e-2"], "unknown option 'optim.lrr'; did you mean 'lr'?"),
        ([], "nothing varies in this sweep"),
        (["optim.lr=interval(0.1,1)"], "an interval, which only a sweep by Optuna can search; list its values"),
    ],
)
def test_what_a_sweep_refuses_leaves_no_trace(
    given: list[str], message: str, root: Path, call: Callable[..., str], tmp_path: Path
):
    start = ["sweep=grid", f"run={tmp_path / 'sweep'}", "hydra.sweeper.objective=val/mse", *GIVEN]
    said = call(commands.train_prior, *start, *given, code=1)
    assert message in said
    assert not list((tmp_path / "sweep").glob("*/*"))


def test_misspelt_settings_of_the_sweep_and_of_its_space(call: Callable[..., str], tmp_path: Path):
    start = ["sweep=prior_lr_dropout", f"run={tmp_path / 'sweep'}", *GIVEN]
    assert "Key 'num_trails' not in 'OptunaConfig'" in call(
        commands.train_prior, *start, "hydra.sweeper.num_trails=3", code=1
    )
    said = call(commands.train_prior, *start, "model.drop_txt=interval(0,1)", code=1)
    assert "unknown option 'model.drop_txt'; did you mean 'drop_text'?" in said
    assert not list((tmp_path / "sweep").glob("*/*"))
    said = call(commands.train_prior, *start, "optim.lr=tag(log, interval(0,1))", code=1)
    assert "optim.lr: the logarithm of 0.0 does not exist" in said
    said = call(commands.train_prior, "sweep=prior_lr_dropout", *GIVEN, code=1)
    assert "run is not set; give the sweep's folder on the command line: run=..." in said


def test_a_diverged_trial_counts_and_the_sweep_goes_on(root: Path, call: Callable[..., str]):
    given = [
        "sweep=grid",
        "run=diverged",
        "hydra.sweeper.objective=val/mse",
        *GIVEN,
        "optim.lr=1e30,1e-3",
        "optim.grad_clip=0",
    ]
    said = call(commands.train_prior, *given)
    failure = json.loads((root / "diverged/0/failed.json").read_text())
    assert "the loss or its gradient is not finite" in failure["error"]
    rows = list(csv.reader((root / "diverged/trials.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["trial", "1", "0"]
    assert rows[2][-1] == "diverged"
    assert "best: trial 1, val/mse" in said


def test_an_unknown_objective_is_told_with_the_known_ones(root: Path, call: Callable[..., str]):
    given = [
        "sweep=grid",
        "run=diverged",
        "hydra.sweeper.objective=val/msee",
        *GIVEN,
        "optim.lr=1e30,1e-3",
        "optim.grad_clip=0",
    ]
    said = call(commands.train_prior, *given, code=1)
    assert "diverged/1 has no val/msee; set hydra.sweeper.objective to one of:" in said


def test_the_ready_command_quotes_and_leaves_out_the_sweep(tmp_path: Path):
    trial = Trial(tmp_path, 3, ["sweep=grid", "launch=slurm", "++data.others=[{path: b}]"], ["++optim.lr=0.1"])
    assert ready_command("train-clip", trial, "r") == "train-clip run=r 'data.others=[{path: b}]' optim.lr=0.1"
