"""Lists of tensors through torch's foreach ops: few kernel launches without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_opt.kernels.many import Many
from lightning_opt.kernels.rule import Bucket, Rule, apply, wide

# Temporaries are several times the list. Slices bound them; on a GPU they must be long enough to fill the machine.
_SLICE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


def _slices(params: list[Tensor]) -> Iterator[list[int]]:
    """Indices of consecutive tensors of together at most one slice; a larger tensor gets a slice of its own."""
    limit = _SLICE_ELEMENTS.get(params[0].device.type, 1 << 24)
    current: list[int] = []
    held = 0
    for i, p in enumerate(params):
        if current and held + p.numel() > limit:
            yield current
            current, held = [], 0
        current.append(i)
        held += p.numel()
    if current:
        yield current


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place."""
    for indices in _slices(bucket.params):
        part = bucket.part(indices)
        p, g, *state = (Many([wide(t) for t in tensors]) for tensors in (part.params, part.grads, *part.states))
        new = apply(rule, p, g, tuple(state), part.shrink, part.l2, part.scalars)
        for old, value in zip((part.params, *part.states), new, strict=True):
            torch._foreach_copy_(old, value.tensors)
