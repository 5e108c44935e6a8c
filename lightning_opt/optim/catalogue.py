"""The list of all optimizers. To add one: a file `optim/<name>.py` with `RULE` and its class, and its line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lightning_opt.plan import ConfigError, one_of

if TYPE_CHECKING:
    from lightning_opt.kernels import Rule

# The word users write (also the module, the YAML and the float64 reference) -> the class.
OPTIMIZERS: dict[str, str] = {
    "adamw": "AdamW",
    "lion": "Lion",
}


def list_optimizers() -> list[str]:
    """Names of all optimizers, sorted."""
    return sorted(OPTIMIZERS)


def find_rule(name: str, *, field: str = "rule") -> Rule:
    """The rule of a name.

    Raises:
        ConfigError: for an unknown name, with the closest right one.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(field, name, one_of(name, OPTIMIZERS))
    return importlib.import_module(f"lightning_opt.optim.{name}").RULE
