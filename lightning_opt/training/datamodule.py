"""The LightningDataModule over `lightning_opt.data`'s token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_opt import data


class FirstSequences:
    """A map dataset's first sequences, repeated for ever (for `debug=overfit`).

    Args:
        dataset: any map dataset.
        count: how many of its sequences to keep.
    """

    def __init__(self, dataset: Any, count: int):
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % self._count]


class TokenDataModule(pl.LightningDataModule):
    """Micro-batches in an order that is a function of the seed and the step alone.

    Args:
        train: map dataset of sequences, endless by repetition.
        val: corpus to map dataset.
        micro_batch_size: sequences per device and micro-batch.
        micro_batches: micro-batches of the whole run per device (steps times accumulation).
        val_batches: micro-batches per corpus and validation.
        num_workers: loader processes; the order does not depend on it.
        overfit_batches: when above 0, the run sees only its first so many micro-batches, again and again.
    """

    def __init__(
        self,
        train: Any,
        val: Mapping[str, Any],
        *,
        micro_batch_size: int,
        micro_batches: int,
        val_batches: int,
        num_workers: int = 0,
        overfit_batches: int = 0,
    ):
        super().__init__()
        self.train = FirstSequences(train, overfit_batches * micro_batch_size) if overfit_batches else train
        self.val = dict(val)
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.val_batches = val_batches
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        """The run's micro-batches for this rank."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return data.loader(
            self.train,
            batch_size=self.micro_batch_size,
            count=self.micro_batches * self.micro_batch_size * world,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world,
        )

    def val_dataloader(self) -> list[Any]:
        """One loader per corpus, from its start."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return [
            data.loader(
                dataset,
                batch_size=self.micro_batch_size,
                count=min(len(dataset), self.val_batches * self.micro_batch_size * world),
                num_workers=0,
                rank=rank,
                world_size=world,
            )
            for dataset in self.val.values()
        ]
