"""Runs that are a function from what was asked for to a loss: no training, and a count of how often each ran."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning_opt.study.cells import CellPlan, Outcome, Trial
from lightning_opt.study.phases import Design
from lightning_opt.study.results import Cell
from lightning_opt.study.space import Axis

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
DECAYS = (0.0, 0.1, 0.2)
SIZES = {"small": 1.0e5, "large": 4.0e5}


@dataclass
class FakeRuns:
    """A runner and its ledger.

    Attributes:
        design: the study's.
        loss: of a trial; infinite where it diverges; None where the run fails.
        dies_after: runs after which Ctrl-C comes; None: never.
        ran: how often each run was run to its end.
    """

    design: Design
    loss: Callable[[Trial], float | None]
    dies_after: int | None = None
    ran: Counter = field(default_factory=Counter)
    ledger: dict = field(default_factory=dict)
    asked: list[Trial] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)

    def __call__(self, trials: Sequence[Trial]) -> int:
        self.waves.append(len(trials))
        code = 0
        for trial in trials:
            if self.dies_after is not None and sum(self.ran.values()) >= self.dies_after:
                raise KeyboardInterrupt
            key, loss = self.design.key(trial), self.loss(trial)
            self.ran[key] += 1
            self.asked.append(trial)
            if loss is None:
                self.ledger[key] = Outcome("FAILED", None, 1.0, 0.0, "a fault")
                code = 1
            else:
                state = "FINISHED" if math.isfinite(loss) else "DIVERGED"
                self.ledger[key] = Outcome(state, loss, trial.plan.tokens / 1e4, trial.plan.tokens, "")
        return code

    def read(self) -> dict:
        return dict(self.ledger)


def plan_of(cell: Cell, start: dict, **more) -> CellPlan:
    words = (f"optimizer={cell.optimizer}", f"model={cell.params}", f"scale={cell.chinchilla:g}x")
    size = SIZES[cell.params]
    about = {"tokens": 20 * size * cell.chinchilla, "sequence_length": 256, "batch": 8, "params": size}
    return CellPlan(cell, words, start, **{**about, "flops_per_token": 6 * size, **more})


def design_of(
    cells: Sequence[Cell], *, first: Sequence[Cell] | None = None, start: dict | None = None, axes=None, **more
) -> Design:
    start = start or {"optimizer.lr": 1.0, "optimizer.weight_decay": 0.1}
    axes = axes or (Axis("optimizer.lr", RATES, 1), Axis("optimizer.weight_decay", DECAYS))
    plans = {cell: plan_of(cell, start) for cell in cells}
    first = frozenset(cells if first is None else first)
    return Design(plans, {cell: tuple(axes) for cell in cells}, first, **{"seeds": (1, 2), **more})


def bowl(trial: Trial, *, rate: float = 2.0, decay: float = 0.2) -> float:
    """Lowest at one rate and one decay; other seeds and the other part of the text lie a little higher."""
    lr, wd = trial.config["optimizer.lr"], trial.config["optimizer.weight_decay"]
    other = 0.001 * trial.seed if trial.seed < 100 else 0.0
    height = 0.1 * math.log2(lr / rate) ** 2 + 2.0 * (wd - decay) ** 2
    return 3.0 - 0.1 * math.log(trial.cell.chinchilla) + height + other + 0.01 * (trial.part == "reporting")
