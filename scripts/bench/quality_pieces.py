"""The arithmetic of scripts/bench/peer_quality.py: pieces and their files, the time to a quality, and how sure it is."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PARTS = 16  # of a budget; a snapshot each
SIGN = {"cosine": 1, "recall_1": 1, "kid": -1}  # 1: more is better
MEASURES = {"prior": ("cosine", "recall_1"), "decoder": ("kid",)}
OURS, THEIRS = "unclip", "dalle2_pytorch"
TUNING_SEED = 100  # of the pieces that choose a learning rate; no measured piece has it
REPLICATES, HALVES = 2000, 100
SURE = 0.975  # of the halves, as an interval of 95 % leaves out on a side


@dataclass(frozen=True)
class Piece:
    """One training run: all that may differ between two of them."""

    stage: str
    side: str
    minutes: float
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.side}-{self.minutes:g}min-seed{self.seed}-lr{self.lr:g}"


@dataclass(frozen=True)
class Point:
    """What one snapshot reached. ``seconds``: of training until then; ``steps``: those that the sampler was asked for;
    ``drawing``: seconds in which it drew all samples.

    ``halves``: each measure on the same HALVES halves of the samples, whose spread is that of the whole (see :func:`halves`).
    """

    part: int
    seconds: float
    steps: int
    drawing: float
    values: dict[str, float]
    halves: dict[str, list[float]]


Pair = tuple[Sequence[Point], Sequence[Point]]  # our points and the peer's


class Records:
    """The pieces' JSON files in one folder; a piece is there once it is trained, its points are added one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.json"

    def read(self, piece: Piece) -> dict[str, Any] | None:
        """None for a piece that was not trained yet. SystemExit for a damaged file."""
        path = self.path(piece)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            if found["piece"] != asdict(piece):
                raise ValueError(f"it is of {found['piece']}")
        except (ValueError, KeyError) as error:
            raise SystemExit(f"{path} is damaged ({error}): remove it, and the piece is trained again") from error
        return found

    def write(self, piece: Piece, record: dict[str, Any]) -> None:
        """Complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.path(piece).with_suffix(".tmp")
        draft.write_text(json.dumps({"piece": asdict(piece), **record}, indent=1) + "\n")
        draft.replace(self.path(piece))

    def points(self, piece: Piece) -> list[Point]:
        """Of a piece that was trained, in the order of training time; none for another one."""
        record = self.read(piece)
        return [] if record is None else sorted((Point(**p) for p in record["points"]), key=lambda p: (p.part, p.steps))

    def add(self, piece: Piece, point: Point) -> None:
        record = self.read(piece)
        assert record is not None
        self.change(piece, points=[*record["points"], asdict(point)])

    def change(self, piece: Piece, **values: Any) -> None:
        record = self.read(piece)
        assert record is not None
        self.write(piece, {name: value for name, value in {**record, **values}.items() if name != "piece"})

    def refuse_unlike(self, piece: Piece, recipe: dict[str, Any]) -> None:
        """SystemExit where another piece of this stage, side and budget was made by another recipe: their figures go together, or
        one chose the other's learning rate."""
        for path in sorted(self.folder.glob(f"{piece.stage}-{piece.side}-{piece.minutes:g}min-*.json")):
            there = json.loads(path.read_text())
            for what, here in recipe.items():
                if there[what] != here:
                    raise SystemExit(
                        f"{path} was made by another recipe ({what} {there[what]}, of {piece.name} {here}): remove it to train it "
                        "again, or give another --out and --scratch"
                    )

    def refuse_mixtures(self, pieces: Iterable[Piece]) -> None:
        """SystemExit where pieces of one stage and side are of several budgets or learning rates: no figure can be made of them."""
        first: dict[tuple[str, str], Piece] = {}
        for piece in pieces:
            other = first.setdefault((piece.stage, piece.side), piece)
            if (piece.minutes, piece.lr) != (other.minutes, other.lr):
                raise SystemExit(
                    f"{self.path(piece)} and {self.path(other)} are of other budgets or learning rates: no figure can be made "
                    "of both, so keep trials in another --out"
                )

    def complete(self) -> dict[str, dict[str, list[tuple[Piece, list[Point]]]]]:
        """By stage and side the measured pieces that are wholly judged, in the order of their seeds."""
        found: dict[str, dict[str, list[tuple[Piece, list[Point]]]]] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                piece = Piece(**json.loads(path.read_text())["piece"])
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path} is damaged ({error}): remove it, and the piece is trained again") from error
            record = self.read(piece)
            if record is not None and record.get("complete") and piece.seed != TUNING_SEED:
                found.setdefault(piece.stage, {}).setdefault(piece.side, []).append((piece, self.points(piece)))
        return {
            stage: {side: sorted(of, key=lambda pair: pair[0].seed) for side, of in sides.items()}
            for stage, sides in found.items()
        }


def selected(name: str, words: Sequence[str]) -> bool:
    """Whether a piece of this name is asked for: it holds every word (no words: all are)."""
    return all(word in name for word in words)


def halves(count: int, number: int = HALVES) -> list[np.ndarray]:
    """``number`` fixed halves of ``count`` rows, drawn without replacement.

    The mean over half of n rows varies by (1/(n/2) - 1/n) s² = s²/n about the mean of all, as that varies about the truth; and
    no row occurs twice, which would bias KID.
    """
    chance = np.random.default_rng(0)
    return [np.sort(chance.permutation(count)[: max(2, count // 2)]) for _ in range(number)]


def reaches(value: dict[str, float], goal: dict[str, float]) -> bool:
    """Whether every measure of ``goal`` is reached or passed."""
    return all(SIGN[name] * value[name] >= SIGN[name] * goal[name] for name in goal)


def time_to(curve: Iterable[tuple[float, dict[str, float]]], goal: dict[str, float]) -> float:
    """Seconds of the first point (seconds, values) that reaches ``goal``, infinite if none does: nothing in between counts."""
    return next((seconds for seconds, values in curve if reaches(values, goal)), math.inf)


def settled(points: Sequence[Point], theirs: Sequence[Point]) -> bool:
    """Whether two neighbouring parts both reach what the peer's end reached, on all samples and on nearly every half of them: then
    the rest of the curve says no more about the time to it, nor about its interval."""

    def surely(point: Point) -> bool:
        on_halves = sum(reaches(_value(point, half), final(theirs, half)[1]) for half in range(HALVES))
        return reaches(point.values, final(theirs)[1]) and on_halves >= SURE * HALVES

    found = {point.part for point in points if surely(point)}
    return any(part + 1 in found for part in found)


def final(points: Sequence[Point], replicate: int | None = None) -> tuple[float, dict[str, float]]:
    """Seconds and values of the last snapshot; where several samplers drew from it, each measure's best.

    ``replicate``: on that half of the samples.
    """
    last = max(point.part for point in points)
    drawn = [point for point in points if point.part == last]
    names = drawn[0].values
    best = {name: SIGN[name] * max(SIGN[name] * _value(point, replicate)[name] for point in drawn) for name in names}
    return drawn[0].seconds, best


def drawing_speedup(readme: int, ours: Sequence[Point], theirs: Sequence[Point], replicate: int | None = None) -> float:
    """The peer's seconds of drawing with its README's steps, over ours with the fewest steps whose KID is no higher, both from
    the last snapshot; 0 if none is."""
    (peer,) = [point for point in theirs if point.steps == readme]
    last = max(point.part for point in ours)
    goal = _value(peer, replicate)
    reached = [p for p in ours if p.part == last and reaches(_value(p, replicate), goal)]
    return peer.drawing / min(reached, key=lambda point: point.steps).drawing if reached else 0.0


def drawing_speedup_at_fewest(
    readme: int, ours: Sequence[Point], theirs: Sequence[Point], replicate: int | None = None
) -> float:
    """As :func:`drawing_speedup`, but by the shortest drawing of the peer's last snapshot whose KID is no higher than that of its
    README's steps: it too may need fewer."""
    (peer,) = [point for point in theirs if point.steps == readme]
    goal = _value(peer, replicate)
    as_good = [p.drawing for p in theirs if p.part == peer.part and reaches(_value(p, replicate), goal)]
    return drawing_speedup(readme, ours, theirs, replicate) * min(as_good) / peer.drawing


def speedup(
    names: Sequence[str], ours: Sequence[Point], theirs: Sequence[Point], replicate: int | None = None
) -> float:
    """The peer's whole time over our first time at or beyond its final values of ``names``; 0 if we never get there."""
    seconds, values = final(theirs, replicate)
    goal = {name: values[name] for name in names}
    return seconds / time_to(((p.seconds, _value(p, replicate)) for p in ours), goal)


def interval(
    pairs: Sequence[Pair], ratio: Callable[[Sequence[Point], Sequence[Point], int | None], float]
) -> dict[str, float]:
    """Median over seeds of a ratio of our points and the peer's, and its 95 % bootstrap interval as min and max.

    A replicate draws as many seeds with replacement, and for all of them the same half of the samples: the last argument of
    ``ratio``, None for all samples.
    """
    chance = np.random.default_rng(0)
    by_half = np.array([[ratio(ours, theirs, half) for ours, theirs in pairs] for half in range(HALVES)])
    drawn = []
    for _ in range(REPLICATES):
        seeds = chance.integers(len(pairs), size=len(pairs))
        drawn.append(np.median(by_half[chance.integers(HALVES), seeds]))
    median = float(np.median([ratio(ours, theirs, None) for ours, theirs in pairs]))
    low, high = (float(q) for q in np.quantile(drawn, (0.025, 0.975), method="inverted_cdf"))
    return {"median": median, "min": min(low, median), "max": max(high, median)}


def figures(stage: str, pieces: dict[str, list[tuple[Piece, list[Point]]]], curve: int, readme: int) -> dict[str, Any]:
    """A stage's figures of complete pieces by side: what each side reached in the end, median, minimum and maximum of its seeds,
    and where both have seeds the ratios of time with their intervals. ``curve``: our sampler's steps; ``readme``: the peer's."""
    names, found = MEASURES[stage], {}
    for side, of in pieces.items():
        for name in names if of else ():
            judged = [[p for p in points if side == THEIRS or p.steps == curve] for _, points in of]
            ends = [final(points)[1][name] for points in judged]
            found[f"{stage}_{name}_{side}"] = {"median": float(np.median(ends)), "min": min(ends), "max": max(ends)}
    theirs = {piece.seed: points for piece, points in pieces.get(THEIRS, [])}
    pairs = [(points, theirs[piece.seed]) for piece, points in pieces.get(OURS, []) if piece.seed in theirs]
    if not pairs:
        return found
    curves = [([p for p in own if p.steps == curve], peer) for own, peer in pairs]
    found[f"{stage}_time_to_peer_quality"] = interval(curves, partial(speedup, names))
    for name in names if len(names) > 1 else ():
        found[f"{stage}_time_to_peer_{name}"] = interval(curves, partial(speedup, (name,)))
    if stage == "decoder":
        found["sampling_to_equal_kid_vs_dalle2_pytorch"] = interval(pairs, partial(drawing_speedup, readme))
        found["sampling_to_equal_kid_vs_fewest_steps"] = interval(pairs, partial(drawing_speedup_at_fewest, readme))
    return found


def best_rate(finals: dict[float, dict[str, float]], stage: str) -> float:
    """The learning rate whose last snapshot was best by the stage's first measure."""
    name = MEASURES[stage][0]
    return max(finals, key=lambda lr: SIGN[name] * finals[lr][name])


def _value(point: Point, replicate: int | None) -> dict[str, float]:
    return point.values if replicate is None else {name: of[replicate] for name, of in point.halves.items()}
