"""The sweep folder: one run folder per job, and ``sweep.json`` that says which job is which.

The ledger is the run folders themselves: what a job has come to stands in its own ``status.json``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_opt.run_folder.folder import FolderRefused, RunFolder, claim
from lightning_opt.run_folder.records import read_json, write_json
from lightning_opt.run_folder.status import FINISHED_STATES, read_status

_LONGEST_NAME = 96


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        folder: its run folder; it need not exist yet.
        config_hash: identity of its configuration.
        overrides: what its command line would be, without secrets and without what concerns the sweep alone.
        differs: the overrides that are not the same in all jobs, key to value.
        command: the command line that asked for it last, without secrets.
    """

    folder: RunFolder
    config_hash: str
    overrides: list[str]
    differs: dict[str, Any]
    command: str = ""

    @property
    def state(self) -> str | None:
        """What its run folder says; None before it starts."""
        return read_status(self.folder.status).get("state")

    @property
    def is_done(self) -> bool:
        """Whether it is a result, which no later command runs again."""
        return self.state in FINISHED_STATES

    def label(self, *, short: bool = False) -> str:
        """What differs, on one line: ``optimizer=lion optimizer.lr_scale=2``; where nothing does, its folder's name.

        Args:
            short: only the last words of each key, as many as tell them apart.
        """
        names = short_names(self.differs) if short else {key: key for key in self.differs}
        return " ".join(f"{names[key]}={_shown(value)}" for key, value in self.differs.items()) or self.folder.path.name


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's folder: every path in it by name."""

    path: Path

    sweep = property(lambda self: self.path / "sweep.json", doc="The command and its jobs.")
    status = property(lambda self: self.path / "status.json", doc="The sweep's own state.")
    report_html = property(lambda self: self.path / "report.html", doc="The comparison as a page.")
    report_md = property(lambda self: self.path / "report.md", doc="The comparison as Markdown.")
    table = property(lambda self: self.path / "sweep.csv", doc="One row per job.")

    @property
    def command(self) -> str:
        """The newest command line that asked for jobs."""
        return str(read_json(self.sweep).get("command") or "")

    def jobs(self) -> list[SweepJob]:
        """The jobs of ``sweep.json``, in order."""
        return [
            SweepJob(
                RunFolder(self.path / job["folder"]),
                job["config_hash"],
                job["overrides"],
                job["differs"],
                job.get("command", ""),
            )
            for job in read_json(self.sweep).get("jobs", [])
        ]

    def write(self, command: str, swept: Sequence[str], jobs: Sequence[SweepJob]) -> None:
        """Writes ``sweep.json``.

        Args:
            command: the newest command line, without secrets.
            swept: the keys that differ between the jobs.
            jobs: all of them, whose folders lie in this one.
        """
        entries = [
            {
                "folder": job.folder.path.name,
                "config_hash": job.config_hash,
                "overrides": job.overrides,
                "differs": job.differs,
                "command": job.command,
            }
            for job in jobs
        ]
        write_json(self.sweep, {"command": command, "swept": list(swept), "jobs": entries})


def claim_sweep(
    root: Path, hashes: Iterable[str], *, resume: str = "auto", path: Path | None = None
) -> tuple[SweepFolder, str]:
    """Claims a new sweep folder, or adopts the newest one of the same jobs, finished or not, whose owner is gone.

    Args:
        root: the folder of all runs; the new folder is ``root/sweeps/<UTC time>-<hash of the jobs>``.
        hashes: each job's `config_hash`.
        resume: ``auto``, or ``never`` for a new folder.
        path: the folder itself (the user named it); it may hold a sweep already, to which the jobs are then added.

    Returns:
        The folder, which exists, and the sweep's hash.

    Raises:
        FolderRefused: the named folder holds something else, or a sweep in progress.
    """
    hash = hashlib.sha256(",".join(sorted(set(hashes))).encode()).hexdigest()[:8]
    if path is not None and RunFolder(path).config.exists():
        raise FolderRefused("a new folder or one of a sweep: this one holds a single run")
    folder, _ = claim(root, "sweeps", hash, resume=resume, path=path, grows=True)
    return SweepFolder(folder.path), hash


class _Asked(Protocol):
    @property
    def command(self) -> str: ...


_Job = TypeVar("_Job", bound=_Asked)


def to_go_on(jobs: Iterable[_Job]) -> dict[str, list[_Job]]:
    """The jobs by the command, as it is typed, that runs them: a sweep may have grown by several."""
    found: dict[str, list[_Job]] = {}
    for job in jobs:
        found.setdefault(f"python {job.command}", []).append(job)
    return found


def job_name(differs: dict[str, Any], config_hash: str, name: str = "") -> str:
    """A job's folder name, of ``[A-Za-z0-9._+-]`` only: ``optimizer-lion_lr_scale-0.5-1a2b3c4d``.

    Args:
        differs: the overrides in which it differs from the others.
        config_hash: identity of its configuration, which makes the name unique.
        name: what to call it where it differs in nothing.
    """
    names = short_names(differs)
    words = "_".join(f"{names[key]}-{_shown(value)}" for key, value in differs.items()) or name
    slug = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._+-]+", "-", words))[:_LONGEST_NAME].strip("-._")
    return f"{slug}-{config_hash}" if slug else config_hash


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key's shortest ending that no other of the keys shares: ``optimizer.lr_scale`` is ``lr_scale``."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, mine in parts.items():
        for length in range(1, len(mine) + 1):
            ending = mine[-length:]
            if sum(other[-length:] == ending for other in parts.values()) == 1:
                break
        names[key] = ".".join(ending)
    return names


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value).replace(" ", "")
