"""launch=slurm where it cannot work, and the chain that scripts/slurm/pipeline.sh submits. tests/slurm has real jobs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests_support import run_command

from unclip.cli import launch
from unclip.cli.train import CONF, forced
from unclip.config import typed
from unclip.errors import ConfigError
from unclip.train import PriorTrainConfig, train

PIPELINE = Path(__file__).parent.parent / "scripts" / "slurm" / "pipeline.sh"


def task(**settings: object) -> launch.Task:
    config = {"run": "r", "launch": settings, "hydra": {"job": {"name": "train_prior"}, "overrides": {"task": []}}}
    return launch.Task(None, None, OmegaConf.create(config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partiton": "gpu"}, "launch: unknown option 'partiton'; did you mean 'partition'?"),
        ({"nodes": 0}, "launch: nodes=0 must be at least 1"),
        (
            {"script": "none.sbatch"},
            f"launch: script=none.sbatch is not a file; copy {launch.SCRIPT} and change the copy",
        ),
    ],
)
def test_wrong_settings_are_told_before_anything_is_submitted(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        launch.run_on_slurm([task(**settings)])


def test_without_submitit_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(
        ConfigError, match=r"needs submitit: pip install 'unclip\[slurm\]'. Without it: sbatch scripts/slurm/tr"
    ):
        launch.run_on_slurm([task()])


def test_without_sbatch_a_login_node_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch or srun here. Submit from a login node of a SLURM cluster"):
        launch.run_on_slurm([task()])


def test_what_sbatch_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "sbatch: error: invalid partition specified: gpuu" >&2\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"sbatch refuses this job.*invalid partition specified: gpuu"):
        launch.run_on_slurm([task(partition="gpuu", folder=str(tmp_path / "slurm"))])


def test_a_job_gets_its_resources_and_its_run() -> None:
    pytest.importorskip("submitit")
    first, second = task(), task()
    second.config.run = "with space"
    cfg = launch.SlurmConfig(
        nodes=2, tasks_per_node=8, gpus_per_node=8, partition="gpu", options={"constraint": "h100"}
    )
    given = launch._parameters([first, second], cfg)
    assert (given["nodes"], given["ntasks_per_node"], given["gpus_per_node"], given["partition"]) == (2, 8, 8, "gpu")
    assert given["additional_parameters"] == {"signal": "USR1@120", "requeue": True, "constraint": "h100"}
    assert "account" not in given
    said = subprocess.run(
        ["bash", "-c", "; ".join([*given["setup"], 'echo "$UNCLIP_RUN|$MAX_RESTARTS"'])],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "with space|3\n"


def test_settings_of_slurm_without_it_are_refused(tmp_path: Path) -> None:
    given = ["train-prior", "run=r", "data.path=d", "launch.partition=gpu"]
    said = run_command(*given, cwd=tmp_path, code=1)
    assert "error: launch.partition is for launch=slurm: add that, or leave out launch.*" in said


def pipeline(folder: Path, settings: str, refused: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the script says, and what it submits to a stand-in for sbatch that counts from 100 and refuses one name."""
    (folder / "settings.sh").write_text(settings)
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncase "$*" in *--job-name={refused or "none"}" "*) exit 1;; esac\n'
        f'echo "$UNCLIP_RUN $*" >> {folder}/calls\necho $((99 + $(wc -l < {folder}/calls)))\n'
    )
    (folder / "sbatch").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        [PIPELINE, folder / "settings.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done, calls


def test_the_pipeline_submits_the_chain_in_its_order(tmp_path: Path) -> None:
    done, calls = pipeline(
        tmp_path,
        "data=/d runs=/r\nall_job=(--partition=gpu)\nclip=(experiment=paper_clip)\nclip_job=(--nodes=4)\n"
        "embed_job=(--array=0-15)\nupsamplers=(upsampler-256 upsampler-1024)\nupsampler_256=(model.image_size=256)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clip → embed → prior ∥ decoder ∥ upsampler-256 ∥ upsampler-1024 → evaluate\n"
    graph = [line.split(maxsplit=2) for line in done.stderr.splitlines()]
    assert graph == [
        ["clip", "100"],
        ["embed", "101", "after 100"],
        ["prior", "102", "after 101"],
        ["decoder", "103", "after 101"],
        ["upsampler-256", "104", "after 101"],
        ["upsampler-1024", "105", "after 101"],
        ["evaluate", "106", "after 102, 103, 104, 105"],
    ]
    here = PIPELINE.parent
    assert calls[0] == (
        f" --parsable --job-name=clip --partition=gpu --nodes=4 {here}/train.sbatch "
        "train-clip run=/r/clip data.path=/d experiment=paper_clip"
    )
    assert "--dependency=afterok:100 --kill-on-invalid-dep=yes --partition=gpu --array=0-15" in calls[1]
    assert calls[1].endswith(f"{here}/embed.sbatch run=/r/embeddings clip=/r/clip data=/d")
    assert calls[4].endswith("train-upsampler run=/r/upsampler-256 data.path=/d model.image_size=256")
    assert "--dependency=afterok:102:103:104:105 " in calls[6]
    assert calls[6].startswith("/r/evaluation ")


def test_the_pipeline_takes_a_clip_that_is_there_and_another_evaluation(tmp_path: Path) -> None:
    settings = "data=/d runs=/r clip_from=/old/clip upsamplers=()\nevaluate=(unclip verdict --from /r)\n"
    done, calls = pipeline(tmp_path, settings)
    assert done.stdout == "embed → prior ∥ decoder → evaluate\n"
    assert calls[0].endswith("embed.sbatch run=/r/embeddings clip=/old/clip data=/d")
    assert "--dependency" not in calls[0]
    assert calls[-1].endswith("train.sbatch unclip verdict --from /r")


@pytest.mark.parametrize(("refused", "submitted"), [("clip", 0), ("decoder", 3), ("upsampler", 4), ("evaluate", 5)])
def test_the_pipeline_ends_where_a_job_is_refused(tmp_path: Path, refused: str, submitted: int) -> None:
    """Else the jobs behind it would be queued without what they wait for."""
    done, calls = pipeline(tmp_path, "data=/d runs=/r\n", refused)
    assert done.returncode != 0
    assert len(calls) == submitted
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("settings", "message"), [("data=/d\n", "settings.sh must set data=... and runs=..."), (None, "usage: ")]
)
def test_the_pipeline_says_what_it_lacks(tmp_path: Path, settings: str | None, message: str) -> None:
    if settings is None:
        done = subprocess.run([PIPELINE], capture_output=True, text=True)
    else:
        done, calls = pipeline(tmp_path, settings)
        assert calls == []
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("model", "variable", "message"),
    [
        (
            "diffusion_prior",
            "SLURM_NTASKS_PER_NODE",
            "trainer.devices=2, but this SLURM job has SLURM_NTASKS_PER_NODE=4; ",
        ),
        (
            "diffusion_prior",
            "SLURM_NNODES",
            "trainer.num_nodes=1, but this SLURM job has SLURM_NNODES=4; let them agree",
        ),
        (
            "linear_prior",
            "SLURM_NTASKS_PER_NODE",
            "trainer.devices=1 (this model has no weights to train, so it takes one)",
        ),
    ],
)
def test_ranks_that_are_not_those_of_the_job_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, variable: str, message: str
) -> None:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv(variable, "4")
    given = [f"run={tmp_path}/run", "data.embeddings=none", f"model={model}", "trainer.devices=2"]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = typed(compose("train_prior", [forced(text) for text in given]), PriorTrainConfig)
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(cfg)
    assert not (tmp_path / "run").exists()
