"""Which curves a comparison shows: loss on the way by tokens, time and compute, and the ends against what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_opt.reports import figures, sweep_figures, tradeoffs
from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.jobs import Comparison, Job
from lightning_opt.reports.ranking import Cell, Group
from lightning_opt.reports.reading import Series
from lightning_opt.reports.series import smooth
from lightning_opt.reports.sweep_figures import Colours, Line

_CAPTIONS = {
    ("val/loss", "tokens"): "Only the ends may be ranked: before that, the runs' rates are still on their way down.",
    ("val/loss", "time"): "The same by wall-clock time, validations included: what a slower or faster step changes.",
    ("val/loss", "compute"): "The same by the model's training operations (plan.json's FLOPs per token times tokens), "
    "which leave out the optimizer's own.",
    ("train/loss", "tokens"): "Rolling means over a twentieth of each run; one batch's loss jumps.",
    ("train/loss", "time"): "Rolling means over a twentieth of each run, by wall-clock time.",
}


def curves(comparison: Comparison, group: Group, colours: Colours, suffix: str) -> list[Figure]:
    """Validation loss by tokens, time and compute, and training loss by tokens and time, as far as they were logged.

    Where every run takes the same operations per token, compute says nothing that tokens do not; only a comparison
    that was put together by hand shows it then.
    """
    wanted = [*_CAPTIONS]
    if not comparison.sources and len({_each(job) for job in group.jobs if job.run.plan}) < 2:
        wanted.remove(("val/loss", "compute"))
    return _drawn(group.jobs, _front(group), wanted, colours, suffix, {})


def together(found: Sequence[Group], colours: Colours) -> list[Figure]:
    """Validation loss of all groups in one picture each, and their ends against what they cost."""
    front = {key: f"{label} ({group.name})" for group in found for key, label in _front(group).items()}
    jobs = [job for group in found for job in group.jobs]
    wanted = [key for key in _CAPTIONS if key[0] == "val/loss"]
    captions = dict.fromkeys(wanted, tradeoffs.UNRANKED)
    names = {id(one.cells[0].best): group.name for group in found for one in group.standings}
    cells = [one.cells[0] for group in found for one in group.standings]
    drawn = _drawn(jobs, front, wanted, colours, "-together", captions)

    def label(cell: Cell) -> str:
        return f"{cell.best.optimizer} ({names[id(cell.best)]})"

    return drawn + _ends(cells, label, colours, "-together", ranked=False)


def ends(group: Group, colours: Colours, suffix: str) -> list[Figure]:
    """Every setting's final loss against its peak memory and against its time."""
    cells = [cell for one in group.standings for cell in one.cells]

    def label(cell: Cell) -> str:
        return ", ".join(filter(None, (cell.best.optimizer, cell.best.setting)))

    return _ends(cells, label, colours, suffix)


def _ends(
    cells: Sequence[Cell], label: Callable[[Cell], str], colours: Colours, suffix: str, *, ranked: bool = True
) -> list[Figure]:
    drawn = []
    for kind, key, draw in (("memory", "peak_memory_bytes", tradeoffs.memory), ("time", "seconds", tradeoffs.time)):
        spots = tradeoffs.spots(cells, key, label)
        if len(spots) > 1:
            drawn.append(draw(f"tradeoff-{kind}{suffix}", spots, colours, ranked=ranked))
    return drawn


def _front(group: Group) -> dict[int, str]:
    """The runs in front, by identity, with their labels: each optimizer's best, else the one that came furthest."""
    front = {}
    for one in group.standings:
        job = one.cells[0].best if one.best else max(one.jobs, key=lambda job: len(job.run.series("train/loss")[0]))
        setting = f", {job.setting}" if job.setting else ""
        front[id(job)] = f"{one.optimizer}{setting}"
    return front


def _drawn(
    jobs: Sequence[Job],
    front: Mapping[int, str],
    wanted: Sequence[tuple[str, str]],
    colours: Colours,
    suffix: str,
    captions: Mapping[tuple[str, str], str],
) -> list[Figure]:
    clock = figures.time_label([x for job in jobs for x in job.run.series("train/loss", "time_s")[0][-1:]])
    compute = figures.flops_label([x for job in jobs for x in _series(job, "val/loss", "compute")[0][-1:]])
    labels = {"tokens": "tokens", "time": clock, "compute": compute}
    drawn = []
    for column, by in wanted:
        validated = column == "val/loss"
        lines = []
        for job in jobs:
            series = _series(job, column, by)
            if series[0]:
                series = series if validated else smooth(series)
                series = series if by == "tokens" else figures.in_unit(series, labels[by])
                lines.append(Line(job.optimizer, front.get(id(job), ""), series, id(job) in front))
        if lines:
            title = f"{'Validation' if validated else 'Training'} loss by {by}"
            key = f"{column.replace('/', '-')}-{by}{suffix}"
            caption = captions.get((column, by), _CAPTIONS[column, by])
            drawn.append(sweep_figures.curves(key, title, labels[by], lines, colours, caption, validated))
    return drawn


def _series(job: Job, column: str, by: str) -> Series:
    if by != "compute":
        return job.run.series(column, {"tokens": "tokens", "time": "time_s"}[by])
    each, (tokens, losses) = _each(job), job.run.series(column, "tokens")
    return ([each * x for x in tokens], losses) if each else ([], [])


def _each(job: Job) -> float | None:
    """Training operations of a token; None where the plan does not say."""
    each = q.finite(job.run.plan.get("flops_per_token"))
    return each if each and each > 0 else None
