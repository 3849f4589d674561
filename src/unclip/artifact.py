"""The contract between stages: what one stage writes and the next one reads.

An artifact is a folder ``artifact-STEP/`` inside a run with ``weights.safetensors``, ``manifest.json`` and ``config.yaml``
(for people, never parsed); statistics that a command added later stand beside them. The run's symlink ``artifact`` points at
the newest one. No pickle, no import string: a model is rebuilt from its registry name and its configuration.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unclip import __version__
from unclip.config import from_plain
from unclip.drafts import complete_or_not, sync, write_atomic
from unclip.errors import ArtifactError, ConfigError
from unclip.models.interface import Interface
from unclip.tensor_file import write_tensors

FORMAT = 1
KINDS = ("clip", "prior", "decoder", "upsampler")
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
FILLS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


@dataclass
class Manifest:
    """What an artifact is and where it comes from.

    ``kind`` is the stage (clip, prior, decoder, upsampler), ``model`` the registry name, ``config`` what rebuilds the model.
    ``hash`` covers weights, model and configuration; ``parents`` maps what the stage was trained on to their hashes.
    Statistics have a hash of their own, so that adding them breaks no lineage.
    """

    kind: str
    model: str
    config: dict[str, Any]
    interface: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    step: int = 0
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    hash: str = ""
    weights_sha256: str = ""
    statistics_sha256: str = ""
    version: str = __version__
    format: int = FORMAT


class HasStatistics(Protocol):
    """A model with tensors that are gathered after training and kept apart from its weights."""

    def statistics(self) -> dict[str, Tensor]: ...
    def load_statistics(self, statistics: dict[str, Tensor]) -> None: ...


def save(run: Path, model: nn.Module | Mapping[str, Tensor], manifest: Manifest) -> Path:
    """Write ``model`` (or its state) as ``run/artifact-STEP/`` and point ``run/artifact`` at it.

    Both appear complete or not at all. Of a sharded state this rank gathers one tensor after another; the other ranks call
    ``write_tensors(None, state)`` meanwhile.
    """
    final = _unused(run / f"artifact-{manifest.step:08d}")
    with complete_or_not(final) as draft:
        _write(draft, model, manifest)
    link = run / "artifact.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, run / "artifact")
    sync(run)
    _drop_older(run, keep=final.name)
    return final


def refuse_run(out: Path) -> None:
    """ConfigError for a folder that a training run owns, whose artifact another one would replace."""
    if (out / "identity.json").exists():
        raise ConfigError(f"--out {out} is a training run, whose artifact this would replace; give another folder")


def _unused(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... that is free: the one in use stays until the link moves."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 100))]
    return next(name for name in names if not name.exists())


def _write(draft: Path, model: nn.Module | Mapping[str, Tensor], manifest: Manifest) -> None:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    write_tensors(draft / WEIGHTS, state)
    manifest.weights_sha256 = _sha256(draft / WEIGHTS)
    manifest.hash = content_hash(manifest)
    (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    (draft / "config.yaml").write_text(yaml.safe_dump(manifest.settings, sort_keys=False))
    for path in [*draft.iterdir(), draft]:
        sync(path)


def load(folder: Path | str, *, kind: str | None = None) -> tuple[nn.Module, Manifest]:
    """The model of a run or artifact folder, in eval mode on the CPU, with its manifest.

    Raises :class:`ArtifactError` where the folder, a file or a weight is missing, altered, of another kind or newer than
    this version.
    """
    from unclip.models import build

    manifest = read_manifest(folder, kind=kind)
    path = locate(folder)
    weights = _checked_weights(path, manifest)
    with _Unfilled():
        model = build(config_of(manifest, path), Interface(**manifest.interface))
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path / WEIGHTS} does not fit the model in {MANIFEST}: {error}") from error
    if manifest.statistics_sha256:
        owner: Any = model
        owner.load_statistics(_read_statistics(path, manifest))
    return model.eval().requires_grad_(False), manifest


class _Unfilled(TorchFunctionMode):
    """Leaves out initial values: each weight comes from the file, and drawing a billion random numbers takes a while."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The weights and buffers of a run or artifact folder by name; raises :class:`ArtifactError` as :func:`load` does."""
    return _checked_weights(locate(folder), read_manifest(folder))


def verify(folder: Path | str) -> Manifest:
    """The manifest of an artifact whose files are whole, without loading them; raises :class:`ArtifactError` as :func:`load`."""
    path, manifest = locate(folder), read_manifest(folder)
    _refuse_altered(path, manifest)
    if manifest.statistics_sha256:
        _read_statistics(path, manifest)
    return manifest


def _refuse_altered(path: Path, manifest: Manifest) -> None:
    if _sha256(path / WEIGHTS) != manifest.weights_sha256:
        raise ArtifactError(
            f"{path / WEIGHTS} is not the file that {MANIFEST} describes: it was altered or cut short. "
            "Copy the artifact again or train the stage again."
        )


def _checked_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    _refuse_altered(path, manifest)
    try:
        return load_file(path / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ArtifactError(f"{path / WEIGHTS} cannot be read: {error}") from error


def add_statistics(folder: Path | str, model: HasStatistics) -> Path:
    """Write the model's statistics into its artifact, in place of older ones; ``hash`` stays as it is. Returns the file."""
    path, manifest = locate(folder), read_manifest(folder)
    content = tensor_bytes({name: t.detach().cpu().contiguous() for name, t in model.statistics().items()})
    manifest.statistics_sha256 = hashlib.sha256(content).hexdigest()
    final = _statistics_file(path, manifest)
    write_atomic(final, content)
    write_atomic(path / MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())
    for old in path.glob("statistics-*.safetensors"):
        if old != final:
            old.unlink()
    return final


def _statistics_file(path: Path, manifest: Manifest) -> Path:
    return path / f"statistics-{manifest.statistics_sha256[:8]}.safetensors"


def _read_statistics(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    file = _statistics_file(path, manifest)
    if not file.is_file() or _sha256(file) != manifest.statistics_sha256:
        raise ArtifactError(f"{file} is missing or altered; copy the artifact again, or run `unclip prior-stats` again")
    return load_file(file)


def read_manifest(folder: Path | str, *, kind: str | None = None) -> Manifest:
    """The manifest of a run or artifact folder; raises :class:`ArtifactError` as :func:`load` does."""
    path = locate(folder)
    try:
        raw = json.loads((path / MANIFEST).read_text())
        _refuse_newer(raw, path)
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path / MANIFEST} is damaged ({error}); train the stage again or copy it again"
        ) from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{path} is a {manifest.kind} artifact where a {kind} is needed; pass the {kind} run's folder"
        )
    if content_hash(manifest) != manifest.hash:
        raise ArtifactError(f"{path / MANIFEST} was altered after it was written; copy the artifact again")
    if not (path / WEIGHTS).is_file():
        raise ArtifactError(f"{path / WEIGHTS} is missing; copy the whole artifact folder again")
    return manifest


def _refuse_newer(raw: dict[str, Any], path: Path) -> None:
    """Before anything else is read: a newer manifest may have fields that this version does not know."""
    if raw["format"] > FORMAT:
        raise ArtifactError(
            f"{path} has format {raw['format']}; this unclip {__version__} reads up to {FORMAT}: upgrade it"
        )


def locate(folder: Path | str) -> Path:
    """The artifact folder behind a run folder or an artifact folder."""
    folder = Path(folder)
    for candidate in (folder / "artifact", folder):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; give the run folder of a finished stage")
    raise ArtifactError(f"{folder} holds no artifact: the stage has not finished, or this is not a run folder")


def kind_named(name: str) -> str:
    """The kind of a stage by its folder's name: upsampler2, upsampler_1024 and upsampler-256 are all of the kind upsampler."""
    return name[: next((i for i, letter in enumerate(name) if not letter.isalpha()), len(name))]


def is_there(folder: Path) -> bool:
    """Whether a run or artifact folder holds an artifact, by its files alone."""
    return any((candidate / MANIFEST).is_file() for candidate in (folder / "artifact", folder))


def content_hash(manifest: Manifest) -> str:
    """sha256 over the weights and everything that gives them meaning; statistics and metrics stay outside."""
    meaning = [
        manifest.kind,
        manifest.model,
        manifest.config,
        manifest.interface,
        manifest.parents,
        manifest.weights_sha256,
    ]
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def stages_of(runs: Path) -> dict[str, Path]:
    """One run or artifact by its kind, or the stages of a folder of runs by their names. ArtifactError where there are none."""
    if is_there(runs):
        return {read_manifest(runs).kind: runs}
    found = {path.name: path for path in sorted(runs.glob("*")) if kind_named(path.name) in KINDS and is_there(path)}
    if not found:
        raise ArtifactError(f"{runs} holds no stages: give a folder with finished runs {', '.join(KINDS)}, or one run")
    return found


def config_of(manifest: Manifest, path: Path) -> Any:
    """The model's typed configuration; raises :class:`ArtifactError` for a model or settings that this version does not know."""
    from unclip.models import REGISTRY

    if manifest.model not in REGISTRY:
        raise ArtifactError(f"{path} holds a '{manifest.model}'; this unclip {__version__} knows {', '.join(REGISTRY)}")
    try:
        return from_plain(manifest.config, REGISTRY[manifest.model][0])
    except ConfigError as error:
        raise ArtifactError(
            f"{path / MANIFEST} has settings that this unclip {__version__} does not take: {error}; "
            f"load it with version {manifest.version}, or train the stage again"
        ) from error


def _drop_older(run: Path, keep: str) -> None:
    for old in run.glob("artifact-*"):
        if old.name != keep:
            shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(model: nn.Module) -> dict[str, int]:
    """Parameters, trainable parameters and bytes of a model."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(p.numel() * torch.tensor([], dtype=p.dtype).element_size() for p in parameters),
    }


def refuse_half(manifest: Manifest, folder: Path) -> None:
    """ArtifactError for a decoder of two nets whose second one is still to be trained."""
    split = manifest.config.get("split") if manifest.kind == "decoder" else None
    if split and manifest.config.get("last_net") is None:
        raise ArtifactError(
            f"{folder} draws the noisier {1 - split:.0%} of the steps only (model.split): take the decoder that train-decoder "
            "makes of it with model.first and model.last_net"
        )
