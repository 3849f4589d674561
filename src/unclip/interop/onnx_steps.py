"""The nets of an artifact as modules of tensors in and tensors out, one step of sampling each, ready to be exported."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unclip.errors import ConfigError
from unclip.models.clip import CLIP
from unclip.models.decoder import Decoder
from unclip.models.diffusion_prior import DiffusionPrior
from unclip.models.interface import Interface
from unclip.models.upsampler import Upsampler
from unclip.nets.layers import Cond, Keep

TEXT = ("text_emb", "text_seq", "tokens")


@dataclass
class Step:
    """A net's forward: ``run`` maps the named ``inputs`` (examples with a batch of 2) to the named ``outputs``.

    ``timesteps``: the first and the last that it is for, where two nets share them.
    """

    name: str
    module: nn.Module
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    timesteps: tuple[int, int] | None = None


def steps_of(name: str, model: nn.Module) -> list[Step]:
    """CLIP's towers, or a step of a stage's net (of both, where a decoder or an upsampler has two).

    Timesteps are those of the training schedule, embeddings CLIP's raw outputs; ``keep_text`` and ``keep_image`` False drop
    a row's condition, as guidance needs it. Raises :class:`ConfigError` for priors that are no diffusion models.
    """
    if isinstance(model, CLIP):
        return _clip(name, model)
    if isinstance(model, DiffusionPrior):
        return [_prior(name, model)]
    if isinstance(model, Decoder):
        return _decoder(name, model)
    if isinstance(model, Upsampler):
        return _upsampler(name, model)
    raise ConfigError(
        f"export onnx knows the steps of diffusion priors, not of a {type(model).__name__}: train one with "
        "model=diffusion_prior, or export the other runs one by one (unclip export onnx RUN)"
    )


def _clip(name: str, clip: CLIP) -> list[Step]:
    pictures = torch.randint(256, (2, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    image = Step(f"{name}_image", clip, lambda x: (clip.encode_image(x["image"]),), {"image": pictures}, ("image_emb",))
    tokens = {"tokens": clip.tokenize(["a red cube", "two cones"])}
    text = Step(f"{name}_text", clip, lambda x: clip.encode_text(x["tokens"]), tokens, ("text_emb", "text_seq"))
    return [text] if clip.model.visual is None else [image, text]


def _prior(name: str, prior: DiffusionPrior) -> Step:
    def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        context = prior.prepare(_cond(given), Keep(text=given["keep_text"]))
        last = (given["x0_last"],) if "x0_last" in given else ()
        return (prior.net(given["x_t"], given["timestep"], context, *last),)

    x_t = torch.randn(2, prior.num_channels)
    inputs = {"x_t": x_t, "timestep": torch.tensor([0, 500]), "keep_text": torch.tensor([True, False])}
    if prior.cfg.diffusion.self_conditioning:
        inputs["x0_last"] = torch.zeros_like(x_t)
    columns = [name for name in prior.cfg.columns if name in TEXT]
    return Step(name, prior, run, inputs | _examples(columns, prior.interface), ("prediction",))


def _decoder(name: str, decoder: Decoder) -> list[Step]:
    size = decoder.cfg.image_size
    inputs = {"x_t": torch.randn(2, 3, size, size), "timestep": torch.tensor([0, 500])}
    conditioning = decoder.cfg.conditioning
    if conditioning.image:
        inputs["keep_image"] = torch.tensor([True, False])
    if conditioning.reads_text:
        inputs["keep_text"] = torch.tensor([False, True])
    embeddings = {"image_emb": conditioning.image, "text_emb": conditioning.text_emb}
    columns = [column for column, sees in embeddings.items() if sees]
    columns += [column for column in decoder.cfg.columns if column in ("tokens", "text_seq")]

    def runner(net: Any) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
        def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
            keep = Keep(given.get("keep_image"), given.get("keep_text"))
            return (net(given["x_t"], given["timestep"], decoder.prepare(_cond(given), keep, net)),)

        return run

    given = inputs | _examples(columns, decoder.interface)
    return [
        Step(own, net, runner(net), given, ("prediction",), timesteps) for own, net, timesteps in _nets(name, decoder)
    ]


def _nets(name: str, model: Decoder | Upsampler) -> list[tuple[str, nn.Module, tuple[int, int] | None]]:
    """A model's one or two nets, each with its name and the timesteps that are its own where there are two."""
    if model.last_net is None:
        return [(name, model.net, None)]
    limit, total = model.last_diffusion.trained.stop, model.cfg.diffusion.num_timesteps
    return [(name, model.net, (limit, total - 1)), (f"{name}_last", model.last_net, (0, limit - 1))]


def _upsampler(name: str, upsampler: Upsampler) -> list[Step]:
    size = upsampler.cfg.image_size
    inputs = {
        "x_t": torch.randn(2, 3, size, size),
        "low": torch.randn(2, 3, size, size),
        "timestep": torch.tensor([0, 500]),
    }
    if upsampler.cfg.max_noise:
        inputs["noise_level"] = torch.full((2,), upsampler.cfg.max_noise / 2)

    def runner(net: Any) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
        return lambda given: (
            net(given["x_t"], given["timestep"], net.prepare(given["low"], given.get("noise_level"))),
        )

    return [
        Step(own, net, runner(net), inputs, ("prediction",), timesteps)
        for own, net, timesteps in _nets(name, upsampler)
    ]


def _examples(columns: list[str], widths: Interface) -> dict[str, Tensor]:
    """Of the named conditions, for a batch of 2."""
    length = widths.context_length
    tokens = torch.randint(1, max(2, widths.vocab_size - 1), (2, length))
    tokens[:, length // 2], tokens[1, length // 2 :] = widths.vocab_size - 1, 0
    tokens[1, 1] = widths.vocab_size - 1
    found = {
        "image_emb": torch.randn(2, widths.embed_dim),
        "text_emb": torch.randn(2, widths.embed_dim),
        "text_seq": torch.randn(2, length, widths.text_width),
        "tokens": tokens,
    }
    return {name: found[name] for name in found if name in columns}


def _cond(given: dict[str, Tensor]) -> Cond:
    fields = {name: given[name] for name in ("image_emb", *TEXT) if name in given}
    return replace(Cond(num_rows=given["x_t"].shape[0]), **fields)
