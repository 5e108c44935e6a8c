"""Who may be compared with whom, and whether a difference is more than noise between seeds. Plain arithmetic."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports.jobs import Job, shown
from lightning_opt.reports.reading import Run
from lightning_opt.reports.settings import rate_after_scale
from lightning_opt.study import significance
from lightning_opt.study.significance import Noise


@dataclass(frozen=True)
class Cell:
    """Jobs that differ by nothing but their seed.

    Attributes:
        jobs: all of them, whatever became of them.
    """

    jobs: tuple[Job, ...]

    @property
    def finished(self) -> tuple[Job, ...]:
        """Those with a final loss."""
        return tuple(job for job in self.jobs if job.loss is not None)

    @property
    def losses(self) -> list[float]:
        """Final validation losses, nats per token, one for each seed: the mean of its runs, which tell no spread."""
        by_seed: dict[Any, list[float]] = {}
        for index, job in enumerate(self.jobs):
            if job.loss is not None:
                by_seed.setdefault(job.run.config.get("seed", f"job {index}"), []).append(job.loss)
        return [fmean(losses) for losses in by_seed.values()]

    @property
    def n(self) -> int:
        """Seeds with a finished run."""
        return len(self.losses)

    @property
    def mean(self) -> float:
        """Mean final loss; infinite where no run finished, so that it ranks last."""
        return fmean(self.losses) if self.losses else math.inf

    @property
    def std(self) -> float | None:
        """Sample standard deviation between seeds (n - 1 below the line); None for fewer than two seeds."""
        return stdev(self.losses) if self.n > 1 else None

    @property
    def best(self) -> Job:
        """The finished run of the lowest loss, else the first job."""
        return min(self.finished, key=lambda job: job.loss or 0.0, default=self.jobs[0])

    @property
    def diverged(self) -> bool:
        """Whether it was tried and only diverged."""
        return not self.losses and any(job.state == "DIVERGED" for job in self.jobs)

    @property
    def rate(self) -> float | None:
        """Peak learning rate."""
        return rate_after_scale(self.best.run)


@dataclass(frozen=True)
class Standing:
    """All that one optimizer did.

    Attributes:
        optimizer: as it is spelled.
        cells: its settings, best first.
    """

    optimizer: str
    cells: tuple[Cell, ...]

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every job of the optimizer: its tuning budget."""
        return tuple(job for cell in self.cells for job in cell.jobs)

    @property
    def best(self) -> Cell | None:
        """The setting with the lowest mean final loss."""
        return self.cells[0] if self.cells[0].n else None

    @property
    def edge(self) -> Edge | None:
        """Where its best learning rate lies among those that were tried."""
        return edge([(cell.rate, cell) for cell in self.cells if cell.rate is not None])


def pooled(cells: Iterable[Cell]) -> Noise | None:
    """The variance within all settings together, as in a one-way analysis of variance; None without repeated seeds."""
    return significance.pooled(cell.losses for cell in cells)


@dataclass(frozen=True)
class Group:
    """Jobs that may be ranked against each other.

    Attributes:
        name: a letter; empty for the only group.
        facts: what they share, name to text; only what is not the same in all groups.
        jobs: the jobs, in the order they were asked for.
    """

    name: str
    facts: dict[str, str]
    jobs: tuple[Job, ...]

    @cached_property
    def standings(self) -> tuple[Standing, ...]:
        """The optimizers, best first; those without a finished run last."""
        by_optimizer: dict[str, dict[str, list[Job]]] = {}
        for job in self.jobs:
            by_optimizer.setdefault(job.optimizer, {}).setdefault(job.identity, []).append(job)
        found = [
            Standing(name, tuple(sorted((Cell(tuple(jobs)) for jobs in cells.values()), key=lambda cell: cell.mean)))
            for name, cells in by_optimizer.items()
        ]
        return tuple(sorted(found, key=lambda standing: standing.cells[0].mean))

    @cached_property
    def noise(self) -> Noise | None:
        """What its repeated settings say of the spread between seeds, which is taken to be the same everywhere."""
        return pooled(cell for standing in self.standings for cell in standing.cells)


@dataclass(frozen=True)
class Gap:
    """The difference between two settings' mean final losses, held against the spread between seeds.

    Attributes:
        value: how far the second is above the first, nats per token.
        t: the difference in its standard errors; None where no seed of any setting was repeated.
        limit: what ``t`` must exceed to be beyond noise: Student's t, two-sided, 5 %.
    """

    value: float
    t: float | None
    limit: float | None

    @property
    def judgement(self) -> str:
        """``beyond`` or ``inside`` the noise, ``unknown`` without repeated seeds."""
        if self.t is None or self.limit is None:
            return "unknown"
        return "beyond" if abs(self.t) > self.limit else "inside"


def gap(first: Cell, second: Cell, noise: Noise | None) -> Gap:
    """Compares two settings by Student's t test with the spread of the whole group.

    Args:
        first: a setting with finished runs.
        second: another.
        noise: the spread between seeds; None where it is not known.
    """
    value = second.mean - first.mean
    if noise is None:
        return Gap(value, None, None)
    error = math.sqrt(noise.variance * (1 / first.n + 1 / second.n))
    t = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return Gap(value, t, t_limit(noise.freedom))


def t_limit(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    return significance.t_quantile(0.975, freedom)


def groups(jobs: Sequence[Job]) -> tuple[tuple[Group, ...], tuple[Job, ...]]:
    """Sorts jobs by what must be equal for their losses to mean the same.

    Returns:
        The groups, largest first, and the jobs that say too little of themselves (never started, or failed before
        their plan was written). Where there is but one group, they belong to it.
    """
    known = [job for job in jobs if job.run.plan]
    silent = [job for job in jobs if not job.run.plan]
    facts = {id(job): _facts(job) for job in known}
    apart = [name for name, _ in _FACTS if len({str(facts[id(job)][name]) for job in known}) > 1]
    sorted_out: dict[tuple[str, ...], list[Job]] = {}
    for job in known:
        sorted_out.setdefault(tuple(str(facts[id(job)][name]) for name in apart), []).append(job)
    if len(sorted_out) < 2:
        return (Group("", {}, tuple(jobs)),), ()
    parts = sorted(sorted_out.values(), key=len, reverse=True)
    found = [
        Group(_letters(place), {name: _fact_text(facts[id(part[0])][name]) for name in apart}, _among_equals(part))
        for place, part in enumerate(parts)
    ]
    return tuple(found), tuple(silent)


def _among_equals(part: Sequence[Job]) -> tuple[Job, ...]:
    """A group's jobs, each knowing what all of them share and no label need repeat."""
    shared = frozenset(key for key in part[0].differs if len({shown(job.differs[key]) for job in part}) == 1)
    return tuple(replace(job, shared=shared) for job in part)


def _letters(place: int) -> str:
    """A to Z, then AA and so on."""
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _trained(run: Run) -> Any:
    """Tokens that the run saw by its end; a run that has not ended is taken at its word."""
    return run.summary.get("tokens") if run.state == "FINISHED" else run.plan.get("tokens")


_FACTS: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("model", lambda run: run.plan.get("model")),
    ("parameters", lambda run: run.plan.get("params_total")),
    ("precision", lambda run: run.plan.get("precision")),
    ("data fingerprint", lambda run: run.plan.get("data_fingerprint") or run.env.get("data_fingerprint")),
    ("tokens trained on", _trained),
    ("schedule end (tokens)", lambda run: run.plan.get("tokens")),
    ("sequence length", lambda run: run.plan.get("sequence_length")),
    ("validation sequences", lambda run: run.asked("trainer.val_sequences")),
    ("validation part", lambda run: run.asked("trainer.val_part") or "all"),
)

_OTHERWISE = ("model", "parameters", "precision")
"""Facts that set groups apart, though runs that differ in them were given the same task."""


def unequal(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """What of data, tokens and schedule end differs between jobs: its name to each value with how many have it.

    Jobs that wrote no plan count for nothing.
    """
    known = [_facts(job) for job in jobs if job.run.plan]
    equal = [name for name, _ in _FACTS if name not in _OTHERWISE]
    found = {name: Counter(_fact_text(facts[name]) for facts in known) for name in equal}
    apart = {name: counts for name, counts in found.items() if len(counts) > 1}
    return {name: [f"{text} in {count}" for text, count in counts.items()] for name, counts in apart.items()}


def _facts(job: Job) -> dict[str, Any]:
    return {name: read(job.run) for name, read in _FACTS}


def _fact_text(value: Any) -> str:
    if q.finite(value) is not None:
        return q.integer(value)
    text = "not known" if value is None else str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def baseline(group: Group) -> Standing | None:
    """AdamW where it finished a run, else the optimizer that was asked for first and finished one."""
    able = {standing.optimizer: standing for standing in group.standings if standing.best}
    order = ["AdamW", *(job.optimizer for job in group.jobs)]
    return next((able[name] for name in order if name in able), None)


@dataclass(frozen=True)
class Edge:
    """Where the best of the tried values lies.

    Attributes:
        side: ``low``, ``high``, ``only`` (one value tried) or empty (values on both sides were worse).
        value: the best value.
    """

    side: str
    value: float


def edge(points: Sequence[tuple[float, Cell]]) -> Edge | None:
    """Tells whether the best value of a swept number is the last that was tried on one side.

    A value that diverged was tried; one whose jobs failed, or have yet to run, was not.

    Args:
        points: value and cell.
    """
    tried = [(value, cell) for value, cell in points if cell.n or cell.diverged]
    if not any(cell.n for _, cell in tried):
        return None
    best = min(tried, key=lambda point: point[1].mean)[0]
    values = {value for value, _ in tried}
    side = "only" if len(values) == 1 else "low" if best == min(values) else "high" if best == max(values) else ""
    return Edge(side, best)
