"""`unclip plan`: its memory against what the allocator handed out, its FLOPs against a count by hand, and its refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_decoder import make
from models.test_decoder_split import saved
from tests_support import environment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from unclip.cli.app import app
from unclip.cli.plan import measured, read
from unclip.config import OptimConfig, Precision
from unclip.errors import ConfigError
from unclip.models import (
    CLIPConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    Interface,
    ModelConfig,
    UpsamplerConfig,
    build,
)
from unclip.nets.conditioned import ConditioningConfig, DecoderText
from unclip.nets.transformer import PriorNetConfig
from unclip.nets.unet import UNetConfig
from unclip.optim import make_optimizer
from unclip.plan import Losses, Step, example, measure_step, on_devices, train_step

INTERFACE = Interface(embed_dim=64, text_width=64, context_length=20, vocab_size=1000)
SMALL: dict[str, tuple[ModelConfig, Interface, OptimConfig, int]] = {
    "decoder": (
        DecoderConfig(
            image_size=32,
            net=UNetConfig([32, 64], 1, [1], head_dim=32, dropout=0.1),
            conditioning=ConditioningConfig(text=DecoderText.clip_states, context_dim=64),
        ),
        INTERFACE,
        OptimConfig(),
        8,
    ),
    "prior": (
        DiffusionPriorConfig(net=PriorNetConfig(width=256, depth=4, num_heads=4)),
        INTERFACE,
        OptimConfig(ema_profiles=[0.05, 0.1]),
        16,
    ),
    "upsampler": (
        UpsamplerConfig(
            low_size=16,
            image_size=64,
            net=UNetConfig([32, 64], 1, scale_shift=False, gradient_checkpointing=True),
            crop_fraction=0.5,
        ),
        Interface(),
        OptimConfig(ema_decay=0.0),
        8,
    ),
    "decoder's second net": (
        DecoderConfig(
            image_size=32,
            net=UNetConfig([64, 128], 1, [1], head_dim=32),
            conditioning=ConditioningConfig(context_dim=64),
            split=0.3,
            last_net=UNetConfig([32, 64], 1, [1], head_dim=32),
        ),
        INTERFACE,
        OptimConfig(),
        8,
    ),
    "upsampler's second net": (
        UpsamplerConfig(low_size=16, image_size=32, net=UNetConfig([32, 64], 1, scale_shift=False), last_steps=1),
        Interface(),
        OptimConfig(),
        8,
    ),
}


def allocated(cfg: ModelConfig, interface: Interface, optim: OptimConfig, rows: int) -> int:
    """Bytes at the peak of a second step, by the allocator's own events; everything is made within the profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.manual_seed(0)
        model = build(cfg, interface).train()
        optimizer = make_optimizer(model, optim)
        batch = example(model, interface, rows)
        for _ in range(2):
            train_step(Losses(model), optimizer, batch, Precision.bf16)
    return peak_of(seen)


def peak_of(seen: profile) -> int:
    """The largest number of bytes alive at once, by the allocator's events."""
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("name", SMALL)
def test_memory_is_within_15_percent_of_what_the_allocator_handed_out(name: str):
    cfg, interface, optim, rows = SMALL[name]
    step = measure_step(cfg, interface, optim, Precision.bf16, rows)
    assert step.peak == pytest.approx(allocated(cfg, interface, optim, rows), rel=0.15)
    averages = bool(optim.ema_decay) + len(optim.ema_profiles)
    assert step.bytes["optimiser"] == pytest.approx(4 * step.trainable * (2 + averages), rel=0.01)
    assert step.bytes["parameters"] == pytest.approx(4 * step.parameters, rel=0.02)


def test_memory_of_two_ranks_is_within_15_percent_of_what_each_ones_allocator_handed_out():
    """Real DDP and FSDP2 over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("memory_ranks.py")
    done = subprocess.run(
        [*command, script, *SMALL], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (cfg, interface, optim, rows) in SMALL.items():
        step = measure_step(cfg, interface, optim, Precision.bf16, rows)
        for strategy, kinds in on_devices(step, 2, Precision.bf16).items():
            assert sum(kinds.values()) == pytest.approx(found[strategy][name], rel=0.15), (strategy, name)


def test_a_first_net_at_rest_is_kept_but_not_trained_nor_gathered():
    """A large one beside a small second net: the step is that of the small net alone, but for the memory of the weights."""
    cfg, interface, optim, rows = SMALL["decoder's second net"]
    assert isinstance(cfg, DecoderConfig)
    assert cfg.last_net is not None
    both = measure_step(cfg, interface, optim, Precision.bf16, rows)
    alone = measure_step(replace(cfg, net=cfg.last_net, last_net=None), interface, optim, Precision.bf16, rows)
    first = measure_step(replace(cfg, last_net=None), interface, optim, Precision.bf16, rows)
    assert both.parameters == first.parameters + alone.parameters
    assert both.trainable == alone.trainable
    assert (both.largest_block, both.outside, both.flops) == (alone.largest_block, alone.outside, alone.flops)
    added = {kind: size - alone.bytes[kind] for kind, size in both.bytes.items()}
    assert added["parameters"] == pytest.approx(4 * first.parameters, rel=0.01)
    assert added["gradients"] == added["optimiser"] == 0


def test_flops_are_those_of_the_layers():
    net = UNetConfig([8], 1, scale_shift=False, groups=4)
    cfg = UpsamplerConfig(low_size=4, image_size=8, net=net, crop_fraction=1.0)
    step = measure_step(cfg, Interface(), OptimConfig(), Precision.fp32, rows=3)
    pixels, channels = 3 * 64, 8
    convolution = 2 * 9 * pixels * channels**2
    layers = 4 * 2 + 2  # down, twice in the middle, twice up: two each; two of them read twice the channels
    shortcuts = 2 * (2 * pixels * 2 * channels * channels)
    inner = 3 * (layers * convolution + 2 * convolution + shortcuts + 2 * 9 * pixels * channels * 3)
    first = 2 * (2 * 9 * pixels * 6 * channels)
    time = 3 * 2 * 3 * (32 * 32 + 5 * 32 * 8) + 2 * 2 * 3 * 8 * 32
    assert step.flops == pytest.approx(inner + first + time, rel=0.02)
    assert measure_step(cfg, Interface(), OptimConfig(sam_rho=0.1), Precision.fp32, rows=3).flops == 2 * step.flops


def test_a_clip_of_the_registry_reads_pictures_and_captions_of_its_own_size():
    with FakeTensorMode():
        clip = build(CLIPConfig(name="ViT-B-32"), Interface())
        batch = example(clip, Interface(), 2)
    assert batch.column("image").shape == (2, 3, 224, 224)
    assert batch.column("tokens").shape == (2, 77)


def test_several_devices_share_what_belongs_to_the_weights():
    kinds = {"parameters": 400, "gradients": 400, "optimiser": 1200, "activations": 1000}
    step = Step(parameters=100, trainable=100, flops=1, bytes=kinds, largest_block=10, outside=20)
    assert on_devices(step, 1, Precision.bf16) == {"one device": kinds}
    found = on_devices(step, 4, Precision.bf16)
    assert found["ddp"] == {**kinds, "buckets": 400}
    gathered = 2 * 2 * 10 + 4 * 20 + 4 * 10
    assert found["fsdp2"] == {
        "parameters": 100, "gradients": 100, "optimiser": 300, "activations": 1000, "gathered": gathered,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        (["experiment=paper_decoder"], "decoder"),
        (["experiment=base128"], "decoder"),
        (["experiment=karlo_prior"], "prior"),
        (["model=ar_prior"], "prior"),
        (["model=upsampler"], "upsampler"),
        (["experiment=demo_clip"], "clip"),
        (["stage=upsampler"], "upsampler"),
    ],
)
def test_the_stage_is_known_by_its_name(given: list[str], stage: str):
    assert read(given)[2] == stage


def test_gpus_are_the_trainers_unless_they_are_given():
    assert read(["experiment=tiny_decoder", "trainer.devices=2", "trainer.num_nodes=2"])[0].gpus == 4
    assert read(["experiment=tiny_decoder", "gpus=8"])[0].gpus == 8


def test_an_autoregressive_prior_is_planned_with_as_many_codes_as_it_may_have():
    given = [
        "model.net.width=32",
        "model.net.depth=1",
        "model.net.num_heads=2",
        "model.net.context=9",
        "model.net.text.width=16",
    ]
    given += [
        "model.net.text.depth=1",
        "model.net.text.num_heads=2",
        "model.num_buckets=8",
        "embed_dim=32",
        "vocab_size=100",
    ]
    settings, cfg, stage = read(["model=ar_prior", "model.explained_variance=0.99", *given])
    long, short = (measured(settings, replace(cfg, model=replace(cfg.model, net=net)), stage, 2) for net in nets(cfg))
    assert long.flops > short.flops > 0, "of 8 and of 4 codes"


def nets(cfg: Any) -> list[Any]:
    return [cfg.model.net, replace(cfg.model.net, context=5)]


def test_a_run_that_goes_on_from_another_has_that_ones_model(tmp_path: Path):
    _, cfg, _ = read(["stage=decoder", f"init={saved(make(), tmp_path / 'run')}"])
    assert cfg.model.image_size == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["experiment=tiny_decoder", "batch=10", "gpus=4"], "batch=10 is not a multiple of gpus=4"),
        (["experiment=tiny_decoder", "gpus=0"], "gpus=0 must be positive"),
        (
            ["experiment=tiny_decoder", "gpus=4", "trainer.devices=2"],
            "gpus=4, but trainer.devices times trainer.num_nodes is 2",
        ),
        (["experiment=tiny_decoder", "gpus=two"], "gpus='two' is not a valid int"),
        (["experiment=tiny_decoder", "mfu=40"], "mfu=40.0 is a share of tflops"),
        (["stage=vae"], "stage=vae is not one of: clip, prior, decoder, upsampler"),
        (["experiment=no_such_decoder"], "is decoder the stage"),
        (["experiment=tiny_decoder", "model.net.widht=1"], "unknown option 'model.net.widht'"),
        (["stage=clip", "model.lora_rank=2"], "follows whole weights, not adapters"),
        (["tiny_decoder"], "'tiny_decoder' is not a setting: write unclip plan experiment="),
    ],
)
def test_bad_input_is_told(given: list[str], message: str):
    result = CliRunner().invoke(app, ["plan", *given])
    assert isinstance(result.exception, ConfigError), result.output
    assert message in str(result.exception)


def test_a_plan_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    given = ["experiment=tiny_decoder", "gpus=2", "batch=8", "mfu=0.5", "tflops=100", "vocab_size=100"]
    result = CliRunner().invoke(app, ["plan", *given, "trainer.accumulate=2"])
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "decoder", "a step", "a GPU", "memory, ddp", "memory, fsdp2", "the recipe",
    ]  # fmt: skip
    assert lines[2] == "a GPU: 2 samples at once, 2 times a step"
    assert "5,000 steps, 40,000 samples" in lines[-1]
    assert "on 2 GPUs at 50% of 100 TFLOP/s" in lines[-1]
    assert not list(tmp_path.iterdir())
