"""dalle2-pytorch's side of scripts/bench/peer_quality.py, through its public classes, with the settings of its README.

Where the README must give way it does so in the peer's favour: bf16 autocast (its default is float32), captions of CLIP's length
instead of 256 positions. CLIP's token states, narrower than its net, are filled up with zeros. Runs in .venv-peer.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from dalle2_pytorch import Decoder, DecoderTrainer, DiffusionPrior, DiffusionPriorNetwork, DiffusionPriorTrainer, Unet
from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter
from quality_worker import Rows
from torch import Tensor, nn

TRAINER = {"wd": 1e-2, "ema_beta": 0.99, "ema_update_after_step": 1000, "ema_update_every": 10}  # README


def states(rows: Rows, chosen: np.ndarray, width: int) -> Tensor:
    """CLIP's token states, which are zero at padding, as wide as the net."""
    (text_seq,) = rows.take(chosen, "text_seq")
    return F.pad(text_seq, (0, width - text_seq.shape[-1]))


def unit(rows: Rows, chosen: np.ndarray, name: str) -> Tensor:
    """z_i or z_t at unit norm, as its CLIP adapters give them; a tensor of its own, since the prior scales z_i in place."""
    (emb,) = rows.take(chosen, name)
    return F.normalize(emb, dim=-1)


class StoredClip(BaseClipAdapter):
    """The stored embeddings in place of a CLIP: a "text" is the number of a row."""

    image_channels = 3

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(nn.Identity())
        self.width, self.longest, self.side = (
            facts["widths"]["embed_dim"],
            facts["widths"]["context_length"],
            facts["size"],
        )
        self.rows: Any = None

    @property
    def dim_latent(self) -> int:
        return self.width

    @property
    def image_size(self) -> int:
        return self.side

    @property
    def max_text_len(self) -> int:
        return self.longest

    def embed_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        chosen = text[:, 0].numpy()
        return unit(self.rows, chosen, "text_emb"), states(self.rows, chosen, self.width)


class PeerPrior:
    """Width and heads' width are set by the embeddings and the README, depth and number of heads as on our side; the
    feed-forward layers are as wide as the parameters allow."""

    def build(self, facts: dict[str, Any], shape: dict[str, Any]) -> nn.Module:
        self.facts, width = facts, facts["widths"]["embed_dim"]

        def parameters(hidden: int) -> int:
            return sum(p.numel() for p in self._net(shape, hidden).parameters())

        one, more = parameters(width), parameters(width + 1)
        hidden = max(1, width + round((shape["parameters"] - one) / (more - one)))
        self.chosen = {"feed_forward": hidden, "dim": width, "dim_head": shape["peer_head_dim"]}
        self.settings = {**TRAINER, "timesteps": 1000, "cond_drop_prob": 0.2, "batch": shape["batch"]}
        self.clip = StoredClip(facts)
        self.model = DiffusionPrior(self._net(shape, hidden), clip=self.clip, timesteps=1000, cond_drop_prob=0.2)
        return self.model

    def _net(self, shape: dict[str, Any], hidden: int) -> Any:
        widths = self.facts["widths"]
        return DiffusionPriorNetwork(
            dim=widths["embed_dim"],
            depth=shape["depth"],
            heads=shape["heads"],
            dim_head=shape["peer_head_dim"],
            ff_mult=(hidden + 0.5) / widths["embed_dim"],  # it rounds the product down
            max_text_len=widths["context_length"],
        )

    def start(self, lr: float, seed: int) -> None:
        self.trainer = DiffusionPriorTrainer(self.model, accelerator=accelerator(), lr=lr, **TRAINER)

    def step(self, rows: Rows, chosen: np.ndarray, positions: list[int], progress: float) -> None:
        self.trainer(
            text_embed=unit(rows, chosen, "text_emb"),
            image_embed=unit(rows, chosen, "image_emb"),
            text_encodings=states(rows, chosen, self.facts["widths"]["embed_dim"]),
        )
        self.trainer.update()

    def averaged(self) -> dict[str, Tensor]:
        return self.trainer.ema_diffusion_prior.ema_model.state_dict()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)
        self.model.eval()

    def sample(self, rows: Rows, chosen: np.ndarray, how: dict[str, Any]) -> Tensor:
        self.clip.rows = rows
        text = torch.from_numpy(chosen)[:, None]
        drawn = self.model.sample(
            text, num_samples_per_batch=how["candidates"], cond_scale=how["guidance"], timesteps=how["steps"]
        )
        return F.normalize(drawn.float(), dim=1)


class PeerDecoder:
    """Its README's U-Net with fewer channels, as the shape says; the context is as wide as the parameters allow."""

    def build(self, facts: dict[str, Any], shape: dict[str, Any]) -> nn.Module:
        self.facts, width = facts, shape["peer_dim"]

        def parameters(context: int) -> int:
            with torch.device("meta"):
                return sum(p.numel() for p in self._unet(shape, context).parameters())

        least, more = parameters(width), parameters(width + 1)
        context = width + max(0, round((shape["parameters"] - least) / (more - least)))
        if context == facts["widths"]["embed_dim"]:  # where it takes z_i as it is for its tokens
            context -= 1
        self.chosen = {"dim": width, "cond_dim": context}
        self.settings = {**TRAINER, "timesteps": 1000, "image_cond_drop_prob": 0.1, "batch": shape["batch"]}
        self.model = Decoder(
            unet=self._unet(shape, context),
            clip=StoredClip(facts),
            image_sizes=(facts["size"],),
            timesteps=1000,
            image_cond_drop_prob=0.1,
            text_cond_drop_prob=0.5,
        )
        return self.model

    def _unet(self, shape: dict[str, Any], context: int) -> Any:
        return Unet(
            dim=shape["peer_dim"],
            image_embed_dim=self.facts["widths"]["embed_dim"],
            cond_dim=context,
            channels=3,
            channels_out=6,  # with the learned variance, as the decoder would set it
            cond_on_image_embeds=True,
            dim_mults=tuple(shape["peer_mults"]),
            max_text_len=1,  # of a null caption that is never used: its parameters would count for nothing
        )

    def start(self, lr: float, seed: int) -> None:
        self.trainer = DecoderTrainer(self.model, accelerator=accelerator(), lr=lr, **TRAINER)

    def step(self, rows: Rows, chosen: np.ndarray, positions: list[int], progress: float) -> None:
        (image,) = rows.take(chosen, "image")
        self.trainer(image.float() / 255, image_embed=unit(rows, chosen, "image_emb"), unet_number=1)
        self.trainer.update(unet_number=1)

    def averaged(self) -> dict[str, Tensor]:
        return self.trainer.unets[0].state_dict()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.unets[0].load_state_dict(weights)
        self.model.eval()

    def sample(self, rows: Rows, chosen: np.ndarray, how: dict[str, Any]) -> Tensor:
        self.model.sample_timesteps = (how["steps"],)
        drawn = self.model.sample(image_embed=unit(rows, chosen, "image_emb"), cond_scale=how["guidance"])
        return (drawn.float().clamp(0, 1) * 255).round().to(torch.uint8)


def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="bf16")


STAGES = {"prior": PeerPrior, "decoder": PeerDecoder}
