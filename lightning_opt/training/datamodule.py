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


class SpreadSequences:
    """Some of a map dataset's sequences, evenly spread over it: the same ones whatever the batch size.

    Args:
        dataset: any map dataset.
        count: how many of its sequences; all where it has fewer.
    """

    def __init__(self, dataset: Any, count: int):
        self._dataset, self._count = dataset, min(count, len(dataset))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index * len(self._dataset) // self._count]


class TokenDataModule(pl.LightningDataModule):
    """Micro-batches in an order that is a function of the seed and the step alone.

    Args:
        train: map dataset of sequences, endless by repetition.
        val: corpus to map dataset.
        micro_batch_size: sequences per device and micro-batch.
        micro_batches: micro-batches of the whole run per device (steps times accumulation).
        val_sequences: sequences per corpus and validation.
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
        val_sequences: int,
        num_workers: int = 0,
        overfit_batches: int = 0,
    ):
        super().__init__()
        self.train = FirstSequences(train, overfit_batches * micro_batch_size) if overfit_batches else train
        self.val = {name: SpreadSequences(dataset, val_sequences) for name, dataset in val.items()}
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        """The run's micro-batches for this rank."""
        world = self.trainer.world_size if self.trainer else 1
        return self._loader(self.train, self.micro_batches * self.micro_batch_size * world, self.num_workers)

    def val_dataloader(self) -> list[Any]:
        """One loader per corpus, from its start."""
        return [self._loader(dataset, len(dataset), 0) for dataset in self.val.values()]

    def _loader(self, dataset: Any, count: int, num_workers: int) -> Any:
        trainer = self.trainer
        return data.loader(
            dataset,
            batch_size=self.micro_batch_size,
            count=count,
            num_workers=num_workers,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            pin_memory=bool(trainer) and trainer.strategy.root_device.type == "cuda",
        )
