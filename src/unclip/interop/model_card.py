"""A model card of the Hugging Face hub, written from the manifests of what is pushed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unclip import __version__
from unclip.artifact import Manifest

METHOD = "https://arxiv.org/abs/2204.06125"
NOT_MEASURES = {"seconds"}


@dataclass
class Card:
    """What a card says beside the manifests.

    ``licence``: an identifier of the hub, such as apache-2.0; ``sheets``: pictures in the repository by stage;
    ``licence_files``: texts in the repository that go with the weights or the data.
    """

    repo: str
    licence: str
    sheets: Mapping[str, str] = field(default_factory=dict)
    licence_files: list[str] = field(default_factory=list)


def card_of(stages: Mapping[str, Manifest], card: Card) -> str:
    """The card's text: metadata that the hub reads, then stages, use, lineage, data, measures, sheets and licence."""
    parts = [
        f"# {card.repo}",
        _intro(stages),
        "## Use\n\n" + _use(stages, card.repo),
        "## Stages and lineage\n\n" + _lineage(stages),
        "## Data\n\n" + _data(stages),
        "## Measures\n\n" + _measures(stages),
        "## Licence\n\n" + _licence(stages, card),
    ]
    if card.sheets:
        sheets = [f"Drawn by the {stage} in training:\n\n![{stage}]({path})" for stage, path in card.sheets.items()]
        parts.insert(2, "## Pictures\n\n" + "\n\n".join(sheets))
    return f"---\n{_metadata(stages, card)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(stages: Mapping[str, Manifest], card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="unclip",
            dataset_name=_data_name(manifest),
            metric_type=name,
            metric_name=f"{stage}: {name}",
            metric_value=value,
        )
        for stage, manifest in stages.items()
        for name, value in _measured(manifest).items()
    ]
    named: dict[str, Any] = {"license": card.licence}
    if card.licence == "other":
        named |= {"license_name": "other", "license_link": card.licence_files[0]}
    data = ModelCardData(
        library_name="unclip",
        tags=["unclip", "dall-e-2", *sorted({manifest.kind for manifest in stages.values()})],
        pipeline_tag="text-to-image" if {"clip", "prior", "decoder"} <= {*stages} else "unconditional-image-generation",
        model_name=card.repo.split("/")[-1] if results else None,
        eval_results=results or None,
        **named,
    )
    return data.to_yaml()


def _intro(stages: Mapping[str, Manifest]) -> str:
    return (
        f"Stages of an unCLIP system ([Ramesh et al. 2022]({METHOD})), trained with unclip {__version__}: "
        f"{', '.join(stages)}. Weights are safetensors, each stage with a manifest that says what it is."
    )


def _use(stages: Mapping[str, Manifest], repo: str) -> str:
    lines = [f"unclip pull {repo} --out runs"]
    if {"clip", "prior", "decoder"} <= {*stages}:
        lines.append(f'unclip generate "a red cube" --from hf://{repo} --out pictures')
    return "```bash\n" + "\n".join(lines) + "\n```"


def _lineage(stages: Mapping[str, Manifest]) -> str:
    names = {manifest.hash: stage for stage, manifest in stages.items()}
    rows = ["| stage | model | step | samples seen | hash | trained on |", "|---|---|---|---|---|---|"]
    for stage, manifest in stages.items():
        parents = [f"{role} {names.get(value, 'elsewhere')} `{value[:12]}`" for role, value in manifest.parents.items()]
        imported = manifest.settings.get("imported")
        origin = [f"imported from {imported['from']}"] if isinstance(imported, dict) and "from" in imported else []
        rows.append(
            f"| {stage} | {manifest.model} | {manifest.step:,} | {manifest.samples:,} | `{manifest.hash[:12]}` | "
            f"{', '.join(parents + origin) or 'no other stage'} |"
        )
    return "\n".join(rows)


def _data(stages: Mapping[str, Manifest]) -> str:
    rows = []
    for stage, manifest in stages.items():
        if manifest.data:
            rows.append(f"- {stage}: {_data_name(manifest)}, fingerprint `{manifest.data[:12]}`")
        elif manifest.step:
            rows.append(f"- {stage}: not recorded")
        else:
            rows.append(f"- {stage}: not trained here; its weights were imported or mixed")
    return "\n".join(rows)


def _measures(stages: Mapping[str, Manifest]) -> str:
    rows = [
        f"| {stage} | {name} | {value:.5g} |"
        for stage, manifest in stages.items()
        for name, value in _measured(manifest).items()
    ]
    return "\n".join(["| stage | measure | value |", "|---|---|---|", *rows]) if rows else "None was taken."


def _licence(stages: Mapping[str, Manifest], card: Card) -> str:
    lines = [f"The weights: {card.licence}."]
    if card.licence_files:
        lines.append("Texts that go with them: " + ", ".join(f"[{name}]({name})" for name in card.licence_files) + ".")
    for stage, manifest in stages.items():
        imported = manifest.settings.get("imported")
        if isinstance(imported, dict) and imported.get("licence"):
            lines.append(f"The {stage} was imported, under: {imported['licence']}.")
    return "\n".join(lines)


def _data_name(manifest: Manifest) -> str:
    """The names of the data sets' folders, without the places they had on the machine."""
    data = manifest.settings.get("data")
    if not isinstance(data, dict) or not data.get("path"):
        return "unknown"
    others = [other.get("path", "") for other in data.get("others") or [] if isinstance(other, dict)]
    return " + ".join(str(path).rstrip("/").split("/")[-1] for path in [data["path"], *others])


def _measured(manifest: Manifest) -> dict[str, float]:
    return {name: value for name, value in manifest.metrics.items() if name not in NOT_MEASURES and value == value}
