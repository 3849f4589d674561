"""Pictures as data: splits of shards, tars of others, and a stand-in for MS-COCO in the format of its caption annotations."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from unclip.data.shards import ShardWriter

WORDS = ("first", "second", "third", "fourth", "fifth")


def field(seed: list[int], size: tuple[int, int]) -> Image.Image:
    """A smooth picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def noise(seed: int, size: tuple[int, int] = (48, 40), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A file of ``kind`` with a picture that no other seed gives, (width, height) pixels large."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A shard as another program makes it, without an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_split(folder: Path, count: int, seed: int, side: int = 16) -> None:
    """Shards of ``count`` pictures, each with a caption of its own."""
    with ShardWriter(folder) as writer:
        for i in range(count):
            content = io.BytesIO()
            field([seed, i], (side, side)).save(content, "PNG")
            writer.write(f"{i:05d}", content.getvalue(), f"field {seed} of colour {i}", {})


def write_coco(folder: Path, count: int, split: str = "val2014") -> None:
    """``folder``/annotations/captions_SPLIT.json and ``folder``/SPLIT/COCO_SPLIT_NUMBER.jpg: several sizes, five captions each,
    numbers out of order."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, notes = [], []
    for i in reversed(range(count)):
        number, side = 3 + 7 * i, (40 + i % 3, 36)
        name = f"COCO_{split}_{number:012d}.jpg"
        field([len(split), i], side).save(folder / split / name, quality=95)
        images.append({"license": 1, "file_name": name, "height": side[1], "width": side[0], "id": number})
        notes += [
            {"image_id": number, "id": 1000 * number + k, "caption": f"scene {i}, {word} words\n"}
            for k, word in enumerate(WORDS)
        ]
    content = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": notes}
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
