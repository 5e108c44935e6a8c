"""The page that shows models side by side on their tasks: ``scores.html`` and ``scores.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.reports import downstream_figures as figures
from lightning_opt.reports import quantities as q
from lightning_opt.reports.commands import command
from lightning_opt.reports.downstream import Difference, Judged, differences, labels, read_judged, tasks_of
from lightning_opt.reports.page import Section, guarded, render
from lightning_opt.reports.ranking import t_limit
from lightning_opt.reports.scores import TITLES, listed
from lightning_opt.reports.style import corpus_colour
from lightning_opt.reports.tables import Table
from lightning_opt.run_folder.records import write_text

_KINDS = {"lm-eval": "lm-eval's groups", "article": "science, humanities and technology"}
_READING = (
    "Every score has the standard error that its documents leave; chance is what guessing among the choices scores.",
    "Two models are compared on the very documents that both were asked. The interval holds the difference with "
    "95\N{NO-BREAK SPACE}% confidence; p-values are adjusted for all comparisons of this page (Holm), and a difference "
    "whose p is 0.05 or more is inside the noise: these documents cannot tell the two apart, which does not mean that "
    "they are equal.",
    "The noise is that of the documents alone. Another seed of the same training would differ too: one run each says "
    "nothing about that.",
    "Bits per byte of the gold answers is how surprised a model is by the right answer, per byte of it: lower is "
    "better. It tells small models apart long before their accuracy leaves chance.",
)


def write_scores(names: Sequence[str], folders: Sequence[Path], out: Path) -> None:
    """Writes ``scores.html`` and ``scores.csv`` of models side by side.

    Args:
        names: what the user called the models: their paths.
        folders: with each model's ``results.json`` and ``documents.jsonl.gz``.
        out: where the two files go.
    """
    called = labels(names)
    models = [read_judged(label, folder) for label, folder in zip(called, folders, strict=True)]
    tasks = tasks_of(models, TITLES)
    found = differences(models, tasks)
    write_text(out / "scores.csv", as_csv(models, tasks, found))
    again = command(["python", "-m", "recipes.evaluate", *names, "--report-only", "--out", str(out)])
    write_text(out / "scores.html", render("report.html.j2", page(models, tasks, found, again)))


def page(models: Sequence[Judged], tasks: Sequence[str], found: Sequence[Difference], again: str) -> dict[str, Any]:
    """Everything the template shows, as plain data; `again` is the command that draws the page."""
    colours = {model.label: corpus_colour(place) for place, model in enumerate(models)}
    suites = list(dict.fromkeys(model.suite or "none" for model in models))
    parts = [("scores", lambda: _scores(models, tasks, colours))]
    if found:
        parts.append(("differences", lambda: _differences(tasks, found)))
    parts += [
        ("bits", lambda: _bits(models, tasks, found, colours)),
        ("groups", lambda: _groups(models, colours)),
        ("tasks", lambda: _pictures(models, tasks, colours)),
    ]
    sections = [
        guarded(key, make, Section(key, key.capitalize(), "This part could not be drawn.")) for key, make in parts
    ]
    whom = f"{listed(list(colours))} side by side" if len(models) < 4 else f"{len(models)} models side by side"
    return {
        "title": whom if len(models) > 1 else f"Scores of {models[0].label}",
        "state": f"suite {' and '.join(suites)}",
        "tone": "muted",
        "subtitle": f"{len(tasks)} tasks · {q.integer(max((_asked(model) for model in models), default=0))} documents",
        "source": "results of recipes.evaluate",
        "reading": "How to read these scores",
        "alarm_tone": "warn",
        "alarm": _alarm(models, suites),
        "verdict": _verdict(models, tasks, found),
        "cards": (),
        "notes": _READING if len(models) > 1 else (_READING[0], _READING[3]),
        "sections": [section for section in sections if section.figures or section.tables or section.intro],
        "commands": (("Draw this page again, or with others that were scored", again),),
        "missing": (),
    }


def _asked(model: Judged) -> int:
    return sum(int(score.n or 0) for score in model.scores.values() if score.value is not None)


def _alarm(models: Sequence[Judged], suites: Sequence[str]) -> str:
    if len(suites) > 1:
        return "These models were scored by different suites: their numbers may not be compared."
    broken = [
        f"{model.label} on {score.title}" for model in models for score in model.scores.values() if score.degenerate
    ]
    if broken:
        return f"Broken scorer or model: every choice got the same likelihood ({listed(broken)})."
    return "Suite mini: small sets of our own, comparable with nothing but each other." if suites == ["mini"] else ""


_KINDS_OF_NUMBER = ((False, "score"), (True, "bits per byte"))
_MOST_PAIRS = 3


def _verdict(models: Sequence[Judged], tasks: Sequence[str], found: Sequence[Difference]) -> tuple[str, ...]:
    pairs = list(dict.fromkeys((one.first, one.second) for one in found))
    if not pairs:
        above = [score.title for model in models[:1] for score in model.scores.values() if score.judgement == "above"]
        return (f"Better than chance on {listed(above)}." if above else "No score differs from chance.",)
    if len(pairs) > _MOST_PAIRS:
        return tuple(
            _counted(what, [one for one in found if one.lower_is_better == bits]) for bits, what in _KINDS_OF_NUMBER
        )
    words = []
    for pair in pairs:
        for bits, what in _KINDS_OF_NUMBER:
            tested = [one for one in found if (one.first, one.second) == pair and one.lower_is_better == bits]
            if tested:
                words.append(f"{pair[0]} against {pair[1]}, by {what}: {_told(pair, tested)}.")
    return tuple(words)


def _told(pair: tuple[str, str], tested: Sequence[Difference]) -> str:
    """Who is better where; and how many differences are none."""
    won = {label: [_title(one.task) for one in tested if one.better == label] for label in pair}
    told = [f"{label} is better on {listed(titles)}" for label, titles in won.items() if titles]
    rest = len(tested) - sum(map(len, won.values()))
    return "; ".join([*told, *([f"{_times(rest, 'difference')} inside the noise"] if rest else [])])


def _counted(what: str, tested: Sequence[Difference]) -> str:
    clear = sum(bool(one.better) for one in tested)
    return f"By {what}: {clear} of {_times(len(tested), 'difference')} between two models are outside the noise."


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _title(task: str) -> str:
    return TITLES.get(task, task)


def _scores(models: Sequence[Judged], tasks: Sequence[str], colours: Mapping[str, str]) -> Section:
    why = _why_not(models, tasks)
    everyone = [model.label for model in models]
    shared = {task: next(iter(whys)) for task, whys in why.items() if list(whys.values()) == [everyone]}
    body = []
    for task in tasks:
        known = [
            model.scores[task] for model in models if task in model.scores and model.scores[task].value is not None
        ]
        cells = [_cell(model, task) for model in models]
        levels = [q.NOT_MEASURED if known[0].chance is None else f"{known[0].chance:.3f}"]
        levels.append("–" if known[0].majority is None else f"{known[0].majority:.3f}")
        counts = " / ".join(dict.fromkeys(q.integer(score.n) for score in known))
        told = (shared.get(task, "see below" if why[task] else ""),) if any(why.values()) else ()
        body.append((_title(task), known[0].metric, *cells, *levels, counts, q.integer(known[0].shots), *told))
    last = ("not comparable with published scores",) if any(why.values()) else ()
    header = ("task", "metric", *colours, "chance", "most frequent answer", "documents", "shots", *last)
    numeric = frozenset(range(2, len(models) + 6))
    tables = [Table("scores", "", header, tuple(body), numeric, note=_STAR)]
    unlike = [
        (_title(task), reason, listed(labels))
        for task in tasks
        if task not in shared
        for reason, labels in why[task].items()
    ]
    if unlike:
        title = "Why some scores do not stand beside published ones"
        tables.append(Table("why-not", title, ("task", "why", "models"), tuple(unlike)))
    return Section("scores", "Scores", "", (), tuple(tables))


_STAR = (
    "Score ± standard error; a star marks what is better than guessing, and than always giving the most frequent "
    "answer, by more than two standard errors."
)


def _why_not(models: Sequence[Judged], tasks: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Task to what keeps a score from standing beside published ones, and whose score that is."""
    found: dict[str, dict[str, list[str]]] = {task: {} for task in tasks}
    for model in models:
        for task in tasks:
            if task in model.scores and model.scores[task].why_not:
                found[task].setdefault(model.scores[task].why_not, []).append(model.label)
    return found


def _pictures(models: Sequence[Judged], tasks: Sequence[str], colours: Mapping[str, str]) -> Section:
    drawn = tuple(figures.task(f"task-{task}", _title(task), task, models, colours) for task in tasks)
    return Section("tasks", "Task by task", "", drawn)


def _cell(model: Judged, task: str) -> str:
    score = model.scores.get(task)
    if score is None or score.value is None:
        return "not asked" if score is None or score.skipped is None else f"skipped: {score.skipped}"
    return score.measured + ("*" if score.judgement == "above" else "") + (" broken" if score.degenerate else "")


def _differences(tasks: Sequence[str], found: Sequence[Difference]) -> Section:
    chosen = [one for one in found if not one.lower_is_better]
    header = ("task", "first − second", "points, 95 %", "only one is right", "p", "p adjusted", "documents", "verdict")
    body = tuple(
        (
            _title(one.task),
            f"{one.first} − {one.second}",
            _interval(one, 100, 1),
            "–" if one.only_first is None else f"{one.only_first} : {one.only_second}",
            _p(one.p),
            _p(one.adjusted),
            _documents(one),
            _judged(one),
        )
        for one in chosen
    )
    table = Table("differences", "", header, body, frozenset({2, 3, 4, 5, 6}), note=_DIFFERENCES)
    return Section("differences", "Differences", "", (), (table,))


_DIFFERENCES = (
    "Points are hundredths of the score. Only one is right: documents that the first alone, and that the second alone, "
    "answers rightly; McNemar's exact test asks whether a coin would split them so."
)


def _interval(one: Difference, scale: float, digits: int) -> str:
    value = f"{scale * one.value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    if one.value == 0 and one.stderr == 0:
        return "0, all alike"
    if one.stderr is None:
        return value
    reach = t_limit(one.n - 1) * one.stderr
    ends = [
        f"{scale * end:+.{digits}f}".replace("-", "\N{MINUS SIGN}") for end in (one.value - reach, one.value + reach)
    ]
    return f"{value} [{ends[0]}, {ends[1]}]"


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.3f}" if p >= 0.001 else f"{p:.4f}"


def _documents(one: Difference) -> str:
    return q.integer(one.n) + (f", {q.integer(one.unlike)} not shared" if one.unlike else "")


def _judged(one: Difference) -> str:
    return f"{one.better} is better" if one.better else "inside the noise"


def _bits(
    models: Sequence[Judged], tasks: Sequence[str], found: Sequence[Difference], colours: Mapping[str, str]
) -> Section:
    measured = [task for task in tasks if any(_bits_of(model, task) is not None for model in models)]
    if not measured:
        return Section("bits", "Bits per byte")
    body = tuple(
        (_title(task), *(q.plus_minus(_bits_of(model, task), _bits_error(model, task)) for model in models))
        for task in measured
    )
    table = Table("bits", "", ("task", *colours), body, frozenset(range(1, len(models) + 1)))
    tables = [table]
    chosen = [one for one in found if one.lower_is_better]
    if chosen:
        header = ("task", "first − second", "bits per byte, 95 %", "p", "p adjusted", "documents", "verdict")
        rows = tuple(
            (
                _title(one.task),
                f"{one.first} − {one.second}",
                _interval(one, 1, 3),
                _p(one.p),
                _p(one.adjusted),
                _documents(one),
                _judged(one),
            )
            for one in chosen
        )
        tables.append(Table("bits-differences", "Differences", header, rows, frozenset({2, 3, 4, 5})))
    return Section("bits", "Bits per byte of the gold answers", _BITS, (), tuple(tables))


_BITS = (
    "Mean over documents ± standard error, lower is better. Questions answered by a letter: the bits of that letter."
)


def _bits_of(model: Judged, task: str) -> float | None:
    return model.scores[task].bits_per_byte if task in model.scores else None


def _bits_error(model: Judged, task: str) -> float | None:
    return model.scores[task].bits_error if task in model.scores else None


def _groups(models: Sequence[Judged], colours: Mapping[str, str]) -> Section:
    drawn, tables = [], []
    for kind, title in _KINDS.items():
        split = {model.label: (model.entries.get("mmlu", {}).get("groups") or {}).get(kind, {}) for model in models}
        names = list(dict.fromkeys(name for groups in split.values() for name in groups))
        if not names:
            continue
        drawn.append(figures.groups(f"groups-{kind}", f"MMLU by {title}", names, split, colours))
        body = tuple(
            (
                name.replace("_", " "),
                *(_share(split[model.label].get(name)) for model in models),
                next(q.integer(groups[name]["n"]) for groups in split.values() if name in groups),
            )
            for name in names
        )
        header = ("group", *colours, "documents")
        tables.append(
            Table(
                f"groups-{kind}", f"By {title}", header, body, frozenset(range(1, len(header))), note="Chance is 0.25."
            )
        )
    return Section("groups", "MMLU by group", "", tuple(drawn), tuple(tables))


def _share(group: Mapping[str, Any] | None) -> str:
    return q.NOT_MEASURED if group is None else q.plus_minus(group["value"], group["stderr"])


_COLUMNS = (
    *("kind", "task", "group", "metric", "model", "against", "value", "stderr", "chance", "majority", "n", "shots"),
    *("only_first", "only_second", "p", "p_adjusted", "better", "comparable"),
)


def as_csv(models: Sequence[Judged], tasks: Sequence[str], found: Sequence[Difference]) -> str:
    """Everything of the page in one long table: a row for each score, group and difference."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for model in models:
        for task in tasks:
            score = model.scores.get(task)
            if score is None or score.value is None:
                continue
            levels = (score.chance, score.majority, _whole(score.n), _whole(score.shots))
            end = ("", "", "", "", "", str(score.comparable).lower())
            rows.writerow(("score", task, "", score.metric, model.label, "", score.value, score.stderr, *levels, *end))
            if score.bits_per_byte is not None:
                bits = (score.bits_per_byte, score.bits_error, "", "", *levels[2:])
                rows.writerow(("score", task, "", "bits_per_byte", model.label, "", *bits, *end))
            for kind, groups in (model.entries[task].get("groups") or {}).items():
                for name, one in groups.items():
                    numbers = (one["value"], one["stderr"], one["chance"], one["majority"], one["n"], *levels[3:])
                    rows.writerow(("group", task, f"{kind}: {name}", score.metric, model.label, "", *numbers, *end))
    for one in found:
        head = ("difference", one.task, "", one.metric, one.first, one.second, one.value, one.stderr, "", "", one.n, "")
        rows.writerow((*head, one.only_first, one.only_second, one.p, one.adjusted, one.better, ""))
    return text.getvalue()


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
