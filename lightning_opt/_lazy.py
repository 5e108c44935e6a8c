"""Lazy packages (PEP 562): a room's names are imported when they are first used, so a light room stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def attach(
    package: str, homes: dict[str, list[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the module hooks of a package whose public names live in its submodules.

    Args:
        package: the package's ``__name__``.
        homes: submodule name to the public names it defines.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` for the package.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    if both := home_of.keys() & homes.keys():
        raise ImportError(
            f"{package}: {both} are both files and public names; importing such a file hides the name: rename the file"
        )
    public = sorted(home_of)

    def __getattr__(name: str) -> Any:  # noqa: N807 - the name PEP 562 asks for
        if name in home_of:
            return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")

    return __getattr__, lambda: public, public
