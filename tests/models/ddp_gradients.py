"""Gradients of CLIP on two gloo ranks, by the stage's own code. usage: ddp_gradients.py FOLDER

Writes what rank 0 holds after each of MODES to FOLDER/out.pt. Lightning starts the second rank by this same command.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from unclip.config import OptimConfig, TrainerConfig
from unclip.data.batch import Batch
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.contrastive import Contrast
from unclip.stages.clip import ClipStage

SMALL = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
SMALL |= {"text_width": 16, "text_layers": 1, "text_heads": 2, "context_length": 8}
MODES = {
    "plain": (Contrast.softmax, 1, 0.0),
    "cached": (Contrast.softmax, 2, 0.0),
    "sigmoid": (Contrast.sigmoid, 1, 0.0),
    "sigmoid cached": (Contrast.sigmoid, 2, 0.0),
    "sam": (Contrast.softmax, 1, 0.1),
    "sam cached": (Contrast.softmax, 2, 0.1),
    "sam sigmoid": (Contrast.sigmoid, 1, 0.1),
}


def make_clip() -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(**SMALL, contrast=Contrast.sigmoid))  # with a bias, which the softmax leaves alone
    with torch.no_grad():
        clip.model.logit_bias.fill_(-2.0)
    return clip


def make_batch(clip: CLIP) -> Batch:
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = clip.tokenize([f"{n} red cubes and {8 - n} balls" for n in range(8)])
    return Batch(key=[str(n) for n in range(8)], position=list(range(8)), image=images, tokens=tokens)


class Probe(ClipStage):
    """Computes gradients in each of MODES and trains nothing."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        found = {}
        mine = batch.split(self.trainer.world_size)[self.global_rank]
        for name, (contrast, accumulate, rho) in MODES.items():
            self.zero_grad(set_to_none=True)
            self.model.cfg.contrast = contrast
            self.trainer_cfg.accumulate, self.optim_cfg.sam_rho = accumulate, rho
            terms = self._gradients(mine)
            gradients = {key: p.grad.clone() for key, p in self.model.named_parameters() if p.grad is not None}
            found[name] = (self.trainer.strategy.reduce(terms["contrastive"].clone(), reduce_op="mean"), gradients)
        if self.global_rank == 0:
            torch.save(found, Path(sys.argv[1]) / "out.pt")


if __name__ == "__main__":
    clip = make_clip()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_find_unused_parameters_true",  # the softmax never meets the bias
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    stage = Probe(clip, TrainerConfig(batch_size=8), OptimConfig(), seed=0)
    trainer.fit(stage, DataLoader([make_batch(clip)], batch_size=None))
