"""Tuned configurations of a study, in the file that goes with a published table of results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.study.results import Cell, Config


@dataclass(frozen=True)
class Tuned:
    """What a study says it settled on.

    Attributes:
        best: cell to the configuration that its recorded changes were made to.
        lowest: cell to the lowest loss of all its runs, nats per token.
        sensitive: optimizer to its scaling-sensitive hyperparameters with the values that serve every setting.
        predicted: cell to the configuration that its hyperparameter laws predicted.
        searched: cells whose configuration came from a search of their own, not from laws or another cell.
    """

    best: dict[Cell, Config]
    lowest: dict[Cell, float]
    sensitive: dict[str, dict[str, tuple[Any, ...]]]
    predicted: dict[Cell, Config]
    searched: frozenset[Cell] = frozenset()


def read_tuned(path: str | Path) -> Tuned:
    """Reads tuned configurations.

    Args:
        path: YAML: ``optimizers: {NAME: {sensitive_keys: {KEY: [VALUES]}, settings: {130m/1x: {best: {…}, min_loss: …,
            predicted: {…}}}}}``; all but ``settings`` may be missing.

    Raises:
        ConfigError: the file cannot be read, or is of another shape.
    """
    import yaml

    must = "must be a YAML file of the shape optimizers: {NAME: {settings: {130m/1x: {best: {…}}}}}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        held = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["optimizers"]
        settings = {
            Cell(name, label, float(scale.removesuffix("x"))): setting
            for name, about in held.items()
            for key, setting in about["settings"].items()
            for label, scale in [key.split("/")]
        }
        sensitive = {
            name: {key: tuple(values) for key, values in (about.get("sensitive_keys") or {}).items()}
            for name, about in held.items()
        }
        return Tuned(
            {cell: dict(setting["best"]) for cell, setting in settings.items() if setting.get("best")},
            {cell: float(setting["min_loss"]) for cell, setting in settings.items() if setting.get("min_loss")},
            sensitive,
            {cell: dict(setting["predicted"]) for cell, setting in settings.items() if setting.get("predicted")},
            frozenset(cell for cell, setting in settings.items() if setting.get("grid") and "predicted" not in setting),
        )
    except OSError as error:
        raise ConfigError("tuned", str(path), f"{must}; {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError("tuned", str(path), f"{must}; {type(error).__name__}: {error}") from None
