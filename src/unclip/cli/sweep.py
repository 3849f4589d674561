"""What the trials of a sweep leave in their folders: which are finished, which was best, a table, a plot and a command."""

import csv
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unclip import artifact
from unclip.drafts import write_atomic
from unclip.errors import ConfigError, TrainingError
from unclip.run_lock import RANKS

SETTINGS, FAILED, EVALUATION = "trial.json", "failed.json", "evaluation.json"
COMMANDS = {"embed": "unclip-embed", "evaluate": "unclip-evaluate"}  # the others are named like their settings


@dataclass
class Trial:
    """Trial ``number`` of the sweep in ``sweep``: settings that all share, and its ``own``, as overrides."""

    sweep: Path
    number: int
    fixed: list[str]
    own: list[str]

    @property
    def folder(self) -> Path:
        return self.sweep / str(self.number)

    @property
    def overrides(self) -> list[str]:
        return [*self.fixed, *self.own]

    @property
    def failed(self) -> bool:
        """Whether training diverged, which trying again would not change."""
        return (self.folder / FAILED).exists()

    @property
    def finished(self) -> bool:
        return self.failed or (self.folder / EVALUATION).exists() or (self.folder / "artifact").exists()

    def measures(self) -> dict[str, float]:
        """What a finished trial found, by name; nothing for a failed one."""
        if (self.folder / EVALUATION).exists():
            return json.loads((self.folder / EVALUATION).read_text())["measures"]
        return artifact.read_manifest(self.folder).metrics if (self.folder / "artifact").exists() else {}

    def value(self, objective: str) -> float:
        """The measure that the sweep is about; ConfigError, with those that exist, if there is none of that name."""
        found = self.measures()
        if objective not in found:
            raise ConfigError(
                f"{self.folder} has no {objective}; set hydra.sweeper.objective to one of: {', '.join(sorted(found))}"
            )
        return float(found[objective])

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"fixed": self.fixed, "own": self.own}
        write_atomic(self.folder / SETTINGS, (json.dumps(content, indent=2) + "\n").encode())

    def check_own(self) -> None:
        """ConfigError where another sweep ran under this number."""
        for other in trials(self.sweep):
            if other.number == self.number and other.own != self.own:
                raise ConfigError(
                    f"{self.folder} was run with {' '.join(other.own)}, not {' '.join(self.own)}: give the sweep the same "
                    "values in the same order, or another run=..."
                )

    def check_same(self, fixed: list[str]) -> None:
        """ConfigError where this trial was run with other settings than the sweep's present ones."""
        gone, new = (" ".join(sorted(set(a) - set(b))) for a, b in ((self.fixed, fixed), (fixed, self.fixed)))
        if gone or new:
            raise ConfigError(
                f"{self.folder} was run with other settings: {gone or 'nothing'} -> {new or 'nothing'}; use the same "
                "settings to go on with the sweep, or another run=... to start anew"
            )

    def forget_unless_begun(self) -> None:
        """A trial that could not start, by a misspelt setting for instance, binds nothing."""
        if not self.finished and not (self.folder / "identity.json").exists():
            (self.folder / SETTINGS).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def trials(sweep: Path) -> list[Trial]:
    """The trials that were begun, by number."""
    found = []
    for path in sweep.glob(f"*/{SETTINGS}"):
        content = json.loads(path.read_text())
        found.append(Trial(sweep, int(path.parent.name), content["fixed"], content["own"]))
    return sorted(found, key=lambda trial: trial.number)


def write_failure(run: Path, error: TrainingError) -> bool:
    """Note in a trial's folder that its training diverged; False if ``run`` is not a trial's."""
    if not (run / SETTINGS).exists():
        return False
    write_atomic(run / FAILED, (json.dumps({"error": str(error)}, indent=2) + "\n").encode())
    return True


def refuse_ranks() -> None:
    """ConfigError in one of several ranks. A batch script of SLURM is alone, though it has a SLURM_PROCID."""
    launched = any(name in os.environ for name in RANKS if name != "SLURM_PROCID")
    if launched or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise ConfigError("a sweep is one process that starts its trials; call it without torchrun or srun")


def command_name(root: str) -> str:
    """The command that reads ``conf/ROOT.yaml``."""
    return COMMANDS.get(root, root.replace("_", "-"))


def conclude(sweep: Path, objective: str, maximize: bool, command: str) -> None:
    """Write ``trials.csv``, ``trials.png`` and ``best.txt``, and show the table and the best trial's command."""
    done = [trial for trial in trials(sweep) if trial.finished]
    good = [trial for trial in done if not trial.failed]
    good.sort(key=lambda trial: trial.value(objective), reverse=maximize)
    names = list(dict.fromkeys(_key(text) for trial in done for text in trial.own))
    rows = [[str(t.number), *_values(t, names), f"{t.value(objective):.6g}"] for t in good]
    rows += [[str(t.number), *_values(t, names), "diverged"] for t in done if t.failed]
    with (sweep / "trials.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["trial", *names, objective], *rows])
    table = Table("trial", *names, objective, title=f"{sweep}: {len(done)} trials, best first", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if not good:
        raise TrainingError(f"all trials in {sweep} diverged; lower the learning rates that the sweep tries")
    _plot(sweep / "trials.png", good, names, objective)
    best = ready_command(command, good[0], f"{sweep}-best")
    (sweep / "best.txt").write_text(best + "\n")
    console.print(f"best: trial {good[0].number}, {objective} {good[0].value(objective):.6g}; in a run of its own:")
    console.print(best, soft_wrap=True, highlight=False)


def ready_command(command: str, trial: Trial, run: str) -> str:
    """The trial as a command outside of its sweep."""
    given = [text.lstrip("+") for text in trial.overrides if not _key(text).startswith(("sweep", "hydra", "launch"))]
    if command == "unclip-evaluate":
        kind = next(text for text in given if _key(text) == "evaluation")
        given.remove(kind)
        command = f"{command} {kind.partition('=')[2]}"
    return f"{command} {shlex.join([f'run={run}', *given])}"


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _values(trial: Trial, names: list[str]) -> list[str]:
    own: dict[str, Any] = {_key(text): text.partition("=")[2] for text in trial.own}
    return [own.get(name, "") for name in names]


def _plot(path: Path, good: list[Trial], names: list[str], objective: str) -> None:
    """A panel for each setting, value against objective; with two settings, one more of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(names) + (len(names) == 2)
    figure, axes = plt.subplots(1, count, figsize=(4 * count, 3.5), squeeze=False, layout="constrained")
    measured = [trial.value(objective) for trial in good]
    columns = [_axis([_values(trial, names)[i] for trial in good]) for i in range(len(names))]
    for axis, name, column in zip(axes[0], names, columns, strict=False):
        axis.plot(column, measured, "o")
        axis.set(xlabel=name, ylabel=objective, xscale=_scale(column))
    if len(names) == 2:
        axis = axes[0][-1]
        shown = axis.scatter(columns[0], columns[1], c=measured, s=60)
        axis.set(xlabel=names[0], ylabel=names[1], xscale=_scale(columns[0]), yscale=_scale(columns[1]))
        figure.colorbar(shown, label=objective)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _axis(texts: list[str]) -> list[Any]:
    """Numbers where all are numbers, else the words themselves."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return texts


def _scale(values: list[Any]) -> str:
    numbers = [v for v in values if isinstance(v, float)]
    return "log" if len(numbers) == len(values) and min(numbers) > 0 and max(numbers) >= 20 * min(numbers) else "linear"
