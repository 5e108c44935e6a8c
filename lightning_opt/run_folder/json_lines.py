"""Files of one JSON value a line: events, documents, records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NoJson(ValueError):
    """A line holds no JSON; the message names the line.

    Attributes:
        line: its number, from 1.
    """

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")
        self.line = line


def read_json_lines(path: Path, *, torn: bool = False) -> Iterator[Any]:
    """The values of a file, in order; of a packed one too, where its name ends in ``.gz``. Blank lines are no values.

    Args:
        path: the file.
        torn: leave lines out that are no JSON, which a kill may have cut off.

    Raises:
        OSError, EOFError: the file cannot be read, or is compressed and cut short.
        NoJson: see `torn`.
        UnicodeDecodeError: it is not UTF-8.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if torn:
                    continue
                raise NoJson(number, error.msg) from None
            yield value
