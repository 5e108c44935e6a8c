"""Each job in a process of its own; what that means is in `lightning_opt.launch.sweep`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class ProcessLauncher(Launcher):
    """One process per job, one job per device.

    Args:
        on_failure: `continue`, `stop` or `retry:N`.
        jobs_per_device: how many jobs share a device.
    """

    def __init__(self, on_failure: str = "continue", jobs_per_device: int = 1) -> None:
        self.on_failure, self.jobs_per_device = on_failure, jobs_per_device

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what Hydra hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs; a job's return value is its exit code."""
        from lightning_opt.launch import sweep

        setup_globals()
        configs = [self._compose(list(lines), initial_job_idx + n) for n, lines in enumerate(job_overrides)]
        run = functools.partial(_in_process, self.hydra_context, self.task_function)
        codes = sweep.launch(configs, run, on_failure=self.on_failure, jobs_per_device=self.jobs_per_device)
        return [
            JobReturn(
                overrides=lines, status=JobStatus.UNKNOWN if code is None else JobStatus.COMPLETED, _return_value=code
            )
            for lines, code in zip(job_overrides, codes, strict=True)
        ]

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config


def _in_process(context: HydraContext, function: TaskFunction, config: DictConfig) -> int:
    setup_globals()
    done = run_job(
        hydra_context=context,
        task_function=function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    return int(done.return_value)
