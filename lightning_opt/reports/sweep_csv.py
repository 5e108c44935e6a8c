"""A comparison as CSV, for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports import targets
from lightning_opt.reports.job_states import in_order
from lightning_opt.reports.jobs import Comparison, Job, link, shown
from lightning_opt.reports.ranking import Group, baseline
from lightning_opt.reports.scores import scores
from lightning_opt.reports.settings import rate_after_scale, seed

_SUMMARY = (
    "train_loss",
    "tokens",
    "steps",
    "seconds",
    "tokens_per_s_per_device",
    "step_ms",
    "optimizer_ms",
    "optimizer_share",
    "peak_memory_bytes",
    "optimizer_state_bytes",
    "mfu",
)


def as_csv(comparison: Comparison, groups: Sequence[Group]) -> str:
    """The whole comparison as CSV: a row for each job, plain numbers, empty where nothing was measured."""
    tasks = list(dict.fromkeys(entry.task for job in comparison.jobs for entry in scores(job.run)))
    keys = [key for key in comparison.keys if key not in ("optimizer", "seed")]
    header = ["group", "rank", "job", "state", "reason", "optimizer", "seed", "learning_rate", *keys]
    header += ["final_loss", "latest_val_loss", *_SUMMARY]
    header += ["suite", *(f"{task}{part}" for task in tasks for part in ("", "_stderr"))]
    header += ["to_baseline_steps", "to_baseline_tokens", "to_baseline_seconds", "config_hash", "report"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    placed = {job.folder: group for group in groups for job in group.jobs}
    ranks: dict[str, int] = {}
    for job in in_order(comparison.jobs):
        group, rank = placed.get(job.folder), None
        if group is not None and job.loss is not None:
            rank = ranks[group.name] = ranks.get(group.name, 0) + 1
        row = [
            group.name if group else None,
            rank,
            job.folder.name,
            job.state,
            job.run.status.get("reason"),
            job.optimizer,
            seed(job.run),
        ]
        row += [rate_after_scale(job.run), *(shown(job.known[key]) if key in job.known else None for key in keys)]
        row += [job.loss, *(_plain(job, key) for key in ("val_loss", *_SUMMARY))]
        row += [*_csv_scores(job, tasks), *_csv_target(job, group)]
        row += [job.run.status.get("config_hash"), link(job, comparison.folder)]
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _plain(job: Job, key: str) -> Any:
    value = job.run.summary.get(key)
    return None if q.finite(value) is None else value


def _csv_scores(job: Job, tasks: Sequence[str]) -> list[Any]:
    entries = {entry.task: entry for entry in scores(job.run)}
    suite = next((entry.suite for entry in entries.values()), None)
    cells: list[Any] = [suite]
    for task in tasks:
        entry = entries.get(task)
        cells += [entry.value, entry.stderr] if entry and entry.counts else [None, None]
    return cells


def _csv_target(job: Job, group: Group | None) -> list[float | None]:
    base = baseline(group) if group else None
    found = targets.crossing(job.run, base.best.mean) if base and base.best and job.loss is not None else None
    return [found.steps, found.tokens, found.seconds] if found else [None, None, None]
