"""The rule compiled, one pass over memory: generated C++ on a CPU, torch.compile (Triton) elsewhere.

Rates and step-dependent numbers travel as data, so a schedule never recompiles. On a GPU the whole list is one graph
with fixed shapes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import cpp, foreach, native
from lightning_opt.kernels.device import can_compile
from lightning_opt.kernels.measuring import factors
from lightning_opt.kernels.rule import Bucket, Course, Rule, Variant, apply, measures, scratch, summand, wide, write

log = logging.getLogger("lightning_opt.kernels")

Shapes = tuple[torch.Size, ...]

_MOST = 32  # lists of shapes that are compiled per kind of bucket: each takes seconds, and memory
_shapes: dict[tuple[Any, ...], set[Shapes]] = {}
_full: set[tuple[Any, ...]] = set()  # kinds of which it was said that they have no room
_broken: dict[tuple[str, Variant, tuple[torch.dtype, ...]], str] = {}  # what cannot be compiled: why


def possible(rule: Rule, variant: Variant, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether this rule can be compiled for a device and dtypes, and with what, or why not.

    On a CPU it is compiled to find out, once per process; on a GPU the first step tells.
    """
    can, what = can_compile(device.type)
    if can and device.type == "cpu":
        if not cpp.possible(dtypes):
            return False, "the C++ loop takes float32, float64 and bfloat16"
        if (rule.name, variant, dtypes) not in _broken:
            try:
                native.prepare(rule, variant, dtypes)
            except native.CannotCompile as error:
                _give_up(rule, variant, dtypes, error)
    why = _broken.get((rule.name, variant, dtypes))
    return (can, what) if why is None else (False, f"compiling failed: {why}")


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place; falls back to foreach, and says so once, where compiling fails."""
    kind = bucket.variant, bucket.dtypes
    on_cpu = bucket.params[0].device.type == "cpu"
    measured_shards = bucket.wholes is not None and measures(rule, bucket.variant)  # ranks must sum in the same calls
    in_cpp = not (bucket.skip is not None or measured_shards)  # no mask there either
    if (rule.name, *kind) not in _broken and (in_cpp or not on_cpu):
        how = native.run if on_cpu else _run_graph
        try:
            left = how(rule, bucket)
        except (native.CannotCompile, torch._dynamo.exc.BackendCompilerFailed) as error:  # nothing was touched
            _give_up(rule, *kind, error)
        else:
            bucket = bucket.part(left)
    if bucket.params:
        foreach.run(rule, bucket)


def _give_up(rule: Rule, variant: Variant, dtypes: tuple[torch.dtype, ...], error: Exception) -> None:
    why = _broken[rule.name, variant, dtypes] = " ".join(str(error).splitlines()[:2]) or type(error).__name__
    log.warning("compiling %s failed, torch's kernels run instead: %s", rule.name, why)


def _graph(rule: Rule, names: tuple[str, ...], variant: Variant) -> Callable[..., None]:
    """The function to compile: lists in, written in place; `numbers` holds shrink, l2, step and the scalars."""

    def update_all(
        numbers: Tensor,
        skip: Tensor | None,
        factors: list[list[Tensor]],
        firsts: list[int] | None,
        experts: list[Tensor] | None,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        shrink, l2, _, *scalars = numbers.to(wide(params[0]).dtype).unbind()
        step = numbers[2].long()
        named = dict(zip(names, scalars, strict=True))
        for i, (p, g, *state) in enumerate(zip(params, grads, *states, strict=True)):
            stored = (p, *state)
            course = Course.of(rule, shrink, l2, skip, experts[i] if experts else None, p)
            computed = [scratch(tensor, course.stays(k)) for k, tensor in enumerate(stored)]
            known = [column[i].reshape(()) for column in factors]
            decay = course.shrink, course.l2
            apply(rule, variant, computed[0], wide(g), computed[1:], *decay, named, known, course.rate)
            for k, (old, new) in enumerate(zip(stored, computed, strict=True)):
                if new is not old:
                    write(old, new, course.stays(k), variant.salt(k, old.dtype, step, firsts[i] if firsts else 0))

    return _own(update_all, f"update_{rule.name}")


def _sums(rule: Rule, names: tuple[str, ...], variant: Variant, number: int) -> Callable[..., list[Tensor]]:
    """As `_graph`, for the sums of one measurement over every tensor."""

    def sum_all(
        numbers: Tensor,
        factors: list[list[Tensor]],
        experts: list[Tensor] | None,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
    ) -> list[Tensor]:
        _, l2, _, *scalars = numbers.to(wide(params[0]).dtype).unbind()
        named = dict(zip(names, scalars, strict=True))
        totals = []
        for i, (p, g, *state) in enumerate(zip(params, grads, *states, strict=True)):
            copies = [wide(tensor).clone() for tensor in state]
            known = [column[i].reshape(()) for column in factors]
            its_l2 = Course.of(rule, None, l2, None, experts[i] if experts else None, p).l2
            x = summand(rule, variant, number, wide(p), wide(g), copies, its_l2, named, known)
            totals.append(x.sum(dtype=wide(p).dtype))
        return totals

    return _own(sum_all, f"sums_{rule.name}")


def _own(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    # Dynamo keeps compiled code per code object, 8 kinds at most, and runs eager in silence beyond: one object each.
    function.__code__ = function.__code__.replace(co_name=name)
    return function


def _has_room(kind: tuple[Any, ...], shapes: Shapes) -> bool:
    """Whether one more list of shapes may be compiled for a kind of bucket: gradients that come and go make many."""
    known = _shapes.setdefault(kind, set())
    if shapes not in known and len(known) == _MOST:
        if kind not in _full:
            _full.add(kind)
            log.warning("%s: %d lists of shapes are compiled, torch's kernels take all others", kind[0].name, _MOST)
        return False
    known.add(shapes)
    return True


@functools.cache
def _compiled(
    rule: Rule, names: tuple[str, ...], variant: Variant, masked: bool, dtypes: tuple[torch.dtype, ...], shapes: Shapes
) -> tuple[Callable[..., None], list[Callable[..., list[Tensor]]]]:
    """Compiled functions per kind of bucket and list of shapes: one function for all would hit the recompile limit."""
    sums = [_sums(rule, names, variant, number) for number in range(len(measures(rule, variant)))]
    return torch.compile(_graph(rule, names, variant), dynamic=False), [torch.compile(f, dynamic=False) for f in sums]


def _run_graph(rule: Rule, bucket: Bucket) -> list[int]:
    """The whole list as one graph, or nothing of it: measured in blocks, or of too many lists of shapes."""
    kind = rule, tuple(bucket.scalars), bucket.variant, bucket.skip is not None, bucket.dtypes
    shapes = tuple(p.shape for p in bucket.params)
    if (rule.measure is not None and rule.measure.block is not None) or not _has_room(kind, shapes):
        return list(range(len(bucket.params)))
    lists = (bucket.params, bucket.grads, *bucket.states)
    call, sums = _compiled(*kind, shapes)
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    given = [shrink, bucket.l2 or 0.0, bucket.step, *bucket.scalars.values()]
    measured = {i: value for i, value in enumerate(given) if isinstance(value, Tensor)}  # on the device, to stay there
    numbers = torch.tensor([0.0 if i in measured else value for i, value in enumerate(given)], dtype=torch.float64)
    numbers = numbers.to(bucket.params[0].device, non_blocking=True)
    for i, value in measured.items():
        numbers[i].copy_(value)
    experts = None if bucket.experts is None else [bucket.experts_of(i) for i in range(len(bucket.params))]
    found = factors(rule, bucket, lambda number, known: sums[number](numbers, known, experts, *lists))
    call(numbers, bucket.skip, found, bucket.firsts, experts, *lists)
    return []
