"""Where metrics go: ``metrics.jsonl`` always, and what ``logger`` names beside it.

A run that was killed and resumed holds every step once in each of them.
"""

import csv
import json
import logging
import os
import secrets
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from unclip import wandb_files
from unclip.artifact import Manifest
from unclip.config import LoggerConfig, LoggerName
from unclip.drafts import write_atomic
from unclip.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)


def make_loggers(cfg: LoggerConfig, run: Path, start: int, settings: dict[str, Any], group: str | None) -> list[Logger]:
    """The loggers of a run that begins at step ``start``; ``group`` is the sweep that it belongs to."""
    jsonl = JsonlLogger(run / "metrics.jsonl", start, csv_too=cfg.name is LoggerName.csv)
    loggers: list[Logger] = [jsonl]
    if cfg.name is LoggerName.tensorboard:
        loggers.append(TensorBoardLogger(run, name="tensorboard", version="", purge_step=start + 1))
    elif cfg.name is LoggerName.wandb:
        loggers.append(WandbRun(cfg, run, jsonl, settings, group))
    elif cfg.name is LoggerName.mlflow:
        loggers.append(MlflowRun(cfg, run, settings, group))
    return loggers


class JsonlLogger(Logger):
    """``metrics.jsonl``: one JSON object a line with ``step``, ``seconds`` and the metrics.

    A resumed run first drops the lines beyond its checkpoint, so every step stands there once. ``csv_too`` makes ``metrics.csv``
    of it whenever training ends or stops: one column a metric.
    """

    def __init__(self, path: Path, resumed_step: int, csv_too: bool) -> None:
        super().__init__()
        self.path, self._csv_too = path, csv_too
        self._start = time.monotonic()
        if rank_zero_only.rank == 0 and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_step]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            row = {"step": step, "seconds": round(time.monotonic() - self._start, 2), **values}
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise TrainingError(
                    f"{self.path} could not be written ({error}); the last checkpoint, if any, is whole. "
                    "Free disk space there, and run the same command again"
                ) from error

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings stand in ``config.yaml``."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        rows = self.rows() if self._csv_too else []
        if rows:
            with self.path.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)

    def validation(self, step: int) -> dict[str, float]:
        """What the validation at this step found; empty if there was none."""
        found = [row for row in self.rows() if row["step"] == step]
        return {name: value for row in found for name, value in row.items() if name.startswith("val/")}

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a crash


class WandbRun(WandbLogger):
    """One wandb run, whose id lives in the run's folder; its steps are training's own.

    Offline, each start leaves a folder. A kill takes the newest rows with it, or leaves some beyond the checkpoint: on
    resuming, the folders are cut back to where they are whole and the rest is logged again from ``metrics.jsonl``, so that
    together they hold every step once. A server takes a step once only.
    """

    def __init__(
        self, cfg: LoggerConfig, run: Path, jsonl: JsonlLogger, settings: dict[str, Any], group: str | None
    ) -> None:
        self.is_offline = is_offline(cfg)
        more: dict[str, Any] = {"mode": "offline"} if self.is_offline else {}
        more |= {"project": cfg.project, "save_dir": run, "group": group}
        super().__init__(name=run.resolve().name, id=_id(run / "wandb-id.txt"), **more)
        if rank_zero_only.rank != 0:
            return
        missing = _cut_to_whole(run, jsonl.rows())
        self.experiment.config.update(settings, allow_val_change=True)
        for row in missing:
            values = {key: value for key, value in row.items() if key not in ("step", "seconds")}
            self.log_metrics(values, int(row["step"]))

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.log({**metrics, wandb_files.STEP: step}, step=step)

    @rank_zero_only
    def log_lineage(self, manifest: Manifest, folder: Path) -> None:
        """The artifact's hash and those of its parents; its manifest as a wandb artifact. The weights stay here."""
        import wandb

        self.experiment.summary.update({"artifact": manifest.hash, "step": manifest.step})
        lineage = {
            "hash": manifest.hash,
            "parents": manifest.parents,
            "data": manifest.data,
            "folder": str(folder.resolve()),
        }
        described = wandb.Artifact(f"{manifest.kind}-{manifest.hash[:12]}", type=manifest.kind, metadata=lineage)
        described.add_file(str(folder / "manifest.json"))
        self.experiment.log_artifact(described)

    @rank_zero_only
    def close(self, code: int) -> None:
        """End the run, so that the next one in this process (of a sweep) begins its own."""
        self.experiment.finish(exit_code=code)


def _id(path: Path) -> str:
    """The id in a file of the run's folder, made up by the first start."""
    if not path.exists():
        if rank_zero_only.rank != 0:
            return ""
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def is_offline(cfg: LoggerConfig) -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun") or cfg.offline is not None:
        return bool(cfg.offline is None or cfg.offline)
    if reachable(wandb_url()):
        return False
    log.info("%s cannot be reached, so wandb stays offline; `unclip sync RUN` sends the run later", wandb_url())
    return True


def wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether something listens there, or at the proxy on the way to it."""
    way = urllib.parse.urlsplit(url)
    if not urllib.request.proxy_bypass(way.hostname or ""):
        way = urllib.parse.urlsplit(urllib.request.getproxies().get(way.scheme, url))
    try:
        with socket.create_connection((way.hostname or "", way.port or (80 if way.scheme == "http" else 443)), seconds):
            return True
    except OSError:
        return False


def _cut_to_whole(run: Path, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Cut the offline folders back to the last step up to which nothing is missing; the rows after it."""
    if not wandb_files.folders(run):
        return []
    have, whole = wandb_files.steps(run), -1
    for step in sorted({int(row["step"]) for row in rows}):
        wanted = {key for row in rows if row["step"] == step for key in row} - {"step", "seconds"}
        if not wanted <= have.get(step, set()):
            break
        whole = step
    wandb_files.cut_after(run, whole)
    return [row for row in rows if row["step"] > whole]


class MlflowRun(MLFlowLogger):
    """One MLflow run, whose id lives in the run's folder. What a killed run logged beyond its checkpoint is not logged again:
    the resumed one computes the same numbers."""

    def __init__(self, cfg: LoggerConfig, run: Path, settings: dict[str, Any], group: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        path = run / "mlflow-id.txt"
        known = path.read_text().strip() if path.exists() else None
        uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ConfigError(
                "logger=mlflow needs a server: logger.tracking_uri=http://HOST:PORT, or MLFLOW_TRACKING_URI in the environment"
            )
        tags = {"sweep": group} if group else None
        try:
            super().__init__(cfg.project, run.resolve().name, uri, run_id=known, tags=tags)
        except ModuleNotFoundError as error:
            raise ConfigError("logger=mlflow needs the extra mlflow: pip install 'unclip[mlflow]'") from error
        self._known: dict[str, int] = {}  # of a resumed run: the last step on the server, by metric
        self._resumed = known is not None
        if not known and rank_zero_only.rank == 0:
            write_atomic(path, str(self.run_id).encode())
            self.log_hyperparams(settings)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        new = {key: value for key, value in metrics.items() if not self._resumed or (step or 0) > self._last(key)}
        if new:
            super().log_metrics(new, step)

    def _last(self, key: str) -> int:
        if key not in self._known:
            past = self.experiment.get_metric_history(str(self.run_id), key)
            self._known[key] = max((metric.step for metric in past), default=-1)
        return self._known[key]

    @rank_zero_only
    def log_lineage(self, manifest: Manifest, folder: Path) -> None:
        """The artifact's hash and its parents' as tags, and its manifest."""
        for name, value in {"artifact": manifest.hash, "data": manifest.data, **manifest.parents}.items():
            self.experiment.set_tag(str(self.run_id), name, value)
        self.experiment.log_artifact(str(self.run_id), str(folder / "manifest.json"))
