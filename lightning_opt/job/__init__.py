"""One run in plain Python: train, evaluate, report; its status and its exit code."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"stages": ["run"], "leaving": ["leave"]})
