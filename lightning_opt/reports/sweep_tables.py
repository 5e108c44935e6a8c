"""The tables of a comparison: the best of each optimizer, every job, and what the baseline's loss cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.reports import origins, targets
from lightning_opt.reports import quantities as q
from lightning_opt.reports.job_states import counted, ending, in_order, remark
from lightning_opt.reports.jobs import Job, link, shown
from lightning_opt.reports.ranking import Cell, Group, Standing, baseline, gap
from lightning_opt.reports.scores import TITLES, Score, comparability, scores
from lightning_opt.reports.sweep_figures import Colours, Response, edge_words
from lightning_opt.reports.tables import Table
from lightning_opt.reports.verdicts import doubts, loss_of, times
from lightning_opt.run_folder import short_names

_ABSENT = "–"
_JUDGED = {"beyond": "yes", "inside": "no", "unknown": "unknown"}
_MOST_COLUMNS = 4


def groups(found: Sequence[Group]) -> Table:
    """What sets the groups apart."""
    names = list(found[0].facts)
    body = tuple(
        (group.name, *(group.facts[name] for name in names), q.integer(len(group.jobs)), counted(group.jobs))
        for group in found
    )
    return Table("groups", "", ("group", *names, "jobs", "of these"), body, frozenset({len(names) + 1}))


def standing(group: Group, page: Path, colours: Colours) -> Table:
    """The best setting of each optimizer, and how it stands to the first."""
    first = group.standings[0].best
    header = ("optimizer", "best setting", "final loss", "n", "behind", "beyond noise", "settings tried")
    header += ("tokens/s", "optimizer step", "jobs")
    body = []
    for one in group.standings:
        tried = q.integer(len([cell for cell in one.cells if cell.n or cell.diverged]))
        if one.best is None or first is None:
            nothing = (_ABSENT, _ABSENT, "0", _ABSENT, _ABSENT, tried, _ABSENT, _ABSENT)
            body.append((one.optimizer, *nothing, counted(one.jobs)))
            continue
        apart = gap(first, one.best, group.noise)
        behind = (_ABSENT, _ABSENT) if one.best is first else (_behind(apart.value), _JUDGED[apart.judgement])
        summary = one.best.best.run.summary
        body.append(
            (
                one.optimizer,
                one.best.best.setting or "as configured",
                loss_of(one.best),
                q.integer(one.best.n),
                *behind,
                tried,
                _measured(summary, "tokens_per_s_per_device", q.short),
                _joined(summary, ("optimizer_share", q.percent), ("optimizer_ms", q.milliseconds)),
                counted(one.jobs),
            )
        )
    note = (
        "Final loss: mean over n finished runs of validation loss at the end of the schedule, nats per token, ± the "
        "standard deviation between seeds where n > 1. Speed and the optimizer's share and time of a step are the best "
        "run's. Settings tried: those that finished or diverged."
    )
    links = tuple(link(one.cells[0].best, page) for one in group.standings)
    swatches = tuple(colours[one.optimizer][0] for one in group.standings)
    best = frozenset({0}) if first is not None else frozenset()
    numeric = frozenset({2, 3, 4, 6, 7, 8})
    return Table("standing", "", header, tuple(body), numeric, swatches, note, False, links, best)


def values_from(group: Group, colours: Colours) -> Table:
    """What each optimizer started from, before anything was asked of it: tuned values, of which source, or none."""
    body = []
    for one in group.standings:
        found = Counter(origins.row(job.run) for job in one.jobs)
        body += [(one.optimizer, *words, q.integer(count)) for words, count in found.items()]
    header = ("optimizer", "values", "source", "tuned", "jobs")
    swatches = tuple(colours[row[0]][0] for row in body)
    note = "What the command itself gave is not among the tuned ones: it counts before both."
    return Table("origins", "Whose values they ran", header, tuple(body), frozenset({4}), swatches, note)


def _behind(value: float) -> str:
    return f"+{q.number(value, 2)}" if value else "0"


def every_job(jobs: Sequence[Job], keys: Sequence[str], page: Path, colours: Colours) -> Table:
    """One row for each job, with only the overrides that differ."""
    ordered = in_order(jobs)
    columns = [key for key in keys if key != "optimizer"]
    crowded = len(columns) > _MOST_COLUMNS  # then one column says them all
    names = short_names(keys)
    settings = ["setting", *(key for key in columns if key == "seed")] if crowded else columns
    tasks, suffix, note = _tasks(ordered)
    header = ("optimizer", *(names.get(key, key) for key in settings), "final loss", "state")
    header += (*(f"{TITLES.get(task, task)}{suffix}" for task in tasks), "tokens/s", "optimizer share")
    header += ("memory · state",)
    body = []
    for job in ordered:
        summary = job.run.summary
        entries = {entry.task: entry for entry in scores(job.run)}
        body.append(
            (
                job.optimizer,
                *(job.setting if key == "setting" else _asked(job, key) for key in settings),
                _ABSENT if job.loss is None else q.number(job.loss),
                ending(job),
                *(_score(entries.get(task), bool(suffix)) for task in tasks),
                _measured(summary, "tokens_per_s_per_device", q.short),
                _measured(summary, "optimizer_share", q.percent),
                _joined(summary, ("peak_memory_bytes", q.size), ("optimizer_state_bytes", q.size)),
            )
        )
    first = [index for index, job in enumerate(ordered) if job.loss is not None][:1]
    note = (
        "Final loss: validation loss at the schedule's end, nats per token; only finished runs have one. Optimizer "
        f"share: of the training step. Memory: its peak, and the optimizer's state. {note}"
    )
    state = header.index("state")
    numeric = frozenset(range(1, len(header))) - {state} - ({1} if crowded else frozenset())
    swatches = tuple(colours[job.optimizer][0] for job in ordered)
    links = tuple(link(job, page) for job in ordered)
    return Table("jobs", "", header, tuple(body), numeric, swatches, note.strip(), False, links, frozenset(first))


def settings(group: Group, colours: Colours) -> Table:
    """One row for each setting whose seeds were repeated: what the runs of each came to."""
    cells = sorted(
        ((cell.mean, one.optimizer, cell) for one in group.standings for cell in one.cells), key=lambda c: c[0]
    )
    repeated = any(cell.n > 1 for _, _, cell in cells)
    body = tuple(
        (
            name,
            cell.best.setting or "as configured",
            loss_of(cell) if cell.n else _ABSENT,
            q.integer(cell.n),
            q.number(min(cell.losses)) if cell.n else _ABSENT,
            q.number(max(cell.losses)) if cell.n else _ABSENT,
            counted(cell.jobs),
        )
        for _, name, cell in cells
    )
    header = ("optimizer", "setting", "final loss", "n", "lowest", "highest", "jobs")
    swatches = tuple(colours[name][0] for _, name, _ in cells)
    note = "Jobs that differ by nothing but their seed, together: mean ± standard deviation of the finished ones."
    rows = body if repeated else ()
    return Table("settings", "By setting", header, rows, frozenset({2, 3, 4, 5}), swatches, note)


def remarks(jobs: Sequence[Job], colours: Colours) -> Table:
    """Jobs that did not finish, each with its reason."""
    told = [(job, remark(job)) for job in in_order(jobs)]
    kept = [(job, words) for job, words in told if words]
    body = tuple((job.optimizer, job.label or job.folder.name, ending(job), words) for job, words in kept)
    swatches = tuple(colours[job.optimizer][0] for job, _ in kept)
    return Table("remarks", "Not finished", ("optimizer", "setting", "state", "why"), body, frozenset(), swatches)


def _asked(job: Job, key: str) -> str:
    return shown(job.known[key]) if key in job.known else _ABSENT


def _joined(summary: dict[str, Any], *shown_as: tuple[str, Callable[[Any], str]]) -> str:
    parts = [_measured(summary, key, show) for key, show in shown_as]
    return " · ".join(part for part in parts if part != _ABSENT) or _ABSENT


def _measured(summary: dict[str, Any], key: str, show: Callable[[Any], str]) -> str:
    return _ABSENT if q.finite(summary.get(key)) is None else show(summary[key])


def _tasks(jobs: Sequence[Job]) -> tuple[list[str], str, str]:
    """The tasks that any job was scored on, what to add to their names, and the note on what the scores are worth."""
    entries = [entry for job in jobs for entry in scores(job.run) if entry.value is not None or entry.skipped]
    found = {entry.task for entry in entries if entry.value is not None}
    tasks = [*(task for task in TITLES if task in found), *sorted(found - set(TITLES))]
    labels = {entry.label.removeprefix(entry.title) for entry in entries if entry.value is not None}
    suites = {entry.suite for entry in entries}
    notes = list(dict.fromkeys(filter(None, (comparability(scores(job.run)) for job in jobs))))
    for task in dict.fromkeys(entry.task for entry in entries if entry.task not in found):
        reasons = dict.fromkeys(str(entry.skipped) for entry in entries if entry.task == task)
        notes.append(f"{TITLES.get(task, task)} was skipped: {'; '.join(reasons)}.")
    if len(suites) > 1:
        notes.append("The suites differ between jobs: their scores do not mean the same.")
    note = " ".join([*(["Scores are ± their standard error."] if tasks else []), *notes])
    return tasks, labels.pop() if len(labels) == 1 else "", note


def _score(entry: Score | None, said: bool) -> str:
    if entry is None or (entry.value is None and not entry.skipped):
        return _ABSENT
    if entry.value is None:
        return "skipped"
    if entry.degenerate:
        return "no score"
    return entry.measured + ("" if said else entry.label.removeprefix(entry.title))


def to_baseline(group: Group, colours: Colours) -> Table | None:
    """Steps, tokens and seconds until the baseline's final loss, for the best setting of each optimizer."""
    base = baseline(group)
    ranked = [one for one in group.standings if one.best]
    if base is None or base.best is None or len(ranked) < 2:
        return None
    spent = targets.of_end(base.best)
    header = ("optimizer", "best setting", "n", "steps", "tokens", "time", "speed-up in tokens", "speed-up in time")
    body = [
        (one.optimizer, one.best.best.setting or "as configured", q.integer(one.best.n), *_cost(one.best, base, spent))
        for one in ranked
        if one.best is not None
    ]
    note = (
        f"Until validation loss {q.number(base.best.mean)}, where the best {base.optimizer} setting ended (the "
        "baseline: its row is its whole run). Straight lines between validation points; time is wall-clock with "
        "validations. A run that crosses early does so before its own rate has come down, while the baseline's loss "
        "is the end of a finished schedule: the ratio is a hint, and can flatter either side. Proof is a run whose "
        "schedule ends at those steps. "
        + "".join(f"Mind that {doubt}. " for doubt in doubts(group))
        + "sweep.csv has steps, tokens and seconds of every job."
    )
    swatches = tuple(colours[one.optimizer][0] for one in ranked)
    return Table("target", "", header, tuple(body), frozenset(range(2, 8)), swatches, note)


def _cost(cell: Cell, base: Standing, spent: targets.Crossing | None) -> tuple[str, ...]:
    assert base.best is not None
    if cell is base.best:
        whole = _costs(spent) if spent else (q.NOT_MEASURED,) * 3
        return (*whole, "baseline", "baseline")
    needed, reached = targets.of_cell(cell, base.best.mean)
    if needed is None:
        words = "not reached" if not reached else f"reached by {reached} of {len(cell.finished)}"
        return (words, _ABSENT, _ABSENT, _ABSENT, _ABSENT)
    return (*_costs(needed), _ratio(needed, spent, "tokens"), _ratio(needed, spent, "seconds"))


def _costs(cost: targets.Crossing) -> tuple[str, str, str]:
    most = "≤ " if cost.at_most else ""
    shown_as = (q.integer(cost.steps), q.short(cost.tokens), q.duration(cost.seconds))
    return tuple(text if text == q.NOT_MEASURED else f"{most}{text}" for text in shown_as)  # type: ignore[return-value]


def _ratio(needed: targets.Crossing, spent: targets.Crossing | None, unit: str) -> str:
    mine, theirs = getattr(needed, unit), getattr(spent, unit, None)
    if not mine or not theirs:
        return q.NOT_MEASURED
    return times(theirs / mine, needed.at_most)


def grid(what: Response, colours: Colours) -> Table:
    """The best value of a swept number for each optimizer, and whether the grid held it in."""
    body = []
    for name, points in what.points.items():
        values = sorted({value for value, cell in points if cell.n or cell.diverged})
        finished = [point for point in points if point[1].n]
        best = min(finished, key=lambda point: point[1].mean, default=None)
        span = " to ".join(dict.fromkeys(q.trimmed(value, 3) for value in (*values[:1], *values[-1:])))
        shown_best = (_ABSENT, _ABSENT) if best is None else (q.trimmed(best[0], 3), loss_of(best[1]))
        body.append((name, *shown_best, f"{span} ({len(values)})" if values else "none", edge_words(what, name)))
    header = ("optimizer", f"best {what.thing}", "final loss", "values tried", "where the best lies")
    swatches = tuple(colours[name][0] for name in what.points)
    return Table("grid", f"Best {what.thing} of each optimizer", header, tuple(body), frozenset({1, 2, 3}), swatches)
