"""The settings of a run's data."""

from dataclasses import dataclass, field, replace
from enum import Enum

from unclip.config import FREE
from unclip.data.mixture import Mixture
from unclip.data.places import place_of
from unclip.data.remote import RemoteConfig
from unclip.errors import ConfigError


@dataclass
class SourceConfig:
    """Another data set to train on, with its weight among all."""

    path: str
    embeddings: str | None = None
    weight: float = 1.0


class TextStates(Enum):
    """Where the caption's states come from: a column of the embeddings, or the frozen CLIP's text tower at every step."""

    stored = "stored"
    live = "live"


@dataclass
class DataConfig:
    """Where samples come from. ``path`` holds one folder of shards per split, ``embeddings`` what unclip-embed wrote.
    Imported embeddings hold their captions: a prior needs no ``path`` beside them.

    ``others`` are further data sets to train on, each sample drawn from one of them with a probability in proportion
    to ``weight`` (of the first) and theirs; validation and statistics are those of the first.

    ``image_size``: pixels of the square that a stage trains on (null: the model's). ``enlarge``: whether smaller pictures
    are enlarged, or left out as damaged ones are (null: enlarged for CLIP, left out where drawing is learnt). ``cache``
    keeps decoded pictures in memory. ``num_workers`` 0 prepares batches in a thread, which is best on few cores.
    ``max_val`` samples of validation, spread evenly over the split; ``val_split`` null switches validation off.
    ``neighbours`` samples that stand side by side in a shard stay together in the shuffle: hard negatives for CLIP where
    the data is written so.
    ``text_states`` live takes the CLIP run or artifact ``clip``, which must be the one behind the embeddings.

    ``path`` may lie behind an URL (s3://, http://), and may name the shards of the training split themselves, by braces
    or as a list; ``val_path`` is the data set of the validation split where that is another. Such shards without an index,
    and those that a command prints (pipe:COMMAND), are read as a stream. ``cache_dir``, ``cache_gb`` and
    ``retry_seconds``: see :class:`RemoteConfig`. A run stops when more than the share ``max_corrupt`` of the samples it
    read (of 1000, while it read fewer) had to be replaced.
    """

    path: str | list[str] = ""
    embeddings: str | None = None
    weight: float = 1.0
    others: list[SourceConfig] = field(default_factory=list)
    image_size: int | None = None
    enlarge: bool | None = None
    text_states: TextStates = TextStates.stored
    clip: str | None = None
    train_split: str = "train"
    neighbours: int = 1
    val_split: str | None = field(default="val", metadata=FREE)
    val_path: str | None = field(default=None, metadata=FREE)
    max_val: int = field(default=1024, metadata=FREE)
    num_workers: int = field(default=0, metadata=FREE)
    cache: bool = field(default=False, metadata=FREE)
    cache_dir: str | None = field(default=None, metadata=FREE)
    cache_gb: float = field(default=100.0, metadata=FREE)
    retry_seconds: float = field(default=600.0, metadata=FREE)
    max_corrupt: float = field(default=0.01, metadata=FREE)

    def __post_init__(self) -> None:
        if self.max_val < 1:
            raise ConfigError(
                f"data.max_val={self.max_val} must be positive; data.val_split=null switches validation off"
            )
        if (self.text_states is TextStates.live) != (self.clip is not None):
            raise ConfigError("data.text_states=live and data.clip=RUN belong together; give both or neither")
        if self.val_path is not None and self.val_split in (None, self.train_split):
            raise ConfigError(
                f"data.val_path={self.val_path} is the data set of the validation split, but data.val_split={self.val_split}: give "
                f"that split there a name other than train_split={self.train_split}"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers={self.num_workers} must not be negative")
        Mixture(self.weights, seed=0)  # refuses useless weights before anything is read
        if self.neighbours < 1:
            raise ConfigError(f"data.neighbours={self.neighbours} must be positive; 1 shuffles single samples")
        if not 0 <= self.max_corrupt <= 1:
            raise ConfigError(f"data.max_corrupt={self.max_corrupt} is a share, from 0 to 1")
        if self.retry_seconds < 0 or self.cache_gb <= 0:
            raise ConfigError(
                f"data.retry_seconds={self.retry_seconds} and data.cache_gb={self.cache_gb} must not be negative"
            )

    @property
    def weights(self) -> list[float]:
        """Of the first data set and of the others."""
        return [self.weight, *(other.weight for other in self.others)]

    @property
    def enlarges(self) -> bool:
        return self.enlarge is not False

    def for_drawing(self, size: int) -> "DataConfig":
        """Of a stage that learns to draw pictures of ``size`` pixels: with what was left to the stage."""
        return replace(self, image_size=self.image_size or size, enlarge=bool(self.enlarge))

    @property
    def remote(self) -> RemoteConfig:
        return RemoteConfig(self.cache_dir, self.cache_gb, self.retry_seconds)

    def place(self, split: str) -> str | list[str]:
        """The folder of a split, or the shards that stand for it; ConfigError for a validation split without a place."""
        if split != self.val_split or split == self.train_split:
            return place_of(self.path, split)
        place = place_of(self.path if self.val_path is None else self.val_path, split)
        if self.val_path is None and not isinstance(place, str):
            raise ConfigError(
                "data.path names the training shards themselves; name the data set of the validation split with "
                "data.val_path=…, or switch validation off with data.val_split=null"
            )
        return place
