"""Speed-ups: how much more data (or time, or memory) the baseline needs for the same final loss, and how sure that is.

A final loss is turned into the data with which the baseline's law reaches it; that over the data it took is the
speed-up. The interval asks which speed-ups the losses allow: if the cell's true speed-up were s, its loss would be one
more point of the baseline's law, at the ratio s times its own. The law is fitted again with that point, and s is in
the interval while the sum of squares, in units of the noise, rises by no more than the quantile of chi-square (of F
where the noise is estimated): the profile likelihood. `benchmarks/interval_coverage.py` says how often that is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from lightning_opt.plan import ConfigError, one_of
from lightning_opt.study.laws import (
    BETWEEN,
    EXPONENTS,
    Baseline,
    LossLaw,
    NotEnoughCells,
    fit_law,
    interpolate,
    least_squares,
)
from lightning_opt.study.results import Cell, Results
from lightning_opt.study.significance import Noise, t_quantile

UNDEFINED = "undefined: below the fitted floor"
NOT_ENOUGH = "not enough cells"
EXTRAPOLATED = "extrapolated"
INTERPOLATED = "interpolated"
DIVERGED = "undefined: the run diverged"
RISING = "undefined: the baseline's loss does not fall with data"

FARTHEST = 100.0
"""Speed-ups are looked for between 1/100 and 100; an interval that reaches farther has no end: 0 or infinite."""


@dataclass(frozen=True)
class SpeedUp:
    """How much faster a cell's optimizer got to its final loss than the baseline.

    Attributes:
        optimizer: of the cell.
        params: the model's label.
        chinchilla: the cell's ratio of data.
        value: the speed-up; nan where it is undefined.
        low: lower end of its interval; nan where there is none.
        high: upper end; infinite where the losses set no bound.
        by: ``tokens``, ``time`` or ``memory``.
        note: empty, or what must be said with it: ``extrapolated`` (the baseline's law is read outside the ratios it
            was fitted to), ``interpolated`` (two ratios, no fit), ``not enough cells``, ``undefined: …`` (then `low`
            is the least that the losses allow).
    """

    optimizer: str
    params: str
    chinchilla: float
    value: float
    low: float
    high: float
    by: str = "tokens"
    note: str = ""


def speed_ups(
    results: Results,
    *,
    baseline: str = "adamw",
    fit: tuple[float, float] | None = (1, 8),
    sigma: float | Noise = 3e-3,
    level: float = 0.90,
    by: Literal["tokens", "time", "memory"] = "tokens",
) -> list[SpeedUp]:
    """The speed-up of every cell that has a final loss, other than the baseline's own.

    Args:
        results: losses and costs.
        baseline: the optimizer the others are held against.
        fit: lowest and highest ratio of the baseline's fit; None: all it has.
        sigma: standard deviation of a final loss between seeds, nats, or a `Noise` estimated from repeated seeds.
        level: share of the truth that the intervals are meant to cover.
        by: ``tokens`` (data), ``time`` (seconds of training to the same loss), or ``memory`` (bytes that the baseline
            holds in the same cell for each byte of the cell's optimizer). The last two only where they were measured.

    Raises:
        ConfigError: the results hold no cell of the baseline, or another argument cannot be.
    """
    if baseline not in results.optimizers:
        raise ConfigError("baseline", baseline, one_of(baseline, results.optimizers))
    if by not in ("tokens", "time", "memory"):
        raise ConfigError("by", by, one_of(by, ("tokens", "time", "memory")))
    if not 0 < level < 1:
        raise ConfigError("level", level, "must be a number > 0 and < 1")
    noise = Noise.of(sigma)
    if not noise.variance > 0:
        raise ConfigError("sigma", noise.sigma, "must be a number > 0 (nats; the study's threshold is 3e-3)")
    others = [cell for cell in results.losses if cell.optimizer != baseline]
    if by == "memory":
        return [found for cell in others if (found := _by_memory(results, cell, baseline, level))]
    by_cell: dict[Cell, SpeedUp] = {}
    for label in results.labels:
        curve = baseline_of(results, baseline, label, fit)
        mine = [cell for cell in others if cell.params == label]
        by_cell.update(_by_tokens(results, mine, curve, baseline, noise, level))
    found = [by_cell[cell] for cell in others]
    if by == "tokens":
        return found
    return [timed for one in found if (timed := _by_time(results, one, baseline, level))]


def baseline_of(
    results: Results, optimizer: str, params: str, fit: tuple[float, float] | None = (1, 8)
) -> Baseline | None:
    """The law of an optimizer on a model; a curve through its points where it has two; None where it has fewer.

    Args:
        results: its losses; cells with a run that diverged are left out.
        optimizer: whose.
        params: the model's label.
        fit: lowest and highest ratio that counts; None: all.

    Raises:
        ConfigError: the ratios are the wrong way round.
    """
    low, high = fit or (0.0, math.inf)
    if not low <= high:
        raise ConfigError("fit", list(fit or ()), "must be the lowest and the highest ratio of the fit, as [1, 8]")
    cells = [cell for cell in results.of(optimizer, params) if low <= cell.chinchilla <= high]
    cells = [cell for cell in cells if math.isfinite(results.loss(cell))]
    ratios, losses = [cell.chinchilla for cell in cells], [results.loss(cell) for cell in cells]
    try:
        if len(cells) == 2:
            return interpolate(ratios, losses)
        return fit_law(ratios, losses, [len(results.losses[cell]) for cell in cells])
    except NotEnoughCells:
        return None


def _by_tokens(
    results: Results, cells: Sequence[Cell], curve: Baseline | None, baseline: str, noise: Noise, level: float
) -> Iterator[tuple[Cell, SpeedUp]]:
    """The speed-ups of a model's cells, all intervals at once."""
    notes = {cell: _hindrance(curve, results.loss(cell)) for cell in cells}
    able = [cell for cell in cells if not notes[cell]]
    ends = _intervals(results, able, curve, baseline, noise, level) if curve and able else {}
    for cell in cells:
        reached, note = math.nan, notes[cell]
        if curve and not note:
            reached = curve.equivalent(results.loss(cell))
            note = _remark(curve, reached)
        low, high = ends.get(cell, (math.nan, math.nan))
        yield cell, SpeedUp(*astuple(cell), reached / cell.chinchilla, low, high, note=note)


def _hindrance(curve: Baseline | None, loss: float) -> str:
    """Why a cell has no speed-up whatever its loss; empty where it may have one."""
    if curve is None:
        return NOT_ENOUGH
    if not math.isfinite(loss):
        return DIVERGED
    ratios = [ratio for ratio, _ in curve.points]
    return "" if curve(ratios[0]) > curve(ratios[-1]) else RISING


def _remark(curve: Baseline, reached: float) -> str:
    """What must be said with a speed-up, given the data with which the baseline reaches its loss."""
    if math.isnan(reached):
        return UNDEFINED
    if not isinstance(curve, LossLaw):
        return INTERPOLATED
    return "" if curve.points[0][0] <= reached <= curve.points[-1][0] else EXTRAPOLATED


def _intervals(
    results: Results, cells: Sequence[Cell], curve: Baseline, baseline: str, noise: Noise, level: float
) -> dict[Cell, tuple[float, float]]:
    points = np.array(curve.points)
    low, high = interval(
        points[:, 0],
        points[:, 1],
        np.array([cell.chinchilla for cell in cells]),
        np.array([results.loss(cell) for cell in cells]),
        noise,
        level,
        seeds=np.array([len(results.losses[Cell(baseline, cells[0].params, ratio)]) for ratio, _ in curve.points]),
        own_seeds=np.array([len(results.losses[cell]) for cell in cells]),
        exponents=EXPONENTS if isinstance(curve, LossLaw) else BETWEEN,
    )
    return dict(zip(cells, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def interval(
    ratios: np.ndarray,
    losses: np.ndarray,
    ratio: np.ndarray | float,
    loss: np.ndarray,
    noise: Noise,
    level: float,
    *,
    seeds: np.ndarray | None = None,
    own_seeds: np.ndarray | float = 1,
    exponents: tuple[float, float] = EXPONENTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Profile-likelihood intervals of speed-ups, of many cells or tables at once.

    Leading axes of the arguments are broadcast to those of `loss`.

    Args:
        ratios: of the baseline's points.
        losses: of the baseline's points on the last axis, nats per token.
        ratio: of the cell.
        loss: of the cell.
        noise: of one final loss; its variance may have leading axes too.
        level: share of the truth that the interval is meant to cover.
        seeds: behind each of the baseline's points; one each when None.
        own_seeds: behind the cell's loss.
        exponents: lowest and highest exponent of the baseline's law.

    Returns:
        Lower and upper ends; 0 and infinite where a bound lies beyond `FARTHEST`.
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    weights = np.ones(len(logs)) if seeds is None else np.asarray(seeds, dtype=float)
    law = least_squares(logs, losses, weights, exponents)
    values = _with_own(np.broadcast_to(losses, (*loss.shape, len(logs))), loss)
    heavy = _with_own(np.broadcast_to(weights, values[..., 1:].shape), np.broadcast_to(own_seeds, loss.shape))
    own = np.log(np.asarray(ratio, dtype=float))

    def squares(log_speed: np.ndarray) -> np.ndarray:
        every = _with_own(np.broadcast_to(logs, values[..., 1:].shape), own + log_speed)
        return least_squares(every, values, heavy, exponents).squares

    far, alone = np.full(loss.shape, math.log(FARTHEST)), np.broadcast_to(law.squares, loss.shape)
    middle = law.log_equivalent(loss) - own
    lost = ~(np.abs(middle) < far)
    if lost.any():
        grid = np.linspace(-far, far, 41)
        tried = np.stack([squares(at) for at in grid])
        middle = np.where(lost, np.take_along_axis(grid, tried.argmin(0)[None], 0)[0], middle)
        alone = np.where(lost, np.maximum(alone, tried.min(0)), alone)  # under the floor no speed-up fits exactly
    limit = alone + t_quantile((1 + level) / 2, noise.freedom) ** 2 * noise.variance
    low, high = (_edge(squares, middle, end, limit) for end in (-far, far))
    return np.where(low <= -far, 0.0, np.exp(low)), np.where(high >= far, math.inf, np.exp(high))


def _with_own(baseline: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The baseline's points and, as one more, the cell's."""
    return np.concatenate([baseline, np.asarray(own)[..., None]], -1)


def _edge(
    squares: Callable[[np.ndarray], np.ndarray], inside: np.ndarray, end: np.ndarray, limit: np.ndarray
) -> np.ndarray:
    """Where the sum of squares passes the limit between a point inside and the end of the search, by bisection."""
    endless = squares(end) <= limit
    outside = end
    for _ in range(20):
        half = (inside + outside) / 2
        within = squares(half) <= limit
        inside, outside = np.where(within, half, inside), np.where(within, outside, half)
    return np.where(endless, end, (inside + outside) / 2)


def _by_time(results: Results, found: SpeedUp, baseline: str, level: float) -> SpeedUp | None:
    """The speed-up by data, times how much longer the baseline takes for the same data; None where it is not known."""
    own = results.seconds.get(Cell(found.optimizer, found.params, found.chinchilla))
    timed = {cell: results.seconds[cell] for cell in results.of(baseline, found.params) if results.seconds.get(cell)}
    if not own or not timed:
        return None
    same = Cell(baseline, found.params, found.chinchilla)
    used = [same] if same in timed else list(timed)  # batches differ between ratios, and with them the speed
    theirs = [seconds / cell.chinchilla for cell in used for seconds in timed[cell]]
    factor = fmean(theirs) / (fmean(own) / found.chinchilla)
    value, low, high = (factor * part for part in (found.value, found.low, found.high))
    error = math.hypot(_relative_error(own), _relative_error(theirs)) * t_quantile((1 + level) / 2, math.inf)
    if error and value > 0:
        low = value * math.exp(-math.hypot(math.log(value / low), error)) if low > 0 else low
        high = value * math.exp(math.hypot(math.log(high / value), error)) if math.isfinite(high) else high
    return replace(found, value=value, low=low, high=high, by="time")


def _by_memory(results: Results, cell: Cell, baseline: str, level: float) -> SpeedUp | None:
    """Bytes of the baseline in the same cell for each of this optimizer's; None where either is not known."""
    own = results.peak_bytes.get(cell)
    theirs = results.peak_bytes.get(Cell(baseline, cell.params, cell.chinchilla))
    if not own or not theirs:
        return None
    value = fmean(theirs) / fmean(own)
    error = math.hypot(_relative_error(own), _relative_error(theirs)) * t_quantile((1 + level) / 2, math.inf)
    spread = math.exp(error)
    return SpeedUp(cell.optimizer, cell.params, cell.chinchilla, value, value / spread, value * spread, by="memory")


def _relative_error(values: tuple[float, ...] | list[float]) -> float:
    """Standard error of a mean over the mean; 0 for one value, whose spread nobody knows."""
    return stdev(values) / math.sqrt(len(values)) / fmean(values) if len(values) > 1 else 0.0
