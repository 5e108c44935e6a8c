"""The LightningDataModule over `lightning_opt.data`'s token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_opt import data
from lightning_opt.models import IGNORE
from lightning_opt.plan import ConfigError


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


class EveryOther:
    """Every other sequence of a map dataset, so that what is tuned on one half can be reported on the other.

    Args:
        dataset: any map dataset.
        first: 0 or 1: the sequence it begins with.
    """

    def __init__(self, dataset: Any, first: int):
        self._dataset, self._first = dataset, first

    def __len__(self) -> int:
        return (len(self._dataset) + 1 - self._first) // 2

    def __getitem__(self, index: int) -> Any:
        return self._dataset[2 * index + self._first]


PARTS = {"tuning": 0, "reporting": 1}
"""Parts of the validation text to the sequence that each begins with."""


def part_of(val: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One part of the validation text: every other sequence of each corpus, or all.

    Args:
        val: corpus to map dataset.
        part: ``all``, ``tuning`` or ``reporting``; the last two share no sequence.

    Raises:
        ConfigError: a corpus has too few sequences to be parted.
    """
    if part == "all":
        return dict(val)
    for name, dataset in val.items():
        if len(dataset) < 2:
            why = f"needs 2 validation sequences of each corpus, and {name} has {len(dataset)}: raise data.val_fraction"
            raise ConfigError("trainer.val_part", part, why)
    return {name: EveryOther(dataset, PARTS[part]) for name, dataset in val.items()}


class Filled:
    """A map dataset filled up with sequences that do not count, so that each rank gets as many batches.

    Args:
        dataset: any map dataset of ``input_ids`` and ``labels``.
        multiple: its length becomes a multiple of this.
    """

    def __init__(self, dataset: Any, multiple: int):
        self._dataset, self._count = dataset, -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if index < len(self._dataset):
            return self._dataset[index]
        last = self._dataset[len(self._dataset) - 1]
        return {**last, "labels": torch.full_like(last["labels"], IGNORE)}


class TokenDataModule(pl.LightningDataModule):
    """Micro-batches in an order that is a function of the seed and the step alone.

    Args:
        train: map dataset of sequences, endless by repetition.
        val: corpus to map dataset.
        micro_batch_size: sequences per device and micro-batch.
        micro_batches: micro-batches of the whole run per device (steps times accumulation).
        val_sequences: sequences per corpus and validation.
        val_part: of the validation text: ``all``, or every other sequence: ``tuning``, or ``reporting`` for the others.
        num_workers: loader processes; the order does not depend on it.
        overfit_batches: when above 0, the run sees only its first so many micro-batches (of all ranks), again and
            again.
        not_before: first sequence of the global order that is left to train on; what lies before is left out.
    """

    def __init__(
        self,
        train: Any,
        val: Mapping[str, Any],
        *,
        micro_batch_size: int,
        micro_batches: int,
        val_sequences: int,
        val_part: str = "all",
        num_workers: int = 0,
        overfit_batches: int = 0,
        not_before: int = 0,
    ):
        super().__init__()
        self.train = train
        self.overfit_batches = overfit_batches
        self.val = {name: SpreadSequences(dataset, val_sequences) for name, dataset in part_of(val, val_part).items()}
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.num_workers = num_workers
        self.not_before = not_before

    def train_dataloader(self) -> Any:
        """The run's micro-batches for this rank."""
        whole = self.micro_batch_size * self._world_size
        train = FirstSequences(self.train, self.overfit_batches * whole) if self.overfit_batches else self.train
        return self._loader(train, self.micro_batches * whole, self.num_workers, self.not_before)

    def val_dataloader(self) -> list[Any]:
        """One loader per corpus, from its start; as many batches on every rank."""
        sets = list(self.val.values())
        if self._world_size > 1:
            sets = [Filled(dataset, self.micro_batch_size * self._world_size) for dataset in sets]
        return [self._loader(dataset, len(dataset), 0) for dataset in sets]

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, dataset: Any, count: int, num_workers: int, not_before: int = 0) -> Any:
        trainer = self.trainer
        return data.loader(
            dataset,
            batch_size=self.micro_batch_size,
            count=count,
            not_before=not_before,
            num_workers=num_workers,
            rank=trainer.global_rank if trainer else 0,
            world_size=self._world_size,
            pin_memory=bool(trainer) and trainer.strategy.root_device.type == "cuda",
        )
