"""Final loss against what it cost: who is beaten in both, and who is not (the Pareto front)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import Figure, Legend, sheet
from lightning_opt.reports.figures import time_label, unit_of
from lightning_opt.reports.ranking import Cell
from lightning_opt.reports.style import hexadecimal

UNRANKED = "Runs of unequal data, tokens or schedule: neither ways nor ends may be ranked."


@dataclass(frozen=True)
class Spot:
    """A setting with its final loss and its cost.

    Attributes:
        optimizer: whose colour it takes.
        label: what names it.
        cost: what it took, in any unit.
        loss: mean final loss, nats per token.
        std: of the loss between seeds; None for one seed.
    """

    optimizer: str
    label: str
    cost: float
    loss: float
    std: float | None = None


def spots(cells: Sequence[Cell], key: str, label: Callable[[Cell], str]) -> list[Spot]:
    """The settings that have a final loss and measured this cost, in the mean over their finished runs.

    Args:
        cells: the settings.
        key: of the summary: ``seconds``, ``peak_memory_bytes``.
        label: what to call a setting.
    """
    found = []
    for cell in cells:
        costs = [cost for job in cell.finished if (cost := q.finite(job.run.summary.get(key)))]
        if costs and len(costs) == len(cell.finished):
            found.append(Spot(cell.best.optimizer, label(cell), fmean(costs), cell.mean, cell.std))
    return found


def front(found: Sequence[Spot]) -> list[Spot]:
    """Those that no other beats in one of cost and loss without losing in the other, cheapest first."""
    kept: list[Spot] = []
    for spot in sorted(found, key=lambda one: (one.cost, one.loss)):
        if not kept or spot.loss < kept[-1].loss:
            kept.append(spot)
    return kept


def memory(key: str, found: Sequence[Spot], colours: Mapping[str, tuple[str, bool]], *, ranked: bool = True) -> Figure:
    """Final loss against peak memory, in the binary unit that suits it; with the front where losses may be ranked."""
    top = max(spot.cost for spot in found)
    unit, divisor = ("GiB", 2**30) if top >= 2**30 else ("MiB", 2**20)
    title, label = "Final loss against peak memory", f"peak memory of one device, {unit}"
    return _figure(key, title, label, found, divisor, colours, q.size, ranked)


def time(key: str, found: Sequence[Spot], colours: Mapping[str, tuple[str, bool]], *, ranked: bool = True) -> Figure:
    """Final loss against training time; with the front where losses may be ranked."""
    label = time_label([spot.cost for spot in found])
    return _figure(key, "Final loss against time", label, found, unit_of(label), colours, q.duration, ranked)


def _figure(
    key: str,
    title: str,
    label: str,
    found: Sequence[Spot],
    divisor: float,
    colours: Mapping[str, tuple[str, bool]],
    show: Callable[[float], str],
    ranked: bool,
) -> Figure:
    best = front(found) if ranked else []
    with sheet(key) as page:
        axes = page.axes
        xs, ys = [spot.cost / divisor for spot in best], [spot.loss for spot in best]
        axes.plot(xs, ys, color=hexadecimal("faint"), linewidth=1.6, drawstyle="steps-post", zorder=1)
        for spot in found:
            hue, x = hexadecimal(colours[spot.optimizer][0]), spot.cost / divisor
            if spot.std:
                axes.plot([x, x], [spot.loss - spot.std, spot.loss + spot.std], color=hue, linewidth=1.4, alpha=0.7)
            dashed = colours[spot.optimizer][1]
            axes.plot([x], [spot.loss], color=hue, marker="D" if dashed else "o", markersize=7, linewidth=0, zorder=3)
            if spot in best:
                axes.plot([x], [spot.loss], color=hue, marker="o", markersize=13, markerfacecolor="none", linewidth=0)
        axes.margins(x=0.08, y=0.1)
        page.ticks()
        page.label(label, "final loss, nats per token")
        caption = "Rings: no other setting is both lower and cheaper. " if ranked else f"{UNRANKED} "
        caption += (
            "Bars: one standard deviation between seeds each way."
            if any(s.std for s in found)
            else ("One run each: small gaps show no order.")
        )
        used = dict.fromkeys(spot.optimizer for spot in found)
        marks = {name: "diamond" if colours[name][1] else "dot" for name in used}
        legend = tuple(Legend(name, colours[name][0], mark) for name, mark in marks.items())
        legend += (Legend("the front", "faint"),) if ranked else ()
        rows = tuple(
            (
                spot.label,
                show(spot.cost),
                q.number(spot.loss, 5),
                *(("yes" if spot in best else "no",) if ranked else ()),
            )
            for spot in sorted(found, key=lambda one: one.cost)
        )
        header = ("setting", "cost", "final loss", *(("on the front",) if ranked else ()))
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, header, rows)
