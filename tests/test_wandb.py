"""``logger=wandb`` without a network: the run that it leaves behind is read back."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_support import TINY, run_command
from wandb.proto import wandb_internal_pb2 as pb

BLOCK, HEADER = 32768, 7


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


@pytest.mark.timeout(240)
def test_an_offline_run_holds_settings_losses_and_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=tmp_path)
    given = ["train-upsampler", "run=up", "data.path=data", *TINY["upsampler"]]
    run_command(*given, "logger=wandb", "logger.offline=true", "logger.project=tests", cwd=tmp_path)
    (path,) = (tmp_path / "up").glob("wandb/offline-run-*/run-*.wandb")
    found = list(records(path))
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {(r.project, r.display_name) for r in runs} == {("tests", "up")}
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    losses = {row["trainer/global_step"]: row["train/mse"] for row in history if "train/mse" in row}
    rows = [json.loads(line) for line in (tmp_path / "up/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx({row["step"]: row["train/mse"] for row in rows if "train/mse" in row})
    assert set(losses) == {2, 4}
    settings = {i.key: i.value_json for r in found if r.WhichOneof("record_type") == "config" for i in r.config.update}
    settings |= {i.key: i.value_json for r in runs for i in r.config.update}
    assert json.loads(settings["model"])["low_size"] == 16
    assert any(key.split(".")[0] == "sheet" for row in history for key in row)
