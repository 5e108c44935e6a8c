"""A live study against runs that are a function: every phase, kills, caps, ties, divergence, failures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from fake_runs import DECAYS, RATES, FakeRuns, bowl, design_of
from scipy import stats

from lightning_opt.study.budget import Budget
from lightning_opt.study.cells import Trial
from lightning_opt.study.phases import drive, stand, threshold_of
from lightning_opt.study.results import Cell
from lightning_opt.study.significance import Noise
from lightning_opt.study.space import Axis

ADAMW, LION = Cell("adamw", "small", 1.0), Cell("lion", "small", 1.0)


def run(design, loss, **more):
    runs = FakeRuns(design, loss, **more)
    code = drive(design, runs.read, runs)
    return runs, code, stand(design, runs.read())


def test_each_optimizer_ends_at_the_lowest_of_its_whole_grid_and_is_reported_on_fresh_seeds():
    rates = {"adamw": 4.0, "lion": 0.25}
    design = design_of([ADAMW, LION])

    def loss(trial):
        return bowl(trial, rate=rates[trial.cell.optimizer])

    runs, code, standing = run(design, loss)
    assert code == 0
    assert standing.is_done
    for one in standing.cells:
        every = [{"optimizer.lr": r, "optimizer.weight_decay": d} for r, d in itertools.product(RATES, DECAYS)]
        lowest = min(every, key=lambda config: loss(Trial(one.plan, config, 1234)))
        assert one.best == lowest
        assert [(trial.seed, trial.part) for trial in one.finals] == [(1, "reporting"), (2, "reporting")]
        assert [outcome.loss for outcome in one.reported] == [loss(trial) for trial in one.finals]
    chosen_on = {(trial.seed, trial.part) for trial in runs.asked} - {(1, "reporting"), (2, "reporting")}
    assert chosen_on == {(1234, "tuning")}
    assert set(runs.ran.values()) == {1}


def test_killed_anywhere_the_same_call_ends_with_the_same_runs_and_none_runs_twice():
    design = design_of([ADAMW, LION, Cell("lion", "small", 2.0)], first=[ADAMW, LION], budget=Budget(8))
    whole, _, expected = run(design, bowl)
    total = sum(whole.ran.values())
    assert total > 20
    for dies_after in range(0, total, 3):
        runs = FakeRuns(design, bowl, dies_after)
        with pytest.raises(KeyboardInterrupt):
            drive(design, runs.read, runs)
        runs.dies_after = None
        assert drive(design, runs.read, runs) == 0
        assert runs.ran == whole.ran
        assert [one.best for one in stand(design, runs.read()).cells] == [one.best for one in expected.cells]


@pytest.mark.parametrize(
    "budget", [Budget(runs=5), Budget(tokens=5 * 2e6), Budget(seconds=5 * 200.0), Budget(5, 1e9, 1e9)], ids=str
)
def test_the_cap_is_the_same_for_all_and_who_hits_it_is_marked(budget):
    far = {"adamw": 1.0, "lion": 4.0}  # lion's best is two accepted steps away
    design = design_of([ADAMW, LION], budget=budget)

    def loss(trial):
        return bowl(trial, rate=far[trial.cell.optimizer], decay=0.1)

    runs, code, standing = run(design, loss)
    assert code == 0
    by_name = {one.plan.cell.optimizer: one for one in standing.cells}
    assert by_name["adamw"].spent.runs == 5  # the start and its four neighbours: it needs no more
    assert not by_name["adamw"].capped
    assert by_name["lion"].spent.runs == 5
    assert by_name["lion"].capped
    tuning = [trial for trial in runs.asked if trial.part == "tuning"]
    assert len(tuning) == 10
    lion = [trial for trial in tuning if trial.cell == LION]
    assert by_name["lion"].best == min(lion, key=loss).config  # as far as it came


def test_a_larger_cap_goes_on_and_a_smaller_one_forgets_what_lies_beyond():
    def loss(trial):
        return bowl(trial, rate=4.0, decay=0.1)

    small, large = (design_of([ADAMW], budget=Budget(runs)) for runs in (5, 40))
    runs, _, capped = run(small, loss)
    runs.design = large
    assert drive(large, runs.read, runs) == 0
    grown = stand(large, runs.read()).cells[0]
    assert grown.best["optimizer.lr"] == 4.0
    assert not grown.capped
    again = stand(small, runs.read()).cells[0]
    assert (again.best, again.spent.runs, again.capped) == (capped.cells[0].best, 5, True)


def test_a_tie_keeps_what_is_there_and_gains_inside_the_threshold_are_not_taken():
    design = design_of([ADAMW], threshold=3e-3)
    _, _, standing = run(design, lambda trial: 3.0 - (0.002 if trial.config["optimizer.lr"] == 2.0 else 0.0))
    assert standing.cells[0].descent.accepted == []
    _, _, level = run(design, lambda trial: 3.0)
    assert level.cells[0].best == {"optimizer.lr": 1.0, "optimizer.weight_decay": 0.1}


def test_a_run_that_diverges_is_a_result_and_never_chosen():
    def loss(trial):
        return math.inf if trial.config["optimizer.lr"] >= 2.0 else bowl(trial, rate=4.0)

    runs, code, standing = run(design_of([ADAMW, LION]), loss)
    assert code == 0
    for one in standing.cells:
        assert one.best["optimizer.lr"] == 1.0
        assert one.spent.diverged == sum(math.isinf(value) for _, value in one.tried) > 0
    assert set(runs.ran.values()) == {1}


def test_an_optimizer_that_only_diverges_holds_nobody_up():
    later = Cell("lion", "small", 2.0)
    design = design_of([ADAMW, LION, later], first=[ADAMW, LION])
    _, code, standing = run(design, lambda t: math.inf if t.cell.optimizer == "lion" else bowl(t))
    assert code == 0
    assert standing.is_done
    assert [one.state for one in standing.cells] == ["done", "nothing came to its end", "nothing came to its end"]


def test_a_run_that_fails_is_left_out_by_this_call_and_tried_again_by_the_next():
    design = design_of([ADAMW])

    def fails(trial):
        return None if trial.config["optimizer.lr"] == 2.0 else bowl(trial)

    runs, code, _ = run(design, fails)
    assert code == 1
    assert not stand(design, runs.read()).is_done
    assert max(runs.ran.values()) == 1
    runs.loss = bowl
    assert drive(design, runs.read, runs) == 0
    standing = stand(design, runs.read())
    assert standing.is_done
    assert standing.cells[0].best["optimizer.lr"] == 2.0
    assert max(runs.ran.values()) == 2


def test_a_failed_run_counts_towards_the_cap():
    design = design_of([ADAMW], budget=Budget(runs=4))
    runs, code, _ = run(design, lambda trial: None if trial.config["optimizer.lr"] == 2.0 else bowl(trial, rate=0.25))
    assert code == 1
    assert sum(trial.part == "tuning" for trial in runs.asked) == 4


def test_phase_two_searches_what_phase_one_could_not_settle_from_the_nearest_best():
    small, large = Cell("adamw", "small", 1.0), Cell("adamw", "large", 1.0)
    others = [Cell("adamw", "small", 2.0), Cell("adamw", "large", 4.0)]
    best_rate = {"small": 4.0, "large": 0.5}
    design = design_of([small, large, *others], first=[small, large])
    runs, code, standing = run(design, lambda trial: bowl(trial, rate=best_rate[trial.cell.params]))
    assert code == 0
    said = standing.reduced["adamw"]
    assert set(said.insensitive) == {"optimizer.weight_decay"}
    assert said.sensitive == {"optimizer.lr": (0.5, 4.0)}
    for cell in others:
        mine = [trial.config for trial in runs.asked if trial.cell == cell and trial.part == "tuning"]
        assert mine[0]["optimizer.lr"] == best_rate[cell.params]  # from the same model's cell
        assert {config["optimizer.lr"] for config in mine} == {0.5, 4.0}
        assert {config["optimizer.weight_decay"] for config in mine} == {0.2}
    firsts = [index for index, trial in enumerate(runs.asked) if trial.cell in others]
    last = max(i for i, trial in enumerate(runs.asked) if trial.cell in (small, large) and trial.part == "tuning")
    assert min(firsts) > last


def test_what_is_always_searched_keeps_its_whole_grid_in_phase_two():
    first, later = ADAMW, Cell("adamw", "small", 4.0)
    design = design_of([first, later], first=[first], always=("optimizer.lr",))
    rate = {1.0: 2.0, 4.0: 0.25}  # with more data a lower rate
    _, _, standing = run(design, lambda trial: bowl(trial, rate=rate[trial.cell.chinchilla]))
    assert standing.cells[1].best == {"optimizer.lr": 0.25, "optimizer.weight_decay": 0.2}
    settled = design_of([first, later], first=[first])
    runs, _, fixed = run(settled, lambda trial: bowl(trial, rate=rate[trial.cell.chinchilla]))
    assert fixed.cells[1].best == fixed.cells[0].best
    assert sum(trial.cell == later and trial.part == "tuning" for trial in runs.asked) == 1


def test_a_warmup_of_steps_that_a_shorter_run_cannot_hold_is_not_handed_on():
    long, short = Cell("adamw", "small", 4.0), Cell("adamw", "small", 0.5)
    axes = (Axis("schedule.warmup", (500, 1000)), Axis("optimizer.lr", (1.0, 2.0)))
    design = design_of([long, short], first=[long], start={"schedule.warmup": 1000, "optimizer.lr": 1.0}, axes=axes)
    own = replace(design.plans[short], start={"schedule.warmup": 100, "optimizer.lr": 1.0})
    design = replace(design, plans={**design.plans, short: own})
    runs, code, standing = run(design, lambda trial: 3.0 + trial.config["schedule.warmup"] / 1e4)
    assert code == 0
    assert standing.cells[0].best["schedule.warmup"] == 500
    # 0.5x of 100 000 parameters in batches of 2048 tokens: 488 steps
    assert {trial.config["schedule.warmup"] for trial in runs.asked if trial.cell == short} == {100}


def test_a_measured_threshold_is_what_two_equal_settings_rarely_differ_by():
    design = design_of([ADAMW, LION], threshold=None, noise_seeds=(1235, 1236))
    spread = {1234: 0.0, 1235: 0.03, 1236: -0.01}

    def loss(trial):
        return bowl(trial, rate=1.3) + spread.get(trial.seed, 0.0) * (2 if trial.cell.optimizer == "lion" else 1)

    runs, code, standing = run(design, loss)
    assert code == 0
    rows = [np.array([0.0, 0.03, -0.01]), 2 * np.array([0.0, 0.03, -0.01])]
    pooled = math.sqrt(np.mean([row.var(ddof=1) for row in rows]))
    assert standing.noise.sigma == pytest.approx(pooled)
    assert standing.threshold == pytest.approx(stats.t.ppf(0.95, df=4) * math.sqrt(2) * pooled)
    assert all(not one.descent.accepted for one in standing.cells)  # all gains are inside the noise
    assert set(runs.ran.values()) == {1}


def test_the_threshold_is_passed_by_one_in_twenty_pairs_of_equal_settings():
    draws = np.random.default_rng(0).normal(0.0, 0.02, (40_000, 2))
    share = np.mean(draws[:, 0] - draws[:, 1] > threshold_of(Noise(0.02**2)))
    assert share == pytest.approx(0.05, abs=0.005)


def test_only_one_optimizer_runs_where_that_is_asked_and_the_rest_follows_later():
    design = design_of([ADAMW, LION])
    runs = FakeRuns(design, bowl)
    assert drive(design, runs.read, runs, only={"lion"}) == 0
    assert {trial.cell.optimizer for trial in runs.asked} == {"lion"}
    assert drive(design, runs.read, runs) == 0
    assert stand(design, runs.read()).is_done
    assert set(runs.ran.values()) == {1}


def test_the_longest_runs_of_a_wave_come_first():
    design = design_of([ADAMW, Cell("adamw", "large", 2.0)])
    runs = FakeRuns(design, bowl)
    assert drive(design, runs.read, runs) == 0
    sizes = [trial.cell.params for trial in runs.asked[: runs.waves[0]]]
    assert sizes == sorted(sizes, key=["large", "small"].index)
    assert {*sizes} == {"large", "small"}


def test_a_stop_is_handed_on_and_a_study_without_time_says_so():
    design = design_of([ADAMW])
    runs = FakeRuns(design, bowl)
    assert drive(design, runs.read, lambda trials: 143) == 143
    assert drive(design, runs.read, lambda trials: -1) == -1
