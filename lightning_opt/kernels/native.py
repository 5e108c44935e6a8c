"""The rule as a C++ loop (`cpp`) over a whole list of CPU tensors, compiled in a fraction of a second.

One call and one pass over memory whatever the number of tensors, where inductor takes 3 to 13 s to start and 30 us per
tensor and call. The OpenMP threads are torch's own: the library leaves those symbols to what torch has loaded.
"""

from __future__ import annotations

import array
import ctypes
import functools
import inspect
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_opt.kernels import cpp
from lightning_opt.kernels.device import cpp_compiler
from lightning_opt.kernels.rule import Bucket, Rule

# No -ffast-math: an element must come out the same wherever it lies. What is named here only lets roots and selects
# run in vector registers; contraction is off so that each operation is rounded once, as torch rounds it.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-fopenmp")


_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may hold their numbers elsewhere


class CannotCompile(Exception):
    """No C++ library for this rule here; the text says why in one line."""


@functools.cache
def _library(rule: Rule, names: tuple[str, ...], l2: bool, dtypes: tuple[torch.dtype, ...]) -> Callable[..., None]:
    """The compiled function; made anew by every process: half a second, and no cache that others could write to."""
    try:
        function = _build(cpp.source(rule, names, l2, dtypes)).update
    except cpp.NotInCpp as error:
        raise CannotCompile(f"no C++ for {error}") from error
    except subprocess.CalledProcessError as error:
        silent = f"{error.cmd[0]} ended with code {error.returncode} and said nothing"
        raise CannotCompile((error.stderr.strip() or silent).splitlines()[0]) from error
    except OSError as error:
        raise CannotCompile(str(error)) from error
    function.restype = None
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int]
    return function


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


def prepare(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> None:
    """Compiles the rule as it mostly runs, without L2 decay, so that its first step need not.

    Raises:
        CannotCompile: there is no library for it here.
    """
    _library(rule, _scalars(rule), False, dtypes)


@functools.cache
def _scalars(rule: Rule) -> tuple[str, ...]:
    """Names of the numbers that the rule's update takes."""
    return tuple(p.name for p in inspect.signature(rule.update).parameters.values() if p.kind is p.KEYWORD_ONLY)


def run(rule: Rule, bucket: Bucket) -> list[int]:
    """Carries the update out in place.

    Returns:
        indices of the tensors it left alone: those that are not plain memory in one order and of one size.

    Raises:
        CannotCompile: before anything was touched.
    """
    names, dtypes = _scalars(rule), bucket.dtypes
    update = _library(rule, names, bucket.l2 is not None, dtypes)
    left, sizes, at, written = [], [0], [], []
    for i, row in enumerate(zip(bucket.params, bucket.grads, *bucket.states, strict=True)):
        size = row[0].numel()
        for t in row:
            if type(t) not in _PLAIN or not t.is_contiguous() or t.numel() != size:
                left.append(i)
                break
        else:
            sizes.append(size)
            at += [t.data_ptr() for t in row]
            written += row
    if not written:
        return left
    del written[1 :: len(dtypes)]  # gradients are only read
    shrink = 1.0 if bucket.shrink is None else bucket.shrink
    numbers = [shrink, bucket.l2 or 0.0, *[bucket.scalars[name] for name in names]]
    # Named, so that their memory lives until the call returns.
    arrays = [array.array("q", itertools.accumulate(sizes)), array.array("Q", at), array.array("d", numbers)]
    update(len(sizes) - 1, *[values.buffer_info()[0] for values in arrays], torch.get_num_threads())
    torch.autograd.graph.increment_version(written)  # autograd must see that saved weights were overwritten
    return left
