"""``unclip-evaluate pictures``: drawn pictures against real ones, by the figures of docs/evaluation.md."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.cli.draw_captions import DrawnCaptions, DrawnConfig, captions_to_draw
from unclip.errors import ConfigError, DataError
from unclip.evaluation.blocks import Blocks, Ranks
from unclip.evaluation.diversity import pairs_of
from unclip.evaluation.extractors import ClipFeatures, Extractor, open_extractor
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.intervals import LEVEL
from unclip.evaluation.pictures import (
    LEAST_PAIRS,
    OF_CLIP,
    ONE_SIDED,
    Figures,
    Metric,
    refuse_few_captions,
    refuse_few_pairs,
    refuse_nonfinite,
    refuse_too_few,
    unlike_training,
)
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.evaluation.sources import Fit, Source, SourceConfig, caption_of, load_pictures, open_source, sides, whole
from unclip.progress import track

NEIGHBOURS = "neighbours.png"
NETS = ("lite0", "clip", "dinov2", "inception")
DEFAULT = (Metric.kid, Metric.precision_recall, Metric.density_coverage, Metric.vendi, Metric.pair_distance)
SHOWN = 8


@dataclass
class PictureEvaluateConfig:
    """``run``: the folder that gets evaluation.json, and keeps what was drawn and the features, so that the same command goes on.

    ``drawn`` pictures are judged, against ``real`` ones and, for memorisation and ``filtered_share``, those of ``train``.
    ``features``: the nets whose features are compared, of lite0, clip, dinov2 and inception; ``clip`` is a run or artifact,
    ``dinov2`` and ``inception`` are files of weights. ``size``: what all pictures are cut to; null: as drawn, which real ones
    must then be too. ``neighbours``: k of precision, recall, density and coverage. ``replicates``: of the bootstrap.
    ``pairs``: of pictures that pair_distance compares, 10 or more. ``filtered_share`` > 0 gives each distance again without that
    share of the real pictures, those nearest to a training picture by the first net.
    """

    run: str
    drawn: DrawnConfig = field(default_factory=DrawnConfig)
    real: SourceConfig = field(default_factory=SourceConfig)
    train: SourceConfig = field(default_factory=SourceConfig)
    features: list[str] = field(default_factory=lambda: ["lite0"])
    metrics: list[Metric] = field(default_factory=lambda: list(DEFAULT))
    clip: str | None = None
    dinov2: str | None = None
    inception: str | None = None
    size: int | None = None
    neighbours: int = 5
    replicates: int = 100
    pairs: int = 1000
    filtered_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in NETS]
        if unknown or not self.features:
            raise ConfigError(f"features={self.features} must name at least one of: {', '.join(NETS)}")
        if not self.drawn.is_given:
            raise ConfigError(
                "say which pictures to judge: drawn.runs= draws them; drawn.folder=, drawn.split= and drawn.coco= are there"
            )
        if "clip" in self.nets and self.clip is None:
            named = [metric.name for metric in self.metrics if metric in OF_CLIP] or ["features=clip"]
            raise ConfigError(f"{', '.join(named)} need a CLIP: give clip=RUN, best one that the chain has never met")
        if (Metric.memorisation in self.metrics or self.filtered_share) and not self.train.is_given:
            raise ConfigError("memorisation and filtered_share need the training pictures: give train.split=DATA/train")
        if not self.real.is_given and set(self.metrics) - ONE_SIDED:
            lacking = sorted(metric.name for metric in set(self.metrics) - ONE_SIDED)
            raise ConfigError(
                f"{', '.join(lacking)} need real pictures: give real.split=DATA/val, real.folder= or real.coco="
            )
        if self.filtered_share and not self.real.is_given:
            raise ConfigError(
                "filtered_share leaves out some of the real pictures: give real.split=, real.folder= or real.coco="
            )
        if self.pairs < LEAST_PAIRS:
            raise ConfigError(f"pairs={self.pairs} must be at least {LEAST_PAIRS}: pair_distance of fewer says nothing")
        if self.neighbours < 1 or self.replicates < 0 or not 0 <= self.filtered_share < 1:
            raise ConfigError(
                f"neighbours={self.neighbours} must be at least 1, replicates={self.replicates} at least 0, and "
                f"filtered_share={self.filtered_share} a share below 1"
            )

    @property
    def compared(self) -> list[str]:
        """The nets whose features of pictures are needed."""
        needed = set(self.metrics) - OF_CLIP - {Metric.pair_distance} or self.filtered_share
        return list(
            dict.fromkeys([*(self.features if needed else []), *(["clip"] if OF_CLIP & set(self.metrics) else [])])
        )

    @property
    def nets(self) -> list[str]:
        """All that look at pictures; for pair_distance one of them looks at pairs."""
        return list(dict.fromkeys([*self.compared, *(["lite0"] if Metric.pair_distance in self.metrics else [])]))


def evaluate_pictures(cfg: PictureEvaluateConfig) -> dict[str, Any]:
    """Measure pictures; what was found on rank zero, nothing on the others.

    Raises ConfigError for too few pictures, missing weights and settings that do not fit, DataError for pictures that cannot
    be used; both before anything is drawn, as far as it can be known by then.
    """
    ranks = Ranks.join()
    try:
        evaluation = PictureEvaluation(cfg, ranks)
        evaluation.gather()
        return evaluation.figures() if ranks.rank == 0 else {}
    finally:
        ranks.leave()


class PictureEvaluation:
    """One evaluation: opens and checks everything, gathers rows block by block, and makes figures of all of them."""

    def __init__(self, cfg: PictureEvaluateConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks, self.run, self.metrics = cfg, ranks, Path(cfg.run), set(cfg.metrics)
        weights = {"clip": cfg.clip, "dinov2": cfg.dinov2, "inception": cfg.inception, "lite0": None}
        self.nets: dict[str, Extractor] = {
            name: open_extractor(name, weights[name], ranks.device()) for name in cfg.nets
        }
        self.sources: dict[str, Source] = {}
        for side, source in (("real", cfg.real), ("train", cfg.train)):
            if source.is_given:
                self.sources[side] = open_source(source, side)
        self._refuse_training_as_real()
        self.drawer = self._drawer()
        self.sources = {"drawn": self.drawer or open_source(cfg.drawn, "drawn"), **self.sources}
        self._refuse_too_few()
        self.size = self._common_size()
        self.captions = self._captions()
        self.pairs = self._pairs() if Metric.pair_distance in self.metrics else {}
        self.stores: dict[tuple[str, str], Blocks] = {}

    def _drawer(self) -> DrawnCaptions | None:
        cfg = self.cfg.drawn
        if cfg.runs is None:
            return None
        place = cfg.captions if cfg.captions.is_given else self.cfg.real
        captions = captions_to_draw(open_source(place, "drawn.captions"), cfg)
        return DrawnCaptions(cfg, captions, self.run / "pictures", self.ranks)

    def _refuse_training_as_real(self) -> None:
        if {"real", "train"} <= self.sources.keys():
            real, train = self.sources["real"], self.sources["train"]
            if whole(real).fingerprint == whole(train).fingerprint:
                raise ConfigError(f"real and train are both {real.where}: real pictures must be ones not trained on")

    def _refuse_too_few(self) -> None:
        counts = {side: len(source) for side, source in self.sources.items() if side != "train"}
        filtered = {}
        if self.cfg.filtered_share:
            filtered = {"filtered real": counts["real"] - round(self.cfg.filtered_share * counts["real"])}
        for metric in self.cfg.metrics:
            sides = {"drawn": counts["drawn"]} if metric in ONE_SIDED - {Metric.vendi} else counts
            if metric not in ONE_SIDED | {Metric.memorisation}:
                sides = {**counts, **filtered}
            widths = [self.nets[name].width for name in self.cfg.features] if metric is Metric.fid else [0]
            refuse_too_few(metric, sides, max(widths))
        if (
            min([*counts.values(), *filtered.values()]) <= self.cfg.neighbours
            and {Metric.precision_recall, Metric.density_coverage} & self.metrics
        ):
            raise ConfigError(f"neighbours={self.cfg.neighbours} must be below the number of pictures")

    def _common_size(self) -> int:
        """The side of all pictures; looks at the first one of each source, before any is drawn."""
        drawn, size = self.sources["drawn"], self.cfg.size
        if size is None:
            size = self.drawer.size if self.drawer else _side(drawn)
        elif self.drawer and self.drawer.size < size:
            raise ConfigError(
                f"drawn pictures have {self.drawer.size} pixels; size={size} would enlarge them: take fewer"
            )
        self._fits = dict.fromkeys(self.sources, Fit.same if self.cfg.size is None else Fit.any)
        self._fits["drawn"] = Fit.same if self.cfg.size is None else Fit.reduce
        for side, source in self.sources.items():
            if side != "drawn" or not self.drawer:
                load_pictures(source, [0], size, self._fits[side])
        return size

    def _captions(self) -> dict[str, list[str]]:
        """Of drawn pictures and, where they have any, real ones, if they are read; of drawn ones for pairs, if all have one."""
        found = {}
        if self.metrics & {Metric.clip_score, Metric.r_precision}:
            for side in ("drawn", "real"):
                source = self.sources.get(side)
                if source is not None and (side == "drawn" or source.captions(0)):
                    found[side] = [caption_of(source, i) for i in range(len(source))]
        elif Metric.pair_distance in self.metrics:
            drawn = self.sources["drawn"]
            first = [next(iter(drawn.captions(i)), "") for i in range(len(drawn))]
            found = {"drawn": first} if all(first) else {}
        if Metric.r_precision in self.metrics:
            refuse_few_captions(found["drawn"])
        return found

    def gather(self) -> None:
        """Draw, and look at all pictures with all nets, as far as that has not been done; ranks share the work."""
        if self.drawer:
            self.drawer.draw()
        for side, source in self.sources.items():
            if side != "train" or self._needs_training:
                self._look(side, source)
            if side in self.captions and OF_CLIP & self.metrics:
                self._read_captions(side)
        if Metric.pair_distance in self.metrics:
            self._compare_pairs()
        self.ranks.wait()

    @property
    def _needs_training(self) -> bool:
        return Metric.memorisation in self.metrics or self.cfg.filtered_share > 0

    def _look(self, side: str, source: Source) -> None:
        wanted = self.cfg.features[:1] if side == "train" else self.cfg.compared
        stores = {name: self._store(name, side, len(source)) for name in wanted}
        for block, rows in self._mine(len(source), f"looking at {side} pictures"):
            lacking = [name for name, store in stores.items() if not store.has(block)]
            if not lacking:
                continue
            pictures = load_pictures(source, rows, self.size, self._fits[side])
            for name in lacking:
                found = self.nets[name](pictures)
                refuse_nonfinite(found, f"{name}'s features", [f"{source.where}: {source.key(i)}" for i in rows])
                stores[name].write(block, found)

    def _read_captions(self, side: str) -> None:
        clip, captions = self.nets["clip"], self.captions[side]
        assert isinstance(clip, ClipFeatures)
        store = self._store("texts", side, len(captions))
        for block, rows in self._mine(len(captions), f"reading {side} captions"):
            if not store.has(block):
                texts = [captions[i] for i in rows]
                found = clip.texts(texts)
                refuse_nonfinite(found, "CLIP's text embeddings", texts)
                store.write(block, found)

    def _compare_pairs(self) -> None:
        net = self.nets["lite0"]
        assert isinstance(net, PictureFeatures)
        for side, pairs in self.pairs.items():
            store = self._store(
                "pair_distance", side, len(pairs), str(self.cfg.pairs), str(self.cfg.seed), self.pair_name
            )
            for block, rows in self._mine(len(pairs), f"comparing {side} pictures"):
                if store.has(block):
                    continue
                a, b = (
                    load_pictures(self.sources[side], pairs[rows, i].tolist(), self.size, self._fits[side])
                    for i in (0, 1)
                )
                store.write(block, net.distance(a, b)[:, None])

    def _pairs(self) -> dict[str, np.ndarray]:
        """Of drawn pictures; of real ones too where the pairs are of any captions, which those can be compared with."""
        captions: Sequence[Hashable] = self.captions.get("drawn", []) or range(len(self.sources["drawn"]))
        pairs, alike = pairs_of(captions, self.cfg.pairs, self.cfg.seed)
        self.pair_name = "pair_distance_of_a_caption" if alike else "pair_distance"
        found = {"drawn": pairs}
        if "real" in self.sources and not alike:
            found["real"] = pairs_of(range(len(self.sources["real"])), self.cfg.pairs, self.cfg.seed)[0]
        for side, some in found.items():
            refuse_few_pairs(side, len(some))
        return found

    def _mine(self, count: int, title: str) -> Iterable[tuple[int, range]]:
        mine = list(self.ranks.mine(count))
        return track(mine, title, len(mine), silent=self.ranks.rank > 0)

    def _store(self, name: str, side: str, count: int, *more: str) -> Blocks:
        if (name, side) not in self.stores:
            net = self.nets[{"texts": "clip", "pair_distance": "lite0"}.get(name, name)]
            about = {"pictures": self.sources[side].fingerprint, "net": net.hash, "size": str(self.size)}
            about |= {"pairs": " ".join(more)} if more else {}
            self.stores[name, side] = Blocks(self.run / "features" / f"{name}-{side}", count, about)
        return self.stores[name, side]

    def _rows(self, name: str, side: str) -> Tensor:
        return self.stores[name, side].read()

    def figures(self) -> dict[str, Any]:
        """All figures, from the rows of all ranks."""
        cfg, figures = self.cfg, Figures(self.cfg.replicates, self.cfg.seed)
        kept = None
        if cfg.filtered_share:
            first = cfg.features[0]
            kept = unlike_training(self._rows(first, "real"), self._rows(first, "train"), cfg.filtered_share)
        for name in cfg.compared:
            metrics = self.metrics if name in cfg.features else self.metrics & {Metric.cmmd}
            drawn = self._rows(name, "drawn")
            if "real" in self.sources:
                real = self._rows(name, "real")
                figures.compare(name, metrics, drawn, real, cfg.neighbours)
                if kept is not None:
                    figures.compare(name, metrics, drawn, real[kept], cfg.neighbours, "_filtered")
            if Metric.vendi in metrics:
                figures.vary(name, drawn, self._rows(name, "real") if "real" in self.sources else None)
            if Metric.memorisation in metrics and name == cfg.features[0]:
                self._show(figures.memorise(name, drawn, self._rows(name, "real"), self._rows(name, "train")), drawn)
        for side in self.captions if OF_CLIP & self.metrics else ():
            texts = self._rows("texts", side)
            figures.fit_captions(self.metrics, side, self._rows("clip", side), texts, self.captions[side])
        for (name, side), store in self.stores.items():
            if name == "pair_distance":
                figures.mean(f"lite0/{self.pair_name}{'_real' if side == 'real' else ''}", store.read()[:, 0], side)
        return self._told(figures, kept)

    def _show(self, neighbours: Tensor, drawn: Tensor) -> None:
        """``neighbours.png``: the drawn pictures that come nearest to training pictures, beside these."""
        train = self._rows(self.cfg.features[0], "train")
        near = torch.cosine_similarity(drawn, train[neighbours[:, 0]], dim=1)
        rows = []
        for i in near.argsort(descending=True, stable=True)[:SHOWN].tolist():
            shown = load_pictures(self.sources["drawn"], [i], self.size, self._fits["drawn"])
            others = load_pictures(self.sources["train"], neighbours[i].tolist(), self.size, self._fits["train"])
            pictures = [picture.permute(1, 2, 0).numpy() for picture in (*shown, *others)]
            words = self.sources["drawn"].captions(i) or [self.sources["drawn"].key(i)]
            rows.append((f"{near[i]:.3f} {words[0]}", pictures))
        columns = ["drawn", *(f"training picture {n + 1}" for n in range(neighbours.shape[1]))]
        save_picture(draw_table(rows, columns), self.run / NEIGHBOURS)

    def _told(self, figures: Figures, kept: Tensor | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kind": "pictures",
            "pictures": {side: {"where": source.where, "count": len(source)} for side, source in self.sources.items()},
            "artifacts": self.drawer.artifacts if self.drawer else {},
            "nets": {name: net.hash for name, net in self.nets.items()},
            "size": self.size,
            "seed": self.cfg.seed,
            "drawn_seed": self.cfg.drawn.seed if self.drawer else None,
            "neighbours": self.cfg.neighbours,
            "replicates": self.cfg.replicates,
            "level": LEVEL,
        }
        if kept is not None:
            found["pictures"]["real_filtered"] = {"where": self.sources["real"].where, "count": len(kept)}
        return {**found, **figures.plain()}


def _side(drawn: Source) -> int:
    try:
        return min(sides(drawn.picture(0)))
    except DataError as error:
        raise DataError(f"{drawn.where}: {drawn.key(0)}: {error}") from error
