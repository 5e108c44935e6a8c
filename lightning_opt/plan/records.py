"""Tuned values: for an optimizer on a model at a scale, the values that were measured or published as best.

One file per optimizer, `plan/tuned/<optimizer>.yaml`: a list of tables, each with

    source    where its values come from; `{cell}` stands for the model and scale of a row
    measured  ours = by this project | published = by the source | no = a first guess
    tokens    of the runs that were measured; left out where the scale says it
    always    dotted key: value, for every row
    columns   dotted keys; `loss` is the validation loss that was reached, for reading only
    cells     model/scale: values, in the order of the columns; scale `any` holds for all of them

A value that is a map sets the keys below its column: `schedule: {name: wsd, decay: 0.8}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_opt.plan.errors import ConfigError

_FOLDER = Path(__file__).with_name("tuned")
_KEYS = {"source", "measured", "always", "columns", "cells"}
_MAY = {"tokens"}
STUDIED = (130_000_000, 1_210_000_000)
"""Smallest and largest number of non-embedding parameters that published values were tuned at."""
_PUBLISHED_LENGTH = 4096  # tokens of a sequence in arXiv:2509.02046
_OUR_BATCH = 8 * 256  # tokens of a step, benchmarks/results/2026-11-22-tuned-small-models.md


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
        loss: validation loss that the source reached with them, nats per token; None where it does not say.
        tokens: that the values were found at; None where the scale says it, or the source does not.
    """

    optimizer: str
    model: str
    scales: tuple[str, ...]
    values: dict[str, Any]
    source: str
    measured: str
    loss: float | None = None
    tokens: int | None = None

    def at(self, scale: str) -> bool:
        """Whether the record holds for this scale."""
        return "any" in self.scales or scale in self.scales

    @property
    def tokens_per_step(self) -> int | None:
        """Batch size that the values were found at, in tokens; None where the source does not say."""
        if self.measured == "ours":
            return _OUR_BATCH
        batch = self.values.get("trainer.global_batch_size") if self.measured == "published" else None
        return batch and batch * _PUBLISHED_LENGTH

    def check_size(self, non_embedding_params: int | None, *, field: str = "tuned") -> None:
        """Refuses published values outside the sizes they were tuned at: nobody knows how they would have to change.

        Args:
            non_embedding_params: of the model to train; None where it is not known.
            field: the name to show in the error.

        Raises:
            ConfigError: the model is smaller or larger than the study's.
        """
        low, high = STUDIED
        if self.measured != "published" or (non_embedding_params and low <= non_embedding_params <= high):
            return
        size = f"{non_embedding_params:,} parameters" if non_embedding_params else "an unknown size"
        why = f"published for models of 130M to 1.2B non-embedding parameters, and this one has {size}: say ~tuned"
        raise ConfigError(field, f"{self.optimizer}/{self.model}_{self.scales[0]}", why)


@cache
def tuned_optimizers() -> tuple[str, ...]:
    """Names of the optimizers that have tuned values, sorted; no table is read."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


def tuned_records(optimizer: str | None = None) -> tuple[TunedRecord, ...]:
    """The records of one optimizer in its file's order, () where it has none; of all optimizers without a name."""
    if optimizer is None:
        return tuple(record for name in tuned_optimizers() for record in tuned_records(name))
    return _read(optimizer) if optimizer in tuned_optimizers() else ()


@cache
def _read(optimizer: str) -> tuple[TunedRecord, ...]:
    import yaml

    file = _FOLDER / f"{optimizer}.yaml"
    tables = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(record for table in tables for record in _records(optimizer, table))


def _records(optimizer: str, table: dict[str, Any]) -> Iterator[TunedRecord]:
    if set(table) - _MAY != _KEYS:
        raise ValueError(f"tuned/{optimizer}.yaml: a table needs exactly {sorted(_KEYS)}, not {sorted(table)}")
    for cell, row in table["cells"].items():
        model, scale = cell.split("/")
        values = _flat(table["always"]) | _flat(dict(zip(table["columns"], row, strict=True)))
        loss = values.pop("loss", None)
        source = table["source"].replace("{cell}", cell)
        yield TunedRecord(optimizer, model, (scale,), values, source, table["measured"], loss, table.get("tokens"))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            {f"{key}.{inner}": it for inner, it in _flat(value).items()} if isinstance(value, dict) else {key: value}
        )
    return flat


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
    pool = tuned_records(optimizer) if records is None else records
    found = [record for record in pool if (record.optimizer, record.model) == (optimizer, model) and record.at(scale)]
    return min(found, key=lambda record: "any" in record.scales, default=None)
