"""One run from its configuration to its report: train → evaluate → report."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_opt.job import notices, record
from lightning_opt.job.logs import run_log
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.plan import ConfigError, RunPlan, check, data_config
from lightning_opt.run_folder import (
    Diverged,
    ExitCode,
    RunFolder,
    Status,
    append_event,
    config_hash,
    read_status,
    summarize,
    write_json,
    write_text,
)

log = logging.getLogger("lightning_opt.job")


@dataclass(frozen=True)
class Order:
    """What a run was asked to do.

    Attributes:
        config: the resolved configuration, plain types only.
        plan: lengths and batches that follow from it.
        overrides: the command line's overrides, without secrets.
        saved_config: text of config.yaml, environment variables unresolved.
        instantiate: calls a ``_target_`` (Hydra's, handed down).
        tuned: tuned values that were merged, ``{"source", "values"}``, or None.
    """

    config: dict[str, Any]
    plan: RunPlan
    overrides: list[str]
    saved_config: str
    instantiate: Callable[..., Any]
    tuned: dict[str, Any] | None


def run(
    config: dict[str, Any],
    folder: RunFolder,
    *,
    overrides: list[str],
    saved_config: str,
    instantiate: Callable[..., Any],
    tuned: dict[str, Any] | None = None,
) -> int:
    """Trains, evaluates and reports in one folder, and never ends silently.

    Args:
        config: the resolved configuration.
        folder: the claimed run folder.
        overrides: the command line's overrides, without secrets.
        saved_config: text for config.yaml.
        instantiate: calls a ``_target_``.
        tuned: tuned values that were merged, or None.

    Returns:
        The exit code: 0 finished, 1 failed, 2 configuration, 3 diverged, 130 interrupted, 143 preempted. The reason
        is in status.json, and the traceback, if any, in run.log.
    """
    order = Order(config, check(config), overrides, saved_config, instantiate, tuned)
    identity = read_status(folder.status).get("config_hash") or config_hash(config)
    with Status(folder.status, identity) as status, run_log(folder.log), terminable():
        return _guarded(order, folder, status)


def _guarded(order: Order, folder: RunFolder, status: Status) -> int:
    """Runs the stages and turns whatever happens into a state, a reason, an event and an exit code."""
    try:
        if folder.metrics.exists():
            append_event(folder.events, "restarted")
        write_text(folder.config, order.saved_config)
        write_text(folder.overrides, "".join(f"{word}\n" for word in order.overrides))
        if _train_and_evaluate(order, folder, status):
            raise Terminated
        state, reason, code = "FINISHED", None, ExitCode.FINISHED
    except ConfigError as error:
        state, reason, code = "FAILED", str(error), ExitCode.CONFIGURATION
    except Diverged as error:
        state, reason, code = "DIVERGED", str(error), ExitCode.DIVERGED
    except Terminated:
        state, reason, code = "PREEMPTED", f"stopped by SIGTERM at step {status.step}", ExitCode.PREEMPTED
    except (KeyboardInterrupt, SystemExit):  # Lightning answers Ctrl-C with SystemExit after its own shutdown
        state, reason, code = "PREEMPTED", f"interrupted at step {status.step}", ExitCode.INTERRUPTED
    except Exception as error:
        state, reason, code = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())}", ExitCode.FAILED
        log.error("%s", traceback.format_exc())
    status.set(state, reason)
    if reason:
        log.error("%s: %s", state.lower(), reason)
        append_event(folder.events, state.lower(), step=status.step, reason=reason)
    if code != ExitCode.CONFIGURATION:
        _report(folder)
    return int(code)


def _train_and_evaluate(order: Order, folder: RunFolder, status: Status) -> str | None:
    """The stages that need torch. Returns what stopped the run early, if anything."""
    from lightning_opt import anatomy, data, models, optim, training

    config = order.config
    device = training.choose_device(config["trainer"]["accelerator"])
    training.prepare(config["seed"], config["trainer"]["num_threads"])
    token_data = data.build(data_config(config), seed=config["seed"])
    plan = order.plan if order.plan.max_steps else check(config, sequences=len(token_data.train))
    model = models.build(
        config["model"],
        vocab_size=token_data.vocab_size,
        instantiate=order.instantiate,
        eos_token_id=token_data.tokenizer.eos_token_id,
    )
    described = anatomy.describe(model)
    optimizer = optim.build(model, config["optimizer"])
    flops = _flops_per_token(model, described.non_embedding, plan.sequence_length)
    precision = training.choose_precision(config["trainer"]["precision"], config["trainer"]["accelerator"])
    planned = record.planned(
        config,
        plan,
        token_data=token_data,
        anatomy=described,
        optimizer=optimizer,
        flops_per_token=flops,
        precision=precision,
        tuned=order.tuned,
    )
    env = record.environment(token_data.fingerprint, device)
    write_json(folder.env, env)
    write_json(folder.plan, planned)
    notices.banner(folder.path, planned, env)
    fitted = training.fit(
        _module(config, plan, model, optimizer, token_data),
        _batches(config, plan, token_data),
        plan,
        config=config["trainer"],
        precision=precision[0],
        folder=folder,
        columns=_columns(token_data.val, {group["role"] for group in optimizer.param_groups}),
        callbacks=_callbacks(order, folder, plan, flops, token_data.tokenizer),
        loggers=_loggers(order, folder),
        status=status,
    )
    if fitted.stopped_by is None:
        _evaluate(order, folder, model, token_data.tokenizer, device)
    return fitted.stopped_by


def _flops_per_token(model: Any, non_embedding: int, sequence_length: int) -> float | None:
    """Training FLOPs per token; None for a model whose shape is not told the usual way."""
    from lightning_opt.plan import flops_per_token

    shape = getattr(model, "config", None)
    sizes = [getattr(shape, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    if None in sizes:
        return None
    layers, hidden, vocabulary = sizes
    return flops_per_token(non_embedding, layers, hidden, sequence_length, vocabulary)


def _module(config: dict[str, Any], plan: RunPlan, model: Any, optimizer: Any, token_data: Any) -> Any:
    from lightning_opt import training
    from lightning_opt.optim import schedules

    return training.PretrainModule(
        model,
        optimizer,
        schedules.build(config["schedule"], plan.max_steps),
        corpora=_validation_weights(token_data),
        token_bytes=token_data.token_bytes,
        z_loss=config["model"].get("z_loss") or 0.0,
    )


def _batches(config: dict[str, Any], plan: RunPlan, token_data: Any) -> Any:
    from lightning_opt import training

    return training.TokenDataModule(
        token_data.train,
        token_data.val,
        micro_batch_size=plan.micro_batch_size,
        micro_batches=plan.max_steps * plan.accumulate,
        val_sequences=config["trainer"]["val_sequences"],
        num_workers=config["data"]["num_workers"],
        overfit_batches=config["trainer"]["overfit_batches"],
    )


def _validation_weights(token_data: Any) -> dict[str, float]:
    """What each validation set counts in ``val/loss``: its corpus's share of the mixture.

    Where there are sets that nothing is trained on (the study's C4), they alone are the measure.
    """
    held_out = {corpus.name for corpus in token_data.corpora if not corpus.train_tokens}
    weight = {corpus.name: corpus.weight for corpus in token_data.corpora}
    return {name: float(name in held_out) if held_out else weight[name] for name in token_data.val}


def _columns(corpora: Any, roles: set[str]) -> list[str]:
    """Metric names that depend on the data and the routing."""
    ordered = sorted(roles)
    return (
        [f"val/loss/{name}" for name in corpora]
        + [f"lr/{role}" for role in ordered]
        + [f"grad_norm/{role}" for role in ordered]
    )


def _callbacks(order: Order, folder: RunFolder, plan: RunPlan, flops: float | None, tokenizer: Any) -> list[Any]:
    """Builds the configured callbacks and hands each what it asks for by an attribute that is still None."""
    given = {
        "flops_per_token": flops,
        "directory": folder.model,
        "tokenizer": tokenizer,
        "max_steps": plan.max_steps,
        "tokens_per_step": plan.tokens_per_step,
    }
    callbacks = [order.instantiate(spec) for spec in (order.config["callbacks"] or {}).values() if spec]
    for callback in callbacks:
        for name, value in given.items():
            if hasattr(callback, name) and getattr(callback, name) is None:
                setattr(callback, name, value)
    return callbacks


def _loggers(order: Order, folder: RunFolder) -> list[Any]:
    """Builds the configured loggers; what they write goes into the run folder unless they say where."""
    loggers = []
    for spec in (order.config["logger"] or {}).values():
        place = {"save_dir": str(folder.path)} if "save_dir" in spec and spec["save_dir"] is None else {}
        loggers.append(order.instantiate(spec, **place))
    return loggers


def _evaluate(order: Order, folder: RunFolder, model: Any, tokenizer: Any, device: str) -> None:
    from lightning_opt import evaluation

    config = order.config["evaluation"]
    if config["suite"] == "none":
        return
    log.info("evaluation %s suite: %s", config["suite"], ", ".join(config["tasks"]))
    evaluation.evaluate(
        model,
        tokenizer,
        config,
        folder.evaluation,
        context_length=order.plan.sequence_length,
        device=device,
    )


def _report(folder: RunFolder) -> None:
    """Summary, report and last block, for unfinished runs too; a fault here must not hide the run's own state."""
    try:
        summary = summarize(folder)
        write_json(folder.summary, summary)
        from lightning_opt import reports

        reports.write(folder.path)
        notices.last_block(folder.path, summary, reports.next_commands(reports.read(folder.path)))
    except Exception as error:
        log.error("the report could not be written: %s: %s", type(error).__name__, error)
        log.error("%s", traceback.format_exc())
