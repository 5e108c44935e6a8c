"""What all callbacks that look at experts share: one count of tokens, begun anew with every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_opt.anatomy import ExpertTraffic


def attention_mask(batch: Any) -> Tensor | None:
    """A batch's ``attention_mask`` (B, T), None where it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class ExpertCallback(pl.Callback):
    """Counts tokens per expert while it fits a model with experts; nothing else of it runs for other models.

    Padding is what the batch's ``attention_mask`` says; without one every position is a token.

    Attributes:
        traffic: the counts, shared with whoever else asks; None for a model without experts and outside of a fit.
    """

    traffic: ExpertTraffic | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the experts."""
        traffic = ExpertTraffic.of(pl_module)
        if traffic.layers:
            self.traffic = traffic
        else:
            traffic.close()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts from 0 in the first micro-batch of a step."""
        if self.traffic is not None:
            self.traffic.begin(trainer.global_step, attention_mask(batch))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the model."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the model."""
        self._close()

    def _close(self) -> None:
        if self.traffic is not None:
            self.traffic.close()
            self.traffic = None
