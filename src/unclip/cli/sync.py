"""``unclip sync``: send a run that wandb kept offline to its server, or say what that takes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import typer

from unclip import wandb_files
from unclip.errors import ConfigError
from unclip.loggers import reachable, wandb_url


def sync_run(run: Path) -> bool:
    """Send the offline folders of ``run``, oldest first: they are one run with one id. False where wandb did not send
    them all, and, with the command to copy, where the server cannot be reached or nobody is logged in."""
    folders = [folder for folder in wandb_files.folders(run) if wandb_files.is_begun(folder)]
    if not folders:
        raise ConfigError(f"{run} holds no offline run of wandb; runs with logger=wandb have one in RUN/wandb")
    arguments = ["sync", *map(str, folders)]
    lacking = _lacking()
    if lacking:
        typer.echo(f"{lacking}; then run, here or on a machine that has these folders:")
        typer.echo(shlex.join(["wandb", *arguments]))
        return False
    subprocess.run([sys.executable, "-m", "wandb", *arguments], check=False)  # its exit code is 0 whatever happens
    return all(wandb_files.is_sent(folder) for folder in folders)


def _lacking() -> str:
    if not reachable(wandb_url()):
        return f"{wandb_url()} cannot be reached: find a route to it"
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return "nobody is logged in to wandb: `wandb login`, or set WANDB_API_KEY"
    return ""
