"""Tokens, steps, accumulation, epochs: worked by hand."""

import pytest

from lightning_opt.optim import schedules
from lightning_opt.plan import ConfigError, steps_for_epochs
from lightning_opt.plan.lengths import split_batch, steps_for_tokens, steps_for_warmup, token_budget


def _trainer(**changes):
    return {"global_batch_size": 8, "micro_batch_size": None, "devices": 1, "num_nodes": 1, **changes}


def test_the_study_130m_at_1x_is_5120_steps():
    # arXiv:2509.02046: 134,217,728 non-embedding parameters, 128 sequences of 4096 tokens
    config = {
        "trainer": {},
        "scale": {"name": "1x", "tokens": None, "chinchilla": 1.0},
        "model": {"non_embedding_params": 134_217_728},
    }
    tokens = token_budget(config)
    assert tokens == 2_684_354_560
    assert steps_for_tokens(tokens, 128, 4096) == 5120


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"micro_batch_size": 2}, (2, 4, 1)),
        ({"devices": 2}, (4, 1, 2)),
        ({"devices": 2, "num_nodes": 2, "micro_batch_size": 1}, (1, 2, 4)),
    ],
)
def test_batch_is_split(changes, expected):
    micro, accumulate, devices = split_batch(_trainer(**changes))
    assert (micro, accumulate, devices) == expected
    assert micro * accumulate * devices == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 4}, "nearest: 8 or 12"),
        ({"global_batch_size": 10, "micro_batch_size": 2, "devices": 2, "num_nodes": 2}, "nearest: 8 or 16"),
        ({"global_batch_size": 2, "micro_batch_size": 4}, "nearest: 4"),
        ({"global_batch_size": 9, "devices": 2}, "nearest: 8 or 10"),
        ({"global_batch_size": 1, "devices": 4}, "nearest: 4"),
    ],
)
def test_batch_that_cannot_be_split_names_the_nearest(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        split_batch(_trainer(**changes))
    assert str(caught.value).startswith(f"trainer.global_batch_size = {changes['global_batch_size']}: ")


def test_epochs_cover_every_sequence():
    assert steps_for_epochs(1, 80, 8) == 10
    assert steps_for_epochs(1, 81, 8) == 11  # the last one is filled up
    assert steps_for_epochs(0.5, 80, 8) == 5
    assert steps_for_epochs(0.001, 80, 8) == 1


@pytest.mark.parametrize("steps", [1, 3, 20, 50, 799, 800])
@pytest.mark.parametrize("warmup", [0, 0.01, 0.05, 0.1, 0.37, 1, 7])
def test_warmup_agrees_with_the_schedule_that_runs(warmup, steps):
    counted = steps_for_warmup(warmup, steps)
    if counted >= steps:
        return
    multiplier = schedules.build({"name": "constant", "warmup": warmup}, steps)
    assert sum(multiplier(step) < 1 for step in range(steps)) == max(0, counted - 1)
