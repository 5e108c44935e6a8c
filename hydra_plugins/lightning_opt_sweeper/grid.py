"""Every combination of the swept values, like Hydra's basic sweeper, which would also write a multirun.yaml."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus


class GridSweeper(BasicSweeper):
    """Runs all combinations through the launcher and leaves each job's exit code with `lightning_opt.launch`."""

    def sweep(self, arguments: list[str]) -> list[list[JobReturn]]:
        """Launches every job, batch by batch; a failed job stops none of the others.

        Args:
            arguments: the overrides of the command line.
        """
        from lightning_opt.launch import task

        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        batches = self.split_arguments(overrides, self.max_batch_size)
        returns: list[list[JobReturn]] = []
        for batch in batches:
            first = sum(len(done) for done in returns)
            returns.append(list(self.launcher.launch(batch, initial_job_idx=first)))
        task.report([exit_code(job) for done in returns for job in done])
        return returns


def exit_code(job: JobReturn) -> int:
    """A job's exit code; 1 where it did not even come to return one."""
    value: Any = job._return_value
    return value if job.status == JobStatus.COMPLETED and isinstance(value, int) else 1
