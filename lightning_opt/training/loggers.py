"""Loggers of other people's that can be slow, missing or broken without costing the run more than one warning."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger

from lightning_opt.plan.secrets import clean_text

log = logging.getLogger("lightning_opt.training")

START_S = 20.0  # for imports and the constructor
END_S = 20.0  # less than what a scheduler leaves between SIGTERM and SIGKILL
BACKLOG = 1000  # calls; at one row and one `save` per logged step, hundreds of rows

_Call = Callable[[Logger], Any]


class GuardedLogger(Logger):
    """Hands everything to another logger, in a thread of its own, until that fails.

    The other logger is made in that thread too. Whatever it raises, and a call that does not return while `BACKLOG`
    more are waiting, ends it with one warning: nothing more is handed on, and the run goes on. So neither a missing
    package, a missing key nor an unreachable server can stop or slow down training. Only the first rank makes one.

    Whatever else it has (``experiment``, ``watch``, ``log_image``) is reached through this object, once all before has
    been handed on; an error in there is the caller's.

    Args:
        label: its name in the warning, for example ``wandb``.
        make: makes the logger; may raise anything.
        start_s: seconds that making it, or asking it for something else, may take the caller's time.
        end_s: seconds that `close` waits for what is still to be written.

    Attributes:
        current_step: optimizer steps done so far. Given to the logger as the step, so that its axis is that of
            ``metrics.csv``; Lightning's own is one less in training than in validation. None: Lightning's.
    """

    def __init__(self, label: str, make: Callable[[], Logger], *, start_s: float = START_S, end_s: float = END_S):
        super().__init__()
        self.current_step: Callable[[], int] | None = None
        self._label, self._start_s, self._end_s = label, start_s, end_s
        self._failed = False
        self._row: tuple[int | None, dict[str, float]] = (None, {})
        self._calls: queue.Queue[_Call | None] = queue.Queue(BACKLOG)
        self._made = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"logger {label}", daemon=True)
        self._thread.start()
        self._made.wait(start_s)  # imports in two threads at once may meet half-made modules

    def _work(self, make: Callable[[], Logger]) -> None:
        try:
            logger = make()
            self._made.set()
            while (call := self._calls.get()) is not None:
                call(logger)
        except BaseException as error:  # some end the process where they cannot start
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._made.set()

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            text = clean_text(" ".join(why.split()))[:300]
            log.warning("logger %s: %s; the run goes on without it, metrics.csv has everything", self._label, text)

    def _hand(self, call: _Call | None) -> None:
        if self._failed:
            return
        try:
            if self._row[1]:
                (step, values), self._row = self._row, (None, {})
                self._calls.put_nowait(lambda logger: logger.log_metrics(values, step))
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{BACKLOG} calls behind")

    @property
    def name(self) -> str:
        """The label: the other's own name may ask a server."""
        return self._label

    @property
    def version(self) -> str:
        """Unused by us: the run folder is the version."""
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hands on what is logged for one step at once, when Lightning saves; without Lightning's ``epoch``."""
        now = self.current_step() if self.current_step else step
        if self._row[1] and self._row[0] != now:
            self.save()
        self._row = now, {**self._row[1], **{name: value for name, value in metrics.items() if name != "epoch"}}

    def log_hyperparams(self, params: Any, *args: Any, **keywords: Any) -> None:
        """Hands on hyperparameters."""
        self._hand(lambda logger: logger.log_hyperparams(params, *args, **keywords))

    def log_graph(self, *_: Any, **__: Any) -> None:
        """Nothing: tracing a model beside its training is not safe in another thread."""

    def save(self) -> None:
        """Hands on."""
        self._hand(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """Hands on; metrics may follow, for Lightning calls this before the validation that ends a run."""
        self._hand(lambda logger: logger.finalize(status))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Hands on."""
        self._hand(lambda logger: logger.after_save_checkpoint(checkpoint_callback))

    def close(self) -> None:
        """Ends the other logger: waits for what is still to be written, but not for ever.

        A thread that does not end is marked ``abandoned``, so that the process will not wait for it either.
        """
        if not self._failed:
            self._hand(_finish)
            self._hand(None)
            self._thread.join(self._end_s)
            if self._thread.is_alive():
                self._fail(f"not done {self._end_s:g} s after the end of training")
            self._failed = True
        self._thread.abandoned = self._thread.is_alive()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._failed:
            raise AttributeError(f"no {name}: the logger has failed")
        answer: Future[Any] = Future()

        def look(logger: Logger) -> None:
            try:
                answer.set_result(getattr(logger, name))
            except Exception as error:
                answer.set_exception(error)

        self._hand(look)
        try:
            return answer.result(self._start_s)
        except TimeoutError:
            raise AttributeError(f"no {name}: the logger {self._label} does not answer") from None


def _finish(logger: Logger) -> None:
    """Ends a W&B run, or the next one in this process would go on with it."""
    finish = getattr(getattr(logger, "_experiment", None), "finish", None)
    if finish:
        finish()


def wandb_logger(**keywords: Any) -> Logger:
    """Lightning's W&B logger; offline where nobody has logged in, instead of asking for a key.

    Online means a key in WANDB_API_KEY, WANDB_IDENTITY_TOKEN_FILE or from ``wandb login``. WANDB_MODE decides where it
    is set. The command line is kept out of what W&B stores: it may hold secrets that the configuration's copy lacks.

    Args:
        **keywords: of Lightning's `WandbLogger`; ``offline`` None chooses as above.
    """
    from lightning.pytorch.loggers import WandbLogger

    if keywords.get("offline") is None:
        keywords["offline"] = not os.environ.get("WANDB_MODE") and not _logged_in()
        if keywords["offline"]:
            log.info("logger wandb: not logged in, so this run is kept on disk; `wandb sync` sends it later")
    settings = {"x_disable_meta": True, **(keywords.pop("settings", None) or {})}
    return WandbLogger(settings=settings, **keywords)


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files = [os.environ.get("NETRC"), *(str(Path.home() / name) for name in (".netrc", "_netrc"))]
    for file in filter(None, files):
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
