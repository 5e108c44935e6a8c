"""Puts a comparison together and writes it: ``report.html``, ``report.md`` and ``sweep.csv``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.reports import quantities as q
from lightning_opt.reports import sweep_csv, sweep_curves, sweep_figures, sweep_tables, verdicts
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.findings import data_name, model_name
from lightning_opt.reports.jobs import Comparison, Job, of_runs, of_sweep
from lightning_opt.reports.page import BROKEN, Section, guarded, render
from lightning_opt.reports.ranking import Cell, Group, groups, unequal
from lightning_opt.reports.scores import listed
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.reports.sweep_commands import sweep_commands
from lightning_opt.reports.sweep_figures import Colours, Response
from lightning_opt.reports.tables import Table
from lightning_opt.run_folder import SweepFolder, short_names
from lightning_opt.run_folder.records import write_text

Part = tuple[Sequence[Figure], str, tuple[Table, ...]]
"""Figures, introduction and tables of a section."""

_RATE_KEYS = ("optimizer.lr", "optimizer.lr_scale")


def write_sweep(folder: Path) -> None:
    """Writes the comparison of a sweep's jobs into its folder: ``report.html``, ``report.md`` and ``sweep.csv``.

    A sweep that is still going is shown as it stands. Only the folder is read.

    Args:
        folder: a sweep folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    _write(of_sweep(Path(folder)))


def compare(runs: Sequence[Path], out: Path, *, mixed: bool = False) -> None:
    """Writes the comparison of any runs into a folder of its own.

    Args:
        runs: run folders; a sweep folder stands for all its jobs.
        out: where ``report.html``, ``report.md`` and ``sweep.csv`` go; made where it is missing.
        mixed: runs of unequal data, tokens or schedule end are put side by side, and marked, in place of refused.

    Raises:
        FileNotFoundError: a run folder does not exist.
        ConfigError: the runs differ in data, tokens or schedule end.
    """
    comparison = of_runs(runs, Path(out))
    apart = unequal(comparison.jobs)
    if apart and not mixed:
        differ = "; ".join(f"{name}: {', '.join(found)}" for name, found in apart.items())
        how = "compare those that agree, or add --mixed to see them side by side, marked as not comparable"
        raise ConfigError(
            "--compare", str(out), f"must be of runs that may be compared, and these differ ({differ}); {how}"
        )
    _write(replace(comparison, mixed=bool(apart)))


def _write(comparison: Comparison) -> None:
    found, silent = groups(comparison.jobs)
    content = report(comparison, found, silent)
    paths = SweepFolder(comparison.folder)
    write_text(paths.table, sweep_csv.as_csv(comparison, found))
    write_text(paths.report_html, render("report.html.j2", content))
    write_text(paths.report_md, render("report.md.j2", content))


def report(comparison: Comparison, found: Sequence[Group], silent: Sequence[Job]) -> dict[str, Any]:
    """Everything the templates show of a comparison, as plain data."""
    colours = optimizer_colours(job.optimizer for job in comparison.jobs)
    sections = [Section("groups", "Groups", _GROUPS, tables=(sweep_tables.groups(found),))] if len(found) > 1 else []
    for group in found:
        sections += _sections(comparison, group, colours, f"-{group.name.lower()}" if group.name else "")
    if comparison.mixed:
        drawn = guarded("together", lambda: sweep_curves.together(found, colours), ())
        sections.insert(1, Section("together", "All runs together", _TOGETHER, tuple(drawn)))
    if silent:
        tables = tuple(_renamed(one, "-silent") for one in _jobs(comparison, silent, colours)[2])
        sections.append(Section("silent", "In no group", _SILENT, tables=tables))
    words, tone = verdicts.state(comparison)
    name = comparison.folder.resolve().name
    return {
        "title": _title(comparison),
        "state": words,
        "tone": tone,
        "subtitle": _subtitle(comparison),
        "folder": name,
        "source": f"run folders of {name}",
        "reading": "How to read this comparison",
        "alarm_tone": "warn",
        "alarm": guarded("alarm", lambda: verdicts.alarm(comparison, found), ""),
        "verdict": tuple(
            guarded(
                "verdict",
                lambda group=group: verdicts.titled(group, verdicts.verdict(group)),
                "No verdict could be drawn.",
            )
            for group in found
        ),
        "cards": guarded("cards", lambda: verdicts.cards(comparison, found), ()),
        "notes": guarded("notes", lambda: verdicts.notes(comparison, found), ()),
        "sections": [*sections, guarded("setup", lambda: _setup(comparison), Section("setup", "Setup", BROKEN))],
        "commands": guarded("commands", lambda: sweep_commands(comparison, found), ()),
        "missing": (),
    }


_TOGETHER = "Put side by side with --mixed. They were not given the same task: read shapes, not ranks."
_GROUPS = "Only runs that share all of these are ranked against each other."
_SILENT = "These jobs wrote no plan (they never started, or failed before it): whom they belong with is not known."


def _title(comparison: Comparison) -> str:
    names = list(dict.fromkeys(job.optimizer for job in comparison.jobs))
    if not names:
        return "An empty comparison"
    models = list(dict.fromkeys(model_name(job.run) for job in comparison.jobs if job.run.plan))
    whom = f"{listed(names)} compared" if len(names) < 5 else f"{len(names)} optimizers compared"
    if len(names) == 1:
        whom = f"{names[0]}: {len(comparison.jobs)} runs compared"
    return f"{whom} on {models[0]}" if len(models) == 1 else whom


def _subtitle(comparison: Comparison) -> str:
    planned = [job.run for job in comparison.jobs if job.run.plan]
    data = list(dict.fromkeys(data_name(run) for run in planned))
    tokens = list(dict.fromkeys(q.short(run.plan.get("tokens")) for run in planned if run.plan.get("tokens")))
    length = [f"{tokens[0]} tokens"] if len(tokens) == 1 else []
    return " · ".join([comparison.folder.resolve().name, *data[:2], *length])


def _sections(comparison: Comparison, group: Group, colours: Colours, suffix: str) -> list[Section]:
    where = f", group {group.name}" if group.name else ""
    parts = (
        ("standing", "Best of each optimizer", lambda: _standing(comparison, group, colours)),
        ("curves", "Loss on the way", lambda: _curves(comparison, group, colours, suffix)),
        ("ends", "Loss against what it cost", lambda: _ends(group, colours, suffix)),
        ("grid", "Tuning", lambda: _tuning(comparison, group, colours, suffix)),
        ("target", "What it takes to reach the baseline", lambda: _target(group, colours)),
        ("jobs", "Every job", lambda: _jobs(comparison, group.jobs, colours, sweep_tables.settings(group, colours))),
    )
    sections = []
    for key, title, make in parts:
        drawn = guarded(key, make, ((), BROKEN, ()))
        if drawn is not None:
            shown, intro, tables = drawn
            renamed = tuple(_renamed(one, suffix) for one in tables)
            sections.append(Section(f"{key}{suffix}", f"{title}{where}", intro, tuple(shown), renamed))
    return sections


def _renamed(table: Table, suffix: str) -> Table:
    return replace(table, key=f"{table.key}{suffix}")


def _standing(comparison: Comparison, group: Group, colours: Colours) -> Part:
    return (), "", (sweep_tables.standing(group, comparison.folder, colours), sweep_tables.values_from(group, colours))


def _jobs(comparison: Comparison, jobs: Sequence[Job], colours: Colours, *more: Table) -> Part:
    told = sweep_tables.remarks(jobs, colours)
    every = sweep_tables.every_job(jobs, comparison.keys, comparison.folder, colours)
    return (), "", (every, *(table for table in (told, *more) if table.rows))


def _curves(comparison: Comparison, group: Group, colours: Colours, suffix: str) -> Part:
    drawn = sweep_curves.curves(comparison, group, colours, suffix)
    return drawn, "" if drawn else f"Loss: {q.NOT_MEASURED}. No metrics were logged.", ()


def _ends(group: Group, colours: Colours, suffix: str) -> Part | None:
    drawn = sweep_curves.ends(group, colours, suffix)
    return (drawn, "", ()) if drawn else None


def _tuning(comparison: Comparison, group: Group, colours: Colours, suffix: str) -> Part | None:
    what = response(comparison.keys, group, suffix)
    ranked = [one for one in group.standings if one.best]
    several = len(ranked) > 1 and any(len([cell for cell in one.cells if cell.n]) > 1 for one in ranked)
    drawn = [sweep_figures.response(what, colours)] if what and ranked else []
    drawn += [sweep_figures.all_losses(f"losses{suffix}", ranked, colours)] if several else []
    tables = (sweep_tables.grid(what, colours),) if what else ()
    return (drawn, "", tables) if drawn or tables else None


def response(keys: Sequence[str], group: Group, suffix: str = "") -> Response | None:
    """The swept number to draw the final loss against: the rate where it varies, else the only number that does.

    Args:
        keys: overrides that differ.
        group: the runs.
        suffix: of the figure's key.
    """
    others = [key for key in keys if key not in ("optimizer", "seed", *_RATE_KEYS)]
    rates = {
        one.optimizer: [(cell.rate, cell) for cell in one.cells if cell.rate is not None and cell.rate > 0]
        for one in group.standings
    }
    if any(len({value for value, _ in points}) > 1 for points in rates.values()):
        points = {name: _narrowed(found) for name, found in rates.items() if found}
        label = "peak learning rate (lr × lr_scale)"
        narrowed = any(len(points[name]) < len(rates[name]) for name in points)
        return Response(f"rates{suffix}", "Final loss by learning rate", label, points, True, "rate", narrowed)
    numeric = [key for key in others if all(q.finite(job.differs[key]) is not None for job in group.jobs)]
    if len(others) != 1 or numeric != others or any(key in _RATE_KEYS for key in keys):
        return None
    points = {
        one.optimizer: _narrowed([(float(cell.best.differs[others[0]]), cell) for cell in one.cells])
        for one in group.standings
    }
    values = sorted({value for found in points.values() for value, _ in found})
    if len(values) < 2:
        return None
    name = short_names(keys)[others[0]]
    log = values[0] > 0 and values[-1] / values[0] >= 4
    return Response(f"swept{suffix}", f"Final loss by {name}", others[0], points, log, name, False)


def _narrowed(points: Sequence[tuple[float, Cell]]) -> list[tuple[float, Cell]]:
    """One cell for each value: the best; cells come best first."""
    kept: dict[float, Cell] = {}
    for value, cell in points:
        known = kept.get(value)
        if known is None or (not known.n and not known.diverged and cell.diverged):
            kept[value] = cell
    return sorted(kept.items())


def _target(group: Group, colours: Colours) -> Part | None:
    table = sweep_tables.to_baseline(group, colours)
    return None if table is None else ((), "", (table,))


_SHARED: tuple[tuple[str, str, str], ...] = (
    ("data", "data", "data"),
    ("data", "data_fingerprint", "fingerprint"),
    ("data", "sequence_length", "sequence length"),
    ("length", "tokens", "tokens"),
    ("length", "max_steps", "steps"),
    ("length", "global_batch_size", "global batch (sequences)"),
    ("length", "warmup_steps", "warm-up steps"),
    ("model", "model", "model"),
    ("model", "params_total", "parameters"),
    ("compute", "precision", "precision"),
    ("compute", "devices", "devices"),
)


def _setup(comparison: Comparison) -> Section:
    planned = [job.run for job in comparison.jobs if job.run.plan]
    rows = [(group, name, _all_of([q.text(run.plan.get(key)) for run in planned])) for group, key, name in _SHARED]
    for group, key, name in (("compute", "device_name", "device"), ("origin", "git_commit", "commit")):
        rows.append((group, name, _all_of([q.text(run.env.get(key)) for run in planned if run.env])))
    schedules = [str(run.asked("schedule.name") or "–") for run in planned]
    rows.append(("length", "schedule", _all_of(schedules)))
    order = {group: place for place, group in enumerate(dict.fromkeys(row[0] for row in rows))}
    body = tuple(sorted((row for row in rows if row[2] not in ("", "–")), key=lambda row: order[row[0]]))
    tables = (Table("setup", "", ("of", "what", "value"), body, grouped=True),) if body else ()
    intro = "What all runs share; where they differ, each value is named." if body else "No run wrote down what it is."
    details = (("The sweep's command", f"python {comparison.command}"),) if comparison.command else ()
    return Section("setup", "Setup", intro, (), tables, details)


def _all_of(texts: Sequence[str]) -> str:
    """The one value, or all of them."""
    unique = list(dict.fromkeys(texts))
    return " / ".join(unique[:6]) + (" / …" if len(unique) > 6 else "")
