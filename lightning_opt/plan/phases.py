"""The phases of a run as they are written: read, checked and put in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.rule_facts import COMMON, RuleFacts, facts
from lightning_opt.plan.values import check_value
from lightning_opt.plan.words import closest, one_of

DYNAMIC = ("signal", "threshold", "hysteresis", "patience", "dwell")  # settings that say when, in place of `until`
_COURSE = {"phases", "warm", "ramp", *DYNAMIC}
_PLACE = ("rule", "until", "lr", "lr_scale")
_FIXED = ("lr", "state_dtype")  # of the whole run: rates are factors, and states go on


@dataclass(frozen=True)
class Phase:
    """A stretch of the run under one rule.

    Attributes:
        name: the user's.
        rule: name of its rule.
        until: optimizer steps (>= 1) or fraction of the run (< 1) where it ends; None: the end, or when told.
        factor: of the rate.
        values: hyperparameters that it gives.
    """

    name: str
    rule: str
    until: int | float | None
    factor: float
    values: Mapping[str, Any]


def phases_of(config: Mapping[str, Any]) -> list[Phase]:
    """The phases of an optimizer's configuration, `phased` or `dynamic`.

    Raises:
        ConfigError: as `read_phases`.
    """
    top = {key: value for key, value in config.items() if key not in {"name", "roles", "lr_scale", *_COURSE}}
    top["lr"] = check_value("lr", config.get("lr", COMMON["lr"]), field="optimizer.lr")
    return read_phases(config["phases"], top, ends="signal" not in config)


def read_phases(
    phases: Mapping[str, Mapping[str, Any] | None], top: Mapping[str, Any], *, ends: bool = True
) -> list[Phase]:
    """Checks a map of phases; entries that are None are left out.

    Args:
        phases: name to settings.
        top: hyperparameters that hold for all.
        ends: all but the last say `until`; False: there are two, and none does.

    Raises:
        ConfigError: names the field.
    """
    entries = {name: entry for name, entry in phases.items() if entry is not None}
    for name, entry in entries.items():
        _check_named(name, entry)
    if not entries:
        raise ConfigError("optimizer.phases", phases, "must have a phase, for example {start: {rule: lion}}")
    if not ends and len(entries) != 2:
        raise ConfigError("optimizer.phases", list(entries), "must be two: the calm one, then the rough one")
    rules = {name: facts(entry["rule"], field=f"optimizer.phases.{name}.rule") for name, entry in entries.items()}
    common = {*COMMON, "clip_group", *(key for rule in rules.values() for key in rule.keys)}
    for key, value in top.items():
        if key not in common:
            raise ConfigError(f"optimizer.{key}", value, one_of(key, sorted(common)))
    last = list(entries)[-1]
    found = [_read(name, entry, rules[name], top, ends and name != last) for name, entry in entries.items()]
    for kind in (int, float):  # those of one kind can be compared before the length of the run is known
        same = [phase for phase in found if type(phase.until) is kind]
        check_order(same, [phase.until for phase in same])
    return found


def _check_named(name: str, entry: Any) -> None:
    if isinstance(entry, Mapping) and entry.get("rule"):
        return
    near = closest("rule", entry) if isinstance(entry, Mapping) and "rule" not in entry else ""
    what = "must name its rule, for example {rule: lion}"
    raise ConfigError(f"optimizer.phases.{name}", entry, f"{what}; did you mean rule by {near}?" if near else what)


def _read(name: str, entry: Mapping[str, Any], rule: RuleFacts, top: Mapping[str, Any], has_end: bool) -> Phase:
    known = {*COMMON, "clip_group", *rule.keys} - set(_FIXED) | set(_PLACE)
    values = {}
    for key, value in entry.items():
        field = f"optimizer.phases.{name}.{key}"
        if key not in known:
            raise ConfigError(field, value, one_of(key, sorted(known)))
        if key not in ("rule", "clip_group"):
            value = check_value(key if key in _PLACE else f"{rule.name}.{key}", value, field=field)
        values[key] = value
    until = values.get("until")
    if (until is None) == has_end:
        what = "must say where the phase ends" if has_end else "must be null: this phase has no end"
        raise ConfigError(f"optimizer.phases.{name}.until", until, what)
    factor = values.get("lr", top["lr"]) / top["lr"] * values.get("lr_scale", 1.0)
    values = {key: value for key, value in values.items() if key not in _PLACE}
    return Phase(name, rule.name, until, factor, values)


def check_order(phases: Iterable[Any], ends: Sequence[float | None], field: str = "optimizer.phases") -> None:
    """Refuses a phase that ends before it begins.

    Args:
        phases: in order, each with `name` and `until`.
        ends: of each, in one unit; None: of no matter.
        field: where the configuration has them.

    Raises:
        ConfigError: names it.
    """
    for (before, end), (phase, later) in pairwise(zip(phases, ends, strict=True)):
        if later is not None and end is not None and later <= end:
            what = f"must be later than {end:g}, where {before.name} ends"
            raise ConfigError(f"{field}.{phase.name}.until", phase.until, what)
