"""What seeds say: the spread between them, and whether one optimizer is better than another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit


@dataclass(frozen=True)
class Noise:
    """How far seeds alone set final losses of one setting apart.

    Attributes:
        variance: of the final loss between seeds, nats squared.
        freedom: degrees of freedom behind it; infinite for a sigma that is given, not estimated.
    """

    variance: float
    freedom: float = math.inf

    @classmethod
    def of(cls, sigma: float | Noise) -> Noise:
        """A noise as it is, or the one of a given standard deviation, nats."""
        return sigma if isinstance(sigma, Noise) else cls(float(sigma) ** 2)

    @property
    def sigma(self) -> float:
        """Standard deviation, nats."""
        return math.sqrt(self.variance)


def pooled(samples: Iterable[Sequence[float]]) -> Noise | None:
    """The variance within all samples together, as in a one-way analysis of variance.

    Args:
        samples: final losses of each cell, one for each seed. A sample with a loss that is not finite tells nothing.

    Returns:
        None where no cell has two seeds.
    """
    repeated = [sample for sample in samples if len(sample) > 1 and all(map(math.isfinite, sample))]
    freedom = sum(len(sample) - 1 for sample in repeated)
    if not freedom:
        return None
    return Noise(sum((len(sample) - 1) * variance(sample) for sample in repeated) / freedom, freedom)


def blocked(places: Iterable[Iterable[Sequence[float]]]) -> Noise | None:
    """The variance between cells that ran the same seeds, less what a seed does to all of them alike.

    The residual of a two-way analysis of variance without replication (randomised blocks), pooled over places. What it
    leaves out, the difference of two cells of a place leaves out too.

    Args:
        places: for each model and amount of data, the final losses of its cells, one for each seed, seeds in one order.
            Cells with a loss that is not finite tell nothing, nor do those that share their number of seeds with none.

    Returns:
        None where no place has two cells of two seeds.
    """
    squares = freedom = 0.0
    for cells in places:
        told = [cell for cell in cells if len(cell) > 1 and all(map(math.isfinite, cell))]
        for seeds in {len(cell) for cell in told}:
            table = np.array([cell for cell in told if len(cell) == seeds])
            left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
            squares += float((left**2).sum())
            freedom += (len(table) - 1) * (seeds - 1)
    return Noise(squares / freedom, freedom) if freedom else None


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t; of the normal distribution for infinite degrees of freedom."""
    return float(ndtri(probability) if math.isinf(freedom) else stdtrit(freedom, probability))


def t_tail(t: float, freedom: float) -> float:
    """Probability that Student's t exceeds a value; the normal's for infinite degrees of freedom."""
    return float(stdtr(1e12 if math.isinf(freedom) else freedom, -t))


@dataclass(frozen=True)
class Comparison:
    """A one-sided test of "the first has the lower loss".

    Attributes:
        gap: how far the first's mean lies below the second's, nats per token.
        t: the gap in its standard errors.
        freedom: degrees of freedom; infinite for a given sigma.
        p: how probable a t as large is if the first is no better.
        seeds: of the first and of the second.
        level: of the test: significant where ``p < 1 - level``.
        test: ``given sigma``, ``pooled``, ``blocked``, ``paired`` or ``Welch``.
    """

    gap: float
    t: float
    freedom: float
    p: float
    seeds: tuple[int, int]
    level: float
    test: str

    @property
    def significant(self) -> bool:
        """Whether the first is better beyond noise."""
        return self.p < 1 - self.level

    @property
    def formula(self) -> str:
        """How t was worked out."""
        return FORMULAS[self.test]


FORMULAS = {
    "given sigma": "z = (mean b - mean a) / (sigma * sqrt(1/n_a + 1/n_b)), sigma given; normal distribution",
    "pooled": "t = (mean b - mean a) / (s * sqrt(1/n_a + 1/n_b)), s pooled over all cells with repeated seeds; "
    "Student's t with its degrees of freedom",
    "blocked": "t = mean(b - a) / (s * sqrt(2/n)), a and b on equal seeds, s pooled over all cells that ran the same "
    "seeds, less each seed's own effect; Student's t with its degrees of freedom",
    "paired": "t = mean(b - a) / (s / sqrt(n)), s of the differences between equal seeds; Student's t, n - 1",
    "Welch": "t = (mean b - mean a) / sqrt(s_a^2/n_a + s_b^2/n_b); Student's t, degrees of freedom by Welch and "
    "Satterthwaite",
}
"""The one-sided tests, in words: a is said to be better than b where p = P(T > t) is under 1 - level."""


def better(
    a: Sequence[float],
    b: Sequence[float],
    noise: Noise | float | None = None,
    *,
    paired: bool = False,
    level: float = 0.95,
) -> Comparison | None:
    """Tests "a is better than b": a one-sided t test of lower final losses.

    Args:
        a: final losses, nats per token, one for each seed.
        b: the other's.
        noise: the spread between seeds, given (a number: sigma) or pooled over many cells; None: from these losses.
        paired: a and b are in the same order of seeds. Without `noise`: compare seed by seed; with it: it is `blocked`.
        level: of the test.

    Returns:
        None where the losses do not say: one diverged, or fewer than two seeds and no noise.
    """
    seeds = len(a), len(b)
    if not a or not b or not all(map(math.isfinite, (*a, *b))):
        return None
    gap = fmean(b) - fmean(a)
    if noise is not None:
        noise = Noise.of(noise)
        error, freedom = math.sqrt(noise.variance * (1 / seeds[0] + 1 / seeds[1])), noise.freedom
        test = "given sigma" if math.isinf(freedom) else "blocked" if paired and seeds[0] == seeds[1] else "pooled"
    elif min(seeds) < 2:
        return None
    elif paired and seeds[0] == seeds[1]:
        error = stdev([y - x for x, y in zip(a, b, strict=True)]) / math.sqrt(seeds[0])
        freedom, test = seeds[0] - 1, "paired"
    else:
        parts = variance(a) / seeds[0], variance(b) / seeds[1]
        error, test = math.sqrt(sum(parts)), "Welch"
        below = parts[0] ** 2 / (seeds[0] - 1) + parts[1] ** 2 / (seeds[1] - 1)
        freedom = sum(parts) ** 2 / below if below else sum(seeds) - 2
    t = gap / error if error else math.copysign(math.inf, gap) if gap else 0.0
    return Comparison(gap, t, freedom, t_tail(t, freedom), seeds, level, test)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each of many tests, raised so that one false find among all of them is as rare as p says.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure"; holds however the tests depend.
    """
    raised, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        raised[place] = least
    return raised


def seeds_for(gap: float, noise: Noise | float, *, level: float = 0.95, power: float = 0.8) -> int:
    """Seeds that each of two cells needs so that a gap between them is found significant.

    Args:
        gap: true difference of the losses, nats per token, > 0.
        noise: the spread between seeds, or its sigma.
        level: of the one-sided test.
        power: how often such a gap should be found.

    Source: the normal approximation n = 2 ((z_level + z_power) sigma / gap)^2.
    """
    reach = (t_quantile(level, math.inf) + t_quantile(power, math.inf)) * Noise.of(noise).sigma / gap
    return max(1, math.ceil(2 * reach**2))


def beats(target: float, losses: Sequence[float], noise: Noise | float, *, level: float = 0.999) -> bool:
    """Whether a mean loss is under a target beyond noise: (target - mean) * sqrt(n) >= z * sigma.

    Args:
        target: loss to be reached, nats per token.
        losses: final losses, one for each seed.
        noise: the spread between seeds, or its sigma.
        level: one-sided; with 0.999 and sigma 0.0013 the right-hand side is 0.004, as in modded-nanogpt's track 3.
    """
    noise = Noise.of(noise)
    return (target - fmean(losses)) * math.sqrt(len(losses)) >= t_quantile(level, noise.freedom) * noise.sigma
