"""The list of all optimizers. To add one: a file `optim/<name>.py` with `RULE` and its class, and its line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lightning_opt.plan import ConfigError, one_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from lightning_opt.kernels import Rule

# The word users write (also the module, the YAML and the float64 reference) -> the class.
OPTIMIZERS: dict[str, str] = {
    "adabelief": "AdaBelief",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adam_mini": "AdamMini",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "adopt": "Adopt",
    "amsgrad": "AMSGrad",
    "cautious_adamw": "CautiousAdamW",
    "kron": "Kron",
    "lion": "Lion",
    "lion_sign_first": "LionSignFirst",
    "mars": "Mars",
    "momentum": "Momentum",
    "muon": "Muon",
    "nadam": "NAdam",
    "nadamw": "NAdamW",
    "normuon": "NorMuon",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "scion": "Scion",
    "sgd": "SGD",
    "signum": "Signum",
    "soap": "SOAP",
    "sophia": "Sophia",
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


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter group, in the form that its options ask for."""
    rule = find_rule(group["rule"])
    return rule if rule.form is None else rule.form(group)
