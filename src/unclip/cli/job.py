"""``unclip job COMMAND …``: the tasks of a SLURM job, and whether the job is started again once they have ended.

``scripts/slurm/train.sbatch`` calls it, and so does ``launch=slurm``.

- Stopped by a signal after saving (the time limit, a preemption): requeued, as often as it takes.
- A setting or an artifact is wrong (``error.json``): ends.
- Any other failure (a killed rank, a lost node): requeued up to MAX_RESTARTS times.
- Cancelled, or requeued by SLURM itself: nothing is left to do.
"""

import logging
import os
import signal
import subprocess
import time
from pathlib import Path

from unclip.errors import ConfigError
from unclip.job_notes import ERROR, STOPPED, job_id, note, noted

log = logging.getLogger(__name__)
PATIENCE = 600.0  # seconds to wait for a controller that does not answer


def run_job(command: list[str]) -> int:
    """Run ``command`` in every task of this SLURM job; returns the exit code of the batch script.

    Raises :class:`ConfigError` outside of a job, for a command that names no run, and for a bad MAX_RESTARTS.
    """
    job, run, limit = _this_job(), _run_folder(command), _max_restarts()
    failures_file = f"failures-{job}.json"
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM tells the tasks too: they save and end, and srun with them
        signal.signal(number, lambda *_: None)
    for name in (ERROR, STOPPED):
        if noted(run, name, job):
            (run / name).unlink()
    code = _srun(command, run)
    if code == 0:
        (run / failures_file).unlink(missing_ok=True)
        return 0
    if (state := _state(job)) != "RUNNING":
        log.info("job %s is %s: left to SLURM", job, state.lower() or "gone")
        return code
    if stopped := noted(run, STOPPED, job):
        if stopped["signal"] == signal.SIGINT:
            return code
        log.info("stopped by signal %d at step %d", stopped["signal"], stopped["step"])
        return _requeue(job)
    if error := noted(run, ERROR, job):
        log.info(
            "not started again: %s (%s). Mend it, and submit the same line once more", error["message"], run / ERROR
        )
        return code
    failures = (noted(run, failures_file, job) or {"count": 0})["count"] + 1
    note(run, failures_file, count=failures)
    if failures > limit:
        log.info(
            "not started again: exit code %d, and MAX_RESTARTS=%d is reached. See the log above for the cause; "
            "the same line resumes %s",
            code,
            limit,
            run,
        )
        return code
    log.info("exit code %d: restart %d of MAX_RESTARTS=%d", code, failures, limit)
    return _requeue(job)


def _this_job() -> str:
    job = job_id()
    if job is None:
        raise ConfigError("unclip job works inside of a SLURM job: sbatch scripts/slurm/train.sbatch COMMAND run=...")
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(f"this job was submitted with --ntasks={tasks}; give --nodes and --ntasks-per-node instead")
    return job


def _run_folder(command: list[str]) -> Path:
    """The run that ``command`` names, or UNCLIP_RUN where it does not show; a job submitted by another inherits that one's."""
    found = [word.lstrip("+").partition("=")[2] for word in command if word.lstrip("+").startswith("run=")]
    run = found[-1] if found else os.environ.get("UNCLIP_RUN", "")
    if not command or not run:
        raise ConfigError(
            f"`{' '.join(command)}` names no run; submit a command with its run: "
            "sbatch scripts/slurm/train.sbatch train-prior run=..."
        )
    return Path(run)


def _max_restarts() -> int:
    text = os.environ.get("MAX_RESTARTS", "3")
    if not text.isdecimal():
        raise ConfigError(f"MAX_RESTARTS={text} is not a number of restarts: 0, 1, 2, ...")
    return int(text)


def _srun(command: list[str], run: Path) -> int:
    """All tasks; the first that fails ends the others. Training is told how many ranks the job gives it."""
    environment = {**os.environ, "UNCLIP_RUN": str(run)}
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):  # srun does not take it over by itself
        environment = {"OMP_NUM_THREADS": cpus, "SRUN_CPUS_PER_TASK": cpus, **environment}
    if Path(command[0]).name.startswith("train-"):
        ranks = {
            "trainer.num_nodes": environment.get("SLURM_NNODES"),
            "trainer.devices": environment.get("SLURM_NTASKS_PER_NODE"),
        }
        given = {word.lstrip("+").partition("=")[0] for word in command}
        command = command + [f"{name}={value}" for name, value in ranks.items() if value and name not in given]
    return subprocess.run(["srun", "--kill-on-bad-exit=1", *command], env=environment, check=False).returncode


def _state(job: str) -> str:
    return _ask("squeue", "--noheader", "--jobs", job, "--format", "%T").strip()


def _requeue(job: str) -> int:
    """Put this job back into the queue, which ends this process soon."""
    _ask("scontrol", "requeue", job)
    log.info("job %s is requeued", job)
    return 0


def _ask(*command: str) -> str:
    """What a SLURM command prints. A controller that is away, during its restart for instance, is waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 or time.monotonic() > deadline:
            done.check_returncode()
            return done.stdout
        log.info("%s: %s", command[0], done.stderr.strip())
        time.sleep(min(5.0, PATIENCE / 10))
