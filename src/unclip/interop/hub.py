"""Runs to and from the Hugging Face hub: artifacts as they are, with a card written from their manifests.

A repository holds ``STAGE/artifact/`` for each stage, so what is fetched is a folder of runs. Only safetensors, JSON, YAML,
texts and pictures are sent or fetched.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from unclip import artifact
from unclip.artifact import MANIFEST, Manifest, refuse_half, stages_of
from unclip.drafts import complete_or_not
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.model_card import Card, card_of

PREFIX = "hf://"
FILES = ["*.safetensors", "*.json", "*.yaml", "*.md", "*.png", "*.txt", "LICEN?E*"]
DATA_TEXTS = ("ATTRIBUTION.md", "LICENSE", "LICENSE.txt", "LICENSE.md")  # beside a data set


@dataclass
class Push:
    """``runs``: a folder of runs, or one run or artifact. ``repo``: OWNER/NAME. ``licence``: of the weights, by the hub's
    identifier; "other" needs a file LICENSE in ``runs``."""

    runs: Path
    repo: str
    licence: str
    private: bool = False
    message: str = "Add stages"


def push(cfg: Push) -> str:
    """Create the repository if it is not there, and send everything in one commit; returns the commit's address.

    Raises :class:`ArtifactError` for stages that are damaged or of different CLIPs, and where the hub refuses or cannot be
    reached.
    """
    from huggingface_hub import HfApi, ModelCard

    with tempfile.TemporaryDirectory() as scratch:
        prepare(cfg, Path(scratch))
        with _told(cfg.repo):
            ModelCard.load(Path(scratch) / "README.md").validate()
            api = HfApi()
            api.create_repo(cfg.repo, private=cfg.private, exist_ok=True)
            done = api.upload_folder(repo_id=cfg.repo, folder_path=scratch, commit_message=cfg.message)
    return str(done.commit_url)


def prepare(cfg: Push, folder: Path) -> None:
    """Write into ``folder`` what would be sent."""
    stages = stages_of(cfg.runs)
    manifests = {name: artifact.verify(run) for name, run in stages.items()}
    _refuse_mixed(stages, manifests)
    for name, manifest in manifests.items():
        refuse_half(manifest, stages[name])
    sheets, texts = {}, _texts(cfg.runs, manifests)
    for name, run in stages.items():
        source = artifact.locate(run)
        (folder / name / "artifact").mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if file.suffix in (".safetensors", ".json", ".yaml"):
                link_or_copy(file, folder / name / "artifact" / file.name)
        drawn = sorted((run / "samples").glob("*.png"))
        if drawn:
            sheets[name] = f"{name}/sheet.png"
            shutil.copyfile(drawn[-1], folder / sheets[name])
    for name, file in texts.items():
        shutil.copyfile(file, folder / name)
    if cfg.licence == "other" and not texts:
        raise ConfigError(f"--license other needs its text: put it at {cfg.runs / 'LICENSE'}, or give an identifier")
    card = Card(cfg.repo, cfg.licence, sheets, list(texts))
    (folder / "README.md").write_text(card_of(manifests, card), encoding="utf-8")


def pull(repo: str, out: Path, revision: str | None = None) -> dict[str, Manifest]:
    """Fetch a repository into ``out`` and check every byte of its artifacts; returns their manifests by stage.

    Raises :class:`ArtifactError` as :func:`fetched` does and for damaged artifacts, :class:`ConfigError` where ``out`` exists.
    """
    with complete_or_not(out) as draft:
        shutil.copytree(_snapshot(repo, revision), draft, copy_function=link_or_copy, dirs_exist_ok=True)
        return {name: artifact.verify(run) for name, run in stages_of(draft).items()}


def fetched(place: str) -> Path:
    """The folder of ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``, fetched into the hub's cache unless it is there.

    Raises :class:`ArtifactError` for what is no such name, no such repository, and where the hub cannot be reached.
    """
    repo, _, revision = place.removeprefix(PREFIX).strip("/").partition("@")
    if repo.count("/") != 1:
        raise ArtifactError(f"{place} is not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return _snapshot(repo, revision or None)


def runs_folder(place: str) -> Path:
    """A folder of runs: ``place`` itself, or what it names on the hub."""
    return fetched(place) if place.startswith(PREFIX) else Path(place)


def _snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _told(repo):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))
    if not list(folder.glob(f"*/artifact/{MANIFEST}")):
        raise ArtifactError(f"{repo} holds no stages of unclip: `unclip push` writes STAGE/artifact/{MANIFEST}")
    return folder


def _refuse_mixed(stages: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> None:
    clips: dict[str, str] = {}
    for name, manifest in manifests.items():
        if hashed := manifest.hash if manifest.kind == "clip" else manifest.interface.get("clip", ""):
            clips.setdefault(hashed, name)
    if len(clips) > 1:
        (first, one), (second, other), *_ = clips.items()
        raise ArtifactError(
            f"{stages[one]} and {stages[other]} belong to two CLIPs, {first[:8]} and {second[:8]}; push them to two repositories"
        )


def _texts(runs: Path, manifests: Mapping[str, Manifest]) -> dict[str, Path]:
    """Licences and attributions by their names in the repository: those beside the runs, then those of the data sets."""
    found = {path.name: path for path in sorted(runs.glob("LICEN?E*")) if path.is_file()}
    for manifest in manifests.values():
        data = manifest.settings.get("data")
        place = Path(str(data.get("path"))) if isinstance(data, dict) and data.get("path") else None
        for name in DATA_TEXTS if place is not None else ():
            assert place is not None
            if (place / name).is_file():
                found[f"data-{place.name}-{name}"] = place / name
    return found


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under a second name where the disk allows it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ArtifactError(f"{repo} is no name of a repository, which is OWNER/NAME: {error}") from error
    except errors.RepositoryNotFoundError as error:
        raise ArtifactError(
            f"the hub has no {repo}, or it is private: check the name, and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ArtifactError(f"{repo} has no such revision: give a branch, a tag or a commit of it") from error
    except (errors.LocalEntryNotFoundError, *_network_errors()) as error:
        raise ArtifactError(
            f"the hub cannot be reached, and {repo} is not in the local cache ({type(error).__name__}); try again with a network"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ValueError) as error:
        raise ArtifactError(f"the hub refuses {repo}: {error}") from error


def _network_errors() -> tuple[type[Exception], ...]:
    """Of the HTTP client that this version of huggingface_hub uses."""
    found = []
    for module, name in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "ConnectionError")):
        try:
            found.append(getattr(import_module(module), name))
        except ModuleNotFoundError:
            continue
    return tuple(found)
