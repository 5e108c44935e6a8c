"""A callback that sends signals to the run it belongs to, at the places that the environment names."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import lightning.pytorch as pl

PLACES = "SIGNALS_AT"  # "batch:7:SIGTERM validation:10:SIGUSR1", each answered before the call returns


class Signaller(pl.Callback):
    """Places are ``batch`` (the first micro-batch of a step), ``validation`` (its second batch) and ``save``.

    A rank, or a job of a sweep, tells the process that started it, and is answered a moment later.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Within a step: other micro-batches and the update are still to come."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._send(trainer, "batch", trainer.global_step + 1)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Within a validation."""
        if batch_idx == 1:
            self._send(trainer, "validation", trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        """Within a save."""
        self._send(trainer, "save", trainer.global_step)

    def _send(self, trainer: pl.Trainer, where: str, step: int) -> None:
        for word in os.environ.get(PLACES, "").split():
            place, at, name = word.split(":")
            if (place, int(at)) == (where, step) and trainer.is_global_zero:
                starter = multiprocessing.parent_process()
                if starter is None:
                    signal.raise_signal(signal.Signals[name])
                else:
                    os.kill(starter.pid or 0, signal.Signals[name])
