"""Sweeps that decide from results what to run next: what all of them share, whatever it is that decides.

Something that decides (`Decider`) names points: overrides without a seed. Each becomes a job for every seed, which is
checked, entered into the ledger and run, and the mean of the final validation losses is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from lightning_opt.launch.ledger import Ledger, value_of
from lightning_opt.launch.preflight import Job
from lightning_opt.plan import ConfigError
from lightning_opt.plan.values import rule_for
from lightning_opt.run_folder import SweepJob, config_hash, read_json


@dataclass(frozen=True)
class Point:
    """What is told apart by its loss.

    Attributes:
        name: for whoever asked for it.
        lines: overrides, without the seed.
        label: what sets it apart, for people.
        changed: the override in which it differs from another that is checked before it; None where it is the first.
    """

    name: Any
    lines: tuple[str, ...]
    label: str
    changed: str | None = None


class Decider(Protocol):
    """What a search is by: it asks and is told."""

    words: str
    first: Sequence[Point]  # checked before anything starts

    def open(self, folder: Path, say: Callable[[str], None]) -> None:
        """The sweep's folder is there; what earlier commands left in it may be read."""

    def ask(self) -> Sequence[Point]:
        """What to run now, side by side; nothing where the search is over."""

    def tell(self, point: Point, loss: float | None, refused: str = "") -> None:
        """The mean loss; infinite: a seed diverged; None: one failed, or the point is ``refused`` for this reason."""

    def closing(self) -> list[str]:
        """What came of it, in lines."""


@dataclass
class Search:
    """One search of a command that was found right.

    Attributes:
        decider: what decides.
        seeds: overrides that repeat each point, such as ``seed=1``; one empty line where no seed is swept.
        check: composes and checks a job; raises ConfigError.
    """

    decider: Decider
    seeds: Sequence[str]
    check: Callable[[Sequence[str]], Job]

    @property
    def words(self) -> str:
        """What will be searched, in one line."""
        return self.decider.words

    def first_jobs(self) -> list[Job]:
        """Checks what can be known before anything starts: the first points with every seed, the others with one.

        A change that is wrong only together with what it meets (a warm-up longer than the run that a large batch
        leaves) is no mistake: the search passes over it. But something of each change must be possible.

        Raises:
            ConfigError: the first problem found.
        """
        jobs: dict[str, Job] = {}
        problems: dict[str, ConfigError] = {}
        possible: set[str] = set()
        for point in self.decider.first:
            for seed in self.seeds if point.changed is None else self.seeds[:1]:
                try:
                    job = _judged(self.check(_with_seed(point, seed)))
                except ConfigError as error:
                    if point.changed is None or _is_wrong_alone(point.changed):
                        raise
                    problems.setdefault(_key(point.changed), error)
                    continue
                jobs.setdefault(config_hash(job.config), job)
                possible |= {_key(point.changed)} if point.changed else set()
        for key, error in problems.items():
            if key not in possible:
                raise error
        return list(jobs.values())

    def open(self, ledger: Ledger, say: Callable[[str], None]) -> None:
        """Gets ready to run in a folder."""
        self._ledger, self._say = ledger, say
        self._waiting: list[tuple[Point, list[Job]]] = []
        self.decider.open(ledger.folder.path, say)

    def wave(self) -> list[list[str]]:
        """The overrides of what to run next, for a launcher; none where the search is over.

        What has a result already is told without a run.
        """
        self.learn()
        while points := self.decider.ask():
            jobs: dict[str, Job] = {}
            for point in points:
                try:
                    mine = [self.check(_with_seed(point, seed)) for seed in self.seeds]
                except ConfigError as error:
                    self._say(f"{point.label}: left out: {error}")
                    self.decider.tell(point, None, str(error))
                    continue
                self._waiting.append((point, mine))
                jobs |= {config_hash(job.config): job for job in mine}
            self._ledger.add(list(jobs.values()))
            if left := self._ledger.left(list(jobs.values())):
                return left
            self.learn()
        for line in self.decider.closing():
            self._say(line)
        return []

    def learn(self) -> None:
        """Tells the results of the last wave."""
        found = {job.config_hash: job for job in self._ledger.folder.jobs()} if self._waiting else {}
        for point, jobs in self._waiting:
            self.decider.tell(point, _mean([_loss(found[config_hash(job.config)]) for job in jobs]))
        self._waiting = []


def drive(search: Search, launch: Callable[[list[list[str]], int], Sequence[Any]], *, stops: bool) -> list[Any]:
    """Runs a search to its end; for Hydra's sweepers.

    Args:
        search: the search, opened.
        launch: Hydra's launcher: takes the overrides of each job and the number of the first.
        stops: whether a job that fails ends the search (``on_failure=stop``).

    Returns:
        What the launcher answered, wave after wave.
    """
    from lightning_opt.launch import task

    answers: list[Any] = []
    number = 0
    while lists := search.wave():
        answers.append(launch(lists, number))
        number += len(lists)
        if task.stopped() or (stops and task.exit_code() not in (0, 3)):
            break
    return answers


def _judged(job: Job) -> Job:
    if not job.config["trainer"]["val_sequences"]:
        why = "must be >= 1: a search decides by the final validation loss"
        raise ConfigError("trainer.val_sequences", 0, why)
    return job


def _loss(job: SweepJob) -> float | None:
    if job.state == "DIVERGED":
        return math.inf
    loss = read_json(job.folder.summary).get("val_loss") if job.state == "FINISHED" else None
    return None if loss is None else float(loss) if math.isfinite(loss) else math.inf


def _mean(losses: Sequence[float | None]) -> float | None:
    had = [loss for loss in losses if loss is not None]
    return fmean(had) if len(had) == len(losses) or math.inf in had else None


def _with_seed(point: Point, seed: str) -> list[str]:
    return [*point.lines, *filter(None, [seed])]


def _key(line: str) -> str:
    return line.partition("=")[0]


def _is_wrong_alone(line: str) -> bool:
    """Whether the value breaks the field's own rule, whatever else is chosen; also where no such rule is known."""
    key, value = value_of(line)
    rule = rule_for(key)
    if rule is None:
        return True
    try:
        rule.normalise(value)
    except ValueError:
        return True
    return False
