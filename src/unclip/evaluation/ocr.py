"""Reading written words off pictures: RapidOCR, whose PP-OCR models come in its package (extra ``eval``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip.errors import ConfigError
from unclip.evaluation.probes import Share

SIDE = 256  # pixels at which a picture is read: letters of 7 pixels, as on a sign of a 64 px picture, are too small as they are


class WordReader:
    """Pictures (S, S, 3) uint8 to the words on them, in lower case, letters and digits only.

    Raises ConfigError where the packages are missing.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise ConfigError("reading written words needs the extra eval: pip install 'unclip[eval]'") from None
        settings = {"Global.use_cls": False, "Det.limit_side_len": SIDE}  # no upside-down text, no further enlargement
        settings |= {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "Global.log_level": "error"}
        self._ocr: Any = RapidOCR(params=settings)

    def __call__(self, picture: np.ndarray) -> list[str]:
        large = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        found = self._ocr(np.ascontiguousarray(np.asarray(large)[..., ::-1])).txts or ()  # it takes BGR
        words = ["".join(letter for letter in text.lower() if letter.isalnum()) for text in found]
        return [word for word in words if word]


def edit_distance(first: str, second: str) -> int:
    """Levenshtein (1966): insertions, deletions and exchanges of a letter."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def word_share(read: Sequence[Sequence[str]], asked: Sequence[str]) -> Share:
    """Pictures on which the very word is read; ``read``: all words of each picture."""
    if len(read) != len(asked):
        raise ValueError(f"{len(read)} pictures read but {len(asked)} words asked for; give one for each")
    return Share(sum(word in words for words, word in zip(read, asked, strict=True)), len(asked))


def word_measures(read: Sequence[Sequence[str]], asked: Sequence[str]) -> dict[str, Share | float]:
    """``words``: pictures on which the very word is read. ``letters``: 1 - edit distance / letters asked for, of the nearest
    word read, at least 0, on average. ``anything``: pictures on which anything is read."""
    words = word_share(read, asked)
    nearness = [
        max((1 - edit_distance(seen, word) / len(word) for seen in found), default=0.0)
        for found, word in zip(read, asked, strict=True)
    ]
    return {
        "words": words,
        "letters": float(np.maximum(nearness, 0).mean()),
        "anything": Share(sum(bool(found) for found in read), len(asked)),
    }
