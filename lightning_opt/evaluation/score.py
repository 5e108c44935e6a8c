"""Scores a model: plan the tasks, let lm-eval score them, keep its results, every document's, and our summary."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.evaluation import document_records
from lightning_opt.evaluation.freezing import check_frozen, checksum
from lightning_opt.evaluation.mmlu_subjects import article_groups
from lightning_opt.evaluation.offline import write_tasks
from lightning_opt.evaluation.quiet import quiet
from lightning_opt.evaluation.sandbox import available
from lightning_opt.evaluation.suites import STOCK_MAX_GEN_TOKS, data_folder, local_files, out_of_reach, resolve
from lightning_opt.evaluation.task_table import SOURCES, TASKS
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import read_json, write_json

if TYPE_CHECKING:
    import torch

    from lightning_opt.evaluation.calling import Scored

_LOG = logging.getLogger("lightning_opt.evaluation")
DOCUMENTS = "documents.jsonl.gz"


def evaluate(
    model: torch.nn.Module | Path,
    tokenizer: Any,
    config: Mapping[str, Any],
    output: Path,
    *,
    context_length: int | None = None,
    device: Any = None,
) -> dict[str, Any]:
    """Scores `model` with lm-eval and writes `results.json`, `documents.jsonl.gz` and `tasks/` into `output`.

    Where no task could be scored, results that are in `output` already stay.
    The model stays where it is and as it is (device, dtype, train or eval mode, random states), unless `device` names
    another device: then it is there for the time of the scoring.

    Args:
        model: a causal language model of transformers; with `engine=vllm` its checkpoint folder may stand for it.
        tokenizer: its tokenizer; needs an end-of-text or start-of-text token.
        config: `config["evaluation"]`; what it leaves out is as in `suites.DEFAULTS`.
        output: folder, usually `evaluation/` of a run folder.
        context_length: tokens the model can see, for models whose config has no `max_position_embeddings`.
        device: where to score; None means where the model is.

    Returns:
        `suite`, `comparable` (whether every score may stand beside published ones), and per task either `metric`,
        `value`, `stderr`, `n`, `shots`, `chance`, `majority`, `bits_per_byte` (see `document_records`), `truncated`
        (documents that did not fit the context), `comparable` (a whole real set, no prompt cut, HumanEval's answers
        greedy and of the stock length) and where it is not `why_not`; MMLU also `groups`; or `skipped` (why).

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
    length = context_of(model, context_length)
    skipped = _refused_tasks(settings)
    wanted = [task for task in settings["tasks"] if task not in skipped]
    for task in settings["tasks"]:
        if task in skipped:
            _LOG.warning("%s skipped: %s", task, skipped[task])
    found, summary = None, {}
    if wanted:
        with quiet():
            from lightning_opt.evaluation.calling import call

        _LOG.debug("evaluation %s: %s", suite, ", ".join(wanted))
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), settings, wanted, length)
            found = call(model, tokenizer, wanted, Path(folder), settings, length, device=device)
            if len(found.failed) < len(wanted):
                _replace(output / "tasks", Path(folder))
        skipped |= found.failed
        summary = {task: _summary(task, found, settings) for task in wanted if task not in found.failed}
    head["comparable"] = bool(summary) and all(entry["comparable"] for entry in summary.values())
    named = dict.fromkeys([*TASKS, *settings["tasks"]])
    block = head | {task: summary.get(task) or {"skipped": skipped.get(task, "no result")} for task in named}
    if summary or not _scored(_earlier(output)):
        _keep(output, found, block, skipped, settings, seconds=time.monotonic() - started)
    else:
        _LOG.warning("nothing was scored: %s stays as it was", output / "results.json")
    return block


def context_of(model: torch.nn.Module | Path, given: int | None) -> int:
    """Tokens that a model, or the checkpoint in a folder, can see.

    Args:
        model: of transformers.
        given: for one whose config does not say.

    Raises:
        ConfigError: nobody says.
    """
    if isinstance(model, Path):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, local_files_only=True)
    else:
        config = model.config
    own = getattr(config, "max_position_embeddings", None)
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
    return out_of_reach(settings) | skipped


def _replace(folder: Path, by: Path) -> None:
    for old in folder.glob("*.yaml"):
        old.unlink()
    shutil.copytree(by, folder, dirs_exist_ok=True)


def _write(folder: Path, settings: Mapping[str, Any], tasks: list[str], context_length: int) -> None:
    write_tasks(
        folder,
        suite=settings["suite"],
        tasks=tasks,
        context_length=context_length,
        limit=settings["limit"],
        data_dir=settings["data_dir"],
        max_new_tokens=settings["max_gen_toks"],
        samples=settings["samples"],
        temperature=settings["temperature"],
        sandbox_seconds=settings["sandbox_seconds"],
    )


def _members(task: str, results: Mapping[str, Any]) -> list[str]:
    """Names of the tasks with documents: the subjects of `mmlu`, the task itself otherwise."""
    return [name for name in results["n-samples"] if name == task or (task == "mmlu" and name.startswith("mmlu_"))]


def _summary(task: str, scored: Scored, settings: Mapping[str, Any]) -> dict[str, Any]:
    source, results = SOURCES[task], scored.results
    scores = results["results"].get(task) or results["groups"][task]
    members = _members(task, results)
    found = [record for record in scored.records if record["task"] in members]
    n = sum(results["n-samples"][name]["effective"] for name in members)
    value = float(scores[source.metric])
    name, _, kind = source.metric.partition(",")
    about = document_records.described(found)
    tied = about.pop("tied")
    entry = {
        "metric": name,
        "value": value,
        "stderr": _stderr(scores.get(f"{name}_stderr,{kind}"), value, n),
        "n": n,
        "shots": source.shots,
        **about,
        "truncated": sum(len(scored.cut[member]) for member in members),
    }
    if name == "acc_norm":
        entry["acc"] = float(scores["acc,none"])
        entry["acc_stderr"] = _stderr(scores.get("acc_stderr,none"), entry["acc"], n)
    if "perplexity,none" in scores:
        entry["perplexity"] = float(scores["perplexity,none"])
    draws = {key.partition(",")[0]: scores[key] for key in scores if key.startswith("pass@") and key != source.metric}
    entry |= {key: value for key, value in draws.items() if isinstance(value, float)}
    if task == "mmlu" and settings["suite"] == "full":
        entry["groups"] = _groups(found, results)
    if about["majority"] is not None and tied == len(found):
        entry["degenerate"] = True
        _LOG.warning(
            "%s: every choice of every item got the same log-likelihood: the model or the scorer is broken, and the "
            "score is only the share of items whose first choice is right",
            task,
        )
    why = _why_not(task, entry, settings, results)
    return entry | ({"comparable": False, "why_not": why} if why else {"comparable": True})


def _groups(found: list[document_records.Record], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """MMLU's score by group: lm-eval's four, and article 1's three with the rest; each document counts once."""
    stock = {
        name.removeprefix("mmlu_"): members
        for name, members in sorted(results["group_subtasks"].items())
        if name.startswith("mmlu_")
    }
    article = {name: [f"mmlu_{subject}" for subject in subjects] for name, subjects in article_groups().items()}
    split = {}
    for kind, groups in (("lm-eval", stock), ("article", article)):
        parts = {name: [record for record in found if record["task"] in members] for name, members in groups.items()}
        split[kind] = {name: document_records.shares(part, "acc") for name, part in parts.items() if part}
    return split


def _why_not(task: str, entry: Mapping[str, Any], settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Where the score may not stand beside published ones, why in a few words; empty where it may."""
    whole = SOURCES[task].documents
    tokens = results["configs"]["humaneval"]["generation_kwargs"]["max_gen_toks"] if task == "humaneval" else None
    if settings["suite"] != "full":
        return f"suite {settings['suite']}"
    if settings["data_dir"] is not None:
        splits = local_files(Path(settings["data_dir"]).expanduser(), task)
        if set(splits) != set(SOURCES[task].files):
            return f"{'/'.join(splits)} split, stock {'/'.join(SOURCES[task].files)}"
    if entry["n"] != whole:
        return f"{entry['n']} of {whole} documents"
    if tokens not in (None, STOCK_MAX_GEN_TOKS):
        return f"answers of {tokens} tokens, stock {STOCK_MAX_GEN_TOKS}"
    if task == "humaneval" and settings["samples"] > 1:
        return f"{settings['samples']} programs drawn at temperature {settings['temperature']:g}, stock one greedy"
    if entry["truncated"]:
        return f"{entry['truncated']} of {entry['n']} prompts cut to the context"
    return ""


def _stderr(given: Any, value: float, n: int) -> float | None:
    """lm-eval's standard error; where it has none (one-document subjects), that of a share of n documents."""
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        return float(given)
    return math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None


def _keep(
    output: Path,
    scored: Scored | None,
    block: dict[str, Any],
    skipped: dict[str, str],
    settings: Mapping[str, Any],
    *,
    seconds: float,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    results = scored.results if scored else {}
    for old in ("model_sha", "model_revision"):
        results.get("config", {}).pop(old, None)
    records = scored.records if scored else []
    solved = [record for record in records if record["task"] == "humaneval"]
    document_records.write(output / DOCUMENTS, records)
    write_json(
        output / "results.json",
        results
        | {
            "suite": block["suite"],
            "comparable": block["comparable"],
            "limit": settings["limit"],
            "engine": settings["engine"],
            "data": _data(settings),
            "truncated": {task: entry["truncated"] for task, entry in _scored(block).items()},
            "skipped": {task: reason for task, reason in skipped.items() if "skipped" in block[task]},
            "samples": {"humaneval": [{"doc": {"task_id": one["id"]}, "pass@1": one.get("pass@1")} for one in solved]},
            "evaluation_seconds": round(seconds, 3),
            "summary": block,
        },
    )


def _earlier(output: Path) -> dict[str, Any]:
    """The summary of an earlier scoring; empty where there is none, or none that can be read."""
    try:
        return read_json(output / "results.json").get("summary") or {}
    except ValueError:
        return {}


def _scored(block: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: entry for task, entry in block.items() if isinstance(entry, dict) and "truncated" in entry}


def _data(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that were scored, with checksum, and their revision on the hub where we froze them."""
    folder = data_folder(settings["suite"], settings["data_dir"])
    if folder is None:
        return {}
    paths = [path for task in settings["tasks"] for path in local_files(folder, task).values()]
    frozen = check_frozen(folder, [path.name for path in paths])
    return {path.name: frozen.get(path.name) or {"sha256": checksum(path)} for path in paths}
