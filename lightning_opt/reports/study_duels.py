"""Who is lower than whom in a study, and whether that is beyond the noise between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_opt.reports import quantities as q
from lightning_opt.reports.study_material import Material, Place, name_of, place_name, seeds_of
from lightning_opt.reports.tables import Table
from lightning_opt.study.significance import FORMULAS, Comparison, Noise, better, holm, t_quantile

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell

BETTER, WORSE, LEVEL, UNTESTED = "lower", "higher", "not told apart", "not tested"


@dataclass(frozen=True)
class Front:
    """Who leads at a place.

    Attributes:
        place: model and ratio.
        first: the cell of the lowest mean loss.
        level: cells that the test does not tell from it, lowest first.
        behind: cells beyond noise above it, lowest first.
        untested: cells that cannot be tested: a seed diverged, or nothing says how far seeds spread.
    """

    place: Place
    first: Cell
    level: tuple[Cell, ...]
    behind: tuple[Cell, ...]
    untested: tuple[Cell, ...]

    @property
    def clear(self) -> bool:
        """Whether the first is lower than every other beyond noise."""
        return bool(self.behind) and not self.level and not self.untested


def test(about: Material, a: Cell, b: Cell) -> Comparison | None:
    """The one-sided test of "a has the lower final loss than b"; None where the losses do not say."""
    found = [about.results.losses.get(cell, ()) for cell in (a, b)]
    noise = noise_of(about)
    if noise is not None and about.blocks is not None and len(found[0]) == len(found[1]) > 1:
        return better(*found, about.blocks, paired=True)
    return better(*found, noise, paired=noise is None)


def noise_of(about: Material) -> Noise | None:
    """The spread between seeds that tests and intervals use; None where nobody knows it."""
    if about.sigma is None:
        return None
    return Noise(about.sigma**2, math.inf if about.freedom is None else about.freedom)


def judged(about: Material, cell: Cell, base: Cell) -> str:
    """How a cell stands to another: `BETTER`, `WORSE`, `LEVEL` or `UNTESTED`."""
    below, above = test(about, cell, base), test(about, base, cell)
    if below is None or above is None:
        return UNTESTED
    return BETTER if below.significant else WORSE if above.significant else LEVEL


def front(about: Material, place: Place) -> Front | None:
    """Who leads at a place; None where nobody has a loss there."""
    cells = about.cells_at(place)
    if not cells:
        return None
    first, *others = cells
    found: dict[str, list[Cell]] = {LEVEL: [], WORSE: [], UNTESTED: []}
    for other in others:
        tested = test(about, first, other)
        found[UNTESTED if tested is None else WORSE if tested.significant else LEVEL].append(other)
    return Front(place, first, *(tuple(found[key]) for key in (LEVEL, WORSE, UNTESTED)))


def fronts(about: Material) -> list[Front]:
    """Who leads, place by place, where there are two optimizers or more."""
    found = [front(about, place) for place in about.places]
    return [one for one in found if one is not None and (one.level or one.behind or one.untested)]


def lowest(about: Material, found: Sequence[Front]) -> Table:
    """Each place's lowest, the next one, and the test between them."""
    body = []
    for one in found:
        rivals = sorted((*one.level, *one.behind, *one.untested), key=about.mean)
        tested = test(about, one.first, rivals[0])
        ties = ", ".join(name_of(cell.optimizer) for cell in one.level) or "none"
        body.append(
            (
                place_name(one.place),
                f"{name_of(one.first.optimizer)} {q.number(about.mean(one.first), 5)}",
                f"{name_of(rivals[0].optimizer)} {q.number(about.mean(rivals[0]), 5)}",
                q.number(about.mean(rivals[0]) - about.mean(one.first), 2),
                seeds_of(about.losses(cell) for cell in (one.first, rivals[0])),
                *_figures(tested),
                ties,
            )
        )
    header = ("cell", "lowest", "next", "gap, nats", "n", "t", "p", "beyond noise", "not told from the lowest")
    title = "The lowest against the next"
    return Table(f"lowest{about.suffix}", title, header, tuple(body), frozenset({3, 4, 5, 6}), note=formula(about))


def _figures(tested: Comparison | None) -> tuple[str, str, str]:
    if tested is None:
        return q.NOT_MEASURED, q.NOT_MEASURED, UNTESTED
    t = "infinite" if math.isinf(tested.t) else f"{tested.t:.2f}"
    return t, "< 0.001" if tested.p < 1e-3 else f"{tested.p:.3f}", "yes" if tested.significant else "no"


def formula(about: Material) -> str:
    """The test in words, with its limit."""
    noise = noise_of(about)
    kind = "paired" if noise is None else "given sigma" if math.isinf(noise.freedom) else "pooled"
    noise, kind = (noise, kind) if about.blocks is None else (about.blocks, "blocked")
    words = f"One-sided test of the lower loss: {FORMULAS[kind]}. Beyond noise where p < 0.05"
    if noise is not None:
        limit = t_quantile(0.95, noise.freedom)
        seeds = 1 if about.blocks is None else max(map(len, about.results.losses.values()))
        least = limit * noise.sigma * math.sqrt(2 / seeds)
        words += f", that is beyond {limit:.3f} standard errors: {q.number(least, 2)} nats between two cells of "
        words += "one seed" if seeds == 1 else f"{seeds} seeds (s = {q.number(noise.sigma, 2)})"
    if about.blocks is not None:
        words += "; cells of unequal numbers of seeds by the spread of all seeds instead"
    return (
        f"{words}. Each pair by itself; who was lower was seen before it was tested, so of equal pairs one in ten "
        "would pass."
    )


def against_baseline(about: Material) -> Table | None:
    """Every optimizer's gap to the baseline in every place; None without a baseline."""
    places = [place for place in about.places if about.cell(about.baseline, place)]
    names = [name for name in about.optimizers if name != about.baseline]
    if not places or not names:
        return None
    body = tuple((name_of(name), *(_gap(about, name, place) for place in places)) for name in names)
    swatches = tuple(about.colours[row[0]][0] for row in body)
    base = name_of(about.baseline)
    note = (
        f"Mean final loss minus {base}'s, nats per token: below 0 is better than {base}. ● is beyond noise by the same "
        f"test, ○ is not; ? could not be tested; – was not run.{_all_at_once(about, names, places)}"
    )
    header = ("optimizer", *map(place_name, places))
    return Table(
        f"gaps{about.suffix}", f"Against {base}", header, body, frozenset(range(1, len(header))), swatches, note
    )


def _all_at_once(about: Material, names: Sequence[str], places: Sequence[Place]) -> str:
    """How many of the table's finds stand if it is taken as one family of tests, both ways of each pair."""
    pairs = [(about.cell(name, place), about.cell(about.baseline, place)) for name in names for place in places]
    both = [(test(about, a, b), test(about, b, a)) for a, b in pairs if a and b]
    tests = [one for pair in both for one in pair if one is not None]
    alone = sum(one.significant for one in tests)
    if not alone:
        return ""
    kept = sum(p < 1 - one.level for one, p in zip(tests, holm([one.p for one in tests]), strict=True))
    return f" {kept} of the {alone} ● stand by Holm's correction for all {len(tests)} one-sided tests of this table."


_MARKS = {BETTER: "●", WORSE: "●", LEVEL: "○", UNTESTED: "?"}


def _gap(about: Material, name: str, place: Place) -> str:
    cell, base = about.cell(name, place), about.cell(about.baseline, place)
    if cell is None or base is None:
        return "–"
    gap = about.mean(cell) - about.mean(base)
    return f"{gap:+.4f} {_MARKS[judged(about, cell, base)]}".replace("-", "\N{MINUS SIGN}")
