"""The decoder: z_i and caption to a picture."""

from collections.abc import Callable
from typing import Any

from unclip.data.batch import Batch
from unclip.models.pictures import to_uint8
from unclip.nets.conditioned import DecoderText
from unclip.nets.layers import Cond
from unclip.stages.base import Row, Stage


class DecoderStage(Stage):
    def __init__(self, model: Any, *settings: Any) -> None:
        super().__init__(model, *settings)
        self.columns = ("true picture", *self._ways())

    def _ways(self) -> dict[str, Callable[[Cond], Cond]]:
        """What this decoder can be shown, by the heading of its column."""
        cfg = self.model.cfg.conditioning
        if cfg.text is DecoderText.none and not cfg.text_emb:
            return {"from z_i": lambda cond: cond}
        if not cfg.image:
            return {"from the caption": lambda cond: cond}
        return {
            "from z_i and caption": lambda cond: cond,
            "from z_i": Cond.without_text,
            "from the caption": Cond.without_image,
        }

    def sheet(self, batch: Batch) -> list[Row]:
        cond, how, noise = self.model.cond(batch), self.model.default_sampling(), self.noise(batch)
        drawn = [to_uint8(self.model.sample(way(cond), how, noise)) for way in self._ways().values()]
        pictures = batch.column("image").cpu()
        return [Row(c, [pictures[i], *(d[i] for d in drawn)]) for i, c in enumerate(batch.caption)]
