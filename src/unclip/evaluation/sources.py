"""Where pictures to evaluate come from: a folder of files, a split of shards, or a copy of COCO."""

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from unclip.data.shards import IMAGE_TYPES, Shards
from unclip.data.transforms import FORMATS, load_image
from unclip.errors import ConfigError, DataError

SHEET = "sheet.png"  # what the drawing commands lay beside their pictures


@dataclass
class SourceConfig:
    """One of three places. ``folder``: files NAME.png, jpg or webp, with captions in NAME.txt or, of PNGs that unclip drew, in
    themselves. ``split``: the shards of one split, as DATA/val. ``coco``: a folder with ``annotations/captions_SPLIT.json`` and
    ``SPLIT/``, SPLIT being ``coco_split``. ``num`` pictures at most, spread evenly.
    """

    folder: str | None = None
    split: str | None = None
    coco: str | None = None
    coco_split: str = "val2014"
    num: int | None = None

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.folder, self.split, self.coco)) > 1:
            raise ConfigError("give one of folder, split and coco, not several")
        if self.num is not None and self.num < 1:
            raise ConfigError(f"num={self.num} must be at least 1")

    @property
    def is_given(self) -> bool:
        return any(place is not None for place in (self.folder, self.split, self.coco))


class Source(Protocol):
    """Pictures in a fixed order; ``fingerprint`` tells them from others."""

    where: str
    fingerprint: str

    def __len__(self) -> int: ...
    def key(self, i: int) -> str: ...
    def picture(self, i: int) -> bytes: ...
    def captions(self, i: int) -> list[str]: ...


class FolderSource:
    """Picture files of a folder by name.

    The fingerprint is of all content, captions too, not of sizes and times: a picture drawn again may be as large as before, and
    a copied folder holds the same pictures. Reading the files once more costs little beside looking at them with a net.
    """

    def __init__(self, folder: str) -> None:
        self.where = folder
        if not Path(folder).is_dir():
            raise DataError(f"there is no folder {folder}")
        found = (path for path in Path(folder).iterdir() if path.suffix.lower().lstrip(".") in IMAGE_TYPES)
        self.paths = sorted(path for path in found if path.name != SHEET)
        listed = hashlib.sha256()
        for path in self.paths:
            for file in (path, path.with_suffix(".txt")):
                if file.is_file():
                    listed.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        self.fingerprint = listed.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        return self.paths[i].name

    def picture(self, i: int) -> bytes:
        return self.paths[i].read_bytes()

    def captions(self, i: int) -> list[str]:
        text = self.paths[i].with_suffix(".txt")
        if text.exists():
            return [text.read_text(encoding="utf-8-sig").strip()]
        try:
            with Image.open(self.paths[i], formats=FORMATS) as image:
                return [str(image.info["Description"])] if "Description" in image.info else []
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{self.paths[i]} cannot be decoded ({error}); give it a caption file or take it away"
            ) from error


class SplitSource:
    """One split of captioned shards."""

    def __init__(self, split: str) -> None:
        self.where = split
        self.shards = Shards(Path(split))
        self.fingerprint = self.shards.fingerprint

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return self.shards.keys[i]

    def picture(self, i: int) -> bytes:
        return self.shards.image(i)

    def captions(self, i: int) -> list[str]:
        caption = self.shards.caption(i)
        return [caption] if caption else []


class CocoSource:
    """Pictures and captions in the format of COCO's caption annotations, by picture number.

    The fingerprint is of the annotations and of the pictures' sizes and times: there are too many to read all of them first.
    """

    def __init__(self, folder: str, split: str) -> None:
        self.where = f"{folder}/{split}"
        path = Path(folder) / "annotations" / f"captions_{split}.json"
        if not path.is_file():
            raise DataError(
                f"there is no {path}: coco is a folder with annotations/captions_{split}.json and the pictures in {split}/, "
                "as annotations_trainval2014.zip and val2014.zip of https://cocodataset.org/#download unpack"
            )
        raw = path.read_bytes()
        listed = hashlib.sha256(raw)
        try:
            content: dict[str, Any] = json.loads(raw)
            self.names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            found: dict[int, list[tuple[int, str]]] = {number: [] for number in self.names}
            for note in content["annotations"]:
                found[int(note["image_id"])].append((int(note["id"]), " ".join(str(note["caption"]).split())))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not in the format of COCO's captions ({error!r})") from error
        self.numbers = sorted(self.names)
        self._captions = {number: [text for _, text in sorted(notes)] for number, notes in found.items()}
        for i in range(len(self.numbers)):
            with suppress(FileNotFoundError):  # told when it is read
                state = (Path(self.where) / self.key(i)).stat()
                listed.update(f"{self.key(i)} {state.st_size} {state.st_mtime_ns}\n".encode())
        self.fingerprint = listed.hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, i: int) -> str:
        return self.names[self.numbers[i]]

    def picture(self, i: int) -> bytes:
        path = Path(self.where) / self.key(i)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}, which the annotations name, cannot be read ({error.strerror})") from error

    def captions(self, i: int) -> list[str]:
        return self._captions[self.numbers[i]]


class Part:
    """``num`` pictures of a source, spread evenly."""

    def __init__(self, source: Source, num: int) -> None:
        self.source, self.num = source, num
        self.where, self.fingerprint = source.where, f"{source.fingerprint}, {num} of {len(source)}"

    def __len__(self) -> int:
        return self.num

    def key(self, i: int) -> str:
        return self.source.key(self._at(i))

    def picture(self, i: int) -> bytes:
        return self.source.picture(self._at(i))

    def captions(self, i: int) -> list[str]:
        return self.source.captions(self._at(i))

    def _at(self, i: int) -> int:
        return i * len(self.source) // self.num


def whole(source: Source) -> Source:
    """The source that this one is a part of, or itself."""
    return source.source if isinstance(source, Part) else source


def open_source(cfg: SourceConfig, name: str) -> Source:
    """The pictures of a source; ``name`` is the setting's. DataError where there are none."""
    if cfg.folder is not None:
        source: Source = FolderSource(cfg.folder)
    elif cfg.split is not None:
        source = SplitSource(cfg.split)
    elif cfg.coco is not None:
        source = CocoSource(cfg.coco, cfg.coco_split)
    else:
        raise ConfigError(f"say where the {name} pictures are: {name}.folder=, {name}.split= or {name}.coco=")
    if not len(source):
        raise DataError(f"{source.where} holds no pictures to take as {name}; give another {name} source")
    return source if cfg.num is None or cfg.num >= len(source) else Part(source, cfg.num)


def caption_of(source: Source, i: int) -> str:
    """The first caption of a picture; DataError where it has none."""
    found = source.captions(i)
    if not found or not found[0]:
        raise DataError(
            f"{source.where}: {source.key(i)} has no caption, which clip_score and r_precision need: write it to NAME.txt, or "
            "leave them out of metrics"
        )
    return found[0]


class Fit(Enum):
    """What pictures may go through to be ``size`` pixels square: nothing, cutting and reducing, or enlarging too."""

    same = "same"
    reduce = "reduce"
    any = "any"


def load_pictures(source: Source, places: Sequence[int], size: int, fit: Fit) -> Tensor:
    """uint8 (B, 3, size, size). DataError, with its name, for a picture that is damaged or does not ``fit``."""
    found = []
    for i in places:
        content = source.picture(i)
        try:
            height, width = sides(content)
            if fit is Fit.same and (height, width) != (size, size):
                raise DataError(
                    f"{width}x{height} pixels, where drawn ones have {size}: set size=, to which all are cut"
                )
            if fit is Fit.reduce and min(height, width) < size:
                raise DataError(f"{width}x{height} pixels would be enlarged to size={size}: take a smaller size")
            found.append(load_image(content, size))
        except DataError as error:
            raise DataError(f"{source.where}: {source.key(i)}: {error}") from error
    return torch.stack(found)


def sides(content: bytes) -> tuple[int, int]:
    """Height and width of an encoded picture."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"the picture cannot be decoded ({error})") from error
