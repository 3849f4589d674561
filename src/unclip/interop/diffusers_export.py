"""``unclip export diffusers``: write the folder, then have diffusers itself repeat our numbers from it."""

import importlib.util
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip import artifact
from unclip.drafts import complete_or_not
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.diffusers_folder import DiffusersFolder, refuse_inexpressible
from unclip.interop.diffusers_reference import Reference
from unclip.models.interface import Interface

log = logging.getLogger(__name__)
FORWARD, MEAN, SHARE = (
    1e-5,
    1e-4,
    1e-3,
)  # largest differences: of a net's output; of pictures, mean and share above 1e-3


@dataclass
class Checked:
    """What diffusers made of the folder: largest difference of a forward pass; of pictures mean and share above 1e-3."""

    version: str
    forward: float
    mean: float
    share: float
    shimmed: bool


def export_diffusers(folders: Mapping[str, Path], out: Path, *, legacy: bool = False) -> Checked:
    """Write ``out`` from the stages clip, decoder, upsampler* and, for captions, prior; one stage is in memory at a time.

    ``legacy``: for diffusers up to 0.37. The folder is there only if diffusers, in a process of its own, loads the same
    weights to the bit, computes the same and draws the same pictures. Raises :class:`ConfigError` with the setting that would
    do for a stage that diffusers cannot express, and :class:`ArtifactError` where a stage is missing or the check fails.
    """
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("transformers") is None:
        raise ConfigError("what is exported is checked with diffusers: pip install 'unclip[diffusers]'")
    upsamplers = _upsamplers(folders)
    if not upsamplers:
        raise ArtifactError("diffusers' pipelines end in an upsampler, and there is none: train-upsampler")
    for run in folders.values():
        manifest = artifact.read_manifest(run)
        refuse_inexpressible(artifact.config_of(manifest, run), Interface(**manifest.interface))
    with complete_or_not(out) as draft, tempfile.TemporaryDirectory() as scratch:
        folder, reference = DiffusersFolder(draft, legacy), Reference()
        for name in ("clip", "prior", "decoder"):
            if name not in folders:
                continue
            log.info("writing the %s", name)
            model: Any = _load(folders[name], name)
            getattr(folder, f"add_{name}")(model)
            getattr(reference, name)(model)
        for name in upsamplers:
            log.info("writing the %s", name)
            model = _load(folders[name], "upsampler")
            inside = "" if name == upsamplers[0] else f"super_res_{model.cfg.image_size}/"
            folder.add_upsampler(model, inside)
            reference.upsampler(model, inside)
        del model
        folder.finish()
        file = Path(scratch) / "reference.safetensors"
        reference.write(file, folder.digests)
        log.info("repeating forward passes and pictures with diffusers")
        return _judged(repeat(draft, file))


def _load(folder: Path, kind: str) -> Any:
    model, _ = artifact.load(folder, kind=kind)
    return model.float()


def _upsamplers(folders: Mapping[str, Path]) -> list[str]:
    names = [name for name in folders if name.startswith("upsampler")]
    return sorted(names, key=lambda name: artifact.read_manifest(folders[name], kind="upsampler").config["image_size"])


def repeat(folder: Path, reference: Path) -> dict[str, Any]:
    """What :mod:`unclip.interop.diffusers_check` finds. Raises :class:`ArtifactError` where diffusers cannot load the folder."""
    command = [sys.executable, "-m", "unclip.interop.diffusers_check", str(folder), str(reference)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ArtifactError(f"diffusers cannot load what was written: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def _judged(found: dict[str, Any]) -> Checked:
    pictures = found["pictures"].values()
    result = Checked(
        found["version"],
        _worst(found["forward"].values()),
        _worst(mean for mean, _ in pictures),
        _worst(share for _, share in pictures),
        found["shimmed"],
    )
    wrong = [f"{name}: other weights" for name in found["weights"]]
    wrong += [
        f"{name}: outputs differ by {value:.2g}" for name, value in found["forward"].items() if not value <= FORWARD
    ]
    wrong += [
        f"pictures ({name}): mean difference {mean:.2g}, {100 * share:.2g} % of the values above 1e-3"
        for name, (mean, share) in found["pictures"].items()
        if not (mean <= MEAN and share <= SHARE)
    ]
    if wrong:
        raise ArtifactError(
            f"diffusers {found['version']} does not repeat what these stages compute: {'; '.join(wrong)}. Nothing was "
            "written; try the tested versions of diffusers, and report this"
        )
    return result


def _worst(values: Any) -> float:
    """The largest, or what is not a number."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)
