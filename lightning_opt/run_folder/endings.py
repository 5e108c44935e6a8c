"""How a run can end, and the record of an end that it could not write itself."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from enum import IntEnum

from lightning_opt.run_folder.folder import RunFolder
from lightning_opt.run_folder.records import append_event, append_text
from lightning_opt.run_folder.status import State, Status, read_status


class ExitCode(IntEnum):
    """What the process answers to whoever started it."""

    FINISHED = 0
    FAILED = 1
    CONFIGURATION = 2
    DIVERGED = 3
    INTERRUPTED = 130
    PREEMPTED = 143


class Diverged(RuntimeError):
    """Training left the finite numbers.

    Args:
        reason: one line.
        step: the step that was not taken, from 1: the weights are those from before it. None: every step was taken.
    """

    def __init__(self, reason: str, step: int | None = None):
        super().__init__(reason)
        self.step = step


def record_end(folder: RunFolder, config_hash: str, state: State, reason: str, traceback: str = "") -> None:
    """Writes state, reason, event and the lines of run.log for a run that ended outside its own stages.

    Args:
        folder: the run folder; it is made where the run died before it had one.
        config_hash: identity of the run's configuration.
        state: how it ended.
        reason: one line that says why.
        traceback: goes into run.log before the reason.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    status = Status(folder.status, config_hash)
    status.step = int(read_status(folder.status).get("step", 0))
    now = datetime.now().strftime("%Y-%m-%dT%H:%M:%S")
    lines = [f"{now} ERROR {text}\n" for text in (traceback.rstrip(), f"{state.lower()}: {reason}") if text]
    with suppress(OSError):  # the disk may be what it died of
        append_text(folder.log, "".join(lines))
    append_event(folder.events, state.lower(), step=status.step, reason=reason)
    status.set(state, reason)
