"""The layout of clip-retrieval, which embedding-reader reads: numbered parts of embeddings and their metadata.

SRC/img_emb/img_emb_0.npy        (n, D) float16, or img_emb_0.parquet with a list column "embedding"
SRC/text_emb/text_emb_0.npy      alike, optional
SRC/metadata/metadata_0.parquet  columns caption, image_path and key; parquet embeddings may carry them themselves
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclip.errors import DataError

FOLDERS = ("img_emb", "text_emb", "metadata")
EMBEDDING = "embedding"  # the column of a parquet file, by embedding-reader's default
_BLOCK = 16_384  # rows looked at at once


@dataclass(frozen=True)
class Part:
    """Files of one number. ``texts`` is the parquet file that holds the captions."""

    number: int
    image: Path
    text: Path | None
    texts: Path

    def texts_table(self) -> Any:
        """Columns caption, and key or image_path where they are there, as a pyarrow table. DataError without caption."""
        table = _parquet(self.texts)
        found = table.schema.names
        if "caption" not in found:
            raise DataError(f"{self.texts} has the columns {found}, not caption, which a prior is trained on")
        return table.select([name for name in ("key", "image_path", "caption") if name in found])


def parts_of(src: Path) -> list[Part]:
    """The parts of a folder, by number. DataError where files of a part are missing or nothing is found."""
    src = Path(src)
    images, texts, metadata = (_numbered(src / name) for name in FOLDERS)
    if not images:
        raise DataError(
            f"{src} holds no img_emb/*.npy or img_emb/*.parquet; give the folder that holds img_emb, text_emb and metadata"
        )
    if texts and texts.keys() != images.keys():
        raise DataError(
            f"{src} has the parts {_some(images)} of img_emb but {_some(texts)} of text_emb; fetch the missing ones"
        )
    if not metadata and all(path.suffix == ".parquet" for path in images.values()):
        metadata = images
    missing = sorted(images.keys() - metadata.keys())
    if missing:
        raise DataError(
            f"{src / 'metadata'} has no .parquet file of part {missing[0]} ({len(missing)} are missing); it holds the captions"
        )
    return [Part(number, images[number], texts.get(number), metadata[number]) for number in sorted(images)]


def read_rows(path: Path) -> np.ndarray:
    """(n, D) floating point rows of a .npy file, mapped, or of a .parquet file. DataError where it is damaged."""
    try:
        rows = _lists(path) if path.suffix == ".parquet" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no array ({error}); fetch it again") from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise DataError(f"{path} holds {rows.dtype} of shape {rows.shape}, not rows of floating point numbers")
    return rows


def unit_norm(path: Path, rows: np.ndarray) -> bool:
    """Whether all rows have norm 1 within float16's precision. DataError for a row that is zero or not finite."""
    unit = True
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float32)
        norms = np.linalg.norm(block, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            row = block[bad[0]]
            what = "NaN" if np.isnan(row).any() else "zero" if not row.any() else "infinite, an overflow of fp16"
            raise DataError(
                f"row {start + bad[0]} of {path} is {what} ({len(bad)} such rows in its block); "
                "embed that picture again in fp32, or take the row out of all three files"
            )
        unit = unit and bool((np.abs(norms - 1) < 1e-2).all())
    return unit


def texts_of(part: Part, num_rows: int) -> tuple[list[str], list[str]]:
    """Keys and captions of a part; a null caption is "". The key is key, else image_path, else the row's number."""
    table = part.texts_table()
    if len(table) != num_rows:
        raise DataError(f"{part.image} has {num_rows} rows but {part.texts} has {len(table)}; fetch both again")
    captions = [str(caption or "") for caption in table.column("caption").to_pylist()]
    for name in ("key", "image_path"):
        if name in table.schema.names:
            return [" ".join(str(key).splitlines()) for key in table.column(name).to_pylist()], captions
    return [f"{part.number}-{row}" for row in range(num_rows)], captions


class LayoutWriter:
    """Writes part after part. ``kind`` is npy (float16 rows, as clip-retrieval's) or parquet (float32 lists)."""

    def __init__(self, out: Path, kind: str, num_parts: int) -> None:
        self.out, self.kind = out, kind
        self.digits = len(str(num_parts - 1))  # readers sort by name
        self.number = 0

    def write(self, rows: dict[str, np.ndarray], keys: list[str], captions: list[str] | None) -> None:
        """One part: ``rows`` by folder (img_emb, text_emb). DataError for what float16 cannot hold."""
        import pyarrow as pa
        from pyarrow import parquet

        texts = {"key": keys, "image_path": keys} | ({} if captions is None else {"caption": captions})
        for folder in (*rows, "metadata"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        for folder, values in rows.items():
            path = self.out / folder / f"{folder}_{self.number:0{self.digits}d}.{self.kind}"
            if self.kind == "parquet":
                lists = pa.FixedSizeListArray.from_arrays(values.astype(np.float32).ravel(), values.shape[1])
                parquet.write_table(pa.table({EMBEDDING: lists, **texts}), path)
                continue
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if not np.isfinite(half).all():
                raise DataError(f"rows of {folder} exceed float16, {np.abs(values).max():g}; export unit-norm ones")
            np.save(path, half)
        parquet.write_table(pa.table(texts), self.out / "metadata" / f"metadata_{self.number:0{self.digits}d}.parquet")
        self.number += 1


def _numbered(folder: Path) -> dict[int, Path]:
    """Files of a folder by the number at the end of their names."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*")):
        number = re.search(r"(\d+)$", path.stem)
        if path.suffix not in (".npy", ".parquet") or (folder.name == "metadata" and path.suffix != ".parquet"):
            continue
        if number is None:
            raise DataError(
                f"{path} has no number at the end of its name; parts are called {folder.name}_0{path.suffix}"
            )
        if int(number[1]) in found:
            raise DataError(f"{found[int(number[1])]} and {path} are both part {int(number[1])}; remove one of them")
        found[int(number[1])] = path
    return found


def _parquet(path: Path, columns: list[str] | None = None) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'unclip[parquet]'") from None
    try:
        return parquet.read_table(path, columns=columns)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} is damaged or no parquet file ({error}); fetch it again") from error


def _lists(path: Path) -> np.ndarray:
    """The list column of a parquet file as one array."""
    table = _parquet(path)
    if EMBEDDING not in table.schema.names:
        raise DataError(f"{path} has the columns {table.schema.names}, not {EMBEDDING}")
    chunks = table.column(EMBEDDING).chunks
    if table.column(EMBEDDING).null_count:
        raise DataError(f"{path} has {table.column(EMBEDDING).null_count} rows without an embedding")
    widths = {len(row) for chunk in chunks for row in chunk}
    if len(widths) != 1:
        raise DataError(f"{path} has embeddings of {sorted(widths)[:5]} numbers; they must be of one width")
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]).reshape(
        -1, widths.pop()
    )


def _some(parts: dict[int, Path]) -> str:
    numbers = sorted(parts)
    return f"{', '.join(map(str, numbers[:5]))}{' …' if len(numbers) > 5 else ''} ({len(numbers)})"


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
