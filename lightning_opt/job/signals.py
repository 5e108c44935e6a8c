"""SIGTERM as an exception, so that a run that is asked to end can say so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raises `Terminated` on SIGTERM for the length of a run.

    While Lightning trains it wraps this handler in its own, which ends the step first; then nothing is raised here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker: as if the handler were not there
            os._exit(128 + number)
        if signal.getsignal(number) is terminate:
            raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
