"""Experts of a stack that go each their own way through a step: how a number per expert meets what is stored."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(column: Tensor, like: Tensor) -> Tensor:
    """One number per expert, to be multiplied with or to mask what is stored expert after expert.

    Args:
        column: (E,), or what lines up already: a single number, or of the shape of `like`.
        like: its first dimension holds equally many entries of each expert: weights, rows of them, factors, scales.
    """
    if column.ndim != 1:
        return column
    if len(like) != len(column):
        column = column.repeat_interleave(len(like) // len(column))
    return column.reshape(len(column), *[1] * (like.ndim - 1))


def kept(old: Tensor, new: Tensor, skip: Tensor | None) -> Tensor:
    """What to write over `old`: the new values, or the old ones where the update is skipped.

    Args:
        old: what is stored.
        new: what was computed.
        skip: bool, as `spread` takes it; None: nothing stays.
    """
    return new if skip is None else torch.where(spread(skip, old), old, new.to(old.dtype))
