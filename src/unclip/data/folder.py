"""`unclip data folder`: a user's own captioned pictures, written as shards, and a report of what was refused and why."""

import csv
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unclip.data.shards import IMAGE_TYPES, ShardWriter
from unclip.data.transforms import load_image
from unclip.data.write_lock import WriteLock
from unclip.drafts import write_atomic
from unclip.errors import ConfigError, DataError
from unclip.progress import counted

TABLES = (".csv", ".jsonl", ".parquet")
_AHEAD = 64  # pictures that are decoded ahead of the writer


@dataclass(frozen=True)
class Entry:
    """A picture that the source names; `caption` is None where the caption's file has to be read."""

    name: str
    path: Path
    caption: str | None


@dataclass
class FolderReport:
    """Samples written per split, and the refused pictures with their reason."""

    written: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person: totals, then each reason with an example."""
        reasons = Counter(reason.split(":")[0] for reason in self.refused.values())
        examples = {reason.split(":")[0]: f"{name}: {reason}" for name, reason in reversed(self.refused.items())}
        said = [f"{split}: {count} pictures" for split, count in self.written.items()]
        if "val" not in self.written:
            said.append("no picture for validation: raise --val, or train with data.val_split=null")
        return said + [f"refused {count}: {reason}, such as {examples[reason]}" for reason, count in reasons.items()]


class RefusedError(DataError):
    """Why a picture does not enter a data set."""


def write_folder(
    src: Path, out: Path, *, min_size: int = 32, val: float = 0.05, seed: int = 0, workers: int | None = None
) -> FolderReport:
    """Write `out`/{train,val} from a folder of NAME.jpg|png|webp with NAME.txt, or from a table of path and caption.

    Args:
        src: a folder (searched with its subfolders), or a .csv, .jsonl or .parquet file with the columns `path` and
            `caption`; relative paths start at the table's folder.
        min_size: the shorter side in pixels that a picture must have.
        val: share of the pictures for validation. A picture's split depends on its bytes and `seed` only.
        workers: threads that decode, by default one per core.

    Pictures are written as they are, without a second compression. Refused are those that cannot be decoded to the end,
    are too small or too large, repeat another one byte for byte, or have no caption; `out`/report.json names each.
    Raises ConfigError for settings out of range, DataError where nothing is left or `out` holds shards already,
    UnclipError where another process writes there. The same command again replaces what a killed one left.
    """
    if not 0 <= val < 1:
        raise ConfigError(f"--val is {val}; it is a share of the pictures, at least 0 and below 1")
    check = picture_check(min_size)
    entries = _entries(Path(src))
    if not entries:
        raise DataError(f"{src} holds no picture (.{', .'.join(IMAGE_TYPES)}); nothing was written")
    report, first_of = FolderReport(), dict[str, str]()
    with WriteLock(out, ["train", "val"]):
        with ExitStack() as stack:
            advance = stack.enter_context(counted(len(entries), "reading pictures"))
            writers: dict[str, ShardWriter] = {}
            pool = stack.enter_context(ThreadPoolExecutor(workers or os.cpu_count() or 1))
            for number, (entry, found) in enumerate(_ahead(pool, entries, check)):
                advance(1)
                if isinstance(found, str):
                    report.refused[entry.name] = found
                    continue
                content, captions = found
                digest = hashlib.sha256(content).hexdigest()
                if digest in first_of:
                    report.refused[entry.name] = f"duplicate: the same bytes as {first_of[digest]}"
                    continue
                first_of[digest] = entry.name
                split = "val" if _place(digest, seed) < val else "train"
                if split not in writers:
                    writers[split] = stack.enter_context(ShardWriter(out / split))
                kind = entry.path.suffix.lower().lstrip(".")
                meta = {"path": entry.name} | ({"captions": captions} if len(captions) > 1 else {})
                writers[split].write(f"{number:08d}", content, " ".join(captions), meta, kind)
                report.written[split] = report.written.get(split, 0) + 1
            if not report.written:
                raise DataError(f"{src} holds no usable picture, nothing was written: " + "; ".join(report.lines()))
            if "train" not in report.written:
                raise DataError(f"{src} holds {report.written['val']} usable pictures, all of them in val; lower --val")
        write_atomic(out / "report.json", json.dumps(vars(report), indent=2, ensure_ascii=False).encode())
    return report


def _ahead(
    pool: ThreadPoolExecutor, entries: list[Entry], check: Callable[[bytes], None]
) -> Iterator[tuple[Entry, tuple[bytes, list[str]] | str]]:
    """Each entry with its picture and captions or the reason against it, read by the pool a little ahead, in order."""
    jobs = ((entry, pool.submit(_read, entry, check)) for entry in entries)
    waiting = list(itertools.islice(jobs, _AHEAD))
    while waiting:
        entry, result = waiting.pop(0)
        yield entry, result.result()
        waiting += itertools.islice(jobs, 1)


def _read(entry: Entry, check: Callable[[bytes], None]) -> tuple[bytes, list[str]] | str:
    try:
        content = _content(entry.path)
        check(content)
        captions = _captions(entry)
        "".join(captions).encode()
    except RefusedError as error:
        return str(error)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return "caption not Unicode: it holds a lone surrogate"
    return content, captions


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(f"unreadable: {error.strerror or error}") from error


def picture_check(min_size: int) -> Callable[[bytes], None]:
    """A function that raises RefusedError for an encoded picture that cannot be decoded to its end or is too small.

    `min_size` is the shorter side in pixels that a picture must have; ConfigError where it is not positive.
    """
    if min_size < 1:
        raise ConfigError(f"--min-size is {min_size}; it must be a positive number of pixels")
    return partial(_check_picture, min_size)


def _check_picture(min_size: int, content: bytes) -> None:
    try:
        height, width = load_image(content).shape[1:]
    except DataError as error:
        raise RefusedError(f"not decodable: {error}") from error
    if min(height, width) < min_size:
        raise RefusedError(f"too small: {width} x {height} pixels")


def _captions(entry: Entry) -> list[str]:
    """The lines that hold something; together they are the caption, and each is one of several (``unclip-embed captions=5``)."""
    caption = entry.caption
    if caption is None:
        path = entry.path.with_suffix(".txt")
        try:
            caption = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise RefusedError(f"no caption: there is no {path.name}") from None
        except UnicodeDecodeError as error:
            raise RefusedError(f"caption not UTF-8: byte {error.start} of {path.name}") from error
        except OSError as error:
            raise RefusedError(f"unreadable: {path.name}: {error.strerror or error}") from error
    captions = [" ".join(line.split()) for line in caption.splitlines() if line.strip()]
    if not captions:
        raise RefusedError("empty caption")
    return captions


def _entries(src: Path) -> list[Entry]:
    """All pictures that a source names, in a fixed order."""
    if src.is_dir():
        found = sorted(path for path in _files(src) if path.suffix.lower().lstrip(".") in IMAGE_TYPES)
        return [Entry(_printable(path.relative_to(src).as_posix()), path, None) for path in found if not path.is_dir()]
    if src.suffix.lower() not in TABLES:
        raise DataError(f"{src} is neither a folder nor a table ({', '.join(TABLES)}) of path and caption")
    if not src.is_file():
        raise DataError(f"there is no file {src}")
    entries = []
    for number, row in enumerate(_rows(src), 1):
        if row.get("path") is None or "caption" not in row:
            raise DataError(
                f"{src}, row {number}: the columns path and caption are needed, found {sorted(map(str, row))}"
            )
        path = src.parent / str(row["path"])
        if path.suffix.lower().lstrip(".") not in IMAGE_TYPES:
            raise DataError(f"{src}, row {number}: {row['path']} is no .{', .'.join(IMAGE_TYPES)} file")
        entries.append(Entry(_printable(str(row["path"])), path, str(row["caption"] or "")))
    return entries


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, also behind links to folders, each of which is entered once."""
    seen = {(found.st_dev, found.st_ino) for found in [os.stat(folder)]}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()  # of two links to one folder the first is entered, everywhere the same
        for name in list(folders):
            found = os.stat(os.path.join(place, name))
            if (found.st_dev, found.st_ino) in seen:
                folders.remove(name)
            seen.add((found.st_dev, found.st_ino))
        yield from (Path(place, name) for name in names)


def _printable(name: str) -> str:
    """File names may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _rows(table: Path) -> Iterable[dict[str, Any]]:
    try:
        match table.suffix.lower():
            case ".csv":
                with table.open(encoding="utf-8-sig", newline="") as file:
                    return list(csv.DictReader(file))
            case ".jsonl":
                lines = table.read_text(encoding="utf-8-sig").split("\n")
                rows = [json.loads(line) for line in lines if line.strip()]
                if any(not isinstance(row, dict) for row in rows):
                    raise ValueError("a line is not an object")
                return rows
            case _:
                return _parquet_rows(table)
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, csv.Error, OSError) as error:
        raise DataError(f"{table} cannot be read as a table: {error}") from error


def _parquet_rows(table: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{table} needs pyarrow: pip install 'unclip[parquet]', or save the table as .csv") from None
    return parquet.read_table(table).to_pylist()


def _place(digest: str, seed: int) -> float:
    """A number in [0, 1) that depends on the picture's bytes and the seed."""
    return int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()[:13], 16) / 16**13
