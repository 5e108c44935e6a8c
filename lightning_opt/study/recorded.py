"""Runs that somebody recorded, as a search would have met them: the loss of a configuration is looked up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_opt.study.descent import THRESHOLD, Descent
from lightning_opt.study.results import recorded_change
from lightning_opt.study.space import Axis, Space, canonical, identity, nothing_refused

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell, Config, Results

AS_TUNED = "as tuned"  # stands for a value that the table does not tell

LOST = 1.0
"""A run that ends so far above its cell's lowest came to nothing, nats per token. Published losses of runs that blew up
are finite: 7 at 130M, where 3.5 is usual."""


@dataclass(frozen=True)
class RecordedRuns:
    """The tuned configuration of a cell and its recorded one-off neighbours: an oracle for a search.

    Attributes:
        best: the configuration around which the changes were tried.
        losses: `space.identity` of a configuration to its final loss; infinite where the run diverged.
        space: each recorded hyperparameter with the values that were tried, in order of size where they are numbers.
    """

    best: dict[str, Any]
    losses: dict[str, float]
    space: Space = field(repr=False)

    @classmethod
    def of(
        cls,
        tuning: Mapping[str, float],
        best: Config | None = None,
        *,
        refused: Callable[[Config], str | None] = nothing_refused,
    ) -> RecordedRuns:
        """Reads `Results.tuning` of one cell.

        Args:
            tuning: ``best_config`` and ``NAME=VALUE`` to losses.
            best: the tuned configuration; None where the table alone is there: its values are then called `AS_TUNED`.
            refused: as the `Space` takes it.
        """
        changes = [(*recorded_change(change), loss) for change, loss in tuning.items() if change != "best_config"]
        tried: dict[str, list[Any]] = {}
        for name, value, _ in changes:
            tried.setdefault(name, []).append(value)
        middle = dict(best) if best is not None else dict.fromkeys(tried, AS_TUNED)
        losses = {identity(middle | {name: value}): loss for name, value, loss in changes}
        if "best_config" in tuning:
            losses[identity(middle)] = tuning["best_config"]
        axes = tuple(Axis(name, _in_order([middle[name], *values])) for name, values in tried.items())
        return cls(middle, losses, Space(axes, refused))

    def __call__(self, config: Config) -> float | None:
        """The loss of a configuration; None where it is not recorded."""
        return self.losses.get(identity(config))

    def neighbours(self) -> Iterator[dict[str, Any]]:
        """The recorded one-off changes of the tuned configuration."""
        return (config for config in self.space.around(self.best) if self(config) is not None)

    def descend(self, start: Config | None = None, *, threshold: float = THRESHOLD) -> Descent:
        """A coordinate descent over the record, run to its end.

        Args:
            start: where from; None: the tuned configuration.
            threshold: as `Descent` takes it.
        """
        return descend(Descent(self.space, self.best if start is None else start, threshold=threshold), self)


def descend(descent: Descent, loss: Callable[[Config], float | None]) -> Descent:
    """Runs a descent to its end with a function for a loss.

    Args:
        descent: it is told what it asks for.
        loss: of a configuration; infinite: it diverged; None: it cannot be had.
    """
    while asked := descent.ask():
        for config in asked:
            descent.tell(config, loss(config))
    return descent


def recorded_cost(results: Results) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What the recorded tuning runs took: a lower bound, for passes before a search's last are not recorded.

    Args:
        results: with `tuning`.

    Returns:
        As `lightning_opt.reports.study.write` takes them: ``cost`` (optimizer to runs, diverged, and tokens as if each
        ran to its end; None where a model's size is not known) and ``failures`` (the runs that came to nothing).
    """
    from lightning_opt.plan.lengths import CHINCHILLA

    cost: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    for cell, runs in results.tuning.items():
        spent = cost.setdefault(cell.optimizer, {"runs": 0, "diverged": 0, "tokens": 0.0})
        size = results.sizes.get(cell.params)
        known = size and spent["tokens"] is not None
        spent["tokens"] = spent["tokens"] + len(runs) * CHINCHILLA * size * cell.chinchilla if known else None
        spent["runs"] += len(runs)
        for change, loss in runs.items():
            if came_to_nothing(loss, runs.values()):
                spent["diverged"] += 1
                where = {"optimizer": cell.optimizer, "params": cell.params, "chinchilla": cell.chinchilla}
                reason = f"ended at {loss:,.2f}" if math.isfinite(loss) else "no finite loss"
                failures.append({**where, "setting": change.replace("=", " "), "state": "DIVERGED", "reason": reason})
    return cost, failures


def came_to_nothing(loss: float, losses: Iterable[float]) -> bool:
    """Whether a run diverged, or ended `LOST` or more above the lowest of its cell's losses."""
    return not loss < min(losses) + LOST


def recorded_gains(results: Results, *, threshold: float = THRESHOLD) -> dict[Cell, Descent]:
    """What a descent from each cell's tuned configuration still accepts among its recorded changes.

    Args:
        results: cells without a tuned configuration are passed over.
        threshold: as `Descent` takes it.
    """
    tuned = {cell: runs for cell, runs in results.tuning.items() if "best_config" in runs}
    return {cell: RecordedRuns.of(runs).descend(threshold=threshold) for cell, runs in tuned.items()}


def _in_order(values: list[Any]) -> tuple[Any, ...]:
    once = list({canonical(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) for value in once)
    return tuple(sorted(once)) if numbers else tuple(once)
