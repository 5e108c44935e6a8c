"""Tensor by tensor, op by op: the plainest way, and the yardstick of all others."""

from __future__ import annotations

from lightning_opt.kernels.rule import Bucket, Rule, apply, wide


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place. Temporaries: a few times the largest tensor."""
    for p, g, *state in zip(bucket.params, bucket.grads, *bucket.states, strict=True):
        widened = tuple(wide(s) for s in state)
        new = apply(rule, wide(p), wide(g), widened, bucket.shrink, bucket.l2, bucket.scalars)
        for old, value in zip((p, *state), new, strict=True):
            old.copy_(value)
