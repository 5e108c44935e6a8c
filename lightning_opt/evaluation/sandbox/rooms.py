"""Several closed rooms side by side: programs judged at once, with the verdicts they get one by one."""

from __future__ import annotations

import atexit
import functools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from lightning_opt.evaluation.sandbox.room import Limits, Sandbox, Verdict
from lightning_opt.plan import available_cpus

_MOST = 16


class Rooms:
    """Sandboxes of the same limits; each opens with its first program and stays open.

    Args:
        limits: of each program.
        count: how many; None: see `affordable`.

    Attributes:
        rooms: they.
    """

    def __init__(self, limits: Limits | None = None, count: int | None = None) -> None:
        limits = limits or Limits()
        self.rooms = [Sandbox(limits) for _ in range(count or affordable(limits))]

    def run(self, programs: Sequence[str], told: Callable[[], None] = lambda: None) -> list[Verdict]:
        """Runs programs as `Sandbox.run` does, each alone in its room.

        Args:
            programs: Python sources.
            told: called as often as there are programs, while they come to their ends.

        Returns:
            The verdicts in the order of the programs.

        Raises:
            SandboxError: the machine cannot isolate programs.
        """
        free: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for room in self.rooms:
            free.put(room)

        def judge(program: str) -> Verdict:
            room = free.get()
            try:
                return room.run(program)
            finally:
                free.put(room)

        verdicts = []
        pool = ThreadPoolExecutor(len(self.rooms))
        try:
            for verdict in pool.map(judge, programs):
                verdicts.append(verdict)
                told()
        finally:
            pool.shutdown(cancel_futures=True)
        return verdicts

    def close(self) -> None:
        """Ends all rooms."""
        for room in self.rooms:
            room.close()


def affordable(limits: Limits) -> int:
    """One room per CPU, so that no program waits for another's; at most 16, and no more than memory is free for."""
    memory = psutil.virtual_memory().available // (limits.memory_bytes * limits.processes)
    return max(1, min(available_cpus(), memory, _MOST))


@functools.cache
def shared(limits: Limits) -> Rooms:
    """The rooms of this process for these limits; ended at exit."""
    rooms = Rooms(limits)
    atexit.register(rooms.close)
    return rooms
