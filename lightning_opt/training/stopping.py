"""Leaving a fit between two optimizer steps, on all ranks after the same one, with the step saved."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_opt.training.group import Group

log = logging.getLogger("lightning_opt.training")


class Stopped(Exception):
    """The fit was left because a signal asked for it.

    Args:
        name: of the signal.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Stopping(pl.Callback):
    """Asks after each optimizer step whether to stop; then it saves and leaves.

    Lightning's own handlers are kept out: alone, its handler ends the process with exit code 0 and nothing saved; with
    several ranks it broadcasts from within the signal, where its collectives do not match the other ranks'.

    Args:
        asked: name of the signal that this process got, or None.
        group: the run's processes, which decide together.
    """

    def __init__(self, asked: Callable[[], str | None], group: Group):
        self._asked, self._group = asked, group

    def keep_lightning_out(self, trainer: pl.Trainer) -> None:
        """Takes the place of Lightning's handlers, and of its question to all ranks before each batch."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def check(self, save: Callable[[], None] = lambda: None) -> None:
        """Leaves the fit if any rank was asked to stop; every rank must call this.

        Args:
            save: called before, on all ranks.

        Raises:
            Stopped: one was.
        """
        mine = self._asked()
        number = self._group.max(signal.Signals[mine].value if mine else 0)
        if not number:
            return
        save()
        self._group.max(0)  # the first rank has written it: nobody leaves before
        raise Stopped(signal.Signals(number).name)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leaves between optimizer steps only."""
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0:
            self.check(lambda: self._save(trainer))

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A validation is not waited for; after the fit, its last step is on disk already."""
        in_fit = trainer.state.fn == TrainerFn.FITTING
        self.check((lambda: self._save(trainer)) if in_fit else (lambda: None))

    def _save(self, trainer: pl.Trainer) -> None:
        saves = [save for callback in trainer.callbacks if callable(save := getattr(callback, "save_now", None))]
        newest = max((step for save in saves if (step := save(trainer)) is not None), default=None)
        if newest == trainer.global_step:
            log.info("saved at step %d", newest)
        elif newest is not None:
            log.warning("not saved: the last checkpoint is that of step %d", newest)
        else:
            log.warning("not saved: there is no checkpoint, and the same command starts over")
