"""A study's verdict as CSV, for other programs."""

from __future__ import annotations

import csv
import io
from statistics import stdev
from typing import TYPE_CHECKING, Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports.study_duels import UNTESTED, judged, test
from lightning_opt.reports.study_material import BY, Material

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell

_HEADER = (
    "optimizer",
    "params",
    "chinchilla",
    "n",
    "loss",
    "std",
    "gap_to_lowest",
    "p_lowest_is_better",
    "gap_to_baseline",
    "p_better_than_baseline",
    "against_baseline",
)


def as_csv(about: Material) -> str:
    """A row for each cell, plain numbers, empty where nothing was measured."""
    tasks = list(dict.fromkeys(task for found in about.results.scores.values() for task in found))
    header = [*_HEADER]
    header += [f"speedup_{by}{part}" for by in BY for part in ("", "_low", "_high", "_note")]
    header += [*tasks, "seconds", "peak_bytes"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for place in about.places:
        ranked = about.cells_at(place)
        diverged = [c for c in about.results.losses if (c.params, c.chinchilla) == place and c not in ranked]
        for cell in (*ranked, *diverged):
            row = [*_standing(about, cell, ranked), *_sped(about, cell)]
            row += [_mean(about.score(cell, task)) for task in tasks]
            row += [_mean(about.results.seconds.get(cell)), _mean(about.results.peak_bytes.get(cell))]
            writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _standing(about: Material, cell: Cell, ranked: list[Cell]) -> list[Any]:
    values = about.losses(cell)
    named = [cell.optimizer, cell.params, f"{cell.chinchilla:g}", len(values)]
    if not values:
        return [*named, *[None] * (len(_HEADER) - len(named) - 1), "diverged"]
    mean, first = about.mean(cell), ranked[0]
    base = about.cell(about.baseline, (cell.params, cell.chinchilla))
    lead = test(about, first, cell) if cell != first else None
    beats = test(about, cell, base) if base and cell != base else None
    told = "" if base is None else "baseline" if cell == base else judged(about, cell, base)
    return [
        *named,
        mean,
        stdev(values) if len(values) > 1 else None,
        mean - about.mean(first),
        lead.p if lead else None,
        mean - about.mean(base) if base and cell != base else None,
        beats.p if beats else None,
        told or UNTESTED,
    ]


def _sped(about: Material, cell: Cell) -> list[Any]:
    row: list[Any] = []
    for by in BY:
        one = about.speedup(cell, by)
        row += [None] * 4 if one is None else [q.finite(one.value), q.finite(one.low), q.finite(one.high), one.note]
    return row


def _mean(values: tuple[float, ...] | None) -> float | None:
    return sum(values) / len(values) if values else None
