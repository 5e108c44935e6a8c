"""The one place that asks what this machine can do."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil


@functools.cache
def cpp_compiler() -> str | None:
    """Path of the C++ compiler that inductor would use (``CXX``, else g++, else clang++), or None."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def can_compile(device_type: str) -> tuple[bool, str]:
    """Whether torch.compile makes kernels for a device ("cpu", "cuda"), and what it has or lacks for that."""
    if device_type == "cpu":
        path = cpp_compiler()
        return (True, os.path.basename(path)) if path else (False, "no C++ compiler found")
    if device_type in ("cuda", "xpu"):
        found = importlib.util.find_spec("triton") is not None
        return found, "Triton" if found else "Triton is not installed"
    return False, f"no compiler for {device_type}"
