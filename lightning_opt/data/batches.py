"""Batches in the global order, for one rank, from any point on; the number of workers changes nothing but the speed."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_opt.data.workers import deaf, end_with_parent


class _Indices:
    """The index lists of one rank, from batch ``first`` on."""

    def __init__(self, start: int, count: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.count, self.batch_size, self.rank = start, count, batch_size, rank
        self.global_batch = batch_size * world_size
        self.first = self.offset = 0

    def batch(self, number: int) -> range:
        return self._elements(number * self.global_batch + self.rank * self.batch_size, self.batch_size)

    def global_batch_of(self, number: int) -> range:
        return self._elements(number * self.global_batch, self.global_batch)

    def _elements(self, begin: int, size: int) -> range:
        origin = self.start + self.offset
        return range(origin + begin, origin + min(begin + size, self.count))

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.global_batch)
        return full + (rest > self.rank * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first, len(self)):
            yield list(self.batch(number))


Batch = dict[str, torch.Tensor]


def _stack(items: list[Batch] | np.ndarray) -> Batch | np.ndarray:
    """Windows that a dataset read as one array stay as small as on disk until they have left their worker."""
    if isinstance(items, np.ndarray):
        return items
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _batch(windows: Batch | np.ndarray, pinned: bool) -> Batch:
    """Token windows (B, T + 1) as inputs and labels one place on; a batch as it is."""
    if not isinstance(windows, np.ndarray):
        return windows
    sides = {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}
    batch = {key: torch.from_numpy(side.astype(np.int64)) for key, side in sides.items()}
    return {key: side.pin_memory() for key, side in batch.items()} if pinned else batch


class BatchLoader:
    """A sized iterable of batches ``{"input_ids": (B, T), "labels": (B, T)}``, int64, whose state is one integer.

    Batch b of rank r out of w holds the elements ``start + b*B*w + r*B`` and the B-1 after it: one optimizer step over
    all ranks and accumulation sees the same elements whatever w is. ``len`` is the whole range also after
    ``load_state_dict``; the next iteration then begins behind the batches already given, and the one after it at 0.
    The state counts what was handed out, so batches that workers prepared ahead are not lost. With `not_before` all
    batches still to come lie further on, by as many elements as it takes; that is part of the state too, and so is what
    batches of another size have moved them by.

    Args:
        dataset: map-style; one with ``__getitems__`` (as torch calls it) may give a batch as one array of token
            windows, (B, T + 1), which passes from worker to this process about five times as fast.
        batch_size: B, sequences per batch and rank.
        num_workers: processes that read; 0 reads in this one.
        start: first element of the global order.
        count: elements of all ranks together; None: to the end of the dataset. What does not fill a last batch makes a
            shorter one (ranks beyond it get one batch fewer).
        not_before: the next batch begins at this element of the global order or behind it: what lies before is left
            out for good. Only for a dataset without end.
        rank: r.
        world_size: w.
        pin_memory: as in torch's DataLoader.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; None: Python's default.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        num_workers: int = 0,
        start: int = 0,
        count: int | None = None,
        not_before: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ) -> None:
        count = max(_length(dataset) - start, 0) if count is None else count
        if batch_size < 1 or start < 0 or count < 0 or num_workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"{batch_size=} >= 1, {start=}, {count=}, {num_workers=} >= 0 and 0 <= {rank=} < {world_size=}"
            )
        self.dataset, self.batch_size = dataset, batch_size
        self._pin_memory = pin_memory
        self._indices = _Indices(start, count, batch_size, rank, world_size)
        self._position = 0
        self._not_before = not_before
        self._resumed = False
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._indices,
            num_workers=num_workers,
            collate_fn=_stack,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            multiprocessing_context=multiprocessing_context if num_workers else None,
            worker_init_fn=end_with_parent,
            generator=torch.Generator().manual_seed(0),  # else every epoch would draw from torch's global generator
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._position = 0
        self._resumed = False
        self._indices.first = self._position
        ahead = self._not_before - self._indices.global_batch_of(self._position).start
        self._indices.offset += max(ahead, 0)
        with deaf():
            batches = iter(self._loader)
        for windows in batches:
            self._position += 1
            yield _batch(windows, self._pin_memory)

    def elements(self, number: int) -> range:
        """What all ranks' batches of that number hold together, as places in the global order."""
        return self._indices.global_batch_of(number)

    def state_dict(self) -> dict[str, Any]:
        """``{"sequences": n, "offset": m}``: the next element is ``start + n + m``; n counts whole batches."""
        done = min(self._position * self._indices.global_batch, self._indices.count)
        return {"sequences": done, "offset": self._indices.offset}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration go on behind that many elements; batch size and ranks may differ from then.

        Args:
            state_dict: of `state_dict`. Where it also says ``"batches"``, so many of this loader's are over, whatever
                size those had that led to the saved element. Only for a dataset without end.

        Raises:
            ValueError: the number does not lie within this loader's range, or not between two of its batches.
        """
        done, indices = int(state_dict["sequences"]), self._indices
        offset = int(state_dict.get("offset", 0))
        if "batches" in state_dict:
            element, done = done + offset, int(state_dict["batches"]) * indices.global_batch
            offset = element - done
        if not 0 <= done <= indices.count:
            raise ValueError(f"the saved position is sequence {done}, this loader has {indices.count}")
        if done % indices.global_batch and done != indices.count:
            raise ValueError(f"the saved position, sequence {done}, is no multiple of {indices.global_batch} (a batch)")
        self._position, self._resumed = min(-(-done // indices.global_batch), len(self)), True
        indices.offset = offset


def loader(dataset: Dataset, **options: Any) -> BatchLoader:
    """``BatchLoader(dataset, **options)``: see there."""
    return BatchLoader(dataset, **options)


def _length(dataset: Dataset) -> int:
    if not isinstance(dataset, Sized):
        raise ValueError("count= is needed for a dataset without a length")
    return len(dataset)
