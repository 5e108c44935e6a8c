"""What to do next: exact commands to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from lightning_opt.checkpoints.manifest import find
from lightning_opt.reports.reading import Run, override_key
from lightning_opt.run_folder import starts_elsewhere

_OTHERS = ("adamw", "lion")


def shown_path(folder: Path) -> str:
    """The folder as a command can name it: relative to the working folder where it lies inside it."""
    absolute = folder.resolve()
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def next_commands(run: Run) -> tuple[tuple[str, str], ...]:
    """Pairs of what it does and the command.

    Where it is not known what was asked, no command claims to repeat it. A secret that was on the command line is not
    repeated: its place says so and has to be filled in.
    """
    path = shlex.quote(shown_path(run.folder))
    again, overrides = "Train again with the same configuration and seed", list(run.overrides)
    if run.state in ("PREEMPTED", "RUNNING", "FAILED"):
        again, overrides = "Resume this run: the same command takes up its folder", _resuming(run)
        if not find(run.folder / "checkpoints"):
            if any(run.folder.glob("checkpoints/step-*")):
                again = "Move this folder away and start anew: none of its checkpoints can be read"
            elif not starts_elsewhere(run.asked("resume")):
                again = "Start this run over, in the same folder: it has no checkpoint"
    elif run.state == "DIVERGED":
        again = "Train again, with half the rate"
        overrides = [*without(overrides, r"optimizer\.lr_scale"), f"optimizer.lr_scale={_half_scale(run):g}"]
    train = (again, command(["python", "train.py", *overrides]))
    score = ("Score the trained model on the real test sets", f"python -m recipes.evaluate {path} --suite full")
    compare = ("Compare with another optimizer on the same data and tokens", _compare(run))
    draw = ("Draw this report again", f"python -m recipes.report {path}")
    scores = (score,) if (run.folder / "model").is_dir() else ()
    return (*scores, draw) if run.lacks("overrides.txt") else (train, *scores, compare, draw)


def _resuming(run: Run) -> list[str]:
    """The overrides that find this very folder again: one that is not where runs go by themselves must be named."""
    anew = r"resume" if run.asked("resume") == "never" else r""
    path, name = shown_path(run.folder), run.asked("name")
    by_itself = path.startswith(f"runs/{name}/") and f"-{run.status.get('config_hash')}" in run.folder.name
    quoted = path if re.fullmatch(r"[\w./+-]+", path) else "'" + path.replace("'", r"\'") + "'"
    return without(run.overrides, anew) + ([] if by_itself else [f"hydra.run.dir={quoted}"])


def _compare(run: Run) -> str:
    mine = str(run.asked("optimizer.name") or run.summary.get("optimizer") or "lion")
    names = [mine, next(name for name in _OTHERS if name != mine)]
    kept = without(run.overrides, r"optimizer|optimizer\..*|name|resume|resume_allow|hydra\.run\.dir|hydra\.sweep\.dir")
    return command(["python", "train.py", "-m", f"optimizer={','.join(names)}", *kept])


def without(overrides: Iterable[str], pattern: str) -> list[str]:
    """Overrides whose key (without Hydra's ``+`` and ``~``) does not match."""
    return [override for override in overrides if not re.fullmatch(pattern, override_key(override))]


def _half_scale(run: Run) -> float:
    scale = run.asked("optimizer.lr_scale")
    return 0.5 * scale if isinstance(scale, int | float) and scale > 0 else 0.5


def command(words: list[str]) -> str:
    """The words as a shell takes them."""
    return " ".join(shlex.quote(word) for word in words)
