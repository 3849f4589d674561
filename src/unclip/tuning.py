"""Training that starts from another run's artifact: its settings, its weights, and low-rank adapters instead of them."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import over
from unclip.drafts import write_atomic
from unclip.errors import ConfigError
from unclip.models import Decoder, Upsampler
from unclip.models.interface import Interface
from unclip.models.second_net import take_first

PARENTS = ("init", "first")  # and in the run a file of each: what it started from


def settings_of(init: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The model's settings: those of the artifact ``init``, and over them the ones that are given.

    ``given`` has ``kind``, the registry's name. Raises ConfigError where ``init`` is another model.
    """
    manifest = artifact.read_manifest(init, kind=kind)
    if given["kind"] != manifest.model:
        raise ConfigError(f"init={init} is a {manifest.model}, not a {given['kind']}: add model={manifest.model}")
    base = {**manifest.config, **({"first": None} if kind in ("decoder", "upsampler") else {})}
    return over(base, given)


def start_from(init: str, model: Any, kind: str, interface: Interface, run: Path) -> None:
    """Give ``model`` the weights and statistics of ``init``, and write down in ``run`` what that was.

    Raises ConfigError where the settings make another model of it, or where the data are of another CLIP.
    """
    manifest = artifact.read_manifest(init, kind=kind)
    theirs = manifest.interface.get("clip", "")
    if theirs and theirs != interface.clip:
        raise ConfigError(
            f"init={init} was trained on CLIP {theirs[:8]}, data.embeddings are of CLIP {interface.clip[:8] or '(none)'}: embed "
            "the data with that CLIP"
        )
    base = artifact.config_of(manifest, Path(init))
    for name in model.cfg.fitted:
        if getattr(model.cfg, name) != getattr(base, name):
            raise ConfigError(
                f"model.{name} belongs to the fit to the training embeddings, which init={init} brings with it: leave it out"
            )
    weights = _fitted(model, artifact.read_weights(init))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"with these settings model.* is another net than that of init={init}: {error}") from error
    if isinstance(model, Decoder | Upsampler) and model.last_net is not None:
        if model.cfg.first is not None:
            take_first(model, kind)
        elif model.cfg.kind_of_net() != base.kind_of_net():
            raise ConfigError(
                f"the first net of init={init} stays as it is, so this run cannot differ from it in sizes, net, condition, "
                "diffusion or split: leave these settings out"
            )
    note_parent(run, "init", init, manifest)


def note_parent(run: Path, role: str, source: str, manifest: Manifest | None = None) -> None:
    """Write down in ``run`` what it started from: its ``init``, or the ``first`` net that it keeps."""
    manifest = manifest or artifact.read_manifest(source)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / f"{role}.json", (json.dumps({"from": source, "hash": manifest.hash}) + "\n").encode())


def _fitted(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A second net may be left out; an upsampler's may begin as the first."""
    if not isinstance(model, Decoder | Upsampler):
        return weights
    nets = {name: value for name, value in weights.items() if not name.startswith("last_net.")}
    if model.last_net is None:
        return nets
    if isinstance(model, Decoder):
        return weights
    return {f"last_{name}": value for name, value in nets.items() if name.startswith("net.")} | weights


def parents_of(run: Path) -> dict[str, str]:
    """The hashes of what a run started from, by their roles, for its artifact's lineage."""
    noted = {role: run / f"{role}.json" for role in PARENTS}
    return {role: json.loads(path.read_text())["hash"] for role, path in noted.items() if path.exists()}
