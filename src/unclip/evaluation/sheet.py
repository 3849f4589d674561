"""Contact sheets: captions and pictures on one page."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from unclip.drafts import replacing

MARGIN, LINE = 6, 14


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: θ and η, accents, Greek and Cyrillic, which Pillow's own font lacks."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def draw_table(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], cell: int = 96, blocks: int = 1
) -> Image.Image:
    """A table with a caption and uint8 pictures (H, W, 3) per row, scaled to ``cell`` pixels without smoothing.

    ``blocks`` > 1 folds a long table into that many columns side by side.
    """
    length = -(-len(rows) // blocks)
    parts = [_block(rows[i * length : (i + 1) * length], columns, cell) for i in range(blocks)]
    page = Image.new("RGB", (sum(part.width for part in parts), parts[0].height), "white")
    for i, part in enumerate(parts):
        page.paste(part, (i * parts[0].width, 0))
    return page


def _block(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], cell: int) -> Image.Image:
    font = _font(10)
    text_width = 230
    page = Image.new(
        "RGB",
        (text_width + len(columns) * (cell + MARGIN) + MARGIN, 2 * LINE + MARGIN + len(rows) * (cell + MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(page)
    for j, title in enumerate(columns):
        for k, line in enumerate(_wrap(title, 17)[:2]):
            draw.text((text_width + j * (cell + MARGIN), k * LINE), line, fill="black", font=font)
    for i, (caption, pictures) in enumerate(rows):
        top = 2 * LINE + MARGIN + i * (cell + MARGIN)
        for k, line in enumerate(_wrap(caption, 38)[: cell // LINE]):
            draw.text((MARGIN, top + k * LINE), line, fill="black", font=font)
        for j, picture in enumerate(pictures):
            page.paste(_fit(picture, cell), (text_width + j * (cell + MARGIN), top))
    return page


def draw_gallery(pictures: Sequence[tuple[str, np.ndarray]], per_row: int = 8, cell: int = 128) -> Image.Image:
    """Pictures in rows, each with its caption below."""
    font = _font(9)
    lines = 3
    num_rows = -(-len(pictures) // per_row)
    step_x, step_y = cell + MARGIN, cell + MARGIN + lines * LINE
    page = Image.new("RGB", (min(per_row, len(pictures)) * step_x + MARGIN, num_rows * step_y + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for i, (caption, picture) in enumerate(pictures):
        left, top = MARGIN + (i % per_row) * step_x, MARGIN + (i // per_row) * step_y
        page.paste(_fit(picture, cell), (left, top))
        for k, line in enumerate(_wrap(caption, cell // 6)[:lines]):
            draw.text((left, top + cell + k * LINE), line, fill="black", font=font)
    return page


def save_picture(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG, with the text chunks of ``info``, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as draft:
        picture.save(draft, format="PNG", pnginfo=info)


def text_tile(text: str, size: int = 96) -> np.ndarray:
    """The words as a (size, size, 3) uint8 picture, where there is no picture to show."""
    page = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(page)
    for k, line in enumerate(_wrap(text, size // 6)[: size // LINE]):
        draw.text((0, k * LINE), line, fill="black", font=_font(9))
    return np.asarray(page)


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = cell / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
