"""Jobs that somebody lists one by one, wave after wave, in one sweep folder: for studies and for your own searches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_opt.job.signals import terminable
from lightning_opt.launch.compose import Composer
from lightning_opt.launch.entry import hand_to_hydra
from lightning_opt.launch.preflight import Checker, check_lists


def run_jobs(
    lists: Sequence[Sequence[str]],
    folder: str | Path,
    *,
    words: Sequence[str],
    shared: Sequence[str] = (),
    draw: bool = True,
    until: float = math.inf,
) -> int:
    """Runs those of the jobs that have no result yet; the others, and what the folder holds besides, stay as they are.

    Every job is composed and checked before any starts. Wave after wave from one process is cheap: what was composed is
    used again, and the server from which the jobs are forked stays.

    Args:
        lists: the overrides of each job, one value each; a configuration that is there twice is one job.
        folder: the sweep folder, new or with jobs of earlier calls.
        words: the command that asks for the jobs, as typed after ``python``; the ledger keeps it.
        shared: overrides of all jobs, and of the sweep (``jobs_per_device=2``, ``on_failure=retry:1``,
            ``hydra/launcher=submitit_slurm``).
        draw: whether the sweep's comparison is drawn, and what has no result is said; else both are for the caller.
        until: `time.monotonic` after which our launcher starts nothing more; one with a queue of its own has all jobs
            at once.

    Returns:
        The exit code: 130 or 143 where it was stopped, else 1 where one of these jobs has no result, else 3 where one
        diverged, else 0.

    Raises:
        ConfigError: the first problem found; nothing was started.
    """
    from lightning_opt.launch import task
    from lightning_opt.launch.sweep import run_sweep

    if not lists:
        return 0
    with terminable() as signals:
        command = check_lists(_checker(), lists, Path(folder), shared=shared)
        try:
            return run_sweep(
                command,
                words,
                lambda overrides: hand_to_hydra(["--multirun", *overrides], task.run_job),
                draw=draw,
                until=until,
            )
        finally:
            signals.over = False  # the caller goes on, and may be stopped


@functools.cache
def _checker() -> Checker:
    with Composer() as composer:
        return Checker(composer)
