"""The rule as a C++ loop (`cpp`) over a whole list of CPU tensors, compiled in a fraction of a second.

One call and one pass over memory whatever the number of tensors, where inductor takes 3 to 13 s to start and 30 us per
tensor and call. The OpenMP threads are torch's own: the library leaves those symbols to what torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import cpp
from lightning_opt.kernels.device import cpp_compiler
from lightning_opt.kernels.measuring import Factors, block_size, factors
from lightning_opt.kernels.quantised import BLOCK as CODED
from lightning_opt.kernels.quantised import LEVELS, Coded
from lightning_opt.kernels.rule import Bucket, Rule, Variant, measures, wide

# No -ffast-math: an element must come out the same wherever it lies. What is named here only lets roots and selects
# run in vector registers; contraction is off so that each operation is rounded once, as torch rounds it.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-fopenmp")


BLOCK = 1 << 16  # elements a thread takes at once, as in the C++
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may hold their numbers elsewhere


class CannotCompile(Exception):
    """No C++ library for this rule here; the text says why in one line."""


@functools.cache
def _library(
    rule: Rule, names: tuple[str, ...], variant: Variant, dtypes: tuple[torch.dtype, ...]
) -> list[Callable[..., None]]:
    """The compiled update, then its sums; made anew by every process: in half a second, with no cache to trust."""
    try:
        library = _build(cpp.source(rule, names, variant, dtypes))
    except cpp.NotInCpp as error:
        raise CannotCompile(f"no C++ for {error}") from error
    except subprocess.CalledProcessError as error:
        silent = f"{error.cmd[0]} ended with code {error.returncode} and said nothing"
        raise CannotCompile((error.stderr.strip() or silent).splitlines()[0]) from error
    except OSError as error:
        raise CannotCompile(str(error)) from error
    pointer = ctypes.c_void_p
    functions = [library.update, *(getattr(library, f"sum{k}") for k in range(len(measures(rule, variant))))]
    for function in functions:
        function.restype = None
        function.argtypes = [ctypes.c_int64, *[pointer] * 4, ctypes.c_int]
    for function in functions[1:]:
        function.argtypes += [pointer, pointer]
    return functions


def _build(text: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="lightning_opt-") as folder:
        made, library = Path(folder) / "update.o", Path(folder) / "update.so"

        def compiler(*arguments: str | Path) -> None:
            subprocess.run([cpp_compiler(), *arguments], input=text, text=True, capture_output=True, check=True)

        compiler("-x", "c++", "-c", "-", *_FLAGS, "-o", made)
        try:  # with torch's OpenMP, which it loads for all to see: two sets of threads would get in each other's way
            compiler("-shared", made, "-o", library)
            return ctypes.CDLL(str(library))
        except OSError:  # or with the compiler's, where torch came with another
            compiler("-shared", "-fopenmp", made, "-o", library)
            return ctypes.CDLL(str(library))


def prepare(rule: Rule, variant: Variant, dtypes: tuple[torch.dtype, ...]) -> None:
    """Compiles the rule, so that its first step need not.

    Raises:
        CannotCompile: there is no library for it here.
    """
    _library(rule, _scalars(rule), variant, dtypes)


@functools.cache
def _scalars(rule: Rule) -> tuple[str, ...]:
    """Names of the numbers that the rule's update takes, but for what it measures."""
    measured = rule.measure.name if rule.measure is not None else None
    every = inspect.signature(rule.update).parameters.values()
    return tuple(p.name for p in every if p.kind is p.KEYWORD_ONLY and p.name != measured)


def run(rule: Rule, bucket: Bucket) -> list[int]:
    """Carries the update out in place.

    Returns:
        indices of the tensors it left alone: those that are not plain memory in one order and of one size.

    Raises:
        CannotCompile: before anything was touched.
    """
    update, *sums = _library(rule, _scalars(rule), bucket.variant, bucket.dtypes)
    rows = list(zip(bucket.params, bucket.grads, *bucket.states, strict=True))
    in_blocks = rule.measure is not None and rule.measure.block is not None
    by_chance = bucket.variant.random_weights or bucket.variant.random_states or torch.uint8 in bucket.dtypes
    if (in_blocks and (by_chance or _coded(bucket))) or (bucket.wholes is not None and by_chance):
        return list(range(len(rows)))  # the C++ counts elements from the beginning of what it takes for a tensor
    left = [i for i, row in enumerate(rows) if not _plain(row)]
    if left:
        bucket = bucket.part([i for i in range(len(rows)) if i not in set(left)])
    if bucket.params:
        _call(rule, bucket, update, sums)
    return left


def _plain(row: tuple[Tensor | Coded, ...]) -> bool:
    size = row[0].numel()
    found = [t.codes if isinstance(t, Coded) else t for t in row]
    return all(type(t) in _PLAIN and t.is_contiguous() and t.numel() == size for t in found)


def _coded(bucket: Bucket) -> bool:
    return any(dtype in LEVELS for dtype in bucket.dtypes)


def _call(rule: Rule, bucket: Bucket, update: Callable[..., None], sums: list[Callable[..., None]]) -> None:
    rows = list(zip(bucket.params, bucket.grads, *bucket.states, strict=True))
    parts = [max(1, row[0].numel() // max(1, block_size(rule, bucket, i))) for i, row in enumerate(rows)]
    starts, at = _coded_entries(rows) if _coded(bucket) else _entries(rows, parts)
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    scalars = [bucket.scalars[name] for name in _scalars(rule)]
    numbers = torch.tensor([shrink, bucket.l2 or 0.0, bucket.step, *scalars], dtype=torch.float64)
    count, threads = len(starts) - 1, torch.get_num_threads()

    def call(function: Callable[..., None], found: Factors, *more: Tensor) -> None:
        columns = [
            torch.cat([f.reshape(-1).expand(n) for f, n in zip(column, parts, strict=True)]).double()
            for column in found
        ]
        factors = torch.tensor([column.data_ptr() for column in columns], dtype=torch.int64)
        given = [tensor.data_ptr() for tensor in (starts, at, numbers, factors)]
        function(count, *given, threads, *[tensor.data_ptr() for tensor in more])

    def totals(number: int, found: Factors) -> list[Tensor]:
        partial = torch.empty(int(starts[-1]) // BLOCK + 2 + count, dtype=torch.float64)
        result = torch.empty(count, dtype=torch.float64)
        call(sums[number], found, partial, result)
        by_block = result.to(wide(bucket.params[0]).dtype).split(parts)
        in_blocks = measures(rule, bucket.variant)[number].block is not None
        return list(by_block) if in_blocks else [block.sum().reshape(1) for block in by_block]

    call(update, factors(rule, bucket, totals))
    written = []  # gradients are only read
    for p, _, *states in rows:
        written += [p, *(t for state in states for t in (state if isinstance(state, Coded) else [state]))]
    torch.autograd.graph.increment_version(written)  # autograd must see that saved weights were overwritten


def _entries(rows: list[tuple[Tensor, ...]], parts: list[int]) -> tuple[Tensor, Tensor]:
    """Where each tensor, or block of one, begins when all are laid end to end, and the addresses of its numbers."""
    sizes = [row[0].numel() // n for row, n in zip(rows, parts, strict=True)]
    if all(n == 1 for n in parts):
        at = torch.tensor([t.data_ptr() for row in rows for t in row], dtype=torch.int64)
        return torch.tensor(list(itertools.accumulate(sizes, initial=0)), dtype=torch.int64), at
    addresses = []
    for row, size, n in zip(rows, sizes, parts, strict=True):
        first = torch.tensor([t.data_ptr() for t in row], dtype=torch.int64)
        width = torch.tensor([size * t.element_size() for t in row], dtype=torch.int64)
        addresses.append((first + torch.arange(n).unsqueeze(1) * width).reshape(-1))
    ends = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(parts)).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]), torch.cat(addresses)


def _coded_entries(rows: list[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """As `_entries`, where states are in codes: room for whole blocks of them, then the scales and the size."""
    sizes = [row[0].numel() for row in rows]
    addresses = []
    for row, size in zip(rows, sizes, strict=True):
        addresses += [(t.codes if isinstance(t, Coded) else t).data_ptr() for t in row]
        addresses += [*(t.scales.data_ptr() for t in row if isinstance(t, Coded)), size]
    starts = list(itertools.accumulate((-(-size // CODED) * CODED for size in sizes), initial=0))
    return torch.tensor(starts, dtype=torch.int64), torch.tensor(addresses, dtype=torch.int64)
