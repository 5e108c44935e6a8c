"""How the loss answers to one hyperparameter: from the runs that tuned a cell, or from recorded one-off changes."""

from __future__ import annotations

import math

from lightning_opt.reports import quantities as q
from lightning_opt.reports.study_material import Material, Place, name_of
from lightning_opt.study.recorded import came_to_nothing
from lightning_opt.study.results import Cell
from lightning_opt.study.sensitivity import recorded_trials

RATE = ("learning_rate", "optimizer.lr", "optimizer.lr_scale")
DECAY = ("weight_decay", "optimizer.weight_decay")
BATCH = ("train_batch_size", "trainer.global_batch_size")


def of_cell(about: Material, cell: Cell, keys: tuple[str, ...]) -> dict[float, float]:
    """Value of a hyperparameter to the lowest loss that was met with it while tuning the cell; infinite: diverged.

    Args:
        about: the study.
        cell: which.
        keys: names that the hyperparameter goes by.
    """
    found: dict[float, float] = {}
    centre = (about.facts.get("centre") or {}).get(cell) or {}
    for config, loss in (*about.tried.get(cell, ()), *recorded_trials(about.results, cell, centre)):
        value = next((q.finite(config[key]) for key in keys if key in config), None)
        if value is not None:
            found[value] = min(found.get(value, math.inf), loss)
    return dict(sorted(found.items()))


def at_place(about: Material, place: Place, keys: tuple[str, ...]) -> dict[str, dict[float, float]]:
    """Optimizer as it is spelled to the answers of its cell, where two values or more were tried."""
    found = {name_of(name): of_cell(about, Cell(name, *place), keys) for name in about.optimizers}
    return {name: answers for name, answers in found.items() if len(answers) > 1}


def cost_of(about: Material, cell: Cell, keys: tuple[str, ...], factor: float) -> float | None:
    """By how much the loss rises where the tuned value is multiplied; None where that was not run.

    Args:
        about: the study.
        cell: which.
        keys: names that the hyperparameter goes by.
        factor: of the tuned value, the one of the lowest loss.

    Returns:
        Nats per token; infinite where the run came to nothing.
    """
    answers = of_cell(about, cell, keys)
    if not answers or not (about.tried.get(cell) or (about.facts.get("centre") or {}).get(cell)):
        return None  # a table of changes alone does not tell what was changed
    best = min(answers, key=answers.__getitem__)
    near = (loss for value, loss in answers.items() if best and math.isclose(value, factor * best, rel_tol=1e-6))
    loss = next(near, None)
    if loss is None:
        return None
    return math.inf if came_to_nothing(loss, answers.values()) else loss - answers[best]
