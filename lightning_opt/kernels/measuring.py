"""What a rule must know of a whole tensor first: the sums, and the factors it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_opt.kernels.rule import Bucket, Measure, Rule, measures, scratch, states_stay, summand, wide, write

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
    sizes = [total.numel() for total in sums]
    total = torch.cat([total.reshape(-1) for total in sums])
    total = total if bucket.reduce is None else bucket.reduce(total)
    elements = [whole.numel() for whole in bucket.wholes or bucket.params]
    counts = [max(1, n // blocks) if blocks else 1 for n, blocks in zip(elements, sizes, strict=True)]
    count = torch.tensor(counts, dtype=total.dtype).repeat_interleave(torch.tensor(sizes))
    count = count.to(total.device, non_blocking=True)
    if measure.block is None:
        return list(measure.factor(total, count, **bucket.scalars).split(sizes))
    made = []
    for i, (mine, number) in enumerate(zip(total.split(sizes), count.split(sizes), strict=True)):
        old = [column[i] for column in bucket.block_states]
        stays = states_stay(bucket.skip, bucket.experts[i] if bucket.experts else None)
        new = [scratch(state, stays) for state in old]
        made.append(measure.factor(mine, number, *new, **bucket.scalars))
        for before, after in zip(old, new, strict=True):
            if after is not before:
                write(before, after, stays)
    return made


def block_size(rule: Rule, bucket: Bucket, index: int) -> int:
    """Elements of one block of a weight; all of them where the rule measures whole tensors or nothing."""
    p = (bucket.wholes or bucket.params)[index]
    if rule.measure is None or rule.measure.block is None:
        return p.numel()
    size = rule.measure.block(p, bucket.layouts[index] if bucket.layouts else {}, bucket.options)
    if p.numel() % max(1, size):
        raise ValueError(f"{rule.name}: blocks of {size} elements do not fill a weight of {tuple(p.shape)}")
    return size


def by_tensor(rule: Rule, bucket: Bucket) -> Totals:
    """The sums, tensor by tensor with torch's ops."""

    def totals(number: int, found: Factors) -> list[Tensor]:
        in_blocks = measures(rule, bucket.variant)[number].block is not None
        sums = []
        for i, row in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
            cut = [shaped(rule, bucket, i, wide(tensor)) for tensor in row]
            p, g, *states = cut
            states = [t.clone() for t in states]
            named = [aligned(rule, bucket, i, column[i]) for column in found]
            l2 = bucket.course(rule, i, p).l2
            x = summand(rule, bucket.variant, number, p, g, states, l2, bucket.scalars, named)
            sums.append(_by_block(rule, bucket, i, x) if in_blocks else x.sum(dtype=p.dtype).reshape(1))
        return sums

    return totals


def _by_block(rule: Rule, bucket: Bucket, index: int, x: Tensor) -> Tensor:
    """The sums over the blocks of what `shaped` returned."""
    if bucket.wholes is None:
        return x.sum(1, dtype=x.dtype)
    size = max(1, block_size(rule, bucket, index))
    sums = x.new_zeros(max(1, bucket.wholes[index].numel() // size))
    return sums.index_add_(0, _places(bucket, index, size, x), x.reshape(-1))


def _places(bucket: Bucket, index: int, size: int, x: Tensor) -> Tensor:
    """To which block of the whole weight each element of a shard belongs."""
    if bucket.firsts is None or bucket.firsts[index] < 0:
        raise ValueError("sums over blocks need weights that are split along their first dimension")
    return (torch.arange(x.numel(), device=x.device) + bucket.firsts[index]) // size


def shaped(rule: Rule, bucket: Bucket, index: int, tensor: Tensor) -> Tensor:
    """The tensor with one row per block, so that one factor per block lines up with it; else, and shards, as it is."""
    if rule.measure is None or rule.measure.block is None or bucket.wholes is not None:
        return tensor
    return tensor.reshape(-1, max(1, block_size(rule, bucket, index)))


def aligned(rule: Rule, bucket: Bucket, index: int, factor: Tensor) -> Tensor:
    """A weight's factors, to be multiplied with what `shaped` returned."""
    if factor.numel() == 1:
        return factor.reshape(())
    if bucket.wholes is None:
        return factor.unsqueeze(1)
    p = bucket.params[index]
    return factor[_places(bucket, index, block_size(rule, bucket, index), p)].reshape(p.shape)
