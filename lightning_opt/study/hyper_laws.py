"""Laws over model size and data: of a tuned hyperparameter, and of the loss itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit, minimize

from lightning_opt.plan.lengths import CHINCHILLA
from lightning_opt.study.laws import NotEnoughCells
from lightning_opt.study.results import Cell, Config

HYPER_LAW_COLUMNS = ("optimizer", "key", "cells", "scale", "by_size", "by_ratio", "constant", "held_out")


@dataclass(frozen=True)
class HyperLaw:
    """h = A * N**B * C**c + D, of non-embedding parameters N and the data ratio C.

    Tuned values come from short grids, so that many laws hang on one or two changes of value and their numbers are
    huge and of opposite signs; what such a law says between its points still holds.

    Attributes:
        scale: A.
        by_size: B.
        by_ratio: c.
        constant: D, in the hyperparameter's unit.
        held_out: relative error at the last point, which the fit did not see; None where there is none.
        points: size, ratio and tuned value of every setting, small models and little data first.
    """

    scale: float
    by_size: float
    by_ratio: float
    constant: float
    held_out: float | None = None
    points: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, size: float, ratio: float) -> float:
        """The hyperparameter for a model of so many non-embedding parameters and a ratio of data."""
        return _hyper((size, ratio), self.scale, self.by_size, self.by_ratio, self.constant)

    @property
    def by_tokens(self) -> tuple[float, float, float, float]:
        """The paper's form h = alpha * N**-a * D**-b + beta with D training tokens: (alpha, a, b, beta).

        It is the same law: D = 20 N C.
        """
        tokens = -self.by_ratio
        return self.scale * CHINCHILLA**tokens, -self.by_size - tokens, tokens, self.constant


def fit_hyper_law(
    sizes: Sequence[float], ratios: Sequence[float], values: Sequence[float], *, leave_out: bool = True
) -> HyperLaw:
    """Fits h = A * N**B * C**c + D by least squares.

    Args:
        sizes: non-embedding parameters of each setting.
        ratios: of data, in units of 20 tokens per parameter.
        values: the tuned value of each setting, in the same order: small models and little data first.
        leave_out: leave out the first and the last setting, as the study does, and hold the last against the law.

    Raises:
        NotEnoughCells: fewer than four settings are left, or only one size or one ratio.
        ValueError: a value is not a finite number.
        RuntimeError: the fit does not converge.

    Source: arXiv 2509.02046, phase III: ``curve_fit`` from A = 0, B = c = -1/2 and D = the mean of all but the last.
    """
    given = np.asarray(values, dtype=float)
    where = np.array([sizes, ratios], dtype=float)
    if not (np.isfinite(given).all() and np.isfinite(where).all() and (where > 0).all()):
        raise ValueError("sizes and ratios must be > 0, values finite")
    kept = slice(1, -1) if leave_out else slice(None)
    if len(given[kept]) < 4 or min(len({*row}) for row in where[:, kept].tolist()) < 2:
        raise NotEnoughCells("not enough cells: needs 4 settings of at least 2 sizes and 2 ratios")
    points = tuple(map(tuple, np.vstack([where, given]).T.tolist()))
    if np.ptp(given) == 0:
        return HyperLaw(0.0, 0.0, 0.0, float(given[0]), 0.0 if leave_out else None, points)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", OptimizeWarning)  # the covariance of a degenerate fit, which nobody reads
        start = (0.0, -0.5, -0.5, float(given[:-1].mean()))
        found, _ = curve_fit(_hyper, where[:, kept], given[kept], p0=start, maxfev=200_000)
    law = HyperLaw(*map(float, found), points=points)
    if not leave_out:
        return law
    missed = abs(law(*where[:, -1]) - given[-1]) / (abs(given[-1]) + 1e-6)  # the study's guard against a value of 0
    return replace(law, held_out=float(missed))


def tuned_laws(best: Mapping[Cell, Config], sizes: Mapping[str, float]) -> list[tuple[str, str, int, HyperLaw]]:
    """Laws of each optimizer's tuned hyperparameters in model size and data, where there are cells enough.

    Args:
        best: the tuned configuration of each cell.
        sizes: label to non-embedding parameters; cells of another label are left out.

    Returns:
        Optimizer, hyperparameter, cells it was fitted to or held against, law. Words and switches have no law.
    """
    known = (cell for cell in best if cell.params in sizes)
    cells = sorted(known, key=lambda cell: (sizes[cell.params], cell.chinchilla))
    found = []
    for optimizer in dict.fromkeys(cell.optimizer for cell in best):
        mine = [cell for cell in cells if cell.optimizer == optimizer]
        where = [sizes[cell.params] for cell in mine], [cell.chinchilla for cell in mine]
        for key in best[mine[0]] if mine else ():
            values = [best[cell].get(key) for cell in mine]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                with suppress(NotEnoughCells, RuntimeError):
                    found.append((optimizer, key, len(mine), fit_hyper_law(*where, values)))
    return found


def law_row(found: tuple[str, str, int, HyperLaw]) -> tuple[object, ...]:
    """One of `tuned_laws` as a row under `HYPER_LAW_COLUMNS`."""
    optimizer, key, cells, law = found
    held_out = "" if law.held_out is None else law.held_out
    return (optimizer, key, cells, law.scale, law.by_size, law.by_ratio, law.constant, held_out)


def _hyper(where, scale, by_size, by_ratio, constant):
    return scale * where[0] ** by_size * where[1] ** by_ratio + constant


@dataclass(frozen=True)
class JointLaw:
    """L(N, D) = floor + a * N**-p + b * D**-q, of non-embedding parameters N and training tokens D.

    Attributes:
        floor: nats per token.
        by_size: a, taken with N in units of `unit_size`.
        size_exponent: p.
        by_tokens: b, taken with D in units of `unit_tokens`.
        tokens_exponent: q.
        unit_size: parameters.
        unit_tokens: tokens.
        error: root of the mean squared residual, nats per token.
        cells: losses it was fitted to.
    """

    floor: float
    by_size: float
    size_exponent: float
    by_tokens: float
    tokens_exponent: float
    unit_size: float
    unit_tokens: float
    error: float
    cells: int

    def __call__(self, size: float, tokens: float) -> float:
        """Loss of a model of so many non-embedding parameters after so many tokens, nats per token."""
        return (
            self.floor
            + self.by_size * (size / self.unit_size) ** -self.size_exponent
            + self.by_tokens * (tokens / self.unit_tokens) ** -self.tokens_exponent
        )


def fit_joint_law(sizes: Sequence[float], ratios: Sequence[float], losses: Sequence[float]) -> JointLaw:
    """Fits one law over several model sizes by least squares.

    Args:
        sizes: non-embedding parameters of each cell.
        ratios: of data, in units of 20 tokens per parameter.
        losses: final losses, nats per token.

    Raises:
        NotEnoughCells: fewer than three sizes (two cannot tell a floor from what a larger model would gain), one ratio
            alone (size and tokens then grow together), or fewer than six cells for the five numbers.

    Source: the form of Hoffmann et al. 2022 (arXiv 2203.15556), approach 3, here with plain least squares.
    """
    size, ratio, loss = (np.asarray(row, dtype=float) for row in (sizes, ratios, losses))
    if len({*size.tolist()}) < 3 or len({*ratio.tolist()}) < 2 or len(loss) < 6:
        raise NotEnoughCells("not enough cells: needs 6 cells of at least 3 model sizes and 2 ratios")
    tokens = CHINCHILLA * size * ratio
    units = float(np.exp(np.log(size).mean())), float(np.exp(np.log(tokens).mean()))
    small, few = np.log(size / units[0]), np.log(tokens / units[1])

    def solve(exponents: np.ndarray) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(loss), np.exp(-exponents[0] * small), np.exp(-exponents[1] * few)], 1)
        numbers, *_ = np.linalg.lstsq(columns, loss, rcond=None)
        return numbers, float(((columns @ numbers - loss) ** 2).sum())

    grid = np.linspace(0.05, 1.5, 30)
    start = min(((p, q) for p in grid for q in grid), key=lambda pair: solve(np.array(pair))[1])
    options = {"xatol": 1e-9, "fatol": 1e-18, "maxiter": 4000}
    best = minimize(lambda at: solve(at)[1], start, method="Nelder-Mead", bounds=[(1e-3, 4.0)] * 2, options=options)
    (floor, by_size, by_tokens), squares = solve(best.x)
    error = math.sqrt(squares / len(loss))
    return JointLaw(
        float(floor), float(by_size), float(best.x[0]), float(by_tokens), float(best.x[1]), *units, error, len(loss)
    )
