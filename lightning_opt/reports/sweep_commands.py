"""What to do after a comparison: the best runs' own command lines, and those that would settle what is open."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from lightning_opt.reports import quantities as q
from lightning_opt.reports import targets
from lightning_opt.reports.commands import command, shown_path, without
from lightning_opt.reports.job_states import unfinished
from lightning_opt.reports.jobs import CHANGES_NOTHING, Comparison, Job
from lightning_opt.reports.ranking import Cell, Edge, Group, Standing, baseline
from lightning_opt.reports.scores import suite
from lightning_opt.reports.settings import seed
from lightning_opt.reports.verdicts import loss_of
from lightning_opt.run_folder import to_go_on

_LENGTHS = r"trainer\.max_(steps|tokens|epochs)"
_RATES = ("optimizer.lr_scale", "optimizer.lr")
_KEPT = "what is done stays, the rest runs, what failed again"


def again(job: Job) -> str:
    """The command that trains this job alone; empty where it is not known what was asked of it."""
    if not job.overrides and job.run.lacks("overrides.txt"):
        return ""
    return command(["python", "train.py", *_kept(job)])


def _kept(job: Job, *keys: str) -> list[str]:
    """The overrides that decide what the job is, without those of the keys (patterns)."""
    return without(job.overrides, "|".join((CHANGES_NOTHING, *keys)))


def sweep_commands(comparison: Comparison, found: Sequence[Group]) -> tuple[tuple[str, str], ...]:
    """Pairs of what it does and the command."""
    pairs = []
    if comparison.command:
        pairs += [
            (f"Go on with this sweep, {len(jobs)} of {len(comparison.jobs)} jobs: {_KEPT}", line)
            for line, jobs in to_go_on(unfinished(comparison.jobs)).items()
        ]
    for group in found:
        where = f" (group {group.name})" if group.name else ""
        ranked = [one for one in group.standings if one.best]
        pairs += [(_best_words(one, place) + where, again(one.cells[0].best)) for place, one in enumerate(ranked)]
        for one in ranked:
            pairs += _widened(comparison, one)
        for one in ranked[:2]:
            pairs += _repeated(comparison, one)
        pairs += _proof(group, ranked)
        if ranked and suite(ranked[0].cells[0].best.run) != "full":
            path = shlex.quote(shown_path(ranked[0].cells[0].best.folder))
            words = f"Score the best run{where} on the real test sets"
            pairs.append((words, f"python -m recipes.evaluate {path} --suite full"))
    pairs.append(("Draw this comparison again", _draw(comparison)))
    return tuple(pair for pair in pairs if pair[1])


def _best_words(one: Standing, place: int) -> str:
    cell = one.cells[0]
    which = "The best run" if place == 0 else "The best run of its optimizer"
    setting = f", {cell.best.setting}" if cell.best.setting else ""
    return f"{which}: {one.optimizer}{setting}, final loss {loss_of(cell)} (n = {cell.n})"


def _more(comparison: Comparison, words: str, overrides: Sequence[str]) -> tuple[str, str]:
    """A sweep, whose jobs join the comparison where that is a sweep's own folder."""
    place = [f"hydra.sweep.dir={shown_path(comparison.folder)}"] if comparison.command else []
    apart = "" if place else " (a new sweep: compare again with its folder added)"
    return words + apart, command(["python", "train.py", "-m", *overrides, *place])


def _widened(comparison: Comparison, one: Standing) -> list[tuple[str, str]]:
    """More rates beyond the edge at which the best one lies, in the grid's own spacing."""
    where, job = one.edge, one.cells[0].best
    keys = [key for key in _RATES if key in job.differs] or ["optimizer.lr_scale"]
    if where is None or not where.side or len(keys) != 1 or not again(job) or unfinished(one.jobs):
        return []
    value = q.finite(job.differs.get(keys[0], job.run.asked(keys[0]))) or 1.0
    values = {q.finite(cell.best.differs.get(keys[0])) for cell in one.cells if cell.n or cell.diverged}
    beyond = _beyond(where, value, sorted(v for v in values if v))
    seeds = list(dict.fromkeys(filter(None, (seed(each.run) for each in one.cells[0].jobs))))
    repeated = [f"seed={','.join(seeds)}"] if len(seeds) > 1 else []
    kept = _kept(job, re.escape(keys[0]), *(["seed"] if repeated else []))
    words = f"Widen {one.optimizer}'s grid" if where.side != "only" else f"Tune {one.optimizer}'s rate"
    return [_more(comparison, words, [*kept, *repeated, f"{keys[0]}={','.join(beyond)}"])]


def _beyond(where: Edge, value: float, values: Sequence[float]) -> list[str]:
    if where.side == "only" or len(values) < 2:
        return [f"{value / 2:g}", f"{value * 2:g}"]
    step = values[-1] / values[-2] if where.side == "high" else values[0] / values[1]
    return [f"{value * step:g}", f"{value * step**2:g}"]


def _repeated(comparison: Comparison, one: Standing) -> list[tuple[str, str]]:
    """The best setting with two more seeds, where it was run with one."""
    cell: Cell = one.cells[0]
    first = seed(cell.best.run)
    if cell.n > 1 or first is None or not first.isdigit() or not again(cell.best):
        return []
    more = f"seed={int(first) + 1},{int(first) + 2}"
    words = f"Learn {one.optimizer}'s spread: its best setting with two more seeds"
    return [_more(comparison, words, [*_kept(cell.best, "seed"), more])]


def _proof(group: Group, ranked: Sequence[Standing]) -> list[tuple[str, str]]:
    """The first optimizer's best run with a schedule that ends where it crossed the baseline's loss."""
    base = baseline(group)
    if base is None or base.best is None or not ranked or ranked[0] is base:
        return []
    job = ranked[0].cells[0].best
    needed = targets.crossing(job.run, base.best.mean)
    if needed is None or needed.at_most or not again(job) or job.run.asked("scale.chinchilla") is not None:
        return []
    words = f"Prove the speed-up: does {ranked[0].optimizer} reach {base.optimizer}'s loss when its schedule ends here?"
    return [(words, command(["python", "train.py", *_kept(job, _LENGTHS), f"trainer.max_steps={round(needed.steps)}"]))]


def _draw(comparison: Comparison) -> str:
    here = shown_path(comparison.folder)
    given = [shown_path(path) for path in comparison.sources]
    marked = ["--mixed"] if comparison.mixed else []
    return command(["python", "-m", "recipes.report", *(["--compare", here, *marked, *given] if given else [here])])
