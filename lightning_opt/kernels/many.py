"""`Many`: a list of tensors that behaves like one tensor, so a rule for one runs through torch's foreach ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels.tensor_like import TensorLike


class Many(TensorLike):
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
    def _call(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Many:
        name = func.__name__
        foreach = getattr(torch, f"_foreach_{name}", None)
        if foreach is None or not isinstance(args[0], Many) or kwargs:
            result = _one_by_one(func, args, kwargs)
        else:
            try:
                result = Many(foreach(*[arg.tensors if isinstance(arg, Many) else arg for arg in args]) or [])
            except TypeError:  # torch has this foreach op, but not for these argument types
                result = _one_by_one(func, args, kwargs)
        return args[0] if name.endswith("_") and not name.endswith("__") else result


def _one_by_one(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Many:
    count = next(len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Many))
    pick = lambda arg, i: arg.tensors[i] if isinstance(arg, Many) else arg  # noqa: E731
    return Many(
        [func(*[pick(arg, i) for arg in args], **{k: pick(v, i) for k, v in kwargs.items()}) for i in range(count)]
    )
