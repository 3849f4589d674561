"""``logger=wandb`` without a network: the run that it leaves behind is read back."""

import json
import shlex
import shutil
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support import TINY, kill_beyond
from wandb.proto import wandb_internal_pb2 as pb
from wandb_server import wandb_server

from unclip.artifact import read_manifest
from unclip.cli import train as commands
from unclip.cli.sync import sync_run
from unclip.config import LoggerConfig, LoggerName
from unclip.data.shapes import write_shapes
from unclip.errors import ConfigError
from unclip.loggers import is_offline

BLOCK, HEADER, STEPS = 32768, 7, 20


def records(path: Path) -> Iterator[pb.Record]:
    """The protobuf records of an offline run: a LevelDB log after a header of seven bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, pieces = HEADER, []
    while place + HEADER <= len(content):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, place)
        piece = content[place + HEADER : place + HEADER + length]
        if not kind and not length:
            return
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        place += HEADER + length
        pieces.append(piece)
        if kind in (1, 4):  # a whole record, or its last piece
            record = pb.Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics in one offline folder."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records(path)
        if r.WhichOneof("record_type") == "history"
    ]


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed twice and then ended, as a trial of a sweep named "sweep"."""
    root = tmp_path_factory.mktemp("wandb")
    write_shapes(root / "data", num=64, size=32, workers=1)
    run = root / "sweep/up"
    run.mkdir(parents=True)
    (run / "trial.json").write_text("{}")
    given = [f"run={run}", f"data.path={root / 'data'}", *TINY["upsampler"], f"trainer.max_steps={STEPS}"]
    given += ["logger=wandb", "logger.project=tests", "trainer.val_every=5"]
    checkpoint = run / "checkpoints" / "last.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("WANDB_MODE", "offline")
        first = kill_beyond(5, checkpoint, ["train-upsampler", *given], root)
        kill_beyond(first + 3, checkpoint, ["train-upsampler", *given], root)
        patch.setattr(sys, "argv", ["train-upsampler", *given])
        commands.train_upsampler()
    last = max(run.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 60  # wandb's own process writes it a little later
    while not any(row.get("train/mse") and row["trainer/global_step"] == STEPS for row in history(last)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


@pytest.mark.timeout(900)
def test_the_offline_folders_of_a_run_killed_twice_hold_every_step_once(killed_twice: Path):
    paths = sorted(killed_twice.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(paths) == 3
    assert len({path.stem for path in paths}) == 1, "one id"
    assert (killed_twice / "wandb-id.txt").read_text() == paths[0].stem.removeprefix("run-")
    rows = [row for path in paths for row in history(path)]
    kept = [json.loads(line) for line in (killed_twice / "metrics.jsonl").read_text().splitlines()]
    for kind in ("train/mse", "val/mse"):
        logged = [row for row in rows if kind in row]
        assert [row["trainer/global_step"] for row in logged] == [row["step"] for row in kept if kind in row]
        assert [row[kind] for row in logged] == pytest.approx([row[kind] for row in kept if kind in row])
    assert [row["step"] for row in kept if "train/mse" in row] == list(range(2, STEPS + 1, 2))
    assert [row["step"] for row in kept if "val/mse" in row] == list(range(5, STEPS + 1, 5))
    assert all(row["_step"] == row["trainer/global_step"] for row in rows if "trainer/global_step" in row)


def test_an_offline_run_holds_settings_lineage_group_and_a_sheet(killed_twice: Path):
    path = sorted(killed_twice.glob("wandb/offline-run-*/run-*.wandb"))[-1]
    found = list(records(path))
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {(r.project, r.display_name, r.run_group) for r in runs} == {("tests", "up", "sweep")}
    settings = {i.key: i.value_json for r in found if r.WhichOneof("record_type") == "config" for i in r.config.update}
    settings |= {i.key: i.value_json for r in runs for i in r.config.update}
    manifest = read_manifest(killed_twice)
    assert json.loads(settings["model"])["low_size"] == 16
    assert json.loads(settings["lineage"]) == {"data": manifest.data, "clip": ""}
    assert any(key.split(".")[0] == "sheet" for row in history(path) for key in row)
    summary = {i.key: i.value_json for r in found if r.WhichOneof("record_type") == "summary" for i in r.summary.update}
    assert json.loads(summary["artifact"]) == manifest.hash
    assert f"upsampler-{manifest.hash[:12]}".encode() in path.read_bytes()


def test_sync_prints_what_is_needed_without_a_route(
    killed_twice: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert sync_run(killed_twice) is False
    said = capsys.readouterr().out
    assert "http://127.0.0.1:9 cannot be reached" in said
    commanded = shlex.split(said.splitlines()[-1])
    assert commanded[:2] == ["wandb", "sync"]
    begun = [path.parent for path in sorted(killed_twice.glob("wandb/offline-run-*/*.wandb")) if any(records(path))]
    assert commanded[2:] == [str(path) for path in begun]
    with pytest.raises(ConfigError, match="holds no offline run of wandb"):
        sync_run(killed_twice.parent)


def test_sync_sends_every_step_once(killed_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """wandb's own client, and a stand-in for its server."""
    run = tmp_path / "up"
    shutil.copytree(killed_twice, run)
    begun_only = run / "wandb" / "offline-run-20200101_000000-killed"
    begun_only.mkdir()
    (begun_only / "run-killed.wandb").write_bytes(b":W&B\0\0\0")
    with wandb_server() as server:
        for name, value in {"BASE_URL": server.url, "API_KEY": "a" * 40}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert sync_run(run) is True
        assert server.names == {(run / "wandb-id.txt").read_text()}
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for kind in ("train/mse", "val/mse"):
            sent = {row["_step"]: row[kind] for row in server.history if kind in row}
            assert sent == pytest.approx({row["step"]: row[kind] for row in rows if kind in row})
        steps = [row["_step"] for row in server.history]
        assert steps == sorted(set(steps))
        shutil.copytree(killed_twice, tmp_path / "again")
        server.refuses = True
        assert sync_run(tmp_path / "again") is False


def test_wandb_stays_offline_where_there_is_no_route(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with caplog.at_level("INFO"):
        assert is_offline(LoggerConfig(LoggerName.wandb))
    assert "cannot be reached, so wandb stays offline; `unclip sync RUN`" in caplog.text
    assert not is_offline(LoggerConfig(LoggerName.wandb, offline=False)), "said so: wandb's own error is the answer"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not is_offline(LoggerConfig(LoggerName.wandb))
    assert is_offline(LoggerConfig(LoggerName.wandb, offline=True))
