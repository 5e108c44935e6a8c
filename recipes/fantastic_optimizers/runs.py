"""The same material from run folders: each finished run in its cell, by the study's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports.jobs import Job, of_runs
from lightning_opt.reports.ranking import Cell as Setting
from lightning_opt.reports.settings import rate_after_scale
from lightning_opt.study import Cell, Results
from recipes.fantastic_optimizers.plans import config

_COMPUTE_OPTIMAL = 20  # tokens per non-embedding parameter at 1x
_COSTS = {"seconds": "seconds", "tokens": "tokens", "peak_bytes": "peak_memory_bytes"}


@dataclass(frozen=True)
class Read:
    """What the runs say.

    Attributes:
        results: the best setting of each cell, one loss for each of its seeds.
        tried: cell to every setting with its mean loss; infinite where it diverged.
        curves: cell to tokens and validation loss of its best run.
        left_out: runs that belong to no cell, in words.
    """

    results: Results
    tried: dict[Cell, list[tuple[dict[str, float], float]]]
    curves: dict[Cell, dict[str, tuple[list[float], list[float]]]]
    left_out: tuple[str, ...]


def read(paths: Sequence[Path]) -> Read:
    """Reads run folders and sweeps; a setting is all runs that differ by nothing but their seed.

    Args:
        paths: run folders; a sweep stands for its jobs.

    Raises:
        FileNotFoundError: one of them is no folder.
    """
    settings: dict[Cell, dict[str, list[Job]]] = defaultdict(lambda: defaultdict(list))
    left_out = []
    for job in of_runs(paths, Path()).jobs:
        cell = cell_of(job)
        if cell is None:
            left_out.append(f"{job.folder.name}: its plan does not say which cell it belongs to")
        elif job.state in ("FINISHED", "DIVERGED"):
            settings[cell][job.identity].append(job)
        else:
            left_out.append(f"{job.folder.name}: {job.state.lower()}")
    results, tried, curves = Results(source="run folders"), {}, {}
    for cell, found in settings.items():
        cells = sorted((Setting(tuple(jobs)) for jobs in found.values()), key=lambda one: one.mean)
        tried[cell] = [(_values(one), one.mean) for one in cells]
        _add(results, curves, cell, cells[0])
    return Read(results, tried, curves, tuple(left_out))


def cell_of(job: Job) -> Cell | None:
    """Optimizer, model and data ratio by the study's names where it has them; None where the run does not say."""
    run = job.run
    model, name = run.plan.get("model"), run.asked("optimizer.name") or run.plan.get("optimizer")
    size, tokens = (q.finite(run.plan.get(key)) for key in ("params_non_embedding", "tokens"))
    ratio = q.finite(run.asked("scale.chinchilla"))
    if ratio is None and size and tokens:
        ratio = float(f"{tokens / size / _COMPUTE_OPTIMAL:.3g}")
    if not model or not name or not ratio:
        return None
    models = {ours: label for label, ours in config()["models"].items()}
    optimizers = {one["ours"]: label for label, one in config()["optimizers"].items()}
    return Cell(optimizers.get(str(name), str(name)), models.get(str(model), str(model)), ratio)


def _values(setting: Setting) -> dict[str, float]:
    run = setting.best.run
    found = {"learning_rate": rate_after_scale(run), "weight_decay": q.finite(run.asked("optimizer.weight_decay"))}
    return {name: value for name, value in found.items() if value is not None}


def _add(results: Results, curves: dict[Cell, Any], cell: Cell, best: Setting) -> None:
    """Files the cell's best setting."""
    if not best.n:
        return
    results.losses[cell] = tuple(best.losses)
    done = best.finished
    for name, key in _COSTS.items():
        values = [q.finite(job.run.summary.get(key)) for job in done]
        if all(values):
            getattr(results, name)[cell] = tuple(value for value in values if value is not None)
    size = q.finite(best.best.run.plan.get("params_non_embedding"))
    if size:
        results.sizes[cell.params] = size
    for task in best.best.run.part("summary", "evaluation"):
        values = [
            q.finite(job.run.part("summary", "evaluation").get(task, {}).get("value"))
            for job in done
            if _scored(job, task)
        ]
        if values and len(values) == len(done) and None not in values:
            results.scores.setdefault(cell, {})[task] = tuple(value for value in values if value is not None)
    series = {by: best.best.run.series("val/loss", column) for by, column in (("tokens", "tokens"), ("time", "time_s"))}
    curves[cell] = {by: found for by, found in series.items() if len(found[0]) > 1}


def _scored(job: Job, task: str) -> bool:
    return isinstance(job.run.part("summary", "evaluation").get(task), dict)
