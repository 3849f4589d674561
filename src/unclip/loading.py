"""The stages' models: read from their folders, and kept in memory or not."""

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from unclip import artifact
from unclip.artifact import Manifest
from unclip.errors import ArtifactError


class Memory(Enum):
    """Which stages stay in memory: all, or one at a time, each being read again when its turn comes."""

    all = "all"
    one = "one"


class OnDemand(Mapping[str, tuple[Any, Manifest, Path]]):
    """Stages that are read from their folders when they are asked for; only the last one stays in memory."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._last: tuple[str, tuple[Any, Manifest, Path]] | None = None
        self._hashes: dict[str, str] = {}

    def __getitem__(self, name: str) -> tuple[Any, Manifest, Path]:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            model, manifest, folder = read_stage(name, self._folders[name])
            if self._hashes.setdefault(name, manifest.hash) != manifest.hash:
                raise ArtifactError(f"{folder} was trained on while it was in use; load the stages again")
            self._last = (name, (model, manifest, folder))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


class Models(Mapping[str, Any]):
    """The stages' models on their device, by name."""

    def __init__(self, stages: Mapping[str, tuple[Any, Manifest, Path]], device: torch.device) -> None:
        self._stages, self._device = stages, device

    def __getitem__(self, name: str) -> Any:
        if name not in self._stages:
            raise ArtifactError(
                f"there is no stage {name} among {', '.join(self._stages)}: train it, or add its folder"
            )
        return self._stages[name][0].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


def read_stage(name: str, folder: Path) -> tuple[Any, Manifest, Path]:
    """Model, manifest and folder of a stage.

    The weights say that they need gradients, which nobody takes: autocast only keeps the casts of such weights, and would
    cast all others again at every sampling step.
    """
    model, manifest = artifact.load(folder, kind=artifact.kind_named(name))
    return model.requires_grad_(True), manifest, folder


def folders_of(runs: Path) -> dict[str, Path]:
    """The stages below a folder of runs: clip, decoder, and where they are there prior and upsampler*."""
    found = {name: runs / name for name in ("clip", "prior", "decoder")}
    if not found["prior"].exists() and found["clip"].exists():
        del found["prior"]
    upsamplers = [path for path in sorted(runs.glob("upsampler*")) if artifact.is_there(path)]
    return found | {path.name: path for path in upsamplers}
