"""The sole writer of ``metrics.csv``: `fit` makes one on the first rank only."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from lightning_opt.run_folder import METRIC_COLUMNS, append_text, late_events, read_metrics, write_text

log = logging.getLogger("lightning_opt.training")


class RunLogger(Logger):
    """Writes one row per logged optimizer step; what arrives later for the same step joins its row.

    Lightning's own CSV logger writes a second row for a step with validation, and deletes the file of a folder that
    is used again. While the disk is full, rows wait in memory.

    Args:
        path: the table.
        columns: what this run will log besides `METRIC_COLUMNS`; the header is written before the first row. A metric
            nobody announced (somebody's own callback) adds its column by rewriting the file once.
        tokens_per_step: tokens of one optimizer step over all devices.
        current_step: optimizer steps done so far.
        start_step: rows after it are dropped; None: all stay until `load_state_dict`.
        clock: seconds; injected by tests.
        cpu_clock: seconds that this process, all its threads together, has computed; injected by tests.
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
        cpu_clock: Callable[[], float] = time.process_time,
    ):
        super().__init__()
        self.path = path
        self._tokens_per_step = tokens_per_step
        self._tokens_apart = 0  # what earlier steps of another size make up
        self._current_step = current_step
        self._clock, self._cpu_clock = clock, cpu_clock
        self._columns = list(dict.fromkeys([*METRIC_COLUMNS, *columns]))
        self._row: dict[str, Any] = {}
        self._late: list[dict[str, Any]] = []  # rows that found the disk full
        kept = self._rows_until(start_step)
        last = kept[-1] if kept else {}
        self._began = clock() - (last.get("time_s") or 0.0)
        self._cpu_began = cpu_clock() - (last.get("cpu_time_s") or 0.0)
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
            self._row = {"step": now, "tokens": self._tokens(now)}
        self._row["time_s"] = round(self._clock() - self._began, 4)
        self._row["cpu_time_s"] = round(self._cpu_clock() - self._cpu_began, 4)
        self._row |= {name: float(value) for name, value in metrics.items() if name != "epoch"}

    def state_dict(self) -> dict[str, Any]:
        """The rows that are not on disk yet, and how many seconds and tokens the run has taken."""
        tokens = self._tokens(self._current_step())
        seconds, computed = self._clock() - self._began, self._cpu_clock() - self._cpu_began
        row, late = dict(self._row), list(self._late)
        return {"row": row, "late": late, "seconds": seconds, "cpu_seconds": computed, "tokens": tokens}

    def load_state_dict(self, state_dict: dict[str, Any], step: int) -> None:
        """Goes on from `state_dict` as it was after that step: later rows are dropped."""
        self._row = dict(state_dict["row"])
        self._tokens_apart = state_dict["tokens"] - step * self._tokens_per_step
        self._began = self._clock() - state_dict["seconds"]
        self._cpu_began = self._cpu_clock() - state_dict.get("cpu_seconds", 0.0)
        missing = [*state_dict["late"], *([self._row] if self._row else [])]
        self._rewrite([*self._rows_until(missing[0]["step"] - 1 if missing else step), *state_dict["late"]])

    def close(self) -> None:
        """Writes the last row. Not `finalize`: Lightning calls that before the validation that ends a run."""
        self._flush()

    def _flush(self) -> None:
        rows = [*self._late, self._row] if self._row else self._late
        self._row = {}
        try:
            self._append(rows)
            self._late = []
        except OSError as error:
            if not self._late:  # told once
                log.warning("%s cannot be written (%s): its rows wait in memory", self.path.name, error.strerror)
            self._late = rows
        late_events()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        unknown = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if unknown:
            self._rewrite([*self._rows_until(None), *rows], [*self._columns, *unknown])
            self._columns += unknown
        elif rows:
            append_text(self.path, _lines(rows, self._columns))

    def _tokens(self, step: int) -> int:
        return step * self._tokens_per_step + self._tokens_apart

    def _rows_until(self, step: int | None) -> list[dict[str, Any]]:
        columns = read_metrics(self.path)
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self._columns += [name for name in names if name not in self._columns]
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        for row in rows:
            row |= {name: int(row[name]) for name in ("step", "tokens") if name in row}
        return [row for row in rows if step is None or row["step"] <= step]

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
        columns = columns or self._columns
        write_text(self.path, _lines([dict(zip(columns, columns, strict=True)), *rows], columns))


def _lines(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
