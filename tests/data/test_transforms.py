"""Odd pictures become plain RGB, and hopeless ones a clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from unclip.data.transforms import load_image
from unclip.errors import DataError

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
