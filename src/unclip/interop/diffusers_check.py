"""Loads an exported folder with diffusers and repeats what our nets computed; run as a process of its own.

``python -m unclip.interop.diffusers_check FOLDER REFERENCE`` prints one JSON object: the largest differences by name.
Nothing here is told which are small enough.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unclip.interop.diffusers_folder import LEGACY_TEXT_PROJ, digest
from unclip.interop.diffusers_reference import (
    CAPTIONS,
    DECODER_SCALE,
    DECODER_STEPS,
    PRIOR_SCALE,
    PRIOR_STEPS,
    UPSAMPLER_STEPS,
)

Tensors = dict[str, Tensor]


def main(folder: Path, reference: Path) -> dict[str, Any]:
    """{"version", "shimmed", "weights": names that differ, "forward": {name: difference}, "pictures": {name: [mean, share]}}."""
    diffusers: Any = importlib.import_module("diffusers")
    with safe_open(reference, "pt") as file:
        digests: dict[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index = json.loads((folder / "model_index.json").read_text())
    shimmed = index["text_proj"][0] == LEGACY_TEXT_PROJ and _shim()
    found: dict[str, Any] = {"version": diffusers.__version__, "shimmed": shimmed, "forward": {}, "pictures": {}}
    wrong: list[str] = []
    pipelines: list[tuple[Any, Any]] = []
    if "prior" in index:
        pipelines.append((diffusers.UnCLIPPipeline, _captions))
    if "image_encoder" in index:
        pipelines.append((diffusers.UnCLIPImageVariationPipeline, _variations))
    for cls, draw in pipelines:
        pipe = cls.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        wrong += [name for name, module in pipe.components.items() if _differs(name, module, digests)]
        with torch.no_grad():
            found["forward"] |= _forwards(pipe, tensors)
            found["pictures"] |= draw(pipe, tensors)
        del pipe
    for inside in sorted({path.parent.name for path in folder.glob("*/super_res_first")}):
        modules = _upsampler(folder / inside)
        wrong += [f"{inside}/{name}" for name in modules if _differs(f"{inside}/{name}", modules[name], digests)]
        with torch.no_grad():
            found["forward"] |= _upsampler_forwards(modules, tensors, f"{inside}/")
            pictures = _upscale(modules, tensors, f"{inside}/super_res")
        found["pictures"][inside] = _compare(pictures, tensors[f"{inside}/super_res.picture"])
    return {**found, "weights": wrong}


def _shim() -> bool:
    """Give diffusers >= 0.38 the module's name before that; whether it was needed."""
    try:
        importlib.import_module("diffusers.pipelines.unclip")
    except ModuleNotFoundError:
        module = importlib.import_module("diffusers.pipelines.deprecated.unclip")
        sys.modules["diffusers.pipelines.unclip"] = module
        importlib.import_module("diffusers.pipelines").unclip = module  # type: ignore[attr-defined]
        return True
    return False


def _differs(name: str, module: Any, digests: dict[str, str]) -> bool:
    """Whether the loaded weights are others than those that were written, by name or by a bit."""
    if not isinstance(module, torch.nn.Module):
        return False
    wanted = {key.removeprefix(f"{name}:"): value for key, value in digests.items() if key.startswith(f"{name}:")}
    return {key: digest(value) for key, value in module.state_dict().items()} != wanted


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest one, relative to the largest value where that is above 1."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def _compare(found: Tensor, wanted: Tensor) -> list[float]:
    """Mean difference of pictures in [0, 1], and the share of values that differ by more than 1e-3."""
    difference = (found - wanted).abs()
    return [float(difference.mean()), float((difference > 1e-3).float().mean())]


def _forwards(pipe: Any, tensors: Tensors) -> dict[str, float]:
    modules, found = pipe.components, {}
    mask = tensors["text.mask"]
    tokens = pipe.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    found["tokens"] = float(not torch.equal(torch.where(mask, tokens.input_ids, 0), tensors["text.tokens"] * mask))
    found["mask"] = float(not torch.equal(tokens.attention_mask.bool(), mask))
    text = pipe.text_encoder(tokens.input_ids)
    found["text_embeds"] = _difference(text.text_embeds, tensors["text.embeds"])
    found["text_states"] = _difference(text.last_hidden_state[mask], tensors["text.states"][mask])
    given = {"proj_embedding": tensors["text.embeds"], "encoder_hidden_states": tensors["text.states"]}
    if "prior" in modules:
        x_t, timestep = tensors["prior.x_t"], tensors["prior.timestep"]
        out = pipe.prior(x_t, timestep, **given, attention_mask=mask).predicted_image_embedding
        found["prior"] = _difference(out, tensors["prior.out"])
    if "image_encoder" in modules:
        found["image_embeds"] = _difference(
            pipe.image_encoder(tensors["image.pixels"]).image_embeds, tensors["image.embeds"]
        )
    hidden, additive = pipe.text_proj(
        image_embeddings=tensors["decoder.image_emb"],
        prompt_embeds=tensors["text.embeds"],
        text_encoder_hidden_states=tensors["text.states"],
        do_classifier_free_guidance=False,
    )
    mask = torch.nn.functional.pad(mask, (hidden.shape[1] - mask.shape[1], 0), value=True)
    given = {"encoder_hidden_states": hidden, "class_labels": additive, "attention_mask": mask}
    out = pipe.decoder(tensors["decoder.x_t"], tensors["decoder.timestep"], **given).sample
    found["decoder"] = _difference(out, tensors["decoder.out"])
    return found | _upsampler_forwards(modules, tensors, "")


def _upsampler_forwards(modules: dict[str, Any], tensors: Tensors, inside: str) -> dict[str, float]:
    name = f"{inside}super_res"
    x_t, timestep = tensors[f"{name}.x_t"], tensors[f"{name}.timestep"]
    outs = {which: modules[f"super_res_{which}"](x_t, timestep).sample for which in ("first", "last")}
    return {f"{name}_{which}": _difference(out, tensors[f"{name}.out_{which}"]) for which, out in outs.items()}


def _captions(pipe: Any, tensors: Tensors) -> dict[str, list[float]]:
    starts = _feed_noise(tensors, ["prior", "decoder", "super_res"])
    pictures = pipe(
        CAPTIONS,
        prior_num_inference_steps=PRIOR_STEPS,
        decoder_num_inference_steps=DECODER_STEPS,
        super_res_num_inference_steps=UPSAMPLER_STEPS,
        prior_guidance_scale=PRIOR_SCALE,
        decoder_guidance_scale=DECODER_SCALE,
        prior_latents=starts["prior"],
        decoder_latents=starts["decoder"],
        super_res_latents=starts["super_res"],
        output_type="np",
    ).images
    return {"captions": _compare(_pictures(pictures), tensors["picture.of_caption"])}


def _variations(pipe: Any, tensors: Tensors) -> dict[str, list[float]]:
    starts = _feed_noise(tensors, ["decoder", "super_res"])
    pictures = pipe(
        image_embeddings=tensors["decoder.image_emb"],
        decoder_num_inference_steps=DECODER_STEPS,
        super_res_num_inference_steps=UPSAMPLER_STEPS,
        decoder_guidance_scale=DECODER_SCALE,
        decoder_latents=starts["decoder"],
        super_res_latents=starts["super_res"],
        output_type="np",
    ).images
    return {"variations": _compare(_pictures(pictures), tensors["picture.variation"])}


def _pictures(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _upsampler(folder: Path) -> dict[str, Any]:
    diffusers: Any = importlib.import_module("diffusers")
    nets = {
        name: diffusers.UNet2DModel.from_pretrained(folder / name) for name in ("super_res_first", "super_res_last")
    }
    return {**nets, "super_res_scheduler": diffusers.UnCLIPScheduler.from_pretrained(folder / "super_res_scheduler")}


def _upscale(modules: dict[str, Any], tensors: Tensors, name: str) -> Tensor:
    """As UnCLIPPipeline does after its decoder: what to do with a stage that it does not have."""
    x_t, low = _feed_noise(tensors, [name])[name], tensors[f"{name}.low"]
    low = torch.nn.functional.interpolate(low, x_t.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
    scheduler = modules["super_res_scheduler"]
    scheduler.set_timesteps(UPSAMPLER_STEPS)
    times = scheduler.timesteps
    for i, t in enumerate(times):
        last = i == len(times) - 1
        net = modules["super_res_last" if last else "super_res_first"]
        eps = net(torch.cat((x_t, low), dim=1), t).sample
        x_t = scheduler.step(eps, t, x_t, prev_timestep=None if last else times[i + 1]).prev_sample
    return (x_t * 0.5 + 0.5).clamp(0, 1)


def _feed_noise(tensors: Tensors, stages: list[str]) -> Tensors:
    """Have the scheduler draw the recorded noises, in order; returns those that sampling begins with."""
    scheduling: Any = importlib.import_module("diffusers.schedulers.scheduling_unclip")
    drawn = {
        stage: [tensors[name] for name in sorted(tensors) if name.startswith(f"{stage}.noise_")] for stage in stages
    }
    steps: Iterator[Tensor] = iter([value for values in drawn.values() for value in values[1:]])

    def recorded(shape: Any, **_: Any) -> Tensor:
        return next(steps).reshape(shape)

    scheduling.randn_tensor = recorded
    return {stage: values[0] for stage, values in drawn.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
