"""A few documents of a suite's tasks, scored again and again while a model trains: prepared once, then only weighed.

The tasks, prompts and metrics are those of `score.evaluate` with `limit` documents (the same task files by `offline`),
and so is `bits_per_byte` (`document_records`); nothing is generated, so HumanEval tells the bits per byte of the set's
own solutions only.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_opt.evaluation import document_records
from lightning_opt.evaluation.humaneval import solution_bits
from lightning_opt.evaluation.offline import write_tasks
from lightning_opt.evaluation.quiet import quiet
from lightning_opt.evaluation.score import context_of
from lightning_opt.evaluation.suites import check_sample, resolve
from lightning_opt.evaluation.task_table import SOURCES
from lightning_opt.plan import ConfigError, check_value

if TYPE_CHECKING:
    import torch

BITS = "bits_per_byte"


class SampleScorer:
    """For the callback `SampleScores`: scores a LightningModule's ``model``, a causal language model of transformers.

    Args:
        documents: of each task (MMLU: in all, spread over its subjects); None: all.
        tasks: of the evaluation's; None: all of them.

    Attributes:
        evaluation: `config["evaluation"]`, which names suite, tasks and data.
        tokenizer: the model's.
        context_length: tokens the model can see.

    Raises:
        ConfigError: from `columns` and the first call: no suite to take a sample of, or a task that is not in it.
    """

    def __init__(self, documents: int = 32, tasks: Sequence[str] | None = None) -> None:
        self.documents = check_value("evaluation.limit", documents, field="sample_scores.scorer.documents")
        self.tasks = None if tasks is None else list(tasks)
        self.evaluation: Mapping[str, Any] | None = None
        self.tokenizer: Any = None
        self.context_length: int | None = None
        self._sample: _Sample | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what a call returns: ``score/<task>/<metric>`` and ``score/<task>/bits_per_byte``."""
        measures = {task: [_metric(task)] * (task != "humaneval") + [BITS] for task in self._settings()["tasks"]}
        return tuple(f"score/{task}/{name}" for task, names in measures.items() for name in names)

    def _settings(self) -> dict[str, Any]:
        settings = resolve(self.evaluation or {})
        if settings["suite"] == "none":
            why = "must be mini or full for scores while training (or callbacks.sample_scores.every_n_steps=0)"
            raise ConfigError("evaluation.suite", "none", why)
        check_sample(self.evaluation or {}, self.tasks, "sample_scores.scorer.tasks")
        return settings | {"tasks": self.tasks or settings["tasks"], "limit": self.documents}

    def __call__(self, module: torch.nn.Module) -> dict[str, float]:
        """Scores; the first call loads the tasks and builds their prompts.

        Returns:
            `columns` to value: shares of right answers, and bits per UTF-8 byte of the gold answers.
        """
        settings = self._settings()
        with _silence():
            if self._sample is None:
                model = getattr(module, "model", module)
                self._sample = _Sample(model, self.tokenizer, settings, self.context_length)
            return self._sample.scores()


def _metric(task: str) -> str:
    return SOURCES[task].metric.partition(",")[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """`quiet`, and no meter: the terminal shows the training's own bar."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), quiet():
        yield


class _Sample:
    """lm-eval's tasks with their few documents, and the model that weighs them."""

    def __init__(self, model: Any, tokenizer: Any, settings: Mapping[str, Any], context: int | None) -> None:
        from lm_eval.tasks import TaskManager

        from lightning_opt.evaluation.adapter import CountingLM

        length = context_of(model, context)
        self._lm = CountingLM(model, copy.deepcopy(tokenizer), batch_size=settings["batch_size"], max_length=length)
        with tempfile.TemporaryDirectory() as folder:
            given = {name: settings[name] for name in ("suite", "tasks", "limit", "data_dir")}
            write_tasks(Path(folder), context_length=length, **given)
            self._tasks = TaskManager(include_path=folder, include_defaults=False).load(settings["tasks"])
        self._programs = self._tasks["tasks"].pop("humaneval", None)
        self._tasks["groups"].pop("humaneval", None)

    def scores(self) -> dict[str, float]:
        from lm_eval.evaluator import evaluate

        found: dict[str, dict[str, list[float]]] = {}
        if self._tasks["tasks"]:
            samples = evaluate(self._lm, self._tasks, bootstrap_iters=0, log_samples=True)["samples"]
            for record in document_records.records(self._tasks["tasks"], samples):
                task = "mmlu" if record["task"].startswith("mmlu_") else record["task"]
                for name in (_metric(task), BITS):
                    if record.get(name) is not None:
                        found.setdefault(task, {}).setdefault(name, []).append(record[name])
        if self._programs is not None:
            found["humaneval"] = {BITS: solution_bits(self._lm, self._programs.eval_docs)}
        return {f"score/{task}/{name}": fmean(values) for task, part in found.items() for name, values in part.items()}
