"""What a stage shows of itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from unclip.config import OptimConfig, Precision, TrainerConfig
from unclip.data.batch import Batch
from unclip.diffusion.samplers import SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models import DecoderConfig, Interface, UpsamplerConfig, build
from unclip.models.sampling import DiffusionSampling
from unclip.nets.conditioned import ConditioningConfig, DecoderText
from unclip.nets.layers import Cond
from unclip.nets.unet import UNetConfig
from unclip.stages.decoder import DecoderStage
from unclip.stages.sharded import shard
from unclip.stages.upsampler import UpsamplerStage


@pytest.mark.parametrize(
    ("conditioning", "headings"),
    [
        (ConditioningConfig(), ["from z_i"]),
        (ConditioningConfig(text_emb=True), ["from z_i and caption", "from z_i", "from the caption"]),
        (ConditioningConfig(image=False, text=DecoderText.clip_states), ["from the caption"]),
    ],
)
def test_the_decoders_sheet_shows_what_the_decoder_can_see(
    conditioning: ConditioningConfig, headings: list[str], monkeypatch: pytest.MonkeyPatch
):
    net = UNetConfig(channels=[16, 32], num_blocks=1, attention_levels=[1], head_dim=16, groups=8)
    cfg = DecoderConfig(image_size=16, net=net, conditioning=conditioning)
    cfg.sampling = DiffusionSampling(SamplerConfig(num_steps=1))
    stage = DecoderStage(build(cfg, Interface(8, 8, 6, 100)), TrainerConfig(), OptimConfig(), 0)
    batch = Batch(
        position=[0, 1],
        caption=["a", "b"],
        image=torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        tokens=torch.tensor([[1, 99, 0], [1, 2, 99]]),
        image_emb=torch.randn(2, 8),
        text_emb=torch.randn(2, 8),
        text_seq=torch.randn(2, 3, 8),
    )
    assert stage.columns == ("true picture", *headings)
    shown: list[set[str]] = []
    draw = stage.model.sample

    def sample(cond: Cond, *given: Any) -> torch.Tensor:
        text = (cond.text_emb, cond.text_seq, cond.tokens)
        seen = {"from z_i": cond.image_emb is not None, "caption": any(value is not None for value in text)}
        shown.append({name for name, there in seen.items() if there})
        return draw(cond, *given)

    monkeypatch.setattr(stage.model, "sample", sample)
    rows = stage.sheet(batch)
    for heading, seen in zip(headings, shown, strict=True):
        if conditioning.image and (conditioning.text_emb or conditioning.reads_text):
            assert seen == {part for part in ("from z_i", "caption") if part in heading}
    assert [row.caption for row in rows] == ["a", "b"]
    assert [len(row.pictures) for row in rows] == [len(stage.columns)] * 2


def test_a_batch_in_parts_has_the_whole_batchs_gradients_and_losses():
    net = UNetConfig(channels=[16, 32], num_blocks=1, groups=8)
    diffusion = DiffusionConfig(predict=Predict.v, clip_range=1.0)
    model = build(UpsamplerConfig(16, 32, net, diffusion, crop_fraction=0.5), Interface())
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batch = Batch(key=[""] * 7, position=list(range(7)), caption=[""] * 7, image=images)
    found = []
    for parts in (1, 3):  # of 3, 2 and 2 samples
        stage = UpsamplerStage(model, TrainerConfig(batch_size=7, accumulate=parts), OptimConfig(), 0)
        stage._trainer = SimpleNamespace(strategy=None, global_step=0, global_rank=0)  # type: ignore[assignment]
        stage.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
        model.zero_grad(set_to_none=True)
        terms = stage._gradients(batch)
        found.append((terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (whole, wanted), (sums, parts_gradients) = found
    assert_close(sums, whole)
    assert any(value.abs().max() > 1e-3 for value in wanted.values())
    for name, value in wanted.items():
        assert_close(parts_gradients[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-9, msg=name)


def test_batch_norms_are_not_sharded():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"batch norms .*take trainer\.strategy=ddp"):
        shard(net, None, Precision.fp32)  # type: ignore[arg-type]  it is refused before the mesh is looked at
