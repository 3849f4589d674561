"""The Hydra commands: train-clip, train-prior, train-decoder, train-upsampler, unclip-embed and unclip-evaluate."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from unclip.errors import ArtifactError, ConfigError, DivergedError, told_to_the_user
from unclip.job_notes import ERROR, note, note_error

CONF = Path(__file__).parents[1] / "conf"


def train_clip() -> None:
    """Train or fine-tune a CLIP."""
    _train("clip")


def embed() -> None:
    """Write z_i, z_t and token ids of a data set with a CLIP artifact."""

    def run(raw: DictConfig) -> Any:
        from unclip.config import typed
        from unclip.data.embed import EmbedConfig, embed
        from unclip.report.run import report_quietly
        from unclip.run_lock import RunLock

        cfg = typed(raw, EmbedConfig)
        part, parts = cfg.share()
        with RunLock(Path(cfg.run), "lock" if parts == 1 else f"lock-{part}-of-{parts}"):
            run = embed(cfg)
            report_quietly(run)  # of several parts the last one, which writes the manifest
            return run

    _main("embed", run)


def train_prior() -> None:
    """Train a prior: caption to z_i."""
    _train("prior")


def train_decoder() -> None:
    """Train a decoder: z_i (and the caption) to a picture."""
    _train("decoder")


def train_upsampler() -> None:
    """Train an upsampler: a small picture to a larger one."""
    _train("upsampler")


def _train(kind: str) -> None:
    def run(raw: DictConfig) -> Any:
        from unclip.config import typed
        from unclip.train import CONFIGS, train

        return train(typed(with_init(raw, kind), CONFIGS[kind]))

    _main(f"train_{kind}", run)


def with_init(raw: DictConfig, kind: str) -> DictConfig:
    """Settings with ``init=RUN`` take those of the model from that artifact, where none are given."""
    if raw.get("init"):
        from unclip.tuning import settings_of

        given = OmegaConf.to_container(raw.model, resolve=True)
        with open_dict(raw):
            raw.model = settings_of(raw.init, kind, given)  # pyright: ignore[reportArgumentType]
    return raw


def evaluate() -> None:
    """Measure a prior or pictures: unclip-evaluate KIND run=..., as in conf/evaluation/KIND.yaml."""
    with told_to_the_user():
        kind = _kind(sys.argv)

    def run(raw: DictConfig) -> Any:
        from unclip.cli.evaluate import evaluate

        return evaluate(kind, raw)

    _main("evaluate", run)


def _kind(argv: list[str]) -> str:
    """Take the kind of evaluation off the command line and choose its settings; plain --help shows those of a prior."""
    known = sorted(path.stem for path in (CONF / "evaluation").glob("*.yaml"))
    if argv[1:] == ["--help"]:
        return "prior"
    if len(argv) < 2 or argv[1] not in known:
        raise ConfigError(f"say first what to evaluate: unclip-evaluate KIND run=...; kinds: {', '.join(known)}")
    argv[1] = f"evaluation={argv[1]}"
    return argv[1].removeprefix("evaluation=")


def _main(root: str, run: Callable[[DictConfig], Any]) -> None:
    """Compose ``conf/ROOT.yaml`` with the command line and run; errors for users end in one message and exit code 1."""
    sys.argv[1:] = [forced(argument) for argument in sys.argv[1:]]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)

    composed = False

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=root)
    def command(raw: DictConfig) -> None:
        nonlocal composed
        composed = True
        with told_to_the_user(), _noted(raw):
            _drop_launch(raw)
            try:
                run(raw)
            except DivergedError as error:
                from unclip.cli.sweep import write_failure

                if not write_failure(Path(raw.run), error):  # the other trials of a sweep go on
                    raise
                logging.getLogger(__name__).warning("%s: %s", raw.run, error)

    try:
        command()
    except SystemExit as end:
        if end.code and not composed:
            note_error(ConfigError("the command line is refused; the log says why"))
        raise


def _drop_launch(raw: DictConfig) -> None:
    """``launch`` says where a command runs, which it need not know itself."""
    with open_dict(raw):
        given = raw.pop("launch", {})
    if given and HydraConfig.get().runtime.choices["launch"] == "local":
        raise ConfigError(f"launch.{next(iter(given))} is for launch=slurm: add that, or leave out launch.*")


@contextmanager
def _noted(raw: DictConfig) -> Iterator[None]:
    """Around a command: ``error.json`` in its run says that a setting or an artifact is wrong, for what starts it again.

    Outside of SLURM a sweep ends there, and leaves no trace of a trial that was not to be.
    """
    told = "SLURM_JOB_ID" in os.environ or HydraConfig.get().mode is not RunMode.MULTIRUN
    try:
        yield
    except (ConfigError, ArtifactError) as error:
        if told and not OmegaConf.is_missing(raw, "run"):
            note(Path(raw.run), ERROR, kind=type(error).__name__, message=str(error))
        raise


def forced(argument: str) -> str:
    """``net.widht=1`` as ``++net.widht=1``: Hydra then passes every key on, and ours is the one that refuses it.

    Hydra alone would suggest ``+net.widht=1`` for a misspelt key, which it then accepts and nobody reads.
    """
    key, equals, _ = argument.partition("=")
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    if not equals or key.startswith(("-", "~", "++", "hydra")) or key.split("@")[0] in groups:
        return argument
    return "++" + argument.lstrip("+") if key.lstrip("+") not in groups else argument
