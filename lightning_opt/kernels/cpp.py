"""From a rule to C++: running the rule once on `Code` objects writes down what it computes.

The rule's Python stays the only source of the maths; here is only how each torch function it may use is spelled in
C++, and one loop around it that takes a whole list of tensors in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels.rule import Rule, Variant, apply, measures, summand
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

// What `apply` does to a stretch of one tensor, and what it first sums up over it.
@FUNCTIONS@

template <class F> static void walk(int64_t count, const int64_t* starts, int threads, F visit) {
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
      const int64_t end = to < starts[tensor + 1] ? to : starts[tensor + 1];
      visit(b, tensor, from - starts[tensor], end - from);
      from = end;
    }
  }
}

extern "C" void update(int64_t count, const int64_t* starts, void* const* at, const double* numbers,
                       const double* const* factors, int threads) {
  walk(count, starts, threads, [=](int64_t, int64_t tensor, int64_t i, int64_t n) {
    run(@POINTERS@, numbers, factors, tensor, n);
  });
}
@SUMS@
"""

# Stretches of one block and tensor each have a place of their own in `partial`, so the sum does not depend on which
# thread was where.
_SUM = """
extern "C" void sum@K@(int64_t count, const int64_t* starts, void* const* at, const double* numbers,
                     const double* const* factors, int threads, double* partial, double* totals) {
  walk(count, starts, threads, [=](int64_t b, int64_t tensor, int64_t i, int64_t n) {
    partial[b + tensor] = add@K@(@POINTERS@, numbers, factors, tensor, n);
  });
  const int64_t block = 1 << 16;
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    totals[tensor] = 0;
    for (int64_t b = starts[tensor] / block; b * block < starts[tensor + 1]; ++b)
      if (starts[tensor] < starts[tensor + 1]) totals[tensor] += partial[b + tensor];
  }
}
"""

_RUN = """
static void run(@STREAMS@, const double* numbers, const double* const* factors, int64_t tensor, int64_t n) {
@NUMBERS@
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
@BODY@
  }
}
"""

_ADD = """
static double add@K@(@STREAMS@, const double* numbers, const double* const* factors, int64_t tensor, int64_t n) {
@NUMBERS@
  double total = 0;
  for (int64_t part = 0; part < n; part += 1024) {  // short sums in T, which a double then adds up
    const int64_t end = n < part + 1024 ? n : part + 1024;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = part; i < end; ++i) {
@BODY@
    }
    total += sum;
  }
  return total;
}
"""


def possible(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether there is C++ for weights, gradients and states of these dtypes."""
    return all(dtype in _TYPES for dtype in dtypes)


def source(rule: Rule, names: tuple[str, ...], variant: Variant, dtypes: tuple[torch.dtype, ...]) -> str:
    """C++ of ``update(count, starts, at, numbers, factors, threads)`` and of ``sum0``, ``sum1``, ... for `measures`.

    Args:
        rule: an elementwise rule.
        names: of its scalars; `numbers` holds shrink, l2 and these, in order.
        variant: see `Variant`.
        dtypes: of weight, gradient and each state; `at` holds their addresses, tensor after tensor, and `starts` where
            each begins when all are laid end to end (one more entry than tensors). `factors` holds an address for each
            measurement, with one number per tensor there.

    Raises:
        NotInCpp: where the rule uses what has no spelling here.
    """
    types = [_TYPES[dtype] for dtype in dtypes]
    found = range(len(measures(rule, variant)))
    const = lambda k: "const " if k == 1 else ""  # noqa: E731
    every = list(enumerate(types))
    numbers = [f"  const double {n} = numbers[{k}];" for k, n in enumerate(("shrink", "l2", *names))]
    shared = {
        "T": "double" if torch.float64 in dtypes else "float",
        "STREAMS": ", ".join(f"{const(k)}{kind}* __restrict s{k}" for k, kind in every),
        "POINTERS": ", ".join(f"({const(k)}{kind}*)at[{len(types)} * tensor + {k}] + i" for k, kind in every),
    }
    functions = [_filled(_RUN, _traced(rule, names, variant, len(types), None), numbers, found)]
    functions += [_filled(_ADD, _traced(rule, names, variant, len(types), k), numbers, found[:k], k) for k in found]
    sums = [_SUM.replace("@K@", str(k)) for k in found]
    text = _SOURCE.replace("@FUNCTIONS@", "".join(functions)).replace("@SUMS@", "".join(sums))
    for key, value in shared.items():
        text = text.replace(f"@{key}@", value)
    return text


def _filled(template: str, body: list[str], numbers: list[str], known: range, number: int = 0) -> str:
    lines = [*numbers, *(f"  const double factor{k} = factors[{k}][tensor];" for k in known)]
    statements = "\n".join(f"    {line}" for line in body)
    return template.replace("@NUMBERS@", "\n".join(lines)).replace("@BODY@", statements).replace("@K@", str(number))


def _traced(rule: Rule, names: tuple[str, ...], variant: Variant, streams: int, number: int | None) -> list[str]:
    """The statements for one element: of the update (`number` None), or of the summand of a measurement."""
    lines: list[str] = []
    p, g, *states = (Code(f"v{k}", lines, True) for k in range(streams))
    shrink, l2, *scalars = (Code(name, lines, False) for name in ("shrink", "l2", *names))
    named = dict(zip(names, scalars, strict=True))
    known = len(measures(rule, variant)) if number is None else number
    factors = [Code(f"factor{k}", lines, False) for k in range(known)]
    loads = [f"T v{k} = s{k}[i];" for k in range(streams)]
    if number is None:
        apply(rule, variant, p, g, states, shrink, l2, named, factors)
        return [*loads, *lines, *(f"s{k}[i] = v{k};" for k in range(streams) if k != 1)]
    result = summand(rule, variant, number, p, g, states, l2, named, factors)
    return [*loads, *lines, f"sum += {result.name};"]
