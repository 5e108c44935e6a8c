"""Loss as a function of training data: L(C) = alpha * C**-exponent + floor, and the fit of it.

For a given exponent the law is a straight line in its other two numbers, so its least squares are a search over the
exponent alone (variable projection: Golub and Pereyra 1973). That never fails to converge, and fits thousands of
simulated tables at once. The search runs through exponent 0, where the law is a straight line in log C, into negative
ones, where the loss falls faster and faster and there is no floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

EXPONENTS = (-1.0, 4.0)
"""Where a law's exponent is looked for."""

BETWEEN = (0.0, 1.0)
"""What the exponent may be between two ratios, which say nothing of it: 0 is a straight line in log C."""

_GRID = 26
_GOLDEN = (math.sqrt(5) - 1) / 2
_ALMOST_ZERO = 1e-6  # an exponent of 0 has no alpha and no floor


class NotEnoughCells(ValueError):
    """A law has fewer points than it needs."""


class Baseline(Protocol):
    """A curve of loss over data that others are held against."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, ratio: float) -> float:
        """Loss at a ratio of data, nats per token."""

    def equivalent(self, loss: float) -> float:
        """Ratio of data that gives this loss; nan where none does."""


@dataclass(frozen=True)
class LossLaw:
    """L(C) = alpha * C**-exponent + floor.

    Attributes:
        alpha: nats per token; negative for a negative exponent.
        exponent: without unit.
        floor: nats per token: what the loss tends to with endless data (for a negative exponent an upper bound).
        points: ratio and loss of what was fitted. With three the law runs through all of them, and no residual says
            whether it holds.
    """

    alpha: float
    exponent: float
    floor: float
    points: tuple[tuple[float, float], ...] = ()

    def __call__(self, ratio: float) -> float:
        """Loss at a ratio of data, nats per token."""
        return self.alpha * ratio**-self.exponent + self.floor

    def equivalent(self, loss: float) -> float:
        """Ratio of data that gives this loss: ((loss - floor) / alpha)**(-1 / exponent); nan at and under the floor."""
        share = (loss - self.floor) / self.alpha if self.alpha else math.nan
        if not (self.falls and share > 0):
            return math.nan
        with np.errstate(over="ignore"):
            return float(np.exp(-math.log(share) / self.exponent))

    @property
    def falls(self) -> bool:
        """Whether more data gives a lower loss."""
        return self.alpha * self.exponent > 0


@dataclass(frozen=True)
class Interpolation:
    """A power law with a floor through each two neighbours, of an exponent that is taken, not fitted.

    Outside the points the outermost pieces go on.

    Attributes:
        points: ratio and loss, two or more.
        exponent: of every piece.
    """

    points: tuple[tuple[float, float], ...]
    exponent: float = 0.5

    def __call__(self, ratio: float) -> float:
        """Loss at a ratio of data, nats per token."""
        inner = [point[0] for point in self.points[1:-1]]
        return self._piece(sum(ratio > edge for edge in inner))(ratio)

    def equivalent(self, loss: float) -> float:
        """Ratio of data that gives this loss; nan under the last piece's floor."""
        inner = [point[1] for point in self.points[1:-1]]
        return self._piece(sum(loss < edge for edge in inner)).equivalent(loss)

    def _piece(self, place: int) -> LossLaw:
        (low, first), (high, last) = self.points[place : place + 2]
        alpha = (first - last) / (low**-self.exponent - high**-self.exponent)
        return LossLaw(alpha, self.exponent, first - alpha * low**-self.exponent, self.points[place : place + 2])


class Fitted(NamedTuple):
    """Least squares over the exponent, for many tables at once.

    Attributes:
        exponent: the best.
        level: a of ``a + b * (1 - exp(-exponent * log C)) / exponent``: the loss at ratio 1.
        slope: b of it: nats per unit of log C, at ratio 1.
        squares: weighted sum of squared residuals, nats squared.
    """

    exponent: np.ndarray
    level: np.ndarray
    slope: np.ndarray
    squares: np.ndarray

    def log_equivalent(self, loss: np.ndarray) -> np.ndarray:
        """Logarithm of the ratio that gives a loss; nan under the floor, and where the loss does not fall."""
        steep = np.where(np.abs(self.exponent) < 1e-9, 1e-9, self.exponent)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = 1 - steep * (loss - self.level) / self.slope
            return np.where((share > 0) & (self.slope < 0), -np.log(share) / steep, np.nan)


def fit_law(ratios: Sequence[float], losses: Sequence[float], weights: Sequence[float] | None = None) -> LossLaw:
    """Fits L(C) = alpha * C**-exponent + floor by least squares.

    Args:
        ratios: data of each cell, in units of 20 tokens per non-embedding parameter.
        losses: final losses, nats per token.
        weights: seeds behind each loss; one each when None.

    Raises:
        NotEnoughCells: fewer than three different ratios. With three the law is exactly determined.

    Source: arXiv 2509.02046, as its ``speedup_estimation.py`` fits it (there with scipy's ``curve_fit``).
    """
    points = _points(ratios, losses, least=3)
    logs, values = np.log([ratio for ratio, _ in points]), np.array([loss for _, loss in points])
    heavy = np.ones(len(points)) if weights is None else np.array(_ordered(ratios, weights))
    found = least_squares(logs, values, heavy, steps=60)
    exponent = float(found.exponent)
    if abs(exponent) < _ALMOST_ZERO:
        exponent = math.copysign(_ALMOST_ZERO, exponent)
        _, level, slope = _line(logs, values, heavy, np.array(exponent))
        return LossLaw(float(-slope / exponent), exponent, float(level + slope / exponent), points)
    return LossLaw(float(-found.slope / exponent), exponent, float(found.level + found.slope / exponent), points)


def interpolate(ratios: Sequence[float], losses: Sequence[float], exponent: float = 0.5) -> Interpolation:
    """A curve through two or more points, where they are too few for a fit.

    Args:
        ratios: data of each cell.
        losses: final losses, nats per token.
        exponent: of the power law between neighbours; AdamW's laws of the study have 0.4 to 0.5.

    Raises:
        NotEnoughCells: fewer than two different ratios.
    """
    return Interpolation(_points(ratios, losses, least=2), exponent)


def least_squares(
    logs: np.ndarray,
    losses: np.ndarray,
    weights: np.ndarray,
    exponents: tuple[float, float] = EXPONENTS,
    *,
    steps: int = 20,
) -> Fitted:
    """Fits many tables at once; leading axes of the arguments are broadcast, the last one runs over the points.

    Args:
        logs: logarithms of the ratios.
        losses: nats per token.
        weights: of the squared residuals.
        exponents: lowest and highest exponent.
        steps: of the golden section search around the best exponent of a grid; 20 are enough for the squares (they
            err by the square of 1e-5), 60 for the exponent.
    """
    grid = np.linspace(*exponents, _GRID)
    squares = _line(logs[..., None, :], losses[..., None, :], weights[..., None, :], grid)[0]
    best = squares.argmin(-1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, _GRID - 1)]
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_inner, at_outer = (_line(logs, losses, weights, at)[0] for at in (inner, outer))
    for _ in range(steps):
        left = at_inner < at_outer
        low, high = np.where(left, low, inner), np.where(left, outer, high)
        new = np.where(left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = _line(logs, losses, weights, new)[0]
        inner, outer = np.where(left, new, outer), np.where(left, inner, new)
        at_inner, at_outer = np.where(left, at_new, at_outer), np.where(left, at_inner, at_new)
    exponent = np.where(at_inner < at_outer, inner, outer)
    squares, level, slope = _line(logs, losses, weights, exponent)
    return Fitted(exponent, level, slope, squares)


def _line(
    logs: np.ndarray, losses: np.ndarray, weights: np.ndarray, exponent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The squares left over, the level and the slope of the best straight line in (1 - C**-exponent) / exponent."""
    along = bent(logs, exponent[..., None])
    total = weights.sum(-1)
    centre, mean = (weights * along).sum(-1) / total, (weights * losses).sum(-1) / total
    across, above = along - centre[..., None], losses - mean[..., None]
    slope = (weights * across * above).sum(-1) / (weights * across**2).sum(-1)
    left = above - slope[..., None] * across
    return (weights * left**2).sum(-1), mean - slope * centre, slope


def bent(logs: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """(1 - C**-exponent) / exponent, which is log C at exponent 0."""
    steep = np.where(np.abs(exponent) < 1e-9, 1e-9, exponent)
    return -np.expm1(-steep * logs) / steep


def _points(ratios: Sequence[float], losses: Sequence[float], *, least: int) -> tuple[tuple[float, float], ...]:
    """Ratio and loss of each cell, little data first."""
    points = tuple(sorted((float(ratio), float(loss)) for ratio, loss in zip(ratios, losses, strict=True)))
    if len({ratio for ratio, _ in points}) < least:
        raise NotEnoughCells(f"not enough cells: needs {least} different ratios, got {len(points)}")
    if len({ratio for ratio, _ in points}) < len(points):
        raise ValueError("a ratio is there twice: give the mean of its losses, and their number as its weight")
    if not all(ratio > 0 and math.isfinite(loss) for ratio, loss in points):
        raise ValueError("ratios must be > 0 and losses finite")
    return points


def _ordered(ratios: Sequence[float], weights: Sequence[float]) -> list[float]:
    return [weight for _, weight in sorted(zip(ratios, weights, strict=True))]
