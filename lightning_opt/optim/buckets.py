"""From a group's parameters to buckets: what of each the rule works on, and which go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import Bucket, Rule, Step
from lightning_opt.optim.storage import local


@dataclass(frozen=True)
class Row:
    """One parameter as its rule sees it: whole tensors, or for elementwise rules this rank's shards.

    Attributes:
        tensors: weight, gradient, then the states named in `Rule.state`.
        blocks: the states named in `Measure.state`.
        layout: what the model says about the weight.
        state: everything in ``optimizer.state[p]``.
        shard: the weight as a DTensor where `tensors` are shards of it, else None.
    """

    tensors: list[Tensor]
    blocks: list[Tensor]
    layout: Mapping[str, Any]
    state: dict[str, Any]
    shard: Any = None

    @classmethod
    def of(cls, rule: Rule, p: Tensor, grad: Tensor, state: dict[str, Any], layout: Mapping[str, Any]) -> Row:
        """The row of a parameter that has its state."""
        tensors = [p, grad, *[state[name] for name in rule.state]]
        blocks = [state[name] for name in rule.measure.state] if rule.measure is not None else []
        if not rule.elementwise or not hasattr(p, "to_local"):
            return cls(tensors, blocks, layout, state)
        if grad.placements != p.placements:
            tensors[1] = grad.redistribute(placements=p.placements)
        return cls([local(t) for t in tensors], blocks, layout, state, p)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows of one bucket have in common, beside the step."""
        since = tuple(sorted(self.state.get("since", {}).items()))
        mesh = None if self.shard is None else self.shard.device_mesh
        return (since, mesh, self.tensors[0].device, *[t.dtype for t in self.tensors])


def layout_of(group: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What the model says about a group's parameter: ``pieces`` (rows of the matrices fused in it), ``heads``."""
    found = {}
    for key in ("pieces", "heads"):
        values = group.get(key)
        if values is not None and values[index] is not None:
            found[key] = values[index]
    return found


def filled_bucket(
    rule: Rule,
    rows: list[Row],
    step: int,
    group: Mapping[str, Any],
    *,
    shrink: float | None,
    l2: float | None,
    skip: Tensor | None,
) -> Bucket:
    """The bucket of rows of one kind."""
    params, grads, *states = (list(column) for column in zip(*(row.tensors for row in rows), strict=True))
    blocks = tuple(list(column) for column in zip(*(row.blocks for row in rows), strict=True))
    counted = Step(step, rows[0].state.get("since"))
    sharded = rows[0].shard is not None
    return Bucket(
        params,
        grads,
        tuple(states),
        rule.scalars(counted, group),
        counted,
        shrink,
        l2,
        group,
        skip,
        cautious=group["cautious"],
        cautious_decay=group["cautious_weight_decay"],
        layouts=[row.layout for row in rows],
        block_states=blocks,
        reduce=_summed_over(rows[0].shard) if sharded else None,
        counts=[row.shard.numel() for row in rows] if sharded else None,
        extra=[row.state for row in rows],
    )


def _summed_over(shard: Any) -> Callable[[Tensor], Tensor]:
    """Adds sums over one rank's shards up over the ranks that hold the other shards."""

    def reduce(totals: Tensor) -> Tensor:
        totals = totals.clone()
        for dim, placement in enumerate(shard.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(totals, group=shard.device_mesh.get_group(dim))
        return totals

    return reduce
