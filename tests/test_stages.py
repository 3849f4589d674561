"""What a stage shows of itself."""

import pytest
import torch

from unclip.config import OptimConfig, Precision, TrainerConfig
from unclip.data.batch import Batch
from unclip.diffusion.samplers import SamplerConfig
from unclip.errors import ConfigError
from unclip.models import DecoderConfig, Interface, build
from unclip.models.sampling import DiffusionSampling
from unclip.nets.conditioned import ConditioningConfig, DecoderText
from unclip.nets.unet import UNetConfig
from unclip.stages.decoder import DecoderStage
from unclip.stages.sharded import shard


@pytest.mark.parametrize(
    ("conditioning", "headings"),
    [
        (ConditioningConfig(), ["from z_i"]),
        (ConditioningConfig(text_emb=True), ["from z_i and caption", "from z_i", "from the caption"]),
        (ConditioningConfig(image=False, text=DecoderText.clip_states), ["from the caption"]),
    ],
)
def test_the_decoders_sheet_shows_what_the_decoder_can_see(conditioning, headings):
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
    rows = stage.sheet(batch)
    assert [row.caption for row in rows] == ["a", "b"]
    assert [len(row.pictures) for row in rows] == [len(stage.columns)] * 2


def test_batch_norms_are_not_sharded():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"batch norms .*take trainer\.strategy=ddp"):
        shard(net, None, Precision.fp32)  # type: ignore[arg-type]  it is refused before the mesh is looked at
