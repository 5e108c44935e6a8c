"""The small arithmetic behind a study's figures, against numpy and brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.study_crossings import crossings
from lightning_opt.reports.study_figures import Point, Row, at, dots, gap_to, lines
from lightning_opt.reports.tradeoffs import Spot, front


def test_between_points_a_curve_is_numpys_straight_line() -> None:
    noise = random.Random(3)
    xs = sorted(noise.uniform(0, 10) for _ in range(20))
    ys = [noise.gauss(0, 1) for _ in xs]
    for x in (-1.0, *xs, *(noise.uniform(0, 10) for _ in range(50)), 11.0):
        assert at((xs, ys), x) == pytest.approx(np.interp(x, xs, ys))
    assert gap_to((xs, ys), (xs, ys)) == (xs, [0.0] * len(xs))
    assert gap_to(([], []), (xs, ys)) == ([], [])
    inside = [x for x in np.linspace(-1, 11, 30) if xs[0] <= x <= xs[-1]]
    assert gap_to((list(np.linspace(-1, 11, 30)), [0.0] * 30), (xs, ys))[0] == inside


def test_the_front_is_what_nobody_beats() -> None:
    noise = random.Random(5)
    for _ in range(50):
        found = [Spot("a", str(n), noise.choice((1, 2, 3, 4, 5)), noise.choice((1, 2, 3, 4, 5))) for n in range(8)]
        points = {(one.cost, one.loss) for one in found}

        def beaten(point: tuple[float, float], points: set[tuple[float, float]] = points) -> bool:
            return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

        assert {(one.cost, one.loss) for one in front(found)} == {point for point in points if not beaten(point)}


def test_a_lead_that_is_noise_is_no_lead() -> None:
    xs = [float(x) for x in range(11)]
    curves = {"a": (xs, [2 - 0.1 * x for x in xs]), "b": (xs, [2.001 - 0.1 * x - 0.0003 * x for x in xs])}
    assert [(one.winner, one.overtaken) for one in crossings(curves)] == [("b", "a")]
    assert crossings(curves, least=3e-3) == []
    assert crossings({"a": curves["a"]}) == []


def numbers(figure: Figure) -> list[tuple[str, ...]]:
    return [row[:2] for row in figure.numbers]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "off"),
    [
        ([], 0),
        ([Row("a", None, words="not enough cells")], 0),
        ([Row("a", 1.0)], 0),
        ([Row("a", 1.0, 1.0, 1.0), Row("a", 1.0)], 0),
        ([Row("a", 1.0, 0.5, float("inf")), Row("a", 2.0, None, None, (1.9, 2.1), "2.0"), *[Row("a", 1.1)] * 9], 1),
        ([Row("a", 1.0), Row("a", 1.1), Row("a", 1.2), Row("a", 1.3), Row("a", 900.0, words="900")], 1),
    ],
)
def test_rows_of_every_kind_are_drawn(rows: list[Row], off: int) -> None:
    figure = dots("key", "title", "label", rows, {"a": ("blue", False)}, "caption", (1.0, "one"))
    assert figure.svg.startswith("<svg")
    assert len(figure.numbers) == len(rows)
    assert figure.caption == "caption" + f" Arrows: {off} further right, with its value." * off


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [(), (0.1,), (0.0, 0.1), (0.001, 0.002, 0.004), (1.0, 1.0001), (0.0, 0.1, 0.2, 0.5, 0.6, 0.7)]
)
def test_lines_over_values_of_every_kind_are_drawn(values: tuple[float, ...]) -> None:
    points = {"a": [Point(value, 3.5 + value, 3.4, 3.6) for value in values] + [Point(0.3, float("inf"))]}
    figure = lines("key", "title", ("x", "y"), points, {"a": ("blue", True)}, "caption", level=3.5)
    assert "Crosses at the top: diverged." in figure.caption
    assert figure.numbers[-1][2] == "diverged"
    assert numbers(figure)[: len(values)] == [("a", f"{value:.4g}") for value in values]


def test_the_canvas_is_as_high_as_its_rows() -> None:
    many = [Row("a", float(n)) for n in range(30)]
    assert 'viewBox="0 0 460 650"' in dots("key", "title", "label", many, {"a": ("blue", False)}, "").svg
    assert 'viewBox="0 0 460 270"' in dots("key", "title", "label", many[:3], {"a": ("blue", False)}, "").svg
