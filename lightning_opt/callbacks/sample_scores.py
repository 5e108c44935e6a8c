"""Does the model get better at its tasks? Scores of a small fixed sample while it trains."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from lightning_opt.callbacks.rng import undisturbed
from lightning_opt.callbacks.telling import tell
from lightning_opt.plan import check_value

log = logging.getLogger("lightning_opt.callbacks")

SHARE = "score/time_share"
SECONDS = "score/seconds"


class SampleScores(pl.Callback):
    """Calls a scorer every so many optimizer steps and logs what it returns.

    The run does not feel it: weights, train/eval modes, gradients' switch and every random state are as before, so a
    run with it takes the same steps to the last bit, and so does a resumed one. An exception of the scorer is one
    warning, and there are no scores from there on. `Throughput` and `Progress` do not count its time.

    Scored is what validation would see: averaged weights where a callback averages them (Lightning's `WeightAveraging`
    and so `EMA`) or the optimizer does (schedule-free: its ``eval`` and ``train``), at the trainer's precision, never
    compiled (a sample has many shapes).

    With several processes every rank calls the scorer on the same sample, since where weights are split each forward
    pass needs them all; the first rank logs. Nobody goes on scoring once one rank has failed.

    Logged: what the scorer returns, ``score/seconds`` (of this scoring) and ``score/time_share`` (of all scorings in
    the fit's time so far).

    Args:
        scorer: called with the LightningModule; returns name to number. It may have ``columns``, the names announced
            before the first step. None: scores are off unless somebody sets one.
        every_n_steps: optimizer steps between two scorings; 0 is off, None is a tenth of the run. The last step is
            scored as well.
        clock: seconds, for tests.

    Attributes:
        max_steps: optimizer steps of the whole run; None = as the trainer estimates.
        last: what was logged last, by name.
    """

    def __init__(
        self,
        scorer: Callable[[pl.LightningModule], Mapping[str, float]] | None = None,
        every_n_steps: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        every = check_value("callbacks.SampleScores.every_n_steps", every_n_steps, field="sample_scores.every_n_steps")
        self.scorer, self.every_n_steps = scorer, every
        self.max_steps: int | None = None
        self.last: dict[str, float] = {}
        self._clock = clock
        self._on = False

    def columns(self, model: nn.Module) -> list[str]:
        """Names of what it will log, as far as the scorer tells; none where it is off."""
        if self.scorer is None or self.every_n_steps == 0:
            return []
        return [*getattr(self.scorer, "columns", ()), SECONDS, SHARE]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Goes behind a callback that averages weights: this step is then part of the average."""
        ordered = list(trainer.callbacks)
        averaging = [place for place, callback in enumerate(ordered) if isinstance(callback, WeightAveraging)]
        own = ordered.index(self)
        if averaging and own < averaging[-1]:
            ordered.insert(averaging[-1], ordered.pop(own))
            trainer.callbacks = ordered

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts anew; also after a resume."""
        self._on = self.scorer is not None and self.every_n_steps != 0
        self._step, self._spent, self._started = trainer.global_step, 0.0, self._clock()
        estimated = self.max_steps or trainer.estimated_stepping_batches
        self._end = int(estimated) if estimated and math.isfinite(estimated) and estimated > 0 else None
        self._every = self.every_n_steps or max(1, math.ceil((self._end or 1000) / 10))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scores when it is time."""
        step = trainer.global_step
        if not self._on or step == self._step:
            return
        self._step = step
        if step % self._every and step != self._end:
            return
        started = self._clock()
        found, failure = self._score(trainer, pl_module)
        if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            self._on = False
            if trainer.is_global_zero:
                why = failure or "another rank failed"
                log.warning("scores     step %d: %s: training goes on, without scores", step, why)
            return
        now = self._clock()
        self._spent += now - started
        share = self._spent / max(now - self._started, 1e-9)
        self.last = {**found, SECONDS: now - started, SHARE: min(1.0, share)}
        if trainer.is_global_zero:
            tell(trainer, self.last)
            log.debug("scores     step %d: %s", step, found)

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[dict[str, float], str | None]:
        try:
            with _stopped_clocks(trainer), undisturbed(module), _averaged(trainer, module), torch.no_grad():
                with trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
                    found = self.scorer(module)
                return {str(name): float(value) for name, value in found.items()}, None
        except Exception as error:
            log.debug("the scorer failed", exc_info=True)
            return {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _averaged(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Averaged weights in place, as in a validation: by the same hooks and methods."""
    averaging = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    optimizers = [each for each in trainer.optimizers if hasattr(each, "eval") and hasattr(each, "train")]
    with contextlib.ExitStack() as undo:
        for optimizer in optimizers:
            optimizer.eval()
            undo.callback(optimizer.train)
        for callback in averaging:
            callback.on_validation_epoch_start(trainer, module)
            undo.callback(callback.on_validation_epoch_end, trainer, module)
        yield


@contextlib.contextmanager
def _stopped_clocks(trainer: pl.Trainer) -> Iterator[None]:
    """Stops the clocks of callbacks that have ``pause``; each goes on by itself with the next batch."""
    for callback in trainer.callbacks:
        if callable(pause := getattr(callback, "pause", None)):
            pause()
    yield
