"""Names inside a run folder, and who may work in which."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_opt.run_folder.status import FINISHED_STATES, STALE_S, is_elsewhere, owner_is_gone, read_status

log = logging.getLogger("lightning_opt.run_folder")

# What may differ between two tries at the same run: it changes no result.
_NOT_IDENTITY = (
    "resume_allow",
    "name",
    "logger",
    "on_failure",
    "jobs_per_device",
    "callbacks.checkpoint",
    "data.num_workers",
    "data.cache_dir",
    "trainer.log_every_n_steps",
)

# As `write_text` and the model's export call what they rename into place.
_BESIDE = re.compile(r"\..+\.\d+\.(part|tmp|old)")


_LOOK_S = 1.0  # between two looks at another host's heartbeat


class FolderRefused(ValueError):
    """The folder that the user named cannot be used; ``str()`` says what would be right."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: every path in it by name."""

    path: Path

    config = property(lambda self: self.path / "config.yaml", doc="What was asked, without secrets.")
    overrides = property(lambda self: self.path / "overrides.txt", doc="The command line's overrides, one a line.")
    env = property(lambda self: self.path / "env.json", doc="Versions, device, commit.")
    plan = property(lambda self: self.path / "plan.json", doc="What the run will do, known before its first step.")
    status = property(lambda self: self.path / "status.json", doc="State, step, reason, owner.")
    metrics = property(lambda self: self.path / "metrics.csv", doc="One row per logged step.")
    events = property(lambda self: self.path / "events.jsonl", doc="What happened once.")
    expert_load = property(lambda self: self.path / "expert_load.npz", doc="Tokens per expert over the run.")
    checkpoints = property(lambda self: self.path / "checkpoints", doc="Folder of checkpoints.")
    model = property(lambda self: self.path / "model", doc="The trained model in Hugging Face format.")
    evaluation = property(lambda self: self.path / "evaluation", doc="Folder of downstream scores.")
    results = property(lambda self: self.path / "evaluation" / "results.json", doc="lm-eval's own format.")
    summary = property(lambda self: self.path / "summary.json", doc="The run in one object.")
    report_html = property(lambda self: self.path / "report.html", doc="The report as a page.")
    report_md = property(lambda self: self.path / "report.md", doc="The report as Markdown.")
    model_card = property(lambda self: self.path / "MODEL_CARD.md", doc="The model card.")
    log = property(lambda self: self.path / "run.log", doc="Everything that was said.")
    profile = property(lambda self: self.path / "profile", doc="Profiler output (debug=profile).")


def config_hash(config: dict[str, Any]) -> str:
    """Identity of a resolved configuration: 8 hex digits of the SHA-256 of its canonical JSON.

    Args:
        config: the plain dict that the job gets; the run's name, loggers, a sweep's policy, when checkpoints are
            written, loader processes, the cache and the logging interval do not count, nor does ``resume`` unless it
            is a path: a run that starts from a checkpoint is another.
    """
    start = config.get("resume")
    start = {"resume": os.path.normpath(start)} if starts_elsewhere(start) else {}
    counted = {key: value for key, value in config.items() if key != "resume"} | start
    text = json.dumps(_identity(counted), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def starts_elsewhere(resume: str | None) -> bool:
    """Whether ``resume`` is a path."""
    return resume not in (None, "auto", "never")


def _identity(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _identity(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in _NOT_IDENTITY
    }


def claim(
    root: Path, name: str, hash: str, *, resume: str = "auto", path: Path | None = None, grows: bool = False
) -> tuple[RunFolder, bool]:
    """Claims a new run folder, or adopts an unfinished one of the same configuration whose owner is gone.

    An owner on another host, which a host that broke down leaves behind too, is waited for until its heartbeat moves:
    if it does not in two minutes, it is gone.

    Args:
        root: the folder of all runs; the new folder is ``root/name/<UTC time>-<hash>``.
        name: the run's name.
        hash: `config_hash` of the configuration.
        resume: ``never`` always makes a new folder, all else adopts the newest unfinished one of the same hash.
        path: the folder itself (the user named it); ``root`` and ``name`` are then ignored.
        grows: the folder is a sweep's: taken up again also when it is finished, and if named, under another hash.

    Returns:
        The folder, which exists, and whether it was adopted.

    Raises:
        FolderRefused: the named folder belongs to another configuration, a finished run, or a run in progress.
    """
    gone = _gone_elsewhere(root, name, hash, path) if resume != "never" else []
    if path is not None:
        return _claim_named(path, hash, resume, grows, gone)
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(parent):
        if resume != "never" and (unfinished := adoptable(root, name, hash, grows=grows, gone=gone)):
            return _own(unfinished.path, hash), True
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        for attempt in range(1000):
            folder = parent / (f"{stamp}-{hash}" if attempt == 0 else f"{stamp}-{hash}-{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return _own(folder, hash), False
    raise RuntimeError(f"no free run folder below {parent}")


def adoptable(
    root: Path,
    name: str,
    hash: str,
    *,
    path: Path | None = None,
    grows: bool = False,
    gone: Sequence[dict[str, Any]] = (),
) -> RunFolder | None:
    """The folder that `claim` with the same arguments would adopt, if any; nothing is touched.

    Args:
        root: as for `claim`.
        name: as for `claim`.
        hash: as for `claim`.
        path: as for `claim`.
        grows: as for `claim`.
        gone: owners that are known to be gone.
    """
    for candidate in _candidates(root, name, hash, path):
        status = read_status(candidate / "status.json")
        if not status or not _is_gone(status, gone) or (path is not None and status.get("config_hash") != hash):
            continue
        if grows or status.get("state") not in FINISHED_STATES:
            return RunFolder(candidate)
    return None


def _candidates(root: Path, name: str, hash: str, path: Path | None) -> list[Path]:
    return sorted((root / name).glob(f"*-{hash}*"), reverse=True) if path is None else [path]


def _is_gone(status: dict[str, Any], gone: Sequence[dict[str, Any]]) -> bool:
    return owner_is_gone(status) or status.get("owner") in gone


def _gone_elsewhere(root: Path, name: str, hash: str, path: Path | None) -> list[dict[str, Any]]:
    """Owners on other hosts that gave no sign of life while we looked, each with its last heartbeat.

    Two beats missed do not make one dead: a beat may be late by a minute (a compiler at work, a full disk, what a
    network file system remembers), and two owners in one folder cost more than the wait.
    """
    gone = []
    for folder in _candidates(root, name, hash, path):
        status = read_status(folder / "status.json")
        if not owner_is_gone(status) and is_elsewhere(status) and not _beats(folder, status):
            gone.append(status["owner"])
    return gone


def _beats(folder: Path, status: dict[str, Any]) -> bool:
    """Whether an owner on another host lives; how old its heartbeat is says nothing: their clock may not be ours."""
    owner = status["owner"]
    log.warning("%s: is %s alive? Looking for its heartbeat, up to %.0f s", folder, _owner(status), STALE_S)
    end = time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        now = read_status(folder / "status.json")
        if now.get("owner") != owner:
            said = "it has ended" if owner_is_gone(now) else "it is, and keeps its folder"
            log.warning("%s: %s", folder, said)
            return True
    log.warning("%s: it is not, so this command goes on there", folder)
    return False


def _claim_named(
    path: Path, hash: str, resume: str, grows: bool, gone: Sequence[dict[str, Any]]
) -> tuple[RunFolder, bool]:
    path.mkdir(parents=True, exist_ok=True)
    kind = "sweep" if grows or (path / "sweep.json").exists() else "run"
    with _one_at_a_time(path):
        status = read_status(path / "status.json")
        if not status:
            if any(item.name != ".claim" for item in path.iterdir()):
                raise FolderRefused("an empty or new folder: this one holds other files")
            return _own(path, hash), False
        if not _is_gone(status, gone):
            raise FolderRefused(f"another folder: a {kind} is in progress there ({_owner(status)})")
        if resume == "never":
            raise FolderRefused(f"a new folder: resume=never starts anew, and this one holds a {kind}")
        if status.get("config_hash") != hash and not grows:
            raise FolderRefused(f"a new folder: this one holds a {kind} of another configuration")
        if status.get("state") in FINISHED_STATES and not grows:
            raise FolderRefused(f"a new folder: this run is already {status['state']}")
        return _own(path, hash), True


def _owner(status: dict[str, Any]) -> str:
    owner = status.get("owner", {})
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _own(path: Path, hash: str) -> RunFolder:
    """Writes our name into the folder while the lock is held, so that a second process sees it taken.

    What the one before was killed over while it wrote it is cleared away; its checkpoints see to themselves.
    """
    from lightning_opt.run_folder.status import Status

    for beside in (*path.glob(".*"), *path.glob("evaluation/.*")):
        if _BESIDE.fullmatch(beside.name):
            shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
    before = read_status(path / "status.json")
    status = Status(path / "status.json", hash)
    status.step = int(before.get("step", 0))
    status.write()
    return RunFolder(path)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder for the moment of claiming; the kernel lets go of it when the process dies."""
    import fcntl

    with (folder / ".claim").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
