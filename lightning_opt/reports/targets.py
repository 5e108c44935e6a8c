"""What a run needed to come to a given loss: the first crossing of its validation curve, straight between points."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from lightning_opt.reports.ranking import Cell
from lightning_opt.reports.reading import Run


@dataclass(frozen=True)
class Crossing:
    """Where a validation curve first came down to a loss.

    Attributes:
        steps: optimizer steps, interpolated.
        tokens: tokens, interpolated; None where the run did not log them.
        seconds: wall-clock time with validations, interpolated; None where the run did not log it.
        at_most: the first validation was already below, so these are upper bounds.
    """

    steps: float
    tokens: float | None
    seconds: float | None
    at_most: bool = False


def crossing(run: Run, target: float) -> Crossing | None:
    """The first crossing of the target; None where the curve never came down to it.

    Args:
        run: the run.
        target: loss in nats per token.
    """
    steps, losses = run.series("val/loss")
    index = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if index is None:
        return None
    if index == 0:
        return Crossing(steps[0], *(_at(run, column, steps[0]) for column in ("tokens", "time_s")), at_most=True)
    share = (losses[index - 1] - target) / (losses[index - 1] - losses[index])

    def between(before: float | None, after: float | None) -> float | None:
        return None if before is None or after is None else before + share * (after - before)

    steps_needed = steps[index - 1] + share * (steps[index] - steps[index - 1])
    tokens, seconds = (
        between(_at(run, column, steps[index - 1]), _at(run, column, steps[index])) for column in ("tokens", "time_s")
    )
    return Crossing(steps_needed, tokens, seconds)


def _at(run: Run, column: str, step: float) -> float | None:
    return dict(zip(*run.series(column), strict=True)).get(step)


def end(run: Run) -> Crossing | None:
    """The run's last validation: what its final loss cost; None where it was never validated."""
    steps = run.series("val/loss")[0]
    return Crossing(steps[-1], _at(run, "tokens", steps[-1]), _at(run, "time_s", steps[-1])) if steps else None


def of_cell(cell: Cell, target: float) -> tuple[Crossing | None, int]:
    """The mean crossing of a setting's finished runs, or None unless all of them came down; and how many did."""
    found = [crossing(job.run, target) for job in cell.finished]
    reached = [one for one in found if one is not None]
    return (mean(reached) if len(reached) == len(found) and reached else None), len(reached)


def mean(found: list[Crossing]) -> Crossing:
    """The mean of crossings; a part that one of them lacks is absent."""

    def middle(values: list[float | None]) -> float | None:
        return None if any(value is None for value in values) else fmean(value or 0.0 for value in values)

    return Crossing(
        fmean(one.steps for one in found),
        middle([one.tokens for one in found]),
        middle([one.seconds for one in found]),
        any(one.at_most for one in found),
    )


def of_end(cell: Cell) -> Crossing | None:
    """What a setting's whole runs cost, in the mean; None where none was validated."""
    found = [cost for cost in (end(job.run) for job in cell.finished) if cost is not None]
    return mean(found) if found else None
