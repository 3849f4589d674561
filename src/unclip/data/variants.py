"""Several captions and several crops of one picture: how they are found, made, stored and picked.

With C captions and K crops a picture, the columns of the embeddings gain a dimension after the first: ``image_emb``
(n, K, D), ``text_emb`` (n, C, D), ``tokens`` (n, C, context_length), ``text_seq`` (n, C, L, W). One of anything adds none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unclip.data.pictures import Pictures
from unclip.data.shards import Shards
from unclip.diffusion.noise import Noise
from unclip.errors import DataError

TEXT_COLUMNS = ("text_emb", "tokens", "text_seq")
_LARGER = 1.25  # side of the square that the further crops are cut from, in sides of a crop: they show 64 % of it


@dataclass(frozen=True)
class Variants:
    """How many captions and crops a picture has, and the seed of the crops (0 where there is only one)."""

    captions: int = 1
    crops: int = 1
    seed: int = 0

    def of(self, column: str) -> int:
        """Rows of a column a picture."""
        return self.captions if column in TEXT_COLUMNS else self.crops

    def shaped(self, column: str, rows: np.ndarray) -> np.ndarray:
        """(n, …) from rows (n * variants, …), variant after variant of each picture; unchanged where there is one."""
        count = self.of(column)
        return rows if count == 1 else rows.reshape(len(rows) // count, count, *rows.shape[1:])

    def first(self, column: str, rows: np.ndarray) -> np.ndarray:
        """The first caption or the central crop of each picture."""
        return rows if self.of(column) == 1 else rows[:, 0]


ONE = Variants()


def captions_of(shards: Shards, sample: int, count: int) -> list[str]:
    """``count`` captions of a sample: the list "captions" of its KEY.json, else the lines of its KEY.txt.

    Of more the first are taken; fewer are repeated in turn. For ``count`` 1 the caption is :meth:`Shards.caption`.
    """
    if count == 1:
        return [shards.caption(sample)]
    listed = shards.meta(sample).get("captions")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(text, str) for text in listed)):
        raise DataError(
            f'"captions" of {shards.keys[sample]} in {shards.split_dir} is not a list of texts: mend it, or take captions=1'
        )
    lines = listed or shards.caption(sample).splitlines()
    found = [line.strip() for line in lines if line.strip()] or [""]
    return [found[k % len(found)] for k in range(count)]


class Crops:
    """uint8 crops of samples, ``size`` pixels square. The first one is the central square, as everywhere else.

    The others are windows of the same size, at random places of the central square resized to 1.25 times that size.
    The place depends on the seed, the shard's content and the sample's place in it: on nothing that stands beside it.
    """

    def __init__(self, shards: Shards, size: int, variants: Variants) -> None:
        self.size, self.variants = size, variants
        self.central = Pictures(shards, size)
        self.larger = Pictures(shards, round(size * _LARGER)) if variants.crops > 1 else None

    def batch(self, samples: range) -> Tensor:
        """(len(samples) * crops, 3, size, size), crop after crop of each picture; DataError for damaged ones."""
        central = self._decoded(self.central, samples)
        if self.larger is None:
            return central
        whole = self._decoded(self.larger, samples)
        out = torch.empty(len(samples), self.variants.crops, *central.shape[1:], dtype=torch.uint8)
        out[:, 0] = central
        room = whole.shape[-1] - self.size + 1
        for row, sample in enumerate(samples):
            places = self._generator(sample).integers(0, room, (self.variants.crops - 1, 2)).tolist()
            for k, (top, left) in enumerate(places, start=1):
                out[row, k] = whole[row, :, top : top + self.size, left : left + self.size]
        return out.flatten(0, 1)

    def _generator(self, sample: int) -> np.random.Generator:
        shards = self.central.shards
        shard = shards.shard_of(sample)
        place = sample - int(shards.starts[shard])
        return np.random.default_rng([self.variants.seed, int(shards.sha256[shard][:15], 16), place])

    @staticmethod
    def _decoded(pictures: Pictures, samples: range) -> Tensor:
        image, used = pictures.batch(np.array(samples))
        damaged = [pictures.shards.keys[i] for i, j in zip(samples, used.tolist(), strict=True) if i != j]
        if damaged:
            folder = pictures.shards.split_dir
            raise DataError(
                f"{folder} has damaged pictures ({', '.join(damaged[:3])}{' …' if damaged[3:] else ''}); "
                f"delete its index.json, then `unclip data check {folder.parent}` writes one without them; embed again"
            )
        return image


def picked(
    rows: dict[str, np.ndarray], variants: Variants, positions: Sequence[int], central: bool
) -> tuple[dict[str, np.ndarray], list[int]]:
    """One variant of each row, chosen by its global position alone, and the numbers of the captions chosen.

    All text columns of a row are of one caption. ``central`` takes the central crop always: for stages that see the
    picture itself, which is that crop.
    """
    uniform = Noise(positions).uniform((2,), "variants").numpy()
    caption = (uniform[:, 0] * variants.captions).astype(np.int64)
    crop = (uniform[:, 1] * (1 if central else variants.crops)).astype(np.int64)
    every = np.arange(len(uniform))
    chosen = {
        column: values if variants.of(column) == 1 else values[every, caption if column in TEXT_COLUMNS else crop]
        for column, values in rows.items()
    }
    return chosen, caption.tolist()
