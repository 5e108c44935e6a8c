"""Where a run speaks: the terminal, and the same lines in run.log."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def run_log(path: Path) -> Iterator[logging.Logger]:
    """Sends the project's log to stdout and to a file for the length of a run.

    Warnings of other libraries go to the file only: they are for the one who looks for a cause.

    Args:
        path: ``run.log``; appended to, so that an adopted folder keeps its history.

    Yields:
        The logger ``lightning_opt``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.setLevel(logging.INFO)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    ours, captured = logging.getLogger("lightning_opt"), logging.getLogger("py.warnings")
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [terminal, file]
    captured.handlers, captured.propagate = [file], False
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            yield ours
    finally:
        logging.captureWarnings(False)
        captured.handlers, ours.handlers = [], []
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        file.close()


@contextmanager
def muted() -> Iterator[logging.Logger]:
    """Silence for the ranks of a run that are not its first: the first says and warns it all."""
    names = ("lightning_opt", "py.warnings", *_NOISY)
    for logger in map(logging.getLogger, names):
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    logging.captureWarnings(True)
    yield logging.getLogger("lightning_opt")
