"""One side of scripts/bench/peer_quality.py in a process of its own: JSON lines in on stdin, JSON lines out on stdout.

    python quality_worker.py SIDE          SIDE: unclip or dalle2_pytorch

Requests, each with one answer: {"do": "build", "stage": …, "arrays": …, "shape": …, "threads": n}, {"do": "train", …} and
{"do": "sample", …}, see :class:`Worker`. Runs in the environment of its side, so it imports nothing but numpy and torch until
it knows which one that is. Both sides see the same rows in the same order.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peer_worker import now, serve
from torch import Tensor

DRAWN_AT_ONCE = 125


class Rows:
    """The columns of one split, memory-mapped (quality_arrays.py)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._columns = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}

    def __len__(self) -> int:
        return len(self._columns["tokens"])

    def take(self, rows: np.ndarray, *names: str) -> list[Tensor]:
        """The named columns at ``rows``: pictures as uint8, tokens as int64, all others as float32."""
        return [self._widened(torch.from_numpy(self._columns[name][rows])) for name in names]

    def _widened(self, column: Tensor) -> Tensor:
        column = column.to(self.device)
        return column.float() if column.is_floating_point() else column


class Side(Protocol):
    """What a worker asks of a stage of a project. ``batch`` rows are one step."""

    def build(self, facts: dict[str, Any], shape: dict[str, Any]) -> torch.nn.Module:
        """A new model for arrays of these ``facts``; what a search chose stands in ``chosen`` then."""
        ...

    def start(self, lr: float, seed: int) -> None:
        """Make the optimiser and the average of the model's weights."""
        ...

    def step(self, rows: Rows, chosen: np.ndarray, positions: list[int], progress: float) -> None:
        """One whole step on the ``chosen`` rows, which stand at ``positions`` of the endless stream; progress in [0, 1)."""
        ...

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, as :meth:`load` takes them."""
        ...

    def load(self, weights: dict[str, Tensor]) -> None: ...

    def sample(self, rows: Rows, chosen: np.ndarray, how: dict[str, Any]) -> Tensor:
        """z_i (B, D), or uint8 pictures (B, 3, H, W), with the weights that were loaded."""
        ...


class Worker:
    """A side's stage, once built; answers requests."""

    def __init__(self, name: str) -> None:
        self.name, self.driver = name, os.getppid()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build(self, stage: str, arrays: str, shape: dict[str, Any], threads: int, seed: int = 0) -> dict[str, Any]:
        """The number of parameters, and what a search chose to reach it."""
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        folder = Path(arrays)
        facts = json.loads((folder / "arrays.json").read_text())
        self.train_rows, self.eval_rows = (Rows(folder / split, self.device) for split in ("train", "eval"))
        self.side, self.shape = sides(self.name)[stage](), shape
        self.model = self.side.build(facts, shape).to(self.device)
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "chosen": self.side.chosen, "settings": self.side.settings}

    def train(self, seconds: float, lr: float, seed: int, parts: int, folder: str) -> dict[str, Any]:
        """Train for ``seconds`` of the clock, which stands still while the averaged weights of each part are saved.

        Writes ``folder``/PART.pt. Returns the steps, for each part its seconds and steps, and the seconds of CPU time: far less
        than seconds x threads, and something else was at work.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        worked = time.process_time()
        batch, clock, steps = min(self.shape["batch"], len(self.train_rows)), 0.0, 0
        saved: list[dict[str, Any]] = []
        self.side.start(lr, seed)
        self.model.train()
        while len(saved) < parts:
            self._stop_without_driver()
            before = now(self.device)
            positions = list(range(steps * batch, (steps + 1) * batch))
            self.side.step(
                self.train_rows, shuffled(positions, len(self.train_rows), seed), positions, min(clock / seconds, 1.0)
            )
            clock += now(self.device) - before
            steps += 1
            while len(saved) < parts and clock >= seconds * (len(saved) + 1) / parts:
                saved.append({"part": len(saved) + 1, "seconds": round(clock, 3), "steps": steps})
                self._save(Path(folder) / f"{len(saved)}.pt")
        worked = round(time.process_time() - worked, 3)
        return {"steps": steps, "seconds": round(clock, 3), "cpu_seconds": worked, "snapshots": saved}

    def sample(self, weights: str, how: dict[str, Any], out: str) -> dict[str, Any]:
        """Draw one sample for each evaluation row from the weights of a snapshot and write them all to ``out`` (.npy)."""
        self.side.load(torch.load(weights, map_location=self.device, weights_only=True))
        torch.manual_seed(0)
        before, drawn = now(self.device), []
        for start in range(0, len(self.eval_rows), DRAWN_AT_ONCE):
            self._stop_without_driver()
            chosen = np.arange(start, min(start + DRAWN_AT_ONCE, len(self.eval_rows)))
            with torch.autocast(self.device.type, torch.bfloat16), torch.no_grad():
                drawn.append(self.side.sample(self.eval_rows, chosen, how).cpu())
        seconds = now(self.device) - before
        np.save(out, torch.cat(drawn).numpy())
        return {"seconds": round(seconds, 4)}

    def _stop_without_driver(self) -> None:
        """A benchmark that was killed must not leave a side at work."""
        if os.getppid() != self.driver:
            raise SystemExit("the benchmark that asked for this has ended")

    def _save(self, path: Path) -> None:
        draft = path.with_suffix(".tmp")
        torch.save({name: value.cpu() for name, value in self.side.averaged().items()}, draft)
        os.replace(draft, path)


def shuffled(positions: list[int], count: int, seed: int) -> np.ndarray:
    """The rows at these positions of the endless stream: one seeded permutation after another."""
    epochs = {p // count for p in positions}
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in epochs}
    return np.array([orders[p // count][p % count] for p in positions])


def sides(name: str) -> dict[str, Any]:
    """The stages of a side, imported in its own environment."""
    if name == "unclip":
        from quality_unclip import STAGES
    else:
        from quality_dalle2 import STAGES
    return STAGES


def main() -> None:
    worker = Worker(sys.argv[1])
    serve({"build": worker.build, "train": worker.train, "sample": worker.sample})


if __name__ == "__main__":
    main()
