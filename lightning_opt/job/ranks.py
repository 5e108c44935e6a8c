"""A run's ranks: started by this process, watched, and never left alone.

The processes are told their places as torchrun would tell them, so Lightning starts none itself; its own launcher
would run the whole command once more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from lightning_opt.job.leaving import leave
from lightning_opt.job.logs import muted, run_log
from lightning_opt.job.outcomes import Outcome, left_notes
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.plan import Place
from lightning_opt.plan.secrets import guarding
from lightning_opt.run_folder import ExitCode, RunFolder

LOOK_S = 1.0  # between two looks at the step counter
SETTLE_S = 5.0  # for the other ranks to say what happened to them, once one has ended badly
LEAVE_S = 22.0  # for the other ranks, once one that was asked to end has saved: a logger of the first may take 20 s


class Steps(Protocol):
    """What is told of every optimizer step: the run's `Status`, or a counter that another process reads."""

    step: int


Work = Callable[[Any, "RunFolder | None", Steps, Place], Outcome]


class Counter:
    """Steps in memory that the starting process shares.

    Args:
        value: of `multiprocessing`.
    """

    def __init__(self, value: Any):
        self._value = value

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._value.value

    @step.setter
    def step(self, step: int) -> None:
        self._value.value = step


def speak(folder: RunFolder | None, place: Place) -> AbstractContextManager[logging.Logger]:
    """The log of a rank: the first rank's is the run's, the others' is silence."""
    return run_log(folder.log) if place.first and folder is not None else muted()


def start_ranks(work: Work, order: Any, folder: RunFolder, status: Steps, count: int) -> Outcome:
    """Starts the ranks of one machine and stays until the last is gone.

    Whatever ends one rank ends all; they also end when this process does, however it dies. What asks this process to
    end is passed on as SIGTERM, which all ranks answer after the same step; a second time kills them. Where another
    process took the port that they were to meet at, they are started once more.

    Args:
        work: what a rank does; found by its name in the new process, as is all that `order` refers to.
        order: handed to `work`.
        folder: the run folder; ranks leave notes there.
        status: told of the first rank's steps.
        count: number of ranks.

    Returns:
        What ended the run.

    Raises:
        KeyboardInterrupt: this process was interrupted; the ranks are gone.
        Terminated: the same by SIGTERM or SIGUSR1.
    """
    outcome = _start_once(work, order, folder, status, count)
    taken = "EADDRINUSE" in (outcome.reason or "")
    return _start_once(work, order, folder, status, count) if taken else outcome


def _start_once(work: Work, order: Any, folder: RunFolder, status: Steps, count: int) -> Outcome:
    context = multiprocessing.get_context("spawn")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "lightning_opt"}
    steps = Counter(context.RawValue("q", status.step))
    ranks = []
    for rank in range(count):
        place = Place(rank, rank, count, "torchrun")
        told = {**meeting, **place.environment(count)}
        ranks.append(context.Process(target=_rank, args=(work, order, folder, steps, place, told), name=f"rank-{rank}"))
    try:
        for process in ranks:
            process.start()
        while any(process.exitcode is None for process in ranks) and not any(process.exitcode for process in ranks):
            wait([process.sentinel for process in ranks if process.exitcode is None], timeout=LOOK_S)
            status.step = steps.step
        dead = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
        _stop(ranks, LEAVE_S if ExitCode.PREEMPTED in dead.values() else SETTLE_S)
    except (KeyboardInterrupt, Terminated):
        _stop(ranks, LEAVE_S, together=True)
        left_notes(folder)  # they only tell that they were asked to stop, as we are
        raise
    finally:
        status.step = steps.step
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    return _cause(dead, left_notes(folder))


def _cause(dead: dict[int, int], notes: dict[int, Outcome]) -> Outcome:
    """A rank that died without a word comes first: what the others then said is the consequence."""
    for rank, code in dead.items():
        if rank not in notes:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Outcome("FAILED", f"rank {rank} {how}", ExitCode.FAILED)
    return min(notes.values(), key=lambda note: note.time, default=Outcome())


def _stop(ranks: list[BaseProcess], patience: float, *, together: bool = False) -> None:
    """Asks the living ranks to end, and waits.

    Args:
        ranks: the processes.
        patience: seconds to wait.
        together: they count from the first rank's end: a step takes as long as it takes, but one that waits for a
            rank that is gone, in a call below Python, hears nothing.
    """
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.terminate()
    if together and len(alive) == len(ranks):
        wait([process.sentinel for process in alive])
    deadline = time.monotonic() + patience
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(work: Work, order: Any, folder: RunFolder, steps: Counter, place: Place, environment: dict[str, str]) -> None:
    """What a new process does: takes its place, works, and leaves a note where it did not finish."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all of us; the starting process passes it on
    threading.Thread(target=_end_with_starter, name="starter", daemon=True).start()
    with guarding(getattr(order, "config", None)), terminable(passed_on=True) as signals, speak(folder, place):
        outcome = work(order, folder, steps, place)
        signals.over = True
    leave(int(outcome.code))


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None
    wait([starter.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
