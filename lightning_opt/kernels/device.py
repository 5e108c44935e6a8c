"""The one place that asks what this machine can do."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil


@functools.cache
def cpp_compiler() -> str | None:
    """Path of the C++ compiler (``CXX``, else g++, else clang++), or None."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def can_compile(device_type: str) -> tuple[bool, str]:
    """Whether kernels can be made for a device ("cpu", "cuda"), and what it has or lacks for that."""
    if device_type == "cpu":
        path = cpp_compiler()
        return (True, os.path.basename(path)) if path else (False, "no C++ compiler found")
    if device_type in ("cuda", "xpu"):
        return (True, "Triton") if _has_triton() else (False, "Triton is not installed")
    return False, f"no compiler for {device_type}"


@functools.cache
def fast_bfloat16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 beat float32's.

    True of GPUs, of CPUs with AMX and of AMD's with AVX-512 BF16 (EPYC, one core, torch 2.13: 2.1 times as fast); not
    of Intel's with AVX-512 BF16 alone (model 207: 1.5 to 1.9 times as slow). Asks what the CPU is rather than time it:
    the answer decides how updates are rounded, so it must not depend on the load.
    """
    if device_type != "cpu":
        return device_type in ("cuda", "xpu")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split("\n\n", 1)[0].split())
    except OSError:
        return False
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
