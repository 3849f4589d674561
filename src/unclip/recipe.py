"""A picture as a PNG file that carries everything needed to draw it again."""

import base64
import io
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unclip import __version__
from unclip.config import Precision, from_plain, to_plain
from unclip.data.transforms import MAX_PIXELS
from unclip.errors import DataError
from unclip.jobs import Job, Picture, Sampling
from unclip.models.sampling import ARSampling, NoSampling, PriorSampling

CHUNK = "unclip"  # the PNG text chunk that holds the recipe, as JSON
LARGEST_BATCH = 4096
_PRIORS = {cls.__name__: cls for cls in (PriorSampling, ARSampling, NoSampling)}
_TENSORS = {"image_emb": torch.float32, "x_T": torch.float32, "known": torch.uint8, "mask": torch.bool}


def text_chunks(picture: Picture) -> PngInfo:
    """The recipe, and the caption as the file's description.

    In words: caption, seed, artifacts and what was done. Under ``repeat``: the job, with the latent (z_i, x_T) of a picture
    that another one gave rise to, and all sampling settings. No input picture but the one inpainted, and no path.
    """
    history = {
        "caption": picture.caption,
        "seed": picture.seed,
        **picture.words,
        "artifacts": picture.artifacts,
        "version": __version__,
        "repeat": {
            "job": {name: _stored(value) for name, value in vars(picture.job).items()},
            "how": {**to_plain(picture.how), "prior_kind": type(picture.how.prior).__name__},
            "places": picture.places,
            "num_tokens": picture.num_tokens,
            "precision": picture.precision,
        },
    }
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(history))
    info.add_itxt("Description", picture.caption)
    return info


def to_png(picture: Picture) -> bytes:
    """The PNG file."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="PNG", pnginfo=text_chunks(picture))
    return buffer.getvalue()


def to_image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.image.permute(1, 2, 0).contiguous().numpy())


def from_png(file: Path | bytes) -> Picture:
    """The picture of a PNG that :func:`to_png` wrote, ready for ``UnCLIP.repeat``.

    Raises :class:`DataError` for a file that is no picture, holds no recipe, or one that this version cannot read.
    """
    name = str(file) if isinstance(file, Path) else "the picture"
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels")
            image.load()  # text may stand behind the pixels
            raw = image.info.get(CHUNK)
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read ({error}); give a PNG that unclip wrote") from error
    if raw is None:
        raise DataError(
            f"{name} does not say how it was drawn: it is not a PNG of unclip, or another program saved it anew"
        )
    try:
        return _picture(json.loads(raw), pixels)
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise DataError(f"{name} has a recipe that this unclip {__version__} cannot read ({error})") from error


def _picture(history: dict[str, Any], pixels: Tensor) -> Picture:
    again = history["repeat"]
    how = dict(again["how"])
    kind, prior = how.pop("prior_kind"), how.pop("prior")
    sampling = from_plain(how, Sampling)
    if prior is not None:
        sampling = replace(sampling, prior=from_plain(prior, _PRIORS[kind]))
    job = Job(**{name: _restored(name, value) for name, value in again["job"].items()})
    precision = Precision[str(again["precision"])].name
    places = {str(stage): (int(size), int(index)) for stage, (size, index) in again["places"].items()}
    if not all(0 <= index < size <= LARGEST_BATCH for size, index in places.values()):
        raise ValueError("a place outside of its batch")
    return Picture(
        pixels, job.title, job.seed, dict(history["artifacts"]), job.words, job, sampling, places,
        int(again["num_tokens"]), precision,
    )  # fmt: skip


def _stored(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    array = value.cpu().contiguous().numpy()
    return {"shape": list(array.shape), "data": base64.b64encode(zlib.compress(array.tobytes())).decode()}


def _restored(name: str, value: Any) -> Any:
    if name not in _TENSORS or value is None:
        return value
    dtype, shape = _TENSORS[name], [int(side) for side in value["shape"]]
    if min(shape) < 1 or math.prod(shape) > 3 * MAX_PIXELS:
        raise ValueError(f"{name} has the shape {shape}")
    expected = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(value["data"]), expected + 1)
    if len(content) != expected:
        raise ValueError(f"{name} is not of the shape {shape}")
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
