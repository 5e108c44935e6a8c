"""Checks that each `_target_` names something that exists, without importing it: torch must not load yet."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.plan.words import one_of

_OURS = "lightning_opt."


def check_targets(config: Any, prefix: str = "") -> None:
    """Checks every `_target_` of a plain configuration.

    Raises:
        ConfigError: a module is not installed, or has no such name as far as its source shows.
    """
    if isinstance(config, dict):
        if "_target_" in config:
            _check(f"{prefix}_target_", config["_target_"])
        for key, value in config.items():
            check_targets(value, f"{prefix}{key}.")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            check_targets(value, f"{prefix}{index}.")


def check_loggers(loggers: dict[str, Any]) -> None:
    """Checks the loggers' `_target_`s; one whose package is not installed passes: the run warns of it and goes on.

    Raises:
        ConfigError: a target that is no dotted name, or a name that its package does not have.
    """
    for label, spec in loggers.items():
        package, dot, _ = str(spec.get("_target_") if isinstance(spec, dict) else "").partition(".")
        if not dot or find_spec(package) is not None:
            check_targets(spec, f"logger.{label}.")


def _check(field: str, target: Any) -> None:
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(field, target, "must be a dotted name, for example lightning_opt.callbacks.Throughput")
    parts = target.split(".")
    try:
        spec = find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError(field, target, f"package {parts[0]} is not installed")
    depth = 1
    while depth < len(parts) and spec.submodule_search_locations is not None:
        below = PathFinder.find_spec(".".join(parts[: depth + 1]), list(spec.submodule_search_locations))
        if below is None:
            break
        spec, depth = below, depth + 1
    if depth < len(parts):
        known = _names(".".join(parts[:depth]), spec)
        if known is not None and parts[depth] not in known:
            public = [name for name in known if not name.startswith("_")]
            raise ConfigError(
                field, target, f"{'.'.join(parts[:depth])} has no {parts[depth]}; {one_of(parts[depth], public)}"
            )


def _names(module: str, spec: ModuleSpec) -> set[str] | None:
    """Names a module defines, or None where only importing it would tell."""
    if module.startswith(_OURS) and spec.submodule_search_locations is not None:
        return set(dir(importlib.import_module(module)))  # our packages are lazy: this imports nothing heavy
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    names: set[str] = set()
    for node in _statements(ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}
    return None if names & {"*", "__getattr__"} else names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                yield from _statements(getattr(node, part, []))
