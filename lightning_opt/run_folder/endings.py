"""How a run can end."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process answers to whoever started it."""

    FINISHED = 0
    FAILED = 1
    CONFIGURATION = 2
    DIVERGED = 3
    INTERRUPTED = 130
    PREEMPTED = 143


class Diverged(RuntimeError):
    """Training left the finite numbers; the weights are those from before the step."""
