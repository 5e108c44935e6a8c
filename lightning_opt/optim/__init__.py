"""Optimizers: one base with the only `step`, one file per rule, schedules, and `build` from roles."""

from lightning_opt._lazy import attach
from lightning_opt.optim.catalogue import OPTIMIZERS

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["Optimizer"],
        "routing": ["build"],
        "phased": ["Phased", "Switch"],
        "dynamic": ["Dynamic"],
        "saved": ["with_values_of"],
        "catalogue": ["OPTIMIZERS", "find_rule", "list_optimizers"],
        **{module: [cls] for module, cls in OPTIMIZERS.items()},
    },
)
