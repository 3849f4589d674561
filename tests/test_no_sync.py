"""A training step of every stage on the meta device: nothing in it makes the host wait for the device.

Its tensors have shapes and no content, so whatever reads a value fails: ``.item()``, ``nonzero``, an index of booleans, a copy
to the host. (Fake tensors on a pretended GPU would do too, but without a driver autograd refuses them.)
"""

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chain import CONFIGS, DIFFUSION, UNET
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.config import OnNonfinite, OptimConfig, TrainerConfig, from_plain
from unclip.data.batch import Batch
from unclip.diffusion import Guidance, Noise
from unclip.models import REGISTRY, Interface, build
from unclip.models.pca import uniform_edges
from unclip.models.sampling import ARSampling, PriorSampling
from unclip.plan import example
from unclip.stages.base import Stage
from unclip.train import STAGES

aten = torch.ops.aten
STAGE_OF = dict(STAGES.values())
INTERFACE = Interface(embed_dim=16, text_width=16, context_length=6, vocab_size=50)
CLIP = {"image_size": 16, "vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
TEXT = {"width": 32, "depth": 1, "num_heads": 2}
PRIOR = CONFIGS["diffusion_prior"]["net"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model, its settings, the optimiser's
    "clip": ("clip", CLIP, {}),
    "clip by sigmoids and SAM": ("clip", {**CLIP, "contrast": "sigmoid"}, {"sam_rho": 0.1}),
    "diffusion prior": ("diffusion_prior", {"net": PRIOR, "num_draws": 2}, {"ema_profiles": [0.05, 0.1]}),
    "whitened, self-conditioned": (
        "diffusion_prior",
        {"net": PRIOR, "embedding_space": "whitened", "diffusion": {"self_conditioning": True}},
        {},
    ),
    "autoregressive prior": ("ar_prior", {"net": {"width": 32, "depth": 1, "num_heads": 2, "text": TEXT}}, {}),
    "eclipse": ("eclipse_prior", {"net": PRIOR}, {}),
    "mlp": ("mlp_prior", {}, {}),
    "decoder": ("decoder", CONFIGS["decoder"], {}),
    "decoder, learned variance": (
        "decoder",
        {
            **CONFIGS["decoder"],
            "diffusion": {"learned_variance": True, "clip_range": 1.0, "weighting": "min_snr"},
            "net": {**UNET, "attention_levels": [1], "dropout": 0.1, "gradient_checkpointing": True},
        },
        {},
    ),
    "decoder's second net": (
        "decoder",
        {**CONFIGS["decoder"], "split": 0.3, "last_net": {**UNET, "attention_levels": [1]}},
        {},
    ),
    "upsampler": ("upsampler", {**CONFIGS["upsampler"], "max_noise": 0.3}, {"grad_clip": 0.0}),
    "upsampler of degraded pictures": ("upsampler", {**CONFIGS["upsampler"], "bsr": "light"}, {}),
    "upsampler's second net": ("upsampler", {**CONFIGS["upsampler"], "last_steps": 1, "diffusion": DIFFUSION}, {}),
}


class Waits(TorchDispatchMode):
    """Refuses copies from the host that are not asynchronous; the meta device itself refuses those to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and args[0].device.type != found.device.type:
            assert (kwargs or {}).get("non_blocking"), f"a copy from {args[0].device} to {found.device}"
        elif func is aten.copy_.default and args[0].device.type != args[1].device.type:
            assert args[2:] == (True,), f"a copy from {args[1].device} to {args[0].device}"
        return found


def a_stage(model: Any, kind: str, trainer: TrainerConfig, optim: OptimConfig) -> tuple[Stage, Any]:
    """The stage with all that it asks of Lightning's trainer, which is to be kept alive."""
    stage = STAGE_OF[kind](model, trainer, optim, 0)
    optimizer = stage.configure_optimizers()
    strategy = SimpleNamespace(_lightning_optimizers=[optimizer])
    strategy.backward = lambda loss, *_: loss.backward()
    strategy.reduce_boolean_decision = lambda decision, all: decision
    seen = SimpleNamespace(strategy=strategy, optimizers=[optimizer], global_step=0, global_rank=0, world_size=1)
    stage.trainer = seen  # type: ignore[assignment]
    stage._device = torch.device("meta")
    return stage.train(), seen


def on_meta(case: str) -> tuple[Any, Batch]:
    """The model of a case and a batch of four for it."""
    name, raw, _ = CASES[case]
    cfg: Any = from_plain(raw, REGISTRY[name][0])
    own = Interface() if name in ("clip", "upsampler") else INTERFACE
    model = build(cfg, own)
    batch = example(model, own, 4).to("meta")
    if name == "ar_prior":  # which trains on what its fit found
        model.pca.fit([torch.randn(32, own.embed_dim)], num_components=4)
        model.buckets.fit(torch.randn(32, 4), uniform_edges(torch.ones(4), cfg.num_buckets, 3.0), cfg.bucket_value)
    return model.to("meta"), batch


def step(case: str, **options: Any) -> None:
    """Two training steps; the first one may wait: it puts tables on the device."""
    name, _, optim = CASES[case]
    model, batch = on_meta(case)
    kind = name if name in STAGE_OF else "prior"
    stage, _trainer = a_stage(model, kind, TrainerConfig(batch_size=4, **options), OptimConfig(**optim))
    stage.training_step(batch, 0)
    with Waits():
        stage.training_step(batch, 1)
    assert stage._count == 2


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimiser and autocast, which have lists of devices, take the meta device too."""
    adam = import_module("torch.optim.adam")  # torch.optim itself hides it
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_never_waits(case: str, accumulate: int):
    step(case, accumulate=accumulate)


@pytest.mark.parametrize("case", ["diffusion prior", "whitened, self-conditioned", "autoregressive prior"])
def test_a_priors_measures_and_sampling_never_read_the_device(case: str):
    prior, batch = on_meta(case)
    noise = Noise.at(0, batch.position, "meta")
    assert all(value.is_meta for value in prior.measures(batch, noise).values())
    ar = ARSampling(guidance_scale=2.0, top_p=0.9, num_candidates=2)
    how = ar if case == "autoregressive prior" else PriorSampling(guidance=Guidance(2.0), num_candidates=2)
    assert prior.sample(prior.cond(batch), how, noise, negative=prior.cond(batch)).is_meta


def test_reading_a_value_and_copies_that_wait_are_noticed():
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        step("mlp", on_nonfinite=OnNonfinite.skip)  # which looks at every step, as its documentation says
    there = torch.ones(2, device="meta")
    for read in (Tensor.item, Tensor.nonzero, Tensor.cpu, Tensor.tolist, lambda t: t[t > 0]):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
            read(there[0] if read is Tensor.item else there)
    with Waits():
        with pytest.raises(AssertionError, match="a copy from cpu to meta"):
            torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
