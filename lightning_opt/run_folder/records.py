"""How a run's records are written and read: JSON, events, and the metrics table."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

METRIC_COLUMNS = (
    "step",
    "tokens",
    "time_s",
    "train/loss",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
    "grad_norm",
    "grad_norm_change",
    "loss_volatility",
    "tokens_per_s_per_device",
    "step_ms",
    "data_ms",
    "forward_backward_ms",
    "optimizer_ms",
    "other_ms",
    "optimizer_share",
    "mfu",
    "memory_allocated_bytes",
    "memory_reserved_bytes",
    "memory_peak_bytes",
    "optimizer_state_bytes",
)
"""Columns every run has; `val/loss/<corpus>`, `lr/<role>` and `grad_norm/<role>` follow for what the run holds."""


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a kill, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically; NaN and infinities become null, since what was not measured is null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _finite(value.item())
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing file is an empty one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def append_event(path: Path, kind: str, **fields: Any) -> None:
    """Appends one line to ``events.jsonl``: skips, alarms, phase switches and whatever else happened once."""
    line = json.dumps(_finite({"time": round(time.time(), 3), "kind": kind, **fields}), allow_nan=False, default=str)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads ``events.jsonl``; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def read_metrics(path: Path) -> dict[str, list[float | None]]:
    """Reads ``metrics.csv`` into columns; an empty cell is None. A missing file gives no columns."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows:
        return {}
    header, *body = rows
    complete = [row for row in body if len(row) == len(header)]
    return {name: [_number(row[i]) for row in complete] for i, name in enumerate(header)}


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
