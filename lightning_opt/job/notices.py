"""What a run says at its start and at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("lightning_opt.job")


def banner(folder: Path, plan: dict[str, Any], env: dict[str, Any]) -> None:
    """Says what is about to run: folder, device, model, data, routing, length.

    Args:
        folder: the run folder.
        plan: ``plan.json``.
        env: ``env.json``.
    """
    device = (
        f"{env['device_name'] or env['device']}, {env['num_threads']} threads"
        if env["device"] == "cpu"
        else env["device_name"]
    )
    if env["world_size"] > 1:
        nodes = f" on {env['num_nodes']} machines" if env["num_nodes"] > 1 else ""
        device = f"{env['strategy']} × {env['world_size']}{nodes}, each {device}"
    log.info("run        %s", folder)
    log.info("device     %s; %s: %s", device, plan["precision"], plan["precision_reason"])
    total, used = plan["params_total"], plan["params_active"]
    log.info(
        "model      %s: %s parameters%s, %s without embeddings",
        plan["model"],
        _count(total),
        f" of which a token uses {_count(used)}" if used < total else "",
        _count(plan["params_non_embedding"]),
    )
    log.info(
        "data       %s: vocabulary %d, fingerprint %s",
        plan["data"],
        plan["tokenizer"]["vocab_size"],
        plan["data_fingerprint"][:12],
    )
    mixture(plan)
    tuned = plan["tuned"]
    log.info("optimizer  %s; tuned values: %s", plan["optimizer"], tuned["source"] if tuned else "none, defaults")
    tuning(tuned, plan["tokens_per_step"], plan["tokens"])
    table(
        "           ",
        ("role", "rule", "runs as", "tensors", "params", "lr", "decay", "state"),
        [_route(row) for row in plan["routing"]],
    )
    for rule, why in plan["implementations"].items():
        log.info("           %s runs as %s", rule, why)
    log.info(
        "length     %d steps of %s tokens = %s tokens; warm-up %d steps, then %s",
        plan["max_steps"],
        f"{plan['tokens_per_step']:,}",
        _count(plan["tokens"]),
        plan["warmup_steps"],
        plan["schedule"]["name"],
    )


def mixture(plan: dict[str, Any]) -> None:
    """Says what is read how often, how that changes along the run, and warns of corpora that are read too often."""
    for corpus in plan["corpora"]:
        if corpus["epochs"] is None:
            log.info("           %-12s validation only", corpus["name"])
            continue
        entropy = corpus["unigram_entropy"]  # of its validation tokens, which it need not have
        log.info(
            "           %-12s weight %.3f  %s tokens, %.2f epochs%s",
            corpus["name"],
            corpus["weight"],
            _count(corpus["train_tokens"]),
            corpus["epochs"],
            "; no validation text of its own" if entropy is None else f"; unigram entropy {entropy:.2f} nats",
        )
    for phase in plan["mixture"] if len(plan["mixture"]) > 1 else ():
        shares = " ".join(f"{name} {share:.3f}" for name, share in phase["weights"].items())
        log.info("           %-12s until %s tokens: %s", phase["phase"], _count(phase["until_token"]), shares)
    if plan["documents_apart"]:
        log.info("           no token sees another document")
    limit = plan["warn_above_epochs"]
    for corpus in plan["corpora"]:
        if limit and (corpus["epochs"] or 0) > limit:
            log.warning(
                "           %s is gone through %.3g times, more than data.warn_above_epochs = %g: beyond four times, "
                "repeated text teaches less and less (arXiv:2305.16264)",
                corpus["name"],
                corpus["epochs"],
                limit,
            )


def tuning(tuned: dict[str, Any] | None, tokens_per_step: int, tokens: int) -> None:
    """Warns where tuned values were found at another batch than this run's, or in runs of less than half its tokens."""
    tuned = tuned or {}
    batch, length = tuned.get("tokens_per_step"), tuned.get("tokens")
    words = "           tuned at %s tokens%s, and this run has %s: its best %s"
    if batch and batch != tokens_per_step:
        log.warning(words, f"{batch:,}", " per step", f"{tokens_per_step:,}", "lr and batch may be others")
    if length and length < tokens / 2:
        log.warning(words, f"{length:,}", "", f"{tokens:,}", "lr may be smaller")


def resumed(notes: Sequence[str]) -> None:
    """Says from where a run goes on, and what is not as it was there."""
    for first, line in enumerate(notes):
        log.info("%-10s %s", "" if first else "resume", line)


def _route(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["role"],
        row["rule"],
        row["implementation"].partition(" ")[0],
        str(row["tensors"]),
        f"{row['params']:,}",
        f"{row['lr']:.3g}",
        f"{row['weight_decay']:.3g}",
        _bytes(row["state_bytes"]),
    )


def table(indent: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Logs rows in aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        log.info("%s%s", indent, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def last_block(folder: Path, summary: dict[str, Any], commands: Sequence[tuple[str, str]]) -> None:
    """Says how it went, where everything is, and what can be typed next.

    Args:
        folder: the run folder.
        summary: ``summary.json``.
        commands: pairs of what it does and the command.
    """
    log.info("")
    facts = [f"{_count(summary['tokens'])} tokens in {summary['seconds'] or 0:.0f} s"]
    if summary["val_loss"] is not None:
        facts.insert(0, f"validation loss {summary['val_loss']:.4f} nats/token")
        facts.insert(1, f"perplexity {summary['val_perplexity']:.1f}, {summary['val_bits_per_byte']:.3f} bits per byte")
    elif summary["train_loss"] is not None:
        facts.insert(0, f"training loss {summary['train_loss']:.4f} nats/token")
    log.info("%-10s %s", summary["state"], "; ".join(facts))
    by_corpus = {name: loss for name, loss in (summary["val_loss_by_corpus"] or {}).items() if loss is not None}
    if by_corpus:
        log.info("loss       %s", "  ".join(f"{name} {loss:.4f}" for name, loss in by_corpus.items()))
    if summary["tokens_per_s_per_device"]:
        share = (
            f"; optimizer {100 * summary['optimizer_share']:.1f} % of a step"
            if summary["optimizer_share"] is not None
            else ""
        )
        log.info("speed      %s tokens/s per device%s", f"{summary['tokens_per_s_per_device']:,.0f}", share)
    for task, score in scores(summary).items():
        log.info("%-10s %s", task, score)
    log.info("report     %s", folder / "report.html")
    for what, command in commands:
        log.info("%s:", what)
        log.info("  %s", command)


def scores(summary: dict[str, Any]) -> dict[str, str]:
    """Each task's score as a line: value, standard error, n, shots, chance."""
    evaluation = summary.get("evaluation") or {}
    lines = {}
    for task, score in evaluation.items():
        if not isinstance(score, dict):
            continue
        if "skipped" in score:
            lines[task] = f"skipped: {score['skipped']}"
            continue
        spread = f" ± {score['stderr']:.3f}" if score.get("stderr") is not None else ""
        chance = f", chance {score['chance']:.3f}" if score.get("chance") is not None else ""
        lines[task] = (
            f"{score['value']:.3f}{spread} {score['metric']} "
            f"({evaluation['suite']}: n={score['n']}, {score['shots']}-shot{chance})"
        )
    return lines


def _count(number: float | None) -> str:
    if number is None:
        return "unknown"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
