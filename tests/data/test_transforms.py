"""Odd pictures become plain RGB, and hopeless ones a clear error."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from unclip.data import transforms
from unclip.data.transforms import load_image, read_image
from unclip.errors import DataError
from unclip.evaluation.sources import FolderSource, sides
from unclip.recipe import from_png

RED, GREY = (200, 40, 20), 90


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(content: bytes) -> list[int]:
    picture = load_image(content)
    assert picture.shape == (3, 12, 16)
    return picture.float().mean(dim=(1, 2)).round().int().tolist()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("RGB", (16, 12), RED)), RED),
        (encoded(Image.new("RGB", (16, 12), RED).quantize(4)), RED),
        (encoded(Image.new("L", (16, 12), GREY)), (GREY,) * 3),
        (encoded(Image.fromarray(np.full((12, 16), GREY * 257, np.uint16))), (GREY,) * 3),
        (encoded(Image.new("RGBA", (16, 12), (*RED, 0))), (255,) * 3),
        (encoded(Image.new("RGB", (16, 12), RED).convert("CMYK"), "JPEG", quality=100), RED),
        (encoded(Image.new("1", (16, 12), 1)), (255,) * 3),
    ],
    ids=["rgb", "palette", "grey", "16-bit", "transparent", "cmyk", "bilevel"],
)
def test_every_kind_of_picture_becomes_rgb(content: bytes, expected: tuple[int, ...]) -> None:
    assert np.abs(np.array(colour(content)) - expected).max() <= 2


def test_an_animation_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (16, 12), c) for c in (RED, (0, 0, 0))]
    for kind in ("WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)
        assert np.abs(np.array(colour(content)) - RED).max() <= 6


def test_the_cameras_orientation_is_applied() -> None:
    image = Image.new("RGB", (12, 16), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert load_image(encoded(image, "JPEG", exif=exif)).shape == (3, 12, 16)


def test_damaged_camera_data_is_one_error() -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(encoded(Image.new("RGB", (16, 12), RED), exif=b"Exif\0\0II*\0"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        encoded(Image.new("RGB", (64, 64), RED))[:60],
        encoded(Image.new("RGB", (64, 64)), "JPEG")[:200],
    ],
    ids=["empty", "text", "cut png", "cut jpeg"],
)
def test_what_cannot_be_decoded_is_one_error(content: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(content)


@pytest.mark.parametrize("kind", ["GIF", "EPS", "TIFF", "BMP"])
def test_other_formats_are_refused_whatever_the_file_is_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(Image.new("RGB", (16, 12), RED), kind)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", pytest.fail)  # a program that PIL starts for an EPS file
    with pytest.raises(DataError, match=r"cannot be decoded \(it is no png, jpg or webp\)"):
        load_image(content)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: .*; give a picture as png, jpg or webp"):
        read_image(path)
    with pytest.raises(DataError, match=r"a\.png cannot be read \(.*\); give a PNG that unclip wrote"):
        from_png(path)
    with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
        FolderSource(str(tmp_path)).captions(0)
    with pytest.raises(DataError, match="cannot be decoded"):
        sides(content)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", [(16, 16), (33, 47), (257, 130), (301, 512)])
def test_the_fast_jpeg_decoder_gives_pils_bytes(
    mode: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = shape
    colours = np.random.default_rng(1).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((width, height)).convert(mode)
    for options in ({"quality": 60}, {"quality": 95, "progressive": True}, {"quality": 80, "subsampling": 0}):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", **options)
        content = buffer.getvalue()
        for size in (None, 8, 16, 32, 100):  # 8 and 16 decode to a fraction of the size
            assert transforms._plain_jpeg(content, size) is not None
            fast = transforms.load_pixels(content, size)
            with monkeypatch.context() as patch:
                patch.setattr(transforms, "_plain_jpeg", lambda *_: None)
                assert np.array_equal(fast, transforms.load_pixels(content, size))


def test_pictures_that_may_be_turned_or_are_damaged_are_left_to_pil() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG")
    content = buffer.getvalue()
    assert transforms._plain_jpeg(content, None) is not None
    assert transforms._plain_jpeg(content[:-40], None) is None
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    assert transforms._plain_jpeg(buffer.getvalue(), None) is None
    assert transforms.load_pixels(buffer.getvalue()).shape == (4, 2, 3)
