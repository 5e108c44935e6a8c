"""The small parts: numbers as text, curves, scores against chance, figures from plain data."""

from __future__ import annotations

import math
import random
import re
from statistics import fmean
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_opt.reports import figures
from lightning_opt.reports import quantities as q
from lightning_opt.reports.scores import Score, comparability
from lightning_opt.reports.series import smooth, sparkline, thin, thirds


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (q.number(3.71234), "3.712"),
        (q.number(1234567.8), "1,234,568"),
        (q.number(0.00003), "3e-5"),
        (q.number(0), "0"),
        (q.trimmed(0.3), "0.3"),
        (q.trimmed(6.0e-4), "0.0006"),
        (q.trimmed(1e-8), "1e-8"),
        (q.short(802), "802"),
        (q.short(14_230), "14.2k"),
        (q.short(1_638_400), "1.64M"),
        (q.short(999_900), "1.00M"),
        (q.short(3_000_000_000), "3.00B"),
        (q.size(512), "512 B"),
        (q.size(4_264_448), "4.07 MiB"),
        (q.size(85 * 2**30), "85.0 GiB"),
        (q.size(5000 * 2**30), "5,000 GiB"),
        (q.milliseconds(4.8049), "4.80 ms"),
        (q.milliseconds(1203), "1.20 s"),
        (q.duration(125.2), "2 min 05 s"),
        (q.duration(41), "41 s"),
        (q.duration(3 * 3600 + 305), "3 h 05 min"),
        (q.percent(0.0312), "3.1 %"),
        (q.percent(1.0), "100 %"),
        (q.plus_minus(0.4167, 0.0489), "0.417 ± 0.049"),
        (q.plus_minus(0.25, 0.0021), "0.2500 ± 0.0021"),
        (q.plus_minus(0.25, None), "0.250"),
    ],
)
def test_numbers_as_text(shown: str, expected: str) -> None:
    assert shown == expected


SHOWERS = (q.number, q.trimmed, q.integer, q.short, q.size, q.milliseconds, q.duration, q.percent)


@pytest.mark.parametrize("show", SHOWERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True, [], {}])
def test_what_is_no_number_is_not_measured(show, value) -> None:
    assert show(value) == "not measured"


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_numbers_keep_four_digits(value: float) -> None:
    assert float(q.number(value).replace(",", "")) == pytest.approx(value, rel=5.01e-4, abs=1e-300)


def test_thinning_keeps_ends_order_and_spikes() -> None:
    xs = [float(i) for i in range(10_000)]
    noise = random.Random(3)
    ys = [noise.random() for _ in xs]
    ys[7777], ys[1234] = 99.0, -99.0
    kept = thin((xs, ys), 200)
    assert len(kept[0]) <= 204
    assert kept[0] == sorted(kept[0])
    assert (kept[0][0], kept[0][-1]) == (0.0, 9999.0)
    assert max(kept[1]) == 99.0
    assert min(kept[1]) == -99.0


def test_smoothing_is_a_mean_and_keeps_a_constant() -> None:
    xs = [float(i) for i in range(200)]
    assert smooth((xs, [2.0] * 200))[1] == pytest.approx([2.0] * 200)
    ys = [float(i % 2) for i in range(200)]
    assert smooth((xs, ys))[1][100] == pytest.approx(fmean(ys[95:106]))
    assert smooth(([1.0], [5.0])) == ([1.0], [5.0])
    assert smooth(([], [])) == ([], [])


def test_thirds_are_of_the_planned_run() -> None:
    xs = [float(i) for i in range(1, 10)]
    assert thirds((xs, xs)) == [2.0, 5.0, 8.0]
    assert thirds((xs, xs), 27) == [5.0, None, None]
    assert thirds(([], [])) == [None, None, None]


def test_sparkline_rises_and_falls() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▄▄"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)))) == 32


@pytest.mark.parametrize(
    ("value", "stderr", "chance", "judgement"),
    [
        (0.43, 0.05, 0.25, "above"),
        (0.35, 0.05, 0.25, "same"),
        (0.36, 0.05, 0.25, "above"),
        (0.10, 0.05, 0.25, "below"),
        (0.0, 0.0, 0.0, "same"),
        (1 / 164, 0.0061, 0.0, "above"),  # guessing passes nothing: one passed item is no guess
        (1.0, 0.0, 0.0, "above"),
        (0.5, 0.0, 0.25, "unknown"),
        (0.5, None, 0.25, "unknown"),
        (0.5, 0.05, None, "unknown"),
        (None, None, 0.25, "unknown"),
    ],
)
def test_judgement_needs_two_standard_errors(value, stderr, chance, judgement) -> None:
    assert Score("x", value=value, stderr=stderr, chance=chance).judgement == judgement


def test_equal_likelihoods_are_no_score() -> None:
    score = Score("hellaswag", value=0.31, stderr=0.01, chance=0.25, degenerate=True)
    assert (score.judgement, score.counts) == ("broken", False)
    assert "no score" in score.words


def test_whether_scores_are_comparable_is_said_of_each_task() -> None:
    fair = Score("hellaswag", value=0.3, suite="full", comparable=True)
    limited = Score("mmlu", value=0.3, suite="full", why_not="6 of 14042 items")
    cut = Score("humaneval", value=0.0, suite="full", why_not="4 of 164 prompts cut.")
    assert comparability([fair]) == "Suite full: the real tasks, comparable with published numbers."
    assert comparability([fair, limited, Score("humaneval", skipped="no sandbox")]) == (
        "Suite full: MMLU not comparable with published numbers. MMLU: 6 of 14042 items."
    )
    assert comparability([limited, cut]) == (
        "Suite full: not comparable with published numbers. MMLU: 6 of 14042 items; HumanEval: 4 of 164 prompts cut."
    )
    assert "own" not in comparability([limited, cut])
    assert comparability([Score("mmlu", value=0.3, suite="mini")]).startswith("Suite mini: not comparable")
    assert comparability([Score("mmlu", skipped="no data", suite="full")]) == ""
    assert [entry.label for entry in (fair, limited)] == ["HellaSwag", "MMLU (not comparable)"]


def test_the_scores_figure_says_no_more_than_is_true() -> None:
    chance_is_no_zero = Score("mmlu", value=0.3, stderr=0.01, chance=0.25, suite="full", comparable=True)
    humaneval = Score("humaneval", value=0.01, stderr=0.007, chance=0.0, suite="full", why_not="limit 6")
    alone, both = (figures.scores("k", entries) for entries in ([chance_is_no_zero], [chance_is_no_zero, humaneval]))
    assert "cannot be told from guessing." in alone.caption
    assert "but for HumanEval: guessing scores exactly 0 there." in both.caption
    assert "HumanEval: limit 6." in both.caption
    for figure in (alone, both):
        assert "mini" not in figure.svg + figure.caption


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Corner points of every unfilled path of a drawing."""
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    found = []
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        if "fill: none" in path.get("style", ""):
            words = path.get("d", "").replace("M", "").replace("L", "").split()
            found.append(list(zip(map(float, words[::2]), map(float, words[1::2]), strict=True)))
    return found


def test_a_curve_is_drawn_where_its_numbers_are() -> None:
    xs, ys = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0]
    figure = figures.corpora("k", {"a": (xs, ys)}, {}, ["a"])
    curve = next(path for path in points(figure.svg) if len(path) == 4)
    for i in range(3):  # equal ratios on the paper as in the data
        assert (curve[i + 1][0] - curve[0][0]) / (curve[3][0] - curve[0][0]) == pytest.approx((i + 1) / 3, abs=1e-4)
        drawn = (curve[i + 1][1] - curve[0][1]) / (curve[3][1] - curve[0][1])
        assert drawn == pytest.approx((ys[i + 1] - ys[0]) / (ys[3] - ys[0]), abs=1e-4)


def test_roles_with_one_rate_share_a_line() -> None:
    curve, other = ([1.0, 2.0], [0.1, 0.2]), ([1.0, 2.0], [0.3, 0.6])
    figure = figures.rates("k", {"matrix": curve, "embedding": other, "norm": curve}, None)
    assert [entry.label for entry in figure.legend] == ["matrix · norm", "embedding"]


def test_shares_of_a_step_add_up() -> None:
    figure = figures.step_split("k", [1, 2], {"forward + backward": [60, 80], "optimizer": [20, 20], "other": [20, 0]})
    assert [row[2] for row in figure.numbers] == ["70.0 %", "20.0 %", "10.0 %"]
    assert figure.numbers[0][1] == "70.0 ms"


def test_figures_do_not_share_ids() -> None:
    series = ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    both = [figures.loss(key, "Loss", "step", series, series, "c").svg for key in ("one", "two")]
    first, second = (set(re.findall(r' id="([^"]+)"', svg)) for svg in both)
    assert first
    assert not first & second
