"""Wording: refusals that name the closest right word, amounts, spans of time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def closest(word: str, known: Iterable[object]) -> str:
    """The known word most like `word`, or an empty string."""
    return next(iter(difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)), "")


def one_of(word: str, known: Iterable[object]) -> str:
    """The end of a sentence that names the closest known word and all of them."""
    names, near = sorted(str(name) for name in known), closest(word, known)
    return f"must be one of {', '.join(names)}" + (f"; did you mean {near}?" if near else "")


def near_path(path: Path) -> str:
    """Names the first part of a path that is missing, and the entry most like it; empty where nothing is."""
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            near = closest(part.name, [entry.name for entry in part.parent.iterdir()]) if part.parent.is_dir() else ""
            return f" ({part.parent} holds no {part.name}" + (f"; did you mean {part.parent / near}?)" if near else ")")
    return ""


def amount(count: float, unit: str) -> str:
    """``12.3 MB``, ``3 Gtokens``: three figures and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """A span of time: 4.2 s, 41 s, 2 min 17 s, 3 h 05 min, 2 d 04 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"
