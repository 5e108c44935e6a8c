"""A callback that fills the disk under the run it belongs to, and frees it again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Filler(pl.Callback):
    """Leaves not a byte from the end of one step on to the end of another.

    Args:
        fill: the step after which the disk is full.
        free: that after which it is as it was; 0 = never.
        stop: the step within which the run gets a SIGTERM; 0 = none.
    """

    def __init__(self, fill: int, free: int = 0, stop: int = 0) -> None:
        self._fill, self._free, self._stop = fill, free, stop

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self._stop:
            signal.raise_signal(signal.SIGTERM)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        filler = Path(trainer.default_root_dir).parent / "filler"
        if trainer.global_step in (self._fill, self._free):
            trainer.checkpoint_callback._store.wait()  # or a save of before would meet it too
        if trainer.global_step == self._fill:
            with filler.open("wb", buffering=0) as file:
                room = os.statvfs(filler.parent)
                file.write(bytes(room.f_bavail * room.f_frsize))
        elif trainer.global_step == self._free:
            filler.unlink()
