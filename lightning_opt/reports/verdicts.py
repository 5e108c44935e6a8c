"""A comparison in words: who ended lowest, by how much, on how many runs, and what that does not show."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from lightning_opt.reports import origins, targets
from lightning_opt.reports import quantities as q
from lightning_opt.reports.findings import Card
from lightning_opt.reports.job_states import OVER, counted, unfinished
from lightning_opt.reports.jobs import Comparison, Job, shown
from lightning_opt.reports.ranking import Cell, Gap, Group, Standing, baseline, gap
from lightning_opt.reports.scores import listed, scores


def loss_of(cell: Cell) -> str:
    """Mean final loss, with the standard deviation between seeds where there is one."""
    if not cell.n:
        return q.NOT_MEASURED
    if cell.std is None:
        return q.number(cell.mean)
    return q.plus_minus(cell.mean, cell.std) if cell.std else f"{q.number(cell.mean)} ± 0"


def verdict(group: Group) -> str:
    """Who won, by how much, with n and spread, in two or three sentences; no order that the runs do not show."""
    ranked = [standing for standing in group.standings if standing.best]
    if not ranked:
        return f"Nothing can be ranked: no run came to its end with a validation loss ({counted(group.jobs)})."
    if len(ranked) == 1:
        return _alone(ranked[0], group)
    first, *others = ranked
    gaps = {other.optimizer: gap(_best(first), _best(other), group.noise) for other in others}
    inside, behind = (
        [other for other in others if gaps[other.optimizer].judgement == judgement]
        for judgement in ("inside", "beyond")
    )
    sentences = []
    if group.noise is None:
        sentences += [_level_or_lower(first, others[0], gaps, len(ranked)), _UNTESTED]
    elif inside:
        names = listed([first.optimizer, *(other.optimizer for other in inside)])
        sentences.append(
            f"{names} cannot be told apart: {_figure(first)} against {listed([_figure(other) for other in inside])}, "
            f"a difference inside the noise between seeds ({_tests([gaps[other.optimizer] for other in inside])})."
        )
        if behind:
            sentences.append(f"Beyond noise behind {first.optimizer}: {listed([_figure(other) for other in behind])}.")
    else:
        sentences.append(_ahead(first, behind, gaps))
    return " ".join([*sentences, *_asides(first, others[0])])


def titled(group: Group, words: str) -> str:
    """The words, with whom they are about where there is more than one group."""
    return f"Group {group.name}: {words}" if group.name else words


_UNTESTED = (
    "One run of each setting (n = 1): the spread between seeds is unknown, so this order is what was measured once, "
    "not what is shown to hold."
)


def _ahead(first: Standing, behind: Sequence[Standing], gaps: dict[str, Gap]) -> str:
    second = behind[0]
    test = gaps[second.optimizer]
    how = "won with" if _repeated(_best(first), _best(second)) else "ended lowest at"
    below = f"{_apart(test, _best(second))} below {_figure(second)}"
    words = f"{first.optimizer} {how} {_bare(first)}, {below}; {_beyond(test, _best(first), _best(second))}."
    if len(behind) > 1:
        words += f" The rest are further behind: {listed([_figure(other) for other in behind[1:]])}."
    return words


def _repeated(*cells: Cell) -> bool:
    return all(cell.n > 1 for cell in cells)


def _beyond(test: Gap, *cells: Cell) -> str:
    """What a difference beyond noise is worth: a win needs seeds of its own on both sides."""
    if _repeated(*cells):
        return f"beyond the noise between seeds ({_tests([test])})"
    return (
        f"more than the noise among the repeated settings explains ({_tests([test])}), "
        "though not every setting named here was repeated itself"
    )


def _level_or_lower(first: Standing, second: Standing, gaps: dict[str, Gap], optimizers: int) -> str:
    test = gaps[second.optimizer]
    among = "" if optimizers == 2 else f" of {optimizers} optimizers"
    if not test.value:
        return f"{first.optimizer} and {second.optimizer} ended level at {loss_of(_best(first))} nats per token."
    return (
        f"{first.optimizer} ended lowest{among} at {_bare(first)}, {_apart(test, _best(second))} below "
        f"{_figure(second)}."
    )


def _alone(standing: Standing, group: Group) -> str:
    cells = [cell for cell in standing.cells if cell.n]
    where = f" with {_setting(cells[0])}" if _setting(cells[0]) else ""
    words = f"{standing.optimizer} alone has finished runs: its best ended at {loss_of(cells[0])} nats per token{where}"
    if len(group.standings) == 1 and len(cells) == 1:
        words = f"{standing.optimizer} ended at {loss_of(cells[0])} nats per token{where}"
    elif len(group.standings) == 1:
        words = f"{standing.optimizer}: the best of {len(cells)} settings ended at {loss_of(cells[0])} nats per token"
        words += where
    words += f" ({_runs(cells[0])})"
    if len(cells) < 2:
        return f"{words}. There is nothing to rank it against."
    test = gap(cells[0], cells[1], group.noise)
    second = f"{loss_of(cells[1])} with {_setting(cells[1]) or 'its defaults'}"
    against = f"{q.number(test.value, 2)} below the next, {second}"
    told = {
        "beyond": f"; {_beyond(test, *cells[:2])}.",
        "inside": f"; inside the noise between seeds ({_tests([test])}), so neither is shown to be better.",
        "unknown": ". One run of each (n = 1): the spread between seeds is unknown.",
    }
    return f"{words}, {against}{told[test.judgement]}"


def _asides(first: Standing, second: Standing) -> list[str]:
    """Says where the two best runs differ by more than what belongs to their optimizers."""
    one, other = _best(first).best, _best(second).best
    apart = [
        f"{key} ({shown(one.differs[key])} and {shown(other.differs[key])})"
        for key in _not_the_optimizers(one)
        if one.differs[key] != other.differs[key]
    ]
    if not apart:
        return []
    return [f"The two also differ in {listed(apart)}, so the difference is not the optimizer's alone."]


def _not_the_optimizers(job: Job) -> list[str]:
    return [key for key in job.differs if not re.match(r"(optimizer|seed)\b", key)]


def _best(standing: Standing) -> Cell:
    assert standing.best is not None
    return standing.best


def _figure(standing: Standing) -> str:
    return f"{standing.optimizer}'s {_bare(standing)}"


def _bare(standing: Standing) -> str:
    cell = _best(standing)
    where = f"{_setting(cell)}, " if _setting(cell) else ""
    return f"{loss_of(cell)} ({where}{_runs(cell)})"


def _setting(cell: Cell) -> str:
    return cell.best.setting


def _runs(cell: Cell) -> str:
    return f"n = {cell.n}"


def _apart(test: Gap, other: Cell) -> str:
    share = f" ({q.percent(test.value / other.mean)})" if other.mean else ""
    return f"{q.number(test.value, 2)} nats{share}"


def _tests(tests: Sequence[Gap]) -> str:
    def one(test: Gap) -> str:
        t = "infinite" if test.t is None or math.isinf(test.t) else f"{abs(test.t):.1f}"
        return f"t = {t}, 5 % limit {test.limit or 0.0:.1f}"

    return "; ".join(one(test) for test in tests)


def alarm(comparison: Comparison, found: Sequence[Group]) -> str:
    """What must be said first: what is not ranked against what, and what is still to come. Else empty."""
    said = [comparison.trouble] if comparison.trouble else []
    if comparison.mixed:
        said.append("Mixed on purpose (--mixed): these runs were not given the same task.")
    if len(found) > 1:
        apart = listed(list(found[0].facts))
        said.append(
            f"Not one ranking but {len(found)}: these runs differ in {apart}, so their losses do not mean the same. "
            "Each group is ranked by itself."
        )
    left = unfinished(comparison.jobs)
    if left:
        said.append(f"{len(left)} of {_jobs(len(comparison.jobs))} can still change what follows: {counted(left)}.")
    if any(job.state == "FAILED" for job in left):
        said.append("What failed is missing from the ranking; the command that asked for it runs it again.")
    return " ".join(said)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def state(comparison: Comparison) -> tuple[str, str]:
    """What became of the jobs, and the tone it is said in."""
    states = [job.state for job in comparison.jobs]
    done = sum(one in OVER for one in states)
    tone = "good" if done == len(states) else "bad" if "FAILED" in states else "warn"
    return f"{done} of {len(states)} jobs done", tone if states else "warn"


def cards(comparison: Comparison, found: Sequence[Group]) -> tuple[Card, ...]:
    """The key figures of the header; figures of a ranking only where there is one ranking."""
    budget = Card("jobs", f"{len(comparison.jobs)}", counted(comparison.jobs))
    ranked = [standing for standing in found[0].standings if standing.best] if len(found) == 1 else []
    if not ranked:
        return (budget,)
    best = _best(ranked[0])
    summary = best.best.run.summary
    where = " · ".join(filter(None, (ranked[0].optimizer, _setting(best), _runs(best))))
    taken = [Card("lowest final loss", loss_of(best), where)]
    if len(ranked) > 1:
        test = gap(best, _best(ranked[1]), found[0].noise)
        told = {"beyond": "beyond noise", "inside": "inside noise", "unknown": "n = 1: spread unknown"}
        detail = f"nats · {ranked[1].optimizer} {loss_of(_best(ranked[1]))} · {told[test.judgement]}"
        taken.append(Card("ahead of the next", q.number(test.value, 2) if test.value else "0", detail))
    taken += _speed_up(found[0])
    speed, share = summary.get("tokens_per_s_per_device"), q.finite(summary.get("optimizer_share"))
    detail = "" if share is None else f"of the best run · optimizer {q.percent(share)} of each step"
    tokens = Card("tokens per run", q.short(summary.get("tokens")), f"{q.integer(summary.get('steps'))} steps")
    return (*taken, Card("tokens/s per device", q.short(speed), detail), tokens, budget)


def doubts(group: Group) -> list[str]:
    """What keeps the first optimizer's speed-up over the baseline from being worth a headline."""
    base, first = baseline(group), group.standings[0]
    if base is None or base is first or base.best is None or first.best is None:
        return []
    said = []
    if gap(first.best, base.best, group.noise).judgement != "beyond":
        said.append(f"{first.optimizer}'s lead over {base.optimizer} is not shown to be beyond noise")
    if base.edge is None or base.edge.side:
        said.append(f"{base.optimizer} is not tuned: its best rate is the only one tried or at the edge of its grid")
    return said


def _speed_up(group: Group) -> list[Card]:
    base, first = baseline(group), group.standings[0]
    if base is None or base is first or base.best is None or first.best is None or doubts(group):
        return []
    needed = targets.of_cell(first.best, base.best.mean)[0]
    spent = targets.of_end(base.best)
    if needed is None or spent is None or not needed.tokens or not spent.tokens:
        return []
    most = "at most " if needed.at_most else ""
    detail = f"{first.optimizer} came to {base.optimizer}'s final loss in {most}{q.short(needed.tokens)} tokens: a hint"
    return [Card("speed-up in tokens", times(spent.tokens / needed.tokens, needed.at_most), detail)]


def times(ratio: float, at_least: bool = False) -> str:
    """A ratio as people say it: 1.43×."""
    return f"{'≥ ' if at_least else ''}{q.number(ratio, 3)}×"


def notes(comparison: Comparison, found: Sequence[Group]) -> tuple[str, ...]:
    """What the comparison shows, and what it does not."""
    said = []
    for group in found:
        told = (*_mixed(group), *origins.note(group), *_budget(group), *_edges(group), *_told_by_scores(group))
        said += [titled(group, words) for words in told]
    if any(group.noise for group in found):
        said.append(
            "± is the standard deviation between seeds. Each pair is tested on its own by Student's t, with one spread "
            "pooled over all repeated settings, which are taken to spread alike; that the best of several settings "
            "was picked is not corrected for."
        )
    elif any(one.best for group in found for one in group.standings):
        said.append(
            "Every setting was run once (n = 1). Before believing a small difference, repeat the best of each with "
            "other seeds: the command is below."
        )
    said += _origins(comparison.jobs)
    return tuple(said)


def _mixed(group: Group) -> list[str]:
    """What else varies in one ranking: the best of each optimizer may differ by that alone."""
    keys = _not_the_optimizers(group.jobs[0]) if group.jobs else []
    varied = [key for key in keys if len({shown(job.differs[key]) for job in group.jobs}) > 1]
    if not varied:
        return []
    return [
        f"Jobs of this ranking also differ in {listed(varied)}: only those that agree there compare optimizers alone."
    ]


def _budget(group: Group) -> list[str]:
    budgets = {one.optimizer: len([cell for cell in one.cells if cell.n or cell.diverged]) for one in group.standings}
    said = []
    if len(budgets) > 1 and len(set(budgets.values())) > 1:
        tried = ", ".join(f"{name} {count}" for name, count in budgets.items())
        said.append(f"Unequal tuning: settings tried are {tried}. Whoever tries more gets a luckier best.")
    elif max(budgets.values(), default=0) > 1:
        said.append(
            "The best setting is picked by the same loss that is reported, so each best is a little lucky; the number "
            "of settings tried is given with it."
        )
    return said


def _edges(group: Group) -> list[str]:
    said, untuned = [], []
    for standing in group.standings:
        where = standing.edge
        if where is None or not where.side:
            continue
        if where.side == "only":
            untuned.append(f"{standing.optimizer} ({q.trimmed(where.value, 3)})")
            continue
        left = len(unfinished(standing.jobs))
        open_jobs = f" so far; {_jobs(left)} of it {'is' if left == 1 else 'are'} still open."
        said.append(
            f"{standing.optimizer}'s best rate ({q.trimmed(where.value, 3)}) is at the {where.side} edge of the grid"
            + (open_jobs if left else _WIDEN)
        )
    if untuned:
        said.append(f"Run at one rate only, so not tuned here: {listed(untuned)}.")
    return said


_WIDEN = ": widen it; a better one may lie beyond."


def _told_by_scores(group: Group) -> list[str]:
    """Whether the downstream scores of the two best optimizers differ by more than two standard errors."""
    ranked = [standing for standing in group.standings if standing.best]
    if len(ranked) < 2:
        return []
    one, other = ({entry.task: entry for entry in scores(_best(r).best.run) if entry.counts} for r in ranked[:2])
    apart, compared = [], []
    for task in one:
        if task in other and one[task].suite == other[task].suite:
            a, b = one[task], other[task]
            error = math.hypot(a.stderr or 0.0, b.stderr or 0.0)
            compared.append(a.title)
            if error and abs((a.value or 0.0) - (b.value or 0.0)) > 2 * error:
                ahead = ranked[0] if (a.value or 0.0) > (b.value or 0.0) else ranked[1]
                apart.append(f"{a.label} (ahead: {ahead.optimizer})")
    if not compared:
        return []
    names = f"the best {ranked[0].optimizer} and the best {ranked[1].optimizer} run"
    if apart:
        return [f"More than two standard errors lie between {names} in {listed(apart)}."]
    return [f"No score tells {names} apart ({listed(compared)}: all within two standard errors)."]


def _origins(jobs: Sequence[Job]) -> list[str]:
    said = []
    devices = {str(job.run.env.get("device_name") or job.run.env.get("device")) for job in jobs if job.run.env}
    if len(devices) > 1:
        said.append(f"Speeds are not comparable: the jobs ran on {listed(sorted(devices))}.")
    elif _at_once(jobs):
        said.append("Some jobs ran at the same time: if they shared a device, their speeds and times suffer from it.")
    commits = {str(job.run.env["git_commit"]) for job in jobs if job.run.env.get("git_commit")}
    if len(commits) > 1:
        said.append(f"The jobs ran on {len(commits)} different commits of the code.")
    if any(job.run.env.get("git_dirty") is True for job in jobs):
        said.append("The code had uncommitted changes: a commit alone does not reproduce these runs.")
    return said


_HANDOVER_S = 10.0  # a sweep starts the next process while the last one is still leaving


def _at_once(jobs: Sequence[Job]) -> bool:
    """Whether two processes that ran jobs on one host lived at the same time, by their owners' first and last signs."""
    ends: dict[tuple[str, float, str], float] = {}
    for job in jobs:
        owner = job.run.part("status", "owner")
        started, ended = q.finite(owner.get("started")), q.finite(owner.get("heartbeat"))
        if job.state in OVER and started is not None and ended is not None:
            process = (str(owner.get("host")), started, str(owner.get("pid")))  # a worker may run job after job
            ends[process] = max(ended, ends.get(process, ended))
    spans = sorted(ends.items())
    return any(before[0] == after[0] and after[1] < end - _HANDOVER_S for (before, end), (after, _) in pairwise(spans))
