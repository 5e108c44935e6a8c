"""Plain one-line texts: numbers as people read them, and a way into the log that never reaches the console."""

from __future__ import annotations

import logging
import math
import sys

logger = logging.getLogger("lightning_opt.progress")


def number(value: float, digits: int = 3) -> str:
    """Fixed point where that is readable, else scientific: ``4.812``, ``1.23e+05``."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.{digits - 1}e}"


def quantity(value: float) -> str:
    """Three digits and a unit: ``14.2k``, ``987``, ``1.25M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(1.0, scaled))))}f}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _handlers() -> list[logging.Handler]:
    found: list[logging.Handler] = []
    current: logging.Logger | None = logger
    while current is not None:
        found += current.handlers
        current = current.parent if current.propagate else None
    return found


def _is_console(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def log_line(line: str) -> None:
    """One INFO record to every handler of ``lightning_opt.progress`` and above that does not write to the console."""
    if not logger.isEnabledFor(logging.INFO):
        return
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None, "progress")
    for handler in _handlers():
        if record.levelno >= handler.level and not _is_console(handler):
            handler.handle(record)
