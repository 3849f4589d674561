"""How long we train to be as good as dalle2-pytorch after its whole budget: prior and decoder, equal data, sizes and seconds.

    python scripts/bench/peer_quality.py --data DATA/64 --embeddings EMBEDDINGS --clip CLIP [--only prior] [--untuned]

DATA, EMBEDDINGS and CLIP as scripts/emoji.sh leaves them. Every training run is a piece with a JSON file of its own in --out; the
same command again runs what is missing, so it can be stopped at any time. Each side is a worker process (quality_worker.py) in its
own environment and works while the other waits; dalle2-pytorch's is .venv-peer, without which only our side runs. Snapshots are
judged after training, off the clock. --smoke: tiny sizes on made-up arrays. docs/benchmarks.md says what the figures mean.
"""

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quality_arrays
import torch
from prior import PEER_PYTHON, TOLERANCE, Side, has_peer
from quality_measures import Judge
from quality_pieces import (
    MEASURES,
    OURS,
    PARTS,
    THEIRS,
    TUNING_SEED,
    Piece,
    Point,
    Records,
    best_rate,
    figures,
    final,
    reaches,
    selected,
    settled,
)
from turns import report

REPOSITORY = Path(__file__).resolve().parents[2]
Rates = tuple[float, float, float]


@dataclass
class Plan:
    """What one stage does on both sides. ``curve``: steps of each side's sampler; ``readme``: those of the peer's README;
    ``fewer``: those of ours that are tried for a picture as good as the peer's."""

    stage: str
    minutes: float
    shape: dict[str, Any]
    rates: dict[str, Rates]
    curve: dict[str, int]
    readme: int
    guidance: float
    fewer: tuple[int, ...]
    every: bool
    parts: int = PARTS

    def tuning(self, side: str) -> list[Piece]:
        return [Piece(self.stage, side, self.minutes, TUNING_SEED, lr) for lr in self.rates[side]]

    def parts_of(self, piece: Piece) -> int:
        """Of a piece that only chooses a learning rate the end is enough."""
        return 1 if piece.seed == TUNING_SEED else self.parts

    def next_point(self, piece: Piece, points: Sequence[Point], rival: Sequence[Point]) -> tuple[int, int] | None:
        """Part and steps of the sampler that are to be judged next; None when the piece is done.

        The peer: its end with the README's steps, then end and middle with fewer. Ours: the end, then part after part until
        two in a row have surely reached the end of the ``rival``, the peer's piece; without one the middle. With ``every`` all
        parts of both. Then our end with ``fewer`` steps, until it has reached the rival's.
        """
        goal = final(rival)[1] if rival else None
        parts, steps = self.parts_of(piece), self.curve[piece.side]
        wanted = [(parts, steps), (-(-parts // 2), steps)]
        if self.every or (piece.side == OURS and goal is not None):
            wanted = [(part, steps) for part in (parts, *range(1, parts))]
        curve = [point for point in points if point.steps == steps]
        if piece.side == OURS and goal is not None and settled(curve, rival) and not self.every:
            wanted = wanted[:1]
        if piece.side == THEIRS and piece.seed != TUNING_SEED:
            wanted.insert(0, (parts, self.readme))
        if piece.side == OURS and goal is not None:
            reached = {p.steps for p in points if p.part == parts and reaches(p.values, goal)}
            wanted += [(parts, few) for few in self.fewer if not reached or few <= min(reached)]
        judged = {(point.part, point.steps) for point in points}
        return next((point for point in wanted if point not in judged), None)


def plans(smoke: bool, minutes: float | None, every: bool = False) -> list[Plan]:
    shapes: dict[str, dict[str, Any]] = {
        "prior": {"parameters": 3_000_000, "width": 232, "depth": 4, "heads": 4, "peer_head_dim": 64, "batch": 128},
        "decoder": {
            "parameters": 4_000_000,
            "channels": [48, 64, 96, 96],
            "attention_levels": [1, 2],
            "head_dim": 32,
            "peer_dim": 16,
            "peer_mults": [1, 2, 4, 7],  # the README's end with 8: 4.37 million parameters
            "batch": 48,
        },
    }
    budgets = {"prior": 5.0, "decoder": 20.0}
    if smoke:
        shapes["prior"] |= {"parameters": 32_000, "width": 32, "depth": 2, "heads": 2, "peer_head_dim": 8, "batch": 16}
        shapes["decoder"] |= {"parameters": 264_000, "channels": [16, 32], "attention_levels": [1], "batch": 8}
        shapes["decoder"] |= {"peer_dim": 8, "peer_mults": [1, 2]}
        budgets = dict.fromkeys(budgets, 0.4 / 60)
    rates: dict[str, dict[str, Rates]] = {
        "prior": {OURS: (1.7e-4, 5e-4, 1.5e-3), THEIRS: (1e-4, 3e-4, 9e-4)},
        "decoder": {OURS: (5e-4, 1.5e-3, 4.5e-3), THEIRS: (1e-4, 3e-4, 9e-4)},
    }
    steps = {
        "prior": ({OURS: 16, THEIRS: 16}, 64, 1.0, ()),
        "decoder": ({OURS: 16, THEIRS: 20}, 250, 2.0, (2, 3, 4, 6, 8, 12)),
    }
    if smoke:
        steps = {stage: ({OURS: 3, THEIRS: 3}, 4, scale, fewer[:1]) for stage, (_, _, scale, fewer) in steps.items()}
    return [
        Plan(stage, minutes or budgets[stage], shapes[stage], rates[stage], *steps[stage], every, 4 if smoke else PARTS)
        for stage in MEASURES
    ]


class Bench:
    """The pieces of all stages, trained and judged where that is missing. ``arrays``: a folder of quality_arrays.py."""

    def __init__(
        self, choice: argparse.Namespace, arrays: Path, facts: dict[str, Any], workers: dict[str, Side]
    ) -> None:
        self.choice, self.arrays, self.facts, self.workers = choice, arrays, facts, workers
        self.records, self.judge = Records(choice.out), Judge(arrays)

    def run(self, plan: Plan) -> dict[str, list[tuple[Piece, list[Point]]]]:
        """Train and judge one stage; by side the pieces that are complete then with their points, in the order of their seeds."""
        rates = self.rates(plan)
        measured: list[Piece] = []
        for seed in range(
            self.choice.seeds
        ):  # each is trained and judged before the next one, for there may be no more time
            turn = list(rates) if seed % 2 == 0 else list(rates)[::-1]
            pair = [Piece(plan.stage, side, plan.minutes, seed, rates[side]) for side in turn]
            for piece in pair:
                self.train(plan, piece, pair)
            rival: list[Point] = []
            for piece in sorted(pair, key=lambda piece: piece.side == OURS):  # ours is judged until it reaches the peer
                if self.judged(plan, piece, rival) and piece.side == THEIRS:
                    rival = self.records.points(piece)
            measured += pair
        complete = self.records.complete().get(plan.stage, {})
        return {
            side: [(piece, points) for piece, points in complete.get(side, []) if piece in measured] for side in rates
        }

    def rates(self, plan: Plan) -> dict[str, float]:
        """The learning rate of each side: the best of three on a seed of its own, or untuned the middle one. A side is missing
        where --only left out some of its tuning."""
        if self.choice.untuned:
            return {side: plan.rates[side][1] for side in self.workers}
        tuning = [piece for lrs in zip(*map(plan.tuning, self.workers), strict=True) for piece in lrs]
        for piece in tuning:
            self.train(plan, piece, tuning)
        found = {}
        for side in self.workers:
            complete = [piece for piece in plan.tuning(side) if self.judged(plan, piece, [])]
            if len(complete) == len(plan.rates[side]):
                finals = {piece.lr: final(self.records.points(piece))[1] for piece in complete}
                found[side] = best_rate(finals, plan.stage)
                tried = "; ".join(f"{lr:g}: {brief(values)}" for lr, values in finals.items())
                say(f"{plan.stage}, {side}: learning rate {found[side]:g} of {tried}")
            else:
                say(f"{plan.stage}, {side}: no learning rate chosen yet; run without --only, or with --untuned")
        return found

    def train(self, plan: Plan, piece: Piece, mates: Sequence[Piece]) -> None:
        """SystemExit where the model has not the stated number of parameters, and where one of the ``mates``, with which it is
        compared, was trained on another CLIP's embeddings or another machine."""
        if not selected(piece.name, self.choice.only) or self.known(plan, piece) is not None:
            return
        here = self.origin()
        for mate in mates:
            there = self.known(plan, mate)
            for what in ("clip", "machine") if there is not None else ():
                if there[what] != here[what]:
                    raise SystemExit(
                        f"{piece.name} is compared with {self.records.path(mate)}, which is of another {what} ({there[what]}, here "
                        f"{here[what]}): go on with that one, or remove the file"
                    )
        say(f"training {piece.name}, {piece.minutes:g} minutes")
        recipe = {
            "built": self.build(plan, piece),
            "sampling": {"curve": plan.curve, "readme": plan.readme, "guidance": plan.guidance},
        }
        self.records.refuse_unlike(piece, recipe)
        found = self.workers[piece.side].ask(
            "train", seconds=60 * piece.minutes, lr=piece.lr, seed=piece.seed, parts=plan.parts_of(piece),
            folder=str(self.scratch(piece)),
        )  # fmt: skip
        self.records.write(piece, {**here, **recipe, "training": found, "shape": plan.shape, "points": []})

    def judged(self, plan: Plan, piece: Piece, rival: Sequence[Point]) -> bool:
        """Judge the snapshots that are wanted; whether the piece is complete then. SystemExit for another CLIP's snapshots and for
        a model that is built otherwise than the one that was trained."""
        record = self.known(plan, piece)
        if record is None:
            return False
        built = False
        while (wanted := plan.next_point(piece, self.records.points(piece), rival)) is not None:
            if not selected(piece.name, self.choice.only):
                return False
            part, steps = wanted
            weights, drawn = self.scratch(piece) / f"{part}.pt", self.scratch(piece) / "drawn.npy"
            if not weights.exists():
                path = self.records.path(piece)
                raise SystemExit(
                    f"{weights} is gone, but {path} wants it judged: remove {path} to train that piece again"
                )
            if record["clip"] != self.facts["clip"]:
                raise SystemExit(
                    f"{self.records.path(piece)} is not wholly judged, and of another CLIP ({record['clip'][:8]}): give that one's "
                    "--embeddings and --clip, or remove the file to train the piece again"
                )
            if not built:
                now = self.build(plan, piece)
                if now != record["built"]:
                    raise SystemExit(
                        f"{self.records.path(piece)} was built otherwise ({record['built']}, now {now}): remove it to train again"
                    )
                built = True
            how = {"steps": steps, "guidance": plan.guidance, "candidates": 2}
            took = self.workers[piece.side].ask("sample", weights=str(weights), how=how, out=str(drawn))["seconds"]
            values, halves = self.judge(piece.stage, np.load(drawn))
            seconds = record["training"]["snapshots"][part - 1]["seconds"]
            self.records.add(piece, Point(part, seconds, steps, took, values, halves))
            say(
                f"{piece.name}, part {part} after {seconds:.0f} s, {steps} steps: {brief(values)}; drawn in {took:.0f} s"
            )
        if (
            piece.side == THEIRS or rival or len(self.workers) == 1
        ):  # ours is done once it was judged against the peer's
            self.records.change(piece, complete=True)
        return True

    def build(self, plan: Plan, piece: Piece) -> dict[str, Any]:
        built = self.workers[piece.side].ask(
            "build", stage=piece.stage, arrays=str(self.arrays), shape=plan.shape, threads=torch.get_num_threads(),
            seed=piece.seed,
        )  # fmt: skip
        check_size(piece, built["parameters"], plan.shape["parameters"])
        return built

    def known(self, plan: Plan, piece: Piece) -> dict[str, Any] | None:
        """The piece's record; SystemExit if it is of other pictures or other sizes."""
        record = self.records.read(piece)
        for what, here in (("data", self.facts["fingerprint"]), ("shape", plan.shape)) if record is not None else ():
            if record[what] != here:
                raise SystemExit(
                    f"{self.records.path(piece)} is of other {what} ({record[what]}, here {here}): give those that it is from, or "
                    "another --out and --scratch"
                )
        return record

    def scratch(self, piece: Piece) -> Path:
        return self.choice.scratch / piece.name

    def origin(self) -> dict[str, Any]:
        """What makes a record speak for itself."""
        return {
            "command": f"python scripts/bench/peer_quality.py {self.choice.said}",
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "data": self.facts["fingerprint"],
            "clip": self.facts["clip"],
        }


def check_size(piece: Piece, parameters: int, wanted: int) -> None:
    if abs(parameters - wanted) > TOLERANCE * wanted:
        raise SystemExit(
            f"not comparable: the {piece.stage} of {piece.side} has {parameters} parameters, more than {TOLERANCE:.0%} from "
            f"{wanted}; change its shape in plans(), which fits the emoji CLIP's widths"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on made-up arrays, under a minute")
    parser.add_argument("--data", type=Path, help="shards with the splits train, val, test and test_styles")
    parser.add_argument("--embeddings", type=Path, help="of all of them, by unclip-embed")
    parser.add_argument("--clip", type=Path, help="the CLIP that made them, where they hold no text_seq")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="pieces whose names hold all these words")
    parser.add_argument("--minutes", type=float, help="of training a side, instead of 5 (prior) and 20 (decoder)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--untuned", action="store_true", help="take the middle learning rate of each side")
    parser.add_argument(
        "--every", action="store_true", help="judge all snapshots of both sides: whole curves, for hours"
    )
    parser.add_argument("--out", type=Path, help="for the pieces' files; default docs/results/peer_quality")
    parser.add_argument("--scratch", type=Path, help="for arrays and snapshots; default runs/peer_quality")
    choice = parser.parse_args()
    if choice.seeds < 1 or (choice.minutes is not None and choice.minutes <= 0):
        parser.error("--seeds and --minutes must be positive")
    if not choice.smoke and (choice.data is None or choice.embeddings is None):
        parser.error("give --data and --embeddings, as scripts/emoji.sh makes them, or --smoke")
    choice.out = choice.out or REPOSITORY / "docs" / "results" / "peer_quality"
    choice.scratch = choice.scratch or REPOSITORY / "runs" / "peer_quality"
    choice.said = "--data DATA/64 --embeddings EMBEDDINGS --clip CLIP"  # the places themselves mean nothing elsewhere
    choice.said += "".join(f" --{name} {vars(choice)[name]:g}" for name in ("minutes", "seeds") if vars(choice)[name])
    choice.said += " --untuned" if choice.untuned else ""
    return choice


def main() -> None:
    choice = arguments()
    with contextlib.ExitStack() as stack:
        if choice.smoke:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            choice.seeds, choice.out, choice.scratch = 1, place / "out", place / "scratch"
            facts = quality_arrays.made_up(place / "arrays")
            arrays = place / "arrays"
        else:
            arrays = choice.scratch / "arrays"
            facts = quality_arrays.from_data(choice.data, choice.embeddings, choice.clip, arrays)
        bench = Bench(choice, arrays, facts, start(stack))
        ratios: dict[str, dict[str, float]] = {}
        complete: dict[str, list[str]] = {}
        sampling: dict[str, Any] = {}
        for plan in plans(choice.smoke, choice.minutes, choice.every):
            found = bench.run(plan)
            ratios |= figures(plan.stage, found, plan.curve[OURS], plan.readme)
            complete[plan.stage] = [piece.name for pieces in found.values() for piece, _ in pieces]
            sampling[plan.stage] = {"steps": plan.curve, "steps_readme": plan.readme, "guidance": plan.guidance}
        settings = {
            "pieces": complete,
            "sampling": sampling,
            "judged": "the peer's end with steps_readme and with steps, the better one counts, its middle with steps; our end, "
            "and our parts in order until two in a row have surely reached the peer of the same seed; with --every all parts",
            "untuned": choice.untuned,
            "data": facts,
            "interval": "of times: 95 % bootstrap over seeds and halves of the samples; else minimum and maximum of the seeds",
            "commit": commit(),
            "cpu": machine()["cpu"],
        }
    report("peer_quality", ratios, settings)


def start(stack: contextlib.ExitStack) -> dict[str, Side]:
    """The sides' processes, which end with ``stack``."""
    pythons = {OURS: sys.executable, **({THEIRS: str(PEER_PYTHON)} if has_peer() else {})}
    workers = {name: Side(name, python, "quality_worker.py") for name, python in pythons.items()}
    for worker in workers.values():
        stack.callback(worker.close)
    return workers


def commit() -> str:
    """The short hash of the checkout, with a + where files differ from it; "unknown" outside of one."""
    git = ["git", "-C", str(REPOSITORY)]
    done = subprocess.run([*git, "describe", "--always", "--exclude=*", "--dirty=+"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def brief(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
