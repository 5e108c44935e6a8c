"""Pictures of optimizers on small problems: paths over a surface's contours, and scores by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

from lightning_opt.reports.canvas import Figure, Legend, Sheet, sheet
from lightning_opt.reports.style import hexadecimal

Surface = Callable[[Any, Any], Any]
Colours = Mapping[str, tuple[str, bool]]
_GRID = 240
_LEVELS = 18


def paths(
    key: str,
    title: str,
    caption: str,
    surface: Surface,
    box: tuple[float, float, float, float],
    walks: Mapping[str, np.ndarray],
    goals: Sequence[tuple[float, float]],
    colours: Colours,
    *,
    png: Path | None = None,
) -> Figure:
    """Paths over log contours.

    Args:
        key: identifier in the page.
        title: what is shown.
        caption: what to read from it.
        surface: height over arrays x and y.
        box: left, right, bottom and top of what is drawn.
        walks: name of each optimizer to its points ``[steps + 1, 2]``.
        goals: minima, drawn as stars.
        colours: of every optimizer, from `optimizer_colours` over all that the page shows.
        png: the same drawing is written there too, on white.
    """
    with sheet(key, left=40) as drawn:
        _contours(drawn, surface, box)
        for place, (name, points) in enumerate(walks.items()):
            colour, dashed = colours[name]
            ink, line = hexadecimal(colour), "--" if dashed else "-"
            width = 1 + 1.6 * (1 - place / max(1, len(walks) - 1))  # later paths do not hide earlier ones
            drawn.axes.plot(*points.T, line, color=ink, linewidth=width, label=name, zorder=3)
            drawn.axes.plot(*points[-1], "o", color=ink, markersize=6, zorder=4)
        first = next(iter(walks.values()))[0]
        drawn.axes.plot(*first, "s", color=hexadecimal("ink"), markersize=6, zorder=4)
        for goal in goals:
            drawn.axes.plot(*goal, "*", color=hexadecimal("ink"), markersize=11, zorder=4)
        drawn.axes.set(xlim=box[:2], ylim=box[2:])
        drawn.axes.grid(False)
        for axis in (drawn.axes.xaxis, drawn.axes.yaxis):  # the two lowest would meet in the corner
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], prune="lower"))
        if png is not None:
            _write_png(drawn, png, title)
        drawn.label("x", "y")
        svg = drawn.svg(f"{title}: paths of {', '.join(walks)} over contours of the surface")
    legend = tuple(Legend(name, colours[name][0], "dashed" if colours[name][1] else "line") for name in walks)
    rows = tuple((name, *(f"{value:.4g}" for value in points[-1])) for name, points in walks.items())
    return Figure(key, title, svg, caption, legend, ("optimizer", "x at the end", "y at the end"), rows)


def _contours(drawn: Sheet, surface: Surface, box: tuple[float, float, float, float]) -> None:
    """Lines of equal height, their distances from the lowest point spaced evenly by logarithm."""
    x, y = np.meshgrid(np.linspace(*box[:2], _GRID), np.linspace(*box[2:], _GRID))
    height = surface(x, y)
    height = height - height.min()
    levels = np.geomspace(max(height.max() * 1e-4, 1e-3), height.max(), _LEVELS)
    drawn.axes.contour(x, y, height, levels=levels, colors=hexadecimal("faint"), linewidths=0.7, zorder=1)


def scores(
    key: str,
    title: str,
    caption: str,
    label: str,
    curves: Mapping[str, tuple[float, np.ndarray]],
    colours: Colours,
    floor: float = 0.0,
) -> Figure:
    """Score by step, on a logarithmic axis.

    Args:
        key: identifier in the page.
        title: what is shown.
        caption: what to read from it.
        label: what the score is.
        curves: name of each optimizer to its rate and its scores, the first before any step.
        colours: as for `paths`.
        floor: the smallest possible score, which is subtracted.
    """
    with sheet(key) as drawn:
        drawn.axes.set_yscale("log")
        for name, (_, values) in curves.items():
            colour, dashed = colours[name]
            drawn.axes.plot(np.maximum(values - floor, 1e-12), "--" if dashed else "-", color=hexadecimal(colour))
        drawn.ticks()
        drawn.label("step", label)
        svg = drawn.svg(f"{title}: {label} of {', '.join(curves)} by step")
    legend = tuple(Legend(name, colours[name][0], "dashed" if colours[name][1] else "line") for name in curves)
    rows = tuple((name, f"{rate:.3g}", f"{values[-1] - floor:.4g}") for name, (rate, values) in curves.items())
    return Figure(key, title, svg, caption, legend, ("optimizer", "rate", f"{label} at the end"), rows)


def _write_png(drawn: Sheet, path: Path, title: str) -> None:
    """The drawing with what the page says around it: title, names and legend; taken off again."""
    before = drawn.axes.get_position()
    drawn.axes.set_position((0.12, 0.14, 0.84, 0.76))
    drawn.axes.set_xlabel("x", labelpad=2)
    drawn.axes.set_ylabel("y", rotation=0, labelpad=6)
    drawn.drawing.patch.set(visible=True, facecolor="white")
    drawn.axes.set_title(title, fontsize=13)
    legend = drawn.axes.legend(loc="lower right", fontsize=10, framealpha=0.9)
    drawn.drawing.set_dpi(160)
    canvas = drawn.drawing.canvas
    FigureCanvasAgg(drawn.drawing).print_png(path)
    drawn.drawing.set_canvas(canvas)
    drawn.drawing.set_dpi(72)
    drawn.drawing.patch.set_visible(False)
    legend.remove()
    drawn.axes.set(title="", xlabel="", ylabel="")
    drawn.axes.set_position(before)
