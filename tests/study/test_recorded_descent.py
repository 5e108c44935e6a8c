"""Descent over the study's recorded ablations: it accepts only what its threshold allows, and comes back."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lightning_opt.study import Cell, RecordedRuns, Results, Tuned, recorded_cost, recorded_gains

THRESHOLD = 3e-3
STILL_BETTER = {
    Cell("scion", "300m", 4.0): ("train_batch_size", 256, 3.0955305099487305 - 3.085716724395752),
    Cell("kron", "130m", 4.0): ("learning_rate", 0.001, 3.3066134452819824 - 3.303089141845703),
}


@pytest.fixture(scope="module")
def runs(published: Results, tuned: Tuned) -> dict[Cell, RecordedRuns]:
    cells = {cell: losses for cell, losses in published.tuning.items() if "best_config" in losses}
    assert len(cells) == 90
    return {cell: RecordedRuns.of(losses, tuned.best[cell]) for cell, losses in cells.items()}


def test_from_a_published_best_it_accepts_only_recorded_gains(runs: dict[Cell, RecordedRuns]) -> None:
    accepted = {cell: found for cell, one in runs.items() if (found := one.descend().accepted)}
    assert set(accepted) == set(STILL_BETTER)
    for cell, (key, value, gain) in STILL_BETTER.items():
        (step,) = accepted[cell]
        assert (step.axis, step.after[key]) == (key, value)
        assert step.before == runs[cell].best
        assert step.gain == pytest.approx(gain, abs=1e-12)


def test_it_comes_back_from_every_neighbour_that_is_worse_by_more_than_the_threshold(
    runs: dict[Cell, RecordedRuns],
) -> None:
    starts = 0
    for cell, one in runs.items():
        best = one(one.best)
        for start in one.neighbours():
            if not one(start) > best + THRESHOLD:
                continue
            starts += 1
            descent = one.descend(start)
            end = descent.incumbent
            if cell in STILL_BETTER:
                key, value, _ = STILL_BETTER[cell]
                assert end == one.best | {key: value}, (cell, start)
            else:
                assert end == one.best, (cell, start)
            assert one(descent.best) <= best
            assert all(step.gain > THRESHOLD for step in descent.accepted)
    assert starts > 600


def test_what_is_not_recorded_cannot_be_had(runs: dict[Cell, RecordedRuns]) -> None:
    one = runs[Cell("adamw", "130m", 1.0)]
    assert one(one.best) == 3.5291428565979004
    assert one(one.best | {"beta1": 0.95}) == 3.5385568141937256
    assert one(one.best | {"beta1": 0.95, "warmup": 1000}) is None
    assert one(one.best | {"beta1": 0.5}) is None


def test_every_recorded_loss_is_found(runs: dict[Cell, RecordedRuns], recorded: Path) -> None:
    """Against the csv module and nothing of ours but the names."""
    with (recorded / "results.csv").open(newline="") as file:
        every = [row for row in csv.DictReader(file) if row["metric"].startswith("c4en_loss_")]
    cells = [Cell(row["optimizer"], row["params"], float(row["chinchilla"])) for row in every]
    tuned = {cell for cell, row in zip(cells, every, strict=True) if row["metric"] == "c4en_loss_best_config"}
    assert set(runs) == tuned  # soap 130m 2x has changes, but not the run that they are changes of
    found = 0
    for cell, row in zip(cells, every, strict=True):
        if cell not in tuned or not row["metric"].startswith("c4en_loss_ablation:"):
            continue
        one = runs[cell]
        name, _, text = row["metric"].removeprefix("c4en_loss_ablation:").partition("=")
        value = {"True": True, "False": False}.get(text)
        changed = one.best | {name: float(text) if value is None else value}
        loss = float(row["value"]) if float(row["value"]) <= 1e4 else math.inf
        assert one(changed) == loss, row
        found += 1
    assert found > 1200


def test_the_table_alone_is_enough(published: Results) -> None:
    """Without the tuned values, which the table does not hold."""
    descents = recorded_gains(published)
    assert len(descents) == 90
    accepted = {cell: descent.accepted for cell, descent in descents.items() if descent.accepted}
    assert set(accepted) == set(STILL_BETTER)
    for cell, (key, value, gain) in STILL_BETTER.items():
        (step,) = accepted[cell]
        assert step.axis == key
        assert (step.before[key], step.after[key]) == ("as tuned", value)
        assert step.gain == pytest.approx(gain, abs=1e-12)


def test_what_the_recorded_runs_took(published: Results, recorded: Path) -> None:
    """Against the csv module: study.md counts the runs above 5 nats or without a number as lost."""
    cost, failures = recorded_cost(published)
    with (recorded / "results.csv").open(newline="") as file:
        every = [row for row in csv.DictReader(file) if row["metric"].startswith(("c4en_loss_abl", "c4en_loss_best"))]
    for name, spent in cost.items():
        mine = [row for row in every if row["optimizer"] == name]
        assert spent["runs"] == len(mine)
        over = sum(not float(row["value"]) <= 5 for row in mine)
        assert over <= spent["diverged"] <= over + 3  # some ended between 1 nat above the best and 5 nats
        sizes = {"130m": 134_217_728, "300m": 301_989_888}
        tokens = sum(20 * sizes[row["params"]] * float(row["chinchilla"]) for row in mine)
        assert spent["tokens"] == pytest.approx(tokens)
        assert sum(one["optimizer"] == name for one in failures) == spent["diverged"]


def test_a_model_of_unknown_size_has_no_tokens() -> None:
    runs = {"best_config": 4.0, "lr=1": math.inf, "lr=2": 5.5, "lr=3": 4.9}
    cost, failures = recorded_cost(Results(tuning={Cell("lion", "mine", 1.0): runs}))
    assert cost == {"lion": {"runs": 4, "diverged": 2, "tokens": None}}
    assert [(one["setting"], one["reason"]) for one in failures] == [
        ("lr 1", "no finite loss"),
        ("lr 2", "ended at 5.50"),
    ]
