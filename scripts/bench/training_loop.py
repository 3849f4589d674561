"""What our training loop costs beside the step itself: Lightning and callbacks, two ranks for one process, checkpoints.

Sides take turns: the loop (``train`` on its own data, with metrics, watchdog and progress) and a bare loop of the same step over
the same batches; two gloo ranks of one thread and one process of two threads on the same global batch. A checkpoint's stall is
what holds training up (the copy), and at worst also the whole write, as if training stood still for it; both are divided by the
default number of steps between two checkpoints.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from turns import ROUNDS, ratio, report, size_from_command_line, take_turns

from unclip.artifact import read_manifest
from unclip.checkpoint import Writer
from unclip.config import LoggerConfig, LoggerName, OptimConfig, Precision, TrainerConfig
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.shapes import write_shapes
from unclip.diffusion.noise import Noise
from unclip.models import UpsamplerConfig, build
from unclip.nets.unet import UNetConfig
from unclip.optim import AdamWEMA, clip_gradients, learning_rate, make_optimizer
from unclip.train import UpsamplerTrainConfig, train

WORKER = "UNCLIP_BENCH_WORKER"  # size, folder and ranks, for a process that only trains
SIZES = {  # steps, batch, channels, side in pixels
    "smoke": (4, 8, (16, 32), 32),
    "quick": (24, 16, (48, 96), 64),
    "full": (80, 16, (48, 96), 64),
}


def config(size: str, root: Path) -> UpsamplerTrainConfig:
    """An upsampler on generated shapes: convolutions, as in most of the chain, and no other stage before it."""
    steps, batch, channels, side = SIZES[size]
    net = UNetConfig(channels=list(channels), num_blocks=1, groups=8)
    return UpsamplerTrainConfig(
        run=str(root / "run"),
        data=DataConfig(path=str(root / "data"), image_size=side, max_val=batch, cache=True),
        trainer=TrainerConfig(
            max_steps=steps,
            batch_size=batch,
            precision=Precision.fp32,
            val_every=steps + 1,
            accelerator="cpu",
            num_samples=1,
        ),
        optim=OptimConfig(warmup_steps=10),
        logger=LoggerConfig(name=LoggerName.none),
        model=UpsamplerConfig(
            net=net, low_size=side // 2, image_size=side, crop_fraction=0.5 if size == "smoke" else 1.0
        ),
    )


def by_the_loop(cfg: UpsamplerTrainConfig) -> float:
    """Seconds of training a fresh run, from its first step to the end of its last."""
    shutil.rmtree(cfg.run, ignore_errors=True)
    return float(read_manifest(train(cfg)).metrics["seconds"])


def by_a_bare_loop(cfg: UpsamplerTrainConfig) -> tuple[float, torch.nn.Module, AdamWEMA]:
    """The same step on the same batches, written down in one piece."""
    torch.manual_seed(cfg.seed)
    data = UnclipData(cfg.data, cfg.seed, cfg.trainer.batch_size, needs=cfg.model.columns)
    model = build(cfg.model, data.interface)
    model.fit(None)
    parameters, optimizer = list(model.parameters()), make_optimizer(model, cfg.optim)
    batches = iter(data.train_dataloader())
    before = time.perf_counter()
    for step in range(cfg.trainer.max_steps):
        batch = next(batches)
        terms = model.losses(batch, Noise.at(cfg.seed, batch.position, "cpu"))
        torch.stack(list(terms.values())).sum().backward()
        clip_gradients(parameters, cfg.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, step, step / cfg.trainer.max_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - before, model, optimizer


def in_processes(size: str, root: Path, ranks: int) -> float:
    """The loop in ``ranks`` processes that share two threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks), WORKER: json.dumps([size, str(root), ranks])}
    command = [sys.executable, __file__]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, __file__]
    shutil.rmtree(root / "run", ignore_errors=True)
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    return float(read_manifest(root / "run").metrics["seconds"])


def work(size: str, root: str, ranks: int) -> None:
    """One of the processes of :func:`in_processes`."""
    cfg = config(size, Path(root))
    cfg.trainer.devices, cfg.trainer.strategy = ranks, "ddp" if ranks > 1 else "auto"
    train(cfg)


def checkpoint_seconds(model: torch.nn.Module, optimizer: AdamWEMA, path: Path) -> tuple[float, float]:
    """Seconds that a checkpoint holds training up, and seconds until it is on disk."""
    writer = Writer()
    before = time.perf_counter()
    writer.save_checkpoint({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
    copied = time.perf_counter()
    writer.wait()
    return copied - before, time.perf_counter() - before


def main() -> None:
    size = size_from_command_line(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cfg = config(size, root)
        write_shapes(root / "data", num=cfg.trainer.batch_size * 8, size=cfg.model.image_size, workers=1)
        held, written = [], []

        def bare() -> float:
            seconds, model, optimizer = by_a_bare_loop(cfg)
            for found, value in zip(
                (held, written), checkpoint_seconds(model, optimizer, root / "c.ckpt"), strict=True
            ):
                found.append(value)
            return seconds

        sides = {"bare": bare, "loop": lambda: by_the_loop(cfg)}
        sides["one"] = lambda: in_processes(size, root, 1)
        sides["two"] = lambda: in_processes(size, root, 2)
        found = take_turns(sides, ROUNDS[size])
        megabytes = (root / "c.ckpt").stat().st_size / 1e6
    between = [TrainerConfig().checkpoint_every * wall / cfg.trainer.max_steps for wall in found["loop"]]
    ratios = {
        "loop_vs_bare": ratio(found["bare"], found["loop"]),
        "two_ranks_vs_one": ratio(found["one"], found["two"]),
    }
    ratios["checkpoint_stall_share"] = ratio(held, between)
    ratios["checkpoint_write_share"] = ratio(written, between)
    steps, batch, channels, side = SIZES[size]
    settings = {"size": size, "steps": steps, "batch": batch, "channels": list(channels), "side": side}
    settings |= {"checkpoint_MB": round(megabytes, 1), "step_s": round(float(np.median(found["loop"])) / steps, 4)}
    settings |= {f"{name}_s": round(float(np.median(values)), 3) for name, values in found.items()}
    report("training_loop", ratios, settings)


if __name__ == "__main__":
    if WORKER in os.environ:
        work(*json.loads(os.environ[WORKER]))
    else:
        main()
