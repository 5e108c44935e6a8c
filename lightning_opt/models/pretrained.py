"""Continued training: any causal language model in Hugging Face format."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_opt.plan import ConfigError, hub_said, is_hub_id

log = logging.getLogger("lightning_opt.models")


def hf(*, path: str | None = None, context_length: int) -> PreTrainedModel:
    """Loads a causal language model to train on.

    Args:
        path: a folder with ``config.json`` and weights, or a hub id.
        context_length: training sequence length in tokens; at most what the model was made for.

    Returns:
        The model in float32 (the trainer's precision casts it, so bf16 checkpoints keep a full-precision master). What
        a folder holds expert by expert is stacked in memory, and written expert by expert again.

    Raises:
        ConfigError: there is no model at the path, or it is shorter than ``context_length``.
        HubLost: the hub does not answer, and has not been asked before.
    """
    if not path:
        raise ConfigError("model.path", path, "a Hugging Face folder or hub id, e.g. model.path=runs/.../model")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        instead = "a folder with the model can stand for it: model.path=FOLDER"
        said = hub_said("model.path", "", path, error, instead) if is_hub_id(path) else None
        if said:
            raise said from None
        kind = "folder" if Path(path).exists() else "path"
        raise ConfigError(
            "model.path", path, f"a causal language model: this {kind} cannot be loaded ({error})"
        ) from None
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and context_length > longest:
        raise ConfigError("model.context_length", context_length, f"at most {longest}, the model's own")
    model.config.use_cache = True
    if getattr(model.config, "num_nextn_predict_layers", 0):
        log.info("%s: its layers that predict further tokens (MTP) are neither trained nor kept", path)
        model.config.num_nextn_predict_layers = 0
    return model
