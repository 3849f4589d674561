"""The upsamplers: a small picture to a larger one."""

from unclip.data.batch import Batch
from unclip.models.pictures import to_uint8
from unclip.stages.base import Row, Stage


class UpsamplerStage(Stage):
    columns = ("low resolution", "upsampled", "true picture")

    def sheet(self, batch: Batch) -> list[Row]:
        low = self.model.low_resolution(batch.image)
        high = to_uint8(self.model.sample(low, self.model.default_sampling(), self.noise(batch)))
        pictures, low = batch.column("image").cpu(), to_uint8(low)
        return [Row(c, [low[i], high[i], pictures[i]]) for i, c in enumerate(batch.caption)]
