"""The diffusion prior against diffusers and dalle2-pytorch: sampling, training steps, noise draws, memory.

Every side is a worker process (peer_worker.py) and works while the others wait. dalle2-pytorch runs in .venv-peer, which
``make bench`` makes; without it those ratios are left out, unless UNCLIP_REQUIRE names "peer".
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from turns import ROUNDS, ratio, report, size_from_command_line, take_turns

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parents[1] / ".venv-peer" / "bin" / "python"
FULL = 77
TOLERANCE = 0.03  # of the number of parameters

SIZES: dict[str, dict[str, int]] = {
    "stated": {"width": 512, "depth": 6, "heads": 8, "batch": 64, "captions": 8, "steps": 64, "repeats": 3},
    "smoke": {"width": 64, "depth": 2, "heads": 2, "batch": 4, "captions": 2, "steps": 3, "repeats": 1},
}
DRAWS, CANDIDATES, GUIDANCE = 8, 2, 3.0

# Tokens with start and end: how many of the 14,396 captions of `unclip data emoji` have 7, 8, … 22
EMOJI = [78, 864, 1818, 1862, 1390, 1094, 1378, 1394, 1464, 1270, 784, 576, 240, 122, 46, 16]

DIFFERENCES = {
    "all": "same captions, states of a frozen CLIP, stored; bf16 autocast; clipping, fused AdamW and EMA by the same code",
    "unclip": "captions as long as the longest of the batch; guidance in one forward; ancestral sampling",
    "diffusers": "the same architecture and parameters; 77 positions always; guidance in one forward, with "
    "UnCLIPScheduler, as its pipelines do",
    "dalle2_pytorch": "77 positions always; one key and value head, cosine-similarity attention, rotary and relative "
    "positions, SwiGLU (its width set for equal parameters): its only form; guidance in two forwards; DDIM with eta 1",
}


class Side:
    """A worker process and the questions it answers. Raises RuntimeError with the worker's own words when it fails."""

    def __init__(self, name: str, python: Path | str, worker: str = "peer_worker.py") -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        command = [str(python), str(HERE / worker), name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self.requests.write(json.dumps({"do": what, **request}) + "\n")
            self.requests.flush()
        line = self.answers.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the {self.name} side stopped at {what!r}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.process.wait()
        self.answers.close()
        self.log.close()


def main() -> None:
    size = size_from_command_line(str(__doc__))
    numbers = SIZES["smoke" if size == "smoke" else "stated"]
    rounds = ROUNDS[size]
    with contextlib.ExitStack() as stack:
        sides = start(stack)
        built = build(sides, numbers)
        megabytes, ratios = memory(sides, numbers)
        ratios = sampling(sides, numbers, rounds) | training(sides, numbers, rounds) | ratios
    settings = {
        **numbers,
        "rounds": rounds,
        "candidates": CANDIDATES,
        "guidance": GUIDANCE,
        "draws": DRAWS,
        "built": built,
        "lengths": {kind: spread(caption_lengths(kind, numbers["batch"])) for kind in ("emoji", "coco")},
        "megabytes": megabytes,
        "sides": {name: said for name, said in DIFFERENCES.items() if name == "all" or name in sides},
    }
    report("prior", ratios, settings)


def caption_lengths(kind: str, count: int) -> list[int]:
    """Tokens of ``count`` captions, start and end included. coco: made up, 9 + Poisson(3); full: 77, nothing to trim."""
    chance = random.Random(0)
    if kind == "emoji":
        return chance.choices(range(7, 7 + len(EMOJI)), weights=EMOJI, k=count)
    if kind == "coco":
        return [9 + sum(chance.random() < 0.01 for _ in range(300)) for _ in range(count)]
    return [FULL] * count


def spread(lengths: list[int]) -> dict[str, float]:
    return {"mean": round(sum(lengths) / len(lengths), 1), "max": max(lengths)}


def start(stack: contextlib.ExitStack) -> dict[str, Side]:
    """The sides' processes, not built yet; they end with ``stack``."""
    pythons: dict[str, Path | str] = {"unclip": sys.executable, "diffusers": sys.executable}
    if has_peer():
        pythons["dalle2_pytorch"] = PEER_PYTHON
    sides = {name: Side(name, python) for name, python in pythons.items()}
    for side in sides.values():
        stack.callback(side.close)
    return sides


def has_peer() -> bool:
    """Whether .venv-peer is there. Raises SystemExit when it is not but must be."""
    if PEER_PYTHON.exists():
        return True
    remedy = "make it with: make .venv-peer/ready"
    if "peer" in os.environ.get("UNCLIP_REQUIRE", ""):
        raise SystemExit(f"{PEER_PYTHON} is missing, but UNCLIP_REQUIRE asks for the peer; {remedy}")
    print(f"without dalle2-pytorch, whose environment .venv-peer is missing; {remedy}", file=sys.stderr)
    return False


def build(sides: dict[str, Side], numbers: dict[str, int]) -> dict[str, dict[str, int]]:
    """Parameters and feed-forward width of each side. Raises SystemExit if the parameters differ by more than 3 %."""
    shape = {name: numbers[name] for name in ("width", "depth", "heads")}
    shape |= {"draws": DRAWS, "threads": torch.get_num_threads()}
    built: dict[str, dict[str, int]] = {}
    for name, side in sides.items():
        built[name] = side.ask("build", shape=shape)
        shape.setdefault("parameters", built[name]["parameters"])  # the peer's are made to match
    print(f"built: {built}", file=sys.stderr)
    ours = built["unclip"]["parameters"]
    if any(abs(facts["parameters"] - ours) > TOLERANCE * ours for facts in built.values()):
        raise SystemExit(f"not comparable, parameters differ by more than {TOLERANCE:.0%}: {built}; change SIZES")
    return built


def peers(sides: dict[str, Side]) -> list[str]:
    return [name for name in sides if name != "unclip"]


def memory(sides: dict[str, Side], numbers: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """MB of each side, in its own fresh process: once built, and the most that each kind of work took, in this order.

    On a GPU what torch allocated; else the largest resident size, which never falls, so the smallest work comes first.
    """
    if sys.platform != "linux" and not torch.cuda.is_available():
        return {}, {}
    how = {"steps": 2, "candidates": CANDIDATES, "guidance": GUIDANCE}
    megabytes: dict[str, dict[str, int]] = {}
    for name, side in sides.items():
        seen = megabytes[name] = {"built": round(side.ask("memory")["megabytes"])}
        side.ask("sample", lengths=caption_lengths("coco", numbers["captions"]), how=how)
        seen["sample"] = round(side.ask("memory")["megabytes"])
        for task, kind in (("train_step", "coco"), ("train_step_77", "full")):
            side.ask("train_step", lengths=caption_lengths(kind, numbers["batch"]), steps=2)
            seen[task] = round(side.ask("memory")["megabytes"])
        print(f"memory, {name}, MB: {seen}", file=sys.stderr, flush=True)
    ratios = {
        f"memory_{task}_vs_{name}": ratio([megabytes[name][task]], [megabytes["unclip"][task]])
        for task in ("sample", "train_step", "train_step_77")
        for name in peers(sides)
    }
    return megabytes, ratios


def sampling(sides: dict[str, Side], numbers: dict[str, int], rounds: int) -> dict[str, Any]:
    """Seconds of one call for all captions. The peers pad to 77, so one measurement of theirs stands for both lengths."""
    how = {"steps": numbers["steps"], "candidates": CANDIDATES, "guidance": GUIDANCE}

    def measure(side: Side, kind: str) -> Callable[[], float]:
        lengths = caption_lengths(kind, numbers["captions"])
        side.ask("sample", lengths=lengths, how={**how, "steps": 2})  # warm up
        return lambda: side.ask("sample", lengths=lengths, how=how)["seconds"]

    turns = {"unclip": measure(sides["unclip"], "coco"), "unclip 77": measure(sides["unclip"], "full")}
    turns |= {name: measure(sides[name], "coco") for name in peers(sides)}
    found = take_turns({f"sampling, {name}": work for name, work in turns.items()}, rounds)
    ratios = {}
    for name in peers(sides):
        theirs = found[f"sampling, {name}"]
        ratios[f"sampling_vs_{name}"] = ratio(theirs, found["sampling, unclip"])
        ratios[f"sampling_77_vs_{name}"] = ratio(theirs, found["sampling, unclip 77"])
    return ratios


def training(sides: dict[str, Side], numbers: dict[str, int], rounds: int) -> dict[str, Any]:
    """Whole steps: forward, backward, clipping, optimiser, EMA. The peers pad to 77 whatever the captions' lengths."""

    def measure(side: Side, kind: str, draws: int = 1) -> Callable[[], float]:
        request = {"lengths": caption_lengths(kind, numbers["batch"]), "draws": draws}
        side.ask("train_step", **request, steps=1)  # warm up
        return lambda: side.ask("train_step", **request, steps=numbers["repeats"])["seconds"]

    turns = {kind: measure(sides["unclip"], kind) for kind in ("emoji", "coco", "full")}
    turns["draws"] = measure(sides["unclip"], "coco", DRAWS)
    turns |= {name: measure(sides[name], "coco") for name in peers(sides)}
    found = take_turns({f"train step, {name}": work for name, work in turns.items()}, rounds)
    ratios = {}
    for name in peers(sides):
        theirs = found[f"train step, {name}"]
        emoji, coco, full, draws = (ratio(theirs, found[f"train step, {turn}"]) for turn in list(turns)[:4])
        ratios[f"train_step_vs_{name}"] = min(emoji, coco, key=lambda spread: spread["median"])
        ratios[f"train_step_emoji_vs_{name}"], ratios[f"train_step_coco_vs_{name}"] = emoji, coco
        ratios[f"train_step_77_vs_{name}"] = full
        ratios[f"draws_vs_{name}"] = {of: DRAWS * value for of, value in draws.items()}
    return ratios


if __name__ == "__main__":
    main()
