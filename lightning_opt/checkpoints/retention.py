"""Which checkpoints stay, and how many bytes that takes (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_opt.checkpoints.manifest import Checkpoint
from lightning_opt.plan import ConfigError

_SMALL_PARTS_BYTES = 2**20


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run stay.

    Attributes:
        keep_last: how many of the highest steps, 1 or more.
        keep_best: how many of the lowest `monitor`; the later of two equals counts as better.
        keep_every_n_steps: those whose step is a multiple stay for good; None = none.
        monitor: the metric's name.

    Raises:
        ConfigError: a count that makes no sense.
    """

    keep_last: int = 2
    keep_best: int = 1
    keep_every_n_steps: int | None = None
    monitor: str = "val/loss"

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError("checkpoint.keep_last", self.keep_last, "must be 1 or more")
        if self.keep_best < 0:
            raise ConfigError("checkpoint.keep_best", self.keep_best, "must be 0 or more")
        if self.keep_every_n_steps is not None and self.keep_every_n_steps < 1:
            raise ConfigError("checkpoint.keep_every_n_steps", self.keep_every_n_steps, "must be null, or 1 or more")

    def kept(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """The steps that stay, decided by the manifests alone."""
        steps = sorted((checkpoint.step for checkpoint in checkpoints), reverse=True)
        scores = {c.step: value for c in checkpoints if (value := c.metric(self.monitor)) is not None}
        best = sorted(scores, key=lambda step: (scores[step], -step))
        n = self.keep_every_n_steps
        return {*steps[: self.keep_last], *best[: self.keep_best], *(s for s in steps if n and s % n == 0)}

    def most(self, max_steps: int) -> int:
        """How many checkpoints a run of that many steps can hold at most once it has cleaned up."""
        n = self.keep_every_n_steps
        return self.keep_last + self.keep_best + (max_steps // n if n else 0)


def bytes_needed(parameter_bytes: int, state_bytes: int, keep: int) -> int:
    """Disk that a run's checkpoints take: those kept, and the one being written before an old one goes.

    Args:
        parameter_bytes: the parameters and buffers as they are saved.
        state_bytes: the optimizer's state and whatever else is saved.
        keep: how many stay (`Retention.most`).
    """
    return (parameter_bytes + state_bytes + _SMALL_PARTS_BYTES) * (keep + 1)
