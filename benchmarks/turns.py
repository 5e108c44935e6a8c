"""Training loops that run block by block, in turn, within one process: whatever disturbs the machine meets them all."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Body = Callable[[Callable[[], None]], None]


class Spent(NamedTuple):
    """Seconds of one block: by the clock, and of this process's processors."""

    wall: float
    cpu: float


class Turns:
    """A loop in a thread of its own that stands still except while `block` waits for it.

    Args:
        body: runs the whole loop; calls what it is given between every two steps.
        steps: steps of a block.
    """

    def __init__(self, body: Body, steps: int) -> None:
        self._body, self._steps = body, steps
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._free, self._over = 0, False, False
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def block(self) -> Spent:
        """Lets the loop do its next block; the first one sets it up too.

        Raises:
            RuntimeError: the loop failed, or ended before its block did.
        """
        self._left = self._steps
        _finish_device()
        wall, cpu = time.perf_counter(), time.process_time()
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._stopped.acquire()
        spent = Spent(time.perf_counter() - wall, time.process_time() - cpu)
        if self._over:
            raise RuntimeError("the loop ended before its turns did") from self._error
        return spent

    def finish(self) -> None:
        """Lets the loop run to its end.

        Raises:
            RuntimeError: it failed.
        """
        self._free = True
        self._go.release()
        self._thread.join()
        if self._error:
            raise RuntimeError("the loop failed at its end") from self._error

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # torch counts per thread
        self._go.acquire()
        try:
            self._body(self._between)
        except BaseException as error:
            self._error = error
        self._over = True
        self._stopped.release()

    def _between(self) -> None:
        self._left -= 1
        if self._left or self._free:
            return
        _finish_device()
        self._stopped.release()
        self._go.acquire()


def alternate(loops: Mapping[str, Turns], rounds: int, *, warm: int = 2, seed: int = 0) -> dict[str, list[Spent]]:
    """Every loop's blocks, one per round, in an order shuffled anew each round.

    Args:
        loops: by name.
        rounds: blocks that count.
        warm: blocks before them that do not.
        seed: of the orders.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in loops}
    order, draw = list(loops), random.Random(seed)
    for _ in range(warm + rounds):
        draw.shuffle(order)
        for name in order:
            spent[name].append(loops[name].block())
    for loop in loops.values():
        loop.finish()
    return {name: blocks[warm:] for name, blocks in spent.items()}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (10 % to 90 %)``."""
    low, high = deciles(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def deciles(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest decile."""
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
