"""Which figures are made of pictures, of how many at least, and from what."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from unclip.errors import ConfigError, DataError
from unclip.evaluation.distances import cmmd_figure, fid_figure, kid_figure
from unclip.evaluation.diversity import NUM_WRONG, cosines, r_precise, vendi_figure
from unclip.evaluation.intervals import Figure, mean_figure, resamples
from unclip.evaluation.manifolds import nearest, overlap


class Metric(Enum):
    fid = "fid"
    kid = "kid"
    cmmd = "cmmd"
    precision_recall = "precision_recall"
    density_coverage = "density_coverage"
    clip_score = "clip_score"
    r_precision = "r_precision"
    vendi = "vendi"
    pair_distance = "pair_distance"
    memorisation = "memorisation"


OF_CLIP = {Metric.cmmd, Metric.clip_score, Metric.r_precision}
ONE_SIDED = {
    Metric.clip_score,
    Metric.r_precision,
    Metric.vendi,
    Metric.pair_distance,
}  # mean something without real pictures
LEAST = {  # pictures on each side; docs/evaluation.md says why. Of fid, one more than features
    Metric.kid: 50,
    Metric.cmmd: 50,
    Metric.precision_recall: 50,
    Metric.density_coverage: 50,
    Metric.clip_score: 10,
    Metric.r_precision: NUM_WRONG + 1,
    Metric.vendi: 20,
    Metric.pair_distance: 20,
    Metric.memorisation: 20,
}
LEAST_PAIRS = 10  # of pair_distance: what its 20 pictures make
COPY_QUANTILE, NUM_SHOWN = 0.99, 4


def refuse_too_few(metric: Metric, counts: dict[str, int], width: int = 0) -> None:
    """ConfigError where a side has too few pictures; ``counts`` by side, ``width`` of the features."""
    least = width + 1 if metric is Metric.fid else LEAST[metric]
    for side, count in counts.items():
        if count < least:
            why = f", one more than the {width} features" if metric is Metric.fid else ""
            raise ConfigError(
                f"{metric.name} needs at least {least:,} {side} pictures{why}, but there are {count:,}: give more, or leave "
                "it out of metrics"
            )


def refuse_few_pairs(side: str, count: int) -> None:
    """ConfigError where the distance of pairs would rest on few pairs of pictures."""
    if count < LEAST_PAIRS:
        raise ConfigError(
            f"pair_distance needs at least {LEAST_PAIRS} pairs of {side} pictures, but there are {count}: give more, or leave it "
            "out of metrics"
        )


def refuse_few_captions(captions: list[str]) -> None:
    """ConfigError where R-precision would lack wrong captions."""
    if (distinct := len(set(captions))) <= NUM_WRONG:
        raise ConfigError(
            f"r_precision needs at least {NUM_WRONG + 1} different captions, but there are {distinct}: give pictures of more "
            "captions, or leave it out of metrics"
        )


def refuse_nonfinite(rows: Tensor, what: str, names: Sequence[str]) -> None:
    """DataError that names the first picture whose row (B, D) has a number that is not finite."""
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{what} of {names[bad[0]]} are not finite ({len(bad)} of {len(rows)} pictures): its weights are broken, or it "
            "runs in too few bits"
        )


@dataclass
class Figures:
    """Figures by name, of resamples that all of them share."""

    replicates: int
    seed: int
    found: dict[str, Figure] = field(default_factory=dict)

    def weights(self, count: int, side: str) -> Tensor:
        """Resamples of the drawn or the real pictures."""
        return resamples(count, self.replicates, 2 * self.seed + (side == "real"))

    def mean(self, name: str, rows: Tensor, side: str) -> None:
        self.found[name] = mean_figure(rows, self.weights(len(rows), side))

    def compare(self, prefix: str, metrics: set[Metric], drawn: Tensor, real: Tensor, k: int, suffix: str = "") -> None:
        """The distances of one net's features, drawn (N, D) from real (M, D)."""
        args = (drawn, real, self.weights(len(drawn), "drawn"), self.weights(len(real), "real"))
        if Metric.fid in metrics:
            self.found[f"{prefix}/fid{suffix}"] = fid_figure(*args)
        if Metric.kid in metrics:
            self.found[f"{prefix}/kid{suffix}"] = kid_figure(*args)
        if Metric.cmmd in metrics and prefix == "clip":
            self.found[f"clip/cmmd{suffix}"] = cmmd_figure(*args)
        if not metrics & {Metric.precision_recall, Metric.density_coverage}:
            return
        rows = overlap(drawn, real, k)
        if Metric.precision_recall in metrics:
            self.mean(f"{prefix}/precision{suffix}", rows.precise, "drawn")
            self.mean(f"{prefix}/recall{suffix}", rows.recalled, "real")
        if Metric.density_coverage in metrics:
            self.mean(f"{prefix}/density{suffix}", rows.density, "drawn")
            self.mean(f"{prefix}/coverage{suffix}", rows.covered, "real")

    def vary(self, prefix: str, drawn: Tensor, real: Tensor | None) -> None:
        """The diversity of drawn and of real pictures by one net's features, of as many of each: it grows with their number."""
        count = len(drawn) if real is None else min(len(drawn), len(real))
        for side, rows in (("drawn", drawn), ("real", real)):
            if rows is not None:
                some = rows[torch.arange(count) * len(rows) // count]
                name = f"{prefix}/vendi{'_real' if side == 'real' else ''}"
                self.found[name] = vendi_figure(some, self.weights(count, side))

    def fit_captions(self, metrics: set[Metric], side: str, images: Tensor, texts: Tensor, captions: list[str]) -> None:
        """CLIP score and R-precision of drawn or real pictures; of real ones the latter only where there are enough captions."""
        end = "_real" if side == "real" else ""
        if Metric.clip_score in metrics:
            self.mean(f"clip/score{end}", cosines(images, texts), side)
        if Metric.r_precision in metrics and (side == "drawn" or len(set(captions)) > NUM_WRONG):
            self.mean(f"clip/r_precision{end}", r_precise(images, texts, captions, self.seed), side)

    def memorise(self, prefix: str, drawn: Tensor, real: Tensor, train: Tensor) -> Tensor:
        """How near drawn pictures come to training pictures, beside real ones that were not trained on; (N, k) the numbers of
        the training pictures nearest to each drawn one."""
        found = {"drawn": nearest(drawn, train, min(NUM_SHOWN, len(train))), "real": nearest(real, train, 1)}
        of_drawn, of_real = found["drawn"][0][:, 0], found["real"][0][:, 0]
        self.mean(f"{prefix}/nearest_train", of_drawn, "drawn")
        self.mean(f"{prefix}/nearest_train_real", of_real, "real")
        limit = of_real.double().quantile(COPY_QUANTILE)
        self.mean(f"{prefix}/copied_share", (of_drawn > limit).double(), "drawn")
        return found["drawn"][1]

    def plain(self) -> dict[str, Any]:
        """``measures`` and ``intervals`` for JSON."""
        return {
            "measures": {name: one.value for name, one in self.found.items()},
            "intervals": {name: [one.low, one.high] for name, one in self.found.items()},
        }


def unlike_training(real: Tensor, train: Tensor, share: float) -> Tensor:
    """The numbers, in order, of real pictures (N, D) without the ``share`` that comes nearest to a training picture.

    GLIDE's filtered validation set lost 21 % that way (Nichol et al. 2021, sec. 5); the limit was not published, the share was.
    """
    near = nearest(real, train, 1)[0][:, 0]
    return near.argsort(stable=True)[: len(real) - round(share * len(real))].sort().values
