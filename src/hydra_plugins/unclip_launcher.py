"""``launch=slurm``. Hydra finds this module by its package's name, and imports it at every start: keep it light."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class SlurmLauncherConfig:
    _target_: str = "hydra_plugins.unclip_launcher.SlurmLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="unclip_slurm", node=SlurmLauncherConfig(), provider="unclip")


class SlurmLauncher(Launcher):
    """Submits jobs and waits for them; their settings are ``launch.*``, see ``unclip.cli.launch``."""

    at_a_time = 1000  # jobs of one array, less than clusters allow; launch.parallel of them run together

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from unclip.cli.launch import Task, run_on_slurm
        from unclip.errors import told_to_the_user

        with told_to_the_user():
            tasks = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = number
                tasks.append(Task(self.hydra_context, self.task_function, config))
            return run_on_slurm(tasks)
