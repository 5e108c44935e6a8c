"""Which rule updates a role's weights, at which rate, with which hyperparameters: the roles map of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.phases import phases_of
from lightning_opt.plan.rule_facts import COMMON, RuleFacts, check_options, facts, known_rules
from lightning_opt.plan.values import check_value
from lightning_opt.plan.words import one_of

ROLES = ("matrix", "expert", "embedding", "head", "norm", "bias", "router", "other")
_TOP_ONLY = {"name", "roles"}
_EVERYWHERE = {"lr_scale", "clip_group", *COMMON}


def read_roles(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The roles map, complete: every word checked, ``default`` there, entries without a rule laid over it.

    Beside ``phases`` an entry may have no rule: its settings hold in every phase.

    Args:
        config: plain dict as in ``conf/optimizer``.

    Raises:
        ConfigError: for an unknown role, rule or key, with the closest right one.
    """
    given = config.get("roles") or {}
    for role, entry in given.items():
        if role != "default" and role not in ROLES:
            raise ConfigError(f"optimizer.roles.{role}", entry, f"unknown role; {one_of(role, ['default', *ROLES])}")
        if entry is not None and not isinstance(entry, Mapping):
            raise ConfigError(f"optimizer.roles.{role}", entry, "must be a map, for example {weight_decay: 0.0}")
    phased = config.get("phases") is not None
    default = {**({} if phased else {"rule": config.get("name", "adamw")}), **(given.get("default") or {})}
    entries = {role: dict(entry) for role, entry in given.items() if entry is not None}
    entries = {role: entry if "rule" in entry else {**default, **entry} for role, entry in entries.items()}
    entries["default"] = default
    rules = {
        role: facts(entry["rule"], field=f"optimizer.roles.{role}.rule")
        for role, entry in entries.items()
        if "rule" in entry
    }
    of_phases = {key for phase in phases_of(config) for key in facts(phase.rule).keys} if phased else set()
    for role, entry in entries.items():
        own = rules[role].keys if role in rules else of_phases
        for key, value in entry.items():
            if key != "rule" and key not in _EVERYWHERE and key not in own:
                raise ConfigError(f"optimizer.roles.{role}.{key}", value, one_of(key, {"rule", *_EVERYWHERE, *own}))
    known = {*_TOP_ONLY, *_EVERYWHERE, *(key for rule in rules.values() for key in rule.keys)}
    for key, value in config.items():
        if not phased and key not in known:  # beside phases, those that read them looked
            raise ConfigError(f"optimizer.{key}", value, one_of(key, known))
    return entries


def settings(config: Mapping[str, Any], entries: Mapping[str, dict[str, Any]], role: str) -> dict[str, Any]:
    """What a role's group is made with: its rule, unless phases say it, rate and hyperparameters.

    The top level gives every hyperparameter to each rule that knows it; the role's entry overrides. The peak rate is
    ``lr`` x the top level's ``lr_scale`` x the entry's ``lr_scale``.

    Args:
        config: plain dict as in ``conf/optimizer``.
        entries: of `read_roles`.
        role: any.

    Raises:
        ConfigError: for a value out of range, or one that the rule cannot have.
    """
    entry, field = entries.get(role, entries["default"]), f"optimizer.roles.{role}"
    if "rule" not in entry:
        found = {key: value for key, value in entry.items() if key != "lr_scale"}
        return {**found, "lr": _rate(config, entry, field)}
    rule = facts(entry["rule"], field=f"{field}.rule")
    at = lambda key: f"{field}.{key}" if key in entry else f"optimizer.{key}"  # noqa: E731
    keys = {*COMMON, "clip_group", *rule.keys}
    found = {key: config[key] for key in keys - _presets(config.get("name"), rule) if key in config}
    if rule.whole and found.get("implementation") != "whole":
        found.pop("implementation", None)  # said for the elementwise rules beside it
    found |= {key: value for key, value in entry.items() if key in keys}
    for key, value in found.items():
        if key != "clip_group":
            found[key] = check_value(f"{rule.name}.{key}", value, field=at(key))
    check_options(rule, found, at)
    return {"rule": rule.name, **found, "lr": _rate(config, entry, field)}


def _presets(name: str | None, rule: RuleFacts) -> set[str]:
    """Common keys that the top level says for the rule of its name alone: `cautious`, where either rule is that."""
    if name == rule.name:
        return set()
    return {*(facts(name).keys if name in known_rules() else ()), *rule.keys} & COMMON.keys()


def _rate(config: Mapping[str, Any], entry: Mapping[str, Any], field: str) -> float:
    """A group's peak rate: the entry's or the top level's, times both scales."""
    place, source = (field, entry) if "lr" in entry else ("optimizer", config)
    rate = check_value("lr", source.get("lr", COMMON["lr"]), field=f"{place}.lr")
    for place, source in (("optimizer", config), (field, entry)):
        rate *= check_value("lr_scale", source.get("lr_scale", 1.0), field=f"{place}.lr_scale")
    return rate
