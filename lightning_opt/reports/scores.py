"""Downstream scores of a run, and whether they differ from guessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_opt.reports.quantities import finite, plus_minus
from lightning_opt.reports.reading import Run

TITLES = {
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "humaneval": "HumanEval",
    "lambada_openai": "LAMBADA",
    "openbookqa": "OpenBookQA",
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "wsc273": "WSC273",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "copa": "COPA",
    "tau2_retail": "tau2 retail",
    "tau2_airline": "tau2 airline",
}


@dataclass(frozen=True)
class Score:
    """One task's score.

    Attributes:
        task: its key in the summary.
        metric: what the value is (``acc_norm``, ``pass@1``).
        value: the score, 0 to 1.
        stderr: its standard error.
        n: items scored.
        shots: examples in the prompt.
        chance: what guessing scores.
        majority: what always giving the most frequent answer scores; None where there are no choices.
        bits_per_byte: of the gold answers; None where it was not measured.
        bits_error: its standard error.
        skipped: why there is no score.
        truncated: prompts that were cut to the model's context; None where nobody counted.
        degenerate: every choice of every item got the same likelihood: the value is no score.
        suite: the suite it belongs to (``mini``, ``full``); empty where none is named.
        comparable: whether the value may stand beside published ones.
        why_not: why it may not; empty where nothing is recorded.
    """

    task: str
    metric: str = ""
    value: float | None = None
    stderr: float | None = None
    n: float | None = None
    shots: float | None = None
    chance: float | None = None
    majority: float | None = None
    bits_per_byte: float | None = None
    bits_error: float | None = None
    skipped: str | None = None
    truncated: float | None = None
    degenerate: bool = False
    suite: str = ""
    comparable: bool = False
    why_not: str = ""

    @property
    def title(self) -> str:
        """The task's usual spelling."""
        return TITLES.get(self.task, self.task)

    @property
    def label(self) -> str:
        """The title, with what must not be overlooked where the value stands alone."""
        if self.comparable or not self.suite:
            return self.title
        return f"{self.title} ({'mini' if self.suite == 'mini' else 'not comparable'})"

    @property
    def counts(self) -> bool:
        """Whether there is a score, and not only a number."""
        return self.value is not None and not self.degenerate

    @property
    def distance(self) -> float | None:
        """Standard errors between the score and chance; None where one of the three is unknown or 0.

        A chance of exactly 0 leaves nothing to test: guessing never passes, so one passed item is above it.
        """
        if self.value is None or not self.chance or not self.stderr:
            return None
        return (self.value - self.chance) / self.stderr

    @property
    def judgement(self) -> str:
        """``above``, ``below``, ``same`` (within two standard errors), ``skipped``, ``broken`` or ``unknown``."""
        if self.value is None:
            return "skipped" if self.skipped else "unknown"
        if self.degenerate:
            return "broken"
        if self.distance is None:
            if self.value == self.chance:
                return "same"
            return "above" if self.chance == 0 and self.value > 0 else "unknown"
        if abs(self.distance) <= 2 or self.one_sided:
            return "same"
        return "above" if self.distance > 0 else "below"

    @property
    def one_sided(self) -> bool:
        """Whether one answer is right more often than by chance, and giving it always would score as well."""
        if not (self.majority and self.chance and self.stderr and self.n) or self.value is None:
            return False
        lopsided = self.majority > self.chance + 2 * (self.chance * (1 - self.chance) / self.n) ** 0.5
        return lopsided and self.chance < self.value <= self.majority + 2 * self.stderr

    @property
    def words(self) -> str:
        """The judgement in words with its figure."""
        if self.judgement == "skipped":
            return f"skipped: {self.skipped}"
        if self.judgement == "broken":
            return "no score: every choice of every item got the same likelihood"
        if self.judgement == "same" and self.one_sided:
            return f"no better than always the most frequent answer, which scores {self.majority:.3f}"
        if self.judgement == "same":
            apart = "equal to chance" if self.distance is None else f"{abs(self.distance):.1f} standard errors"
            return f"no difference from chance ({apart})"
        if self.judgement == "unknown":
            return "cannot be told: " + ("no score" if self.value is None else "no standard error or chance level")
        if self.distance is None:
            return "above chance, which is exactly 0"
        return f"{self.judgement} chance by {abs(self.distance):.1f} standard errors"

    @property
    def measured(self) -> str:
        """Value and standard error as text."""
        return plus_minus(self.value, self.stderr)


def suite(run: Run) -> str | None:
    """Name of the evaluation suite: ``mini``, ``full``, or None where nothing was evaluated."""
    name = _block(run).get("suite") or run.results.get("suite")
    return None if name in (None, "none") else str(name)


def comparability(entries: Sequence[Score]) -> str:
    """Whether the scores may stand beside published ones, in a sentence; empty where nothing was scored."""
    scored = [entry for entry in entries if entry.counts]
    if not scored:
        return ""
    name = f"Suite {scored[0].suite or 'not named'}"
    if scored[0].suite == "mini":
        return f"{name}: not comparable with published numbers. Small sets of our own, in the formats of the real ones."
    unfair = [entry for entry in scored if not entry.comparable]
    if not unfair:
        return f"{name}: the real tasks, comparable with published numbers."
    which = "" if len(unfair) == len(scored) else f" {listed([entry.title for entry in unfair])}"
    reasons: dict[str, list[str]] = {}
    for entry in unfair:
        reasons.setdefault(entry.why_not.rstrip("."), []).append(entry.title)
    why = "; ".join(f"{listed(titles)}: {reason}" for reason, titles in reasons.items() if reason)
    return f"{name}:{which} not comparable with published numbers." + (f" {why}." if why else "")


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def scores(run: Run) -> list[Score]:
    """The scores of the summary, else of lm-eval's results file, in a fixed order."""
    block, named = _block(run), suite(run) or ""
    whole = block.get("comparable", run.results.get("comparable")) is True
    found = {task: from_summary(task, entry, named, whole) for task, entry in block.items() if isinstance(entry, dict)}
    if not found:
        rows = run.part("results", "results").items()
        found = {task: _from_results(run, task, row, named, whole) for task, row in rows}
    order = [*[task for task in TITLES if task in found], *sorted(set(found) - set(TITLES))]
    return [found[task] for task in order]


def _block(run: Run) -> dict[str, Any]:
    return run.part("summary", "evaluation") or run.part("results", "summary")


def from_summary(task: str, entry: dict[str, Any], named: str, whole: bool) -> Score:
    """A task's score from its entry in a summary.

    Args:
        task: its key.
        entry: what the summary says of it.
        named: the suite.
        whole: whether the suite as a whole may stand beside published scores; for entries that do not say.
    """
    skipped = entry.get("skipped")
    counted = next(
        (entry[key] for key in ("truncated", "truncated_prompts", "prompts_truncated") if key in entry), None
    )
    return Score(
        task=task,
        metric=str(entry.get("metric") or ""),
        value=finite(entry.get("value")),
        stderr=finite(entry.get("stderr")),
        n=finite(entry.get("n")),
        shots=finite(entry.get("shots")),
        chance=finite(entry.get("chance")),
        majority=finite(entry.get("majority")),
        bits_per_byte=finite(entry.get("bits_per_byte")),
        bits_error=finite(entry.get("bits_per_byte_stderr")),
        skipped=None if skipped is None else str(skipped),
        truncated=finite(counted),
        degenerate=entry.get("degenerate") is True,
        suite=named,
        comparable=named != "mini" and entry.get("comparable", whole) is True,
        why_not=str(entry.get("why_not") or ""),
    )


def _from_results(run: Run, task: str, row: Any, named: str, whole: bool) -> Score:
    """A row of lm-eval's own results: ``{"acc_norm,none": ..., "acc_norm_stderr,none": ...}``."""
    row = row if isinstance(row, dict) else {}
    metrics = {
        key.split(",")[0]: key for key in row if "," in key and "_stderr" not in key and finite(row[key]) is not None
    }
    metric = next((name for name in ("acc_norm", "acc", "pass@1", "exact_match") if name in metrics), None)
    metric = metric or next(iter(metrics), "")
    key = metrics.get(metric, "")
    error = key.replace(",", "_stderr,", 1)
    samples = run.part("results", "n-samples").get(task)
    return Score(
        task=task,
        metric=metric,
        value=finite(row.get(key)),
        stderr=finite(row.get(error)),
        n=finite(samples.get("effective")) if isinstance(samples, dict) else None,
        shots=finite(run.part("results", "n-shot").get(task)),
        suite=named,
        comparable=named != "mini" and whole,
    )
