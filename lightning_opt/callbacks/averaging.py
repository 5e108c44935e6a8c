"""Are averaged weights better? An exponential moving average of them, which is what is validated and kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

from lightning_opt.plan import ConfigError, check_value


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` as a run needs it.

    Validation sees the average, and so does everything after the last step: the exported model, evaluation. Checkpoints
    hold both, the average as ``state_dict`` and the trained weights beside it, also one that is saved within a
    validation or after the last step. A skipped step counts: the average moves towards weights that stayed where they
    were.

    Buffers are copied, not averaged: whole numbers have no average. A run that was already complete when it was resumed
    trains nothing more, so that Lightning would leave it with the trained weights; here it has the average.

    Source: Polyak and Juditsky 1992 (averaging); Tarvainen and Valpola 2017 (arXiv 1703.01780), the exponential one.

    Args:
        decay: of the average per step; about ``1 / (1 - decay)`` steps are remembered.
        **more: of Lightning's callback, for example ``update_every_n_steps``.

    Raises:
        ConfigError: for a decay out of range, or where the weights are split over ranks (FSDP2).
    """

    def __init__(self, decay: float = 0.999, **more: Any) -> None:
        check_value("callbacks.EMA.decay", decay, field="ema.decay")
        super().__init__(decay=decay, **{"use_buffers": False, **more})
        self._exchanged = False  # within a validation, and at the end, the module holds the average
        self._over = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average; refuses weights that no process has whole."""
        if isinstance(trainer.strategy, pl.strategies.ModelParallelStrategy | pl.strategies.FSDPStrategy):
            raise ConfigError("callbacks", "ema", "needs whole weights on every rank: trainer.strategy=ddp")
        if stage == "fit":
            self._exchanged = self._over = False
        super().setup(trainer, pl_module, stage)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._exchanged = not self._exchanged

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hands the average out; the trained weights are kept in its place for whoever saves after this."""
        self._swap_models(pl_module)
        self._over = True

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average into the module, where it is not there for good."""
        if not self._over:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes it out again."""
        if not self._over:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the average, and says which of the two is which."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._exchanged:
            average, trained = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint.update(state_dict=average, current_model_state=trained)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes both; the average alone where nothing is left to train."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and 0 <= trainer.max_steps <= checkpoint["global_step"]:
            self._copy_average_to_current(pl_module)


def averages(callbacks: Iterable[Any]) -> bool:
    """Whether one of them averages the weights, so that a checkpoint holds them twice."""
    return any(isinstance(callback, WeightAveraging | StochasticWeightAveraging) for callback in callbacks)
