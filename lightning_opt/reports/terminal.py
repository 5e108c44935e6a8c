"""The short form of a comparison for the terminal: a table of at most 100 columns, the best command, the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning_opt.reports import quantities as q
from lightning_opt.reports import verdicts
from lightning_opt.reports.commands import shown_path
from lightning_opt.reports.job_states import ending, in_order, remark
from lightning_opt.reports.jobs import Job, of_sweep
from lightning_opt.reports.ranking import groups
from lightning_opt.reports.scores import TITLES, comparability, scores
from lightning_opt.reports.sweep_commands import again
from lightning_opt.run_folder import SweepFolder

WIDTH = 100
_MOST = 24
_NEEDS_NO_WORD = ("NOT STARTED", "RUNNING", "STOPPED")


def sweep_lines(folder: Path) -> list[str]:
    """A sweep in lines of at most 100 characters, but for commands and paths, which must stay whole to be pasted.

    Args:
        folder: a sweep folder, finished or not.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    comparison = of_sweep(Path(folder))
    found, silent = groups(comparison.jobs)
    lines: list[str] = []
    for group in found:
        if group.name:
            facts = ", ".join(f"{name} {text}" for name, text in group.facts.items())
            lines += ["", *textwrap.wrap(f"Group {group.name} (ranked by itself): {facts}", WIDTH)]
        lines += _table(group.jobs)
    if silent:
        lines += ["", "in no group (no plan was written):", *_table(silent)]
    for group in found:
        lines += ["", *textwrap.wrap(verdicts.titled(group, verdicts.verdict(group)), WIDTH)]
        best = next((one.best for one in group.standings if one.best), None)
        if best is not None and again(best.best):
            lines += ["", "best:", f"  {again(best.best)}"]
    report = SweepFolder(comparison.folder).report_html
    return [*lines, "", f"report: {shown_path(report)}"]


def _table(jobs: Sequence[Job]) -> list[str]:
    ordered = in_order(jobs)
    shown = ordered if len(ordered) <= _MOST else ordered[: _MOST - 1]
    tasks = [task for task in TITLES if any(e.task == task and e.counts for job in shown for e in scores(job.run))]
    several = len({job.optimizer for job in jobs}) > 1
    header = ["", "run", "loss", *(TITLES[task] for task in tasks), "tokens/s", "opt", "memory", "state"]
    rows = [_cells(job, tasks, several, index == 0) for index, job in enumerate(shown)]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    spare = WIDTH - sum(widths[2:-1]) - 2 * (len(widths) - 1) - widths[0]
    widths[1] = min(widths[1], max(16, spare - min(widths[-1], 14)))
    widths[-1] = max(8, min(widths[-1], spare - widths[1]))
    lines = [_line(row, widths) for row in [header, *rows]]
    if len(shown) < len(ordered):
        lines.append(f"   and {len(ordered) - len(shown)} more in the report")
    suite = next(filter(None, (comparability(scores(job.run)) for job in shown)), "") if tasks else ""
    lines += [f"   {line}" for line in textwrap.wrap(suite, WIDTH - 3)]
    reasons = [f"   {_name(job, several)}: {remark(job)}" for job in ordered if job.state not in _NEEDS_NO_WORD]
    return [*lines, *(_cut(line, WIDTH) for line in reasons if not line.endswith(": "))]


def _cells(job: Job, tasks: Sequence[str], several: bool, first: bool) -> list[str]:
    summary = job.run.summary
    entries = {entry.task: entry for entry in scores(job.run) if entry.counts}
    return [
        "*" if first and job.loss is not None else "",
        _name(job, several),
        "–" if job.loss is None else q.number(job.loss),
        *(entries[task].measured.replace(" ± ", "±") if task in entries else "–" for task in tasks),
        *(
            "–" if q.finite(summary.get(key)) is None else show(summary[key])
            for key, show in (("tokens_per_s_per_device", q.short), ("optimizer_share", q.percent))
        ),
        "–" if q.finite(summary.get("peak_memory_bytes")) is None else q.size(summary["peak_memory_bytes"]),
        ending(job),
    ]


def _name(job: Job, several: bool) -> str:
    return " ".join(filter(None, [job.optimizer if several else "", job.label.replace(", ", " ")])) or job.optimizer


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    shown = [
        _cut(cell, width).ljust(width) if column in (0, 1, len(cells) - 1) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(shown).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
