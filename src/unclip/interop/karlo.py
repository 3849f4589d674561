"""Import of Karlo, and of Kandinsky's prior: diffusers' folders sub-folder by sub-folder, or Karlo's own checkpoints."""

import logging
import shutil
from pathlib import Path
from typing import Any

from unclip.errors import ArtifactError, ConfigError
from unclip.interop.foreign import ClipFolders, Foreign, Stage, check_vocabulary, read_json, renamed, write
from unclip.interop.karlo_checkpoint import read_checkpoints
from unclip.interop.karlo_config import decoder_config, prior_config, prior_interface, scheduler_json, upsampler_config
from unclip.interop.weight_files import OneFile, Source, component

log = logging.getLogger(__name__)
TEXT_ENCODER, IMAGE_ENCODER = "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"
DECODING = {
    "decoder": "UNet2DConditionModel", "text_proj": "UnCLIPTextProjModel", "text_encoder": TEXT_ENCODER,
    "super_res_first": "UNet2DModel", "super_res_last": "UNet2DModel", "decoder_scheduler": "UnCLIPScheduler",
    "super_res_scheduler": "UnCLIPScheduler",
}  # fmt: skip
KANDINSKY = {
    "prior": "PriorTransformer", "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER,
    "scheduler": "UnCLIPScheduler",
}  # fmt: skip
PIPELINES = {  # what a folder's model_index.json must name, by its own class
    "UnCLIPPipeline": {"prior": "PriorTransformer", "prior_scheduler": "UnCLIPScheduler", **DECODING},
    "UnCLIPImageVariationPipeline": {"image_encoder": IMAGE_ENCODER, **DECODING},
    "KandinskyPriorPipeline": KANDINSKY,
    "KandinskyV22PriorPipeline": KANDINSKY,
}
PRIOR_SCHEDULER = scheduler_json("sample", "fixed_small_log", 5.0)  # of a prior's folder alone: Kandinsky's
LICENCE = "CreativeML Open RAIL-M"  # of Karlo's code and weights


def import_karlo(folder: Path, out: Path, clip: Path | None = None, image_encoder: Path | None = None) -> list[Path]:
    """Write the stages found in ``folder`` as runs below ``out``; returns their folders, the CLIP's first.

    ``folder``: a pipeline's of diffusers (UnCLIPPipeline, UnCLIPImageVariationPipeline, Kandinsky's priors), a PriorTransformer's,
    or one with Karlo's .ckpt files. ``clip``: a run or artifact to take as its CLIP. ``image_encoder``: a folder of the
    picture tower, or of a pipeline that has it. Raises ArtifactError and ConfigError; then nothing is left in ``out``.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give that of a pipeline, as diffusers or a download writes it")
    try:
        found = read_folder(folder)
    except ValueError as error:  # also of a configuration that contradicts itself
        raise ConfigError(f"{folder}: {error}" if not isinstance(error, ConfigError) else str(error)) from error
    if image_encoder is not None:
        _add_image_encoder(found, image_encoder)
    licence = _licence(folder)
    about = {
        "imported": {"from": found.name, "licence": licence.name if licence else f"not found; Karlo's is {LICENCE}"}
    }
    folders = write(found, out, clip, about)
    if licence is not None:
        shutil.copyfile(licence, out / licence.name)
    else:
        log.warning(
            "%s holds no licence text. Karlo's weights are under %s: its use restrictions go with all that is made from them; "
            "keep that text beside %s",
            folder, LICENCE, out,
        )  # fmt: skip
    if found.clip is not None and found.clip.image is None and clip is None:
        log.warning(
            "%s has no picture tower, so %s encodes captions only. To embed pictures, import again with --image-encoder",
            folder, folders[0],
        )  # fmt: skip
    return folders


def read_folder(folder: Path) -> Foreign:
    """What is in a folder, by its files."""
    if (folder / "model_index.json").is_file():
        return read_pipeline(folder)
    if list(folder.glob("*.ckpt")):
        return read_checkpoints(folder)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("_class_name") == "PriorTransformer":
            return Foreign("PriorTransformer", [_prior(folder, config, PRIOR_SCHEDULER)])
        raise ConfigError(
            f"{folder} holds a {config.get('_class_name', 'component')}, which is no whole pipeline; give the folder above it"
        )
    raise ConfigError(
        f"{folder} holds neither model_index.json nor .ckpt files: it is not a folder of Karlo, as diffusers or its authors "
        "publish it"
    )


def read_pipeline(folder: Path) -> Foreign:
    """A pipeline's folder of diffusers."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(f"{folder} is a {name}; only {', '.join(PIPELINES)} can be imported")
    for part, class_name in PIPELINES[name].items():
        entry = index.get(part)
        if not isinstance(entry, list) or entry[-1] != class_name:
            said = entry[-1] if isinstance(entry, list) and entry else entry
            raise ConfigError(f"{folder / 'model_index.json'} names {said} as {part} where {class_name} is needed")
        if not (folder / part).is_dir():
            raise ArtifactError(f"{folder / part} is missing, which model_index.json names; fetch the folder again")
    parts, image = (
        PIPELINES[name],
        folder / "image_encoder",
    )  # which a text-to-image folder may have beside what it needs
    check_vocabulary(folder / "tokenizer")
    clip = ClipFolders(folder / "text_encoder", image if image.is_dir() else None, _preprocess(folder))
    stages = []
    if "prior" in parts:
        scheduler = "prior_scheduler" if "prior_scheduler" in parts else "scheduler"
        stages.append(_prior(folder / "prior", None, _scheduler(folder / scheduler)))
    if "decoder" in parts:
        stages += _decoder_and_upsampler(folder)
    return Foreign(str(name), stages, clip)


def _prior(folder: Path, config: dict[str, Any] | None, scheduler: dict[str, Any]) -> Stage:
    config = config or read_json(folder / "config.json")
    cfg = prior_config(config, scheduler, str(folder / "config.json"))
    sources = renamed(component(folder), "net.")
    statistics = {name: sources.pop(f"net.{name}") for name in ("clip_mean", "clip_std") if f"net.{name}" in sources}
    if "clip_std" in statistics and not _positive(statistics["clip_std"]):
        raise ArtifactError(
            f"{folder}: clip_std is not positive, so z_i cannot be whitened: this prior was never trained"
        )
    return Stage("prior", cfg, sources | statistics, str(folder), prior_interface(config), "net.")


def _decoder_and_upsampler(folder: Path) -> list[Stage]:
    unet, proj = read_json(folder / "decoder" / "config.json"), read_json(folder / "text_proj" / "config.json")
    cfg, embed_dim = decoder_config(unet, proj, _scheduler(folder / "decoder_scheduler"))
    sources = renamed(component(folder / "decoder"), "net.unet.") | renamed(
        component(folder / "text_proj"), "net.text_proj."
    )
    decoder = Stage("decoder", cfg, sources, str(folder / "decoder"), (embed_dim, 0), "net.text_proj.")
    nets = [read_json(folder / name / "config.json") for name in ("super_res_first", "super_res_last")]
    scheduler = _scheduler(folder / "super_res_scheduler")
    both = [
        upsampler_config(net, scheduler, cfg.image_size, where)
        for net, where in zip(nets, ("super_res_first", "super_res_last"), strict=True)
    ]
    if both[0] != both[1]:
        raise ConfigError(f"{folder}: super_res_first and super_res_last are nets of different shapes")
    sources = renamed(component(folder / "super_res_first"), "net.unet.") | renamed(
        component(folder / "super_res_last"), "last_net.unet."
    )
    return [decoder, Stage("upsampler", both[0], sources, str(folder / "super_res_first"))]


def _scheduler(folder: Path) -> dict[str, Any]:
    return read_json(folder / "scheduler_config.json")


def _preprocess(folder: Path) -> dict[str, Any]:
    """Mean and std of CLIP's pictures, where the folder says them."""
    for name in ("feature_extractor", "image_processor"):
        if (folder / name / "preprocessor_config.json").is_file():
            found = read_json(folder / name / "preprocessor_config.json")
            return {
                ours: found[theirs]
                for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
                if theirs in found
            }
    return {}


def _add_image_encoder(found: Foreign, folder: Path) -> None:
    if found.clip is None or found.clip.image is not None:
        raise ConfigError(
            f"{found.name} {'has its own picture tower' if found.clip else 'brings no CLIP'}: leave out --image-encoder"
        )
    whole = folder / "image_encoder"
    found.clip.image = whole if whole.is_dir() else folder
    found.clip.preprocess = _preprocess(folder)


def _positive(source: Source) -> bool:
    return bool((OneFile().read(source) > 0).all())


def _licence(folder: Path) -> Path | None:
    """The licence text beside the weights, if it is there."""
    names = sorted(path for path in folder.iterdir() if path.name.lower().startswith(("license", "licence")))
    return next((path for path in names if path.is_file()), None)
