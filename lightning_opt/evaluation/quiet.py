"""The quiet in which lm-eval is imported and runs."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

from lightning_opt.data.meter import Meter

_LOG = logging.getLogger("lightning_opt.evaluation")
_CHATTERERS = ("lm_eval", "transformers", "datasets", "huggingface_hub", "accelerate", "filelock", "fsspec", "httpx")
_terminal: list[tuple[io.TextIOBase, io.TextIOBase]] = []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval, transformers and datasets from the terminal: log lines below error, warnings, progress bars.

    What they wrote goes to the debug log when something fails.
    """
    levels = {name: logging.getLogger(name).level for name in _CHATTERERS}
    heard = io.StringIO()
    _terminal.append((sys.stdout, sys.stderr))
    try:
        for name in _CHATTERERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        _LOG.debug("lm-eval said:\n%s", heard.getvalue()[-20_000:])
        raise
    finally:
        _terminal.pop()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def aloud() -> Iterator[None]:
    """Inside `quiet`, lets our own log lines reach the terminal."""
    if not _terminal:
        yield
        return
    out, error = _terminal[0]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield


def terminal() -> io.TextIOBase:
    """The terminal's error stream, inside `quiet` too."""
    return _terminal[0][1] if _terminal else sys.stderr


def metered(what: str, total: int) -> Meter:
    """A meter that is seen and heard inside `quiet`.

    Args:
        what: is counted, in a few words.
        total: all of it.
    """
    return Meter(f"evaluation, {what}", total, log=_LOG, stream=terminal(), around=aloud)
