"""From a rule to C++: running the rule once on `Code` objects writes down what it computes.

The rule's Python stays the only source of the maths; here is only how each torch function it may use is spelled in
C++, and one loop around it that takes a whole list of tensors in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import cpp_text
from lightning_opt.kernels.quantised import BLOCK, LEVELS, TINY
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
    "clamp": "clamp({0}, {1}, {2})",
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


_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
}


# What an expert has of its own: rate, shrink, l2, whether its states stay, and its first element in the weight.
EXPERT_COLUMNS = 5


def possible(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether there is C++ for weights, gradients and states of these dtypes."""
    return all(dtype in _TYPES for dtype in dtypes)


def source(rule: Rule, names: tuple[str, ...], variant: Variant, dtypes: tuple[torch.dtype, ...]) -> str:
    """C++ of ``update(count, starts, at, numbers, factors, threads)`` and of ``sum0``, ``sum1``, ... for `measures`.

    Args:
        rule: an elementwise rule.
        names: of its scalars; `numbers` holds shrink, l2, the step and these, in order.
        variant: see `Variant`.
        dtypes: of weight, gradient and each state; `at` holds their addresses, tensor after tensor, and `starts` where
            each begins when all are laid end to end (one more entry than tensors). Where states are in codes, a
            tensor's addresses are followed by those of the scales of each such state and its number of elements, and
            `starts` leaves it room for whole blocks. `factors` holds an address for each measurement, with one number
            per tensor there; where experts go each their own way, before these `EXPERT_COLUMNS` more.

    Raises:
        NotInCpp: where the rule uses what has no spelling here.
    """
    streams = _Streams(rule, names, variant, dtypes)
    found = range(len(measures(rule, variant)))
    functions = [streams.filled(cpp_text.RUN_CODED if streams.coded else cpp_text.RUN, None, found)]
    functions += [streams.filled(cpp_text.ADD, k, found[:k]) for k in found]
    sums = [cpp_text.SUM.replace("@K@", str(k)) for k in found]
    text = cpp_text.SOURCE.replace("@FUNCTIONS@", "".join(functions)).replace("@SUMS@", "".join(sums))
    for key, value in streams.shared().items():
        text = text.replace(f"@{key}@", value)
    return text


class _Streams:
    """What is read and written element by element: weight, gradient and states, some of them in codes."""

    def __init__(self, rule: Rule, names: tuple[str, ...], variant: Variant, dtypes: tuple[torch.dtype, ...]) -> None:
        self.rule, self.names, self.variant, self.dtypes = rule, names, variant, dtypes
        self.coded = [k for k, dtype in enumerate(dtypes) if dtype in LEVELS]

    def shared(self) -> dict[str, str]:
        """What stands for the placeholders that all functions have."""
        width = len(self.dtypes) + (len(self.coded) + 1 if self.coded else 0)
        const = lambda k: "const " if k == 1 else ""  # noqa: E731
        kinds = [(f"{const(k)}{_TYPES[dtype]}*", f"s{k}", "i") for k, dtype in enumerate(self.dtypes)]
        kinds += [("float*", f"c{k}", f"i / {BLOCK}") for k in self.coded]
        clip = [
            f"    const int64_t size = int64_t(at[{width} * tensor + {width - 1}]);",
            "    n = n < size - i ? n : size - i;",
        ]
        pointers = (f"({kind})at[{width} * tensor + {place}] + {i}" for place, (kind, _, i) in enumerate(kinds))
        return {
            "T": "double" if torch.float64 in self.dtypes else "float",
            "STREAMS": ", ".join(f"{kind} __restrict {name}" for kind, name, _ in kinds),
            "POINTERS": ", ".join(pointers),
            "CLIP": "\n".join(clip if self.coded else []),
            "PART": str(BLOCK if self.coded else 1024),
            "BLOCK": str(BLOCK),
        }

    def filled(self, template: str, number: int | None, known: range) -> str:
        """One function: the update (`number` None) or the sum of a measurement, with the factors `known` before it."""
        lines = [f"  const double {n} = numbers[{k}];" for k, n in enumerate(("updates", *self.names), 2)]
        lines += self._own_way(number is None)
        lines += [f"  const double factor{k} = factors[{k + self._columns}][tensor];" for k in known]
        by_chance = {k: self._salt(k) for k in range(len(self.dtypes)) if k != 1 and self._salt(k) is not None}
        if number is None and by_chance:
            lines.append("  const uint32_t seed = uint32_t(uint64_t(updates)) * 0x9E3779B9u;")
            lines += [
                f"  const uint32_t salt{k} = mixed(seed + {stream}u) + uint32_t(first);"
                for k, stream in by_chance.items()
            ]
        scales = [
            f"    const float scale{k} = c{k}[from / {BLOCK}] * {1 / LEVELS[self.dtypes[k]] ** 4}f;" for k in self.coded
        ]
        if number is None:
            scales += [f"    int32_t top{k} = 0;" for k in self.coded]
        parts = {
            "NUMBERS": lines,
            "SCALES": scales,
            "BODY": [f"    {line}" for line in self._body(number, by_chance)],
            "ENCODE": [self._encode(k, k in by_chance) for k in self.coded],
        }
        for key, value in parts.items():
            template = template.replace(f"@{key}@", "\n".join(value))
        tops = "".join(f" reduction(max : top{k})" for k in self.coded)
        values = ", ".join(f"d{k}[{BLOCK}]" for k in self.coded)
        return template.replace("@REDUCTIONS@", tops).replace("@VALUES@", values).replace("@K@", str(number))

    @property
    def _columns(self) -> int:
        return EXPERT_COLUMNS if self.variant.experts else 0

    def _own_way(self, updates: bool) -> list[str]:
        """Decay, which is the same for all tensors or else comes with what else each expert has of its own."""
        if not self.variant.experts:
            return ["  const double shrink = numbers[0], l2 = numbers[1];"]
        lines = ["  const double own_rate = factors[0][tensor], shrink = factors[1][tensor], l2 = factors[2][tensor];"]
        if updates:
            lines.append("  const bool hold = factors[3][tensor] > 0;")
            lines.append("  if (own_rate == 0 && shrink == 1 && hold) return;")
            lines.append("  first += int64_t(factors[4][tensor]);")
        return lines

    def _stored(self, k: int, by_chance: bool) -> str:
        """Writes the k-th of weight, gradient and states, unless it stays."""
        stays = ("hold" if k else "own_rate == 0" if self.rule.writes else "") if self.variant.experts else ""
        if by_chance:
            return f"{f'if (!({stays})) ' if stays else ''}s{k}[i].by_chance(v{k}, mixed(salt{k} + uint32_t(i)));"
        return f"s{k}[i] = {stays} ? T(s{k}[i]) : v{k};" if stays else f"s{k}[i] = v{k};"

    def _salt(self, k: int) -> int | None:
        """The stream (of `quantised.salt_of`) by which the k-th of weight, gradient and states is rounded."""
        stream = max(0, k - 1)
        return None if self.variant.salt(stream, self.dtypes[k], 0) is None else stream

    def _encode(self, k: int, by_chance: bool) -> str:
        signed = self.dtypes[k] == torch.int8
        words = {
            "TINY": str(TINY),
            "LEVELS4": f"{float(LEVELS[self.dtypes[k]] ** 4)}",
            "LEVELS": f"{float(LEVELS[self.dtypes[k]])}f",
            "CHANCE": f"uniform(salt{k} + uint32_t(i))" if by_chance else "0.5f",
            "SIGNED": "int8_t(int32_t(std::copysign(found, x)))"
            if signed
            else "uint8_t(int32_t(found + float(x > 0) * float(found < 1)))",
            "k": str(k),
        }
        text = cpp_text.ENCODE
        for key, value in words.items():
            text = text.replace(f"@{key}@", value)
        return f"    if (!hold) {{{text}    }}" if self.variant.experts else text

    def _body(self, number: int | None, by_chance: dict[int, int]) -> list[str]:
        """The statements for one element: of the update (`number` None), or of the summand of a measurement."""
        lines: list[str] = []
        p, g, *states = (Code(f"v{k}", lines, True) for k in range(len(self.dtypes)))
        shrink, l2, *scalars = (Code(name, lines, False) for name in ("shrink", "l2", *self.names))
        named = dict(zip(self.names, scalars, strict=True))
        known = len(measures(self.rule, self.variant)) if number is None else number
        factors = [Code(f"factor{k}", lines, False) for k in range(known)]
        loads = [
            f"T v{k} = fourth(s{k}[i]) * scale{k};" if k in self.coded else f"T v{k} = s{k}[i];"
            for k in range(len(self.dtypes))
        ]
        if number is not None:
            result = summand(self.rule, self.variant, number, p, g, states, l2, named, factors)
            return [*loads, *lines, f"sum += {result.name};"]
        rate = Code("own_rate", lines, False) if self.variant.experts else None
        apply(self.rule, self.variant, p, g, states, shrink, l2, named, factors, rate)
        for k in range(len(self.dtypes)):
            if k in self.coded:
                lines += [f"d{k}[i - from] = v{k};", f"const int32_t size{k} = magnitude(v{k});"]
                lines.append(f"top{k} = size{k} > top{k} ? size{k} : top{k};")
            elif k != 1:
                lines.append(self._stored(k, k in by_chance))
        return [*loads, *lines]
