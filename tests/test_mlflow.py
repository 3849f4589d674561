"""``logger=mlflow``: read back from its store, and from a real server."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from test_checkpoint import cfg  # noqa: F401  the fixture

from unclip.artifact import read_manifest
from unclip.config import LoggerConfig, LoggerName
from unclip.errors import ConfigError, TrainingError
from unclip.train import ClipTrainConfig, train


def check_a_run_that_failed_and_went_on(cfg: ClipTrainConfig, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It fails beyond its last checkpoint and is started again: one MLflow run that holds every step once."""
    cfg = replace(cfg, logger=LoggerConfig(LoggerName.mlflow, project="tests", tracking_uri=uri))
    save = torch.save

    def failing(checkpoint: Any, *arguments: Any) -> None:
        if checkpoint["global_step"] == 4:
            raise OSError(28, "No space left on device")
        save(checkpoint, *arguments)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(TrainingError):
        train(cfg)
    monkeypatch.setattr(torch, "save", save)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.status == "FAILED"
    assert max(metric.step for metric in client.get_metric_history(run.info.run_id, "train/lr")) >= 4
    train(cfg)
    (run,) = client.search_runs([run.info.experiment_id])
    assert run.info.run_id == (Path(cfg.run) / "mlflow-id.txt").read_text()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    for name, steps in {"train/contrastive": [1, 2, 3, 4, 5, 6], "val/contrastive": [2, 4, 6]}.items():
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == steps
    assert run.data.params["trainer/batch_size"] == "8"
    manifest = read_manifest(Path(cfg.run))
    assert (run.data.tags["artifact"], run.data.tags["data"]) == (manifest.hash, manifest.data)


def test_a_run_in_a_database(cfg: ClipTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    check_a_run_that_failed_and_went_on(cfg, f"sqlite:///{tmp_path / 'mlflow.db'}", monkeypatch)


def test_without_a_server_it_asks_for_one(cfg: ClipTrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"logger\.tracking_uri=http://HOST:PORT, or MLFLOW_TRACKING_URI"):
        train(replace(cfg, logger=LoggerConfig(LoggerName.mlflow)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real server, in an environment of its own: it wants other versions than the rest."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "mlflow==3.17.2"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'server.db'}"
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", tmp_path / "artifacts"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield url
        process.terminate()


@pytest.mark.slow
def test_a_run_on_a_real_server(cfg: ClipTrainConfig, server: str, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    check_a_run_that_failed_and_went_on(cfg, server, monkeypatch)
