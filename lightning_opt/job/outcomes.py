"""How the processes of a run ended, and which of them the run ended by."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from lightning_opt.job.signals import Terminated
from lightning_opt.plan import ConfigError
from lightning_opt.plan.secrets import mask
from lightning_opt.run_folder import Diverged, ExitCode, RunFolder, read_json, write_json
from lightning_opt.run_folder.status import State


@dataclass(frozen=True)
class Outcome:
    """How one process ended.

    Attributes:
        state: the state that the run would have if this were its end.
        reason: one line that says why; None where all is well.
        code: exit code.
        traceback: of a failure that nobody foresaw.
        signal: name of the one that asked for the end.
        time: seconds since the epoch. What ended first is the cause: the other ranks fail because a rank is missing.
    """

    state: State = "FINISHED"
    reason: str | None = None
    code: int = ExitCode.FINISHED
    traceback: str = ""
    signal: str | None = None
    time: float = field(default_factory=time.time)

    def leave(self, folder: RunFolder, rank: int) -> None:
        """Leaves a note for the process that ends the run."""
        together = self.state in ("PREEMPTED", "DIVERGED")  # decided by all ranks
        reason = f"rank {rank}: {self.reason}" if rank and not together else self.reason
        with suppress(OSError):  # the exit code says the most of it
            write_json(folder.path / f".rank-{rank}.json", {**asdict(self), "reason": reason})


def outcome_of(error: BaseException, step: int) -> Outcome:
    """State, reason and exit code of what stopped a run.

    Args:
        error: what was raised.
        step: optimizer steps done.
    """
    if isinstance(error, ConfigError):
        return Outcome("FAILED", str(error), ExitCode.CONFIGURATION)
    if isinstance(error, Diverged):
        return Outcome("DIVERGED", str(error), ExitCode.DIVERGED)
    name = error.name if isinstance(error, Terminated) else None
    interrupt = error.__context__ if isinstance(error, SystemExit) else error  # Lightning makes one of the other
    if name == "SIGINT" or isinstance(interrupt, KeyboardInterrupt):
        return Outcome("PREEMPTED", f"interrupted at step {step}", ExitCode.INTERRUPTED, signal="SIGINT")
    if name:
        return Outcome("PREEMPTED", f"stopped by {name} at step {step}", ExitCode.PREEMPTED, signal=name)
    reason = mask(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Outcome("FAILED", reason, ExitCode.FAILED, mask("".join(traceback.format_exception(error))))


def left_notes(folder: RunFolder) -> dict[int, Outcome]:
    """Takes the notes that ranks have left, by rank: each is read once."""
    notes = {}
    for path in folder.path.glob(".rank-*.json"):
        notes[int(path.stem.rpartition("-")[2])] = Outcome(**read_json(path))
        path.unlink()
    return notes
