"""What is said of a command that comes to nothing: wrong, once for many processes, or stopped too soon."""

from __future__ import annotations

import socket
import sys

from lightning_opt.job.signals import Terminated
from lightning_opt.plan import ConfigError, place
from lightning_opt.run_folder import ExitCode


def refuse(error: ConfigError) -> ExitCode:
    """Says what is wrong, once on each machine, which may lack what the first has; beyond the first, with its name.

    Returns:
        The exit code of a wrong configuration.
    """
    here = place()
    if here.local_rank == 0:
        print(error if here.first else f"{socket.gethostname()}: {error}", file=sys.stderr)
    return ExitCode.CONFIGURATION


def give_up(stop: KeyboardInterrupt | Terminated) -> ExitCode:
    """Says that a signal came before there was anything that could record it.

    Returns:
        The exit code.
    """
    said = f"stopped by {stop.name}" if isinstance(stop, Terminated) else "interrupted"
    print(f"{said} before anything was started", file=sys.stderr, flush=True)
    return ExitCode.PREEMPTED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
