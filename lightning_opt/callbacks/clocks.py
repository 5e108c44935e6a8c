"""Lap timing that never makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class HostClock:
    """Seconds read on the host; right where the host does the work (CPU)."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def mark(self) -> float:
        """Now."""
        return self._read()

    def passed(self, mark: float) -> bool:
        """Whether the device has reached the mark."""
        return True

    def milliseconds(self, start: float, end: float) -> float:
        """From one mark to a later one."""
        return (end - start) * 1e3


class DeviceClock:
    """CUDA events in the current stream, read once the device has passed them: no synchronisation per step.

    The time between two marks is then the *device's*: data that was loaded while the device still computed costs 0.
    """

    def mark(self) -> torch.cuda.Event:
        """An event behind all work queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has reached the mark."""
        return mark.query()

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """From one mark to a later one."""
        return start.elapsed_time(end)


class Laps:
    """The laps of one optimizer step: what each stretch between two marks was spent on."""

    def __init__(self, clock: HostClock | DeviceClock, start: Any) -> None:
        self._clock, self.start, self.tokens = clock, start, 0
        self._marks: list[tuple[str | None, Any]] = []

    def cut(self, kind: str | None) -> None:
        """Ends the running lap; what passed since the last cut belongs to ``kind`` (``None``: does not count)."""
        self._marks.append((kind, self._clock.mark()))

    @property
    def end(self) -> Any:
        """The last mark."""
        return self._marks[-1][1] if self._marks else self.start

    def milliseconds(self) -> dict[str, float]:
        """Sum of the laps by kind; call it only when the clock has passed ``end``."""
        sums: dict[str, float] = {}
        start = self.start
        for kind, mark in self._marks:
            if kind is not None:
                sums[kind] = sums.get(kind, 0.0) + self._clock.milliseconds(start, mark)
            start = mark
        return sums
