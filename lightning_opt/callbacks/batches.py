"""What can be told about any project's batch and training output without knowing the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TokensPerBatch = int | Callable[[Any], int] | None


def count_tokens(batch: Any, tokens_per_batch: TokensPerBatch = None) -> int | None:
    """Token positions in one micro-batch of one device, padding included.

    Args:
        batch: what the dataloader yields.
        tokens_per_batch: the number itself, or a function of the batch; ``None`` looks for ``input_ids``, then for the
            first integer tensor of shape (B, T).

    Returns:
        The count, or ``None`` where the batch does not show what a token is.
    """
    if callable(tokens_per_batch):
        return int(tokens_per_batch(batch))
    if tokens_per_batch is not None:
        return int(tokens_per_batch)
    if isinstance(batch, Mapping):
        if isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"].numel()
        candidates: list[Any] = list(batch.values())
    else:
        candidates = list(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else [batch]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32):
            return tensor.numel()
    return None


class StepLoss:
    """The training loss of one optimizer step: the mean over its micro-batches, kept on the device without a sync."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, outputs: Any, accumulate: int) -> None:
        """Takes what Lightning hands to ``on_train_batch_end``.

        Args:
            outputs: the training step's output: a scalar tensor, a mapping with ``loss``, or nothing.
            accumulate: what Lightning divided the loss by (its ``accumulate_grad_batches``; 1 in manual optimization).
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach().reshape(()).float()
        if accumulate != 1:
            loss = loss * accumulate
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def take(self) -> Tensor | None:
        """The mean so far as a float32 scalar on the device (``None`` if no micro-batch had a loss); starts anew."""
        total, count = self._total, self._count
        self._total, self._count = None, 0
        return total if total is None or count == 1 else total / count
