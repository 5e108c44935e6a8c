"""Worker processes that leave signals to the process they read for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# macOS cannot say who sent a signal, so there a worker must not refuse what may come from its parent.
_KNOWS_SENDER = hasattr(signal, "sigwaitinfo")


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started meanwhile are born deaf to SIGINT, SIGUSR1 and SIGTERM.

    A terminal or Slurm tells all processes of a run, which needs its workers to finish the step.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {signal.SIGINT, signal.SIGUSR1} | ({signal.SIGTERM} if _KNOWS_SENDER else set())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker: int = 0) -> None:
    """For a worker that is born deaf: SIGTERM from its parent ends it, as torch does where a worker hangs.

    Args:
        worker: its number, which torch hands over.
    """
    if not _KNOWS_SENDER:
        return
    parent = multiprocessing.parent_process()
    assert parent is not None

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=listen, name="parent", daemon=True).start()
