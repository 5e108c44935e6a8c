"""Tensor by tensor, op by op: the plainest way, and the yardstick of all others."""

from __future__ import annotations

from torch import Tensor

from lightning_opt.kernels.measuring import aligned, by_tensor, factors, shaped
from lightning_opt.kernels.rule import Bucket, Rule, apply, kept, scratch, wide


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place. Temporaries: one to three times the largest tensor."""
    found = factors(rule, bucket, by_tensor(rule, bucket))
    for i, (p, g, *states) in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
        stored = (p, *states)
        computed = [shaped(rule, bucket, i, scratch(tensor, bucket.skip)) for tensor in stored]
        named = [aligned(column[i], computed[0]) for column in found]
        g = shaped(rule, bucket, i, wide(g))
        apply(rule, bucket.variant, computed[0], g, computed[1:], bucket.shrink, bucket.l2, bucket.scalars, named)
        for old, new in zip(stored, computed, strict=True):
            write_back(old, new, bucket.skip)


def write_back(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Writes the computed tensor over the stored one, unless it was computed in place."""
    if new.data_ptr() != old.data_ptr() or new.dtype != old.dtype:
        old.copy_(kept(old, new.reshape(old.shape), skip))
