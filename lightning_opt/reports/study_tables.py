"""Tables of a comparison study: optimizers down, cells across, and what each cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports.scores import TITLES
from lightning_opt.reports.study_material import BY, Material, Place, as_key, name_of, place_name, spread
from lightning_opt.reports.tables import Table

if TYPE_CHECKING:
    from lightning_opt.study.hyper_laws import HyperLaw
    from lightning_opt.study.results import Cell
    from lightning_opt.study.speedups import SpeedUp

_ABSENT = "–"


def losses(about: Material) -> Table:
    """Final loss of every cell, mean ± standard deviation between seeds."""
    lowest = {place: cells[0] for place in about.places if (cells := about.cells_at(place))}

    def text(cell: Cell, place: Place) -> str:
        found, lost = about.losses(cell), about.lost(cell)
        words = spread(found) if found else "diverged"
        words += f" ({lost} of {lost + len(found)} diverged)" if found and lost else ""
        return f"{words} ▾" if cell == lowest.get(place) else words

    counts = ", ".join(f"{count}" for count in sorted({len(found) for found in about.results.losses.values()}))
    note = (
        f"Nats per token at the end of the schedule; seeds per cell: {counts}. ▾ is the lowest of its column, which "
        "alone does not make it better: see what is beyond noise. – was not run."
    )
    cells = dict.fromkeys(about.results.losses)
    return _across(about, "losses", "", text, note, cells)


def _across(
    about: Material,
    key: str,
    title: str,
    text: Callable[[Cell, Place], str],
    note: str,
    cells: Mapping[Cell, Any],
    without: str = "",
) -> Table:
    """A row for each optimizer, a column for each place; cells that are not there are a dash."""
    known = {(cell.optimizer, cell.params, cell.chinchilla): cell for cell in cells}
    places = [place for place in about.places if any((cell.params, cell.chinchilla) == place for cell in cells)]
    names = [name for name in about.optimizers if name != without and any(cell.optimizer == name for cell in cells)]
    body = tuple(
        (name_of(name), *(text(cell, place) if (cell := known.get((name, *place))) else _ABSENT for place in places))
        for name in names
    )
    swatches = tuple(about.colours[name_of(name)][0] for name in names)
    header = ("optimizer", *map(place_name, places))
    return Table(key + about.suffix, title, header, body, frozenset(range(1, len(header))), swatches, note)


def speedups(about: Material, by: str) -> tuple[Table, ...]:
    """Speed-up over the baseline with its interval, or why there is none: a table for each model."""
    base = name_of(about.baseline)
    note = f"{_COUNTED[by].format(base=base)}, with the {q.percent(about.level)} interval. {_NOTES}"
    return _by_model(about, f"speedups-{by}", f"By {BY[by]}", [one for one in about.speedups if one.by == by], note)


def _by_model(about: Material, key: str, title: str, found: Sequence[SpeedUp], note: str) -> tuple[Table, ...]:
    tables = []
    for label in about.labels:
        words = {about.cell_of(one): speedup_words(one) for one in found if one.params == label}
        if words:
            name, last = as_key(f"{key}-{label}"), label == about.labels[-1]
            said = (f"{title}, {label}", lambda cell, _, words=words: words[cell], note if last else "")
            tables.append(_across(about, name, *said, words, about.baseline))
    return tuple(tables)


_COUNTED = {
    "tokens": "How many times the tokens {base} needs for the same final loss",
    "time": "How many times the seconds {base} needs for the same final loss, each at its own measured speed",
    "memory": "Bytes that {base} holds at its peak in the same cell for each byte of this optimizer",
}
_NOTES = (
    "Intervals hold the speed-ups that the losses allow at this noise. e: extrapolated, the baseline's law is read "
    "outside its own cells; i: interpolated between two cells, no law; undefined: no amount of data brings it so low."
)
MARKS = {"extrapolated": " e", "interpolated": " i"}
"""How tables and pictures mark a speed-up that is not read off the baseline's own range."""


def speedup_words(one: SpeedUp | None) -> str:
    """``1.41× (1.35 to 1.48)``, with its note or the mark of it; the note alone where there is no value."""
    if one is None:
        return q.NOT_MEASURED
    value = q.finite(one.value)
    if value is None:
        return f"{one.note or q.NOT_MEASURED}{interval_words(one.low, one.high)}"
    words = f"{q.number(value, 3)}×{interval_words(one.low, one.high)}"
    return f"{words}{MARKS[one.note]}" if one.note in MARKS else f"{words}, {one.note}" if one.note else words


def interval_words(low: float | None, high: float | None) -> str:
    """`` (1.35 to 1.48)``; open where an end is 0 or not finite, empty where there is no interval."""
    below, above = q.finite(low) or None, q.finite(high)
    if below and above:
        return f" ({q.number(below, 3)} to {q.number(above, 3)})"
    return f" (above {q.number(below, 3)})" if below else f" (below {q.number(above, 3)})" if above else ""


def refits(about: Material) -> tuple[Table, ...]:
    """The speed-ups by tokens with other ranges of the baseline's fit, where such were worked out."""
    usual = about.facts.get("fit") or "other ratios"
    note = (
        f"The same losses, the baseline fitted over another range of its cells than {usual}: a speed-up is only as "
        "certain as the law behind it."
    )
    tables: list[Table] = []
    for words, found in _refit(about):
        counted = [one for one in found if one.by == "tokens"]
        tables += _by_model(about, as_key(f"refit-{words}"), f"By tokens, fitted over {words} instead", counted, note)
    return tuple(tables)


def _refit(about: Material) -> Sequence[tuple[str, Sequence[SpeedUp]]]:
    found = about.facts.get("refit") or ()
    return tuple(found.items()) if isinstance(found, Mapping) else tuple(found)


def scores(about: Material, task: str) -> Table:
    """A task's score of every cell."""
    found = {cell: tasks[task] for cell, tasks in about.results.scores.items() if tasks.get(task)}

    def text(cell: Cell, _: Place) -> str:
        known = about.score(cell, task)
        return spread(known, 4) if known else " or ".join(f"{value:.4f}" for value in found[cell])

    note = "Share of right answers. Where two differ by less than the documents' own error, neither is better."
    if any(not about.score(cell, task) for cell in found):
        note += " “Or”: more scores than final losses, of runs that nothing tells apart; left out of every picture."
    return _across(about, f"score-{task.replace('_', '-')}", task_title(task), text, note, found)


def task_title(task: str) -> str:
    """A task as it is usually spelled."""
    plain = task.removesuffix("_0shot")
    return {"mean10": "Mean of the ten tasks"}.get(task) or TITLES.get(plain, plain)


def laws(about: Material) -> Table | None:
    """The loss laws behind the speed-ups."""
    if not about.laws:
        return None
    header = ("optimizer", "model", "ratios in the fit", "alpha", "exponent", "floor, nats")
    body = tuple(
        (
            name_of(str(row.get("optimizer"))),
            str(row.get("params")),
            str(row.get("fit_points") or _ABSENT).replace(";", ", "),
            *(_or_note(row, key) for key in ("alpha", "exponent", "floor")),
        )
        for row in about.laws
    )
    swatches = tuple(about.colours.get(row[0], ("grey", False))[0] for row in body)
    note = "Loss = alpha × ratio^−exponent + floor; a law through as many cells as it has numbers is exact, not tested."
    return Table(f"laws{about.suffix}", "Loss laws", header, body, frozenset({2, 3, 4, 5}), swatches, note)


def _or_note(row: Mapping[str, Any], key: str) -> str:
    return _ABSENT if q.finite(row.get(key)) is None else q.number(row.get(key), 4)


def hyper_laws(about: Material) -> Table | None:
    """The laws of tuned hyperparameters, each held against the setting that it did not see."""
    found = [one for one in about.facts.get("hyper_laws") or () if one[0] in about.optimizers]
    if not found:
        return None
    moving, constant = [], {}
    for one in found:
        optimizer, key, _, law = one
        if len({value for *_, value in law.points}) > 1:
            moving.append(one)
        else:
            constant.setdefault(name_of(optimizer), []).append(f"{key} {q.trimmed(law.constant)}")
    body = tuple((name_of(optimizer), key, str(cells), *_held(law)) for optimizer, key, cells, law in moving)
    swatches = tuple(about.colours[row[0]][0] for row in body)
    header = ("optimizer", "hyperparameter", "settings", "tuned in the last", "its law says", "missed by", "law")
    same = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in constant.items())
    note = f"The same in every setting, so that there is nothing to fit: {same}." if same else ""
    return Table(f"hyper-laws{about.suffix}", "", header, body, frozenset({2, 3, 4, 5}), swatches, note)


def _held(law: HyperLaw) -> tuple[str, str, str, str]:
    """Tuned value of the last setting, what the law says there, by how much that is off, the law."""
    numbers = (law.scale, law.by_size, law.by_ratio, law.constant)
    scale, size, ratio, rest = (_power(number, 3).replace("-", "\N{MINUS SIGN}") for number in numbers)
    words = f"{scale}·N^{size}·C^{ratio} + {rest}".replace("+ \N{MINUS SIGN}", "\N{MINUS SIGN} ")
    if law.held_out is None:
        return _ABSENT, _ABSENT, _ABSENT, words
    *last, tuned = law.points[-1]
    says = law(*last)
    return q.trimmed(tuned), q.number(says, 3), _missed(tuned, says), words


def _missed(tuned: float, says: float) -> str:
    """The relative error, as a factor where it is large; epsilons span orders of magnitude."""
    if not tuned:
        return _ABSENT
    off = says / tuned
    return q.percent(abs(off - 1)) if abs(off - 1) < 10 else f"{_power(off, 2)} times"


def _power(number: float, digits: int) -> str:
    """``3.49e86``: the numbers of a degenerate law would fill lines."""
    mantissa, _, exponent = f"{number:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def cost(about: Material) -> Table | None:
    """What tuning each optimizer took, and where the cap on it was hit."""
    found = about.facts.get("cost") or {}
    if not found:
        return None
    header = ("optimizer", "runs", "of these diverged", "tokens", "time", "hit the cap")
    body = []
    for name, spent in sorted(found.items(), key=lambda item: item[0] != about.baseline):
        seconds = spent.get("seconds")
        body.append(
            (
                name_of(name),
                q.integer(spent.get("runs")),
                q.integer(spent.get("diverged")),
                q.short(spent.get("tokens")),
                q.NOT_MEASURED if seconds is None else q.duration(seconds),
                _capped(spent.get("capped")),
            )
        )
    swatches = tuple(about.colours.get(row[0], ("grey", False))[0] for row in body)
    counted = about.facts.get("cost_note") or "Every run before the reporting seeds counts."
    note = f"{counted} Who tuned longer had more chances at a lucky best."
    return Table(f"cost{about.suffix}", "", header, tuple(body), frozenset({1, 2, 3, 4}), swatches, note)


def _capped(what: Any) -> str:
    if what is None:
        return q.NOT_MEASURED
    if isinstance(what, bool):
        return "yes" if what else "no"
    named = [what] if isinstance(what, str) else list(what)
    return ", ".join(one if isinstance(one, str) else f"{one.params} {one.chinchilla:g}x" for one in named) or "no"


def failures(about: Material) -> Table | None:
    """Runs that gave no final loss, each with its reason."""
    body = [
        (
            name_of(str(one.get("optimizer"))),
            " ".join(filter(None, (str(one.get("params") or ""), _ratio(one.get("chinchilla"))))) or _ABSENT,
            str(one.get("setting") or _ABSENT),
            str(one.get("state") or "failed").lower(),
            str(one.get("reason") or "no reason was recorded"),
        )
        for one in about.facts.get("failures") or ()
    ]
    if not body:
        return None
    swatches = tuple(about.colours.get(row[0], ("grey", False))[0] for row in body)
    header = ("optimizer", "cell", "setting", "state", "why")
    return Table(f"failures{about.suffix}", "", header, tuple(body[:_MOST]), frozenset(), swatches, _rest(body))


_MOST = 60


def _rest(body: Sequence[tuple[str, ...]]) -> str:
    return f"And {len(body) - _MOST} more." if len(body) > _MOST else ""


def _ratio(value: Any) -> str:
    ratio = q.finite(value)
    return "" if ratio is None else f"{ratio:g}x"


def steady(about: Material) -> Table | None:
    """Hyperparameters that one value serves everywhere, and those that none does."""
    fixed, moving = (about.facts.get(key) or {} for key in ("insensitive", "sensitive"))
    names = [name for name in about.optimizers if name in fixed or name in moving]
    if not names:
        return None
    body = tuple((name_of(name), _values(fixed.get(name)), _values(moving.get(name))) for name in names)
    swatches = tuple(about.colours[row[0]][0] for row in body)
    header = ("optimizer", "one value serves every cell", "values needed to cover all cells")
    return Table(f"steady{about.suffix}", "What has to be tuned", header, body, frozenset(), swatches)


def _values(found: Any) -> str:
    if not found:
        return _ABSENT
    if isinstance(found, Mapping):
        return "; ".join(f"{name} {q.text(value)}" for name, value in found.items())
    return ", ".join(map(str, found))
