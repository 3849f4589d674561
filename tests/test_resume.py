"""A training command that is killed with SIGKILL and started again ends with the very same weights."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tests_support import TINY, command, environment, run_command

from unclip.callbacks import SampleSheet, StopOnLimitOrSignal
from unclip.cli.train import CONF, forced
from unclip.config import typed
from unclip.stages.base import Stage
from unclip.stages.upsampler import UpsamplerStage
from unclip.train import UpsamplerTrainConfig, train

pytestmark = pytest.mark.timeout(300)
STEPS = 100  # enough for a signal to fall into on a busy machine
RESNET = {
    "image_size": "32",
    "vision_width": "4",
    "vision_layers": "4",
    "vision_heads": "3",
    "vision_blocks": "[1,1,1,1]",
}
OPTIONS = TINY | {"resnet": [*TINY["clip"], *(f"model.{name}={value}" for name, value in RESNET.items())]}
COMMANDS = {"clip": "train-clip", "prior": "train-prior", "decoder": "train-decoder", "upsampler": "train-upsampler"}
COMMANDS["resnet"] = "train-clip"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    run_command("train-clip", "run=clip", "data.path=data", *TINY["clip"], cwd=root)
    run_command("unclip-embed", "run=embeddings", "clip=clip", "data=data", cwd=root)
    return root


def arguments(stage: str, run: str) -> list[str]:
    given = [COMMANDS[stage], f"run={run}", "data.path=data", *OPTIONS[stage], f"trainer.max_steps={STEPS}"]
    return given + (["data.embeddings=embeddings"] if stage in ("prior", "decoder") else [])


def stop_in_training(
    given: list[str], cwd: Path, checkpoint: Path, number: signal.Signals = signal.SIGKILL
) -> tuple[int, int]:
    """Start a command and signal it, with its workers, once a checkpoint beyond the second step stands; that step and the
    exit code."""
    with subprocess.Popen(
        [command(given[0]), *given[1:]], cwd=cwd, env=environment(), stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if checkpoint.exists() and (step := torch.load(checkpoint, weights_only=True)["global_step"]) > 2:
                os.killpg(process.pid, number)
                return step, process.wait(timeout=60)
            time.sleep(0.02)
        process.kill()
        said = process.stderr.read().decode() if process.stderr else ""
    raise AssertionError(f"no checkpoint to interrupt at; the command said:\n{said}")


@pytest.mark.parametrize("stage", COMMANDS)
def test_killed_and_resumed_equals_uninterrupted(stage: str, data: Path):
    run_command(*arguments(stage, f"whole/{stage}"), cwd=data)
    cut = data / "cut" / stage
    killed_at, _ = stop_in_training(arguments(stage, f"cut/{stage}"), data, cut / "checkpoints" / "last.ckpt")
    assert 2 < killed_at < STEPS
    assert not (cut / "artifact").exists()
    run_command(*arguments(stage, f"cut/{stage}"), cwd=data)

    whole, resumed = ((data / way / stage / "artifact") for way in ("whole", "cut"))
    assert (whole / "weights.safetensors").read_bytes() == (resumed / "weights.safetensors").read_bytes()
    hashes = [json.loads((folder / "manifest.json").read_text())["hash"] for folder in (whole, resumed)]
    assert hashes[0] == hashes[1]
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines() if "train/" in line]
    assert steps == list(range(2, STEPS + 1, 2)), "every logged step stands in metrics.jsonl once"


def test_a_signal_after_the_last_step_ends_a_run_that_only_has_to_be_finished(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    """While the last sheet is drawn, where Lightning's own handler would broadcast and end with exit code 0."""
    monkeypatch.chdir(data)
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        given = [forced(word) for word in [*arguments("upsampler", "signal/late")[1:], "trainer.sample_every=1000"]]
        cfg = typed(compose("train_upsampler", given), UpsamplerTrainConfig)
    draw = SampleSheet.draw

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*args)

    with monkeypatch.context() as context:
        context.setattr(SampleSheet, "draw", interrupted)
        with pytest.raises(SystemExit) as ended:
            train(cfg)
    assert ended.value.code == 128 + signal.SIGTERM
    run = data / "signal" / "late"
    assert json.loads((run / "stopped.json").read_text())["signal"] == signal.SIGTERM
    assert not (run / "artifact").exists()
    assert "this run has not finished" in (run / "report.html").read_text()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # they were ignored, as this process was to end
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    placed: list[str] = []
    with monkeypatch.context() as context:  # where the weights are: Lightning's end puts them onto the CPU
        context.setattr(UpsamplerStage, "cpu", lambda stage: placed.append("the CPU") or stage)
        context.setattr(UpsamplerStage, "to", lambda stage, device: placed.append(f"the run's {device}") or stage)
        context.setattr(SampleSheet, "draw", lambda *args: placed.append("the sheet"))
        train(cfg)
    assert placed[-3:] == ["the CPU", "the run's cpu", "the sheet"]
    assert (run / "artifact").exists()


def test_a_validation_that_a_run_died_before_is_made_up_and_none_is_made_twice(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(data)
    val_every = ["trainer.val_every=4", "trainer.checkpoint_every=1", "trainer.max_steps=12", "logger=none"]

    def trained(name: str, dies_at: str = "", step: int = 0) -> dict[int, list[float]]:
        """Train, or until the hook ``dies_at`` of this step; the validation errors in metrics.jsonl, by step."""
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            given = [forced(word) for word in [*arguments("upsampler", f"validation/{name}")[1:], *val_every]]
            cfg = typed(compose("train_upsampler", given), UpsamplerTrainConfig)

        def dying(stage: UpsamplerStage, *args: Any) -> None:
            if stage.global_step == step:
                raise KeyError("killed")
            getattr(Stage, dies_at)(stage, *args)

        with monkeypatch.context() as context:
            if dies_at:
                context.setattr(UpsamplerStage, dies_at, dying)
            with pytest.raises(KeyError, match="killed") if dies_at else contextlib.nullcontext():
                train(cfg)
        rows = [json.loads(line) for line in (data / f"validation/{name}/metrics.jsonl").read_text().splitlines()]
        return {s: [row["val/mse"] for row in rows if row["step"] == s and "val/mse" in row] for s in (4, 8, 12)}

    whole = trained("whole")
    assert [len(found) for found in whole.values()] == [1, 1, 1]
    assert not trained("before", "on_validation_start", 8)[8]
    assert trained("before") == whole
    assert trained("after", "on_train_batch_start", 8)[8] == whole[8]
    assert trained("after") == whole
    assert not trained("last", "on_validation_start", 12)[12]
    assert trained("last") == whole


def test_a_second_sigint_ends_at_once_if_the_first_does_not_help(monkeypatch: pytest.MonkeyPatch):
    """But not one that a launcher passes on after the terminal's own."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("unclip.callbacks.time.monotonic", lambda: clock.now)
    stop = StopOnLimitOrSignal(None)  # type: ignore[arg-type]
    stop._note(signal.SIGINT, None)
    clock.now = 102.9
    stop._note(signal.SIGINT, None)
    assert stop.received == signal.SIGINT
    clock.now = 103.1
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(number: signal.Signals, workers: int, data: Path):
    """A terminal and SLURM signal a loader's workers too."""
    run = f"signal/{number.name}-{workers}"
    given = [*arguments("upsampler", run), f"data.num_workers={workers}"]
    checkpoint = data / run / "checkpoints" / "last.ckpt"
    seen_at, code = stop_in_training(given, data, checkpoint, number)
    assert code == 128 + number
    stopped_at = torch.load(checkpoint, weights_only=True)["global_step"]
    assert seen_at <= stopped_at < STEPS
    run_command(*given, cwd=data)
    run_command(*arguments("upsampler", "signal/none"), cwd=data)
    weights = [(data / path / "artifact" / "weights.safetensors").read_bytes() for path in (run, "signal/none")]
    assert weights[0] == weights[1]


def test_killed_and_resumed_embeddings_equal_uninterrupted_ones(data: Path):
    run_command("unclip", "data", "shapes", "--out", "more", "--num", "3000", "--size", "32", cwd=data)
    given = ["unclip-embed", "run=cut/embeddings", "clip=clip", "data=more", "batch_size=8"]
    with subprocess.Popen(
        [command(given[0]), *given[1:]], cwd=data, env=environment(), stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if list((data / "cut/embeddings").glob("*/*/keys.txt")):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the command ended before it could be killed"
    run_command(*given, cwd=data)
    run_command("unclip-embed", "run=whole/embeddings", *given[2:], cwd=data)
    whole, cut = (
        sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != "lock")
        for folder in (data / "whole/embeddings", data / "cut/embeddings")
    )
    assert whole == cut
    for name in whole:
        assert (data / "whole/embeddings" / name).read_bytes() == (data / "cut/embeddings" / name).read_bytes(), name
