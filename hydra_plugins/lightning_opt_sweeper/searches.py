"""Sweepers that decide from results what to run next; how they decide is in `lightning_opt.launch`."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _SearchSweeper(Sweeper):
    """Launches wave after wave of the search that `lightning_opt.launch` has checked before Hydra began."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes the launcher."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search to its end."""
        from lightning_opt.launch import searching, sweep

        stops = self.config.on_failure == "stop"
        return searching.drive(sweep.current_search(), self.launcher.launch, stops=stops)


class CoordinateDescentSweeper(_SearchSweeper):
    """One swept value at a time around the best so far.

    Args:
        params: overrides with several values, added to those of the command line.
        threshold: nats per token: a value is accepted where it lowers the validation loss by more.
        reach: how far along its list a value may lie from the one before; None: all of the list are tried.
    """

    def __init__(self, params: dict[str, str] | None = None, threshold: float = 3e-3, reach: int | None = None) -> None:
        self.params, self.threshold, self.reach = params, threshold, reach  # read by the checks before Hydra begins


class OptunaSweeper(_SearchSweeper):
    """What one of Optuna's samplers says.

    Args:
        params: overrides with several values, added to those of the command line.
        sampler: tpe, cmaes, random or gp.
        n_trials: with a result, in all.
        n_jobs: trials at once.
        sampler_seed: of the sampler.
    """

    def __init__(
        self,
        params: dict[str, str] | None = None,
        sampler: str = "tpe",
        n_trials: int = 20,
        n_jobs: int = 1,
        sampler_seed: int = 0,
    ) -> None:
        self.params, self.sampler, self.n_trials = params, sampler, n_trials  # read by the checks before Hydra begins
        self.n_jobs, self.sampler_seed = n_jobs, sampler_seed
