"""Markdown's escaping and tables, so that nothing a file says can become markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ACTIVE = re.compile(r"([\\`*\[\]|~])")


def escape(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = _ACTIVE.sub(r"\\\1", flat)
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)
    return re.sub(r"(https?|ftp)://", r"\1:&#47;&#47;", flat)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: frozenset[int] = frozenset(),
    links: Sequence[str] = (),
    best: frozenset[int] = frozenset(),
) -> str:
    """A Markdown table; ``numeric`` columns are aligned right, ``links`` are of the first cells, ``best`` rows bold."""
    marks = ["---:" if index in numeric else "---" for index in range(len(header))]
    body = [[escape(cell) for cell in row] for row in rows]
    for index in best:
        body[index] = [f"**{cell}**" if cell else cell for cell in body[index]]
    for row, link in zip(body, links, strict=False):
        row[0] = f"[{row[0]}]({link})" if link else row[0]
    lines = [[escape(cell) for cell in header], marks, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(text: str, language: str = "") -> str:
    """A code block, with a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    bars = "`" * max(3, longest + 1)
    return f"{bars}{language}\n{text.rstrip()}\n{bars}"
