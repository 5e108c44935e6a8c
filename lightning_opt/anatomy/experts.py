"""Mixture-of-experts layers: where the experts are, how many, how many run per token, and the router beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_opt.anatomy.roles import embedding_ids, head_ids


@dataclass
class ExpertLayer:
    """One layer of experts.

    Attributes:
        name: of the module that holds experts and router.
        count: number of experts.
        top_k: experts per token, None where neither module nor config says.
        experts: parameters of the experts.
        routers: score weights beside them, (count, hidden) or the gate of a shared expert (1, hidden).
    """

    name: str
    count: int
    top_k: int | None
    experts: list[nn.Parameter] = field(default_factory=list)
    routers: list[nn.Parameter] = field(default_factory=list)


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """All expert layers of a model.

    Experts are 3-D parameters (one slice each) of a module that is no convolution, or equal modules in a ModuleList of
    a module that also says two whole numbers: how many, and fewer than that per token. Routers are the 2-D weights
    beside them with one row per expert.
    """
    excluded = embedding_ids(model) | head_ids(model)
    layers = []
    for name, module in model.named_modules():
        for holder in module.children():
            count, experts = _stacked(holder) or _listed(module, holder) or (0, [])
            if count > 1:
                inside = {id(p) for p in experts}
                routers = [
                    p
                    for p in _beside(module, holder)
                    if id(p) not in excluded | inside and p.ndim == 2 and p.shape[0] in (1, count)
                ]
                layers.append(ExpertLayer(name, count, _top_k(model, module, count), experts, routers))
    return layers


def _stacked(holder: nn.Module) -> tuple[int, list[nn.Parameter]] | None:
    """Experts as slices of 3-D parameters; their 2-D companions are biases and stay out."""
    if isinstance(holder, _ConvNd):
        return None
    stacks = [p for p in holder._parameters.values() if p is not None and p.ndim == 3 and p.shape[0] > 1]
    if not stacks or len({p.shape[0] for p in stacks}) != 1:
        return None
    return stacks[0].shape[0], stacks


def _listed(parent: nn.Module, holder: nn.Module) -> tuple[int, list[nn.Parameter]] | None:
    """Experts as equal modules in a list, where the parent says how many there are and how many run."""
    if not isinstance(holder, nn.ModuleList) or len(holder) < 2:
        return None
    shapes = {tuple(p.shape for p in expert.parameters()) for expert in holder}
    if len(shapes) != 1 or len(holder) not in _numbers(parent) or _top_k(parent, parent, len(holder)) is None:
        return None
    return len(holder), [p for p in holder.parameters() if p.ndim == 2]


def _beside(module: nn.Module, holder: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of a module itself and of its children other than `holder`, not deeper."""
    for neighbour in (module, *(child for child in module.children() if child is not holder)):
        yield from (p for p in neighbour._parameters.values() if p is not None)


def _numbers(module: nn.Module) -> set[int]:
    return {value for value in vars(module).values() if type(value) is int}


def _top_k(model: nn.Module, module: nn.Module, count: int) -> int | None:
    """Experts per token: the layer's or its router's own `top_k`, else the config's number."""
    config = getattr(model, "config", None)
    places = [(part, ("top_k", "num_experts_per_tok")) for part in (module, *module.children())]
    places.append((config, ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k")))
    for place, names in places:
        for name in names:
            value = getattr(place, name, None)
            if type(value) is int and 0 < value <= count:
                return value
    return None
