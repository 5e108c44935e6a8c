"""The only writer of a run's checkpoints: snapshot now, disk in the background, old ones away."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_opt.checkpoints.manifest import find, plain_json
from lightning_opt.checkpoints.retention import Retention
from lightning_opt.checkpoints.staging import Staging
from lightning_opt.checkpoints.writing import clear_leftovers, clear_set_aside, remove, write

log = logging.getLogger("lightning_opt.checkpoints")


def _nobody(*_: Any, **__: Any) -> None:
    """Nobody wants to know."""


class Store:
    """Saves and thins out one run's checkpoints; leftovers of a killed writer are cleared first.

    Args:
        root: the folder of checkpoints; it need not exist.
        keep_last: how many of the newest stay.
        keep_best: how many of the lowest `monitor` stay.
        keep_every_n_steps: those whose step is a multiple stay for good; None = none.
        monitor: name of the metric that `save` is given.
        on_event: ``on_event("checkpoint_failed", step=, reason=)``, called from the thread that writes.

    Attributes:
        saved: steps that this object brought onto the disk.
        failures: saves that failed.

    Raises:
        ConfigError: a count that makes no sense.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_n_steps: int | None = None,
        monitor: str = "val/loss",
        on_event: Callable[..., None] = _nobody,
    ) -> None:
        self.root = Path(root)
        self.retention = Retention(keep_last, keep_best, keep_every_n_steps, monitor)
        self.saved: list[int] = []
        self.failures = 0
        self._on_event = on_event
        self._staging = Staging()
        self._writer: threading.Thread | None = None
        clear_leftovers(self.root)

    def save(
        self, tree: dict[str, Any], *, step: int, meta: dict[str, Any], metric: float | None = None, wait: bool = False
    ) -> None:
        """Takes a snapshot and returns; the disk follows in the background, after the save before it.

        A save that fails (disk full, no permission) never raises: it is logged, counted and told to `on_event`, older
        checkpoints are as they were, and the next save tries again.

        Args:
            tree: Lightning's checkpoint dict: tensors on any device, and plain types.
            step: optimizer steps done; a checkpoint of that step is replaced.
            meta: what to keep about it; plain JSON.
            metric: the monitored metric at this very step; None or not finite = unknown.
            wait: return when it is on disk.

        Raises:
            TypeError: the tree or `meta` holds something else than it may; the message says where.
        """
        meta = plain_json(meta)
        value = metric if metric is not None and math.isfinite(metric) else None
        self.wait()
        try:
            snapshot = self._staging.copy(tree)
        except (MemoryError, RuntimeError) as error:  # no host memory, or none that can be pinned
            self._failed(step, error)
            return
        arguments = (snapshot, step, meta, {"name": self.retention.monitor, "value": value})
        self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint-writer")
        self._writer.start()
        if wait:
            self.wait()
        else:
            _set_nice(self._writer, 10)  # training goes first

    def wait(self) -> None:
        """Returns when everything is on disk."""
        if self._writer is not None:
            _set_nice(self._writer, 0)
            self._writer.join()
            self._writer = None

    def abandon(self) -> None:
        """For a process that must end at once (`job.leave`): it will not wait for what is under way."""
        if self._writer is not None:
            self._writer.abandoned = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Returns when everything is on disk, and lets go of the host memory."""
        self.wait()
        self._staging = Staging()

    def _write(self, snapshot: dict[str, Any], step: int, meta: dict[str, Any], metric: dict[str, Any]) -> None:
        try:
            write(self.root, snapshot, step=step, meta=meta, metric=metric)
        except Exception as error:
            self._failed(step, error)
            return
        self.saved.append(step)
        try:
            self._thin_out(step)
        except OSError as error:
            log.warning("old checkpoints could not be looked through: %s", error)

    def _thin_out(self, step: int) -> None:
        # what lies beyond this step is another future of the run, and not ours to judge
        known = [checkpoint for checkpoint in find(self.root) if checkpoint.step <= step]
        kept = self.retention.kept(known)
        for checkpoint in known:
            if checkpoint.step not in kept:
                remove(checkpoint.path)
        clear_set_aside(self.root)

    def _failed(self, step: int, error: Exception) -> None:
        self.failures += 1
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.error("checkpoint of step %d was not saved: %s", step, reason)
        try:
            self._on_event("checkpoint_failed", step=step, reason=reason)
        except Exception as told:  # the same full disk, most likely
            log.error("and could not be recorded: %s", told)


def _set_nice(thread: threading.Thread, more: int) -> None:
    """Lets a thread step back behind this one, and 0 takes it back: only on Linux, and for whom both are allowed."""
    if thread.is_alive() and thread.native_id is not None and _may_take_back():
        with contextlib.suppress(OSError):  # it is done already
            os.setpriority(os.PRIO_PROCESS, thread.native_id, os.getpriority(os.PRIO_PROCESS, 0) + more)


@functools.cache
def _may_take_back() -> bool:
    """Whether a thread that stepped back may come forward again, tried out: else a save that is waited for would crawl.

    Root may, outside of most containers; others where `ulimit -e` says so.
    """
    may = []

    def attempt() -> None:
        mine = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, mine + 1)
            os.setpriority(os.PRIO_PROCESS, 0, mine)
            may.append(True)

    if sys.platform == "linux":  # elsewhere it would be the whole process
        thread = threading.Thread(target=attempt, name="nice")
        thread.start()
        thread.join()
    return bool(may)
