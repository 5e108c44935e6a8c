"""The last thing that a process does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import NoReturn, TextIO

from lightning_opt.job.signals import STOP_SIGNALS


def leave(code: int) -> NoReturn:
    """Ends this process; at once where a logger that was given up could hold it for ever.

    Its package may have threads and exit hooks that wait for what never comes, say a server that is gone. An output
    that cannot be written, a file on a full disk, does not change the exit code; Python alone makes 120 of it. Nor does
    a signal that asks the process to end, which it does.

    Args:
        code: exit code.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    flushed = all(map(_flush, (sys.stdout, sys.stderr)))
    if flushed and not any(getattr(thread, "abandoned", False) for thread in threading.enumerate()):
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(code)


def _flush(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True
