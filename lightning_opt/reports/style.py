"""The look, defined once: colours of figures and page, in light and dark, and who wears which.

The first hues keep apart under the common colour-vision deficiencies (after Okabe and Ito, "Color Universal Design",
2008), each darkened for white paper and lightened for a dark screen. A figure is drawn in the light values; the page
replaces every one of them by its CSS variable, so one drawing serves both modes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

# name -> (light, dark). All light values differ, because the light value is how a drawing names its colour.
COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#fbfbfa", "#14161a"),
    "surface": ("#ffffff", "#1c1f25"),
    "raised": ("#f3f4f5", "#262a31"),
    "line": ("#dfe2e6", "#353a43"),
    "ink": ("#1a1d21", "#e8eaed"),
    "muted": ("#5a626d", "#a3abb6"),
    "faint": ("#b9c0c9", "#5b6370"),
    "blue": ("#0b62a4", "#6cb4ee"),
    "orange": ("#c8500a", "#f0904d"),
    "green": ("#0a7f5a", "#3cc79a"),
    "pink": ("#a8457f", "#e290c3"),
    "ochre": ("#9a7400", "#e0bf4e"),
    "indigo": ("#4a46a8", "#a9a6f5"),
    "sky": ("#3593c4", "#9bdcff"),
    "grey": ("#7a828c", "#8f98a3"),
    "plum": ("#6f2482", "#d08be4"),
    "lime": ("#6a8a00", "#b6d94c"),
    "brown": ("#7b4b2a", "#cc9d7a"),
    "teal": ("#007c80", "#4ed2d2"),
    "good": ("#0b7a52", "#45c996"),
    "warn": ("#8f6400", "#e8b84a"),
    "bad": ("#b3261e", "#ff8a80"),
}

ROLES: dict[str, str] = {
    "matrix": "blue",
    "embedding": "orange",
    "head": "green",
    "norm": "pink",
    "bias": "ochre",
    "expert": "indigo",
    "router": "sky",
    "other": "grey",
    "default": "grey",
}

STEP_PARTS: dict[str, str] = {
    "forward + backward": "blue",
    "optimizer": "orange",
    "data": "ochre",
    "other": "faint",
    "forward, backward and other": "blue",
}

STATES: dict[str, str] = {
    "FINISHED": "good",
    "RUNNING": "muted",
    "PREEMPTED": "warn",
    "DIVERGED": "bad",
    "FAILED": "bad",
}

_HUES = ("blue", "orange", "green", "pink", "ochre", "indigo", "sky", "grey")
_MORE = ("blue", "orange", "green", "pink", "ochre", "indigo", "sky", "plum", "lime", "brown", "teal", "grey")
_SOLID = 8  # hues that tell lines apart by themselves; from the ninth on, dashes help


def hexadecimal(name: str) -> str:
    """The light value of a colour: what figures draw with."""
    return COLOURS[name][0]


def role_colour(role: str) -> str:
    """Colour name of a parameter role; roles we do not know are grey."""
    return ROLES.get(role, "grey")


def corpus_colour(index: int) -> str:
    """Colour name of the corpus at this place of the mixture."""
    return _HUES[index % len(_HUES)]


def optimizer_colours(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Colour name of each optimizer, and whether its lines are dashed, which those from the ninth to the twentieth are.

    The two that most comparisons hold keep their colours from report to report; the others follow in order.
    """
    kept = {"AdamW": 0, "Lion": 1}
    asked = list(dict.fromkeys(names))
    free = (place for place in itertools.count() if place not in [kept[name] for name in asked if name in kept])
    places = {name: kept[name] if name in kept else next(free) for name in asked}
    return {name: (_MORE[place % len(_MORE)], _SOLID <= place < _SOLID + len(_MORE)) for name, place in places.items()}


def css_variables(dark: bool) -> str:
    """The colours as CSS custom properties, one line each."""
    return "\n".join(f"  --{name}: {pair[int(dark)]};" for name, pair in COLOURS.items())
