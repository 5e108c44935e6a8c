"""One-sided tests against scipy's, and the two rules of thumb against what they are made of."""

from __future__ import annotations

import math
from statistics import variance

import numpy as np
import pytest
from scipy import stats

from lightning_opt.study import Noise, better, pooled
from lightning_opt.study.significance import FORMULAS, beats, seeds_for, t_quantile, t_tail

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
