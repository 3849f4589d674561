"""Where a CLIP comes from: open_clip's registry, the Hugging Face hub, a local folder, or a few numbers."""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training pictures, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG_FILE = "open_clip_config.json"  # open_clip's own name, on the hub and in folders
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


@dataclass
class Architecture:
    """Arguments of open_clip.CLIP, and the mean and std of its pictures in [0, 1]."""

    arguments: dict[str, Any]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def is_foreign(name: str) -> bool:
    """Whether a model is described outside of open_clip: ``hf-hub:OWNER/MODEL`` or ``local-dir:FOLDER``."""
    return name.startswith(("hf-hub:", "local-dir:"))


def foreign_description(name: str) -> str:
    """The JSON text that describes a model of the hub or of a folder: model_cfg and preprocess_cfg."""
    text = _foreign_file(name, [CONFIG_FILE]).read_text(encoding="utf-8")
    try:
        json.loads(text)["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{name}: {CONFIG_FILE} does not describe a model of open_clip (no model_cfg)") from error
    return text


def named_architecture(name: str, pretrained: str, description: str, quick_gelu: bool | None) -> Architecture:
    """That of open_clip's registry, or of ``description``, the JSON text of a foreign model. Downloads nothing."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if description:
        found = json.loads(description)
        model, preprocess = found["model_cfg"], found.get("preprocess_cfg") or {}
    else:
        model = open_clip.get_model_config(name)
        preprocess = get_pretrained_cfg(name, pretrained) if model and pretrained else {}
    if model is None:
        raise ConfigError(
            f"model.name={name} is not in open_clip; `open_clip.list_models()` lists the names, and hf-hub:OWNER/MODEL "
            "or local-dir:FOLDER name others"
        )
    _refuse_unsupported(name, model)
    model = deepcopy(model)
    if quick_gelu is not None:
        model["quick_gelu"] = quick_gelu
    elif pretrained == "openai" or preprocess.get("quick_gelu"):
        model["quick_gelu"] = True  # OpenAI's weights want QuickGELU; the registry's plain names say GELU
    names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
    arguments = {key: model[key] for key in names if key in model}
    return Architecture(arguments, tuple(preprocess.get("mean") or MEAN), tuple(preprocess.get("std") or STD))


def _refuse_unsupported(name: str, model: dict[str, Any]) -> None:
    """Text towers that are not CLIP's causal transformer with end-of-text pooling have no place in the chain."""
    text = model["text_cfg"]
    other = [key for key in ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls") if text.get(key)]
    if model.get("custom_text") or other or text.get("pool_type", "argmax") != "argmax":
        raise ConfigError(
            f"model.name={name} has another text tower than OpenAI's CLIP ({', '.join(other) or 'custom_text'}); "
            "take one of the ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, RN50 families"
        )


def load_weights(model: Any, name: str, pretrained: str) -> None:
    """Load what ``pretrained`` names (a tag or a file), or a foreign model's own weights, without running pickled code.

    All names must fit, but for SigLIP's bias, which CLIP has not: a model that wants one begins with its own scale and bias then.
    """
    import open_clip

    path = (
        _foreign_file(name, list(WEIGHTS)) if is_foreign(name) and not pretrained else _weights_file(name, pretrained)
    )
    log.info("loading CLIP weights from %s", path)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in ("logit_scale", "logit_bias")}
    with _told(path, name):
        found: Any = open_clip.load_checkpoint(model, str(path), strict=False, weights_only=True)
        wrong = {*found.missing_keys, *found.unexpected_keys} - {"logit_bias"}
        if wrong:
            raise KeyError(f"missing or unknown: {', '.join(sorted(wrong)[:4])} ({len(wrong)} in all)")
    if "logit_bias" in own and not model.logit_bias.any():  # open_clip fills in 0 where a file has none
        model.load_state_dict(own, strict=False)


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except pickle.UnpicklingError as error:
        raise ArtifactError(f"{path} holds more than weights, which is not loaded; save it as .safetensors") from error
    except (SafetensorError, RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold the weights of {name or 'this small CLIP'}: {error}") from error


def _weights_file(name: str, pretrained: str) -> Path:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    if Path(pretrained).is_file():
        return Path(pretrained)
    known = get_pretrained_cfg(name, pretrained) if name else {}
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) if name else "none"
        raise ConfigError(f"model.pretrained={pretrained} is neither a file nor a tag of '{name}' (tags: {tags})")
    return Path(download_pretrained(known))


def _foreign_file(name: str, candidates: list[str]) -> Path:
    """The first of ``candidates`` that a folder or a repository of the hub (fetched into its cache) holds."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        found = next((Path(place) / file for file in candidates if (Path(place) / file).is_file()), None)
    else:
        found = _fetch(place, candidates)
    if found is None:
        raise ArtifactError(
            f"{name} holds none of {', '.join(candidates)}; open_clip's push_to_hf_hub writes such folders"
        )
    return found


def _fetch(repository: str, candidates: list[str]) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for file in candidates:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError as error:
            raise ArtifactError(
                f"hf-hub:{repository} is not in the local cache, and huggingface.co cannot be reached; fetch it elsewhere "
                "and name the folder: local-dir:FOLDER"
            ) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError) as error:
            raise ArtifactError(f"hf-hub:{repository} cannot be fetched: {error}") from error
    return None
