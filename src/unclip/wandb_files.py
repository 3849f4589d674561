"""wandb's offline folders: which steps they hold, and cutting them back to a step.

A ``run-ID.wandb`` file is seven bytes of header and a LevelDB log: blocks of 32 KiB, in them pieces with a checksum, a
length and a kind (1 a whole record, 2 its first piece, 3 a middle one, 4 its last). A record is a protobuf.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, STEP = 32768, 7, "trainer/global_step"


def folders(run: Path) -> list[Path]:
    """The offline folders of a run, oldest first."""
    return sorted(path.parent for path in run.glob("wandb/offline-run-*/run-*.wandb"))


def is_begun(folder: Path) -> bool:
    """Whether the folder says of which run it is; one of a start that was killed at once says nothing."""
    return any(record.WhichOneof("record_type") == "run" for _, record in _records(folder))


def is_sent(folder: Path) -> bool:
    """Whether wandb has marked the folder as sent."""
    return any(folder.glob("*.synced"))


def history(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each row of metrics begins in the file, and the row; a file cut short by a kill ends at its last whole record."""
    for place, record in _records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield place, {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def cut_after(run: Path, step: int) -> None:
    """Drop everything that was logged once training had passed ``step``, as if the run had been killed before."""
    for folder in folders(run):
        for place, row in history(folder):
            if row.get(STEP, -1) > step:
                os.truncate(_file(folder), place)
                break


def steps(run: Path) -> dict[int, set[str]]:
    """The metrics that stand in the offline folders, by step."""
    found: dict[int, set[str]] = {}
    for folder in folders(run):
        for _, row in history(folder):
            if STEP in row:
                found.setdefault(row[STEP], set()).update(row)
    return found


def _file(folder: Path) -> Path:
    (path,) = folder.glob("run-*.wandb")
    return path


def _records(folder: Path) -> Iterator[tuple[int, Any]]:
    from wandb.proto import wandb_internal_pb2

    content = _file(folder).read_bytes()
    place, start, pieces = HEADER, HEADER, []
    while place + HEADER <= len(content):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, place)
        piece = content[place + HEADER : place + HEADER + length]
        if not kind or len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        start = place if kind in (1, 2) else start
        place += HEADER + length
        pieces.append(piece)
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield start, record
