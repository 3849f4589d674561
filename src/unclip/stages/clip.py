"""CLIP: contrastive training; validation by retrieval both ways and by the rank of z_i, which the paper's SAM lowers."""

from typing import Any

import torch
from torch import Tensor

from unclip.config import OptimConfig, TrainerConfig
from unclip.data.batch import Batch
from unclip.evaluation.metrics import effective_rank, num_components, retrieval, spectrum
from unclip.stages.base import Row, Stage


class ClipStage(Stage):
    columns = ("caption's picture", "1st found", "2nd", "3rd", "4th")

    def __init__(self, model: Any, trainer_cfg: TrainerConfig, optim_cfg: OptimConfig, seed: int) -> None:
        super().__init__(model, trainer_cfg, optim_cfg, seed)
        self._encode = torch.compile(model.features) if trainer_cfg.compile else model.features

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """In parts, with the loss of the whole batch: its gradient on each embedding is passed on part by part.

        All embeddings are computed once without gradients, then once more with them (Gao et al. 2021, "Scaling Deep
        Contrastive Learning Batch Size under Memory Limited Setup").
        """
        parts = batch.split(self.trainer_cfg.accumulate)
        if len(parts) == 1:
            return super()._backward(batch)
        with torch.no_grad():
            cached = [self._features(i, part) for i, part in enumerate(parts)]
        torch.clear_autocast_cache()  # it holds casts of the weights without their gradients
        embeddings = [torch.cat(column).requires_grad_() for column in zip(*cached, strict=True)]
        scalars = [p for p in self.model.logit_parameters() if p.requires_grad]
        terms = self.model.contrast(*embeddings)
        gradients = torch.autograd.grad(terms["contrastive"], [*embeddings, *scalars])
        offset = 0
        for i, part in enumerate(parts):
            rows = slice(offset, offset + len(part))
            pairs = [(value, g[rows]) for value, g in zip(self._features(i, part), gradients[:2], strict=True)]
            last = i == len(parts) - 1
            if last:
                pairs += zip(scalars, gradients[2:], strict=True)
            with self._unsynced(not last):
                self.manual_backward(torch.stack([(value * g).sum() for value, g in pairs]).sum())
            offset += len(part)
        return {name: value.detach() for name, value in terms.items()}

    def _features(self, i: int, part: Batch) -> tuple[Tensor, Tensor]:
        self.seed_dropout(i)
        return self._encode(part)

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
        image_emb, text_emb = torch.cat(self._image_emb), torch.cat(self._text_emb)
        found = retrieval(image_emb, text_emb, self._captions)
        variances = spectrum(torch.nn.functional.normalize(image_emb, dim=1))
        found |= {"effective_rank": effective_rank(variances), "components_for_99": float(num_components(variances))}
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
