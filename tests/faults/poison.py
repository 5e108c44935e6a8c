"""A callback that spoils losses and gradients of chosen steps for real, and keeps what it saw of each step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """One step as it was about to be taken: its sequences, and weights and optimizer state from before it."""

    step: int
    sequences: Tensor
    weights: Tensor
    state: Tensor


SEEN: list[Seen] = []
"""Of the runs in this process, one after another."""

GRADIENT: Callable[[int, Tensor], float] = lambda step, sequences: 1.0  # noqa: E731
"""What gradients are multiplied by, from the step (from 1) and its sequences; set by tests."""


def flat(tensors: Any) -> Tensor:
    """All numbers in one row."""
    return torch.cat([torch.as_tensor(t, dtype=torch.float64).flatten() for t in tensors] or [torch.empty(0)])


class Poison(pl.Callback):
    """Spoils what it is told to.

    Args:
        loss_at: step, from 1, whose loss becomes NaN.
        fail_at: step, from 1, before which the run breaks down, where the variable ``POISON_FAILS`` is set.
        rank: the only rank whose gradients are spoiled after ranks have shared them, by ``POISON_FACTOR``.
        rank_at: the step of it.
    """

    def __init__(self, loss_at: int = 0, fail_at: int = 0, rank: int = -1, rank_at: int = 0) -> None:
        self.loss_at, self.fail_at, self.rank, self.rank_at = loss_at, fail_at, rank, rank_at
        self._rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, _: int) -> None:
        step = trainer.global_step + 1
        if step == self.fail_at and os.environ.get("POISON_FAILS"):
            raise OSError("the machine breaks down")
        if not self._rows:
            states = trainer.optimizers[0].state_dict()["state"].values()
            self._before = flat(module.parameters()), flat(value for state in states for value in state.values())
        self._rows.append(batch["input_ids"].clone())
        if step == self.loss_at:
            table = next(m for m in module.modules() if isinstance(m, nn.Embedding))
            hook = table.register_forward_hook(lambda m, args, output: output * torch.nan)
            trainer.strategy.lightning_module._poison = hook

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        step, sequences = trainer.global_step + 1, torch.cat(self._rows)
        self._rows = []
        SEEN.append(Seen(step, sequences, *self._before))
        factor = GRADIENT(step, sequences)
        if trainer.global_rank == self.rank and step == self.rank_at:
            factor = float(os.environ["POISON_FACTOR"])
        if factor != 1.0:
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.rank >= 0:
            torch.save(flat(module.parameters()), f"weights-{trainer.global_rank}.pt")
