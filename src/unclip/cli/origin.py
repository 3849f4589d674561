"""Where a figure comes from: unclip's version, its commit and the machine."""

import platform
import subprocess
from pathlib import Path

import torch

from unclip import __version__
from unclip.data.parallel import num_cores

CHECKOUT = Path(__file__).resolve().parents[3]


def origin() -> dict[str, str | None]:
    """``version``; ``commit``, seven digits, with a star where files differ from it, null where unclip is not run from its git
    checkout; ``machine``: cores, processor, GPUs and torch."""
    return {"version": __version__, "commit": _commit(), "machine": _machine()}


def _commit() -> str | None:
    if _git("rev-parse", "--show-toplevel") != str(CHECKOUT):  # installed, perhaps below another project's checkout
        return None
    commit, changed = _git("rev-parse", "--short=7", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("*" if changed else "")


def _git(*words: str) -> str | None:
    """What git says of the checkout; nothing where there is no git or it refuses."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = [f"{num_cores()} cores", names[0] if names else platform.processor() or platform.machine()]
    found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*found, f"torch {torch.__version__}"])
