"""Pictures for an evaluation: one for each of many captions, drawn block by block by all ranks, and never drawn twice."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unclip.batches import Batches, Meter
from unclip.cli.options import Overrides
from unclip.cli.pictures import sampling
from unclip.config import Precision, to_plain
from unclip.errors import ArtifactError, ConfigError, DataError
from unclip.evaluation.blocks import Ranks, claim
from unclip.evaluation.sheet import save_picture
from unclip.evaluation.sources import Source, SourceConfig
from unclip.jobs import Job
from unclip.pipeline import UnCLIP
from unclip.progress import track
from unclip.recipe import text_chunks, to_image


@dataclass
class DrawnConfig(SourceConfig):
    """Pictures that are there, as of any source, or that are drawn: ``runs`` is then the folder of a chain's runs.

    ``captions`` are those of these pictures, by default of the real ones; ``num`` of them, at random by ``seed``, where
    there are as many. Each is drawn ``per_caption`` times; picture i has the seed ``seed`` + i. ``sampling`` replaces parts of what
    the artifacts say: ``drawn.sampling.decoder_guidance=1.25``.
    """

    runs: str | None = None
    captions: SourceConfig = field(default_factory=SourceConfig)
    per_caption: int = 1
    seed: int = 0
    batch_size: int = 16
    precision: Precision = Precision.fp32
    sampling: Overrides = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs is not None and super().is_given:
            raise ConfigError("drawn.runs draws pictures; leave out drawn.folder, drawn.split and drawn.coco, or runs")
        if self.seed < 0:
            raise ConfigError(f"drawn.seed={self.seed} must not be negative")
        if self.per_caption < 1 or self.batch_size < 1:
            raise ConfigError(f"per_caption={self.per_caption} and batch_size={self.batch_size} must be at least 1")
        if self.runs is None and (self.captions.is_given or self.per_caption > 1):
            raise ConfigError("captions and per_caption are for drawn.runs: pictures that are there have their own")

    @property
    def is_given(self) -> bool:
        return self.runs is not None or super().is_given


class DrawnCaptions:
    """The pictures of captions, a source once :meth:`draw` has run on all ranks; ``size`` in pixels.

    ConfigError or ArtifactError, before anything is drawn, for a chain or settings that cannot draw.
    """

    def __init__(self, cfg: DrawnConfig, captions: list[str], folder: Path, ranks: Ranks) -> None:
        assert cfg.runs is not None
        self.where, self._captions, self._cfg, self._ranks = str(folder), captions, cfg, ranks
        pipeline = UnCLIP.load(cfg.runs, ranks.device(), cfg.precision)
        if "prior" not in pipeline.manifests:
            raise ArtifactError(f"{cfg.runs} has no prior, which drawing captions needs: run train-prior")
        self._pipeline: UnCLIP | None = pipeline
        self._how = pipeline.resolved(sampling(cfg.sampling, pipeline))
        self.artifacts = pipeline.hashes
        height, width = pipeline.finished_size(self._how)
        if height != width:
            raise ConfigError(f"pictures of {width}x{height} pixels cannot be compared; evaluate squares")
        self.size = height
        about = {
            **self.artifacts,
            "captions": _digest(captions),
            "seed": str(cfg.seed),
            "precision": cfg.precision.name,
        }
        about["sampling"] = json.dumps(to_plain(self._how), sort_keys=True)
        self.fingerprint = _digest(about)
        claim(folder, about)

    def __len__(self) -> int:
        return len(self._captions)

    def key(self, i: int) -> str:
        return f"{i:08d}.png"

    def picture(self, i: int) -> bytes:
        return (Path(self.where) / self.key(i)).read_bytes()

    def captions(self, i: int) -> list[str]:
        return [self._captions[i]]

    def draw(self) -> None:
        """Draw what this rank is to draw and has not drawn yet, wait for the others, and let go of the chain."""
        pipeline = self._pipeline
        assert pipeline is not None
        mine = list(self._ranks.mine(len(self)))
        for _, rows in track(mine, f"drawing {len(self)} captions", len(mine), silent=self._ranks.rank > 0):
            paths = [Path(self.where) / self.key(i) for i in rows]
            if all(path.exists() for path in paths):
                continue
            jobs = [self._job(i) for i in rows]
            drawn = pipeline.run(jobs, self._how, Batches(self._cfg.batch_size, Meter(None, 0)))
            for path, picture in zip(paths, drawn, strict=True):
                save_picture(to_image(picture), path, text_chunks(picture))
        self._pipeline = None
        self._ranks.wait()

    def _job(self, i: int) -> Job:
        caption = self._captions[i]
        return Job(self._cfg.seed + i, caption, title=caption, words={"operation": "generate"})


def captions_to_draw(source: Source, cfg: DrawnConfig) -> list[str]:
    """All captions of a source's pictures, or ``cfg.num`` of them chosen by ``cfg.seed``, in order, each as often as asked for.

    DataError where there are none, ConfigError where there are fewer than ``cfg.num``.
    """
    found = [caption for i in range(len(source)) for caption in source.captions(i) if caption]
    if not found:
        raise DataError("there are no captions to draw: name pictures with captions as drawn.captions")
    if cfg.num is not None and cfg.num > len(found):
        raise ConfigError(
            f"drawn.num={cfg.num} asks for more captions than the {len(found)} of {source.where}: set drawn.num={len(found)}, "
            "or name pictures with more captions as drawn.captions"
        )
    if cfg.num is not None and cfg.num < len(found):
        chosen = np.random.default_rng(cfg.seed).permutation(len(found))[: cfg.num]
        found = [found[i] for i in np.sort(chosen)]
    return [caption for caption in found for _ in range(cfg.per_caption)]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
