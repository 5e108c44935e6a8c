"""One-sided tests against scipy's, and the two rules of thumb against what they are made of."""

from __future__ import annotations

import itertools
import math
from statistics import variance

import numpy as np
import pytest
from scipy import stats

from lightning_opt.study import Noise, better, pooled
from lightning_opt.study.significance import FORMULAS, beats, blocked, holm, seeds_for, t_quantile, t_tail

A, B = (3.251, 3.247, 3.255), (3.262, 3.258, 3.259, 3.271)


def test_welch_is_scipys() -> None:
    found, expected = better(A, B), stats.ttest_ind(B, A, equal_var=False, alternative="greater")
    assert (found.t, found.freedom, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert found.test == "Welch"
    assert found.formula == FORMULAS["Welch"]
    assert better(B, A).p == pytest.approx(1 - found.p)


def test_pooled_is_scipys() -> None:
    found, expected = better(A, B, pooled([A, B])), stats.ttest_ind(B, A, alternative="greater")
    assert (found.t, found.freedom, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert found.test == "pooled"


def test_paired_is_scipys() -> None:
    found, expected = better(A, B[:3], paired=True), stats.ttest_rel(B[:3], A, alternative="greater")
    assert (found.t, found.freedom, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert found.test == "paired"
    assert better(A, B, paired=True).test == "Welch"  # no pairs


def test_one_seed_and_a_given_sigma() -> None:
    found = better((3.25,), (3.26,), 3e-3)
    assert found.p == pytest.approx(stats.norm.sf(0.01 / (3e-3 * math.sqrt(2))))
    assert found.significant
    assert not better((3.25,), (3.254,), 3e-3).significant


def test_what_says_nothing() -> None:
    assert better((3.25,), (3.26,)) is None
    assert better((3.25, math.inf), (3.26, 3.27)) is None
    assert better((), (3.26,), 3e-3) is None
    assert pooled([(3.2,), (3.1, math.inf)]) is None


def test_pooling() -> None:
    found = pooled([A, B, (3.0,)])
    assert found.freedom == 5
    assert found.variance == pytest.approx((2 * variance(A) + 3 * variance(B)) / 5)


@pytest.mark.parametrize("freedom", [1, 3, 7.5, math.inf])
def test_students_t(freedom: float) -> None:
    law = stats.norm() if math.isinf(freedom) else stats.t(freedom)
    assert t_quantile(0.95, freedom) == pytest.approx(law.ppf(0.95))
    assert t_tail(1.7, freedom) == pytest.approx(law.sf(1.7))


def test_the_test_is_wrong_as_often_as_it_says() -> None:
    """Two cells of three seeds with one mean: 5 % are called significant."""
    rng = np.random.default_rng(3)
    tables = rng.standard_normal((2000, 2, 3))
    wrong = sum(better(a, b, pooled([a, b])).significant for a, b in tables.tolist())
    assert wrong / len(tables) == pytest.approx(0.05, abs=0.015)


def test_the_speedruns_inequality() -> None:
    """modded-nanogpt, track 3: (target - mean) sqrt(n) >= 0.004 with sigma 0.0013."""
    assert t_quantile(0.999, math.inf) * 0.0013 == pytest.approx(0.004, abs=2e-5)
    assert beats(3.28, [3.2787] * 10, 0.0013)
    assert not beats(3.28, [3.2787] * 8, 0.0013)


def test_how_many_seeds() -> None:
    """With that many seeds, a gap of one sigma is found in four of five trials."""
    n = seeds_for(1.0, Noise.of(1.0))
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((4000, n)), 1 + rng.standard_normal((4000, n))
    found = np.mean((b.mean(1) - a.mean(1)) / math.sqrt(2 / n) > stats.norm.ppf(0.95))
    assert 0.78 < found < 0.87


def test_many_tests_are_closed_under_bonferroni() -> None:
    """Holm's is the closed procedure: p of a test is the largest Bonferroni p of any group of tests it belongs to."""
    rng = np.random.default_rng(3)
    for count in (1, 2, 5, 6):
        ps = rng.uniform(0, 0.3, count).tolist()
        groups = [group for size in range(1, count + 1) for group in itertools.combinations(range(count), size)]
        closed = [
            max(min(1.0, len(group) * min(ps[other] for other in group)) for group in groups if place in group)
            for place in range(count)
        ]
        assert holm(ps) == pytest.approx(closed)
    assert holm([]) == []


def test_equal_seeds_are_blocks() -> None:
    """Two cells alone: the paired t test. More: what least squares leave of a model of cells and seeds."""
    rng = np.random.default_rng(5)
    seeds, cells = rng.normal(0, 0.02, 4), np.array([3.5, 3.48, 3.51])
    table = cells[:, None] + seeds + rng.normal(0, 0.003, (3, 4))
    noise = blocked([table[:2].tolist()])
    found, expected = better(*table[:2].tolist(), noise, paired=True), stats.ttest_rel(table[1], table[0])
    assert found.t == pytest.approx(expected.statistic)
    assert found.freedom == expected.df
    assert found.formula == FORMULAS["blocked"]
    design = np.array([[*np.eye(3)[cell], *np.eye(4)[seed]] for cell in range(3) for seed in range(4)])
    found, _, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    residual = table.ravel() - design @ found
    assert rank == 6  # of 12 numbers
    assert blocked([table.tolist()]) == Noise(pytest.approx(float(residual @ residual) / 6), 6)
    both = blocked([table.tolist(), [*table[:2].tolist(), (math.inf, 3.5, 3.5, 3.5), (3.5, 3.4)]])
    assert both.freedom == 6 + 3
    assert both.variance < pooled(table.tolist()).variance / 5
    assert blocked([[(3.5, 3.4)], [(3.5,), (3.4,)]]) is None
