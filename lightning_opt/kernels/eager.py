"""Tensor by tensor, op by op: the plainest way, and the yardstick of all others."""

from __future__ import annotations

from lightning_opt.kernels.rule import Bucket, Rule, apply, kept, scratch, wide


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place. Temporaries: one to three times the largest tensor."""
    for p, g, *states in zip(bucket.params, bucket.grads, *bucket.states, strict=True):
        stored = (p, *states)
        computed = [scratch(tensor, bucket.skip) for tensor in stored]
        apply(rule, computed[0], wide(g), computed[1:], bucket.shrink, bucket.l2, bucket.scalars)
        for old, new in zip(stored, computed, strict=True):
            if new is not old:
                old.copy_(kept(old, new, bucket.skip))
