"""A real SLURM for these tests: two nodes on loopback, started by cluster.sh in a temporary folder and stopped at the end."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests_support import lacks

SCRIPT = Path(__file__).with_name("cluster.sh")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """A running SLURM; partitions ``main`` and ``high``, whose jobs preempt those of ``main``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{SBIN}"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a client prints."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environment, **environment}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def restart_controller(self) -> None:
        subprocess.run([SCRIPT, "controller", self.folder], env=self.environment, check=True, timeout=120)

    def states(self, job: str) -> list[str]:
        """How an ended job, or each task of an array, ended, with a row for each time it was requeued."""
        for _ in range(60):  # the accounting is some seconds late
            found = self.ask("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State").split("\n")
            if not {"PENDING", "RUNNING", "COMPLETING"} & set(found):
                break
            time.sleep(0.5)
        return found

    def wait(self, *jobs: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while left := self.ask("squeue", "-h", "-j", ",".join(jobs), "-o", "%i %T %r"):
            assert time.monotonic() < deadline, f"still in the queue: {left}"
            time.sleep(0.5)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    missing = [name for name in ("slurmctld", "slurmdbd", "munged", "mariadbd") if not shutil.which(name, path=SBIN)]
    if missing:
        lacks("slurm", f"{', '.join(missing)} not found; `make setup-slurm` installs a SLURM (Debian, root or sudo)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets' paths must be short
    cluster = Cluster(folder)
    try:
        started = subprocess.run(
            [SCRIPT, "start", folder, str(_free_ports())], env=cluster.environment, stderr=subprocess.PIPE, text=True
        )
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        subprocess.run([SCRIPT, "stop", folder], env=cluster.environment, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> int:
    """The first of five free ports; beyond those that training takes by the number of its job (15000 to 24999)."""
    for _ in range(100):
        first = random.randrange(25_000, 32_000)
        sockets = [socket.socket() for _ in range(5)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise OSError("no five free ports in a row")
