"""Checks an optimizer's settings, alone and beside the rest of a run, as far as no model is needed for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.lengths import steps_for_warmup
from lightning_opt.plan.phases import check_order, phases_of
from lightning_opt.plan.routes import read_roles, settings
from lightning_opt.plan.rule_facts import (
    EXPERT_TOKENS,
    RuleFacts,
    check_options,
    facts,
    minds_tokens,
    warms_by_fraction,
)

_VECTORS = ("norm", "bias")  # roles whose weights are no matrices


def check_optimizer(config: Mapping[str, Any], max_steps: int | None) -> None:
    """Checks what `optim.build` would refuse, and what the run around it does not give.

    Args:
        config: a whole configuration.
        max_steps: optimizer steps of the run; None where that is not known yet.

    Raises:
        ConfigError: the first problem found; `job.pieces.rehearse` finds what only tensors tell.
    """
    optimizer = config["optimizer"]
    rules = list(rules_of(optimizer))
    if optimizer.get("phases") is not None and max_steps is not None:
        phases = phases_of(optimizer)
        check_order(phases, [p.until if p.until is None else steps_for_warmup(p.until, max_steps) for p in phases])
    schedule = config["schedule"]
    flat = schedule["name"] == "constant" and not schedule.get("warmup")
    if not flat and any(rule.averages for rule, _ in rules):
        what = "must be flat beside an optimizer that averages its iterates and warms up by itself: schedule=flat"
        raise ConfigError("schedule", schedule["name"], what)
    _check_fed(config, _needs(optimizer, rules))


def rules_of(optimizer: Mapping[str, Any]) -> Iterator[tuple[RuleFacts, dict[str, Any]]]:
    """Every rule that some weight may come under, with its values; all are checked."""
    entries = read_roles(optimizer)
    phases = phases_of(optimizer) if optimizer.get("phases") is not None else []
    for role in dict.fromkeys([*entries, *_VECTORS]):
        values = settings(optimizer, entries, role)
        if "rule" in values:
            rule = facts(values["rule"])
            _check_shapes(rule, role, "roles.default" if role not in entries else f"roles.{role}")
            yield rule, values
            continue
        for phase in phases:
            rule = facts(phase.rule)
            _check_shapes(rule, role, f"phases.{phase.name}")
            every = {**optimizer, **phase.values, **values}
            place = {key: f"optimizer.phases.{phase.name}.{key}" for key in phase.values}
            check_options(rule, every, lambda key, place=place: place.get(key, f"optimizer.{key}"))
            yield rule, every


def _check_shapes(rule: RuleFacts, role: str, place: str) -> None:
    if role in _VECTORS and rule.least_ndim > 1:
        what = f"takes matrices, and weights of role {role} are none: give optimizer.roles.{role} a rule of its own"
        raise ConfigError(f"optimizer.{place}.rule", rule.name, what)


def fed_to(rule: RuleFacts, values: Mapping[str, Any]) -> set[str]:
    """The signals that a rule is fed with these hyperparameters, but for the length of the run."""
    return {*rule.needs, *([EXPERT_TOKENS] if minds_tokens(values) else [])}


def _needs(optimizer: Mapping[str, Any], rules: list[tuple[RuleFacts, dict[str, Any]]]) -> set[str]:
    found = {signal for rule, values in rules for signal in fed_to(rule, {**optimizer, **values})}
    lengths = [optimizer.get("warm"), optimizer.get("ramp")]
    if optimizer.get("phases") is not None:
        lengths += [phase.until for phase in phases_of(optimizer)]
    if any(length and length < 1 for length in lengths) or any(warms_by_fraction(values) for _, values in rules):
        found.add("run_length")
    return found | {optimizer["signal"]} if "signal" in optimizer else found


def _check_fed(config: Mapping[str, Any], needs: set[str]) -> None:
    """Signals come from our callback, or from one that somebody else wrote."""
    targets = [str(entry.get("_target_")) for entry in (config.get("callbacks") or {}).values() if entry]
    if needs and not any(t.endswith(".OptimizerSignals") or not t.startswith("lightning_opt.") for t in targets):
        what = f"needs {', '.join(sorted(needs))}: the callback OptimizerSignals (callbacks.signals) feeds it"
        raise ConfigError("optimizer", config["optimizer"]["name"], what)
