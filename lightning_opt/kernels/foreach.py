"""Lists of tensors through torch's foreach ops: few kernel launches on a GPU, small blocks in long lists on a CPU.

On a CPU large tensors are cut into blocks of 32768 elements, up to which torch's ops stay on one thread: on two busy
cores waking the other costs more than it gains, and temporaries of that size are reused instead of mapped anew.
Measured on 27M parameters against tensor by tensor: 0.8 of the CPU time for Lion, 0.7 for AdamW; on 1M 0.95.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_opt.kernels import eager
from lightning_opt.kernels.experts import kept
from lightning_opt.kernels.many import Many
from lightning_opt.kernels.measuring import by_tensor, factors
from lightning_opt.kernels.quantised import LEVELS
from lightning_opt.kernels.rule import Bucket, Rule, apply, scratch, wide

BLOCK = 1 << 15  # elements; torch's own limit below which a CPU op does not use threads
# Elements of one list. Temporaries are several times that; a GPU wants enough to fill the machine.
_LIST_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}

Row = tuple[Tensor, ...]  # weight, gradient, states, factors


def _cut(row: Row, factors: int) -> Iterator[Row]:
    """Flat views of at most one block; tensors that are strided or small stay whole."""
    tensors, numbers = row[: len(row) - factors], row[len(row) - factors :]
    if row[0].numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([row])
    pieces = zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)
    return ((*piece, *numbers) for piece in pieces)


def _lists(rows: Iterator[Row], limit: int) -> Iterator[list[Row]]:
    """Consecutive rows of together at most `limit` elements; a larger one comes alone."""
    current: list[Row] = []
    held = 0
    for row in rows:
        size = row[0].numel()
        if current and held + size > limit:
            yield current
            current, held = [], 0
        current.append(row)
        held += size
    if current:
        yield current


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place; what has blocks, is rounded by chance, or is stacks of experts that go each its
    own way (large tensors, so that launching counts for nothing), is eager's.
    """
    in_blocks = rule.measure is not None and rule.measure.block is not None
    variant, dtypes = bucket.variant, bucket.dtypes
    by_chance = variant.random_weights or variant.random_states
    if in_blocks or by_chance or variant.experts or any(dtype in LEVELS for dtype in dtypes):
        eager.run(rule, bucket)
        return
    device = bucket.params[0].device.type
    found = [[factor.reshape(()) for factor in column] for column in factors(rule, bucket, by_tensor(rule, bucket))]
    rows: Iterator[Row] = zip(bucket.params, bucket.grads, *bucket.states, *found, strict=True)
    if device == "cpu":
        rows = (piece for row in rows for piece in _cut(row, len(found)))
    for part in _lists(rows, _LIST_ELEMENTS.get(device, 1 << 24)):
        params, grads, *rest = (list(column) for column in zip(*part, strict=True))
        stored = (params, *rest[: len(bucket.states)])
        computed = [Many([scratch(t, bucket.skip) for t in tensors]) for tensors in stored]
        g = Many([wide(t) for t in grads])
        named = [Many(column) for column in rest[len(bucket.states) :]]
        apply(rule, variant, computed[0], g, computed[1:], bucket.shrink, bucket.l2, bucket.scalars, named)
        for old, new in zip(stored, computed, strict=True):
            if new.tensors[0] is not old[0]:
                torch._foreach_copy_(old, [kept(*pair, bucket.skip) for pair in zip(old, new.tensors, strict=True)])
