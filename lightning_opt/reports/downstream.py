"""Models side by side on the same tasks: who is better where, over the same documents, and where nobody can tell.

Correct or not is compared by McNemar's exact test on the documents where exactly one of the two models is right
(McNemar 1947; recommended for two classifiers on one test set by Dietterich 1998, section 3.1); other numbers by
Student's paired t test on their differences. P-values of one page are adjusted together (Holm 1979).
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_opt.reports.quantities import finite
from lightning_opt.reports.scores import Score, from_summary
from lightning_opt.run_folder import read_json, read_json_lines

log = logging.getLogger("lightning_opt.reports")

LEVEL = 0.05
"""Adjusted p-value below which a difference is said to be one."""

_TERMS = 200  # 1e-10 of the value, up to 60,000 documents

Document = tuple[str, str, int]
"""Task of lm-eval, checksum of the content, and which of several with the same content."""


@dataclass(frozen=True)
class Judged:
    """A model's scores.

    Attributes:
        label: what the page calls it.
        scores: task to its score.
        entries: task to what the summary says of it.
        records: task to document to its record.
        suite: name of the suite.
    """

    label: str
    scores: dict[str, Score]
    entries: dict[str, dict[str, Any]]
    records: dict[str, dict[Document, dict[str, Any]]] = field(default_factory=dict)
    suite: str = ""


@dataclass(frozen=True)
class Difference:
    """Two models on one task.

    Attributes:
        task: key of the task.
        metric: what is compared.
        first: label of one model.
        second: label of the other.
        value: mean over the shared documents of the first's number minus the second's.
        stderr: its standard error, from the differences; None for one document.
        p: two-sided p-value; None where nothing can be tested.
        adjusted: the same after Holm's correction over the page.
        n: documents that both were asked.
        only_first: of these, where the first alone is right; None where the metric is not right or wrong.
        only_second: where the second alone is right.
        unlike: documents that only one of the two was asked.
        lower_is_better: whether a negative value is in favour of the first.
    """

    task: str
    metric: str
    first: str
    second: str
    value: float
    stderr: float | None
    p: float | None
    n: int
    only_first: int | None = None
    only_second: int | None = None
    unlike: int = 0
    lower_is_better: bool = False
    adjusted: float | None = None

    @property
    def better(self) -> str:
        """Label of the better model; empty where the difference is inside the noise."""
        if self.adjusted is None or self.adjusted >= LEVEL or self.value == 0:
            return ""
        return self.second if (self.value > 0) == self.lower_is_better else self.first


def read_judged(label: str, folder: Path) -> Judged:
    """Reads a folder with `results.json` and `documents.jsonl.gz`.

    Args:
        label: what to call the model.
        folder: `evaluation/` of a run folder, or where `recipes.evaluate` put a checkpoint's results.
    """
    results = read_json(folder / "results.json")
    block = results.get("summary") or {}
    suite = str(block.get("suite") or "")
    entries = {task: entry for task, entry in block.items() if isinstance(entry, dict)}
    scores = {
        task: from_summary(task, entry, suite, block.get("comparable") is True) for task, entry in entries.items()
    }
    found: dict[str, dict[Document, dict[str, Any]]] = {}
    for record in _records(folder / "documents.jsonl.gz"):
        task = "mmlu" if record["task"].startswith("mmlu_") else record["task"]
        documents = found.setdefault(task, {})
        place = 0
        while (document := (record["task"], record["hash"], place)) in documents:
            place += 1
        documents[document] = record
    return Judged(label, scores, entries, found, suite)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json_lines(path))
    except FileNotFoundError:
        return []
    except (OSError, EOFError, ValueError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return []


_RUN = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}(-\d+)?")


def labels(names: Sequence[str]) -> list[str]:
    """Names that tell models apart: the shortest ends of their paths that differ, numbered where even these agree.

    Of a run the time and hash that end its path are left out, or, where they tell runs apart, stand behind its name.
    """
    parts = [Path(name).parts for name in names]
    dated = [len(one) > 1 and bool(_RUN.fullmatch(one[-1])) for one in parts]
    named = [one[:-1] if is_run else one for one, is_run in zip(parts, dated, strict=True)]
    depth = 1
    if len({one[-1] for one in named}) == len(parts):
        parts = named
    elif any(dated):
        depth = 2
    while depth < max(map(len, parts)) and len({one[-depth:] for one in parts}) < len(parts):
        depth += 1
    short = ["/".join(one[-depth:]) for one in parts]
    times, seen = Counter(short), Counter()
    for place, name in enumerate(short):
        seen[name] += 1
        if times[name] > 1:
            short[place] = f"{name} ({seen[name]})"
    return short


def differences(models: Sequence[Judged], tasks: Sequence[str]) -> list[Difference]:
    """Every pair of models on every task by its score and by bits per byte, with p-values adjusted over all of them."""
    found = []
    for task in tasks:
        for first, second in combinations(models, 2):
            if first.suite != second.suite:
                continue
            metric = first.scores[task].metric if task in first.scores else ""
            for key in (metric, "bits_per_byte"):
                one = difference(task, key, first, second) if key else None
                found += [one] if one else []
    return _holm(found)


def difference(task: str, metric: str, first: Judged, second: Judged) -> Difference | None:
    """Two models on the documents of one task that both were asked; None where there are none, or a scorer broke."""
    if any(task in model.scores and model.scores[task].degenerate for model in (first, second)):
        return None
    ours, theirs = first.records.get(task, {}), second.records.get(task, {})
    shared = [key for key in ours if key in theirs]
    pairs = [(finite(ours[key].get(metric)), finite(theirs[key].get(metric))) for key in shared]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    gaps = [a - b for a, b in known]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    unlike = len(ours) + len(theirs) - 2 * len(shared)
    one = Difference(task, metric, first.label, second.label, fmean(gaps), error, None, len(gaps), unlike=unlike)
    if metric == "bits_per_byte":
        return replace(one, p=paired_t(one.value, error, one.n), lower_is_better=True)
    if all(value in (0, 1) for pair in known for value in pair):
        wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        return replace(one, p=mcnemar(wins, losses), only_first=wins, only_second=losses)
    return replace(one, p=paired_t(one.value, error, one.n))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses, if both were equally likely."""
    n, least = wins + losses, min(wins, losses)
    if not n or wins == losses:
        return 1.0
    log_half = n * math.log(2)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - log_half) for k in range(least + 1)
    )
    return min(1.0, 2 * tail)


def paired_t(mean: float, stderr: float | None, n: int) -> float | None:
    """Two-sided p-value of a mean of n differences by its standard error (Student 1908, n - 1 degrees of freedom).

    None where there is no error to go by.
    """
    if not stderr:
        return 1.0 if stderr == 0 and mean == 0 else None
    t, freedom = mean / stderr, n - 1
    return _beta_share(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


def _beta_share(a: float, b: float, x: float, rest: float) -> float:
    """Regularized incomplete beta function I_x(a, b) with rest = 1 - x: its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_share(b, a, rest, x)
    if not x:
        return 0.0
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    fraction = 1.0
    for m in range(_TERMS, 0, -1):  # from the inside out
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(front) / (a * fraction)


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """The same with adjusted p-values."""
    tested = sorted((one.p, place) for place, one in enumerate(found) if one.p is not None)
    adjusted: dict[int, float] = {}
    largest = 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = largest
    return [replace(one, adjusted=adjusted.get(place)) for place, one in enumerate(found)]


def tasks_of(models: Sequence[Judged], order: Mapping[str, Any]) -> list[str]:
    """Tasks that any of the models was scored on, known ones first and in their order."""
    found = {task for model in models for task, score in model.scores.items() if score.value is not None}
    return [*[task for task in order if task in found], *sorted(found - set(order))]
