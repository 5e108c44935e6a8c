"""Scores a served checkpoint as a tool-calling agent with Sierra's tau2 and keeps ``results.json`` in lm-eval's layout.

Folder: ``results.json`` and ``documents.jsonl.gz`` as `score.evaluate` writes them (one record for each task), and per
domain ``<domain>/results.json`` (tau2's own, with every message) and ``<domain>/tau2.log``. The same request again goes
on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_opt.evaluation import document_records
from lightning_opt.evaluation.agents.scores import IDLE, read_results, score_domain, task_records
from lightning_opt.evaluation.agents.settings import DOMAINS, AgentSettings, folder_of
from lightning_opt.evaluation.agents.tau2 import Tau2, find_tau2, named, run_domain, served_model
from lightning_opt.evaluation.score import DOCUMENTS
from lightning_opt.plan import ConfigError
from lightning_opt.plan.secrets import guarding
from lightning_opt.run_folder import read_json, write_json

_LOG = logging.getLogger("lightning_opt.evaluation")
_MAY_DIFFER = ("domains", "url", "user_url", "judge_url", "concurrency", "out", "tau2")


def evaluate_agent(settings: AgentSettings, say: Callable[[str], None] = _LOG.info) -> tuple[Path, dict[str, Any]]:
    """Holds the conversations that are missing and scores all of them.

    Args:
        settings: what is asked.
        say: takes lines of progress.

    Returns:
        The folder, and its summary: ``suite``, ``comparable``, and per task ``tau2_<domain>`` what `evaluate` gives
        (``metric`` is ``pass^1``) with ``pass``, ``trials``, ``tool_calls``, ``tool_call_success``, ``gold_actions``,
        ``endings`` and ``broken``.

    Raises:
        ConfigError: the endpoint, tau2, a key or the folder is not as it must be; nothing has been run then.
        RuntimeError: tau2 failed, or no conversation came to its end.
    """
    with guarding({}):
        settings = named(settings, served_model(settings))
        folder = folder_of(settings)
        kept = _kept(folder)
        tau2 = find_tau2(settings)
        config = _config(settings, tau2)
        _refuse_others(folder, kept.get("config", {}), config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("out", str(folder), f"must be a folder we can write to ({error.strerror})") from None
        results = kept or {"results": {}, "n-samples": {}, "versions": {}, "n-shot": {}, "higher_is_better": {}}
        results |= {"config": config, "model_name": settings.model, "suite": "agents"}
        started, before = time.monotonic(), results.get("evaluation_seconds", 0.0)
        for domain in settings.domains:
            found = read_results(folder / domain)
            if not _complete(found, tau2.tasks[domain], settings.trials):
                write_json(folder / "results.json", results)
                run_domain(tau2, settings, domain, folder / domain, say)
                found = read_results(folder / domain)
            if not found or not score_domain(found)["n"]:
                raise RuntimeError(f"{domain}: no conversation came to its end, see {folder / domain / 'tau2.log'}")
            _enter(results, domain, score_domain(found), tau2, settings)
            results["evaluation_seconds"] = round(before + time.monotonic() - started, 3)
            write_json(folder / "results.json", results)
        _write_records(folder)
        return folder, results["summary"]


def _write_records(folder: Path) -> None:
    found = ((domain, read_results(folder / domain)) for domain in DOMAINS)
    document_records.write(
        folder / DOCUMENTS, [record for name, kept in found if kept for record in task_records(name, kept)]
    )


def _kept(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        kept = read_json(path) if path.is_file() else {}
    except ValueError:
        how = "must be whole, and is cut or no JSON: delete it, and conversations that were held are scored again"
        raise ConfigError("out", str(path), how) from None
    if kept.get("suite", "agents") != "agents":
        raise ConfigError("out", str(folder), "must be a folder of its own: it holds other results")
    return kept


def _config(settings: AgentSettings, tau2: Tau2) -> dict[str, Any]:
    """What the scores depend on, and who played the others."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("out", "tau2", "model")}
    asked |= {"domains": list(settings.domains), **tau2.models}  # with tau2's own choices named
    return {"agent": settings.model, "tau2_version": tau2.version, **asked}


def _refuse_others(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in now if name not in _MAY_DIFFER and before and before.get(name) != now[name]]
    if changed:
        what = ", ".join(f"{name} {before.get(name)} instead of {now[name]}" for name in changed)
        raise ConfigError("out", str(folder), f"holds conversations with {what}: give another folder, or ask as before")


def _complete(found: dict[str, Any] | None, tasks: list[str], trials: int) -> bool:
    if found is None:
        return False
    held = score_domain(found)["tasks"]
    return all(held.get(task, {}).get("trials", 0) >= trials for task in tasks)


def _enter(results: dict[str, Any], domain: str, score: dict[str, Any], tau2: Tau2, settings: AgentSettings) -> None:
    """Puts one domain's scores where lm-eval has a task's."""
    task = f"tau2_{domain}"
    flat: dict[str, Any] = {"alias": task}
    for k, entry in score["pass"].items():
        flat |= {f"pass^{k},none": entry["value"], f"pass^{k}_stderr,none": entry["stderr"]}
    flat |= {f"{name},none": score[name] for name in ("reward", "tool_call_success", "gold_actions")}
    results["results"][task] = flat
    results["n-samples"][task] = {"original": len(tau2.tasks[domain]), "effective": score["n"]}
    results["versions"][task], results["n-shot"][task] = tau2.version, 0
    results["higher_is_better"][task] = {name.split(",")[0]: True for name in flat if name.endswith(",none")}
    whole = settings.tasks is None and settings.split == "base"
    entry = {
        "metric": "pass^1", **score["pass"][1], "n": score["n"], "shots": 0,
        "chance": IDLE[domain] if whole else None, "trials": settings.trials, "pass": score["pass"],
        **{name: score[name] for name in ("tool_calls", "tool_call_success", "gold_actions")},
        **{name: score[name] for name in ("endings", "broken", "unreadable")},
        **_comparable(domain, score, tau2, settings),
    }  # fmt: skip
    summary = results.setdefault("summary", {"suite": "agents", "trials": settings.trials})
    summary[task] = entry
    summary["comparable"] = all(part["comparable"] for part in summary.values() if isinstance(part, dict))
    results["comparable"] = summary["comparable"]


def _comparable(domain: str, score: dict[str, Any], tau2: Tau2, settings: AgentSettings) -> dict[str, Any]:
    """Whether the score may stand beside published ones, and where not, why in a few words."""
    why = ""
    if score["broken"]:
        why = f"{score['broken']} conversations broke off: the same command holds them again"
    elif score["unreadable"]:
        why = f"{score['unreadable']} conversations with an unreadable message count as failed, tau2 leaves them out"
    elif settings.split != "base" or settings.tasks is not None:
        why = f"{score['n']} tasks of split {settings.split}, not all of base"
    elif settings.user or (settings.judge and tau2.judged[domain]):
        why = "the user or the judge is not the model of the published scores"
    elif settings.max_steps != AgentSettings.max_steps:
        why = f"conversations of at most {settings.max_steps} steps"
    return {"comparable": False, "why_not": why} if why else {"comparable": True}
