"""What a study still takes at most, and how long that lasts: measured speeds where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_opt.study.cells import CellPlan, Ledger, Outcome, key_of
from lightning_opt.study.phases import CellStanding, Design, Standing


@dataclass(frozen=True)
class Forecast:
    """What is left to do, at most.

    Attributes:
        tuning: runs that choose.
        reporting: runs that are reported.
        seconds: of all of them, one after another.
        open: whether a search has no cap, so that the figures say only what is known to come.
        measured: whether the seconds are of runs of this study; else they are estimated.
    """

    tuning: int
    reporting: int
    seconds: float
    open: bool
    measured: bool

    @property
    def runs(self) -> int:
        """All of them."""
        return self.tuning + self.reporting


class Speeds:
    """Seconds per token of each optimizer on each model.

    Args:
        design: the study's.
        ledger: what its runs took.
        flops_per_second: of one run, where none was measured.
    """

    def __init__(self, design: Design, ledger: Ledger, flops_per_second: float) -> None:
        self._flops_per_second = flops_per_second
        seconds, tokens, work = dict[tuple[str, str], float](), dict[tuple[str, str], float](), 0.0
        for plan, found in _by_plan(design, ledger):
            if found.seconds and found.tokens:
                key = plan.cell.optimizer, plan.cell.params
                seconds[key] = seconds.get(key, 0.0) + found.seconds
                tokens[key] = tokens.get(key, 0.0) + found.tokens
                work += found.tokens * plan.flops_per_token
        self._measured = {key: seconds[key] / tokens[key] for key in seconds}
        self.measured = bool(seconds)
        if work:
            self._flops_per_second = work / sum(seconds.values())

    def __call__(self, plan: CellPlan) -> float:
        """Seconds per token: measured, else by the FLOPs of what was measured, else estimated."""
        key = plan.cell.optimizer, plan.cell.params
        return self._measured.get(key) or plan.flops_per_token / self._flops_per_second


def _by_plan(design: Design, ledger: Ledger) -> list[tuple[CellPlan, Outcome]]:
    """The runs of the ledger by the cell they belong to."""
    made = {key_of(plan.words): plan for plan in design.plans.values()}
    found = []
    for key, outcome in ledger.items():
        plan = next((plan for words, plan in made.items() if words <= key), None)
        if plan is not None:
            found.append((plan, outcome))
    return found


def forecast(design: Design, standing: Standing, speeds: Speeds) -> Forecast:
    """What is left to do at most: every search to its cap, then every run that is reported.

    Args:
        design: the study's.
        standing: as it stands now.
        speeds: of its runs.
    """
    tuning, reporting, seconds, open_ended = len(standing.measuring), 0, 0.0, False
    seconds += sum(trial.plan.tokens * speeds(trial.plan) for trial in standing.measuring)
    for one in standing.cells:
        left = _left(one, design, speeds(one.plan))
        open_ended = open_ended or left is None
        searching = len(one.pending) if left is None else left
        finals = _finals_left(one, design)
        tuning, reporting = tuning + searching, reporting + finals
        seconds += (searching + finals) * one.plan.tokens * speeds(one.plan)
    return Forecast(tuning, reporting, seconds, open_ended, speeds.measured)


def _left(one: CellStanding, design: Design, seconds_per_token: float) -> int | None:
    """Runs that its search may still take; None where nothing bounds it."""
    if one.over:
        return 0
    budget = design.budget if one.phase == 1 else design.reduced_budget
    most = budget.most_runs(one.plan.tokens, one.spent.seconds_per_token or seconds_per_token)
    return None if most is None else max(most - one.spent.runs, len(one.pending))


def _finals_left(one: CellStanding, design: Design) -> int:
    if not one.over:
        return len(design.seeds)
    return sum(not outcome.is_result for outcome in one.reported)


def counts(design: Design, ledger: Ledger) -> Mapping[str, int]:
    """Runs of the study by their state, those it no longer asks for included."""
    found: dict[str, int] = {}
    for _, outcome in _by_plan(design, ledger):
        found[outcome.state] = found.get(outcome.state, 0) + 1
    return found
