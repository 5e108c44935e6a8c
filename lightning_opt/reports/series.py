"""Arithmetic on curves: thinning, smoothing, thirds, and the line of block characters that stands for a figure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lightning_opt.reports.reading import Series

_BLOCKS = "▁▂▃▄▅▆▇█"


def thin(series: Series, limit: int = 500) -> Series:
    """At most so many points, keeping each stretch's lowest and highest, so that no spike is lost."""
    xs, ys = series
    if len(xs) <= limit:
        return series
    stretches = max(1, limit // 2)
    kept: list[int] = []
    for i in range(stretches):
        span = range(i * len(xs) // stretches, (i + 1) * len(xs) // stretches)
        kept.extend(sorted({min(span, key=ys.__getitem__), max(span, key=ys.__getitem__)}))
    kept = sorted({0, *kept, len(xs) - 1})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def window(points: int) -> int:
    """Points on each side that `smooth` averages over: a fortieth of the curve."""
    return max(1, points // 40)


def smooth(series: Series) -> Series:
    """Rolling mean over a twentieth of the curve, centred.

    It narrows towards the start, where the loss falls fast, and looks only back at the end, where one point is noise.
    """
    xs, ys = series
    half = window(len(ys))
    total = [0.0]
    for y in ys:
        total.append(total[-1] + y)
    means = []
    for i in range(len(ys)):
        first = i - min(half, i)
        last = min(i + min(half, i), len(ys) - 1)
        means.append((total[last + 1] - total[first]) / (last + 1 - first))
    return xs, means


def thirds(series: Series, end: float | None = None) -> list[float | None]:
    """Means over the first, second and last third of the x range, which starts at 0 and ends at ``end``."""
    xs, ys = series
    if not xs:
        return [None, None, None]
    span = end or xs[-1] or 1
    parts: list[list[float]] = [[], [], []]
    for x, y in zip(xs, ys, strict=True):
        parts[min(2, max(0, int(3 * (x - 1) / span)))].append(y)
    return [fmean(part) if part else None for part in parts]


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The curve in block characters, lowest to highest value."""
    if not values:
        return ""
    width = min(width, len(values))
    means = [fmean(values[i * len(values) // width : (i + 1) * len(values) // width]) for i in range(width)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[3] * width
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)
