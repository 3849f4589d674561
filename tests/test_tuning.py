"""Fine-tuning of an imported pipeline: whole and by LoRA, from the imported weights and statistics."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from tiny_karlo import FULL_SIZE, components, text_to_image

from unclip import artifact
from unclip.cli.train import CONF, forced, with_init
from unclip.config import typed
from unclip.data.embed import EmbedConfig, embed
from unclip.data.shards import ShardWriter
from unclip.errors import ConfigError
from unclip.interop.karlo import import_karlo
from unclip.train import DecoderTrainConfig, PriorTrainConfig, UpsamplerTrainConfig, train

SHORT = [
    "trainer.batch_size=16",
    "trainer.log_every=10",
    "trainer.num_samples=2",
    "trainer.precision=fp32",
    "data.max_val=8",
]
SHORT += [
    "optim.warmup_steps=1",
    "trainer.val_every=1000",
    "trainer.checkpoint_every=1000",
    "logger=none",
    "optim.ema_decay=0",
]
COLUMNS = ["image_emb", "text_emb", "tokens", "text_seq"]
CONFIGS = {"prior": PriorTrainConfig, "decoder": DecoderTrainConfig, "upsampler": UpsamplerTrainConfig}


def png(rng: np.random.Generator) -> bytes:
    import io

    from PIL import Image

    colour = rng.integers(0, 256, 3)
    picture = np.clip(colour + rng.normal(0, 10, (FULL_SIZE, FULL_SIZE, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Karlo as runs ``karlo/``, 64 pictures with captions ``data``, and their embeddings."""
    root = tmp_path_factory.mktemp("tuning")
    parts = components()
    text_to_image(parts).save_pretrained(root / "t2i")
    parts["image_encoder"].save_pretrained(root / "t2i" / "image_encoder")
    import_karlo(root / "t2i", root / "karlo")
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 8)):
        with ShardWriter(root / "data" / split) as writer:
            for i in range(count):
                writer.write(f"{i:04d}", png(rng), f"picture number {i} of {split}", {})
    embed(
        EmbedConfig(
            run=str(root / "embeddings"), clip=str(root / "karlo" / "clip"), data=str(root / "data"), columns=COLUMNS
        )
    )
    return root


def raw(stage: str, root: Path, name: str, *overrides: str) -> Any:
    """The command's settings, as Hydra composes them."""
    given = [f"run={root / name}", f"init={root / 'karlo' / stage}", f"data.path={root / 'data'}"]
    given += [] if stage == "upsampler" else [f"data.embeddings={root / 'embeddings'}"]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        found = compose(f"train_{stage}", [forced(o) for o in (*given, *overrides)])
    with open_dict(found):
        found.pop("launch", None)
    return found


def tune(root: Path, stage: str, name: str, *settings: str, steps: int = 30) -> list[float]:
    """Train as the command does; the mean losses of every ten steps."""
    found = raw(stage, root, name, f"trainer.max_steps={steps}", *SHORT, *settings)
    train(typed(with_init(found, stage), CONFIGS[stage]))
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/mse"] for line in lines if "train/mse" in line]


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_falls_on_64_pictures(root: Path, stage: str, rank: int):
    name = f"{stage}-{rank}"
    settings = ["optim.lr=3e-3" if rank else "optim.lr=1e-3", f"lora_rank={rank}"]
    settings += ["model.sampling.sampler.num_steps=2", "model.last_steps=0"] if stage == "upsampler" else []
    settings += ["model.sampling.sampler.num_steps=2"] if stage != "upsampler" else []
    losses = tune(root, stage, name, *settings)
    assert losses[-1] < 0.97 * losses[0], losses

    start, tuned = artifact.read_weights(root / "karlo" / stage), artifact.read_weights(root / name)
    assert {n: v.shape for n, v in tuned.items()} == {n: v.shape for n, v in start.items() if n in tuned}  # merged
    changed = {n for n, v in tuned.items() if not torch.equal(v, start[n])}
    kept = {n for n in tuned if n.startswith(("clip_", "net.empty", "net.text_proj.empty"))}
    assert not changed & kept  # whitening and the stored caption are the imported ones
    if rank:
        assert changed
        assert all(n.endswith(".weight") for n in changed)
    else:
        assert len(changed) > 0.8 * len({*tuned} - kept)
    manifest, first = artifact.read_manifest(root / name), artifact.read_manifest(root / "karlo" / stage)
    assert manifest.parents["init"] == first.hash
    assert manifest.settings["lora_rank"] == rank


def test_a_lora_run_resumes_and_samples_by_the_sum(root: Path):
    """Its checkpoint holds the adapters; the prior samples in validation by other code than it trains by."""
    small = ["lora_rank=2", "model.sampling.sampler.num_steps=2", "optim.lr=1e-2"]
    small += ["trainer.val_every=2", "trainer.checkpoint_every=2"]
    tune(root, "prior", "whole", *small, steps=4)
    tune(root, "prior", "parts", *small, steps=2)
    tune(root, "prior", "parts", *small, steps=4)
    whole, parts = artifact.read_weights(root / "whole"), artifact.read_weights(root / "parts")
    assert all(torch.equal(whole[name], value) for name, value in parts.items())
    found = [artifact.read_manifest(root / name).metrics["val/cosine_to_true"] for name in ("whole", "parts")]
    assert found[0] == found[1]


def test_sampling_sees_the_adapters(root: Path):
    from unclip.diffusion.noise import Noise
    from unclip.models.lora import add_lora, merge_lora
    from unclip.nets.layers import Cond

    prior = artifact.load(root / "karlo" / "prior")[0]
    cond = Cond(
        text_emb=torch.randn(2, 32), text_seq=torch.randn(2, 5, 32), text_mask=torch.ones(2, 5, dtype=torch.bool)
    )
    how = prior.default_sampling()
    how.sampler.num_steps = 3
    adapters = add_lora(prior, "diffusion_prior", 2)
    plain = prior.sample(cond, how, Noise([0, 1]))
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    tuned = prior.sample(cond, how, Noise([0, 1]))
    merge_lora(adapters)
    merged = prior.sample(cond, how, Noise([0, 1]))
    assert (tuned - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, tuned, atol=1e-5, rtol=1e-5)


def test_settings_come_from_the_artifact_and_what_is_given_on_top(root: Path):
    found = with_init(raw("prior", root, "given", "model.drop_text=0.5"), "prior").model
    assert (found.net.depth, found.drop_text, found.embedding_space) == (2, 0.5, "whitened")
    with pytest.raises(ConfigError, match="is a diffusion_prior, not a ar_prior: add model=diffusion_prior"):
        with_init(raw("prior", root, "given", "model=ar_prior"), "prior")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.net.depth=3"], "model.* is another net than that of init="),
        (["model.embedding_space=scaled"], "model.embedding_space belongs to the fit to the training embeddings"),
        (["lora_rank=-1"], "lora_rank=-1 adds to trained weights"),
        (["lora_rank=2", "trainer.strategy=fsdp2"], "take trainer.strategy=ddp"),
        (["lora_rank=2", "optim.ema_profiles=[0.1]"], "leave one out"),
        (["init=DECODER"], "is a decoder artifact where a prior is needed"),
    ],
)
def test_bad_settings_are_refused(root: Path, settings: list[str], message: str):
    settings = [s.replace("DECODER", str(root / "karlo" / "decoder")) for s in settings]
    with pytest.raises(Exception, match=message.replace("*", r"\*")) as caught:
        train(typed(with_init(raw("prior", root, "refused", *settings), "prior"), PriorTrainConfig))
    assert "unclip.errors" in type(caught.value).__module__


def test_data_of_another_clip_are_refused(root: Path, tmp_path: Path):
    from unclip.models.interface import Interface
    from unclip.tuning import start_from

    stage = SimpleNamespace()
    with pytest.raises(ConfigError, match="embed the data with that CLIP"):
        start_from(str(root / "karlo" / "prior"), stage, "prior", Interface(clip="b" * 64), tmp_path)


def test_a_second_net_goes_on_from_a_tuned_first_one(root: Path, tmp_path: Path):
    from unclip.models import build
    from unclip.models.interface import Interface
    from unclip.tuning import start_from

    model = artifact.load(root / "karlo" / "upsampler")[0]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.net.unet.conv_in.bias.add_(1.0)
    manifest = artifact.read_manifest(root / "karlo" / "upsampler")
    artifact.save(tmp_path / "first", model, manifest)
    model.cfg.first = str(tmp_path / "first")
    both = build(model.cfg, Interface())
    start_from(str(root / "karlo" / "upsampler"), both, "upsampler", Interface(), tmp_path / "run")
    assert torch.equal(both.net.unet.conv_in.bias, start["net.unet.conv_in.bias"] + 1)
    assert torch.equal(both.last_net.unet.conv_in.bias, start["last_net.unet.conv_in.bias"])
