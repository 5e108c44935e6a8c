"""Checks a whole configuration: each field by its rule, fields against each other, paths on disk."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.lengths import (
    split_batch,
    steps_for_epochs,
    steps_for_tokens,
    steps_for_warmup,
    token_budget,
)
from lightning_opt.plan.mixing import check_data_fields, check_documents_apart, data_phases, data_seams
from lightning_opt.plan.optimizers import check_optimizer, fed_to, rules_of
from lightning_opt.plan.processes import place
from lightning_opt.plan.resuming import check_allowed
from lightning_opt.plan.rule_facts import wants_all
from lightning_opt.plan.values import LARGEST_TRAINED_VOCABULARY, RULES, check_value, rule_for
from lightning_opt.plan.words import near_path

_NO_RULE_BELOW = ("callbacks.", "logger.")  # other people's keywords
_OURS = "lightning_opt.callbacks."


@dataclass(frozen=True)
class RunPlan:
    """What a checked configuration amounts to.

    Attributes:
        max_steps: optimizer steps; None for `max_epochs` until the number of training sequences is known.
        tokens: tokens trained on, `max_steps` x `tokens_per_step`.
        tokens_per_step: global batch x sequence length.
        global_batch_size: sequences per optimizer step.
        micro_batch_size: sequences per forward pass and device.
        accumulate: forward passes per optimizer step.
        devices: over all nodes.
        sequence_length: tokens.
        warmup_steps: steps until the peak rate.
        val_every_n_steps: steps between validations.
        data_seams: first sequence of each of the data's phases but the first.
    """

    max_steps: int | None
    tokens: int | None
    tokens_per_step: int
    global_batch_size: int
    micro_batch_size: int
    accumulate: int
    devices: int
    sequence_length: int
    warmup_steps: int | None
    val_every_n_steps: int | None
    data_seams: tuple[int, ...] = ()


def check(config: dict[str, Any], *, sequences: int | None = None) -> RunPlan:
    """Checks every value and the values against each other; `config` itself is not changed.

    Args:
        config: the resolved configuration, a plain dict.
        sequences: training sequences in one epoch, once known; without it `max_epochs` leaves the steps open.

    Raises:
        ConfigError: the first problem found.
    """
    config = normalised(config)
    _check_name(config["name"])
    check_allowed(config.get("resume_allow", []))
    _check_model(config["model"])
    _check_data(config["data"], config["model"])
    check_documents_apart(config["data"], "cpu" if config["trainer"].get("accelerator") == "cpu" else None)
    _check_devices(config["trainer"])
    _check_callbacks(config.get("callbacks") or {}, config.get("evaluation") or {})
    plan = _plan(config, sequences)
    check_optimizer(config, plan.max_steps)
    check_update_in_backward(config, plan)
    return plan


def normalised(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy with every value in the one type its rule gives it (`2.0` steps are `2`), plain types only.

    Raises:
        ConfigError: a value breaks its rule.
    """
    target = str(config.get("_target_")) if prefix.startswith("callbacks.") else ""
    ours = f"callbacks.{target.removeprefix(_OURS)}." if target.startswith(_OURS) else ""
    return {key: _normalised(value, f"{prefix}{key}", ours and f"{ours}{key}") for key, value in config.items()}


def _normalised(value: Any, path: str, ours: str) -> Any:
    """By the rule of a field, or of a keyword of a callback of ours."""
    if ours in RULES:
        return check_value(ours, value, field=path)
    if isinstance(value, dict):
        return normalised(value, f"{path}.")
    if path.startswith(_NO_RULE_BELOW) or rule_for(path) is None:
        return value
    right = check_value(path, value)
    return list(right) if isinstance(right, tuple) else right


def data_config(config: dict[str, Any]) -> dict[str, Any]:
    """The `data` part as a run uses it.

    A model that brings its tokenizer is trained with it; prepared shards are compared with it. A tokenizer that is
    trained on the spot to a model's vocabulary has no more entries than its few megabytes of text can teach; any other
    size stays as it is given.
    """
    model, tokenizer = config["model"], config["data"].get("tokenizer") or {}
    size = tokenizer.get("vocab_size")
    if model.get("path") and config["data"].get("source") == "prepared":
        tokenizer = {**tokenizer, "of_model": model["path"]}
    elif tokenizer.get("path"):
        return config["data"]
    elif model.get("path"):
        tokenizer = {**tokenizer, "path": model["path"]}
    elif size is not None and size == model.get("vocab_size"):
        tokenizer = {**tokenizer, "vocab_size": min(size, LARGEST_TRAINED_VOCABULARY)}
    return {**config["data"], "tokenizer": tokenizer}


def is_hub_id(path: str) -> bool:
    """Whether this reads as `organisation/name` on the Hugging Face hub: no file, and no folder of that name here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.json)", path)) and not Path(path.partition("/")[0]).exists()


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name) or ".." in name:
        raise ConfigError(
            "name", name, "must be a folder name of letters, digits and . _ + - (slashes make sub-folders)"
        )


def _check_model(model: dict[str, Any]) -> None:
    hidden, heads, head = model.get("hidden_size"), model.get("num_heads"), model.get("head_dim")
    if hidden and heads:
        if not head and hidden % heads:
            near = " or ".join(str(n) for n in _divisors_near(hidden, heads))
            raise ConfigError("model.num_heads", heads, f"must divide model.hidden_size = {hidden}, for example {near}")
        turned = int((head or hidden // heads) * model.get("rotary_fraction", 1))
        if turned % 2 or not turned:
            field, value = ("model.head_dim", head) if head else ("model.num_heads", heads)
            raise ConfigError(field, value, f"must leave an even head size (rotary embedding), not {turned}")
        kv_heads = model.get("num_kv_heads")
        if kv_heads and heads % kv_heads:
            near = " or ".join(str(n) for n in _divisors_near(heads, kv_heads))
            raise ConfigError("model.num_kv_heads", kv_heads, f"must divide model.num_heads = {heads}: {near}")
    _check_experts(model)
    if model.get("_target_") == "lightning_opt.models.gpt2" and isinstance(model.get("init"), str):
        raise ConfigError("model.init", model["init"], "must be a number for GPT-2, whose own is 0.02")
    path = model.get("path")
    if "path" in model and not path:
        raise ConfigError("model.path", path, "must name a folder with a Hugging Face model, or a hub id")
    if path and not is_hub_id(path):
        _check_model_folder(model)


def _check_experts(model: dict[str, Any]) -> None:
    count, chosen = model.get("num_experts"), model.get("experts_per_token")
    if count and chosen and chosen > count:
        raise ConfigError("model.experts_per_token", chosen, f"must be at most model.num_experts = {count}")
    layers, dense = model.get("num_layers"), model.get("dense_layers")
    if count and layers and dense is not None and dense >= layers:
        why = f"must be less than model.num_layers = {layers}: the others have experts"
        raise ConfigError("model.dense_layers", dense, why)
    if count and model.get("init") == "study":
        raise ConfigError("model.init", "study", "must be width or a number for a model with experts")


def _check_model_folder(model: dict[str, Any]) -> None:
    folder = Path(model["path"])
    if not folder.is_dir():
        raise ConfigError("model.path", model["path"], f"not found{near_path(folder)}")
    try:
        own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        longest = own.get("text_config", own).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(
            "model.path", model["path"], "must hold a Hugging Face model: config.json is missing or unreadable"
        ) from None
    length = model.get("context_length")
    if isinstance(longest, int) and length and length > longest:
        raise ConfigError("model.context_length", length, f"must be at most {longest}, what the model was made for")


def _divisors_near(number: int, wish: int) -> list[int]:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return sorted(sorted(divisors, key=lambda n: abs(math.log(n / wish)))[:2])


def _check_data(data: dict[str, Any], model: dict[str, Any]) -> None:
    check_data_fields(data)
    path, source = data.get("path"), data.get("source")
    if source == "files":  # prepared shards are checked by the data room, which knows how to make them
        if path is None:
            raise ConfigError("data.path", None, "must name a folder, for example data.path=my_texts")
        if not Path(path).exists():
            raise ConfigError("data.path", path, f"not found{near_path(Path(path))}")
    tokenizer = (data.get("tokenizer") or {}).get("path")
    if tokenizer is not None and not Path(tokenizer).exists() and not is_hub_id(tokenizer):
        raise ConfigError("data.tokenizer.path", tokenizer, f"not found{near_path(Path(tokenizer))}")
    length, context = data.get("sequence_length"), model.get("context_length")
    if length and context and length > context:
        raise ConfigError("data.sequence_length", length, f"must be at most model.context_length = {context}")


def _check_devices(trainer: dict[str, Any]) -> None:
    here, asked = place(), trainer["devices"] * trainer["num_nodes"]
    if here.launcher and here.world_size != asked:
        raise ConfigError(
            "trainer.devices",
            trainer["devices"],
            f"x num_nodes must be the {here.world_size} that {here.launcher} started",
        )
    if not here.launcher and (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError("WORLD_SIZE", world, "is set, but not by torchrun or srun: start by one of them, or unset it")
    if trainer["num_nodes"] > 1 and not here.launcher:
        raise ConfigError(
            "trainer.num_nodes",
            trainer["num_nodes"],
            "needs torchrun or srun on every node, one process per device, for example "
            f"torchrun --nnodes {trainer['num_nodes']} --nproc-per-node {trainer['devices']} ... train.py ...",
        )


def _check_callbacks(callbacks: dict[str, Any], evaluation: dict[str, Any]) -> None:
    for label, spec in callbacks.items():
        field = f"callbacks.{label}"
        if spec and not (isinstance(spec, dict) and spec.get("_target_")):
            why = f"has no _target_: name it by {field}._target_=, or start from callbacks=default"
            raise ConfigError(field, spec, why)
        if spec and str(spec["_target_"]) == f"{_OURS}LossGuard":
            warmup, window = spec.get("warmup"), spec.get("window")
            if warmup and window and warmup > window:
                raise ConfigError(f"{field}.warmup", warmup, f"must be at most the window, {window}")
        if spec and str(spec["_target_"]) == f"{_OURS}SampleScores" and spec.get("every_n_steps") != 0:
            scorer = spec.get("scorer") or {}
            check_value("evaluation.limit", scorer.get("documents"), field=f"{field}.scorer.documents")
            if evaluation.get("suite") == "none":
                why = "must be 0 with evaluation=none, which names no tasks to take a sample of"
                raise ConfigError(f"{field}.every_n_steps", spec.get("every_n_steps"), why)


def check_update_in_backward(config: dict[str, Any], plan: RunPlan) -> None:
    """Refuses what `trainer.update_in_backward` cannot be had with, as far as a configuration tells.

    Raises:
        ConfigError: for the first thing found; `optim.releasing.refuse` finds what only the built optimizer tells.
    """
    mode, optimizer = config["trainer"].get("update_in_backward", "off"), config["optimizer"]
    if mode == "off":
        return
    field, common = "trainer.update_in_backward", optimizer.get("max_grad_norm")
    roles = {"default": {}, **(optimizer.get("roles") or {})}
    clipped = [role for role, settings in roles.items() if settings.get("max_grad_norm", common) is not None]
    if clipped and mode != "clip_each":
        limit = "optimizer.max_grad_norm" if common is not None else f"optimizer.roles.{clipped[0]}.max_grad_norm"
        raise ConfigError(field, mode, f"{limit} must be null (or clip_each: tensor by tensor)")
    if plan.accumulate > 1:
        why = f"trainer.micro_batch_size must be the whole batch, not one of {plan.accumulate} parts"
        raise ConfigError(field, mode, why)
    for label, spec in (config.get("callbacks") or {}).items():
        if spec and str(spec["_target_"]) == f"{_OURS}LossGuard":
            raise ConfigError(field, mode, f"say ~callbacks.{label}: it looks at all gradients before a weight changes")
    if plan.devices > 1:
        raise ConfigError(field, mode, f"it works on one device only, not on {plan.devices}")
    if optimizer.get("phases"):
        raise ConfigError(field, mode, f"{optimizer['name']} cannot be had with it: its phases look ahead")
    for rule, own in rules_of(optimizer):
        values = {**optimizer, **own}
        if why := wants_all(rule, values, fed_to(rule, values)):
            raise ConfigError(field, mode, why)


def _plan(config: dict[str, Any], sequences: int | None) -> RunPlan:
    trainer, length, phases = config["trainer"], int(config["data"]["sequence_length"]), data_phases(config["data"])
    batch = int(trainer["global_batch_size"])
    micro, accumulate, devices = split_batch(trainer)
    steps = _steps(config, batch, length, sequences)
    warmup = None
    if steps is not None:
        warmup = _warmup(config["schedule"], steps)
    every = trainer.get("val_every_n_steps")
    if every is None and steps is not None:
        every = math.ceil(steps / 4)
    return RunPlan(
        max_steps=steps,
        tokens=None if steps is None else steps * batch * length,
        tokens_per_step=batch * length,
        global_batch_size=batch,
        micro_batch_size=micro,
        accumulate=accumulate,
        devices=devices,
        sequence_length=length,
        warmup_steps=warmup,
        val_every_n_steps=every,
        data_seams=() if steps is None else data_seams(phases, steps, batch),
    )


def _steps(config: dict[str, Any], batch: int, length: int, sequences: int | None) -> int | None:
    trainer, budget = config["trainer"], token_budget(config)
    if trainer.get("max_steps") is not None:
        return int(trainer["max_steps"])
    if trainer.get("max_epochs") is not None:
        return None if sequences is None else steps_for_epochs(trainer["max_epochs"], sequences, batch)
    tokens = int(trainer["max_tokens"] if budget is None else budget)
    steps = steps_for_tokens(tokens, batch, length)
    if steps < 1:
        field = "trainer.max_tokens" if budget is None else "scale.tokens"
        raise ConfigError(field, tokens, f"must be at least one step of {batch} x {length} = {batch * length} tokens")
    return steps


def _warmup(schedule: dict[str, Any], steps: int) -> int:
    given = schedule.get("warmup", 0)
    warmup = steps_for_warmup(given, steps)
    if warmup >= steps:
        raise ConfigError("schedule.warmup", given, f"must be shorter than the run of {steps} steps, or a fraction < 1")
    decay = schedule.get("decay")
    if schedule.get("name") == "wsd" and decay is not None and warmup + steps_for_warmup(decay, steps) > steps:
        room = (steps - warmup) / steps
        raise ConfigError(
            "schedule.decay",
            schedule["decay"],
            f"must leave room for the warm-up of {warmup} steps: at most {room:.3g}",
        )
    return warmup
