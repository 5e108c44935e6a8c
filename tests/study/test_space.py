"""What lies beside a configuration, which two are the same, and what makes no sense."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_opt.plan import ConfigError
from lightning_opt.study import Axis, Ladder, Space
from lightning_opt.study.space import warmup_too_long


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ({"x": 1}, {"x": 1.0}, True),
        ({"x": np.float64(0.1)}, {"x": 0.1}, True),
        ({"x": 0.1 + 0.2}, {"x": 0.3}, True),
        ({"x": 0.0}, {"x": -0.0}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"betas": [0.9, 0.95]}, {"betas": (0.9, 0.95)}, True),
        ({"eps": 1e-25}, {"eps": 1e-20}, False),
        ({"x": True}, {"x": 1}, False),
        ({"x": None}, {"x": 0}, False),
        ({"x": "1"}, {"x": 1}, False),
        ({"x": 1.0}, {"x": 1.00000000001}, False),
        ({"x": 1}, {"x": 1, "y": 1}, False),
    ],
)
def test_the_same_configuration(a, b, same):
    space = Space(())
    assert (space.identity(a) == space.identity(b)) is same


def test_every_other_value_is_a_neighbour_unless_the_reach_is_short():
    axes = (Axis("lr", (1, 2, 4, 8)), Axis("near", (1, 2, 4, 8), reach=1), Axis("word", ("a", "b", "c")))
    space, here = Space(axes), {"lr": 2.0, "near": 2, "word": "b", "fixed": 7}
    found = {axis.name: [config[axis.name] for config in space.neighbours(here, axis.name)] for axis in axes}
    assert found == {"lr": [1, 4, 8], "near": [1, 4], "word": ["a", "c"]}
    for config in space.around(here):
        assert sum(config[key] != here[key] for key in here) == 1
    assert len(space.around(here)) == 7


@pytest.mark.parametrize(
    ("axis", "value", "near"),
    [
        (Axis("x", (1, 2, 4, 8), reach=1), 3, [2, 4]),
        (Axis("x", (8, 1, 4, 2), reach=1), 3, [2, 4]),  # off the list it is size that counts
        (Axis("x", (8, 1, 4, 2), reach=1), 1, [8, 4]),  # on the list it is the place
        (Axis("x", (1, 2, 4, 8), reach=2), 8, [2, 4]),
        (Axis("x", (1, 2, 4, 8), reach=1), 16, [8]),
        (Axis("x", ("a", "b"), reach=1), "c", ["a", "b"]),
        (Axis("x", (1, 2)), 3, [1, 2]),
        (Ladder("x", 2, 1, 8), 4, [2, 8]),
        (Ladder("x", 2, 1, 8), 8, [4]),
        (Ladder("x", 2, 1, 8), 1, [2]),
        (Ladder("x", 10, 1e-30, 1e-10), 1e-25, [1e-26, 1e-24]),
        (Ladder("x", 1.5, 1, 8), 2, [1, 3]),
        (Ladder("x", 1.5, 1, 8), 2.0, [1.3333333333333, 3.0]),
    ],
)
def test_what_lies_beside_a_value(axis, value, near):
    assert axis.around(value) == near
    assert [type(other) for other in axis.around(value)] == [type(other) for other in near]


@given(st.floats(1.01, 10), st.floats(1e-6, 1e3), st.lists(st.booleans(), max_size=40))
def test_a_ladder_has_no_more_rungs_than_fit(factor, start, ups):
    """Whatever the path, a value is one of the start's multiples; so a descent on it ends."""
    low, high = start / 100, start * 100
    ladder, value = Ladder("x", factor, low, high), start
    place = 0
    for up in ups:
        step = 1 if up else -1
        target = start * factor ** (place + step)
        beside = [other for other in ladder.around(value) if (other > value) is up]
        if low * 1.001 < target < high * 0.999:
            assert len(beside) == 1
        if beside:
            value, place = beside[0], place + step
            assert Space(()).identity({"x": value}) == Space(()).identity({"x": start * factor**place}) or (
                math.isclose(value, start * factor**place, rel_tol=1e-11)
            )


def test_a_warm_up_longer_than_the_run_is_no_neighbour():
    """Tokens stay as they are when the batch changes, so the steps follow it: steps = tokens // (4096 batch)."""
    tokens = 2_684_354_560
    space = Space(
        (Axis("warmup", (500, 2000, 4000, 8000)), Axis("train_batch_size", (128, 256, 512, 1024))),
        warmup_too_long(tokens, 4096),
    )
    here = {"warmup": 2000, "train_batch_size": 128, "lr": 0.008}
    assert [config["warmup"] for config in space.neighbours(here, "warmup")] == [500, 4000]  # of 5120 steps
    assert [config["train_batch_size"] for config in space.neighbours(here, "train_batch_size")] == [256]
    fraction = {"warmup": 0.05, "train_batch_size": 128, "lr": 0.008}
    assert [config["train_batch_size"] for config in space.neighbours(fraction, "train_batch_size")] == [256, 512, 1024]
    allowed = [
        (warmup, batch)
        for warmup, batch in itertools.product((500, 2000, 4000, 8000), (128, 256, 512, 1024))
        if space.refused({"warmup": warmup, "train_batch_size": batch}) is None
    ]
    assert allowed == [(500, 128), (500, 256), (500, 512), (500, 1024), (2000, 128), (2000, 256), (4000, 128)]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Axis("lr", ()), "lr"),
        (lambda: Axis("lr", (1, 1.0)), "lr"),
        (lambda: Axis("lr", (1, 2), reach=0), "lr.reach"),
        (lambda: Ladder("lr", 1.0, 1, 2), "lr.factor"),
        (lambda: Ladder("lr", 2.0, 0, 2), "lr.low"),
        (lambda: Ladder("lr", 2.0, 3, 2), "lr.low"),
        (lambda: Space((Axis("lr", (1, 2)), Ladder("lr", 2, 1, 2))), "lr"),
    ],
)
def test_what_is_no_space(make, field):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
