"""Saved optimizer states: does one fit an optimizer, and what of it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_opt.optim.catalogue import rule_of
from lightning_opt.plan import ConfigError

# How this process runs and clips is said by whoever built the optimizer, not by the checkpoint.
_OWN = ("rule", "role", "clip_group", "lr_factor", "max_grad_norm", "implementation")
# Switches of torch's optimizers that change the maths, and the only value that is ours.
_MATHS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
_TORCHS = {*_MATHS, "foreach", "capturable", "differentiable", "fused"}


def with_values_of(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """A saved state under the hyperparameters of `groups`; None if rules, roles or numbers of tensors differ."""
    saved = state_dict["param_groups"]
    layouts = [[(g.get("rule"), g.get("role"), len(g["params"])) for g in side] for side in (saved, groups)]
    if layouts[0] != layouts[1]:
        return None
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
        for index in old["params"]:
            if state.get(index):
                state[index] = _counted(state[index], merged[-1], f"{field}.state")
    return {**state_dict, "state": state, "param_groups": merged}


def _counted(state: Mapping[str, Any], group: Mapping[str, Any], field: str) -> dict[str, Any]:
    """One parameter's state with its step as an int (torch saves a tensor)."""
    spec = rule_of(group)
    wanted = {"step", *spec.state, *(spec.measure.state if spec.measure else ())}
    scales = {f"{name}_scale" for name in spec.codes}
    found = set(state) - {"since", "ahead", "master", *scales, *state.get("ahead", ())}
    if found != wanted and not (spec.initial is not None and found > wanted):
        raise ConfigError(field, sorted(state), f"the checkpoint's must be {', '.join(sorted(wanted))} for {spec.name}")
    return {**state, "step": int(state["step"])}


def plain(value: Any) -> Any:
    """Tensors of one element as Python numbers, also within a list or tuple; everything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
