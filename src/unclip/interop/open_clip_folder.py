"""A CLIP artifact as a folder that open_clip reads as ``local-dir:FOLDER``."""

import json
from pathlib import Path

from safetensors.torch import save_file

from unclip import artifact
from unclip.drafts import complete_or_not
from unclip.errors import ArtifactError
from unclip.models.clip import CLIP
from unclip.models.clip_sources import CONFIG_FILE, WEIGHTS


def export_open_clip(folder: Path, out: Path) -> None:
    """Write the CLIP of a run or artifact; ``open_clip.create_model("local-dir:OUT")`` has its weights to the bit.

    Raises :class:`ArtifactError` for what is no whole CLIP, :class:`ConfigError` where ``out`` is there already.
    """
    clip, _ = artifact.load(folder, kind="clip")
    assert isinstance(clip, CLIP)
    if clip.model.visual is None:
        raise ArtifactError(
            f"{folder} was imported without its picture tower, which a folder of open_clip holds: import it again with one"
        )
    architecture = clip.cfg.architecture()
    described = {
        "model_cfg": architecture.arguments,
        "preprocess_cfg": {
            "mean": list(architecture.mean),
            "std": list(architecture.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    with complete_or_not(out) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        state = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
        save_file(state, draft / WEIGHTS[0], metadata={"format": "pt"})
