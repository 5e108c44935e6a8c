"""What became of the jobs of a comparison, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lightning_opt.reports import quantities as q
from lightning_opt.reports.jobs import Job

ENDINGS = ("FINISHED", "RUNNING", "STOPPED", "PREEMPTED", "DIVERGED", "FAILED", "UNKNOWN", "NOT STARTED")
"""States in the order of the tables."""

OVER = ("FINISHED", "DIVERGED")
"""States that are a result."""


def counted(jobs: Sequence[Job]) -> str:
    """How many came to what: ``5 finished, 1 diverged``."""
    found = Counter(_known(job.state) for job in jobs)
    return ", ".join(f"{found[state]} {state.lower()}" for state in ENDINGS if found[state])


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Jobs that the same command would run, failed ones again."""
    return [job for job in jobs if job.state not in OVER]


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Finished runs by their loss, then the others by how far they are from a result."""
    return sorted(jobs, key=lambda job: (ENDINGS.index(_known(job.state)), math.inf if job.loss is None else job.loss))


def _known(state: str) -> str:
    return state if state in ENDINGS else "UNKNOWN"


def ending(job: Job) -> str:
    """The state, and how far the run came: ``diverged, 312/800``."""
    words = job.state.lower()
    step, planned = q.finite(job.run.status.get("step")), q.finite(job.run.plan.get("max_steps"))
    if job.state in ("FINISHED", "NOT STARTED") or step is None:
        return words
    return f"{words}, {step:.0f}/{planned:.0f}" if planned else f"{words}, step {step:.0f}"


def remark(job: Job) -> str:
    """Why it is not finished, or how it stands; empty where there is nothing to say."""
    latest = job.run.series("val/loss")[1]
    if job.state == "RUNNING" and latest:
        return f"validation loss {q.number(latest[-1])} so far"
    if job.state == "STOPPED":
        return "its process is gone; the same command takes it up again"
    if job.state == "FINISHED":
        return "" if job.loss is not None else "its validation loss was not measured, so it cannot be ranked"
    if job.state in ("RUNNING", "NOT STARTED"):
        return ""
    return " ".join(str(job.run.status.get("reason") or "no reason was recorded").split())
