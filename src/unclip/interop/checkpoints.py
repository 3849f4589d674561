"""What a file of weights holds, said without running any code in it: dalle2-pytorch's checkpoints, Karlo's, CLIPs, and others."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.errors import ArtifactError
from unclip.interop.weight_files import Source, Unknown, described, flat, read_pickle

LONGEST = 200  # letters of a value that are shown


@dataclass
class Part:
    """Tensors whose names begin alike."""

    tensors: int = 0
    numbers: int = 0
    types: set[str] = field(default_factory=set)


@dataclass
class Description:
    """``what`` it is in words, its ``parts``, the plain ``values`` beside them, and the classes of what was ``left_out``."""

    what: str
    parts: dict[str, Part]
    values: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def describe(file: Path) -> Description:
    """Of a .safetensors file or of what ``torch.save`` wrote. Raises ArtifactError for anything else."""
    if file.suffix == ".safetensors":
        sources = described(file)
        return Description(_what({n: s.shape for n, s in sources.items()}), _parts_of_sources(sources))
    found = read_pickle(file)
    tensors = flat(found)
    if not tensors:
        raise ArtifactError(f"{file} holds no tensors: it is no checkpoint")
    unknown: dict[str, Unknown] = {}
    values: dict[str, str] = {}
    _look(found, "", values, unknown)
    for name, value in unknown.items():
        if (number := _version(value)) is not None:
            values[name] = number
    parts: dict[str, Part] = {}
    for name, value in tensors.items():
        _add(parts, name, value.numel(), str(value.dtype))
    left_out = sorted({repr(value) for name, value in unknown.items() if name not in values})
    return Description(_what({name: tuple(value.shape) for name, value in tensors.items()}), parts, values, left_out)


def _parts_of_sources(sources: Mapping[str, Source]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, source in sources.items():
        size = 1
        for side in source.shape:
            size *= side
        _add(parts, name, size, "as stored")
    return parts


def _add(parts: dict[str, Part], name: str, size: int, kind: str) -> None:
    """Below the first two names, as long as they are no numbers: model.net, model.clip, optimizer."""
    pieces = name.split(".")
    count = 2 if len(pieces) > 2 and not pieces[0].isdecimal() and not pieces[1].isdecimal() else 1
    count = 1 if pieces[0] in ("optimizer", "optimizer_states") or pieces[0].startswith("optim") else count
    part = parts.setdefault(".".join(pieces[:count]) if len(pieces) > count else "(top)", Part())
    part.tensors, part.numbers = part.tensors + 1, part.numbers + size
    part.types.add(kind.removeprefix("torch."))


def _look(value: Any, path: str, values: dict[str, str], unknown: dict[str, Unknown]) -> None:
    """Gather plain values of the first level, and whatever a pickle named that was not loaded, at any."""
    if isinstance(value, Unknown):
        unknown[path] = value
    elif isinstance(value, dict):
        for name, inner in value.items():
            _look(inner, f"{path}.{name}" if path else str(name), values, unknown)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _look(inner, f"{path}.{number}", values, unknown)
    elif "." not in path and not isinstance(value, Tensor) and value is not None:
        values[path] = str(value)[:LONGEST]


def _version(value: Unknown) -> str | None:
    """The numbers of a pickled packaging.version.Version."""
    if value.name != "Version":
        return None
    return ".".join(map(str, _numbers([value.args, value.state]) or ())) or None


def _numbers(value: Any) -> tuple[int, ...] | None:
    """The first tuple of integers of two and more in nested containers."""
    if isinstance(value, Unknown):
        return _numbers([value.args, value.state])
    if isinstance(value, tuple) and len(value) > 1 and all(isinstance(v, int) for v in value):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for v in inner if (found := _numbers(v)) is not None), None)


def _what(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """By names that only one project's nets have."""
    names = list(shapes)

    def having(pattern: str) -> list[re.Match[str]]:
        return [match for name in names if (match := re.search(pattern, name))]

    def shape(pattern: str) -> tuple[int, ...]:
        return next((shapes[name] for name in names if re.search(pattern, name)), ())

    if layers := having(r"net\.causal_transformer\.layers\.(\d+)\."):
        depth = 1 + max(int(match[1]) for match in layers)
        width, steps = shape(r"net\.learned_query$"), shape(r"noise_scheduler\.betas$")
        said = [f"depth {depth}", *[f"width {width[-1]}"][: len(width)], *[f"{steps[0]} timesteps"][: len(steps)]]
        return f"a diffusion prior of dalle2-pytorch ({', '.join(said)}){_with_clip(names)}, which cannot be imported"
    if unets := having(r"(?:^|\.)unets\.(\d+)\."):
        count = len({match[1] for match in unets})
        return f"a decoder of dalle2-pytorch with {count} unet{'s' * (count > 1)}{_with_clip(names)}, which cannot be imported"
    for pattern, what in KNOWN.items():
        if having(pattern):
            return what
    return "a file of weights that is not known here"


KNOWN = {
    r"(^|\.)prd_emb$": "a prior of Karlo's own, which `unclip import karlo FOLDER` takes",
    r"(^|\.)cf_param$": "a decoder of Karlo's own, which `unclip import karlo FOLDER` takes",
    r"model_first_steps\.": "an upsampler of Karlo's own, which `unclip import karlo FOLDER` takes",
    r"prd_embedding$": "a PriorTransformer of diffusers, or a prior of this project",
    r"(^|\.)visual\.(proj|conv1\.weight|conv1)$": "a CLIP, which `unclip import clip NAME --pretrained FILE` takes",
    r"(text|vision)_model\.encoder\.layers\.": "a CLIP of transformers",
    r"down_blocks\.0\.resnets\.": "a U-Net of diffusers, or of this project",
}


def _with_clip(names: list[str]) -> str:
    return " with a CLIP inside" if any(re.search(r"(^|\.)clip\.clip\.", name) for name in names) else ""
