"""`Many`: a list of tensors that behaves like one tensor, so a rule for one runs through torch's foreach ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Many:
    """A list of tensors under the arithmetic of one.

    ``a * b``, ``2 * a``, ``torch.sqrt(a)`` and every other torch function work element by element of the list: through
    ``torch._foreach_*`` where torch has it for these arguments, else tensor by tensor. Results are new `Many`, but for
    in-place methods (``a.mul_(2)``), which write into the tensors.

    Args:
        tensors: the list; `Many` objects in one expression must be equally long.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Where `torch.sqrt(many)` and the like arrive."""
        kwargs = kwargs or {}
        foreach = getattr(torch, f"_foreach_{func.__name__}", None)
        if foreach is not None and isinstance(args[0], Many) and not kwargs:
            return _foreach(foreach, func, args)
        return _one_by_one(func, args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Many]:
        """Tensor methods, ``mul_`` and the like: in place on every tensor, returning this list."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)

        def method(*args: Any) -> Many:
            foreach = getattr(torch, f"_foreach_{name}", None)
            single = getattr(Tensor, name)
            result = _foreach(foreach, single, (self, *args)) if foreach else _one_by_one(single, (self, *args), {})
            return self if name.endswith("_") else result

        return method

    def __add__(self, other: Any) -> Many:
        return _foreach(torch._foreach_add, torch.add, (self, other))

    def __mul__(self, other: Any) -> Many:
        return _foreach(torch._foreach_mul, torch.mul, (self, other))

    def __sub__(self, other: Any) -> Many:
        return _foreach(torch._foreach_sub, torch.sub, (self, other))

    def __truediv__(self, other: Any) -> Many:
        return _foreach(torch._foreach_div, torch.div, (self, other))

    def __neg__(self) -> Many:
        return _foreach(torch._foreach_neg, torch.neg, (self,))

    def __pow__(self, exponent: float) -> Many:
        return _foreach(torch._foreach_pow, torch.pow, (self, exponent))

    def __rsub__(self, other: Any) -> Many:
        return _one_by_one(torch.rsub, (self, other), {})

    def __rtruediv__(self, other: Any) -> Many:
        return _one_by_one(lambda tensor, number: number / tensor, (self, other), {})

    def __gt__(self, other: Any) -> Many:
        return _one_by_one(torch.gt, (self, other), {})

    def __lt__(self, other: Any) -> Many:
        return _one_by_one(torch.lt, (self, other), {})

    __radd__ = __add__
    __rmul__ = __mul__


def _foreach(foreach: Callable[..., list[Tensor]], single: Callable[..., Tensor], args: tuple[Any, ...]) -> Many:
    try:
        return Many(foreach(*[arg.tensors if isinstance(arg, Many) else arg for arg in args]) or [])
    except TypeError:  # torch has this foreach op, but not for these argument types
        return _one_by_one(single, args, {})


def _one_by_one(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Many:
    count = next(len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Many))
    pick = lambda arg, i: arg.tensors[i] if isinstance(arg, Many) else arg  # noqa: E731
    return Many(
        [func(*[pick(arg, i) for arg in args], **{k: pick(v, i) for k, v in kwargs.items()}) for i in range(count)]
    )
