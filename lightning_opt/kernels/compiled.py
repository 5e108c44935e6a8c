"""The rule through torch.compile: one pass over memory.

On a CPU one kernel per rule and set of dtypes is compiled, for a flat tensor of any length, and called per tensor: it
compiles in a second or two whatever the model (inductor's own start comes on top), where compiling the whole list of a
27M-parameter model takes 10 to 30 s. A call costs about 30 us, so small tensors take the foreach way. On a GPU, where
30 us is longer than the kernel, the whole list is one graph with fixed shapes.

Rates and step-dependent numbers travel in one tensor, so a schedule never recompiles.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_opt.kernels import foreach
from lightning_opt.kernels.rule import Bucket, Rule, apply, wide

log = logging.getLogger("lightning_opt.kernels")

SMALL = 1 << 14  # elements; below, a call of the compiled kernel costs more than the foreach ops
_broken: set[str] = set()


def broken(rule: Rule) -> bool:
    """Whether compiling this rule has failed in this process, so that foreach runs instead."""
    return rule.name in _broken


def _graph(rule: Rule, names: tuple[str, ...], l2: bool) -> Callable[..., None]:
    """The function to compile: lists in, written in place; `numbers` holds shrink, l2 and the scalars in order."""

    def update_all(numbers: Tensor, params: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> None:
        shrink, coupled, *scalars = numbers.to(wide(params[0]).dtype).unbind()
        named = dict(zip(names, scalars, strict=True))
        for p, g, *state in zip(params, grads, *states, strict=True):
            stored = (p, *state)
            computed = [wide(tensor) for tensor in stored]
            apply(rule, computed[0], wide(g), computed[1:], shrink, coupled if l2 else None, named)
            for old, new in zip(stored, computed, strict=True):
                if new is not old:
                    old.copy_(new)

    # Dynamo keeps compiled code per code object, 8 kinds at most, and runs eager in silence beyond: one object each.
    update_all.__code__ = update_all.__code__.replace(co_name=f"update_{rule.name}")
    return update_all


@functools.cache
def _compiled(rule: Rule, names: tuple[str, ...], l2: bool, dtypes: tuple[torch.dtype, ...], flat: bool) -> Callable:
    """One compiled function per kind of bucket, each with a cache of its own, so that none hits the recompile limit."""
    return torch.compile(_graph(rule, names, l2), dynamic=flat)


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place; falls back to foreach, and says so once, where compiling fails."""
    if broken(rule):
        foreach.run(rule, bucket)
        return
    dtypes = tuple(tensors[0].dtype for tensors in (bucket.params, bucket.grads, *bucket.states))
    flat = _one_by_one(rule, bucket)
    call = _compiled(rule, tuple(bucket.scalars), bucket.l2 is not None, dtypes, flat)
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    numbers = torch.tensor([shrink, bucket.l2 or 0.0, *bucket.scalars.values()], dtype=torch.float64)
    numbers = numbers.to(bucket.params[0].device, non_blocking=True)
    left: list[int] = []
    for indices in _units(rule, bucket, left):
        if broken(rule):
            left += indices
            continue
        part = bucket.part(indices)
        lists = (part.params, part.grads, *part.states)
        if flat:
            lists = tuple([t.view(-1) for t in tensors] for tensors in lists)
        try:
            call(numbers, *lists)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # raised before this unit was touched
            _broken.add(rule.name)
            log.warning("compiling %s failed, foreach runs instead: %s", rule.name, str(error).splitlines()[0])
            left += indices
    if left:
        foreach.run(rule, bucket.part(left))


def _units(rule: Rule, bucket: Bucket, left: list[int]) -> Iterator[list[int]]:
    """Indices to run in one call each; appends to `left` those that are better off without the compiler."""
    if not _one_by_one(rule, bucket):
        yield list(range(len(bucket.params)))
        return
    for i, tensors in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
        # Flat views must pair the right elements: all of them contiguous.
        if tensors[0].numel() < SMALL or not all(t.is_contiguous() for t in tensors):
            left.append(i)
        else:
            yield [i]


def _one_by_one(rule: Rule, bucket: Bucket) -> bool:
    return rule.elementwise and bucket.params[0].device.type == "cpu"
