"""The last thing that a process does."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Ends this process; at once where a logger that was given up could hold it for ever.

    Its package may have threads and exit hooks that wait for what never comes, say a server that is gone.

    Args:
        code: exit code.
    """
    if not any(getattr(thread, "abandoned", False) for thread in threading.enumerate()):
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
