"""From a model and an optimizer's configuration to one optimizer: role -> rule, rate, decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_opt.anatomy import LAYOUT, ROLES, ParameterInfo, describe
from lightning_opt.optim.base import Optimizer
from lightning_opt.plan import read_roles, settings


def build(model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
    """One optimizer over all trainable parameters of a model, grouped by role.

    ``config["roles"]`` maps a role (or ``default``, for roles that are not listed) to settings. The top level gives
    every hyperparameter to each rule that knows it; a role's entry overrides. An entry that names its own ``rule``
    starts from the top level; one that does not refines ``default``. Without ``roles``, the rule called ``name`` takes
    everything. A group's peak rate is ``lr`` x the top level's ``lr_scale`` x the entry's ``lr_scale``.

    Args:
        model: any module, on any device.
        config: plain dict as in ``conf/optimizer``.

    Raises:
        ConfigError: for an unknown role, rule or key (with the closest right one) or a value out of range.
        ValueError: where the model has no trainable parameter.
    """
    infos: dict[str, list[ParameterInfo]] = {}
    for info in describe(model).parameters:
        if info.parameter.requires_grad:
            infos.setdefault(info.role, []).append(info)
    if not infos:
        raise ValueError("the model has no trainable parameter: nothing requires a gradient")
    members = {
        role: {"params": [info.parameter for info in infos[role]], "role": role, **_layouts(infos[role])}
        for role in ROLES
        if role in infos
    }
    entries = read_roles(config)
    groups = []
    for role, group in members.items():
        group |= settings(config, entries, role)
        groups.append({**group, "initial_lr": group["lr"]})
    if config.get("phases") is None:
        return Optimizer(groups, rule=groups[0]["rule"])
    from lightning_opt.optim import Dynamic, Phased

    top = {key: value for key, value in config.items() if key not in ("name", "roles", "lr_scale")}
    return (Dynamic if "signal" in config else Phased)(groups, **top)


def _layouts(infos: list[ParameterInfo]) -> dict[str, list[Any] | None]:
    """What the model says of a group's weights, one list per key; None where it says nothing of any."""
    found = {key: [info.layout.get(key) for info in infos] for key in LAYOUT}
    return {key: values if any(value is not None for value in values) else None for key, values in found.items()}
