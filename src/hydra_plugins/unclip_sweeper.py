"""Sweepers for ``conf/sweep``: all combinations, or Optuna's proposals. Hydra finds this module by its package's name.

Both give trial N the run folder ``run/N``. What a trial left there says whether it is finished; one that was killed is run
again with the same settings in the same folder. ``unclip.cli.sweep`` reads the folders and sums up.
"""

import itertools
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

    from unclip.cli.sweep import Trial

log = logging.getLogger(__name__)


@dataclass
class SweeperConfig:
    """``params``: setting to value or to a sweep in Hydra's grammar (``1,2``, ``interval(0,1)``); the command line wins.

    ``objective`` names a metric of the trained artifact (``val/mse``) or a measure of an evaluation (``cosine_to_true``).
    ``parallel`` trials are given to the launcher at a time; 0: one, but all of a grid to launch=slurm, as one array of jobs.
    """

    _target_: str = MISSING
    objective: str = MISSING
    maximize: bool = False
    parallel: int = 0
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class GridConfig(SweeperConfig):
    _target_: str = "hydra_plugins.unclip_sweeper.GridSweeper"


@dataclass
class OptunaConfig(SweeperConfig):
    _target_: str = "hydra_plugins.unclip_sweeper.OptunaSweeper"
    num_trials: int = 16
    seed: int = 0


ConfigStore.instance().store(group="hydra/sweeper", name="unclip_grid", node=GridConfig, provider="unclip")
ConfigStore.instance().store(group="hydra/sweeper", name="unclip_optuna", node=OptunaConfig, provider="unclip")


class FolderSweeper(Sweeper):
    """Runs trials in numbered folders, and ends with a table, a plot and the best configuration as a command."""

    def __init__(self, objective: str, maximize: bool, parallel: int, params: dict[str, Any]) -> None:
        self.objective, self.maximize, self.parallel, self.params = objective, maximize, parallel, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.settings, self.context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from unclip.cli import sweep as folders
        from unclip.errors import ConfigError, told_to_the_user
        from unclip.run_lock import RunLock

        with told_to_the_user():
            if OmegaConf.is_missing(self.settings, "run"):
                raise ConfigError("run is not set; give the sweep's folder on the command line: run=...")
            folders.refuse_ranks()
            self.folder = Path(self.settings.run)
            fixed, varied = self._settings(arguments)
            if not varied:
                raise ConfigError(
                    "nothing varies in this sweep; give some setting several values, as optim.lr=1e-4,1e-3"
                )
            with RunLock(self.folder, "sweep.lock"):
                for trial in folders.trials(self.folder):
                    trial.check_same(fixed)
                self._run_all(fixed, varied)
                command = folders.command_name(self.settings.hydra.job.config_name)
                folders.conclude(self.folder, self.objective, self.maximize, command)

    def _settings(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, Override]]:
        """What all trials share, and what varies; of two values for one setting the later one counts."""
        from unclip.cli.train import forced

        given = [forced(f"{key}={_text(value)}") for key, value in self.params.items()]
        given += [a for a in arguments if not a.lstrip("+").startswith("run=")]
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        last = {o.key_or_group: o for o in parser.parse_overrides(given)}
        fixed = [str(o.input_line) for o in last.values() if not o.is_sweep_override()]
        return fixed, {key: o for key, o in last.items() if o.is_sweep_override()}

    @abstractmethod
    def _run_all(self, fixed: list[str], varied: dict[str, Override]) -> None:
        """Run the trials that are not finished."""

    def _by_default(self) -> int:
        """Trials at a time where ``parallel`` is 0."""
        return 1

    def _run(self, trials: "Sequence[Trial]") -> None:
        """Launch some trials; what could not even start leaves no trace."""
        waiting = [trial for trial in trials if not trial.finished]
        for trial in waiting:
            trial.write()
        number = max(1, self.parallel or self._by_default())
        try:
            for first in range(0, len(waiting), number):
                batch = waiting[first : first + number]
                jobs = [[*trial.overrides, f"++run={trial.folder}"] for trial in batch]
                log.info("trials %s", ", ".join(f"{t.number}: {' '.join(t.own)}" for t in batch))
                for result in self.launcher.launch(jobs, initial_job_idx=batch[0].number):
                    _ = result.return_value  # raises what the job raised
        finally:
            for trial in waiting:
                trial.forget_unless_begun()


class GridSweeper(FolderSweeper):
    """All combinations, as of Hydra's basic sweeper; trial numbers follow its order."""

    def _run_all(self, fixed: list[str], varied: dict[str, Override]) -> None:
        from unclip.cli.sweep import Trial
        from unclip.errors import ConfigError

        sides: list[list[str]] = []
        for key, override in varied.items():
            if not override.is_discrete_sweep():
                raise ConfigError(f"{key} is an interval, which only a sweep by Optuna can search; list its values")
            sides.append([f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()])
        trials = [Trial(self.folder, n, fixed, list(own)) for n, own in enumerate(itertools.product(*sides))]
        for trial in trials:
            trial.check_own()
        self._run(trials)

    def _by_default(self) -> int:
        return getattr(self.launcher, "at_a_time", 1)


class OptunaSweeper(FolderSweeper):
    """Proposals of Optuna's TPE, each from the finished trials and ``seed`` alone; the study is ``run/optuna.jsonl``."""

    def __init__(self, num_trials: int, seed: int, **common: Any) -> None:
        super().__init__(**common)
        self.num_trials, self.seed = num_trials, seed

    def _run_all(self, fixed: list[str], varied: dict[str, Override]) -> None:
        from unclip.errors import ConfigError

        space = {key: _distribution(key, override) for key, override in varied.items()}
        study = self._study()
        self._tell(study)
        self._run(list(self._open(study)))  # killed ones
        self._tell(study)
        while (left := self.num_trials - self._count(study)) > 0:
            asked = []
            for _ in range(min(left, max(1, self.parallel))):
                try:
                    asked.append(self._ask(study, space, varied, fixed))
                except ValueError as error:
                    raise ConfigError(f"{error}; choose another run=... for another space") from error
            self._run(asked)
            self._tell(study)

    def _study(self) -> "Study":
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        from unclip.cli.sweep import trials

        path = self.folder / "optuna.jsonl"
        Path(f"{path}.lock").unlink(missing_ok=True)  # of a killed process: sweep.lock keeps others out
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            path.write_bytes(whole[0] + whole[1])  # a kill may have cut the last line
        if not trials(self.folder):
            path.unlink(missing_ok=True)  # nothing ever began
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = "maximize" if self.maximize else "minimize"
        storage = JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)

    def _ask(
        self, study: "Study", space: "dict[str, BaseDistribution]", varied: dict[str, Override], fixed: list[str]
    ) -> "Trial":
        from optuna.samplers import TPESampler

        from unclip.cli.sweep import Trial

        study.sampler = TPESampler(seed=self.seed * 1_000_003 + len(study.trials))
        asked = study.ask(space)
        own = [f"{varied[key].get_key_element()}={_number(asked.params[key])}" for key in space]
        return Trial(self.folder, asked.number, fixed, own)

    def _open(self, study: "Study") -> "Iterator[Trial]":
        from optuna.trial import TrialState

        from unclip.cli.sweep import trials

        known = {trial.number: trial for trial in trials(self.folder)}
        for frozen in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if frozen.number in known:
                yield known[frozen.number]
            else:
                study.tell(frozen.number, state=TrialState.FAIL)  # it never began

    def _tell(self, study: "Study") -> None:
        from optuna.trial import TrialState

        for trial in self._open(study):
            if trial.failed:
                study.tell(trial.number, state=TrialState.FAIL)
            elif trial.finished:
                study.tell(trial.number, trial.value(self.objective))

    def _count(self, study: "Study") -> int:
        from unclip.cli.sweep import trials

        return sum(trial.finished for trial in trials(self.folder))


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _distribution(key: str, override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from unclip.errors import ConfigError

    value = override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        logarithmic = "log" in value.tags
        if logarithmic and value.start <= 0:
            raise ConfigError(f"{key}: the logarithm of {value.start} does not exist; let the interval begin above 0")
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=logarithmic)
        return FloatDistribution(float(value.start), float(value.end), log=logarithmic)
    if isinstance(value, RangeSweep) and all(isinstance(n, int) for n in (value.start, value.stop, value.step)):
        values = list(range(int(value.start or 0), int(value.stop or 0), int(value.step)))
        return IntDistribution(values[0], values[-1], step=int(value.step))
    if isinstance(value, (ChoiceSweep, RangeSweep)):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise ConfigError(
        f"{key}={override.get_value_element_as_str()} is no sweep; give 1,2 or interval(1,2) or range(1,9)"
    )
