"""What is said of a command that comes to nothing: wrong, once for many processes, or stopped too soon."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import TextIO

from lightning_opt.job.signals import Terminated
from lightning_opt.plan import ConfigError, Place, place
from lightning_opt.run_folder import ExitCode


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints, by default to stderr; on a full disk, or where the reader is gone, records and exit codes say it."""
    with suppress(OSError):
        print(line, file=stream or sys.stderr, flush=True)


def refuse(error: ConfigError) -> ExitCode:
    """Says what is wrong, once on each machine, which may lack what the first has; beyond the first, with its name.

    Returns:
        The exit code of a wrong configuration.
    """
    try:
        here = place()
    except ConfigError:  # it is what is wrong
        here = Place()
    if here.local_rank == 0:
        say(str(error) if here.first else f"{socket.gethostname()}: {error}")
    return ExitCode.CONFIGURATION


def give_up(stop: KeyboardInterrupt | Terminated) -> ExitCode:
    """Says that a signal came before there was anything that could record it.

    Returns:
        The exit code.
    """
    said = f"stopped by {stop.name}" if isinstance(stop, Terminated) else "interrupted"
    say(f"{said} before anything was started")
    return ExitCode.PREEMPTED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
