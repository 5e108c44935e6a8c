"""How long a run is: tokens, steps, accumulation, epochs."""

from __future__ import annotations

import math
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.flops import mixture_params, non_embedding_params

CHINCHILLA = 20  # tokens per non-embedding parameter at scale 1x, as in arXiv:2509.02046
_LENGTHS = ("max_steps", "max_tokens", "max_epochs")
_SHAPES = {"gpt2": ("num_layers", "hidden_size", "num_heads")}  # what the builders' weights are counted from
_SHAPES["llama"] = (*_SHAPES["gpt2"], "intermediate_size")
_SHAPES["glm4_moe"] = (
    *_SHAPES["llama"],
    *("num_experts", "experts_per_token", "expert_size", "shared_experts", "dense_layers"),
)


def steps_for_tokens(tokens: int, global_batch_size: int, sequence_length: int) -> int:
    """Whole optimizer steps that fit into so many tokens (rounded down, as the study does)."""
    return int(tokens) // (global_batch_size * sequence_length)


def steps_for_epochs(epochs: float, sequences: int, global_batch_size: int) -> int:
    """Optimizer steps of so many passes over the training sequences, at least one; the last batch is filled up.

    Args:
        epochs: passes, may be a fraction.
        sequences: training sequences in one pass.
        global_batch_size: sequences per optimizer step.
    """
    return max(1, math.ceil(epochs * sequences / global_batch_size))


def steps_for_warmup(warmup: float, max_steps: int) -> int:
    """Warm-up steps from a fraction of the run (< 1, rounded to the nearest step) or from steps (>= 1)."""
    return round(warmup * max_steps) if warmup < 1 else int(warmup)


def split_batch(trainer: dict[str, Any]) -> tuple[int, int, int]:
    """Micro-batch, accumulation and devices (over all nodes) for the global batch.

    Raises:
        ConfigError: the global batch is not a multiple of micro-batch x devices x nodes.
    """
    whole, devices = trainer["global_batch_size"], trainer["devices"] * trainer["num_nodes"]
    given = trainer.get("micro_batch_size")
    unit = (given or 1) * devices
    if whole % unit:
        parts = f"devices x num_nodes = {unit}"
        if given is not None:
            parts = f"trainer.micro_batch_size x devices x num_nodes = {given} x {devices} = {unit}"
        below = whole // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError("trainer.global_batch_size", whole, f"must be a multiple of {parts}; nearest: {near}")
    micro = given or whole // devices
    return micro, whole // (micro * devices), devices


def params_for_length(model: dict[str, Any]) -> int | None:
    """Non-embedding parameters: from the shape where it is ours, else as the model's file states them, else None.

    Of experts only those that one token is sent to: it is they that a token trains.
    """
    kind, stated = str(model.get("_target_")).removeprefix("lightning_opt.models."), model.get("non_embedding_params")
    shape = {key: model.get(key) for key in _SHAPES.get(kind, ())}
    optional = {key: model[key] for key in ("num_kv_heads", "head_dim") if model.get(key) is not None}
    numbers = (*shape.values(), *optional.values())
    if not shape or not all(isinstance(number, int | float) for number in numbers) or not shape["num_heads"]:
        return stated  # of another builder; or `check` has something to say
    if kind == "gpt2":
        return non_embedding_params(**shape, intermediate_size=4 * shape["hidden_size"], mlp_matrices=2)
    if kind == "llama":
        return non_embedding_params(**shape, num_kv_heads=optional.get("num_kv_heads"))
    return mixture_params(**shape, **optional)


def token_budget(config: dict[str, Any]) -> int | None:
    """Tokens that `scale` asks for; None where `trainer` says the length itself.

    Raises:
        ConfigError: two lengths contradict each other, or the scale needs a parameter count that is not known.
    """
    trainer, scale = config["trainer"], config["scale"]
    given = [key for key in _LENGTHS if trainer.get(key) is not None]
    if len(given) > 1:
        first, second = (f"trainer.{key}" for key in given[:2])
        raise ConfigError(
            second,
            trainer[given[1]],
            f"contradicts {first} = {trainer[given[0]]}: give one length, with {first}=null or {second}=null beside it",
        )
    chinchilla = scale.get("chinchilla")
    if chinchilla is not None and scale.get("tokens") is not None:
        raise ConfigError(
            "scale.tokens",
            scale["tokens"],
            f"contradicts scale.chinchilla = {chinchilla}: give one length, and null for the other",
        )
    if given and chinchilla is not None:
        raise ConfigError(
            f"trainer.{given[0]}",
            trainer[given[0]],
            f"contradicts scale={scale['name']}: give one length, not two; scale=demo leaves it to trainer.{given[0]}",
        )
    if given:
        return None
    if chinchilla is None:
        if scale.get("tokens") is None:
            raise ConfigError("scale.tokens", None, "must be a number of tokens where scale.chinchilla is null")
        return scale["tokens"]
    params = params_for_length(config["model"])
    if params is None:
        raise ConfigError(
            "scale.chinchilla", chinchilla, "needs model.non_embedding_params, which is null; or say trainer.max_tokens"
        )
    return round(CHINCHILLA * params * chinchilla)
