"""What a rule must know of a whole tensor first: the sums, and the factors it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_opt.kernels.rule import Bucket, Measure, Rule, kept, measures, scratch, summand, wide

Factors = list[list[Tensor]]  # one list per measurement, in it one tensor per weight with one number per block
Totals = Callable[[int, Factors], Sequence[Tensor]]


def factors(rule: Rule, bucket: Bucket, totals: Totals) -> Factors:
    """Every measurement in turn.

    Args:
        rule: the rule.
        bucket: its tensors; block states are written.
        totals: ``totals(number, factors so far)``: the sums of measurement `number`, as in `Factors`.
    """
    found: Factors = []
    for number, measure in enumerate(measures(rule, bucket.variant)):
        found.append(_factors(measure, bucket, totals(number, found)))
    return found


def _factors(measure: Measure, bucket: Bucket, sums: Sequence[Tensor]) -> list[Tensor]:
    if measure.block is None:
        total = torch.cat([s.reshape(1) for s in sums])
        total = total if bucket.reduce is None else bucket.reduce(total)
        count = torch.tensor(bucket.counts or [p.numel() for p in bucket.params], dtype=total.dtype)
        return list(measure.factor(total, count.to(total.device), **bucket.scalars).split(1))
    made = []
    for i, total in enumerate(sums):
        old = [column[i] for column in bucket.block_states]
        new = [scratch(state, bucket.skip) for state in old]
        count = torch.full_like(total, max(1, bucket.params[i].numel() // max(1, total.numel())))
        made.append(measure.factor(total, count, *new, **bucket.scalars))
        for before, after in zip(old, new, strict=True):
            if after is not before:
                before.copy_(kept(before, after, bucket.skip))
    return made


def blocks(rule: Rule, bucket: Bucket, index: int) -> int:
    """Number of blocks of one weight; 1 where the rule measures whole tensors or nothing."""
    if rule.measure is None or rule.measure.block is None:
        return 1
    p = bucket.params[index]
    size = rule.measure.block(p, bucket.layouts[index] if bucket.layouts else {})
    return max(1, p.numel() // max(1, size))


def by_tensor(rule: Rule, bucket: Bucket) -> Totals:
    """The sums, tensor by tensor with torch's ops."""

    def totals(number: int, found: Factors) -> list[Tensor]:
        sums = []
        for i, row in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
            p, g, *states = (wide(t) for t in row)
            states = [t.clone() if t is old else t for t, old in zip(states, row[2:], strict=True)]
            named = [column[i].reshape(()) for column in found]
            x = summand(rule, bucket.variant, number, p, g, states, bucket.l2, bucket.scalars, named)
            sums.append(x.reshape(blocks(rule, bucket, i), -1).sum(1, dtype=p.dtype))
        return sums

    return totals


def shaped(rule: Rule, bucket: Bucket, index: int, tensor: Tensor) -> Tensor:
    """The tensor with one row per block, so that one factor per block lines up with it; whole ones as they are."""
    if rule.measure is None or rule.measure.block is None:
        return tensor
    return tensor.reshape(blocks(rule, bucket, index), -1)


def aligned(factor: Tensor, tensor: Tensor) -> Tensor:
    """A weight's factors, to be multiplied with what `shaped` returned."""
    return factor.reshape(()) if factor.numel() == 1 else factor.unsqueeze(1)
