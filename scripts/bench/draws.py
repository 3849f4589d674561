"""Whether several noise draws a caption pay: a prior's validation loss and cosine after equal seconds of training.

    python scripts/bench/draws.py --embeddings runs/embeddings --seconds 300 --seeds 3

One cell for each K = 1, 2, 4, 8 and each seed. The cells of a seed take turns in short slices; a cell's clock runs while it
trains, not while it is judged. On a machine that others use too, --cpu-time counts the seconds that one core really worked
(with OMP_NUM_THREADS=1). Without --embeddings it uses made-up ones, which say nothing about real data.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from turns import command_line, report

from unclip.config import Decay, OptimConfig
from unclip.data.batch import Batch
from unclip.data.embeddings import Embeddings, lengths
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from unclip.models.interface import Interface
from unclip.models.sampling import PriorSampling
from unclip.nets.transformer import PriorNetConfig, PriorText
from unclip.optim import clip_gradients, learning_rate, make_optimizer

DRAWS = (1, 2, 4, 8)
SECONDS = {"smoke": 0.4, "quick": 25.0, "full": 300.0}  # a cell; four cells and their judging take 2 minutes at "quick"
SLICES = {"smoke": 2, "quick": 10, "full": 20}
WIDTH = {"smoke": (32, 1, 2), "quick": (256, 4, 4), "full": (256, 4, 4)}  # width, depth, heads
JUDGED, JUDGE_DRAWS = 512, 8
Clock = Callable[[], float]
SAMPLING = PriorSampling(SamplerConfig(Sampler.ddim, 16), Guidance(1.0), num_candidates=1)
OPTIM = OptimConfig(lr=5e-4, weight_decay=0.06, warmup_steps=100, decay=Decay.cosine, ema_decay=0.995)


@dataclass
class Rows:
    """All rows of a split in memory."""

    image_emb: Tensor
    text_emb: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.image_emb)

    def batch(self, rows: Tensor, position: list[int]) -> Batch:
        tokens = self.tokens[rows]
        longest = int(lengths(tokens.numpy()).max())
        return Batch(
            position=position,
            image_emb=self.image_emb[rows],
            text_emb=self.text_emb[rows],
            tokens=tokens[:, :longest].long(),
        )


@dataclass
class Point:
    """What a cell had reached after this many seconds of its own."""

    seconds: float
    loss: float
    cosine: float


@dataclass
class Cell:
    """One prior in training. ``curve`` begins before the first step."""

    draws: int
    model: DiffusionPrior
    judge: DiffusionPrior
    seed: int
    steps: int = 0
    captions: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, OPTIM)
        self.parameters = list(self.model.parameters())

    def train(self, rows: Rows, batch_size: int, until: float, total: float, clock: Clock) -> None:
        """Steps until the cell's clock says ``until``; the learning rate falls to zero at ``total`` seconds."""
        begun = clock() - self.seconds
        while self.seconds < until:
            position = list(range(self.captions, self.captions + batch_size))
            batch = rows.batch(shuffled(position, len(rows), self.seed), position)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(OPTIM, self.steps, self.seconds / total)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.stack(list(self.model.losses(batch, Noise.at(self.seed, position)).values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(self.parameters, OPTIM.grad_clip)
            self.optimizer.step()
            self.steps += 1
            self.captions += batch_size
            self.seconds = clock() - begun

    @torch.no_grad()
    def look(self, val: Batch) -> None:
        """Add a point to the curve: averaged weights, fixed noise, the same measure for every K."""
        with self.optimizer.ema_weights():
            self.judge.load_state_dict(self.model.state_dict())
        noise = Noise.at(0, val.position)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(self.judge.losses(val, noise).values())).sum()
            drawn = self.judge.sample(self.judge.cond(val), SAMPLING, noise)
        cosine = F.cosine_similarity(drawn.float(), val.column("image_emb"), dim=1).mean()
        self.curve.append(Point(self.seconds, float(loss), float(cosine)))


def main() -> None:
    choice = arguments()
    torch.manual_seed(0)
    interface, train, val = load(choice.embeddings)
    seconds = SECONDS[choice.size] if choice.seconds is None else choice.seconds
    judged = torch.arange(min(JUDGED, len(val)))
    batch_size = min(choice.batch_size, len(train))
    clock = time.process_time if choice.cpu_time else time.perf_counter
    cells = []
    for seed in range(choice.seeds):
        made = [new_cell(draws, seed, interface, WIDTH[choice.size]) for draws in DRAWS]
        run(made, Course(train, val.batch(judged, judged.tolist()), batch_size, seconds, choice.slices, clock))
        cells += made
    print(table(cells, seconds))
    settings = {
        "embeddings": str(choice.embeddings or "made up"),
        "rows": len(train),
        "judged": len(judged),
        "seconds": seconds,
        "clock": clock.__name__,
        "seeds": choice.seeds,
        "batch": batch_size,
        "net": WIDTH[choice.size],
        "lr": OPTIM.lr,
        "curves": [curve(cell) for cell in cells],
    }
    report("draws", figures(cells), settings)


def arguments() -> argparse.Namespace:
    parser = command_line(str(__doc__).partition("\n")[0])
    parser.add_argument("--embeddings", type=Path, help="a folder of unclip-embed with train and val and their tokens")
    parser.add_argument("--seconds", type=float, help="of training for each cell")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256, help="captions a step")
    parser.add_argument("--slices", type=int, help="turns of each cell, and points on its curve")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor, not of the clock on the wall"
    )
    choice = parser.parse_args()
    choice.slices = choice.slices or SLICES[choice.size]
    if choice.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time adds up what all threads use; set OMP_NUM_THREADS=1")
    if min(choice.seeds, choice.batch_size, choice.slices) < 1 or (choice.seconds is not None and choice.seconds <= 0):
        parser.error("--seeds, --batch-size, --slices and --seconds must be positive")
    return choice


def load(folder: Path | None) -> tuple[Interface, Rows, Rows]:
    if folder is None:
        return made_up()
    splits = [Embeddings(folder, split) for split in ("train", "val")]
    columns = [{name: s.column(name) for name in ("image_emb", "text_emb", "tokens")} for s in splits]
    train, val = (
        Rows(torch.from_numpy(c["image_emb"]).float(), torch.from_numpy(c["text_emb"]).float(), as_tokens(c["tokens"]))
        for c in columns
    )
    return splits[0].interface, train, val


def as_tokens(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def made_up() -> tuple[Interface, Rows, Rows]:
    """Embeddings that depend on the caption's words and on chance: a smooth map of a bag of words, plus noise."""
    random, width, words, length = torch.Generator().manual_seed(0), 32, 50, 12
    word_emb = torch.randn(words, width, generator=random)
    turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q

    def rows(count: int) -> Rows:
        tokens = torch.randint(1, words, (count, length), generator=random)
        size = torch.randint(4, length, (count,), generator=random)
        place = torch.arange(length)
        tokens = torch.where(place < size[:, None], tokens, 0)
        text = (word_emb[tokens] * (tokens > 0)[..., None]).sum(1)
        tokens[torch.arange(count), size] = words + 1
        noise = torch.randn(count, width, generator=random)
        return Rows(torch.tanh(text @ turn) + 0.5 * noise, text, tokens)

    interface = Interface(embed_dim=width, text_width=width, context_length=length, vocab_size=words + 2)
    return interface, rows(2048), rows(256)


def new_cell(draws: int, seed: int, interface: Interface, net: tuple[int, int, int]) -> Cell:
    """All cells of a seed begin with the same weights."""
    torch.manual_seed(seed)
    width, depth, heads = net
    cfg = DiffusionPriorConfig(
        net=PriorNetConfig(width=width, depth=depth, num_heads=heads, text=PriorText.tokens), num_draws=draws
    )
    judge = replace(cfg, num_draws=JUDGE_DRAWS, drop_text=0.0)
    return Cell(draws, DiffusionPrior(cfg, interface), DiffusionPrior(judge, interface), seed)


@dataclass
class Course:
    """What all cells of a seed go through."""

    train: Rows
    val: Batch
    batch_size: int
    seconds: float
    slices: int
    clock: Clock


def run(cells: list[Cell], course: Course) -> None:
    for cell in cells:
        cell.look(course.val)
    for number in range(1, course.slices + 1):
        until = course.seconds * number / course.slices
        for cell in cells:
            cell.train(course.train, course.batch_size, until, course.seconds, course.clock)
            cell.look(course.val)
        latest = ", ".join(f"K={cell.draws} {cell.curve[-1].loss:.4f}" for cell in cells)
        print(f"seed {cells[0].seed}, slice {number}/{course.slices}: {latest}", file=sys.stderr, flush=True)


def shuffled(position: list[int], count: int, seed: int) -> Tensor:
    """The rows at these positions of the endless stream: one seeded permutation after another."""
    epochs = {p // count for p in position}
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in epochs}
    return torch.tensor([int(orders[p // count][p % count]) for p in position])


def time_to(curve: list[Point], loss: float) -> float:
    """Seconds after which the curve first lies at ``loss`` or below, between its points on a line; infinite if never."""
    for before, after in itertools.pairwise(curve):
        if after.loss <= loss:
            fraction = (before.loss - loss) / (before.loss - after.loss) if before.loss > loss else 0.0
            return before.seconds + fraction * (after.seconds - before.seconds)
    return float("inf")


def figures(cells: list[Cell]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum over the seeds. speedup_K: K = 1's seconds to its own last loss over K's to the same
    loss; 0 if K never gets there."""
    by_seed = {(cell.draws, cell.seed): cell for cell in cells}
    found: dict[str, list[float]] = {}
    for (draws, seed), cell in by_seed.items():
        one = by_seed[1, seed].curve
        found.setdefault(f"loss_{draws}", []).append(cell.curve[-1].loss)
        found.setdefault(f"cosine_{draws}", []).append(cell.curve[-1].cosine)
        if draws > 1:
            goal = one[-1].loss
            found.setdefault(f"speedup_{draws}", []).append(time_to(one, goal) / time_to(cell.curve, goal))
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }


def table(cells: list[Cell], seconds: float) -> str:
    """Means over the seeds at a quarter, a half and all of the time."""
    lines = [
        f"{'K':>2} {'steps':>7} {'draws/s':>8}" + "".join(f"  loss {p:>4}  cosine" for p in ("25%", "50%", "100%"))
    ]
    for draws in DRAWS:
        ours = [cell for cell in cells if cell.draws == draws]
        steps = statistics.mean(cell.steps for cell in ours)
        text = f"{draws:>2} {steps:>7.0f} {statistics.mean(rate(cell) for cell in ours):>8.0f}"
        for part in (0.25, 0.5, 1.0):
            points = [next(p for p in cell.curve if p.seconds >= part * seconds) for cell in ours]
            text += f" {statistics.mean(p.loss for p in points):>10.4f}"
            text += f" {statistics.mean(p.cosine for p in points):>7.4f}"
        lines.append(text)
    return "\n".join(lines)


def rate(cell: Cell) -> float:
    """Noise draws a second."""
    return cell.captions * cell.draws / cell.seconds


def curve(cell: Cell) -> dict[str, Any]:
    points = [[round(p.seconds, 2), round(p.loss, 5), round(p.cosine, 4)] for p in cell.curve]
    return {"draws": cell.draws, "seed": cell.seed, "steps": cell.steps, "seconds_loss_cosine": points}


if __name__ == "__main__":
    main()
