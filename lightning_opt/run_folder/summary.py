"""``summary.json``: one pure function of the folder, so that it can be made again at any time."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning_opt.run_folder.folder import RunFolder
from lightning_opt.run_folder.records import read_events, read_json, read_metrics
from lightning_opt.run_folder.status import read_status

Column = list[float | None]


def summarize(folder: RunFolder | Path) -> dict[str, Any]:
    """Derives the run's summary from its records; what was not measured is None.

    Args:
        folder: a run folder, finished or not.

    Returns:
        The keys of ``summary.json``. ``train_loss`` is the mean over the last twentieth of the logged steps.
        ``cpu_seconds`` is what the process computed (of several, the first), ``seconds`` what passed.
        ``loss_volatility`` is the mean over the run of the rolling std/mean. Speeds are medians over the logged
        intervals, each of which is a total: a machine that stalls for a minute does not move them, a cost that
        comes back every few steps does, as long as it comes back within ``log_every_n_steps``.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))
    plan, env, status = read_json(folder.plan), read_json(folder.env), read_status(folder.status)
    columns = read_metrics(folder.metrics)

    def column(name: str) -> list[float]:
        return [value for value in columns.get(name, []) if value is not None]

    def middle(name: str) -> float | None:
        values = column(name)
        return median(values) if values else None

    losses = column("train/loss")
    steps = columns.get("step", [])
    done = status.get("step")
    per_step = plan.get("tokens_per_step")
    tokens = _tokens(columns, done, per_step) if done is not None and per_step else None
    return {
        "name": plan.get("name"),
        "optimizer": plan.get("optimizer"),
        "model": plan.get("model"),
        "data": plan.get("data"),
        "params_total": plan.get("params_total"),
        "params_active": plan.get("params_active"),
        "params_non_embedding": plan.get("params_non_embedding"),
        "tokens": tokens,
        "epochs_by_corpus": _epochs(plan.get("mixture") or [], tokens),
        "steps": done,
        "seconds": _last(column("time_s")),
        "cpu_seconds": _last(column("cpu_time_s")),
        "train_loss": fmean(losses[-max(1, len(losses) // 20) :]) if losses else None,
        "val_loss": _last(column("val/loss")),
        "val_perplexity": _last(column("val/perplexity")),
        "val_bits_per_byte": _last(column("val/bits_per_byte")),
        "val_loss_by_corpus": {
            name.removeprefix("val/loss/"): _last(column(name)) for name in columns if name.startswith("val/loss/")
        }
        or None,
        "tokens_per_s_per_device": middle("tokens_per_s_per_device"),
        "step_ms": middle("step_ms"),
        "optimizer_ms": middle("optimizer_ms"),
        "optimizer_share": middle("optimizer_share"),
        "optimizer_state_bytes": _last(column("optimizer_state_bytes")),
        "peak_memory_bytes": max(column("memory_peak_bytes"), default=None),
        "mfu": middle("mfu"),
        "grad_norm_change": middle("grad_norm_change"),
        "loss_volatility": _mean(column("loss_volatility")),
        "loss_volatility_by_third": _thirds(steps, columns.get("loss_volatility", []), plan.get("max_steps")),
        "expert_load_cv": _last(column("expert_load/cv")),
        "expert_load_dead": _last(column("expert_load/dead")),
        **_troubles(folder),
        "evaluation": read_json(folder.results).get("summary"),
        "state": status.get("state"),
        "config_hash": status.get("config_hash"),
        "git_commit": env.get("git_commit"),
    }


def _troubles(folder: RunFolder) -> dict[str, Any]:
    """What the run survived: events say so; what lay behind the checkpoint that it went on from, it lived again."""
    if not folder.plan.exists():
        return dict.fromkeys(("resumed_from", "failed_saves", "skipped_steps", "rewinds"))
    events = read_events(folder.events)
    kinds = [event.get("kind") for event in events]
    skipped: set[int] = set()
    for event, kind in zip(events, kinds, strict=True):
        if kind == "step_skipped":
            skipped.add(event["step"])
        elif kind in ("resumed", "restarted"):
            skipped = {step for step in skipped if step <= event.get("step", 0)}
    before = ["", *kinds]  # a rewind goes on from a checkpoint too
    return {
        "resumed_from": [
            event["step"]
            for event, last in zip(events, before, strict=False)
            if event.get("kind") == "resumed" and last != "rewound"
        ],
        "failed_saves": kinds.count("checkpoint_failed"),
        "skipped_steps": len(skipped),
        "rewinds": kinds.count("rewound"),
    }


def _tokens(columns: dict[str, Column], done: int, per_step: int) -> int:
    """Tokens of all steps: from the last row on steps are of the size of now, those before it may have had another."""
    row = {name: _last([value for value in columns.get(name, []) if value is not None]) for name in ("step", "tokens")}
    return (row["tokens"] or 0) + (done - (row["step"] or 0)) * per_step


def _epochs(phases: list[dict[str, Any]], tokens: int | None) -> dict[str, float] | None:
    """How often each corpus was read: on the line between what the plan says of the seams on both sides."""
    if not phases or tokens is None:
        return None
    since, before = 0, dict.fromkeys(phases[0]["epochs"], 0.0)
    for phase in phases:
        until, after = phase["until_token"], phase["epochs"]
        if tokens <= until:
            break
        if phase is not phases[-1]:
            since, before = until, after
    part = (tokens - since) / (until - since)
    return {name: before[name] + part * (after[name] - before[name]) for name in after}


def _last(values: list[float]) -> float | int | None:
    if not values:
        return None
    value = values[-1]
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _thirds(steps: Column, values: Column, max_steps: int | None) -> list[float | None] | None:
    """Means of a column over the first, second and last third of the planned run."""
    if not max_steps or not any(value is not None for value in values):
        return None
    parts: list[list[float]] = [[], [], []]
    for step, value in zip(steps, values, strict=True):
        if step is not None and value is not None:
            parts[min(2, int(3 * (step - 1) / max_steps))].append(value)
    return [_mean(part) for part in parts]
