"""The figures of a comparison: one colour for each optimizer, the best of each in front, the others faint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import Figure, Legend, Sheet, sheet
from lightning_opt.reports.figures import CURVE_HEADER, curve_rows
from lightning_opt.reports.job_states import counted
from lightning_opt.reports.ranking import Cell, Standing, edge
from lightning_opt.reports.reading import Series
from lightning_opt.reports.series import thin
from lightning_opt.reports.style import hexadecimal
from lightning_opt.reports.verdicts import loss_of

Colours = Mapping[str, tuple[str, bool]]
"""Optimizer to its colour name and whether it is drawn dashed."""

_DASHES = (0, (4, 2.5))
_FEW_POINTS = 10


@dataclass(frozen=True)
class Line:
    """One run's curve.

    Attributes:
        optimizer: whose colour it takes.
        label: what names it where it stands in front.
        series: the curve.
        front: whether it is drawn in full colour.
    """

    optimizer: str
    label: str
    series: Series
    front: bool


def curves(
    key: str, title: str, x_label: str, lines: Sequence[Line], colours: Colours, caption: str, dots: bool
) -> Figure:
    """Curves of many runs.

    Args:
        key: identifier.
        title: heading.
        x_label: what the x values are, with unit.
        lines: the curves, any number.
        colours: of the optimizers.
        caption: what to read.
        dots: whether the points of the curves in front are marked.
    """
    drawn = [line for line in lines if line.series[0]]
    front = [line for line in drawn if line.front]
    with sheet(key) as page:
        for line in sorted(drawn, key=lambda one: one.front):
            colour, dashed = colours[line.optimizer]
            style = {"color": hexadecimal(colour), "linestyle": _DASHES if dashed else "-"}
            if line.front:
                few = dots and len(front) <= 6 and len(line.series[0]) <= 40
                mark = {"marker": "o", "markersize": 4} if few else {}
                width = 2.2 if len(front) <= 6 else 1.5
                page.axes.plot(*thin(line.series, 240), linewidth=width, **style, **mark)
            else:
                page.axes.plot(*thin(line.series, 80), linewidth=0.9, alpha=0.38, **style)
        top = _cut(page.axes, drawn)
        page.axes.margins(x=0.01)
        page.ticks()
        page.label(x_label, "loss, nats per token")
        if any(y > top for line in drawn for y in line.series[1]):
            caption += f" Losses above {q.number(top, 3)}, at the start of training or of runs gone wrong, are cut off."
        legend = [Legend(line.label, colours[line.optimizer][0], _mark(colours, line.optimizer)) for line in front]
        if len(front) < len(drawn):
            legend.append(Legend("other runs, in their optimizer's colour", "faint"))
        rows = curve_rows({line.label: line.series for line in front})
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def _mark(colours: Colours, optimizer: str) -> str:
    return "dashed" if colours[optimizer][1] else "line"


def _cut(axes: Axes, lines: Sequence[Line]) -> float:
    """Shows where the runs differ: from the lowest loss to where the best were after a fifth of their way.

    A curve of a few points is shown whole.
    """
    low = min(min(line.series[1]) for line in lines)
    leading = [line for line in lines if line.front] or list(lines)
    early = []
    for line in leading:
        xs, ys = line.series
        after = next((y for x, y in zip(xs, ys, strict=True) if x >= 0.2 * xs[-1]), ys[0])
        early.append(after if len(xs) >= _FEW_POINTS else max(ys))
    top = max(early)
    room = 0.05 * (top - low) or 0.05
    axes.set_ylim(low - room, top + room)
    return top + room


@dataclass(frozen=True)
class Response:
    """How the final loss answers to one swept number.

    Attributes:
        key: identifier.
        title: heading.
        label: of the x axis.
        points: optimizer to value and cell, one best cell for each value.
        log: whether the x axis is logarithmic.
        thing: what the number is called: ``rate``.
        narrowed: whether other settings were swept too, so that each point is the best of them.
    """

    key: str
    title: str
    label: str
    points: Mapping[str, Sequence[tuple[float, Cell]]]
    log: bool
    thing: str
    narrowed: bool


def response(what: Response, colours: Colours) -> Figure:
    """Final loss against a swept number: means with their spread, rings at the best, crosses where it diverged."""
    with sheet(what.key) as page:
        finished = [cell for points in what.points.values() for _, cell in points if cell.n]
        crosses: list[tuple[float, str]] = []
        for name, points in what.points.items():
            crosses += [(value, name) for value, cell in points if cell.diverged]
            _branch(page.axes, sorted((p for p in points if p[1].n), key=lambda p: p[0]), colours[name])
        _loss_axis(page.axes, finished)
        top = page.axes.get_ylim()[1]
        for value, name in crosses:
            page.axes.plot([value], [top], color=hexadecimal(colours[name][0]), marker="x", markersize=8, clip_on=False)
        _x_axis(page, what)
        page.label(what.label, "final validation loss, nats per token")
        caption = _response_caption(what, bool(crosses), top)
        legend = [Legend(name, colours[name][0], _mark(colours, name)) for name in what.points]
        header = (what.label, "optimizer", "final loss", "n", "outcome")
        rows = tuple(
            (q.trimmed(value, 4), name, loss_of(cell), q.integer(cell.n), counted(cell.jobs))
            for name, points in what.points.items()
            for value, cell in sorted(points, key=lambda point: point[0])
        )
        svg = page.svg(f"{what.title}. {caption}")
        return Figure(what.key, what.title, svg, caption, tuple(legend), header, rows)


def _branch(axes: Axes, points: Sequence[tuple[float, Cell]], colour: tuple[str, bool]) -> None:
    if not points:
        return
    hue, dashed = hexadecimal(colour[0]), colour[1]
    xs, means = [value for value, _ in points], [cell.mean for _, cell in points]
    axes.plot(xs, means, color=hue, linestyle=_DASHES if dashed else "-", marker="o", markersize=5)
    for value, cell in points:
        if cell.std:
            axes.plot([value] * 2, [cell.mean - cell.std, cell.mean + cell.std], color=hue, linewidth=1.4)
        if cell.n > 1:
            axes.plot([value] * cell.n, cell.losses, color=hue, linestyle="", marker="o", markersize=2.5, alpha=0.6)
    best = min(range(len(means)), key=means.__getitem__)
    axes.plot([xs[best]], [means[best]], color=hue, marker="o", markersize=11, markerfacecolor="none", linewidth=0)


def _loss_axis(axes: Axes, cells: Sequence[Cell]) -> None:
    means = sorted(cell.mean for cell in cells)
    top = _highest_shown(means)
    room = 0.12 * (top - means[0]) or 0.05
    lowest = min(min(cell.losses) for cell in cells)
    axes.set_ylim(min(means[0], lowest) - room, top + room)


def _highest_shown(means: Sequence[float]) -> float:
    """One run gone wrong must not flatten the others; three quarters of them are always shown. ``means`` ascend."""
    spread = means[math.ceil(0.75 * (len(means) - 1))] - means[0]
    return min(means[-1], means[0] + max(3 * spread, 0.5))


def _x_axis(page: Sheet, what: Response) -> None:
    values = sorted({value for points in what.points.values() for value, _ in points})
    page.axes.margins(x=0.06)
    page.ticks()
    if not what.log:
        return
    page.axes.set_xscale("log")
    low, high = values[0], values[-1]
    margin = (high / low) ** 0.06 if high > low else 1.5
    page.axes.set_xlim(low / margin, high * margin)
    page.ticks()
    page.axes.xaxis.set_minor_locator(NullLocator())
    page.axes.xaxis.set_minor_formatter(NullFormatter())
    # the values that were run are the ticks, as long as they leave room for their labels
    if all(later / earlier >= (high / low) ** 0.13 for earlier, later in pairwise(values)):
        page.axes.xaxis.set_major_locator(FixedLocator(values))
    else:
        page.axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 3) if high / low < 1000 else (1,), numticks=8))


def _response_caption(what: Response, crossed: bool, top: float) -> str:
    words = ["Each point is a setting at the end of its schedule; a ring marks the best of each optimizer."]
    cells = [cell for points in what.points.values() for _, cell in points]
    if any(cell.n > 1 for cell in cells):
        words.append("Points are means over seeds, bars one standard deviation each way.")
    if what.narrowed:
        words.append("Other settings were swept too: each point is the best of them at that value.")
    if crossed:
        words.append("Crosses at the top: every run there diverged.")
    if any(cell.n and cell.mean > top for cell in cells):
        words.append(f"Losses above {q.number(top, 3)} are cut off; the table has them.")
    return " ".join(words)


def edge_words(what: Response, name: str) -> str:
    """Where the best value of one optimizer lies in its grid."""
    where = edge(what.points[name])
    if where is None:
        return "no run finished"
    if where.side == "only":
        return "one value tried: not tuned"
    if where.side:
        return f"at the {where.side} edge of the grid: widen it"
    return "inside the grid"


def all_losses(key: str, standings: Sequence[Standing], colours: Colours) -> Figure:
    """The final loss of every setting, a row of dots for each optimizer: how much tuning mattered."""
    shown = [standing for standing in standings if standing.best]
    means = sorted(cell.mean for standing in shown for cell in standing.cells if cell.n)
    right = _highest_shown(means)
    room = 0.06 * (right - means[0]) or 0.05
    beyond = 0
    with sheet(key, left=_room(shown), right=24) as page:
        axes = page.axes
        for place, standing in enumerate(shown):
            hue = hexadecimal(colours[standing.optimizer][0])
            seen = [cell.mean for cell in standing.cells if cell.n and cell.mean <= right]
            off = [cell for cell in standing.cells if cell.diverged or (cell.n and cell.mean > right)]
            beyond += len(off)
            axes.plot(seen, [place] * len(seen), color=hue, linestyle="", marker="o", markersize=7, alpha=0.55)
            best = standing.cells[0]
            if best.std:
                axes.plot([best.mean - best.std, best.mean + best.std], [place] * 2, color=hue, linewidth=2)
            axes.plot([best.mean], [place], color=hue, marker="o", markersize=9)
            if off:
                axes.plot([right + room], [place], color=hue, marker=5, markersize=8, clip_on=False)
        axes.set_yticks(range(len(shown)), [standing.optimizer for standing in shown])
        axes.tick_params(axis="y", labelcolor=hexadecimal("ink"), pad=9)
        axes.set_ylim(max(len(shown), 3) - 0.4, -0.6)
        axes.set_xlim(means[0] - room, right + room)
        labels = axes.get_yticklabels()
        page.ticks()
        axes.set_yticks(range(len(shown)), [label.get_text() for label in labels])
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        page.label("final validation loss, nats per token", "")
        caption = (
            "One dot for each setting, the best of each optimizer in full colour: a long row is a rule to tune well."
        )
        if any(standing.cells[0].std for standing in shown):
            caption += " Bars are one standard deviation between seeds each way."
        if beyond:
            caption += f" Arrows: {beyond} {'setting' if beyond == 1 else 'settings'} further right or diverged."
        header = ("optimizer", "settings finished", "diverged", "best", "median", "worst")
        title = "Every setting's final loss"
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, (), header, tuple(map(_row, shown)))


def _room(standings: Sequence[Standing]) -> int:
    """Room for the longest name, at about 7.5 units a letter."""
    return min(170, 24 + math.ceil(7.5 * max(len(standing.optimizer) for standing in standings)))


def _row(standing: Standing) -> tuple[str, ...]:
    cells = [cell for cell in standing.cells if cell.n]
    middle = cells[(len(cells) - 1) // 2]
    diverged = sum(cell.diverged for cell in standing.cells)
    ends = (loss_of(cells[0]), loss_of(middle), loss_of(cells[-1]))
    return (standing.optimizer, q.integer(len(cells)), q.integer(diverged), *ends)
