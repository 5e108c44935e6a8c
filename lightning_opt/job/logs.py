"""Where a run speaks: the terminal, and the same lines in run.log."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_opt.plan.secrets import mask

_NOISY = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "lm_eval",
    "datasets",
    "httpx",
    "absl",
    "grain",
    "matplotlib",
)


class _Discreet(logging.Formatter):
    """Formats tracebacks without secrets too."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class _Lasting(logging.FileHandler):
    """Outlives a full disk: what found no room stays in the stream's buffer, and follows with a later line."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _unless_full(handler: logging.Handler) -> logging.Handler:
    """Lets a handler be silent about a place that cannot be written: logging would print a traceback per line."""
    told = handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            told(record)

    handler.handleError = handle_error  # type: ignore[method-assign]
    return handler


@contextmanager
def run_log(path: Path) -> Iterator[logging.Logger]:
    """Sends the project's log to stdout and to a file for the length of a run.

    Warnings of other libraries go to the file only: they are for the one who looks for a cause. Nothing that is
    written shows a secret (`plan.secrets.guarding`). A full disk costs lines, not the run.

    Args:
        path: ``run.log``; appended to, so that an adopted folder keeps its history.

    Yields:
        The logger ``lightning_opt``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = _unless_full(logging.StreamHandler(sys.stdout))
    terminal.setFormatter(_Discreet("%(message)s"))
    terminal.setLevel(logging.INFO)
    file = _unless_full(_Lasting(path, encoding="utf-8"))
    file.setFormatter(_Discreet("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    with _borrowed() as (ours, captured, *noisy):
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        ours.setLevel(logging.INFO)
        ours.handlers, ours.propagate = [terminal, file], False
        captured.handlers, captured.propagate = [file], False
        try:
            yield ours
        finally:
            file.close()


@contextmanager
def muted() -> Iterator[logging.Logger]:
    """Silence for the ranks of a run that are not its first: the first says and warns it all."""
    with _borrowed() as loggers:
        for logger in loggers:
            logger.handlers, logger.propagate = [logging.NullHandler()], False
        yield loggers[0]


@contextmanager
def _borrowed() -> Iterator[list[logging.Logger]]:
    """Our logger, that of warnings and the noisy ones; given back as they were. Till then no record has a secret."""
    loggers = [logging.getLogger(name) for name in ("lightning_opt", "py.warnings", *_NOISY)]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    factory = logging.getLogRecordFactory()

    def discreet(*args: Any, **keywords: Any) -> logging.LogRecord:
        record = factory(*args, **keywords)
        with contextlib.suppress(Exception):  # whoever handles it will say that its arguments do not fit
            record.msg, record.args = mask(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(discreet)  # other libraries add handlers of their own, also later
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            yield loggers
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(factory)
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
