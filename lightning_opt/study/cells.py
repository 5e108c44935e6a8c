"""The cells of a live study: where each starts, how a run of it is asked for, and what the run folders say of it.

The run folders are the only ledger: a run counts where it was asked for in just these words.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.plan import ConfigError, check
from lightning_opt.run_folder import FINISHED_STATES, SweepFolder, owner_seems_gone, read_json, read_status, summarize
from lightning_opt.study.space import canonical, identity, steps_of

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell, Config

TUNING, REPORTING = "tuning", "reporting"
"""The two parts of the validation text: what chose a setting does not report it."""

BATCH, WARMUP = "trainer.global_batch_size", "schedule.warmup"
_ELEMENT = re.compile(r"(.+)\[(\d+)\]")
# words that make no other run
_NOT_COUNTED = re.compile(r"(hydra|logger)([./].*)?|name|resume|on_failure|jobs_per_device|callbacks\.checkpoint\..*")


@dataclass(frozen=True)
class CellPlan:
    """One cell before its first run.

    Attributes:
        cell: optimizer, model, scale.
        words: the overrides of ``train.py`` that make it.
        start: hyperparameter to the value that ``train.py`` itself would use, in the order they are searched.
        lists: each list of which an element is searched, as it starts: ``{"optimizer.betas": (0.9, 0.95)}``.
        tokens: of a run.
        sequence_length: tokens.
        batch: sequences per step at the start.
        warmup: of the schedule at the start.
        params: non-embedding parameters.
        flops_per_token: of training.
        origin: where the start's values come from, in words.
        config: the checked configuration of a run at the start; without it only lengths are checked.
    """

    cell: Cell
    words: tuple[str, ...]
    start: Config
    lists: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tokens: float = 0.0
    sequence_length: int = 1
    batch: int = 1
    warmup: float = 0.0
    params: float = 0.0
    flops_per_token: float = 0.0
    origin: str = ""
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    _refused: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)

    def refused(self, config: Config) -> str | None:
        """Why a configuration makes no sense in this cell (a warm-up as long as the run, say); None where it does."""
        key = identity(config)
        if key not in self._refused:
            self._refused[key] = self._why_not(config)
        return self._refused[key]

    def _why_not(self, config: Config) -> str | None:
        if self.config is not None:
            try:
                check(with_values(self.config, config))
            except ConfigError as error:
                return str(error)
            return None
        steps, warmup = self.steps(config), config.get(WARMUP, self.warmup)
        if steps < 1:
            return f"{self.tokens:g} tokens are less than one step"
        return f"a warm-up of {warmup:g} steps leaves nothing of {steps}" if 1 <= warmup >= steps else None

    def steps(self, config: Config) -> int:
        """Optimizer steps of a run: a change of batch keeps the tokens."""
        return steps_of(self.tokens, config.get(BATCH, self.batch), self.sequence_length)


@dataclass(frozen=True)
class Trial:
    """One run that a study asks for.

    Attributes:
        plan: its cell.
        config: hyperparameter to value.
        seed: of weights and data order.
        part: of the validation text it is measured on: ``tuning`` or ``reporting``.
    """

    plan: CellPlan
    config: Config
    seed: int
    part: str = TUNING

    @property
    def cell(self) -> Cell:
        """Optimizer, model, scale."""
        return self.plan.cell

    def words(self) -> list[str]:
        """Its overrides of ``train.py``; a list of which an element is searched is written whole."""
        said: dict[str, str] = {}
        lists: dict[str, list[Any]] = {}
        for name, value in self.config.items():
            if element := _ELEMENT.fullmatch(name):
                whole = lists.setdefault(element[1], list(self.plan.lists[element[1]]))
                whole[int(element[2])] = value
                said[element[1]] = shown(whole)
            else:
                said[name] = shown(value)
        settings = [f"{name}={text}" for name, text in said.items()]
        return [*self.plan.words, *settings, f"seed={self.seed}", f"trainer.val_part={self.part}"]


def shown(value: Any) -> str:
    """A value in the grammar of the command line: ``null``, ``true``, ``[0.9,0.95]``, ``0.008``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(shown(item) for item in value)}]"
    return "null" if value is None else repr(value) if isinstance(value, float) else str(value)


def with_values(config: Mapping[str, Any], values: Config) -> dict[str, Any]:
    """A copy of a configuration with these values set, each by its dotted name; ``betas[0]`` is an element."""
    changed = copy.deepcopy(dict(config))
    for name, value in values.items():
        path, place = elements(name) or (name, None)
        *parents, last = path.split(".")
        node = changed
        for parent in parents:
            node = node[parent]
        if place is None:
            node[last] = value
        else:
            node[last] = [*node[last][:place], value, *node[last][place + 1 :]]
    return changed


def value_at(config: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or of an element.

    Raises:
        KeyError: there is none.
    """
    path, place = elements(name) or (name, None)
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(name)
        node = node[part]
    if place is None:
        return node
    if not isinstance(node, list | tuple) or place >= len(node):
        raise KeyError(name)
    return node[place]


def elements(name: str) -> tuple[str, int] | None:
    """The list and the index that a name like ``optimizer.betas[0]`` stands for; None where it names no element."""
    found = _ELEMENT.fullmatch(name)
    return (found[1], int(found[2])) if found else None


Key = frozenset[tuple[str, str]]
"""What a run was asked for, whatever the order of its words and the spelling of its numbers."""


def key_of(words: Iterable[str]) -> Key:
    """The identity of a run by its overrides; those that change nothing about it do not count."""
    pairs = (word.lstrip("+").partition("=")[::2] for word in words)
    return frozenset((name, _canonical(text)) for name, text in pairs if not _NOT_COUNTED.fullmatch(name))


def _canonical(text: str) -> str:
    words = {"null": "None", "true": "True", "false": "False"}
    plain = re.sub(r"\b(null|true|false)\b", lambda found: words[found[0]], text.strip())
    try:
        return canonical(ast.literal_eval(plain))
    except (ValueError, SyntaxError):
        return text.strip().strip("'\"")


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        state: RUNNING, FINISHED, DIVERGED, PREEMPTED or FAILED; empty where it never began.
        loss: final validation loss, nats per token; infinite where it diverged; None where there is none (yet).
        seconds: it trained.
        tokens: it was trained on.
        reason: why it ended as it did, where that is said.
        folder: its run folder.
    """

    state: str = ""
    loss: float | None = None
    seconds: float = 0.0
    tokens: float = 0.0
    reason: str = ""
    folder: Path | None = None

    @property
    def is_result(self) -> bool:
        """Whether nobody needs to run it again."""
        return self.loss is not None


Ledger = Mapping[Key, Outcome]


def read_ledger(folder: Path) -> dict[Key, Outcome]:
    """What the run folders of a study say; empty before the first.

    Args:
        folder: of all runs of the study (a sweep's).
    """
    if not SweepFolder(folder).sweep.is_file():
        return {}
    return {key_of(job.overrides): outcome(job.folder.path) for job in SweepFolder(folder).jobs()}


def outcome(folder: Path) -> Outcome:
    """What one run folder says."""
    status = read_status(folder / "status.json")
    state = str(status.get("state") or "")
    if state == "RUNNING" and owner_seems_gone(status):
        state = "PREEMPTED"
    if state not in FINISHED_STATES:
        return Outcome(state, reason=str(status.get("reason") or ""), folder=folder)
    summary = _summary(folder, state)
    loss = summary.get("val_loss") if state == "FINISHED" else math.inf
    if loss is not None and not math.isfinite(loss):
        loss = math.inf
    seconds, tokens = (float(summary.get(name) or 0.0) for name in ("seconds", "tokens"))
    return Outcome(state, loss, seconds, tokens, str(status.get("reason") or ""), folder)


def _summary(folder: Path, state: str) -> dict[str, Any]:
    """The run's summary; derived anew where it is of an earlier stop: a kill may have come between end and summary."""
    summary = read_json(folder / "summary.json")
    return summary if summary.get("state") == state else summarize(folder)


def summary_of(one: Outcome) -> dict[str, Any]:
    """The summary of a run that has ended."""
    return _summary(one.folder, one.state) if one.folder else {}


def time_column(one: Outcome) -> str:
    """The column of metrics.csv that tells how long a run took: of one thread on a CPU what it computed.

    What else ran on the machine makes the clock's seconds longer, several times over where cores are scarce.
    """
    env = read_json(one.folder / "env.json") if one.folder else {}
    alone = env.get("device") == "cpu" and env.get("num_threads") == env.get("world_size") == 1
    return "cpu_time_s" if alone and summary_of(one).get("cpu_seconds") else "time_s"


def costs(results: Sequence[Outcome]) -> dict[str, tuple[float, ...]]:
    """Seconds (see `time_column`), tokens, peak bytes and floating-point operations of finished runs, in their order.

    What one of them does not know is left out for all.
    """
    by_cpu = all(time_column(one) == "cpu_time_s" for one in results)
    rows = []
    for one in results:
        summary = summary_of(one)
        plan = read_json(one.folder / "plan.json") if one.folder else {}
        per_token = plan.get("flops_per_token")
        flops = per_token * one.tokens if per_token else None
        peak = summary.get("peak_memory_bytes")
        seconds = summary.get("cpu_seconds") if by_cpu else one.seconds or None
        rows.append({"seconds": seconds, "tokens": one.tokens, "peak_bytes": peak, "flops": flops})
    known = [name for name in ("seconds", "tokens", "peak_bytes", "flops") if all(row[name] for row in rows)]
    return {name: tuple(float(row[name]) for row in rows) for name in known}


def scores(results: Sequence[Outcome]) -> dict[str, tuple[float, ...]]:
    """Downstream scores of finished runs, task to a value for each run; tasks that one of them lacks are left out."""
    found = [_scores(one) for one in results]
    tasks = [task for task in (found[0] if found else {}) if all(task in row for row in found)]
    return {task: tuple(row[task] for row in found) for task in tasks}


def _scores(one: Outcome) -> dict[str, float]:
    evaluation = summary_of(one).get("evaluation") or {}
    values = {task: row.get("value") for task, row in evaluation.items() if isinstance(row, dict)}
    return {task: float(value) for task, value in values.items() if isinstance(value, int | float)}
