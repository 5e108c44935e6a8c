"""Which runs the figures need: the study's cells, read from ``cells.yaml``, and their commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_opt.plan import ConfigError, one_of
from lightning_opt.study import Cell

CELLS = Path(__file__).with_name("cells.yaml")


@dataclass(frozen=True)
class Planned:
    """A run of the study.

    Attributes:
        cell: by the study's names.
        words: overrides of ``train.py``.
        why: the part of ``cells.yaml`` that asks for it: ``cells``, ``under_tuned``, ``shared_decay``.
    """

    cell: Cell
    words: tuple[str, ...]
    why: str = "cells"

    @property
    def command(self) -> str:
        """As a shell takes it."""
        from shlex import join

        return join(["python", "train.py", *self.words])


@cache
def config() -> dict[str, Any]:
    """What ``cells.yaml`` says."""
    return yaml.safe_load(CELLS.read_text(encoding="utf-8"))


def planned() -> Iterator[Planned]:
    """Every cell once, then the runs that single figures need besides."""
    for line in config()["cells"]:
        yield from _of(line, "cells", ())
    for why, line in config()["besides"].items():
        yield from _of(line, why, (line["change"],))


def _of(line: dict[str, Any], why: str, more: tuple[str, ...]) -> Iterator[Planned]:
    models, optimizers = config()["models"], config()["optimizers"]
    for model in line["models"]:
        for scale in line["scales"]:
            for name in line["optimizers"]:
                words = (f"optimizer={optimizers[name]['ours']}", f"model={models[model]}", f"scale={scale}")
                cell = Cell(name, model, float(scale.removesuffix("x")))
                yield Planned(cell, (*words, *config()["always"], *more), why)


def chosen(text: str) -> list[Planned]:
    """The runs of a model, or of a model at a scale.

    Args:
        text: ``all``, ``130m`` or ``130m/1x``.

    Raises:
        ConfigError: there is no such model or scale.
    """
    label, _, scale = text.partition("/")
    labels = ["all", *config()["models"]]
    if label not in labels:
        raise ConfigError("--commands", text, one_of(label, labels))
    found = [one for one in planned() if label in ("all", one.cell.params)]
    scales = list(dict.fromkeys(f"{one.cell.chinchilla:g}x" for one in found))
    if scale and scale not in scales:
        raise ConfigError("--commands", text, one_of(scale, scales))
    return [one for one in found if not scale or f"{one.cell.chinchilla:g}x" == scale]


def of_kind(kind: str) -> list[str]:
    """The study's names of the optimizers that step by element (``scalar``) or by matrix (``matrix``)."""
    return [name for name, one in config()["optimizers"].items() if one["kind"] == kind]
