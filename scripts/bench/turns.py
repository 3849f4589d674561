"""What the benchmarks share: sides that take turns in one run, and one JSON line with each ratio's spread.

A benchmark is a script ``scripts/bench/NAME.py`` with ``--smoke`` (tiny sizes, under a minute), ``--quick`` (the stated
sizes, two rounds, at most 8 minutes) and no flag (the stated sizes, five rounds).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = {"smoke": 1, "quick": 2, "full": 5}


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser that sets ``size`` to "smoke", "quick" or "full", for a benchmark that has settings of its own."""
    parser = argparse.ArgumentParser(description=description)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--smoke", action="store_const", const="smoke", dest="size", help="tiny sizes, under a minute")
    choice.add_argument("--quick", action="store_const", const="quick", dest="size", help="stated sizes, two rounds")
    parser.set_defaults(size="full")
    return parser


def size_from_command_line(description: str) -> str:
    """One of "smoke", "quick" and "full"."""
    return command_line(description).parse_args().size


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; waits for a GPU's queued work."""
    _wait()
    before = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - before


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every side once a round, A B A B …, so that a slow minute of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
            print(f"round {number + 1}/{rounds}: {name} {found[name][-1]:.4g}", file=sys.stderr, flush=True)
    return found


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of over / under, round by round."""
    values = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(name: str, ratios: dict[str, dict[str, float]], settings: dict[str, Any]) -> None:
    """Print the one JSON object that is a benchmark's last line."""
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    rounded = {key: {k: round(v, 4) for k, v in spread.items()} for key, spread in ratios.items()}
    print(json.dumps({"benchmark": name, **rounded, "settings": {**settings, **machine}}))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
