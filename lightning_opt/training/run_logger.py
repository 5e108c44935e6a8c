"""The sole writer of ``metrics.csv``: `fit` makes one on the first rank only."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from lightning_opt.run_folder import METRIC_COLUMNS, read_metrics, write_text


class RunLogger(Logger):
    """Writes one row per logged optimizer step; what arrives later for the same step joins its row.

    Lightning's own CSV logger writes a second row for a step with validation, and deletes the file of a folder that
    is used again.

    Args:
        path: the table.
        columns: what this run will log besides `METRIC_COLUMNS`; the header is written before the first row. A metric
            nobody announced (somebody's own callback) adds its column by rewriting the file once.
        tokens_per_step: tokens of one optimizer step over all devices.
        current_step: optimizer steps done so far.
        start_step: rows after it are dropped; None: all stay until `load_state_dict`.
        clock: seconds; injected by tests.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        *,
        tokens_per_step: int,
        current_step: Callable[[], int],
        start_step: int | None = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__()
        self.path = path
        self._tokens_per_step = tokens_per_step
        self._current_step = current_step
        self._clock = clock
        self._columns = list(dict.fromkeys([*METRIC_COLUMNS, *columns]))
        self._row: dict[str, Any] = {}
        kept = self._rows_until(start_step)
        self._began = clock() - (kept[-1].get("time_s") or 0.0 if kept else 0.0)
        self._rewrite(kept)

    @property
    def name(self) -> str:
        """Unused by us: the run folder has the name."""
        return "run"

    @property
    def version(self) -> str:
        """Unused by us: the run folder is the version."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml holds what was asked."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of the current optimizer step.

        Args:
            metrics: name to value; Lightning's ``epoch`` is left out.
            step: ignored: Lightning counts it from another base in fit and in validate.
        """
        now = self._current_step()
        if self._row and self._row["step"] != now:
            self._flush()
        if not self._row:
            self._row = {"step": now, "tokens": now * self._tokens_per_step}
        self._row["time_s"] = round(self._clock() - self._began, 4)
        self._row |= {name: float(value) for name, value in metrics.items() if name != "epoch"}

    def state_dict(self) -> dict[str, Any]:
        """The row that is not on disk yet, and how many seconds the run has taken."""
        return {"row": dict(self._row), "seconds": self._clock() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any], step: int) -> None:
        """Goes on from `state_dict` as it was after that step: later rows are dropped."""
        self._row = dict(state_dict["row"])
        self._began = self._clock() - state_dict["seconds"]
        self._rewrite(self._rows_until(self._row["step"] - 1 if self._row else step))

    def close(self) -> None:
        """Writes the last row. Not `finalize`: Lightning calls that before the validation that ends a run."""
        self._flush()

    def _flush(self) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        unknown = [name for name in row if name not in self._columns]
        if unknown:
            kept = self._rows_until(None)
            self._columns += unknown
            self._rewrite(kept)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _rows_until(self, step: int | None) -> list[dict[str, Any]]:
        columns = read_metrics(self.path)
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self._columns += [name for name in names if name not in self._columns]
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        for row in rows:
            row |= {name: int(row[name]) for name in ("step", "tokens") if name in row}
        return [row for row in rows if step is None or row["step"] <= step]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
