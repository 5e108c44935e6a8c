"""Tensor by tensor, op by op: the plainest way, and the yardstick of all others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_opt.kernels.measuring import aligned, by_tensor, factors, shaped
from lightning_opt.kernels.quantised import Coded
from lightning_opt.kernels.rule import Bucket, Rule, apply, scratch, wide, write


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place. Temporaries: one to three times the largest tensor."""
    found = factors(rule, bucket, by_tensor(rule, bucket))
    variant = bucket.variant
    for i, (p, g, *states) in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
        stored = (p, *states)
        course = bucket.course(rule, i, shaped(rule, bucket, i, p))
        computed = [shaped(rule, bucket, i, scratch(tensor, course.stays(k))) for k, tensor in enumerate(stored)]
        g = shaped(rule, bucket, i, wide(g))
        named = [aligned(rule, bucket, i, column[i]) for column in found]
        decay, rate = (course.shrink, course.l2), course.rate
        apply(rule, variant, computed[0], g, computed[1:], *decay, bucket.scalars, named, rate)
        for k, (old, new) in enumerate(zip(stored, computed, strict=True)):
            salt = variant.salt(k, old.dtype, bucket.step, bucket.firsts[i] if bucket.firsts else 0)
            write_back(old, new, course.stays(k), salt)


def write_back(old: Tensor | Coded, new: Tensor, skip: Tensor | None, salt: Any = None) -> None:
    """As `write`, unless what was computed lies in the memory of what is stored."""
    if isinstance(old, Coded) or new.dtype != old.dtype or new.data_ptr() != old.data_ptr():
        write(old, new, skip, salt)
