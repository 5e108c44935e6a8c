"""Wording of refusals: the closest right word first, then the whole list."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: object, valid: Iterable[str]) -> str:
    """What would be right instead of ``word``, for a ConfigError: "did you mean 'lr'? one of betas, eps, lr"."""
    choices = sorted(valid)
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    listed = "one of " + ", ".join(choices)
    return f"{near[0]} (did you mean it?); {listed}" if near else listed
