"""Article 1's decision matrix, filled from measured cells alone.

Its questions are those that the article weighs its optimizers by ("GLM-4.5-Air: AdamW vs Lion", blog.csdn.net/
gitblog_00403, article 151599122; the rows of `recipes/glm45_air_adamw_vs_lion`): memory, speed of the update,
convergence, stability, balance of experts, knowledge and code, large batches, its setting for code, its staged run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lightning_opt.reports import quantities as q
from lightning_opt.reports.study_material import Material, name_of
from lightning_opt.reports.study_responses import BATCH, RATE, cost_of
from lightning_opt.reports.tables import Table

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell

Answer = Callable[[Material, str], str]


def matrix(about: Material) -> Table:
    """One row for each question, one column for each optimizer."""
    body = tuple(
        (what, question, *(answer(about, name) for name in about.optimizers)) for what, question, answer in _ROWS
    )
    header = ("what is scarce", "what was asked", *map(name_of, about.optimizers))
    note = (
        f"Means over the cells that both the optimizer and {name_of(about.baseline)} have, their number in brackets: "
        "columns of different numbers are of different cells, and no fair pair. Speed-ups are of the data that the "
        "baseline's law was fitted to. Nothing here is taken from the article or from anybody's expectation."
    )
    return Table("matrix", "", header, body, frozenset(), (), note)


def _cells(about: Material, name: str) -> list[Cell]:
    return [cell for cell in about.results.losses if cell.optimizer == name and about.losses(cell)]


def _over(values: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(fmean(values))} ({len(values)})" if values else q.NOT_MEASURED


def _against_baseline(about: Material, name: str, measure: Callable[[Cell], float | None]) -> list[tuple[float, float]]:
    """The optimizer's and the baseline's value in every place where both have one."""
    pairs = []
    for cell in _cells(about, name):
        base = about.cell(about.baseline, (cell.params, cell.chinchilla))
        mine, theirs = measure(cell), measure(base) if base is not None else None
        if mine is not None and theirs is not None:
            pairs.append((mine, theirs))
    return pairs


def _loss(about: Material, name: str) -> str:
    gaps = [mine - theirs for mine, theirs in _against_baseline(about, name, about.mean)]
    return "baseline" if name == about.baseline and gaps else _over(gaps, lambda gap: f"{gap:+.4f} nats")


def _sped_up(by: str) -> Answer:
    def answer(about: Material, name: str) -> str:
        if name == about.baseline:
            return "baseline" if any(one.by == by and q.finite(one.value) for one in about.speedups) else q.NOT_MEASURED
        found = [about.speedup(cell, by) for cell in _cells(about, name) if _held_in(about, cell)]
        values = [value for one in found if one is not None and (value := q.finite(one.value)) is not None]
        return _over(values, lambda ratio: f"{q.number(ratio, 3)}×")

    return answer


def _held_in(about: Material, cell: Cell) -> bool:
    """Whether the baseline's law on the cell's model was fitted to as much data as the cell's, where it was fitted."""
    fits = (row for row in about.laws if (row.get("optimizer"), row.get("params")) == (about.baseline, cell.params))
    seen = [float(ratio) for row in fits for ratio in str(row.get("fit_points") or "").split(";") if ratio]
    return not seen or min(seen) <= cell.chinchilla <= max(seen)


def _ratio(measure: Callable[[Material, Cell], float | None]) -> Answer:
    def answer(about: Material, name: str) -> str:
        pairs = _against_baseline(about, name, lambda cell: measure(about, cell))
        if name == about.baseline:
            return "baseline" if pairs else q.NOT_MEASURED
        return _over([mine / theirs for mine, theirs in pairs if theirs], lambda ratio: f"{q.number(ratio, 3)}×")

    return answer


def _peak(about: Material, cell: Cell) -> float | None:
    values = about.results.peak_bytes.get(cell, ())
    return fmean(values) if values else None


def _measure(key: str) -> Callable[[Material, Cell], float | None]:
    def read(about: Material, cell: Cell) -> float | None:
        values = (about.facts.get("measures") or {}).get(cell, {}).get(key) or ()
        known = [value for value in values if q.finite(value) is not None]
        return fmean(known) if known else None

    return read


def _plain(key: str, show: Callable[[float], str]) -> Answer:
    read = _measure(key)

    def answer(about: Material, name: str) -> str:
        found = [value for cell in _cells(about, name) if (value := read(about, cell)) is not None]
        return _over(found, show)

    return answer


def _score(*tasks: str) -> Answer:
    def answer(about: Material, name: str) -> str:
        values = [fmean(found) for cell in _cells(about, name) for task in tasks if (found := about.score(cell, task))]
        return _over(values, lambda value: f"{value:.3f}")

    return answer


def _change(keys: tuple[str, ...], factor: float, show: Callable[[Sequence[float]], str]) -> Answer:
    def answer(about: Material, name: str) -> str:
        cells = dict.fromkeys(cell for cell in (*about.tried, *about.results.tuning) if cell.optimizer == name)
        return show([rise for cell in cells if (rise := cost_of(about, cell, keys, factor)) is not None])

    return answer


def _risen(rises: Sequence[float]) -> str:
    ended = [rise for rise in rises if math.isfinite(rise)]
    return "diverged" if rises and not ended else _over(ended, lambda rise: f"{rise:+.4f} nats")


def _ruined(rises: Sequence[float]) -> str:
    return f"{sum(map(math.isinf, rises))} of {len(rises)}" if rises else q.NOT_MEASURED


def _diverged(about: Material, name: str) -> str:
    spent = (about.facts.get("cost") or {}).get(name) or {}
    runs, lost = q.finite(spent.get("runs")), q.finite(spent.get("diverged"))
    return q.NOT_MEASURED if runs is None or lost is None else f"{lost:.0f} of {runs:.0f} runs"


def _never(about: Material, name: str) -> str:
    return q.NOT_MEASURED


_ROWS: tuple[tuple[str, str, Answer], ...] = (
    ("tokens", "final loss against the baseline's", _loss),
    ("tokens", "speed-up by tokens", _sped_up("tokens")),
    ("time", "speed-up by wall time", _sped_up("time")),
    ("time", "time of an update against the baseline's", _ratio(_measure("optimizer_ms"))),
    ("memory", "peak memory against the baseline's", _ratio(_peak)),
    ("memory", "optimizer's state against the baseline's", _ratio(_measure("optimizer_state_bytes"))),
    ("memory", "speed-up by memory", _sped_up("memory")),
    ("stability", "diverged while it was tuned", _diverged),
    ("stability", "loss volatility", _plain("loss_volatility", lambda value: q.number(value, 3))),
    ("stability", "change of the gradient norm", _plain("grad_norm_change", lambda value: q.number(value, 3))),
    ("stability", "twice the tuned rate costs", _change(RATE, 2.0, _risen)),
    ("stability", "twice the tuned rate diverges", _change(RATE, 2.0, _ruined)),
    ("large batches", "four times the tuned batch costs", _change(BATCH, 4.0, _risen)),
    ("large batches", "four times the tuned batch diverges", _change(BATCH, 4.0, _ruined)),
    ("experts", "unevenness of their load (CV)", _plain("expert_load_cv", lambda value: q.number(value, 3))),
    ("common sense", "HellaSwag", _score("hellaswag", "hellaswag_0shot")),
    ("knowledge", "MMLU", _score("mmlu")),
    ("code", "HumanEval", _score("humaneval")),
    ("code", "decay 0.015, the article's for code", _never),
    ("stages", "Lion, AdamW, Lion in one run", _never),
)
