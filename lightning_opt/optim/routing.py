"""From a model and an optimizer's configuration to one optimizer: role -> rule, rate, decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_opt.anatomy import LAYOUT, ROLES, ParameterInfo, describe
from lightning_opt.kernels import Rule
from lightning_opt.optim.base import COMMON, Optimizer
from lightning_opt.optim.catalogue import OPTIMIZERS, find_rule
from lightning_opt.plan import ConfigError, check_value, one_of

_TOP_ONLY = {"name", "roles"}
_EVERYWHERE = {"lr_scale", "clip_group", *COMMON}


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
    if config.get("phases") is not None:
        return _phased(config, members)
    entries = _entries(config)
    groups = []
    for role, group in members.items():
        group |= _group(config, entries.get(role) or entries["default"], f"optimizer.roles.{role}")
        groups.append({**group, "initial_lr": group["lr"]})
    return Optimizer(groups, rule=groups[0]["rule"])


def _phased(config: Mapping[str, Any], members: Mapping[str, dict[str, Any]]) -> Optimizer:
    """One whose rule changes on the way. Roles that name a rule keep it; the others' settings hold in every phase."""
    from lightning_opt.optim import Dynamic, Phased

    roles = _roles(config)
    groups = []
    for role, group in members.items():
        field, entry = f"optimizer.roles.{role}", roles.get(role, {})
        entry = entry if "rule" in entry else {**roles.get("default", {}), **entry}
        if "rule" in entry:
            group |= _group(config, entry, field)
        else:
            group |= {key: value for key, value in entry.items() if key != "lr_scale"}
            group["lr"] = _rate(config, entry, field)
        groups.append({**group, "initial_lr": group["lr"]})
    top = {key: value for key, value in config.items() if key not in ("name", "roles", "lr_scale")}
    return (Dynamic if "signal" in config else Phased)(groups, **top)


def _layouts(infos: list[ParameterInfo]) -> dict[str, list[Any] | None]:
    """What the model says of a group's weights, one list per key; None where it says nothing of any."""
    found = {key: [info.layout.get(key) for info in infos] for key in LAYOUT}
    return {key: values if any(value is not None for value in values) else None for key, values in found.items()}


def _roles(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The roles map, its words checked."""
    roles = {role: dict(entry) for role, entry in (config.get("roles") or {}).items() if entry is not None}
    for role in roles:
        if role != "default" and role not in ROLES:
            raise ConfigError("optimizer.roles", role, one_of(role, ["default", *ROLES]))
    return roles


def _entries(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The roles map, complete: checked words, ``default`` present, entries without a rule laid over it."""
    roles = _roles(config)
    default = {"rule": config.get("name", "adamw"), **roles.get("default", {})}
    entries = {role: entry if "rule" in entry else {**default, **entry} for role, entry in roles.items()}
    entries["default"] = default
    rules = {find_rule(entry["rule"], field=f"optimizer.roles.{role}.rule") for role, entry in entries.items()}
    known = {*_TOP_ONLY, *_EVERYWHERE, *(key for rule in rules for key in rule.defaults)}
    for key, value in config.items():
        if key not in known:
            raise ConfigError(f"optimizer.{key}", value, one_of(key, known))
    for role, entry in entries.items():
        rule = find_rule(entry["rule"])
        for key, value in entry.items():
            if key != "rule" and key not in _EVERYWHERE and key not in rule.defaults:
                raise ConfigError(
                    f"optimizer.roles.{role}.{key}", value, one_of(key, ["rule", *_EVERYWHERE, *rule.defaults])
                )
    return entries


def _group(config: Mapping[str, Any], entry: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Hyperparameters of one group: the top level under the entry, rates multiplied out."""
    rule = find_rule(entry["rule"])
    keys = {*COMMON, "clip_group", *rule.defaults}
    group = {key: config[key] for key in keys - _presets(config.get("name"), rule) if key in config}
    if not rule.elementwise and group.get("implementation") != "whole":
        group.pop("implementation", None)  # said for the elementwise rules beside it
    group |= {key: value for key, value in entry.items() if key in keys}
    for key, value in group.items():
        if key != "clip_group":
            group[key] = check_value(
                f"{rule.name}.{key}", value, field=f"{field}.{key}" if key in entry else f"optimizer.{key}"
            )
    group["lr"] = _rate(config, entry, field)
    return {"rule": rule.name, **group}


def _presets(name: str | None, rule: Rule) -> set[str]:
    """Common keys that the top level says for the rule of its name alone: `cautious`, where either rule is that."""
    named = OPTIMIZERS.get(name) and find_rule(name)
    return set() if named is rule else {*(named.defaults if named else ()), *rule.defaults} & COMMON.keys()


def _rate(config: Mapping[str, Any], entry: Mapping[str, Any], field: str) -> float:
    """A group's peak rate: the entry's or the top level's, times both scales."""
    place, source = (field, entry) if "lr" in entry else ("optimizer", config)
    rate = check_value("lr", source.get("lr", COMMON["lr"]), field=f"{place}.lr")
    for place, source in (("optimizer", config), (field, entry)):
        rate *= check_value("lr_scale", source.get("lr_scale", 1.0), field=f"{place}.lr_scale")
    return rate
