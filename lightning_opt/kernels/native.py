"""The rule as a C++ loop (`cpp`) over a whole list of CPU tensors, compiled in a fraction of a second.

One call and one pass over memory whatever the number of tensors, where inductor takes 3 to 13 s to start and 30 us per
tensor and call. The OpenMP threads are torch's own: the library leaves those symbols to what torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
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
    coded = any(dtype in LEVELS for dtype in bucket.dtypes)
    if (in_blocks and (by_chance or coded)) or (bucket.wholes is not None and by_chance):
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


def _call(rule: Rule, bucket: Bucket, update: Callable[..., None], sums: list[Callable[..., None]]) -> None:
    rows = list(zip(bucket.params, bucket.grads, *bucket.states, strict=True))
    parts = [max(1, row[0].numel() // max(1, block_size(rule, bucket, i))) for i, row in enumerate(rows)]
    experts = [bucket.experts_of(i) for i in range(len(rows))] if bucket.experts is not None else []
    parts = [max(n, each.shape[1]) for n, each in zip(parts, experts, strict=True)] if experts else parts
    starts, at = _entries(rows, parts)
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    scalars = [bucket.scalars[name] for name in _scalars(rule)]
    numbers = torch.tensor([shrink, bucket.l2 or 0.0, bucket.step, *scalars], dtype=torch.float64)
    count, threads = len(starts) - 1, torch.get_num_threads()
    own = _of_experts(rows, parts, experts) if experts else []

    def call(function: Callable[..., None], found: Factors, *more: Tensor) -> None:
        columns = own + [
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


def _of_experts(rows: list[tuple[Any, ...]], parts: list[int], experts: list[Tensor]) -> list[Tensor]:
    """`cpp.EXPERT_COLUMNS` columns, one number per entry in each."""
    found = []
    for row, n, each in zip(rows, parts, experts, strict=True):
        numbers = each.double().repeat_interleave(n // max(1, each.shape[1]), 1)
        firsts = torch.arange(n, dtype=torch.float64) * (row[0].numel() // n)
        found.append(torch.cat([numbers if numbers.numel() else numbers.new_zeros(4, n), firsts.unsqueeze(0)]))
    return list(torch.cat(found, 1).contiguous())


def _entries(rows: list[tuple[Any, ...]], parts: list[int]) -> tuple[Tensor, Tensor]:
    """Where each tensor, or each part of one, begins when all are laid end to end, and the addresses of its numbers.

    Where states are in codes: room for whole blocks of them, then the scales and the size.
    """
    sizes = torch.tensor([row[0].numel() // n for row, n in zip(rows, parts, strict=True)])
    coded = [k for k, t in enumerate(rows[0]) if isinstance(t, Coded)]
    blocks = -(-sizes // CODED)
    held = [[t.codes if isinstance(t, Coded) else t for t in row] for row in rows] if coded else rows
    first = torch.tensor([t.data_ptr() for row in held for t in row]).view(len(rows), -1)
    if coded:
        scales = torch.tensor([row[k].scales.data_ptr() for row in rows for k in coded]).view(len(rows), -1)
        first = torch.cat([first, scales, sizes.unsqueeze(1)], 1)
    room = blocks * CODED if coded else sizes
    if max(parts) > 1:  # each part has its own entry, as far from the one before as that is long
        counts = torch.tensor(parts)
        width = [sizes * t.element_size() for t in held[0]]
        width += [4 * blocks] * len(coded) + [0 * sizes] * bool(coded)
        first, width = (x.repeat_interleave(counts, 0) for x in (first, torch.stack(width, 1)))
        number = torch.arange(len(first)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        first, room = first + number.unsqueeze(1) * width, room.repeat_interleave(counts)
    return torch.cat([room.new_zeros(1), room.cumsum(0)]), first
