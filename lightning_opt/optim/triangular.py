"""Products of triangular and symmetric matrices without what is known beforehand: zeros, and what mirrors the rest.

Each is cut in halves until a half is small: after two cuts 5/8 are left of a product with a triangular matrix and of
one of a matrix with its own transpose, 11/32 of one of two triangular matrices. BLAS has routines of that kind (trmm,
syrk), torch does not. On a GPU, where small products cost more than what they save, products stay whole.

Tensors are batches ``[number, rows, columns]``, triangular ones upper.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 128  # side of a half: below, the calls cost more than the arithmetic


def times_upper(rows: Tensor, q: Tensor) -> Tensor:
    """``rows @ q``; rows ``[b, m, n]``, q ``[b, n, n]``."""
    return rows @ q if _stays_whole(q) else _rows(rows.new_empty(rows.shape), rows, q, upper=True)


def times_lower(rows: Tensor, q: Tensor) -> Tensor:
    """``rows @ q.mT``; rows ``[b, m, n]``, q ``[b, n, n]``, upper too."""
    return rows @ q.mT if _stays_whole(q) else _rows(rows.new_empty(rows.shape), rows, q, upper=False)


def upper_times_upper(u: Tensor, q: Tensor) -> Tensor:
    """``u @ q``, upper again; both ``[b, n, n]``."""
    return u @ q if _stays_whole(q) else _both(torch.zeros_like(q), u, q)


def gram(a: Tensor) -> Tensor:
    """``a @ a.mT`` of a ``[b, n, m]``."""
    return average_gram_(a.new_empty(*a.shape[:-1], a.shape[-2]), a, 1.0)


def average_gram_(average: Tensor, a: Tensor, new: float) -> Tensor:
    """Moves a symmetric matrix ``[b, n, n]`` by the share `new` towards ``a @ a.mT``, in place, and returns it."""
    if _stays_whole(a):
        return average.baddbmm_(a, a.mT, beta=1 - new, alpha=new)
    return _gram(average, a, new)


def _stays_whole(q: Tensor) -> bool:
    return q.is_cuda or q.shape[-2] < 2 * _SMALLEST


def _rows(out: Tensor, rows: Tensor, q: Tensor, upper: bool) -> Tensor:
    n = q.shape[-1]
    if n < 2 * _SMALLEST:
        return out.baddbmm_(rows, q if upper else q.mT, beta=0)
    first, last = slice(None, n // 2), slice(n // 2, None)
    for part in (first, last):
        _rows(out[..., part], rows[..., part], q[..., part, part], upper)
    corner = q[..., first, last]
    if upper:
        out[..., last].baddbmm_(rows[..., first], corner)
    else:
        out[..., first].baddbmm_(rows[..., last], corner.mT)
    return out


def _both(out: Tensor, u: Tensor, q: Tensor) -> Tensor:
    n = q.shape[-1]
    if n < 2 * _SMALLEST:
        return out.baddbmm_(u, q, beta=0)
    first, last = slice(None, n // 2), slice(n // 2, None)
    for part in (first, last):
        _both(out[..., part, part], u[..., part, part], q[..., part, part])
    corner = out[..., first, last]
    _rows(corner, u[..., first, last], q[..., last, last], upper=True)
    corner.baddbmm_(u[..., first, first], q[..., first, last])
    return out


def _gram(out: Tensor, a: Tensor, new: float) -> Tensor:
    n = a.shape[-2]
    if n < 2 * _SMALLEST:
        return out.baddbmm_(a, a.mT, beta=1 - new, alpha=new)
    first, last = slice(None, n // 2), slice(n // 2, None)
    for part in (first, last):
        _gram(out[..., part, part], a[..., part, :], new)
    corner = out[..., first, last]
    corner.baddbmm_(a[..., first, :], a[..., last, :].mT, beta=1 - new, alpha=new)
    out[..., last, first].copy_(corner.mT)
    return out
