"""Slurm's queue: a job that was warned before its time is up asks to be started again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Requeued:
    """What came of it.

    Attributes:
        job: the Slurm job, as ``scontrol`` calls it.
        failure: one line that says why it is not back in the queue; None where it is.
    """

    job: str
    failure: str | None

    def __str__(self) -> str:
        if self.failure is None:
            return f"Slurm job {self.job} is back in the queue"
        return f"Slurm job {self.job} could not be put back into the queue: {self.failure}"


def requeue() -> Requeued | None:
    """Asks Slurm to put this job back into its queue; Slurm then ends it.

    A task of an array is called by the array and its place: the plain number of one of them means them all. A process
    that a sweep or a run started leaves it to that one.

    Returns:
        What came of it; None where there is no Slurm job that this process answers for.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or multiprocessing.parent_process() is not None or shutil.which("scontrol") is None:
        return None
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{place}" if array and place else job
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Requeued(job, " ".join(str(error).split()))
    said = " ".join(f"{done.stderr} {done.stdout}".split())
    failed = done.returncode not in (0, -signal.SIGTERM)  # Slurm ends all that the job started, scontrol too
    return Requeued(job, (said or f"exit code {done.returncode}") if failed else None)
