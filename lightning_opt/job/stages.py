"""One run from its configuration to its report: train → evaluate → report."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import yaml

from lightning_opt.job import notices, ranks, record
from lightning_opt.job.logs import run_log
from lightning_opt.job.outcomes import Outcome, left_notes, outcome_of
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.plan import Place, RunPlan, check, data_config, place
from lightning_opt.run_folder import (
    ExitCode,
    RunFolder,
    Status,
    SweepFolder,
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
    folder: RunFolder | None,
    *,
    overrides: list[str],
    saved_config: str,
    instantiate: Callable[..., Any],
    tuned: dict[str, Any] | None = None,
) -> int:
    """Trains, evaluates and reports in one folder, and never ends silently.

    More than one device means one process each. Where neither torchrun nor srun started them, this one does.

    Args:
        config: the resolved configuration.
        folder: the claimed run folder; None in a process that torchrun or srun started beside the first.
        overrides: the command line's overrides, without secrets.
        saved_config: text for config.yaml.
        instantiate: calls a ``_target_``; with several devices it is found by its name in their processes.
        tuned: tuned values that were merged, or None.

    Returns:
        The exit code: 0 finished, 1 failed, 2 configuration, 3 diverged, 130 interrupted, 143 preempted. The reason
        is in status.json, and the traceback, if any, in run.log.
    """
    order = Order(config, check(config), overrides, saved_config, instantiate, tuned)
    here = place()
    if folder is None:
        with ranks.speak(None, here), terminable():
            outcome = _work(order, None, SimpleNamespace(step=0), here)
        if outcome.reason:  # the first rank may never get to hear of it
            sys.stderr.write(f"{outcome.traceback}rank {here.rank}: {outcome.reason}\n")
        return int(outcome.code)
    identity = read_status(folder.status).get("config_hash") or config_hash(config)
    with Status(folder.status, identity) as status, run_log(folder.log), terminable():
        return _guarded(order, folder, status, here)


def _guarded(order: Order, folder: RunFolder, status: Status, here: Place) -> int:
    """Runs the stages and turns whatever happens into a state, a reason, an event and an exit code."""
    try:
        left_notes(folder)  # of an earlier try
        if folder.metrics.exists():
            append_event(folder.events, "restarted")
        write_text(folder.config, order.saved_config)
        write_text(folder.overrides, "".join(f"{word}\n" for word in order.overrides))
        if order.plan.devices > here.world_size:
            outcome = ranks.start_ranks(_work, order, folder, status, order.plan.devices)
        else:
            outcome = _work(order, folder, status, here)
    except BaseException as error:
        outcome = outcome_of(error, status.step)
    outcome = min([outcome, *left_notes(folder).values()], key=lambda note: note.time)
    if outcome.traceback:
        log.error("%s", outcome.traceback)
    status.set(outcome.state, outcome.reason)
    if outcome.reason:
        log.error("%s: %s", outcome.state.lower(), outcome.reason)
        append_event(folder.events, outcome.state.lower(), step=status.step, reason=outcome.reason)
    if outcome.code != ExitCode.CONFIGURATION:
        _report(folder)
    return int(outcome.code)


def _work(order: Order, folder: RunFolder | None, status: ranks.Steps, here: Place) -> Outcome:
    """What each process of a run does: train with the others; the first then scores. Never raises."""
    try:
        from lightning_opt import training

        with training.joined(here, order.config["trainer"]) as group:
            folder = group.shared(folder)
            model, tokenizer = _train(order, folder, status, group)
        if here.first:
            _evaluate(order, folder, model, tokenizer)
        return Outcome()
    except BaseException as error:
        outcome = outcome_of(error, status.step)
        if here.launcher and folder is not None:
            outcome.leave(folder, here.rank)
        return outcome


def _train(order: Order, folder: RunFolder, status: ranks.Steps, group: Any) -> tuple[Any, Any]:
    """Builds and trains. Returns the trained model, whole on the first rank, and the tokenizer.

    Raises:
        Terminated: the run was asked to end, and did so after a whole step.
    """
    from lightning_opt import anatomy, data, models, optim, training

    config = order.config
    training.prepare(config["seed"], config["trainer"]["num_threads"], config["trainer"]["devices"])
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
    strategy = config["trainer"]["strategy"] if plan.devices > 1 else "auto"
    precision = training.choose_precision(config["trainer"]["precision"], config["trainer"]["accelerator"], strategy)
    if group.first:
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
        env = record.environment(
            token_data.fingerprint, training.choose_device(config["trainer"]["accelerator"]), config["trainer"]
        )
        write_json(folder.env, env)
        write_json(folder.plan, planned)
        notices.banner(folder.path, planned, env)
    module = _module(config, plan, model, optimizer, token_data)
    fitted = training.fit(
        module,
        _batches(config, plan, token_data),
        plan,
        config=config["trainer"],
        precision=precision[0],
        folder=folder,
        columns=_columns(token_data.val, {group["role"] for group in optimizer.param_groups}),
        callbacks=_callbacks(order, folder, plan, flops, token_data.tokenizer),
        loggers=_loggers(order, folder) if group.first else [],
        status=status,
        group=group,
    )
    if fitted.stopped_by:
        raise Terminated
    return module.whole_model(keep=group.first), token_data.tokenizer


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
    """Starts the configured loggers and tells them the configuration, without secrets.

    What they write goes into the run folder unless they say where.
    """
    from lightning_opt.training import GuardedLogger

    loggers = []
    for label, spec in (order.config["logger"] or {}).items():
        if not spec:
            continue
        place = {"save_dir": str(folder.path)} if "save_dir" in spec and spec["save_dir"] is None else {}
        logger = GuardedLogger(label, partial(order.instantiate, spec, **place))
        logger.log_hyperparams(yaml.safe_load(order.saved_config))
        loggers.append(logger)
    return loggers


def _evaluate(order: Order, folder: RunFolder, model: Any, tokenizer: Any) -> None:
    from lightning_opt import evaluation, training

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
        device=training.choose_device(order.config["trainer"]["accelerator"]),
    )


def _report(folder: RunFolder) -> None:
    """Summary, report and last block, for unfinished runs too; a fault here must not hide the run's own state."""
    try:
        summary = summarize(folder)
        write_json(folder.summary, summary)
        from lightning_opt import reports

        reports.write(folder.path)
        in_sweep = SweepFolder(folder.path.parent).sweep.exists()  # whose own end says what to type next
        commands = [] if in_sweep else reports.next_commands(reports.read(folder.path))
        notices.last_block(folder.path, summary, commands)
    except Exception as error:
        log.error("the report could not be written: %s: %s", type(error).__name__, error)
        log.error("%s", traceback.format_exc())
