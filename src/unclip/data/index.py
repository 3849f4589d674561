"""``index.json``, which stands beside shards: every sample's key and place in bytes, and each shard's checksum."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from unclip.drafts import write_atomic
from unclip.errors import DataError

INDEX_VERSION = 1
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
MEMBER_TYPES = (*IMAGE_TYPES, "txt", "json")


@dataclass
class IndexReport:
    """What ``build_index`` found. ``bad`` maps the keys that were left out to the reason."""

    num_shards: int = 0
    num_samples: int = 0
    bad: dict[str, str] = field(default_factory=dict)


def key_and_kind(name: str) -> tuple[str, str]:
    """Whose file a tar member is and of what type. What is not UTF-8, which tarfile reads as lone surrogates, is spelt out."""
    folder, _, name = name.encode("utf-8", "backslashreplace").decode().rpartition("/")
    stem, _, kind = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, kind.lower()


def scan_shard(
    path: Path,
    check: Callable[[bytes], object] | None = None,
    bad: dict[str, str] | None = None,
    first_of: dict[str, str] | None = None,
) -> dict:
    """One entry of the index: the keys of a tar and each member's offset and size (offset -1: there is no such member).

    Samples without picture or caption, and those whose picture makes ``check`` raise, are left out and put in ``bad``.
    With ``first_of``, which maps the SHA-256 of pictures to their first sample, so are those that repeat a picture byte
    for byte. ``text_sha256`` covers keys and captions, a list of several too: it is the same for two sizes of the same
    pictures. Raises DataError for a tar that is cut short or damaged.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, kind = key_and_kind(info.name)
                if info.isfile() and kind in MEMBER_TYPES:
                    members.setdefault(key, {})[kind] = (info.offset_data, info.size)
            end = tar.offset  # where tarfile found no further member: it takes damage for an archive's end
        with path.open("rb") as file:
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise EOFError(f"at byte {end} stands neither a member nor the archive's end")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a complete tar file ({error}); fetch or make it again") from error
    good = {}
    with path.open("rb") as file:
        for key, found in members.items():
            outside = key.startswith("/") or ".." in key.split("/")
            reason = "its path leaves the archive" if outside else _why_bad(file, found, check)
            if reason is None and first_of is not None:
                reason = _repeated(file, found, f"{path}: {key}", first_of)
            if reason is None:
                good[key] = found
            elif bad is not None:
                bad[key] = reason
        texts = [[key, _caption(file, found), *_more_captions(file, found)] for key, found in good.items()]
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kinds = [kind for kind in MEMBER_TYPES if any(kind in found for found in good.values())]
    return {
        "name": path.name,
        "num_samples": len(good),
        "size": path.stat().st_size,
        "sha256": digest,
        "text_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "keys": list(good),
        "offsets": {kind: [list(found.get(kind, (-1, 0))) for found in good.values()] for kind in kinds},
    }


def _image(file: BinaryIO, found: dict[str, tuple[int, int]]) -> bytes:
    offset, size = next(found[kind] for kind in IMAGE_TYPES if kind in found)
    return os.pread(file.fileno(), size, offset)


def _repeated(file: BinaryIO, found: dict[str, tuple[int, int]], name: str, first_of: dict[str, str]) -> str | None:
    first = first_of.setdefault(hashlib.sha256(_image(file, found)).hexdigest(), name)
    return None if first == name else f"duplicate: the same bytes as {first}"


def _why_bad(file: BinaryIO, found: dict[str, tuple[int, int]], check: Callable[[bytes], object] | None) -> str | None:
    if not any(kind in found for kind in IMAGE_TYPES):
        return "no picture"
    if "txt" not in found and "json" not in found:
        return "no caption"
    if check is not None:
        try:
            check(_image(file, found))
            if not _strict_caption(file, found).strip():
                return "empty caption"
            _check_meta(file, found)
        except (OSError, ValueError, SyntaxError, DataError) as error:
            return str(error) or type(error).__name__
    return None


def _check_meta(file: BinaryIO, found: dict[str, tuple[int, int]]) -> None:
    """DataError for metadata that is no JSON object."""
    if "json" not in found:
        return
    try:
        meta = json.loads(os.pread(file.fileno(), found["json"][1], found["json"][0]))
    except ValueError as error:
        raise DataError(f"bad metadata: no JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError("bad metadata: no JSON object")


def _strict_caption(file: BinaryIO, found: dict[str, tuple[int, int]]) -> str:
    """The caption; DataError for one that is no text, and for metadata that is no JSON object."""
    offset, size = found["txt"] if "txt" in found else found["json"]
    try:
        content = os.pread(file.fileno(), size, offset).decode("utf-8")
        if "txt" in found:
            return content
        meta = json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(f"caption not UTF-8: byte {error.start}") from error
    except ValueError as error:
        raise DataError(f"no caption: the metadata is no JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError("no caption: the metadata is no JSON object")
    caption = str(meta.get("caption") or "")
    if any("\ud800" <= character <= "\udfff" for character in caption):  # half of a pair, which JSON can hold
        raise DataError("caption not Unicode: it holds a lone surrogate")
    return caption


def _caption(file: BinaryIO, found: dict[str, tuple[int, int]]) -> str:
    offset, size = found["txt"] if "txt" in found else found["json"]
    return os.pread(file.fileno(), size, offset).decode("utf-8", errors="replace")


def _more_captions(file: BinaryIO, found: dict[str, tuple[int, int]]) -> list[Any]:
    """What stands under "captions" in the KEY.json beside a KEY.txt: [] if nothing, so that old indices keep their hash."""
    if "txt" not in found or "json" not in found:
        return []
    content = os.pread(file.fileno(), found["json"][1], found["json"][0])
    if b'"captions"' not in content:
        return []
    try:
        meta = json.loads(content)
    except ValueError:
        return []  # whoever reads it is told; a caption is there
    return [meta["captions"]] if isinstance(meta, dict) and "captions" in meta else []


def write_index(split_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Write ``index.json`` atomically. An empty split is refused (DataError)."""
    if not entries:
        raise DataError(f"{split_dir} got no samples; nothing was written")
    total = sum(entry["num_samples"] for entry in entries)
    index = {"version": INDEX_VERSION, "num_samples": total, "shards": entries}
    write_atomic(split_dir / "index.json", json.dumps(index, ensure_ascii=False).encode())


def build_index(split_dir: Path, check: Callable[[bytes], object] | None = None) -> IndexReport:
    """Index the ``*.tar`` files that are there (shards that others made, or after damaged samples were found).

    ``check`` is called with each encoded picture; the samples for which it raises leave the index and are reported.
    """
    split_dir = Path(split_dir)
    report = IndexReport()
    paths = sorted(split_dir.glob("*.tar"))
    if not paths:
        raise DataError(f"{split_dir} holds no *.tar file; is it the folder of one split?")
    entries = [scan_shard(path, check, report.bad) for path in paths]
    entries = [entry for entry in entries if entry["num_samples"] > 0]
    write_index(split_dir, entries)
    report.num_shards, report.num_samples = len(entries), sum(entry["num_samples"] for entry in entries)
    return report


def read_index(raw: bytes, where: str) -> dict[str, Any]:
    """The parsed content of the index at ``where``; DataError where it is damaged or of another version."""
    advice = f"run `unclip data check` where the shards are and put its index at {where}"
    try:
        index = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); {advice}") from error
    version = index.get("version") if isinstance(index, dict) else None
    if version != INDEX_VERSION:
        raise DataError(f"{where} has version {version}, this unclip reads {INDEX_VERSION}")
    return index
