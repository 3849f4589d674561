"""Stages that another project trained: checked against our models without a weight in memory, then written tensor by tensor."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import to_plain
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.transformers_clip import LOGIT_SCALE, TEXT, VISION, from_transformers, open_clip_config
from unclip.interop.weight_files import Lazy, Source, component
from unclip.models import ModelConfig, build, name_of
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface

log = logging.getLogger(__name__)
STRAY = ("position_ids", "causal_attention_mask")  # tables that old files hold and nobody needs
NO_PICTURES = {  # what stands in the description of a CLIP for a picture tower that is not there
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 224,
    "patch_size": 32,
}  # fmt: skip


@dataclass
class Stage:
    """One stage: its kind, our configuration of it, and where each of our weights stands.

    ``widths``: of z_i and of the longest caption in tokens (0: reads none), which must be those of the CLIP. ``empty``: the
    prefix of the buffers that hold the caption "", None if there are none. ``at_hand``: small tensors that were made already.
    """

    kind: str
    config: ModelConfig
    sources: dict[str, Source]
    where: str
    widths: tuple[int, int] = (0, 0)
    empty: str | None = None
    at_hand: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ClipFolders:
    """Folders of CLIP's towers with projection, as transformers writes them; mean and std of its pictures in [0, 1]."""

    text: Path
    image: Path | None
    preprocess: dict[str, Any] = field(default_factory=dict)


@dataclass
class Foreign:
    """What was found in a folder: ``name`` says what it is."""

    name: str
    stages: list[Stage]
    clip: ClipFolders | None = None


def write(found: Foreign, out: Path, clip: Path | None, about: dict[str, Any]) -> list[Path]:
    """Write each stage, and the CLIP first, as ``out``/KIND; all or none. ``clip``: a run or artifact in place of the found one.

    Everything is checked before anything is written. ``about`` is kept in the manifests' settings. Raises ArtifactError where
    weights, configuration and CLIP do not fit one another, ConfigError where a folder is in use.
    """
    folders = [out / "clip", *(out / stage.kind for stage in found.stages)]
    if used := [folder for folder in folders if folder.exists()]:
        raise ConfigError(f"{used[0]} is there already: give another --out, or remove it")
    cfg, interface = _clip_config(found, clip)
    for stage in found.stages:
        check(stage, interface)
    try:
        if clip is None:
            assert cfg is not None
            assert found.clip is not None
            _write_clip(folders[0], cfg, found.clip, about)
        else:
            artifact.save(folders[0], artifact.read_weights(clip), artifact.read_manifest(clip, kind="clip"))
        interface = replace(interface, clip=artifact.read_manifest(folders[0]).hash)
        empty = _empty_caption(folders[0]) if any(stage.empty is not None for stage in found.stages) else {}
        return [folders[0], *(_write_stage(out / s.kind, s, interface, empty, about) for s in found.stages)]
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _clip_config(found: Foreign, clip: Path | None) -> tuple[CLIPConfig | None, Interface]:
    """The CLIP's configuration, if it is to be imported, and its interface."""
    if clip is not None:
        return None, Interface(**artifact.read_manifest(clip, kind="clip").interface)
    if found.clip is None:
        raise ConfigError(
            f"{found.name} brings no CLIP: add --clip RUN, the CLIP that it was trained on, for example of "
            "`unclip import clip ViT-L-14 --pretrained openai --out RUN`"
        )
    config = clip_config(found.clip)
    with FakeTensorMode():
        return config, CLIP(config).interface()


def clip_config(folders: ClipFolders) -> CLIPConfig:
    """Ours of the towers' config.json; without a picture tower for captions only."""
    text = read_json(folders.text / "config.json", "CLIPTextModelWithProjection")
    shared = {name: text[name] for name in ("projection_dim", "hidden_act") if name in text}
    vision = NO_PICTURES | shared
    if folders.image is not None:
        vision = read_json(folders.image / "config.json", "CLIPVisionModelWithProjection")
    model = open_clip_config(text, vision)
    description = json.dumps({"model_cfg": model, "preprocess_cfg": folders.preprocess}, sort_keys=True)
    return CLIPConfig(name="imported", description=description, text_only=folders.image is None)


def _write_clip(folder: Path, cfg: CLIPConfig, folders: ClipFolders, about: dict[str, Any]) -> None:
    log.info("writing %s", folder)
    state: dict[str, Tensor] = {"logit_scale": torch.tensor(LOGIT_SCALE)}
    for tower, place in ((TEXT, folders.text), (VISION, folders.image)):
        if place is not None:
            state |= from_transformers(Lazy(component(place)), tower)
    state = {f"model.{name}": value for name, value in state.items()}
    with FakeTensorMode():
        clip = CLIP(cfg)
    _compare({name: tuple(value.shape) for name, value in state.items()}, clip, str(folders.text))
    interface = to_plain(clip.interface())
    artifact.save(folder, state, Manifest("clip", "clip", to_plain(cfg), interface, settings=about))


@torch.no_grad()
def _empty_caption(clip: Path) -> dict[str, Tensor]:
    """What a CLIP makes of the caption "": tokens (L,), text_emb (D,) and text_seq (L, W)."""
    model: Any = artifact.load(clip, kind="clip")[0]
    tokens = model.tokenize([""])
    tokens = tokens[:, : int(tokens.argmax()) + 1]
    text_emb, text_seq = model.encode_text(tokens)
    return {"tokens": tokens[0], "text_emb": text_emb[0].clone(), "text_seq": text_seq[0].clone()}


def check(stage: Stage, interface: Interface) -> None:
    """Whether weights, configuration and CLIP fit one another; ArtifactError where not."""
    embed_dim, length = stage.widths
    if embed_dim and (embed_dim, length) != (interface.embed_dim, length and interface.context_length):
        raise ArtifactError(
            f"{stage.where} takes embeddings of width {embed_dim} and captions of up to {length} tokens, but its CLIP makes "
            f"{interface.embed_dim} and {interface.context_length}: they are not of one pipeline"
        )
    if embed_dim and interface.text_width != embed_dim:
        raise ArtifactError(
            f"{stage.where} takes token states as wide as z_i, {embed_dim}, but its CLIP makes {interface.text_width}"
        )
    with FakeTensorMode():
        model = build(stage.config, interface)
    _compare({name: source.shape for name, source in stage.sources.items()}, model, stage.where, stage.empty)


def _compare(found: Mapping[str, Sequence[int]], model: torch.nn.Module, where: str, empty: str | None = None) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if empty is not None:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(f"{empty}empty_")}
    missing, unknown = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing or unknown:
        names = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        names += [f"{len(unknown)} unknown, such as {unknown[0]}"] if unknown else []
        raise ArtifactError(f"{where} does not hold the weights that its config.json describes: {'; '.join(names)}")
    odd = [name for name, shape in wanted.items() if tuple(found[name]) != shape]
    if odd:
        raise ArtifactError(
            f"{where} does not hold the weights that its config.json describes: {odd[0]} has the shape "
            f"{tuple(found[odd[0]])}, not {wanted[odd[0]]} ({len(odd)} such)"
        )


def _write_stage(
    folder: Path, stage: Stage, interface: Interface, empty: dict[str, Tensor], about: dict[str, Any]
) -> Path:
    size = sum(torch.Size(source.shape).numel() for source in stage.sources.values())
    log.info("writing %s: %.1f M numbers", folder, size / 1e6)
    if stage.kind == "upsampler":
        interface = Interface()
    extra = dict(stage.at_hand)
    if stage.empty is not None:
        extra |= {f"{stage.empty}empty_{name}": value for name, value in empty.items()}
    parents = {"clip": interface.clip} if interface.clip else {}
    config = to_plain(stage.config)
    manifest = Manifest(
        stage.kind, name_of(stage.config), config, to_plain(interface), parents, settings={**about, "model": config}
    )
    artifact.save(folder, Lazy(stage.sources, extra), manifest)
    return folder


def renamed(sources: Mapping[str, Source], prefix: str) -> dict[str, Source]:
    """Sources under our names, which are theirs behind a prefix; stray tables are left out."""
    return {prefix + name: source for name, source in sources.items() if not name.endswith(STRAY)}


def read_json(path: Path, class_name: str | None = None) -> dict[str, Any]:
    """A component's configuration. ArtifactError where it is missing, damaged or, of transformers, of another class."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"{path} is missing: the folder is not complete; fetch it again") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}); fetch the folder again") from error
    if not isinstance(found, dict) or (class_name is not None and class_name not in found.get("architectures", [])):
        kind = ", ".join(found.get("architectures", [])) if isinstance(found, dict) else "no mapping"
        raise ArtifactError(f"{path} describes {kind or 'no class'} where {class_name} is needed")
    return found


def check_vocabulary(folder: Path) -> None:
    """Whether a tokenizer's words are CLIP's, old files or new; ArtifactError where not. Its ends may be named otherwise."""
    from open_clip import SimpleTokenizer

    if (folder / "vocab.json").is_file():
        found = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        found = read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    else:
        return
    words = list(SimpleTokenizer().encoder.items())[:-2]
    odd = next(((word, number) for word, number in words if found.get(word) != number), None)
    if odd is not None:
        raise ArtifactError(
            f"{folder} reads {odd[0]!r} as token {found.get(odd[0])}, CLIP as {odd[1]}: captions of this pipeline have other words "
            "than CLIP's, which cannot be imported"
        )
