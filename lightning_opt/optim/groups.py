"""What a parameter group holds: the keys every rule has, the checks of their values, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_opt import kernels
from lightning_opt.anatomy import LAYOUT
from lightning_opt.kernels import Rule
from lightning_opt.optim.saved import plain
from lightning_opt.optim.schedules import steps_of
from lightning_opt.plan import ConfigError, check_value, one_of
from lightning_opt.plan.values import show

# Every rule has these; a rule adds its own (`Rule.defaults`).
COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.0,
    "weight_decay_mode": "decoupled",
    "max_grad_norm": None,
    "cautious": False,
    "cautious_weight_decay": False,
    "state_dtype": "float32",
    "state_rounding": "nearest",
    "weight_rounding": "nearest",
    "implementation": "auto",
}
# What else a group may carry. Those in `LAYOUT` are lists aligned with the group's parameters, or None: what the model
# says of each weight (see `anatomy.layouts`).
# `lr_factor` multiplies the rate, whatever a schedule makes of `lr`: phases have rates of their own.
BOOKKEEPING: dict[str, Any] = {
    "rule": None,
    "role": "all",
    "clip_group": "",
    **dict.fromkeys(LAYOUT),
    "lr_factor": 1.0,
}
ALLOWED = frozenset({"params", "param_names", "name", "initial_lr", *COMMON, *BOOKKEEPING})


def refuse_unknown(spec: Rule, hyper: Mapping[str, Any]) -> None:
    """Refuses keys that neither the rule nor every group has, naming the nearest."""
    for key, value in hyper.items():
        if key not in ALLOWED and key not in spec.defaults:
            raise ConfigError(f"{spec.name}.{key}", value, one_of(key, [*COMMON, *spec.defaults]))


def checked(spec: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with its values checked and in plain types."""
    found = dict(group)
    for key in (*COMMON, *spec.defaults):
        value = plain(group[key])
        still = key == "lr" and type(value) in (int, float) and value == 0  # only a configuration refuses it
        found[key] = 0.0 if still else check_value(f"{spec.name}.{key}", value)
    if found.get("initial_lr") is not None:
        found["initial_lr"] = plain(found["initial_lr"])
    only = {"cautious": False, "cautious_weight_decay": False, "weight_decay_mode": "decoupled"} if spec.writes else {}
    for key, value in only.items():
        if found[key] != value:
            why = f"{spec.name} writes its weights itself: {show(value)} is all it can do"
            raise ConfigError(f"{spec.name}.{key}", found[key], why)
    if found["cautious_weight_decay"] and found["weight_decay_mode"] == "l2":
        why = "false, or weight_decay_mode decoupled or independent: l2 decays through the gradient"
        raise ConfigError(f"{spec.name}.cautious_weight_decay", True, why)
    if found["state_dtype"] == "int8" and not (form := spec if spec.form is None else spec.form(found)).codes:
        raise ConfigError(f"{spec.name}.state_dtype", "int8", f"{form.name} has float32 and bfloat16")
    asked, possible = found["implementation"], kernels.possible(spec)
    if asked != "auto" and asked not in possible:
        raise ConfigError(f"{spec.name}.implementation", asked, f"{spec.name} has auto, {', '.join(possible)}")
    return found


def warms_by_fraction(group: Mapping[str, Any]) -> bool:
    """Whether a rule's own warm-up (`warmup_steps`) is a fraction of the run, whose length must be told then."""
    return 0 < group.get("warmup_steps", 0) < 1


def at_rate(group: dict[str, Any], run_length: int = 0) -> dict[str, Any]:
    """The group with the rate that it steps by, the schedule's times its phase's, and its own warm-up in steps."""
    if warms_by_fraction(group):
        group = {**group, "warmup_steps": steps_of(group["warmup_steps"], run_length)}
    factor = group["lr_factor"]
    if factor == 1:
        return group
    peak = group.get("initial_lr") or group["lr"]
    return {**group, "lr": group["lr"] * factor, "initial_lr": peak * factor}


def decay(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(factor on the weights, coefficient of the weights in the gradient), None where there is none."""
    wd, lr = group["weight_decay"], group["lr"]
    if wd == 0:
        return None, None
    if group["weight_decay_mode"] == "l2":
        return None, wd
    if group["weight_decay_mode"] == "independent":
        return 1 - lr / (group.get("initial_lr") or lr) * wd if lr else None, None
    return 1 - lr * wd, None
