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
        pairs = {"to_true": (sampled, true), "to_text": (sampled, text), "text_to_true": (text, true)}
        for name, (a, b) in pairs.items():
            self.add_mean(f"cosine_{name}", (a * b).sum(1).mean(), len(batch))
        self._rows.add(batch.position, batch.caption, true, sampled)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
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
