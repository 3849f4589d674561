"""Training that starts from another run's artifact: its settings, its weights, and low-rank adapters instead of them."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip import artifact
from unclip.errors import ConfigError
from unclip.models import Decoder, Upsampler
from unclip.models.interface import Interface

INIT = "init.json"  # in the run: what it started from


def settings_of(init: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The model's settings: those of the artifact ``init``, and over them the ones that are given.

    ``given`` has ``kind``, the registry's name. Raises ConfigError where ``init`` is another model.
    """
    manifest = artifact.read_manifest(init, kind=kind)
    if given["kind"] != manifest.model:
        raise ConfigError(f"init={init} is a {manifest.model}, not a {given['kind']}: add model={manifest.model}")
    base = {**manifest.config, **({"first": None} if kind == "upsampler" else {})}
    return _over(base, given)


def _over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    both = {k: _over(base[k], v) for k, v in given.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **given, **both}


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
    weights = _fitted(model, artifact.read_weights(init))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"with these settings model.* is another net than that of init={init}: {error}") from error
    if isinstance(model, Decoder | Upsampler) and model.cfg.first is not None:
        first = artifact.read_weights(model.cfg.first)
        model.net.load_state_dict({n.removeprefix("net."): v for n, v in first.items() if n.startswith("net.")})
    run.mkdir(parents=True, exist_ok=True)
    draft = run / f"{INIT}.{os.getpid()}.tmp"  # one for each rank
    draft.write_text(json.dumps({"from": init, "hash": manifest.hash}) + "\n")
    os.replace(draft, run / INIT)


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
    """The hash of what a run started from, for its artifact's lineage."""
    path = run / INIT
    return {"init": json.loads(path.read_text())["hash"]} if path.exists() else {}
