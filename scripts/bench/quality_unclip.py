"""Our side of scripts/bench/peer_quality.py: the emoji recipes (conf/experiment/emoji_*.yaml) at the benchmark's sizes.

What the peer has no counterpart for is left out: the decoder sees z_i only and draws no sketch, and the prior reads the caption
from CLIP's frozen states, as the peer does, instead of an own embedding of its tokens.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality_worker import Rows
from torch import Tensor, nn

from unclip.config import Decay, OptimConfig, to_plain
from unclip.data.batch import Batch
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict, Timesteps, Weighting
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from unclip.models.interface import Interface
from unclip.models.pictures import to_uint8
from unclip.models.sampling import DiffusionSampling, PriorSampling
from unclip.nets.conditioned import ConditioningConfig
from unclip.nets.layers import Cond
from unclip.nets.transformer import PriorNetConfig, PriorText
from unclip.nets.unet import UNetConfig
from unclip.optim import clip_gradients, learning_rate, make_optimizer

TEMPERATURE = 0.3  # of our decoder's sampler


class Unclip:
    """What both stages share: a step in bf16 autocast, with Muon for the decoder's matrices, and averaged weights."""

    chosen: dict[str, int] = {}  # noqa: RUF012  (nothing is searched for on this side)
    settings: dict[str, Any]
    model: Any
    optim: OptimConfig

    def start(self, lr: float, seed: int) -> None:
        self.optim.muon_lr *= lr / self.optim.lr  # one search for both
        self.optim.lr, self.seed, self.steps = lr, seed, 0
        self.optimizer = make_optimizer(self.model, self.optim)
        self.parameters: list[nn.Parameter] = list(self.model.parameters())

    def step(self, rows: Rows, chosen: np.ndarray, positions: list[int], progress: float) -> None:
        batch = self.batch(rows, chosen, positions)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(self.optim, self.steps, progress)
        with torch.autocast(rows.device.type, torch.bfloat16):
            losses = self.model.losses(batch, Noise.at(self.seed, positions, rows.device))
            loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self.parameters, self.optim.grad_clip)
        self.optimizer.step()
        self.steps += 1

    def averaged(self) -> dict[str, Tensor]:
        with self.optimizer.ema_weights():
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)
        self.model.eval()

    def batch(self, rows: Rows, chosen: np.ndarray, positions: list[int]) -> Batch:
        raise NotImplementedError


class UnclipPrior(Unclip):
    """``sample``: DDIM, the closer of two candidates to z_t, no guidance."""

    def build(self, facts: dict[str, Any], shape: dict[str, Any]) -> nn.Module:
        net = PriorNetConfig(
            width=shape["width"], depth=shape["depth"], num_heads=shape["heads"], text=PriorText.clip_states
        )
        self.optim = OptimConfig(lr=5e-4, weight_decay=0.06, warmup_steps=100, decay=Decay.cosine, ema_decay=0.995)
        cfg = DiffusionPriorConfig(net=net)
        self.settings = {"optim": plain(self.optim), "model": to_plain(cfg), "batch": shape["batch"]}
        self.model = DiffusionPrior(cfg, Interface(**facts["widths"]))
        return self.model

    def batch(self, rows: Rows, chosen: np.ndarray, positions: list[int]) -> Batch:
        tokens, text_seq, text_emb, image_emb = rows.take(chosen, "tokens", "text_seq", "text_emb", "image_emb")
        longest = int(tokens.argmax(1).max()) + 1
        return Batch(
            position=positions,
            image_emb=image_emb,
            text_emb=text_emb,
            text_seq=text_seq[:, :longest],
            tokens=tokens[:, :longest],
        )

    def sample(self, rows: Rows, chosen: np.ndarray, how: dict[str, Any]) -> Tensor:
        batch = self.batch(rows, chosen, chosen.tolist())
        sampler = SamplerConfig(Sampler.ddim, how["steps"])
        sampling = PriorSampling(sampler, Guidance(how["guidance"]), num_candidates=how["candidates"])
        drawn = self.model.sample(self.model.cond(batch), sampling, Noise(batch.position, rows.device))
        return F.normalize(drawn.float(), dim=1)


class UnclipDecoder(Unclip):
    """``sample``: ancestral at a low temperature, with guidance."""

    def build(self, facts: dict[str, Any], shape: dict[str, Any]) -> nn.Module:
        net = UNetConfig(
            channels=shape["channels"],
            num_blocks=1,
            attention_levels=shape["attention_levels"],
            head_dim=shape["head_dim"],
            groups=16,
            patch=2,
        )
        diffusion = DiffusionConfig(
            predict=Predict.x0,
            weighting=Weighting.clamped_snr,
            clip_range=1.0,
            timesteps=Timesteps.low_discrepancy,
        )
        cfg = DecoderConfig(
            image_size=facts["size"],
            net=net,
            conditioning=ConditioningConfig(context_dim=128),
            diffusion=diffusion,
            drop_image=0.1,
        )
        self.optim = OptimConfig(
            lr=1.5e-3, muon_lr=0.02, weight_decay=0.01, warmup_steps=100, decay=Decay.cosine, ema_decay=0.998
        )
        self.settings = {
            "optim": plain(self.optim),
            "model": to_plain(cfg),
            "batch": shape["batch"],
            "temperature": TEMPERATURE,
        }
        self.model = Decoder(cfg, Interface(**facts["widths"]))
        return self.model

    def batch(self, rows: Rows, chosen: np.ndarray, positions: list[int]) -> Batch:
        image, image_emb = rows.take(chosen, "image", "image_emb")
        return Batch(position=positions, image=image, image_emb=image_emb)

    def sample(self, rows: Rows, chosen: np.ndarray, how: dict[str, Any]) -> Tensor:
        sampling = DiffusionSampling(
            SamplerConfig(num_steps=how["steps"], temperature=TEMPERATURE), Guidance(how["guidance"])
        )
        (image_emb,) = rows.take(chosen, "image_emb")
        noise = Noise(chosen.tolist(), rows.device)
        return to_uint8(self.model.sample(Cond(image_emb=image_emb), sampling, noise))


def plain(optim: OptimConfig) -> dict[str, Any]:
    """What a piece says of the optimiser; its learning rate is the piece's own."""
    names = ("muon_lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "grad_clip", "ema_decay")
    return {name: vars(optim)[name] for name in names} | {"decay": optim.decay.value}


STAGES = {"prior": UnclipPrior, "decoder": UnclipDecoder}
