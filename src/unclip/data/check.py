"""`unclip data check`: every sample of any webdataset read, its index written or verified, and a report of what is bad."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclip.data.folder import picture_check
from unclip.data.shards import scan_shard, write_index
from unclip.drafts import write_atomic
from unclip.errors import DataError
from unclip.progress import counted

_log = logging.getLogger(__name__)


@dataclass
class CheckReport:
    """What `check_data` found: good samples per split, bad samples and shards with their reason, and each index's state."""

    samples: dict[str, int] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.bad and all(state in ("verified", "written") for state in self.index.values())


def check_data(folder: Path, *, min_size: int = 32) -> CheckReport:
    """Read every sample of a data set, or of one split: decode its picture, look for its caption.

    Bad are the samples that `unclip data folder` would refuse: that cannot be decoded to the end, have a shorter side
    below ``min_size`` pixels or are too large, repeat another one byte for byte, or have no caption. An index that is
    missing is written, without them; one that is there is compared with the shards and left as it is. A shard that is cut
    short or cannot be read is bad as a whole: no index of its split is written. ``folder``/report.json says all of it.
    Raises DataError where there are no shards at all, ConfigError for a ``min_size`` that is not positive.
    """
    check = picture_check(min_size)
    splits = [folder] if any(folder.glob("*.tar")) else sorted({tar.parent for tar in folder.glob("*/*.tar")})
    if not splits:
        raise DataError(f"{folder} holds no *.tar file, nor does any folder in it")
    report, first_of = CheckReport(), dict[str, str]()
    tars = {split: sorted(split.glob("*.tar")) for split in splits}
    with counted(sum(map(len, tars.values())), f"checking {folder}") as advance:
        for split, paths in tars.items():
            entries, unread = [], []
            for path in paths:
                bad: dict[str, str] = {}
                try:
                    entries.append(scan_shard(path, check, bad, first_of))
                except (DataError, OSError) as error:
                    unread.append(path.name)
                    report.bad[str(path)] = _why_unread(error)
                report.bad |= {f"{path}: {key}": reason for key, reason in bad.items()}
                advance(1)
            entries = [entry for entry in entries if entry["num_samples"]]
            report.samples[split.name] = sum(entry["num_samples"] for entry in entries)
            report.index[split.name] = _verify_or_write(split, entries, unread)
    _write_report(folder / "report.json", vars(report))
    return report


def _why_unread(error: DataError | OSError) -> str:
    return f"unreadable: {error.strerror or error}" if isinstance(error, OSError) else f"truncated: {error}"


def _verify_or_write(split: Path, entries: list[dict[str, Any]], unread: list[str]) -> str:
    path = split / "index.json"
    if unread:
        state = "not verified" if path.exists() else "not written"
        return f"{state}: {', '.join(unread)} cannot be read; fetch or make it again"
    if not entries:
        return "not written: no good sample"
    if not path.exists():
        write_index(split, entries)
        return "written"
    try:
        known = {entry["name"]: entry for entry in json.loads(path.read_bytes())["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        return f"damaged ({error}); delete {path} and check again to write it anew"
    mine = {entry["name"]: entry for entry in entries}
    different = sorted(name for name in {*known, *mine} if known.get(name) != mine.get(name))
    if different:
        return f"differs from {', '.join(different)}; delete {path} and check again to write it anew"
    return "verified"


def _write_report(path: Path, found: dict[str, Any]) -> None:
    """Beside what `unclip data folder` said there. Data may lie where nothing can be written, once they have an index."""
    try:
        before = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        before = {}
    text = json.dumps((before if isinstance(before, dict) else {}) | found, indent=2, ensure_ascii=False)
    content = text.encode("utf-8", "backslashreplace")  # names of files may hold bytes that are no text
    try:
        write_atomic(path, content)
    except OSError as error:
        _log.warning("%s cannot be written (%s)", path, error.strerror or error)
