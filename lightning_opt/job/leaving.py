"""The last thing that a process does."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import NoReturn, TextIO


def leave(code: int) -> NoReturn:
    """Ends this process; at once where a logger that was given up could hold it for ever.

    Its package may have threads and exit hooks that wait for what never comes, say a server that is gone. An output
    that cannot be written, a file on a full disk, does not change the exit code; Python alone makes 120 of it.

    Args:
        code: exit code.
    """
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
