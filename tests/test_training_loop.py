"""The training loop against a plain one, its end by the clock, and what it says on a terminal."""

import io
import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_checkpoint import cfg  # noqa: F401  the fixture
from torch import nn

from unclip.callbacks import ProgressBar, SampleSheet
from unclip.config import Decay, OptimConfig, TrainerConfig
from unclip.data.batch import Batch
from unclip.data.datamodule import UnclipData
from unclip.diffusion.noise import Noise
from unclip.models import UpsamplerConfig, build
from unclip.nets.unet import UNetConfig
from unclip.stages.base import Row, Stage
from unclip.stages.clip import ClipStage
from unclip.train import ClipTrainConfig, UpsamplerTrainConfig, _model_and_data, train

STEPS = 6


def plain_loop(cfg: ClipTrainConfig) -> tuple[list[float], list[float], nn.Module]:  # noqa: F811
    """Losses, learning rates and the trained model: torch's AdamW and clipping, the rates by their formulas."""
    data = UnclipData(cfg.data, cfg.seed, cfg.trainer.batch_size, cfg.model.columns)
    torch.manual_seed(cfg.seed)
    model = build(cfg.model, data.interface).train()
    data.tokenize = model.tokenize
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decays = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in tables]
    optim = cfg.optim
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False, fused=False,
    )  # fmt: skip
    losses, rates = [], []
    for step, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        terms = model.losses(batch, Noise.at(cfg.seed, batch.position, torch.device("cpu")))
        loss = torch.stack(list(terms.values())).sum()
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        rate = optim.lr * min(1, (step + 1) / optim.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        losses.append(loss.item())
        rates.append(rate)
    return losses, rates, model


def test_a_run_is_the_plain_loop(cfg: ClipTrainConfig):  # noqa: F811
    """Warm-up, decay, clipping that bites, weight decay: losses, rates and the weights in the end."""
    optim = OptimConfig(lr=3e-3, warmup_steps=3, decay=Decay.cosine, grad_clip=0.5, weight_decay=0.3, ema_decay=0.0)
    cfg = replace(cfg, optim=optim, trainer=replace(cfg.trainer, val_every=100))
    losses, rates, model = plain_loop(cfg)
    artifact = train(cfg)
    rows = [json.loads(line) for line in (Path(cfg.run) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/lr" in row]
    assert [row["train/lr"] for row in rows] == pytest.approx(rates, rel=1e-6)
    assert [row["train/contrastive"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert all(row["train/grad_norm"] > 0.5 for row in rows), "the limit acts"
    weights = load_file(artifact / "weights.safetensors")
    for name, value in model.state_dict().items():
        if "in_proj_bias" not in name:  # a key's bias has no gradient, and Adam makes steps of the rounding errors
            torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_minutes_end_a_run_and_more_of_them_go_on(cfg: ClipTrainConfig):  # noqa: F811
    limited = replace(cfg, trainer=replace(cfg.trainer, max_minutes=1e-6))
    first = train(limited)
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["step"] < 3, "less than any step takes"
    written = (first / "manifest.json").stat().st_mtime_ns
    assert (train(limited) / "manifest.json").stat().st_mtime_ns == written, "it is finished"
    manifest = json.loads((train(cfg) / "manifest.json").read_text())
    assert manifest["step"] == STEPS


def test_the_learning_rate_falls_with_the_minutes():
    stage: Any = SimpleNamespace(
        global_step=10, seconds=45.0, trainer_cfg=TrainerConfig(max_steps=1000, max_minutes=1.0)
    )
    assert ClipStage.progress.fget(stage) == 0.75  # type: ignore[attr-defined]
    stage.trainer_cfg = TrainerConfig(max_steps=11, max_minutes=1.0)
    assert ClipStage.progress.fget(stage) == pytest.approx(10 / 11)  # type: ignore[attr-defined]
    stage.trainer_cfg = TrainerConfig(max_steps=1000)
    assert ClipStage.progress.fget(stage) == 0.01  # type: ignore[attr-defined]


def test_a_terminal_shows_a_bar_with_the_step(monkeypatch: pytest.MonkeyPatch):
    said = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("unclip.callbacks.Console", lambda **_: Console(file=said, force_terminal=True, width=100))
    bar, trainer = ProgressBar("prior in runs/prior"), SimpleNamespace(is_global_zero=True, global_step=0)
    stage = SimpleNamespace(progress=0.0, seconds=3.0)
    bar.on_train_start(trainer, stage)  # type: ignore[arg-type]
    trainer.global_step, stage.progress = 7, 0.5
    bar.on_train_batch_end(trainer, stage, None, None, 0)  # type: ignore[arg-type]
    bar.on_train_end(trainer, stage)  # type: ignore[arg-type]
    last = next(line for line in reversed(said.getvalue().splitlines()) if "prior" in line)
    assert re.search(r"prior in runs/prior .*50%.*step 7", last)


def test_sharded_weights_stay_contiguous(cfg: ClipTrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # noqa: F811
    """torch shards contiguous weights only; elsewhere convolutions on GPUs are channels_last."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = UpsamplerConfig(8, 16, UNetConfig([16], 1, groups=8))
    found = {}
    for strategy in ("ddp", "fsdp2"):
        trainer = replace(cfg.trainer, strategy=strategy)
        given = UpsamplerTrainConfig(str(tmp_path / "run"), data=cfg.data, trainer=trainer, model=model)
        built, _ = _model_and_data(given, "upsampler", fresh=True)
        convolution = next(module for module in built.modules() if isinstance(module, nn.Conv2d))
        found[strategy] = convolution.weight.is_contiguous()
    assert found == {"ddp": False, "fsdp2": True}


def test_a_sheet_is_drawn_a_few_samples_at_a_time(tmp_path: Path):
    """All at once, 16 pictures of 1,024 px would take more memory than the training that they show."""
    drawn: list[int] = []

    def sheet(batch: Batch) -> list[Row]:
        drawn.append(len(batch))
        return [Row(f"caption {i}", [torch.zeros(3, 8, 8, dtype=torch.uint8)]) for i in batch.position]

    batch = Batch(key=[""] * 10, position=list(range(10)), caption=[""] * 10, image=torch.zeros(10, 3, 8, 8))
    stage: Any = SimpleNamespace(
        is_sharded=False, device="cpu", columns=("picture",), sheet=sheet, sheet_rows=Stage.sheet_rows
    )
    stage.trainer_cfg, stage.eval, stage.train = TrainerConfig(num_samples=10), lambda: None, lambda: None
    data = SimpleNamespace(sheet_batch=lambda count: batch)
    plugin = SimpleNamespace(forward_context=nullcontext)
    trainer: Any = SimpleNamespace(
        global_step=3, is_global_zero=True, datamodule=data, precision_plugin=plugin, loggers=[]
    )
    trainer.optimizers = [SimpleNamespace(ema_weights=nullcontext)]
    SampleSheet(tmp_path).draw(trainer, stage)
    assert drawn == [4, 4, 2]
    assert json.loads((tmp_path / "captions.json").read_text()) == [f"caption {i}" for i in range(10)]
    drawn.clear()
    stage.sheet_rows = ClipStage.sheet_rows
    trainer.global_step = 4
    SampleSheet(tmp_path).draw(trainer, stage)
    assert drawn == [10], "of CLIP, which looks for each picture among all of the sheet"
