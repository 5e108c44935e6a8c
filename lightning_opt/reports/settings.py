"""The configuration as a reader wants it: what was asked on the command line, and the values that mattered."""

from __future__ import annotations

from typing import Any

import yaml

from lightning_opt.reports import quantities as q
from lightning_opt.reports.reading import Run
from lightning_opt.reports.tables import Table


def tuned(run: Run) -> Table:
    """The tuned values that were used, with their source."""
    record = run.part("plan", "tuned")
    values = record.get("values") if isinstance(record.get("values"), dict) else {}
    source = q.text(record.get("source"))
    body = tuple((str(key), q.text(value), source) for key, value in values.items())
    return Table("tuned", "Tuned values", ("field", "value", "source"), body, frozenset({1}))


def tuned_words(run: Run) -> str:
    """Whether tuned values were used, in a sentence that does not claim what the values then were."""
    record = run.part("plan", "tuned")
    if record:
        return f"Tuned values from: {q.text(record.get('source'))}."
    if "tuned" in run.plan and run.plan["tuned"] is None:
        return "No tuned values were used: what was not asked is the configuration's own default."
    return "Whether tuned values were used is not known."


def settings(run: Run) -> Table:
    """The resolved values that decide what a run is."""
    rows = [*_optimizer(run), *_schedule(run), *_length(run), *_model(run), *_data(run), *_compute(run)]
    body = tuple((group, name, q.text(value)) for group, name, value in rows if value not in (None, "", [], {}))
    return Table("settings", "Values that decided the run", ("of", "setting", "value"), body, grouped=True)


def full_configuration(run: Run) -> str:
    """The whole configuration as YAML, secrets redacted; empty where the folder has none."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110) if run.config else ""


def rate_after_scale(run: Run) -> float | None:
    """The optimizer's rate times its scale, the peak that the default role gets."""
    rate, scale = q.finite(run.asked("optimizer.lr")), q.finite(run.asked("optimizer.lr_scale"))
    return None if rate is None else rate * (1.0 if scale is None else scale)


def seed(run: Run) -> str | None:
    """The seed to the letter, without separators; None where no file says it."""
    value = run.plan.get("seed", run.asked("seed"))
    return None if value is None else str(value)


def _optimizer(run: Run) -> list[tuple[str, str, Any]]:
    optimizer = run.part("config", "optimizer")
    shown = ("name", "lr", "lr_scale", "weight_decay", "weight_decay_mode", "betas", "eps", "momentum")
    shown += ("max_grad_norm", "state_dtype", "implementation")
    rows = [("optimizer", name, optimizer.get(name)) for name in shown if name in optimizer]
    if "max_grad_norm" in optimizer and optimizer["max_grad_norm"] is None:
        rows = [(a, b, "no clipping" if b == "max_grad_norm" else value) for a, b, value in rows]
    return rows


def _schedule(run: Run) -> list[tuple[str, str, Any]]:
    schedule = run.part("config", "schedule")
    rows = [
        ("schedule", name, schedule.get(name)) for name in ("name", "warmup", "min_ratio", "decay") if name in schedule
    ]
    if schedule.get("name") not in (None, "wsd"):
        rows = [row for row in rows if row[1] != "decay"]
    return [*rows, ("schedule", "warm-up steps", run.plan.get("warmup_steps"))]


def _length(run: Run) -> list[tuple[str, str, Any]]:
    plan = run.plan
    return [
        ("length", "scale", run.asked("scale.name")),
        ("length", "steps", plan.get("max_steps")),
        ("length", "tokens", plan.get("tokens")),
        ("length", "tokens per step", plan.get("tokens_per_step")),
        ("length", "sequence length", plan.get("sequence_length")),
        ("length", "global batch (sequences)", plan.get("global_batch_size")),
        ("length", "micro batch × accumulation × devices", _product(plan)),
    ]


def _product(plan: dict[str, Any]) -> str | None:
    parts = [plan.get(key) for key in ("micro_batch_size", "accumulate", "devices")]
    return None if any(part is None for part in parts) else " × ".join(q.text(part) for part in parts)


def _model(run: Run) -> list[tuple[str, str, Any]]:
    model = run.part("config", "model")
    shown = ("name", "path", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    shown += ("dense_layers", "num_experts", "experts_per_token", "expert_size", "shared_experts")
    shown += ("context_length", "tie_embeddings", "qk_norm", "z_loss", "init", "activation_checkpointing")
    rows = [("model", name, model.get(name)) for name in shown if name in model]
    return [
        *rows,
        ("model", "parameters", run.plan.get("params_total")),
        ("model", "parameters that one token uses", run.plan.get("params_active")),
        ("model", "parameters without embedding", run.plan.get("params_non_embedding")),
        ("model", "FLOPs per token", q.short(run.plan["flops_per_token"]) if "flops_per_token" in run.plan else None),
    ]


def _data(run: Run) -> list[tuple[str, str, Any]]:
    tokenizer = run.part("plan", "tokenizer")
    words = None
    if tokenizer:
        words = f"{q.text(tokenizer.get('kind'))}, {q.text(tokenizer.get('vocab_size'))} tokens"
    return [
        ("data", "name", run.asked("data.name")),
        ("data", "source", run.asked("data.source")),
        ("data", "path", run.asked("data.path")),
        ("data", "weights", run.asked("data.weights")),
        ("data", "tokenizer", words),
        ("data", "tokenizer SHA-256", tokenizer.get("sha256")),
    ]


def _compute(run: Run) -> list[tuple[str, str, Any]]:
    precision, reason = run.plan.get("precision"), run.plan.get("precision_reason")
    return [
        ("compute", "precision", f"{precision} ({reason})" if precision and reason else precision),
        ("compute", "compile", run.asked("trainer.compile")),
        ("compute", "deterministic", run.asked("trainer.deterministic")),
        ("compute", "seed", seed(run)),
    ]
