"""How far long work is and how long the rest takes: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from lightning_opt.plan import amount, duration

LINE_EVERY_S = 10.0


class Meter:
    """Counts work done; a context manager.

    Args:
        what: is being done, in a few words.
        total: all of it, in steps that take about equal time.
        unit: what is counted, where it means something to the reader: then amounts are told, and the end.
        done: how much of it was done before.
        log: takes the lines.
        stream: where the bar may be; None: standard error.
        around: a context to log in.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str | None = None,
        done: int = 0,
        log: logging.Logger | None = None,
        stream: TextIO | None = None,
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, max(total, 1), unit, done
        self._log, self._stream, self._around = log or logging.getLogger("lightning_opt.data"), stream, around
        self._before = done
        self._bar = None

    def __enter__(self) -> Meter:
        self._started = self._said = time.monotonic()
        stream = self._stream or sys.stderr
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[so_far]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=stream), transient=True)
            self._bar.start()
            self._bar.add_task(self.what, total=self.total, completed=self.done, so_far=self._so_far())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self.unit is not None:
            self._say(f"{self.what}: done in {duration(time.monotonic() - self._started)}")

    def advance(self, work: int) -> None:
        """Adds to what is done, and says so if it is time."""
        self.done += work
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, so_far=self._so_far())
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            self._say(self.line(now - self._started))

    def line(self, elapsed: float) -> str:
        """One line of progress.

        Args:
            elapsed: seconds since the start.
        """
        text, since = f"{self.what}: {self._so_far()}", self.done - self._before
        if since <= 0 or elapsed <= 0:
            return text
        speed = "" if self.unit is None else f", {amount(since / elapsed, self.unit)}/s"
        return f"{text}{speed}, {duration(max(self.total - self.done, 0) * elapsed / since)} left"

    def _so_far(self) -> str:
        share = f"{100 * self.done / self.total:.0f} %"
        if self.unit is None:
            return share
        return f"{amount(self.done, self.unit)} of {amount(self.total, self.unit)} ({share})"

    def _say(self, line: str) -> None:
        with self._around():
            self._log.info("%s", line)
