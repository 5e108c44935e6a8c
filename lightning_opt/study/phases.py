"""A live study as a pure function of its ledger: how each cell stands, and what to run next.

Phase I searches every hyperparameter in some cells, phase II only what those could not settle in the others, from the
nearest tuned cell's best; then each cell's best configuration runs on fresh seeds and on another part of the
validation text. Method: "Fantastic Pretraining Optimizers" (arXiv 2509.02046), sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_opt.study.budget import Budget, Spent
from lightning_opt.study.cells import REPORTING, TUNING, CellPlan, Key, Ledger, Outcome, Trial, key_of
from lightning_opt.study.descent import THRESHOLD, Descent
from lightning_opt.study.sensitivity import Sensitivity, sensitivity
from lightning_opt.study.significance import Noise, pooled, t_quantile
from lightning_opt.study.space import Axis, Ladder, Space

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell, Config

NEAR = 6.4 / 3  # of the threshold: the study's near-best sets reach 6.4e-3 nats, its threshold is 3e-3
SURE = 0.95  # that a change accepted at a measured threshold is not noise alone, one-sided
STOPS = (130, 143)  # exit codes of a sweep that was interrupted or asked to end


@dataclass(frozen=True)
class Design:
    """What a study was asked to find out.

    Attributes:
        plans: of every cell.
        axes: of every cell, in the order they are searched.
        first: the cells of phase I.
        budget: cap on tuning a cell of phase I; ``reduced_budget`` the same for a cell of phase II.
        seeds: of the runs that are reported.
        tuning_seed: of the runs that choose.
        threshold: an accepted change gains more than this, nats; None: measured.
        noise_seeds: further seeds on which the start is run to measure it.
        near: near-best configurations reach so far above the lowest loss, nats; None: 6.4 / 3 of the threshold.
        always: hyperparameters that phase II searches whatever phase I says.
        extra: overrides of the runs of each part, ``tuning`` and ``reporting``.
        validations: how often a run of each part is validated, its end included; none: as its overrides say.
    """

    plans: Mapping[Cell, CellPlan]
    axes: Mapping[Cell, tuple[Axis | Ladder, ...]]
    first: Set[Cell]
    budget: Budget = field(default_factory=Budget)
    reduced_budget: Budget = field(default_factory=Budget)
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seed: int = 1234
    threshold: float | None = THRESHOLD
    noise_seeds: tuple[int, ...] = ()
    near: float | None = None
    always: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    validations: Mapping[str, int] = field(default_factory=dict)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """In the order of the cells."""
        return tuple(dict.fromkeys(cell.optimizer for cell in self.plans))

    def words(self, trial: Trial) -> list[str]:
        """The overrides that ask for a run."""
        words = [*trial.words(), *self.extra.get(trial.part, ())]
        if often := self.validations.get(trial.part):
            words.append(f"trainer.val_every_n_steps={max(1, math.ceil(trial.plan.steps(trial.config) / often))}")
        return words

    def key(self, trial: Trial) -> Key:
        """Its identity in the ledger."""
        return key_of(self.words(trial))

    def noise_trials(self) -> list[Trial]:
        """The start of each optimizer's first cell of phase I on the tuning seed and further ones, smallest first."""
        found = []
        for name in self.optimizers:
            mine = [plan for cell, plan in self.plans.items() if cell.optimizer == name and cell in self.first]
            plan = min(mine, key=lambda plan: plan.tokens * plan.flops_per_token)
            found += [Trial(plan, plan.start, seed) for seed in (self.tuning_seed, *self.noise_seeds)]
        return found


@dataclass(frozen=True)
class CellStanding:
    """How a cell stands.

    Attributes:
        plan: the cell.
        phase: 1 or 2.
        descent: what is known of it; None in phase II while phase I is not over.
        tried: what its search knows: configurations with their losses, infinite where the run diverged.
        spent: on tuning it.
        capped: whether the cap ended its search.
        over: whether its search has ended.
        pending: runs that its search waits for.
        finals: the runs that are reported; none before the search is over, nor where nothing came to its end.
        reported: what has become of them, in the same order.
    """

    plan: CellPlan
    phase: int
    descent: Descent | None = None
    tried: tuple[tuple[Config, float], ...] = ()
    spent: Spent = field(default_factory=Spent)
    capped: bool = False
    over: bool = False
    pending: tuple[Trial, ...] = ()
    finals: tuple[Trial, ...] = ()
    reported: tuple[Outcome, ...] = ()

    @property
    def best(self) -> dict[str, Any] | None:
        """The configuration of the lowest loss so far."""
        return self.descent.best if self.descent else None

    @property
    def best_loss(self) -> float | None:
        """Its loss on the tuning seed."""
        return self.descent.loss(self.best) if self.descent and self.best else None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return self.over and all(one.is_result for one in self.reported)

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.descent is None:
            return "waits for the threshold" if self.phase == 1 else "waits for phase I"
        if not self.over:
            return "searching"
        if not self.finals:
            return "nothing came to its end"
        return "done" if self.is_done else "final runs"


@dataclass(frozen=True)
class Standing:
    """How the whole study stands.

    Attributes:
        cells: every cell, in the design's order.
        threshold: nats; None while it is still measured.
        noise: between seeds, as measured for the threshold; None where it is given.
        measuring: runs that measure it and are not there yet.
        reduced: what phase I says of each hyperparameter, by optimizer whose phase I is over.
    """

    cells: tuple[CellStanding, ...]
    threshold: float | None
    noise: Noise | None = None
    measuring: tuple[Trial, ...] = ()
    reduced: Mapping[str, Sensitivity] = field(default_factory=dict)

    @cached_property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return not self.measuring and all(cell.is_done for cell in self.cells)

    def to_run(self, given_up: Set[Key], design: Design, only: Set[str] = frozenset()) -> list[Trial]:
        """What can run now, side by side, longest first.

        Args:
            given_up: what is not tried again.
            design: the study's.
            only: these optimizers; all where empty.
        """
        finals = [
            trial
            for cell in self.cells
            for trial, one in zip(cell.finals, cell.reported, strict=True)
            if not one.is_result and design.key(trial) not in given_up
        ]
        found = [*(trial for cell in self.cells for trial in cell.pending), *finals]
        found = [trial for trial in found if not only or trial.cell.optimizer in only]
        mine = {design.key(trial): trial for trial in (*self.measuring, *found)}  # all need the threshold
        return sorted(mine.values(), key=lambda trial: -trial.plan.tokens * trial.plan.flops_per_token)


def stand(design: Design, ledger: Ledger, given_up: Set[Key] = frozenset()) -> Standing:
    """How a study stands, from its run folders alone.

    Args:
        design: what was asked.
        ledger: what has become of the runs.
        given_up: runs without a result that are not tried again: they cannot be had.
    """
    noise, threshold = None, design.threshold
    if threshold is None:
        trials = design.noise_trials()
        measuring = [trial for trial in trials if not _known(design, ledger, trial, given_up)]
        if measuring:
            waiting = (CellStanding(plan, 1 if cell in design.first else 2) for cell, plan in design.plans.items())
            return Standing(tuple(waiting), None, measuring=tuple(measuring))
        noise = _measured(design, ledger, trials)
        threshold = THRESHOLD if noise is None else threshold_of(noise)
    searches = _Searches(design, ledger, given_up, threshold)
    return Standing(searches.cells(), threshold, noise, reduced=searches.reduced)


def threshold_of(noise: Noise) -> float:
    """What a change must gain to be accepted: two runs differ by more with a chance of 5 % if it changes nothing."""
    return t_quantile(SURE, noise.freedom) * math.sqrt(2) * noise.sigma


def _measured(design: Design, ledger: Ledger, trials: Sequence[Trial]) -> Noise | None:
    by_cell: dict[Cell, list[float]] = {}
    for trial in trials:
        found = ledger.get(design.key(trial), Outcome())
        if found.loss is not None and math.isfinite(found.loss):
            by_cell.setdefault(trial.cell, []).append(found.loss)
    return pooled(by_cell.values())


def _known(design: Design, ledger: Ledger, trial: Trial, given_up: Set[Key]) -> bool:
    key = design.key(trial)
    return key in given_up or ledger.get(key, Outcome()).is_result


class _Searches:
    """The searches of all cells, phase I before phase II, each optimizer for itself."""

    def __init__(self, design: Design, ledger: Ledger, given_up: Set[Key], threshold: float) -> None:
        self.design, self.ledger, self.given_up, self.threshold = design, ledger, given_up, threshold
        self.near = NEAR * threshold if design.near is None else design.near
        self.reduced: dict[str, Sensitivity] = {}

    def cells(self) -> tuple[CellStanding, ...]:
        found: dict[Cell, CellStanding] = {}
        for name in self.design.optimizers:
            mine = {cell: plan for cell, plan in self.design.plans.items() if cell.optimizer == name}
            tuned = {cell: self._first(plan) for cell, plan in mine.items() if cell in self.design.first}
            found |= tuned
            if all(one.over for one in tuned.values()):
                self.reduced[name] = sensitivity({cell: one.tried for cell, one in tuned.items()}, self.near)
            for cell in mine.keys() - tuned.keys():
                found[cell] = self._second(mine[cell], tuned)
        return tuple(found[cell] for cell in self.design.plans)

    def _first(self, plan: CellPlan) -> CellStanding:
        space = Space(self.design.axes[plan.cell], plan.refused)
        return self._search(plan, 1, Descent(space, plan.start, threshold=self.threshold), self.design.budget)

    def _second(self, plan: CellPlan, tuned: Mapping[Cell, CellStanding]) -> CellStanding:
        reduced = self.reduced.get(plan.cell.optimizer)
        if reduced is None:
            return CellStanding(plan, 2)
        nearest = _nearest(plan, [one for one in tuned.values() if one.best])
        if nearest is None:  # nothing came to its end in phase I
            return CellStanding(plan, 2, Descent(Space(()), plan.start), over=True)
        start, axes = self._reduced(plan, nearest.best or {}, reduced)
        if plan.refused(start):
            start |= {name: plan.start[name] for name in start if name in plan.start and _of_the_run(name)}
        space = Space(axes, plan.refused)
        return self._search(plan, 2, Descent(space, start, threshold=self.threshold), self.design.reduced_budget)

    def _reduced(
        self, plan: CellPlan, best: Config, said: Sensitivity
    ) -> tuple[dict[str, Any], tuple[Axis | Ladder, ...]]:
        """Where a cell of phase II starts, and its grid: what serves every cell of phase I is settled."""
        grid, axes = said.reduced(best), []
        start = {name: values[0] if len(values := grid[name]) == 1 else best[name] for name in best}
        for axis in self.design.axes[plan.cell]:
            if axis.name in self.design.always:
                start[axis.name] = best[axis.name]
                axes.append(axis)
            elif len(grid[axis.name]) > 1:
                axes.append(Axis(axis.name, grid[axis.name]))
        return start, tuple(axes)

    def _search(self, plan: CellPlan, phase: int, descent: Descent, budget: Budget) -> CellStanding:
        """Tells the descent what is known, as far as the cap goes, and finds what it waits for."""
        spent, capped, pending, tried = Spent(), False, [], []
        while not pending and not capped and (asked := descent.ask()):
            ahead = spent
            for config in asked:
                trial = Trial(plan, config, self.design.tuning_seed, TUNING)
                if not budget.allows(ahead, plan.tokens):
                    capped = True
                    break
                cost = self._cost(trial, ahead)
                ahead += cost
                if _known(self.design, self.ledger, trial, self.given_up):
                    spent += cost
                    loss = self._found(trial).loss
                    descent.tell(config, loss)
                    tried += [(config, loss)] if loss is not None else []
                else:
                    pending.append(trial)
        capped = capped and not pending  # the rest of a wave is still to come
        over = not pending
        standing = CellStanding(plan, phase, descent, tuple(tried), spent, capped, over, tuple(pending))
        return self._with_finals(standing) if over and standing.best else standing

    def _found(self, trial: Trial) -> Outcome:
        return self.ledger.get(self.design.key(trial), Outcome())

    def _cost(self, trial: Trial, so_far: Spent) -> Spent:
        """What a run has cost; of one that is to come, what it should."""
        found = self._found(trial)
        if found.is_result:
            return Spent(1, found.tokens, found.seconds, diverged=int(math.isinf(found.loss or 0.0)))
        tokens = trial.plan.tokens
        return Spent(1, tokens, tokens * (so_far.seconds_per_token or 0.0), failed=1)

    def _with_finals(self, standing: CellStanding) -> CellStanding:
        best = standing.best or {}
        finals = tuple(Trial(standing.plan, best, seed, REPORTING) for seed in self.design.seeds)
        reported = tuple(self._found(trial) for trial in finals)
        return CellStanding(**{**vars(standing), "finals": finals, "reported": reported})


def _nearest(plan: CellPlan, tuned: Sequence[CellStanding]) -> CellStanding | None:
    """The tuned cell nearest in size, then in scale."""

    def far(one: CellStanding) -> tuple[float, float]:
        size = abs(math.log(max(one.plan.params, 1) / max(plan.params, 1)))
        return size, abs(math.log(one.plan.cell.chinchilla / plan.cell.chinchilla))

    return min(tuned, key=far, default=None)


def _of_the_run(name: str) -> bool:
    """Whether a value may suit one length of run and not another."""
    return name.startswith(("schedule.", "trainer."))


def drive(
    design: Design,
    read: Callable[[], Ledger],
    run: Callable[[Sequence[Trial]], int],
    *,
    only: Set[str] = frozenset(),
    tell: Callable[[Standing, Sequence[Trial]], None] = lambda standing, wave: None,
) -> int:
    """Runs a study to its end, wave by wave; stopped at any time, the same call goes on.

    What comes back without a result is not tried again by this call, but by the next.

    Args:
        design: what was asked.
        read: the ledger as it is now.
        run: runs trials side by side and answers an exit code as a sweep's; a negative one ends it here.
        only: these optimizers; all where empty.
        tell: told how the study stands before each wave.

    Returns:
        0 where all was run that could be, 1 where a run failed for good, 130 or 143 where it was stopped, a negative
        code of ``run`` as it is.
    """
    given_up: set[Key] = set()
    while True:
        standing = stand(design, read(), given_up)
        wave = standing.to_run(given_up, design, only)
        tell(standing, wave)
        if not wave:
            return int(bool(given_up))
        code = run(wave)
        if code in STOPS or code < 0:
            return code
        after = read()
        given_up |= {key for key in map(design.key, wave) if not after.get(key, Outcome()).is_result}
