"""Contact sheets: every picture where it belongs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.evaluation.sheet import LINE, MARGIN, draw_gallery, draw_table, save_picture

LEFT, TOP = 230, 2 * LINE + MARGIN  # of a table's first picture


def flat(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def cut(page: Image.Image, left: int, top: int, width: int, height: int | None = None) -> np.ndarray:
    return np.asarray(page)[top : top + (height or width), left : left + width]


def test_a_table_holds_each_picture_at_its_place():
    rows = [(f"row {i}", [flat(10 * i + j) for j in range(3)]) for i in range(2)]
    page = draw_table(rows, ["a", "b", "c"], cell=8)
    assert page.size == (LEFT + 3 * 14 + MARGIN, TOP + 2 * 14)
    for i in range(2):
        for j in range(3):
            assert (cut(page, LEFT + 14 * j, TOP + 14 * i, 8) == 10 * i + j).all()
            assert (cut(page, LEFT + 14 * j + 8, TOP + 14 * i, MARGIN, 8) == 255).all()
    assert (cut(page, LEFT + 42, 0, MARGIN, page.height) == 255).all()


def test_a_folded_table_goes_on_in_the_next_block():
    rows = [("", [flat(i)]) for i in range(5)]
    page = draw_table(rows, ["a"], cell=8, blocks=2)
    width = LEFT + 14 + MARGIN
    assert page.size == (2 * width, TOP + 3 * 14)
    for i in range(5):
        assert (cut(page, LEFT + width * (i // 3), TOP + 14 * (i % 3), 8) == i).all()
    assert (cut(page, LEFT + width, TOP + 2 * 14, 8) == 255).all(), "the sixth place stays empty"


def test_captions_and_headings_are_written():
    rows = [("", [flat(255, 48, 48)]), ("a red cube left of a blue sphere", [flat(255, 48, 48)])]
    page = draw_table(rows, ["heading"], cell=48)
    assert cut(page, LEFT, 0, 48, LINE).min() < 100
    assert (cut(page, 0, TOP, LEFT, 48) == 255).all()
    assert cut(page, 0, TOP + 54, LEFT, LINE).min() < 100


def test_pictures_are_scaled_without_smoothing():
    picture = np.array([[0, 40], [80, 120]], np.uint8)[..., None].repeat(3, axis=2)
    shown = cut(draw_table([("", [picture])], ["a"], cell=8), LEFT, TOP, 8)
    assert (shown == picture.repeat(4, axis=0).repeat(4, axis=1)).all()
    checks = np.indices((32, 32)).sum(0).astype(np.uint8)[..., None].repeat(3, axis=2) % 2 * 200
    assert (cut(draw_table([("", [checks])], ["a"], cell=8), LEFT, TOP, 8) == 100).all(), "averaged when they shrink"


def test_the_aspect_ratio_stays():
    page = draw_table([("", [flat(0, 4, 8)])], ["a"], cell=16)
    assert (cut(page, LEFT, TOP, 16, 8) == 0).all()
    assert (cut(page, LEFT, TOP + 8, 16, 8) == 255).all()


def test_a_gallery_fills_rows():
    page = draw_gallery([("a cone", flat(i)) for i in range(5)], per_row=3, cell=32)
    step_x, step_y = 32 + MARGIN, 32 + MARGIN + 3 * LINE
    assert page.size == (3 * step_x + MARGIN, 2 * step_y + MARGIN)
    for i in range(5):
        left, top = MARGIN + i % 3 * step_x, MARGIN + i // 3 * step_y
        assert (cut(page, left, top, 32) == i).all()
        assert cut(page, left, top + 32, 32, LINE).min() < 100, "its caption is below"
    assert (cut(page, MARGIN + 2 * step_x, MARGIN + step_y, 32) == 255).all()


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "sheet.png"
    info = PngInfo()
    info.add_itxt("Description", "a red cube")
    save_picture(Image.fromarray(flat(7)), path, info)
    assert (np.asarray(Image.open(path)) == 7).all()
    assert Image.open(path).info["Description"] == "a red cube"

    def fail(image: Image.Image, file: Path, format: str, pnginfo: PngInfo | None) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.fromarray(flat(9)), path)
    assert (np.asarray(Image.open(path)) == 7).all()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("letter", "θηéжΩ")
def test_captions_and_titles_have_their_letters(letter: str):
    def drawn(text: str) -> bytes:
        return draw_gallery([(text, np.zeros((8, 8, 3), np.uint8))]).tobytes()

    assert drawn(letter) != drawn("\uffff"), "the box of a letter that the font lacks"
    assert drawn(letter) != drawn(" ")
