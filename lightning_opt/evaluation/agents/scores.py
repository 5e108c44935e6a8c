"""Scores from tau2's result files: pass^k, tool-call success, how conversations ended. Plain Python, no tau2 needed.

Formats read: tau2 1.0 (``Results`` of its ``data_model/simulation.py``, tag v1.0.1, commit b711c1e), both the single
``results.json`` and the folder with ``simulations/*.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_opt.plan import ConfigError

# Share of the tasks that an agent passes which only says "...": nothing was to be changed there. Measured with tau2
# 1.0.1, all tasks of the split base (11 of 114, 23 of 50), with a judge that finds every assertion met.
IDLE = {"retail": 11 / 114, "airline": 23 / 50}
BROKEN = "infrastructure_error"  # the conversation never came to its end: an endpoint failed, nothing is scored


def pass_hat_k(trials: int, successes: int, k: int) -> float:
    """Unbiased chance that k trials drawn without replacement from `trials` all succeed: C(c, k) / C(n, k).

    Source: tau-bench, arXiv 2406.12045, section 3 ("pass^k").

    Args:
        trials: conversations held about the task (n).
        successes: how many of them succeeded (c).
        k: drawn, at most `trials`.

    Raises:
        ValueError: more drawn or more successes than there are.
    """
    if not 0 <= successes <= trials or not 1 <= k <= trials:
        raise ValueError(
            f"pass^{k} of {trials} trials, {successes} successes: 1 <= k <= trials and successes <= trials"
        )
    return math.comb(successes, k) / math.comb(trials, k)


def read_results(folder: Path) -> dict[str, Any] | None:
    """tau2's results of one domain with their simulations; None where there are none yet.

    Raises:
        ConfigError: the file is not what tau2 1.x writes.
    """
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        if (folder / "simulations").is_dir():
            files = sorted((folder / "simulations").glob("[!.]*.json"))
            found["simulations"] = [json.loads(file.read_text("utf-8")) for file in files]
        for part in (found["info"], *found["tasks"], *found["simulations"]):
            part.items()
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"must be results of tau2 1.x ({type(error).__name__}: {error})"
        raise ConfigError("out", str(path), why) from None


def score_domain(results: dict[str, Any]) -> dict[str, Any]:
    """What one domain's conversations say about the agent.

    Returns:
        ``n`` tasks scored, ``conversations``, ``broken`` (not scored), ``unreadable`` (ended by a message of the agent
        that is none, and failed: tau2 itself calls these broken and leaves them out, which flatters), ``pass`` (k to
        mean and standard error over tasks, k up to the fewest trials of a task), ``reward`` (mean), ``tool_calls``,
        ``tool_call_success`` (share of them that ran without an error; None without calls), ``gold_actions`` (share
        of the actions in the tasks' files that the agent took, as tau2 matches them; None where it checked none),
        ``endings`` (reason to count) and ``tasks`` (task to trials and successes).
    """
    unreadable = [run for run in results["simulations"] if _is_unreadable(run)]
    scored = [run for run in results["simulations"] if run["termination_reason"] != BROKEN or _is_unreadable(run)]
    tasks: dict[str, list[bool]] = {}
    for run in sorted(scored, key=lambda run: run.get("trial") or 0):
        tasks.setdefault(str(run["task_id"]), []).append(_succeeded(run))
    calls = [failed for run in scored for failed in _call_errors(run.get("messages") or [])]
    matched = [
        check["action_match"] for run in scored for check in (run.get("reward_info") or {}).get("action_checks") or []
    ]
    return {
        "n": len(tasks),
        "conversations": len(scored),
        "broken": len(results["simulations"]) - len(scored),
        "unreadable": len(unreadable),
        "pass": _passes(list(tasks.values())),
        "reward": fmean(_reward(run) for run in scored) if scored else None,
        "tool_calls": len(calls),
        "tool_call_success": 1 - fmean(calls) if calls else None,
        "gold_actions": fmean(matched) if matched else None,
        "endings": dict(Counter(run["termination_reason"] for run in results["simulations"])),
        "tasks": {name: {"trials": len(kept), "successes": sum(kept)} for name, kept in tasks.items()},
    }


def task_records(domain: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each task, as `document_records` has one for each document: to compare two agents on the same."""
    held = score_domain(results)["tasks"]
    records = []
    for place, task in enumerate(results["tasks"]):
        if counts := held.get(str(task["id"])):
            content = json.dumps(task, sort_keys=True).encode()
            identity = {"task": f"tau2_{domain}", "doc": place, "hash": hashlib.sha256(content).hexdigest()[:16]}
            share = counts["successes"] / counts["trials"]
            records.append({**identity, "id": task["id"], "pass^1": share, **counts})
    return records


def _is_unreadable(run: dict[str, Any]) -> bool:
    """Whether the agent ended it by an empty message, or by a call whose arguments are no JSON object."""
    told = run.get("info") or {}
    if run["termination_reason"] != BROKEN:
        return False
    garbled = told.get("error_type") in ("JSONDecodeError", "ValidationError")
    by_agent = "llm_agent.py" in str(told.get("error_traceback"))  # not the judge, whose answers are JSON as well
    return (garbled and by_agent) or str(told.get("error")).startswith("AssistantMessage must have")


def _reward(run: dict[str, Any]) -> float:
    """0 where tau2 gave none: the conversation ended too early to be judged."""
    return float((run.get("reward_info") or {}).get("reward") or 0.0)


def _succeeded(run: dict[str, Any]) -> bool:
    return abs(_reward(run) - 1.0) <= 1e-6


def _call_errors(messages: Iterable[dict[str, Any]]) -> list[bool]:
    """Of each tool call of the agent that got an answer: whether the answer is an error (unknown tool, bad arguments,
    refused by the tool). The simulated user's own calls do not count.
    """
    found = []
    for message in messages:
        parts = message.get("tool_messages") or [message]
        answers = [part for part in parts if part.get("role") == "tool" and part.get("requestor") == "assistant"]
        found += [bool(part.get("error")) for part in answers]
    return found


def _passes(tasks: Sequence[Sequence[bool]]) -> dict[int, dict[str, float | None]]:
    fewest = min(map(len, tasks), default=0)
    passes = {}
    for k in range(1, fewest + 1):
        values = [pass_hat_k(len(trials), sum(trials), k) for trials in tasks]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        passes[k] = {"value": fmean(values), "stderr": error}
    return passes
