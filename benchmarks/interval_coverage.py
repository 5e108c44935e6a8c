"""How often do the intervals of speed-ups hold the truth?

    python -m benchmarks.interval_coverage              some minutes
    python -m benchmarks.interval_coverage --quick      a few trials of a few shapes

Tables of losses are drawn from a known law and a known speed-up, with normal noise; the 90 % interval is right where
it holds the speed-up that was put in. The laws are AdamW's of the study at 130M and 300M (fitted to its 1x to 8x), at
two spreads between seeds, for speed-ups of 1.05 and 1.6. Two constructions: *profile*, the one that `study.speedups`
uses, and *percentile*, the parametric bootstrap (the law fitted again to losses drawn from the fitted law).

*covered*: share of trials, over all laws and speed-ups of the row; *lowest*, *highest*: of one law and speed-up, each
of 1000 trials, whose standard error is 0.01. *width*: median of the upper end over the lower. *endless*: intervals
without an upper end. *undefined*: losses under the fitted floor, where the speed-up has a lower end alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Page, Table, keep, machine
from lightning_opt.study.laws import BETWEEN, EXPONENTS, LossLaw, least_squares
from lightning_opt.study.significance import Noise
from lightning_opt.study.speedups import interval

LAWS = {"130m": LossLaw(0.417868, 0.494997, 3.111276), "300m": LossLaw(0.349751, 0.477362, 2.913006)}
FOUR = (1.0, 2.0, 4.0, 8.0)
SIGMAS = (3e-3, 1e-3)
SPEEDS = (1.05, 1.6)
LEVEL = 0.90
DRAWS = 200


@dataclass(frozen=True)
class Shape:
    """One kind of table.

    Attributes:
        ratios: of the baseline's points.
        ratio: of the cell.
        sigma: between seeds, nats.
        freedom: degrees of freedom of its estimate; infinite where it is known.
    """

    ratios: tuple[float, ...]
    ratio: float
    sigma: float
    freedom: float = math.inf

    @property
    def exponents(self) -> tuple[float, float]:
        """Of the baseline's law: two points are interpolated."""
        return BETWEEN if len(self.ratios) == 2 else EXPONENTS


def shapes() -> Iterator[Shape]:
    noisy, quiet = SIGMAS
    yield from (Shape(FOUR, ratio, noisy) for ratio in (*FOUR, 16.0))
    yield from (Shape(FOUR, ratio, quiet) for ratio in (1.0, 8.0, 16.0))
    yield from (Shape(FOUR[:3], ratio, noisy) for ratio in FOUR[:3])
    yield Shape(FOUR[:3], 4.0, quiet)
    yield from (Shape(FOUR[:2], ratio, sigma) for sigma in SIGMAS for ratio in FOUR[:2])
    yield Shape((0.5, 1.0, 2.0, 4.0), 4.0, noisy)
    yield from (Shape(FOUR, 8.0, noisy, freedom) for freedom in (2, 6, 12))


def drawn(shape: Shape, law: LossLaw, speed: float, trials: int, rng: np.random.Generator) -> tuple[Any, Any, Noise]:
    """Losses of the baseline (one row a trial), of the cell, and what is known of the noise."""
    truth = np.array([law(ratio) for ratio in shape.ratios])
    losses = truth + shape.sigma * rng.standard_normal((trials, len(truth)))
    loss = law(shape.ratio * speed) + shape.sigma * rng.standard_normal(trials)
    if math.isinf(shape.freedom):
        return losses, loss, Noise.of(shape.sigma)
    variance = shape.sigma**2 * rng.chisquare(shape.freedom, trials) / shape.freedom
    return losses, loss, Noise(variance, shape.freedom)


def percentile(
    shape: Shape, losses: np.ndarray, loss: np.ndarray, noise: Noise, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The parametric bootstrap's percentile interval; a draw under its fitted floor counts as infinitely fast."""
    logs, one = np.log(shape.ratios), np.ones(len(shape.ratios))
    law = least_squares(logs, losses, one, shape.exponents)
    steep = np.where(np.abs(law.exponent) < 1e-9, 1e-9, law.exponent)[:, None]
    fitted = law.level[:, None] + law.slope[:, None] * -np.expm1(-steep * logs) / steep
    sigma = np.broadcast_to(np.sqrt(noise.variance), loss.shape)
    ends = []
    for part in np.array_split(np.arange(len(loss)), max(1, len(loss) // 50)):
        spread = sigma[part][:, None]
        again = fitted[part][:, None] + spread[..., None] * rng.standard_normal((len(part), DRAWS, len(logs)))
        own = loss[part][:, None] + spread * rng.standard_normal((len(part), DRAWS))
        found = least_squares(logs, again, one, shape.exponents).log_equivalent(own) - math.log(shape.ratio)
        sides = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        ends.append(np.quantile(np.where(np.isnan(found), 50.0, found), sides, axis=1, method="nearest"))
    low, high = np.exp(np.concatenate(ends, axis=1))
    return low, np.where(high > 1e6, np.inf, high)


def trial_counts(shape: Shape, law: LossLaw, speed: float, trials: int, how: str, seed: int) -> dict[str, float]:
    """Shares of the trials of one shape, law and speed-up."""
    rng = np.random.default_rng(seed)
    losses, loss, noise = drawn(shape, law, speed, trials, rng)
    if how == "profile":
        low, high = interval(np.array(shape.ratios), losses, shape.ratio, loss, noise, LEVEL, exponents=shape.exponents)
    else:
        low, high = percentile(shape, losses, loss, noise, rng)
    own = least_squares(np.log(shape.ratios), losses, np.ones(len(shape.ratios)), shape.exponents)
    with np.errstate(divide="ignore"):
        width = high / low
    return {
        "covered": float(((low <= speed) & (speed <= high)).mean()),
        "width": float(np.median(width)),
        "endless": float(np.isinf(high).mean()),
        "undefined": float(np.isnan(own.log_equivalent(loss)).mean()),
    }


def row(shape: Shape, how: str, laws: Iterable[str], speeds: Iterable[float], trials: int) -> dict[str, Any]:
    cases = list(itertools.product(laws, speeds))
    counts = [trial_counts(shape, LAWS[law], speed, trials, how, seed) for seed, (law, speed) in enumerate(cases)]
    covered = [count["covered"] for count in counts]
    found = {
        "baseline at": " ".join(f"{ratio:g}x" for ratio in shape.ratios),
        "cell at": f"{shape.ratio:g}x",
        "sigma": shape.sigma,
        "sigma known from": "given" if math.isinf(shape.freedom) else f"{shape.freedom:g} degrees of freedom",
        "interval": how,
        "covered": round(float(np.mean(covered)), 3),
        "lowest": round(min(covered), 3),
        "highest": round(max(covered), 3),
        "width": round(float(np.median([count["width"] for count in counts])), 3),
        "endless": round(float(np.mean([count["endless"] for count in counts])), 3),
        "undefined": round(float(np.mean([count["undefined"] for count in counts])), 3),
    }
    print(*found.values(), sep=" | ", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 trials of a few shapes")
    parser.add_argument("--trials", type=int, default=1000, help="of each shape, law and speed-up")
    parser.add_argument("--out", type=Path, help="folder of the page; benchmarks/results when left out")
    given = parser.parse_args()
    where = machine()
    laws, speeds, trials = (("130m",), (1.4,), 50) if given.quick else (tuple(LAWS), SPEEDS, given.trials)
    kinds = list(shapes())[::5] if given.quick else list(shapes())
    profile = [row(shape, "profile", laws, speeds, trials) for shape in kinds]
    known = [shape for shape in kinds if math.isinf(shape.freedom) and shape.sigma == SIGMAS[0]]
    compared = [row(shape, "percentile", laws[:1], (1.4,), trials) for shape in known]
    tables = [
        Table("The intervals of study.speedups", profile, f"{trials} trials of each law and speed-up."),
        Table("The percentile bootstrap instead", compared, f"One law (130M), one speed-up (1.4), {DRAWS} draws."),
    ]
    about = " ".join(__doc__.split("\n\n", 2)[2].split())
    keep(
        Page("interval_coverage", "Coverage of the 90 % intervals", about, tables),
        where,
        given.out,
        suffix="-quick" if given.quick else "",
    )


if __name__ == "__main__":
    main()
