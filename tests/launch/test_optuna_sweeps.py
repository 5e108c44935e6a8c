"""``hydra/sweeper=optuna``: its samplers, what they may be given, and that a search goes on where it stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from laboratory import sweep, the_folder, value

from lightning_opt.launch import sampling
from lightning_opt.run_folder import read_status

OPTUNA = "hydra/sweeper=optuna"
RATE = "optimizer.lr_scale=tag(log,interval(0.1,10))"


def study():
    import optuna

    storage = f"sqlite:///{the_folder().path / sampling.STORAGE}"
    return optuna.load_study(study_name=sampling.STUDY, storage=storage)


def test_a_package_that_is_missing_is_named_in_one_line(lab, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "find_spec", lambda package: None)
    assert sweep(OPTUNA, RATE) == 2
    how = "pip install -c constraints.txt -e '.[run,search]'"
    assert capsys.readouterr().err == f"hydra/sweeper = optuna: needs the package optuna: {how}\n"
    assert not lab.ran


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
def test_each_sampler_finds_the_bottom_of_a_bowl(lab, capsys, sampler):
    pytest.importorskip("optuna")
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    lab.loss = lambda config: 3 + math.log10(value(config, "optimizer.lr_scale")) ** 2
    words = (OPTUNA, RATE, f"hydra.sweeper.sampler={sampler}", "hydra.sweeper.n_trials=14", "hydra.sweeper.n_jobs=2")
    assert sweep(*words) == 0
    tried = [value(config, "optimizer.lr_scale") for config in lab.ran]
    assert 13 <= len(tried) == len(set(tried))  # gp asks for its best once more: that is no new run
    assert all(0.1 <= rate <= 10 for rate in tried)
    assert min(map(lab.loss, lab.ran)) < 3.1
    told = study()
    losses = [lab.loss(config) for config in lab.ran]
    assert len(told.trials) == 14
    assert {f"{trial.value:.9f}" for trial in told.trials} == {f"{loss:.9f}" for loss in losses}
    assert f"loss {told.best_value:.4f} (trial {told.best_trial.number}, 14 with a result)" in capsys.readouterr().out


def test_a_search_goes_on_where_it_stopped(lab, capsys):
    """Killed in its third trial, then asked for more: nothing runs twice, and no random number comes again."""
    pytest.importorskip("optuna")

    def dies(config):
        if len(lab.ran) == 3:
            raise KeyboardInterrupt
        return 3.0 + value(config, "optimizer.lr_scale")

    lab.loss = dies
    words = (OPTUNA, RATE, "hydra.sweeper.sampler=random")
    assert sweep(*words, "hydra.sweeper.n_trials=5") == 130
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    cut = lab.ran[-1]
    lab.ran.clear()
    lab.loss = lambda config: 3.0 + value(config, "optimizer.lr_scale")
    assert sweep(*words, "hydra.sweeper.n_trials=5") == 0
    assert lab.ran[0] == cut
    assert len(lab.ran) == 3
    assert "2 trials are told already" in capsys.readouterr().out
    lab.ran.clear()
    assert sweep(*words, "hydra.sweeper.n_trials=7") == 0
    assert len(lab.ran) == 2
    trials = study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 7
    assert len({trial.params["optimizer.lr_scale"] for trial in trials}) == 7
    assert read_status(the_folder().status)["state"] == "FINISHED"


def test_what_failed_is_tried_again_and_what_diverged_is_infinitely_bad(lab):
    pytest.importorskip("optuna")
    answers = iter([3.0, None, math.inf])
    lab.loss = lambda config: next(answers)
    words = (OPTUNA, RATE, "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler=random")
    assert sweep(*words) == 1
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study().trials[2].value == math.inf
    failed = lab.ran[1]
    lab.ran.clear()
    lab.loss = lambda config: 2.0
    assert sweep(*words) == 3
    assert lab.ran == [failed]
    assert study().best_value == 2.0


def test_choices_ranges_and_whole_numbers(lab):
    pytest.importorskip("optuna")
    words = ("optimizer=adamw,lion", "trainer.global_batch_size=range(4,17,4)", "trainer.max_steps=interval(100,200)")
    assert sweep(OPTUNA, *words, "hydra.sweeper.n_trials=8", "hydra.sweeper.sampler=random", "seed=1,2") == 0
    assert {config["optimizer"]["name"] for config in lab.ran} == {"adamw", "lion"}
    assert {config["trainer"]["global_batch_size"] for config in lab.ran} <= {4, 8, 12, 16}
    assert all(100 <= config["trainer"]["max_steps"] <= 200 for config in lab.ran)
    seeds = [config["seed"] for config in lab.ran]
    assert seeds == [1, 2] * (len(seeds) // 2)
    assert len(study().trials) == 8


def test_a_folder_of_another_search_is_refused(lab, capsys):
    pytest.importorskip("optuna")
    words = (OPTUNA, "hydra.sweeper.n_trials=1", "hydra.sweep.dir=mine")
    assert sweep(*words, "optimizer=adamw,lion") == 0
    assert len(lab.ran) == 1
    assert (Path("mine") / sampling.STORAGE).exists()
    assert sweep(*words, "optimizer=adamw,muon") == 2
    why = "hydra.sweep.dir = mine: holds a search over other values of optimizer: name another folder\n"
    assert capsys.readouterr().err == why
    assert len(lab.ran) == 1


@pytest.mark.parametrize(
    ("words", "field", "why"),
    [
        ([RATE, "hydra.sweeper.sampler=cma"], "hydra.sweeper.sampler = cma", "cmaes"),
        ([RATE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials = 0", ">= 1"),
        ([RATE, "hydra.sweeper.n_jobs=1.5"], "hydra.sweeper.n_jobs = 1.5", "whole number"),
        ([], "hydra/sweeper = optuna", "interval"),
        (["optimizer.lr_scale=interval(2,1)"], "optimizer.lr_scale = interval(2,1)", "low < high"),
        (["optimizer.lr_scale=tag(log,interval(0,1))"], "optimizer.lr_scale = tag(log,interval(0,1))", "above 0"),
        (["optimizer.lr_scale=interval(-1,1)"], "optimizer.lr_scale = -1.0", "must be a number > 0"),
        (["optimizer=adamw,lion", "hydra.sweeper.sampler=cmaes"], "hydra.sweeper.sampler = cmaes", "optimizer"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_starts(lab, capsys, tmp_path, words, field, why):
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    assert sweep(OPTUNA, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(field), said
    assert why in said
    assert not lab.ran
    assert not list(Path(tmp_path).iterdir())
