"""The tiny chain with a decoder that has learnt something: plain coloured pictures, so that noise can be told from them."""

import io
import shutil
from pathlib import Path

import torch
from PIL import Image
from tiny_chain import CONFIGS, write_tiny_chain

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import from_plain, to_plain
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.models import REGISTRY, build
from unclip.models.interface import Interface

COLOURS = {"a red cube": (220, 30, 30), "a blue cone": (30, 30, 220), "a green ring": (30, 200, 30)}
ROWS, STEPS = 12, 150


def write_smooth_chain(runs: Path) -> None:
    """clip, prior and decoder (16 px) below ``runs``; takes seconds."""
    write_tiny_chain(runs)
    shutil.rmtree(runs / "upsampler")
    shutil.rmtree(runs / "decoder")
    clip, manifest = artifact.load(runs / "clip")
    interface = Interface(**{**manifest.interface, "clip": manifest.hash})
    raw = {**CONFIGS["decoder"], "diffusion": {"predict": "x0", "clip_range": 1.0}}
    torch.manual_seed(0)
    decoder = build(from_plain(raw, REGISTRY["decoder"][0]), interface)
    captions = [list(COLOURS)[i % len(COLOURS)] for i in range(ROWS)]
    pictures = torch.stack([torch.tensor(COLOURS[caption], dtype=torch.uint8) for caption in captions])
    pictures = pictures[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    with torch.no_grad():
        columns = {"image": pictures, "tokens": clip.tokenize(captions), "image_emb": clip.encode_image(pictures)}
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    for step in range(STEPS):
        positions = list(range(step * ROWS, (step + 1) * ROWS))
        losses = decoder.losses(Batch(position=positions, caption=captions, **columns), Noise.at(0, positions))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    found = Manifest("decoder", "decoder", to_plain(decoder.cfg), to_plain(interface), {"clip": manifest.hash}, STEPS)
    artifact.save(runs / "decoder", decoder.eval(), found)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (24, 24)) -> bytes:
    """A picture of one colour as a file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()
