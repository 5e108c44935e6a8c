"""Rules that see whole matrices: they return their steps, and here decay, caution and rounding are applied to them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_opt.kernels.eager import write_back
from lightning_opt.kernels.rule import Bucket, Rule, scratch, wide


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place.

    Of sharded weights the rule sees the whole matrices and every rank works out the whole step, then writes its shard.
    """
    assert rule.whole is not None
    if bucket.l2 is not None:
        bucket.grads = [wide(g) + bucket.l2 * wide(p) for p, g in zip(bucket.params, bucket.grads, strict=True)]
    for p, g, step in zip(bucket.params, bucket.grads, rule.whole(bucket), strict=True):
        new = scratch(p, bucket.skip)
        if bucket.cautious:
            step = _cautious(step, wide(g))
        if bucket.variant.cautious_decay:
            new.copy_(torch.where(step * new < 0, new, new * bucket.shrink))
        elif bucket.shrink is not None:
            new.mul_(bucket.shrink)
        new.sub_(step)
        write_back(p, new, bucket.skip)


def _cautious(step: Tensor, g: Tensor) -> Tensor:
    agrees = step * g > 0
    return torch.where(agrees, step / agrees.to(step.dtype).mean().clamp(min=1e-3), 0.0)
