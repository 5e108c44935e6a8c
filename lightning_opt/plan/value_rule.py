"""What one field may hold: kinds, ranges and words, and how a given value becomes the one type that the code uses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What one field may hold.

    Attributes:
        kind: ``float``, ``int``, ``bool``, ``str``, ``choice``, ``floats`` or ``words`` (lists) or ``warmup``.
        low: smallest value; ``low_open`` excludes it.
        high: largest value; ``high_open`` excludes it.
        choices: allowed words (``choice``, ``words``), or words allowed beside a number (other kinds).
        pattern: regular expression a word may match instead of being one of `choices`.
        booleans: the choices that false and true mean; YAML reads an unquoted `off` as false.
        length: number of items of ``floats``.
        none: what null means, or an empty string where null is refused.
        hint: shown after the range, for example typical values.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    choices: Sequence[str] = ()
    pattern: str = ""
    booleans: tuple[str, str] | None = None
    length: int = 0
    none: str = ""
    hint: str = ""
    expected: str = field(default="", compare=False)

    def describe(self) -> str:
        """What would be right, as the end of a sentence that starts with the field and the value."""
        if self.expected:
            return self.expected
        if self.kind == "choice":
            text = f"must be one of {', '.join(self.choices)}"
        elif self.kind == "words":
            text = f"must be a list of some of {', '.join(self.choices)}"
        else:
            noun = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a word"}
            many = f"a list of {self.length} numbers, each" if self.length else "a list of numbers, each"
            text = "must be " + noun.get(self.kind, many)
            bounds = []
            if self.low is not None:
                bounds.append(f"{'>' if self.low_open else '>='} {self.low:g}")
            if self.high is not None:
                bounds.append(f"{'<' if self.high_open else '<='} {self.high:g}")
            text += " " + " and ".join(bounds) if bounds else ""
            if self.choices:
                text += f", or {' or '.join(self.choices)}"
        if self.none:
            text += f", or null for {self.none}"
        return f"{text} ({self.hint})" if self.hint else text

    def _number(self, value: Any) -> float | int | None:
        """The value as this rule's number, or None where it is not one in range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return None
        if self.high is not None and (value > self.high or (self.high_open and value == self.high)):
            return None
        if self.kind == "int":
            return int(value) if value == int(value) else None  # 1e9 tokens is a whole number too
        return float(value)

    def normalise(self, value: Any) -> Any:
        """The value in the one type the code uses.

        Raises:
            ValueError: the value breaks the rule.
        """
        result: Any = None
        if value is None:
            if self.none:
                return None
        elif self.kind == "words":
            known = isinstance(value, (list, tuple)) and all(item in self.choices for item in value)
            result = tuple(word for word in self.choices if word in value) if known and value else None
        elif isinstance(value, bool) and self.booleans:
            return self.booleans[value]
        elif isinstance(value, str) and (value in self.choices or (self.pattern and re.fullmatch(self.pattern, value))):
            return value
        elif self.kind in {"float", "int"}:
            result = self._number(value)
        elif self.kind == "bool":
            result = value if isinstance(value, bool) else None
        elif self.kind == "str":
            result = value if isinstance(value, str) and value.strip() else None
        elif self.kind == "floats" and isinstance(value, (list, tuple)):
            items = [self._number(item) for item in value]
            if None not in items and (not self.length or len(items) == self.length):
                result = tuple(items)
        elif self.kind == "warmup":
            result = None if self.low_open and value == 0 else _warmup(value)
        if result is None:
            raise ValueError(self.describe())
        return result


def _warmup(value: Any) -> int | float | None:
    """Fraction of the run (< 1) or whole steps (>= 1); the float 1.0 could mean either, so it is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if 0 <= value < 1:
        return float(value)
    return int(value) if value >= 1 and value == int(value) and not (isinstance(value, float) and value == 1) else None
