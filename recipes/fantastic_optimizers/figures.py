"""Article 2's figures, each a part of the page: what it showed, drawn from what is at hand, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lightning_opt.reports import quantities as q
from lightning_opt.reports import study_pictures, study_tables, sweep_figures
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.page import Section
from lightning_opt.reports.study_figures import Point, lines, scatter
from lightning_opt.reports.study_material import Material, Place, as_key, key_of, name_of, place_name, ratio_name
from lightning_opt.reports.study_responses import DECAY, RATE, of_cell
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.reports.sweep_figures import Line
from lightning_opt.reports.tables import Table
from lightning_opt.study import Cell
from recipes.fantastic_optimizers.plans import config, of_kind

GPT3_RATE = 6e-4
_SHARED = 0.1
_OWN_DECAY = tuple(config()["besides"]["shared_decay"]["optimizers"])
_HELLASWAG = ("hellaswag_0shot", "hellaswag")


@dataclass(frozen=True)
class Source:
    """Where figures are drawn from.

    Attributes:
        name: ``published`` or ``runs``.
        title: as headings say it.
        material: the results and what belongs to them.
        figure: which figure is drawn: makes its keys its own.
    """

    name: str
    title: str
    material: Material
    figure: str = ""

    @property
    def about(self) -> Material:
        """The material for one figure."""
        return replace(self.material, suffix=f"-{self.figure}-{self.name}")


def under_tuned(source: Source) -> Section:
    """AdamW at GPT-3's rate against its own: half the data is lost."""
    about, label = source.about, "130m"
    answers = {place[1]: of_cell(about, Cell("adamw", *place), RATE) for place in about.places if place[0] == label}
    answers = {ratio: found for ratio, found in answers.items() if found}
    rates = sorted({rate for found in answers.values() for rate in found})
    seen = any(abs(rate / GPT3_RATE - 1) < 1e-6 for rate in rates)
    drawn = []
    if any(len(found) > 1 for found in answers.values()):
        names = {ratio_name(ratio): found for ratio, found in answers.items()}
        points = {name: _ringed(found) for name, found in names.items()}
        caption = "A line for each amount of data; a ring marks its lowest. A bad rate loses what more data gains."
        labels = ("peak learning rate", "final loss, nats per token")
        title = f"AdamW's loss over its rate, {label}"
        drawn.append(lines(as_key(f"rates{about.suffix}"), title, labels, points, optimizer_colours(names), caption))
    if seen:
        intro = "GPT-3's rate for this size, 6e-4, is among the rates: read how much more data it needs for a loss."
    else:
        span = (
            f"the rates at hand are {q.trimmed(rates[0])} to {q.trimmed(rates[-1])}" if rates else "no rate is at hand"
        )
        intro = (
            f"Not whole: a run at GPT-3's rate for this size, 6e-4, is not in these results ({span}). That tuned AdamW "
            "(8e-3) comes to its loss in half the steps is published as a statement only; the two commands below "
            "train it."
        )
    return _section(source, "under-tuned", "Under-tuned AdamW: 6e-4 against 8e-3", intro, drawn)


def _ringed(found: dict[float, float]) -> list[Point]:
    lowest = min(found.values())
    return [Point(value, loss, ringed=loss == lowest) for value, loss in found.items()]


def decay(source: Source) -> Section:
    """One decay for all against each one's own."""
    about, drawn, body = source.about, [], []
    for place in about.places:
        found = {name: of_cell(about, Cell(name, *place), DECAY) for name in about.optimizers}
        answers = {name: values for name, values in found.items() if len(values) > 1}
        body += [row for name, values in answers.items() if (row := _own_decay(name, place, values))]
        apart = {name: values for name, values in answers.items() if name in _OWN_DECAY}
        if apart:
            base = {name: values for name, values in answers.items() if name == about.baseline}
            drawn.append(_decays(source, place, base | apart))
    header = ("optimizer", "cell", "own decay", "loss with it", f"loss with {_SHARED:g}", "the shared one costs")
    note = (
        "Own: the lowest of those tried around the tuned configuration. Optimizers and cells that are not here have "
        f"their lowest at {_SHARED:g} itself, or were tried at one decay."
    )
    swatches = tuple(about.colours[row[0]][0] for row in body)
    title, key = "What one decay for all costs", f"decay{about.suffix}"
    table = Table(key, title, header, tuple(body), frozenset({2, 3, 4, 5}), swatches, note)
    intro = ""
    if not drawn:
        intro = "Neither Lion nor Kron was run at two decays here: the commands below train them at the shared one."
    return _section(source, "decay", "Shared against own decay", intro, drawn, (table,) if body else ())


def _own_decay(name: str, place: Place, answers: dict[float, float]) -> tuple[str, ...] | None:
    """A row of the table; None where the shared decay is the optimizer's own."""
    own, shared = min(answers, key=answers.__getitem__), answers.get(_SHARED)
    if own == _SHARED:
        return None
    cost = q.NOT_MEASURED if shared is None else f"+{q.number(shared - answers[own], 2)}"
    return name_of(name), place_name(place), q.trimmed(own), q.number(answers[own], 5), q.number(shared, 5), cost


def _decays(source: Source, place: Place, answers: dict[str, dict[float, float]]) -> Figure:
    points = {name_of(name): _ringed(found) for name, found in answers.items()}
    caption = "Every other value as tuned; a ring marks the lowest of each optimizer."
    labels = ("weight decay", "final loss, nats per token")
    title = f"Loss over decay, {place_name(place)}"
    return lines(key_of(source.about, "decay", place), title, labels, points, source.about.colours, caption)


def cells(source: Source) -> Section:
    """Loss and HellaSwag of every cell."""
    about = source.about
    drawn = [*study_pictures.losses(about)]
    tables = [study_tables.losses(about)]
    task = next((task for task in _HELLASWAG if any(task in found for found in about.results.scores.values())), None)
    intro = ""
    if task is None:
        intro = "HellaSwag: not measured in these results."
    else:
        drawn += [*study_pictures.scores(about, task), *_against(source, task)]
        tables.append(study_tables.scores(about, task))
    return _section(source, "cells", "Loss and HellaSwag of every cell", intro, drawn, tuple(tables))


def _against(source: Source, task: str) -> list[Figure]:
    """Whether a lower loss is a better score."""
    about = source.about
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in about.results.scores:
        if (found := about.score(cell, task)) and about.losses(cell):
            score = sum(found) / len(found)
            points.setdefault(name_of(cell.optimizer), []).append((about.mean(cell), score))
    if sum(map(len, points.values())) < 3:
        return []
    labels = ("final loss, nats per token", "HellaSwag, share of right answers")
    caption = "One dot a cell: over all sizes and amounts of data the score follows the loss, whatever the optimizer."
    return [
        scatter(as_key(f"score-loss{about.suffix}"), "HellaSwag against loss", labels, points, about.colours, caption)
    ]


def kinds(source: Source) -> Section:
    """Curves of the optimizers that step by element, and of those that step by matrix."""
    about, drawn = source.about, []
    curves = about.facts.get("curves") or {}
    for place in _shown(about):
        for kind, words in (("scalar", "step by element"), ("matrix", "step by matrix")):
            names = list(dict.fromkeys(["adamw", *of_kind(kind)]))
            found = {
                n: curves[Cell(n, *place)]["tokens"] for n in names if curves.get(Cell(n, *place), {}).get("tokens")
            }
            if len(found) > 1:
                shown = [Line(name_of(name), name_of(name), series, True) for name, series in found.items()]
                title = f"Optimizers that {words}, {place_name(place)}"
                ends = [series[1][-1] for name, series in found.items() if name != "adamw"]
                caption = (
                    f"With AdamW in both pictures; the others end within {q.number(max(ends) - min(ends), 2)} nats."
                )
                key = key_of(about, f"kind-{kind}", place)
                drawn.append(sweep_figures.curves(key, title, "tokens", shown, about.colours, caption, False))
    intro = "" if drawn else f"Loss on the way: {_no_curves(source)}"
    return _section(source, "kinds", "Scalar against matrix optimizers", intro, drawn)


def _shown(about: Material) -> list[Place]:
    """Least and most data of each model: enough pictures."""
    curves = about.facts.get("curves") or {}
    places = [place for place in about.places if any((c.params, c.chinchilla) == place for c in curves)]
    kept = [[place for place in places if place[0] == label] for label in about.labels]
    return [place for found in kept for place in dict.fromkeys((*found[:1], *found[-1:]))]


def _no_curves(source: Source) -> str:
    return (
        "hand over loss_curves.csv with --curves." if source.name == "published" else "no run here has two validations."
    )


def speed_up(source: Source) -> Section:
    """Speed-up against model size and data."""
    about = source.about
    drawn = [*study_pictures.speedups_over(about)]
    sizes = [label for label in config()["models"] if label not in about.labels]
    intro = (
        f"Not whole: these results have no cell of {' or '.join(sizes)}; such losses go into the same table."
        if sizes
        else ""
    )
    if not about.speedups:
        intro = f"No speed-up can be worked out: {name_of(about.baseline)} has no cell. {intro}".strip()
    measured = [by for by in ("tokens", "time", "memory") if any(one.by == by for one in about.speedups)]
    tables = [table for by in measured for table in study_tables.speedups(about, by)]
    tables += [table for table in (study_tables.laws(about),) if table]
    return _section(source, "speedup", "Speed-up against size and data", intro, drawn, tuple(tables))


def sixteen(source: Source) -> Section:
    """Sixteen times the compute-optimal data."""
    about = source.about
    wanted = [place for place in about.places if place[1] == 16]
    drawn = [*study_pictures.losses(about, wanted), *study_pictures.speedups_at(about, "tokens", wanted)]
    intro = "" if wanted else "No 16x cell in these results."
    if wanted and not drawn:
        intro = "The 16x cells here have no two optimizers in common."
    return _section(source, "sixteen", "16x the compute-optimal data", intro, drawn, study_tables.refits(about))


def crossing(source: Source) -> Section:
    """Curves that cross while the rate comes down."""
    drawn, table = study_pictures.crossing(source.about)
    intro = f"Loss on the way: {_no_curves(source)}"
    if drawn:
        intro = "Orders turn while the rate comes down, so who leads in the middle of a run says little of its end."
    return _section(source, "crossing", "Curves that cross during decay", intro, list(drawn), (table,) if table else ())


def _section(
    source: Source, key: str, title: str, intro: str, drawn: list[Figure], tables: tuple[Table, ...] = ()
) -> Section:
    return Section(f"{key}-{source.name}", f"{title} ({source.title})", intro, tuple(drawn), tables)


FIGURES: tuple[Callable[[Source], Section], ...] = (
    under_tuned,
    decay,
    cells,
    kinds,
    speed_up,
    sixteen,
    crossing,
)
