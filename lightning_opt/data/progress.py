"""A bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("lightning_opt.data")

_LINE_EVERY_S = 10.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of ``total`` (bytes) is done while the block runs; yields the function that adds to it."""
    started = time.monotonic()
    if sys.stderr.isatty():
        yield from _bar(what, total)
    else:
        yield from _lines(what, total)
    log.info("%s: done in %.1f s", what, time.monotonic() - started)


def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(what: str, total: int) -> Iterator[Callable[[int], None]]:
    done, last = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            log.info("%s: %.0f of %.0f MB", what, done / 1e6, total / 1e6)

    yield advance
