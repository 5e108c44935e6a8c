"""A parameter's states at a seam between two rules: which can go on, what is missing, what is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_opt.optim.catalogue import rule_of
from lightning_opt.optim.storage import fresh_state, restored


def copied(value: Any) -> Any:
    """A state that may be written without the original."""
    return value.clone() if isinstance(value, Tensor) else dict(value) if isinstance(value, Mapping) else value


def fits(held: Any, wanted: Any) -> bool:
    """Whether a state that is held may go on as the one that is wanted."""
    return type(held) is type(wanted) and (not isinstance(wanted, Tensor) or held.shape == wanted.shape)


def add_missing(state: dict[str, Any], fresh: Mapping[str, Any]) -> None:
    """Gives a parameter the states that it lacks for the coming rule, and their own count."""
    for name, value in fresh.items():
        if name not in state:
            state[name] = value
            state.setdefault("since", {})[name] = state["step"]
            state.setdefault("ahead", {})[name] = 1


def carry(state: dict[str, Any], group: Mapping[str, Any], p: Tensor, layout: Mapping[str, Any]) -> None:
    """Makes a parameter's state, in place, what the group's new rule wants."""
    rule = rule_of(group)
    fresh = fresh_state(rule, group, p, layout)
    since, step = state.pop("since", {}), state["step"]
    state.pop("ahead", None)
    kept = restored(rule, group, p, {name: state[name] for name in fresh if fits(state.get(name), fresh[name])})
    state.clear()
    state |= {"step": step, **fresh, **kept}
    counts = {name: since.get(name, 0) if name in kept else step for name in fresh}
    if counts := {name: count for name, count in counts.items() if count}:
        state["since"] = counts
