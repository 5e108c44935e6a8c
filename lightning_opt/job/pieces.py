"""What a run is put together from: its module, batches, metric columns, callbacks and loggers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from lightning_opt.plan import ConfigError, RunPlan, with_data
from lightning_opt.plan import flops_per_token as flops_of_shape
from lightning_opt.plan import identity as config_identity
from lightning_opt.run_folder import RunFolder, append_event

if TYPE_CHECKING:
    from lightning_opt.job.stages import Order


def flops_per_token(model: Any, non_embedding: int, sequence_length: int) -> float | None:
    """Training FLOPs per token of a model, so many of whose weights without embedding and head one token uses.

    None where the shape is not told the usual way.
    """
    shape = getattr(model, "config", None)
    sizes = [getattr(shape, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    if None in sizes:
        return None
    layers, hidden, vocabulary = sizes
    heads, one, keys, values = (
        getattr(shape, name, None) for name in ("num_attention_heads", "head_dim", "qk_head_dim", "v_head_dim")
    )
    head = (keys + values) / 2 if keys and values else one  # DeepSeek's heads compare and carry different widths
    width = heads * head if heads and head else hidden
    return flops_of_shape(non_embedding, layers, hidden, sequence_length, vocabulary, width)


def rehearse(config: dict[str, Any]) -> None:
    """Builds the optimizer over a stand-in with a weight of every kind, before data and model cost time.

    Raises:
        ConfigError: its settings are wrong; what no tensor is needed for was seen by `plan.check`.
    """
    import torch
    from torch import nn

    from lightning_opt import optim
    from lightning_opt.optim import releasing

    with torch.device("meta"):
        parts = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8))
    try:
        optimizer = optim.build(parts, config["optimizer"])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("optimizer", config["optimizer"]["name"], str(error)) from error
    if (mode := config["trainer"].get("update_in_backward", "off")) != "off":
        releasing.refuse(optimizer, clip_each=mode == "clip_each")


def module(config: dict[str, Any], plan: RunPlan, model: Any, optimizer: Any, token_data: Any) -> Any:
    """What Lightning trains."""
    from lightning_opt import training
    from lightning_opt.optim import schedules

    return training.PretrainModule(
        model,
        optimizer,
        schedules.build(config["schedule"], plan.max_steps),
        corpora=_validation_weights(token_data),
        token_bytes=token_data.token_bytes,
        z_loss=config["model"].get("z_loss") or 0.0,
        separator=token_data.tokenizer.eos_token_id if _documents_apart(config) else None,
    )


def _documents_apart(config: dict[str, Any]) -> bool:
    return bool(config["data"].get("block_cross_document_attention"))


def batches(config: dict[str, Any], plan: RunPlan, token_data: Any, not_before: int = 0) -> Any:
    """What it is trained and validated on, from one sequence of the global order on."""
    from lightning_opt import training

    return training.TokenDataModule(
        token_data.train,
        token_data.val,
        micro_batch_size=plan.micro_batch_size,
        micro_batches=plan.max_steps * plan.accumulate,
        val_sequences=config["trainer"]["val_sequences"],
        val_part=config["trainer"].get("val_part", "all"),
        num_workers=config["data"].get("num_workers") or 0,
        overfit_batches=config["trainer"]["overfit_batches"],
        not_before=not_before,
    )


def _validation_weights(token_data: Any) -> dict[str, float]:
    """What each validation set counts in ``val/loss``: its corpus's share of the mixture.

    Where there are sets that nothing is trained on (the study's C4), they alone are the measure.
    """
    held_out = {corpus.name for corpus in token_data.corpora if not corpus.train_tokens}
    weight = {corpus.name: corpus.weight for corpus in token_data.corpora}
    return {name: float(name in held_out) if held_out else weight[name] for name in token_data.val}


def columns(corpora: Any, roles: set[str], callbacks: list[Any], model: Any) -> list[str]:
    """Metric names that depend on the data, the routing, and what callbacks announce by ``columns(model)``."""
    ordered = sorted(roles)
    announced = [callback.columns(model) for callback in callbacks if hasattr(callback, "columns")]
    return (
        [f"val/loss/{name}" for name in corpora]
        + [f"lr/{role}" for role in ordered]
        + [f"grad_norm/{role}" for role in ordered]
        + [name for names in announced for name in names]
    )


def identity(order: Order, plan: RunPlan, token_data: Any) -> dict[str, Any]:
    """What checkpoints are kept with: of the configuration as it is saved, so that no secret gets there."""
    known = config_identity(yaml.safe_load(order.saved_config), plan.max_steps)
    return with_data(
        known,
        weights={corpus.name: corpus.weight for corpus in token_data.corpora},
        bytes={corpus.name: corpus.train_bytes + corpus.val_bytes for corpus in token_data.corpora},
        fingerprint=token_data.fingerprint,
        tokenizer=token_data.tokenizer_sha256,
        vocabulary=token_data.vocab_size,
        phases=[(phase.first, phase.shares) for phase in token_data.train.phases],
        documents_apart=_documents_apart(order.config),
    )


def callbacks(order: Order, folder: RunFolder, plan: RunPlan, given: dict[str, Any]) -> list[Any]:
    """Builds the configured callbacks and hands each what it asks for by an attribute that is still None.

    What they write goes into the run folder, their trainer's root, unless they say where.
    """
    given = given | {
        "on_event": partial(append_event, folder.events),
        "max_steps": plan.max_steps,
        "tokens_per_step": plan.tokens_per_step,
        "context_length": plan.sequence_length,
        "evaluation": order.config["evaluation"],
    }
    built = [order.instantiate(spec) for spec in (order.config["callbacks"] or {}).values() if spec]
    hand([*built, *(callback.scorer for callback in built if getattr(callback, "scorer", None))], given)
    return built


def hand(callbacks: list[Any], given: dict[str, Any]) -> None:
    """Hands each callback what it asks for by an attribute that is still None."""
    for callback in callbacks:
        for name, value in given.items():
            if hasattr(callback, name) and getattr(callback, name) is None:
                setattr(callback, name, value)


def loggers(order: Order, folder: RunFolder) -> list[Any]:
    """Starts the configured loggers and tells them the configuration, without secrets.

    What they write goes into the run folder unless they say where.
    """
    from lightning_opt.training import GuardedLogger

    built = []
    for label, spec in (order.config["logger"] or {}).items():
        if not spec:
            continue
        place = {"save_dir": str(folder.path)} if "save_dir" in spec and spec["save_dir"] is None else {}
        logger = GuardedLogger(label, partial(order.instantiate, spec, **place))
        logger.log_hyperparams(yaml.safe_load(order.saved_config))
        built.append(logger)
    return built
