"""How a run's records are written and read: JSON, events, and the metrics table."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_opt.run_folder.json_lines import read_json_lines

log = logging.getLogger("lightning_opt.run_folder")

METRIC_COLUMNS = (
    "step",
    "tokens",
    "time_s",
    "cpu_time_s",
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

_late: dict[Path, str] = {}  # events that found the disk full
_late_lock = threading.Lock()  # a checkpoint's writer has events too


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a kill, sees the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the old content is still there, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def overwrite_text(path: Path, text: str) -> None:
    """Writes a text into the blocks that a file has already: for a disk without room for another file beside it.

    The rest of a longer old content becomes spaces, so that one write is all.

    Raises:
        OSError: there is no such file, or it has too little room.
    """
    content = text.encode()
    with path.open("r+b", buffering=0) as file:
        there = os.fstat(file.fileno())
        if len(content) > there.st_blocks * 512:  # a unit of its own, whatever the file system's
            raise OSError(f"{path.name} has no room for {len(content)} bytes")
        file.write(content.ljust(there.st_size))


def append_text(path: Path, text: str) -> None:
    """Appends lines to a text file, all or nothing; a last line that a kill has torn stays on a line of its own.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"
        content = memoryview(("\n" * bool(torn) + text).encode())
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically; NaN and infinities become null, since what was not measured is null."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


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
    """Appends one line to ``events.jsonl``: skips, alarms, phase switches and whatever else happened once.

    A disk that is full raises nothing: the line is kept in memory, and follows with the next or by `late_events`. Where
    the folder is not, or no more, there is nothing to be told.
    """
    line = json.dumps(_finite({"time": round(time.time(), 3), "kind": kind, **fields}), allow_nan=False, default=str)
    with _late_lock:
        _late[path] = _late.get(path, "") + line + "\n"
    late_events()


def late_events() -> None:
    """Writes the events that could not be written yet, where that is possible now."""
    with _late_lock:
        for path, lines in list(_late.items()):
            if not path.parent.is_dir():  # deleted: it is not to come back by this
                del _late[path]
                continue
            try:
                append_text(path, lines)
            except OSError as error:
                if lines.count("\n") == 1:  # told once
                    log.warning("%s cannot be written (%s): events wait in memory", path.name, error.strerror)
            else:
                del _late[path]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads ``events.jsonl``; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    return list(read_json_lines(path, torn=True))


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
