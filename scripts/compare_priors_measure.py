"""Evaluate every prior that scripts/compare_priors.sh trained, and draw with each by one decoder.

    python scripts/compare_priors_measure.py OUT --data DATA --embeddings FOLDER --splits val test_styles --chain RUNS

One process for all: what is real is looked at once. Each OUT/LABEL/seed-N gets evaluation-SPLIT.json and, with --chain,
drawn.json; what is there already is kept, if it is of the same weights and, of drawings, of the same chain and number.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from compare_priors_table import DRAWN, TRUE
from torch import Tensor

from unclip import artifact
from unclip.cli.measure import Yardstick, draw
from unclip.config import Precision
from unclip.data.datamodule import DataConfig
from unclip.drafts import write_atomic
from unclip.errors import told_to_the_user
from unclip.evaluation.prior import PriorEvaluateConfig, evaluate_prior
from unclip.pipeline import UnCLIP

BATCH = 50


def main() -> None:
    choice = arguments()
    cells = sorted(path.parent for path in choice.out.glob("*/seed-*/artifact"))
    for split in choice.splits:
        data = DataConfig(path=str(choice.data), embeddings=str(choice.embeddings), val_split=split, max_val=10_000)
        for cell in cells:
            file = cell / f"evaluation-{split}.json"
            if not is_of(file, {"hash": artifact.read_manifest(cell).hash}):
                write(file, evaluate_prior(PriorEvaluateConfig(str(cell), str(cell), seed_of(cell), data)))
    if choice.chain is not None:
        draw_all(choice, cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of the compared runs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["val"], help="splits to evaluate on")
    parser.add_argument("--chain", type=Path, help="a folder with the runs clip, decoder and upsampler*")
    parser.add_argument("--num", type=int, default=150, help="pictures of each of the splits test and test_styles")
    return parser.parse_args()


def draw_all(choice: argparse.Namespace, cells: list[Path]) -> None:
    """Every cell draws the same captions with its own seed; once, the decoder draws from the real pictures' z_i."""
    kinds = ("clip", "decoder", "upsampler")
    runs = [path for path in sorted(choice.chain.iterdir()) if artifact.is_there(path)]
    others = [path for path in runs if artifact.kind_named(path.name) in kinds]
    chain = {"chain": [artifact.read_manifest(path).hash for path in others], "asked": choice.num}
    origins = {cell: {**chain, "prior": artifact.read_manifest(cell).hash} for cell in cells}
    todo = [cell for cell in cells if not is_of(cell / f"{DRAWN}.json", origins[cell])]
    if not todo and is_of(choice.out / TRUE, chain):
        return
    yardstick = Yardstick(choice.data, choice.num)
    pipeline = UnCLIP.load(choice.chain, precision=Precision.bf16, prior=cells[0])
    yardstick.look(pipeline.size)
    if not is_of(choice.out / TRUE, chain):
        write(choice.out / TRUE, judged(yardstick, *drawn(pipeline, yardstick, 0, true=True)) | chain)
    for cell in todo:
        pipeline = UnCLIP.load(choice.chain, precision=Precision.bf16, prior=cell)
        found = judged(yardstick, *drawn(pipeline, yardstick, seed_of(cell)))
        print(f"{cell}: KID {found['kid']:.1f}, style {found['style_accuracy']:.1%}", flush=True)
        write(cell / f"{DRAWN}.json", found | origins[cell])


def drawn(pipeline: UnCLIP, yardstick: Yardstick, seed: int, *, true: bool = False) -> list[Tensor]:
    return [draw(pipeline, samples, seed, BATCH, true=true) for samples in (yardstick.test, yardstick.styled)]


def is_of(file: Path, origin: dict[str, Any]) -> bool:
    """Whether a file of figures is there and says this of itself."""
    return file.exists() and origin.items() <= json.loads(file.read_text()).items()


def judged(yardstick: Yardstick, test: Tensor, styled: Tensor) -> dict[str, float]:
    distance, error = yardstick.kid(test)
    style = yardstick.style_accuracy(styled)
    counts = {"num_test": len(test), "num_styles": len(styled)}
    return {"kid": distance, "kid_error": error, "style_accuracy": style, **counts}


def seed_of(cell: Path) -> int:
    return int(cell.name.removeprefix("seed-"))


def write(path: Path, found: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    with told_to_the_user():
        main()
