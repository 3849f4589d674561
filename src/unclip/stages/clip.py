"""CLIP: contrastive training; validation by retrieval both ways."""

import torch
from torch import Tensor

from unclip.data.batch import Batch
from unclip.evaluation.metrics import retrieval
from unclip.stages.base import Row, Stage


class ClipStage(Stage):
    columns = ("caption's picture", "1st found", "2nd", "3rd", "4th")

    def start_validation(self) -> None:
        self._image_emb: list[Tensor] = []
        self._text_emb: list[Tensor] = []
        self._captions: list[str] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._image_emb.append(self.model.encode_image(batch.image).float().cpu())
        self._text_emb.append(self.model.encode_text(batch.tokens)[0].float().cpu())
        self._captions += batch.caption

    def on_validation_epoch_end(self) -> None:
        found = retrieval(torch.cat(self._image_emb), torch.cat(self._text_emb), self._captions)
        self.log_dict({f"val/{name}": value for name, value in found.items()})

    def sheet(self, batch: Batch) -> list[Row]:
        image_emb = self.model.encode_image(batch.image).float()
        text_emb = self.model.encode_text(batch.tokens)[0].float()
        order = (text_emb @ torch.nn.functional.normalize(image_emb, dim=1).T).argsort(dim=1, descending=True)
        pictures = batch.column("image").cpu()
        return [
            Row(caption, [pictures[i], *(pictures[j] for j in order[i, :4].tolist())])
            for i, caption in enumerate(batch.caption)
        ]
