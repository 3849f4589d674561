"""Jobs on a real SLURM: training on two nodes that is interrupted in every way, arrays, and jobs that cannot succeed."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import TINY, command, run_command

from unclip.artifact import Manifest, save
from unclip.config import to_plain
from unclip.data.shards import ShardWriter
from unclip.models.clip import CLIP, CLIPConfig

from .conftest import Cluster

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
STEPS = 400
TRAIN = ["train-upsampler", "data.path=data", *TINY["upsampler"], "logger=none", "trainer.accelerator=cpu"]
TRAIN += ["trainer.log_every=50", "trainer.checkpoint_every=5", "trainer.val_every=100000", "data.num_workers=0"]
CPU = ["--cpus-per-task=1", "--mem-per-cpu=64"]
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` and an untrained ``clip``."""
    root = tmp_path_factory.mktemp("jobs")
    pictures = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        with ShardWriter(root / "data" / split, shard_size=8) as writer:
            for i, picture in enumerate(pictures):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                writer.write(f"{split}{i}", buffer.getvalue(), f"picture {i}", {})
    torch.manual_seed(0)
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    clip = CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12)).eval()
    save(root / "clip", clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    return root


@dataclass
class Job:
    """A training job of two nodes with two ranks each, submitted by hand, and what may happen to it."""

    slurm: Cluster
    root: Path
    run: str
    steps: int
    strategy: str = "auto"

    def __post_init__(self) -> None:
        size = ["-N2", "--ntasks-per-node=2", *CPU]
        script = [str(SCRIPTS / "train.sbatch"), *TRAIN, f"trainer.max_steps={self.steps}", f"run={self.run}"]
        script.append(f"trainer.strategy={self.strategy}")
        self.id = self.slurm.ask("sbatch", "--parsable", *size, *script, cwd=self.root)
        self.restarts = 0

    @property
    def step(self) -> int:
        path = self.root / self.run / "checkpoints" / "last.ckpt"
        return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0

    def signalled(self) -> None:
        self.slurm.ask("scancel", "--signal=USR1", self.id)

    def rank_killed(self) -> None:
        os.kill(self._rank(3), signal.SIGKILL)

    def preempted(self) -> None:
        self.slurm.ask("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")

    def _rank(self, rank: int) -> int:
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((path / "environ").read_bytes().split(b"\0"))
                if wanted <= variables and b"train-upsampler" in (path / "cmdline").read_bytes():
                    return int(path.name)
            except OSError:
                continue
        raise AssertionError(f"rank {rank} of job {self.id} is not running")

    def interrupt(self, how: Callable[["Job"], None]) -> None:
        """Once training has got on, let it happen; wait until the job was started again."""
        seen = self.step
        self._until(lambda: self.step >= seen + 10)
        assert self.step < self.steps, "the run was too short to be interrupted"
        how(self)
        self.restarts += 1
        self._until(lambda: f"Restarts={self.restarts} " in self._shown() and "JobState=RUNNING" in self._shown())

    def _shown(self) -> str:
        return self.slurm.ask("scontrol", "show", "job", self.id, "-o")

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not true():
            assert "JobState=COMPLETED" not in self._shown(), "the job ended before it could be interrupted"
            assert time.monotonic() < deadline, f"{self._shown()}\n{self.log()[-4000:]}"
            time.sleep(0.2)

    def log(self) -> str:
        return (self.root / f"unclip-{self.id}.log").read_text()


def weights(run: Path) -> bytes:
    return (run / "artifact" / "weights.safetensors").read_bytes()


def hydra(slurm: Cluster, root: Path, *given: str) -> subprocess.Popen:
    """A command with launch=slurm, which waits for its jobs."""
    line = [command(given[0]), *given[1:], "launch=slurm", "launch.cpus_per_task=1", "launch.minutes=30"]
    return subprocess.Popen(line, cwd=root, env=slurm.environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=600)[1]
    return f"{said}\nexit code {process.returncode}"


@dataclass
class Done:
    """What the jobs of this module left, and what their commands said."""

    cut: Job
    whole: str
    wrong: str
    parts: str
    array: str
    failing: str


@pytest.fixture(scope="module")
def done(slurm: Cluster, root: Path) -> Done:
    """All jobs at once; the one in ``cut`` is interrupted three times and sees the controller go."""
    ranks = ["trainer.devices=2", "trainer.num_nodes=2", f"trainer.max_steps={STEPS}"]
    cut = Job(slurm, root, "cut", STEPS)
    cut.interrupt(Job.preempted)  # first: it would take all jobs of the partition
    whole = hydra(slurm, root, *TRAIN, *ranks, "run=whole")
    cut.interrupt(Job.signalled)
    wrong = hydra(slurm, root, *TRAIN, "run=wrong", "optim.lr=fast")
    failing = slurm.ask(
        "sbatch", "--parsable", *CPU, SCRIPTS / "train.sbatch", "false", "run=failing", cwd=root, MAX_RESTARTS="1"
    )
    cut.interrupt(Job.rank_killed)
    given = ["clip=clip", "data=data", "device=cpu"]
    array = slurm.ask(
        "sbatch", "--parsable", "--array=0-1", *CPU, SCRIPTS / "embed.sbatch", "run=by-array", *given, cwd=root
    )
    parts = hydra(slurm, root, "unclip-embed", *given, "run=by-parts", "parts=2", "part=0,1")
    slurm.restart_controller()
    said = [ended(process) for process in (whole, wrong, parts)]
    slurm.wait(array, failing)
    slurm.wait(cut.id)
    return Done(cut, *said, array, failing)


def test_two_nodes_of_two_tasks_interrupted_three_times_end_with_the_weights_of_an_undisturbed_run(
    done: Done, root: Path
):
    assert "exit code 0" in done.whole
    assert json.loads((root / "whole" / "artifact" / "manifest.json").read_text())["step"] == STEPS
    assert done.cut.slurm.states(done.cut.id) == ["REQUEUED"] * 3 + ["COMPLETED"], done.cut.log()
    assert weights(root / "cut") == weights(root / "whole")
    log = done.cut.log()
    assert len(re.findall(r"stopped by signal \d+ at step \d+; the same command resumes", log)) == 2
    assert log.count("restart 1 of MAX_RESTARTS=3") == 1, "only the killed rank is a failure"
    rows = [json.loads(line) for line in (root / "cut" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/lr" in row]
    assert steps == list(range(50, STEPS + 1, 50)), "every logged step stands in metrics.jsonl once"
    assert not list((root / "cut").glob("failures*"))


def test_a_wrong_setting_is_told_and_not_tried_again(done: Done, root: Path):
    assert "(wrong) failed: optim.lr='fast' is not a valid float" in done.wrong
    assert "exit code 1" in done.wrong
    assert "Traceback" not in done.wrong
    told = json.loads((root / "wrong" / "error.json").read_text())
    assert (told["kind"], told["message"]) == ("ConfigError", "optim.lr='fast' is not a valid float")
    assert done.cut.slurm.states(told["job"]) == ["FAILED"]


def test_a_command_that_fails_is_tried_again_up_to_max_restarts(done: Done, root: Path):
    assert done.cut.slurm.states(done.failing) == ["REQUEUED", "FAILED"]
    log = (root / f"unclip-{done.failing}.log").read_text()
    assert "exit code 1: restart 1 of MAX_RESTARTS=1" in log
    assert "not started again: exit code 1, and MAX_RESTARTS=1 is reached" in log


def test_arrays_write_the_embeddings_of_one_process(done: Done, root: Path):
    run_command("unclip-embed", "run=by-one", "clip=clip", "data=data", "device=cpu", cwd=root)
    assert done.cut.slurm.states(done.array) == ["COMPLETED"] * 2
    assert "exit code 0" in done.parts
    wanted = files(root / "by-one")
    assert len(wanted) > 8
    assert files(root / "by-array") == wanted
    assert files(root / "by-parts") == wanted


def files(folder: Path) -> dict[str, bytes]:
    """What readers see: everything but the locks, and the report, which knows times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    paths = [path for path in paths if path.name != "report.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_interruptions_change_nothing(slurm: Cluster, root: Path):
    long = Job(slurm, root, "long", 3000)
    calm = Job(slurm, root, "calm", 3000)
    for i in range(20):
        long.interrupt((Job.signalled, Job.preempted, Job.signalled, Job.rank_killed)[i % 4 if i < 12 else i % 3])
    slurm.wait(long.id, calm.id, seconds=1200)
    assert slurm.states(long.id) == ["REQUEUED"] * 20 + ["COMPLETED"]
    assert weights(root / "long") == weights(root / "calm")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sharded_run_of_two_nodes_interrupted_twice_ends_with_the_weights_of_an_undisturbed_one(
    slurm: Cluster, root: Path
):
    cut, calm = (Job(slurm, root, run, STEPS, "fsdp2") for run in ("cut-shards", "calm-shards"))
    cut.interrupt(Job.signalled)
    cut.interrupt(Job.rank_killed)
    slurm.wait(cut.id, calm.id, seconds=1200)
    assert slurm.states(cut.id) == ["REQUEUED"] * 2 + ["COMPLETED"]
    assert weights(root / "cut-shards") == weights(root / "calm-shards")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep_is_an_array_whose_signalled_trial_goes_on(slurm: Cluster, root: Path):
    given = [f"trainer.max_steps={STEPS}", "optim.lr=1e-3,1e-4", "hydra.sweeper.objective=val/mse"]
    sweep = hydra(slurm, root, *TRAIN, *given, "sweep=grid", "run=sweep", "launch.folder=jobs")
    trials = [root / "sweep" / str(number) for number in range(2)]
    deadline = time.monotonic() + 400
    while not all((trial / "checkpoints" / "last.ckpt").exists() for trial in trials) and sweep.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    found = slurm.ask("squeue", "-h", "--array", "-o", "%i").split()
    slurm.ask("scancel", "--signal=USR1", sorted(found)[0])
    said = ended(sweep)
    assert "exit code 0" in said
    assert sorted(slurm.states(sorted(found)[0].partition("_")[0])) == ["COMPLETED", "COMPLETED", "REQUEUED"]
    table = (root / "sweep" / "trials.csv").read_text().splitlines()
    assert table[0] == "trial,optim.lr,val/mse"
    assert sorted(row[0] for row in table[1:]) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_pipeline_runs_from_the_clip_to_the_evaluation(slurm: Cluster, root: Path):
    common = ["logger=none", "trainer.accelerator=cpu", "data.num_workers=0", "trainer.val_every=100"]
    settings = [f"data={root}/data runs={root}/chain", f"all_job=({' '.join(CPU)})", "embed=(device=cpu)"]
    settings += ["embed_job=(--array=0-1)", "decoder_job=(--ntasks-per-node=2)"]
    for stage in ("clip", "prior", "decoder", "upsampler"):
        settings.append(f"{stage}=({shlex.join([*TINY[stage], *common])})")
    (root / "settings.sh").write_text("\n".join(settings) + "\n")
    done = subprocess.run(
        [SCRIPTS / "pipeline.sh", "settings.sh"], cwd=root, env=slurm.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clip → embed → prior ∥ decoder ∥ upsampler → evaluate\n"
    jobs = [line.split()[1] for line in done.stderr.splitlines()]
    slurm.wait(*jobs, seconds=3000)
    assert [state for job in jobs for state in slurm.states(job)] == ["COMPLETED"] * 7  # the array has two tasks
    for run in ("clip", "prior", "decoder", "upsampler"):
        assert (root / "chain" / run / "artifact" / "manifest.json").exists(), run
    assert (root / "chain" / "evaluation" / "evaluation.json").exists()
