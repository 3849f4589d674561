"""Whether a command of the documentation is one: its program, options, settings and values, without running it."""

import contextlib
import dataclasses
import re
import tempfile
import tomllib
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import typer
from doc_pages import HYDRA, ROOT, Command
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from unclip.cli.app import app
from unclip.cli.evaluate import EVALUATIONS
from unclip.cli.launch import SlurmConfig
from unclip.cli.plan import PlanSettings, read
from unclip.cli.train import CONF, forced
from unclip.config import typed
from unclip.data.embed import EmbedConfig
from unclip.models import REGISTRY
from unclip.models.interface import ModelConfig
from unclip.train import ClipTrainConfig, DecoderTrainConfig, PriorTrainConfig, UpsamplerTrainConfig

CONFIGS: dict[str, type] = {
    "train_clip": ClipTrainConfig,
    "train_prior": PriorTrainConfig,
    "train_decoder": DecoderTrainConfig,
    "train_upsampler": UpsamplerTrainConfig,
    "embed": EmbedConfig,
}
NEEDED = {
    "train_clip": ["run=r", "data.path=d"],
    "train_prior": ["run=r", "data.path=d", "data.embeddings=e"],
    "train_decoder": ["run=r", "data.path=d", "data.embeddings=e"],
    "train_upsampler": ["run=r", "data.path=d"],
    "embed": ["run=r", "clip=c", "data=d"],
    "prior": ["run=r", "prior=p", "data.path=d", "data.embeddings=e"],  # of unclip-evaluate
    "pictures": ["run=r", "drawn.folder=d", "real.folder=r"],
    "coco": ["run=r", "drawn.runs=d", "real.coco=c", "clip=c", "inception=i"],
    "coco_filtered": ["run=r", "drawn.runs=d", "real.coco=c", "clip=c", "inception=i", "train.split=t"],
}
_PLACEHOLDER = re.compile(r".*(…|\.\.\.)|[A-Z][A-Z_0-9]*(\.[a-z]+)?")  # paper_…, RUN, NAMES.txt


class WrongCommandError(AssertionError):
    pass


def check(command: Command) -> None:
    """Raises :class:`WrongCommandError`, or what the command itself would say."""
    program = command.words[0]
    if program in HYDRA:
        check_settings(HYDRA[program], list(command.words[1:]), command.inline)
    elif program.startswith("scripts/"):
        refuse(not (ROOT / program).is_file(), f"there is no {program}")
        refuse(not (ROOT / program).stat().st_mode & 0o100, f"{program} is not executable")
        _options_in(ROOT / program, command.words[1:])
    else:
        refuse(program not in CHECKS, f"{program} is no program that this page may speak of")
        CHECKS[program](command)


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise WrongCommandError(message)


def check_settings(root: str, words: list[str], inline: bool = False) -> None:
    """Compose and type the settings of a Hydra command. Of one in a sentence only what it names must be right."""
    if "--help" in words:
        return
    open_end = "…" in words
    words = [word for word in words if word != "…"]
    kind = ""
    if root == "evaluate":
        refuse(not words or words[0] not in EVALUATIONS, f"unclip-evaluate {words[:1]}: no such evaluation")
        kind, words = words[0], words[1:]
    overrides = []
    for word in _without_options(words):
        key, equals, value = word.partition("=")
        refuse(not equals, f"{word} is no setting")
        named = key in ("run", "clip", "data", "prior") or key.endswith("path")
        if (inline or open_end) and _PLACEHOLDER.fullmatch(value) and not named:
            group = key in {folder.name for folder in CONF.iterdir() if folder.is_dir()}
            refuse(not group and key not in known_settings(), f"there is no setting {key}")
            continue
        overrides.append(_first_value(word))
    given = {override.partition("=")[0] for override in overrides}
    elsewhere = {key for key in given if key.startswith("launch.")} if "launch=slurm" not in overrides else set()
    refuse(bool(elsewhere), f"{elsewhere} without launch=slurm")
    if any(key == "init" for key in given):  # the rest of the model is the artifact's
        unknown = {key for key in given if key not in known_settings()}
        refuse(bool(unknown), f"there is no setting {unknown}")
        return
    if inline or open_end:
        overrides = [need for need in NEEDED[kind or root] if not _is_given(need, given)] + overrides
    config = EVALUATIONS[kind][0] if kind else CONFIGS[root]
    _compose(root, tuple([f"evaluation={kind}"] * bool(kind) + overrides), config)


def _is_given(need: str, given: set[str]) -> bool:
    """Whether a setting is among the given ones; of where pictures come from any other does, too."""
    key = need.partition("=")[0]
    group = key.partition(".")[0] + "."
    return key in given or (group in ("drawn.", "real.") and any(other.startswith(group) for other in given))


def _without_options(words: list[str]) -> list[str]:
    """Hydra's own --config-dir and its folder left out: what lies there is tried by running the command."""
    if "--config-dir" not in words:
        return words
    at = words.index("--config-dir")
    folder = words[at + 1]
    refuse("=" in folder, "--config-dir needs a folder")
    return [word for i, word in enumerate(words) if i not in (at, at + 1) and not word.startswith("experiment=")]


def _first_value(word: str) -> str:
    """Of a sweep over several values the setting with its first one."""
    override = OverridesParser.create().parse_override(word)
    return f"{override.key_or_group}={next(override.sweep_string_iterator())}" if override.is_sweep_override() else word


@cache
def _compose(root: str, overrides: tuple[str, ...], config: type) -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose(root, [forced(override) for override in overrides])
    with open_dict(raw):
        launch = raw.pop("launch", None)
    if launch is not None:
        shown = OmegaConf.merge({"trainer": raw.get("trainer", {})}, {"launch": launch})
        typed(OmegaConf.create(OmegaConf.to_container(shown, resolve=True)["launch"]), SlurmConfig)
    typed(raw, config)


@cache
def known_settings() -> set[str]:
    """Dotted names of the settings of all commands, of their groups, and of `launch` and `unclip plan`."""
    found = set()
    for config in (*CONFIGS.values(), *(config for config, _ in EVALUATIONS.values()), PlanSettings):
        found |= _names(config)
    return found | {f"launch.{name}" for name in _names(SlurmConfig)}


def _names(config: type) -> set[str]:
    found = set()
    for name, hint in typing.get_type_hints(config).items():
        found.add(name)
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                kinds = [part]
                if issubclass(part, ModelConfig):
                    kinds = [kind for kind, _ in REGISTRY.values() if issubclass(kind, part)]
                found |= {f"{name}.{inner}" for kind in kinds for inner in _names(kind)}
    return found


def _unclip(command: Command) -> None:
    """The command line is read by the command itself, which then does nothing. Files and folders that it names are there."""
    root: Any = typer.main.get_command(app)
    words = ["runs" if word.startswith("hf://") else word for word in command.words[1:] if word != "…"]
    found, names = root, list[str]()
    while hasattr(found, "commands"):
        name = words[len(names)] if len(names) < len(words) else ""
        if not name and command.inline:
            return
        names.append(name)
        refuse(name not in found.commands, f"there is no unclip {' '.join(names)}")
        found = found.commands[name]
    found.callback = lambda **_: None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for word in words:
            if not word.startswith(("-", "/")):
                _make_path(Path(word))
        try:
            root.main(args=words, prog_name="unclip", standalone_mode=False)
        except Exception as error:
            if command.inline and type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"):
                return
            raise
    if found.name == "plan" and len(words) > 1:
        read([word for word in words[1:] if not _PLACEHOLDER.fullmatch(word.partition("=")[2])])


def _make_path(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.touch()
    else:
        path.mkdir(exist_ok=True)


def _make(command: Command) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w./-]+):", text, re.MULTILINE))
    for word in command.words[1:]:
        name, equals, _ = word.partition("=")
        if equals:
            refuse(f"{name} ?=" not in text, f"the Makefile has no variable {name}")
        else:
            refuse(word not in targets, f"the Makefile has no target {word}")


def _pip(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    refuse(command.words[1] != "install", f"pip {command.words[1]}")
    for word in command.words[2:]:
        if match := re.match(r"(?:unclip|\.)\[(.*)\]", word):
            unknown = set(match[1].split(",")) - extras.keys()
            refuse(bool(unknown), f"there is no extra {unknown}")


def _python(command: Command) -> None:
    script = ROOT / command.words[1]
    refuse(not script.is_file(), f"there is no {command.words[1]}")
    _options_in(script, command.words[2:])


def _options_in(script: Path, words: tuple[str, ...]) -> None:
    text = script.read_text() + "".join(path.read_text() for path in script.parent.glob("turns.py"))
    for word in words:
        refuse(word.startswith("--") and word not in text, f"{script.name} has no option {word}")


def _torchrun(command: Command) -> None:
    start = next((i for i, word in enumerate(command.words) if word in HYDRA), None)
    refuse(start is None, "torchrun starts none of our commands")
    check(dataclasses.replace(command, words=command.words[start:]))


def _sbatch(command: Command) -> None:
    """Of what stands behind the script: a command for train.sbatch, unclip-embed's settings for embed.sbatch."""
    start = next((i for i, word in enumerate(command.words) if word.endswith(".sbatch")), None)
    refuse(start is None, "sbatch starts none of our scripts")
    script, rest = command.words[start], command.words[start + 1 :]
    refuse(not (ROOT / script).is_file(), f"there is no {script}")
    check(dataclasses.replace(command, words=("unclip-embed", *rest) if script.endswith("embed.sbatch") else rest))


def _elsewhere(command: Command) -> None:
    """A program of others, whose options are not ours to check."""


CHECKS: dict[str, Callable[[Command], None]] = {
    "unclip": _unclip,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
    "sbatch": _sbatch,
    **dict.fromkeys(("scancel", "scontrol", "ssh", "tensorboard", "mkdir", "cp"), _elsewhere),
}
