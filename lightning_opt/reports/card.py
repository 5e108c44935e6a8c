"""The model card: filled by machine from the run folder, with the YAML header that Hugging Face reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_opt.reports import findings, settings, tables
from lightning_opt.reports import quantities as q
from lightning_opt.reports.commands import shown_path
from lightning_opt.reports.reading import Run
from lightning_opt.reports.scores import Score, comparability


def content(run: Run, entries: Sequence[Score]) -> dict[str, Any]:
    """Everything the card's template shows."""
    return {
        "header": yaml.safe_dump(header(run, entries), sort_keys=False, allow_unicode=True, width=110).rstrip(),
        "title": run.name,
        "alarm": findings.alarm(run, entries),
        "verdict": findings.verdict(run, entries),
        "facts": _facts(run),
        "corpora": tables.corpora(run),
        "routing": tables.routing(run),
        "tuned": settings.tuned(run),
        "tuned_words": settings.tuned_words(run),
        "scores": tables.scores(entries),
        "comparability": comparability(entries),
        "limits": _limits(run, entries),
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
    base = _origin(run)
    if base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists():  # the shape of a hub id
        found["base_model"] = base
    measured = [entry for entry in entries if entry.counts and entry.comparable]
    if measured:  # any other would be read as a score of the real set
        found["model-index"] = [{"name": name, "results": [_result(entry) for entry in measured]}]
    return found


def _origin(run: Run) -> str | None:
    """Path or hub id of the model whose weights the run went on from; None for a new model."""
    path = run.asked("model.path")
    return path if isinstance(path, str) and path else None


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
        *([("continued from", base)] if (base := _origin(run)) else []),
        *([("started from the checkpoint", start)] if (start := findings.started_elsewhere(run)) else []),
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


def _used_by_a_token(run: Run) -> float | None:
    """Parameters outside the embedding, of experts only those that one token is sent to."""
    names = ("params_non_embedding", "params_total", "params_active")
    size, total, active = (q.finite(run.summary.get(name)) for name in names)
    return size if None in (size, total, active) else size - (total - active)


def _limits(run: Run, entries: Sequence[Score]) -> tuple[str, ...]:
    limits = list(findings.notes(run, entries))
    tokens, size = q.finite(run.summary.get("tokens")), _used_by_a_token(run)
    if tokens is not None and size and not _origin(run):
        limits.append(
            f"Trained on {q.number(tokens / size, 3)} tokens per parameter outside the embedding "
            "(20 are usual for a compute-optimal model, Hoffmann et al. 2022)."
        )
    if base := _origin(run):
        limits.append(
            f"Continued from {base}: what that model was trained on, and its licence and limits, are not in this card. "
            "This run added raw text only, and was not filtered or tested for safety."
        )
    else:
        limits.append("Pretrained on raw text only: not tuned for instructions, not filtered or tested for safety.")
    limits.append("Licence: not declared here. The terms of the training data apply; state one before publishing.")
    return tuple(limits)
