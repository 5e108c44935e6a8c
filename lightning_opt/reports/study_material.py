"""What a study's page is made of: the results and all that was worked out from them, in the order of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports.findings import spelled
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.study.results import Cell
from lightning_opt.study.significance import blocked

if TYPE_CHECKING:
    from lightning_opt.study.results import Results
    from lightning_opt.study.significance import Noise
    from lightning_opt.study.speedups import SpeedUp

Place = tuple[str, float]
"""A model's label and the data ratio: what the cells of a comparison share."""

BY = {"tokens": "tokens", "time": "wall time", "memory": "memory"}
"""What a speed-up is counted in, and how it is called."""

_THEIRS = {"cautious": "Cautious"}  # names of the recorded data that are no names of ours


@dataclass(frozen=True)
class Material:
    """All that the page shows.

    Attributes:
        results: the losses and what belongs to them.
        speedups: of every cell, by tokens and, where they were measured, by time and by memory.
        laws: rows of ``laws.csv``: optimizer, params, fit_points, alpha, exponent, floor.
        tried: cell to the configurations that were run while tuning it, each with its loss.
        facts: as `lightning_opt.reports.study.write` lists them.
        suffix: ends the key of every figure and table, for pages that show more than one study.
    """

    results: Results
    speedups: Sequence[SpeedUp] = ()
    laws: Sequence[Mapping[str, Any]] = ()
    tried: Mapping[Cell, Sequence[tuple[Mapping[str, Any], float]]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""

    @property
    def baseline(self) -> str:
        """The optimizer that the others are held against, by its plain name."""
        return str(self.facts.get("baseline") or "adamw")

    @property
    def sigma(self) -> float | None:
        """Standard deviation of a final loss between seeds, nats per token; None where it is not known."""
        return q.finite(self.facts.get("sigma"))

    @property
    def freedom(self) -> int | None:
        """Degrees of freedom behind a pooled sigma; None where it was given."""
        value = q.finite(self.facts.get("freedom"))
        return None if value is None else int(value)

    @cached_property
    def blocks(self) -> Noise | None:
        """The spread between cells on equal seeds; None where sigma was given, or no two cells share their seeds."""
        if self.freedom is None or self.facts.get("paired") is False:
            return None
        losses = self.results.losses
        return blocked([losses[cell] for cell in losses if (cell.params, cell.chinchilla) == at] for at in self.places)

    @property
    def level(self) -> float:
        """Share of the truth that the intervals are meant to cover."""
        return q.finite(self.facts.get("level")) or 0.9

    @cached_property
    def optimizers(self) -> tuple[str, ...]:
        """Plain names, the baseline first, the others as the results name them."""
        named = dict.fromkeys((*self.results.optimizers, *(cell.optimizer for cell in self.results.tuning)))
        return tuple(sorted(named, key=lambda name: name != self.baseline))

    @property
    def labels(self) -> tuple[str, ...]:
        """Models with a final loss, small ones first."""
        return self.results.labels

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where losses are, small models and little data first."""
        found = {(cell.params, cell.chinchilla) for cell in self.results.losses}
        return tuple(sorted(found, key=lambda place: (self.labels.index(place[0]), place[1])))

    @cached_property
    def colours(self) -> dict[str, tuple[str, bool]]:
        """Colour name of each optimizer as it is spelled, and whether its lines are dashed."""
        return optimizer_colours(map(name_of, self.optimizers))

    def cells_at(self, place: Place) -> list[Cell]:
        """The cells with losses at a place, lowest mean first; those with a seed that diverged last."""
        found = [cell for cell in self.results.losses if (cell.params, cell.chinchilla) == place]
        return sorted(
            (cell for cell in found if self.losses(cell)), key=lambda cell: (self.lost(cell) > 0, self.mean(cell))
        )

    def cell(self, optimizer: str, place: Place) -> Cell | None:
        """The cell of an optimizer at a place, where it has losses."""
        return next((cell for cell in self.cells_at(place) if cell.optimizer == optimizer), None)

    def losses(self, cell: Cell) -> tuple[float, ...]:
        """Finite final losses, one for each reporting seed."""
        return tuple(loss for loss in self.results.losses.get(cell, ()) if q.finite(loss) is not None)

    def lost(self, cell: Cell) -> int:
        """Reporting seeds that diverged."""
        return len(self.results.losses.get(cell, ())) - len(self.losses(cell))

    def mean(self, cell: Cell) -> float:
        """Mean final loss of a cell that has one."""
        return fmean(self.losses(cell))

    def score(self, cell: Cell, task: str) -> tuple[float, ...]:
        """A task's scores, one for each seed; none where the table has more scores than final losses.

        Then they are of different runs, and nothing says which of them the loss is of.
        """
        values, seeds = self.results.scores.get(cell, {}).get(task, ()), self.results.losses.get(cell)
        return values if not seeds or len(values) <= len(seeds) else ()

    def cell_of(self, one: SpeedUp) -> Cell:
        """The cell that a speed-up is of."""
        return Cell(one.optimizer, one.params, one.chinchilla)

    def speedup(self, cell: Cell, by: str = "tokens") -> SpeedUp | None:
        """The cell's speed-up over the baseline, where it was worked out."""
        key = (cell.optimizer, cell.params, cell.chinchilla, by)
        return next((one for one in self.speedups if (one.optimizer, one.params, one.chinchilla, one.by) == key), None)


def name_of(optimizer: str) -> str:
    """An optimizer as it is usually spelled."""
    return _THEIRS.get(optimizer) or spelled(optimizer)


def key_of(about: Material, kind: str, place: Place) -> str:
    """The key in the page of a figure of a place."""
    return as_key(f"{kind}-{place_name(place)}{about.suffix}")


def as_key(text: str) -> str:
    """The text as an identifier of the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def place_name(place: Place) -> str:
    """``130m 1x``."""
    return f"{place[0]} {ratio_name(place[1])}"


def ratio_name(ratio: float) -> str:
    """``0.5x``, ``16x``."""
    return f"{ratio:g}x"


def spread(values: Sequence[float], digits: int = 5) -> str:
    """Mean ± sample standard deviation; one value alone."""
    if not values:
        return q.NOT_MEASURED
    if len(values) < 2:
        return q.number(values[0], digits)
    deviation = stdev(values)
    return q.plus_minus(fmean(values), deviation) if deviation else f"{q.number(values[0], digits)} ± 0"


def seeds_of(found: Iterable[tuple[float, ...]]) -> str:
    """How many seeds the cells have: ``1``, ``2 to 3``."""
    counts = sorted({len(values) for values in found if values})
    return " to ".join(str(count) for count in dict.fromkeys((*counts[:1], *counts[-1:]))) or "0"
