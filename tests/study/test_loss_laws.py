"""Loss laws against scipy's curve_fit, against closed forms, and what they say of the published losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lightning_opt.study import LossLaw, Results, fit_law, interpolate
from lightning_opt.study.laws import NotEnoughCells, least_squares


def form(ratio, alpha, exponent, floor):
    return alpha * ratio**-exponent + floor


def by_curve_fit(ratios, losses):
    """As the study's own script fits it."""
    start = [losses[0] - losses[-1], 0.5, losses[-1]]
    return curve_fit(form, np.array(ratios, float), np.array(losses, float), p0=start, maxfev=100_000)[0]


def test_every_published_law_is_curve_fits(published: Results) -> None:
    checked = 0
    for optimizer in published.optimizers:
        for label in published.labels:
            cells = published.of(optimizer, label)
            for last in (8, 16):
                points = [(cell.chinchilla, published.loss(cell)) for cell in cells if cell.chinchilla <= last]
                if len(points) < 3:
                    continue
                ratios, losses = zip(*points, strict=True)
                law = fit_law(ratios, losses)
                assert (law.alpha, law.exponent, law.floor) == pytest.approx(by_curve_fit(ratios, losses), rel=1e-4)
                checked += 1
    assert checked == 42  # 11 optimizers at 130m and 10 at 300m, each with and without 16x


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.3, -0.4])
def test_a_law_without_noise_is_found(exponent: float) -> None:
    truth = LossLaw(math.copysign(0.4, exponent), exponent, 3.1)
    ratios = (0.5, 1, 2, 4, 8)
    law = fit_law(ratios, [truth(ratio) for ratio in ratios])
    assert (law.alpha, law.exponent, law.floor) == pytest.approx((truth.alpha, truth.exponent, truth.floor), rel=1e-5)
    assert law.equivalent(truth(3.0)) == pytest.approx(3.0)


def test_three_points_are_run_through() -> None:
    """Exactly determined: with ratios 1, 2 and 4 the exponent is log2 of the quotient of the differences."""
    losses = (3.53, 3.41, 3.33)
    law = fit_law((1, 2, 4), losses)
    assert law.exponent == pytest.approx(math.log2((losses[0] - losses[1]) / (losses[1] - losses[2])), rel=1e-6)
    assert [law(ratio) for ratio in (1, 2, 4)] == pytest.approx(losses, abs=1e-9)


def test_a_straight_line_in_log_c() -> None:
    """Exponent 0 has no alpha and no floor; the law beside it says the same."""
    law = fit_law((1, 2, 4, 8), [3.5 - 0.1 * math.log2(ratio) for ratio in (1, 2, 4, 8)])
    assert abs(law.exponent) < 1e-4
    assert law(16) == pytest.approx(3.1, abs=1e-3)
    assert law.equivalent(3.25) == pytest.approx(2**2.5, rel=1e-3)


def test_seeds_weigh() -> None:
    """A loss with n seeds behind it pulls like n losses."""
    ratios, losses = np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.53, 3.40, 3.33, 3.26])
    weights = (1, 1, 5, 2)
    found = fit_law(ratios, losses, weights)
    start = [losses[0] - losses[-1], 0.5, losses[-1]]
    expected = curve_fit(form, ratios, losses, p0=start, sigma=1 / np.sqrt(weights), maxfev=100_000)[0]
    assert (found.alpha, found.exponent, found.floor) == pytest.approx(expected, rel=1e-4)


def test_many_tables_at_once() -> None:
    rng = np.random.default_rng(0)
    ratios = np.array([1.0, 2.0, 4.0, 8.0])
    losses = form(ratios, 0.4, 0.5, 3.1) + 3e-3 * rng.standard_normal((20, 4))
    found = least_squares(np.log(ratios), losses, np.ones(4))
    for table, exponent, squares in zip(losses, found.exponent, found.squares, strict=True):
        expected = by_curve_fit(ratios, table)
        assert exponent == pytest.approx(expected[1], abs=1e-4)
        assert squares == pytest.approx(((form(ratios, *expected) - table) ** 2).sum(), rel=1e-6)


def test_no_law_below_three_ratios() -> None:
    with pytest.raises(NotEnoughCells, match="not enough cells"):
        fit_law((1, 2), (3.5, 3.4))
    with pytest.raises(NotEnoughCells, match="not enough cells"):
        interpolate((1,), (3.5,))


def test_nothing_reaches_the_floor() -> None:
    law = LossLaw(0.4, 0.5, 3.1)
    assert math.isnan(law.equivalent(3.1))
    assert math.isnan(law.equivalent(3.0))
    assert law.equivalent(3.1 + 1e-3) == pytest.approx(400**2)


def test_between_points_the_curve_runs_through_them() -> None:
    curve = interpolate((4, 1, 2), (3.33, 3.53, 3.41))
    for ratio, loss in ((1, 3.53), (2, 3.41), (4, 3.33)):
        assert curve(ratio) == pytest.approx(loss)
        assert curve.equivalent(loss) == pytest.approx(ratio)
    for ratio in (0.7, 1.4, 3.0, 6.0):
        assert curve.equivalent(curve(ratio)) == pytest.approx(ratio)
    truth = LossLaw(0.4, 0.5, 3.1)
    assert interpolate((1, 2), (truth(1), truth(2)))(1.5) == pytest.approx(truth(1.5))
