"""Which figures a study's page shows, and of what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.figures import in_unit, time_label
from lightning_opt.reports.reading import Series
from lightning_opt.reports.study_crossings import Crossing, crossings
from lightning_opt.reports.study_figures import Point, Row, dots, leads, lines
from lightning_opt.reports.study_material import BY, Material, Place, as_key, key_of, name_of, place_name, ratio_name
from lightning_opt.reports.study_responses import RATE, at_place
from lightning_opt.reports.study_tables import MARKS, task_title
from lightning_opt.reports.tables import Table

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell
    from lightning_opt.study.speedups import SpeedUp

_MOST = 24  # pictures of one kind
_LEAST = 3e-3  # nats; a lead below the study's threshold is none


def _capped(drawn: Sequence[Figure]) -> tuple[Figure, ...]:
    """So many pictures that a page stays readable; the last says how many more there would be."""
    if len(drawn) <= _MOST:
        return tuple(drawn)
    *kept, last = drawn[:_MOST]
    words = (
        f"{last.caption} {len(drawn) - _MOST} more pictures of this kind are left out; the tables have their numbers."
    )
    return (*kept, replace(last, caption=words))


def losses(about: Material, places: Sequence[Place] | None = None) -> tuple[Figure, ...]:
    """One picture for each place with two optimizers or more, lowest loss above."""
    drawn = []
    for place in about.places if places is None else places:
        rows = [_loss_row(about, cell) for cell in about.cells_at(place)]
        if len(rows) > 1:
            caption = _loss_caption(about, place)
            title = f"Final loss, {place_name(place)}"
            drawn.append(
                dots(key_of(about, "loss", place), title, "final loss, nats per token", rows, about.colours, caption)
            )
    return _capped(drawn)


def _loss_row(about: Material, cell: Cell) -> Row:
    values, mean = about.losses(cell), about.mean(cell)
    reach = stdev(values) if len(values) > 1 else about.sigma
    ends = (None, None) if reach is None else (mean - reach, mean + reach)
    return Row(name_of(cell.optimizer), mean, *ends, values, q.number(mean, 5))


def _loss_caption(about: Material, place: Place) -> str:
    counts = {len(about.losses(cell)) for cell in about.cells_at(place)}
    if counts == {1}:
        bars = (
            ""
            if about.sigma is None
            else f" Bars: sigma = {q.trimmed(about.sigma, 3)} nats each way, not measured here"
        )
        return f"One run each.{bars}." if bars else "One run each: how far seeds spread is not known."
    return "Means over seeds, bars one standard deviation each way, small dots the seeds."


def scores(about: Material, task: str) -> tuple[Figure, ...]:
    """Each place's scores on one task, best above."""
    drawn = []
    for place in about.places:
        found = {
            cell: values
            for cell in about.results.scores
            if (cell.params, cell.chinchilla) == place and (values := about.score(cell, task))
        }
        rows = [
            Row(name_of(cell.optimizer), fmean(values), *_reach(values), values, f"{fmean(values):.4f}")
            for cell, values in sorted(found.items(), key=lambda item: -fmean(item[1]))
        ]
        if len(rows) > 1:
            title = f"{task_title(task)}, {place_name(place)}"
            caption = (
                "Best above. One run each." if max(map(len, found.values())) == 1 else "Best above; means over seeds."
            )
            drawn.append(
                dots(key_of(about, "score", place), title, "share of right answers", rows, about.colours, caption)
            )
    return _capped(drawn)


def _reach(values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    return fmean(values) - stdev(values), fmean(values) + stdev(values)


def speedups(about: Material) -> tuple[Figure, ...]:
    """Over data and model size, then place by place for each of tokens, time and memory that was measured."""
    return (*speedups_over(about), *(one for by in BY for one in speedups_at(about, by)))


def speedups_over(about: Material) -> tuple[Figure, ...]:
    """By tokens: over data for each model, over model size for each amount of data."""
    drawn = [_over_data(about, label) for label in about.labels]
    drawn += [_over_size(about, ratio) for ratio in sorted({ratio for _, ratio in about.places})]
    return _capped([one for one in drawn if one is not None])


def speedups_at(about: Material, by: str, places: Sequence[Place] | None = None) -> tuple[Figure, ...]:
    """A row for each optimizer with its interval, place by place."""
    drawn = [_at_place(about, place, by) for place in (about.places if places is None else places)]
    return _capped([one for one in drawn if one is not None])


def _found(about: Material, by: str = "tokens") -> list[SpeedUp]:
    return [one for one in about.speedups if one.by == by and q.finite(one.value) is not None]


def _points(found: Sequence[SpeedUp], x: Mapping[SpeedUp, float]) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for one in sorted(found, key=lambda one: x[one]):
        ends = (one.low, one.high) if q.finite(one.low) is not None else (None, None)
        words = f"{q.number(one.value, 3)}×{MARKS.get(one.note, '')}"
        point = Point(x[one], one.value, *ends, hollow=one.note in MARKS, words=words)
        points.setdefault(name_of(one.optimizer), []).append(point)
    return points


def _marked(points: Mapping[str, Sequence[Point]]) -> str:
    """``e: extrapolated``, of the marks that points bear."""
    words = [point.words for found in points.values() for point in found]
    return ", ".join(f"{mark.strip()}: {note}" for note, mark in MARKS.items() if any(w.endswith(mark) for w in words))


def _over_data(about: Material, label: str) -> Figure | None:
    found = [one for one in _found(about) if one.params == label]
    if len({one.chinchilla for one in found}) < 2:
        return None
    points = _points(found, {one: one.chinchilla for one in found})
    names = {one.chinchilla: ratio_name(one.chinchilla) for one in found}
    return _lines(
        about, f"speedup-data-{label}", f"Speed-up by tokens over data, {label}", "data, in tokens of 1x", points, names
    )


def _over_size(about: Material, ratio: float) -> Figure | None:
    sizes = about.results.sizes
    found = [one for one in _found(about) if one.chinchilla == ratio and sizes.get(one.params)]
    if len({one.params for one in found}) < 2:
        return None
    points = _points(found, {one: sizes[one.params] for one in found})
    names = {sizes[one.params]: one.params for one in found}
    key, title = f"speedup-size-{ratio_name(ratio)}", f"Speed-up by tokens over model size, {ratio_name(ratio)}"
    return _lines(about, key, title, "non-embedding parameters", points, names)


def _lines(
    about: Material, key: str, title: str, label: str, points: Mapping[str, Sequence[Point]], names: Mapping[float, str]
) -> Figure:
    base = name_of(about.baseline)
    caption = (
        f"Above the dashed line: fewer tokens than {base} for the same loss. Bars: {q.percent(about.level)} intervals."
    )
    if any(point.hollow for found in points.values() for point in found):
        caption += f" Hollow: not read off a fitted range of {base}'s cells ({_marked(points)})."
    return lines(
        as_key(key + about.suffix),
        title,
        (label, "speed-up by tokens"),
        points,
        about.colours,
        caption,
        names,
        level=1.0,
    )


def _at_place(about: Material, place: Place, by: str) -> Figure | None:
    found = [one for one in about.speedups if one.by == by and (one.params, one.chinchilla) == place]
    known = sorted((one for one in found if q.finite(one.value) is not None), key=lambda one: -one.value)
    rows = [_speed_row(one) for one in (*known, *(one for one in found if one not in known))]
    if len(known) < 2 and not (known and by != "tokens"):
        return None
    title = f"Speed-up by {BY[by]}, {place_name(place)}"
    caption = f"Bars: {q.percent(about.level)} intervals; a bar across the dashed line shows no difference."
    told = [f"{mark.strip()}: {note}" for note, mark in MARKS.items() if any(one.note == note for one in known)]
    caption += f" {', '.join(told)}." if told else ""
    reference = (1.0, f"{name_of(about.baseline)}: 1×")
    return dots(
        key_of(about, f"speedup-{by}", place), title, f"speed-up by {BY[by]}", rows, about.colours, caption, reference
    )


def _speed_row(one: SpeedUp) -> Row:
    value = q.finite(one.value)
    if value is None:
        return Row(name_of(one.optimizer), None, words=one.note or q.NOT_MEASURED)
    mark = MARKS.get(one.note, "")
    return Row(
        name_of(one.optimizer),
        value,
        q.finite(one.low),
        q.finite(one.low) and one.high,
        words=f"{q.number(value, 3)}×{mark}",
    )


def rates(about: Material) -> tuple[Figure, ...]:
    """Loss over the rate in each place where it was varied."""
    places = dict.fromkeys(
        (cell.params, cell.chinchilla) for cell in sorted((*about.tried, *about.results.tuning), key=_in_order(about))
    )
    drawn = []
    for place in places:
        answers = at_place(about, place, RATE)
        points = {
            name: [Point(rate, loss, ringed=loss == min(found.values())) for rate, loss in found.items()]
            for name, found in answers.items()
        }
        if points:
            caption = "Each point is a whole run; a ring marks the lowest of each optimizer."
            title = f"Loss over the rate, {place_name(place)}"
            labels = ("peak learning rate", "final loss, nats per token")
            drawn.append(lines(key_of(about, "rate", place), title, labels, points, about.colours, caption))
    return _capped(drawn)


def _in_order(about: Material) -> Callable[[Cell], tuple[int, float]]:
    labels = list(about.labels)
    return lambda cell: (labels.index(cell.params) if cell.params in labels else len(labels), cell.chinchilla)


def crossing(about: Material) -> tuple[tuple[Figure, ...], Table | None]:
    """How far each optimizer lies under the baseline on the way, and the pairs whose order turned."""
    drawn, turned = [], []
    for place in about.places:
        for by in ("tokens", "time"):
            curves = _curves(about, place, by)
            base = name_of(about.baseline)
            if base not in curves or len(curves) < 2:
                continue
            label = "tokens" if by == "tokens" else time_label([curves[base][0][-1]])
            shown = curves if by == "tokens" else {name: in_unit(series, label) for name, series in curves.items()}
            title = f"Loss against {base}'s at equal {BY[by]}, {place_name(place)}"
            caption = (
                f"Below the line: lower than {base} after as many tokens."
                if by == "tokens"
                else (f"Below the line: lower than {base} after the same time.")
            )
            drawn.append(leads(key_of(about, f"lead-{by}", place), title, label, shown, base, about.colours, caption))
            if by == "tokens":
                turned += [(place, one) for one in crossings(curves, about.sigma or _LEAST)]
    return _capped(drawn), _turned(about, turned)


def _curves(about: Material, place: Place, by: str) -> dict[str, Series]:
    found = about.facts.get("curves") or {}
    curves = {
        cell: ([*by_x[by][0]], [*by_x[by][1]])
        for cell, by_x in found.items()
        if (cell.params, cell.chinchilla) == place
        and cell.optimizer in about.optimizers
        and len(by_x.get(by, ((),))[0]) > 1
    }
    ordered = sorted(curves.items(), key=lambda item: about.optimizers.index(item[0].optimizer))
    return {name_of(cell.optimizer): series for cell, series in ordered if all(map(math.isfinite, series[1]))}


def _turned(about: Material, found: Sequence[tuple[Place, Crossing]]) -> Table | None:
    if not found:
        return None
    body = tuple(
        (
            place_name(place),
            one.winner,
            one.overtaken,
            f"{q.short(one.x)} ({q.percent(one.share)})",
            q.number(one.lead, 2),
            q.number(one.final, 2),
        )
        for place, one in found[:40]
    )
    header = (
        "cell",
        "lower at the end",
        "was ahead before",
        "crossed at (tokens)",
        "largest lead lost",
        "gap at the end",
    )
    note = (
        "Pairs whose order turned after the first tenth, where lead and gap both exceed "
        f"{q.trimmed(about.sigma or _LEAST, 3)} nats, at equal tokens; the end is the last point that both curves have."
    )
    note += f" {len(found) - 40} more." if len(found) > 40 else ""
    return Table(f"crossings{about.suffix}", "Who was overtaken", header, body, frozenset({3, 4, 5}), note=note)
