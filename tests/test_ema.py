"""Averages of any length after training: the profiles' mathematics, snapshots, and a run's artifact made of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests_support import TINY, run_command
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.app import app
from unclip.config import OptimConfig, to_plain
from unclip.ema import coefficients, drop_after, exponent, reconstruct, relative_width, save_snapshot, snapshots
from unclip.errors import ArtifactError, ConfigError
from unclip.models import Interface, UpsamplerConfig, build
from unclip.nets.unet import UNetConfig
from unclip.optim import make_optimizer

WIDTHS = [0.05, 0.1]
STEPS, EVERY = 400, 25
CONFIG = UpsamplerConfig(low_size=4, image_size=8, net=UNetConfig([8], 1, groups=4), crop_fraction=1.0)


def test_widths_and_exponents_are_the_published_ones():
    """Karras et al. 2024, sec. 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for width in (0.02, 0.1, 0.25):
        gamma = exponent(width)
        assert relative_width(gamma) == pytest.approx(width)
        profile = (gamma + 1) * tau**gamma
        mean = torch.trapezoid(profile * tau, tau)
        assert float(torch.trapezoid(profile * (tau - mean) ** 2, tau) ** 0.5) == pytest.approx(width, rel=1e-4)
    for wrong in (0.0, 0.3, math.nan):
        with pytest.raises(ConfigError, match="must lie between 0 and"):
            exponent(wrong)


def test_a_profile_that_is_there_is_found_alone():
    gammas = torch.tensor([16.97, 6.94] * 3, dtype=torch.float64)
    times = torch.tensor([10.0, 10.0, 20.0, 20.0, 30.0, 30.0], dtype=torch.float64)
    found, rest = coefficients(gammas, times, 6.94, 20.0)
    assert_close(found, torch.tensor([0, 0, 0, 1.0, 0, 0], dtype=torch.float64), atol=1e-5, rtol=0)
    assert rest < 1e-5
    many = torch.arange(1, 31, dtype=torch.float64).repeat_interleave(2)
    few, better = coefficients(gammas, times, 3.0, 30.0)[1], coefficients(gammas[:2].repeat(30), many, 3.0, 30.0)[1]
    assert better < min(0.05, few / 2), "more snapshots reach more profiles"
    assert coefficients(gammas[:2], times[:2], 16.97, 30.0)[1] > 0.9, "early snapshots say nothing of late weights"


def trained(run: Path, widths: list[float]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Averages of a short training whose weights wander, with a snapshot every EVERY steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    optimizer = make_optimizer(model, OptimConfig(lr=0.02, beta2=0.9, ema_decay=0.9, ema_profiles=widths))
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 6)
        (model(x) - torch.sin(step / 40 + x[:, :4])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            save_snapshot(run, step, {w: optimizer.profile(model, i) for i, w in enumerate(widths)})
    return model, optimizer.profile(model, len(widths) - 1)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_it_equals_the_average_that_was_tracked_online(width: float, tmp_path: Path):
    model, online = trained(tmp_path / "both", [*WIDTHS, width])
    run = tmp_path / "run"  # what a run without that width has kept
    for snapshot in snapshots(tmp_path / "both"):
        tensors = load_file(snapshot.path)
        kept = {w: {n.partition(":")[2]: v for n, v in tensors.items() if n.startswith(f"{w}:")} for w in WIDTHS}
        save_snapshot(run, snapshot.step, kept)
    artifact.save(run, model, Manifest("upsampler", "upsampler", to_plain(CONFIG), {}, step=STEPS))
    folder, rest = reconstruct(run, tmp_path / "out", width)
    found = artifact.read_weights(folder)
    assert_close(
        sum(v.sum() for v in artifact.read_weights(run).values()), sum(v.sum() for v in model.state_dict().values())
    )
    flat, wanted, last = (
        torch.cat([side[name].flatten() for name in sorted(online)]) for side in (found, online, model.state_dict())
    )
    assert (flat - wanted).norm() / wanted.norm() < 0.01
    assert (last - wanted).norm() / wanted.norm() > 0.05, "weights that stand still would prove nothing"
    assert rest < 0.1
    manifest = artifact.read_manifest(folder)
    assert manifest.metrics["ema_sigma_rel"] == width
    assert (manifest.step, manifest.settings["ema"]["ema_unreached"]) == (STEPS, rest)
    assert manifest.hash != artifact.read_manifest(run).hash


def test_profiles_by_hand():
    """After n steps the average is the sum of the weights at step k times (k^(g+1) - (k-1)^(g+1)) / n^(g+1)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, ema_decay=0.0, ema_profiles=[0.1]))
    history = []
    for step in range(6):
        if step != 3:  # a step that is left out: the weights stand still, and count
            model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(model.weight.detach().clone())
    power = exponent(0.1) + 1
    shares = [((k + 1) ** power - k**power) / 6**power for k in range(6)]
    wanted = sum(share * weight for share, weight in zip(shares, history, strict=True))
    assert sum(shares) == pytest.approx(1)
    assert_close(optimizer.profile(model, 0)["weight"], wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(history[2], history[3])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"ema_profiles holds 0\.5; a relative width lies between"):
        OptimConfig(ema_profiles=[0.1, 0.5])
    with pytest.raises(ConfigError, match=r"ema_snapshot_every=10 .*set optim\.ema_profiles=\[0\.05,0\.1\]"):
        OptimConfig(ema_snapshot_every=10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    model = build(CONFIG, Interface())
    artifact.save(run, model, Manifest("upsampler", "upsampler", to_plain(CONFIG), to_plain(Interface()), step=20))
    for step in (10, 20):
        save_snapshot(run, step, {w: {n: p.detach().clone() for n, p in model.named_parameters()} for w in WIDTHS})
    return run


def test_bad_input_is_told_and_nothing_is_written(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"sigma_rel=0\.4 must lie between"):
        reconstruct(run, out, 0.4)
    with pytest.raises(ConfigError, match="no snapshot of step 15; take one of those in its file names"):
        reconstruct(run, out, 0.1, step=15)
    with pytest.raises(ConfigError, match="give another folder than the run"):
        reconstruct(run, run, 0.1)
    last = run / "ema" / "00000020.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    with pytest.raises(ArtifactError, match=r"00000020\.safetensors is damaged"):
        reconstruct(run, out, 0.1)
    drop_after(run, 10)
    assert [snapshot.step for snapshot in snapshots(run)] == [10]
    save_snapshot(run, 20, {w: {"another.weight": torch.zeros(3)} for w in WIDTHS})
    with pytest.raises(ArtifactError, match="two runs in one folder"):
        reconstruct(run, out, 0.1)
    drop_after(run, 0)
    with pytest.raises(ArtifactError, match=r"holds no snapshots: train with optim\.ema_profiles"):
        reconstruct(run, out, 0.1)
    assert not out.exists()


def test_the_command_writes_an_artifact_that_loads(run: Path, tmp_path: Path):
    given = ["ema", str(run), "--sigma-rel", "0.08", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.exception
    assert "sigma_rel 0.08" in result.output
    before, after = (artifact.load(folder, kind="upsampler")[0].state_dict() for folder in (run, tmp_path / "out"))
    for name, value in before.items():  # both snapshots hold the same weights
        assert_close(after[name], value, atol=1e-6, rtol=1e-5)


def test_a_resumed_run_keeps_profiles_and_snapshots_to_the_bit(tmp_path: Path):
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "32", "--size", "32", cwd=tmp_path)
    profiles = ["optim.ema_profiles=[0.05,0.1]", "optim.ema_snapshot_every=2", "trainer.precision=fp32"]
    given = ["train-upsampler", "data.path=data", *TINY["upsampler"], *profiles]
    run_command(*given, "run=whole", "trainer.max_steps=6", cwd=tmp_path)
    run_command(*given, "run=cut", "trainer.max_steps=3", cwd=tmp_path)
    assert sorted(p.stem for p in (tmp_path / "cut" / "ema").iterdir()) == ["00000002", "00000003"]
    run_command(*given, "run=cut", "trainer.max_steps=6", cwd=tmp_path)
    for step in ("00000002", "00000004", "00000006"):
        whole, cut = (load_file(tmp_path / run / "ema" / f"{step}.safetensors") for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    with safe_open(tmp_path / "cut" / "ema" / "00000004.safetensors", "pt") as file:
        assert json.loads(file.metadata()["widths"]) == [0.05, 0.1]
    run_command("unclip", "ema", "cut", "--sigma-rel", "0.07", "--out", "long", cwd=tmp_path)
    manifest = artifact.read_manifest(tmp_path / "long")
    assert (manifest.kind, manifest.step) == ("upsampler", 6)
    assert replace(manifest, metrics={}).parents == {}
