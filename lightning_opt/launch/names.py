"""Checks the names on a command line: groups, their options, fields; every refusal names the closest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf._utils import split_key

from lightning_opt.launch.compose import Composer
from lightning_opt.plan import ConfigError
from lightning_opt.plan.errors import show
from lightning_opt.plan.words import one_of

# Maps whose keys the user may add to or take away from.
OPEN = (
    ("callbacks",),
    ("logger",),
    ("optimizer", "roles"),
    ("optimizer", "phases"),
    ("data", "weights"),
    ("data", "phases"),
    ("data", "corpora"),
    *((name,) for name in ("budget", "reduced_budget", "search", "scales", "start", "space")),  # conf/study.yaml
)
_NULLABLE = ("experiment", "debug")
# What a file calls itself: changed alone, it would label a run as something that it is not.
_LABELS = {f"{group}.name": group for group in ("model", "data", "optimizer", "schedule", "scale")}


def is_group_choice(override: Override, composer: Composer) -> bool:
    """Whether this picks a file of a group; `optimizer={lr: 1}` sets fields instead."""
    return composer.is_group(override.key_or_group) and not isinstance(_value(override), dict)


def check_group(override: Override, composer: Composer) -> None:
    """Checks a group and its option.

    Raises:
        ConfigError: no such option, or the group may not be added, removed or null.
    """
    group, value = override.key_or_group, _value(override)
    if override.is_delete():
        if group != "tuned":
            raise ConfigError(
                f"~{group}", value, "cannot be left out: only ~tuned can, or entries of callbacks and logger"
            )
        return
    if override.is_add() and override.package is None and not group.startswith("hydra/"):
        raise ConfigError(f"+{group}", value, f"is already chosen once: leave out the +, {group}={show(value)}")
    if value is None:
        if group in _NULLABLE:
            return
        hint = "say ~tuned to leave it out" if group == "tuned" else one_of("", composer.options(group))
        raise ConfigError(group, value, hint)
    for option in value if isinstance(value, list) else [value]:
        name = show(option)
        if name not in composer.options_in(group) and name not in composer.options(group):
            raise ConfigError(group, name, one_of(name, composer.options(group)))


def check_field(override: Override, tree: dict[str, Any], composer: Composer) -> bool:
    """Checks a field's name against the configuration that the group choices make, `tree` (unresolved).

    Returns:
        Whether the field is new, in a map that takes new keys.

    Raises:
        ConfigError: no such field, or it may not be added or removed.
    """
    key, value = override.key_or_group, _value(override)
    sign = "~" if override.is_delete() else "+" if override.is_add() or override.is_force_add() else ""
    parts = tuple(split_key(key))
    for below in _keys(value) if isinstance(value, dict) and value else [()]:
        _check_label(".".join((*parts, *below)), _at(value, below))
    open_map = _is_open(parts, tree)
    if override.is_delete():
        if not open_map:
            raise ConfigError(f"~{key}", value, "cannot be left out; null switches off what can be switched off")
        _walk(parts, tree, f"~{key}", value, composer)
        return False
    if open_map and not _exists(parts, tree):
        return True
    _walk(parts, tree, f"{sign}{key}", value, composer)
    if override.is_add():
        raise ConfigError(f"+{key}", value, f"exists already: leave out the +, {key}={show(value)}")
    new = False
    for below in _keys(value) if isinstance(value, dict) else ():
        path = (*parts, *below)
        if _is_open(path, tree):
            new = new or not _exists(path, tree)
        else:
            _walk(path, tree, ".".join(path), _at(value, below), composer)
    return new


def _check_label(field: str, name: Any) -> None:
    if field in _LABELS:
        raise ConfigError(field, name, f"is what the chosen file calls itself: choose by {_LABELS[field]}=NAME")


def _value(override: Override) -> Any:
    return None if override.is_sweep_override() or override.value_type is None else override.value()


def _is_open(parts: tuple[str, ...], tree: Any) -> bool:
    here = (prefix for prefix in OPEN if prefix[0] in tree)  # those of conf/study.yaml are no fields of train.yaml
    if any(parts[: len(prefix)] == prefix and len(parts) > len(prefix) for prefix in here):
        return True
    target = str((tree.get("model") or {}).get("_target_", ""))
    return parts[0] == "model" and len(parts) > 1 and not target.startswith("lightning_opt.")


def _exists(parts: tuple[str, ...], tree: Any) -> bool:
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _at(value: Any, parts: tuple[str, ...]) -> Any:
    for part in parts:
        value = value[part]
    return value


def _keys(value: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, below in value.items():
        if isinstance(below, dict) and below:
            yield from ((str(key), *rest) for rest in _keys(below))
        else:
            yield (str(key),)


def _walk(parts: tuple[str, ...], tree: Any, field: str, value: Any, composer: Composer) -> None:
    node = tree
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if part.isdigit() and int(part) < len(node):
                node = node[int(part)]
                continue
            raise ConfigError(field, value, f"{'.'.join(parts[:depth])} is a list of {len(node)}, counted from 0")
        if not isinstance(node, dict) or part not in node:
            raise ConfigError(field, value, _suggest(parts, depth, node, tree, composer))
        node = node[part]


def _suggest(parts: tuple[str, ...], depth: int, node: Any, tree: dict[str, Any], composer: Composer) -> str:
    """The closest right name: among the siblings first, then anywhere."""
    siblings = [str(key) for key in node] if isinstance(node, dict) else []
    if depth == 0:
        siblings = [name for name in (*siblings, *composer.groups) if name != "hydra" and not name.startswith("hydra/")]
    where = ".".join(parts[:depth])
    text = f"{where} has no field {parts[depth]}" if where else "no such field"
    near, score = _nearest(parts[depth], siblings)
    best = ".".join((*parts[:depth], near, *parts[depth + 1 :])) if near else ""
    if score < 0.85:  # the same word elsewhere says more than a faintly similar one here
        elsewhere = sorted(
            (".".join(path) for path in _keys(tree) if path[0] != "hydra"), key=lambda p: (p.count("."), len(p))
        )
        by_last: dict[str, str] = {}
        for path in elsewhere:
            by_last.setdefault(path.rpartition(".")[2], path)
        last, other = _nearest(parts[-1], by_last)
        if other > score:
            best = by_last[last]
    text += f"; did you mean {best}?" if best else ";"
    if where and len(siblings) <= 24:
        text += f" it has {', '.join(sorted(siblings))}"
    elif not where:
        text += f" the sections are {', '.join(sorted({name for name in siblings if '/' not in name}))}"
    return text.rstrip(";")


def _nearest(word: str, known: Iterable[str]) -> tuple[str, float]:
    scored = [(difflib.SequenceMatcher(None, word, name).ratio(), name) for name in known]
    score, name = max(scored, key=lambda item: item[0], default=(0.0, ""))
    return (name, score) if score >= 0.5 else ("", 0.0)
