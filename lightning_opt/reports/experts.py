"""The report's part about experts: who did how much over the run, as a picture and in words."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import HEIGHT, Figure, Legend, sheet, tick
from lightning_opt.reports.figures import CURVE_HEADER, curve_rows
from lightning_opt.reports.reading import Series
from lightning_opt.reports.series import sparkline, thin
from lightning_opt.reports.style import hexadecimal
from lightning_opt.reports.tables import Table

_MOST_ROWS = 128  # of the picture
_MOST_COLUMNS = 48
_SHADES = 4  # of each of the two colours


@dataclass(frozen=True)
class ExpertHistory:
    """What ``expert_load.npz`` holds.

    Attributes:
        steps: int (n,), optimizer steps, rising.
        counts: int (n, layers, E), tokens per expert in that step; 0 beyond a layer's experts.
        experts: int (layers,), experts of each layer.
        top_k: int (layers,), experts per token, 0 where it is not known.
        layers: names of the layers.
    """

    steps: np.ndarray
    counts: np.ndarray
    experts: np.ndarray
    top_k: np.ndarray
    layers: list[str]


def read_history(path: pathlib.Path) -> ExpertHistory | None:
    """Reads the file; None where there is none, or nothing in it.

    Raises:
        ValueError: it is not what the load monitor writes.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["layers"]]
            found = ExpertHistory(*(file[key] for key in ("steps", "counts", "experts", "top_k")), names)
    except (BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path.name} is not the load monitor's: {error}") from error
    if found.counts.ndim != 3 or found.counts.shape[:2] != (len(found.steps), len(names)):
        raise ValueError(f"{path.name} is not the load monitor's: its arrays do not fit")
    return found if len(found.steps) else None


def relative_load(history: ExpertHistory) -> list[np.ndarray]:
    """Tokens of each expert over the mean of its layer in that step: (n, E) for each layer, 0 without tokens."""
    found = []
    for layer, size in enumerate(history.experts):
        counts = history.counts[:, layer, :size].astype(float)
        found.append(counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-300))
    return found


def heat_map(key: str, history: ExpertHistory) -> Figure:
    """Load of every expert of every layer over the run; of too many, each layer's from its hottest to its coldest.

    Args:
        key: identifier.
        history: what was counted.
    """
    loads = relative_load(history)
    ranked = sum(history.experts) > _MOST_ROWS
    rows = [_ranked(load, max(3, _MOST_ROWS // len(loads))) if ranked else load for load in loads]
    times = [part for part in np.array_split(np.arange(len(history.steps)), _MOST_COLUMNS) if len(part)]
    levels = np.stack([np.concatenate(rows, axis=1)[part].mean(axis=0) for part in times], axis=1) - 1
    levels = np.clip(np.round(levels * _SHADES), -_SHADES, _SHADES).astype(int)
    with sheet(key, left=72) as page:
        thickness = page.axes.get_position().height * HEIGHT / len(levels)
        for level in sorted(set(levels.ravel()) - {0}):
            colour = hexadecimal("indigo" if level > 0 else "bad")
            patch = PathPatch(_stripes(levels == level), fill=False, edgecolor=colour, linewidth=thickness)
            patch.set(alpha=abs(level) / _SHADES, capstyle="butt")
            page.axes.add_patch(patch)
        page.axes.set(xlim=(0, len(times)), ylim=(len(levels), 0))
        _name_places(page.axes, [row.shape[1] for row in rows], [int(history.steps[part[-1]]) for part in times])
        page.label("step", "experts of each layer" + (", hottest first" if ranked else ""))
        order = "A layer's rows are its experts from the hottest to the coldest of that time" if ranked else ""
        caption = (
            f"{order or 'Each row is an expert'}, each column a time. Blue: more tokens than its share, up to twice as "
            "many or more; blank: its share; red: fewer, or none. Rows that stay red are experts that learn nothing."
        )
        legend = (Legend("more than its share", "indigo", "area"), Legend("fewer, or none", "bad", "area"))
        header, numbers = _numbers(history, loads)
        return Figure(key, "Load of each expert", page.svg(caption), caption, legend, header, numbers)


def _ranked(load: np.ndarray, rows: int) -> np.ndarray:
    """(n, E) to (n, rows): quantiles from the largest to the smallest, both included."""
    return np.quantile(load, np.linspace(1, 0, min(rows, load.shape[1])), axis=1).T


def _name_places(axes: Axes, sizes: list[int], steps: list[int]) -> None:
    """Names layers and steps, and draws a line between layers."""
    axes.grid(visible=False)
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        axes.axhline(end, color=hexadecimal("faint"), linewidth=0.8 if len(sizes) < 13 else 0.4)
    chosen = range(0, len(sizes), -(-len(sizes) // 12))
    axes.set_yticks([ends[i] - sizes[i] / 2 for i in chosen], [f"layer {i + 1}" for i in chosen])
    places = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks([place + 0.5 for place in places], [tick(steps[place]) for place in places])


def _stripes(cells: np.ndarray) -> Path:
    """One line for each run of marked cells in a row, along its middle: much smaller than as many boxes."""
    padded = np.pad(cells, ((0, 0), (1, 1))).astype(int)
    points = []
    for row, changes in enumerate(np.diff(padded, axis=1)):
        for start, end in zip(np.flatnonzero(changes == 1), np.flatnonzero(changes == -1), strict=True):
            points += [(start, row + 0.5), (end, row + 0.5)]
    path = Path(points, [Path.MOVETO, Path.LINETO] * (len(points) // 2))
    path.should_simplify = False
    return path


def _numbers(history: ExpertHistory, loads: list[np.ndarray]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """One row per layer: how uneven it was at the first and last look, and the shape between."""
    rows = []
    for number, load in enumerate(loads):
        cv = load.std(axis=1)
        first, last = (q.number(float(value), 3) for value in (cv[0], cv[-1]))
        extremes = f"{q.number(float(load[-1].min()), 3)} to {q.number(float(load[-1].max()), 3)}"
        rows.append((f"layer {number + 1}", first, last, extremes, sparkline([float(value) for value in cv])))
    return ("layer", "CV at the start", "CV at the end", "coldest to hottest at the end", "shape of the CV"), tuple(
        rows
    )


def load_table(history: ExpertHistory) -> Table:
    """The last step that was looked at, layer by layer."""
    body = []
    for number, (name, size) in enumerate(zip(history.layers, history.experts, strict=True)):
        counts = history.counts[-1, number, :size].astype(float)
        mean = counts.mean()
        cv = counts.std() / mean if mean else float("nan")
        floor = np.sqrt((size - max(1, history.top_k[number])) / counts.sum()) if mean else float("nan")
        body.append(
            (
                name,
                q.integer(int(size)),
                q.number(float(cv), 3),
                q.number(float(floor), 2),
                q.number(float(counts.max() / mean - 1) if mean else None, 3),
                q.number(float(counts.min() / mean) if mean else None, 3),
                q.integer(int((counts == 0).sum())),
                q.number(float(1 / (1 + cv**2)), 3),
            )
        )
    header = ("layer", "experts", "CV", "by chance", "MaxVio", "coldest / mean", "without a token", "Jain index")
    note = (
        f"Of step {int(history.steps[-1]):,}, all its tokens. CV is standard deviation over mean: lower is better, "
        "and what chance alone gives stands beside it. The Jain index, 1 / (1 + CV²), is higher where it is better."
    )
    return Table("expert-load", "Load by layer at the end", header, tuple(body), frozenset(range(1, 8)), (), note)


def unevenness(key: str, curves: Mapping[str, Series], limit: float | None) -> Figure:
    """CV of the load over the run beside what chance gives, and the limit of the alarm.

    Args:
        key: identifier.
        curves: ``mean``, ``worst`` and ``chance``, where they were logged.
        limit: the alarm's, None where it is not known.
    """
    words = {"mean": "mean of the layers", "worst": "worst layer", "chance": "what chance alone gives"}
    colours = {"mean": "blue", "worst": "indigo", "chance": "faint"}
    with sheet(key) as page:
        for name, series in curves.items():
            page.axes.plot(*thin(series, 300), color=hexadecimal(colours[name]), linewidth=1.6)
        legend = [Legend(words[name], colours[name]) for name in curves]
        if limit is not None:
            page.axes.axhline(limit, color=hexadecimal("bad"), linewidth=1.2, linestyle=(0, (5, 4)))
            legend.append(Legend(f"alarm over {q.trimmed(limit)}", "bad", "dashed"))
        page.axes.set_ylim(bottom=0)
        page.axes.margins(x=0.01)
        page.ticks()
        page.label("step", "CV of the load: std / mean")
        caption = "How unevenly the tokens of a step are spread: 0 is even. Below the line of chance nothing can be."
        rows = curve_rows({words[name]: series for name, series in curves.items()})
        return Figure(key, "Unevenness", page.svg(caption), caption, tuple(legend), CURVE_HEADER, rows)
