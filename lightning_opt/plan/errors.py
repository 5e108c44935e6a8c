"""What every refusal of the user's input looks like: one line with the field, the value and what would be right."""

from __future__ import annotations

import re
from typing import Any

from lightning_opt.plan.secrets import clean, mask


class ConfigError(ValueError):
    """A value the user gave is wrong; `str()` is one line with the field, the value and what would be right.

    A secret is not shown.

    Attributes:
        field: dotted name, for example ``optimizer.lr``.
        value: what was given.
        expected: what would be right, for example ``must be a number > 0``.
    """

    def __init__(self, field: str, value: Any, expected: str) -> None:
        self.field, self.value, self.expected = field, value, expected
        super().__init__(f"{mask(field)} = {show(clean(value, field))}: {mask(' '.join(str(expected).split()))}")

    def __reduce__(self) -> tuple[type, tuple[str, Any, str]]:
        return type(self), (self.field, self.value, self.expected)


def show(value: Any) -> str:
    """The value on one line, as a user would write it on the command line, shortened in the middle to 80 characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = value if value and not re.search(r"\s|[\x00-\x1f]", value) else repr(value)
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:31]}...{text[-46:]}"  # a path is told by its end
