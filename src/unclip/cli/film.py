"""Frames as moving pictures: GIF, and MP4 where PyAV is installed."""

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

SMALLEST = 256  # pixels a side of an MP4; players blur what is smaller


def write_films(frames: Sequence[Tensor], stem: Path, rate: float) -> list[Path]:
    """``stem``.gif and, with the extra video, ``stem``.mp4 of uint8 frames (3, H, W), ``rate`` of them a second.

    The GIF runs there and back again. What is not installed is said on standard error.
    """
    found = [write_gif(frames, stem.with_suffix(".gif"), rate)]
    if importlib.util.find_spec("av") is None:
        typer.echo("no interpolation.mp4: it needs `pip install unclip[video]`", err=True)
    else:
        found.append(write_mp4(frames, stem.with_suffix(".mp4"), rate))
    return found


def write_gif(frames: Sequence[Tensor], path: Path, rate: float) -> Path:
    """Frames there and back again, without end."""
    images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in [*frames, *frames[-2:0:-1]]]
    duration = max(20, round(1000 / rate))  # viewers take less than 20 ms for 100
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return path


def write_mp4(frames: Sequence[Tensor], path: Path, rate: float) -> Path:
    """H.264 in 4:2:0; small frames are enlarged by whole pixels, odd sides gain one."""
    import av

    height, width = frames[0].shape[1:]
    factor = max(1, -(-SMALLEST // min(height, width)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.width, stream.height = (side * factor + side * factor % 2 for side in (width, height))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            large = frame.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).float()
            padding = (0, stream.width - large.shape[2], 0, stream.height - large.shape[1])
            even = F.pad(large[None], padding, mode="replicate")[0].to(torch.uint8)
            picture = av.VideoFrame.from_ndarray(even.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path
