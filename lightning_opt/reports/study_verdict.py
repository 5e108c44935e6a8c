"""A study in words: who ended lowest where, beyond noise or not, with n and spread; never more than the data show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_opt.reports import quantities as q
from lightning_opt.reports.findings import Card
from lightning_opt.reports.scores import listed
from lightning_opt.reports.study_duels import BETTER, LEVEL, UNTESTED, WORSE, Front, fronts, judged
from lightning_opt.reports.study_material import Material, name_of, place_name, ratio_name, seeds_of
from lightning_opt.reports.study_tables import interval_words
from lightning_opt.study.speedups import EXTRAPOLATED

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell
    from lightning_opt.study.speedups import SpeedUp


def verdict(about: Material) -> tuple[str, ...]:
    """A paragraph on each model, one on the baseline, one on speed-ups, one on what all this rests on."""
    found = fronts(about)
    if not found:
        return (_nothing(about),)
    words = [_of_model(about, label, [one for one in found if one.place[0] == label]) for label in about.labels]
    return tuple(filter(None, (*words, _baseline(about), _speedups(about), _rests_on(about))))


def _nothing(about: Material) -> str:
    cells = [cell for cell in about.results.losses if about.losses(cell)]
    if not cells:
        return "Nothing can be compared yet: no cell has a final loss."
    ended = [f"{name_of(cell.optimizer)} {_at(cell)} {q.number(about.mean(cell), 5)}" for cell in cells[:6]]
    return f"Nothing can be compared: no two optimizers have a final loss in the same cell ({listed(ended)})."


def _at(cell: Cell) -> str:
    return place_name((cell.params, cell.chinchilla))


def _of_model(about: Material, label: str, found: Sequence[Front]) -> str:
    """One sentence for places that one optimizer leads clearly, one for each place where the lead is shared."""
    if not found:
        return ""
    clear = [one for one in found if one.clear]
    leaders = dict.fromkeys(one.first.optimizer for one in clear)
    said = [_led(about, name, [one for one in clear if one.first.optimizer == name]) for name in leaders]
    said += [_shared(about, one) for one in found if not one.clear]
    return f"{label}: {' '.join(said)}"


def _led(about: Material, name: str, places: Sequence[Front]) -> str:
    where = listed([ratio_name(one.place[1]) for one in places])
    gaps = [(min(one.behind, key=about.mean), one) for one in places]
    ahead = listed(
        [
            f"{q.number(about.mean(rival) - about.mean(one.first), 2)} below {_figure(about, rival)}"
            for rival, one in gaps
        ]
    )
    own = listed([q.number(about.mean(one.first), 5) for one in places])
    return f"{name_of(name)} ended lowest at {where} ({own} nats), beyond noise: {ahead}."


def _shared(about: Material, one: Front) -> str:
    where = ratio_name(one.place[1])
    first = _figure(about, one.first)
    words = []
    if one.level:
        others = listed([_figure(about, cell) for cell in one.level])
        rest = f"; the other {len(one.behind)} ended higher, beyond noise" if one.behind else ""
        words.append(f"At {where} {first} cannot be told from {others}{rest}.")
    if one.untested:
        names = listed([_figure(about, cell) for cell in one.untested])
        lead = "" if one.level else f"At {where} the lowest was {first}. "
        words.append(f"{lead}Not tested against it: {names}.")
    return " ".join(words)


def _figure(about: Material, cell: Cell) -> str:
    lost = about.lost(cell)
    words = f"; {lost} of {lost + len(about.losses(cell))} seeds diverged" if lost else ""
    return f"{name_of(cell.optimizer)} ({q.number(about.mean(cell), 5)}{words})"


def _baseline(about: Material) -> str:
    """Who is below the baseline, in how many of the cells that both have."""
    counts: dict[str, Counter[str]] = {}
    for name in about.optimizers[1:] if about.optimizers[:1] == (about.baseline,) else ():
        pairs = [(about.cell(name, place), about.cell(about.baseline, place)) for place in about.places]
        counts[name] = Counter(judged(about, cell, base) for cell, base in pairs if cell and base)
    counts = {name: found for name, found in counts.items() if found}
    if not counts:
        return f"{name_of(about.baseline)}, the baseline, has no cell in common with another optimizer."
    always = [f"{name_of(n)} ({c.total()})" for n, c in counts.items() if c[BETTER] == c.total()]
    parts = []
    if always:
        parts.append(f"lower beyond noise in every cell (their number): {listed(always)}")
    for name, found in counts.items():
        if found[BETTER] != found.total():
            split = [f"{word} in {found[word]}" for word in (BETTER, LEVEL, WORSE, UNTESTED) if found[word]]
            parts.append(f"{name_of(name)} {', '.join(split)}")
    return f"Against {name_of(about.baseline)}: {'; '.join(parts)}."


def _speedups(about: Material) -> str:
    """The span of speed-ups of the optimizers that lead somewhere, by tokens and by time."""
    leaders = Counter(one.first.optimizer for one in fronts(about) if one.first.optimizer != about.baseline)
    said = []
    for name, _ in leaders.most_common(2):
        for by, words in (("tokens", "tokens"), ("time", "wall time")):
            found = [one for one in about.speedups if (one.optimizer, one.by) == (name, by)]
            spans = [span for label in about.labels if (span := _span([one for one in found if one.params == label]))]
            if spans:
                said.append(f"{name_of(name)} by {words}: {'; '.join(spans)}")
    if not said:
        return ""
    return f"Speed-up over {name_of(about.baseline)} to the same loss. {'. '.join(said)}."


def _span(found: Sequence[SpeedUp]) -> str:
    """``130m 1.26× (…) at 8x to 1.42× (…) at 1x``; what is extrapolated or undefined is named apart."""
    known = sorted((one for one in found if q.finite(one.value) is not None), key=lambda one: one.value)
    inside = [one for one in known if one.note != EXTRAPOLATED]
    ends = dict.fromkeys(f"{_plain(one)} at {ratio_name(one.chinchilla)}" for one in (*inside[:1], *inside[-1:]))
    parts = [" to ".join(ends)] if ends else []
    beyond = [f"{_plain(one)} at {ratio_name(one.chinchilla)}" for one in known if one.note == EXTRAPOLATED]
    parts += [f"extrapolated {listed(beyond)}"] if beyond else []
    lost = [one for one in found if q.finite(one.value) is None]
    notes = listed(list(dict.fromkeys(one.note or q.NOT_MEASURED for one in lost))) if lost else ""
    parts += [f"at {listed([ratio_name(one.chinchilla) for one in lost])} {notes}"] if lost else []
    return f"{found[0].params} {', '.join(parts)}" if parts else ""


def _plain(one: SpeedUp) -> str:
    return f"{q.number(one.value, 3)}×{interval_words(one.low, one.high)}"


def _rests_on(about: Material) -> str:
    seeds = seeds_of(about.losses(cell) for cell in about.results.losses)
    origin = str(about.facts.get("sigma_origin") or "").strip()
    if about.sigma is None:
        return f"Seeds per cell: n = {seeds}. The spread between seeds is not known, so no difference was tested."
    if about.freedom is None:
        known = "an input, not measured in these cells" + (f" ({origin})" if origin not in ("", "given") else "")
    else:
        known = origin or f"pooled, {about.freedom} degrees of freedom"
    sigma = f"sigma = {q.trimmed(about.sigma, 3)} nats, {known}"
    return f"Seeds per cell: n = {seeds}. Standard deviation between seeds: {sigma}."


def cards(about: Material) -> tuple[Card, ...]:
    """The key figures of the header."""
    found = fronts(about)
    total = sum(1 for cell in about.results.losses if about.losses(cell))
    shown = [Card("cells", str(total), f"{len(about.optimizers)} optimizers, {len(about.places)} places")]
    if found:
        clear = Counter(one.first.optimizer for one in found if one.clear)
        named = ", ".join(f"{name_of(name)} {count}" for name, count in clear.most_common())
        shown.append(Card("clear leads", f"{clear.total()} of {len(found)}", named or "no lead is beyond noise"))
    best = max(
        (o for o in about.speedups if o.by == "tokens" and q.finite(o.value) and o.note != EXTRAPOLATED),
        default=None,
        key=lambda one: one.value,
    )
    if best is not None:
        where = f"{name_of(best.optimizer)}, {best.params} {ratio_name(best.chinchilla)}"
        detail = f"{where}{interval_words(best.low, best.high)}" + (f", {best.note}" if best.note else "")
        shown.append(Card("largest speed-up in tokens", f"{q.number(best.value, 3)}×", detail))
    seeds = seeds_of(about.losses(cell) for cell in about.results.losses)
    sigma = q.NOT_MEASURED if about.sigma is None else f"{q.trimmed(about.sigma, 3)} nats"
    shown.append(
        Card("sigma between seeds", sigma, f"n = {seeds} per cell" + ("; an input" if about.freedom is None else ""))
    )
    spent = (about.facts.get("cost") or {}).values()
    if spent:
        tokens = sum(q.finite(one.get("tokens")) or 0.0 for one in spent)
        runs = sum(int(q.finite(one.get("runs")) or 0) for one in spent)
        shown.append(Card("tuning", f"{q.integer(runs)} runs", f"{q.short(tokens)} tokens" if tokens else ""))
    return tuple(shown)
