"""Every combination of the swept values, which `lightning_opt.launch` has made and checked before Hydra began."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Hands the launcher the jobs that have no result yet; unlike Hydra's basic sweeper it writes no multirun.yaml.

    Args:
        params: overrides with several values, added to those of the command line.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params  # read by the checks before Hydra begins

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes the launcher."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the jobs at once: when each starts is for the launcher to say."""
        from lightning_opt.launch import sweep

        return [self.launcher.launch(sweep.left_to_run(), initial_job_idx=0)]
