"""The decoder: z_i and caption to a picture."""

from unclip.data.batch import Batch
from unclip.stages.base import Row, Stage, to_uint8


class DecoderStage(Stage):
    columns = ("true picture", "from z_i and caption", "from z_i", "from the caption")

    def sheet(self, batch: Batch) -> list[Row]:
        cond, how, noise = self.model.cond(batch), self.model.default_sampling(), self.noise(batch)
        ways = [cond, cond.without_text(), cond.without_image()]
        drawn = [to_uint8(self.model.sample(way, how, noise)) for way in ways]
        pictures = batch.column("image").cpu()
        return [Row(c, [pictures[i], *(d[i] for d in drawn)]) for i, c in enumerate(batch.caption)]
