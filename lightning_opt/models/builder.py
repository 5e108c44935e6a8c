"""From the config's ``model`` group to a module that is ready to train."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_opt.anatomy import keep_float32
from lightning_opt.models.experts import implement_experts
from lightning_opt.plan import ConfigError

log = logging.getLogger("lightning_opt.models")

# Keys of the group that say how the model is trained or counted, not what it is.
_NOT_ARCHITECTURE = ("name", "z_loss", "activation_checkpointing", "experts_implementation", "non_embedding_params")


def build(
    config: dict[str, Any],
    *,
    vocab_size: int,
    instantiate: Callable[..., nn.Module],
    eos_token_id: int | None = None,
) -> nn.Module:
    """Builds the model of the config.

    Args:
        config: the ``model`` group; ``_target_`` names the builder, e.g. ``lightning_opt.models.llama``.
        vocab_size: size of the tokenizer's vocabulary. A group that states one makes a new model, and gets this; a
            model that has its own vocabulary (``vocab_size`` null) must be at least as large.
        instantiate: calls ``_target_`` with the group's other keys (Hydra's, handed down).
        eos_token_id: the tokenizer's end of text, where a new model's generation stops.

    Returns:
        A causal language model in train mode whose forward returns an object with ``logits`` (B, T, V). What must stay
        float32 in lower precision does (`keep_float32`).

    Raises:
        ConfigError: the tokenizer has ids that the model does not know, or checkpointing or the way to compute experts
            is not to be had.
    """
    architecture = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    stated = architecture.pop("vocab_size", None)
    if stated is not None:
        architecture["vocab_size"] = vocab_size
        if vocab_size != stated:
            why = "as many as the tokenizer has ids (another tokenizer: data.tokenizer.path=FOLDER_OR_HUB_ID)"
            log.info("model.vocab_size is %d, but the embedding gets %d rows: %s", stated, vocab_size, why)
    model = instantiate(architecture)
    if "vocab_size" in architecture and eos_token_id is not None:
        for settings in (model.config, model.generation_config):
            settings.eos_token_id = eos_token_id
    rows = model.get_input_embeddings().num_embeddings if hasattr(model, "get_input_embeddings") else vocab_size
    if rows < vocab_size:
        raise ConfigError("data.tokenizer", f"{vocab_size} ids", f"the model's own tokenizer: it has {rows} embeddings")
    checkpoint_activations(model, config.get("activation_checkpointing") or "off")
    implement_experts(model, config.get("experts_implementation") or "auto")
    return keep_float32(model).train()


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Switches activation checkpointing (non-reentrant) of a transformers model.

    Args:
        model: the model.
        mode: ``off``, ``full``, or ``every_<n>``: recompute every n-th decoder layer only.

    Raises:
        ConfigError: the mode is unknown, or the model cannot recompute.
    """
    if mode == "off":
        return
    every = 1 if mode == "full" else _every(mode)
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError("model.activation_checkpointing", mode, f"off: {type(model).__name__} cannot recompute")
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def _every(mode: str) -> int:
    prefix, _, number = mode.partition("_")
    if prefix == "every" and number.isdigit() and int(number) > 0:
        return int(number)
    raise ConfigError("model.activation_checkpointing", mode, "off, full, or every_<n> such as every_2")
