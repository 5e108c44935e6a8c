"""What a rule is, and the one place that says in which order gradient, decay and rule meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The maths of one optimizer.

    Attributes:
        name: the word users write, for example ``lion``.
        update: ``update(p, g, *state, **scalars)``, writes weight and states in place and leaves the gradient alone;
            plain arithmetic, `torch` functions and methods on tensors of one shape, all float32 or all float64: the
            same code runs on tensors, on lists of tensors (`Many`) and through the compiler. Scalars may be floats or
            0-dim tensors, so they go where both can (operators, ``mul_``, ``lerp_``; not ``alpha=``).
        scalars: ``scalars(step, group) -> {name: float}``: what `update` needs besides tensors, worked out once per
            step in Python's double precision; ``step`` counts from 1, ``group`` is the parameter group.
        state: names of the state tensors, each shaped like the parameter and zero at first.
        defaults: the rule's own hyperparameters (beside lr, weight decay, clipping, ...) and their defaults.
        traffic: bytes per float32 parameter that an ideal step reads and writes, gradient included.
        wide_state: those of `state` that are kept in float32 (float64 for float64 weights) whatever `state_dtype` says.
        fused: torch's fused functional for this rule, ``fused(bucket)``, or None.
        elementwise: `update` treats every element alone, so tensors may be flattened or be shards of a DTensor.
        needs: names of signals (`Optimizer.observe`) the rule cannot work without.
    """

    name: str
    update: Callable[..., None]
    scalars: Callable[[int, Mapping[str, Any]], dict[str, float]]
    state: tuple[str, ...]
    defaults: Mapping[str, Any]
    traffic: int
    wide_state: tuple[str, ...] = ()
    fused: Callable[[Bucket], None] | None = None
    elementwise: bool = True
    needs: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass
class Bucket:
    """Tensors that take the same update in the same step: one group, one step count, one device, one set of dtypes.

    Attributes:
        params: the weights, written in place.
        grads: their gradients, only read.
        states: one list per name in `Rule.state`, aligned with `params`, written in place.
        scalars: from `Rule.scalars`.
        shrink: the weights are multiplied by this first (decoupled and independent decay); None for no decay.
        l2: this times the weights is added to the gradients (mode ``l2``); None for none.
        skip: 0-dim bool on the tensors' device; where it is true, weights and states stay as they are, to the last
            bit and whatever the gradients hold. None: nobody asked, which is the fast way.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: tuple[list[Tensor], ...]
    scalars: dict[str, float]
    step: int
    shrink: float | None = None
    l2: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: Tensor | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weight, gradient and each state."""
        return tuple(tensors[0].dtype for tensors in (self.params, self.grads, *self.states))

    def part(self, indices: list[int]) -> Bucket:
        """The same bucket with only the tensors at `indices`."""
        pick = lambda tensors: [tensors[i] for i in indices]  # noqa: E731
        states = tuple(pick(tensors) for tensors in self.states)
        return replace(self, params=pick(self.params), grads=pick(self.grads), states=states)


def apply(rule: Rule, p: Any, g: Any, state: Iterable[Any], shrink: Any, l2: Any, scalars: Mapping[str, Any]) -> None:
    """One update in place: decay into the gradient (``l2``) or onto the weight (``shrink``), then the rule.

    Works on tensors and on `Many`, all in the dtype updates are computed in.
    """
    if l2 is not None:
        g = g + l2 * p
    if shrink is not None:
        p.mul_(shrink)
    rule.update(p, g, *state, **scalars)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype updates are computed in: float64 stays, everything else is float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def scratch(tensor: Tensor, skip: Tensor | None) -> Tensor:
    """What an update may overwrite: the tensor itself, or a copy where it is narrow or may have to stay."""
    computed = wide(tensor)
    return computed.clone() if skip is not None and computed is tensor else computed


def kept(old: Tensor, new: Tensor, skip: Tensor | None) -> Tensor:
    """What to write over `old`: the new values, or the old ones where the update is skipped."""
    return new if skip is None else torch.where(skip, old, new.to(old.dtype))
