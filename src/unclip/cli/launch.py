"""``launch=slurm``: submit a command, or all combinations of a sweep as an array, to SLURM through submitit; wait for the end.

Each job runs ``train.sbatch``, as a job submitted by hand does, so it saves, is requeued and ends in the same way.
"""

import logging
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import version
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from unclip.config import typed
from unclip.errors import ConfigError, TrainingError
from unclip.job_notes import ERROR, noted

if TYPE_CHECKING:
    from submitit import SlurmJob

log = logging.getLogger(__name__)
SCRIPT = Path(__file__).parents[1] / "slurm" / "train.sbatch"


@dataclass
class SlurmConfig:
    """What each job asks SLURM for.

    ``nodes`` and ``tasks_per_node`` follow ``trainer.num_nodes`` and ``trainer.devices``. ``minutes`` is the time limit;
    ``signal_seconds`` before it the run saves and is requeued. ``parallel`` jobs of a sweep run at a time. ``max_restarts``
    after failures. ``folder`` holds logs and pickles and must be on a file system that all nodes see. ``script`` is a copy
    of train.sbatch with what your cluster needs. ``options`` are further options of sbatch: ``launch.options.constraint=h100``.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 8
    gpus_per_node: int = 0
    mem_gb: int | None = None
    minutes: int = 24 * 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    parallel: int = 64
    signal_seconds: int = 120
    max_restarts: int = 3
    folder: str = "slurm"
    script: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "minutes", "parallel"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"{name}={self.__dict__[name]} must be at least 1")
        if self.script is not None and not Path(self.script).is_file():
            raise ConfigError(f"script={self.script} is not a file; copy {SCRIPT} and change the copy")


@dataclass
class Task:
    """One job's part of Hydra: what a local launcher would call here. It is pickled, and called by every rank of the job."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    @property
    def run(self) -> str:
        if OmegaConf.is_missing(self.config, "run"):
            raise ConfigError("run is not set; give it on the command line: run=...")
        return str(self.config.run)

    def __call__(self) -> JobReturn:
        """Raises SystemExit on failure, so that no result is written and ``unclip job`` decides what follows."""
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):  # submitit ignores them, or requeues at once
            signal.signal(number, signal.SIG_DFL)
        setup_globals()
        version.setbase("1.3")  # as the command's own; without it Hydra changes the working directory
        JobRuntime.instance().set("name", self.config.hydra.job.name)
        done = run_job(self.task_function, self.config, "hydra.sweep.dir", "hydra.sweep.subdir", self.hydra_context)
        if done.status is not JobStatus.COMPLETED:
            traceback.print_exception(done._return_value)
            raise SystemExit(1)
        return done


def run_on_slurm(tasks: list[Task]) -> list[JobReturn]:
    """Submit ``tasks``, several as one array, and wait until all have ended.

    A job that failed is a JobReturn which raises when its value is read. Raises :class:`ConfigError` where SLURM or
    submitit is missing or sbatch refuses the job, and :class:`TrainingError` if all jobs failed.
    """
    cfg = _settings(tasks[0].config)
    jobs = _submit(tasks, cfg)
    ids = [str(job.job_id) for job in jobs]
    log.info("submitted %s; log: %s", ", ".join(ids), ", ".join(str(job.paths.stdout) for job in jobs[:3]))
    try:
        _wait(ids)
    except KeyboardInterrupt:
        log.info("the jobs go on; end them with: scancel %s", ids[0].partition("_")[0])
        raise SystemExit(130) from None
    results = [_result(job, task) for job, task in zip(jobs, tasks, strict=True)]
    if all(result.status is JobStatus.FAILED for result in results):
        raise results[0]._return_value
    return results


def _settings(config: DictConfig) -> SlurmConfig:
    try:
        return typed(config.launch, SlurmConfig)
    except ConfigError as error:
        raise ConfigError(f"launch: {error}") from error


def _submit(tasks: list[Task], cfg: SlurmConfig) -> "list[SlurmJob[Any]]":
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise ConfigError(
            "launch=slurm needs submitit: pip install 'unclip[slurm]'. Without it: sbatch scripts/slurm/train.sbatch"
        ) from error
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "launch=slurm: no sbatch or srun here. Submit from a login node of a SLURM cluster, or leave out launch=slurm"
        )
    script = shlex.join(["bash", str(Path(cfg.script or SCRIPT).resolve()), sys.executable])
    executor = SlurmExecutor(folder=Path(cfg.folder).resolve(), max_num_timeout=0, python=script)
    executor.update_parameters(**_parameters(tasks, cfg))
    try:
        with executor.batch():
            return [executor.submit(task) for task in tasks]  # type: ignore[misc]
    except FailedJobError as error:
        raise ConfigError(f"launch: sbatch refuses this job: {error}") from error


def _parameters(tasks: list[Task], cfg: SlurmConfig) -> dict[str, Any]:
    """submitit's names for the settings; None leaves one to the cluster."""
    runs = shlex.join(task.run for task in tasks)
    setup = [
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH MAX_RESTARTS={cfg.max_restarts}",
        f"runs=({runs})",
        'export UNCLIP_RUN="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
    ]
    more = {"signal": f"USR1@{cfg.signal_seconds}", "requeue": True, **cfg.options}
    given = {
        "job_name": str(tasks[0].config.hydra.job.name),
        "nodes": cfg.nodes,
        "ntasks_per_node": cfg.tasks_per_node,
        "cpus_per_task": cfg.cpus_per_task,
        "gpus_per_node": cfg.gpus_per_node or None,
        "mem": f"{cfg.mem_gb}GB" if cfg.mem_gb else None,
        "time": cfg.minutes,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "array_parallelism": cfg.parallel,
        "stderr_to_stdout": True,
        "use_srun": False,  # the script calls it
        "setup": setup,
        "additional_parameters": more,
    }
    return {name: value for name, value in given.items() if value is not None}


def _wait(ids: list[str]) -> None:
    """Until none of the jobs is in the queue any more; one that is requeued never leaves it."""
    numbers = ",".join(sorted({job.partition("_")[0] for job in ids}))
    pause, left = 1.0, len(ids)
    while True:
        command = ["squeue", "--noheader", "--array", "--jobs", numbers, "--format", "%i"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        known = asked.returncode == 0 or "Invalid job id" in asked.stderr  # else the controller is away: wait for it
        if known and (now := len(asked.stdout.split())) != left:
            left = now
            if left:
                log.info("%d of %d jobs are left", left, len(ids))
        if known and not left:
            return
        time.sleep(pause)
        pause = min(10.0, 1.2 * pause)


def _result(job: "SlurmJob[Any]", task: Task) -> JobReturn:
    """What rank zero returned; without that the job has failed."""
    deadline = time.monotonic() + 5  # a network file system may show it late
    while not job.paths.result_pickle.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if job.paths.result_pickle.exists():
        kind, value = pickle.loads(job.paths.result_pickle.read_bytes())
        if kind == "success":
            return value
    told = noted(Path(task.run), ERROR, str(job.job_id))
    reason = told["message"] if told else f"its log says why: {job.paths.stdout}"
    failed = JobReturn(overrides=list(task.config.hydra.overrides.task), status=JobStatus.FAILED)
    failed.return_value = TrainingError(f"job {job.job_id} ({task.run}) failed: {reason}")
    return failed
