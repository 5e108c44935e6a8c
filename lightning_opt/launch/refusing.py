"""How a wrong command is refused where several processes, on several machines, were started with it."""

from __future__ import annotations

import socket
import sys

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
