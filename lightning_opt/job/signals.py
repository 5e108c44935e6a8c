"""The signals that ask a run to end: at once, or, while it trains, after the step and its checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lightning_opt.plan import place

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_S = 1.0  # `timeout`, torchrun and Slurm tell a process and its group: what follows so soon is the same request
KEY_ECHO_S = 0.1  # the same for Ctrl-C where nothing but a terminal sends it


class Terminated(BaseException):
    """The process was asked to end.

    Args:
        name: of the signal.
    """

    def __init__(self, name: str = "SIGTERM"):
        super().__init__(name)
        self.name = name


class Signals:
    """What the signals of this process have asked for.

    The first raises at once, but inside `deferred` and `finishing`, where it is only noted in `asked`. A second raises
    anywhere, as long as it is not `over`.

    Args:
        passed_on: by a process that answers for this one: it kills where a second one is meant, so that here only the
            first counts, and it is the one that speaks.

    Attributes:
        asked: name of the first signal, or None.
        over: how the run ended is known and must be written down: outside `finishing` nothing raises any more.
    """

    def __init__(self, passed_on: bool = False):
        self.asked: str | None = None
        self.over = False
        self.owner = os.getpid()
        self._passed_on = passed_on
        self._launched = place().launcher is not None
        self._awaits: str | None = None  # what a first signal waits for
        self._answered = 0.0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets what runs inside end by itself, which it does soon after `asked` is set.

        Raises:
            Terminated: it was asked for.
        """
        with self.finishing("stopping after this step"):
            yield
        if self.asked:
            raise Terminated(self.asked)

    @contextmanager
    def finishing(self, words: str) -> Iterator[None]:
        """Lets what runs inside come to its end, and only a second signal cuts it short.

        Args:
            words: said to whoever sends the first.
        """
        self._awaits = words
        try:
            yield
        finally:
            self._awaits = None

    def begin(self) -> None:
        """For the next of several jobs of this process.

        Raises:
            KeyboardInterrupt: Ctrl-C came when the one before was over.
            Terminated: another signal did.
        """
        self.over = False
        if self.asked:
            raise KeyboardInterrupt if self.asked == "SIGINT" else Terminated(self.asked)

    def answer(self, number: int, frame: FrameType | None = None) -> None:
        """The handler.

        Raises:
            KeyboardInterrupt: Ctrl-C, at once.
            Terminated: another signal at once, or a second one of any kind while it trains: Lightning would answer
                KeyboardInterrupt by itself.
        """
        if os.getpid() != self.owner:  # a forked child that set no handlers of its own: as if it had inherited none
            os._exit(128 + number)
        now, first, name = time.monotonic(), self.asked is None, signal.Signals(number).name
        echo = ECHO_S if number != signal.SIGINT or self._launched else min(KEY_ECHO_S, ECHO_S)
        if not first and (self._passed_on or now - self._answered < echo):
            return
        self._answered, self.asked = now, self.asked or name
        if self._awaits and first:
            if not self._passed_on:  # print could be what was interrupted
                again = "once more" if echo < ECHO_S else f"once more, after {echo:.0f} s,"
                with suppress(OSError):
                    os.write(2, f"\n{name}: {self._awaits}; {again} stops at once\n".encode())
            return
        if self.over and not self._awaits:
            return
        if number == signal.SIGINT and not self._awaits:
            raise KeyboardInterrupt
        raise Terminated(name)


_active: Signals | None = None


@contextmanager
def terminable(*, passed_on: bool = False) -> Iterator[Signals]:
    """Answers `STOP_SIGNALS` for the length of a run; within another of this process it is the same.

    What the process was started to ignore (Ctrl-C in the background) stays ignored.

    Args:
        passed_on: see `Signals`.

    Yields:
        What they have asked for.
    """
    global _active
    if _active is not None and _active.owner == os.getpid():
        yield _active
        return
    signals = Signals(passed_on)
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may set handlers
        return
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, signals.answer) for number in heeded}
    _active = signals
    try:
        yield signals
    finally:
        _active = None
        for number, handler in before.items():
            signal.signal(number, handler)
