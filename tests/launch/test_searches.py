"""Sweepers that decide from results, on jobs whose loss is a known function of their configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest
from laboratory import sweep, the_folder, value

from lightning_opt.launch import main
from lightning_opt.run_folder import read_status

DESCENT = "hydra/sweeper=coordinate_descent"


def test_a_descent_goes_one_field_at_a_time_and_says_what_it_took(lab, capsys):
    lab.loss = lambda config: (
        3 + abs(math.log2(value(config, "optimizer.lr_scale") / 4)) + 10 * value(config, "schedule.warmup")
    )
    words = (DESCENT, "optimizer.lr_scale=0.5,1,2,4", "schedule.warmup=0.02,0.05,0.1", "~tuned")
    assert sweep(*words) == 0
    keys = ("optimizer.lr_scale", "schedule.warmup")
    assert lab.at(*keys) == [(1, 0.05), (0.5, 0.05), (2, 0.05), (4, 0.05), (4, 0.02), (4, 0.1), (0.5, 0.02),
                             (1, 0.02), (2, 0.02)]  # fmt: skip
    said = capsys.readouterr().out
    assert "coordinate descent over optimizer.lr_scale, schedule.warmup, taking what gains over 0.003 nats\n" in said
    assert "\nfrom optimizer.lr_scale=1 schedule.warmup=0.05\n" in said
    assert "\naccepted optimizer.lr_scale 1 -> 4: loss 5.5000 -> 3.5000\n" in said
    assert "\naccepted schedule.warmup 0.05 -> 0.02: loss 3.5000 -> 3.2000\n" in said
    assert "\nbest optimizer.lr_scale=4 schedule.warmup=0.02: loss 3.2000 (9 configurations, 0 more within" in said
    folder = the_folder()
    assert said.index("best optimizer.lr_scale=4") < said.index(f"table of {folder.path}")
    assert read_status(folder.status)["state"] == "FINISHED"
    assert len(folder.jobs()) == 9
    assert folder.jobs()[3].differs == {"optimizer.lr_scale": 4, "schedule.warmup": 0.05}
    lab.ran.clear()
    assert sweep(*words) == 0  # the same command again: known all of it, in the same folder
    assert lab.ran == []
    assert "best optimizer.lr_scale=4 schedule.warmup=0.02: loss 3.2000" in capsys.readouterr().out
    assert the_folder() == folder


def test_group_choices_are_cells_and_seeds_are_averaged(lab, capsys):
    """The seeds' noise would mislead a single one; each optimizer comes to its own best."""
    best = {"adamw": 2.0, "lion": 0.5}

    def loss(config: dict[str, Any]) -> float:
        far = abs(math.log2(value(config, "optimizer.lr_scale") / best[config["optimizer"]["name"]]))
        noise = 0.9 if (config["seed"] == 1) == (far > 0) else -0.9  # on average none
        return 3 + far - (noise if config["seed"] in (1, 2) else 0)

    lab.loss = loss
    assert sweep(DESCENT, "optimizer=adamw,lion", "optimizer.lr_scale=0.5,1,2", "seed=1,2") == 0
    said = capsys.readouterr().out
    assert "over optimizer.lr_scale in each of 2 cells" in said
    assert "\noptimizer=adamw: accepted optimizer.lr_scale 1 -> 2: loss 4.0000 -> 3.0000\n" in said
    assert "\noptimizer=lion: accepted optimizer.lr_scale 1 -> 0.5: loss 4.0000 -> 3.0000\n" in said
    assert len(lab.ran) == 12
    first_wave = lab.at("optimizer.name", "seed")[:12]
    assert set(first_wave) == {("adamw", 1), ("adamw", 2), ("lion", 1), ("lion", 2)}  # side by side


def test_the_threshold_decides(lab, capsys):
    lab.loss = lambda config: 3 - 0.01 * value(config, "optimizer.lr_scale")
    assert sweep(DESCENT, "optimizer.lr_scale=1,2,3", "hydra.sweeper.threshold=0.05") == 0
    assert "accepted" not in capsys.readouterr().out
    assert sweep(DESCENT, "optimizer.lr_scale=1,2,3", "hydra.sweeper.threshold=0.015") == 0
    assert "accepted optimizer.lr_scale 1 -> 3" in capsys.readouterr().out


def test_a_run_that_diverged_is_a_result_and_one_that_failed_is_none(lab, capsys):
    losses = {1: 3.0, 2: math.inf, 4: None, 8: 2.0}
    lab.loss = lambda config: losses[value(config, "optimizer.lr_scale")]
    words = (DESCENT, "optimizer.lr_scale=1,2,4,8")
    assert sweep(*words) == 1
    said = capsys.readouterr().out
    assert "accepted optimizer.lr_scale 1 -> 8: loss 3.0000 -> 2.0000" in said
    assert "1 of 4 jobs have no result; the same command again runs only those" in said
    lab.ran.clear()
    losses[4] = 1.0
    assert sweep(*words) == 3
    assert lab.at("optimizer.lr_scale") == [(4,)]
    assert "accepted optimizer.lr_scale 1 -> 4: loss 3.0000 -> 1.0000" in capsys.readouterr().out


def test_on_failure_stop_stops_the_search(lab):
    lab.loss = lambda config: None
    words = (DESCENT, "optimizer.lr_scale=1,2", "schedule.warmup=0.05,0.1", "evaluation=none", "on_failure=stop")
    assert main(["-m", *words, "hydra/launcher=basic"]) == 2  # that launcher cannot
    assert not lab.ran


def test_reach_goes_no_further_than_the_next(lab):
    lab.loss = lambda config: 3 + abs(math.log2(value(config, "optimizer.lr_scale") / 8))
    assert sweep(DESCENT, "optimizer.lr_scale=0.25,0.5,1,2,4,8,16", "hydra.sweeper.reach=1") == 0
    assert lab.at("optimizer.lr_scale") == [(1,), (0.5,), (2,), (4,), (8,), (16,)]


def test_an_item_of_a_list_is_a_field_too(lab):
    lab.loss = lambda config: 3 - config["optimizer"]["betas"][1]
    assert sweep(DESCENT, "optimizer.betas.1=0.9,0.95,0.99", "~tuned") == 0
    assert [list(config["optimizer"]["betas"]) for config in lab.ran] == [[0.9, 0.95], [0.9, 0.9], [0.9, 0.99]]


def test_what_makes_no_sense_together_is_passed_over(lab, capsys):
    """A larger batch leaves fewer steps of the same tokens: 100 of 16 sequences, but 25 of 64."""
    lab.loss = lambda config: 3 - config["trainer"]["global_batch_size"] / 1000 - config["schedule"]["warmup"] / 1e4
    tokens = 100 * 16 * 256
    words = ("trainer.global_batch_size=16,64", "schedule.warmup=10,50", f"trainer.max_tokens={tokens}", "~tuned")
    assert sweep(DESCENT, *words) == 0
    assert lab.at("trainer.global_batch_size", "schedule.warmup") == [(16, 10), (64, 10)]
    said = capsys.readouterr().out
    left_out = "trainer.global_batch_size=64 schedule.warmup=50: left out: schedule.warmup = 50: must be shorter"
    assert left_out in said
    assert sweep(DESCENT, "trainer.global_batch_size=16,64", "schedule.warmup=200,300", *words[2:]) == 2


@pytest.mark.parametrize(
    ("words", "field", "why"),
    [
        (["optimizer=adamw,lion"], "hydra/sweeper = coordinate_descent", "optimizer.lr_scale=0.5,1,2"),
        (["optimizer.lr_scale=1,2,-1"], "optimizer.lr_scale = -1", "must be a number > 0"),
        (["optimizer.lr_scal=1,2"], "optimizer.lr_scal = 1", "optimizer.lr_scale"),
        (["optimizer.lr_scale=1,2", "optimizer=adamw,lyon"], "optimizer = lyon", "lion"),
        (["optimizer.lr_scale=interval(1,2)"], "optimizer.lr_scale = interval(1,2)", "choice(...)"),
        (["optimizer.lr_scale=1,1.0"], "optimizer.lr_scale = [1, 1.0]", "each value once"),
        (["optimizer.lr_scale=1,2", "hydra.sweeper.threshold=-1"], "hydra.sweeper.threshold = -1", "number >= 0"),
        (["optimizer.lr_scale=1,2", "hydra.sweeper.reach=0"], "hydra.sweeper.reach = 0", ">= 1"),
        (["optimizer.lr_scale=1,2", "trainer.val_sequences=0"], "trainer.val_sequences = 0", "validation loss"),
    ],
)
def test_a_wrong_descent_is_refused_before_anything_starts(lab, capsys, tmp_path, words, field, why):
    assert sweep(DESCENT, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(field), said
    assert why in said
    assert said.count("\n") == 1
    assert not lab.ran
    assert not list(tmp_path.iterdir())
