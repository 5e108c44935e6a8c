"""Calls lm-eval on a model: which of our classes runs it, one call for all tasks, and what came of each document."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from lightning_opt.callbacks.rng import undisturbed
from lightning_opt.evaluation import document_records
from lightning_opt.evaluation.adapter import CountingLM, without_environment_report
from lightning_opt.evaluation.answers import Answers, answers_file, identity
from lightning_opt.evaluation.counting import Counting
from lightning_opt.evaluation.humaneval import all_at_once, solution_bits
from lightning_opt.evaluation.quiet import quiet

_LOG = logging.getLogger("lightning_opt.evaluation")
# lm-eval's 100,000 only serve the error of LAMBADA's perplexity, and take minutes.
_BOOTSTRAPS = 1000


@dataclass
class Scored:
    """What a scoring gave.

    Attributes:
        results: lm-eval's own results, without samples.
        records: one for each document (see `document_records`).
        cut: task of lm-eval to documents that lost the left end of a prompt.
        failed: tasks that gave nothing, and why.
    """

    results: dict[str, Any] = field(default_factory=dict)
    records: list[document_records.Record] = field(default_factory=list)
    cut: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    failed: dict[str, str] = field(default_factory=dict)


def call(
    model: torch.nn.Module | Path,
    tokenizer: Any,
    tasks: list[str],
    folder: Path,
    settings: Mapping[str, Any],
    length: int,
    *,
    device: Any = None,
) -> Scored:
    """Scores the tasks whose files are in `folder`; arguments as in `score.evaluate`, `length` is the context."""
    programs = all_at_once(settings["sandbox_seconds"])
    if settings["engine"] == "vllm":
        with programs, _checkpoint(model, tokenizer) as path:
            return _all_or_each(tasks, folder, lambda: _vllm(path, settings, length))
    with programs, _at(model, device), undisturbed(model):
        return _all_or_each(tasks, folder, lambda: _in_memory(model, tokenizer, settings, length))


def _in_memory(model: torch.nn.Module, tokenizer: Any, settings: Mapping[str, Any], length: int) -> CountingLM:
    lm = CountingLM(model, copy.deepcopy(tokenizer), batch_size=settings["batch_size"], max_length=length)
    if settings["cache"] is not None:
        kept = Path(settings["cache"]).expanduser()
        lm.answers = Answers(answers_file(kept, identity(model, tokenizer, length)))
    return lm


def _vllm(path: Path, settings: Mapping[str, Any], length: int) -> Counting:
    from lightning_opt.evaluation.vllm_engine import VllmLM

    return VllmLM(str(path), **{"max_model_len": length, **settings["engine_args"]})


@contextlib.contextmanager
def _checkpoint(model: torch.nn.Module | Path, tokenizer: Any) -> Iterator[Path]:
    """The model as a folder, and off the accelerator, which vLLM wants for itself."""
    if isinstance(model, Path):
        yield model
        return
    home = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            model.to("cpu")
            if home.type == "cuda":
                torch.cuda.empty_cache()
            yield Path(scratch)
        finally:
            model.to(home)


@contextlib.contextmanager
def _at(model: torch.nn.Module, device: Any) -> Iterator[None]:
    home = next(model.parameters()).device
    moved = device is not None and str(device) != str(home)
    if moved:
        model.to(device)
    try:
        yield
    finally:
        if moved:
            model.to(home)


def _all_or_each(tasks: list[str], folder: Path, make: Callable[[], Counting]) -> Scored:
    """All tasks in one call, as lm-eval's command line does; where that fails, one by one, to lose only one.

    The model is made once, and what it has answered is kept, in memory where nowhere else: nothing is asked twice.
    """
    scored = Scored()
    try:
        with quiet():
            lm = make()
    except Exception as error:
        why = _failure(", ".join(tasks), error)
        scored.failed = dict.fromkeys(tasks, why)
        return scored
    lm.answers = lm.answers or Answers()
    with contextlib.closing(lm.answers):
        batches = [tasks]
        while batches:
            batch = batches.pop(0)
            try:
                with quiet():
                    results, records = _call(lm, batch, folder)
            except Exception as error:
                if len(batch) > 1:
                    batches = [[task] for task in batch]
                else:
                    scored.failed[batch[0]] = _failure(batch[0], error)
                continue
            _merge(scored.results, results)
            scored.records += records
    scored.cut = lm.cut
    return scored


def _failure(what: str, error: Exception) -> str:
    why = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    _LOG.warning("%s %s", what, why)
    _LOG.debug("scoring failed", exc_info=True)
    return why


class _Remembering(TaskManager):
    """lm-eval's task manager, which also lets the loaded tasks be asked afterwards."""

    loaded: dict[str, Any]

    def load(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().load(*args, **kwargs)
        self.loaded = found["tasks"]
        return found


def _call(lm: Counting, tasks: list[str], folder: Path) -> tuple[dict[str, Any], list[document_records.Record]]:
    manager = _Remembering(include_path=str(folder), include_defaults=False)
    with without_environment_report():
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=lm.batch_size,
            device=str(getattr(lm, "device", "")),
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
            confirm_run_unsafe_code=True,  # it runs in the sandbox, or the task was skipped
        )
    samples = results.pop("samples")
    records = document_records.records(manager.loaded, samples)
    _weigh_solutions(lm, samples.get("humaneval", ()), records)
    return json.loads(json.dumps(results, default=handle_non_serializable)), records


def _weigh_solutions(lm: Counting, samples: Any, records: list[document_records.Record]) -> None:
    """Bits per byte of HumanEval's own solutions: where no program passes, it still tells models apart."""
    found = solution_bits(lm, [sample["doc"] for sample in samples])
    programs = [record for record in records if record["task"] == "humaneval"]
    for record, bits in zip(programs, found, strict=True):
        record["bits_per_byte"] = bits


def _merge(merged: dict[str, Any], results: dict[str, Any]) -> None:
    for key, value in results.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key].update(value)
        else:
            merged.setdefault(key, value)
