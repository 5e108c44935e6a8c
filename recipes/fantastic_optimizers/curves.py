"""The published curves: loss on the way of the best run of each cell."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lightning_opt.plan import ConfigError
from lightning_opt.study import Cell

COLUMNS = ("optimizer", "params", "chinchilla", "step", "tokens", "c4en_loss")
Curve = tuple[list[float], list[float]]
"""Tokens and losses."""


def read(path: Path) -> tuple[dict[Cell, Curve], list[Cell]]:
    """Reads a table of curves.

    A cell whose steps start anew holds more than one run; the one that ends lowest is taken. The point before the
    first step is left out.

    Args:
        path: a CSV file with at least `COLUMNS`.

    Returns:
        The curve of each cell, and the cells that held more than one run.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or holds something else where a number must stand.
    """
    runs: dict[Cell, list[list[tuple[float, float, float]]]] = defaultdict(list)
    for cell, step, tokens, loss in _rows(path):
        if not runs[cell] or step <= runs[cell][-1][-1][0]:
            runs[cell].append([])
        runs[cell][-1].append((step, tokens, loss))
    best = {cell: min(found, key=lambda run: run[-1][2]) for cell, found in runs.items()}
    curves = {
        cell: ([tokens for step, tokens, _ in run if step > 0], [loss for step, _, loss in run if step > 0])
        for cell, run in best.items()
    }
    return curves, [cell for cell, found in runs.items() if len(found) > 1]


def _rows(path: Path) -> Iterator[tuple[Cell, float, float, float]]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError("--curves", str(path), f"must have the columns {', '.join(COLUMNS)}; no {missing[0]}")
            for row in reader:
                yield _row(path, reader.line_num, row)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("--curves", str(path), f"must be a CSV file of curves; {reason}") from None


def _row(path: Path, line: int, row: dict[str, str]) -> tuple[Cell, float, float, float]:
    numbers = []
    for name in ("chinchilla", "step", "tokens", "c4en_loss"):
        try:
            numbers.append(float(row[name]))
        except (TypeError, ValueError):
            raise ConfigError(
                "--curves", str(path), f"line {line}, column {name}: must be a number, not {row[name]!r}"
            ) from None
    ratio, step, tokens, loss = numbers
    return Cell(row["optimizer"], row["params"], ratio), step, tokens, loss if math.isfinite(loss) else math.inf
