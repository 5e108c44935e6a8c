"""Scores a model in memory: plan the tasks, let lm-eval score them, keep its results and our summary."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.evaluation.offline import write_tasks
from lightning_opt.evaluation.quiet import quiet
from lightning_opt.evaluation.sandbox import available
from lightning_opt.evaluation.suites import SOURCES, STOCK_MAX_GEN_TOKS, TASKS, in_hub_cache, resolve
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import write_json

if TYPE_CHECKING:
    import torch

    from lightning_opt.evaluation.adapter import CountingLM

_LOG = logging.getLogger("lightning_opt.evaluation")
_HUB_SECONDS = 5.0


def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    config: Mapping[str, Any],
    output: Path,
    *,
    context_length: int | None = None,
    device: Any = None,
) -> dict[str, Any]:
    """Scores `model` with lm-eval and writes `results.json` and `tasks/` (the task files) into `output`.

    The model stays where it is and as it is (device, dtype, train or eval mode, random states), unless `device` names
    another device: then it is there for the time of the scoring.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; needs an end-of-text or start-of-text token.
        config: `config["evaluation"]`; what it leaves out is as in `suites.DEFAULTS`.
        output: folder, usually `evaluation/` of a run folder.
        context_length: tokens the model can see, for models whose config has no `max_position_embeddings`.
        device: where to score; None means where the model is.

    Returns:
        `suite`, `comparable` (whether every score may stand beside published ones), and per task either `metric`,
        `value`, `stderr`, `n`, `shots`, `chance`, `truncated` (documents that did not fit the context), `comparable`
        (a whole real set, no prompt cut, HumanEval's answers of the stock length) and where it is not `why_not`, or
        `skipped` (why).

    Raises:
        ConfigError: the configuration is wrong (see `check`), or the tokenizer has no special token to start from.
    """
    settings = resolve(config)
    suite = settings["suite"]
    head: dict[str, Any] = {"suite": suite, "comparable": False}
    if suite == "none":
        return head | {task: {"skipped": "evaluation=none"} for task in TASKS}
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ConfigError("data.tokenizer", "no special tokens", "must have an end-of-text or a start-of-text token")
    started = time.monotonic()
    length = _context(model, context_length)
    skipped = _refused_tasks(settings)
    wanted = [task for task in TASKS if task not in skipped]
    for task in settings["tasks"]:
        if task in skipped:
            _LOG.warning("%s skipped: %s", task, skipped[task])
    results: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    if wanted:
        _LOG.debug("evaluation %s: %s", suite, ", ".join(wanted))
        _write(output / "tasks", settings, wanted, length)
        results, summary, failed = _on_device(model, device, tokenizer, wanted, output / "tasks", settings, length)
        skipped |= failed
    for task, entry in summary.items():
        entry |= _comparable(task, entry, suite, results)
    head["comparable"] = bool(summary) and all(entry["comparable"] for entry in summary.values())
    block = head | {task: summary.get(task) or {"skipped": skipped.get(task, "no result")} for task in TASKS}
    _keep(output, results, block, skipped, settings, seconds=time.monotonic() - started)
    return block


def _context(model: torch.nn.Module, given: int | None) -> int:
    own = getattr(model.config, "max_position_embeddings", None)
    # The model's own first: it is what lm-eval's command line takes, and what any user of the checkpoint gets.
    if not (own or given):
        raise ConfigError("context_length", None, "must be given: the model's config has no max_position_embeddings")
    return own or given


def _refused_tasks(settings: Mapping[str, Any]) -> dict[str, str]:
    """Tasks that will not run, and why; found before any model work."""
    skipped = {task: "not in evaluation.tasks" for task in TASKS if task not in settings["tasks"]}
    if "humaneval" not in skipped:
        isolated, reason = available()
        if not isolated:
            skipped["humaneval"] = reason
    if settings["suite"] == "full" and settings["data_dir"] is None:
        unknown = [task for task in TASKS if task not in skipped and not in_hub_cache(SOURCES[task].hub)]
        if unknown and not _hub_answers():
            reason = (
                "{} is not in the cache and the hub does not answer; give evaluation.data_dir or take evaluation=mini"
            )
            skipped |= {task: reason.format(SOURCES[task].hub) for task in unknown}
    return skipped


def _hub_answers() -> bool:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _write(folder: Path, settings: Mapping[str, Any], tasks: list[str], context_length: int) -> None:
    if folder.is_dir():
        for old in folder.glob("*.yaml"):
            old.unlink()
    write_tasks(
        folder,
        suite=settings["suite"],
        tasks=tasks,
        context_length=context_length,
        limit=settings["limit"],
        data_dir=settings["data_dir"],
        max_new_tokens=settings["max_gen_toks"],
        sandbox_seconds=settings["sandbox_seconds"],
    )


def _on_device(
    model: torch.nn.Module,
    device: Any,
    tokenizer: Any,
    tasks: list[str],
    folder: Path,
    settings: Mapping[str, Any],
    length: int,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    home = next(model.parameters()).device
    moved = device is not None and str(device) != str(home)
    if moved:
        model.to(device)
    try:
        return _score(model, copy.deepcopy(tokenizer), tasks, folder, settings["batch_size"], length)
    finally:
        if moved:
            model.to(home)


def _score(
    model: torch.nn.Module, tokenizer: Any, tasks: list[str], folder: Path, batch_size: int, length: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """All tasks in one call, as lm-eval's command line does; where that fails, one by one, to lose only one."""
    with quiet():
        from lightning_opt.evaluation.adapter import CountingLM, undisturbed

    failed: dict[str, str] = {}
    merged: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    batches = [tasks]
    with undisturbed(model):
        while batches:
            batch = batches.pop(0)
            try:
                with quiet():
                    lm = CountingLM(model, tokenizer, batch_size=batch_size, max_length=length)
                    results = _call(lm, batch, folder)
            except Exception as error:
                if len(batch) > 1:
                    batches = [[task] for task in batch]
                    continue
                failed[batch[0]] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                _LOG.warning("%s %s", batch[0], failed[batch[0]])
                _LOG.debug("scoring failed", exc_info=True)
                continue
            _merge(merged, results)
            summary |= {task: _summary(task, results, lm) for task in batch}
    return merged, summary, failed


def _call(lm: CountingLM, tasks: list[str], folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    from lightning_opt.evaluation.adapter import without_environment_report

    with without_environment_report():
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            batch_size=lm.batch_size,
            device=str(lm.device),
            log_samples=False,
            confirm_run_unsafe_code=True,  # it runs in the sandbox, or the task was skipped
        )
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _merge(merged: dict[str, Any], results: dict[str, Any]) -> None:
    for key, value in results.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key].update(value)
        else:
            merged.setdefault(key, value)


def _members(task: str, results: dict[str, Any]) -> list[str]:
    """Names of the tasks with documents: the subjects of `mmlu`, the task itself otherwise."""
    return [name for name in results["n-samples"] if name == task or (task == "mmlu" and name.startswith("mmlu_"))]


def _summary(task: str, results: dict[str, Any], lm: CountingLM) -> dict[str, Any]:
    source = SOURCES[task]
    scores = results["results"].get(task) or results["groups"][task]
    members = _members(task, results)
    n = sum(results["n-samples"][name]["effective"] for name in members)
    value = float(scores[source.metric])
    name, _, kind = source.metric.partition(",")
    choices = [count for member in members for count in lm.choices[member].values()]
    entry = {
        "metric": name,
        "value": value,
        "stderr": _stderr(scores.get(f"{name}_stderr,{kind}"), value, n),
        "n": n,
        "shots": source.shots,
        "chance": sum(1 / count for count in choices) / len(choices) if choices else 0.0,
        "truncated": sum(len(lm.cut[member]) for member in members),
    }
    if task == "hellaswag":
        entry["acc"] = float(scores["acc,none"])
        entry["acc_stderr"] = _stderr(scores.get("acc_stderr,none"), entry["acc"], n)
    if choices and sum(len(lm.tied[member]) for member in members) == len(choices):
        entry["degenerate"] = True
        _LOG.warning(
            "%s: every choice of every item got the same log-likelihood: the model or the scorer is broken, and the "
            "score is only the share of items whose first choice is right",
            task,
        )
    return entry


def _comparable(task: str, entry: Mapping[str, Any], suite: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """`comparable`, and where the score may not stand beside published ones, why in a few words."""
    whole, why = SOURCES[task].documents, ""
    tokens = results["configs"]["humaneval"]["generation_kwargs"]["max_gen_toks"] if task == "humaneval" else None
    if suite != "full":
        why = f"suite {suite}"
    elif entry["n"] != whole:
        why = f"{entry['n']} of {whole} documents"
    elif tokens not in (None, STOCK_MAX_GEN_TOKS):
        why = f"answers of {tokens} tokens, stock {STOCK_MAX_GEN_TOKS}"
    elif entry["truncated"]:
        why = f"{entry['truncated']} of {entry['n']} prompts cut to the context"
    return {"comparable": False, "why_not": why} if why else {"comparable": True}


def _stderr(given: Any, value: float, n: int) -> float | None:
    """lm-eval's standard error; where it has none (one-document subjects), that of a share of n documents."""
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        return float(given)
    return math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None


def _keep(
    output: Path,
    results: dict[str, Any],
    block: dict[str, Any],
    skipped: dict[str, str],
    settings: Mapping[str, Any],
    *,
    seconds: float,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for old in ("model_sha", "model_revision"):
        results.get("config", {}).pop(old, None)
    write_json(
        output / "results.json",
        results
        | {
            "suite": block["suite"],
            "comparable": block["comparable"],
            "limit": settings["limit"],
            "truncated": {task: block[task]["truncated"] for task in TASKS if "truncated" in block[task]},
            "skipped": {task: reason for task, reason in skipped.items() if "skipped" in block[task]},
            "evaluation_seconds": round(seconds, 3),
            "summary": block,
        },
    )
