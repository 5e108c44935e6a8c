"""The results of a study, and the table they are kept in: what every analysis reads.

A row is one number: ``source, optimizer, params, chinchilla, metric, value``. The metrics that are read:

| metric | is |
| --- | --- |
| `c4en_loss_min` (published) or `val_loss` (ours) | final loss in nats per token; one row for each reporting seed |
| `…_best_config` | loss of the tuned configuration while tuning |
| `…_ablation:NAME=VALUE` | loss of the tuned configuration with one change |
| `acc:TASK` | a task's score |
| `seconds`, `tokens`, `peak_bytes`, `flops` | what a run of the cell cost; one row for each seed |
| `params_non_embedding` | the model's size |

Others belong to somebody else and are passed over, as are rows without a value. A loss that is not finite, or above
`BLOWN_UP`, is a run that diverged: infinite here.
"""

from __future__ import annotations

import ast
import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.run_folder.records import write_text

Config = Mapping[str, Any]
"""Hyperparameter name to value, plain types."""

COLUMNS = ("source", "optimizer", "params", "chinchilla", "metric", "value")
COSTS = ("seconds", "tokens", "peak_bytes", "flops")
PUBLISHED, OURS = "c4en_loss", "val_loss"
_FINAL = {"c4en_loss_min": PUBLISHED, "val_loss": OURS}
_SIZE = "params_non_embedding"

BLOWN_UP = 1e4
"""A loss above is a run that diverged, nats per token (arXiv 2509.02046, its code)."""

_EXACT = {"130m": 134_217_728.0, "300m": 301_989_888.0, "520m": 536_870_912.0, "1.2b": 1_207_959_552.0}
"""Non-embedding parameters of the study's models: 32 layers of 3·h·i + 4·h² (arXiv 2509.02046)."""


@dataclass(frozen=True, order=True)
class Cell:
    """One optimizer on one model with one amount of data.

    Attributes:
        optimizer: name as in the table.
        params: the model's label as in the table: ``130m``, ``1.2b``, or a model's name.
        chinchilla: training tokens in units of 20 tokens per non-embedding parameter.
    """

    optimizer: str
    params: str
    chinchilla: float


@dataclass(frozen=True)
class Results:
    """All that a study found. Read it, never change it.

    Attributes:
        losses: final losses of each cell, nats per token, one for each reporting seed, seeds in one order everywhere;
            infinite for a run that diverged. Published cells have one.
        tuning: losses met while tuning a cell: ``best_config`` and ``NAME=VALUE`` for one change to it; infinite
            where the run diverged.
        scores: task to a score for each seed.
        seconds: wall time of each reporting run; empty where it is not known, as are the next three.
        tokens: tokens it was trained on.
        peak_bytes: most device memory it held.
        flops: floating-point operations it took.
        sizes: label to non-embedding parameters; labels whose size nobody knows are absent.
        metric: ``c4en_loss`` (the published metric) or ``val_loss`` (of our own runs).
        source: where the numbers come from, in words or a path.
    """

    losses: dict[Cell, tuple[float, ...]] = field(default_factory=dict)
    tuning: dict[Cell, dict[str, float]] = field(default_factory=dict)
    scores: dict[Cell, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    seconds: dict[Cell, tuple[float, ...]] = field(default_factory=dict)
    tokens: dict[Cell, tuple[float, ...]] = field(default_factory=dict)
    peak_bytes: dict[Cell, tuple[float, ...]] = field(default_factory=dict)
    flops: dict[Cell, tuple[float, ...]] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    metric: str = OURS
    source: str = ""

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Those with a final loss, in the table's order."""
        return tuple(dict.fromkeys(cell.optimizer for cell in self.losses))

    @property
    def labels(self) -> tuple[str, ...]:
        """Models with a final loss, small ones first; those of unknown size last, in the table's order."""
        found = dict.fromkeys(cell.params for cell in self.losses)
        return tuple(sorted(found, key=lambda label: self.sizes.get(label, math.inf)))

    def of(self, optimizer: str, params: str) -> list[Cell]:
        """The cells of an optimizer on a model that have a final loss, little data first."""
        return sorted(cell for cell in self.losses if (cell.optimizer, cell.params) == (optimizer, params))

    def loss(self, cell: Cell) -> float:
        """Mean final loss over the seeds, nats per token; infinite where one of them diverged."""
        return fmean(self.losses[cell])


def non_embedding(label: str) -> float | None:
    """Non-embedding parameters that a label stands for: the study's exact counts, else ``760m`` read as a number.

    Returns:
        The count, or None where the label is a name.
    """
    if label.lower() in _EXACT:
        return _EXACT[label.lower()]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", label.strip().lower())
    if not found:
        return None
    return float(found[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]]


def recorded_change(change: str) -> tuple[str, Any]:
    """The name and the value of a recorded ablation: ``learning_rate=0.004`` is ``("learning_rate", 0.004)``."""
    name, _, text = change.partition("=")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False, "null": None}.get(text.lower(), text)


def read_results(path: str | Path) -> Results:
    """Reads a table of results.

    Whole rows that are there twice count once.

    Args:
        path: a CSV file with the columns ``source, optimizer, params, chinchilla, metric, value``.

    Raises:
        ConfigError: the file cannot be read, lacks a column, holds something that is no number where one must stand,
            no final loss, or two kinds of final loss. It names line and column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            "results", str(path), f"must be a CSV file with the columns {', '.join(COLUMNS)}; {reason}"
        ) from None
    table = _Table(path)
    for row in dict.fromkeys(_rows(text, path)):
        table.take(row)
    return table.results()


@dataclass(frozen=True)
class _Row:
    """One line of the table; two are equal where all but the line number is."""

    line: int = field(compare=False)
    source: str
    optimizer: str
    params: str
    chinchilla: str
    metric: str
    value: str


def _rows(text: str, path: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    named = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in COLUMNS if name not in named]:
        here = f"line 1 has no column {', '.join(missing)}"
        raise ConfigError("results", str(path), f"must have the columns {', '.join(COLUMNS)}; {here}")
    reader.fieldnames = named
    for row in reader:
        if None in row or None in row.values():
            raise ConfigError("results", str(path), f"line {reader.line_num}: must have {len(named)} columns")
        yield _Row(reader.line_num, *(row[name].strip() for name in COLUMNS))


class _Table:
    """Sorts rows into the fields of `Results`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.final: dict[str, dict[Cell, list[float]]] = {PUBLISHED: {}, OURS: {}}
        self.tuning: dict[str, dict[Cell, dict[str, float]]] = {PUBLISHED: {}, OURS: {}}
        self.scores: dict[Cell, dict[str, list[float]]] = {}
        self.costs: dict[str, dict[Cell, list[float]]] = {name: {} for name in COSTS}
        self.sizes: dict[str, float] = {}

    def take(self, row: _Row) -> None:
        """Files one row; one of a metric that is not ours is passed over."""
        if not row.value:  # nothing was measured
            return
        metric = row.metric
        kind, _, change = metric.partition("_ablation:")
        if metric in _FINAL:
            self.final[_FINAL[metric]].setdefault(self._cell(row), []).append(self._loss(row))
        elif kind in self.tuning and change:
            self.tuning[kind].setdefault(self._cell(row), {})[change] = self._loss(row)
        elif (kind := metric.removesuffix("_best_config")) in self.tuning and kind != metric:
            self.tuning[kind].setdefault(self._cell(row), {})["best_config"] = self._loss(row)
        elif metric.startswith("acc:"):
            task = metric.removeprefix("acc:")
            self.scores.setdefault(self._cell(row), {}).setdefault(task, []).append(self._number(row, "value"))
        elif metric in self.costs:
            self.costs[metric].setdefault(self._cell(row), []).append(self._number(row, "value", positive=True))
        elif metric == _SIZE:
            self.sizes[row.params] = self._number(row, "value", positive=True)

    def results(self) -> Results:
        """What the rows hold together."""
        kinds = [kind for kind, cells in self.final.items() if cells]
        if len(kinds) != 1:
            found = "none of them" if not kinds else "both, which are not the same loss"
            must = f"must hold final losses as the metric {' or '.join(_FINAL)}"
            raise ConfigError("results", str(self.path), f"{must}; it holds {found}")
        labels = {cell.params for cells in (self.final[kinds[0]], self.tuning[kinds[0]]) for cell in cells}
        self._one_spelling("params", labels)
        self._one_spelling("optimizer", {cell.optimizer for cell in self.final[kinds[0]]})
        parsed = {label: size for label in sorted(labels) if (size := non_embedding(label)) is not None}
        return Results(
            losses={cell: tuple(values) for cell, values in self.final[kinds[0]].items()},
            tuning=self.tuning[kinds[0]],
            scores={
                cell: {task: tuple(values) for task, values in tasks.items()} for cell, tasks in self.scores.items()
            },
            **{name: {cell: tuple(values) for cell, values in cells.items()} for name, cells in self.costs.items()},
            sizes={**parsed, **self.sizes},
            metric=kinds[0],
            source=self.path.name,
        )

    def _one_spelling(self, column: str, names: set[str]) -> None:
        """Refuses 130m beside 130M: nobody means two models by them."""
        for name in sorted(names):
            if twin := next((other for other in names if other > name and other.lower() == name.lower()), None):
                must = f"column {column} must spell a name in one way; it holds {name!r} and {twin!r}"
                raise ConfigError("results", str(self.path), must)

    def _cell(self, row: _Row) -> Cell:
        for column in ("optimizer", "params"):
            if not getattr(row, column):
                raise self._wrong(row, column, "must not be empty")
        return Cell(row.optimizer, row.params, self._number(row, "chinchilla", positive=True))

    def _loss(self, row: _Row) -> float:
        """A loss; what is not finite, or absurd, diverged."""
        value = self._read(row, "value")
        return value if math.isfinite(value) and value <= BLOWN_UP else math.inf

    def _number(self, row: _Row, column: str, *, positive: bool = False) -> float:
        value = self._read(row, column)
        if not math.isfinite(value) or (positive and value <= 0):
            raise self._wrong(row, column, "must be a number" + (" > 0" if positive else ""))
        return value

    def _read(self, row: _Row, column: str) -> float:
        try:
            return float(getattr(row, column))
        except ValueError:
            raise self._wrong(row, column, "must be a number") from None

    def _wrong(self, row: _Row, column: str, expected: str) -> ConfigError:
        given = getattr(row, column)
        return ConfigError("results", str(self.path), f"line {row.line}, column {column}: {expected}, not {given!r}")


def write_results(results: Results, path: str | Path) -> Path:
    """Writes the table that `read_results` reads back to the same results, whose source is then its name.

    Returns:
        The path.
    """
    final = next(name for name, kind in _FINAL.items() if kind == results.metric)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell, metric, place, value in _numbers(results, final):
        # the place among the seeds keeps two equal values apart
        source = results.source if place is None else f"{results.source} #{place + 1}".strip()
        writer.writerow([source, cell.optimizer, cell.params, f"{cell.chinchilla:.12g}", metric, repr(float(value))])
    path = Path(path)
    write_text(path, text.getvalue())
    return path


def _numbers(results: Results, final: str) -> Iterator[tuple[Cell, str, int | None, float]]:
    """Cell, metric, place among the seeds (None where there are none) and value of every number."""
    sized = set()
    for cell in dict.fromkeys((*results.losses, *results.tuning, *results.scores)):
        for place, loss in enumerate(results.losses.get(cell, ())):
            yield cell, final, place, loss
        for change, loss in results.tuning.get(cell, {}).items():
            name = "_best_config" if change == "best_config" else f"_ablation:{change}"
            yield cell, results.metric + name, None, loss
        for task, values in results.scores.get(cell, {}).items():
            for place, value in enumerate(values):
                yield cell, f"acc:{task}", place, value
        for name in COSTS:
            for place, value in enumerate(getattr(results, name).get(cell, ())):
                yield cell, name, place, value
        if cell.params in results.sizes and cell.params not in sized:
            sized.add(cell.params)
            yield cell, _SIZE, None, results.sizes[cell.params]
