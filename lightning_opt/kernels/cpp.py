"""From a rule to C++: running the rule once on `Code` objects writes down what it computes.

The rule's Python stays the only source of the maths; here is only how each torch function it may use is spelled in
C++, and one loop around it that takes a whole list of tensors in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels.rule import Rule, apply
from lightning_opt.kernels.tensor_like import TensorLike


class NotInCpp(Exception):
    """The rule uses something that `Code` cannot spell."""


# {0}, {1}, ... are the arguments, all of one C++ type. Spelled as torch computes them, NaN included.
_SPELLING = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "__rdiv__": "(1 / {0}) * {1}",
    "neg": "-{0}",
    "reciprocal": "1 / {0}",
    "square": "{0} * {0}",
    "pow": "std::pow({0}, {1})",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "exp": "std::exp({0})",
    "log": "std::log({0})",
    "tanh": "std::tanh({0})",
    "abs": "std::abs({0})",
    "sign": "sign({0})",
    "copysign": "std::copysign({0}, {1})",
    "lerp": "lerp({0}, {1}, {2})",
    "addcmul": "{0} + {1} * {2}",
    "addcdiv": "{0} + {1} / {2}",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "clamp": "smaller(larger({0}, {1}), {2})",
    "where": "{0} ? {1} : {2}",
    "gt": "{0} > {1}",
    "lt": "{0} < {1}",
    "copy": "{1}",
    "zero": "0",
}


class Code(TensorLike):
    """A C++ variable; computing with it appends statements to `lines`.

    Args:
        name: of the variable.
        lines: statements so far, shared by all variables of one function.
        element: it differs from element to element; else it is a double that is the same for all.
    """

    __slots__ = ("element", "lines", "name")

    def __init__(self, name: str, lines: list[str], element: bool) -> None:
        self.name, self.lines, self.element = name, lines, element

    @classmethod
    def _call(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Code:
        name = func.__name__
        writes = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if writes else name
        if name == "clamp":
            bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
            infinite = (("min", "-INFINITY"), ("max", "INFINITY"))
            args, kwargs = (
                (args[0], *(infinity if bounds.get(k) is None else bounds[k] for k, infinity in infinite)),
                {},
            )
        if func is Tensor.where:
            args = (args[1], args[0], *args[2:])
        if name not in _SPELLING or kwargs:
            raise NotInCpp(f"{name}{f' with {next(iter(kwargs))}' if kwargs else ''}")
        some = [arg for arg in args if isinstance(arg, Code)]
        element = any(arg.element for arg in some)
        text = _SPELLING[name].format(*(_operand(arg, element) for arg in args))
        if writes:
            args[0].lines.append(f"{args[0].name} = {text};")
            return args[0]
        result = Code(f"x{len(some[0].lines)}", some[0].lines, element)
        result.lines.append(f"auto {result.name} = {text};")
        return result


def _operand(arg: Any, element: bool) -> str:
    if isinstance(arg, Code):
        return arg.name if arg.element or not element else f"T({arg.name})"
    if not isinstance(arg, (int, float, str)):
        raise NotInCpp(f"an argument of type {type(arg).__name__}")
    return f"T({arg})" if element else f"double({arg})"


_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}

# The list is one long row cut into blocks that threads take as they come free: small tensors cost no call of their own,
# and a thread that was held up does not hold up the others.
_SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
  uint16_t bits;
  operator float() const { uint32_t wide = uint32_t(bits) << 16; float x; memcpy(&x, &wide, 4); return x; }
  bfloat16& operator=(float x) {
    uint32_t wide; memcpy(&wide, &x, 4);
    bits = x != x ? 0x7FC0 : uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
    return *this;
  }
};

using T = @T@;
template <class V> inline V sign(V a) { return V((a > 0) - (a < 0)); }
template <class V> inline V lerp(V a, V b, V w) {
  return std::abs(w) < V(0.5) ? a + w * (b - a) : b - (b - a) * (1 - w);
}
template <class V> inline V larger(V a, V b) { return a > b || a != a ? a : b; }
template <class V> inline V smaller(V a, V b) { return a < b || a != a ? a : b; }

static void run(@STREAMS@, const double* numbers, int64_t n) {
@NUMBERS@
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
@BODY@
  }
}

extern "C" void update(int64_t count, const int64_t* starts, void* const* at, const double* numbers, int threads) {
  const int64_t block = 1 << 16, total = starts[count], blocks = (total + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(blocks < threads ? int(blocks) : threads)
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t from = b * block, tensor = 0, beyond = count;
    const int64_t to = total < from + block ? total : from + block;
    while (beyond - tensor > 1) {
      const int64_t middle = (tensor + beyond) / 2;
      (starts[middle] <= from ? tensor : beyond) = middle;
    }
    for (; from < to; ++tensor) {
      const int64_t end = to < starts[tensor + 1] ? to : starts[tensor + 1], i = from - starts[tensor];
      run(@POINTERS@, numbers, end - from);
      from = end;
    }
  }
}
"""


def possible(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether there is C++ for weights, gradients and states of these dtypes."""
    return all(dtype in _TYPES for dtype in dtypes)


def source(rule: Rule, names: tuple[str, ...], l2: bool, dtypes: tuple[torch.dtype, ...]) -> str:
    """C++ of ``update(count, starts, at, numbers, threads)``.

    Args:
        rule: an elementwise rule.
        names: of its scalars; `numbers` holds shrink, l2 and these, in order.
        l2: whether l2 times the weight joins the gradient.
        dtypes: of weight, gradient and each state; `at` holds their addresses, tensor after tensor, and `starts` where
            each begins when all are laid end to end (one more entry than tensors).

    Raises:
        NotInCpp: where the rule uses what has no spelling here.
    """
    types = [_TYPES[dtype] for dtype in dtypes]
    lines: list[str] = []
    p, g, *states = (Code(f"v{k}", lines, True) for k in range(len(types)))
    shrink, coupled, *scalars = (Code(name, lines, False) for name in ("shrink", "l2", *names))
    apply(rule, p, g, states, shrink, coupled if l2 else None, dict(zip(names, scalars, strict=True)))
    every = range(len(types))
    body = [*(f"T v{k} = s{k}[i];" for k in every), *lines, *(f"s{k}[i] = v{k};" for k in every if k != 1)]
    const = lambda k: "const " if k == 1 else ""  # noqa: E731
    filled = {
        "T": "double" if torch.float64 in dtypes else "float",
        "STREAMS": ", ".join(f"{const(k)}{kind}* __restrict s{k}" for k, kind in enumerate(types)),
        "POINTERS": ", ".join(
            f"({const(k)}{kind}*)at[{len(types)} * tensor + {k}] + i" for k, kind in enumerate(types)
        ),
        "NUMBERS": "\n".join(f"  const double {n} = numbers[{k}];" for k, n in enumerate(("shrink", "l2", *names))),
        "BODY": "\n".join(f"    {line}" for line in body),
    }
    text = _SOURCE
    for key, value in filled.items():
        text = text.replace(f"@{key}@", value)
    return text
