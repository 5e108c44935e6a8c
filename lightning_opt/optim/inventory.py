"""What an optimizer tells about itself: what runs each rule and why, which weights it has where, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_opt import kernels
from lightning_opt.kernels import Bucket, Choice, Rule, Variant
from lightning_opt.optim.buckets import layout_of, since
from lightning_opt.optim.catalogue import rule_of
from lightning_opt.optim.groups import apart, decay
from lightning_opt.optim.storage import bytes_held, planned_bytes, state_dtypes, updated_dtype

Groups = Sequence[Mapping[str, Any]]
States = Mapping[Tensor, Mapping[str, Any]]


class Inventory:
    """Groups and states as the base hands them in; the number of weights under each rule is remembered."""

    def __init__(self) -> None:
        self._elements: dict[str, int] = {}

    def forget(self) -> None:
        """To be called when a group has come or changed its rule."""
        self._elements.clear()

    def choice(self, groups: Groups, rule: Rule, group: Mapping[str, Any], bucket: Bucket) -> Choice:
        """What runs a bucket of a group."""
        one_count = not bucket.step.since
        return self._choose(groups, rule, group, bucket.params[0].device, bucket.dtypes, bucket.variant, one_count)

    def implementations(self, groups: Groups, states: States) -> dict[str, str]:
        """Per rule what runs it and why, as its last group has it."""
        return {group["rule"]: str(self._choice_of(groups, group, states)) for group in groups if group["params"]}

    def table(self, groups: Groups, states: States) -> list[dict[str, Any]]:
        """One row per group; see `Optimizer.routing_table`."""
        rows = []
        for group in groups:
            params = group["params"]
            held = sum(bytes_held(states[p]) for p in params if p in states)
            rule = rule_of(group)
            planned = sum(planned_bytes(rule, group, p, layout_of(group, i)) for i, p in enumerate(params))
            rows.append(
                {
                    "role": group["role"],
                    "rule": group["rule"],
                    "implementation": str(self._choice_of(groups, group, states)) if params else "",
                    "tensors": len(params),
                    "params": sum(p.numel() for p in params),
                    "lr": group.get("initial_lr", group["lr"]) * group["lr_factor"],
                    "weight_decay": group["weight_decay"],
                    "max_grad_norm": group["max_grad_norm"],
                    "state_bytes": held or planned,
                }
            )
        return rows

    def _choice_of(self, groups: Groups, group: Mapping[str, Any], states: States) -> Choice:
        rule = rule_of(group)
        largest = max(group["params"], key=lambda p: p.numel())
        dtypes = (updated_dtype(group, largest), largest.dtype, *state_dtypes(rule, group, largest).values())
        shrink, l2 = (None, None) if rule.own_decay else decay(group)
        one_count = not since(states.get(largest, {}))
        variant = Variant.of(group, shrink, l2, apart(group))
        return self._choose(groups, rule, group, largest.device, dtypes, variant, one_count)

    def _choose(
        self,
        groups: Groups,
        rule: Rule,
        group: Mapping[str, Any],
        device: torch.device,
        dtypes: tuple[torch.dtype, ...],
        variant: Variant,
        one_count: bool,
    ) -> Choice:
        if rule.name not in self._elements:
            members = (p for g in groups if g["rule"] == rule.name for p in g["params"])
            self._elements[rule.name] = sum(p.numel() for p in members)
        elements = self._elements[rule.name]
        return kernels.choose(rule, group["implementation"], device, dtypes, elements, variant, one_count)
