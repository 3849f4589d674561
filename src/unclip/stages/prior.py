"""The prior: caption and z_t to z_i; validation compares sampled z_i with the true ones."""

import torch.nn.functional as F
from torch import Tensor

from unclip.data.batch import Batch
from unclip.evaluation.metrics import retrieval
from unclip.stages.base import Row, Stage
from unclip.stages.ranks import Rows


class PriorStage(Stage):
    columns = ("true picture", "nearest to the sampled z_i", "2nd", "3rd", "4th")

    def start_validation(self) -> None:
        self._rows = Rows()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        sampled = self._sample(batch)
        true, text = (F.normalize(batch.column(name), dim=1) for name in ("image_emb", "text_emb"))
        size = len(batch)
        self.log("val/cosine_to_true", (sampled * true).sum(1).mean(), batch_size=size, sync_dist=True)
        self.log("val/cosine_to_text", (sampled * text).sum(1).mean(), batch_size=size, sync_dist=True)
        self.log("val/cosine_text_to_true", (text * true).sum(1).mean(), batch_size=size, sync_dist=True)
        self._rows.add(batch.position, batch.caption, true, sampled)

    def on_validation_epoch_end(self) -> None:
        captions, (true, sampled) = self._rows.of_all_ranks(self.device)
        found = retrieval(true, sampled, captions)
        self.log_dict({f"val/{name}": value for name, value in found.items() if name.startswith("text_to_image")})

    def _sample(self, batch: Batch) -> Tensor:
        drawn = self.model.sample(self.model.cond(batch), self.model.default_sampling(), self.noise(batch))
        return F.normalize(drawn.float(), dim=1)

    def sheet(self, batch: Batch) -> list[Row]:
        order = (self._sample(batch) @ F.normalize(batch.column("image_emb"), dim=1).T).argsort(dim=1, descending=True)
        pictures = batch.column("image").cpu()
        return [
            Row(caption, [pictures[i], *(pictures[j] for j in order[i, :4].tolist())])
            for i, caption in enumerate(batch.caption)
        ]
