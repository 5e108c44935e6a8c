"""What configurations must know of the update rules: a table beside this file, so that no check waits for torch.

`python -m recipes.describe --write` writes `rule_facts.json` from the rules themselves, and a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_opt.plan.errors import ConfigError, show
from lightning_opt.plan.words import one_of

TABLE = Path(__file__).with_name("rule_facts.json")

# Hyperparameters that every rule has; a rule adds its own.
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
    "sparse_experts": 0,
    "sparse_parts": ("update", "decay", "momentum"),
    "expert_rate": "none",
    "expert_rate_bound": 2.0,
    "implementation": "auto",
}
EXPERT_TOKENS = "expert_tokens"
"""The signal that says how many tokens each expert was given in a step."""
CURVATURE = "hessian_diagonal"
"""The signal that brings estimates of the Hessian's diagonal, per parameter."""
OF_THE_RUN = ("warmup_steps", "alpha_warmup", "beta3_warmup")
"""Lengths that a rule counts itself: below 1 a fraction of the run, whose length must be told then."""


@dataclass(frozen=True)
class RuleFacts:
    """One rule's facts.

    Attributes:
        name: the word users write.
        keys: its own hyperparameters, beside `COMMON`.
        implementations: those it has on some device.
        int8: it has codes for some of its states.
        averages: the weights to use are others than those that are trained.
        writes: it writes its weights itself.
        least_ndim: smallest number of dimensions of a weight that it takes.
        needs: signals that it cannot work without.
        together: options, as ``clip=global``, with which it measures all of a step's tensors before it updates one.
    """

    name: str
    keys: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    int8: bool = False
    averages: bool = False
    writes: bool = False
    least_ndim: int = 0
    needs: tuple[str, ...] = ()
    together: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """It sees whole matrices and is no elementwise update."""
        return "whole" in self.implementations


def known_rules() -> list[str]:
    """Names of all rules, sorted."""
    return sorted(_table())


def facts(name: str, *, field: str = "rule") -> RuleFacts:
    """The facts of a name.

    Raises:
        ConfigError: for an unknown name, with the closest right one.
    """
    if name not in _table():
        raise ConfigError(field, name, one_of(name, known_rules()))
    return _table()[name]


@cache
def _table() -> dict[str, RuleFacts]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    as_held = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return {name: RuleFacts(name, **{key: as_held(row[key]) for key in row}) for name, row in rows.items()}


def warms_by_fraction(values: Mapping[str, Any]) -> bool:
    """Whether a rule's own warm-up is a fraction of the run."""
    return any(0 < (values.get(key) or 0) < 1 for key in OF_THE_RUN)


def minds_tokens(values: Mapping[str, Any]) -> bool:
    """Whether experts go each their own way by their tokens, where there are experts."""
    return bool(values.get("sparse_experts")) or values.get("expert_rate", "none") != "none"


def wants_all(rule: RuleFacts, values: Mapping[str, Any], needs: Iterable[str]) -> str:
    """Why a rule cannot update each weight as soon as its gradient is there, or "" where it can.

    Args:
        rule: any.
        values: the hyperparameters that are given.
        needs: signals that it is fed with these.
    """
    if fed := sorted({*needs} - {"run_length"}):
        return f"{rule.name} cannot be had with it: {', '.join(fed)} is fed before the step"
    if rule.whole or any(f"{key}={value}" in rule.together for key, value in values.items()):
        return f"{rule.name} cannot be had with it: it works on many tensors at once"
    return ""


def check_options(rule: RuleFacts, values: Mapping[str, Any], at: Callable[[str], str]) -> None:
    """Refuses what each value alone may be, but not for this rule or beside the others.

    Args:
        rule: whose hyperparameters they are.
        values: those that are given, each right by itself.
        at: what to call a key in the error.

    Raises:
        ConfigError: the first one found.
    """
    only = {"cautious": False, "cautious_weight_decay": False, "weight_decay_mode": "decoupled", "expert_rate": "none"}
    for key, value in only.items() if rule.writes else ():
        if values.get(key, value) != value:
            raise ConfigError(
                at(key), values[key], f"{rule.name} writes its weights itself: {show(value)} is all it can do"
            )
    if values.get("cautious_weight_decay") and values.get("weight_decay_mode") == "l2":
        why = "false, or weight_decay_mode decoupled or independent: l2 decays through the gradient"
        raise ConfigError(at("cautious_weight_decay"), True, why)
    parts = values.get("sparse_parts", ())
    if rule.writes and ("update" in parts) != ("decay" in parts):
        why = f"{rule.name} writes its weights itself: update and decay rest together or not at all"
        raise ConfigError(at("sparse_parts"), parts, why)
    if values.get("state_dtype") == "int8" and not rule.int8:
        raise ConfigError(at("state_dtype"), "int8", f"{rule.name} has float32 and bfloat16")
    asked = values.get("implementation", "auto")
    if asked != "auto" and asked not in rule.implementations:
        has = ", ".join(rule.implementations)
        raise ConfigError(at("implementation"), asked, f"{rule.name} has auto, {has}")
