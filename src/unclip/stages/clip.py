"""CLIP: contrastive training; validation by retrieval both ways and by the rank of z_i, which the paper's SAM lowers."""

import torch
from torch import Tensor

from unclip.config import OnNonfinite
from unclip.data.batch import Batch
from unclip.errors import ConfigError
from unclip.evaluation.metrics import effective_rank, num_components, retrieval, spectrum
from unclip.evaluation.rows import Rows
from unclip.models.contrastive import of_all_ranks
from unclip.optim import batch_norms_of, resting_statistics
from unclip.stages.base import Row, Stage


class ClipStage(Stage):
    columns = ("caption's picture", "1st found", "2nd", "3rd", "4th")
    sheet_rows = 0  # the pictures are looked for among all of the sheet

    def bind(self) -> None:
        super().bind()
        if batch_norms_of(self.model) and self.trainer_cfg.on_nonfinite is OnNonfinite.skip:
            raise ConfigError(
                "trainer.on_nonfinite=skip with batch norms (a CLIP's ResNet), whose statistics a NaN spoils for good: take stop"
            )
        self._encode = torch.compile(self.model.features) if self.trainer_cfg.compile else self.model.features

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """In parts, with the loss of the whole batch: its gradient on each embedding is passed on part by part.

        All embeddings are computed once without gradients, then once more with them (Gao et al. 2021, "Scaling Deep
        Contrastive Learning Batch Size under Memory Limited Setup").
        """
        parts = batch.split(self.trainer_cfg.accumulate)
        if len(parts) == 1:
            return super()._backward(batch)
        with torch.no_grad(), resting_statistics(self.model):
            cached = [self._features(i, part) for i, part in enumerate(parts)]
        torch.clear_autocast_cache()  # it holds casts of the weights without their gradients
        embeddings = [torch.cat(column).requires_grad_() for column in zip(*cached, strict=True)]
        scalars = [p for p in self.model.logit_parameters() if p.requires_grad]
        everyones, mine = of_all_ranks(*embeddings)
        terms = self.model.contrast(*everyones, mine)
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
        self._rows = Rows()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        image_emb, text_emb = self.model.features(batch)
        self._rows.add(batch.position, {"image_emb": image_emb, "text_emb": text_emb})
        self._rows.add_captions(batch.position, batch.caption)

    def on_validation_epoch_end(self) -> None:
        columns = self._rows.of_all_ranks(self.device)
        image_emb, text_emb = columns["image_emb"], columns["text_emb"]
        found = retrieval(image_emb, text_emb, columns["caption"].tolist()) | self._validation_loss(image_emb, text_emb)
        variances = spectrum(image_emb)
        found |= {"effective_rank": effective_rank(variances), "components_for_99": float(num_components(variances))}
        self.found(found)

    def _validation_loss(self, image_emb: Tensor, text_emb: Tensor) -> dict[str, float]:
        """The mean over batches of about ``trainer.batch_size`` pairs, weighted by their sizes."""
        pieces = -(-len(image_emb) // self.trainer_cfg.batch_size)
        sums: dict[str, float] = {}
        for pair in zip(image_emb.tensor_split(pieces), text_emb.tensor_split(pieces), strict=True):
            terms = self.model.contrast(*(rows.to(self.device) for rows in pair))
            sums = {name: sums.get(name, 0.0) + float(value) * len(pair[0]) for name, value in terms.items()}
        return {name: value / len(image_emb) for name, value in sums.items()}

    def sheet(self, batch: Batch) -> list[Row]:
        image_emb = self.model.encode_image(batch.image).float()
        text_emb = self.model.encode_text(batch.tokens)[0].float()
        order = (text_emb @ torch.nn.functional.normalize(image_emb, dim=1).T).argsort(dim=1, descending=True)
        pictures = batch.column("image").cpu()
        return [
            Row(caption, [pictures[i], *(pictures[j] for j in order[i, :4].tolist())])
            for i, caption in enumerate(batch.caption)
        ]
