"""A run of the autoregressive prior, whose number of codes only the data tells."""

from pathlib import Path
from typing import Any

import pytest
import torch
from prior_data import make_pairs

from unclip import artifact
from unclip.config import LoggerConfig, LoggerName, OptimConfig, Precision, TrainerConfig
from unclip.data.datamodule import DataConfig
from unclip.errors import ConfigError
from unclip.evaluation.prior import PriorEvaluateConfig, evaluate_prior
from unclip.models.ar_prior import ARPrior, ARPriorConfig
from unclip.nets.ar_transformer import ARNetConfig
from unclip.nets.transformer import TextTransformerConfig
from unclip.train import PriorTrainConfig, train

NET = ARNetConfig(width=16, depth=1, num_heads=2, text=TextTransformerConfig(16, 1, 2))


def config(root: Path, run: str, steps: int) -> PriorTrainConfig:
    return PriorTrainConfig(
        run=str(root / run),
        model=ARPriorConfig(net=NET, explained_variance=0.8, num_buckets=8),
        data=DataConfig(str(root / "data"), str(root / "embeddings")),
        trainer=TrainerConfig(
            max_steps=steps, batch_size=8, precision=Precision.fp32, num_samples=2, accelerator="cpu", val_every=100
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        logger=LoggerConfig(LoggerName.none),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return artifact.load(folder, kind="prior")[0].state_dict()


def test_a_resumed_run_is_the_uninterrupted_one_and_its_artifact_is_self_contained(tmp_path: Path):
    make_pairs(tmp_path)
    train(config(tmp_path, "twice", 2))
    twice = train(config(tmp_path, "twice", 4))
    model, manifest = artifact.load(twice, kind="prior")
    assert isinstance(model, ARPrior)
    assert 1 < model.num_codes < 8
    assert manifest.step == 4
    once = weights(train(config(tmp_path, "once", 4)))
    for name, value in weights(twice).items():
        assert torch.equal(value, once[name]), name

    def measures(**sampling: Any) -> dict[str, float]:
        data = DataConfig(str(tmp_path / "data"), str(tmp_path / "embeddings"))
        how = PriorEvaluateConfig(run="", prior=str(twice), data=data, sampling=sampling, device="cpu")
        return evaluate_prior(how)["measures"]

    found = measures()
    for name in ("cross_entropy", "nats_per_code", "reconstruction_mse", "reconstruction_cosine"):
        assert found[name] == pytest.approx(manifest.metrics[f"val/{name}"], abs=1e-5)
    assert measures(temperature=0.0, percentile=90.0)["cosine_to_true"] != found["cosine_to_true"]
    with pytest.raises(ConfigError, match="unknown option 'guidance'; did you mean 'guidance_scale'"):
        measures(guidance=2.0)
