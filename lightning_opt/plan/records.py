"""Tuned values: for an optimizer on a model at a scale, the values that were measured or published as best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("tuned.yaml")
_KEYS = {"optimizer", "model", "scales", "values", "source", "measured"}


@dataclass(frozen=True)
class TunedRecord:
    """Values for one optimizer, one model and some scales.

    Attributes:
        optimizer: name of its configuration, for example ``lion``.
        model: name of its configuration, for example ``nano``.
        scales: names of scales, or ``("any",)``.
        values: dotted key to value, for example ``{"optimizer.lr": 5e-4}``.
        source: where the values come from: a paper and commit, or the file that holds our measurement.
        measured: ``ours`` (by this project), ``published`` (by the source) or ``no`` (a first guess).
    """

    optimizer: str
    model: str
    scales: tuple[str, ...]
    values: dict[str, Any]
    source: str
    measured: str

    def at(self, scale: str) -> bool:
        """Whether the record holds for this scale."""
        return "any" in self.scales or scale in self.scales


@cache
def tuned_records() -> tuple[TunedRecord, ...]:
    """Every record of `tuned.yaml`, in the file's order."""
    import yaml

    entries = yaml.load(_FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(_record(entry) for entry in entries)


def _record(entry: dict[str, Any]) -> TunedRecord:
    if set(entry) != _KEYS:
        raise ValueError(f"{_FILE.name}: a record needs exactly {sorted(_KEYS)}, not {sorted(entry)}")
    scales = entry["scales"]
    return TunedRecord(**{**entry, "scales": ("any",) if scales == "any" else tuple(scales)})


def tuned(
    optimizer: str, model: str, scale: str, *, records: Iterable[TunedRecord] | None = None
) -> TunedRecord | None:
    """The record for this cell, or None; a record that names the scale goes before one for any scale.

    Args:
        optimizer: name of its configuration.
        model: name of its configuration.
        scale: name of its configuration.
        records: look here instead of in the package's own records.
    """
    pool = tuned_records() if records is None else records
    found = [record for record in pool if (record.optimizer, record.model) == (optimizer, model) and record.at(scale)]
    return min(found, key=lambda record: "any" in record.scales, default=None)
