"""Saved optimizer states: does one fit an optimizer, and what of it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_opt.kernels import Rule
from lightning_opt.optim.buckets import layout_of
from lightning_opt.optim.catalogue import rule_of
from lightning_opt.optim.storage import planned_state
from lightning_opt.plan import ConfigError
from lightning_opt.plan.errors import show

# How this process runs and clips is said by whoever built the optimizer, not by the checkpoint.
_OWN = ("rule", "role", "clip_group", "lr_factor", "max_grad_norm", "implementation")
# Switches of torch's optimizers that change the maths, and the only value that is ours.
_MATHS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
_TORCHS = {*_MATHS, "foreach", "capturable", "differentiable", "fused"}


def with_values_of(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """A saved state under the hyperparameters of `groups`; None if rules, roles or numbers of tensors differ.

    Raises:
        ConfigError: for a hyperparameter that changes which states there are, or their shapes.
    """
    saved = state_dict["param_groups"]
    layouts = [[(g.get("rule"), g.get("role"), len(g["params"])) for g in side] for side in (saved, groups)]
    if layouts[0] != layouts[1]:
        return None
    for old, new in zip(saved, groups, strict=True):
        _refuse_other_states(old, new)
    merged = [{**old, **new, "params": old["params"]} for old, new in zip(saved, groups, strict=True)]
    return {**state_dict, "param_groups": merged}


def fitted(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A saved state, ours or of torch's AdamW, as the optimizer that holds `groups` loads it.

    Hyperparameters come from the checkpoint, as in torch; those in `_OWN` and those it lacks from `groups`.

    Raises:
        ConfigError: for another number of groups, another rule or role in one of them, or states of another rule.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ConfigError("param_groups", len(saved), f"the checkpoint's groups must be {len(groups)}, as many as here")
    merged, state = [], dict(state_dict["state"])
    for number, (old, new) in enumerate(zip(saved, groups, strict=True)):
        field = f"param_groups[{number}]"
        for key in ("rule", "role"):
            if old.get(key, new[key]) != new[key]:
                raise ConfigError(f"{field}.{key}", old[key], f"the checkpoint's {key} must be {new[key]}, as here")
        for key, ours in _MATHS.items():
            if old.get(key, ours) != ours:
                raise ConfigError(f"{field}.{key}", old[key], f"the checkpoint's must be {ours}, as here")
        kept = {key: plain(value) for key, value in old.items() if key not in _TORCHS}
        merged.append({**new, **kept, **{key: new[key] for key in _OWN}})
        for number, index in enumerate(old["params"]):
            if state.get(index) and number < len(new["params"]):
                state[index] = _counted(state[index], {**merged[-1], "params": new["params"]}, number, f"{field}.state")
    return {**state_dict, "state": state, "param_groups": merged}


def _counted(state: Mapping[str, Any], group: Mapping[str, Any], number: int, field: str) -> dict[str, Any]:
    """One parameter's state with its step as an int (torch saves a tensor)."""
    name = group["rule"]
    wanted = _shapes(group, number)
    ignored = {"step", "since", "ahead", *_converted(rule_of(group)), *state.get("ahead", ())}
    found = {key: tuple(getattr(value, "shape", ())) for key, value in state.items() if key not in ignored}
    if found.keys() != wanted.keys():
        what = f"the checkpoint's must be {', '.join(sorted(['step', *wanted]))} for {name}"
        raise ConfigError(field, sorted(state), what)
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ConfigError(f"{field}.{key}", found[key], f"the checkpoint's must have shape {shape} for {name}")
    return {**state, "step": int(state["step"])}


def _converted(rule: Rule) -> set[str]:
    """States that loading makes or drops by itself."""
    return {"master", *(f"{name}_scale" for name in rule.codes)}


def _shapes(group: Mapping[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    """The states that a group's parameter must have, whatever it is stored in."""
    rule = rule_of(group)
    planned = planned_state(rule, group, group["params"][number], layout_of(group, number))
    converted = _converted(rule)
    return {key: tuple(getattr(value, "shape", ())) for key, value in planned.items() if key not in converted}


def _refuse_other_states(saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Names the first option of the rule under which the saved states are not those that are wanted now."""
    then = {key: plain(saved[key]) for key in rule_of(group).defaults if key in saved}
    changed = [key for key, value in then.items() if value != group[key]]
    for key in changed:
        before, after = {**group, **then}, {**group, **then, key: group[key]}
        for number in range(len(group["params"])):
            old, new = _shapes(before, number), _shapes(after, number)
            if differing := sorted({name for name, _ in old.items() ^ new.items()}):
                what = f"must stay {show(then[key])}: {group['rule']}'s state {differing[0]} was saved with it"
                raise ConfigError(f"optimizer.{key}", group[key], what)


def plain(value: Any) -> Any:
    """Tensors of one element as Python numbers, also within a list or tuple; everything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
