"""A live study's runs: how they are asked for, how they are found again, and what is made of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from fake_runs import FakeRuns, bowl, design_of, plan_of

from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob
from lightning_opt.study.budget import Budget, read_budget
from lightning_opt.study.cells import Trial, key_of, read_ledger, value_at, with_values
from lightning_opt.study.forecast import Speeds, forecast
from lightning_opt.study.harvest import check_same_data, facts_of, results_of
from lightning_opt.study.hyper_laws import tuned_laws
from lightning_opt.study.phases import drive, stand
from lightning_opt.study.results import Cell, read_results, write_results
from lightning_opt.study.space import Axis

ADAMW, LION = Cell("adamw", "small", 1.0), Cell("lion", "small", 1.0)


def test_a_list_of_which_an_element_is_searched_is_written_whole():
    plan = plan_of(ADAMW, {"optimizer.lr": 0.008}, lists={"optimizer.betas": (0.9, 0.95)})
    config = {"optimizer.lr": 0.004, "optimizer.betas[1]": 0.98, "optimizer.max_grad_norm": None}
    words = Trial(plan, config, 7, "reporting").words()
    assert words[:3] == ["optimizer=adamw", "model=small", "scale=1x"]
    assert words[3:] == [
        "optimizer.lr=0.004",
        "optimizer.betas=[0.9,0.98]",
        "optimizer.max_grad_norm=null",
        "seed=7",
        "trainer.val_part=reporting",
    ]


def test_a_run_is_known_by_what_was_asked_whatever_the_spelling():
    asked = ["optimizer.lr=0.008", "optimizer.betas=[0.9,0.98]", "seed=1", "optimizer.max_grad_norm=null"]
    same = ["seed=1", "optimizer.betas=[0.9, 0.98]", "++optimizer.lr=8e-3", "optimizer.max_grad_norm=null", "name=mine"]
    assert key_of(asked) == key_of([*same, "jobs_per_device=2", "hydra.sweep.dir='/tmp/a'", "resume=auto"])
    for other in ("seed=2", "optimizer.lr=0.004", "trainer.val_part=tuning"):
        assert key_of([*asked[:2], *asked[3:], other]) != key_of(asked)


def test_values_are_set_by_their_dotted_names_and_the_original_stays():
    config = {"optimizer": {"betas": [0.9, 0.95], "roles": {"default": {"lr_scale": 0.3}}}}
    changed = with_values(config, {"optimizer.betas[0]": 0.8, "optimizer.roles.default.lr_scale": 0.2})
    assert value_at(changed, "optimizer.betas[0]") == 0.8
    assert changed["optimizer"] == {"betas": [0.8, 0.95], "roles": {"default": {"lr_scale": 0.2}}}
    assert config["optimizer"]["betas"] == [0.9, 0.95]
    for missing in ("optimizer.momentum", "optimizer.betas[2]", "optimizer.roles[0]"):
        with pytest.raises(KeyError):
            value_at(config, missing)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (0, "budget"),
        (2.5, "budget"),
        (True, "budget"),
        ({"hours": 1}, "budget.hours"),
        ({"runs": 3, "tokens": -1}, "budget.tokens"),
    ],
)
def test_a_cap_that_is_none_is_refused_by_name(value, field):
    with pytest.raises(ConfigError) as error:
        read_budget(value)
    assert error.value.field == field


def test_caps_are_read_in_each_spelling():
    assert read_budget(12) == read_budget({"runs": 12.0, "tokens": None}) == Budget(runs=12)
    assert read_budget(None) == Budget()
    assert read_budget({"tokens": 5e7, "seconds": 60}) == Budget(None, 5e7, 60.0)


def write_runs(folder, design, runs) -> None:
    """Run folders as train.py leaves them, of what a fake study ran."""
    jobs = []
    for number, trial in enumerate(runs.asked):
        found = runs.ledger[design.key(trial)]
        run = RunFolder(folder / f"job-{number}")
        run.path.mkdir(parents=True)
        reason = "loss is nan" if found.state == "DIVERGED" else None
        run.status.write_text(json.dumps({"state": found.state, "reason": reason}))
        loss = found.loss if found.state == "FINISHED" else None
        summary = {"state": found.state, "val_loss": loss, "seconds": found.seconds, "tokens": found.tokens}
        summary |= {"peak_memory_bytes": 1000, "evaluation": {"suite": "mini", "hellaswag": {"value": 0.3, "n": 64}}}
        run.summary.write_text(json.dumps(summary))
        run.plan.write_text(json.dumps({"flops_per_token": 10}))
        run.metrics.write_text(f"step,tokens,time_s,val/loss\n1,1000,1,4.0\n2,2000,2,{loss or 4.0}\n")
        jobs.append(SweepJob(run, f"{number:08x}", design.words(trial), {}))
    SweepFolder(folder).write("recipes.study", [], jobs)


def test_the_run_folders_alone_tell_all_that_the_study_knew(tmp_path):
    def loss(trial):
        return math.inf if trial.config["optimizer.lr"] == 4.0 else bowl(trial)

    design = design_of([ADAMW, LION], extra={"tuning": ("evaluation=none",), "reporting": ("evaluation=mini",)})
    runs = FakeRuns(design, loss)
    drive(design, runs.read, runs)
    write_runs(tmp_path / "runs", design, runs)
    ledger = read_ledger(tmp_path / "runs")
    known, told = stand(design, runs.read()), stand(design, ledger)
    assert told.is_done
    assert [(one.best, one.tried, one.spent) for one in told.cells] == [(o.best, o.tried, o.spent) for o in known.cells]

    results = results_of(told, "here")
    assert results.losses[LION] == tuple(loss(trial) for trial in told.cells[1].finals)
    assert results.tuning[ADAMW]["best_config"] == told.cells[0].best_loss
    assert results.tuning[ADAMW]["optimizer.lr=4.0"] == math.inf
    assert results.scores[ADAMW] == {"hellaswag": (0.3, 0.3)}
    assert results.peak_bytes[ADAMW] == (1000.0, 1000.0)
    assert results.flops[ADAMW] == (2e7, 2e7)
    write_results(results, tmp_path / "results.csv")
    again = read_results(tmp_path / "results.csv")
    assert again.losses == results.losses
    assert again.tuning == results.tuning
    assert again.sizes == results.sizes

    facts = facts_of(design, told, ledger)
    assert facts["cost"]["lion"]["runs"] == told.cells[1].spent.runs
    assert facts["cost"]["lion"]["diverged"] == sum(math.isinf(value) for _, value in told.cells[1].tried) > 0
    assert {row["reason"] for row in facts["failures"]} == {"loss is nan"}
    assert facts["curves"][ADAMW]["tokens"][0] == [1000, 2000]
    assert any("items: hellaswag 64" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("env", "by_cpu"),
    [
        ({"device": "cpu", "num_threads": 1, "world_size": 1}, True),
        ({"device": "cpu", "num_threads": 2, "world_size": 1}, False),
        ({"device": "cuda", "num_threads": 1, "world_size": 1}, False),
    ],
    ids=["one thread", "two threads", "GPU"],
)
def test_the_time_of_one_thread_is_what_it_computed_and_not_what_passed(tmp_path, env, by_cpu):
    design = design_of([ADAMW])
    runs = FakeRuns(design, bowl)
    drive(design, runs.read, runs)
    write_runs(tmp_path, design, runs)
    for place in tmp_path.glob("job-*"):
        run = RunFolder(place)
        run.env.write_text(json.dumps(env))
        summary = json.loads(run.summary.read_text())
        run.summary.write_text(json.dumps({**summary, "cpu_seconds": 7.5}))
        run.metrics.write_text("step,tokens,time_s,cpu_time_s,val/loss\n1,1000,90,3,4.0\n2,2000,200,7.5,3.5\n")
    ledger = read_ledger(tmp_path)
    standing = stand(design, ledger)
    assert results_of(standing, "here").seconds[ADAMW] == ((7.5, 7.5) if by_cpu else (200.0, 200.0))
    facts = facts_of(design, standing, ledger)
    assert facts["curves"][ADAMW]["time"][0] == ([3, 7.5] if by_cpu else [90, 200])
    assert any("thread computed" in note for note in facts["notes"]) is by_cpu
    assert standing.cells[0].spent.seconds == 200.0 * standing.cells[0].spent.runs  # the forecast is by the clock


def test_a_summary_of_an_earlier_stop_is_not_taken_for_the_end(tmp_path):
    design = design_of([ADAMW])
    runs = FakeRuns(design, bowl)
    drive(design, runs.read, runs)
    write_runs(tmp_path / "runs", design, runs)
    before = {key: found.loss for key, found in read_ledger(tmp_path / "runs").items()}
    stale = tmp_path / "runs" / "job-0" / "summary.json"
    stale.write_text(json.dumps({"state": "PREEMPTED", "val_loss": 9.0}))
    assert {key: found.loss for key, found in read_ledger(tmp_path / "runs").items()} == before


def test_results_of_a_study_under_way_pair_the_seeds():
    """The second seed of one optimizer is missing: its third must not stand beside the others' second."""
    design = design_of([ADAMW, LION], seeds=(1, 2, 3))

    def loss(trial):
        return None if trial.cell == LION and (trial.seed, trial.part) == (2, "reporting") else bowl(trial)

    runs = FakeRuns(design, loss)
    assert drive(design, runs.read, runs) == 1
    results = results_of(stand(design, runs.read()), "here")
    assert [len(results.losses[cell]) for cell in (ADAMW, LION)] == [3, 1]


def test_what_is_left_is_counted_at_most_and_timed_by_what_was_measured():
    later = Cell("lion", "small", 2.0)
    design = design_of([ADAMW, LION, later], first=[ADAMW, LION], budget=Budget(6), reduced_budget=Budget(2))
    before = forecast(design, stand(design, {}), Speeds(design, {}, flops_per_second=6e5 * 1e4))
    assert (before.tuning, before.reporting, before.open, before.measured) == (6 + 6 + 2, 3 * 2, False, False)
    tokens = 20 * 1e5
    assert before.seconds == pytest.approx((6 + 2 + 6 + 2) * tokens / 1e4 + (2 + 2) * 2 * tokens / 1e4)
    runs = FakeRuns(design, bowl)
    drive(design, runs.read, runs)
    speeds = Speeds(design, runs.read(), flops_per_second=1.0)
    assert forecast(design, stand(design, runs.read()), speeds).runs == 0
    assert speeds(design.plans[LION]) == pytest.approx(1e-4)
    assert sum(runs.ran.values()) <= before.runs
    assert forecast(design_of([ADAMW]), stand(design_of([ADAMW]), {}), speeds).open


def test_a_tuned_rate_that_follows_a_power_of_size_and_data_gives_that_law():
    cells = [Cell("adamw", params, ratio) for params in ("small", "large") for ratio in (1.0, 2.0, 4.0, 8.0)]
    design = design_of(cells)

    def rate(plan):
        return 0.008 * (plan.params / 1e5) ** -0.5 * plan.cell.chinchilla**-0.25

    plans = {
        cell: replace(plan, start={"optimizer.lr": rate(plan), "optimizer.weight_decay": 0.1})
        for cell, plan in design.plans.items()
    }
    design = replace(design, plans=plans, axes=dict.fromkeys(cells, (Axis("optimizer.weight_decay", (0.1,)),)))
    runs = FakeRuns(design, lambda trial: 3.0)
    drive(design, runs.read, runs)
    standing = stand(design, runs.read())
    sizes = results_of(standing, "here").sizes
    laws = {key: law for _, key, _, law in tuned_laws({one.plan.cell: one.best for one in standing.cells}, sizes)}
    assert laws["optimizer.lr"](4e5, 8.0) == pytest.approx(0.004 * 8**-0.25, rel=0.02)
    assert laws["optimizer.lr"].held_out < 0.02


def test_runs_that_saw_other_data_are_not_compared(tmp_path):
    design = design_of([ADAMW])
    runs = FakeRuns(design, bowl)
    drive(design, runs.read, runs)
    write_runs(tmp_path, design, runs)

    def check(of=design):
        ledger = read_ledger(tmp_path)
        check_same_data(of, stand(of, ledger), ledger)

    check()
    last = tmp_path / f"job-{len(runs.asked) - 1}" / "plan.json"
    last.write_text(json.dumps({"data_fingerprint": "another"}))
    with pytest.raises(ConfigError, match="must be the same in all runs of a model"):
        check()
    first = tmp_path / "job-0" / "plan.json"  # one that chose
    first.write_text(last.read_text())
    last.write_text("{}")
    with pytest.raises(ConfigError, match="job-0: must be the same"):
        check()
    best = {"optimizer.lr": 2.0, "optimizer.weight_decay": 0.2}
    check(design_of([ADAMW], start=best, axes=[Axis(name, (value,)) for name, value in best.items()]))  # not its run


def test_models_may_have_tokenizers_of_their_own(tmp_path):
    design = design_of([ADAMW, Cell("adamw", "large", 1.0)])
    runs = FakeRuns(design, bowl)
    drive(design, runs.read, runs)
    write_runs(tmp_path, design, runs)
    for number, trial in enumerate(runs.asked):
        (tmp_path / f"job-{number}" / "plan.json").write_text(json.dumps({"data_fingerprint": trial.cell.params}))
    ledger = read_ledger(tmp_path)
    check_same_data(design, stand(design, ledger), ledger)
    (said,) = (note for note in facts_of(design, stand(design, ledger), ledger)["notes"] if "same tokens" in note)
    assert "joint law" in said
    large = next(number for number, trial in enumerate(runs.asked) if trial.cell.params == "large")
    (tmp_path / f"job-{large}" / "plan.json").write_text(json.dumps({"data_fingerprint": "small"}))
    with pytest.raises(ConfigError, match=f"job-{large}: must be the same"):
        check_same_data(design, stand(design, ledger), ledger)
