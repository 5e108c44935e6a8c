"""The rule compiled, one pass over memory: generated C++ on a CPU, torch.compile (Triton) elsewhere.

Rates and step-dependent numbers travel as data, so a schedule never recompiles. On a GPU the whole list is one graph
with fixed shapes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_opt.kernels import cpp, foreach, native
from lightning_opt.kernels.device import can_compile
from lightning_opt.kernels.rule import Bucket, Rule, apply, kept, scratch, wide

log = logging.getLogger("lightning_opt.kernels")

_broken: dict[tuple[str, tuple[torch.dtype, ...]], str] = {}  # (rule, dtypes): why


def possible(rule: Rule, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether this rule can be compiled for a device and dtypes, and with what, or why not.

    On a CPU it is compiled to find out, once per process; on a GPU the first step tells.
    """
    can, what = can_compile(device.type)
    if can and device.type == "cpu":
        if not cpp.possible(dtypes):
            return False, "the C++ loop takes float32, float64 and bfloat16"
        if (rule.name, dtypes) not in _broken:
            try:
                native.prepare(rule, dtypes)
            except native.CannotCompile as error:
                _give_up(rule, dtypes, error)
    why = _broken.get((rule.name, dtypes))
    return (can, what) if why is None else (False, f"compiling failed: {why}")


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place; falls back to foreach, and says so once, where compiling fails."""
    dtypes = bucket.dtypes
    on_cpu = bucket.params[0].device.type == "cpu"
    if (rule.name, dtypes) not in _broken and not (on_cpu and bucket.skip is not None):  # no mask in the C++ loop
        how = native.run if on_cpu else _run_graph
        try:
            left = how(rule, bucket)
        except (native.CannotCompile, torch._dynamo.exc.BackendCompilerFailed) as error:  # nothing was touched
            _give_up(rule, dtypes, error)
        else:
            bucket = bucket.part(left)
    if bucket.params:
        foreach.run(rule, bucket)


def _give_up(rule: Rule, dtypes: tuple[torch.dtype, ...], error: Exception) -> None:
    why = _broken[rule.name, dtypes] = " ".join(str(error).splitlines()[:2]) or type(error).__name__
    log.warning("compiling %s failed, torch's kernels run instead: %s", rule.name, why)


def _graph(rule: Rule, names: tuple[str, ...], l2: bool) -> Callable[..., None]:
    """The function to compile: lists in, written in place; `numbers` holds shrink, l2 and the scalars in order."""

    def update_all(
        numbers: Tensor, skip: Tensor | None, params: list[Tensor], grads: list[Tensor], *states: list[Tensor]
    ) -> None:
        shrink, coupled, *scalars = numbers.to(wide(params[0]).dtype).unbind()
        named = dict(zip(names, scalars, strict=True))
        for p, g, *state in zip(params, grads, *states, strict=True):
            stored = (p, *state)
            computed = [scratch(tensor, skip) for tensor in stored]
            apply(rule, computed[0], wide(g), computed[1:], shrink, coupled if l2 else None, named)
            for old, new in zip(stored, computed, strict=True):
                if new is not old:
                    old.copy_(kept(old, new, skip))

    # Dynamo keeps compiled code per code object, 8 kinds at most, and runs eager in silence beyond: one object each.
    update_all.__code__ = update_all.__code__.replace(co_name=f"update_{rule.name}")
    return update_all


@functools.cache
def _compiled(
    rule: Rule, names: tuple[str, ...], l2: bool, masked: bool, dtypes: tuple[torch.dtype, ...]
) -> Callable[..., None]:
    """One compiled function per kind of bucket, each with a cache of its own, so that none hits the recompile limit."""
    return torch.compile(_graph(rule, names, l2), dynamic=False)


def _run_graph(rule: Rule, bucket: Bucket) -> list[int]:
    """The whole list as one graph; leaves nothing."""
    lists = (bucket.params, bucket.grads, *bucket.states)
    call = _compiled(rule, tuple(bucket.scalars), bucket.l2 is not None, bucket.skip is not None, bucket.dtypes)
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    numbers = torch.tensor([shrink, bucket.l2 or 0.0, *bucket.scalars.values()], dtype=torch.float64)
    call(numbers.to(bucket.params[0].device, non_blocking=True), bucket.skip, *lists)
    return []
