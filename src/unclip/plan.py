"""What a training would take, found without running it: parameters, FLOPs, memory and days.

The stage's own step runs on fake tensors, which have shapes and no content: torch's FlopCounterMode counts its products, torch's
MemTracker follows what is alive. What several devices change is added by the rules in :func:`on_devices`.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from unclip.config import OptimConfig, Precision
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.models import Interface, ModelConfig, UpsamplerConfig, build
from unclip.models.ar_prior import ARPrior
from unclip.models.clip import CLIP
from unclip.models.pictures import Bsr
from unclip.nets.transformer import TransformerBlock
from unclip.nets.unet import ContextAttention, ResnetBlock
from unclip.optim import AdamWEMA, make_optimizer

STATE = ("parameters", "gradients", "optimiser")


@dataclass
class Step:
    """One optimiser step of one device: ``flops`` of forward and backward, and the bytes alive at its peak by kind."""

    parameters: int
    trainable: int
    flops: int
    bytes: dict[str, int]
    largest_block: int  # parameters of the largest unit that FSDP2 gathers
    outside: int  # parameters outside of those units

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())


def measure_step(
    cfg: ModelConfig, interface: Interface, optim: OptimConfig, precision: Precision, rows: int, device: str = "cpu"
) -> Step:
    """Follow the second step of ``rows`` samples, when the optimiser's state exists, on fake tensors of ``device``."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = build(cfg, interface).train()
        if isinstance(model, ARPrior):
            model.assume_fit()
        optimizer = make_optimizer(model, optim)
        batch = example(model, interface, rows)
        sizes = [p.numel() for p in model.parameters()]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        resting = _take_resting(model)
        with FlopCounterMode(display=False) as counter:
            _backward(Losses(model), batch, precision)
        model.zero_grad(set_to_none=True)
        tracker = MemTracker()
        tracker.track_external(model, *resting, optimizer, *[t for t in vars(batch).values() if isinstance(t, Tensor)])
        losses = Losses(model)
        with tracker:
            for _ in range(2):
                train_step(losses, optimizer, batch, precision)
                tracker.reset_mod_stats()  # it follows one forward of a module at a time; the peak stays
        found = next(iter(tracker.get_tracker_snapshot("peak").values()))
        kinds = {kind.name if isinstance(kind, Enum) else kind: size for kind, size in found.items()}
        units = [sum(p.numel() for p in unit.parameters()) for unit in _units(model)]
        return Step(
            parameters=sum(sizes),
            trainable=trainable,
            flops=counter.get_total_flops() * (2 if optim.sam_rho else 1),
            bytes={
                "parameters": kinds["PARAM"] + kinds["BUFFER"],
                "gradients": kinds["GRAD"],
                "optimiser": kinds["OPT"],
                "activations": kinds["ACT"] + kinds["TEMP"] + kinds["OTH"],
            },
            largest_block=max(units, default=0),
            outside=sum(p.numel() for p in model.parameters()) - sum(units),
        )


def seconds_of(step: Step, tflops: float, mfu: float) -> float:
    """Seconds that one device computes for a step, at the share ``mfu`` of its peak."""
    return step.flops / (tflops * 1e12 * mfu)


class Losses(nn.Module):
    """The sum of a model's losses as a forward, which torch's trackers look for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        noise = Noise.at(0, batch.position, batch.column("tokens").device)
        return torch.stack(list(self.model.losses(batch, noise).values())).sum()


def train_step(losses: nn.Module, optimizer: AdamWEMA, batch: Batch, precision: Precision) -> None:
    """What a stage does for one batch on one device."""
    _backward(losses, batch, precision)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _backward(losses: nn.Module, batch: Batch, precision: Precision) -> None:
    device = batch.column("tokens").device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
        loss = losses(batch)
    loss.backward()


def example(model: Any, interface: Interface, rows: int) -> Batch:
    """A batch of zeros in the shapes that the model trains on, captions of full length."""
    cfg = model.cfg
    interface = model.interface() if isinstance(model, CLIP) else interface
    size = model.image_size if isinstance(model, CLIP) else getattr(cfg, "image_size", 1)
    length = interface.context_length or 1
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    low = None
    if isinstance(cfg, UpsamplerConfig) and cfg.bsr is not Bsr.none:  # else it is made from the picture
        low = torch.zeros(rows, 3, cfg.low_size, cfg.low_size, dtype=torch.uint8)
    return Batch(
        key=[""] * rows,
        position=list(range(rows)),
        caption=[""] * rows,
        image=torch.zeros(rows, 3, size, size, dtype=torch.uint8),
        low=low,
        tokens=tokens,
        image_emb=torch.zeros(rows, interface.embed_dim),
        text_emb=torch.zeros(rows, interface.embed_dim),
        text_seq=torch.zeros(rows, length, interface.text_width),
    )


def _take_resting(model: Any) -> list[nn.Module]:
    """Take out of the model what is there in a training step without a part in it: the first of two nets.

    It only takes memory then. torch's tracker would ask for the gradients of all that stays within the model.
    """
    if getattr(model, "last_net", None) is None:
        return []
    net = model.net
    del model.net
    return [net]


def _units(model: Any) -> list[nn.Module]:
    """The blocks that fsdp2 gathers one by one in a training step."""
    from open_clip.transformer import ResidualAttentionBlock

    kinds = (TransformerBlock, ResnetBlock, ContextAttention, ResidualAttentionBlock)
    return [module for module in model.modules() if isinstance(module, kinds)]


def on_devices(step: Step, devices: int, precision: Precision) -> dict[str, dict[str, int]]:
    """Bytes by kind on each of ``devices`` devices, for ddp and fsdp2.

    ddp keeps everything whole and copies the gradients into buckets. fsdp2 keeps 1 / devices of weights, gradients and the
    optimiser's state; gathered at once are two blocks (the next one is fetched ahead) and what belongs to none, and one
    block's gradient before it is summed.
    """
    if devices == 1:
        return {"one device": step.bytes}
    ddp = {**step.bytes, "buckets": 4 * step.trainable}
    width = 2 if precision is Precision.bf16 else 4
    sharded = {name: -(-size // devices) if name in STATE else size for name, size in step.bytes.items()}
    gathered = 2 * width * step.largest_block + 4 * step.outside + 4 * step.largest_block
    return {"ddp": ddp, "fsdp2": {**sharded, "gathered": gathered}}
