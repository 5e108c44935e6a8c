"""Curves that cross: who led on the way and was overtaken before the end of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations

from lightning_opt.reports.reading import Series
from lightning_opt.reports.study_figures import gap_to

EARLY = 0.1
"""Share of the run before which nothing counts: the warm-up's order is nobody's."""


@dataclass(frozen=True)
class Crossing:
    """Two curves whose order at the end is not the one before.

    Attributes:
        winner: lower at the last point of both.
        overtaken: the other.
        x: where they last crossed, in the unit of the curves.
        share: the same as a share of the way.
        lead: by how much the overtaken curve was ahead at most, after the first tenth, in nats per token.
        final: by how much the winner is ahead at the end, in nats per token.
    """

    winner: str
    overtaken: str
    x: float
    share: float
    lead: float
    final: float


def crossings(curves: Mapping[str, Series], least: float = 0.0) -> list[Crossing]:
    """Pairs whose order turned after the first tenth of the way, late turns first.

    Args:
        curves: name to its loss over tokens or time.
        least: both the lead that was lost and the gap at the end must exceed this to count, nats per token.
    """
    found = []
    for winner, other in permutations(curves, 2):
        xs, gaps = gap_to(curves[other], curves[winner])
        late = [(x, gap) for x, gap in zip(xs, gaps, strict=True) if x >= EARLY * xs[-1]]
        ahead = [gap for _, gap in late if gap < 0]
        if not ahead or late[-1][1] <= least or -min(ahead) <= least:
            continue
        x = max(_zero(a, b) for a, b in pairwise(late) if a[1] < 0 <= b[1])
        found.append(Crossing(winner, other, x, x / late[-1][0], -min(ahead), late[-1][1]))
    return sorted(found, key=lambda one: -one.share)


def _zero(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Where the straight line between two points crosses zero."""
    (a, below), (b, above) = before, after
    return a + (b - a) * -below / (above - below)
