"""unclip job: which jobs are started again. SLURM's commands are stand-ins here; tests/slurm has the real ones."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unclip.cli import job
from unclip.errors import ConfigError
from unclip.job_notes import ERROR, STOPPED, job_id, note, noted

REPORT = ("unclip", "report")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job 17 that runs in this process: a folder with ``calls`` of SLURM's commands, and what they answer."""
    for name, answer in {
        "srun": "exit $(cat {0}/code)",
        "squeue": "cat {0}/state",
        "scontrol": 'test ! -e {0}/away || {{ rm {0}/away; echo "Unable to contact slurm controller" >&2; exit 1; }}',
    }.items():
        path = tmp_path / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $* (OMP_NUM_THREADS=$OMP_NUM_THREADS)" >> {tmp_path}/calls\n{answer.format(tmp_path)}\n'
        )
        path.chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "UNCLIP_RUN", "MAX_RESTARTS", "OMP_NUM"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(slurm: Path, code: int, *words: str) -> int:
    (slurm / "code").write_text(f"{code}\n")
    return job.run_job([*(words or ("unclip-embed",)), f"run={slurm / 'run'}"])


def calls(slurm: Path, name: str) -> list[str]:
    lines = (slurm / "calls").read_text().splitlines() if (slurm / "calls").exists() else []
    return [line.partition(" (")[0] for line in lines if line.startswith(name)]


def during(slurm: Path, name: str, **what: object) -> None:
    """What the tasks note in their run while they run."""
    run = slurm / "run"
    run.mkdir(exist_ok=True)
    (slurm / "told").write_text(json.dumps({**what, "job": "17"}))
    text = (slurm / "srun").read_text().replace("exit $(", f"cp {slurm}/told {run / name}\nexit $(", 1)
    (slurm / "srun").write_text(text)


def test_a_job_that_succeeds_ends(slurm: Path) -> None:
    assert run(slurm, 0) == 0
    assert calls(slurm, "srun") == [f"srun --kill-on-bad-exit=1 unclip-embed run={slurm}/run"]
    assert calls(slurm, "scontrol") == []


def test_failures_requeue_up_to_max_restarts(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAX_RESTARTS", "2")
    caplog.set_level("INFO")
    assert [run(slurm, 9) for _ in range(3)] == [0, 0, 9]
    assert calls(slurm, "scontrol") == ["scontrol requeue 17"] * 2
    assert "exit code 9: restart 2 of MAX_RESTARTS=2" in caplog.text
    assert (
        f"MAX_RESTARTS=2 is reached. See the log above for the cause; the same line resumes {slurm}/run" in caplog.text
    )
    assert run(slurm, 0) == 0
    assert run(slurm, 9) == 0, "a job that has succeeded counts anew"


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_run_that_saved_on_a_signal_is_requeued_and_does_not_count(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, again: int
) -> None:
    monkeypatch.setenv("MAX_RESTARTS", "0")
    during(slurm, STOPPED, signal=int(number), step=5)
    run(slurm, 137)  # srun's code may be that of a rank it killed while it ended
    assert calls(slurm, "scontrol") == ["scontrol requeue 17"] * again


def test_a_stop_of_an_earlier_start_does_not_excuse_a_failure(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_RESTARTS", "0")
    note(slurm / "run", STOPPED, signal=10, step=5)
    assert run(slurm, 1) == 1
    assert calls(slurm, "scontrol") == []


def test_a_wrong_setting_ends_the_job(slurm: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    during(slurm, ERROR, kind="ConfigError", message="optim.lr='fast' is not a valid float")
    assert run(slurm, 1) == 1
    assert calls(slurm, "scontrol") == []
    assert f"not started again: optim.lr='fast' is not a valid float ({slurm}/run/error.json). Mend it" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*REPORT, "nowhere"), "nowhere is not a folder"),
        ((*REPORT, "nowhere", "--bogus"), "the command line is refused"),
        (("train-prior", "experiment=tpyo"), "the command line is refused"),
        (("train-prior", "data.path=nowhere", "optim.lr=fast"), "optim.lr"),
    ],
)
def test_whatever_command_the_job_runs_what_is_wrong_with_it_ends_the_job(
    slurm: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("UNCLIP_RUN", str(slurm / "run"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (slurm / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    code = job.run_job([*words, f"run={slurm / 'run'}"] if words[0] != "unclip" else list(words))
    assert code != 0
    assert calls(slurm, "scontrol") == []
    assert f"not started again: {message}" in caplog.text


def test_a_job_that_another_one_submitted_is_of_its_own_run(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch hands the environment on, with the submitting job's UNCLIP_RUN."""
    monkeypatch.setenv("UNCLIP_RUN", str(slurm / "other"))
    (slurm / "srun").write_text(f'#!/bin/sh\necho "$UNCLIP_RUN" > {slurm}/given\n')
    assert job.run_job(["train-prior", f"run={slurm / 'run'}"]) == 0
    assert (slurm / "given").read_text().strip() == str(slurm / "run")


def test_the_error_of_another_job_in_the_folder_says_nothing(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.delenv("SLURM_JOB_ID")
        note(slurm / "run", ERROR, kind="ConfigError", message="a command by hand")
    assert run(slurm, 1) == 0
    assert calls(slurm, "scontrol") == ["scontrol requeue 17"]
    assert json.loads((slurm / "run" / ERROR).read_text())["job"] is None


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", ""])
def test_a_job_that_slurm_itself_ends_is_left_to_it(slurm: Path, state: str) -> None:
    (slurm / "state").write_text(f"{state}\n")
    during(slurm, STOPPED, signal=15, step=5)
    assert run(slurm, 143) == 143
    assert calls(slurm, "scontrol") == []


def test_a_controller_that_is_away_is_waited_for(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PATIENCE", 2.0)
    (slurm / "away").touch()
    assert run(slurm, 1) == 0
    assert calls(slurm, "scontrol") == ["scontrol requeue 17"] * 2


def test_a_task_of_an_array_is_requeued_alone(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run(slurm, 1) == 0
    assert calls(slurm, "scontrol") == ["scontrol requeue 16_3"]
    assert calls(slurm, "squeue") == ["squeue --noheader --jobs 16_3 --format %T"]


def test_training_gets_the_ranks_of_the_job(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    run(slurm, 0, "train-prior")
    run(slurm, 0, "/env/bin/train-prior", "trainer.devices=1")
    first, second = calls(slurm, "srun")
    assert first.endswith("trainer.num_nodes=4 trainer.devices=8")
    assert second.endswith("trainer.num_nodes=4")
    assert "(OMP_NUM_THREADS=6)" in (slurm / "calls").read_text()


def test_notes_name_their_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert job_id() is None
    note(tmp_path / "none", ERROR, message="m")
    assert not (tmp_path / "none").exists(), "a command that fails by hand makes no folder"
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    note(tmp_path / "run", STOPPED, step=3)
    assert noted(tmp_path / "run", STOPPED, "5") == {"step": 3, "job": "5"}
    assert noted(tmp_path / "run", STOPPED, "6") is None
    assert noted(tmp_path / "run", ERROR, "5") is None


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["train-prior", "run=r"], {"SLURM_JOB_ID": ""}, "works inside of a SLURM job: sbatch scripts/slurm/train"),
        (
            ["train-prior", "run=r"],
            {"SLURM_NTASKS": "8"},
            "submitted with --ntasks=8; give --nodes and --ntasks-per-node",
        ),
        (["train-prior", "optim.lr=1"], {}, "`train-prior optim.lr=1` names no run; submit a command with its run"),
        (["train-prior", "run=r"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many is not a number of restarts: 0, 1"),
    ],
)
def test_what_cannot_work_is_told(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.run_job(words)
    assert calls(slurm, "srun") == []
