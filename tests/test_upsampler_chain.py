"""The 256 to 1024 px preset, made tiny, trains on odd pictures and samples after a smaller upsampler."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from unclip import artifact
from unclip.cli.train import CONF, forced
from unclip.config import typed
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.shards import ShardWriter
from unclip.diffusion.noise import Noise
from unclip.errors import ConfigError
from unclip.models.upsampler import Upsampler
from unclip.train import UpsamplerTrainConfig, train

MODES = ("RGB", "L", "RGBA", "LA", "P", "I;16")
TINY = [
    *("data.num_workers=0", "data.max_val=4", "logger=none"),
    *("model.net.channels=[8,16]", "model.net.num_blocks=1", "model.net.groups=8", "optim.warmup_steps=1"),
    *("model.sampling.sampler.num_steps=3", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.precision=fp32"),
    *("trainer.log_every=1", "trainer.num_samples=2"),
]


def encoded(mode: str, seed: int) -> bytes:
    """A PNG of 70x64 pixels in one of the modes that files come in."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (64, 70), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (64, 70, 4), dtype=np.uint8))
        image = (image.convert("RGB") if mode == "P" else image).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("val", 4)):
        with ShardWriter(folder / split, shard_size=12) as writer:
            for i in range(count):
                writer.write(f"{split}{i}", encoded(MODES[i % len(MODES)], i), "a picture", {})
    return folder


def settings(run: Path, data: Path, *overrides: str) -> UpsamplerTrainConfig:
    given = [f"run={run}", f"data.path={data}", *TINY, *overrides]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return typed(compose("train_upsampler", [forced(o) for o in given]), UpsamplerTrainConfig)


def large(run: Path, data: Path, *overrides: str) -> UpsamplerTrainConfig:
    sizes = ("data.image_size=64", "model.low_size=32", "model.image_size=64")
    return settings(run, data, "experiment=paper_upsampler_1024", *sizes, *overrides)


def test_grey_and_transparent_pictures_reach_the_model_as_rgb(data: Path):
    loader = UnclipData(DataConfig(str(data), image_size=64), 0, 12, ("image",)).train_dataloader()
    batch = next(iter(loader))
    assert batch.column("image").shape == (12, 3, 64, 64)
    grey = [i for i, key in enumerate(batch.key) if MODES[int(key.removeprefix("train")) % 6] in ("L", "LA", "I;16")]
    assert len(grey) == 6
    assert all(torch.equal(batch.column("image")[i, 0], batch.column("image")[i, 2]) for i in grey)


def test_the_second_upsampler_trains_on_degraded_pictures_and_follows_the_first(data: Path, tmp_path: Path):
    train(large(tmp_path / "upsampler_64", data))
    sizes = ("data.image_size=32", "model.low_size=16", "model.image_size=32", "model.crop_fraction=0.5")
    train(settings(tmp_path / "upsampler", data, "experiment=tiny_upsampler", *sizes))
    rows = [json.loads(line) for line in (tmp_path / "upsampler_64/metrics.jsonl").read_text().splitlines()]
    assert any("train/vlb" in row for row in rows)
    assert list((tmp_path / "upsampler_64/samples").glob("step-*.png"))
    pictures = torch.zeros(2, 3, 16, 16)
    for name in ("upsampler", "upsampler_64"):
        model, manifest = artifact.load(tmp_path / name, kind="upsampler")
        assert isinstance(model, Upsampler)
        assert np.isfinite(manifest.metrics["val/mse"])
        pictures = model.sample(pictures, model.default_sampling(), Noise(range(2)).branch(name))
    assert pictures.shape == (2, 3, 64, 64)
    assert pictures.isfinite().all()

    both = large(tmp_path / "both", data, "model.last_steps=1", f"model.first={tmp_path / 'upsampler_64'}")
    train(both)
    first, second = artifact.load(tmp_path / "upsampler_64")[0], artifact.load(tmp_path / "both")[0]
    assert isinstance(first, Upsampler)
    assert isinstance(second, Upsampler)
    for name, value in first.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[name], value)
    assert second.last_net is not None
    assert not torch.equal(second.last_net.unet.conv_out.weight, first.net.unet.conv_out.weight)


def test_a_second_net_without_a_first_does_not_bind_the_run(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"give its run with model\.first=RUN"):
        train(large(tmp_path / "run", data, "model.last_steps=1"))
    assert not (tmp_path / "run/identity.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.bsr=heavy", "is not one of: none, light, full"),
        ("model.sampling.guidance.scale=2", "nothing to guide by"),
        ("model.image_size=65", "not a multiple of low_size"),
        ("model.sampling.tile=48 model.sampling.tile_overlap=7", "not a multiple of 2"),
        ("model.net.attention_levels=[1] model.net.head_dim=8", "convolution-only"),
    ],
)
def test_wrong_settings_are_refused_before_training(override: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        large(tmp_path / "run", tmp_path, *override.split(" "))
