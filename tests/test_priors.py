"""Every prior through train-prior, on embeddings of a tiny CLIP; statistics added later; caption states made live."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.prior_stats import add_statistics
from unclip.config import LoggerConfig, LoggerName, OptimConfig, Precision, TrainerConfig, to_plain
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, TextStates, UnclipData
from unclip.data.embed import EmbedConfig, embed
from unclip.data.shards import ShardWriter
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.errors import ArtifactError, ConfigError
from unclip.models.baseline_priors import EclipsePriorConfig, IdentityConfig, LinearPriorConfig, MLPPriorConfig
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig, EmbeddingSpace
from unclip.models.interface import PriorConfig
from unclip.models.sampling import PriorSampling
from unclip.nets.layers import Cond, caption_mask
from unclip.nets.transformer import PriorNetConfig, PriorText
from unclip.train import PriorTrainConfig, train

NET = PriorNetConfig(width=32, depth=1, num_heads=2)
ANALYTIC = PriorSampling(SamplerConfig(Sampler.analytic, 3))


def diffusion(**options: Any) -> DiffusionPriorConfig:
    return DiffusionPriorConfig(net=NET, **{"sampling": PriorSampling(SamplerConfig(num_steps=3)), **options})


MODELS: dict[str, PriorConfig] = {
    "identity": IdentityConfig(),
    "linear_prior": LinearPriorConfig(caption_mean=True),
    "mlp_prior": MLPPriorConfig(width=16, depth=1),
    "eclipse_prior": EclipsePriorConfig(net=NET),
    "whitened": diffusion(embedding_space=EmbeddingSpace.whitened),
    "pca": diffusion(embedding_space=EmbeddingSpace.pca, num_components=5),
    "analytic": diffusion(sampling=ANALYTIC),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, a clip, its embeddings with and without caption states, and another clip."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, count in {"train": 40, "val": 12}.items():
        with ShardWriter(root / "data" / split, shard_size=20) as writer:
            for i in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
                writer.write(f"{split}{i}", buffer.getvalue(), f"a picture of {'many ' * (i % 3)}{i} things", {})
    small = CLIPConfig(
        image_size=16,
        embed_dim=12,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        text_width=16,
        text_layers=1,
        text_heads=2,
    )
    for seed, name in enumerate(("clip", "other_clip")):
        torch.manual_seed(seed)
        clip = CLIP(small)
        artifact.save(root / name, clip, Manifest("clip", "clip", to_plain(small), to_plain(clip.interface())))
    common = {"clip": str(root / "clip"), "data": str(root / "data")}
    columns = ["image_emb", "text_emb", "tokens"]
    embed(EmbedConfig(str(root / "embeddings"), **common, columns=[*columns, "text_seq"]))
    embed(EmbedConfig(str(root / "stateless"), **common, columns=columns))
    return root


def config(world: Path, run: str, model: PriorConfig, embeddings: str = "embeddings", **data: Any) -> PriorTrainConfig:
    return PriorTrainConfig(
        run=str(world / run),
        model=model,
        data=DataConfig(str(world / "data"), str(world / embeddings), **data),
        trainer=TrainerConfig(
            max_steps=2, batch_size=8, precision=Precision.fp32, log_every=1, num_samples=2, accelerator="cpu"
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        logger=LoggerConfig(LoggerName.none),
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_every_prior_fits_trains_validates_and_exports(world: Path, name: str):
    cfg = config(world, name, MODELS[name])
    folder = train(cfg)
    model, manifest = artifact.load(folder, kind="prior")
    trains = MODELS[name].trains
    assert manifest.step == (2 if trains else 0)
    assert manifest.metrics["val/mse"] > 0
    assert -1 <= manifest.metrics["val/cosine_to_true"] <= 1
    assert list((world / name / "samples").glob("step-*.png"))
    if name == "linear_prior":
        assert manifest.metrics["val/cosine_to_true"] > 0.9, "pictures of noise look alike to an untrained CLIP"
    if name in ("whitened", "pca"):
        assert isinstance(model, DiffusionPrior)
        embeddings = UnclipData(cfg.data, 0, 8, ()).embeddings
        assert embeddings is not None
        raw = torch.from_numpy(embeddings.column("image_emb"))
        encoded = model.encode(raw)
        assert_close(encoded.mean(0), torch.zeros(encoded.shape[1]), atol=1e-3, rtol=0)
        assert_close(encoded.std(0, correction=0), torch.ones(encoded.shape[1]), atol=1e-2, rtol=0)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert train(cfg) == folder, "a finished run returns at once"
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_the_pca_space_keeps_the_largest_components(world: Path):
    prior = DiffusionPrior(MODELS["pca"], UnclipData(config(world, "x", MODELS["pca"]).data, 0, 8, ()).interface)  # type: ignore[arg-type]
    data = UnclipData(config(world, "x", MODELS["pca"]).data, 0, 8, ())
    prior.fit(data.embeddings)
    assert data.embeddings is not None
    raw = torch.from_numpy(data.embeddings.column("image_emb"))
    u, s, vh = torch.linalg.svd((raw - raw.mean(0)).double(), full_matrices=False)
    best = raw.mean(0) + ((u[:, :5] * s[:5]) @ vh[:5]).float()
    assert_close(prior.decode(prior.encode(raw)), best, atol=1e-4, rtol=1e-4)
    assert_close(prior.clip_std[0], (s[:5] / len(raw) ** 0.5).float(), atol=1e-5, rtol=1e-3)


def test_components_without_variance_are_not_whitened(world: Path):
    """z_i in a plane have two of twelve: the others would be rounding errors over rounding errors."""
    cfg = diffusion(embedding_space=EmbeddingSpace.pca)
    data = UnclipData(config(world, "x", cfg).data, 0, 8, ())
    prior = DiffusionPrior(cfg, data.interface)
    rng = np.random.default_rng(0)
    plane = (rng.normal(size=(40, 2)) @ rng.normal(size=(2, data.interface.embed_dim))).astype(np.float32)

    class Plane:
        folder, columns, normalised = Path("plane"), {"image_emb": plane}, False

        def __len__(self) -> int:
            return len(plane)

        def rows(self, indices: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
            return {"image_emb": plane[indices]}

    with pytest.raises(ConfigError, match=r"z_i of plane vary along 2 of the 12 .* set model\.num_components=2"):
        prior.fit(Plane())


def test_statistics_join_the_artifact_and_keep_its_lineage(world: Path, capsys: pytest.CaptureFixture):
    cfg = config(world, "stats", diffusion(sampling=ANALYTIC))
    folder = train(cfg)
    model, before = artifact.load(folder)
    assert isinstance(model, DiffusionPrior)
    assert model.default_sampling().sampler.name is Sampler.ancestral
    cond, noise = (
        Cond(text_emb=torch.randn(2, 12), text_seq=torch.randn(2, 5, 16), text_mask=torch.ones(2, 5).bool()),
        Noise([1, 2]),
    )
    with pytest.raises(ConfigError, match=r"run `unclip prior-stats RUN`, or take sampler\.name=ancestral"):
        model.sample(cond, ANALYTIC, noise)

    for num in (16, 24):  # the second replaces the first
        file = add_statistics(world / "stats", num=num, seed=0, batch_size=8)
    assert "sampler.name=analytic" in capsys.readouterr().out
    assert [path.name for path in folder.glob("statistics*")] == [file.name]
    model, after = artifact.load(folder)
    assert isinstance(model, DiffusionPrior)
    assert (after.hash, after.weights_sha256) == (before.hash, before.weights_sha256)
    assert after.statistics_sha256
    assert model.x0_var.shape == (1000,)
    assert (model.x0_var >= 0).all()
    assert model.default_sampling() == ANALYTIC
    plain = replace(ANALYTIC, sampler=SamplerConfig(Sampler.ancestral, 3))
    assert not torch.equal(model.sample(cond, ANALYTIC, noise), model.sample(cond, plain, noise))
    assert train(cfg) == folder

    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"altered; copy the artifact again, or run `unclip prior-stats` again"):
        artifact.load(folder)


def test_statistics_of_what_cannot_use_them_are_refused(world: Path):
    train(config(world, "no_stats", IdentityConfig()))
    with pytest.raises(ArtifactError, match="holds a prior of kind identity; only a diffusion_prior"):
        add_statistics(world / "no_stats", num=8, seed=0, batch_size=8)
    interface = UnclipData(config(world, "x", IdentityConfig()).data, 0, 8, ()).interface
    prior = diffusion()
    for name, clip in (("imported", interface.clip), ("foreign", "f" * 64)):
        mine = replace(interface, clip=clip)
        manifest = Manifest("prior", "diffusion_prior", to_plain(prior), to_plain(mine))
        artifact.save(world / name, DiffusionPrior(prior, mine), manifest)
    with pytest.raises(ConfigError, match="does not say what it was trained on; give --data and --embeddings"):
        add_statistics(world / "imported", num=8, seed=0, batch_size=8)
    given = {"data": world / "data", "embeddings": world / "embeddings"}
    add_statistics(world / "imported", num=8, seed=0, batch_size=8, **given)
    with pytest.raises(ArtifactError, match="was trained on CLIP ffffffff"):
        add_statistics(world / "foreign", num=8, seed=0, batch_size=8, **given)


def live(world: Path, clip: str = "clip") -> dict[str, Any]:
    return {"embeddings": "stateless", "text_states": TextStates.live, "clip": str(world / clip)}


def test_live_states_are_the_stored_ones(world: Path):
    batches: list[Batch] = []
    for source in ({}, live(world)):
        data = UnclipData(config(world, "x", diffusion(), **source).data, 0, 8, diffusion().columns)
        batches.append(data.on_after_batch_transfer(next(iter(data.train_dataloader())).to("cpu"), 0))
    stored, made = (batch.column("text_seq") for batch in batches)
    mask = caption_mask(batches[0].column("tokens"))
    assert stored.shape == made.shape
    assert_close(made[mask], stored[mask], atol=5e-3, rtol=5e-3)  # stored in float16
    assert stored[mask].std() > 0.1


def test_a_prior_trains_on_live_states(world: Path):
    cfg = config(world, "live", diffusion(), **live(world))
    train(cfg)
    model, manifest = artifact.load(world / "live")
    assert manifest.step == 2
    assert not any(isinstance(part, CLIP) for part in model.modules())
    stored = train(config(world, "not_live", diffusion()))
    assert artifact.read_manifest(stored).metrics["val/mse"] == pytest.approx(manifest.metrics["val/mse"], rel=0.05)
    assert json.loads((stored / "manifest.json").read_text())["model"] == "diffusion_prior"


def test_states_without_a_source_are_refused(world: Path):
    with pytest.raises(ConfigError, match=r"text_seq.*embed again with columns=.*or take data\.text_states=live"):
        train(config(world, "none", diffusion(), "stateless"))
    with pytest.raises(ConfigError, match=r"give the CLIP that made the embeddings"):
        train(config(world, "wrong", diffusion(), **live(world, "other_clip")))
    with pytest.raises(ConfigError, match="belong together; give both or neither"):
        DataConfig(clip="runs/clip")


def test_tokens_need_no_states(world: Path):
    model = replace(diffusion(), net=replace(NET, text=PriorText.tokens))
    assert artifact.read_manifest(train(config(world, "tokens", model, "stateless"))).step == 2
