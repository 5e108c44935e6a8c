"""Which checkpoint a run starts from, and whether it may."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.checkpoints import Checkpoint, Damaged, find, newest_good, verify
from lightning_opt.checkpoints.manifest import read_manifest
from lightning_opt.plan import ConfigError, check_same, closest, length_changes, near_path
from lightning_opt.run_folder import RunFolder, append_event, read_events, starts_elsewhere

log = logging.getLogger("lightning_opt.job")

_ORDER = {"seed", "data", "tokenizer", "sequence_length"}  # what the order of the data follows from


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        path: the checkpoint's folder.
        step: optimizer steps done there.
        other_optimizer: its optimizer's state is of another optimizer, and may not fit.
        notes: what is to be said about it, a line each.
    """

    path: Path
    step: int
    other_optimizer: bool = False
    notes: tuple[str, ...] = ()


def check_named(config: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks ``resume=PATH`` by names and manifests alone: nothing heavy is imported, no file is hashed.

    Args:
        config: the resolved configuration.
        now: `plan.identity` of it.

    Raises:
        ConfigError: there is no checkpoint, or the newest is of another run than this.
    """
    _check(_named(config["resume"])[0], config, now)


def choose(folder: RunFolder, config: dict[str, Any], now: dict[str, Any]) -> Start | None:
    """The newest good checkpoint of the run's own folder, else what ``resume=PATH`` names, else None: start anew.

    Warns of each damaged one that it passes over, and writes down from where the run goes on. A run that has
    checkpoints but no good one never starts over by itself.

    Args:
        folder: the run's.
        config: the resolved configuration.
        now: `plan.identity` of this run, data included.

    Raises:
        ConfigError: the checkpoint is of another run than this in something that ``resume_allow`` does not name, the
            user named one that is damaged, or none of the run's own can be used; those stay where they are.
    """
    from lightning_opt.checkpoints import clear_leftovers  # heavy: a command is checked without it

    clear_leftovers(folder.checkpoints)
    bad: list[Damaged] = []
    found, elsewhere = newest_good(folder.checkpoints, bad.append), False
    if found is None and bad:
        raise _none_good(folder, config["resume"], bad)
    if found is None and starts_elsewhere(config["resume"]):
        found, elsewhere = _good(config["resume"], bad), True
    for damage in bad:
        _pass_over(damage, folder)
    if found is None:
        if folder.metrics.exists():
            append_event(folder.events, "restarted")
        return None
    changed = _check(found, config, now, own=None if elsewhere else folder)
    shown = str(found.path if elsewhere else found.path.relative_to(folder.path))
    append_event(folder.events, "resumed", step=found.step, checkpoint=shown)
    notes = (f"from step {found.step}: {shown}", *_notes(found.meta.get("identity") or {}, now, changed))
    return Start(found.path, found.step, "optimizer" in changed, notes)


def rewound(folder: RunFolder, step: int) -> tuple[int, int]:
    """The last rewind from behind a step: which of the run it was, and the first sequence that was left to train on.

    Zeros where there was none. A checkpoint from after that rewind knows both; to be told again changes nothing.

    Args:
        folder: the run's.
        step: optimizer steps done where the run goes on.
    """
    for event in reversed(read_events(folder.events)):
        if event.get("kind") == "rewound" and event["step"] > step:
            return event["count"], event["not_before"]
    return 0, 0


def _named(where: str) -> list[Checkpoint]:
    """The complete checkpoints that a path means, newest first: of a run, of its checkpoints folder, or one alone."""
    path = Path(where)
    if not path.is_dir():
        word = closest(where, ("auto", "never"))
        hint = f"; did you mean {word}?" if word else near_path(path)
        what = "must be auto, never, or the path of a run, its checkpoints or one of them"
        raise ConfigError("resume", where, f"{what}: not found{hint}")
    if _is_one(path):
        return [_whole(read_manifest, path)]
    if not (found := find(path / "checkpoints" if (path / "checkpoints").is_dir() else path)):
        raise ConfigError("resume", where, "holds no checkpoint")
    return found


def _is_one(path: Path) -> bool:
    return bool(re.fullmatch(r"step-\d+", path.resolve().name))


def _whole(look: Callable[[Path], Checkpoint], path: Path) -> Checkpoint:
    try:
        return look(path)
    except Damaged as damage:
        raise ConfigError("resume", str(path), f"must be whole, but {damage.reason}") from None


def _good(where: str, bad: list[Damaged]) -> Checkpoint:
    """The checkpoint that a path means, its files compared with their hashes; `bad` takes those that it passes over."""
    newest = _named(where)[0]
    if _is_one(Path(where)):
        return _whole(verify, newest.path)
    if (good := newest_good(newest.path.parent, bad.append)) is None:
        raise ConfigError("resume", where, f"holds no checkpoint that can be used: {_reasons(bad)}")
    return good


def _pass_over(damage: Damaged, folder: RunFolder) -> None:
    """Says so; one of the run's own that is damaged goes out of the way, one that may be good tomorrow stays."""
    what = "cannot be used" if damage.unreadable else "is damaged"
    log.warning("resume     %s %s and passed over: %s", damage.path, what, damage.reason)
    if damage.path.parent == folder.checkpoints and not damage.unreadable:
        from lightning_opt.checkpoints import set_aside

        log.warning("           it is kept as %s", set_aside(damage.path))
    append_event(folder.events, "checkpoint_bad", checkpoint=damage.path.name, reason=damage.reason)


def _none_good(folder: RunFolder, resume: str, bad: list[Damaged]) -> ConfigError:
    anew = f"move {folder.path} away" if starts_elsewhere(resume) else "resume=never"
    what = f"none of {folder.checkpoints} can be used: {_reasons(bad)}; to start anew: {anew}"
    return ConfigError("resume", resume, what)


def _reasons(bad: list[Damaged]) -> str:
    return "; ".join(f"{damage.path.name}: {damage.reason}" for damage in bad)


def _check(found: Checkpoint, config: dict[str, Any], now: dict[str, Any], own: RunFolder | None = None) -> list[str]:
    """Names that differ and may; of a checkpoint from elsewhere, some of this run must be left to train."""
    what, ends = str(own.path) if own else config["resume"], now["length"]["max_steps"]
    changed = check_same(found.meta.get("identity") or {}, now, config["resume_allow"], what)
    if own is None and ends is not None and found.step >= ends:
        raise ConfigError("resume", what, f"is at step {found.step}, and this run ends at {ends}: ask for more steps")
    return changed


def _notes(saved: dict[str, Any], now: dict[str, Any], changed: list[str]) -> list[str]:
    lines = [f"another {name.replace('_', ' ')} than it was saved with, as allowed" for name in changed]
    if _ORDER & set(changed):
        lines.append("the data comes in another order from here on: some of what was seen may come again")
    if not saved:
        lines.append("the checkpoint does not say what run it is of: nothing was compared")
    if length := length_changes(saved, now):
        lines.append(f"another length: {', '.join(length)}")
    return lines
