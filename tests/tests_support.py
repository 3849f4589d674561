"""Running the commands as a user does, and settings small enough for tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

_SHORT = ["trainer.max_steps=4", "trainer.batch_size=8", "trainer.log_every=2", "trainer.checkpoint_every=1"]
_SHORT += ["trainer.num_samples=2", "data.max_val=8", "optim.warmup_steps=2", "optim.lr=1e-3"]
_UNET = ["model.net.channels=[16,32]", "model.net.num_blocks=1", "model.net.groups=8", "model.diffusion.predict=v"]
_STEPS = ["model.sampling.sampler.name=ddim", "model.sampling.sampler.num_steps=2"]

TINY = {
    "clip": [
        *_SHORT,
        *("model.image_size=16", "model.patch_size=8", "model.embed_dim=16", "data.image_size=16"),
        *("model.vision_width=32", "model.vision_layers=1", "model.vision_heads=2", "model.vision_blocks=null"),
        *("model.text_width=32", "model.text_layers=1", "model.text_heads=2"),
    ],
    "prior": [
        *_SHORT,
        *(
            "model.net.width=32",
            "model.net.depth=1",
            "model.net.num_heads=2",
            "model.net.text=tokens",
            "data.image_size=16",
        ),
        *_STEPS,
    ],
    "ar_prior": [
        *_SHORT,
        *("model.net.width=32", "model.net.depth=1", "model.net.num_heads=2", "data.image_size=16"),
        *("model.net.text.width=32", "model.net.text.depth=1", "model.net.text.num_heads=2", "model.num_buckets=8"),
    ],
    "decoder": [
        *_SHORT,
        *_UNET,
        *_STEPS,
        *("model.image_size=16", "model.net.attention_levels=[1]", "model.net.head_dim=16", "data.image_size=16"),
        *("model.conditioning.text=transformer", "model.conditioning.context_dim=32", "model.net.dropout=0.1"),
        *("model.conditioning.transformer.width=32", "model.conditioning.transformer.depth=1"),
        *("model.conditioning.transformer.num_heads=2",),
    ],
    "upsampler": [
        *_SHORT,
        *_UNET,
        *_STEPS,
        *("model.low_size=16", "model.image_size=32", "model.crop_fraction=0.5"),
    ],
}


def command(name: str) -> str:
    """The console script beside the running Python."""
    return str(Path(sys.executable).parent / name)


def environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def run_command(*arguments: str, cwd: Path, code: int = 0, seconds: float = 240) -> str:
    """Run one command, check its exit code, and return what it printed."""
    done = subprocess.run(
        [command(arguments[0]), *arguments[1:]],
        cwd=cwd, capture_output=True, text=True, timeout=seconds, env=environment(), check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == code, f"{' '.join(arguments)} ended with {done.returncode}:\n{said[-3000:]}"
    return said


def lacks(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where UNCLIP_REQUIRE names ``what`` it lacks."""
    (pytest.fail if what in os.environ.get("UNCLIP_REQUIRE", "").split(",") else pytest.skip)(reason)


class Canary:
    """Makes the folder ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def kill_beyond(step: int, checkpoint: Path, arguments: list[str], cwd: Path) -> int:
    """Start a command and kill it once a checkpoint beyond ``step`` stands; the step of the one that it leaves."""
    with subprocess.Popen(
        [command(arguments[0]), *arguments[1:]], cwd=cwd, env=environment(), stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and process.poll() is None:
            if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["global_step"] > step:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return torch.load(checkpoint, weights_only=True)["global_step"]
            time.sleep(0.01)
        process.kill()
        said = process.stderr.read().decode() if process.stderr else ""
    raise AssertionError(f"no checkpoint beyond step {step}; the command said:\n{said[-3000:]}")
