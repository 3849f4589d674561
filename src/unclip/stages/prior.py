"""The prior: caption and z_t to z_i; validation compares sampled z_i with the true ones."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.batch import Batch
from unclip.evaluation.prior import PriorEvaluation
from unclip.evaluation.sheet import text_tile
from unclip.stages.base import Row, Stage


class PriorStage(Stage):
    """Validation reports the averaged weights, as that of every stage; under ``val/online/`` stand the trained weights'
    losses, which cost no sampling."""

    columns = ("true picture", "nearest to the sampled z_i", "2nd", "3rd", "4th")

    def start_validation(self) -> None:
        self._evaluation = PriorEvaluation(self.model, self.noise)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation.add(batch)
        if self.optim_cfg.ema_decay and self.model.cfg.trains:
            with self.adamw.trained_weights():
                self._evaluation.add_losses(batch, prefix="online/")

    def on_validation_epoch_end(self) -> None:
        found = self._evaluation.summary(self.device)
        self.found(found)

    def _sample(self, batch: Batch) -> Tensor:
        drawn = self.model.sample(self.model.cond(batch), self.model.default_sampling(), self.noise(batch))
        return F.normalize(drawn.float(), dim=1)

    def sheet(self, batch: Batch) -> list[Row]:
        order = (self._sample(batch) @ F.normalize(batch.column("image_emb"), dim=1).T).argsort(dim=1, descending=True)
        pictures = _tiles(batch.caption) if batch.image is None else batch.image.cpu()
        return [
            Row(caption, [pictures[i], *(pictures[j] for j in order[i, :4].tolist())])
            for i, caption in enumerate(batch.caption)
        ]


def _tiles(captions: Sequence[str]) -> Tensor:
    """Captions as pictures (B, 3, 96, 96), for embeddings without pictures."""
    return torch.from_numpy(np.stack([text_tile(caption) for caption in captions])).permute(0, 3, 1, 2)
