"""The model card: filled by machine from the run folder, with the YAML header that Hugging Face reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from lightning_opt.reports import findings, settings, tables
from lightning_opt.reports import quantities as q
from lightning_opt.reports.commands import shown_path
from lightning_opt.reports.reading import Run
from lightning_opt.reports.scores import Score, comparable, suite


def content(run: Run, entries: Sequence[Score]) -> dict[str, Any]:
    """Everything the card's template shows."""
    named, fair = suite(run), comparable(run)
    return {
        "header": yaml.safe_dump(header(run, entries), sort_keys=False, allow_unicode=True, width=110).rstrip(),
        "title": run.name,
        "alarm": findings.alarm(run),
        "verdict": findings.verdict(run, entries, named, fair),
        "facts": _facts(run),
        "corpora": tables.corpora(run),
        "routing": tables.routing(run),
        "tuned": settings.tuned(run),
        "tuned_source": run.part("plan", "tuned").get("source"),
        "scores": tables.scores(entries, named, fair),
        "suite": named,
        "comparable": fair,
        "limits": _limits(run, entries, named, fair),
        "path": f"{shown_path(run.folder)}/model",
        "has_model": (run.folder / "model").is_dir(),
    }


def header(run: Run, entries: Sequence[Score]) -> dict[str, Any]:
    """The card's metadata. A licence and languages are not in it: the run does not know them."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "lightning_opt",
            "causal-lm",
            str(run.asked("optimizer.name") or run.summary.get("optimizer") or "unknown"),
        ],
    }
    base = run.asked("model.path")
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        found["base_model"] = base
    measured = [entry for entry in entries if entry.value is not None]
    if measured and comparable(run):  # scores of our own mini sets would be read as those of the real ones
        found["model-index"] = [{"name": name, "results": [_result(entry) for entry in measured]}]
    return found


def _result(entry: Score) -> dict[str, Any]:
    arguments = {} if entry.shots is None else {"num_few_shot": int(entry.shots)}
    metrics = [{"type": entry.metric or "score", "value": entry.value, "name": entry.metric or "score"}]
    if entry.stderr is not None:
        metrics.append(
            {"type": f"{entry.metric}_stderr", "value": entry.stderr, "name": f"standard error of {entry.metric}"}
        )
    dataset = {"type": entry.task, "name": entry.title, **({"args": arguments} if arguments else {})}
    return {"task": {"type": "text-generation", "name": "Text Generation"}, "dataset": dataset, "metrics": metrics}


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    plan, summary = run.plan, run.summary
    tokenizer = run.part("plan", "tokenizer")
    kind = (
        f"{q.text(tokenizer.get('kind'))}, {q.integer(tokenizer.get('vocab_size'))} tokens"
        if tokenizer
        else q.NOT_MEASURED
    )
    sha = tokenizer.get("sha256")
    rate = settings.rate_after_scale(run)
    device = run.env.get("device_name") or run.env.get("device")
    decay = q.text(run.asked("optimizer.weight_decay"))
    without = q.integer(summary.get("params_non_embedding"))
    sequences, each_step = q.integer(plan.get("global_batch_size")), q.integer(plan.get("tokens_per_step"))
    warmup = q.integer(plan.get("warmup_steps"))
    dirty = " with uncommitted changes" if run.env.get("git_dirty") else ""
    used = f"{q.integer(plan.get('devices'))} × {q.text(device)}, {q.duration(summary.get('seconds'))}{_flops(run)}"
    return (
        ("model", findings.model_name(run)),
        ("parameters", f"{q.integer(summary.get('params_total'))} ({without} without embedding)"),
        ("context", f"{q.integer(plan.get('sequence_length'))} tokens"),
        ("tokenizer", kind + (f", SHA-256 {sha}" if sha else "")),
        ("trained on", f"{q.integer(summary.get('tokens'))} tokens in {q.integer(summary.get('steps'))} steps"),
        ("data fingerprint", q.text(plan.get("data_fingerprint") or run.env.get("data_fingerprint"))),
        ("optimizer", f"{findings.optimizer_name(run)}, peak rate {q.trimmed(rate)}, weight decay {decay}"),
        ("schedule", f"{q.text(run.asked('schedule.name'))}, {warmup} warm-up steps"),
        ("batch", f"{sequences} sequences, {each_step} tokens a step"),
        ("precision", q.text(plan.get("precision"))),
        ("compute", used),
        ("validation loss", _validation(run)),
        ("seed", settings.seed(run) or q.NOT_MEASURED),
        ("code", f"commit {q.text(run.env.get('git_commit'))}{dirty}"),
    )


def _flops(run: Run) -> str:
    tokens, each = q.finite(run.summary.get("tokens")), q.finite(run.plan.get("flops_per_token"))
    return "" if tokens is None or each is None else f", about {tokens * each:.2e} FLOPs"


def _validation(run: Run) -> str:
    loss = run.summary.get("val_loss")
    if q.finite(loss) is None:
        return q.NOT_MEASURED
    bits = run.summary.get("val_bits_per_byte")
    more = f", {q.number(bits)} bits per byte" if q.finite(bits) is not None else ""
    return f"{q.number(loss)} nats per token (perplexity {q.number(run.summary.get('val_perplexity'))}{more})"


def _limits(run: Run, entries: Sequence[Score], named: str | None, fair: bool) -> tuple[str, ...]:
    limits = list(findings.notes(run, entries, named, fair))
    tokens, size = q.finite(run.summary.get("tokens")), q.finite(run.summary.get("params_non_embedding"))
    if tokens is not None and size:
        limits.append(
            f"Trained on {q.number(tokens / size, 3)} tokens per parameter outside the embedding "
            "(20 are usual for a compute-optimal model, Hoffmann et al. 2022)."
        )
    limits.append("Pretrained on raw text only: not tuned to follow instructions, not filtered or tested for safety.")
    limits.append("Licence: not declared here. The terms of the training data apply; state one before publishing.")
    return tuple(limits)
