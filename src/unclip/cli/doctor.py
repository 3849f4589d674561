"""``unclip doctor``: whether this machine can run unclip, in words."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer

from unclip import __version__, artifact
from unclip.artifact import Manifest
from unclip.config import OptimConfig, to_plain
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import UnclipError
from unclip.models import (
    CLIPConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    Interface,
    ModelConfig,
    UpsamplerConfig,
    build,
)
from unclip.nets.conditioned import ConditioningConfig, DecoderText
from unclip.nets.transformer import PriorNetConfig
from unclip.nets.unet import UNetConfig
from unclip.optim import make_optimizer

PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "open_clip_torch", "webdataset", "wandb")
LITTLE_DISK = 10e9  # bytes: a venv's wheels and a few checkpoints
_UNET = UNetConfig(channels=[32, 64], num_blocks=1, attention_levels=[1], head_dim=32)


def examine(folder: Path) -> bool:
    """Print one line a check; returns whether all are well. ``folder`` is where runs would be written."""
    checks: list[tuple[str, Callable[[Path], Iterator[str]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("disk", _disk),
        ("CLIP", _clip),
        ("training", _one_step_each),
    ]
    well = True
    for name, check in checks:
        try:
            for line in check(folder):
                typer.echo(f"ok    {name}: {line}")
        except (OSError, RuntimeError, ValueError, UnclipError, ImportError) as error:
            well = False
            typer.echo(f"WRONG {name}: {error}")
    typer.echo("This machine is ready." if well else "Not ready: see the lines marked WRONG.")
    return well


def _versions(folder: Path) -> Iterator[str]:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    yield f"unclip {__version__}, Python {platform.python_version()}, {', '.join(found)}"


def _devices(folder: Path) -> Iterator[str]:
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16 units: set trainer.precision=fp32"
        yield f"GPU {i}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {bf16}"
    if not torch.cuda.is_available():
        yield f"no GPU; {os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()}): small models only"


def _disk(folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    content = os.urandom(16_000_000)
    with TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
        path = Path(scratch) / "test"
        start = time.monotonic()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        if path.read_bytes() != content:
            raise OSError(f"{folder.resolve()} gave back other bytes than were written")
    if free < LITTLE_DISK:
        raise OSError(f"{folder.resolve()} has {free / 1e9:.1f} GB left; checkpoints need more, free some or move runs")
    yield f"{folder.resolve()}: {free / 1e9:.0f} GB free, written and read back at {16 / seconds:.0f} MB/s"


def _clip(folder: Path) -> Iterator[str]:
    """A CLIP goes through an artifact and encodes a picture and a caption as before."""
    cfg = CLIPConfig(vision_layers=1, text_layers=1)
    model = build(cfg, Interface()).eval()
    picture, tokens = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), model.tokenize(["a red cube"])
    with TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch, torch.no_grad():
        artifact.save(Path(scratch), model, Manifest("clip", "clip", to_plain(cfg), to_plain(model.interface())))
        loaded: Any = artifact.load(Path(scratch), kind="clip")[0].eval()
        same = torch.equal(model.encode_image(picture), loaded.encode_image(picture))
        if not same or not torch.equal(model.encode_text(tokens)[0], loaded.encode_text(tokens)[0]):
            raise RuntimeError("a CLIP that was saved and loaded encodes otherwise than before")
    yield "saved, loaded, encodes a picture and a caption"


def _one_step_each(folder: Path) -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interface = Interface(embed_dim=256, text_width=192, context_length=32, vocab_size=49408)
    text = ConditioningConfig(text=DecoderText.clip_states, text_emb=True, context_dim=64)
    convolutions = UNetConfig(channels=[32, 64], num_blocks=1, scale_shift=False)
    models: dict[str, ModelConfig] = {
        "CLIP": CLIPConfig(vision_layers=1, text_layers=1),
        "prior": DiffusionPriorConfig(net=PriorNetConfig(width=64, depth=2, num_heads=2)),
        "decoder": DecoderConfig(image_size=32, net=_UNET, conditioning=text),
        "upsampler": UpsamplerConfig(low_size=16, image_size=64, net=convolutions),
    }
    batch = _batch(8, 64, interface).to(device)
    for name, cfg in models.items():
        model = build(cfg, interface if name not in ("CLIP", "upsampler") else Interface()).to(device)
        start = time.monotonic()
        loss = _step(model, batch, device)
        if not loss < float("inf"):
            raise RuntimeError(f"one step of the {name} gave a loss of {loss}")
        yield f"one bf16 step of a small {name} on {device} in {time.monotonic() - start:.2f} s, loss {loss:.3g}"


def _step(model: Any, batch: Batch, device: torch.device) -> float:
    optimizer = make_optimizer(model, OptimConfig())
    with torch.autocast(device.type, torch.bfloat16):
        loss = torch.stack(list(model.losses(batch, Noise.at(0, batch.position, device)).values())).sum()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _batch(rows: int, size: int, interface: Interface) -> Batch:
    """Random pictures with captions of six tokens."""
    tokens = torch.randint(1, 1000, (rows, 6))
    tokens[:, -1] = interface.vocab_size - 1
    return Batch(
        position=list(range(rows)),
        image=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8),
        tokens=tokens,
        image_emb=torch.randn(rows, interface.embed_dim),
        text_emb=torch.randn(rows, interface.embed_dim),
        text_seq=torch.randn(rows, 6, interface.text_width),
    )
