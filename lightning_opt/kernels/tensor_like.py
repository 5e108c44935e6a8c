"""What computes like a tensor without being one, so that one rule serves for lists of tensors and for C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TensorLike:
    """Operators, torch functions and tensor methods, which all end in `_call`; a subclass says what that does."""

    __slots__ = ()

    @classmethod
    def _call(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carries out one torch function or tensor method; some of `args` are objects of this class."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Where `torch.sqrt(x)` and the like arrive."""
        return cls._call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Tensor methods, ``mul_`` and the like."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(getattr(Tensor, name), (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return self._call(torch.add, (self, other), {})

    def __mul__(self, other: Any) -> Any:
        return self._call(torch.mul, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return self._call(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return self._call(torch.rsub, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return self._call(torch.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Any:
        return self._call(Tensor.__rtruediv__, (self, other), {})

    def __neg__(self) -> Any:
        return self._call(torch.neg, (self,), {})

    def __pow__(self, exponent: float) -> Any:
        return self._call(torch.pow, (self, exponent), {})

    def __gt__(self, other: Any) -> Any:
        return self._call(torch.gt, (self, other), {})

    def __lt__(self, other: Any) -> Any:
        return self._call(torch.lt, (self, other), {})

    __radd__ = __add__
    __rmul__ = __mul__
