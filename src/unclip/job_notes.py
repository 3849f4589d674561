"""What a run tells ``unclip job``, which decides whether a SLURM job that ended is started again.

``error.json``: a setting or an artifact is wrong, so another try would end the same way. ``stopped.json``: a signal came, and
the run saved a checkpoint. Both name the job they are of: a command that fails in a folder which another job is using says
nothing about that job.
"""

import json
import os
from pathlib import Path
from typing import Any

from unclip.drafts import write_atomic

ERROR, STOPPED = "error.json", "stopped.json"


def job_id() -> str | None:
    """This SLURM job, as ``scontrol`` names it (``17``, or ``17_3`` for a task of an array); None outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def note(run: Path, name: str, **what: Any) -> None:
    """Write ``run/NAME`` in one move. A command outside of a job notes nothing in a folder that does not exist."""
    job = job_id()
    if job is None and not run.is_dir():
        return
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / name, (json.dumps({**what, "job": job}, indent=2) + "\n").encode())


def note_error(error: Exception) -> None:
    """``error.json`` in the run of this job (UNCLIP_RUN, from ``unclip job``); nothing outside of one."""
    if (run := os.environ.get("UNCLIP_RUN")) and job_id():
        note(Path(run), ERROR, kind=type(error).__name__, message=str(error))


def noted(run: Path, name: str, job: str) -> dict[str, Any] | None:
    """What ``job`` noted under this name, if it did. What is wrong for one task of an array is wrong for all."""
    try:
        found = json.loads((run / name).read_text())
    except (FileNotFoundError, ValueError):
        return None
    theirs = str(found.get("job"))
    same = theirs.partition("_")[0] == job.partition("_")[0] if name == ERROR else theirs == job
    return found if same else None
