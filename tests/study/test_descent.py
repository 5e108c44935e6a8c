"""Coordinate descent by ask and tell: what it asks, accepts and ends at, on losses that are known everywhere."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.plan import ConfigError
from lightning_opt.study import Axis, Descent, Ladder, Space, descend

THRESHOLD = 3e-3


@st.composite
def problems(draw: Any) -> tuple[Space, dict[str, Any], dict[str, float | None]]:
    """A small grid, a start on it, and any loss at all for each configuration: lost, diverged, within the noise."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    reach = draw(st.sampled_from([None, None, 1]))
    axes = tuple(Axis(f"x{number}", tuple(range(size)), reach) for number, size in enumerate(sizes))
    refuses = draw(st.booleans())

    def refused(config: Any) -> str | None:
        return "too far" if refuses and sum(config.values()) > sum(sizes) - len(sizes) - 1 > 0 else None

    space = Space(axes, refused)
    loss = st.one_of(st.floats(3, 3.02), st.sampled_from([3.0, 3.003, math.inf, math.nan]), st.none())
    grid = [
        dict(zip((axis.name for axis in axes), point, strict=True)) for point in itertools.product(*map(range, sizes))
    ]
    losses = {space.identity(config): draw(loss) for config in grid}
    return space, {axis.name: 0 for axis in axes}, losses


def run(descent: Descent, loss: Callable[[Any], float | None]) -> list[tuple[dict[str, Any], float | None]]:
    told = []
    while asked := descent.ask():
        for config in asked:
            told.append((config, loss(config)))
            descent.tell(*told[-1])
    return told


def state(descent: Descent) -> Any:
    return (
        descent.incumbent,
        descent.best,
        descent.near_best,
        descent.accepted,
        descent.ask(),
        descent.done,
        descent.told,
    )


@settings(max_examples=150, deadline=None)
@given(problems(), st.randoms(use_true_random=False), st.integers(0, 100))
def test_the_order_of_tells_does_not_matter(problem, chance: random.Random, percent: int):
    """Resuming is telling again: what is known decides, after any part of the way."""
    space, start, losses = problem
    told = run(Descent(space, start), lambda config: losses[space.identity(config)])
    part = told[: len(told) * percent // 100]
    one = Descent(space, start)
    for config, loss in part:
        one.tell(config, loss)
    other = Descent(space, start)
    for config, loss in chance.sample(part, len(part)):
        other.ask()  # asking changes nothing
        other.tell(config, loss)
    assert state(one) == state(other)
    assert one.ask() == one.ask()


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_ends_asks_nothing_twice_and_accepts_only_gains(problem):
    space, start, losses = problem
    descent, seen = Descent(space, start), set()
    while asked := descent.ask():
        names = [space.identity(config) for config in asked]
        assert not seen.intersection(names)
        assert len(set(names)) == len(names)
        assert all(space.refused(config) is None for config in asked)
        seen.update(names)
        for config in asked:
            descent.tell(config, losses[space.identity(config)])
    assert descent.done
    assert len(seen) == descent.told <= len(losses)
    for step in descent.accepted:
        after, before = losses[space.identity(step.after)], losses[space.identity(step.before)]
        assert after is not None
        assert math.isfinite(after)
        gone = before is None or not math.isfinite(before)
        assert step.gain == (math.inf if gone else before - after)
        assert step.gain > THRESHOLD
        assert [key for key in start if step.before[key] != step.after[key]] == step.axis.split(", ")
    finite = {name: loss for name, loss in losses.items() if name in seen and loss is not None and math.isfinite(loss)}
    assert (descent.best is None) == (not finite)
    if finite:
        assert finite[space.identity(descent.best)] == min(finite.values())
        assert finite[space.identity(descent.incumbent)] <= min(finite.values()) + THRESHOLD
        assert {space.identity(config) for config in descent.near_best} == {
            name for name, loss in finite.items() if loss <= min(finite.values()) + THRESHOLD
        }


@settings(max_examples=150, deadline=None)
@given(problems())
def test_where_nothing_is_lost_it_ends_where_no_neighbour_gains(problem):
    space, start, losses = problem
    whole = {name: 3.5 if loss is None else loss for name, loss in losses.items()}
    descent = descend(Descent(space, start), lambda config: whole[space.identity(config)])
    if descent.best is None:
        return
    here = whole[space.identity(descent.incumbent)]
    for config in space.around(descent.incumbent):
        loss = whole[space.identity(config)]
        assert math.isnan(loss) or loss >= here - THRESHOLD - 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_where_the_axes_do_not_meet_it_finds_the_very_best(parts, data):
    """A sum of one function per axis: coordinate descent is exact, and its cost is a sum, not a product."""
    axes = tuple(Axis(f"x{number}", tuple(range(len(part)))) for number, part in enumerate(parts))
    start = {axis.name: data.draw(st.sampled_from(axis.values)) for axis in axes}

    def loss(config: Any) -> float:
        return sum(part[config[f"x{number}"]] for number, part in enumerate(parts))

    descent = descend(Descent(Space(axes), start, threshold=0.0), loss)
    assert loss(descent.best) == min(map(loss, _grid(axes)))
    assert descent.told <= 1 + 2 * sum(len(part) - 1 for part in parts)


def _grid(axes: tuple[Axis, ...]) -> list[dict[str, Any]]:
    return [
        dict(zip((a.name for a in axes), point, strict=True)) for point in itertools.product(*(a.values for a in axes))
    ]


def test_a_wave_is_all_neighbours_along_one_axis():
    space = Space((Axis("lr", (1, 2, 4)), Axis("wd", (0, 1))))
    descent = Descent(space, {"lr": 2, "wd": 0, "name": "x"})
    first = descent.ask()
    assert first == [{"lr": 2, "wd": 0, "name": "x"}, {"lr": 1, "wd": 0, "name": "x"}, {"lr": 4, "wd": 0, "name": "x"}]
    descent.tell(first[2], 3.0)
    assert descent.ask() == first[:2]
    descent.tell(first[0], 3.1)
    descent.tell(first[1], math.nan)
    assert [step.axis for step in descent.accepted] == ["lr"]
    assert descent.ask() == [{"lr": 4, "wd": 1, "name": "x"}]
    descent.tell({"lr": 4, "wd": 1, "name": "x"}, 2.9975)
    assert descent.done  # a gain of 2.5e-3 is not accepted: all neighbours of lr=4 wd=0, which is near-best, are known
    assert descent.incumbent == {"lr": 4, "wd": 0, "name": "x"}
    assert descent.best == {"lr": 4, "wd": 1, "name": "x"}
    assert descent.near_best == [descent.best, descent.incumbent]


def test_a_ladder_is_climbed_rung_by_rung():
    def loss(config: Any) -> float:
        return abs(math.log2(config["lr"] / 0.064))

    descent = descend(Descent(Space((Ladder("lr", 2, 1e-4, 1),)), {"lr": 0.001}), loss)
    assert descent.best == {"lr": 0.064}
    assert [step.after["lr"] for step in descent.accepted] == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    assert descent.told == 9  # 0.0005 to 0.128


def test_it_starts_from_a_run_that_diverged():
    losses = {1: 3.0, 2: 3.5, 4: math.inf}
    descent = descend(Descent(Space((Axis("lr", (1, 2, 4)),)), {"lr": 4}), lambda config: losses[config["lr"]])
    assert descent.best == {"lr": 1}
    assert [step.gain for step in descent.accepted] == [math.inf]


def test_all_diverged():
    descent = descend(Descent(Space((Axis("lr", (1, 2)),)), {"lr": 1}), lambda config: math.inf)
    assert descent.done
    assert descent.best is None
    assert not descent.accepted
    assert not descent.near_best


def test_a_number_replaces_what_could_not_be_had_and_nothing_else_does():
    descent = Descent(Space((Axis("lr", (1, 2)),)), {"lr": 1})
    descent.tell({"lr": 1}, 3.0)
    descent.tell({"lr": 2}, None)
    assert descent.done
    descent.tell({"lr": 2.0}, 2.0)
    assert descent.best == {"lr": 2}
    descent.tell({"lr": 2}, None)
    assert descent.loss({"lr": 2}) == 2.0
    with pytest.raises(ValueError, match=r"told 2\.0 before, now 2\.1"):
        descent.tell({"lr": 2}, 2.1)
    with pytest.raises(ValueError, match="keys"):
        descent.tell({"lr": 2, "wd": 1}, 2.1)


def test_something_better_that_lies_off_the_way_is_gone_to():
    """Told by somebody else, or by an earlier descent from another start."""
    space = Space((Axis("x", (0, 1, 2)), Axis("y", (0, 1, 2))))
    descent = Descent(space, {"x": 0, "y": 0})
    for config in descent.ask():
        descent.tell(config, 3.0)
    descent.tell({"x": 2, "y": 2}, 2.5)
    assert [step.axis for step in descent.accepted] == ["x, y"]
    assert descent.incumbent == {"x": 2, "y": 2}
    assert descent.ask() == [{"x": 0, "y": 2}, {"x": 1, "y": 2}]


def test_it_goes_on_from_a_near_best_that_saves_runs():
    """Many values on y are known around x=1 but none around x=0, and the two are equally good."""
    space = Space((Axis("x", (0, 1)), Axis("y", tuple(range(12))), Axis("z", (0, 1))))
    start = {"x": 0, "y": 0, "z": 0}

    def known(saves: int) -> Descent:
        descent = Descent(space, start, switch_saves=saves)
        descent.tell(start, 3.0)
        for y in range(11):
            descent.tell({"x": 1, "y": y, "z": 0}, 3.0005 if y == 0 else 3.1)
        return descent

    assert known(10).ask() == [{"x": 1, "y": 11, "z": 0}]
    assert known(11).ask() == [{"x": 0, "y": y, "z": 0} for y in range(1, 12)]
    descent = known(10)
    descent.tell({"x": 1, "y": 11, "z": 0}, 3.1)
    descent.tell({"x": 1, "y": 0, "z": 1}, 3.1)
    assert descent.done  # every neighbour of some near-best configuration is known
    assert descent.incumbent == {"x": 1, "y": 0, "z": 0}
    assert not descent.accepted
    assert descent.best == start


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda space: Descent(space, {"wd": 1}), "lr"),
        (lambda space: Descent(space, {"lr": 1}, threshold=-1), "threshold"),
        (lambda space: Descent(space, {"lr": 1}, near=math.nan), "near"),
        (lambda space: Descent(space, {"lr": 1}, switch_saves=0), "switch_saves"),
        (lambda space: Descent(Space(space.axes, lambda config: "no"), {"lr": 1}), "start"),
    ],
)
def test_what_is_no_descent(make, field):
    with pytest.raises(ConfigError) as caught:
        make(Space((Axis("lr", (1, 2)),)))
    assert caught.value.field == field
