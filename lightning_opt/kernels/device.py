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
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
