"""A model's anatomy: every distinct parameter once, with its role, and the counts that scaling rules use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_opt.anatomy.experts import ExpertLayer, find_expert_layers
from lightning_opt.anatomy.layouts import find_layouts
from lightning_opt.anatomy.roles import embedding_ids, head_ids, role_by_shape


@dataclass(frozen=True)
class ParameterInfo:
    """One distinct parameter.

    Attributes:
        name: its first name in the module tree.
        parameter: the parameter itself.
        role: one of `ROLES`.
        module_type: class name of the module that holds it first.
        tied_names: its other names, where weights are tied.
        layout: which matrices its rows are (see `anatomy.layouts`), {} where the model does not tell.
    """

    name: str
    parameter: nn.Parameter
    role: str
    module_type: str
    tied_names: tuple[str, ...] = ()
    layout: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        parameters: every distinct parameter once, frozen ones too, in the order of the module tree.
        total: number of weights.
        active: weights that take part in one token: of expert weights only the share top_k / count (all of them where
            the model does not say top_k).
        non_embedding: weights of the roles matrix, expert and router: the N of scaling rules, L (3 h i + 4 h h) for a
            Llama (arXiv 2509.02046, and ``model.non_embedding_params`` in conf/model).
        expert_layers: mixture-of-experts layers, empty for dense models.
    """

    parameters: list[ParameterInfo]
    total: int
    active: int
    non_embedding: int
    expert_layers: list[ExpertLayer]

    @property
    def active_non_embedding(self) -> int:
        """Of the weights counted as `non_embedding` those that take part in one token."""
        return self.non_embedding - (self.total - self.active)

    @property
    def roles(self) -> dict[str, str]:
        """Parameter name to role."""
        return {info.name: info.role for info in self.parameters}


def describe(model: nn.Module) -> Anatomy:
    """Reads the module tree of any model; works on the meta device too.

    Args:
        model: any module: a language model of transformers, torch's own layers, a plain network, also wrapped.
    """
    embeddings, heads = embedding_ids(model), head_ids(model)
    layers, layouts = find_expert_layers(model), find_layouts(model)
    experts = {id(p) for layer in layers for p in layer.experts}
    routers = {id(p) for layer in layers for p in layer.routers}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    infos = []
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            key = id(parameter)
            seen.add(key)
            if key in embeddings:
                role = "embedding"
            elif key in heads:
                role = "head"
            elif key in routers:
                role = "router"
            elif key in experts:
                role = "expert"
            else:
                role = role_by_shape(module, parameter)
            first, *tied = names[key]
            layout = layouts.get(key, {})
            infos.append(ParameterInfo(first, parameter, role, type(module).__name__, tuple(tied), layout))
    return _counted(infos, layers)


def _counted(infos: list[ParameterInfo], layers: list[ExpertLayer]) -> Anatomy:
    total = sum(info.parameter.numel() for info in infos)
    inside = sum(info.parameter.numel() for info in infos if info.role in ("matrix", "expert", "router"))
    idle = 0
    for layer in layers:
        if layer.top_k is not None:
            held = sum(p.numel() for p in layer.experts)
            idle += held - held * layer.top_k // layer.count
    return Anatomy(infos, total, total - idle, inside, layers)
