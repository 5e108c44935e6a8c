"""Speed-ups of the published study, and whether their intervals hold the truth where it is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares
from scipy.stats import chi2, f

from lightning_opt.plan import ConfigError
from lightning_opt.study import Cell, LossLaw, Noise, Results, SpeedUp, speed_ups
from lightning_opt.study.laws import BETWEEN
from lightning_opt.study.speedups import DIVERGED, EXTRAPOLATED, INTERPOLATED, NOT_ENOUGH, RISING, UNDEFINED, interval

RATIOS = (1.0, 2.0, 4.0, 8.0)
ADAMW = LossLaw(0.4, 0.5, 3.1)  # about what AdamW has at 130M


def find(found: list[SpeedUp], optimizer: str, params: str, ratio: float) -> SpeedUp:
    [one] = [one for one in found if (one.optimizer, one.params, one.chinchilla) == (optimizer, params, ratio)]
    return one


def made(others: dict[Cell, tuple[float, ...]], ratios: tuple[float, ...] = RATIOS, **more: object) -> Results:
    """AdamW on a law without noise, and others."""
    return Results({**{Cell("adamw", "m", ratio): (ADAMW(ratio),) for ratio in ratios}, **others}, **more)


def test_the_studys_own_numbers(published: Results) -> None:
    """Muon at 130M: about 1.4 at 1x; 1.41 at 8x, and 1.30 when 16x is added to AdamW's fit."""
    usual, wide = speed_ups(published), speed_ups(published, fit=(1, 16))
    assert find(usual, "muon", "130m", 1).value == pytest.approx(1.4, abs=0.05)
    assert round(find(usual, "muon", "130m", 8).value, 2) == 1.41
    assert round(find(wide, "muon", "130m", 8).value, 2) == 1.30


def test_every_published_speed_up_is_the_studys_method(published: Results) -> None:
    """Against its script: curve_fit per size, then ((L - floor) / alpha)^(-1 / exponent) / C."""
    usual = speed_ups(published)
    assert len(usual) == len([cell for cell in published.losses if cell.optimizer != "adamw"])
    for label in published.labels:
        losses = [published.loss(Cell("adamw", label, ratio)) for ratio in RATIOS]
        start = [losses[0] - losses[-1], 0.5, losses[-1]]
        law = curve_fit(lambda c, a, b, d: a * c**-b + d, np.array(RATIOS), losses, p0=start, maxfev=100_000)[0]
        for one in (one for one in usual if one.params == label):
            loss = published.loss(Cell(one.optimizer, label, one.chinchilla))
            reached = ((loss - law[2]) / law[0]) ** (-1 / law[1])
            assert one.value == pytest.approx(reached / one.chinchilla, rel=1e-3)
            assert one.low < one.value < one.high
            assert one.note == ("" if 1 <= reached <= 8 else EXTRAPOLATED)


def test_the_interval_is_the_profile_likelihoods() -> None:
    """Where a general optimizer, holding the speed-up at the interval's end, finds the chi-square risen by 2.71."""
    losses = np.array([3.502, 3.381, 3.303, 3.240])
    sigma, ratio, loss = 3e-3, 4.0, 3.28
    low, high = interval(np.array(RATIOS), losses, ratio, np.array(loss), Noise.of(sigma), 0.9)

    def chi_square(speed: float | None) -> float:
        def left(at: np.ndarray) -> np.ndarray:
            law = at[0] * np.array(RATIOS) ** -at[1] + at[2]
            own = [] if speed is None else [at[0] * (ratio * speed) ** -at[1] + at[2] - loss]
            return np.append(law - losses, own) / sigma

        return 2 * least_squares(left, [0.4, 0.5, 3.1], xtol=1e-15, ftol=1e-15, gtol=1e-15).cost

    for end in (float(low), float(high)):
        assert chi_square(end) - chi_square(None) == pytest.approx(chi2.ppf(0.9, 1), rel=1e-3)
    wider = interval(np.array(RATIOS), losses, ratio, np.array(loss), Noise(sigma**2, 6), 0.9)
    assert chi_square(float(wider[1])) - chi_square(None) == pytest.approx(f.ppf(0.9, 1, 6), rel=1e-3)


@pytest.mark.parametrize(
    ("ratios", "ratio", "speed", "freedom"),
    [
        (RATIOS, 1.0, 1.4, math.inf),
        (RATIOS, 8.0, 1.2, math.inf),
        (RATIOS[:3], 2.0, 1.4, math.inf),
        (RATIOS, 16.0, 1.4, math.inf),
        (RATIOS, 2.0, 1.4, 4),
    ],
)
def test_intervals_cover_the_truth(ratios: tuple[float, ...], ratio: float, speed: float, freedom: float) -> None:
    """1000 tables of losses from a known law with noise of 3e-3."""
    rng, sigma, trials = np.random.default_rng(7), 3e-3, 1000
    losses = np.array([ADAMW(at) for at in ratios]) + sigma * rng.standard_normal((trials, len(ratios)))
    loss = ADAMW(ratio * speed) + sigma * rng.standard_normal(trials)
    noise = Noise.of(sigma)
    if math.isfinite(freedom):
        noise = Noise(sigma**2 * rng.chisquare(freedom, trials) / freedom, freedom)
    low, high = interval(np.array(ratios), losses, ratio, loss, noise, 0.9)
    covered = ((low <= speed) & (speed <= high)).mean()
    assert 0.85 <= covered <= 0.95


def test_two_ratios_are_interpolated() -> None:
    """The interval must hold the truth although the exponent is not known; the law itself has 0.5."""
    found = speed_ups(made({Cell("muon", "m", 1): (ADAMW(1.4),)}, (1, 2)), sigma=1e-3)[0]
    assert found.note == INTERPOLATED
    assert found.value == pytest.approx(1.4)
    given = np.array([1.0, 2.0]), np.array([ADAMW(1), ADAMW(2)]), 1.0, np.array(ADAMW(1.4)), Noise.of(1e-3), 0.9
    steep, flat = (interval(*given, exponents=one) for one in ((1.0, 1.001), (0.0, 0.001)))
    assert found.low == pytest.approx(min(steep[0], flat[0]), rel=1e-3)
    assert found.high == pytest.approx(max(steep[1], flat[1]), rel=1e-3)
    assert BETWEEN == (0.0, 1.0)


def test_what_cannot_be_said_is_said() -> None:
    others = {
        Cell("muon", "m", 8): (3.05,),  # under the floor of 3.1
        Cell("lion", "m", 8): (math.inf,),
        Cell("soap", "n", 1): (3.2,),  # no AdamW there
        Cell("soap", "o", 1): (3.2,),
        Cell("adamw", "o", 1): (3.3,),
        Cell("soap", "p", 1): (3.2,),
        **{Cell("adamw", "p", ratio): (3.0 + ratio,) for ratio in (1, 2, 4)},
    }
    found = speed_ups(made(others))
    muon = find(found, "muon", "m", 8)
    assert muon.note == UNDEFINED
    assert math.isnan(muon.value)
    assert 1 < muon.low < math.inf
    assert muon.high == math.inf
    assert find(found, "lion", "m", 8).note == DIVERGED
    assert find(found, "soap", "n", 1).note == find(found, "soap", "o", 1).note == NOT_ENOUGH
    assert find(found, "soap", "p", 1).note == RISING
    assert all(math.isnan(find(found, "soap", label, 1).value) for label in "nop")


def test_seeds_narrow_the_interval() -> None:
    one = speed_ups(made({Cell("muon", "m", 2): (ADAMW(2.8),)}))[0]
    four = speed_ups(made({Cell("muon", "m", 2): (ADAMW(2.8) - 1e-3, ADAMW(2.8) + 1e-3)}))[0]
    assert four.value == pytest.approx(one.value, rel=1e-6)
    assert four.high - four.low < one.high - one.low


def test_the_fits_points_are_the_callers() -> None:
    """A cell that lies off the law changes nothing while the fit leaves it out."""
    results = made({Cell("adamw", "m", 16): (3.15,), Cell("muon", "m", 8): (ADAMW(11),)})
    assert speed_ups(results)[0].value == pytest.approx(11 / 8)
    assert speed_ups(results, fit=None)[0].value != pytest.approx(11 / 8, rel=0.02)
    assert speed_ups(results, fit=(1, 2))[0].note == INTERPOLATED
    assert speed_ups(results, fit=(1, 1))[0].note == NOT_ENOUGH


def test_by_time_and_by_memory() -> None:
    """Muon takes a fifth less data, and each token takes it 10 % longer; it holds four fifths of the bytes."""
    muon, adamw = Cell("muon", "m", 2), Cell("adamw", "m", 2)
    seconds = {muon: (110.0,), adamw: (100.0,), Cell("adamw", "m", 1): (40.0,)}
    results = made({muon: (ADAMW(2.5),)}, seconds=seconds, peak_bytes={muon: (4e9,), adamw: (5e9,)})
    tokens, time, memory = (speed_ups(results, by=by)[0] for by in ("tokens", "time", "memory"))
    assert tokens.value == pytest.approx(1.25)
    assert (time.value, time.low, time.high) == pytest.approx([part / 1.1 for part in (1.25, tokens.low, tokens.high)])
    assert memory.value == pytest.approx(1.25)
    assert (time.by, memory.by) == ("time", "memory")
    assert speed_ups(made({muon: (3.3,)}), by="time") == speed_ups(made({muon: (3.3,)}), by="memory") == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"baseline": "adam"}, "baseline"),
        ({"fit": (8, 1)}, "fit"),
        ({"sigma": 0.0}, "sigma"),
        ({"level": 1.0}, "level"),
        ({"by": "steps"}, "by"),
    ],
)
def test_refusals(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        speed_ups(made({Cell("muon", "m", 1): (3.4,)}), **arguments)
    assert refused.value.field == field
    if field == "baseline":
        assert "did you mean adamw?" in str(refused.value)
