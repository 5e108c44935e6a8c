"""The phases of a run as they are written: read, checked and put in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_opt.optim.catalogue import find_rule
from lightning_opt.optim.groups import COMMON
from lightning_opt.plan import ConfigError, check_value, one_of

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


def read_phases(
    phases: Mapping[str, Mapping[str, Any] | None], top: Mapping[str, Any], *, ends: bool = True
) -> list[Phase]:
    """Checks a map of phases; entries that are None are left out.

    Args:
        phases: name to settings.
        top: hyperparameters that hold for all.
        ends: all but the last say `until`; False: none does.

    Raises:
        ConfigError: names the field.
    """
    entries = {name: entry for name, entry in phases.items() if entry is not None}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or not entry.get("rule"):
            raise ConfigError(f"optimizer.phases.{name}", entry, "must name its rule, for example {rule: lion}")
    if not entries:
        raise ConfigError("optimizer.phases", phases, "must have a phase, for example {start: {rule: lion}}")
    rules = {name: find_rule(e["rule"], field=f"optimizer.phases.{name}.rule") for name, e in entries.items()}
    common = {*COMMON, "clip_group", *(key for rule in rules.values() for key in rule.defaults)}
    for key, value in top.items():
        if key not in common:
            raise ConfigError(f"optimizer.{key}", value, one_of(key, sorted(common)))
    last = list(entries)[-1]
    found = []
    for name, entry in entries.items():
        known = {*COMMON, "clip_group", *rules[name].defaults} - set(_FIXED) | set(_PLACE)
        values = {}
        for key, value in entry.items():
            field = f"optimizer.phases.{name}.{key}"
            if key not in known:
                raise ConfigError(field, value, one_of(key, sorted(known)))
            if key not in ("rule", "clip_group"):
                key_rule = key if key in _PLACE else f"{entry['rule']}.{key}"
                value = check_value(key_rule, value, field=field)
            values[key] = value
        until = values.get("until")
        if (until is None) != (not ends or name == last):
            what = "must say where the phase ends" if ends and name != last else "must be null: this phase has no end"
            raise ConfigError(f"optimizer.phases.{name}.until", until, what)
        factor = values.get("lr", top["lr"]) / top["lr"] * values.get("lr_scale", 1.0)
        values = {key: value for key, value in values.items() if key not in _PLACE}
        found.append(Phase(name, rules[name].name, until, factor, values))
    for kind in (int, float):  # those of one kind can be compared before the length of the run is known
        same = [phase for phase in found if type(phase.until) is kind]
        check_order(same, [phase.until for phase in same])
    return found


def check_order(phases: Iterable[Phase], ends: Sequence[float | None]) -> None:
    """Refuses a phase that ends before it begins.

    Raises:
        ConfigError: names it.
    """
    for (before, end), (phase, later) in pairwise(zip(phases, ends, strict=True)):
        if later is not None and end is not None and later <= end:
            what = f"must be later than {end:g}, where {before.name} ends"
            raise ConfigError(f"optimizer.phases.{phase.name}.until", phase.until, what)
