"""Ablations of a small decoder: what it predicts and how its error is weighted, which sampler in how many steps, and guidance.

    python scripts/ablate_decoder.py --data DATA --embeddings FOLDER --clip RUN [--out runs/ablations] [--steps 1000]

Every parametrisation is trained with every weighting it allows, on the same samples in the same order; the best by KID is then
drawn with every sampler and number of steps, and with every guidance scale and interval. KID x 1000 (EfficientNet-Lite0) of what
is drawn from the true z_i and caption of one split against that split's own pictures, both at the base's size. What is there
already is kept, and table.md is written last.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from unclip.cli.measure import draw, pictures_of
from unclip.config import Precision
from unclip.data.shards import Shards
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.drafts import write_atomic
from unclip.errors import told_to_the_user
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid
from unclip.models.sampling import DiffusionSampling
from unclip.pipeline import UnCLIP

PREDICTED = {"eps": "cosine", "x0": "cosine", "v": "cosine", "flow": "flow"}  # and the schedule that it is trained on
WEIGHTINGS = ["simple", "min_snr", "clamped_snr", "p2"]
SAMPLERS = {name.name: (name, 1.0) for name in (Sampler.ddim, Sampler.dpmpp_2m, Sampler.unipc, Sampler.heun)}
SAMPLERS |= {f"ancestral, temperature {x}": (Sampler.ancestral, x) for x in (1.0, 0.3, 0.0)}
STEPS = [4, 8, 16, 32, 64]
SCALES = [1.0, 1.5, 2.5, 4.0]
INTERVALS = {"everywhere": None, "but the noisiest quarter": (0.0, 0.75), "the middle half": (0.25, 0.75)}
# else as experiment=emoji_decoder
NET = ["model.net.channels=[32,64,96]", "model.net.patch=1", "trainer.batch_size=48"]
CHOSEN = SamplerConfig(Sampler.dpmpp_2m, 16)
BATCH = 50


class Drawing:
    """One split's captions and true z_i, drawn by any decoder in any way, and its own pictures to compare with."""

    def __init__(self, choice: argparse.Namespace) -> None:
        self.clip, self.samples = choice.clip, Shards(choice.data / choice.split).spread(choice.num)
        self.features = PictureFeatures()
        self._real: Tensor | None = None

    def kid(self, decoder: Path, how: DiffusionSampling) -> tuple[float, float]:
        pipeline = UnCLIP.load({"clip": self.clip, "decoder": decoder}, precision=Precision.bf16)
        if self._real is None:
            self._real = self.features(pictures_of(self.samples, pipeline.size))
        return kid(self.features(draw(pipeline, self.samples, 0, BATCH, true=True, how=how)), self._real)


def main() -> None:
    choice = arguments()
    cells = {f"{p} {w}": train(choice, p, w) for p, w in trained()}
    drawing = Drawing(choice)

    def measured(decoder: str, how: DiffusionSampling) -> float:
        guidance = how.guidance
        where = "everywhere" if guidance.interval is None else f"in {guidance.interval}"
        sampler = f"{how.sampler.name.name} {how.sampler.num_steps}, temperature {how.sampler.temperature}"
        label = f"{decoder}, {sampler}, guidance {guidance.scale} {where}"
        file = choice.out / "kid" / f"{label}.json"
        if not file.exists():
            mean, error = drawing.kid(cells[decoder], how)
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, json.dumps({"kid": mean, "error": error, "num": len(drawing.samples)}).encode())
            print(f"{label}: KID {mean:.1f} ± {error:.1f}", flush=True)
        return json.loads(file.read_text())["kid"]

    guided = Guidance(choice.scale)
    kids = {name: measured(name, DiffusionSampling(CHOSEN, guided)) for name in cells}
    best = min(kids, key=lambda name: kids[name])
    steps = {
        (label, n): measured(best, DiffusionSampling(SamplerConfig(sampler, n, temperature=temperature), guided))
        for label, (sampler, temperature) in SAMPLERS.items()
        for n in STEPS
    }
    scales = {
        (scale, name): measured(best, DiffusionSampling(CHOSEN, Guidance(scale, where)))
        for scale in SCALES
        for name, where in INTERVALS.items()
        if scale != 1 or where is None
    }
    text = "\n\n".join([weightings_table(kids), steps_table(best, steps), scales_table(best, scales)]) + "\n"
    write_atomic(choice.out / "table.md", text.encode())
    print("\n" + text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for name, what in (("data", "the data set"), ("embeddings", "its embeddings"), ("clip", "the CLIP's run")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="where runs and table.md go")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each cell")
    parser.add_argument("--split", default="val", help="whose captions are drawn")
    parser.add_argument("--num", type=int, default=200, help="pictures of that split")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance of the first two tables")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of every train-decoder")
    return parser.parse_args()


def trained() -> Iterator[tuple[str, str]]:
    for predict in PREDICTED:
        for weighting in WEIGHTINGS if predict != "flow" else ["simple"]:
            yield predict, weighting


def train(choice: argparse.Namespace, predict: str, weighting: str) -> Path:
    run = choice.out / f"{predict}-{weighting}"
    command = [
        *("train-decoder", f"run={run}", f"data.path={choice.data}", f"data.embeddings={choice.embeddings}"),
        *("experiment=emoji_decoder", *NET, f"trainer.max_steps={choice.steps}", f"model.diffusion.predict={predict}"),
        *(f"model.diffusion.weighting={weighting}", f"model.diffusion.schedule={PREDICTED[predict]}", *choice.set),
    ]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)  # the command has said why
    return run


def weightings_table(found: dict[str, float]) -> str:
    rows = [["predicts", *WEIGHTINGS]]
    rows += [[p, *(number(found.get(f"{p} {w}")) for w in WEIGHTINGS)] for p in PREDICTED]
    return table(rows)


def steps_table(best: str, found: dict[tuple[str, int], float]) -> str:
    """With the smallest number of evaluations within 5 % of the best of all in bold."""
    enough = 1.05 * min(found.values())
    fewest = min(n for (_, n), value in found.items() if value <= enough)
    rows = [[f"{best}, sampler", *map(str, STEPS)]]
    for label in SAMPLERS:
        values = {n: found[label, n] for n in STEPS}
        rows.append(
            [label, *(f"**{v:.0f}**" if n == fewest and v <= enough else f"{v:.0f}" for n, v in values.items())]
        )
    return table(rows)


def scales_table(best: str, found: dict[tuple[float, str], float]) -> str:
    rows = [[f"{best}, guidance", *INTERVALS]]
    rows += [[f"{scale}", *(number(found.get((scale, name))) for name in INTERVALS)] for scale in SCALES]
    return table(rows)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    with told_to_the_user():
        main()
