"""Downstream scores of a run, and whether they differ from guessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_opt.reports.quantities import finite, plus_minus
from lightning_opt.reports.reading import Run

TITLES = {"hellaswag": "HellaSwag", "mmlu": "MMLU", "humaneval": "HumanEval"}


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
        skipped: why there is no score.
        truncated: prompts that were cut to the model's context; None where nobody counted.
    """

    task: str
    metric: str = ""
    value: float | None = None
    stderr: float | None = None
    n: float | None = None
    shots: float | None = None
    chance: float | None = None
    skipped: str | None = None
    truncated: float | None = None

    @property
    def title(self) -> str:
        """The task's usual spelling."""
        return TITLES.get(self.task, self.task)

    @property
    def distance(self) -> float | None:
        """Standard errors between the score and chance; None where one of the three is unknown or the error is 0."""
        if self.value is None or self.chance is None or not self.stderr:
            return None
        return (self.value - self.chance) / self.stderr

    @property
    def judgement(self) -> str:
        """``above``, ``below``, ``same`` (within two standard errors), ``skipped`` or ``unknown``."""
        if self.value is None:
            return "skipped" if self.skipped else "unknown"
        if self.distance is None:
            return "same" if self.chance is not None and self.value == self.chance else "unknown"
        if abs(self.distance) <= 2:
            return "same"
        return "above" if self.distance > 0 else "below"

    @property
    def words(self) -> str:
        """The judgement in words with its figure."""
        if self.judgement == "skipped":
            return f"skipped: {self.skipped}"
        if self.judgement == "same":
            apart = "equal to chance" if self.distance is None else f"{abs(self.distance):.1f} standard errors"
            return f"no difference from chance ({apart})"
        if self.judgement == "unknown":
            return "cannot be told: " + ("no score" if self.value is None else "no standard error or chance level")
        return f"{self.judgement} chance by {abs(self.distance or 0):.1f} standard errors"

    @property
    def measured(self) -> str:
        """Value and standard error as text."""
        return plus_minus(self.value, self.stderr)


def suite(run: Run) -> str | None:
    """Name of the evaluation suite: ``mini``, ``full``, or None where nothing was evaluated."""
    name = run.part("summary", "evaluation").get("suite") or run.results.get("suite")
    return None if name in (None, "none") else str(name)


def comparable(run: Run) -> bool:
    """Whether the scores may be set beside published ones: never those of our mini sets."""
    return bool(run.part("summary", "evaluation").get("comparable", suite(run) == "full")) and suite(run) != "mini"


def scores(run: Run) -> list[Score]:
    """The scores of the summary, else of lm-eval's results file, in a fixed order."""
    block = run.part("summary", "evaluation")
    found = {task: _from_summary(task, entry) for task, entry in block.items() if isinstance(entry, dict)}
    if not found:
        found = {task: _from_results(run, task, row) for task, row in run.part("results", "results").items()}
    order = [*[task for task in TITLES if task in found], *sorted(set(found) - set(TITLES))]
    return [found[task] for task in order]


def _from_summary(task: str, entry: dict[str, Any]) -> Score:
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
        skipped=None if skipped is None else str(skipped),
        truncated=finite(counted),
    )


def _from_results(run: Run, task: str, row: Any) -> Score:
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
    )
