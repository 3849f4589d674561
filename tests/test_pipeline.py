"""The pipeline on freshly built models: one seed is one picture, in any batch."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import CONFIGS, random_weights, tiny_stages, write_tiny_chain
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.artifact import Manifest
from unclip.cli.options import Overrides
from unclip.cli.pictures import sampling
from unclip.config import Precision, from_plain
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.errors import ArtifactError, ConfigError
from unclip.models import REGISTRY, build
from unclip.pipeline import UnCLIP


@pytest.fixture(scope="module")
def pipeline() -> UnCLIP:
    return UnCLIP(tiny_stages())


def test_one_seed_is_one_picture_at_batch_1_and_7(pipeline: UnCLIP):
    captions = ["a red cube", "a small blue sphere left of a large green cone"]
    together = list(pipeline.generate(captions, num=7, seed=3, batch_size=7))
    alone = list(pipeline.generate(captions, num=7, seed=3, batch_size=1))
    assert [(p.caption, p.seed) for p in together] == [(c, 3 + j) for c in captions for j in range(7)]
    for one, other in zip(alone, together, strict=True):
        assert one.image.shape == (3, 32, 32)
        difference = (one.image.float() - other.image.float()).abs()  # of 255; float32 nets make 0 or 1
        assert difference.mean() <= 1.0
        assert difference.max() <= 2.0
    spread = (together[0].image.float() - together[1].image.float()).abs().mean()
    assert spread > 10, "another seed is another picture"


def test_the_caption_and_each_condition_matter(pipeline: UnCLIP):
    one, other = pipeline.generate(["a red cube", "a blue sphere"], num=1, seed=0)
    assert (one.image.float() - other.image.float()).abs().mean() > 0.5
    text = pipeline.embed_text(["a red cube"])
    z_i = pipeline.sample_prior(text, [0])
    text.image_emb = z_i
    both = pipeline.decode(text, [0]).float()
    for less in (text.without_text(), text.without_image()):
        assert (pipeline.decode(less, [0]).float() - both).abs().mean() > 0.1


def test_sampling_settings_are_obeyed(pipeline: UnCLIP):
    decoder = pipeline.models["decoder"]
    calls = []
    handle = decoder.net.register_forward_hook(lambda *_: calls.append(1))
    how = decoder.default_sampling()
    how.sampler = SamplerConfig(Sampler.ddim, num_steps=3)
    pipeline.decode(pipeline.embed_text(["a red cube"]), [0])
    handle.remove()
    assert len(calls) == 3, "guidance is one batched forward a step"


def test_heun_may_take_nearly_twice_the_timesteps(pipeline: UnCLIP):
    """It visits one level for two evaluations."""
    most = sampling(Overrides(decoder_steps=1999, decoder_sampler="heun"), pipeline).decoder
    assert most is not None
    assert (most.sampler.name, most.sampler.num_levels) == (Sampler.heun, 1000)
    for steps, sampler in ((2000, "heun"), (1001, "ddim"), (1001, None)):
        with pytest.raises(ConfigError, match=f"was trained with 1000 timesteps; it cannot sample in {steps}"):
            sampling(Overrides(decoder_steps=steps, decoder_sampler=sampler), pipeline)


@pytest.mark.parametrize("name", ["identity", "linear_prior", "mlp_prior", "eclipse_prior"])
def test_any_prior_feeds_the_decoder(pipeline: UnCLIP, name: str):
    stages = {key: (model, pipeline.manifests[key], Path(key)) for key, model in pipeline.models.items()}
    raw = {"net": CONFIGS["diffusion_prior"]["net"]} if name == "eclipse_prior" else {}
    model = random_weights(build(from_plain(raw, REGISTRY[name][0]), pipeline.models["clip"].interface()))
    stages["prior"] = (model, Manifest("prior", name, raw, {"clip": "c"}, hash=name), Path("prior"))
    chain = UnCLIP(stages)
    one, other = chain.generate(["a red cube"], num=2, seed=0, how=sampling(Overrides(), chain))
    assert one.image.shape == (3, 32, 32)
    assert (one.image.float() - other.image.float()).abs().mean() > 1, "the decoder still has its own noise"
    for refused in (Overrides(candidates=2), Overrides(prior_steps=3), Overrides(prior_guidance=1.0)):
        with pytest.raises(ConfigError, match=f"a {name}, has one answer for a caption"):
            sampling(refused, chain)


def test_a_prior_of_unit_norm_is_refused_by_a_decoder_of_raw_z_i(pipeline: UnCLIP):
    stages = {key: (model, pipeline.manifests[key], Path(key)) for key, model in pipeline.models.items()}
    raw = {**CONFIGS["decoder"], "embedding_norm": "raw"}
    interface = pipeline.models["clip"].interface()
    decoder = random_weights(build(from_plain(raw, REGISTRY["decoder"][0]), interface))
    stages["decoder"] = (decoder, Manifest("decoder", "decoder", raw, {"clip": "c"}, hash="raw"), Path("decoder"))
    with pytest.raises(ArtifactError, match="prior makes z_i of unit norm, but decoder takes them as CLIP makes them"):
        UnCLIP(stages)
    whitened = {**CONFIGS["diffusion_prior"], "embedding_space": "whitened"}
    prior = random_weights(build(from_plain(whitened, REGISTRY["diffusion_prior"][0]), interface))
    stages["prior"] = (prior, Manifest("prior", "diffusion_prior", whitened, {"clip": "c"}, hash="w"), Path("prior"))
    assert next(UnCLIP(stages).generate(["a red cube"])).image.shape == (3, 32, 32)


def test_stages_of_two_clips_are_refused(pipeline: UnCLIP):
    stages = {name: (model, pipeline.manifests[name], Path(f"runs/{name}")) for name, model in pipeline.models.items()}
    model, manifest, _ = stages["prior"]
    stages["prior"] = (model, Manifest(**{**manifest.__dict__, "interface": {"clip": "other"}}), Path("runs/b/prior"))
    with pytest.raises(ArtifactError, match=r"runs/b/prior was trained on CLIP other but runs/clip is CLIP c"):
        UnCLIP(stages)


def test_a_caption_of_a_thousand_words_is_cut_with_a_warning(
    pipeline: UnCLIP, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("unclip.pipeline"), "disabled", False)  # Hydra, run in this process by other
    caplog.set_level(logging.WARNING)  # tests, sets the first, and ERROR as the root logger's level
    long = "a red cube " + "and a blue sphere " * 250
    (picture,) = pipeline.generate([long])
    assert picture.image.shape == (3, 32, 32)
    assert "only 32 of 1005 tokens are read" in caplog.text
    caplog.clear()
    list(pipeline.generate(["a red cube"]))
    assert not caplog.text


def test_a_z_i_that_is_not_finite_is_named(pipeline: UnCLIP):
    cond = pipeline.embed_text(["a cube"] * 3)
    cond.image_emb = pipeline.sample_prior(cond, [0, 1, 2])
    cond.image_emb[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"z_i of row 1 is not finite \(1 of the batch\)"):
        pipeline.decode(cond, [0, 1, 2])


def test_a_z_i_that_is_not_finite_is_named_where_a_picture_is_given_too(
    pipeline: UnCLIP, monkeypatch: pytest.MonkeyPatch
):
    cond, picture = pipeline.embed_text(["a cube"]), torch.zeros(3, 32, 32, dtype=torch.uint8)
    cond.image_emb = torch.full_like(cond.text_emb, torch.nan)
    with pytest.raises(ValueError, match="z_i of row 0 is not finite"):
        pipeline.invert(picture[None], cond, pipeline.resolved(None))
    monkeypatch.setattr(pipeline, "embed_image", lambda given: cond.image_emb)
    with pytest.raises(ValueError, match="z_i of row 0 is not finite"):
        list(pipeline.inpaint(picture, torch.ones(32, 32, dtype=torch.bool)))


class Casts(TorchDispatchMode):
    """Counts how often each parameter is cast to bfloat16, by its place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.found[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))

    def most(self, model: torch.nn.Module) -> int:
        """Of the casts of one parameter, the largest number."""
        return max(self.found[p.data_ptr()] for p in model.parameters())


def test_a_sampling_run_in_bfloat16_casts_each_weight_once(tmp_path: Path):
    unclip = UnCLIP.load(write_tiny_chain(tmp_path), device="cpu", precision=Precision.bf16)

    def drawn() -> tuple[dict[str, int], torch.Tensor]:
        with Casts() as casts:
            (picture,) = unclip.generate(["a red cube"], seed=3)
        return {name: casts.most(model) for name, model in unclip.models.items()}, picture.image

    most, image = drawn()
    assert most == {"clip": 1, "prior": 1, "decoder": 1, "upsampler": 1}
    for model in unclip.models.values():
        model.requires_grad_(False)
    again, frozen = drawn()
    assert again["decoder"] >= 3, "at every step, where autocast keeps nothing"
    assert torch.equal(image, frozen)
