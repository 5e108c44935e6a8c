"""`torch.compile` for the length of a training run: the decoder's layers one by one, or the model as one graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_opt.plan import check_value

log = logging.getLogger("lightning_opt.models")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a transformers model repeats: those that activation checkpointing recomputes, outermost only."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    return layers


@contextmanager
def compiled(model: nn.Module, how: str | bool) -> Iterator[None]:
    """Compiles a model in place, and undoes it at the end of the block: scoring and generation have many shapes.

    - ``layers``: each decoder layer on its own (regional compilation). All equal layers share one compiled graph, so
      the first step waits for one layer's compilation whatever the depth. Embedding, final norm and head run eager,
      and so do transformers' decisions about the attention mask, which keep the flash kernels: inside a graph
      transformers cannot see that a batch is not packed and builds a (B, 1, T, T) mask.
    - ``model``: the model's forward as one graph. A model without known layers is compiled so too.
    - ``off``: nothing.

    Compile before the model is sharded or wrapped (FSDP2's hooks then stay outside of the graphs). Works with
    activation checkpointing, which is inside a layer's forward.

    Args:
        model: the model; its parameters, names and state_dict stay as they are.
        how: ``off``, ``layers`` or ``model``; False and True mean off and layers.

    Raises:
        ConfigError: another word.
    """
    how = check_value("trainer.compile", how)
    if how == "off":
        yield
        return
    parts = decoder_layers(model) if how == "layers" else [model]
    if not parts:
        log.info("compile    %s has no decoder layers that we know: the whole model is compiled", type(model).__name__)
        parts = [model]
    for part in parts:
        part.compile()
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None  # torch has no word to take `Module.compile` back
        torch.compiler.reset()  # else the next fit's graphs share these caches: dynamic shapes, and 8 kinds at most
