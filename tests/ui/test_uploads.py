"""What a browser may send: good, missing, damaged, huge, of another size, from elsewhere."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from smooth_chain import png

from unclip.errors import ConfigError
from unclip.ui import uploads
from unclip.ui.uploads import caption_of, mask_of, number_of, picture_of, whole_of


def sent(folder: Path, content: bytes, name: str = "a.png") -> dict[str, Any]:
    (folder / name).write_bytes(content)
    return {"path": str(folder / name), "meta": {"_type": "gradio.FileData"}}


def layer(shape: tuple[int, int], painted: tuple[slice, slice] | None) -> bytes:
    pixels = np.zeros((*shape, 4), np.uint8)
    if painted:
        pixels[painted] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a hundred bytes that claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def test_a_good_picture(tmp_path: Path):
    picture = picture_of(sent(tmp_path, png((250, 10, 20), (5, 3))), tmp_path)
    assert picture.shape == (3, 3, 5)
    assert picture[:, 0, 0].tolist() == [250, 10, 20]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png((1, 2, 3))[:60], "the picture is damaged or no picture|the picture cannot be read"),
        (b"", "the picture is damaged or no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "the picture is damaged or no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the picture is damaged or no picture"),
        (bomb(6_000), "the picture has 6000x6000 pixels, more than 25 megapixels"),
        (bomb(30_000), "the picture claims to have hundreds of megapixels"),
    ],
    ids=["cut short", "empty", "svg", "postscript", "huge", "bomb"],
)
def test_bad_pictures(tmp_path: Path, content: bytes, said: str):
    with pytest.raises(ConfigError, match=said):
        picture_of(sent(tmp_path, content), tmp_path)


def test_a_file_of_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 50)
    with pytest.raises(ConfigError, match="the picture has 0 MB, more than 0"):
        picture_of(sent(tmp_path, png((1, 2, 3))), tmp_path)


@pytest.mark.parametrize("value", [None, "", [], {}, {"path": None}, {"path": 3}, {"path": ""}])
def test_no_picture(tmp_path: Path, value: object):
    with pytest.raises(ConfigError, match="the picture is missing; choose a PNG"):
        picture_of(value, tmp_path)


def test_files_from_elsewhere_are_refused(tmp_path: Path):
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = sent(tmp_path, png((1, 2, 3)))
    (inside / "link.png").symlink_to(outside["path"])
    for path in (outside["path"], "/etc/passwd", f"{inside}/../a.png", f"{inside}/link.png", str(inside), "a.png"):
        with pytest.raises(ConfigError, match="not a file that was uploaded here"):
            picture_of({"path": path}, inside)


def test_a_drawing(tmp_path: Path):
    background = sent(tmp_path, png((9, 9, 9), (8, 6)))
    layers = [
        sent(tmp_path, layer((6, 8), (slice(0, 2), slice(0, 3))), "1.png"),
        sent(tmp_path, layer((6, 8), (slice(4, 6), slice(7, 8))), "2.png"),
    ]
    picture, mask = mask_of({"background": background, "layers": layers, "composite": None}, tmp_path)
    assert picture.shape == (3, 6, 8)
    assert mask.sum() == 8
    assert bool(mask[1, 2])
    assert bool(mask[5, 7])


@pytest.mark.parametrize("kind", ["GIF", "EPS", "BMP"])
def test_other_formats_than_it_asks_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", pytest.fail)  # a program that PIL starts for an EPS file
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "white").save(buffer, kind)
    other = sent(tmp_path, buffer.getvalue(), "other.png")
    with pytest.raises(ConfigError, match="the picture is damaged or no picture; choose a PNG, JPEG or WebP file"):
        picture_of(other, tmp_path)
    background = sent(tmp_path, png((9, 9, 9), (8, 6)))
    monkeypatch.setattr(uploads, "picture_of", lambda *_: torch.zeros(3, 6, 8, dtype=torch.uint8))
    with pytest.raises(UnidentifiedImageError):  # even where nothing checked it before
        mask_of({"background": background, "layers": [other]}, tmp_path)


def test_bad_drawings(tmp_path: Path):
    background = sent(tmp_path, png((9, 9, 9), (8, 6)))
    small = sent(tmp_path, layer((3, 4), (slice(0, 2), slice(0, 3))), "small.png")
    empty = sent(tmp_path, layer((6, 8), None), "empty.png")
    for value, said in (
        (None, "there is no picture yet"),
        ({"background": None, "layers": []}, "there is no picture yet"),
        ({"background": background, "layers": []}, "nothing is painted yet"),
        ({"background": background, "layers": [empty]}, "nothing is painted yet"),
        ({"background": background, "layers": [small]}, "the mask has 4x3 pixels but the picture 8x6; draw it on"),
        ({"background": background, "layers": [{"path": "/etc/passwd"}]}, "the mask is not a file that was uploaded"),
    ):
        with pytest.raises(ConfigError, match=said):
            mask_of(value, tmp_path)


def test_captions_and_numbers():
    assert caption_of("  a red cube ") == "a red cube"
    for value in ("", "   ", None, 3, ["a"]):
        with pytest.raises(ConfigError, match="the caption is empty"):
            caption_of(value)
    assert len(caption_of("a" * 10_000)) == 10_000
    with pytest.raises(ConfigError, match="30,000 characters; take fewer than 20,000"):
        caption_of("a" * 30_000)
    assert whole_of(3.0, "the seed", 0, 9) == 3
    for bad, said in ((7, "θ is 7; it must be a number from 0 to 1"), (None, "θ is empty"), (float("nan"), "θ is nan")):
        with pytest.raises(ConfigError, match=said):
            number_of(bad, "θ", 0, 1)
    for bad in (True, "1", [1], -0.1):
        with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
            number_of(bad, "θ", 0, 1)
    with pytest.raises(ConfigError, match=r"the seed is 1.5; it must be a whole number"):
        whole_of(1.5, "the seed", 0, 9)
