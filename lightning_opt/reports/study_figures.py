"""Figures of a comparison study: rows of dots with intervals, lines over chosen values, and leads along the way."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import HEIGHT, Figure, Legend, Sheet, sheet
from lightning_opt.reports.reading import Series
from lightning_opt.reports.series import thin
from lightning_opt.reports.style import hexadecimal

Colours = Mapping[str, tuple[str, bool]]
"""Name to its colour name and whether it is drawn dashed."""

_DASHES = (0, (4, 2.5))
_ROW = 19  # height of a row, in units of the figure
_LETTER = 7.6  # width of a letter


@dataclass(frozen=True)
class Row:
    """A row of `dots`.

    Attributes:
        name: at its left, also its colour's.
        value: where the dot is; None: the words alone.
        low: where its bar starts; None for no bar.
        high: where its bar ends.
        each: single values behind it, drawn small.
        words: at its right.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    each: tuple[float, ...] = ()
    words: str = ""


def dots(
    key: str,
    title: str,
    label: str,
    rows: Sequence[Row],
    colours: Colours,
    caption: str,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """One dot a row, with its bar and its value in words.

    Args:
        key: identifier in the page.
        title: heading.
        label: what is measured, with its unit.
        rows: from above.
        colours: of every row's name.
        caption: what to read.
        reference: a value to draw a dashed line at, and what it is.
    """
    height = max(HEIGHT, 80 + _ROW * len(rows))
    left = min(170, 22 + math.ceil(_LETTER * max((len(row.name) for row in rows), default=0)))
    right = 14 + math.ceil(_LETTER * max((len(row.words) for row in rows if row.value is not None), default=0))
    with sheet(key, left, right, height) as page:
        axes = page.axes
        low, high = _span(rows, reference)
        axes.set_xlim(low, high)
        off = 0
        for place, row in enumerate(rows):
            off += _row(axes, place, row, hexadecimal(colours[row.name][0]), high)
        if reference is not None:
            axes.axvline(reference[0], color=hexadecimal("ink"), linewidth=1.4, linestyle=_DASHES, zorder=0)
        axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        page.ticks(4)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", labelcolor=hexadecimal("ink"), pad=9)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        page.label(label, "")
        if off:
            caption += f" Arrows: {off} further right, with {'its value' if off == 1 else 'their values'}."
        legend = () if reference is None else (Legend(reference[1], "ink", "dashed"),)
        numbers = tuple((row.name, row.words or q.number(row.value), _bar(row)) for row in rows)
        header = ("optimizer", label, "bar")
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, header, numbers)


def _row(axes: Axes, place: int, row: Row, colour: str, right: float) -> bool:
    """Draws one row; whether its dot lies beyond the right end."""
    at_right = {"va": "center", "ha": "left", "transform": axes.get_yaxis_transform(), "color": hexadecimal("muted")}
    if row.value is None:
        axes.text(0.02, place, row.words, **at_right)
        return False
    axes.text(1.03, place, row.words, **at_right)
    if row.value > right:
        axes.plot([right], [place], color=colour, marker=5, markersize=8, clip_on=False)
        return True
    if row.low is not None and row.high is not None:
        axes.plot([row.low, min(row.high, right)], [place] * 2, color=colour, linewidth=2, alpha=0.75)
        if row.high > right:
            axes.plot([right], [place], color=colour, marker=5, markersize=6, clip_on=False)
    if len(row.each) > 1:
        axes.plot(row.each, [place] * len(row.each), color=colour, linestyle="", marker="o", markersize=3.5, alpha=0.5)
    axes.plot([row.value], [place], color=colour, marker="o", markersize=8)
    return False


def _span(rows: Sequence[Row], reference: tuple[float, str] | None) -> tuple[float, float]:
    """Holds every dot not far beyond three quarters of the others, and bars as far as that leaves room."""
    values = sorted(row.value for row in rows if row.value is not None)
    if not values:
        return 0.0, 1.0
    usual = values[math.ceil(0.75 * (len(values) - 1))]
    top = min(values[-1], usual + 3 * (usual - values[0])) if len(values) > 3 else values[-1]
    reach = (top - values[0]) or 0.25 * abs(top) or 0.05
    shown = [row for row in rows if row.value is not None and row.value <= top]
    line = [reference[0]] if reference else []
    low = max(min([values[0], *(row.low for row in shown if row.low is not None)]), values[0] - reach)
    high = min(max([top, *(row.high for row in shown if row.high is not None)]), top + reach)
    low, high = min([low, *line]), max([high, *line])
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _bar(row: Row) -> str:
    if row.value is None or row.low is None or row.high is None:
        return "–"
    return _from_to(row.low, row.high, 4)


def _from_to(low: float, high: float, digits: int) -> str:
    return (
        f"{q.number(low, digits)} to {q.number(high, digits)}"
        if math.isfinite(high)
        else f"above {q.number(low, digits)}"
    )


@dataclass(frozen=True)
class Point:
    """A point of `lines`.

    Attributes:
        x: the chosen value.
        y: what came of it; infinite where it diverged.
        low: where its bar starts; None for no bar.
        high: where its bar ends.
        ringed: whether it is marked as the one that was taken.
        hollow: whether it is drawn as less certain than the others.
        words: its y in the table of numbers; the plain number where empty.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    ringed: bool = False
    hollow: bool = False
    words: str = ""


def lines(
    key: str,
    title: str,
    labels: tuple[str, str],
    points: Mapping[str, Sequence[Point]],
    colours: Colours,
    caption: str,
    names: Mapping[float, str] | None = None,
    level: float | None = None,
) -> Figure:
    """Lines over a few chosen values, on a logarithmic axis where they span a factor of 4 or more.

    Args:
        key: identifier in the page.
        title: heading.
        labels: of x and y, with units.
        points: name of each line to its points.
        colours: of every name.
        caption: what to read.
        names: how x values are called at the axis; the plain numbers without.
        level: a dashed line at this y.
    """
    with sheet(key) as page:
        axes = page.axes
        finite = [point for one in points.values() for point in one if math.isfinite(point.y)]
        top = _top(finite)
        xs = sorted({point.x for one in points.values() for point in one})
        log = bool(xs) and xs[0] > 0 and xs[-1] / xs[0] >= 4
        span = ((xs[-1] / xs[0] if log else xs[-1] - xs[0]) if xs else 0.0, log)
        cut = sum(_line(axes, place, one, colours[name], top, span) for place, (name, one) in enumerate(points.items()))
        if level is not None:
            axes.axhline(level, color=hexadecimal("ink"), linewidth=1.4, linestyle=_DASHES, zorder=0)
        _values_axis(page, xs, log, names)
        axes.set_ylim(*_heights(finite, top, level))
        page.label(*labels)
        diverged = [point for one in points.values() for point in one if not math.isfinite(point.y)]
        caption += " Crosses at the top: diverged." if diverged else ""
        caption += f" Triangles: {cut} far above, with their values in the table." if cut else ""
        legend = tuple(Legend(name, colours[name][0], "dashed" if colours[name][1] else "line") for name in points)
        rows = tuple(
            (name, (names or {}).get(point.x, q.trimmed(point.x, 4)), _worth(point), _reach(point))
            for name, one in points.items()
            for point in one
        )
        header = ("optimizer", labels[0], labels[1], "interval")
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, header, rows)


def _top(points: Sequence[Point]) -> float:
    """The highest y that is shown: one bad setting must not flatten the others."""
    ys = sorted(point.y for point in points)
    if not ys:
        return 1.0
    usual = ys[math.ceil(0.5 * (len(ys) - 1))]
    limit = usual + 3 * ((usual - ys[0]) or 0.1 * abs(usual))
    kept = [point for point in points if point.y <= limit]
    return min(max([p.y for p in kept] + [p.high for p in kept if p.high is not None]), limit)


def _heights(points: Sequence[Point], top: float, level: float | None) -> tuple[float, float]:
    lowest = min((point.y for point in points), default=top - 1)
    bars = [point.low for point in points if point.low is not None]
    low = max(min([lowest, *bars]), lowest - (top - lowest))
    low, high = (low, top) if level is None else (min(low, level), max(top, level))
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


_Span = tuple[float, bool]
"""Of the x values, as a ratio where the axis is logarithmic; and whether it is."""


def _line(axes: Axes, place: int, points: Sequence[Point], colour: tuple[str, bool], top: float, span: _Span) -> int:
    """Draws one line; how many of its points lie above the top."""
    hue, style = hexadecimal(colour[0]), _DASHES if colour[1] else "-"
    shown = sorted((point for point in points if point.y <= top), key=lambda point: point.x)
    barred = any(point.low is not None for point in shown)
    xs = [_aside(point.x, place if barred else 4, span) for point in shown]
    axes.plot(xs, [point.y for point in shown], color=hue, linestyle=style)
    for x, point in zip(xs, shown, strict=True):
        face = hexadecimal("surface") if point.hollow else hue
        axes.plot([x], [point.y], color=hue, marker="o", markersize=4.5, markerfacecolor=face, linewidth=0)
        if point.low is not None and point.high is not None:
            axes.plot([x, x], [point.low, min(point.high, 2 * top)], color=hue, linewidth=1.4, alpha=0.7)
        if point.ringed:
            axes.plot([x], [point.y], color=hue, marker="o", markersize=11, markerfacecolor="none", linewidth=0)
    off = [point for point in points if point.y > top]
    for point in off:
        mark = {"marker": "^" if math.isfinite(point.y) else "x", "markersize": 8, "clip_on": False, "linewidth": 0}
        axes.plot([point.x], [1.0], color=hue, transform=axes.get_xaxis_transform(), **mark)
    return sum(math.isfinite(point.y) for point in off)


def _aside(x: float, place: int, span: _Span) -> float:
    """Beside x, so that the bars of different lines do not cover each other."""
    share = 0.006 * (place % 9 - 4)
    return x * span[0] ** share if span[1] else x + share * span[0]


def _values_axis(page: Sheet, xs: Sequence[float], log: bool, names: Mapping[float, str] | None) -> None:
    axes = page.axes
    axes.margins(x=0.06)
    page.ticks()
    if log:
        axes.set_xscale("log")
        margin = (xs[-1] / xs[0]) ** 0.06
        axes.set_xlim(xs[0] / margin, xs[-1] * margin)
        page.ticks()
        axes.xaxis.set_minor_locator(NullLocator())
    span = (xs[-1] / xs[0] if log else xs[-1] - xs[0]) if xs else 0.0
    apart = [(b / a >= span**0.14) if log else (b - a >= 0.14 * span) for a, b in pairwise(xs)]
    kept = list(xs) if all(apart) or len(xs) < 3 else _thinned(xs, span, log)
    if xs:
        axes.xaxis.set_major_locator(FixedLocator(kept))
        axes.xaxis.set_major_formatter(FixedFormatter([(names or {}).get(x, q.trimmed(x, 3)) for x in kept]))


def _thinned(xs: Sequence[float], span: float, log: bool) -> list[float]:
    """Of values that lie too close for their labels, those that leave each other room."""
    kept = [xs[0]]
    for x in xs[1:]:
        if (x / kept[-1] >= span**0.14) if log else (x - kept[-1] >= 0.14 * span):
            kept.append(x)
    return kept


def _worth(point: Point) -> str:
    return point.words or (q.number(point.y, 5) if math.isfinite(point.y) else "diverged")


def _reach(point: Point) -> str:
    return "–" if point.low is None or point.high is None else _from_to(point.low, point.high, 3)


def leads(
    key: str, title: str, x_label: str, curves: Mapping[str, Series], base: str, colours: Colours, caption: str
) -> Figure:
    """How far each curve lies under the baseline's at the same x; where lines cross zero, the order turns.

    Args:
        key: identifier in the page.
        title: heading.
        x_label: what x is, with unit.
        curves: name to its loss over x; the baseline among them.
        base: the baseline's name.
        colours: of every name.
        caption: what to read.
    """
    with sheet(key, left=66) as page:
        axes = page.axes
        gaps = {name: gap_to(series, curves[base]) for name, series in curves.items() if name != base}
        gaps = {name: series for name, series in gaps.items() if series[0]}
        for name, series in gaps.items():
            colour, dashed = colours[name]
            axes.plot(*thin(series, 240), color=hexadecimal(colour), linestyle=_DASHES if dashed else "-", linewidth=2)
        axes.axhline(0.0, color=hexadecimal(colours[base][0]), linewidth=2)
        late = [y for xs, ys in gaps.values() for x, y in zip(xs, ys, strict=True) if x >= 0.25 * xs[-1]]
        low, high = min([0.0, *late]), max([0.0, *late])
        room = 0.15 * (high - low) or 0.05
        axes.set_ylim(low - room, high + room)
        axes.margins(x=0.01)
        page.ticks()
        page.label(x_label, f"loss above {base}'s, nats per token")
        legend = (Legend(base, colours[base][0]),)
        legend += tuple(Legend(name, colours[name][0], "dashed" if colours[name][1] else "line") for name in gaps)
        rows = tuple(
            (name, q.number(min(ys), 3), q.number(max(ys), 3), q.number(ys[-1], 3)) for name, (_, ys) in gaps.items()
        )
        header = ("optimizer", "lowest", "highest", "at the end")
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, header, rows)


def gap_to(series: Series, base: Series) -> Series:
    """The curve minus the base at the same x, straight lines between the base's points, where both are known."""
    if not series[0] or not base[0]:
        return [], []
    pairs = [(x, y - at(base, x)) for x, y in zip(*series, strict=True) if base[0][0] <= x <= base[0][-1]]
    return [x for x, _ in pairs], [y for _, y in pairs]


def at(series: Series, x: float) -> float:
    """The curve's value at x, straight lines between its points; its ends beyond them."""
    xs, ys = series
    place = bisect_left(xs, x)
    if place in (0, len(xs)) or xs[place] == x:
        return ys[min(place, len(xs) - 1)]
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def scatter(
    key: str,
    title: str,
    labels: tuple[str, str],
    points: Mapping[str, Sequence[tuple[float, float]]],
    colours: Colours,
    caption: str,
) -> Figure:
    """Dots of two measures against each other.

    Args:
        key: identifier in the page.
        title: heading.
        labels: of x and y, with units.
        points: name to pairs of x and y.
        colours: of every name; those that would be dashed lines are diamonds.
        caption: what to read.
    """
    with sheet(key) as page:
        for name, found in points.items():
            hue, dashed = colours[name]
            mark = {"marker": "D" if dashed else "o", "markersize": 5 if dashed else 6, "linewidth": 0}
            page.axes.plot([x for x, _ in found], [y for _, y in found], color=hexadecimal(hue), alpha=0.85, **mark)
        page.axes.margins(0.05)
        page.ticks()
        page.label(*labels)
        legend = tuple(Legend(name, colours[name][0], "diamond" if colours[name][1] else "dot") for name in points)
        rows = tuple((name, q.number(x, 5), q.number(y)) for name, found in points.items() for x, y in sorted(found))
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, ("optimizer", *labels), rows)
