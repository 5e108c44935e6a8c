"""Wording of refusals: the closest right word and all of them."""

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
